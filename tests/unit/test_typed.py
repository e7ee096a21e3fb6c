"""fp32 graph in, strongly typed graph out."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from convbert_deploy.architecture import Task
from convbert_deploy.backends.onnxruntime import OnnxRuntimeRunner
from convbert_deploy.calibration.typed import typed_graph
from convbert_deploy.errors import GraphError
from convbert_deploy.exporting import traced_graph
from convbert_deploy.precision import Precision

import factories

HALF = [Precision.FP16, Precision.BF16]


@pytest.fixture(scope="module")
def exported() -> onnx.ModelProto:
    task = Task.SEQUENCE_CLASSIFICATION
    return traced_graph(factories.realistic_model("tiny", task), task)


def _batch() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    mask = (np.arange(17) < np.array([[17], [9]])).astype(np.int64)
    ids = random.integers(1, 500, mask.shape) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def _run(model: onnx.ModelProto, batch: dict[str, np.ndarray], **options) -> dict[str, np.ndarray]:
    with OnnxRuntimeRunner.from_model(model, **options) as runner:
        return runner.infer(batch)


def _small(text_weight: float, op: str = "Mul", epsilon: float | None = None) -> onnx.ModelProto:
    extra = "" if epsilon is None else f"<axis=-1, epsilon={epsilon}, stash_type=1>"
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 20]>
        g (float[N, 4] x) => (float[N, 4] y) {{ y = {op} {extra} (x, w) }}"""
    )
    shape = () if epsilon is None else (4,)
    model.graph.node[0].name = "node"
    model.graph.initializer.append(
        numpy_helper.from_array(np.full(shape, text_weight, np.float32), "w")
    )
    return model


@pytest.mark.parametrize("precision", HALF)
def test_everything_inside_is_half_and_the_interface_is_not(exported, precision) -> None:
    graph = typed_graph(exported, precision)
    onnx.checker.check_model(graph, full_check=True)
    kinds = {tensor.data_type for tensor in graph.graph.initializer}
    assert TensorProto.FLOAT not in kinds
    assert graph.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    inferred = onnx.shape_inference.infer_shapes(graph, strict_mode=True).graph
    floats = [
        v.name for v in inferred.value_info if v.type.tensor_type.elem_type == TensorProto.FLOAT
    ]
    assert not floats
    assert [n.op_type for n in graph.graph.node].count("Cast") == 2  # the mask in, the logits out
    assert exported.graph.initializer[0].data_type == TensorProto.FLOAT  # the input is untouched


def test_fp16_graph_runs_in_stock_onnxruntime_close_to_fp32(exported) -> None:
    expected = _run(exported, _batch())["logits"]
    found = _run(typed_graph(exported, Precision.FP16), _batch())["logits"]
    assert found.dtype == np.float32
    error = np.abs(found - expected).max()
    assert 0 < error < 5e-3  # 7e-4 seen; 0 would mean it computed in fp32
    wrong = factories.sabotage_onnx(typed_graph(exported, Precision.FP16), "reversed-taps")
    assert np.abs(_run(wrong, _batch())["logits"] - expected).max() > 5e-3


@pytest.mark.parametrize("names", [["encoder.layer.0.output.LayerNorm.weight"], None])
def test_kept_names_stay_fp32_and_the_graph_runs(exported, names) -> None:
    keep = names or [node.name for node in exported.graph.node]
    graph = typed_graph(exported, Precision.FP16, keep_fp32=keep)
    onnx.checker.check_model(graph, full_check=True)
    expected = _run(exported, _batch())["logits"]
    limit = 5e-3 if names else 1e-6
    assert np.abs(_run(graph, _batch())["logits"] - expected).max() < limit
    weights = {t.name: t.data_type for t in graph.graph.initializer}
    assert all(weights[name] == TensorProto.FLOAT for name in names or [])


def test_unknown_kept_name_is_an_error(exported) -> None:
    with pytest.raises(GraphError, match="no_such_node"):
        typed_graph(exported, Precision.FP16, keep_fp32=["no_such_node"])


def test_value_out_of_range_is_an_error_naming_the_tensor() -> None:
    with pytest.raises(GraphError, match=r"tensor w holds 70000, which fp16"):
        typed_graph(_small(70000.0), Precision.FP16)
    typed_graph(_small(70000.0), Precision.BF16)
    with pytest.raises(GraphError, match=r"constant w is 1e-12, which is 0 in fp16"):
        typed_graph(_small(1e-12), Precision.FP16)
    typed_graph(_small(70000.0), Precision.FP16, keep_fp32=["node"])


def test_constant_row_survives_layer_norm_in_fp16() -> None:
    """Epsilon 1e-12 is 0 in fp16; with float32 statistics the row gives 0, not NaN."""
    graph = typed_graph(_small(1.0, "LayerNormalization", epsilon=1e-12), Precision.FP16)
    rows = np.array([[3.0, 3.0, 3.0, 3.0], [1.0, 2.0, 3.0, 4.0]], np.float32)
    found = _run(graph, {"x": rows})["y"]
    assert (found[0] == 0).all()
    assert found[1] == pytest.approx([-1.3416, -0.4472, 0.4472, 1.3416], abs=2e-3)


def test_graph_typed_already_is_refused(exported) -> None:
    with pytest.raises(GraphError, match="typed already"):
        typed_graph(typed_graph(exported, Precision.FP16), Precision.FP16)


def test_vanishing_constant_node_stays_with_the_nodes_kept_for_it() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]>
        g (float[N, 4] x) => (float[N, 4] y) {
          one = Constant <value_float = 1.0> ()  small = Constant <value_float = 1e-12> ()
          a = Add (x, one)  y = Add (a, small) }"""
    )
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1), "unused"))
    model.graph.node[3].name = "last"
    with pytest.raises(GraphError, match="constant small is 1e-12, which is 0 in fp16"):
        typed_graph(model, Precision.FP16)
    graph = typed_graph(model, Precision.FP16, keep_fp32=["last"])
    kinds = {n.output[0]: n.attribute[0].t.data_type for n in graph.graph.node if not n.input}
    assert kinds["one"] == TensorProto.FLOAT16 and "small" in kinds
    assert _run(graph, {"x": np.ones((1, 4), np.float32)})["y"] == pytest.approx(2)


def test_weights_by_reference_are_refused() -> None:
    model = _small(1.0)
    tensor = model.graph.initializer[0]
    onnx.external_data_helper.set_external_data(tensor, "weights.bin", 0, 4)
    with pytest.raises(GraphError, match="the values of w are external data"):
        typed_graph(model, Precision.FP16)


def _quantized(
    kind: str = "int8", scale: float = 2**-5, weight_scale: float = 2**-7, opset: int = 20
) -> onnx.ModelProto:
    """x -> producer -> Q -> DQ -> (first, second), each a MatMul with weights behind a DQ."""
    dtype = helper.tensor_dtype_to_np_dtype(
        TensorProto.INT8 if kind == "int8" else TensorProto.FLOAT8E4M3FN
    )
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : {opset}]>
        g (float[N, 4] x) => (float[N, 4] y) {{
          p = Mul (x, one)
          q = QuantizeLinear (p, scale, zero)
          d = DequantizeLinear (q, scale, zero)
          w1 = DequantizeLinear <axis = 1> (weight1, weight_scale, zeros)
          w2 = DequantizeLinear <axis = 1> (weight2, weight_scale, zeros)
          a = MatMul (d, w1)
          b = MatMul (d, w2)
          y = Add (a, b) }}"""
    )
    random = np.random.default_rng(0)
    names = ("producer", "Q", "DQ", "DQ1", "DQ2", "first", "second", "sum")
    for node, name in zip(model.graph.node, names, strict=True):
        node.name = name
    arrays = {
        "one": np.float32(1),
        "scale": np.float32(scale),
        "zero": np.zeros((), dtype),
        "weight_scale": np.full(4, weight_scale, np.float32),
        "zeros": np.zeros(4, dtype),
        "weight1": random.integers(-100, 100, (4, 4)).astype(dtype),
        "weight2": random.integers(-100, 100, (4, 4)).astype(dtype),
    }
    for name, array in arrays.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def _types(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = (*inferred.value_info, *inferred.output, *inferred.input)
    types = {v.name: v.type.tensor_type.elem_type for v in values}
    return types | {t.name: t.data_type for t in model.graph.initializer}


def _require_consistent(model: onnx.ModelProto) -> None:
    """What strong typing demands: Q's input and its scale, DQ's output and its scale agree; a
    quantized tensor has one type of scale."""
    types, scales = _types(model), {}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            quantize = node.op_type == "QuantizeLinear"
            value, quantized = (node.input, node.output) if quantize else (node.output, node.input)
            assert types[value[0]] == types[node.input[1]], node.name
            assert scales.setdefault(quantized[0], types[node.input[1]]) == types[node.input[1]]
        if node.op_type in ("MatMul", "Add", "Mul"):
            assert len({types[name] for name in (*node.input, *node.output)}) == 1, node.name


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantized_graph_takes_half_scales(kind, precision) -> None:
    model = _quantized(kind)
    graph = typed_graph(model, precision)
    onnx.checker.check_model(graph, full_check=True)
    _require_consistent(graph)
    types = _types(graph)
    half = TensorProto.FLOAT16 if precision is Precision.FP16 else TensorProto.BFLOAT16
    assert {types[name] for name in ("scale", "weight_scale", "d", "w1", "a")} == {half}
    assert types["weight1"] == types["q"] == types["zero"] == _types(model)["weight1"]
    expected = 22 if precision is Precision.BF16 else 20 if kind == "int8" else 21
    assert graph.opset_import[0].version == expected
    if precision is Precision.FP16:
        x = np.linspace(-3, 3, 32, dtype=np.float32).reshape(8, 4)
        # ONNX Runtime 1.31's fusion makes an integer MatMul of fp8 and then refuses it
        expected = _run(model, {"x": x}, optimize=False)["y"]
        assert np.abs(_run(graph, {"x": x})["y"] - expected).max() < 0.02


@pytest.mark.parametrize(
    ("keep", "fp32", "casts"),
    [
        # the pair serves two: the kept one reads it through a Cast
        (["first"], {"w1", "a"}, 4),
        (["weight1"], {"w1", "a"}, 4),
        # both kept: the pair is float32, and so is what it quantizes
        (["first", "second"], {"w1", "w2", "d", "a", "b"}, 5),
        (["Q"], {"d"}, 4),
        (["DQ"], {"d"}, 4),
        (["producer", "Q", "first", "second", "sum"], {"p", "d", "w1", "w2", "a", "b"}, 1),
    ],
)
def test_pair_stays_consistent_beside_kept_nodes(keep, fp32, casts) -> None:
    model = _quantized()
    graph = typed_graph(model, Precision.FP16, keep_fp32=keep)
    onnx.checker.check_model(graph, full_check=True)
    _require_consistent(graph)
    types = _types(graph)
    names = {"p", "d", "w1", "w2", "a", "b"}
    assert {name for name in names if types[name] == TensorProto.FLOAT} == fp32
    assert [n.op_type for n in graph.graph.node].count("Cast") == casts
    x = np.linspace(-3, 3, 32, dtype=np.float32).reshape(8, 4)
    assert np.abs(_run(graph, {"x": x})["y"] - _run(model, {"x": x})["y"]).max() < 0.02


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": 1e-9}, "constant scale is 1e-09, which is 0 in fp16"),
        ({"scale": 3e-7}, "scale holds 3e-07, which becomes 2.98023e-07 in fp16"),
        ({"scale": 2**-20}, "its reciprocal"),  # exact, and 1 / scale is infinite
        ({"scale": 1024.0}, "within the type's range"),  # 127 * scale is
        ({"scale": -(2**-5)}, "holds -0.03125"),
        ({"scale": float("nan")}, "holds nan"),
        ({"weight_scale": 1.01e-6}, "scale weight_scale holds 1.01e-06"),
    ],
)
def test_scale_that_fp16_does_not_hold_is_refused(changes, message) -> None:
    model = _quantized(**changes)
    with pytest.raises(GraphError, match=message):
        typed_graph(model, Precision.FP16)
    keep = [node.name for node in model.graph.node]
    if not np.isnan(next(iter(changes.values()))):
        typed_graph(model, Precision.FP16, keep_fp32=keep)


def test_weights_may_have_a_small_exact_scale() -> None:
    """Only a QuantizeLinear divides by its scale."""
    typed_graph(_quantized(weight_scale=2**-20), Precision.FP16)


def test_bf16_refuses_a_scale_that_it_rounds_too_far() -> None:
    with pytest.raises(GraphError, match=r"scale holds 0\.0316, which becomes .* in bf16"):
        typed_graph(_quantized(scale=0.0316), Precision.BF16)
    typed_graph(_quantized(scale=0.0316), Precision.FP16)


def test_opset_is_raised_only_where_no_operator_changes() -> None:
    graph = typed_graph(_quantized(opset=17), Precision.FP16)
    assert graph.opset_import[0].version == 19
    onnx.checker.check_model(graph, full_check=True)
    changed = _quantized(opset=17)
    changed.graph.node.append(helper.make_node("ReduceMean", ["y"], ["z"], axes=[1]))
    with pytest.raises(GraphError, match="of opset 17 and needs 19, where ReduceMean is another"):
        typed_graph(changed, Precision.FP16)
