"""DepthwiseConv1D as an ONNX Runtime operator."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kernels.cases import DTYPES, masks, poison_pads, torch
from kernels.test_depthwise_conv1d import assert_close, inputs


def one_node_model(dtype: str, *, masked: bool, axes=("b", "s", "c")) -> bytes:
    from onnx import TensorProto, helper

    element = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}.get(dtype)
    element = element or TensorProto.BFLOAT16
    # bfloat16 cannot cross numpy: the graph casts at its edges.
    edge = TensorProto.FLOAT if dtype == "bf16" else element
    infos = [
        helper.make_tensor_value_info("x", edge, axes),
        helper.make_tensor_value_info("w", edge, ["k", "c"]),
        helper.make_tensor_value_info("m", TensorProto.INT64, ["mb", "ms"]),
    ][: 3 if masked else 2]
    # Declared without a shape: what a session says about it is inferred.
    output = helper.make_tensor_value_info("o", edge, None)
    names = ["xc", "wc", "m"] if masked else ["xc", "wc"]
    nodes = [
        helper.make_node("Cast", ["x"], ["xc"], to=element),
        helper.make_node("Cast", ["w"], ["wc"], to=element),
        helper.make_node(
            "DepthwiseConv1D",
            names,
            ["oc"],
            domain="convbert",
            plugin_version="1",
            plugin_namespace="",
        ),
        helper.make_node("Cast", ["oc"], ["o"], to=edge),
    ]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("convbert", 1)]
    graph = helper.make_graph(nodes, "one", infos, [output])
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def session(library, model: bytes):
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_onnxruntime_operator(ort_library, dtype, masked) -> None:
    runner = session(ort_library, one_node_model(dtype, masked=masked))
    for kernel_size, channels, seq in itertools.product([1, 9, 15], [37, 256], [1, 9, 129]):
        input, weight = inputs(3, seq, channels, kernel_size, DTYPES[dtype])
        edge = torch.float32 if dtype == "bf16" else input.dtype
        mask = masks(3, seq) if masked else None
        if masked:
            poison_pads(mask, input)
        feed = {"x": input.to(edge).numpy(), "w": weight.to(edge).numpy()}
        feed |= {"m": mask.numpy()} if masked else {}
        output = torch.from_numpy(runner.run(None, feed)[0]).to(input.dtype)
        assert_close(output, input, weight, mask)


@pytest.mark.parametrize("axes", [("b", "s", 16), (2, 7, 16), (2, "s", 16)])
def test_onnxruntime_infers_the_output_shape(ort_library, axes) -> None:
    output = session(ort_library, one_node_model("fp32", masked=True, axes=axes)).get_outputs()[0]
    assert output.type == "tensor(float)"
    assert tuple(output.shape) == axes


@pytest.mark.parametrize(
    ("input_shape", "weight_shape", "mask_shape", "words"),
    [
        ((1, 4, 16), (3, 17), (1, 4), r"weight \(3, 17\) does not fit input \(1, 4, 16\)"),
        ((1, 4, 0), (3, 0), (1, 4), "does not fit"),
        ((1, 4, 16), (4, 16), (1, 4), "kernel_size is 4, expected an odd number up to 15"),
        ((1, 4, 16), (17, 16), (1, 4), "kernel_size is 17"),
        ((1, 4, 16), (0, 16), (1, 4), "kernel_size is 0"),
        ((1, 4, 16), (3, 16), (1, 5), r"mask \(1, 5\) does not fit, expected \(1, 4\)"),
        ((2, 4, 16), (3, 16), (1, 4), r"mask \(1, 4\) does not fit, expected \(2, 4\)"),
    ],
)
def test_onnxruntime_names_bad_shapes(
    ort_library, input_shape, weight_shape, mask_shape, words
) -> None:
    runner = session(ort_library, one_node_model("fp32", masked=True))
    feed = {
        "x": np.zeros(input_shape, np.float32),
        "w": np.zeros(weight_shape, np.float32),
        "m": np.ones(mask_shape, np.int64),
    }
    with pytest.raises(Exception, match=words):
        runner.run(None, feed)


def test_onnxruntime_refuses_another_number_of_axes(ort_library) -> None:
    runner = session(ort_library, one_node_model("fp32", masked=False, axes=("b", "c")))
    feed = {"x": np.zeros((4, 16), np.float32), "w": np.zeros((3, 16), np.float32)}
    with pytest.raises(Exception, match="input has 2 axes, expected 3"):
        runner.run(None, feed)


@pytest.mark.parametrize("shape", [(0, 4, 16), (2, 0, 16)])
def test_onnxruntime_accepts_an_empty_batch(ort_library, shape) -> None:
    runner = session(ort_library, one_node_model("fp32", masked=True))
    feed = {"x": np.zeros(shape, np.float32), "w": np.zeros((3, 16), np.float32)}
    feed["m"] = np.ones(shape[:2], np.int64)
    assert runner.run(None, feed)[0].shape == shape
