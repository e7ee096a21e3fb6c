"""float32 graphs that round like half-precision ones."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from convbert_deploy.architecture import Task
from convbert_deploy.backends.onnxruntime import OnnxRuntimeRunner
from convbert_deploy.calibration.emulated import emulated_graph, non_finite
from convbert_deploy.calibration.typed import typed_graph
from convbert_deploy.calibration.workspace import Workspace
from convbert_deploy.errors import GraphError
from convbert_deploy.exporting import traced_graph
from convbert_deploy.precision import Precision

import factories

NUMPY = {Precision.FP16: np.float16, Precision.BF16: ml_dtypes.bfloat16}
TORCH = {Precision.FP16: "float16", Precision.BF16: "bfloat16"}
HALF = list(NUMPY)


@pytest.fixture(scope="module")
def eager():
    return factories.realistic_model("tiny", Task.SEQUENCE_CLASSIFICATION)


@pytest.fixture(scope="module")
def exported(eager) -> onnx.ModelProto:
    return traced_graph(eager, Task.SEQUENCE_CLASSIFICATION)


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def _batch(rows: int = 16) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    lengths = random.integers(3, 18, (rows, 1))
    mask = (np.arange(17) < lengths).astype(np.int64)
    ids = random.integers(1, 500, mask.shape) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def _run(model: onnx.ModelProto, batch: dict[str, np.ndarray], **options) -> np.ndarray:
    with OnnxRuntimeRunner.from_model(model, **options) as runner:
        return next(iter(runner.infer(batch).values()))


def _small(body: str, opset: int = 20, **weights: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : {opset}]>
        g (float[N, 4] x) => (float[N, 4] y) {{ {body} }}"""
    )
    for name, array in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("optimize", [True, False])
def test_every_tensor_is_rounded_and_no_cast_is_optimized_away(precision, optimize) -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((64, 4)).astype(np.float32)
    w, b = random.standard_normal((2, 4, 4)).astype(np.float32)
    model = _small("a = Mul (x, w)  t = Transpose (a)  s = Transpose (t)  y = Add (s, b)")
    for name, array in (("w", w[0]), ("b", b[0])):
        model.graph.initializer.append(numpy_helper.from_array(array, name))

    def rounded(array: np.ndarray) -> np.ndarray:
        return array.astype(NUMPY[precision]).astype(np.float32)

    expected = rounded(rounded(rounded(x) * rounded(w[0])) + rounded(b[0]))
    found = _run(emulated_graph(model, precision), {"x": x}, optimize=optimize)
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(found, rounded(x * w[0] + b[0])), "one rounding would be another"


@pytest.mark.parametrize("precision", HALF)
def test_error_is_that_of_torch_in_the_same_type(eager, exported, precision) -> None:
    expected = _run(exported, _batch())
    emulated = emulated_graph(exported, precision)
    onnx.checker.check_model(emulated, full_check=True)
    error = np.abs(_run(emulated, _batch()) - expected).mean()
    torch_runner = factories.ModuleRunner(eager, dtype=TORCH[precision])
    control = np.abs(torch_runner.infer(_batch())["logits"] - expected).mean()
    assert control / 2 < error < control * 2
    wrong = factories.sabotage_onnx(emulated, "reversed-taps")
    assert np.abs(_run(wrong, _batch()) - expected).mean() > control * 2


def test_fp16_emulation_agrees_with_the_typed_graph(exported) -> None:
    """ONNX Runtime drops some of the typed graph's roundings, so it has about half the error."""
    expected = _run(exported, _batch())
    typed = np.abs(_run(typed_graph(exported, Precision.FP16), _batch()) - expected).mean()
    error = np.abs(_run(emulated_graph(exported, Precision.FP16), _batch()) - expected).mean()
    assert typed / 1.5 < error < typed * 4


@pytest.mark.parametrize("precision", HALF)
def test_kept_nodes_are_not_rounded(exported, precision) -> None:
    expected = _run(exported, _batch())
    every = [node.name for node in exported.graph.node]
    kept = emulated_graph(exported, precision, keep_fp32=every)
    assert np.abs(_run(kept, _batch()) - expected).max() < 1e-6
    all_rounded = np.abs(_run(emulated_graph(exported, precision), _batch()) - expected).mean()
    convolutions = [node.name for node in exported.graph.node if "attention" not in node.name]
    half_kept = emulated_graph(exported, precision, keep_fp32=convolutions)
    onnx.checker.check_model(half_kept, full_check=True)
    error = np.abs(_run(half_kept, _batch()) - expected).mean()
    assert 1e-6 < error < all_rounded
    with pytest.raises(GraphError, match="no_such_node"):
        emulated_graph(exported, precision, keep_fp32=["no_such_node"])


def test_weight_of_kept_and_rounded_nodes_has_both_values() -> None:
    third = np.float32(1 / 3)
    model = _small("a = Mul (x, w)  b = Mul (x, w)  y = Sub (a, b)", w=third)
    for node, name in zip(model.graph.node, ("exact", "rounded", "last"), strict=True):
        node.name = name
    emulated = emulated_graph(model, Precision.BF16, keep_fp32=["exact", "last"])
    found = _run(emulated, {"x": np.ones((1, 4), np.float32)})
    bf16 = np.float32(third.astype(ml_dtypes.bfloat16))
    assert found == pytest.approx(third - bf16, rel=1e-3) and third != bf16


def test_overflow_shows_in_fp16_alone() -> None:
    model = _small("y = Mul (x, w)", w=np.float32(1000))
    x = np.array([[1, -100, 65, 66]], np.float32)
    found = _run(emulated_graph(model, Precision.FP16), {"x": x})
    np.testing.assert_array_equal(found, [[1000, -np.inf, 64992, np.inf]])
    assert np.isfinite(_run(emulated_graph(model, Precision.BF16), {"x": x})).all()


def test_refusals_and_repairs_are_those_of_the_typed_graph(exported) -> None:
    with pytest.raises(GraphError, match=r"tensor w holds 70000, which fp16"):
        emulated_graph(_small("y = Mul (x, w)", w=np.full(4, 7e4, np.float32)), Precision.FP16)
    with pytest.raises(GraphError, match=r"constant w is 1e-12, which is 0 in fp16"):
        emulated_graph(_small("y = Add (x, w)", w=np.float32(1e-12)), Precision.FP16)
    foreign = _copy(exported)
    tensor = next(t for t in foreign.graph.initializer if t.name == "inputs.mul_constant")
    tensor.CopyFrom(numpy_helper.from_array(np.finfo(np.float32).min, tensor.name))
    found, own = (_run(emulated_graph(m, Precision.FP16), _batch()) for m in (foreign, exported))
    np.testing.assert_array_equal(found, own)
    assert emulated_graph(foreign, Precision.FP32).SerializeToString() == (
        foreign.SerializeToString()
    )


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("kind", ["int8", "float8e4m3fn"])
def test_quantized_graphs_are_emulated_too(kind, precision) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(TensorProto.DataType.Value(kind.upper()))
    scale = np.float32(2**-5)
    weight = np.array([[90, -44, 9, 1]] * 4).astype(dtype)
    model = _small(
        """q = QuantizeLinear (x, scale, zero)  d = DequantizeLinear (q, scale, zero)
        w = DequantizeLinear (weight, scale, zero)  y = MatMul (d, w)""",
        scale=scale,
        zero=np.zeros((), dtype),
        weight=weight,
    )
    x = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)

    def rounded(array: np.ndarray) -> np.ndarray:
        return np.asarray(array).astype(NUMPY[precision]).astype(np.float32)

    scaled = rounded(x) / scale
    quantized = np.rint(scaled) if kind == "int8" else scaled.astype(dtype).astype(np.float32)
    expected = rounded(rounded(quantized * scale) @ rounded(weight.astype(np.float32) * scale))
    found = _run(emulated_graph(model, precision), {"x": x})
    np.testing.assert_allclose(found, expected, rtol=2**-7 if precision is Precision.BF16 else 1e-3)
    assert np.mean(found == expected) > 0.9


@pytest.mark.parametrize("precision", HALF)
def test_weights_by_reference_round_alike(exported, precision) -> None:
    found = []
    with Workspace.open(_copy(exported)) as workspace:
        referring = emulated_graph(workspace.model(), precision)
        assert any(tensor.external_data for tensor in referring.graph.initializer)
        for model in (referring, emulated_graph(exported, precision)):
            with workspace.runner(model) as runner:
                found.append(runner.infer(_batch())["logits"])
    np.testing.assert_array_equal(*found)


def _growing(exported: onnx.ModelProto) -> onnx.ModelProto:
    """A model whose embeddings leave fp16 where the token 7 stands."""
    model = _copy(exported)
    tensor = next(
        t for t in model.graph.initializer if t.name == "embeddings.word_embeddings.weight"
    )
    table = numpy_helper.to_array(tensor).copy()
    table[7] *= 60000 / np.abs(table[7]).max()
    tensor.CopyFrom(numpy_helper.from_array(table, tensor.name))
    tensor = next(t for t in model.graph.initializer if "token_type" in t.name)
    tensor.CopyFrom(numpy_helper.from_array(np.full(tensor.dims, 3e4, np.float32), tensor.name))
    return model


def test_intermediates_are_checked_and_the_row_is_named(exported) -> None:
    batches = [_batch(6), _batch(5)]
    for batch in batches:
        batch["input_ids"][batch["input_ids"] == 7] = 8
    with Workspace.open(_copy(exported)) as workspace:
        for model in (workspace.model(), typed_graph(exported, Precision.FP16)):
            assert non_finite(workspace, model, batches) == ()

    batches[1]["input_ids"][2, 1] = 7
    model = _growing(exported)
    typed = typed_graph(model, Precision.FP16)
    assert np.isfinite(_run(model, batches[1])).all()
    with Workspace.open(_copy(exported)) as workspace:
        for candidate in (typed, emulated_graph(model, Precision.FP16)):
            found = {
                tokens: non_finite(workspace, candidate, batches, max_tokens=tokens)
                for tokens in (1, 40, 4096)
            }
            first = found[1][0]
            assert (first.row, first.tensor) == (6 + 2, "inputs/Add_2:0")
            assert first.nan == 0 < first.infinite
            assert str(first).endswith("infinite, first in row 8")
            assert found[1] == found[40] == found[4096]
        emulated = emulated_graph(model, Precision.BF16)
        assert non_finite(workspace, emulated, batches) == ()


def test_nan_that_the_outputs_hide_is_found() -> None:
    model = _small(
        """a = Mul (x, w)  q = QuantizeLinear (a, scale, zero)
        y = DequantizeLinear (q, scale, zero)""",
        w=np.float32(1000),
        scale=np.float32(2**-4),
        zero=np.int8(0),
    )
    batch = {"x": np.array([[1, 1, 1, 1], [1, 100, 1, 1]], np.float32)}
    batch["input_ids"] = np.zeros((2, 1), np.int64)
    typed = typed_graph(model, Precision.FP16)
    assert np.isfinite(_run(typed, batch)).all()
    with Workspace.open(_copy(model)) as workspace:
        (found,) = non_finite(workspace, typed, [batch])
    assert (found.tensor, found.nan, found.infinite, found.row) == ("a", 0, 1, 1)
