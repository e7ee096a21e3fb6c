"""The Q/DQ graph: where the nodes are, what is stored, and what it computes."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from convbert_deploy.calibration.attention import attention_inputs
from convbert_deploy.calibration.collect import collect
from convbert_deploy.calibration.formats import (
    activation_scale,
    fake_quantized,
    quantized_weight,
    weight_scales,
)
from convbert_deploy.calibration.linears import linears
from convbert_deploy.calibration.quantization_check import quantization_faults
from convbert_deploy.calibration.quantize import quantized_graph
from convbert_deploy.calibration.smoothing import SmoothingOptions
from convbert_deploy.calibration.workspace import Workspace
from convbert_deploy.errors import GraphError
from convbert_deploy.precision import Precision

from calibrated import (
    exported,
    node_of,
    padded_batch,
    plans_of,
    random_samples,
    run,
    runner_of,
    split,
    tagger,
    tagger_samples,
    values,
)

BOTH = pytest.mark.parametrize("precision", [Precision.INT8, Precision.FP8])
SIZES = pytest.mark.parametrize("size", ["tiny", "groups-2"])
AUTO = SmoothingOptions("auto")
_TYPES = {Precision.INT8: TensorProto.INT8, Precision.FP8: TensorProto.FLOAT8E4M3FN}


@pytest.fixture(scope="module", params=["tiny", "groups-2"])
def workspace(request):
    with Workspace.open(split(request.param, padding="masked")) as opened:
        yield opened


@pytest.fixture(scope="module")
def tiny():
    with Workspace.open(split("tiny", padding="masked")) as opened:
        yield opened


def quantized(workspace, precision=Precision.INT8, smoothing=None, keep=lambda plan: True):
    plans = plans_of(workspace, random_samples(), precision, smoothing)
    chosen = tuple(plan for plan in plans if keep(plan))
    return chosen, workspace.complete(quantized_graph(workspace, chosen, precision))


def kinds(model: onnx.ModelProto) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in model.graph.node)


@BOTH
@pytest.mark.parametrize("smoothing", [None, AUTO])
def test_structure(workspace, precision, smoothing):
    plans, model = quantized(workspace, precision, smoothing)
    found = linears(workspace.model())

    onnx.checker.check_model(model)
    assert quantization_faults(model) == []
    count = kinds(model)
    assert count["QuantizeLinear"] == len(plans) == len({linear.activation for linear in found})
    assert count["DequantizeLinear"] == len(plans) + len(found)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for linear in found:
        product = node_of(model, linear.node)
        left, right = (node_of(model, name.removesuffix(":0")) for name in product.input)
        quantize = node_of(model, left.input[0].removesuffix(":0"))
        assert quantize.op_type == "QuantizeLinear"
        assert list(quantize.input[1:]) == list(left.input[1:])
        assert list(tensors[left.input[1]].dims) == list(tensors[left.input[2]].dims) == []
        stored, scale, zero_point = (tensors[name] for name in right.input)
        assert stored.data_type == zero_point.data_type == _TYPES[precision]
        assert list(stored.dims) == [linear.rows, linear.columns]
        assert list(scale.dims) == list(zero_point.dims) == [linear.columns]
        assert [attribute.i for attribute in right.attribute if attribute.name == "axis"] == [1]
        assert not np.any(values(model, zero_point.name).astype(np.float32))


@BOTH
def test_no_float_copy_of_a_quantized_weight_is_left(workspace, precision):
    _, model = quantized(workspace, precision)

    stored = {linear.weight for linear in linears(workspace.model())}
    assert not stored & {tensor.name for tensor in model.graph.initializer}
    read = {name for node in model.graph.node for name in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= read


def test_everything_else_stays_as_it_is(workspace):
    """Attention's products, softmax, LayerNorm, embeddings, kernel generator and head."""
    _, model = quantized(workspace)
    before = workspace.complete(workspace.model())

    chosen = {linear.node for linear in linears(before)}
    for node in before.graph.node:
        same = node_of(model, node.name)
        assert (same == node) == (node.name not in chosen)
    kept = {tensor.name: tensor for tensor in model.graph.initializer}
    replaced = {linear.weight for linear in linears(before)}
    for tensor in before.graph.initializer:
        assert tensor.name in replaced or kept[tensor.name] == tensor
    assert not model.graph.value_info
    assert model.graph.input == before.graph.input and model.graph.output == before.graph.output


@BOTH
def test_the_answers_stay_near(workspace, precision):
    """Realistic random weights, logits of deviation 0.4; one weight's scale doubled is 0.18 off."""
    _, model = quantized(workspace, precision)
    batch = padded_batch(batch=3, seq=30)
    expected = run(workspace.complete(workspace.model()), batch)["logits"]

    found = run(model, batch, precision)["logits"]

    distance = np.abs(found - expected)
    assert 1e-4 < distance.mean() < (0.015 if precision is Precision.INT8 else 0.06)


@pytest.mark.parametrize("optimize", [True, False])
def test_int8_is_the_same_with_and_without_onnxruntimes_fusions(tiny, optimize):
    """Fused integer products and the pairs computed one by one are one graph."""
    _, model = quantized(tiny)
    batch = padded_batch()
    one = run(model, batch, optimize=optimize)["logits"]

    assert np.abs(one - run(model, batch)["logits"]).max() < 0.01


@BOTH
@SIZES
def test_one_linear_is_the_reference_by_hand(size, precision):
    name = "encoder.layer.1.intermediate.dense"
    with Workspace.open(split(size, padding="masked")) as workspace:
        plans, model = quantized(
            workspace, precision, keep=lambda plan: plan.linears[0].name.startswith(name)
        )
        weight = np.array(workspace.weight(plans[0].linears[0].weight))
    assert len(plans) == (1 if size == "tiny" else 2)
    linear, amax = plans[0].linears[0], plans[0].amax
    product = f"{linear.node}:0"

    found = run(model, padded_batch(), precision, outputs=[linear.activation, product])

    scales = weight_scales(weight, precision)
    stored = quantized_weight(weight, scales, precision).astype(np.float64) * scales
    rounded = fake_quantized(found[linear.activation], activation_scale(amax, precision), precision)
    assert np.abs(found[product] - rounded @ stored).max() < 1e-4
    # and neither is the product of the floats
    assert np.abs(found[product] - found[linear.activation] @ weight).max() > 1e-3


@BOTH
def test_a_smoothed_linear_is_the_reference_by_hand(tiny, precision):
    name = "encoder.layer.0.output.dense"
    plans, model = quantized(
        tiny, precision, SmoothingOptions(0.8), keep=lambda plan: plan.linears[0].name == name
    )
    (plan,) = plans
    linear, divisor = plan.linears[0], plan.divisor
    product = f"{linear.node}:0"

    found = run(model, padded_batch(), precision, outputs=[linear.activation, product])

    weight = np.asarray(tiny.weight(linear.weight)) * divisor[:, None]
    scales = weight_scales(weight, precision)
    stored = quantized_weight(weight, scales, precision).astype(np.float64) * scales
    smoothed = found[linear.activation] * (1 / divisor).astype(np.float32)
    rounded = fake_quantized(smoothed, activation_scale(plan.amax, precision), precision)
    assert np.abs(found[product] - rounded @ stored).max() < 1e-4


def test_a_subset_leaves_the_others_untouched(workspace):
    some, model = quantized(workspace, keep=lambda plan: "layer.1" in plan.linears[0].name)

    chosen = {linear.node for plan in some for linear in plan.linears}
    assert 0 < len(chosen) < len(linears(workspace.model()))
    before = workspace.complete(workspace.model())
    for node in before.graph.node:
        assert (node_of(model, node.name) == node) == (node.name not in chosen)
    kept = {tensor.name: tensor for tensor in model.graph.initializer}
    for linear in linears(before):
        if linear.node not in chosen:
            assert np.array_equal(values(model, linear.weight), values(before, linear.weight))
        else:
            assert linear.weight not in kept


def test_no_plan_is_the_graph_itself(tiny):
    before = tiny.complete(tiny.model()).SerializeToString(deterministic=True)

    model = tiny.complete(quantized_graph(tiny, (), Precision.INT8))

    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16, Precision.BF16])
def test_other_precisions_are_refused(tiny, precision):
    with pytest.raises(GraphError, match=f"cannot quantize to {precision}"):
        quantized_graph(tiny, (), precision)


def changed(plan, **linear_changes):
    linears = tuple(dataclasses.replace(linear, **linear_changes) for linear in plan.linears)
    return dataclasses.replace(plan, linears=linears)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"node": "no/MatMul"}, "no node no/MatMul"),
        ({"activation": "nothing:0"}, "expected .*nothing:0"),
        ({"weight": "no.weight"}, "expected .*no.weight"),
    ],
)
@pytest.mark.parametrize("smoothing", [None, SmoothingOptions(0.5)])
def test_plans_of_another_graph_are_refused(tiny, changes, message, smoothing):
    plan = plans_of(tiny, random_samples(4), smoothing=smoothing)[0]

    with pytest.raises(GraphError, match=message):
        quantized_graph(tiny, [changed(plan, **changes)], Precision.INT8)


def test_a_node_cannot_be_quantized_twice(tiny):
    plan = plans_of(tiny, random_samples(4))[0]

    with pytest.raises(GraphError, match="quantizes the node twice"):
        quantized_graph(tiny, [plan, plan], Precision.INT8)


@pytest.mark.parametrize("place", [0, 1])
def test_a_divisor_of_another_length_is_refused(tiny, place):
    """Where it becomes a multiplication, and where it goes into an earlier weight."""
    plan = plans_of(tiny, random_samples(4))[place]
    wrong = dataclasses.replace(plan, divisor=np.ones(plan.linears[0].rows + 1, np.float32))

    with pytest.raises(GraphError, match=r"has shape \[65\], expected \[64\]"):
        quantized_graph(tiny, [wrong], Precision.INT8)


def test_two_layers_with_one_stored_weight():
    """Equal weights are stored once; each linear still has constants of its own."""
    model = exported("tiny", padding="masked")
    first, second = (
        node_of(model, f"encoder.layer.{layer}.output.dense/MatMul") for layer in (0, 1)
    )
    second.input[1] = first.input[1]
    batch = padded_batch()
    expected = run(model, batch)["logits"]

    with Workspace.open(model) as workspace:
        _, model = quantized(workspace, Precision.INT8, SmoothingOptions(0.7))

    names = [tensor.name for tensor in model.graph.initializer]
    assert len(names) == len(set(names)) and first.input[1] not in names
    assert quantization_faults(model) == []
    assert np.abs(run(model, batch)["logits"] - expected).mean() < 0.02


def test_attentions_products_in_fp8(tiny):
    samples = random_samples()
    products = tuple(attention_inputs(tiny.model(), everything(tiny, samples)))
    plans = plans_of(tiny, samples, Precision.FP8)

    model = tiny.complete(quantized_graph(tiny, plans, Precision.FP8, products))

    assert quantization_faults(model) == []
    onnx.checker.check_model(model)
    assert kinds(model)["QuantizeLinear"] == len(plans) + 4 * 2
    batch = padded_batch()
    distance = (
        run(model, batch, Precision.FP8)["logits"]
        - run(tiny.complete(tiny.model()), batch)["logits"]
    )
    assert np.abs(distance).mean() < 0.06


def everything(workspace, samples):
    model = workspace.model()
    names = [name for n in model.graph.node if n.op_type == "MatMul" for name in n.input]
    made = {output for node in model.graph.node for output in node.output}
    return collect(workspace, [name for name in names if name in made], samples, "0" * 64)


def test_smoothing_leaves_the_values_whose_range_attention_uses(tiny):
    """Folded into the value projection, a divisor would take the values out of their FP8 range."""
    samples = random_samples()
    products = tuple(attention_inputs(tiny.model(), everything(tiny, samples)))
    plans = plans_of(tiny, samples, Precision.FP8, SmoothingOptions(0.8))
    value = node_of(tiny.model(), products[3].node).input[1]
    batch = padded_batch()
    before = run(tiny.complete(tiny.model()), batch, outputs=[value])[value]

    model = tiny.complete(quantized_graph(tiny, plans, Precision.FP8, products))

    after = run(model, batch, Precision.FP8, outputs=[value])[value]
    assert np.abs(after).max() == pytest.approx(np.abs(before).max(), rel=0.1)
    assert any(n.name == "encoder.layer.0.attention.output.dense/Smooth" for n in model.graph.node)


@BOTH
def test_a_trained_tagger_keeps_its_tags(precision):
    """14 tags of 24 sentences; per-tensor symmetric, min-max, no smoothing."""
    samples = tagger_samples(24)
    with Workspace.open(tagger()) as workspace:
        split_plans = plans_of(workspace, samples, precision)
        model = workspace.complete(quantized_graph(workspace, split_plans, precision))
    words = same = 0
    with runner_of(tagger()) as reference, runner_of(model, precision) as candidate:
        for _, batch in samples.batches(2048):
            expected, found = (r.infer(batch)["logits"] for r in (reference, candidate))
            words += expected[..., 0].size
            same += int((expected.argmax(-1) == found.argmax(-1)).sum())
    assert same / words > 0.985
