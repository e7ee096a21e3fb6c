"""The worker's loop: load one model, then answer the benchmark's questions until it hangs up.

=========== ======================================================================================
question    answer
=========== ======================================================================================
load        ``ready``: versions, arithmetic, load_ms, loaded_bytes, weights_bytes, notes; and
            convert_ms, the time of making the runtime's own file, in another process
prepare     ``prepared``: prepare_ms, notes, weights_bytes. Takes ``count`` batches (and a last one
            to answer where ``check``); whatever the runtime does once per shape happens here
run         ``ran``: ms, a list: of computing every batch once, ``count`` times; inputs and outputs
            on the host
answer      ``answered``: the outputs as arrays
finish      ``finished``: peak_bytes since ``prepare``; the batches are let go
call        ``called``: what the model's method of that name returns
=========== ======================================================================================

An exception is answered with ``error`` (kind, text, hint, and plain: the text was written for
people) and the loop goes on.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pathlib
import sys
import time
import traceback
from typing import Any, BinaryIO

import numpy as np

from .apart import run_apart
from .frames import read_frame, write_frame
from .refusal import CannotRun

#: What ``load`` may ask for, and the module whose ``load(settings)`` makes it.
LOADERS = {
    "engine": "engine",
    "eager": "torch_peers",
    "compile": "torch_peers",
    "ort": "ort_peer",
    "openvino": "openvino_peer",
    "optimum": "optimum_peer",
    "machine": "machine",
}

#: The turn passes to the next candidate when this process's threads used less than a tenth of a core
#: over a sample, or at the limit: thread pools spin for a while after their last task (ONNX Runtime's
#: 40 ms), and would take the next candidate's core. Linux adds a running thread's time to its process
#: at its ticks, up to 10 ms apart: a shorter sample sees nothing.
_QUIET_SAMPLE_S = 0.012
_QUIET_LIMIT_S = 0.25


def main() -> None:
    """Serve stdin/stdout. Anything that the libraries print goes to stderr instead."""
    questions = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    serve(questions, answers)


def serve(questions: BinaryIO, answers: BinaryIO) -> None:
    worker = Worker()
    while (frame := read_frame(questions)) is not None:
        header, arrays = frame
        try:
            answer, outputs = worker.answer(header, arrays)
        except Exception as error:  # any: the parent decides what it means
            traceback.print_exc(file=sys.stderr)
            answer, outputs = error_header(error), {}
        write_frame(answers, answer, outputs)


def error_header(error: Exception) -> dict[str, Any]:
    hint = getattr(error, "hint", None)
    return {
        "op": "error",
        "kind": type(error).__name__,
        "text": str(error) or type(error).__name__,
        "hint": hint,
        "plain": hint is not None or isinstance(error, CannotRun),
    }


class Worker:
    """One model and the case it is timed on."""

    def __init__(self) -> None:
        self._model: Any = None
        self._feeds: list[Any] = []
        self._check: Any = None

    def answer(
        self, header: dict[str, Any], arrays: dict[str, np.ndarray]
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return getattr(self, f"_{header['op']}")(header, arrays)

    def _load(self, header: dict[str, Any], _: dict[str, np.ndarray]) -> tuple[dict, dict]:
        pin(header.get("cores"))
        name = LOADERS[header["kind"]]
        module = importlib.import_module(f".{name}", __package__)
        start = time.perf_counter_ns()
        if hasattr(module, "convert"):
            run_apart(f"{name}:convert", header)
        convert_ms = (time.perf_counter_ns() - start) / 1e6
        start = time.perf_counter_ns()
        self._model = module.load(header)
        load_ms = (time.perf_counter_ns() - start) / 1e6
        return {
            "op": "ready",
            "convert_ms": convert_ms,
            "load_ms": load_ms,
            "loaded_bytes": peak_bytes(),
            "versions": self._model.versions,
            "arithmetic": self._model.arithmetic,
            "weights_bytes": self._model.weights_bytes,
            "notes": list(self._model.notes),
        }, {}

    def _prepare(self, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> tuple[dict, dict]:
        self._feeds, self._check = [], None
        reset_peak()
        batches = unpacked(arrays)
        start = time.perf_counter_ns()
        feeds = self._model.prepare(batches)
        prepare_ms = (time.perf_counter_ns() - start) / 1e6
        self._feeds = feeds[: header["count"]]
        self._check = feeds[-1] if header.get("check") else feeds[0]
        return {
            "op": "prepared",
            "prepare_ms": prepare_ms,
            "notes": list(self._model.notes),
            "weights_bytes": self._model.weights_bytes,
        }, {}

    def _run(self, header: dict[str, Any], _: dict[str, np.ndarray]) -> tuple[dict, dict]:
        infer = self._model.infer
        elapsed = []
        for _run in range(header["count"]):
            start = time.perf_counter_ns()
            for feed in self._feeds:
                infer(feed)
            elapsed.append((time.perf_counter_ns() - start) / 1e6)
        wait_until_quiet()
        return {"op": "ran", "ms": elapsed}, {}

    def _answer(self, *_: Any) -> tuple[dict, dict]:
        outputs = self._model.infer(self._check)
        named = {name: np.asarray(array, np.float32) for name, array in outputs.items()}
        wait_until_quiet()
        return {"op": "answered"}, named

    def _finish(self, *_: Any) -> tuple[dict, dict]:
        self._feeds, self._check = [], None
        return {"op": "finished", "peak_bytes": peak_bytes()}, {}

    def _call(self, header: dict[str, Any], _: dict[str, np.ndarray]) -> tuple[dict, dict]:
        result = getattr(self._model, header["method"])(**header.get("arguments", {}))
        wait_until_quiet()
        return {"op": "called", "result": result}, {}


def unpacked(arrays: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Batches from arrays named ``INDEX/INPUT``."""
    batches: dict[int, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        index, _, key = name.partition("/")
        batches.setdefault(int(index), {})[key] = array
    return [batches[index] for index in sorted(batches)]


def pin(cores: list[int] | None) -> None:
    """Keep this process on these cores; threads made later inherit it."""
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def wait_until_quiet() -> None:
    deadline = time.perf_counter() + _QUIET_LIMIT_S
    before = time.process_time()
    while time.perf_counter() < deadline:
        time.sleep(_QUIET_SAMPLE_S)
        now = time.process_time()
        if now - before < 0.1 * _QUIET_SAMPLE_S:
            return
        before = now


def peak_bytes() -> int | None:
    """Peak resident memory (VmHWM) since the last ``reset_peak``; None where it cannot be read."""
    try:
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def reset_peak() -> None:
    """Let the kernel count the peak anew from the memory in use now (Linux 4.0)."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")
