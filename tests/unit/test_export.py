"""The exported graph: small, named, shared weights, equal to eager at shapes never traced."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import onnx
import pytest

from convbert_deploy.architecture import Task
from convbert_deploy.backends.eager import EagerRunner
from convbert_deploy.backends.onnxruntime import OnnxRuntimeRunner
from convbert_deploy.errors import ConvBertDeployError, GraphError
from convbert_deploy.exporting import export, traced_graph
from convbert_deploy.graph import Graph, latest_graph, read_info, write_graph, write_model
from convbert_deploy.operators import nodes_of
from convbert_deploy.parity_cases import random_batch

import factories


@pytest.fixture(scope="module")
def base_layers():
    """Two layers of base."""
    model = factories.realistic_model("base", layers=2)
    return model, traced_graph(model, Task.SEQUENCE_CLASSIFICATION)


def test_nodes_of_twelve_layers_stay_below_500(base_layers):
    per_layer = collections.Counter(
        node.name.split("/")[0].split(".")[2]
        for node in base_layers[1].graph.node
        if node.name.startswith("encoder.layer.")
    )
    outside = len(base_layers[1].graph.node) - sum(per_layer.values())
    assert per_layer["0"] == per_layer["1"]
    assert 12 * per_layer["0"] + outside < 500


def test_every_layer_has_its_operators_and_their_functions_travel_along(base_layers):
    graph = base_layers[1]
    assert [n.op_type for n in nodes_of(graph)] == ["DepthwiseConv1D", "SpanDynamicConv"] * 2
    for node in nodes_of(graph, "SpanDynamicConv"):
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes == {
            "num_heads": 6,
            "kernel_size": 9,
            "plugin_version": b"1",
            "plugin_namespace": b"",
        }
    names = [(f.domain, f.name) for f in graph.functions]
    assert names == [("convbert", "DepthwiseConv1D"), ("convbert", "SpanDynamicConv")]
    onnx.checker.check_model(graph, full_check=False)


def test_names_are_unique_paths_and_weights_keep_theirs(base_layers):
    graph = base_layers[1].graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    assert "encoder.layer.1.attention.self.projections/MatMul" in names
    weights = {tensor.name for tensor in graph.initializer}
    assert "encoder.layer.1.output.dense.weight" in weights
    assert not [name for name in names + sorted(weights) if "val_" in name or "_empty" in name]
    assert not graph.value_info and not any(node.metadata_props for node in graph.node)


def test_mask_constant_fits_half_precision(base_layers):
    for tensor in base_layers[1].graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            assert np.isfinite(array.astype(np.float16)).all(), tensor.name


def test_tied_embeddings_are_stored_once():
    model = factories.realistic_model("tiny", Task.MASKED_LM)
    graph = traced_graph(model, Task.MASKED_LM).graph
    elements = model.config.vocab_size * model.config.embedding_size
    tables = [t.name for t in graph.initializer if np.prod(t.dims) == elements]
    assert tables == ["embeddings.word_embeddings.weight"]


def test_axes_are_named():
    graph = traced_graph(
        factories.realistic_model("tiny", Task.MULTIPLE_CHOICE), Task.MULTIPLE_CHOICE
    )
    axes = [d.dim_param for d in graph.graph.input[0].type.tensor_type.shape.dim]
    assert axes == ["batch", "choices", "seq"]
    assert graph.opset_import[0].version == 20


def _worst(model, task, batch, padding="hf", graph=None):
    graph = graph or traced_graph(model, task, padding)
    with (
        EagerRunner(model, task, padding=padding) as eager,
        OnnxRuntimeRunner.from_model(graph) as candidate,
    ):
        expected, got = eager.infer(batch), candidate.infer(batch)
    real = batch["attention_mask"].astype(bool)
    worst = 0.0
    for name, array in expected.items():
        difference = np.abs(array - got[name])
        if padding == "masked" and array.shape[:2] == real.shape:
            difference = difference[real]
        worst = max(worst, float(difference.max()))
    return worst


@pytest.mark.parametrize("padding", ["hf", "masked"])
@pytest.mark.parametrize("task", list(Task), ids=str)
def test_all_tasks_match_eager_on_padded_batches(task, padding):
    model = factories.realistic_model("tiny", task)
    batch = random_batch(factories.architecture_of(model), task, 5, 23, padded=True)
    assert _worst(model, task, batch, padding) <= 1e-5


def test_masked_graph_gives_the_unpadded_answer():
    task = Task.SEQUENCE_CLASSIFICATION
    model = factories.realistic_model("tiny", task)
    batch = random_batch(factories.architecture_of(model), task, 5, 23, padded=True)
    # the hf graph is not the unpadded answer: the leak that masked removes is real
    hf = traced_graph(model, task, "hf")
    assert _worst(model, task, batch, "masked", graph=hf) > 1e-3
    assert _worst(model, task, batch, "masked") <= 1e-5


@pytest.mark.parametrize("kind", factories.ONNX_SABOTAGES)
def test_self_check_refuses_a_sabotaged_graph(kind, classifier, tmp_path, monkeypatch):
    import convbert_deploy.exporting as exporting

    honest = exporting.traced_graph
    monkeypatch.setattr(
        exporting, "traced_graph", lambda *a: factories.sabotage_onnx(honest(*a), kind)
    )
    with pytest.raises(GraphError, match="differs from the eager model"):
        export(classifier, tmp_path / "bad.onnx")
    assert not list(tmp_path.iterdir())


def test_graph_describes_itself(classifier, classifier_graph):
    info = read_info(classifier_graph.path)
    assert info == classifier_graph.info
    assert info.architecture == classifier.architecture
    assert info.chain == (classifier.origin(),)
    assert info.golden.outputs["logits"].shape == (2, 3)


def test_large_weights_go_to_a_data_file(classifier_graph, tmp_path, monkeypatch):
    monkeypatch.setattr("convbert_deploy.graph._EXTERNAL_DATA_BYTES", 1000)
    target = tmp_path / "big.onnx"
    write_model(classifier_graph.model, target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big.onnx", "big.onnx.data"]
    assert target.stat().st_size < 200_000
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("big.onnx", "big.onnx.data"):
        (tmp_path / name).rename(moved / name)
    assert Graph.load(moved / "big.onnx").info == classifier_graph.info
    batch = classifier_graph.info.golden.batch()
    with OnnxRuntimeRunner(moved / "big.onnx") as runner:
        assert classifier_graph.info.golden.max_abs_difference(runner.infer(batch)) < 1e-5


def test_latest_graph_and_strangers(classifier_graph, tmp_path):
    with pytest.raises(GraphError, match="no exported graph"):
        latest_graph(tmp_path)
    (tmp_path / "ours.onnx").write_bytes(classifier_graph.path.read_bytes())
    stranger = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []))
    onnx.save(stranger, tmp_path / "stranger.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"not an onnx file")
    assert latest_graph(tmp_path).name == "ours.onnx"
    for name, message in (
        ("stranger.onnx", "not written by"),
        ("broken.onnx", "unreadable|not written"),
    ):
        with pytest.raises(GraphError, match=message):
            Graph.load(tmp_path / name)


def test_no_partial_file_when_the_write_fails(classifier_graph, sample_path, tmp_path):
    """The kernel refuses to grow the file half-way, as a full disk would."""
    tokenizer = (sample_path / "tokenizer_config.json",)
    import resource
    import signal

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(ConvBertDeployError, match="cannot write"):
            write_graph(classifier_graph.model, tmp_path / "m.onnx", tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_classification_head_of_a_half_checkpoint(classifier, tmp_path):
    """A float16 checkpoint is read into float32, like the eager reference does."""
    half = dataclasses.replace(
        classifier, tensors={name: tensor.half() for name, tensor in classifier.tensors.items()}
    )
    result = export(half, tmp_path / "half.onnx")
    assert result.parity.passed
