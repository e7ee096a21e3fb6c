"""Mask constants of foreign graphs: found by what they flow into, and clamped."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from convbert_deploy.architecture import Task
from convbert_deploy.backends.onnxruntime import OnnxRuntimeRunner
from convbert_deploy.calibration.masks import (
    MASK_CONSTANT,
    float_constant,
    mask_tensors,
    repair_mask_constants,
)
from convbert_deploy.calibration.typed import typed_graph
from convbert_deploy.errors import GraphError
from convbert_deploy.exporting import traced_graph
from convbert_deploy.precision import Precision

import factories

MIN = float(np.finfo(np.float32).min)
INF = float("inf")


@pytest.fixture(scope="module")
def exported() -> onnx.ModelProto:
    task = Task.SEQUENCE_CLASSIFICATION
    return traced_graph(factories.realistic_model("tiny", task), task)


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def _logits(model: onnx.ModelProto) -> np.ndarray:
    random = np.random.default_rng(0)
    mask = (np.arange(17) < np.array([[17], [9], [3]])).astype(np.int64)
    ids = random.integers(1, 500, mask.shape) * mask
    batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    with OnnxRuntimeRunner.from_model(model) as runner:
        return runner.infer(batch)["logits"]


def _value(model: onnx.ModelProto, name: str) -> np.ndarray:
    return next(numpy_helper.to_array(t) for t in model.graph.initializer if t.name == name)


def _set(model: onnx.ModelProto, name: str, values: object, dtype=np.float32) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(values, dtype), name))


def _product(exported: onnx.ModelProto, constant: float) -> onnx.ModelProto:
    """transformers 4: (1 - mask) * constant."""
    model = _copy(exported)
    _set(model, "inputs.mul_constant", constant)
    return model


def _where(exported: onnx.ModelProto, constant: float) -> onnx.ModelProto:
    """transformers 5: Where(mask, 0, constant), from Constant nodes."""
    model = _copy(exported)
    product = next(node for node in model.graph.node if node.name == "inputs/Mul")
    index = list(model.graph.node).index(product)
    nodes = [
        helper.make_node("Constant", [], ["nothing"], value_float=0.0),
        helper.make_node("Constant", [], ["far"], name="far", value_float=constant),
        helper.make_node("Cast", ["attention_mask"], ["kept"], to=TensorProto.BOOL),
        helper.make_node("Where", ["kept", "nothing", "far"], [product.output[0]]),
    ]
    del model.graph.node[index]
    for offset, node in enumerate(nodes):
        model.graph.node.insert(index + offset, node)
    return model


def _fill(exported: onnx.ModelProto, constant: float) -> onnx.ModelProto:
    """masked_fill: the constant takes the place of the scores."""
    model = _copy(exported)
    model.graph.initializer.append(numpy_helper.from_array(np.float32(constant), "far"))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0), "nothing"))
    for node in list(model.graph.node):
        if node.op_type == "Add" and "inputs/Unsqueeze:0" in node.input:
            scores = next(name for name in node.input if name != "inputs/Unsqueeze:0")
            masked = f"{node.output[0]}.masked"
            index = list(model.graph.node).index(node)
            model.graph.node.insert(
                index, helper.make_node("Less", ["inputs/Unsqueeze:0", "nothing"], [masked])
            )
            node.op_type = "Where"
            node.input[:] = [masked, "far", scores]
    return model


FORMS = {"product": _product, "where": _where, "fill": _fill}
REPAIRED = {"product": "inputs.mul_constant", "where": "far", "fill": "far"}


@pytest.mark.parametrize("constant", [MIN, -1e9])
@pytest.mark.parametrize("form", FORMS)
def test_finite_constants_are_clamped_and_the_answers_stay(exported, form, constant) -> None:
    foreign = FORMS[form](exported, constant)
    before = _logits(foreign)
    assert repair_mask_constants(foreign) == (REPAIRED[form],)
    onnx.checker.check_model(foreign, full_check=True)
    assert np.abs(_logits(foreign) - before).max() <= 1e-5
    assert np.isfinite(_logits(typed_graph(foreign, Precision.FP16))).all()


@pytest.mark.parametrize("form", FORMS)
def test_infinite_constants_too(exported, form) -> None:
    foreign = FORMS[form](exported, -INF)
    if form == "product":
        assert np.isnan(_logits(foreign)).all(), "0 * -inf"
    repair_mask_constants(foreign)
    assert np.abs(_logits(foreign) - _logits(exported)).max() <= 1e-5


@pytest.mark.parametrize("constant", [MIN, -1e9, -INF])
def test_typed_graph_repairs_what_plain_conversion_makes_nan_of(exported, constant) -> None:
    with np.errstate(over="ignore"):
        converted = np.float32(constant).astype(np.float16)
    plain = typed_graph(exported, Precision.FP16)
    _set(plain, "inputs.mul_constant", converted, np.float16)
    assert np.isnan(_logits(plain)).all()
    for precision in (Precision.FP16, Precision.BF16):
        typed = typed_graph(_product(exported, constant), precision)
        value = float(_value(typed, "inputs.mul_constant"))
        assert value == pytest.approx(MASK_CONSTANT, rel=2e-3)
    found = _logits(typed_graph(_product(exported, constant), Precision.FP16))
    assert np.abs(found - _logits(exported)).max() < 5e-3


def _quantized(model: onnx.ModelProto) -> onnx.ModelProto:
    """Q/DQ on the input of each attention output projection; |x| stays below 4 there."""
    model = _copy(model)
    model.graph.initializer.append(numpy_helper.from_array(np.float32(4 / 127), "scale"))
    model.graph.initializer.append(numpy_helper.from_array(np.int8(0), "zero"))
    for node in list(model.graph.node):
        if node.name.endswith("attention.output.dense/MatMul"):
            index, source = list(model.graph.node).index(node), node.input[0]
            scaled = ["scale", "zero"]
            pair = [
                helper.make_node("QuantizeLinear", [source, *scaled], [f"{source}.q"]),
                helper.make_node("DequantizeLinear", [f"{source}.q", *scaled], [f"{source}.dq"]),
            ]
            node.input[0] = f"{source}.dq"
            for offset, added in enumerate(pair):
                model.graph.node.insert(index + offset, added)
    return model


def test_int8_turns_the_nan_into_wrong_finite_answers_unless_repaired(exported) -> None:
    """The first layer's NaN becomes a number in QuantizeLinear: nothing shows at the outputs."""
    expected, foreign = _logits(exported), _product(exported, -INF)
    silent = _logits(_quantized(foreign))
    assert np.isfinite(silent).all()
    assert np.abs(silent - expected).max() > 0.1
    repair_mask_constants(foreign)
    assert np.abs(_logits(_quantized(foreign)) - expected).max() < 0.02


def test_our_own_graph_needs_nothing(exported) -> None:
    model = _copy(exported)
    assert repair_mask_constants(model) == ()
    assert model.SerializeToString() == exported.SerializeToString()


def test_mask_constant_is_the_exporters() -> None:
    from convbert_deploy import traceable

    assert traceable.MASK_CONSTANT == MASK_CONSTANT


def test_mask_tensors_are_the_mask_and_what_it_was_added_to(exported) -> None:
    found = mask_tensors(exported)
    sums = {f"encoder.layer.{layer}.attention.self/Add:0" for layer in range(2)}
    mask = {"inputs.mul_constant", "inputs/Mul:0", "inputs/Unsqueeze:0"}
    assert found == sums | mask


def _parsed(text: str, **initializers: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 20]> g (float[2, 4] x, float[2, 4] mask) => {text}'
    )
    for name, values in initializers.items():
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model


FAR = np.float32(MIN)


def test_constant_read_for_something_else_keeps_its_value_there() -> None:
    model = _parsed(
        """(float[2, 4] y, float[2, 4] z)
        { b = Mul (mask, c)  s = Add (x, b)  y = Softmax (s)  z = Max (x, c) }""",
        c=FAR,
    )
    assert repair_mask_constants(model) == ("c",)
    assert _value(model, "c") == FAR
    assert _value(model, "c.mask") == MASK_CONSTANT
    assert [list(n.input) for n in model.graph.node if "c" in n.input] == [["x", "c"]]


def test_constant_node_read_for_something_else_is_copied() -> None:
    model = _parsed(
        """(float[2, 4] y, float[2, 4] z)
        { c = Constant <value_float = -1e9> ()  d = Constant <value_float = -1e9> ()
          b = Mul (mask, c)  e = Mul (b, d)  s = Add (x, e)  y = Softmax (s)
          t = Mul (d, c)  z = Max (x, t) }"""
    )
    assert repair_mask_constants(model) == ("c", "d")
    onnx.checker.check_model(model, full_check=True)
    held = {n.output[0]: float_constant(n) for n in model.graph.node if float_constant(n)}
    values = {name: float(numpy_helper.to_array(tensor)) for name, tensor in held.items()}
    assert values == {"c": -1e9, "d": -1e9, "c.mask": MASK_CONSTANT, "d.mask": MASK_CONSTANT}
    readers = {node.output[0]: list(node.input) for node in model.graph.node}
    assert (readers["b"], readers["e"]) == (["mask", "c.mask"], ["b", "d.mask"])
    assert readers["t"] == ["d", "c"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("b = Mul (mask, c)  s = Sub (x, b)  y = Softmax (s)", 30000),  # score - 1e9 * pad
        ("b = Mul (mask, c)  r = Add (b, b)  s = Add (x, r)  y = Softmax (s)", 30000),
        ("b = Mul (mask, c)  s = Add (x, b)  d = Div (s, c2)  y = Softmax (d)", 30000),
        ("b = Mul (mask, c)  y = Softmax (b)", 1e9),  # nothing is added: no mask
        ("b = Mul (mask, c)  s = Add (x, b)  y = Relu (s)", 1e9),
        ("b = Mul (mask, c)  s = Add (x, b)  r = Tanh (s)  y = Softmax (r)", 1e9),
    ],
)
def test_only_what_is_joined_to_scores_is_a_mask(body, expected) -> None:
    model = _parsed(f"(float[2, 4] y) {{ {body} }}", c=np.float32(1e9), c2=np.float32(8))
    repair_mask_constants(model)
    assert _value(model, "c") == expected


@pytest.mark.parametrize("name", ["float16", "double", "bfloat16"])
def test_other_float_types_and_tables_of_a_mask(name) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(TensorProto.DataType.Value(name.upper()))
    table = np.array([[0, 0, -INF, -INF], [0, 0, 0, -100]]).astype(dtype)
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 20]>
        g ({name}[2, 4] x) => ({name}[2, 4] y) {{ s = Add (x, c)  y = Softmax (s) }}"""
    )
    model.graph.initializer.append(numpy_helper.from_array(table, "c"))
    repair_mask_constants(model)
    clamped = _value(model, "c").astype(np.float32)
    assert clamped == pytest.approx(np.array([[0, 0, -3e4, -3e4], [0, 0, 0, -100]]), rel=2e-3)


def test_mask_of_an_attention_operator() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 11, opset_import: ["" : 23]>
        g (float[1, 2, 4, 8] q, bool[4, 4] kept, float zero) => (float[1, 2, 4, 8] y)
        { m = Where (kept, zero, c)  y = Attention (q, q, q, m) }"""
    )
    model.graph.initializer.append(numpy_helper.from_array(np.float32(-INF), "c"))
    assert repair_mask_constants(model) == ("c",)
    assert "m" in mask_tensors(model)
    model.graph.node[1].input[:] = ["q", "q", "m", ""]
    _set(model, "c", -INF)
    with pytest.raises(GraphError, match="constant c holds -inf and masks no attention"):
        repair_mask_constants(model)


def test_infinity_elsewhere_is_refused_and_nothing_changes() -> None:
    model = _parsed(
        """(float[2, 4] y, float[2, 4] z)
        { b = Mul (mask, c)  s = Add (x, b)  y = Softmax (s)  z = Mul (x, other) }""",
        c=FAR,
        other=np.array([1, 2, -INF, 3], np.float32),
    )
    before = model.SerializeToString()
    with pytest.raises(GraphError, match="constant other holds -inf"):
        repair_mask_constants(model)
    with pytest.raises(GraphError, match="constant other holds -inf"):
        typed_graph(model, Precision.FP16)
    assert model.SerializeToString() == before
    _set(model, "other", [1, 2, float("nan"), 3])
    with pytest.raises(GraphError, match="constant other holds nan"):
        repair_mask_constants(model)
    _set(model, "other", [1, 2, MIN, 3])
    repair_mask_constants(model)
    assert _value(model, "other")[2] == FAR, "finite numbers elsewhere are no business of ours"


def test_infinity_of_one_reader_is_refused_though_another_masks_with_it() -> None:
    model = _parsed(
        """(float[2, 4] y, float[2, 4] z)
        { b = Mul (mask, c)  s = Add (x, b)  y = Softmax (s)  z = Mul (x, c) }""",
        c=np.float32(-INF),
    )
    with pytest.raises(GraphError, match="constant c holds -inf"):
        repair_mask_constants(model)


def test_infinity_inside_a_function_is_refused() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20, "own" : 1]>
        g (float[2, 4] x) => (float[2, 4] y) { y = own.far (x) }
        <domain: "own", opset_import: ["" : 20]>
        far (x) => (y) { c = Constant <value_float = 1.0> ()  y = Mul (x, c) }"""
    )
    assert repair_mask_constants(model) == ()
    model.functions[0].node[0].attribute[0].f = -INF
    with pytest.raises(GraphError, match="c of function far holds -inf"):
        repair_mask_constants(model)


def test_constant_of_shape_masks() -> None:
    model = _parsed("(float[2, 4] y) { s = Add (x, m)  y = Softmax (s) }")
    far = numpy_helper.from_array(np.array([-INF], np.float32))
    model.graph.node.insert(0, helper.make_node("Shape", ["x"], ["shape"]))
    model.graph.node.insert(1, helper.make_node("ConstantOfShape", ["shape"], ["m"], value=far))
    assert repair_mask_constants(model) == ("m",)
    held = float_constant(model.graph.node[1])
    assert numpy_helper.to_array(held) == MASK_CONSTANT
