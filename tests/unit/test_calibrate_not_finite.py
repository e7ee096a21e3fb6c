"""``calibrate`` on graphs that hold or compute what is not finite: named, repaired, never silent."""

from __future__ import annotations

import pathlib

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from convbert_deploy.backends.onnxruntime import OnnxRuntimeRunner
from convbert_deploy.calibration.calibrating import Progress
from convbert_deploy.calibration.smoothing import SmoothingOptions
from convbert_deploy.errors import GraphError
from convbert_deploy.precision import Precision

pytest_plugins = ["quantized_sample"]

PRECISIONS = ["int8", "fp8", "fp16", "bf16"]
PLAIN = SmoothingOptions(None)


@pytest.fixture
def edited(classifier_graph, tmp_path):
    """Writes the classifier's graph after ``change(model)``, its metadata as they were."""

    def make(change, name: str = "edited.onnx") -> pathlib.Path:
        (tmp_path / "graphs").mkdir(exist_ok=True)
        model = onnx.load(classifier_graph.path)
        change(model)
        onnx.save(model, tmp_path / "graphs" / name)
        return tmp_path / "graphs" / name

    return make


def _initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    return tensor


def _set(model: onnx.ModelProto, name: str, values: object) -> None:
    _initializer(model, name).CopyFrom(numpy_helper.from_array(np.asarray(values, "f"), name))


def _written(folder: pathlib.Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_nan_weight_is_named(tiny, edited, tmp_path, precision) -> None:
    weight = "encoder.layer.1.output.dense.weight"

    def spoil(model):
        values = numpy_helper.to_array(_initializer(model, weight)).copy()
        values[3, 5] = np.nan
        _set(model, weight, values)

    graph = edited(spoil)
    before = _written(tmp_path)
    with pytest.raises(GraphError, match=f"{weight} holds nan"):
        tiny(graph=graph, precision=Precision(precision))
    assert _written(tmp_path) == before


@pytest.mark.parametrize("precision", PRECISIONS)
def test_infinity_inside_is_named_with_tensor_and_row(tiny, edited, tmp_path, precision) -> None:
    """The sum of two embeddings is over float32's range; one row has both."""
    ids = np.random.default_rng(1).integers(1, 400, (9, 6))
    ids[4, 2] = 450
    np.savez(tmp_path / "data.npz", input_ids=ids)

    def spoil(model):
        for kind, index in (("word", 450), ("position", 2)):
            name = f"embeddings.{kind}_embeddings.weight"
            values = numpy_helper.to_array(_initializer(model, name)).copy()
            values[index, 0] = 2e38
            _set(model, name, values)

    graph = edited(spoil)
    before = _written(tmp_path)
    with pytest.raises(GraphError, match=r"tensor \S+ holds infinity for row 4 of data.npz"):
        tiny(graph=graph, data=tmp_path / "data.npz", precision=Precision(precision))
    assert _written(tmp_path) == before


def _product_mask(constant: float):
    """transformers 4: (1 - mask) * constant, which is NaN where 0 meets infinity."""
    return lambda model: _set(model, "inputs.mul_constant", constant)


def _where_mask(constant: float):
    """transformers 5: Where(mask, 0, constant), from Constant nodes."""

    def change(model: onnx.ModelProto) -> None:
        nodes = list(model.graph.node)
        index = next(i for i, node in enumerate(nodes) if node.name == "inputs/Mul")
        result = nodes[index].output[0]
        del model.graph.node[index]
        for offset, node in enumerate(
            (
                helper.make_node("Constant", [], ["nothing"], name="nothing", value_float=0.0),
                helper.make_node("Constant", [], ["far"], name="far", value_float=constant),
                helper.make_node(
                    "Cast", ["attention_mask"], ["kept"], name="kept", to=TensorProto.BOOL
                ),
                helper.make_node("Where", ["kept", "nothing", "far"], [result], name="masked"),
            )
        ):
            model.graph.node.insert(index + offset, node)

    return change


MIN = float(np.finfo(np.float32).min)
MASKS = {
    "product, -inf": _product_mask(-np.inf),
    "product, finfo.min": _product_mask(MIN),
    "where, -inf": _where_mask(-np.inf),
    "where, finfo.min": _where_mask(MIN),
}


def _logits(path: pathlib.Path) -> np.ndarray:
    """Of three rows, two of them padded."""
    mask = (np.arange(17) < np.array([[17], [9], [3]])).astype(np.int64)
    ids = np.random.default_rng(0).integers(1, 500, mask.shape) * mask
    batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    with OnnxRuntimeRunner(path) as runner:
        return runner.infer(batch)["logits"]


@pytest.mark.parametrize("form", MASKS)
def test_masks_that_destroy_integers_elsewhere_are_repaired(tiny, edited, form) -> None:
    """0 * -inf is NaN, which QuantizeLinear turns into a number without a sign."""
    foreign = edited(MASKS[form])
    if form == "product, -inf":
        assert np.isnan(_logits(foreign)).all()
    notes: list[str] = []
    repaired = tiny(
        "repaired.onnx", graph=foreign, smoothing=PLAIN, progress=Progress(notes.append)
    )
    assert any("mask constants made finite" in note for note in notes)
    unbroken = tiny("unbroken.onnx", smoothing=PLAIN)
    if form.startswith("product"):
        graphs = [onnx.load(result.path).graph for result in (repaired, unbroken)]
        assert graphs[0].SerializeToString() == graphs[1].SerializeToString()
    np.testing.assert_array_equal(_logits(repaired.path), _logits(unbroken.path))
    assert repaired.record["losses"] == unbroken.record["losses"]
