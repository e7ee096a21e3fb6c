"""EncoderLayers on graphs that ``calibrate`` wrote: stored integers, their scales, smoothing."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import pytest

from convbert_deploy.calibration.quantize import quantized_graph
from convbert_deploy.calibration.samples import CalibrationSamples, SampleRow
from convbert_deploy.calibration.smoothing import SmoothingOptions
from convbert_deploy.calibration.workspace import Workspace
from convbert_deploy.operators import nodes_of
from convbert_deploy.operators.encoder_layer import LayerInputs
from convbert_deploy.operators.packed_weight import LinearWeight, WeightType, unpacked
from convbert_deploy.passes import EncoderLayersOptions
from convbert_deploy.precision import Precision

import calibrated
from encoder_reference import run_reference, with_encoder_layers

STATIC = EncoderLayersOptions(static_activations=True)


def batch():
    return calibrated.padded_batch(batch=2)


def samples() -> CalibrationSamples:
    """The rows of the batch that is run."""
    rows = []
    for number, (ids, mask) in enumerate(
        zip(batch()["input_ids"], batch()["attention_mask"], strict=True)
    ):
        kept = ids[: mask.sum()]
        inputs = {
            "input_ids": kept,
            "attention_mask": np.ones_like(kept),
            "token_type_ids": np.zeros_like(kept),
        }
        rows.append(SampleRow(number, inputs))
    return CalibrationSamples("rows.npz", "row", tuple(rows))


@functools.cache
def _quantized(smooth: bool, high: tuple[str, ...], precision: Precision) -> bytes:
    with Workspace.open(calibrated.split("groups-2", "masked")) as workspace:
        smoothing = SmoothingOptions(0.5 if smooth else None)
        plans = calibrated.plans_of(workspace, samples(), precision, smoothing)
        kept = [plan for plan in plans if not {one.name for one in plan.linears} & set(high)]
        model = quantized_graph(workspace, kept, precision)
        return workspace.complete(model).SerializeToString()


def quantized(
    smooth: bool = True, high: tuple[str, ...] = (), precision: Precision = Precision.INT8
) -> onnx.ModelProto:
    """Two layers with grouped linears, masked; ``high``: linears left in float32."""
    return onnx.load_from_string(_quantized(smooth, high, precision))


def _initializer(model: onnx.ModelProto, name: str, edit) -> None:
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    tensor.CopyFrom(onnx.numpy_helper.from_array(edit(onnx.numpy_helper.to_array(tensor)), name))


def weight_of(model: onnx.ModelProto, name: str, layer: int = 0) -> LinearWeight:
    inputs = LayerInputs.from_order(nodes_of(model, "EncoderLayer")[layer].input)
    return unpacked(calibrated.values(model, getattr(inputs, f"{name}_weight")))


@pytest.mark.parametrize("smooth", [True, False])
def test_static_steps_compute_what_the_pairs_say(smooth):
    before = quantized(smooth)
    # room above the ranges: beyond them the kernel stops at -127 and QuantizeLinear at -128
    for tensor in before.graph.initializer:
        if tensor.name.endswith(".input_scale"):
            _initializer(before, tensor.name, lambda scale: scale * np.float32(1.5))
    after, report = with_encoder_layers(before, STATIC)
    assert report.complete
    expected = calibrated.run(before, batch(), optimize=False)["logits"]
    found = run_reference(after, batch())["logits"]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert not {n.op_type for n in after.graph.node} & {"QuantizeLinear", "DequantizeLinear"}


def test_integers_and_scales_are_the_stored_ones():
    before = quantized()
    module = "encoder.layer.1.attention.self.projections"
    for options in (STATIC, None):
        after, _ = with_encoder_layers(before, options)
        weight = weight_of(after, "projections", 1)
        assert weight.type is WeightType.INT8
        stored = calibrated.values(before, f"{module}.weight.int8")
        assert np.array_equal(weight.weight[0], stored)
        assert np.array_equal(weight.scale, calibrated.values(before, f"{module}.weight.scale"))
        assert np.array_equal(weight.multiplier, calibrated.values(before, f"{module}.smoothing"))
        step = float(calibrated.values(before, f"{module}.input_scale"))
        assert weight.activation_scale == (step if options else 0)
        assert weight_of(after, "generator").type is WeightType.FP32


def test_folded_smoothing_leaves_no_multiplier():
    after, _ = with_encoder_layers(quantized(), STATIC)
    assert weight_of(after, "pointwise").multiplier is None
    assert weight_of(after, "attention_output").multiplier is None


def test_groups_with_steps_of_their_own_share_one():
    """A group's step moves into its multiplier and out of its scales."""
    before = quantized()
    names = [f"encoder.layer.0.intermediate.dense.group{index}" for index in range(2)]
    steps = [float(calibrated.values(before, f"{name}.input_scale")) for name in names]
    assert steps[0] != steps[1]
    after, _ = with_encoder_layers(before, STATIC)
    weight = weight_of(after, "up")
    assert weight.weight.shape[0] == 2 and weight.activation_scale == max(steps)
    for index, name in enumerate(names):
        rows, columns = weight.weight.shape[1:]
        ratio = weight.multiplier[index * rows :][:rows] / calibrated.values(
            before, f"{name}.smoothing"
        )
        np.testing.assert_allclose(ratio, max(steps) / steps[index], rtol=1e-6)
        scale = weight.scale[index * columns :][:columns]
        np.testing.assert_allclose(
            scale * weight.activation_scale,
            calibrated.values(before, f"{name}.weight.scale") * steps[index],
            rtol=1e-6,
        )


def test_a_step_for_each_token_is_nearer_to_float32():
    exact = calibrated.run(calibrated.exported("groups-2", padding="masked"), batch())["logits"]
    worst = {}
    for options in (STATIC, EncoderLayersOptions()):
        after, _ = with_encoder_layers(quantized(), options)
        found = run_reference(after, batch())["logits"]
        worst[options.static_activations] = np.abs(found - exact).max() / exact.std()
    assert worst[False] < 0.1 and worst[True] < 0.2


@pytest.mark.parametrize("kind", [WeightType.FP32, WeightType.BF16])
def test_linears_kept_high(kind):
    high = ("encoder.layer.0.output.dense.group0", "encoder.layer.1.attention.output.dense")
    before = quantized(high=high)
    options = EncoderLayersOptions(linears=kind, static_activations=True)
    after, report = with_encoder_layers(before, options)
    assert report.complete
    assert weight_of(after, "attention_output", 1).type is kind
    assert weight_of(after, "attention_output", 0).type is WeightType.INT8
    mixed = weight_of(after, "down", 0)
    assert mixed.type is kind, "one group kept high takes the others with it"
    name = "encoder.layer.0.output.dense.group1.weight"
    factors = calibrated.values(before, "encoder.layer.0.output.dense.group1.smoothing")
    whole = calibrated.values(before, f"{name}.int8") * calibrated.values(before, f"{name}.scale")
    np.testing.assert_allclose(mixed.weight[1], whole * factors[:, None], rtol=2**-8)
    expected = calibrated.run(before, batch(), optimize=False)["logits"]
    found = run_reference(after, batch())["logits"]
    assert np.abs(found - expected).max() < 0.1 * expected.std()


def test_fp8_is_named():
    _, report = with_encoder_layers(quantized(smooth=False, precision=Precision.FP8))
    assert report.fired == 0
    assert "expected int8 weights, found float8_e4m3fn" in report.reasons[0]


def _axis_of_the_weight(model: onnx.ModelProto) -> None:
    node = calibrated.node_of(
        model, "encoder.layer.0.attention.output.dense.weight/DequantizeLinear"
    )
    node.attribute[0].i = 0


def _offset_in_the_activation(model: onnx.ModelProto) -> None:
    name = "encoder.layer.0.attention.output.dense.input_zero_point"
    _initializer(model, name, lambda zero: zero + np.int8(3))


def _another_scale_back(model: onnx.ModelProto) -> None:
    node = calibrated.node_of(model, "encoder.layer.0.attention.output.dense/DequantizeLinear")
    node.input[1] = "encoder.layer.1.attention.output.dense.input_scale"


def _weight_alone(model: onnx.ModelProto) -> None:
    node = calibrated.node_of(model, "encoder.layer.0.attention.output.dense/MatMul")
    node.input[0] = "encoder.layer.0.attention.self/Concat:0"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_axis_of_the_weight, "a scale a column"),
        (_offset_in_the_activation, "zero point of 0"),
        (_another_scale_back, "the same in both nodes"),
        (_weight_alone, "comes from Concat, expected DequantizeLinear"),
    ],
)
def test_pairs_that_mean_something_else_are_left_and_named(change, reason):
    model = quantized()
    change(model)
    after, report = with_encoder_layers(model, STATIC)
    assert report.fired == 0 and reason in report.reasons[0]
    assert not nodes_of(after, "EncoderLayer")


def test_a_wrong_integer_is_found():
    """Two columns' scales exchanged: the comparison with the pairs tells."""
    before = quantized()
    after, _ = with_encoder_layers(before, STATIC)
    name = "encoder.layer.0.attention.self.projections.weight.scale"
    _initializer(before, name, lambda scales: np.roll(scales, 7))
    expected = calibrated.run(before, batch(), optimize=False)["logits"]
    found = run_reference(after, batch())["logits"]
    assert np.abs(found - expected).max() > 0.03 * expected.std()
