"""The operator alone on CPU: our kernel, the sliced function, the unfold of transformers, a memcpy.

``python benchmarks/span_dynamic_conv.py --markdown benchmarks/results/FILE.md``. Interleaved runs,
float32, one thread; width 384 in 6 heads of 64 and kernel size 9, as in ConvBERT-base. Baseline: the
convolution as transformers writes it, exported to ONNX, in stock ONNX Runtime. Our kernel is timed
twice: as a node of ONNX Runtime, and called through its C ABI into a buffer that is there already.

A call computes the operator CHAIN times, each on the output of the one before, as the layers of the
model do: calling a session costs 10 to 20 microseconds whatever is in it, more than one operator.
"""

from __future__ import annotations

import ctypes
import io
import itertools
import warnings

import numpy as np
import onnx
import torch
from operator_bench import ONE_THREAD, markdown_target, report

from convbert_deploy.backends.base import Batch
from convbert_deploy.backends.onnxruntime import OnnxRuntimeRunner
from convbert_deploy.benchmarking import Candidate, Point
from convbert_deploy.exporting import OPSET
from convbert_deploy.operators import DOMAIN
from convbert_deploy.operators.span_dynamic_conv import OP_TYPE, function_proto
from convbert_deploy.plugin_library import kernels_library, ort_library

HEADS, HEAD_DIM, TAPS = 6, 64, 9
WIDTH = HEADS * HEAD_DIM
CHAIN = 12


def chained(*, with_function: bool) -> onnx.ModelProto:
    infos = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", "seq", width])
        for name, width in (("value", WIDTH), ("logits", HEADS * TAPS), ("out", WIDTH))
    ]
    names = ["value", *(f"value_{layer}" for layer in range(1, CHAIN)), "out"]
    nodes = [
        onnx.helper.make_node(
            OP_TYPE, [given, "logits"], [made], domain=DOMAIN, num_heads=HEADS, kernel_size=TAPS
        )
        for given, made in itertools.pairwise(names)
    ]
    return onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "operators", infos[:2], infos[2:]),
        opset_imports=[onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, 1)],
        functions=[function_proto(HEADS, TAPS, OPSET)] if with_function else [],
        ir_version=10,
    )


class Unfold(torch.nn.Module):
    """The convolution of transformers' ConvBertSelfAttention.forward, operation by operation, from
    the output of conv_kernel_layer and of conv_out_layer on."""

    def forward(self, value: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        for _ in range(CHAIN):
            value = self.convolve(value, logits)
        return value

    def convolve(self, value: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        batch = value.shape[0]
        kernels = torch.softmax(torch.reshape(logits, [-1, TAPS, 1]), dim=1)
        values = torch.reshape(value, [batch, -1, WIDTH])
        values = values.transpose(1, 2).contiguous().unsqueeze(-1)
        values = torch.nn.functional.unfold(
            values, kernel_size=[TAPS, 1], dilation=1, padding=[(TAPS - 1) // 2, 0], stride=1
        )
        values = values.transpose(1, 2).reshape(batch, -1, WIDTH, TAPS)
        values = torch.reshape(values, [-1, HEAD_DIM, TAPS])
        out = torch.reshape(torch.matmul(values, kernels), [-1, WIDTH])
        return torch.reshape(out, [batch, -1, WIDTH])


def exported_unfold() -> onnx.ModelProto:
    """As torch.onnx.export writes it, for any batch and sequence length."""
    example = torch.zeros(2, 16, WIDTH), torch.zeros(2, 16, HEADS * TAPS)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq")}
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Unfold(),
            example,
            buffer,
            dynamo=True,
            opset_version=OPSET,
            input_names=["value", "logits"],
            output_names=["out"],
            dynamic_shapes=(axes, axes),
            verbose=False,
        )
    return onnx.load_from_string(buffer.getvalue())


class Eager:
    """The same in eager torch."""

    name = "torch eager, unfold"

    def infer(self, batch: Batch) -> dict[str, np.ndarray]:
        value, logits = torch.from_numpy(batch["value"]), torch.from_numpy(batch["logits"])
        return {"out": Unfold()(value, logits).numpy()}


class Direct:
    """The kernel through its C ABI, on the calling thread."""

    name = "SpanDynamicConv kernel, C ABI"

    class Params(ctypes.Structure):
        """SpanDynamicConvParams of plugins/span_dynamic_conv/span_dynamic_conv.h."""

        _fields_ = [
            *[(name, ctypes.c_void_p) for name in ("value", "logits", "mask", "output")],
            *[(name, ctypes.c_int64) for name in ("batch", "seq")],
            *[(f"stride_{index}", ctypes.c_int64) for index in range(7)],
            *[(name, ctypes.c_int32) for name in ("heads", "head_dim", "kernel_size", "dtype")],
        ]

    def __init__(self) -> None:
        self._run = ctypes.CDLL(str(kernels_library())).convbert_span_dynamic_conv_cpu
        # Made once a batch (which is kept, for its id to stay its own): what is timed is the call.
        self._calls: dict[int, tuple[Batch, list[Direct.Params], list[np.ndarray]]] = {}

    def infer(self, batch: Batch) -> dict[str, np.ndarray]:
        if id(batch) not in self._calls:
            # two buffers in turn, as a runtime's planner would have it
            made = [np.zeros_like(batch["value"]) for _ in range(2)]
            values = [batch["value"], *(made[layer % 2] for layer in range(CHAIN))]
            calls = [
                self._params(given, batch["logits"], target)
                for given, target in itertools.pairwise(values)
            ]
            self._calls[id(batch)] = batch, calls, values
        _, calls, values = self._calls[id(batch)]
        for params in calls:
            status = self._run(ctypes.byref(params))
            if status:
                raise RuntimeError(f"status {status}")
        return {"out": values[-1]}

    def _params(self, value: np.ndarray, logits: np.ndarray, output: np.ndarray) -> Direct.Params:
        rows, seq, _ = value.shape
        taps = HEADS * TAPS
        strides = (seq * WIDTH, WIDTH, seq * taps, taps, seq, seq * WIDTH, WIDTH)
        pointers = (value.ctypes.data, logits.ctypes.data, None, output.ctypes.data)
        return self.Params(*pointers, rows, seq, *strides, HEADS, HEAD_DIM, TAPS, 0)


class Memcpy:
    """The values copied: what moving them costs."""

    name = "memcpy of the values"

    def __init__(self) -> None:
        self._targets: dict[tuple[int, ...], list[np.ndarray]] = {}

    def infer(self, batch: Batch) -> dict[str, np.ndarray]:
        value = batch["value"]
        if value.shape not in self._targets:
            self._targets[value.shape] = [np.zeros_like(value) for _ in range(2)]
        for layer in range(CHAIN):
            target = self._targets[value.shape][layer % 2]
            np.copyto(target, value)
            value = target
        return {"out": value}


def make_batch(point: Point) -> Batch:
    random = np.random.default_rng(0)
    shape = (point.batch, point.seq)
    return {
        "value": random.standard_normal((*shape, WIDTH), np.float32),
        "logits": random.standard_normal((*shape, HEADS * TAPS), np.float32),
        "attention_mask": np.ones(shape, np.int64),
    }


def check(candidates: list[Candidate]) -> None:
    """All compute the same, or the times mean nothing. The last one, the memcpy, does not."""
    batch = make_batch(Point(2, 37))
    expected = candidates[0].runner.infer(batch)["out"]
    for candidate in candidates[1:-1]:
        error = np.abs(candidate.runner.infer(batch)["out"] - expected).max()
        if not error <= 1e-5:
            raise SystemExit(f"{candidate.name} is off by {error:.3g}")


def main() -> None:
    target = markdown_target(__doc__)
    torch.set_num_threads(1)
    kernel = OnnxRuntimeRunner.from_model(
        chained(with_function=False), options=ONE_THREAD, library=ort_library()
    )
    sliced = OnnxRuntimeRunner.from_model(chained(with_function=True), options=ONE_THREAD)
    unfold = OnnxRuntimeRunner.from_model(exported_unfold(), options=ONE_THREAD)
    with kernel, sliced, unfold, torch.inference_mode():
        candidates = [
            Candidate("stock ONNX Runtime, unfold as exported from transformers", unfold),
            Candidate("torch eager, unfold", Eager()),
            Candidate("stock ONNX Runtime, sliced function", sliced),
            Candidate("SpanDynamicConv kernel in ONNX Runtime", kernel),
            Candidate("SpanDynamicConv kernel, C ABI", Direct()),
            Candidate("memcpy of the values", Memcpy()),
        ]
        check(candidates)
        report(
            candidates,
            [Point(1, 128), Point(8, 128), Point(1, 512)],
            make_batch,
            target,
        )


if __name__ == "__main__":
    main()
