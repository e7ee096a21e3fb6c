"""Shards on processes of this machine: a process that dies is replaced and its shard done again."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection
from typing import Any

from convbert_deploy import errors
from convbert_deploy.bulk_scoring.plan import Shard
from convbert_deploy.bulk_scoring.shard_scoring import Job, ShardResult, ShardScorer
from convbert_deploy.errors import ConvBertDeployError, EngineError

#: times that a shard may end its process before the job is given up
ATTEMPTS = 3
_STOP_SECONDS = 5

#: (job, connection): what runs in each process
Target = Callable[[Job, Any], None]


@dataclasses.dataclass
class _Worker:
    process: Any
    pipe: connection.Connection
    shard: Shard


def score_in_processes(
    job: Job,
    shards: Iterable[Shard],
    workers: int,
    note: Callable[[str], None],
    target: Target | None = None,
) -> Iterator[ShardResult]:
    """Yield each shard's result as it is finished, in any order.

    Processes are spawned, so a script that calls this needs ``if __name__ == "__main__"``. They end
    with the iterator, an interrupt, or this process. note: told of each process that died.
    target: for tests.

    Raises:
        EngineError: a shard ended its process ``ATTEMPTS`` times.
        ConvBertDeployError: a worker's own, such as a full disk.
    """
    todo = collections.deque(shards)
    deaths: collections.Counter[int] = collections.Counter()
    context = multiprocessing.get_context("spawn")
    running: list[_Worker] = []
    try:
        while todo or running:
            while todo and len(running) < workers:
                running.append(_start(context, target or worker_main, job, todo.popleft()))
            for worker in _reported(running):
                message = _received(worker)
                if message is None:
                    running.remove(worker)
                    _check_attempts(worker, deaths, note)
                    todo.appendleft(worker.shard)
                    continue
                yield ShardResult(**_result(message))
                if todo:
                    worker.shard = todo.popleft()
                    _send(worker)
                else:
                    running.remove(worker)
                    _finish(worker)
    finally:
        _stop(running)


def worker_main(job: Job, pipe: Any) -> None:
    """Score shards from the pipe until it closes. Reports ("done", fields), ("failed", class name,
    message, hint) or ("bug", traceback)."""
    # An interrupt goes to the whole group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with_parent()
    try:
        with ShardScorer(job) as scorer:
            while True:
                pipe.send(("done", scorer.score(pipe.recv()).to_json()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except ConvBertDeployError as error:
        report = ("failed", type(error).__name__, str(error), error.hint)
    except Exception:
        report = ("bug", traceback.format_exc())
    with contextlib.suppress(OSError):
        pipe.send(report)


def _end_with_parent() -> None:
    """A parent that is killed cannot stop its workers; one that went on would write beside the
    next job."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()


def _start(context: Any, target: Target, job: Job, shard: Shard) -> _Worker:
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(job, theirs), daemon=True)
    process.start()
    theirs.close()  # so that the worker's end is the only one, and its death ends the stream
    worker = _Worker(process, ours, shard)
    _send(worker)
    return worker


def _send(worker: _Worker) -> None:
    # A process that is already dead is seen when its answer is read.
    with contextlib.suppress(OSError):
        worker.pipe.send(worker.shard)


def _reported(running: list[_Worker]) -> list[_Worker]:
    ready = connection.wait([worker.pipe for worker in running])
    return [worker for worker in running if worker.pipe in ready]


def _received(worker: _Worker) -> tuple[Any, ...] | None:
    """The worker's report; None where it died, of which the end of its pipe is the sign."""
    try:
        return worker.pipe.recv()
    except (EOFError, OSError):
        return None


def _check_attempts(
    worker: _Worker, deaths: collections.Counter[int], note: Callable[[str], None]
) -> None:
    worker.process.join(_STOP_SECONDS)
    worker.pipe.close()
    deaths[worker.shard.index] += 1
    how = _ending(worker.process.exitcode)
    if deaths[worker.shard.index] == ATTEMPTS:
        raise EngineError(
            f"shard {worker.shard.index} ({worker.shard.file}, row {worker.shard.first} on) ended "
            f"its process {ATTEMPTS} times, the last {how}",
            hint="fewer --workers where memory is short; the same command goes on from here",
        )
    note(f"a worker process ended {how}; shard {worker.shard.index} is done again")


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"by {name}" + (" (is memory short?)" if name == "SIGKILL" else "")
    return f"with exit code {code}"


def _result(message: tuple[Any, ...]) -> dict[str, Any]:
    kind, *content = message
    if kind == "done":
        return content[0]
    if kind == "bug":
        raise RuntimeError(f"in a worker process:\n{content[0]}")
    raise remote_error(*content)


def remote_error(name: str, message: str, hint: str | None) -> ConvBertDeployError:
    """A worker's error as one of this process, of the same class."""
    kind = getattr(errors, name, ConvBertDeployError)
    error = kind.__new__(kind)
    ConvBertDeployError.__init__(error, message, hint=hint)
    return error


def _finish(worker: _Worker) -> None:
    worker.pipe.close()
    worker.process.join(_STOP_SECONDS)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join()


def _stop(running: list[_Worker]) -> None:
    for worker in running:
        worker.process.kill()
    for worker in running:
        worker.process.join()
        worker.pipe.close()
