"""EncoderLayers: what it rewrites answers as before, and what it cannot rewrite it names."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest

from convbert_deploy.architecture import Task
from convbert_deploy.backends.onnxruntime import OnnxRuntimeRunner
from convbert_deploy.operators import nodes_of
from convbert_deploy.operators.encoder_layer import LayerAttributes, LayerInputs
from convbert_deploy.operators.packed_weight import WeightType, unpacked
from convbert_deploy.passes import EncoderLayersOptions

import calibrated
import factories
from encoder_reference import run_reference, with_encoder_layers
from layer_text import TEXT, layer_batch, layer_model

#: an exported graph's answers, computed once more in float64 and another order
EXACT = 5e-6


def answers(model: onnx.ModelProto, batch) -> dict[str, np.ndarray]:
    with OnnxRuntimeRunner.from_model(model, optimize=False) as runner:
        return runner.infer(batch)


def inputs_of(model: onnx.ModelProto, index: int = 0) -> LayerInputs[str]:
    return LayerInputs.from_order(nodes_of(model, "EncoderLayer")[index].input)


def test_one_layer_becomes_three_nodes():
    before = layer_model()
    after, report = with_encoder_layers(before)
    assert (report.fired, report.expected, report.reasons) == (1, 1, ())
    assert [node.op_type for node in after.graph.node] == ["PackRows", "EncoderLayer", "UnpackRows"]
    assert not after.functions
    (node,) = nodes_of(after, "EncoderLayer")
    assert LayerAttributes.of(node) == LayerAttributes(2, 3, pytest.approx(1e-12))
    inputs = inputs_of(after)
    assert inputs.attention_mask == "attention_mask", "pads are rows, but no keys"
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in after.graph.initializer}
    assert set(weights) == set(inputs.in_order()) - {
        "attention_mask",
        inputs.rows,
        inputs.row_starts,
    }
    up = unpacked(weights[inputs.up_weight])
    assert np.array_equal(up.weight[0], calibrated.values(before, "w_up"))
    np.testing.assert_allclose(
        run_reference(after, layer_batch())["last"],
        answers(before, layer_batch())["last"],
        atol=EXACT,
    )


def test_a_masked_layer_leaves_pads_out():
    text = TEXT.replace("(hidden, taps)", "(hidden, taps, attention_mask)")
    text = text.replace("(c, logits)", "(c, logits, attention_mask)")
    before, batch = layer_model(text), layer_batch()
    after, report = with_encoder_layers(before)
    assert report.complete
    assert inputs_of(after).attention_mask is None
    (node,) = nodes_of(after, "EncoderLayer")
    assert "" not in node.input, "ONNX Runtime up to 1.23 crashes on it"
    real = batch["attention_mask"] != 0
    found = run_reference(after, batch)["last"]
    np.testing.assert_allclose(found[real], answers(before, batch)["last"][real], atol=EXACT)
    assert not found[~real].any()


def selecting(index: np.ndarray, *, axis: int = 1, outputs: str = "float[B, 8] row"):
    """The layer with a Gather behind it; ``outputs`` of the graph."""
    gather = f"    row = Gather <axis = {axis}> (last, index)\n}}"
    text = TEXT.replace("float[B, S, 8] last", outputs).replace("\n}", f"\n{gather}")
    model = layer_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(index, "index"))
    return model


def test_what_only_first_rows_are_read_of_computes_no_other():
    before, batch = selecting(np.int64(0).reshape(())), layer_batch()
    after, report = with_encoder_layers(before)
    assert report.complete
    assert [node.op_type for node in after.graph.node] == ["PackRows", "EncoderLayer"]
    (node,) = nodes_of(after, "EncoderLayer")
    assert LayerAttributes.of(node).first_row_only == 1
    found = run_reference(after, batch)["row"]
    np.testing.assert_allclose(found, answers(before, batch)["row"], atol=EXACT)


@pytest.mark.parametrize(
    "before",
    [
        selecting(np.int64(1).reshape(())),
        selecting(np.int64([0]), outputs="float[B, one, 8] row"),
        selecting(np.int64(0).reshape(()), axis=0, outputs="float[S, 8] row"),
        selecting(np.int64(0).reshape(()), outputs="float[B, 8] row, float[B, S, 8] last"),
    ],
    ids=["another row", "an axis of one", "the first sequence", "all rows are read too"],
)
def test_anything_else_is_computed_of_all_rows(before):
    after, report = with_encoder_layers(before)
    assert report.complete
    (node,) = nodes_of(after, "EncoderLayer")
    assert LayerAttributes.of(node).first_row_only == 0
    found = run_reference(after, layer_batch())["row"]
    np.testing.assert_allclose(found, answers(before, layer_batch())["row"], atol=EXACT)


def test_pass_twice_is_pass_once():
    once, _ = with_encoder_layers(layer_model())
    twice, report = with_encoder_layers(once)
    assert twice == once
    assert report.fired == 0 and report.reasons == ("no SpanDynamicConv in the graph",)


@pytest.mark.parametrize(
    ("old", "new"), [("(key, q)", "(q, key)"), ("(down, normed)", "(normed, down)")]
)
def test_sums_and_products_match_in_either_order(old, new):
    assert with_encoder_layers(layer_model(TEXT.replace(old, new)))[1].complete


#: a change of the text, and what the reason says
OTHERS = {
    "tanh GELU": ('"none"', '"tanh"', "activated|exact GELU, found approximate tanh"),
    "another activation": ('Gelu <approximate = "none"> (up)', "Relu (up)", "up is read by Relu"),
    "query and key exchanged": ("q, k, v, c =", "k, q, v, c =", "query times key convolution"),
    "value of the attention": ("(v, heads)", "(k, heads)", "first three parts"),
    "convolution of the value": ("(c, logits)", "(v, logits)", "last part of the projections"),
    "convolution first": ("(context, convolved)", "(convolved, context)", "attention beside"),
    "no residual": ("(attention, hidden)", "(attention, b_down)", "attention_output plus hidden"),
    "another residual": ("(down, normed)", "(down, hidden)", "down plus normed"),
    "two epsilons": ("1e-12> (output_sum", "1e-5> (output_sum", "one epsilon"),
    "depthwise of something else": ("DepthwiseConv1D (hidden", "DepthwiseConv1D (q", "read hidden"),
    "masks differ": ("(c, logits)", "(c, logits, attention_mask)", "attention's mask, or none"),
    "heads differ": ("num_heads = 2", "num_heads = 1", "heads|generator of shape"),
    "taps differ": ("kernel_size = 3", "kernel_size = 5", "generator of shape"),
    "keys not turned": ("[0, 2, 3, 1]", "[0, 2, 1, 3]", r"perm \[0, 2, 3, 1\]"),
    "softmax over queries": ("Softmax <axis = -1>", "Softmax <axis = 2>", "axis -1"),
    "unscaled": ("Div (scores, root)", "Div (scores, one)", "sqrt"),
    "computed bias": ("Add (raised, b_up)", "Add (raised, raised)", "no linear layer reads normed"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_pattern_is_left_alone_and_named(case):
    old, new, reason = OTHERS[case]
    assert TEXT.count(old) == 1
    # functions cannot stand for operators with two kinds of nodes; the pass does not need them
    model = onnx.parser.parse_model(TEXT.replace(old, new))
    model.graph.initializer.extend(layer_model().graph.initializer)
    after, report = with_encoder_layers(model)
    assert (report.fired, report.expected) == (0, 1)
    (text,) = report.reasons
    assert text.startswith("encoder.layer.0: ")
    assert re.search(reason, text), text
    assert [n.op_type for n in after.graph.node] == [n.op_type for n in model.graph.node]


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("minus", np.float32(-1), "at most -10000 at pads"),
        ("one", np.float32(2), "1 - mask"),
        ("heads", np.int64([0, 0, 4, 1]), "Reshape to|sqrt"),
    ],
)
def test_constants_are_looked_at(name, value, reason):
    model = layer_model()
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    tensor.CopyFrom(onnx.numpy_helper.from_array(value, name))
    _, report = with_encoder_layers(model)
    assert report.fired == 0
    assert any(part in report.reasons[0] for part in reason.split("|")), report.reasons


def test_what_is_read_from_inside_keeps_the_layer():
    model = layer_model()
    model.graph.output.append(onnx.helper.make_tensor_value_info("weights", 1, None))
    _, report = with_encoder_layers(model)
    assert report.reasons == ("encoder.layer.0: weights is read outside its layer",)


def test_one_odd_layer_keeps_them_all():
    """All or nothing: rows are packed once before the first layer and unpacked after the last."""
    model = calibrated.exported("tiny")
    gelu = [node for node in model.graph.node if node.op_type == "Gelu"][1]
    assert gelu.name.startswith("encoder.layer.1")
    gelu.attribute[0].s = b"tanh"
    after, report = with_encoder_layers(model)
    assert (report.fired, report.expected) == (0, 2)
    assert report.reasons[0].startswith("encoder.layer.1: encoder.layer.1.intermediate")
    assert not nodes_of(after, "EncoderLayer") and len(nodes_of(after, "SpanDynamicConv")) == 2


def test_hidden_states_that_somebody_asks_for_keep_the_layers():
    model = calibrated.exported("tiny")
    name = "encoder.layer.0.output.LayerNorm/LayerNormalization:0"
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, None))
    _, report = with_encoder_layers(model)
    assert report.reasons == (f"encoder.layer.0: {name} is not read by the next alone",)


#: tracing takes seconds each
EXPORTS = [
    ("tiny", "hf"),
    ("tiny", "masked"),
    ("groups-2", "hf"),
    ("embedding-equal", "hf"),
    ("head-ratio-4", "hf"),
    ("intermediate-37", "masked"),
    ("kernel-1", "masked"),
]


@pytest.mark.parametrize(("size", "padding"), EXPORTS)
def test_exports_answer_as_before(size, padding):
    before, batch = calibrated.exported(size, padding=padding), calibrated.padded_batch()
    after, report = with_encoder_layers(before)
    assert (report.fired, report.expected) == (2, 2)
    expected = calibrated.run(before, batch)["logits"]
    np.testing.assert_allclose(run_reference(after, batch)["logits"], expected, atol=EXACT)
    assert not nodes_of(after, "SpanDynamicConv")
    groups = {
        name: unpacked(calibrated.values(after, getattr(inputs_of(after), f"{name}_weight")))
        for name in ("projections", "up", "down")
    }
    expected_groups = 2 if size == "groups-2" else 1
    assert [len(w.weight) for w in groups.values()] == [1, expected_groups, expected_groups]


@pytest.mark.parametrize(
    ("task", "padding"), [(Task.ENCODER, "masked"), (Task.MULTIPLE_CHOICE, "masked")]
)
def test_outputs_that_are_the_rows_and_heads_that_reshape_the_mask(task, padding):
    before, batch = calibrated.exported("tiny", task, padding), calibrated.padded_batch()
    real = batch["attention_mask"] != 0
    if task is Task.MULTIPLE_CHOICE:
        batch = {name: array[None] for name, array in batch.items()}
    after, report = with_encoder_layers(before)
    assert report.complete
    assert [v.name for v in after.graph.output] == [v.name for v in before.graph.output]
    expected, found = calibrated.run(before, batch), run_reference(after, batch)
    for name in expected:
        tokens = real if task is not Task.MULTIPLE_CHOICE else ...
        np.testing.assert_allclose(found[name][tokens], expected[name][tokens], atol=EXACT)


@pytest.mark.parametrize("kind", [WeightType.BF16, WeightType.INT8])
def test_types_of_weights(kind):
    before, batch = calibrated.exported("groups-2"), calibrated.padded_batch()
    options = EncoderLayersOptions(kind, WeightType.BF16, bfloat16_attention=True)
    after, _ = with_encoder_layers(before, options)
    inputs = inputs_of(after)
    found = {
        name.removesuffix("_weight"): unpacked(calibrated.values(after, getattr(inputs, name)))
        for name in vars(inputs)
        if name.endswith("_weight") and "norm" not in name and "depthwise" not in name
    }
    assert {name: w.type for name, w in found.items() if name != "generator"} == dict.fromkeys(
        ("projections", "pointwise", "attention_output", "up", "down"), kind
    )
    assert found["generator"].type is WeightType.BF16
    assert all(w.activation_scale == 0 and w.multiplier is None for w in found.values())
    assert {LayerAttributes.of(n).attention for n in nodes_of(after, "EncoderLayer")} == {1}
    expected = calibrated.run(before, batch)["logits"]
    worst = np.abs(run_reference(after, batch)["logits"] - expected).max()
    limit = 0.02 if kind is WeightType.BF16 else 0.05
    assert 1e-4 < worst < limit * expected.std() * 4


def _swapped(array: np.ndarray, first: slice, second: slice) -> np.ndarray:
    changed = array.copy()
    changed[..., first], changed[..., second] = array[..., second], array[..., first]
    return changed


@pytest.mark.parametrize("fault", ["query and key", "taps reversed", "masks dropped", "norms"])
def test_a_wrong_rewrite_is_found(fault):
    """The comparison above is worth something: each of these moves the answer far beyond it."""
    from convbert_deploy.operators.packed_weight import LinearWeight, packed

    before, batch = calibrated.exported("tiny"), calibrated.padded_batch()
    after, _ = with_encoder_layers(before)
    node = nodes_of(after, "EncoderLayer")[0]
    inputs = inputs_of(after)

    def change(name: str, edit) -> None:
        (tensor,) = [t for t in after.graph.initializer if t.name == name]
        array = edit(onnx.numpy_helper.to_array(tensor))
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))

    def swap_columns(blob: np.ndarray) -> np.ndarray:
        weight = unpacked(blob).weight
        width = weight.shape[2] // 4
        swapped = _swapped(weight, slice(0, width), slice(width, 2 * width))
        return packed(LinearWeight(swapped, WeightType.FP32))

    if fault == "query and key":
        change(inputs.projections_weight, swap_columns)
    elif fault == "taps reversed":
        change(inputs.depthwise_weight, lambda taps: taps[::-1].copy())
    elif fault == "masks dropped":
        del node.input[-1]
    else:
        change(inputs.attention_norm_weight, lambda gamma: gamma[::-1].copy())
    expected = calibrated.run(before, batch)["logits"]
    assert np.abs(run_reference(after, batch)["logits"] - expected).max() > 1000 * EXACT


def test_a_sabotaged_convolution_stays_wrong():
    """The pass rewrites the graph it is given, faults included, or leaves it."""
    wrong = factories.sabotage_onnx(calibrated.exported("tiny"), "reversed-taps")
    batch = calibrated.padded_batch()
    after, _ = with_encoder_layers(wrong)
    good = calibrated.run(calibrated.exported("tiny"), batch)["logits"]
    assert np.abs(run_reference(after, batch)["logits"] - good).max() > 1000 * EXACT
