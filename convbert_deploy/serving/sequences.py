"""Word pieces to sequences a model takes: special tokens, cutting and windows.

``[CLS] first [SEP]`` or ``[CLS] first [SEP] second [SEP]`` with token types 0 and 1, as
transformers' ConvBERT tokenizer builds them. This is done here because the tokenizer library's own
truncation is state of the shared object: two threads would disturb each other.
"""

from __future__ import annotations

import dataclasses
import unicodedata

from convbert_deploy.errors import InputError
from convbert_deploy.serving.tokenizer import Pieces, Tokenizer

#: no combining mark of Unicode comes before it
_FIRST_MARK = "\u02ff"


@dataclasses.dataclass(frozen=True)
class Sequence:
    """One row of a batch before padding.

    The last text's pieces ``first`` to ``first + count - 1`` stand at positions ``start`` and on.
    """

    ids: tuple[int, ...]
    types: tuple[int, ...]
    start: int
    first: int
    count: int

    def __len__(self) -> int:
        return len(self.ids)


def with_whole_characters(pieces: Pieces) -> Pieces:
    """The same pieces, whose ends (and their words') include the combining marks that follow.

    A tokenizer that strips accents ends a piece before a mark of its last letter: without this, the
    answer ``caf\u00e9`` would read ``cafe`` where the text is in decomposed form, and many words of
    Indian scripts would lose their last vowel.
    """
    text, ends = pieces.text, {}
    for i, (_, end) in enumerate(pieces.offsets):
        bound = pieces.offsets[i + 1][0] if i + 1 < len(pieces) else len(text)
        stop = end
        while (
            stop < bound and text[stop] > _FIRST_MARK and unicodedata.category(text[stop])[0] == "M"
        ):
            stop += 1
        if stop > end:
            ends[i] = stop
    if not ends:
        return pieces
    offsets, spans = list(pieces.offsets), list(pieces.word_spans)
    for i, stop in ends.items():
        offsets[i] = (offsets[i][0], stop)
        word = pieces.words[i]
        spans[word] = (spans[word][0], max(spans[word][1], stop))
    return dataclasses.replace(pieces, offsets=tuple(offsets), word_spans=tuple(spans))


def cut(
    tokenizer: Tokenizer, first: Pieces, second: Pieces | None, length: int
) -> tuple[Sequence, bool]:
    """One sequence of at most ``length`` tokens, and whether pieces were lost.

    Pieces go from the end of the longer text (of the second when equal), transformers'
    ``longest_first``.

    Raises:
        InputError: ``length`` leaves no room for a piece of each text.
    """
    room = length - (2 if second is None else 3)
    texts = 1 if second is None else 2
    if room < texts:
        raise InputError(f"{length} positions have no room for {texts} texts and special tokens")
    keep = [len(first), 0 if second is None else len(second)]
    excess = sum(keep) - room
    if excess > 0:
        longer = 0 if keep[0] > keep[1] else 1
        alone = min(excess, abs(keep[0] - keep[1]))
        keep[longer] -= alone
        # From equal lengths on, one piece from each in turn, the second text first.
        rest = excess - alone
        keep[0] -= rest // 2
        keep[1] -= rest - rest // 2
    tail = None if second is None else second.ids[: keep[1]]
    return _join(tokenizer, first.ids[: keep[0]], tail, 0), excess > 0


def windows(
    tokenizer: Tokenizer,
    prefix: Pieces | None,
    text: Pieces,
    length: int,
    overlap: int,
    *,
    most: int | None = None,
) -> list[Sequence]:
    """Sequences of at most ``length`` tokens that together hold all of ``text``.

    Each repeats ``prefix`` (a question) whole; neighbours share ``overlap`` pieces, or half a
    window where that is less.

    Raises:
        InputError: the prefix leaves no room for two pieces of the text, or more than ``most``
            windows would be needed.
    """
    room = length - (2 if prefix is None else 3 + len(prefix))
    if room < min(2, len(text)):
        raise InputError(
            f"the question has {0 if prefix is None else len(prefix)} tokens, which leaves {room} "
            f"of {length} positions for the context",
            hint="shorten the question",
        )
    step = room - min(overlap, room // 2)
    count = 1 + max(0, -(-(len(text) - room) // step))
    if most is not None and count > most:
        raise InputError(
            f"{len(text)} tokens take {count} windows of {room}, expected at most {most}",
            hint="shorten the text" if prefix is None else "shorten the question or the context",
        )
    rows, first = [], 0
    while True:
        ids = text.ids[first : first + room]
        rows.append(
            _join(tokenizer, ids, None, first)
            if prefix is None
            else _join(tokenizer, prefix.ids, ids, first)
        )
        if first + room >= len(text):
            return rows
        first += step


def _join(
    tokenizer: Tokenizer, head: tuple[int, ...], tail: tuple[int, ...] | None, first: int
) -> Sequence:
    ids = (tokenizer.cls_id, *head, tokenizer.sep_id)
    types = (0,) * len(ids)
    if tail is None:
        return Sequence(ids, types, start=1, first=first, count=len(head))
    return Sequence(
        (*ids, *tail, tokenizer.sep_id),
        types + (1,) * (len(tail) + 1),
        start=len(ids),
        first=first,
        count=len(tail),
    )
