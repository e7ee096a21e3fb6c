"""Is the server's model alive and right? A golden request, and its values compared.

A server can say "ready" for ever after its model's process has died, and can answer 200 with an
empty tensor; only the values tell.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pathlib
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from convbert_deploy.engine import GOLDEN, MANIFEST
from convbert_deploy.errors import EngineError, InputError
from convbert_deploy.golden import GoldenRequest
from convbert_deploy.serving.client import (
    Client,
    NoAnswerError,
    RefusedError,
    connected,
    largest_difference,
)
from convbert_deploy.shapes import ShapeProfile, ShapeRange
from convbert_deploy.tolerances import tolerance_for

#: what ``package triton`` writes into the repository
REPOSITORY_MANIFEST = "convbert_manifest.json"


@dataclasses.dataclass(frozen=True)
class Expectation:
    """What a right answer is. model: the tensor model's name on the server; text_model: the one
    that takes text. allowed: largest absolute difference to the golden values. rows: fewest and
    most that a request to the model may have. text, text_answer: a request to the text model and
    the answer that the engine gave when it was packaged; None where it could not run there."""

    golden: GoldenRequest
    allowed: float
    rows: ShapeRange
    model: str | None = None
    text_model: str | None = None
    text: dict[str, Any] | None = None
    text_answer: dict[str, Any] | None = None

    @classmethod
    def of_engine(cls, folder: pathlib.Path) -> Expectation:
        """From an engine bundle. Its files are not hashed: a probe starts fast.

        Raises:
            EngineError: there is no manifest or golden request, or it is damaged.
        """
        file = folder / MANIFEST
        engine = _read(file)
        with _damage_named(file):
            golden = GoldenRequest.from_json(_read(folder / GOLDEN))
            tolerance = tolerance_for(engine["backend"], engine["precision"])
            rows = ShapeProfile.from_json(engine["profile"]).batch
        return cls(golden, tolerance.largest_abs(golden.scale()), rows)

    @classmethod
    def of_repository(cls, file: pathlib.Path) -> Expectation:
        """From the manifest in a model repository, or the folder that holds it.

        Raises:
            EngineError: there is none, or it is damaged.
        """
        file = file / REPOSITORY_MANIFEST if file.is_dir() else file
        manifest = _read(file)
        with _damage_named(file):
            words = manifest["golden_text"] or {"request": None, "answer": None}
            return cls(
                golden=GoldenRequest.from_json(manifest["golden"]),
                allowed=float(manifest["golden"]["max_abs"]),
                rows=ShapeProfile.from_json(manifest["profile"]).batch,
                model=manifest["engine_model"],
                text_model=manifest["text_model"],
                text=words["request"],
                text_answer=words["answer"],
            )

    def named(self, name: str | None) -> Expectation:
        """The same of the models that ``package triton --name NAME`` writes."""
        if name is None:
            return self
        return dataclasses.replace(self, model=f"{name}_engine", text_model=name)


@dataclasses.dataclass(frozen=True)
class ProbeOptions:
    """grpc: instead of HTTP. timeout: seconds for everything. text: send the golden request in
    words to the text model too, and compare its answer: numbers as the values above, the rest must
    be equal. Not for a liveness probe: where two labels are almost as likely, another CPU or GPU
    than the one that packaged may choose the other."""

    grpc: bool = False
    timeout: float = 5.0
    text: bool = False

    def __post_init__(self) -> None:
        if not self.timeout > 0:
            raise InputError(f"timeout is {self.timeout} s, expected more than 0")


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """passed: every value is right, in time. max_abs: largest difference to the golden values,
    infinity where there is none to compare. latency_ms, text_latency_ms: of the golden request and
    of the text, None without an answer. error: why it failed, None where it passed."""

    model: str
    passed: bool
    max_abs: float
    allowed: float
    latency_ms: float | None = None
    text_latency_ms: float | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Strict JSON: a difference that is no number is null."""
        data = dataclasses.asdict(self)
        return data | {"max_abs": self.max_abs if math.isfinite(self.max_abs) else None}

    def to_text(self) -> str:
        if not self.passed:
            return f"FAIL {self.model}: {self.error}"
        text = "" if self.text_latency_ms is None else f", text {self.text_latency_ms:.1f} ms"
        return (
            f"ok {self.model}: max abs difference {self.max_abs:.2g} (allowed {self.allowed:.2g}), "
            f"{self.latency_ms:.1f} ms{text}"
        )


def probe(url: str, expectation: Expectation, options: ProbeOptions | None = None) -> ProbeResult:
    """Send the golden request and compare what comes back, within ``options.timeout`` seconds.

    A server that is silent, refuses or answers wrongly is a result, not an exception.

    Raises:
        InputError: ``url`` is none, or no model is named.
        MissingDependencyError: gRPC without tritonclient.
    """
    options = options or ProbeOptions()
    if expectation.model is None:
        raise InputError(
            "which model of the server? an engine's manifest does not say",
            hint="name it with --model, or give the repository's --manifest",
        )
    if options.text and (expectation.text is None or expectation.text_answer is None):
        raise InputError(
            "there is no golden request in words to send",
            hint="a repository's manifest has one where the engine could run when it was packaged",
        )
    with connected(url, grpc=options.grpc, timeout=options.timeout) as client:
        asking = _Asking(client, expectation, options)
        asking.start()
        # Timeouts of a socket start again with each byte; this one does not.
        asking.join(options.timeout)
        return asking.result()


class _Asking(threading.Thread):
    """The requests, in a thread that can be left behind."""

    def __init__(self, client: Client, expectation: Expectation, options: ProbeOptions) -> None:
        super().__init__(daemon=True)
        self._client, self._expectation, self._options = client, expectation, options
        self._answered: ProbeResult | None = None
        self._bug: BaseException | None = None

    def run(self) -> None:
        try:
            self._answered = self._asked()
        except (NoAnswerError, RefusedError) as error:
            self._answered = self._failed(str(error))
        except BaseException as error:  # shown by the thread that waits
            self._bug = error

    def result(self) -> ProbeResult:
        if self._bug is not None:
            raise self._bug
        if self._answered is None:
            return self._failed(f"no answer within {self._options.timeout:g} s")
        return self._answered

    def _asked(self) -> ProbeResult:
        expected = self._expectation
        assert expected.model is not None
        started = time.perf_counter()
        outputs = expected.golden.answered(self._infer, expected.rows)
        latency = 1e3 * (time.perf_counter() - started)
        difference = expected.golden.max_abs_difference(outputs)
        result = ProbeResult(expected.model, True, difference, expected.allowed, latency)
        if not difference <= expected.allowed:
            error = _wrong(difference, expected.allowed, outputs)
            return dataclasses.replace(result, passed=False, error=error)
        return self._asked_in_words(result) if self._options.text else result

    def _infer(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = tuple(self._expectation.golden.outputs)
        return self._client.infer(str(self._expectation.model), batch, names)

    def _asked_in_words(self, result: ProbeResult) -> ProbeResult:
        expected = self._expectation
        assert expected.text_model is not None
        started = time.perf_counter()
        answer = self._client.ask(expected.text_model, json.dumps(expected.text))
        latency = 1e3 * (time.perf_counter() - started)
        result = dataclasses.replace(result, text_latency_ms=latency)
        difference = largest_difference(expected.text_answer, answer)
        if difference <= expected.allowed:
            return result
        error = f"{expected.text_model} answers {expected.text} wrongly: {answer}"
        return dataclasses.replace(result, passed=False, error=error)

    def _failed(self, error: str) -> ProbeResult:
        model = self._expectation.model or ""
        return ProbeResult(model, False, math.inf, self._expectation.allowed, error=error)


def _wrong(difference: float, allowed: float, outputs: Mapping[str, np.ndarray]) -> str:
    if math.isfinite(difference):
        return f"wrong values: max abs difference {difference:.3g}, allowed {allowed:.3g}"
    shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in outputs.items())
    return f"wrong values: outputs missing, not finite or of another shape ({shapes or 'none'})"


def _read(file: pathlib.Path) -> Any:
    try:
        return json.loads(file.read_text())
    except OSError as error:
        raise EngineError(
            f"cannot read {file}: {error.strerror}",
            hint="--manifest takes a repository's convbert_manifest.json, --engine a bundle",
        ) from error
    except ValueError as error:
        raise _damaged(file, error) from error


def _damaged(file: pathlib.Path, error: Exception) -> EngineError:
    return EngineError(
        f"{file} is damaged: {type(error).__name__}: {error}", hint="package the engine again"
    )


@contextlib.contextmanager
def _damage_named(file: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(file, error) from error
