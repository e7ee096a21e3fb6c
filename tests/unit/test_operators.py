"""Our operators in ONNX: the functions that stand in for them, and the fusing rewrite."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from convbert_deploy.architecture import Task
from convbert_deploy.backends.onnxruntime import OnnxRuntimeRunner
from convbert_deploy.calibration import typed_graph
from convbert_deploy.errors import GraphError
from convbert_deploy.exporting import traced_graph
from convbert_deploy.operators import functions_of, nodes_of
from convbert_deploy.operators.fused_span_dynamic_conv import fuse
from convbert_deploy.parity_cases import random_batch
from convbert_deploy.precision import Precision
from convbert_deploy.reference import (
    depthwise_conv1d,
    fused_span_dynamic_conv,
    span_dynamic_conv,
)

import factories

SEQS = [1, 2, 8, 33]
MODEL = factories.realistic_model("small", Task.TOKEN_CLASSIFICATION, layers=2)


def one_node(op_type, inputs, weights, mask, **attributes) -> onnx.ModelProto:
    """A model of one node and its function; ``inputs`` and ``weights`` are arrays by name."""
    names = [*inputs, *weights]
    feeds = dict(inputs) | ({} if mask is None else {"mask": mask})
    node = onnx.helper.make_node(
        op_type, names + ([] if mask is None else ["mask"]), ["o"], domain="convbert", **attributes
    )
    infos = [
        onnx.helper.make_tensor_value_info(
            name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), ["b", "s", *array.shape[2:]]
        )
        for name, array in feeds.items()
    ]
    output = onnx.helper.make_tensor_value_info("o", 1, ["b", "s", None])
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            [node],
            "one",
            infos,
            [output],
            [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("convbert", 1)],
        ir_version=10,
    )
    model.functions.extend(functions_of(model, 20))
    onnx.checker.check_model(model)
    return model


def answer(model, feeds) -> np.ndarray:
    with OnnxRuntimeRunner.from_model(model) as runner:
        return runner.infer(feeds)["o"]


def masks(seq: int, masked: bool, random) -> np.ndarray | None:
    if not masked:
        return None
    mask = (random.random((2, seq)) < 0.6).astype(np.int64)
    mask[1] = 0
    return mask


def torch_of(array):
    return None if array is None else torch.from_numpy(array)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("heads", "kernel", "head_dim"), [(1, 1, 8), (2, 3, 48), (6, 9, 64), (4, 15, 32)]
)
@pytest.mark.parametrize("seq", SEQS)
def test_span_dynamic_conv_function(heads, kernel, head_dim, seq, masked):
    random = np.random.default_rng(seq)
    value = random.standard_normal((2, seq, heads * head_dim), np.float32)
    logits = 3 * random.standard_normal((2, seq, heads * kernel), np.float32)
    mask = masks(seq, masked, random)
    if masked:
        value[mask == 0] = np.inf
    feeds = {"v": value, "l": logits}
    model = one_node("SpanDynamicConv", feeds, {}, mask, num_heads=heads, kernel_size=kernel)
    expected = span_dynamic_conv(
        torch.from_numpy(value),
        torch.from_numpy(logits),
        num_heads=heads,
        kernel_size=kernel,
        mask=torch_of(mask),
    )
    got = answer(model, feeds | ({"mask": mask} if masked else {}))
    np.testing.assert_allclose(got, expected.numpy(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("channels", "kernel"), [(1, 1), (8, 3), (768, 9), (37, 15)])
@pytest.mark.parametrize("seq", SEQS)
def test_depthwise_conv1d_function(channels, kernel, seq, masked):
    random = np.random.default_rng(seq)
    source = random.standard_normal((2, seq, channels), np.float32)
    weight = random.standard_normal((kernel, channels), np.float32)
    mask = masks(seq, masked, random)
    if masked:
        source[mask == 0] = np.nan
    model = one_node("DepthwiseConv1D", {"x": source}, {"w": weight}, mask)
    expected = depthwise_conv1d(
        torch.from_numpy(source), torch.from_numpy(weight), mask=torch_of(mask)
    )
    got = answer(model, {"x": source} | ({"mask": mask} if masked else {}))
    np.testing.assert_allclose(got, expected.numpy(), atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("heads", "kernel", "head_dim"), [(2, 3, 8), (6, 9, 64)])
@pytest.mark.parametrize("seq", SEQS)
def test_fused_span_dynamic_conv_function(heads, kernel, head_dim, seq, masked):
    random = np.random.default_rng(seq)
    channels = heads * head_dim
    feeds = {
        "key_conv": random.standard_normal((2, seq, channels), np.float32),
        "projections": random.standard_normal((2, seq, 4 * channels), np.float32),
    }
    weights = {
        "weight": random.standard_normal((channels, heads * kernel), np.float32) / channels**0.5,
        "bias": random.standard_normal(heads * kernel, np.float32),
    }
    weights["weight"] = weights["weight"].astype(np.float32)
    attributes = {
        "num_heads": heads,
        "kernel_size": kernel,
        "query_offset": channels,
        "value_offset": 2 * channels,
    }
    mask = masks(seq, masked, random)
    model = one_node("FusedSpanDynamicConv", feeds, weights, mask, **attributes)
    tensors = [torch.from_numpy(array) for array in (feeds | weights).values()]
    expected = fused_span_dynamic_conv(*tensors, mask=torch_of(mask), **attributes)
    got = answer(model, feeds | ({"mask": mask} if masked else {}))
    np.testing.assert_allclose(got, expected.numpy(), atol=2e-5, rtol=1e-5)


def test_nodes_of_two_kinds_need_two_functions():
    value = np.zeros((2, 4, 16), np.float32)
    feeds = {"v": value, "l": np.zeros((2, 4, 6), np.float32)}
    model = one_node("SpanDynamicConv", feeds, {}, None, num_heads=2, kernel_size=3)
    other = model.graph.node.add()
    other.CopyFrom(model.graph.node[0])
    other.name, other.attribute[0].i = "second", 1
    other.attribute[1].i = 5
    with pytest.raises(GraphError, match="not of one kind: second differs"):
        functions_of(model, 20)


# ---- fusing the kernel generator ---------------------------------------------------------------


@pytest.fixture(scope="module", params=["hf", "masked"])
def exported(request) -> onnx.ModelProto:
    return traced_graph(MODEL, Task.TOKEN_CLASSIFICATION, request.param)


def test_fusing_keeps_the_answer(exported):
    fused = fuse(exported)
    kinds = [node.op_type for node in nodes_of(fused)]
    assert kinds == ["DepthwiseConv1D", "FusedSpanDynamicConv"] * 2
    removed = len(exported.graph.node) - len(fused.graph.node)
    assert removed == 2 * 3, "Mul, MatMul and Add of each generator"
    del fused.functions[:]
    fused.functions.extend(functions_of(fused, 20))
    architecture = factories.architecture_of(MODEL)
    batch = random_batch(architecture, Task.TOKEN_CLASSIFICATION, 2, 21, padded=True)
    with (
        OnnxRuntimeRunner.from_model(exported) as before,
        OnnxRuntimeRunner.from_model(fused) as after,
    ):
        expected, got = before.infer(batch)["logits"], after.infer(batch)["logits"]
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_a_generator_that_cannot_be_fused_stays(exported):
    name = "encoder.layer.0.attention.self.kernel_generator/MatMul"
    mixed = fuse(typed_graph(exported, Precision.FP16, keep_fp32=[name]))
    kinds = [node.op_type for node in nodes_of(mixed)]
    assert sorted(set(kinds)) == ["DepthwiseConv1D", "FusedSpanDynamicConv", "SpanDynamicConv"]
    assert kinds.count("SpanDynamicConv") == 1

    read_twice = onnx.ModelProto()
    read_twice.CopyFrom(exported)
    logits = nodes_of(read_twice, "SpanDynamicConv")[1].input[1]
    read_twice.graph.output.append(onnx.helper.make_tensor_value_info(logits, 1, None))
    kinds = [node.op_type for node in nodes_of(fuse(read_twice))]
    assert kinds.count("SpanDynamicConv") == 1, "an output of the graph would be lost"
