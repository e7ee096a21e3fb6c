"""The depthwise convolution alone on CPU: our kernel, stock Transpose-Conv-Transpose, torch, a memcpy.

``python benchmarks/depthwise_conv1d.py --markdown benchmarks/results/FILE.md``. Interleaved runs,
float32, one thread; 768 channels and kernel size 9, as in ConvBERT-base's key convolution.
"""

from __future__ import annotations

import numpy as np
import onnx
import torch
from operator_bench import ONE_THREAD, markdown_target, report

from convbert_deploy.backends.base import Batch
from convbert_deploy.backends.onnxruntime import OnnxRuntimeRunner
from convbert_deploy.benchmarking import Candidate, Point
from convbert_deploy.exporting import OPSET
from convbert_deploy.plugin_library import ort_library

CHANNELS, TAPS = 768, 9
#: tap-major, as our operator takes it
WEIGHT = np.random.default_rng(1).standard_normal((TAPS, CHANNELS), np.float32)
#: as torch and ONNX take it
FILTERS = np.ascontiguousarray(WEIGHT.T[:, None, :])


def model(nodes: list[onnx.NodeProto], weight: np.ndarray) -> onnx.ModelProto:
    infos = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", "seq", CHANNELS])
        for name in ("input", "out")
    ]
    initializers = [onnx.numpy_helper.from_array(weight, "weight")]
    return onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "operator", infos[:1], infos[1:], initializers),
        opset_imports=[
            onnx.helper.make_opsetid("", OPSET),
            onnx.helper.make_opsetid("convbert", 1),
        ],
        ir_version=10,
    )


def ours() -> onnx.ModelProto:
    node = onnx.helper.make_node("DepthwiseConv1D", ["input", "weight"], ["out"], domain="convbert")
    return model([node], WEIGHT)


def stock() -> onnx.ModelProto:
    make = onnx.helper.make_node
    nodes = [
        make("Transpose", ["input"], ["rows"], perm=[0, 2, 1]),
        make(
            "Conv",
            ["rows", "weight"],
            ["convolved"],
            group=CHANNELS,
            kernel_shape=[TAPS],
            pads=[TAPS // 2, TAPS // 2],
        ),
        make("Transpose", ["convolved"], ["out"], perm=[0, 2, 1]),
    ]
    return model(nodes, FILTERS)


class Eager:
    """conv1d between two transposes, the second one carried out."""

    name = "torch eager, conv1d"

    def infer(self, batch: Batch) -> dict[str, np.ndarray]:
        rows = torch.from_numpy(batch["input"]).transpose(1, 2)
        out = torch.nn.functional.conv1d(
            rows, torch.from_numpy(FILTERS), padding=TAPS // 2, groups=CHANNELS
        )
        return {"out": out.transpose(1, 2).contiguous().numpy()}


class Memcpy:
    """The input copied once: what moving it costs."""

    name = "memcpy of the input"

    def __init__(self) -> None:
        self._targets: dict[tuple[int, ...], np.ndarray] = {}

    def infer(self, batch: Batch) -> dict[str, np.ndarray]:
        source = batch["input"]
        target = self._targets.setdefault(source.shape, np.empty_like(source))
        np.copyto(target, source)
        return {"out": target}


def make_batch(point: Point) -> Batch:
    random = np.random.default_rng(0)
    shape = (point.batch, point.seq)
    return {
        "input": random.standard_normal((*shape, CHANNELS), np.float32),
        "attention_mask": np.ones(shape, np.int64),
    }


def main() -> None:
    target = markdown_target(__doc__)
    torch.set_num_threads(1)
    kernel = OnnxRuntimeRunner.from_model(ours(), options=ONE_THREAD, library=ort_library())
    transposed = OnnxRuntimeRunner.from_model(stock(), options=ONE_THREAD)
    with kernel, transposed, torch.inference_mode():
        report(
            [
                Candidate("torch eager, conv1d", Eager()),
                Candidate("stock ONNX Runtime, Transpose-Conv-Transpose", transposed),
                Candidate("DepthwiseConv1D kernel", kernel),
                Candidate("memcpy of the input", Memcpy()),
            ],
            [Point(1, 128), Point(8, 128), Point(1, 512)],
            make_batch,
            target,
        )


if __name__ == "__main__":
    main()
