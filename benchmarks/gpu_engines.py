"""ConvBERT-base in fp16 on an NVIDIA GPU: our engines beside eager, torch.compile and stock
ONNX Runtime.

``python benchmarks/gpu_engines.py --markdown benchmarks/results/FILE.md`` on a machine with a GPU and
torch for CUDA; ONNX Runtime for CUDA and TensorRT are measured where they are installed, and said to
be missing where not. A request is timed from int64 arrays on the host to the classifier's logits on
the host. The candidates take turns; medians. The floor is ``benchmarking.floor``'s, with this GPU's
own rates: the better of two square fp16 products, and reading a gigabyte.
``--dry-run`` goes the same way with a tiny model on the CPU and times nothing worth reading.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import itertools
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tests"))

import numpy as np
import torch
from gpu_torch_engine import with_kernels

from convbert_deploy.architecture import Task
from convbert_deploy.backends.base import Batch
from convbert_deploy.benchmarking.floor import Ceiling, Costs
from convbert_deploy.environment import benchmark_header, environment
from convbert_deploy.errors import ConvBertDeployError
from convbert_deploy.report_table import markdown_table
from convbert_deploy.shapes import ShapeProfile, ShapeRange

import factories

TASK = Task.SEQUENCE_CLASSIFICATION
BATCHES, SEQS = (1, 8, 32, 128), (32, 128, 512)
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
#: candidates with this in front are ours
OURS = "ours: "
#: how far an fp16 candidate's logits may be from fp32's, of deviation about 0.5
TOLERANCE = 0.03

Infer = Callable[[Batch], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Bench:
    """What is measured where. ``rounds``: turns of each candidate at each point, after three more."""

    device: str
    dtype: torch.dtype
    size: str
    layers: int | None
    batches: tuple[int, ...]
    seqs: tuple[int, ...]
    rounds: int

    @property
    def points(self) -> list[tuple[int, int]]:
        return list(itertools.product(self.batches, self.seqs))


ON_GPU = Bench("cuda", torch.float16, "base", None, BATCHES, SEQS, rounds=50)
DRY = Bench("cpu", torch.float32, "tiny", 2, (1, 2), (8, 16), rounds=2)


def batch_of(batch: int, seq: int, vocab: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(batch * seq).integers(1, vocab, (batch, seq))
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
    }


def torch_infer(model: Any, device: str) -> Infer:
    """Host to host, logits only."""

    def infer(batch: Batch) -> np.ndarray:
        inputs = [torch.from_numpy(batch[name]).to(device, non_blocking=True) for name in INPUTS]
        with torch.inference_mode():
            return _logits(model(*inputs)).float().cpu().numpy()

    return infer


def graphed_infer(model: Any) -> Infer:
    """A CUDA graph for each shape, with fixed inputs on the GPU and pinned memory here."""
    made: dict[tuple[int, ...], tuple[list[Any], list[Any], Any, Any, Any]] = {}

    def capture(batch: Batch) -> tuple[list[Any], list[Any], Any, Any, Any]:
        shape = batch["input_ids"].shape
        host = [torch.ones(shape, dtype=torch.int64, pin_memory=True) for _ in INPUTS]
        inputs = [tensor.cuda() for tensor in host]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.no_grad():
            for _ in range(3):
                logits = _logits(model(*inputs)).float()
        torch.cuda.current_stream().wait_stream(side)
        answer = torch.empty(logits.shape, pin_memory=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.no_grad():
            logits = _logits(model(*inputs)).float()
        return host, inputs, graph, logits, answer

    def infer(batch: Batch) -> np.ndarray:
        shape = batch["input_ids"].shape
        if shape not in made:
            made.clear()  # points come one after the other
            made[shape] = capture(batch)
        host, inputs, graph, logits, answer = made[shape]
        for name, pinned, tensor in zip(INPUTS, host, inputs, strict=True):
            pinned.numpy()[:] = batch[name]
            tensor.copy_(pinned, non_blocking=True)
        graph.replay()
        answer.copy_(logits, non_blocking=True)
        torch.cuda.synchronize()
        return answer.numpy().copy()

    return infer


def _logits(outputs: Any) -> torch.Tensor:
    return outputs[0] if isinstance(outputs, tuple) else outputs.logits


def candidates(
    bench: Bench, eager: Any, scope: contextlib.ExitStack
) -> tuple[dict[str, Infer], dict[str, str]]:
    """(what can be measured here, what cannot and why)."""
    half = factories.realistic_model(bench.size, TASK, layers=bench.layers)
    half = half.to(bench.device, bench.dtype)
    kernels = with_kernels(eager, TASK).to(bench.device, bench.dtype)
    found: dict[str, Infer] = {"torch eager": torch_infer(half, bench.device)}
    missing: dict[str, str] = {}
    if bench.device == "cuda":
        # beyond the limit, 8 by default, torch.compile would run new shapes eagerly
        torch._dynamo.config.recompile_limit = 2 * len(bench.points) + 2
        mode = {"mode": "max-autotune", "dynamic": False}
        found["torch.compile, max-autotune"] = torch_infer(torch.compile(half, **mode), "cuda")
        found[OURS + "torch, our kernels, CUDA graph"] = graphed_infer(kernels)
        compiled = torch.compile(kernels, **mode)
        found[OURS + "torch.compile around our kernels"] = torch_infer(compiled, "cuda")
    else:
        found[OURS + "torch, our kernels"] = torch_infer(kernels, bench.device)
    for name, open_engine in (
        ("onnxruntime-cuda, stock export", lambda: stock_onnxruntime(bench)),
        (OURS + "onnxruntime-cuda", lambda: our_engine(bench, eager, "onnxruntime")),
        (OURS + "tensorrt", lambda: our_engine(bench, eager, "tensorrt")),
    ):
        try:
            found[name] = scope.enter_context(open_engine())
        except (ConvBertDeployError, ImportError) as error:
            missing[name] = str(error)
    return found, missing


@contextlib.contextmanager
def stock_onnxruntime(bench: Bench) -> Iterator[Infer]:
    """transformers' model as torch exports it, on the CUDA provider, nothing of ours."""
    from convbert_deploy.backends.onnxruntime import OnnxRuntimeRunner, cuda_available

    if not cuda_available():
        raise ImportError("ONNX Runtime for CUDA is not installed: pip install onnxruntime-gpu")
    model = factories.realistic_model(bench.size, TASK, layers=bench.layers).to(bench.dtype)
    example = tuple(torch.ones(2, 17, dtype=torch.int64) for _ in INPUTS)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq", min=2, max=512)}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "stock.onnx")
        torch.onnx.export(
            model,
            kwargs=dict(zip(INPUTS, example, strict=True)),
            dynamo=True,
            input_names=list(INPUTS),
            output_names=["logits"],
            dynamic_shapes=dict.fromkeys(INPUTS, axes),
            verbose=False,
        ).save(path)
        with OnnxRuntimeRunner(path, cuda=True) as runner:
            yield lambda batch: runner.infer(batch)["logits"].astype(np.float32)


@contextlib.contextmanager
def our_engine(bench: Bench, eager: Any, backend: str) -> Iterator[Infer]:
    """What ``export`` and ``build-engine`` make of the same weights."""
    from convbert_deploy.backends.tensorrt_loading import import_tensorrt
    from convbert_deploy.build import BuildOptions, build_engine, resolve_backend
    from convbert_deploy.checkpoint import Checkpoint
    from convbert_deploy.exporting import ExportOptions, export
    from convbert_deploy.graph import Graph
    from convbert_deploy.precision import Precision

    if resolve_backend(backend) == "onnxruntime-cpu":
        raise ImportError("ONNX Runtime for CUDA is not installed: pip install onnxruntime-gpu")
    if backend == "tensorrt":
        import_tensorrt(backend)  # before the long way there
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        torch.save({k: v.cpu() for k, v in eager.state_dict().items()}, folder / "base.pt")
        checkpoint = Checkpoint.load(folder / "base.pt")
        export(checkpoint, folder / "base.onnx", ExportOptions(check=False))
        profile = ShapeProfile(*(_range(sizes) for sizes in (bench.batches, bench.seqs)))
        options = BuildOptions(precision=Precision.FP16, backend=backend, profile=profile)
        graph = Graph.load(folder / "base.onnx")
        engine = build_engine(graph, folder / "base.engine", options)
        with engine.runner() as runner:
            yield lambda batch: runner.infer(batch)["logits"]


def _range(sizes: Sequence[int]) -> ShapeRange:
    """From 1 to the largest, tuned for the one in the middle."""
    return ShapeRange(1, sorted(sizes)[len(sizes) // 2], max(sizes))


def check(found: dict[str, Infer], eager: Any, vocab: int) -> None:
    """Every candidate answers like the fp32 model. Raises SystemExit."""
    batch = batch_of(2, 16, vocab)
    with torch.inference_mode():
        tensors = [torch.from_numpy(batch[name]) for name in INPUTS]
        truth = eager.cpu()(*tensors).logits.numpy()
    for name, infer in found.items():
        worst = np.abs(infer(batch) - truth).max()
        if not worst <= TOLERANCE:
            raise SystemExit(f"error: {name} is off by {worst:.3g}, allowed {TOLERANCE}")


def milliseconds(found: dict[str, Infer], batch: Batch, rounds: int) -> dict[str, float]:
    """Median time of a request, the candidates taking turns."""
    times: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(rounds + 3):
        for name, infer in found.items():
            start = time.perf_counter()
            infer(batch)
            if turn >= 3:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def ceiling(bench: Bench) -> Ceiling:
    """This device's rates, by torch's own product and reduction."""
    cuda = bench.device == "cuda"
    sizes, nbytes = ((4096, 8192), 1 << 30) if cuda else ((256,), 1 << 20)
    rates = {}
    for size in sizes:
        a, b = (torch.ones(size, size, dtype=bench.dtype, device=bench.device) for _ in range(2))
        rates[size] = 2 * size**3 / _seconds(lambda a=a, b=b: a @ b, cuda) / 1e9
    best = max(rates, key=lambda size: rates[size])
    buffer = torch.ones(nbytes // 4, device=bench.device)
    target = torch.empty_like(buffer)
    name = "fp16" if cuda else "fp32"
    return Ceiling(
        threads=1,
        gemm_gflops={name: rates[best]},
        gemm_by={name: f"torch {best}x{best}x{best}"},
        read_gb_s=nbytes / _seconds(buffer.sum, cuda) / 1e9,
        copy_gb_s=2 * nbytes / _seconds(lambda: target.copy_(buffer), cuda) / 1e9,
        buffer_bytes=nbytes,
    )


def _seconds(call: Callable[[], Any], cuda: bool, calls: int = 10) -> float:
    """The best of five groups of calls, one call's share."""
    wait = torch.cuda.synchronize if cuda else lambda: None
    best = float("inf")
    for _ in range(6):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def row(point: tuple[int, int], spent: dict[str, float], floor_ms: float) -> list[list[str]]:
    """A line for each candidate; the last columns compare the best of ours with the best peer."""
    ours = {name: ms for name, ms in spent.items() if name.startswith(OURS)}
    peers = {name: ms for name, ms in spent.items() if name not in ours}
    best, peer = min(ours.values()), min(peers.values())
    return [
        [
            "{}x{}".format(*point),
            name,
            f"{ms:.3f}",
            f"{spent['torch eager'] / ms:.2f}",
            f"{100 * floor_ms / ms:.0f} %",
            f"{peer / best:.2f}" if ms == best and name in ours else "",
        ]
        for name, ms in spent.items()
    ]


COLUMNS = ["batch x seq", "candidate", "p50 ms", "x eager", "of the floor", "x the best peer"]


def report(bench: Bench, rows: Sequence[Sequence[str]], rates: Ceiling, missing: Any) -> str:
    facts = environment()
    header = benchmark_header(facts, threads=None, device=bench.device)
    name = "fp16" if bench.device == "cuda" else "fp32"
    return "\n".join(
        [
            f"# ConvBERT-{bench.size} {name}, classifier, host to host",
            "",
            f"- date: {datetime.date.today().isoformat()}",
            *[f"- {key}: {value}" for key, value in header.items()],
            f"- ceiling: {rates.gemm_gflops[name] / 1e3:.1f} TFLOP/s ({rates.gemm_by[name]}), "
            f"{rates.read_gb_s:.0f} GB/s read. The floor counts the last layer whole, of which our "
            "ONNX and TensorRT engines compute one row of each sequence.",
            *[f"- not measured: {name}: {reason}" for name, reason in missing.items()],
            "",
            markdown_table(COLUMNS, rows, left=2),
            "",
        ]
    )


def run(bench: Bench) -> str:
    eager = factories.realistic_model(bench.size, TASK, layers=bench.layers)
    vocab = eager.config.vocab_size
    costs = Costs(factories.architecture_of(eager), TASK)
    rates = ceiling(bench)
    arithmetic = "fp16" if bench.device == "cuda" else "fp32"
    rows: list[list[str]] = []
    with contextlib.ExitStack() as scope:
        found, missing = candidates(bench, eager, scope)
        check(found, eager, vocab)
        for batch, seq in bench.points:
            spent = milliseconds(found, batch_of(batch, seq, vocab), bench.rounds)
            floor = costs.floor([seq] * batch, 1, arithmetic, rates)
            assert floor is not None
            rows += row((batch, seq), spent, floor.ms)
            print(f"{batch}x{seq}", spent, file=sys.stderr, flush=True)
    return report(bench, rows, rates, missing)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--markdown", type=pathlib.Path)
    parser.add_argument("--batch", type=_sizes, default=BATCHES, help="comma list")
    parser.add_argument("--seq", type=_sizes, default=SEQS, help="comma list")
    parser.add_argument("--rounds", type=int, default=ON_GPU.rounds)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        print("error: torch sees no CUDA device: this benchmark needs one", file=sys.stderr)
        return 3
    asked = {"batches": options.batch, "seqs": options.seq, "rounds": options.rounds}
    text = run(DRY if options.dry_run else dataclasses.replace(ON_GPU, **asked))
    print(text)
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
