"""Bulk jobs with real processes and a real Ray: workers are killed, jobs are killed and run again."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import pytest

from convbert_deploy.architecture import Task
from convbert_deploy.engine import Engine
from convbert_deploy.serving.answering import run

parquet = pytest.importorskip("pyarrow.parquet")
pytestmark = pytest.mark.serving

SCRIPT = pathlib.Path(__file__).with_name("bulk_job.py")
LINES = 20_000
SHARD_ROWS = 500
SHARDS = LINES // SHARD_ROWS
LIMIT_S = 120
WORDS = ["the", "film", "was", "not", "so", "good", "but", "long", "a", "fine", "day", "in", "june"]


@pytest.fixture(scope="module")
def engine(engine_of: Callable[[Task], Engine]) -> Engine:
    return engine_of(Task.SEQUENCE_CLASSIFICATION)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Every line differs, and no line can be told from its place."""
    rng = random.Random(7)
    return [f"{i} {' '.join(rng.choices(WORDS, k=rng.randint(2, 24)))}" for i in range(LINES)]


@pytest.fixture
def jsonl(texts: list[str], tmp_path: pathlib.Path) -> pathlib.Path:
    """``id`` is the line number; one line in a thousand cannot be scored."""
    path = tmp_path / "in.jsonl"
    with path.open("w") as stream:
        for index, text in enumerate(texts):
            value = " " if index % 1000 == 999 else text
            stream.write(json.dumps({"id": index, "text": value}) + "\n")
    return path


class Running:
    """A ``bulk`` command in a process group of its own."""

    def __init__(self, words: list[str], log: pathlib.Path) -> None:
        self._log = log
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                words, stdout=subprocess.PIPE, stderr=stream, start_new_session=True
            )

    def summary(self) -> dict:
        out, _ = self.process.communicate(timeout=LIMIT_S)
        assert self.process.returncode == 0, self._log.read_text()
        return json.loads(out.splitlines()[-1])

    def kill(self) -> None:
        """The process alone first, as an out-of-memory killer would."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def start(jsonl: pathlib.Path, engine: Engine, tmp_path: pathlib.Path) -> Iterator[Callable]:
    started: list[Running] = []

    def start(*words: str, prefix: tuple[str, ...] = (), before: tuple[str, ...] = ()) -> Running:
        command = [*prefix, sys.executable, str(SCRIPT), *before, "bulk", str(jsonl)]
        command += ["-o", str(tmp_path / "out"), "--engine", str(engine.path), "--json"]
        command += ["--shard-rows", str(SHARD_ROWS), *words]
        started.append(Running(command, tmp_path / "log"))
        return started[-1]

    yield start
    for job in started:
        job.stop()


def records(out: pathlib.Path) -> list[dict]:
    """Of the finished shards."""
    files = (out / "_shards").glob("[0-9]*.json")
    return [json.loads(file.read_text()) for file in files]


def wait_for(condition: Callable[[], bool], job: Running, what: str) -> None:
    until = time.monotonic() + LIMIT_S
    while not condition():
        assert job.process.poll() is None, f"the job ended before: {what}"
        assert time.monotonic() < until, what
        time.sleep(0.01)


def worker_of(record: dict) -> int:
    return int(record["worker"].rpartition(":")[2])


def alive(pid: int) -> bool:
    status = pathlib.Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def check_output(out: pathlib.Path, texts: list[str], engine: Engine, tmp_path) -> None:
    """Each line once, in order, with the answer that ``run`` gives it."""
    tables = [parquet.read_table(path) for path in sorted(out.glob("part-*.parquet"))]
    assert len(tables) == SHARDS and all(table.num_rows == SHARD_ROWS for table in tables)
    rows = [row for table in tables for row in table.to_pylist()]
    assert [row["row"] for row in rows] == [row["id"] for row in rows] == list(range(LINES))
    bad = [row["row"] for row in rows if row["error"]]
    assert bad == list(range(999, LINES, 1000))
    chosen = random.Random(3).sample([i for i in range(LINES) if i % 1000 != 999], 200)
    for index, expected in zip(chosen, run(engine, [texts[i] for i in chosen]), strict=True):
        answer = json.loads(rows[index]["answer"])
        assert rows[index]["text"] == texts[index]
        assert rows[index]["label"] == answer["label"] == expected["label"]
        assert answer["scores"] == pytest.approx(expected["scores"], abs=1e-6)
        assert answer["tokens_scored"] == expected["tokens_scored"]
    success = json.loads((out / "_SUCCESS").read_text())
    assert (success["rows"], success["errors"]) == (LINES, len(bad))
    assert not [path for path in out.rglob(".*") if path.name != ".lock"]


def test_processes_survive_kills_of_a_worker_and_of_the_job(
    start, texts, engine, tmp_path: pathlib.Path
):
    out = tmp_path / "out"
    job = start("--local", "--workers", "2", "--threads-per-worker", "1")
    wait_for(lambda: bool(records(out)), job, "a first shard")
    victim = worker_of(records(out)[0])
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: len(records(out)) >= 8, job, "shards after the worker's death")
    workers = {worker_of(record) for record in records(out)}
    job.kill()

    assert not (out / "_SUCCESS").exists()
    until = time.monotonic() + LIMIT_S
    while any(alive(pid) for pid in workers):  # those of a killed parent end by themselves
        assert time.monotonic() < until
        time.sleep(0.01)
    before = records(out)
    assert 0 < len(before) < SHARDS
    assert "ended by SIGKILL" in (tmp_path / "log").read_text()
    kept = {record["index"]: (out / f"part-{record['index']:05d}.parquet") for record in before}
    stamps = {index: path.stat().st_mtime_ns for index, path in kept.items()}

    summary = start("--local", "--workers", "2", "--threads-per-worker", "1").summary()
    assert (summary["rows"], summary["earlier_shards"]) == (LINES, len(before))
    assert {index: path.stat().st_mtime_ns for index, path in kept.items()} == stamps
    check_output(out, texts, engine, tmp_path)
    again = start("--local").summary()
    assert (again["earlier_shards"], again["workers"]) == (SHARDS, 0)


def test_an_interrupt_leaves_no_partial_file(start, tmp_path: pathlib.Path):
    out = tmp_path / "out"
    job = start("--local", "--workers", "2")
    wait_for(lambda: bool(records(out)), job, "a first shard")
    os.killpg(job.process.pid, signal.SIGINT)
    assert job.process.wait(LIMIT_S) == 1
    assert not [path for path in out.rglob(".*") if path.name != ".lock"]
    finished = {f"part-{record['index']:05d}.parquet" for record in records(out)}
    # A part whose record was not written yet is complete, and is done again.
    parts = [path for path in out.glob("part-*") if path.name not in finished]
    assert all(parquet.read_table(path).num_rows == SHARD_ROWS for path in parts)


def loopback_only() -> tuple[str, ...]:
    """Words that run a command in a network namespace of its own, () where that is not permitted.
    Ray also listens on other addresses than the one it is told."""
    words = ("unshare", "-n", "bash", "-c", 'ip link set lo up && exec "$@"', "bash")
    try:
        allowed = subprocess.run([*words, "true"], capture_output=True, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        allowed = False
    return words if allowed else ()


@pytest.fixture
def ray_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("ray.data")
    # Not pytest's own folder: a socket's path has 107 characters at most.
    folder = tempfile.mkdtemp(prefix="ray")
    monkeypatch.setenv("RAY_TMPDIR", folder)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    yield
    shutil.rmtree(folder, ignore_errors=True)


def test_ray_survives_kills_of_an_actor_and_of_the_job(
    start, ray_environment, texts, engine, tmp_path: pathlib.Path
):
    out, prefix, ray = tmp_path / "out", loopback_only(), ("--ray", "3")
    job = start("--workers", "2", prefix=prefix, before=ray)
    wait_for(lambda: bool(records(out)), job, "a first shard")
    victim = worker_of(records(out)[0])
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: len(records(out)) >= 8, job, "shards after the actor's death")
    job.stop()
    assert not (out / "_SUCCESS").exists()
    assert 0 < len(records(out)) < SHARDS

    job = start("--workers", "2", prefix=prefix, before=ray)
    summary = job.summary()
    assert (summary["rows"], summary["runs_on"]) == (LINES, "ray")
    assert 0 < summary["earlier_shards"] < SHARDS
    check_output(out, texts, engine, tmp_path)


def test_a_cluster_is_driven_from_outside(start, ray_environment, tmp_path: pathlib.Path):
    job = start("--workers", "2", prefix=loopback_only(), before=("--ray-client", "3"))
    summary = job.summary()
    assert (summary["rows"], summary["runs_on"], summary["workers"]) == (LINES, "ray", 2)
    assert len(records(tmp_path / "out")) == SHARDS


def test_ray_settings_that_would_hang_are_refused(start, ray_environment, tmp_path: pathlib.Path):
    job = start("--workers", "2", prefix=loopback_only(), before=("--ray", "2"))
    assert job.process.wait(LIMIT_S) == 3
    log = (tmp_path / "log").read_text()
    assert "would wait for ever" in log and "--workers 1" in log
    assert records(tmp_path / "out") == []
