"""The operator alone on CPU: our kernel, the sliced function, the unfold of transformers, a memcpy.

``python benchmarks/span_dynamic_conv.py --markdown benchmarks/results/FILE.md``. Interleaved runs,
float32, one thread; width 384 in 6 heads of 64 and kernel size 9, as in ConvBERT-base.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

import numpy as np
import onnx
import torch

from convbert_deploy.backends.base import Batch, RunnerOptions
from convbert_deploy.backends.onnxruntime import OnnxRuntimeRunner
from convbert_deploy.benchmark import BenchOptions, Candidate, Point, measure
from convbert_deploy.custom_op import DOMAIN, OP_TYPE, function_proto
from convbert_deploy.environment import benchmark_header, environment
from convbert_deploy.exporting import OPSET
from convbert_deploy.plugin_library import ort_library
from convbert_deploy.report import to_markdown

HEADS, HEAD_DIM, TAPS = 6, 64, 9
WIDTH = HEADS * HEAD_DIM


def one_node(*, with_function: bool) -> onnx.ModelProto:
    infos = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", "seq", width])
        for name, width in (("value", WIDTH), ("logits", HEADS * TAPS), ("out", WIDTH))
    ]
    node = onnx.helper.make_node(
        OP_TYPE, ["value", "logits"], ["out"], domain=DOMAIN, num_heads=HEADS, kernel_size=TAPS
    )
    return onnx.helper.make_model(
        onnx.helper.make_graph([node], "operator", infos[:2], infos[2:]),
        opset_imports=[onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, 1)],
        functions=[function_proto(HEADS, TAPS, OPSET)] if with_function else [],
        ir_version=10,
    )


class Unfold:
    """The convolution the way transformers computes it, in eager torch."""

    name = "torch eager, unfold"

    def infer(self, batch: Batch) -> dict[str, np.ndarray]:
        value, logits = torch.from_numpy(batch["value"]), torch.from_numpy(batch["logits"])
        rows, seq, _ = value.shape
        weights = torch.softmax(logits.reshape(-1, TAPS, 1), dim=1)
        columns = value.transpose(1, 2).contiguous().unsqueeze(-1)
        columns = torch.nn.functional.unfold(columns, [TAPS, 1], padding=[TAPS // 2, 0])
        columns = (
            columns.transpose(1, 2).reshape(rows, seq, WIDTH, TAPS).reshape(-1, HEAD_DIM, TAPS)
        )
        return {"out": (columns @ weights).reshape(rows, seq, WIDTH).numpy()}


class Memcpy:
    """The values copied once: what moving them costs."""

    name = "memcpy of the values"

    def __init__(self) -> None:
        self._targets: dict[tuple[int, ...], np.ndarray] = {}

    def infer(self, batch: Batch) -> dict[str, np.ndarray]:
        value = batch["value"]
        target = self._targets.setdefault(value.shape, np.empty_like(value))
        np.copyto(target, value)
        return {"out": target}


def make_batch(point: Point) -> Batch:
    random = np.random.default_rng(0)
    shape = (point.batch, point.seq)
    return {
        "value": random.standard_normal((*shape, WIDTH), np.float32),
        "logits": random.standard_normal((*shape, HEADS * TAPS), np.float32),
        "attention_mask": np.ones(shape, np.int64),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--markdown", type=pathlib.Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    threads = RunnerOptions(threads=1)
    kernel = OnnxRuntimeRunner.from_model(
        one_node(with_function=False), options=threads, library=ort_library()
    )
    sliced = OnnxRuntimeRunner.from_model(one_node(with_function=True), options=threads)
    with kernel, sliced, torch.inference_mode():
        report = measure(
            [
                Candidate("torch eager, unfold", Unfold()),
                Candidate("stock ONNX Runtime, sliced function", sliced),
                Candidate("SpanDynamicConv kernel", kernel),
                Candidate("memcpy of the values", Memcpy()),
            ],
            [Point(1, 128), Point(8, 128), Point(1, 512)],
            make_batch,
            BenchOptions(min_time_s=2.0, min_runs=100, max_runs=2000, warmup=5),
            header=benchmark_header(environment(), threads=1),
            progress=lambda text: print(text, file=sys.stderr),
        )
    text = to_markdown(report)
    print(text)
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(text + "\n")


if __name__ == "__main__":
    main()
