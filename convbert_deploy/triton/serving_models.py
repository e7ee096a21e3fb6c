"""What the two Triton models do, apart from Triton: requests in, an answer or a failure for each.

A request that is at fault fails alone; a failure of the engine is not called the request's.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from convbert_deploy.architecture import Task
from convbert_deploy.backends.base import Batch, Runner
from convbert_deploy.engine import GOLDEN, MANIFEST, Engine, Manifest
from convbert_deploy.errors import ConvBertDeployError, EngineError, InputError
from convbert_deploy.golden import GoldenRequest
from convbert_deploy.serving.answering import engine_tokenizer, request_of_line, scorer_options
from convbert_deploy.serving.batches import batches_of
from convbert_deploy.serving.requests import INPUT_NAMES, Request, validated_batch
from convbert_deploy.serving.scorer import Scorer

Outputs = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Failure:
    """invalid: the request is at fault (HTTP 400); else the engine is (HTTP 500)."""

    message: str
    invalid: bool

    @classmethod
    def of(cls, error: Exception, *, invalid: bool) -> Failure:
        text = str(error) or type(error).__name__
        return cls(_with_hint(text, getattr(error, "hint", None)), invalid)


def described_engine(folder: pathlib.Path) -> Engine:
    """The engine whose manifest, golden request and tokenizer are in ``folder``; its model may be
    elsewhere, so this one cannot run.

    Raises:
        EngineError: a file is missing or damaged.
    """
    try:
        manifest = Manifest.from_json(json.loads((folder / MANIFEST).read_text()))
        golden = GoldenRequest.from_json(json.loads((folder / GOLDEN).read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(
            f"{folder} does not describe an engine: {error}",
            hint="convbert-deploy package triton ENGINE -o REPO writes the repository again",
        ) from error
    return Engine(folder, manifest, golden)


class EngineModel:
    """Token ids in, the engine's outputs out, for many requests at a time.

    runner: has been entered. It gets rows of like length together, padded on the right to the
    longest; under ``hf`` padding, where pads change answers, only rows of one length.
    """

    def __init__(self, runner: Runner, engine: Engine) -> None:
        self._runner, self._engine = runner, engine
        self._limits = engine.limits()
        self._budget = scorer_options(engine).batch_budget

    def answer(self, requests: Sequence[Batch]) -> list[Outputs | Failure]:
        """One dict of float32 outputs a request, or why it has none.

        requests: inputs by name, int64 of shape (rows, seq) or (rows, choices, seq); mask and token
        types may be left out. An output has as many rows and positions as its request.
        """
        answers: list[Outputs | Failure | None] = [None] * len(requests)
        rows: list[_Row] = []
        for number, request in enumerate(requests):
            try:
                rows += self._rows(number, request)
            except ConvBertDeployError as error:
                answers[number] = Failure.of(error, invalid=True)
        done: dict[int, list[Outputs]] = {}
        for batch in self._batches(rows):
            try:
                outputs = self._infer(batch)
            except Exception as error:  # whatever a runtime raises is an answer to these rows only
                for row in batch:
                    answers[row.request] = Failure.of(error, invalid=False)
                continue
            for place, row in enumerate(batch):
                done.setdefault(row.request, []).append(self._cut(outputs, place, row))
        # Rows of one request have one length, so they come back in their order.
        return [
            _stacked(done[number]) if answer is None else answer
            for number, answer in enumerate(answers)
        ]

    def _rows(self, number: int, request: Batch) -> list[_Row]:
        """Raises InputError and ShapeError for what the engine does not take."""
        checked = validated_batch(request, self._limits)
        axes, shape = self._engine.manifest.task.input_axes, checked["input_ids"].shape
        sizes = dict(zip(axes, shape, strict=True))
        # Rows of several requests share a batch, and too few are filled up.
        del sizes["batch"]
        self._engine.manifest.profile.check(sizes)
        return [
            _Row(number, {name: checked[name][row] for name in INPUT_NAMES})
            for row in range(shape[0])
        ]

    def _batches(self, rows: Sequence[_Row]) -> list[list[_Row]]:
        one_length = self._engine.manifest.padding == "hf"
        groups: dict[tuple[int, ...], list[_Row]] = {}
        for row in rows:
            groups.setdefault(row.shape if one_length else row.shape[:-1], []).append(row)
        return [
            [group[index] for index in indices]
            for group in groups.values()
            for indices in batches_of([row.shape[-1] for row in group], self._budget)
        ]

    def _infer(self, rows: Sequence[_Row]) -> Outputs:
        spare = max(0, self._engine.manifest.profile.batch.min - len(rows))
        filled = [*rows, *rows[-1:] * spare]
        length = max(row.shape[-1] for row in filled)
        pad_id = self._engine.manifest.architecture.pad_token_id
        batch = {}
        for name in INPUT_NAMES:
            value = pad_id if name == "input_ids" else 0
            batch[name] = np.stack([_padded(row.inputs[name], length, value) for row in filled])
        return self._runner.infer(batch)

    def _cut(self, outputs: Outputs, place: int, row: _Row) -> Outputs:
        task = self._engine.manifest.task
        pooled = task in (Task.SEQUENCE_CLASSIFICATION, Task.MULTIPLE_CHOICE)
        return {
            name: outputs[name][place] if pooled else outputs[name][place, : row.shape[-1]]
            for name in task.output_names
        }


class TextModel:
    """Requests in words in, the Scorer's answers out, for many requests at a time.

    infer: asks the engine: a batch in, outputs by name out; raises EngineError where it cannot.
    """

    def __init__(self, engine: Engine, infer: Callable[[Batch], Outputs]) -> None:
        self._task = engine.manifest.task
        runner = _CallingRunner(engine, infer)
        self._scorer = Scorer(runner, engine_tokenizer(engine), scorer_options(engine))

    def answer(self, requests: Sequence[Sequence[bytes]]) -> list[list[bytes] | Failure]:
        """Each request's answers, UTF-8 JSON, one for each of its elements; all of them are scored
        in one call. An element is a JSON object of the task's form, or plain text, in UTF-8. A
        request with one bad element fails as a whole, and names it if there are several."""
        read = [self._read(payload) for request in requests for payload in request]
        scored = iter(self._scored(read))
        return [_joined([next(scored) for _ in request]) for request in requests]

    def _read(self, payload: bytes) -> Request | ConvBertDeployError:
        try:
            text = payload.decode("utf-8")
        except UnicodeDecodeError as error:
            return InputError(
                f"the request is not UTF-8: byte 0x{payload[error.start]:02x} at {error.start}"
            )
        try:
            return request_of_line(self._scorer.options, text)
        except RecursionError:
            return InputError("the request is JSON nested too deeply")

    def _scored(
        self, requests: Sequence[Request | ConvBertDeployError]
    ) -> list[Mapping[str, object] | Failure]:
        try:
            return [
                _checked(answer, outputs)
                for answer, outputs in self._scorer.score_with_outputs(requests)
            ]
        except Exception as error:  # a failing engine must not end the model's process
            if len(requests) == 1:
                return [Failure.of(error, invalid=False)]
        # One of them may be what the engine failed on: each on its own.
        return [self._scored([request])[0] for request in requests]


@dataclasses.dataclass(frozen=True)
class _Row:
    """inputs: int64 of shape (seq,) or (choices, seq). request: the number of whose row it is."""

    request: int
    inputs: Batch

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inputs["input_ids"].shape


class _CallingRunner:
    """A Runner whose ``infer`` is the function given."""

    input_names = INPUT_NAMES

    def __init__(self, engine: Engine, infer: Callable[[Batch], Outputs]) -> None:
        self.name = engine.label
        self.output_names = engine.manifest.task.output_names
        self.infer = infer

    def __enter__(self) -> _CallingRunner:
        return self

    def __exit__(self, *exception: object) -> None:
        return None


def _padded(array: np.ndarray, length: int, value: int) -> np.ndarray:
    missing = length - array.shape[-1]
    widths = [(0, 0)] * (array.ndim - 1) + [(0, missing)]
    return np.pad(array, widths, constant_values=value)


def _stacked(rows: Sequence[Outputs]) -> Outputs:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _with_hint(text: str, hint: object) -> str:
    return f"{text} (hint: {hint})" if hint else text


def _checked(
    answer: Mapping[str, object], outputs: Sequence[Outputs]
) -> Mapping[str, object] | Failure:
    if "error" not in answer:
        return answer
    # What was refused never ran; an answer of NaN did.
    return Failure(_with_hint(str(answer["error"]), answer.get("hint")), invalid=not outputs)


def _joined(answers: Sequence[Mapping[str, object] | Failure]) -> list[bytes] | Failure:
    for number, answer in enumerate(answers):
        if isinstance(answer, Failure):
            place = f"element {number}: " if len(answers) > 1 else ""
            return Failure(place + answer.message, answer.invalid)
    return [json.dumps(answer, ensure_ascii=False).encode() for answer in answers]
