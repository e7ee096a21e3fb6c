"""Divisors moved into earlier weights: the same graph, and only where nothing else reads the tensor."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from convbert_deploy.calibration import quantize
from convbert_deploy.calibration.folding import fold
from convbert_deploy.calibration.linears import Linear, linears
from convbert_deploy.calibration.quantize import quantized_graph
from convbert_deploy.calibration.smoothing import ActivationPlan, SmoothingOptions, by_activation
from convbert_deploy.calibration.workspace import WeightEdits, Workspace
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

#: what is made by a depthwise convolution, and by the heads' context beside the dynamic convolution
FOLDED = ("attention.self.pointwise", "attention.output.dense")
GRAPHS = pytest.mark.parametrize(
    ("size", "padding"), [("tiny", "hf"), ("tiny", "masked"), ("groups-2", "hf")]
)


def divisor_of(rows: int, seed: int) -> np.ndarray:
    """1/8 to 8."""
    return (2 ** np.random.default_rng(seed).uniform(-3, 3, rows)).astype(np.float32)


def plans_with_divisors(model: onnx.ModelProto) -> list[ActivationPlan]:
    return [
        ActivationPlan(group, 1.0, 0.5, divisor_of(group[0].rows, seed), 0.0)
        for seed, group in enumerate(by_activation(linears(model)).values())
    ]


def folded(
    model: onnx.ModelProto, plans: list[ActivationPlan]
) -> tuple[onnx.ModelProto, list[Linear]]:
    """The float graph with divisors folded and the linears' rows multiplied, and which folded."""
    light = onnx.ModelProto()
    light.CopyFrom(model)
    with Workspace.open(light) as workspace:
        changed = workspace.model()
        edits = WeightEdits(workspace)
        done = [plan for plan in plans if fold(edits, changed, plan)]
        edits.write(changed)
        whole = workspace.complete(changed)
    for plan in done:
        for linear in plan.linears:
            (tensor,) = [t for t in whole.graph.initializer if t.name == linear.weight]
            scaled = numpy_helper.to_array(tensor) * plan.divisor[:, None]
            tensor.CopyFrom(numpy_helper.from_array(scaled, tensor.name))
    return whole, [linear for plan in done for linear in plan.linears]


def expect_same_answers(one: onnx.ModelProto, other: onnx.ModelProto, **kwargs) -> None:
    batch = padded_batch(**kwargs)
    assert np.abs(run(one, batch)["logits"] - run(other, batch)["logits"]).max() < 2e-5


@GRAPHS
def test_both_places_of_every_layer_and_the_same_answers(size, padding):
    model = split(size, padding)

    changed, where = folded(model, plans_with_divisors(model))

    expected = [f"encoder.layer.{layer}.{place}" for layer in (0, 1) for place in FOLDED]
    assert [linear.name for linear in where] == expected
    expect_same_answers(changed, model, batch=4, seq=24)


@GRAPHS
def test_the_activations_are_divided(size, padding):
    """Each on its own: an error that cancels in the answers is seen here."""
    model = split(size, padding)
    for plan in plans_with_divisors(model):
        changed, where = folded(model, [plan])
        if where:
            one, other = (
                run(m, padded_batch(), outputs=[plan.activation]) for m in (model, changed)
            )
            divided = one[plan.activation] / plan.divisor
            assert np.abs(other[plan.activation] - divided).max() < 2e-5
            expect_same_answers(changed, model)


def test_queries_and_keys_keep_their_columns():
    model = split("tiny")
    plan = next(p for p in plans_with_divisors(model) if p.linears[0].name.endswith(FOLDED[1]))

    changed, _ = folded(model, [plan])

    for kind in ("weight", "bias"):
        name = f"encoder.layer.0.attention.self.projections.{kind}"
        before, after = values(model, name), values(changed, name)
        # two heads of 16 each: q, k, v, convolution
        assert np.array_equal(after[..., :64], before[..., :64])
        assert np.allclose(after[..., 64:], before[..., 64:] / plan.divisor, rtol=1e-6)


def test_every_layer_of_a_trained_tagger():
    model = tagger()

    changed, where = folded(model, plans_with_divisors(model))

    assert len(where) == 2 * 4
    with runner_of(model) as before, runner_of(changed) as after:
        for _, batch in tagger_samples(6).batches(512):
            one, other = (runner.infer(batch)["logits"] for runner in (before, after))
            # logits of up to 10
            assert np.abs(one - other).max() < 2e-4


def layer_norm_and_gelu(plan: ActivationPlan) -> bool:
    return not plan.linears[0].name.endswith(FOLDED)


@pytest.mark.parametrize("size", ["tiny", "groups-2"])
def test_layer_norms_and_gelus_get_a_multiplication(size):
    with Workspace.open(split(size)) as workspace:
        plans = plans_of(workspace, random_samples(), smoothing=SmoothingOptions(0.7))
        model = workspace.complete(quantized_graph(workspace, plans, Precision.INT8))

    multiplied = {n.name.removesuffix("/Smooth") for n in model.graph.node if "/Smooth" in n.name}
    assert multiplied == {p.linears[0].name for p in plans if layer_norm_and_gelu(p)}
    for plan in plans:
        (quantizer,) = [
            node
            for node in model.graph.node
            if node.name == f"{plan.linears[0].name}/QuantizeLinear"
        ]
        if not layer_norm_and_gelu(plan):
            assert quantizer.input[0] == plan.activation
            continue
        multiply = node_of(model, quantizer.input[0].removesuffix(":0"))
        assert multiply.op_type == "Mul" and multiply.input[0] == plan.activation
        assert np.allclose(values(model, multiply.input[1]) * plan.divisor, 1, rtol=1e-6)


def test_a_folded_graph_computes_what_explicit_multiplications_compute(monkeypatch):
    """Both in int8: rounding apart, and that is a tenth of what the 8 bits cost."""
    with Workspace.open(split("groups-2")) as workspace:
        plans = plans_of(workspace, random_samples(), smoothing=SmoothingOptions(0.8))
        plans = [plan for plan in plans if not layer_norm_and_gelu(plan)]
        folded_graph = workspace.complete(quantized_graph(workspace, plans, Precision.INT8))
        monkeypatch.setattr(quantize, "fold", lambda *arguments: False)
        explicit = workspace.complete(quantized_graph(workspace, plans, Precision.INT8))
    assert sum("/Smooth" in node.name for node in explicit.graph.node) == len(plans) == 4
    assert not any("/Smooth" in node.name for node in folded_graph.graph.node)

    batch = padded_batch(seq=30)
    float_graph, one, other = (
        run(model, batch)["logits"] for model in (split("groups-2"), folded_graph, explicit)
    )

    assert np.abs(one - other).mean() < np.abs(one - float_graph).mean() / 3


def reads(tensor: str):
    def change(model: onnx.ModelProto) -> None:
        node = onnx.helper.make_node("Identity", [tensor], ["other"], name="other")
        after = max(i for i, n in enumerate(model.graph.node) if tensor in n.output)
        model.graph.node.insert(after + 1, node)

    return change


def outputs(tensor: str):
    def change(model: onnx.ModelProto) -> None:
        model.graph.output.append(onnx.ValueInfoProto(name=tensor))

    return change


def shared(weight: str):
    def change(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for index, name in enumerate(node.input):
                if name == weight.replace("layer.0", "layer.1"):
                    node.input[index] = weight

    return change


SELF = "encoder.layer.0.attention.self"


@pytest.mark.parametrize(
    ("place", "change"),
    [
        (FOLDED[0], reads(f"{SELF}.depthwise/DepthwiseConv1D:0")),
        (FOLDED[0], outputs(f"{SELF}.depthwise/DepthwiseConv1D:0")),
        (FOLDED[0], shared(f"{SELF}.depthwise.weight")),
        (FOLDED[1], reads(f"{SELF}/Concat:0")),
        (FOLDED[1], outputs(f"{SELF}/Concat:0")),
        (FOLDED[1], reads(f"{SELF}/SpanDynamicConv:0")),
        (FOLDED[1], reads(f"{SELF}/MatMul_2:0")),
        (FOLDED[1], outputs(f"{SELF}/Transpose_3:0")),
        (FOLDED[1], reads(f"{SELF}/Reshape_3:0")),
        (FOLDED[1], reads(f"{SELF}.projections/Split:2")),
        (FOLDED[1], outputs(f"{SELF}.projections/Split:3")),
        (FOLDED[1], reads(f"{SELF}.projections/Add:0")),
        (FOLDED[1], outputs(f"{SELF}.projections/MatMul:0")),
        (FOLDED[1], shared(f"{SELF}.projections.weight")),
        (FOLDED[1], shared(f"{SELF}.projections.bias")),
    ],
)
def test_nothing_is_folded_where_something_else_reads(place, change):
    model = exported("tiny")
    change(model)
    plans = [plan for plan in plans_with_divisors(model) if plan.linears[0].layer == 0]
    before = {t.name: t.SerializeToString() for t in model.graph.initializer}

    changed, where = folded(model, plans)

    assert [linear.name for linear in where] == [
        f"encoder.layer.0.{other}" for other in FOLDED if other != place
    ]
    expect_same_answers(changed, model)
    if place == FOLDED[1]:
        name = f"{SELF}.projections.weight"
        (same,) = [t for t in changed.graph.initializer if t.name == name]
        assert same.SerializeToString() == before[name]


def test_tensors_with_a_fixed_range_are_not_divided():
    model = exported("tiny")
    plan = next(p for p in plans_with_divisors(model) if p.linears[0].name.endswith(FOLDED[1]))
    with Workspace.open(exported("tiny")) as workspace:
        edits = WeightEdits(workspace)

        assert not fold(edits, model, plan, {f"{SELF}/Transpose_3:0"})
        assert fold(edits, model, plan, {f"{SELF}/Transpose_2:0"})


def test_another_split_is_not_folded():
    """Values and convolution in the other order, or a projection of other parts."""
    model = exported("tiny")
    split_node = node_of(model, f"{SELF}.projections/Split")
    split_node.output[2], split_node.output[3] = split_node.output[3], split_node.output[2]

    _, where = folded(model, plans_with_divisors(model))

    assert f"encoder.layer.0.{FOLDED[1]}" not in {linear.name for linear in where}
