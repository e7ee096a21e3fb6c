"""A graph whose weights lie in one file: the same graph, and nothing left behind."""

from __future__ import annotations

import gc
import pathlib
import tempfile

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from convbert_deploy.calibration import workspace as workspace_module
from convbert_deploy.calibration.workspace import WeightEdits, Workspace
from convbert_deploy.errors import EngineError, GraphError, OutputError

ROWS, COLUMNS = 40, 24


def weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "large": random.normal(size=(ROWS, COLUMNS)).astype(np.float32),
        "half": random.normal(size=(COLUMNS, ROWS)).astype(np.float16),
        "ids": random.integers(-9, 9, (COLUMNS, 30)),
        "small": random.normal(size=COLUMNS).astype(np.float32),
        "scalar": np.float32(0.5),
        # not a multiple of the page: the next one must still begin on one
        "odd": random.normal(size=(1031, 3)).astype(np.float32),
    }


def make_model() -> onnx.ModelProto:
    nodes = [
        helper.make_node("MatMul", ["x", "large"], ["product"]),
        helper.make_node("Add", ["product", "small"], ["sum"]),
        helper.make_node("Cast", ["half"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["sum", "wide"], ["y"]),
        helper.make_node("Gather", ["odd", "index"], ["picked"]),
        helper.make_node("ReduceSum", ["ids"], ["total"], keepdims=0),
        helper.make_node("Mul", ["scalar", "y"], ["z"]),
    ]
    tensors = [numpy_helper.from_array(np.asarray(a), name) for name, a in weights().items()]
    tensors.append(numpy_helper.from_array(np.array([1030, 0, 515]), "index"))
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", TensorProto.FLOAT, ["n", ROWS])],
        [
            info("z", TensorProto.FLOAT, ["n", ROWS]),
            info("picked", TensorProto.FLOAT, [3, 3]),
            info("total", TensorProto.INT64, []),
        ],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


BATCH = {"x": np.random.default_rng(1).normal(size=(5, ROWS)).astype(np.float32)}


def outputs_of(model: onnx.ModelProto) -> dict[str, bytes]:
    from convbert_deploy.backends.onnxruntime import OnnxRuntimeRunner

    with OnnxRuntimeRunner.from_model(model) as runner:
        return {name: array.tobytes() for name, array in runner.infer(BATCH).items()}


@pytest.fixture
def folders(tmp_path, monkeypatch) -> pathlib.Path:
    """Where temporary folders go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def files(folder: pathlib.Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_weights_are_the_initializers(folders):
    with Workspace.open(make_model()) as workspace:
        for name, array in weights().items():
            found = workspace.weight(name)
            assert found.dtype == array.dtype and found.shape == array.shape
            assert np.array_equal(found, array)


def test_mapped_weights_are_read_only(folders):
    with Workspace.open(make_model()) as workspace:
        large = workspace.weight("large")
        with pytest.raises(ValueError, match="read-only"):
            large[0, 0] = 1


def test_an_unknown_weight(folders):
    with (
        Workspace.open(make_model()) as workspace,
        pytest.raises(GraphError, match="no initializer missing"),
    ):
        workspace.weight("missing")


def test_complete_gives_the_graph_back(folders):
    expected = outputs_of(make_model())
    with Workspace.open(make_model()) as workspace:
        whole = workspace.complete(workspace.model())

    assert whole.SerializeToString(deterministic=True) == make_model().SerializeToString(
        deterministic=True
    )
    assert outputs_of(whole) == expected


@pytest.mark.parametrize("optimize", [True, False])
def test_a_runner_answers_like_the_graph(folders, optimize):
    expected = outputs_of(make_model())
    with (
        Workspace.open(make_model()) as workspace,
        workspace.runner(workspace.model(), optimize=optimize) as runner,
    ):
        assert {name: a.tobytes() for name, a in runner.infer(BATCH).items()} == expected


def test_the_given_graph_is_emptied(folders):
    model = make_model()
    size = model.ByteSize()

    with Workspace.open(model) as workspace:
        kept = workspace.model().ByteSize()

    moved = {t.name for t in model.graph.initializer if t.external_data}
    assert moved == {"large", "half", "ids", "odd"}
    assert all(not t.raw_data for t in model.graph.initializer if t.name in moved)
    assert max(kept, model.ByteSize()) < size - 20_000
    for tensor in model.graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        # a runtime can map what begins on a page
        assert int(place.get("offset", 0)) % 4096 == 0


def test_a_model_is_a_copy(folders):
    with Workspace.open(make_model()) as workspace:
        changed = workspace.model()
        del changed.graph.node[:]
        changed.graph.initializer[0].ClearField("external_data")

        assert len(workspace.model().graph.node) == 7
        assert np.array_equal(workspace.weight("large"), weights()["large"])


def test_inner_tensors_beside_the_outputs(folders):
    with Workspace.open(make_model()) as workspace:
        model = workspace.model()
        before = model.SerializeToString()
        with workspace.runner(model, outputs=("sum", "sum", "z")) as runner:
            assert runner.output_names == ("z", "picked", "total", "sum")
            found = runner.infer(BATCH)

        assert model.SerializeToString() == before
    expected = BATCH["x"] @ weights()["large"] + weights()["small"]
    assert np.allclose(found["sum"], expected, atol=1e-5)


def test_only_the_weights_stay_while_the_block_is_open(folders):
    with Workspace.open(make_model()) as workspace:
        with workspace.runner(workspace.model()) as one, workspace.runner(workspace.model()) as two:
            assert len(files(folders)) == 3
            assert one.infer(BATCH)["z"].tobytes() == two.infer(BATCH)["z"].tobytes()
        assert files(folders) == {"weights.bin"}
    assert list(folders.iterdir()) == []


def test_an_error_leaves_nothing(folders):
    with (
        pytest.raises(KeyError, match="mine"),
        Workspace.open(make_model()) as workspace,
        workspace.runner(workspace.model()),
    ):
        raise KeyError("mine")
    assert list(folders.iterdir()) == []


def test_a_graph_that_cannot_be_loaded_leaves_only_the_weights(folders):
    with Workspace.open(make_model()) as workspace:
        broken = workspace.model()
        broken.graph.node[0].op_type = "NoSuchOperator"
        with (
            pytest.raises(EngineError, match="NoSuchOperator"),
            workspace.runner(broken, outputs=("sum",)),
        ):
            pass
        assert files(folders) == {"weights.bin"}
        assert [value.name for value in broken.graph.output] == ["z", "picked", "total"]


def test_no_room_is_an_error_that_names_the_folder(folders, monkeypatch):
    def full(model, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workspace_module, "_moved_out", full)
    with pytest.raises(OutputError, match="No space left on device") as caught:
        Workspace.open(make_model()).__enter__()
    assert str(folders) in str(caught.value) and "TMPDIR" in caught.value.hint
    gc.collect()
    assert list(folders.iterdir()) == []


def test_inline_weights_of_a_copy_are_kept(folders):
    """A changed weight lies in the copy; the rest is still read from the file."""
    with Workspace.open(make_model()) as workspace:
        edits = WeightEdits(workspace)
        divisor = np.linspace(0.5, 2, COLUMNS, dtype=np.float32)
        edits.divide("large", divisor)
        edits.divide("large", divisor)
        edits.divide("small", divisor**2)
        assert np.array_equal(workspace.weight("large"), weights()["large"])
        model = workspace.model()
        edits.write(model)
        with workspace.runner(model, outputs=("sum",)) as runner:
            found = runner.infer(BATCH)["sum"]
        whole = workspace.complete(model)
    expected = (BATCH["x"] @ weights()["large"] + weights()["small"]) / divisor**2

    assert np.allclose(found, expected, atol=1e-5)
    (large,) = [t for t in whole.graph.initializer if t.name == "large"]
    assert np.allclose(numpy_helper.to_array(large), weights()["large"] / divisor**2)


def test_edits_of_an_unknown_weight(folders):
    with Workspace.open(make_model()) as workspace, pytest.raises(GraphError, match="missing"):
        WeightEdits(workspace).divide("missing", np.ones(1, np.float32))


def test_edits_of_a_weight_the_copy_no_longer_has(folders):
    with Workspace.open(make_model()) as workspace:
        edits = WeightEdits(workspace)
        edits.divide("small", np.full(COLUMNS, 2, np.float32))
        model = workspace.model()
        (small,) = [t for t in model.graph.initializer if t.name == "small"]
        model.graph.initializer.remove(small)
        edits.write(model)

        assert "small" not in {t.name for t in model.graph.initializer}


def test_fp8_pairs_run_unfused(folders):
    """ONNX Runtime would put them into its integer products, which refuse the type."""
    from convbert_deploy.calibration.formats import fake_quantized, quantized_weight
    from convbert_deploy.precision import Precision

    scale = np.float32(0.0625)
    stored = quantized_weight(weights()["large"], scale, Precision.FP8)
    kind = TensorProto.FLOAT8E4M3FN
    pair = ["scale", "zero"]
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", *pair], ["q"]),
            helper.make_node("DequantizeLinear", ["q", *pair], ["left"]),
            helper.make_node("DequantizeLinear", ["stored", *pair], ["right"]),
            helper.make_node("MatMul", ["left", "right"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", ROWS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", COLUMNS])],
        [
            helper.make_tensor("scale", TensorProto.FLOAT, [], scale.tobytes(), raw=True),
            helper.make_tensor("zero", kind, [], b"\0", raw=True),
            helper.make_tensor("stored", kind, stored.shape, stored.tobytes(), raw=True),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    expected = fake_quantized(BATCH["x"], scale, Precision.FP8) @ (
        stored.astype(np.float32) * scale
    )

    with Workspace.open(model) as workspace, workspace.runner(workspace.model()) as runner:
        assert np.allclose(runner.infer(BATCH)["y"], expected, atol=1e-5)
