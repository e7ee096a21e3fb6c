"""Faults put into a Q/DQ graph: which are seen without running it, and which only in the answers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from convbert_deploy.calibration.quantization_check import quantization_faults
from convbert_deploy.calibration.quantize import quantized_graph
from convbert_deploy.calibration.typed import typed_graph
from convbert_deploy.calibration.workspace import Workspace
from convbert_deploy.precision import Precision

from calibrated import node_of, padded_batch, plans_of, random_samples, run, split, values

NAME = "encoder.layer.0.output.dense"
SQUARE = "encoder.layer.1.attention.output.dense"
PRECISIONS = (Precision.INT8, Precision.FP8)
BOTH = pytest.mark.parametrize("precision", PRECISIONS)


@pytest.fixture(scope="module")
def graphs():
    """The fp32 graph, and it in each of the 8-bit formats."""
    made = {Precision.FP32: split("tiny")}
    with Workspace.open(split("tiny")) as workspace:
        for precision in PRECISIONS:
            plans = plans_of(workspace, random_samples(), precision)
            made[precision] = workspace.complete(quantized_graph(workspace, plans, precision))
    return {precision: model.SerializeToString() for precision, model in made.items()}


@pytest.fixture
def int8(graphs) -> onnx.ModelProto:
    return onnx.load_from_string(graphs[Precision.INT8])


def replace(model: onnx.ModelProto, name: str, array: np.ndarray) -> None:
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(array), name))


def add(model: onnx.ModelProto, name: str, array: np.ndarray) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return name


def distance(graphs, model: onnx.ModelProto, *, optimize: bool = True) -> float:
    """Mean difference of the logits, of deviation 0.44, to those of the fp32 graph."""
    batch = padded_batch(batch=4, seq=30)
    expected = run(onnx.load_from_string(graphs[Precision.FP32]), batch)["logits"]
    return float(np.abs(run(model, batch, optimize=optimize)["logits"] - expected).mean())


@pytest.mark.parametrize("precision", [Precision.FP32, *PRECISIONS])
def test_our_graphs_have_no_fault(graphs, precision):
    assert quantization_faults(onnx.load_from_string(graphs[precision])) == []


@BOTH
@pytest.mark.parametrize("high", [Precision.FP16, Precision.BF16])
@pytest.mark.parametrize("keep", [(), (f"{NAME}/MatMul", f"{SQUARE}/Add")])
def test_typed_graphs_have_no_fault(graphs, precision, high, keep):
    """Scales are then of a half type; what is kept in float32 stands between casts."""
    typed = typed_graph(onnx.load_from_string(graphs[precision]), high, keep_fp32=keep)

    scale = f"{SQUARE}.input_scale"
    assert values(typed, scale).dtype != np.float32
    assert quantization_faults(typed) == []


def test_a_change_of_type_between_pair_and_product_is_no_fault(int8):
    product = node_of(int8, f"{NAME}/MatMul")
    for index, name in enumerate(product.input):
        node = helper.make_node("Cast", [name], [f"cast{index}"], to=TensorProto.FLOAT)
        before = next(i for i, n in enumerate(int8.graph.node) if n.name == product.name)
        int8.graph.node.insert(before, node)
        assert quantization_faults(int8) == []
        node_of(int8, product.name).input[index] = f"cast{index}"

        assert quantization_faults(int8) == []


def only_fault(model: onnx.ModelProto) -> str:
    (fault,) = quantization_faults(model)
    return fault


def test_activation_scale_doubled_in_the_dequantizer(graphs, int8):
    name = f"{NAME}.input_scale"
    doubled = add(int8, "doubled", 2 * values(int8, name))
    node_of(int8, f"{NAME}/DequantizeLinear").input[1] = doubled

    scale = values(int8, name)
    assert only_fault(int8) == (
        f"{NAME}/DequantizeLinear: scale {2 * scale:.9g}, expected {NAME}/QuantizeLinear's {scale:.9g}"
    )


def test_scale_of_equal_value_under_another_name_is_no_fault(int8):
    twin = add(int8, "twin", values(int8, f"{NAME}.input_scale"))
    node_of(int8, f"{NAME}/DequantizeLinear").input[1] = twin

    assert quantization_faults(int8) == []


@pytest.mark.parametrize("name", [f"{NAME}.input_scale", f"{NAME}.weight.scale"])
def test_scales_doubled_consistently_are_seen_in_the_answers_only(graphs, int8, name):
    """Such a graph is a possible one: ``verify`` and ``evaluate`` have to run it."""
    sound = distance(graphs, int8)
    # an activation's scale doubled in both nodes costs one bit, less than is told from noise here;
    # a quarter of it clips
    factor = 2 if name.endswith("weight.scale") else 0.25
    replace(int8, name, (factor * values(int8, name)).astype(np.float32))

    assert quantization_faults(int8) == []
    assert distance(graphs, int8) > 5 * sound


def test_weight_scale_doubled_and_the_weight_stored_anew(int8):
    """Half of the range is never used: the scale is not the column's."""
    name = f"{NAME}.weight"
    halved = np.rint(values(int8, f"{name}.int8") / 2.1).astype(np.int8)
    replace(int8, f"{name}.int8", halved)

    assert only_fault(int8) == (
        f"{name}/DequantizeLinear: column 0 reaches 60 of 127, expected over half: its scale is not "
        "the column's"
    )


@pytest.mark.parametrize("name", [NAME, SQUARE])
def test_axis_swapped(graphs, int8, name):
    """On a square weight every runtime takes it, and it is wrong. Only this check sees it:
    ONNX Runtime's fused integer product ignores the axis and answers as if it were right."""
    sound = distance(graphs, int8, optimize=False)
    node = node_of(int8, f"{name}.weight/DequantizeLinear")
    (axis,) = [attribute for attribute in node.attribute if attribute.name == "axis"]
    axis.i = 0

    assert only_fault(int8) == f"{node.name}: scales along axis 0, expected one a column: axis 1"
    if name == SQUARE:
        assert distance(graphs, int8, optimize=False) > 3 * sound


@pytest.mark.parametrize("off", [1, 3, -2])
@pytest.mark.parametrize("place", ["input_zero_point", "weight.zero_point"])
def test_zero_point_off(int8, off, place):
    wrong = values(int8, f"{NAME}.{place}").copy()
    if wrong.shape:
        wrong[5] = off
    else:
        wrong = np.int8(off)
    replace(int8, f"{NAME}.{place}", wrong)

    faults = quantization_faults(int8)

    assert len(faults) == (1 if wrong.shape else 2)
    assert all(NAME in fault and f"zero point {off}, expected 0" in fault for fault in faults)


def test_zero_points_that_differ(int8):
    other = add(int8, "other", np.int8(1))
    node_of(int8, f"{NAME}/DequantizeLinear").input[2] = other

    faults = quantization_faults(int8)

    assert any(f"zero point 1, expected {NAME}/QuantizeLinear's 0" in fault for fault in faults)


@pytest.mark.parametrize("scale", [0.0, -0.5, np.nan, np.inf])
@pytest.mark.parametrize("place", ["input_scale", "weight.scale"])
def test_impossible_scales(int8, scale, place):
    wrong = np.array(values(int8, f"{NAME}.{place}"))
    wrong.reshape(-1)[-1] = scale
    replace(int8, f"{NAME}.{place}", wrong)

    faults = quantization_faults(int8)

    assert any(f"scale {scale:.9g}, expected finite and above 0" in fault for fault in faults)
    assert all(NAME in fault for fault in faults)


@pytest.mark.parametrize("scale", [0.1, 1 + 2.0**-8, 2.0**-25, 65536.0])
def test_scales_that_a_half_type_rounds(int8, scale):
    replace(int8, f"{NAME}.input_scale", np.float32(scale))

    faults = quantization_faults(int8)

    assert len(faults) == 2
    assert all("is not exact in float16 and bfloat16" in fault for fault in faults)


def weight_below_the_range(model):
    array = values(model, f"{NAME}.weight.int8").copy()
    array[3, 2] = -128
    replace(model, f"{NAME}.weight.int8", array)


def scale_a_row(model):
    replace(model, f"{NAME}.weight.scale", np.full(128, 0.5, np.float32))
    replace(model, f"{NAME}.weight.zero_point", np.zeros(128, np.int8))


def scale_of_the_whole_weight(model):
    replace(model, f"{NAME}.weight.scale", np.float32(0.5))
    replace(model, f"{NAME}.weight.zero_point", np.int8(0))


def zero_point_of_another_shape(model):
    replace(model, f"{NAME}.weight.zero_point", np.int8(0))


def scale_a_channel_of_the_activation(model):
    replace(model, f"{NAME}.input_scale", np.full(128, 0.5, np.float32))
    replace(model, f"{NAME}.input_zero_point", np.zeros(128, np.int8))


def unsigned(model):
    replace(model, f"{NAME}.input_zero_point", np.uint8(0))


def no_zero_point(model):
    for kind in ("Quantize", "Dequantize"):
        del node_of(model, f"{NAME}/{kind}Linear").input[2]


def scale_that_is_computed(model):
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == f"{NAME}.input_scale":
                node.input[index] = "computed"
    node = helper.make_node("Identity", [f"{NAME}.input_scale"], ["computed"], name="i")
    model.graph.node.insert(0, node)


def grouped_weight(model):
    array = values(model, f"{NAME}.weight.int8")
    replace(model, f"{NAME}.weight.int8", array.reshape(2, 64, 64))


def read_by_an_addition(model):
    source = f"{NAME}/DequantizeLinear:0"
    model.graph.node.append(helper.make_node("Add", [source, source], ["more"], name="add"))


def read_by_an_addition_behind_a_cast(model):
    source = f"{NAME}/DequantizeLinear:0"
    cast = helper.make_node("Cast", [source], ["half"], name="cast", to=TensorProto.FLOAT16)
    add_node = helper.make_node("Add", ["half", "half"], ["more"], name="add")
    model.graph.node.extend([cast, add_node])


def sides_swapped(model):
    product = node_of(model, f"{SQUARE}/MatMul")
    product.input[0], product.input[1] = product.input[1], product.input[0]


def weight_alone(model):
    node_of(model, f"{NAME}/MatMul").input[0] = "encoder.layer.0.output.dense/Gelu:0"


def eight_bits_read_by_something_else(model):
    node = helper.make_node(
        "Cast", [f"{NAME}/QuantizeLinear:0"], ["wide"], name="cast", to=TensorProto.FLOAT
    )
    model.graph.node.extend([node, helper.make_node("Neg", ["wide"], ["negative"], name="neg")])


def zero_point_of_another_type(model):
    (tensor,) = [t for t in model.graph.initializer if t.name == f"{NAME}.weight.zero_point"]
    tensor.data_type = TensorProto.FLOAT8E4M3FN


def an_output_of_the_graph(model):
    model.graph.output.append(onnx.ValueInfoProto(name=f"{NAME}/DequantizeLinear:0"))


def dequantizer_of_something_else(model):
    node_of(model, f"{NAME}/DequantizeLinear").input[0] = "input_ids"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (weight_below_the_range, "column 2 reaches 128, expected at most 127"),
        (scale_a_row, "weight scale of shape [128], expected [64], one a column"),
        (scale_of_the_whole_weight, "weight scale of shape [], expected [64], one a column"),
        (zero_point_of_another_shape, "zero point of shape [], expected its scale's [64]"),
        (scale_a_channel_of_the_activation, "activation scale of shape [128], expected a scalar"),
        (unsigned, "quantized as UINT8, expected INT8 or FLOAT8E4M3FN"),
        (no_zero_point, "its scale or zero point is no constant"),
        (scale_that_is_computed, "its scale or zero point is no constant"),
        (grouped_weight, "weight of shape [2, 64, 64], expected 2 axes"),
        (read_by_an_addition, "Add add reads it, expected MatMul alone"),
        (read_by_an_addition_behind_a_cast, "Add add reads it, expected MatMul alone"),
        (sides_swapped, f"a weight is on the left of {SQUARE}/MatMul, expected on its right"),
        (weight_alone, "only its right side is in 8 bits, expected both"),
        (eight_bits_read_by_something_else, "neg reads its 8-bit values"),
        (zero_point_of_another_type, "zero point of another type than the weight"),
        (an_output_of_the_graph, "its values are an output of the graph"),
        (
            dequantizer_of_something_else,
            "dequantizes input_ids, expected a QuantizeLinear's output",
        ),
    ],
)
def test_each_fault_is_one_sentence_naming_the_node(int8, change, sentence):
    change(int8)

    faults = quantization_faults(int8)

    assert any(sentence in fault for fault in faults), faults
    assert all(NAME in fault or SQUARE in fault for fault in faults)
    assert len(set(faults)) == len(faults)


def test_columns_of_zeros_and_of_next_to_nothing_are_sound(int8):
    stored, scale = values(int8, f"{NAME}.weight.int8").copy(), values(int8, f"{NAME}.weight.scale")
    stored[:, [4, 6]] = 0
    stored[:, 5] = stored[:, 5] // 100
    scale = scale.copy()
    scale[[4, 5]] = 2.0**-24
    scale[6] = 0.5
    replace(int8, f"{NAME}.weight.int8", stored)
    replace(int8, f"{NAME}.weight.scale", scale)

    assert quantization_faults(int8) == []


def test_fp8_weights_that_use_half_their_range(graphs):
    model = onnx.load_from_string(graphs[Precision.FP8])
    name = f"{NAME}.weight.fp8"
    stored = values(model, name)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    halved = (stored.astype(np.float32) / 2).astype(stored.dtype)
    tensor.raw_data = halved.tobytes()

    assert "column 0 reaches 224 of 448, expected over half" in only_fault(model)
