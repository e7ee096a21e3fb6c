"""CPU engines: every layer our node, weights mapped, and what is said where the pass does not fire.

The native library computes; ``test_encoder_layers_*`` hold the graphs to the reference without it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from convbert_deploy.backends.onnxruntime import OnnxRuntimeRunner
from convbert_deploy.build import BuildOptions, build_engine
from convbert_deploy.engine import Engine
from convbert_deploy.errors import EngineError, GraphError
from convbert_deploy.graph import Graph
from convbert_deploy.operators import nodes_of
from convbert_deploy.operators.encoder_layer import LayerAttributes, LayerInputs
from convbert_deploy.operators.packed_weight import WeightType, unpacked
from convbert_deploy.plugin_library import ort_library
from convbert_deploy.precision import Precision
from convbert_deploy.verification import verify

import calibrated
from encoder_reference import run_reference

pytest_plugins = ["quantized_sample"]

FP32, FP16, BF16, INT8 = Precision.FP32, Precision.FP16, Precision.BF16, Precision.INT8


@pytest.fixture(scope="module")
def built(classifier_graph, tmp_path_factory):
    """Engines of the two-layer classifier by precision, each built once."""
    engines: dict[Precision, Engine] = {}

    def build(precision: Precision) -> Engine:
        if precision not in engines:
            target = tmp_path_factory.mktemp("engines") / f"c.{precision}.engine"
            options = BuildOptions(precision=precision, backend="onnxruntime")
            engines[precision] = build_engine(classifier_graph, target, options)
        return engines[precision]

    return build


def graph_of(engine: Engine) -> onnx.ModelProto:
    return onnx.load(engine.path / "model.onnx")


def weight_types(model: onnx.ModelProto) -> dict[str, WeightType]:
    inputs = LayerInputs.from_order(nodes_of(model, "EncoderLayer")[0].input)
    names = ("projections", "pointwise", "generator", "attention_output", "up", "down")
    return {
        name: unpacked(calibrated.values(model, getattr(inputs, f"{name}_weight"))).type
        for name in names
    }


def test_a_layer_of_another_version_says_how_to_build_it_again(built):
    engine = built(FP32)
    model = graph_of(engine)
    node = nodes_of(model, "EncoderLayer")[0]
    node.input.insert(2, "")  # where the optional mask once was
    file = engine.path / "older.onnx"  # beside the weights that it refers to
    onnx.save(model, file)
    try:
        runner = OnnxRuntimeRunner(file, library=ort_library())
        with pytest.raises(EngineError, match="cannot load the graph") as error, runner:
            pass
    finally:
        file.unlink()
    assert "build-engine GRAPH" in error.value.hint


@pytest.mark.parametrize(
    ("precision", "linears", "generator", "attention"),
    [
        (FP32, WeightType.FP32, WeightType.FP32, 0),
        (BF16, WeightType.BF16, WeightType.BF16, 1),
        (INT8, WeightType.INT8, WeightType.BF16, 1),
    ],
)
def test_every_layer_is_one_node_in_the_precision(built, precision, linears, generator, attention):
    engine = built(precision)
    model = graph_of(engine)
    kinds = [node.op_type for node in nodes_of(model)]
    assert kinds == ["PackRows", "EncoderLayer", "EncoderLayer"], "the classifier reads first rows"
    assert engine.manifest.plugin_nodes == 3 and not model.functions
    assert engine.manifest.target["passes"] == {"EncoderLayers": "2 of 2"}
    assert engine.manifest.target["arithmetic"].startswith(str(precision))
    found = weight_types(model)
    assert found.pop("generator") is generator
    assert set(found.values()) == {linears}
    layers = [LayerAttributes.of(node) for node in nodes_of(model, "EncoderLayer")]
    assert {layer.attention for layer in layers} == {attention}
    assert [layer.first_row_only for layer in layers] == [0, 1]


@pytest.mark.parametrize("precision", [FP32, BF16, INT8], ids=str)
def test_the_kernel_computes_what_the_reference_says(built, precision):
    engine = built(precision)
    batch = calibrated.padded_batch()
    with engine.runner() as runner:
        found = runner.infer(batch)["logits"]
    expected = run_reference(graph_of(engine), batch)["logits"]
    # attention and what lies between the products is in bfloat16 beside bf16 and int8 weights
    limit = 2e-6 if precision is FP32 else 0.05 * expected.std()
    assert np.abs(found - expected).max() <= limit


@pytest.mark.parametrize("precision", [BF16, INT8], ids=str)
def test_verify(built, classifier, precision):
    report = verify(built(precision), classifier)
    assert report.passed, report.reasons


def test_weights_lie_aligned_in_a_file_of_their_own(built):
    engine = built(FP32)
    model = onnx.load(engine.path / "model.onnx", load_external_data=False)
    assert {"model.onnx", "model.onnx.data"} <= set(engine.manifest.files)
    places = {}
    for tensor in model.graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place:
            places[tensor.name] = (place["location"], int(place["offset"]), int(place["length"]))
        else:
            assert len(tensor.raw_data) < 1024
    blobs = [name for name in places if name.endswith("packed_weight")]
    assert len(blobs) == 12
    assert {location for location, _, _ in places.values()} == {"model.onnx.data"}
    assert all(offset % 64 == 0 for _, offset, _ in places.values())
    ends = sorted((offset, offset + length) for _, offset, length in places.values())
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ends))


def test_large_weights_begin_at_a_page(tmp_path):
    import onnx_ir as ir

    from convbert_deploy.mapped_model import write_mapped_model

    arrays = {
        "odd": np.arange(500, dtype=np.float32),
        "large": np.arange(1 << 18, dtype=np.float32),
    }
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> '
        "g () => (float[N] y) {y = Concat <axis = 0> (odd, large)}"
    )
    for name, array in arrays.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    write_mapped_model(ir.from_proto(model), tmp_path / "m.onnx")
    light = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    offsets = {
        tensor.name: int(entry.value)
        for tensor in light.graph.initializer
        for entry in tensor.external_data
        if entry.key == "offset"
    }
    assert offsets == {"odd": 0, "large": 4096}
    with OnnxRuntimeRunner(tmp_path / "m.onnx") as runner:
        assert np.array_equal(runner.infer({})["y"], np.concatenate(list(arrays.values())))


def test_a_changed_weight_file_is_refused(built, tmp_path):
    copy = shutil.copytree(built(FP32).path, tmp_path / "copy.engine")
    data = copy / "model.onnx.data"
    changed = bytearray(data.read_bytes())
    changed[len(changed) // 2] ^= 1
    data.write_bytes(changed)
    with pytest.raises(EngineError, match=r"model\.onnx\.data is not the file"):
        Engine.load(copy)


def test_embeddings_take_half_the_bytes_beside_half_weights(sample, tmp_path):
    from convbert_deploy.exporting import ExportOptions, export

    export(sample, tmp_path / "s.onnx", ExportOptions(check=False))
    graph = Graph.load(tmp_path / "s.onnx")
    name = "embeddings.word_embeddings.weight"
    kinds, sizes = {}, {}
    for precision in (FP32, BF16, INT8):
        options = BuildOptions(precision=precision, backend="onnxruntime")
        engine = build_engine(graph, tmp_path / f"s.{precision}.engine", options)
        model = onnx.load(engine.path / "model.onnx", load_external_data=False)
        kinds[precision] = {t.name: t.data_type for t in model.graph.initializer}[name]
        sizes[precision] = (engine.path / "model.onnx.data").stat().st_size
    assert kinds == {
        FP32: TensorProto.FLOAT,
        BF16: TensorProto.FLOAT16,
        INT8: TensorProto.FLOAT16,
    }
    assert sizes[BF16] < 0.56 * sizes[FP32] and sizes[INT8] < 0.4 * sizes[FP32]


def test_fp16_stores_its_weights_as_before(built):
    engine = built(FP16)
    assert not engine.manifest.target["passes"]
    assert engine.manifest.target["arithmetic"] == "fp32"
    assert {node.op_type for node in nodes_of(graph_of(engine))} == {
        "DepthwiseConv1D",
        "SpanDynamicConv",
    }


def test_no_plugin_is_stock_and_has_no_int8_without_ranges(classifier_graph, tmp_path):
    options = BuildOptions(backend="onnxruntime", plugin=False)
    engine = build_engine(classifier_graph, tmp_path / "n.engine", options)
    assert not nodes_of(graph_of(engine), "EncoderLayer")
    with pytest.raises(GraphError, match="needs ranges"):
        build_engine(
            classifier_graph, tmp_path / "i.engine", dataclasses.replace(options, precision=INT8)
        )


@pytest.fixture
def odd_graph(classifier_graph) -> Graph:
    """The classifier with another activation in its second layer; the golden answer does not look
    at it closely enough to tell."""
    model = onnx.ModelProto()
    model.CopyFrom(classifier_graph.model)
    gelu = [n for n in model.graph.node if n.op_type == "Gelu" and "layer.1" in n.name]
    gelu[0].attribute[0].s = b"tanh"
    info = classifier_graph.info
    golden = dataclasses.replace(info.golden, outputs={})
    return dataclasses.replace(
        classifier_graph, model=model, info=dataclasses.replace(info, golden=golden)
    )


def test_a_pass_that_does_not_fire_is_said_and_recorded(odd_graph, tmp_path, monkeypatch):
    monkeypatch.setattr("convbert_deploy.build.check_golden", lambda engine: 0.0)
    said: list[str] = []
    options = BuildOptions(backend="onnxruntime")
    engine = build_engine(odd_graph, tmp_path / "o.engine", options, said.append)
    (line,) = [text for text in said if "EncoderLayers" in text]
    assert "did not fire: 0 of 2: encoder.layer.1" in line and "found approximate tanh" in line
    assert engine.manifest.target["passes"]["EncoderLayers"].startswith("0 of 2: encoder.layer.1")
    assert engine.manifest.target["arithmetic"] == "fp32"
    assert len(nodes_of(graph_of(engine), "SpanDynamicConv")) == 2


def test_int8_without_ranges_and_without_the_pass_is_refused(odd_graph, tmp_path):
    options = BuildOptions(precision=INT8, backend="onnxruntime")
    with pytest.raises(GraphError, match=r"needs ranges.*EncoderLayers: 0 of 2") as caught:
        build_engine(odd_graph, tmp_path / "o.engine", options)
    assert "--int8 --data" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_a_layer_too_few_is_refused(classifier_graph, tmp_path):
    from convbert_deploy.errors import PluginError

    info = classifier_graph.info
    deeper = dataclasses.replace(info.architecture, num_hidden_layers=3)
    graph = dataclasses.replace(
        classifier_graph, info=dataclasses.replace(info, architecture=deeper)
    )
    with pytest.raises(PluginError, match="2 encoder layers, expected 3"):
        build_engine(graph, tmp_path / "d.engine", BuildOptions(backend="onnxruntime"))


def _swap_query_and_key(layers):
    """The merged projection's first two parts, exchanged in what was packed."""
    from convbert_deploy.operators.packed_weight import packed

    for value in layers.model.graph.initializers.values():
        if value.name.endswith("0.projections.packed_weight"):
            linear = unpacked(value.const_value.numpy())
            width = linear.weight.shape[2] // 4
            order = np.r_[width : 2 * width, :width, 2 * width : 4 * width]
            blob = packed(dataclasses.replace(linear, weight=linear.weight[:, :, order]))
            import onnx_ir as ir

            value.const_value = ir.tensor(blob, name=value.name)
    return layers


def test_a_wrongly_packed_engine_is_not_written(classifier_graph, tmp_path, monkeypatch):
    from convbert_deploy.build_cpu import graph_with_layers

    monkeypatch.setattr(
        "convbert_deploy.build.graph_with_layers",
        lambda graph, request: _swap_query_and_key(graph_with_layers(graph, request)),
    )
    with pytest.raises(EngineError, match="golden request wrongly"):
        build_engine(classifier_graph, tmp_path / "w.engine", BuildOptions(backend="onnxruntime"))
    assert not list(tmp_path.iterdir())


def test_a_calibrated_graph_quantizes_each_token_unless_told(calibrated, tmp_path):
    path = calibrated("int8").path
    steps = {}
    for static in (False, True):
        options = BuildOptions(backend="onnxruntime", static_activations=static)
        engine = build_engine(Graph.load(path), tmp_path / f"{static}.engine", options)
        model = graph_of(engine)
        inputs = LayerInputs.from_order(nodes_of(model, "EncoderLayer")[0].input)
        (tensor,) = [t for t in model.graph.initializer if t.name == inputs.projections_weight]
        steps[static] = unpacked(onnx.numpy_helper.to_array(tensor)).activation_scale
        words = "calibrated steps" if static else "a step for each token"
        assert (
            words in json.loads((engine.path / "manifest.json").read_text())["target"]["arithmetic"]
        )
    assert steps[False] == 0 < steps[True]


def test_static_steps_need_a_calibrated_graph(classifier_graph, tmp_path):
    options = BuildOptions(precision=INT8, backend="onnxruntime", static_activations=True)
    with pytest.raises(GraphError, match="of a calibrated 8-bit graph.*is fp32"):
        build_engine(classifier_graph, tmp_path / "s.engine", options)
