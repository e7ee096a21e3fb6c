"""Bundles: complete, checked, refused when damaged or meant for something else."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from convbert_deploy.build import BuildOptions, build_engine, for_our_kernels
from convbert_deploy.engine import MANIFEST, Engine
from convbert_deploy.errors import EngineError, InputError, PluginError, ShapeError
from convbert_deploy.operators import nodes_of
from convbert_deploy.precision import Precision
from convbert_deploy.shapes import ShapeProfile, ShapeRange
from convbert_deploy.verification import VerifyOptions, check_chain, verify

import factories

ORT = "onnxruntime"


@pytest.fixture(scope="module")
def engine(classifier_graph, tmp_path_factory) -> Engine:
    target = tmp_path_factory.mktemp("engine") / "c.fp32.engine"
    profile = ShapeProfile(batch=ShapeRange(1, 4, 8), seq=ShapeRange(1, 32, 512))
    return build_engine(classifier_graph, target, BuildOptions(backend=ORT, profile=profile))


@pytest.fixture
def copy(engine, tmp_path):
    return shutil.copytree(engine.path, tmp_path / "copy.engine")


def test_manifest_tells_everything(engine, classifier, classifier_graph):
    manifest = engine.manifest
    assert manifest.backend == "onnxruntime-cpu"
    assert manifest.chain == (classifier.origin(), classifier_graph.origin())
    assert manifest.plugin_nodes == 3, "rows packed, two layers, the last of first rows alone"
    assert manifest.padding == "hf"
    assert manifest.profile.seq == ShapeRange(1, 32, 128), "cut to the model's 128 positions"
    assert manifest.golden_max_abs < 1e-5
    on_disk = {str(p.relative_to(engine.path)) for p in engine.path.rglob("*") if p.is_file()}
    assert on_disk == {*manifest.files, MANIFEST}


@pytest.fixture
def without_the_pass(monkeypatch):
    """CPU engines of the exported layers' operators, as where EncoderLayers does not fire."""
    from convbert_deploy.build_cpu import LayersGraph
    from convbert_deploy.passes.pass_report import PassReport

    left = LayersGraph(None, PassReport("EncoderLayers", 2, 0, ("left",)), "")
    monkeypatch.setattr("convbert_deploy.build.graph_with_layers", lambda graph, request: left)


def test_our_kernel_runs_not_the_inlined_function(classifier_graph, tmp_path, without_the_pass):
    import onnx

    engine = build_engine(classifier_graph, tmp_path / "k.engine", BuildOptions(backend=ORT))
    model = onnx.load(engine.path / "model.onnx")
    assert not model.functions
    kinds = [node.op_type for node in nodes_of(model)]
    assert kinds == ["DepthwiseConv1D", "SpanDynamicConv"] * 2
    assert engine.manifest.plugin_nodes == len(kinds)


def test_no_plugin_is_explicit(classifier_graph, tmp_path):
    engine = build_engine(
        classifier_graph, tmp_path / "n.engine", BuildOptions(backend=ORT, plugin=False)
    )
    assert engine.manifest.plugin_nodes == 0
    assert engine.manifest.plugin_sha256 is None


def test_missing_library_is_an_error_with_the_cure(classifier_graph, tmp_path, monkeypatch):
    def missing():
        raise PluginError("libconvbert_ort_ops.so is not built", hint="make native")

    monkeypatch.setattr("convbert_deploy.plugin_library.ort_library", missing)
    with pytest.raises(PluginError):
        build_engine(classifier_graph, tmp_path / "m.engine", BuildOptions(backend=ORT))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", [p for p in Precision if not p.quantized], ids=str)
def test_verify_passes_in_every_precision(precision, classifier, classifier_graph, tmp_path):
    engine = build_engine(
        classifier_graph, tmp_path / "p.engine", BuildOptions(precision=precision, backend=ORT)
    )
    report = verify(engine, classifier)
    assert report.passed, report.reasons
    assert report.intermediates_checked
    assert {"b1-s1", "b8-s128", "b8-s128-padded"} <= {case.name for case in report.cases}


def test_verify_refuses_another_checkpoint(engine, save_checkpoint):
    with pytest.raises(EngineError, match="was built from"):
        check_chain(engine, save_checkpoint(seed=7))


def test_verify_fails_for_a_wrong_model(classifier, classifier_graph, copy):
    """A bundle whose graph was swapped for one with reversed taps, hashes made to fit."""
    import onnx

    from convbert_deploy.provenance import sha256_of_file

    wrong = factories.sabotage_onnx(classifier_graph.model, "reversed-taps")
    onnx.save(for_our_kernels(wrong, "onnxruntime-cpu"), copy / "model.onnx")
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["files"]["model.onnx"] = sha256_of_file(copy / "model.onnx")
    (copy / MANIFEST).write_text(json.dumps(manifest))
    report = verify(Engine.load(copy), classifier)
    assert not report.passed


def test_masked_engine_is_compared_row_by_row(classifier, tmp_path):
    from convbert_deploy.exporting import ExportOptions, export
    from convbert_deploy.graph import Graph

    export(classifier, tmp_path / "m.onnx", ExportOptions(padding="masked"))
    engine = build_engine(
        Graph.load(tmp_path / "m.onnx"), tmp_path / "m.engine", BuildOptions(backend=ORT)
    )
    assert engine.manifest.padding == "masked"
    report = verify(engine, classifier)
    assert report.passed, report.reasons


def test_graph_can_stand_in_for_a_plan(engine, classifier):
    report = verify(engine, classifier, VerifyOptions(graph=True))
    assert report.passed
    assert "graph of" in report.candidate


def _good(engine):
    return {name: array.copy() for name, array in engine.golden.batch().items()}


BAD_BATCHES = {
    "id out of range": (lambda b: b["input_ids"].__setitem__((0, 3), 500), InputError, "500"),
    "negative id": (lambda b: b["input_ids"].__setitem__((1, 0), -1), InputError, "-1"),
    "left padding": (
        lambda b: b["attention_mask"].__setitem__((0, 0), 0),
        InputError,
        "left padding",
    ),
    "mask of zeros": (lambda b: b["attention_mask"].__setitem__(0, 0), InputError, "all zeros"),
    "mask of twos": (lambda b: b["attention_mask"].__setitem__(0, 2), InputError, "2"),
    "floats": (lambda b: b.update(input_ids=b["input_ids"] * 1.0), InputError, "float64"),
    "rank": (lambda b: b.update(input_ids=b["input_ids"][0]), InputError, "expects"),
    "too long": (
        lambda b: b.update({k: np.ones((1, 129), np.int64) for k in b}),
        InputError,
        "129",
    ),
    "batch over the profile": (
        lambda b: b.update({k: np.ones((9, 4), np.int64) for k in b}),
        ShapeError,
        "batch 9",
    ),
}


@pytest.mark.parametrize("fault", sorted(BAD_BATCHES))
def test_bad_batches_never_reach_the_runtime(fault, engine):
    damage, error, message = BAD_BATCHES[fault]
    batch = _good(engine)
    damage(batch)
    with engine.runner() as runner:
        runner.infer(_good(engine))
        with pytest.raises(error, match=message):
            runner.infer(batch)


def _edit(copy, **changes):
    manifest = json.loads((copy / MANIFEST).read_text()) | changes
    (copy / MANIFEST).write_text(json.dumps(manifest))


def test_damage_is_found(copy):
    (copy / "model.onnx").write_bytes((copy / "model.onnx").read_bytes()[:-1] + b"x")
    with pytest.raises(EngineError, match=r"model\.onnx is not the file"):
        Engine.load(copy)
    (copy / "model.onnx").unlink()
    with pytest.raises(EngineError, match=r"model\.onnx is missing"):
        Engine.load(copy)


def test_bundles_that_cannot_be_used(copy, tmp_path):
    with pytest.raises(EngineError, match="not an engine"):
        Engine.load(tmp_path)
    _edit(copy, target={"platform": "linux-sparc64"})
    with pytest.raises(EngineError, match="linux-sparc64"):
        Engine.load(copy).runner()
    _edit(copy, files={"../outside": "0"})
    with pytest.raises(EngineError, match="outside the bundle"):
        Engine.load(copy)
    _edit(copy, schema=99)
    with pytest.raises(EngineError, match="schema 99"):
        Engine.load(copy)
    (copy / MANIFEST).write_text("{")
    with pytest.raises(EngineError, match="damaged"):
        Engine.load(copy)


def _value_of_the_attention(model, backend):
    """The fused operator reads another part of the projections than the convolution's value."""
    wrong = for_our_kernels(model, "onnxruntime-cuda")
    for node in nodes_of(wrong, "FusedSpanDynamicConv"):
        offset = next(a for a in node.attribute if a.name == "value_offset")
        offset.i = offset.i // 3 * 2
    return wrong


@pytest.mark.parametrize(
    "wrong",
    [
        lambda model, backend: for_our_kernels(
            factories.sabotage_onnx(model, "shift-by-one"), backend
        ),
        _value_of_the_attention,
    ],
    ids=["shift-by-one", "another value"],
)
def test_a_wrong_engine_is_not_written(
    classifier_graph, tmp_path, monkeypatch, without_the_pass, wrong
):
    monkeypatch.setattr("convbert_deploy.build.for_our_kernels", wrong)
    with pytest.raises(EngineError, match="golden request wrongly"):
        build_engine(classifier_graph, tmp_path / "w.engine", BuildOptions(backend=ORT))
    assert not list(tmp_path.iterdir())


def test_rebuilding_replaces_the_bundle_as_a_whole(classifier_graph, tmp_path):
    target = tmp_path / "r.engine"
    options = BuildOptions(backend=ORT)
    first = build_engine(classifier_graph, target, options)
    (target / "stray").write_text("left over")
    second = build_engine(classifier_graph, target, options)
    assert first.manifest == second.manifest
    assert not (target / "stray").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["r.engine"]


def test_a_nan_inside_is_found_though_the_output_hides_it(classifier, classifier_graph, tmp_path):
    """A branch that overflows and is then multiplied away: outputs agree, the inside does not."""
    import onnx

    from convbert_deploy.backends.onnxruntime import Intermediates

    model = onnx.ModelProto()
    model.CopyFrom(classifier_graph.model)
    source = next(n.output[0] for n in model.graph.node if n.op_type == "Softmax")
    model.graph.node.append(onnx.helper.make_node("Log", [source], ["log"]))
    model.graph.node.append(onnx.helper.make_node("Sub", ["log", "log"], ["hidden_nan"]))
    batch = classifier_graph.info.golden.batch()
    bad = {name: (nans, infs) for name, nans, infs in Intermediates(model)(batch) if nans or infs}
    assert set(bad) == {"log", "hidden_nan"}, "padded keys have probability 0: log gives -inf"
    assert bad["log"][1] == bad["hidden_nan"][0] > 0
