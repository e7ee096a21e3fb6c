"""Load on a server, and whether it still answers right: every answer under load is compared with
the answer to the same text alone."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from convbert_deploy.engine import Engine
from convbert_deploy.errors import ConvBertDeployError, InputError
from convbert_deploy.report_table import text_table
from convbert_deploy.serving.client import (
    METRICS_PORT,
    Client,
    NoAnswerError,
    connected,
    host_of,
    largest_difference,
    metric,
    metrics_page,
)

Progress = Callable[[str], None]
Answer = dict[str, Any]

_MESSAGE_CHARACTERS = 160


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """concurrency: client threads, level after level. requests: of each level. timeout: seconds
    that an answer may take. tolerance: largest difference of a number in an answer to the same
    text's alone; everything else must be equal. grpc: instead of HTTP. metrics: address of the
    server's metrics, None is port 8002 of its host. seed: of the order of the texts."""

    concurrency: tuple[int, ...] = (1, 4, 8)
    requests: int = 1000
    timeout: float = 30.0
    tolerance: float = 1e-6
    grpc: bool = False
    metrics: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.concurrency or min(self.concurrency) < 1:
            raise InputError(f"concurrency {self.concurrency}: expected 1 or more")
        if self.requests < 1:
            raise InputError(f"requests is {self.requests}, expected at least 1")
        if not self.timeout > 0 or not self.tolerance >= 0:
            raise InputError(
                f"timeout {self.timeout}, tolerance {self.tolerance}: expected more than 0 seconds "
                "and a tolerance of 0 or more"
            )


@dataclasses.dataclass(frozen=True)
class LoadLevel:
    """One level of concurrency. different: answers outside the tolerance; max_abs: the largest
    difference, infinity where more than a number differs. latencies_ms: of each answer. seconds:
    of all. errors: how many of each message. mean_batch: rows in an execution of the engine, by the
    server's own count; None without its metrics."""

    concurrency: int
    latencies_ms: tuple[float, ...]
    seconds: float
    different: int
    max_abs: float
    errors: dict[str, int]
    mean_batch: float | None

    @property
    def requests(self) -> int:
        return len(self.latencies_ms) + sum(self.errors.values())

    @property
    def per_second(self) -> float:
        """Right answers and others, errors not."""
        return len(self.latencies_ms) / self.seconds

    def percentile_ms(self, percent: float) -> float:
        """NaN where nothing was answered."""
        return float(np.percentile(self.latencies_ms, percent)) if self.latencies_ms else math.nan

    def to_json(self) -> dict[str, Any]:
        """Strict JSON: what is no number is null."""
        values = {
            "concurrency": self.concurrency,
            "requests": self.requests,
            "seconds": self.seconds,
            "per_second": self.per_second,
            **{f"p{percent}_ms": self.percentile_ms(percent) for percent in (50, 90, 99)},
            "different": self.different,
            "max_abs": self.max_abs,
            "errors": self.errors,
            "mean_batch": self.mean_batch,
        }
        return {key: _strict(value) for key, value in values.items()}


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """reference: where the answers that are compared with come from. texts: distinct ones.
    refused: how many of them got an error alone, by message; they are not sent again."""

    model: str
    reference: str
    texts: int
    refused: dict[str, int]
    levels: tuple[LoadLevel, ...]

    @property
    def passed(self) -> bool:
        """Every request was answered, and as alone."""
        failed = any(level.errors or level.different for level in self.levels)
        return not failed and not self.refused

    def to_json(self) -> dict[str, Any]:
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return data | {
            "passed": self.passed,
            "levels": [level.to_json() for level in self.levels],
        }

    def to_text(self) -> str:
        headers = ("threads", "requests", "errors", "different", "max abs")
        headers += ("p50 ms", "p90 ms", "p99 ms", "per s", "rows a batch")
        rows = [
            (
                str(level.concurrency),
                str(level.requests),
                str(sum(level.errors.values())),
                str(level.different),
                f"{level.max_abs:.1e}",
                *(f"{level.percentile_ms(percent):.1f}" for percent in (50, 90, 99)),
                f"{level.per_second:.0f}",
                "-" if level.mean_batch is None else f"{level.mean_batch:.2f}",
            )
            for level in self.levels
        ]
        lines = [f"{self.model}, {self.texts} texts, compared with {self.reference}"]
        lines += [text_table(headers, rows, left=0)]
        failures = Counter(self.refused)
        for level in self.levels:
            failures.update(level.errors)
        lines += [f"{count} x {message}" for message, count in failures.most_common()]
        lines.append("passed" if self.passed else "FAILED")
        return "\n".join(lines)


def load(
    url: str,
    model: str,
    requests: Sequence[str],
    options: LoadOptions | None = None,
    *,
    engine: Engine | None = None,
    progress: Progress = lambda _: None,
) -> LoadReport:
    """Ask the text model ``model`` at ``url`` from several threads at a time.

    requests: JSON objects of the task's form, or plain texts; each is sent alone first, or with
    ``engine`` answered here alone, and then again and again in mixed order.

    Raises:
        InputError: no requests, or ``url`` is none.
        NoAnswerError: the server does not answer even one client, or ``options.metrics`` holds no
            metrics of the model.
        MissingDependencyError: gRPC without tritonclient.
    """
    options = options or LoadOptions()
    texts = list(dict.fromkeys(requests))
    if not texts:
        raise InputError("there is no text to send", hint="one a line, plain or JSON")
    progress(f"{len(texts)} texts, each alone")
    if engine is None:
        with connected(url, grpc=options.grpc, timeout=options.timeout) as client:
            alone = {text: _answer_or_error(client, model, text) for text in texts}
    else:
        alone = dict(zip(texts, _answers_here(engine, texts), strict=True))
    refused = Counter(answer for answer in alone.values() if isinstance(answer, str))
    expected = {text: answer for text, answer in alone.items() if isinstance(answer, dict)}
    levels = []
    for concurrency in options.concurrency if expected else ():
        progress(f"{options.requests} requests from {concurrency} threads")
        levels.append(_Level(url, model, expected, options, concurrency).run())
    reference = "the same text alone" if engine is None else f"{engine.path.name} here, alone"
    return LoadReport(model, reference, len(texts), dict(refused), tuple(levels))


def read_requests(file: pathlib.Path) -> list[str]:
    """The lines of a file that are not empty. Raises InputError."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8: {error}") from error
    return [line for line in lines if line.strip()]


class _Level:
    """Threads that take the next request until there is none."""

    def __init__(
        self,
        url: str,
        model: str,
        expected: dict[str, Answer],
        options: LoadOptions,
        concurrency: int,
    ) -> None:
        self._url, self._model, self._expected = url, model, expected
        self._options, self._concurrency = options, concurrency
        self._lock = threading.Lock()
        self._queue = _mixed(list(expected), options.requests, options.seed + concurrency)
        self._latencies: list[float] = []
        self._errors: Counter[str] = Counter()
        self._different, self._max_abs = 0, 0.0
        self._bugs: list[BaseException] = []

    def run(self) -> LoadLevel:
        before = self._executed()
        started = time.perf_counter()
        threads = [
            threading.Thread(target=self._work, daemon=True) for _ in range(self._concurrency)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - started
        if self._bugs:
            raise self._bugs[0]
        return LoadLevel(
            self._concurrency,
            tuple(self._latencies),
            seconds,
            self._different,
            self._max_abs,
            dict(self._errors),
            _mean_batch(before, self._executed()),
        )

    def _work(self) -> None:
        try:
            with connected(
                self._url, grpc=self._options.grpc, timeout=self._options.timeout
            ) as client:
                while (text := self._next()) is not None:
                    self._ask(client, text)
        except BaseException as error:  # shown by the thread that waits
            self._bugs.append(error)

    def _next(self) -> str | None:
        with self._lock:
            return next(self._queue, None)

    def _ask(self, client: Client, text: str) -> None:
        started = time.perf_counter()
        answer = _answer_or_error(client, self._model, text, unreachable=str)
        latency = 1e3 * (time.perf_counter() - started)
        with self._lock:
            if isinstance(answer, str):
                self._errors[answer] += 1
                return
            self._latencies.append(latency)
            difference = largest_difference(self._expected[text], answer)
            self._different += not difference <= self._options.tolerance
            self._max_abs = max(self._max_abs, difference)

    def _executed(self) -> tuple[float, float] | None:
        """(rows, executions) of the tensor model so far; None without metrics."""
        url = self._options.metrics or f"{host_of(self._url)}:{METRICS_PORT}"
        try:
            page = metrics_page(url, self._options.timeout)
            model = f"{self._model}_engine"
            return (
                metric(page, "nv_inference_count", model=model),
                metric(page, "nv_inference_exec_count", model=model),
            )
        except (NoAnswerError, KeyError) as error:
            if self._options.metrics is None:
                return None
            if isinstance(error, KeyError):
                raise NoAnswerError(f"{url} has no metric {error.args[0]}") from error
            raise


def _answer_or_error(
    client: Client,
    model: str,
    text: str,
    unreachable: Callable[[NoAnswerError], str] | None = None,
) -> Answer | str:
    """The answer, or the message of a request that failed. unreachable: makes a message of a server
    that does not answer; None raises."""
    try:
        return client.ask(model, text)
    except NoAnswerError as error:
        if unreachable is None:
            raise
        return unreachable(error)[:_MESSAGE_CHARACTERS]
    except ConvBertDeployError as error:
        return str(error)[:_MESSAGE_CHARACTERS]


def _answers_here(engine: Engine, texts: Sequence[str]) -> Iterator[Answer | str]:
    from convbert_deploy.serving.answering import open_scorer, request_of_line

    with open_scorer(engine) as scorer:
        for text in texts:
            (answer,) = scorer.score([request_of_line(scorer.options, text)])
            # as it comes over the wire
            yield str(answer["error"]) if "error" in answer else json.loads(json.dumps(answer))


def _mixed(texts: list[str], count: int, seed: int) -> Iterator[str]:
    """``count`` texts: every one as often as the others, in a new order each time."""
    order = random.Random(seed)
    sent = 0
    while sent < count:
        order.shuffle(texts)
        yield from texts[: count - sent]
        sent += len(texts)


def _mean_batch(
    before: tuple[float, float] | None, after: tuple[float, float] | None
) -> float | None:
    if before is None or after is None or after[1] <= before[1]:
        return None
    return (after[0] - before[0]) / (after[1] - before[1])


def _strict(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
