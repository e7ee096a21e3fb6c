"""SpanDynamicConv as a node of ONNX Runtime graphs."""

from __future__ import annotations

import concurrent.futures
import itertools

import numpy as np
import pytest

from kernels.cases import DTYPES, assert_close, inputs, masks, poison_pads, torch

onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
onnx = pytest.importorskip("onnx", reason="pip install onnx")

ELEMENTS = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16"}
NAMED = ("batch", "seq")


def operator(inputs_: list[str], output: str, num_heads: int, kernel_size: int):
    return onnx.helper.make_node(
        "SpanDynamicConv",
        inputs_,
        [output],
        domain="convbert",
        num_heads=num_heads,
        kernel_size=kernel_size,
        plugin_version="1",
        plugin_namespace="",
    )


def model_of(nodes, infos, output_type: int, initializers=()) -> bytes:
    """The output is declared without a shape: what a session says about it is inferred."""
    output = onnx.helper.make_tensor_value_info("o", output_type, None)
    graph = onnx.helper.make_graph(nodes, "graph", infos, [output], list(initializers))
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("convbert", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def one_node_model(
    dtype: str,
    num_heads: int,
    kernel_size: int,
    *,
    mask: str | None = None,
    axes: tuple = NAMED,
    widths: tuple = ("v", "l"),
) -> bytes:
    """``mask``: "given" for a third input, "empty" for one left out by an empty name."""
    element = getattr(onnx.TensorProto, ELEMENTS[dtype])
    # bfloat16 cannot cross numpy: the graph casts at its edges.
    edge = onnx.TensorProto.FLOAT if dtype == "bf16" else element
    infos = [
        onnx.helper.make_tensor_value_info(name, edge, [*axes, width])
        for name, width in zip("vl", widths, strict=True)
    ]
    names = ["vc", "lc"]
    if mask == "given":
        names.append("mask")
        int64 = onnx.TensorProto.INT64
        infos.append(onnx.helper.make_tensor_value_info("mask", int64, ["mask_b", "mask_s"]))
    elif mask == "empty":
        names.append("")
    nodes = [
        onnx.helper.make_node("Cast", ["v"], ["vc"], to=element),
        onnx.helper.make_node("Cast", ["l"], ["lc"], to=element),
        operator(names, "oc", num_heads, kernel_size),
        onnx.helper.make_node("Cast", ["oc"], ["o"], to=edge),
    ]
    return model_of(nodes, infos, edge)


def session(library, model: bytes, threads: int = 2, optimized_to=None):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    if optimized_to is not None:
        options.optimized_model_filepath = str(optimized_to)
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(runner, value, logits, mask=None):
    edge = torch.float32 if value.dtype == torch.bfloat16 else value.dtype
    feed = {"v": value.to(edge).numpy(), "l": logits.to(edge).numpy()}
    if mask is not None:
        feed["mask"] = mask.numpy()
    return torch.from_numpy(runner.run(None, feed)[0]).to(value.dtype)


@pytest.mark.parametrize("mask", [None, "empty", "given"])
@pytest.mark.parametrize("kernel_size", [1, 3, 9, 15])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(ort_library, dtype, kernel_size, mask) -> None:
    heads = 6
    runner = session(ort_library, one_node_model(dtype, heads, kernel_size, mask=mask))
    shapes = itertools.product([8, 20, 32, 48, 64, 80, 128], [1, 9, 129, 512], [1, 3])
    for head_dim, seq, batch in shapes:
        value, logits = inputs(batch, seq, heads, head_dim, kernel_size, DTYPES[dtype])
        given = None
        if mask == "given":
            given = masks(batch, seq, seed=head_dim)
            poison_pads(given, value, logits)
        output = run(runner, value, logits, given)
        assert_close(output, value, logits, heads, kernel_size, given)


def test_a_mask_from_inside_the_graph(ort_library) -> None:
    """As an exported model may have it: computed by other nodes."""
    infos = [
        onnx.helper.make_tensor_value_info("v", onnx.TensorProto.FLOAT, [*NAMED, 16]),
        onnx.helper.make_tensor_value_info("l", onnx.TensorProto.FLOAT, [*NAMED, 10]),
        onnx.helper.make_tensor_value_info("mask", onnx.TensorProto.INT64, [*NAMED]),
    ]
    two = onnx.helper.make_tensor("two", onnx.TensorProto.INT64, [], [2])
    nodes = [
        onnx.helper.make_node("Mul", ["mask", "two"], ["doubled"]),
        operator(["v", "l", "doubled"], "o", 2, 5),
    ]
    runner = session(ort_library, model_of(nodes, infos, onnx.TensorProto.FLOAT, [two]))
    value, logits = inputs(5, 33, 2, 8, 5, torch.float32)
    mask = masks(5, 33)
    assert_close(run(runner, value, logits, mask), value, logits, 2, 5, mask)


# ---- shapes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_named_axes_keep_their_names(ort_library, dtype) -> None:
    element = getattr(onnx.TensorProto, ELEMENTS[dtype])
    infos = [
        onnx.helper.make_tensor_value_info(name, element, [*NAMED, width])
        for name, width in (("v", 16), ("l", 6))
    ]
    model = model_of([operator(["v", "l"], "o", 2, 3)], infos, element)
    given, _ = session(ort_library, model).get_inputs()
    (output,) = session(ort_library, model).get_outputs()
    assert output.shape == ["batch", "seq", 16]
    assert output.type == given.type


def test_known_axes_stay_known(ort_library) -> None:
    model = one_node_model("fp32", 2, 3, axes=(4, "seq"), widths=(16, 6))
    assert session(ort_library, model).get_outputs()[0].shape == [4, "seq", 16]


def test_unnamed_axes_keep_the_rank(ort_library) -> None:
    model = one_node_model("fp32", 2, 3, axes=(None, None), widths=(16, 6))
    batch, seq, width = session(ort_library, model).get_outputs()[0].shape
    assert width == 16
    assert not isinstance(batch, int) and not isinstance(seq, int), (batch, seq)
    assert batch != seq, "one name for two axes claims that they are equal"


@pytest.mark.parametrize("axes", [NAMED, (None, None), (2, None)], ids=str)
def test_fusions_behind_the_operator_see_its_shape(ort_library, tmp_path, axes) -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((16, 8), np.float32)
    bias = random.standard_normal(8, np.float32)
    infos = [
        onnx.helper.make_tensor_value_info("v", onnx.TensorProto.FLOAT, [*axes, 16]),
        onnx.helper.make_tensor_value_info("l", onnx.TensorProto.FLOAT, [*axes, 6]),
    ]
    nodes = [
        onnx.helper.make_node("Relu", ["v"], ["positive"]),
        operator(["positive", "l"], "conv", 2, 3),
        onnx.helper.make_node("MatMul", ["conv", "weight"], ["product"]),
        onnx.helper.make_node("Add", ["product", "bias"], ["sum"]),
        onnx.helper.make_node("Gelu", ["sum"], ["o"]),
    ]
    constants = [
        onnx.numpy_helper.from_array(a, n) for a, n in ((weight, "weight"), (bias, "bias"))
    ]
    model = model_of(nodes, infos, onnx.TensorProto.FLOAT, constants)
    optimized = tmp_path / "optimized.onnx"
    runner = session(ort_library, model, optimized_to=optimized)
    kinds = [node.op_type for node in onnx.load(optimized).graph.node]
    assert "BiasGelu" in kinds and "Gelu" not in kinds, kinds

    from convbert_deploy.reference import span_dynamic_conv

    value, logits = inputs(2, 21, 2, 8, 3, torch.float32)
    conv = span_dynamic_conv(value.relu(), logits, num_heads=2, kernel_size=3)
    expected = torch.nn.functional.gelu(conv @ torch.from_numpy(weight) + torch.from_numpy(bias))
    assert (run(runner, value, logits) - expected).abs().max() <= 1e-4


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value_shape", "logits_shape", "words"),
    [
        ((1, 4, 17), (1, 4, 6), "does not divide into num_heads 2"),
        ((1, 4, 16), (1, 4, 7), r"expected \(1, 4, num_heads 2 \* kernel_size 3\)"),
        ((1, 4, 16), (1, 5, 6), "kernel_logits"),
        ((2, 4, 16), (1, 4, 6), "kernel_logits"),
    ],
)
def test_bad_shapes_are_named(ort_library, value_shape, logits_shape, words) -> None:
    runner = session(ort_library, one_node_model("fp32", 2, 3))
    feed = {"v": np.zeros(value_shape, np.float32), "l": np.zeros(logits_shape, np.float32)}
    with pytest.raises(Exception, match=words):
        runner.run(None, feed)


@pytest.mark.parametrize("shape", [(1, 4), (2, 5), (4, 2), (2, 1)])
def test_a_mask_of_another_shape_is_named(ort_library, shape) -> None:
    runner = session(ort_library, one_node_model("fp32", 2, 3, mask="given"))
    value, logits = inputs(2, 4, 2, 8, 3, torch.float32)
    words = rf"mask \({shape[0]}, {shape[1]}\) does not fit, expected \(2, 4\)"
    with pytest.raises(Exception, match=words):
        run(runner, value, logits, torch.ones(shape, dtype=torch.int64))


def test_a_mask_of_another_type_or_rank_is_refused(ort_library) -> None:
    infos = [
        onnx.helper.make_tensor_value_info("v", onnx.TensorProto.FLOAT, [*NAMED, 16]),
        onnx.helper.make_tensor_value_info("l", onnx.TensorProto.FLOAT, [*NAMED, 6]),
    ]
    node = operator(["v", "l", "mask"], "o", 2, 3)
    mask = onnx.helper.make_tensor_value_info("mask", onnx.TensorProto.INT32, [*NAMED])
    with pytest.raises(Exception, match="int32"):
        session(ort_library, model_of([node], [*infos, mask], onnx.TensorProto.FLOAT))
    mask = onnx.helper.make_tensor_value_info("mask", onnx.TensorProto.INT64, [*NAMED, 1])
    runner = session(ort_library, model_of([node], [*infos, mask], onnx.TensorProto.FLOAT))
    value, logits = inputs(2, 4, 2, 8, 3, torch.float32)
    with pytest.raises(Exception, match="input mask has 3 axes, expected 2"):
        run(runner, value, logits, torch.ones(2, 4, 1, dtype=torch.int64))


@pytest.mark.parametrize("kernel_size", [0, 4, 17])
def test_even_and_large_kernels_are_refused(ort_library, kernel_size) -> None:
    words = f"kernel_size is {kernel_size}, expected"
    with pytest.raises(Exception, match=words):
        session(ort_library, one_node_model("fp32", 2, kernel_size))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_an_empty_batch_is_accepted(ort_library, shape) -> None:
    runner = session(ort_library, one_node_model("fp32", 2, 3, mask="given"))
    value, logits = torch.zeros(*shape, 16), torch.zeros(*shape, 6)
    output = run(runner, value, logits, torch.ones(shape, dtype=torch.int64))
    assert output.shape == (*shape, 16)


# ---- several sessions --------------------------------------------------------------------------


def test_sessions_of_one_process_do_not_disturb_each_other(ort_library) -> None:
    """Different attributes and types, alive together, called from several threads at once."""
    configurations = [("fp32", 2, 3), ("fp16", 6, 9), ("bf16", 3, 15), ("fp32", 6, 9)]
    runners = [
        session(ort_library, one_node_model(dtype, heads, taps, mask="given"))
        for dtype, heads, taps in configurations
    ]

    def check(call: int) -> None:
        dtype, heads, taps = configurations[call % len(configurations)]
        batch, seq = 1 + call % 3, 1 + 37 * call % 200
        value, logits = inputs(batch, seq, heads, 16, taps, DTYPES[dtype], seed=call)
        mask = masks(batch, seq, seed=call)
        poison_pads(mask, value, logits)
        output = run(runners[call % len(runners)], value, logits, mask)
        assert_close(output, value, logits, heads, taps, mask)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(check, range(48)))
    del runners[::2]
    for call in (1, 3):  # the others outlive a session that is gone
        value, logits = inputs(1, 9, 6, 8, 9, DTYPES[configurations[call][0]])
        mask = torch.ones(1, 9, dtype=torch.int64)
        runner = runners[call // 2]
        assert_close(run(runner, value, logits, mask), value, logits, 6, 9, mask)
