"""A candidate in a process of its own: started, asked, and reported when it dies."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from convbert_deploy.benchmarking.cases import Case
from convbert_deploy.benchmarking.measurement import CandidateFacts
from convbert_deploy.benchmarking.rounds import CandidateFailed, Prepared
from convbert_deploy.benchmarking.worker.frames import FrameError, read_frame, write_frame

WORKER = pathlib.Path(__file__).resolve().parent / "worker"
#: An answer that takes longer than this never comes; compiling a large model takes minutes.
_PATIENCE_S = 3600.0
_STOPPING_S = 10.0
_SHOWN_LINES = 5
#: Of the parent's environment, what would put its packages before the worker's.
_NOT_INHERITED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONSTARTUP")


@dataclasses.dataclass(frozen=True)
class WorkerCommand:
    """How to start a worker. python: its interpreter; settings: the ``load`` question; own
    environment: it sees nothing of this process's Python path."""

    python: pathlib.Path
    settings: Mapping[str, Any]
    isolated: bool = False

    def arguments(self) -> list[str]:
        # Compiled files would be written beside the worker's sources, by whatever Python runs it.
        return [str(self.python), "-B", str(WORKER)]

    def environment(self) -> dict[str, str]:
        """Thread counts for every library, before any of them is loaded."""
        dropped = _NOT_INHERITED if self.isolated else ()
        kept = {name: value for name, value in os.environ.items() if name not in dropped}
        threads = str(self.settings["threads"])
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
        return {**kept, **quiet, **dict.fromkeys(names, threads)}


class Worker:
    """A running worker. Use as a context manager; ``ask`` only inside it."""

    def __init__(self, name: str, command: WorkerCommand) -> None:
        self.name, self._command = name, command
        self.ready: dict[str, Any] = {}
        #: from starting the process to a loaded model; making the runtime's own file left out
        self.ready_ms = 0.0
        self._scope = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: Any = None

    def __enter__(self) -> Worker:
        """Start it and load its model.

        Raises:
            CandidateFailed: it cannot be started, died, or its model cannot be loaded.
        """
        with contextlib.ExitStack() as scope:
            self._stderr = scope.enter_context(tempfile.TemporaryFile())
            start = time.perf_counter_ns()
            try:
                self._process = subprocess.Popen(
                    self._command.arguments(),
                    env=self._command.environment(),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._stderr,
                )
            except OSError as error:
                raise CandidateFailed(
                    f"{self.name}: cannot start {self._command.python}: {error}", gone=True
                ) from error
            scope.callback(self._stop)
            self.ready, _ = self.ask({"op": "load", **self._command.settings}, loading=True)
            elapsed_ms = (time.perf_counter_ns() - start) / 1e6
            self.ready_ms = elapsed_ms - self.ready.get("convert_ms", 0.0)
            self._scope = scope.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._scope.close()

    def ask(
        self,
        header: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray] | None = None,
        *,
        loading: bool = False,
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Raises CandidateFailed: it answered with an error, or died."""
        process = self._process
        try:
            write_frame(process.stdin, header, arrays)
            frame = read_frame(_Patient(process.stdout))
        except (OSError, FrameError) as error:
            raise self._died() from error
        if frame is None:
            raise self._died()
        answer, outputs = frame
        if answer["op"] == "error":
            # Of an error that was not written for people the type says more than the text.
            text = (
                answer["text"]
                if answer["plain"]
                else f"{answer['kind']}: {_first_lines(answer['text'])}"
            )
            raise CandidateFailed(f"{self.name}: {text}", hint=answer["hint"], gone=loading)
        return answer, outputs

    def _died(self) -> CandidateFailed:
        """What became of it, with the last lines it wrote."""
        try:
            status = self._process.wait(_STOPPING_S)
        except subprocess.TimeoutExpired:
            return CandidateFailed(f"{self.name} gave no answer", gone=True)
        how = f"exit status {status}"
        if status < 0:
            how = f"signal {signal.Signals(-status).name}"
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        said = " / ".join(line.strip() for line in lines[-_SHOWN_LINES:])
        return CandidateFailed(
            f"the process of {self.name} ended ({how}){': ' if said else ''}{said}", gone=True
        )

    def _stop(self) -> None:
        process = self._process
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(_STOPPING_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


class _Patient:
    """Reads a pipe exactly, but not for ever."""

    def __init__(self, stream: Any) -> None:
        self._descriptor = stream.fileno()

    def read(self, count: int) -> bytes:
        parts, missing = [], count
        while missing:
            ready, _, _ = select.select([self._descriptor], [], [], _PATIENCE_S)
            if not ready:
                raise FrameError(f"no answer within {_PATIENCE_S:.0f} s")
            part = os.read(self._descriptor, min(missing, 1 << 20))
            if not part:
                break
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)


class WorkerSubject:
    """A started Worker as a Subject of the benchmark."""

    # A worker is waited for until its threads are quiet, which takes 12 to 60 ms.
    turn_ms = 10.0

    def __init__(self, worker: Worker, facts: CandidateFacts, *, essential: bool) -> None:
        self.name, self.essential, self._worker = worker.name, essential, worker
        ready = worker.ready
        self.facts = dataclasses.replace(
            facts,
            arithmetic=ready["arithmetic"],
            versions=ready["versions"],
            notes=tuple(ready["notes"]),
            load_ms=ready["load_ms"],
            ready_ms=worker.ready_ms,
            loaded_bytes=ready["loaded_bytes"],
            weights_bytes=ready["weights_bytes"],
        )

    def open(self, case: Case) -> Prepared:
        batches = [*case.batches, *([] if case.check is None else [case.check])]
        arrays = {
            f"{index}/{name}": array
            for index, batch in enumerate(batches)
            for name, array in batch.items()
        }
        header = {"op": "prepare", "count": len(case.batches), "check": case.check is not None}
        answer, _ = self._worker.ask(header, arrays)
        self.facts = dataclasses.replace(
            self.facts, notes=tuple(answer["notes"]), weights_bytes=answer["weights_bytes"]
        )
        return Prepared(answer["prepare_ms"])

    def runs_ms(self, count: int) -> list[float]:
        return self._worker.ask({"op": "run", "count": count})[0]["ms"]

    def answers(self) -> Mapping[str, np.ndarray]:
        return self._worker.ask({"op": "answer"})[1]

    def close(self) -> int | None:
        return self._worker.ask({"op": "finish"})[0]["peak_bytes"]


def _first_lines(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return " / ".join(lines[:_SHOWN_LINES])[:500]


def cores_for(threads: int) -> list[int] | None:
    """Logical CPUs to keep every worker on: one of each physical core first. None where the system
    has no affinity, or fewer CPUs than threads."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < threads:
        return None
    firsts = [cpu for cpu in usable if _is_first_of_its_core(cpu, usable)]
    rest = [cpu for cpu in usable if cpu not in firsts]
    return [*firsts, *rest][:threads]


def _is_first_of_its_core(cpu: int, usable: Sequence[int]) -> bool:
    path = pathlib.Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        siblings = set(_cpu_list(path.read_text()))
    except (OSError, ValueError):
        return True
    return cpu == min(siblings & set(usable), default=cpu)


def _cpu_list(text: str) -> Iterator[int]:
    """``0-2,8`` -> 0, 1, 2, 8."""
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)
