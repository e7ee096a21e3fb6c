"""Whether EncoderLayer's own matrix products are worth keeping: a whole layer beside the products of
a layer alone in well-kept libraries.

``python benchmarks/encoder_layer.py --markdown benchmarks/results/FILE.md``. A layer of ConvBERT-base
(six linear maps, attention, convolution, GELU, LayerNorms) as EncoderLayer in fp32, bf16 and int8; and
only the six linear maps, without bias, in ONNX Runtime (MLAS: MatMul fp32, DynamicQuantizeMatMul
int8 by column) and in torch (fp32: its BLAS; bf16: oneDNN). Four layers' weights in turn a call, so
that none stays in a small cache. Interleaved runs, one thread.
"""

from __future__ import annotations

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from operator_bench import ONE_THREAD, markdown_target, report

from convbert_deploy.backends.base import Batch
from convbert_deploy.backends.onnxruntime import OnnxRuntimeRunner
from convbert_deploy.benchmarking import Candidate, Point
from convbert_deploy.exporting import OPSET
from convbert_deploy.operators import DOMAIN
from convbert_deploy.operators.encoder_layer import LayerAttributes, LayerInputs, layer_node
from convbert_deploy.operators.packed_weight import LinearWeight, WeightType, packed, quantized
from convbert_deploy.plugin_library import ort_library

HIDDEN, HEADS, HEAD_DIM, TAPS, INTERMEDIATE, LAYERS = 768, 6, 64, 9, 3072, 4
WIDTH = HEADS * HEAD_DIM
LINEARS = {
    "projections": (HIDDEN, 4 * WIDTH),
    "pointwise": (HIDDEN, WIDTH),
    "generator": (WIDTH, HEADS * TAPS),
    "attention_output": (2 * WIDTH, HIDDEN),
    "up": (HIDDEN, INTERMEDIATE),
    "down": (INTERMEDIATE, HIDDEN),
}


def weights(layer: int) -> dict[str, np.ndarray]:
    """float32 (in, out) by linear map."""
    random = np.random.default_rng(layer)
    return {
        name: (random.standard_normal(shape) / shape[0] ** 0.5).astype(np.float32)
        for name, shape in LINEARS.items()
    }


def model(nodes: list[onnx.NodeProto], tensors: dict[str, np.ndarray], out: str) -> onnx.ModelProto:
    infos = [
        helper.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in (
            ("rows", onnx.TensorProto.FLOAT, ["rows", HIDDEN]),
            ("row_starts", onnx.TensorProto.INT64, ["sequences"]),
        )
    ]
    result = helper.make_tensor_value_info(out, onnx.TensorProto.FLOAT, None)
    initializers = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    versions = {"": OPSET, DOMAIN: 1, "com.microsoft": 1}
    return helper.make_model(
        helper.make_graph(nodes, "layers", infos, [result], initializers),
        opset_imports=[helper.make_opsetid(name, version) for name, version in versions.items()],
        ir_version=10,
    )


def layers(kind: WeightType) -> onnx.ModelProto:
    """LAYERS EncoderLayer nodes, one after the other."""
    nodes, tensors, previous = [], {}, "rows"
    for layer in range(LAYERS):
        fields: dict[str, np.ndarray] = {
            "depthwise_weight": np.full((TAPS, HIDDEN), 0.1, np.float32),
            "attention_norm_weight": np.ones(HIDDEN, np.float32),
            "attention_norm_bias": np.zeros(HIDDEN, np.float32),
            "output_norm_weight": np.ones(HIDDEN, np.float32),
            "output_norm_bias": np.zeros(HIDDEN, np.float32),
        }
        for name, weight in weights(layer).items():
            own = WeightType.BF16 if kind is WeightType.INT8 and name == "generator" else kind
            linear = (
                quantized(weight[None])
                if own is WeightType.INT8
                else LinearWeight(weight[None], own)
            )
            fields[f"{name}_weight"] = packed(linear)
            fields[f"{name}_bias"] = np.zeros(weight.shape[1], np.float32)
        tensors |= {f"{layer}.{name}": array for name, array in fields.items()}
        inputs = LayerInputs(
            rows=previous,
            row_starts="row_starts",
            attention_mask=None,
            **{name: f"{layer}.{name}" for name in fields},
        )
        previous = f"layer_{layer}"
        half = int(kind is not WeightType.FP32)
        nodes.append(layer_node(inputs, LayerAttributes(HEADS, TAPS, 1e-12, half), previous))
    return model(nodes, tensors, previous)


def products(int8: bool) -> onnx.ModelProto:
    """The linear maps of LAYERS layers alone. Those that do not take the layer's input take slices
    of a wide one, so that every product has its real shape."""
    pads = np.array([0, 0, 0, INTERMEDIATE - HIDDEN])
    tensors = {"pads": pads, "axis": np.array([1]), "from": np.array([0]), "one": np.array([1])}
    nodes = [helper.make_node("Pad", ["rows", "pads"], ["padded"])]
    for width in {inputs for inputs, _ in LINEARS.values()}:
        tensors[f"to_{width}"] = np.array([width])
        nodes.append(
            helper.make_node("Slice", ["padded", "from", f"to_{width}", "axis"], [f"in_{width}"])
        )
    sums = []
    for layer in range(LAYERS):
        for name, weight in weights(layer).items():
            key, source = f"{layer}.{name}", f"in_{weight.shape[0]}"
            if int8:
                linear = quantized(weight[None])
                tensors |= {f"{key}.q": linear.weight[0], f"{key}.scale": linear.scale}
                inputs = [source, f"{key}.q", f"{key}.scale"]
                node = helper.make_node(
                    "DynamicQuantizeMatMul", inputs, [key], domain="com.microsoft"
                )
            else:
                tensors[key + ".w"] = weight
                node = helper.make_node("MatMul", [source, key + ".w"], [key])
            # a single value of each is kept, so that no product is left out and none is copied
            nodes += [
                node,
                helper.make_node("Slice", [key, "from", "one", "axis"], [key + ".kept"]),
            ]
            sums.append(key + ".kept")
    nodes.append(helper.make_node("Sum", sums, ["sum"]))
    return model(nodes, tensors, "sum")


class TorchProducts:
    """The linear maps of LAYERS layers in torch."""

    input_names, output_names = ("rows",), ()

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self._dtype = name, dtype
        self._weights = [
            torch.from_numpy(np.ascontiguousarray(weight.T)).to(dtype)
            for layer in range(LAYERS)
            for weight in weights(layer).values()
        ]

    def __enter__(self) -> TorchProducts:
        torch.set_num_threads(1)
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def infer(self, batch: Batch) -> dict[str, np.ndarray]:
        rows = torch.from_numpy(batch["rows"]).to(self._dtype)
        wide = torch.nn.functional.pad(rows, (0, INTERMEDIATE - HIDDEN))
        inputs = {width: wide[:, :width].contiguous() for width in (HIDDEN, WIDTH, INTERMEDIATE)}
        with torch.inference_mode():
            for weight in self._weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)
        return {}


def make_batch(point: Point) -> Batch:
    random = np.random.default_rng(0)
    rows = point.batch * point.seq
    return {
        "rows": random.standard_normal((rows, HIDDEN), np.float32),
        "row_starts": np.arange(point.batch + 1, dtype=np.int64) * point.seq,
        "attention_mask": np.ones((point.batch, point.seq), np.int64),
    }


def main() -> None:
    target = markdown_target(__doc__)

    def runner(graph: onnx.ModelProto) -> OnnxRuntimeRunner:
        return OnnxRuntimeRunner.from_model(graph, options=ONE_THREAD, library=ort_library())

    runners = {
        "EncoderLayer fp32": runner(layers(WeightType.FP32)),
        "products alone, MLAS fp32": runner(products(int8=False)),
        "products alone, torch fp32": TorchProducts("torch fp32", torch.float32),
        "EncoderLayer bf16": runner(layers(WeightType.BF16)),
        "products alone, oneDNN bf16": TorchProducts("torch bf16", torch.bfloat16),
        "EncoderLayer int8": runner(layers(WeightType.INT8)),
        "products alone, MLAS int8": runner(products(int8=True)),
    }
    candidates = []
    for name, one in runners.items():
        one.__enter__()
        candidates.append(Candidate(name, one))
    points = [Point(1, 32), Point(1, 128), Point(8, 128), Point(1, 512)]
    report(candidates, points, make_batch, target)


if __name__ == "__main__":
    main()
