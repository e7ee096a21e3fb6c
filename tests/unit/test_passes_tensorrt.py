"""The passes before TensorRT, on graphs written as text and on traced models."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest

from convbert_deploy.architecture import Task
from convbert_deploy.backends.onnxruntime import OnnxRuntimeRunner
from convbert_deploy.errors import GraphError
from convbert_deploy.operators import nodes_of
from convbert_deploy.passes.pass_report import PassReport
from convbert_deploy.passes.ranks import ranks_of
from convbert_deploy.passes.tensorrt import tensorrt_passes

import factories

HEAD = '<ir_version: 9, opset_import: ["" : 20]>\n'
#: a block with a residual around a product, its first row read by a head
BLOCK = """
f (float[b, s, 4] x) => (float[b, 2] y)
<float[4, 6] up, float[6, 4] down, float[6] bias, float[4] gamma, float[4] beta, float[4, 2] head,
 int64 first = {0}>
{
  [mixed] m = Softmax <axis = 1> (x)
  a = MatMul (m, up)
  b1 = Add (bias, a)
  c = Gelu (b1)
  d = MatMul (c, down)
  e = Add (d, m)
  n = LayerNormalization <axis = -1> (e, gamma, beta)
  [pick] r = Gather <axis = 1> (n, first)
  y = MatMul (r, head)
}
"""


def parse(text: str) -> onnx.ModelProto:
    """The graph; its tensors without values get normal numbers."""
    model = onnx.parser.parse_model(HEAD + text)
    random = np.random.default_rng(0)
    for value in model.graph.value_info:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        array = random.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
    del model.graph.value_info[:]
    return model


def answers(model: onnx.ModelProto, shape=(3, 5, 4)) -> dict[str, np.ndarray]:
    onnx.checker.check_model(model, full_check=True)
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    with OnnxRuntimeRunner.from_model(model, optimize=False) as runner:
        return runner.infer({"x": x})


def same_answers(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    expected = answers(before)
    found = answers(after)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=2e-6, atol=2e-6)


def gathered(model: onnx.ModelProto) -> list[str]:
    return [node.input[0] for node in model.graph.node if node.op_type == "Gather"]


def test_one_row_goes_through_the_whole_block() -> None:
    model = parse(BLOCK)
    rewritten, (report,) = tensorrt_passes(model)
    assert report == PassReport("SelectedRows", fired=1, expected=1)
    assert report.complete
    assert gathered(rewritten) == ["m"], "behind the operator that mixes rows, and once"
    assert len(rewritten.graph.node) == len(model.graph.node)
    same_answers(model, rewritten)
    assert gathered(model) == ["n"], "the model itself stays"


def test_the_last_row_and_an_index_with_an_axis() -> None:
    model = parse(
        BLOCK.replace("int64 first = {0}", "int64[1] first = {-1}").replace(
            "float[b, 2] y", "float[b, 1, 2] y"
        )
    )
    rewritten, (report,) = tensorrt_passes(model)
    assert report.fired == 1 and gathered(rewritten) == ["m"]
    same_answers(model, rewritten)


def test_a_tensor_with_other_readers_stays_whole() -> None:
    """The feed-forward's input is an output too; what follows it is still cut."""
    text = BLOCK.replace("=> (float[b, 2] y)", "=> (float[b, 2] y, float[b, s, 4] d)")
    model = parse(text)
    rewritten, (report,) = tensorrt_passes(model)
    assert report.fired == 1
    assert sorted(gathered(rewritten)) == ["d", "m"]
    same_answers(model, rewritten)


def test_a_row_that_is_an_output_keeps_its_name() -> None:
    text = BLOCK.replace("float[b, 2] y", "float[b, 4] r").replace("  y = MatMul (r, head)\n", "")
    model = parse(text)
    rewritten, (report,) = tensorrt_passes(model)
    assert report.fired == 1 and gathered(rewritten) == ["m"]
    same_answers(model, rewritten)


NORMALIZE = "LayerNormalization <axis = -1> (e, gamma, beta)"


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (NORMALIZE, "Softmax <axis = 1> (e)", "an operator that mixes rows"),
        (
            NORMALIZE,
            "LayerNormalization <axis = 1> (e, gamma, beta)",
            "an operator that mixes rows",
        ),
        ("float[b, 2] y", "float[b, 2] y, float[b, s, 4] n", "1 other readers"),
    ],
)
def test_where_it_cannot_move_the_report_says_why(old, new, reason) -> None:
    model = parse(BLOCK.replace(old, new))
    rewritten, (report,) = tensorrt_passes(model)
    assert (report.expected, report.fired, report.complete) == (1, 0, False)
    assert report.reasons[0].startswith("pick: stays behind") and reason in report.reasons[0]
    assert rewritten.graph.node == model.graph.node


def test_a_constant_with_a_row_for_each_position_is_not_passed() -> None:
    model = parse(BLOCK.replace("float[6] bias", "float[5, 6] bias"))
    rewritten, (report,) = tensorrt_passes(model)
    assert report.fired == 1
    assert sorted(gathered(rewritten)) == ["b1", "m"]
    same_answers(model, rewritten)


def test_a_row_in_the_middle_or_of_something_else_is_not_expected() -> None:
    for change in (
        ("int64 first = {0}", "int64 first = {2}"),
        ("Gather <axis = 1> (n, first)", "Gather <axis = 0> (n, first)"),
    ):
        model = parse(BLOCK.replace(*change))
        rewritten, (report,) = tensorrt_passes(model)
        assert (report.expected, report.fired) == (0, 0)
        assert rewritten.graph.node == model.graph.node


def test_quantized_products_are_passed() -> None:
    quantized = """
      q = QuantizeLinear (m, scale, zero)
      dq = DequantizeLinear (q, scale, zero)
      w = DequantizeLinear <axis = 1> (weight, scales)
      a = MatMul (dq, w)
    """
    text = BLOCK.replace("float[4, 6] up", "float scale = {0.05}, int8 zero = {0}, float[6] scales")
    model = parse(text.replace("  a = MatMul (m, up)\n", quantized))
    weight = np.random.default_rng(2).integers(-127, 128, (4, 6)).astype(np.int8)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "weight"))
    rewritten, (report,) = tensorrt_passes(model)
    assert report.fired == 1 and gathered(rewritten) == ["m"]
    same_answers(model, rewritten)


def test_nodes_out_of_order_are_refused() -> None:
    model = parse(BLOCK)
    nodes = [model.graph.node[1], model.graph.node[0], *model.graph.node[2:]]
    reordered = onnx.helper.make_graph(
        nodes, "f", model.graph.input, model.graph.output, model.graph.initializer
    )
    model.graph.CopyFrom(reordered)
    with pytest.raises(GraphError, match="reads m before it is computed"):
        tensorrt_passes(model)


@pytest.mark.parametrize("padding", ["hf", "masked"])
def test_classifier_answers_the_same(padding) -> None:
    from convbert_deploy.exporting import traced_graph

    task = Task.SEQUENCE_CLASSIFICATION
    model = traced_graph(factories.realistic_model("tiny", task), task, padding)
    rewritten, (report,) = tensorrt_passes(model)
    assert report.complete and report.expected == 1
    assert len(nodes_of(rewritten)) == len(nodes_of(model))
    random = np.random.default_rng(0)
    mask = (np.arange(11) < np.array([[11], [7], [1]])).astype(np.int64)
    batch = {
        "input_ids": random.integers(1, 500, (3, 11)) * mask,
        "attention_mask": mask,
        "token_type_ids": np.zeros((3, 11), np.int64),
    }
    logits = []
    for graph in (model, rewritten):
        with OnnxRuntimeRunner.from_model(graph) as runner:
            logits.append(runner.infer(batch)["logits"])
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-5)


def test_multiple_choice_reads_the_last_row() -> None:
    from convbert_deploy.exporting import traced_graph

    task = Task.MULTIPLE_CHOICE
    model = traced_graph(factories.realistic_model("tiny", task), task)
    assert ranks_of(model)["encoder.layer.1.output.LayerNorm/LayerNormalization:0"] == 3
    _, (report,) = tensorrt_passes(model)
    assert (report.expected, report.fired) == (1, 1)


def test_an_encoder_has_nothing_to_cut() -> None:
    from convbert_deploy.exporting import traced_graph

    model = traced_graph(factories.realistic_model("tiny", Task.ENCODER), Task.ENCODER)
    rewritten, (report,) = tensorrt_passes(model)
    assert (report.expected, report.fired) == (0, 0)
    assert rewritten.graph.node == model.graph.node
