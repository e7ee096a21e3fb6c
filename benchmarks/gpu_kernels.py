"""The CUDA kernels on the GPU beside torch: eager, torch.compile, and a device-to-device copy.

Needs torch with CUDA and the kernels built with nvcc, nothing else.
``python benchmarks/gpu_kernels.py --markdown benchmarks/results/FILE.md``. Each candidate is captured
in a CUDA graph of 20 calls (torch.compile too), the graphs are replayed in turn, and the median time
of a call is given. Bytes are what must move: every input once, the output once; the copy reads and
writes as many bytes as the operator's largest input and its output.
"""

from __future__ import annotations

import argparse
import ctypes
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tests"))

import torch

from convbert_deploy.environment import benchmark_header, environment
from convbert_deploy.plugin_library import kernels_library
from convbert_deploy.report_table import markdown_table

from kernels import cases
from kernels import test_depthwise_conv1d as depthwise
from kernels import test_fused_span_dynamic_conv as fused

#: ConvBERT-base's convolution branch and hidden size
HEADS, HEAD_DIM, TAPS, HIDDEN = 6, 64, 9, 768
SHAPES = [(1, 32), (1, 128), (8, 128), (32, 128), (32, 512)]
CALLS_PER_GRAPH = 20

Call = Callable[[], Any]


def launcher(kernels: ctypes.CDLL, name: str, params: ctypes.Structure) -> Call:
    entry = getattr(kernels, f"convbert_{name}_cuda")
    entry.argtypes = [ctypes.c_void_p, ctypes.c_void_p]

    def call() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        if error := entry(ctypes.byref(params), stream):
            raise SystemExit(f"error: {name} returned cudaError_t {error}")

    return call


def unfold(value: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The convolution the way transformers computes it."""
    batch, seq, width = value.shape
    weights = torch.softmax(logits.reshape(-1, TAPS, 1), dim=1)
    columns = value.transpose(1, 2).contiguous().unsqueeze(-1)
    columns = torch.nn.functional.unfold(columns, [TAPS, 1], padding=[TAPS // 2, 0])
    columns = columns.transpose(1, 2).reshape(batch, seq, width, TAPS).reshape(-1, HEAD_DIM, TAPS)
    return (columns @ weights).reshape(batch, seq, width)


def sliced(value: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """K shifted slices: what fuses best in a compiler."""
    batch, seq, _ = value.shape
    weights = torch.softmax(logits.reshape(batch, seq, HEADS, TAPS), dim=-1)
    padded = torch.nn.functional.pad(value, (0, 0, TAPS // 2, TAPS // 2))
    by_head = padded.reshape(batch, seq + TAPS - 1, HEADS, HEAD_DIM)
    total = sum(by_head[:, k : k + seq] * weights[..., k : k + 1] for k in range(TAPS))
    return total.reshape(value.shape)


def span_dynamic_conv(kernels, batch, seq, dtype) -> tuple[dict[str, Call], int]:
    value, logits = (t.cuda() for t in cases.inputs(batch, seq, HEADS, HEAD_DIM, TAPS, dtype))
    output, compiled = torch.empty_like(value), torch.compile(sliced, dynamic=False)
    params = cases.params_of(value, logits, output, HEADS, TAPS)
    candidates = {
        "SpanDynamicConv": launcher(kernels, "span_dynamic_conv", params),
        "torch eager, unfold": lambda: unfold(value, logits),
        "torch.compile, sliced": lambda: compiled(value, logits),
        "copy": lambda: output.copy_(value),
    }
    return candidates, sum(t.numel() * t.element_size() for t in (value, logits, output))


def depthwise_conv1d(kernels, batch, seq, dtype) -> tuple[dict[str, Call], int]:
    source, weight = (t.cuda() for t in depthwise.inputs(batch, seq, HIDDEN, TAPS, dtype))
    filters = weight.t().unsqueeze(1).contiguous()
    output = torch.empty_like(source)
    params = depthwise.params_of(source, weight, output)

    def conv1d(x: torch.Tensor) -> torch.Tensor:
        by_channel = x.transpose(1, 2)
        result = torch.nn.functional.conv1d(by_channel, filters, padding=TAPS // 2, groups=HIDDEN)
        return result.transpose(1, 2)

    compiled = torch.compile(conv1d, dynamic=False)
    candidates = {
        "DepthwiseConv1D": launcher(kernels, "depthwise_conv1d", params),
        "torch eager, conv1d": lambda: conv1d(source),
        "torch.compile, conv1d": lambda: compiled(source),
        "copy": lambda: output.copy_(source),
    }
    return candidates, sum(t.numel() * t.element_size() for t in (source, weight, output))


def fused_span_dynamic_conv(kernels, batch, seq, dtype) -> tuple[dict[str, Call], int]:
    case = fused.make_case((batch, seq, HEADS, HEAD_DIM, TAPS), dtype)
    key_conv, projections, weight, bias = (
        t.cuda() for t in (case.key_conv, case.projections, case.weight, case.bias)
    )
    moved = fused.Case(
        key_conv,
        projections,
        weight,
        bias,
        None,
        HEADS,
        TAPS,
        case.query_offset,
        case.value_offset,
    )
    output, made, logits = (torch.empty_like(key_conv) for _ in range(3))
    channels = HEADS * HEAD_DIM
    value = projections[..., case.value_offset :]
    query = projections[..., :channels]
    logits = torch.empty(batch, seq, HEADS * TAPS, dtype=dtype, device="cuda")
    convolve = launcher(
        kernels, "span_dynamic_conv", cases.params_of(value, logits, made, HEADS, TAPS)
    )

    def separate() -> None:
        torch.addmm(
            bias,
            (query * key_conv).view(-1, channels),
            weight,
            out=logits.view(-1, logits.shape[2]),
        )
        convolve()

    def eager() -> torch.Tensor:
        return sliced(value, (query * key_conv) @ weight + bias)

    compiled = torch.compile(eager, dynamic=False)
    candidates = {
        "FusedSpanDynamicConv": launcher(
            kernels, "fused_span_dynamic_conv", fused.params_of(moved, output)
        ),
        "torch product + SpanDynamicConv": separate,
        "torch eager, sliced": eager,
        "torch.compile, sliced": compiled,
        "copy": lambda: output.copy_(key_conv),
    }
    moving = 4 * key_conv.numel()  # key_conv, query, value and the output
    return candidates, (moving + weight.numel()) * key_conv.element_size()


def captured(call: Call) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_PER_GRAPH):
            call()
    return graph


def microseconds(candidates: dict[str, Call], rounds: int) -> dict[str, float]:
    """Median time of one call each, the candidates taking turns."""
    graphs = {name: captured(call) for name, call in candidates.items()}
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(rounds + 3):
        for name, graph in graphs.items():
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn >= 3:
                times[name].append(begin.elapsed_time(end) * 1000 / CALLS_PER_GRAPH)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--markdown", type=pathlib.Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "error: torch sees no CUDA device: this benchmark needs an NVIDIA GPU", file=sys.stderr
        )
        return 3
    kernels = cases.load_kernels(kernels_library())
    if not kernels.convbert_built_with_cuda():
        print(
            "error: the kernels are built without CUDA: make install with nvcc on the PATH",
            file=sys.stderr,
        )
        return 3
    rows = []
    for operator in (span_dynamic_conv, depthwise_conv1d, fused_span_dynamic_conv):
        for name, dtype in cases.DTYPES.items():
            for batch, seq in SHAPES:
                candidates, moved = operator(kernels, batch, seq, dtype)
                print(f"{operator.__name__} {name} {batch}x{seq}", file=sys.stderr, flush=True)
                with torch.inference_mode():
                    spent = microseconds(candidates, options.rounds)
                (ours, *_), copy = spent, spent["copy"]
                channels = HIDDEN if operator is depthwise_conv1d else HEADS * HEAD_DIM
                copied = 2 * batch * seq * channels * dtype.itemsize
                for candidate, time in spent.items():
                    nbytes = copied if candidate == "copy" else moved
                    rate, ceiling = nbytes / time / 1e3, copied / copy / 1e3
                    rows.append(
                        [
                            operator.__name__,
                            f"{name} {batch}x{seq}",
                            candidate,
                            f"{time:.2f}",
                            f"{time / spent[ours]:.2f}",
                            f"{rate:.0f}",
                            f"{100 * rate / ceiling:.0f} %",
                        ]
                    )
    header = benchmark_header(environment(), threads=None, device="cuda")
    columns = ["operator", "case", "candidate", "us", "x ours", "GB/s", "of the copy's rate"]
    text = "\n".join(
        [
            "# CUDA kernels",
            "",
            *[f"- {key}: {value}" for key, value in header.items()],
            f"- device name: {torch.cuda.get_device_name()}, torch {torch.__version__}",
            "",
            markdown_table(columns, rows),
            "",
        ]
    )
    print(text)
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
