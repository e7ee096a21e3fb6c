"""Requests to answers: tokenize, validate, group by length, run, decode.

The only scoring path: ``run``, bulk jobs, servers and tests go through here. A request that cannot
be scored answers for itself and never fails its batch-mates.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from convbert_deploy.architecture import Task
from convbert_deploy.backends.base import Batch, Runner
from convbert_deploy.errors import ConvBertDeployError, EngineError, InputError
from convbert_deploy.serving import decode, sequences
from convbert_deploy.serving.batches import BatchBudget, batches_of
from convbert_deploy.serving.decode import Answer
from convbert_deploy.serving.requests import (
    ChoiceRequest,
    InputLimits,
    QuestionRequest,
    Request,
    WordsRequest,
    characters_of,
    check_choices,
    checked_request,
    request_from_json,
    validated_batch,
)
from convbert_deploy.serving.tokenizer import Pieces, Tokenizer
from convbert_deploy.shapes import ShapeProfile

_AT_LEAST_ONE = ("length_multiple", "max_windows", "max_characters", "top_k", "max_answer_tokens")


@dataclasses.dataclass(frozen=True)
class ScorerOptions:
    """What the engine computes and how requests are put into batches.

    limits: the model's bounds, and its task. labels: the classifier's rows, in order.
    problem_type: the config's; None is single-label classification.
    profile: shapes the engine takes; its largest batch is the batch size here.
    padding: ``hf`` engines answer differently when padded, so only texts of one length share a
        batch; ``masked`` engines do not: texts of like length share one, padded up to a multiple of
        ``length_multiple``.
    batch_tokens: a batch's rows times its longest row at most; None is what the profile tunes for
        (its largest batch times its optimal length).
    long_text: ``fit`` cuts texts of more tokens than the model has positions (the answer says
        ``truncated``) and puts windows over contexts and sentences; ``refuse`` is an error.
    window_overlap: tokens that neighbouring windows share. max_windows: a request that would take
        more is refused (a question that fills the sequence leaves windows of a few tokens each, so
        that one text would cost thousands).
    max_characters: longer requests are refused before they are tokenized.
    top_k: fillings a mask, answers a question. max_answer_tokens: longest span.
    """

    limits: InputLimits
    labels: tuple[str, ...] = ()
    problem_type: str | None = None
    profile: ShapeProfile = dataclasses.field(default_factory=ShapeProfile)
    padding: Literal["hf", "masked"] = "hf"
    length_multiple: int = 16
    batch_tokens: int | None = None
    long_text: Literal["fit", "refuse"] = "fit"
    window_overlap: int = 128
    max_windows: int = 1024
    max_characters: int = 200_000
    top_k: int = 5
    max_answer_tokens: int = 30

    def __post_init__(self) -> None:
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.window_overlap < 0:
            raise InputError(f"window_overlap is {self.window_overlap}, expected at least 0")
        if self.padding not in ("hf", "masked") or self.long_text not in ("fit", "refuse"):
            raise InputError(
                f"padding {self.padding!r}, long_text {self.long_text!r}: expected hf or masked, "
                "fit or refuse"
            )
        if len(set(self.labels)) != len(self.labels):
            raise InputError(f"labels are not unique: {', '.join(self.labels)}")

    @property
    def task(self) -> Task:
        return self.limits.task

    @property
    def max_length(self) -> int:
        """Tokens a sequence may have."""
        return min(self.limits.max_positions, self.profile.seq.max)

    @property
    def batch_budget(self) -> BatchBudget:
        tokens = self.batch_tokens
        if tokens is None:
            tokens = self.profile.batch.max * self.profile.seq.opt
        return BatchBudget(self.profile.batch.max, tokens)

    def padded_length(self, length: int) -> int:
        """Length of the batch that a sequence of ``length`` tokens is run in."""
        if self.padding == "masked":
            length = -(-length // self.length_multiple) * self.length_multiple
        return min(max(length, self.profile.seq.min), self.max_length)


@dataclasses.dataclass
class _Work:
    """A request on its way. rows: the windows of its text, or its choices, which run together."""

    request: Request
    pieces: Pieces
    rows: list[sequences.Sequence]
    truncated: bool
    outputs: list[dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class _Unit:
    """One row of a batch: inputs of shape (seq,) or (choices, seq), already padded."""

    work: _Work
    index: int
    inputs: Batch

    @property
    def length(self) -> int:
        """Positions, pads included."""
        return self.inputs["input_ids"].shape[-1]


class Scorer:
    """Answers requests with one runner and one tokenizer.

    Threads may share a scorer; the runner computes for one at a time. The runner must have been
    entered; ``encode`` needs none.

    Raises:
        EngineError: from ``score``, when the runner's outputs do not fit task and labels, or there
            is no runner.
    """

    def __init__(self, runner: Runner | None, tokenizer: Tokenizer, options: ScorerOptions) -> None:
        self._runner, self._tokenizer, self.options = runner, tokenizer, options
        self._lock = threading.Lock()
        if options.task is Task.MASKED_LM and tokenizer.mask_id is None:
            raise InputError(f"the tokenizer has no {tokenizer.mask_token}, which masked-lm fills")

    def score(self, requests: Sequence[Request | ConvBertDeployError]) -> list[Answer]:
        """One JSON-able dict a request, in order; see ``decode`` for each task's keys.

        Every answer has ``tokens_scored``, and ``truncated`` where text was cut off. A request that
        cannot be scored gives ``{"error": ..., "hint": ...}``; so does an error put in its place.
        """
        return [answer for answer, _ in self.score_with_outputs(requests)]

    def score_with_outputs(
        self, requests: Sequence[Request | ConvBertDeployError]
    ) -> list[tuple[Answer, list[dict[str, np.ndarray]]]]:
        """Each request's answer, and the float32 outputs it was decoded from, by name, row by row.

        A row is a window; all choices are one row. Shapes: (labels,) or (choices,); (masks,
        vocabulary), masks in text order; else (tokens, ...), [CLS] and [SEP] included, no pads.
        A request that was refused has no rows; outputs that hold NaN or infinity are here, beside
        the answer that says so.
        """
        works: list[_Work | ConvBertDeployError] = []
        units: list[_Unit] = []
        for request in requests:
            try:
                if isinstance(request, ConvBertDeployError):
                    raise request
                work = self._prepare(request)
                units.extend(self._units(work))
                works.append(work)
            except ConvBertDeployError as error:
                works.append(error)
        self._run(units)
        return [
            (self._answer(work), work.outputs if isinstance(work, _Work) else []) for work in works
        ]

    def encode(self, request: Request) -> list[dict[str, np.ndarray]]:
        """The inputs that ``score`` runs for a request, a dict for each row, without running them.

        int64 arrays of shape (seq,), or (choices, seq), padded to the length they are run at.

        Raises:
            InputError: the request cannot be scored.
        """
        return [dict(unit.inputs) for unit in self._units(self._prepare(request))]

    def score_json(self, objects: Iterable[Any]) -> list[Answer]:
        """The same for parsed JSON objects, of the forms in ``requests``."""
        requests: list[Request | ConvBertDeployError] = []
        for obj in objects:
            try:
                requests.append(request_from_json(self.options.task, obj))
            except InputError as error:
                requests.append(error)
        return self.score(requests)

    def _prepare(self, request: Request) -> _Work:
        options, tokenizer = self.options, self._tokenizer
        checked_request(options.task, request)
        size = characters_of(request)
        if size > options.max_characters:
            raise InputError(f"{size} characters, expected at most {options.max_characters}")
        length = options.max_length
        truncated = False
        if isinstance(request, ChoiceRequest):
            check_choices(request, options.profile)
            pieces = self._pieces("prompt", request.prompt)
            pairs = [(pieces, self._pieces("a choice", choice)) for choice in request.choices]
            fitted = [sequences.cut(tokenizer, first, second, length) for first, second in pairs]
            rows, truncated = [row for row, _ in fitted], any(lost for _, lost in fitted)
        elif isinstance(request, QuestionRequest):
            question = self._pieces("question", request.question)
            pieces = self._pieces("context", request.context)
            rows = self._windows(question, pieces)
        elif options.task is Task.TOKEN_CLASSIFICATION:
            pieces = (
                self._pieces("words", request.words)
                if isinstance(request, WordsRequest)
                else self._pieces("text", request.text)
            )
            rows = self._windows(None, pieces)
        else:
            pieces = self._pieces("text", request.text)
            pair = (
                None if request.text_pair is None else self._pieces("text_pair", request.text_pair)
            )
            row, truncated = sequences.cut(tokenizer, pieces, pair, length)
            rows = [row]
            self._check_masks(pieces, row)
        windowed = options.task is not Task.MULTIPLE_CHOICE and len(rows) > 1
        if options.long_text == "refuse" and (truncated or windowed):
            raise InputError(
                f"more than the {length} tokens that fit one sequence",
                hint="shorten the text, or set long_text to fit",
            )
        return _Work(request, pieces, rows, truncated, [{} for _ in rows])

    def _windows(self, question: Pieces | None, text: Pieces) -> list[sequences.Sequence]:
        length, overlap = self.options.max_length, self.options.window_overlap
        return sequences.windows(
            self._tokenizer, question, text, length, overlap, most=self.options.max_windows
        )

    def _pieces(self, name: str, text: str | tuple[str, ...]) -> Pieces:
        split = self._tokenizer.pieces if isinstance(text, str) else self._tokenizer.pieces_of_words
        pieces = sequences.with_whole_characters(split(text))
        if not len(pieces):
            raise InputError(f"{name} holds no token: only invisible characters")
        return pieces

    def _check_masks(self, pieces: Pieces, row: sequences.Sequence) -> None:
        if self.options.task is not Task.MASKED_LM:
            return
        mask_id, name = self._tokenizer.mask_id, self._tokenizer.mask_token
        if mask_id not in pieces.ids:
            raise InputError(f"text has no {name} to fill")
        if pieces.ids.count(mask_id) != row.ids.count(mask_id):
            raise InputError(f"a {name} lies behind the {len(row)} tokens that the model can read")

    def _units(self, work: _Work) -> list[_Unit]:
        """The request's rows, padded and checked each on its own."""
        options = self.options
        together = options.task is Task.MULTIPLE_CHOICE
        groups = [work.rows] if together else [[row] for row in work.rows]
        units = []
        for index, rows in enumerate(groups):
            length = options.padded_length(max(len(row) for row in rows))
            ids = np.full((len(rows), length), self._tokenizer.pad_id, np.int64)
            mask, types = np.zeros_like(ids), np.zeros_like(ids)
            for i, row in enumerate(rows):
                ids[i, : len(row)], mask[i, : len(row)] = row.ids, 1
                types[i, : len(row)] = row.types
            batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
            if together:
                batch = {name: array[None] for name, array in batch.items()}
            checked = validated_batch(batch, options.limits)
            units.append(_Unit(work, index, {name: array[0] for name, array in checked.items()}))
        return units

    def _run(self, units: list[_Unit]) -> None:
        """Rows of one number of choices share batches; under ``hf`` of one length too."""
        if units and self._runner is None:
            raise EngineError("this Scorer has no runner: it encodes requests and scores none")
        same_length = self.options.padding == "hf"
        groups: dict[tuple[int, ...], list[_Unit]] = {}
        for unit in units:
            shape = unit.inputs["input_ids"].shape
            groups.setdefault(shape if same_length else shape[:-1], []).append(unit)
        for group in groups.values():
            for rows in batches_of([unit.length for unit in group], self.options.batch_budget):
                self._run_batch([group[row] for row in rows])

    def _run_batch(self, units: list[_Unit]) -> None:
        # An engine with a smallest batch gets the last row again; those answers are dropped.
        spare = max(0, self.options.profile.batch.min - len(units))
        filled = units + units[-1:] * spare
        length = max(unit.length for unit in filled)
        batch = {
            name: np.stack([self._padded(unit.inputs[name], name, length) for unit in filled])
            for name in self._runner.input_names
        }
        with self._lock:
            outputs = self._runner.infer(batch)
        for name in self.options.task.output_names:
            found = outputs.get(name)
            expected = self._leading_shape(batch["input_ids"].shape)
            if found is None or found.shape[: len(expected)] != expected:
                shape = None if found is None else list(found.shape)
                raise EngineError(
                    f"{self._runner.name} gave {name} of shape {shape} for a batch of "
                    f"{len(filled)}: expected {list(expected)} first"
                )
            for row, unit in enumerate(units):
                unit.work.outputs[unit.index][name] = self._kept(found[row], unit)

    def _leading_shape(self, inputs: tuple[int, ...]) -> tuple[int, ...]:
        """First axes of every output for inputs of that shape: an output that is too short would be
        decoded as if its text ended there."""
        if self.options.task is Task.SEQUENCE_CLASSIFICATION:
            return inputs[:1]
        return inputs[:2]  # rows and tokens, or rows and choices

    def _padded(self, array: np.ndarray, name: str, length: int) -> np.ndarray:
        """``array`` (seq,) or (choices, seq) with pads up to ``length`` positions."""
        missing = length - array.shape[-1]
        pad = self._tokenizer.pad_id if name == "input_ids" else 0
        return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)], constant_values=pad)

    def _kept(self, output: np.ndarray, unit: _Unit) -> np.ndarray:
        """The part of one row's output that decoding reads: no pads, of a masked LM only the masks
        (all positions of 512 x 30,522 are 62 MB a text). A copy, so that the batch can be freed."""
        if self.options.task in (Task.SEQUENCE_CLASSIFICATION, Task.MULTIPLE_CHOICE):
            return output.copy()
        row = unit.work.rows[unit.index]
        if self.options.task is Task.MASKED_LM:
            return output[np.flatnonzero(np.asarray(row.ids) == self._tokenizer.mask_id)]
        return output[: len(row)].copy()

    def _answer(self, work: _Work | ConvBertDeployError) -> Answer:
        if isinstance(work, ConvBertDeployError):
            return {"error": str(work), "hint": work.hint}
        for outputs in work.outputs:
            for name, array in outputs.items():
                if not np.isfinite(array).all():
                    return {
                        "error": f"{self._runner.name} computed NaN or infinity in {name}",
                        "hint": "convbert-deploy verify ENGINE --against CHECKPOINT",
                    }
        answer = self._decode(work)
        answer["tokens_scored"] = sum(len(row) for row in work.rows)
        if work.truncated:
            answer["truncated"] = True
        return answer

    def _decode(self, work: _Work) -> Answer:
        task, options, request = self.options.task, self.options, work.request
        if task is Task.QUESTION_ANSWERING:
            spans = [(out["start_logits"], out["end_logits"]) for out in work.outputs]
            return decode.question_answering(
                work.rows,
                spans,
                work.pieces,
                top_k=options.top_k,
                max_answer_tokens=options.max_answer_tokens,
            )
        if task is Task.ENCODER:
            return decode.encoder(work.outputs[0]["last_hidden_state"])
        logits = [out["logits"] for out in work.outputs if out]
        if task is Task.MASKED_LM:
            return decode.masked_lm(logits[0], work.pieces, self._tokenizer, top_k=options.top_k)
        if task is Task.MULTIPLE_CHOICE:
            assert isinstance(request, ChoiceRequest)
            return decode.multiple_choice(logits[0], request.choices)
        labels = self._labels(logits[0].shape[-1])
        if task is Task.SEQUENCE_CLASSIFICATION:
            return decode.sequence_classification(logits[0], labels, options.problem_type)
        merged = decode.merged_windows(work.rows, logits, len(work.pieces))
        return decode.token_classification(merged, work.pieces, labels)

    def _labels(self, count: int) -> tuple[str, ...]:
        labels = self.options.labels or tuple(f"LABEL_{index}" for index in range(count))
        if len(labels) != count:
            raise EngineError(
                f"{self._runner.name} gave {count} logits, there are {len(labels)} labels"
            )
        return labels
