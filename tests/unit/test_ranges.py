"""Which nodes stay in float32: by measured ranges, not by names."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from convbert_deploy.architecture import Task
from convbert_deploy.backends.onnxruntime import OnnxRuntimeRunner
from convbert_deploy.calibration.ranges import MARGIN, keep_fp32, observed_tensors
from convbert_deploy.calibration.typed import typed_graph
from convbert_deploy.errors import GraphError
from convbert_deploy.exporting import traced_graph
from convbert_deploy.precision import Precision

import factories

FP16 = Precision.FP16


@pytest.fixture(scope="module")
def exported() -> onnx.ModelProto:
    task = Task.SEQUENCE_CLASSIFICATION
    return traced_graph(factories.realistic_model("tiny", task), task)


def _batch() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    mask = (np.arange(17) < np.array([[17], [9]])).astype(np.int64)
    ids = random.integers(1, 500, mask.shape) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def _run(model: onnx.ModelProto, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with OnnxRuntimeRunner.from_model(model) as runner:
        return runner.infer(batch)


def _measured(model: onnx.ModelProto, batch: dict[str, np.ndarray]) -> dict[str, float]:
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    known = {value.name for value in model.graph.output}
    names = [name for name in observed_tensors(model) if name not in known | set(batch)]
    opened.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    found = _run(opened, batch)
    found |= {name: array for name, array in batch.items() if array.dtype == np.float32}
    return {name: float(np.abs(array).max()) for name, array in found.items()}


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def test_all_float_tensors_are_observed_and_no_constant(exported) -> None:
    names = observed_tensors(exported)
    assert len(set(names)) == len(names)
    weights = {tensor.name for tensor in exported.graph.initializer}
    assert not weights & set(names)
    own = [node for node in exported.graph.node if node.domain == "convbert"]
    assert len(own) == 4
    for node in own:
        assert {*node.input[:2], *node.output} <= {*names, *weights}
    assert "logits" in names and "input_ids" not in names and "inputs/Shape:0" not in names


def test_nothing_is_kept_for_a_healthy_model_though_its_mask_is_large(exported) -> None:
    largest = _measured(exported, _batch())
    assert max(largest.values()) >= 30000 > 65504 / MARGIN
    assert keep_fp32(exported, largest, FP16) == ()


@pytest.mark.parametrize("constant", [np.finfo(np.float32).min, -1e9, -1e4])
def test_foreign_mask_forces_nothing(exported, constant) -> None:
    foreign = _copy(exported)
    tensor = next(t for t in foreign.graph.initializer if t.name == "inputs.mul_constant")
    tensor.CopyFrom(numpy_helper.from_array(np.float32(constant), tensor.name))
    assert keep_fp32(foreign, _measured(foreign, _batch()), FP16) == ()


def _grown(exported: onnx.ModelProto, factor: float = 3e5) -> onnx.ModelProto:
    """Feed-forward activations ``factor`` times larger in layer 0, and smaller again after it."""
    model = _copy(exported)
    for name, change in (
        ("encoder.layer.0.intermediate.dense.weight", factor),
        ("encoder.layer.0.intermediate.dense.bias", factor),
        ("encoder.layer.0.output.dense.weight", 1 / factor),
    ):
        tensor = next(t for t in model.graph.initializer if t.name == name)
        values = numpy_helper.to_array(tensor) * np.float32(change)
        tensor.CopyFrom(numpy_helper.from_array(values, name))
    return model


def test_nodes_that_leave_the_range_are_kept_and_the_answers_with_them(exported) -> None:
    """GELU is 0 or x at this size, so the model is another one, and a good one in float32."""
    model, batch = _grown(exported), _batch()
    expected = _run(model, batch)["logits"]
    layer = "encoder.layer.0"
    weight = f"{layer}.intermediate.dense.weight"
    kept = keep_fp32(model, _measured(model, batch), FP16)
    names = {record.node for record in kept}
    ffn = ("intermediate.dense/MatMul", "intermediate.dense/Add", "output.dense/MatMul")
    assert {f"{layer}.{name}" for name in ffn} <= names
    assert all(name.startswith((f"{layer}.intermediate", f"{layer}.output")) for name in names)
    up = next(record for record in kept if record.node == f"{layer}.intermediate.dense/MatMul")
    assert up.largest > up.limit
    assert str(up).startswith(f"{up.node}: {up.tensor} ") and "is over" in str(up)
    assert up.tensor in (weight, f"{layer}.intermediate.dense/MatMul:0")

    typed = typed_graph(model, FP16, keep_fp32=[record.node for record in kept])
    assert np.abs(_run(typed, batch)["logits"] - expected).max() < 5e-3
    with pytest.raises(GraphError, match=f"tensor {weight} holds .*, which fp16 cannot represent"):
        typed_graph(model, FP16, keep_fp32=sorted(names - {f"{layer}.intermediate.dense/MatMul"}))


def _square() -> onnx.ModelProto:
    """A root of mean squares: x * x leaves fp16 from |x| = 256 on, and comes back."""
    return onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]>
        g (float[N, 4] x) => (float[N, 4] y) <float one = {1}> {
          [scale] a = Mul (x, one)
          [square] b = Mul (a, a)
          [root] c = Sqrt (b)
          [last] y = Add (c, one) }"""
    )


def test_activation_out_of_range_is_infinite_unless_its_nodes_are_kept() -> None:
    model, batch = _square(), {"x": np.full((2, 4), 500.0, np.float32)}
    expected = _run(model, batch)["y"]
    kept = keep_fp32(model, _measured(model, batch), FP16)
    assert [(record.node, record.tensor) for record in kept] == [("square", "b"), ("root", "b")]
    assert kept[0].largest == 250000 and kept[0].limit == 65504 / MARGIN
    typed = typed_graph(model, FP16, keep_fp32=[record.node for record in kept])
    assert _run(typed, batch)["y"] == pytest.approx(expected, rel=1e-3)
    assert keep_fp32(model, _measured(model, batch), Precision.BF16) == ()


def test_margin_covers_texts_larger_than_the_measured() -> None:
    model = _square()
    seen = _measured(model, {"x": np.full((1, 4), 150.0, np.float32)})
    assert [record.node for record in keep_fp32(model, seen, FP16)] == ["square", "root"]
    assert keep_fp32(model, seen, FP16, margin=2.0) == ()
    for margin in (1.84, float("nan")):
        with pytest.raises(GraphError, match="expected 1.85 or more"):
            keep_fp32(model, seen, FP16, margin=margin)


def test_mask_beside_the_largest_scores_that_are_not_kept_stays_finite() -> None:
    """The smallest margin allowed, at its limit."""
    scores = 65504 / 1.85
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]>
        g (float[N, 4] x, float[N, 4] pads) => (float[N, 4] y) <float far = {-30000}> {
          [mask] m = Mul (pads, far)
          [sum] s = Add (x, m)
          [softmax] y = Softmax (s) }"""
    )
    batch = {"x": np.array([[1, 2, 3, -scores]], np.float32), "pads": np.eye(4, dtype=np.float32)}
    batch["pads"] = batch["pads"][3:]
    largest = _measured(model, batch)
    assert largest["s"] > 65000
    assert keep_fp32(model, largest, FP16, margin=1.85) == ()
    total = np.float16(batch["x"]) + np.float16(-30000) * np.float16(batch["pads"])
    assert np.isfinite(total).all()
    assert [
        r.node for r in keep_fp32(model, largest | {"x": scores * 1.01}, FP16, margin=1.85)
    ] == ["sum"]


def test_nan_is_over_any_limit_and_a_missing_range_is_an_error() -> None:
    model = _square()
    largest = {"x": 1.0, "a": 1.0, "b": 1.0, "c": float("nan"), "y": 1.0}
    assert [record.node for record in keep_fp32(model, largest, FP16)] == ["root", "last"]
    del largest["c"]
    with pytest.raises(GraphError, match="no range was measured for c, one of 1"):
        keep_fp32(model, largest, FP16)
    largest["c"] = 1e6
    model.graph.node[2].name = ""
    with pytest.raises(GraphError, match="Sqrt node has to stay in fp32 for its tensor c"):
        keep_fp32(model, largest, FP16)


@pytest.mark.parametrize("spelling", ["initializer", "constant"])
def test_epsilon_keeps_everything_up_to_its_division(spelling) -> None:
    """A LayerNormalization in pieces: with epsilon 0 the constant row would be 0 / 0."""
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]>
        g (float[N, 4] x) => (float[N, 4] y) <int64[1] last = {-1}, float one = {1}> {
          [epsilon] eps = Constant <value_float = 1e-12> ()
          [mean] m = ReduceMean (x, last)
          [centre] c = Sub (x, m)
          [square] s = Mul (c, c)
          [variance] v = ReduceMean (s, last)
          [guard] g = Add (v, eps)
          [root] r = Sqrt (g)
          [divide] d = Div (c, r)
          [after] y = Mul (d, one) }"""
    )
    if spelling == "initializer":
        del model.graph.node[0]
        model.graph.initializer.append(numpy_helper.from_array(np.float32(1e-12), "eps"))
    rows = np.array([[3.0, 3.0, 3.0, 3.0], [1.0, 2.0, 3.0, 4.0]], np.float32)
    kept = keep_fp32(model, _measured(model, {"x": rows}), FP16)
    assert [record.node for record in kept] == ["guard", "root", "divide"]
    assert "vanishes below" in str(kept[0]) and kept[0].tensor == "eps"
    with pytest.raises(GraphError, match="constant eps is 1e-12, which is 0 in fp16"):
        typed_graph(model, FP16)
    typed = typed_graph(model, FP16, keep_fp32=[record.node for record in kept])
    found = _run(typed, {"x": rows})["y"]
    assert (found[0] == 0).all()
    assert found[1] == pytest.approx([-1.3416, -0.4472, 0.4472, 1.3416], abs=2e-3)
