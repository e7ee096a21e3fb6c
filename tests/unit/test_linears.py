"""The layers that integers may compute, and grouped linears as one product a group."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from convbert_deploy.architecture import Task
from convbert_deploy.calibration.linears import Linear, linears, share, split_groups
from convbert_deploy.errors import GraphError

from calibrated import exported, node_of, padded_batch, run

#: hidden 64, two attention heads of 16, intermediate 128
_FIXED = {
    "attention.self.projections": (64, 4 * 32),
    "attention.self.pointwise": (64, 32),
    "attention.output.dense": (64, 64),
}
_FEED_FORWARD = {
    "tiny": {"intermediate.dense": (64, 128), "output.dense": (128, 64)},
    "groups-2": {
        "intermediate.dense.group0": (32, 64),
        "intermediate.dense.group1": (32, 64),
        "output.dense.group0": (64, 32),
        "output.dense.group1": (64, 32),
    },
}


def expected(size: str, layers: int) -> list[tuple[str, int, int]]:
    shapes = _FIXED | _FEED_FORWARD[size]
    return [
        (f"encoder.layer.{layer}.{name}", *shape)
        for layer in range(layers)
        for name, shape in shapes.items()
    ]


@pytest.mark.parametrize(
    ("task", "size"),
    [
        (task, "groups-2" if index % 2 else "tiny")
        for index, task in enumerate(t for t in Task if t is not Task.SEQUENCE_CLASSIFICATION)
    ],
)
def test_exactly_the_encoders_linears_whatever_the_head(task, size):
    """The head's own products, the embeddings' projection and the kernel generator are none."""
    model = exported(size, task, layers=1)
    split_groups(model)

    found = [(linear.name, linear.rows, linear.columns) for linear in linears(model)]

    assert found == expected(size, 1)


@pytest.mark.parametrize(("size", "padding"), [("tiny", "masked"), ("groups-2", "hf")])
def test_every_layer_of_a_classifier(size, padding):
    model = exported(size, padding=padding)
    split_groups(model)

    found = linears(model)

    assert [(linear.name, linear.rows, linear.columns) for linear in found] == expected(size, 2)
    half = len(found) // 2
    assert [linear.layer for linear in found] == [0] * half + [1] * half
    for linear in found:
        node = node_of(model, linear.node)
        assert node.op_type == "MatMul"
        assert list(node.input) == [linear.activation, linear.weight]
    # what else multiplies: attention twice, the kernel generator, embeddings' projection, two heads
    others = {n.name for n in model.graph.node if n.op_type in ("MatMul", "Gemm")}
    others -= {linear.node for linear in found}
    assert len(others) == 2 * 3 + 3
    assert sum("kernel_generator" in name for name in others) == 2


def test_the_projections_share_no_weight_with_another_layer():
    found = linears(exported("tiny", padding="masked"))

    assert len({linear.weight for linear in found}) == len(found)


def test_split_groups_keeps_the_values():
    model = exported("groups-2")
    assert any(len(tensor.dims) == 3 for tensor in model.graph.initializer)
    before = run(model, padded_batch())

    rewritten = split_groups(model)

    onnx.checker.check_model(model)
    after = run(model, padded_batch())
    assert rewritten == 4
    assert np.abs(after["logits"] - before["logits"]).max() <= 1e-5
    assert all(len(tensor.dims) != 3 for tensor in model.graph.initializer)
    read = {name for node in model.graph.node for name in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= read


def test_split_groups_gives_every_group_its_own_weight():
    """Swapping two groups must be seen by the comparison above."""
    model = exported("groups-2")
    before = run(model, padded_batch())["logits"]
    split_groups(model)
    one, other = (
        node_of(model, f"encoder.layer.1.output.dense.group{index}/MatMul") for index in (0, 1)
    )
    one.input[1], other.input[1] = other.input[1], one.input[1]

    assert np.abs(run(model, padded_batch())["logits"] - before).max() > 1e-2


def test_split_groups_a_second_time_changes_nothing():
    model = exported("groups-2")
    split_groups(model)
    once = model.SerializeToString(deterministic=True)

    assert split_groups(model) == 0
    assert model.SerializeToString(deterministic=True) == once


def test_split_groups_of_an_ungrouped_graph_changes_nothing():
    model = exported("tiny", padding="masked")
    before = model.SerializeToString(deterministic=True)

    assert split_groups(model) == 0
    assert model.SerializeToString(deterministic=True) == before


def test_groups_of_two_layers_with_one_stored_weight():
    """Equal weights are stored once; each layer gets its own copy a group."""
    model = exported("groups-2")
    first, second = (
        node_of(model, f"encoder.layer.{layer}.output.dense/MatMul") for layer in (0, 1)
    )
    second.input[1] = first.input[1]
    before = run(model, padded_batch())["logits"]

    assert split_groups(model) == 4
    assert np.abs(run(model, padded_batch())["logits"] - before).max() <= 1e-5


def _read_twice(model):
    inner = "encoder.layer.0.intermediate.dense/Transpose:0"
    model.graph.node.append(onnx.helper.make_node("Identity", [inner], ["copy"], name="copy"))


def _an_output(model):
    model.graph.output.append(
        onnx.ValueInfoProto(name="encoder.layer.0.intermediate.dense/MatMul:0")
    )


def _other_permutation(model):
    node_of(model, "encoder.layer.0.output.dense/Transpose_2").attribute[0].ints[:] = [0, 1, 2, 3]


def _no_reshape(model):
    node_of(model, "encoder.layer.0.intermediate.dense/Reshape_2").op_type = "Identity"


def _on_an_input(model):
    node = node_of(model, "encoder.layer.0.intermediate.dense/MatMul")
    node.input[0] = "input_ids"


@pytest.mark.parametrize(
    "change", [_read_twice, _an_output, _other_permutation, _no_reshape, _on_an_input]
)
def test_another_structure_is_refused(change):
    model = exported("groups-2")
    change(model)

    with pytest.raises(GraphError, match=r"encoder\.layer\.0\..*expected a grouped linear"):
        split_groups(model)


def test_a_three_axis_weight_elsewhere_is_refused():
    weight = numpy_helper.from_array(np.zeros((2, 3, 4), np.float32), "w")
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "g",
        [info("x", 1, [1, 2, 5, 3])],
        [info("y", 1, [1, 2, 5, 4])],
        [weight],
    )

    with pytest.raises(GraphError, match="product multiplies by a 3-D weight"):
        split_groups(onnx.helper.make_model(graph))


def test_share_of_the_arithmetic():
    every = tuple(
        Linear(name, name, "a", name, 10, columns) for name, columns in (("a", 1), ("b", 3))
    )

    assert share(every[1:], every) == 0.75
    assert share((), every) == 0.0
    assert share((), ()) == 0.0
