"""fp32 graph in, strongly typed graph out."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from convbert_deploy.architecture import Task
from convbert_deploy.backends.onnxruntime import OnnxRuntimeRunner
from convbert_deploy.calibration import typed
from convbert_deploy.calibration.typed import typed_graph
from convbert_deploy.errors import GraphError
from convbert_deploy.exporting import traced_graph
from convbert_deploy.precision import Precision

import factories

HALF = [Precision.FP16, Precision.BF16]


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


def _small(text_weight: float, op: str = "Mul", epsilon: float | None = None) -> onnx.ModelProto:
    extra = "" if epsilon is None else f"<axis=-1, epsilon={epsilon}, stash_type=1>"
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 20]>
        g (float[N, 4] x) => (float[N, 4] y) {{ y = {op} {extra} (x, w) }}"""
    )
    shape = () if epsilon is None else (4,)
    model.graph.node[0].name = "node"
    model.graph.initializer.append(
        numpy_helper.from_array(np.full(shape, text_weight, np.float32), "w")
    )
    return model


@pytest.mark.parametrize("precision", HALF)
def test_everything_inside_is_half_and_the_interface_is_not(exported, precision) -> None:
    graph = typed_graph(exported, precision)
    onnx.checker.check_model(graph, full_check=True)
    kinds = {tensor.data_type for tensor in graph.graph.initializer}
    assert TensorProto.FLOAT not in kinds
    assert graph.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    inferred = onnx.shape_inference.infer_shapes(graph, strict_mode=True).graph
    floats = [
        v.name for v in inferred.value_info if v.type.tensor_type.elem_type == TensorProto.FLOAT
    ]
    assert not floats
    assert [n.op_type for n in graph.graph.node].count("Cast") == 2  # the mask in, the logits out
    assert exported.graph.initializer[0].data_type == TensorProto.FLOAT  # the input is untouched


def test_fp16_graph_runs_in_stock_onnxruntime_close_to_fp32(exported) -> None:
    expected = _run(exported, _batch())["logits"]
    found = _run(typed_graph(exported, Precision.FP16), _batch())["logits"]
    assert found.dtype == np.float32
    error = np.abs(found - expected).max()
    assert 0 < error < 5e-3  # 7e-4 seen; 0 would mean it computed in fp32
    wrong = factories.sabotage_onnx(typed_graph(exported, Precision.FP16), "reversed-taps")
    assert np.abs(_run(wrong, _batch())["logits"] - expected).max() > 5e-3


@pytest.mark.parametrize("names", [["encoder.layer.0.output.LayerNorm.weight"], None])
def test_kept_names_stay_fp32_and_the_graph_runs(exported, names) -> None:
    keep = names or [node.name for node in exported.graph.node]
    graph = typed_graph(exported, Precision.FP16, keep_fp32=keep)
    onnx.checker.check_model(graph, full_check=True)
    expected = _run(exported, _batch())["logits"]
    limit = 5e-3 if names else 1e-6
    assert np.abs(_run(graph, _batch())["logits"] - expected).max() < limit
    weights = {t.name: t.data_type for t in graph.graph.initializer}
    assert all(weights[name] == TensorProto.FLOAT for name in names or [])


def test_unknown_kept_name_is_an_error(exported) -> None:
    with pytest.raises(GraphError, match="no_such_node"):
        typed_graph(exported, Precision.FP16, keep_fp32=["no_such_node"])


def test_value_out_of_range_is_an_error_naming_the_tensor() -> None:
    with pytest.raises(GraphError, match=r"tensor w holds 70000, which fp16"):
        typed_graph(_small(70000.0), Precision.FP16)
    typed_graph(_small(70000.0), Precision.BF16)
    with pytest.raises(GraphError, match=r"constant w is 1e-12, which is 0 in fp16"):
        typed_graph(_small(1e-12), Precision.FP16)
    typed_graph(_small(70000.0), Precision.FP16, keep_fp32=["node"])


@pytest.mark.parametrize("precision", HALF)
def test_known_mask_constant_is_clamped(precision) -> None:
    graph = typed_graph(_small(float(np.finfo(np.float32).min)), precision)
    value = numpy_helper.to_array(graph.graph.initializer[0]).astype(np.float32)
    assert value == pytest.approx(-30000, rel=0.01)


def test_mask_constant_is_the_exporters() -> None:
    from convbert_deploy.traceable import MASK_CONSTANT

    assert typed._HALF_MASK_CONSTANT == MASK_CONSTANT


def test_constant_row_survives_layer_norm_in_fp16() -> None:
    """Epsilon 1e-12 is 0 in fp16; with float32 statistics the row gives 0, not NaN."""
    graph = typed_graph(_small(1.0, "LayerNormalization", epsilon=1e-12), Precision.FP16)
    rows = np.array([[3.0, 3.0, 3.0, 3.0], [1.0, 2.0, 3.0, 4.0]], np.float32)
    found = _run(graph, {"x": rows})["y"]
    assert (found[0] == 0).all()
    assert found[1] == pytest.approx([-1.3416, -0.4472, 0.4472, 1.3416], abs=2e-3)


def test_graph_typed_already_is_refused(exported) -> None:
    with pytest.raises(GraphError, match="typed already"):
        typed_graph(typed_graph(exported, Precision.FP16), Precision.FP16)
