"""Engines and peers on one machine, each in a process of its own, in interleaved runs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator

from convbert_deploy.architecture import Architecture, Task
from convbert_deploy.benchmarking.cases import (
    FIXED_LENGTH,
    Case,
    Point,
    Workload,
    read_texts,
    workload_cases,
)
from convbert_deploy.benchmarking.floor import Ceiling, Costs
from convbert_deploy.benchmarking.machine_watch import (
    load_warnings,
    machine_state,
    state_warnings,
)
from convbert_deploy.benchmarking.measurement import BenchmarkReport, CandidateFacts, LeftOut
from convbert_deploy.benchmarking.options import BenchOptions
from convbert_deploy.benchmarking.peer_environments import install_command, peer_python
from convbert_deploy.benchmarking.peers import PeerError, PeerRequest
from convbert_deploy.benchmarking.process import (
    Worker,
    WorkerCommand,
    WorkerSubject,
    cores_for,
)
from convbert_deploy.benchmarking.rounds import CandidateFailed, measure_cases
from convbert_deploy.checkpoint import Checkpoint
from convbert_deploy.engine import GRAPH, Engine
from convbert_deploy.errors import EngineError, InputError
from convbert_deploy.precision import Precision

EAGER = "eager fp32"
#: The buffer that bandwidth is measured on, in sizes of the last-level cache.
_BUFFER_CACHES = 4
_GPU_BUFFER = 1 << 30


@dataclasses.dataclass(frozen=True)
class BenchRequest:
    """What to time.

    baseline: checkpoint of the eager model that ratios refer to; peers run it too.
    batches x seqs are the shapes, all tokens real (no padding), unless ``points`` names them.
    texts: file of the variable-length workload, in batches of ``workload_batch``.
    threads: of every candidate, which are then kept on the same cores; None takes every usable CPU.
    install_peers: pip may be run for peers that are absent. graph: what peers that read one run.
    ceiling: measure what the machine can do, for the floor time.
    """

    engines: tuple[pathlib.Path, ...]
    baseline: Checkpoint | None = None
    batches: tuple[int, ...] = (1, 8)
    seqs: tuple[int, ...] = (32, 128)
    threads: int | None = None
    options: BenchOptions = dataclasses.field(default_factory=BenchOptions)
    peers: tuple[PeerRequest, ...] = ()
    install_peers: bool = False
    graph: pathlib.Path | None = None
    points: tuple[Point, ...] | None = None
    texts: pathlib.Path | None = None
    workload_batch: int = 32
    ceiling: bool = True


def bench(request: BenchRequest, progress: Callable[[str], None] | None = None) -> BenchmarkReport:
    """Time every engine, the eager model when a baseline is given, and the peers.

    A peer that cannot compute a case is left out of it and named in the report.

    Raises:
        EngineError: engines of different models.
        PeerError: a peer without a checkpoint, or absent and not to be installed.
        InputError: texts that cannot be read.
        ConvBertDeployError: an engine or the eager model failed, such as a shape outside a profile.
    """
    from convbert_deploy.environment import benchmark_header, environment

    tell = progress or (lambda _: None)
    engines = [Engine.load(path) for path in request.engines]
    facts = environment()
    threads = request.threads or facts.cpu.usable
    devices = _devices(engines)
    machine = _Machine(
        device="cuda" if devices == {"cuda"} else "cpu",
        threads=threads,
        cores=None if request.threads is None else cores_for(threads),
    )
    before = machine_state()
    first_warnings = tuple(load_warnings(before, threads)) if machine.device == "cpu" else ()
    model = _one_model(engines)
    cases = _cases(request, engines, model)
    pythons = _peer_pythons(request, tell)
    with contextlib.ExitStack() as scope:
        plan = _Plan(request, engines, model, machine, pythons, tell)
        # Engines of both kinds in one benchmark have no ceiling in common.
        ceiling = plan.ceiling() if request.ceiling and len(devices) == 1 else None
        subjects, left_out = plan.start(scope)
        report = measure_cases(
            subjects,
            cases,
            request.options,
            header=benchmark_header(facts, threads=threads, device=machine.device),
            progress=tell,
            costs=Costs(*model),
            ceiling=ceiling,
        )
    return dataclasses.replace(
        _with_fixed_length(report),
        warnings=(*first_warnings, *report.warnings, *state_warnings(before, machine_state())),
        left_out=(*left_out, *report.left_out),
    )


@dataclasses.dataclass(frozen=True)
class _Machine:
    """Where candidates run: ``cpu`` or ``cuda``, CPU threads, cores to keep to (None: any)."""

    device: str
    threads: int
    cores: list[int] | None

    def settings(self) -> dict[str, object]:
        return {"device": self.device, "threads": self.threads, "cores": self.cores}


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Starts the candidates one after the other, so that none loads beside another."""

    request: BenchRequest
    engines: list[Engine]
    model: tuple[Architecture, Task]
    machine: _Machine
    pythons: dict[str, pathlib.Path]
    tell: Callable[[str], None]

    def start(self, scope: contextlib.ExitStack) -> tuple[list[WorkerSubject], tuple[LeftOut, ...]]:
        """The started candidates, the baseline first, and the peers that could not be."""
        subjects: list[WorkerSubject] = []
        left_out: list[LeftOut] = []
        for name, command, facts in self._candidates(scope):
            self.tell(f"load {name}")
            essential = facts.kind == "engine" or name == EAGER
            try:
                worker = scope.enter_context(Worker(name, command))
            except CandidateFailed as failure:
                if essential:
                    raise
                self.tell(f"left out: {failure}")
                reason = str(failure).removeprefix(f"{name}: ")
                left_out.append(LeftOut(name, "", reason, failure.hint))
                continue
            subjects.append(WorkerSubject(worker, facts, essential=essential))
        return subjects, tuple(left_out)

    def ceiling(self) -> Ceiling:
        self.tell("measure this machine's ceiling")
        settings = {"kind": "machine", **self.machine.settings()}
        with Worker("ceiling", WorkerCommand(pathlib.Path(sys.executable), settings)) as worker:
            question = {
                "op": "call",
                "method": "ceiling",
                "arguments": {"buffer_bytes": buffer_bytes(self.machine.device)},
            }
            return Ceiling.from_worker(worker.ask(question)[0]["result"])

    def _candidates(
        self, scope: contextlib.ExitStack
    ) -> Iterator[tuple[str, WorkerCommand, CandidateFacts]]:
        names: set[str] = set()
        peers = _peer_requests(self.request)
        if peers:
            scratch = pathlib.Path(scope.enter_context(tempfile.TemporaryDirectory()))
            folder = scratch / "model"
            _save(self.request.baseline, folder)
        if any(one.peer.reads_graph for one in peers):
            _save_inlined(self.request.graph, scratch / GRAPH)
        for index, peer in enumerate(peers):
            own = scratch / str(index)
            own.mkdir()
            names.add(str(peer))
            yield str(peer), self._peer_command(peer, folder, own), _peer_facts(peer)
        for engine in self.engines:
            name = engine.label
            if name in names:
                name = f"{name} ({engine.path.name})"
            if name in names:
                name = f"{engine.label} ({engine.path})"
            names.add(name)
            arithmetic, packs = computes(engine)
            settings = {
                "kind": "engine",
                "model": str(engine.path.resolve()),
                "arithmetic": arithmetic,
                **self.machine.settings(),
            }
            facts = CandidateFacts(kind="engine", arithmetic=arithmetic, packs=packs)
            yield name, WorkerCommand(pathlib.Path(sys.executable), settings), facts

    def _peer_command(
        self, request: PeerRequest, folder: pathlib.Path, scratch: pathlib.Path
    ) -> WorkerCommand:
        python = self.pythons[request.peer.name]
        architecture, task = self.model
        settings = {
            "kind": request.peer.kind,
            "precision": request.precision,
            "model": str(folder),
            "graph": str(folder.parent / GRAPH) if request.peer.reads_graph else None,
            "scratch": str(scratch),
            "outputs": list(task.output_names),
            "vocabulary": architecture.vocab_size,
            **self.machine.settings(),
        }
        return WorkerCommand(python, settings, isolated=str(python) != sys.executable)


def _save(checkpoint: Checkpoint, folder: pathlib.Path) -> None:
    """As a Hugging Face folder of float32 weights, whatever the user's file looks like."""
    model = checkpoint.eager_model()
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()


def _save_inlined(graph: pathlib.Path | None, target: pathlib.Path) -> None:
    """In standard operators alone, which every runtime reads."""
    import onnx
    from onnx.inliner import inline_local_functions

    from convbert_deploy.graph import Graph

    if graph is None:
        raise PeerError(
            "openvino-graph runs an exported graph, and none was given",
            hint="--graph GRAPH names it",
        )
    onnx.save(inline_local_functions(Graph.load(graph).model), target)


def _peer_requests(request: BenchRequest) -> list[PeerRequest]:
    """The baseline and the peers asked for, each once."""
    baseline = [PeerRequest.parse("eager")] if request.baseline else []
    return list(dict.fromkeys([*baseline, *request.peers]))


def _peer_facts(request: PeerRequest) -> CandidateFacts:
    return CandidateFacts(kind="peer", command=install_command(request.peer))


def _peer_pythons(request: BenchRequest, tell: Callable[[str], None]) -> dict[str, pathlib.Path]:
    """Every peer's interpreter, before anything is timed."""
    if request.peers and not request.baseline:
        raise PeerError(
            "peers run a checkpoint, and none was given", hint="--baseline CHECKPOINT names it"
        )
    peers = {one.peer.name: one.peer for one in _peer_requests(request)}
    # The checkpoint was read with this environment's torch: the eager baseline runs here as well.
    return {
        name: pathlib.Path(sys.executable)
        if name == "eager"
        else peer_python(peer, install=request.install_peers, progress=tell)
        for name, peer in peers.items()
    }


def computes(engine: Engine) -> tuple[str, bool]:
    """What an engine's products compute in, and whether it leaves pads out.

    On a CPU, fp16 and bf16 engines of standard operators only store their weights in 16 bits and
    compute in float32; our encoder layer computes in bf16.
    """
    manifest = engine.manifest
    on_cpu = manifest.backend == "onnxruntime-cpu"
    halves = manifest.precision in (Precision.FP16, Precision.BF16)
    if not on_cpu or not (halves or manifest.padding == "masked"):
        return manifest.precision.value, False
    import onnx

    graph = onnx.load(engine.path / GRAPH, load_external_data=False).graph
    operators = {node.op_type for node in graph.node}
    arithmetic = manifest.precision.value
    if halves:
        arithmetic = "bf16" if "EncoderLayer" in operators else "fp32"
    return arithmetic, manifest.padding == "masked" and "PackRows" in operators


def buffer_bytes(device: str, root: pathlib.Path = pathlib.Path("/")) -> int:
    """Enough that no cache holds it; an eighth of the memory at most."""
    from convbert_deploy.environment import environment

    if device != "cpu":
        return _GPU_BUFFER
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    largest = 0
    for path in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text[:-1].isdigit():
            largest = max(largest, int(text[:-1]) * units.get(text[-1], 1))
    return min(_BUFFER_CACHES * largest, environment().memory_mib * (1 << 20) // 8)


def _devices(engines: list[Engine]) -> set[str]:
    return {"cpu" if engine.manifest.backend == "onnxruntime-cpu" else "cuda" for engine in engines}


def _one_model(engines: list[Engine]) -> tuple[Architecture, Task]:
    first = engines[0].manifest
    for engine in engines[1:]:
        if (engine.manifest.architecture, engine.manifest.task) != (first.architecture, first.task):
            raise EngineError(
                f"{engine.path} and {engines[0].path} are different models; "
                "one benchmark compares engines of the same one"
            )
    return first.architecture, first.task


def _cases(
    request: BenchRequest, engines: list[Engine], model: tuple[Architecture, Task]
) -> list[Callable[[], Case]]:
    points = request.points
    if points is None:
        points = tuple(Point(batch, seq) for batch in request.batches for seq in request.seqs)
    cases: list[Callable[[], Case]] = [
        functools.partial(_point_case, model, point) for point in points
    ]
    if request.texts is not None:
        pair = _workload(request, engines, model)
        cases += [functools.partial(pair.__getitem__, index) for index in (0, 1)]
    return cases


def _point_case(model: tuple[Architecture, Task], point: Point) -> Case:
    from convbert_deploy.parity_cases import random_batch

    return Case(point, (random_batch(*model, point.batch, point.seq),))


def _workload(
    request: BenchRequest, engines: list[Engine], model: tuple[Architecture, Task]
) -> tuple[Case, Case]:
    from convbert_deploy.serving.answering import engine_tokenizer

    architecture, task = model
    if task is Task.MULTIPLE_CHOICE:
        raise InputError("texts of a multiple-choice model cannot be timed: use shapes")
    longest = min(engine.limits().max_positions for engine in engines)
    rows = read_texts(request.texts, engine_tokenizer(engines[0]), longest)
    return workload_cases(request.texts.name, rows, request.workload_batch, architecture, task)


def _with_fixed_length(report: BenchmarkReport) -> BenchmarkReport:
    """Each workload's measurements with the time of as many tokens at fixed length."""
    fixed = {
        (one.candidate, str(one.point).removesuffix(FIXED_LENGTH)): one.p50_ms / one.tokens
        for one in report.measurements
        if str(one.point).endswith(FIXED_LENGTH)
    }
    measurements = []
    for one in report.measurements:
        per_token = fixed.get((one.candidate, str(one.point)))
        if isinstance(one.point, Workload) and per_token is not None:
            one = dataclasses.replace(one, fixed_length_ms=per_token * one.tokens)
        measurements.append(one)
    return dataclasses.replace(report, measurements=tuple(measurements))
