"""Text to word pieces with character offsets, with Hugging Face's ``tokenizers`` alone."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from convbert_deploy.errors import CheckpointError, MissingDependencyError

_HINT = "--tokenizer FOLDER names one that holds tokenizer.json or vocab.txt"
_SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Word pieces of one text, without the special tokens a model adds.

    ids, tokens, offsets and words are equally long. offsets: (start, end) characters of ``text``,
    end exclusive; where the caller split the words, ``text`` is those joined by single spaces.
    words: number of the word a piece belongs to; a word of invisible characters has no piece.
    word_spans: (start, end) characters of each word.
    """

    text: str
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    offsets: tuple[tuple[int, int], ...]
    words: tuple[int, ...]
    word_spans: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.ids)


class Tokenizer:
    """A checkpoint's tokenizer. Nothing in it changes after loading, so threads may share it.

    mask_id is None where the vocabulary has no mask token.
    """

    def __init__(self, backend: Any, special: Mapping[str, str], *, source: pathlib.Path) -> None:
        # Saved tokenizers often carry the truncation and padding of their training run.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        ids = {role: backend.token_to_id(token) for role, token in special.items()}
        for role in ("pad_token", "cls_token", "sep_token"):
            if ids[role] is None:
                raise CheckpointError(
                    f"tokenizer {source} has no {special[role]} in its vocabulary", hint=_HINT
                )
        self.pad_id: int = ids["pad_token"]
        self.cls_id: int = ids["cls_token"]
        self.sep_id: int = ids["sep_token"]
        self.mask_id: int | None = ids["mask_token"]
        self.mask_token = special["mask_token"]
        self.vocab_size: int = backend.get_vocab_size()

    @classmethod
    def load(cls, path: str | pathlib.Path) -> Tokenizer:
        """Read a folder (tokenizer.json, else vocab.txt), or one of those files itself.

        ``tokenizer_config.json`` beside it names the special tokens and, for vocab.txt, says
        whether to lower-case (default: yes, as BERT's uncased vocabulary).

        Raises:
            CheckpointError: no tokenizer there, unreadable, or without [CLS], [SEP] or [PAD].
            MissingDependencyError: ``tokenizers`` is not installed.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise MissingDependencyError(
                "tokenizers", needed_for="text input", extra="serve"
            ) from error
        path = pathlib.Path(path)
        names = [path] if path.is_file() else [path / "tokenizer.json", path / "vocab.txt"]
        source = next((name for name in names if name.is_file()), None)
        if source is None:
            raise CheckpointError(
                f"no tokenizer in {path}: expected tokenizer.json or vocab.txt", hint=_HINT
            )
        config = _read_config(source.parent)
        special = {role: _token_text(config.get(role), text) for role, text in _SPECIAL.items()}
        try:
            text = source.read_text(encoding="utf-8")
            if source.suffix == ".json":
                backend = tokenizers.Tokenizer.from_str(text)
            else:
                backend = _word_piece(text, config, special)
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise CheckpointError(
                f"tokenizer {source} is unreadable: {error}", hint=_HINT
            ) from error
        return cls(backend, special, source=source)

    def pieces(self, text: str) -> Pieces:
        """Split a text; words are those of the tokenizer (runs of letters, single punctuation)."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        words: list[int] = []
        spans: list[tuple[int, int]] = []
        previous: int | None = None
        for word, (start, end) in zip(encoding.word_ids, encoding.offsets, strict=True):
            if word is None or word != previous or not spans:
                spans.append((start, end))
            else:
                spans[-1] = (spans[-1][0], end)
            previous = word
            words.append(len(spans) - 1)
        return Pieces(
            text,
            tuple(encoding.ids),
            tuple(encoding.tokens),
            tuple(encoding.offsets),
            tuple(words),
            tuple(spans),
        )

    def pieces_of_words(self, words: Sequence[str]) -> Pieces:
        """Split each of the caller's words; pieces know their word's number in ``words``."""
        encoding = self._backend.encode(list(words), is_pretokenized=True, add_special_tokens=False)
        spans, start = [], 0
        for word in words:
            spans.append((start, start + len(word)))
            start += len(word) + 1
        offsets = tuple(
            (spans[word][0] + first, spans[word][0] + last)
            for word, (first, last) in zip(encoding.word_ids, encoding.offsets, strict=True)
        )
        return Pieces(
            " ".join(words),
            tuple(encoding.ids),
            tuple(encoding.tokens),
            offsets,
            tuple(encoding.word_ids),
            tuple(spans),
        )

    def token(self, token_id: int) -> str:
        """The vocabulary entry of an id; ``<id N>`` for table rows past the vocabulary."""
        return self._backend.id_to_token(token_id) or f"<id {token_id}>"


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = folder / name
        if file.is_file():
            try:
                config.update(json.loads(file.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:
                raise CheckpointError(f"{file} is unreadable: {error}", hint=_HINT) from error
    return config


def _token_text(value: Any, default: str) -> str:
    """Special tokens are written as a string or as an object with ``content``."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else default


def _word_piece(text: str, config: Mapping[str, Any], special: Mapping[str, str]) -> Any:
    """BERT's WordPiece from the lines of a vocab.txt: line number = id."""
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers

    lines = text.removesuffix("\n").split("\n")
    vocabulary = {line.rstrip("\r"): index for index, line in enumerate(lines)}
    if special["unk_token"] not in vocabulary:
        raise CheckpointError(f"no {special['unk_token']} in the vocabulary")
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=special["unk_token"]))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens([token for token in special.values() if token in vocabulary])
    return backend
