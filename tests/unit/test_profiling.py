"""Where an engine's time goes: reading ONNX Runtime's profile, placing nodes, what is not fused."""

from __future__ import annotations

import json
import pathlib

import pytest

from convbert_deploy.architecture import Architecture
from convbert_deploy.build import BuildOptions, build_engine
from convbert_deploy.engine import Engine
from convbert_deploy.errors import EngineError, ShapeError
from convbert_deploy.profiling.attribution import Place, place_of, places
from convbert_deploy.profiling.findings import not_fused
from convbert_deploy.profiling.kernels import Kernel, Workload, kernels_of, middle_mean
from convbert_deploy.profiling.products import layer_gflop, product_of
from convbert_deploy.profiling.profile_report import ProfileReport
from convbert_deploy.profiling.profile_text import profile_text
from convbert_deploy.profiling.profiling import ProfileOptions, _listed, profile
from convbert_deploy.profiling.recording import NodeRun, Tensor, read_recording

RECORDING = pathlib.Path(__file__).parent.parent / "recordings" / "onnxruntime-1.31.1.json"
BODIES = {
    "SpanDynamicConv": frozenset({"Pad", "Slice", "Mul", "Add", "Softmax"}),
    "DepthwiseConv1D": frozenset({"Transpose", "Conv"}),
}
WORKLOAD = Workload(
    Architecture(
        vocab_size=9000,
        embedding_size=128,
        hidden_size=384,
        num_hidden_layers=2,
        num_attention_heads=8,
        head_ratio=2,
        intermediate_size=1536,
        num_groups=2,
        conv_kernel_size=9,
        max_position_embeddings=512,
        type_vocab_size=2,
    ),
    batch=2,
    seq=16,
)


def _node(name, op_type, start=0, duration=10, inputs=(), outputs=()):
    def tensors(shapes):
        return tuple(Tensor("float", shape) for shape in shapes)

    return NodeRun(name, op_type, "CPU", start, duration, tensors(inputs), tensors(outputs))


def _kernel(name, op_type, ms=1.0):
    return Kernel(name, op_type, ms, place_of(name))


def test_a_recording_has_its_runs_and_their_nodes_in_order():
    runs = read_recording(RECORDING)
    assert [len(run.nodes) for run in runs] == [30, 30, 30]
    first = runs[0].nodes
    assert (first[0].name, first[0].op_type) == ("embeddings.word_embeddings/Gather", "Gather")
    assert first[0].inputs == (Tensor("float", (9000, 128)), Tensor("int64", (2, 16)))
    assert [node.start_us for node in first] == sorted(node.start_us for node in first)
    assert all(run.wall_us > sum(node.duration_us for node in run.nodes) for run in runs)


@pytest.mark.parametrize(
    "text", ["not json", "[]", '{"a": 1}', '[{"name": "model_run"}]', "[1]"], ids=str
)
def test_what_is_no_recording_is_an_error(text, tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(EngineError, match=r"profile\.json"):
        read_recording(path)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("encoder.layer.11.attention.self/MatMul_2", Place("layer 11", "attention.self")),
        ("encoder.layer.0.a.b/MatMul/MatmulTransposeFusion", Place("layer 0", "a.b")),
        ("encoder.layer.3/EncoderLayer", Place("layer 3", "")),
        ("encoder/PackRows", Place("encoder", "")),
        ("embeddings.LayerNorm/LayerNormalization", Place("embeddings", "LayerNorm")),
        ("embeddings_project/MatMul", Place("embeddings", "project")),
        ("inputs/Cast", Place("inputs", "")),
        ("classifier.dense/Gemm", Place("head", "classifier.dense")),
        ("BiasGelu_token_58", None),
        ("Slice_220", None),
    ],
)
def test_a_name_tells_the_place(name, place):
    assert place_of(name) == place


def test_nodes_without_a_name_belong_to_the_layer_that_runs_around_them():
    nodes = read_recording(RECORDING)[0].nodes
    placed = dict(zip((node.name for node in nodes), places(nodes), strict=True))
    in_layer_0 = ["Pad_195", "Conv_190", "Slice_197", "Mul_198", "BiasGelu"]
    assert {placed[name].section for name in in_layer_0} == {"layer 0"}
    assert {placed[name].section for name in ("Transpose_225", "Conv_228")} == {"layer 1"}
    assert placed["inputs/Cast"].section == "inputs", "computed within layer 0, but named"


def test_a_nameless_node_after_a_layers_end_is_the_next_layers():
    names = ["encoder.layer.0/A", "encoder.layer.0.LayerNorm/L", "Transpose_1", "inputs/Cast"]
    names += ["Slice_2", "encoder.layer.1/B", "Gelu_3", "classifier/M", "Add_4"]
    found = places([_node(name, "X", start) for start, name in enumerate(names)])
    assert [place.section for place in found] == [
        *("layer 0", "layer 0", "layer 1", "inputs", "layer 1", "layer 1", "head", "head", "head")
    ]


@pytest.mark.parametrize(
    ("op_type", "left", "out", "shown"),
    [
        ("MatMul", (2, 16, 384), (2, 16, 768), "32x384x768"),
        ("FusedMatMul", (2, 384, 16), (2, 16, 192), "32x384x192"),
        ("MatMul", (2, 4, 16, 48), (2, 4, 16, 16), "128x48x16"),
        ("Gemm", (2, 384), (2, 3), "2x384x3"),
        ("MatMul", (5, 7), (2, 3), None),
        ("MatMul", (0, 7), (0, 3), None),
        ("Add", (2, 3), (2, 3), None),
    ],
)
def test_the_size_of_a_matrix_product(op_type, left, out, shown):
    product = product_of(_node("a/b", op_type, inputs=[left], outputs=[out]))
    assert (str(product) if product else None) == shown
    if product:
        assert product.gflop == pytest.approx(2e-9 * product.m * product.k * product.n)


def test_a_layers_arithmetic_is_that_of_its_products():
    """Against the sum over the products of one layer, counted one by one."""
    inner, hidden, tokens = 192, 384, 32
    products = [(hidden, inner)] * 4  # query, key, value, convolution's value
    products += [(hidden, inner), (inner, 4 * 9), (2 * inner, hidden)]
    products += [(hidden // 2, 1536 // 2)] * 2 + [(1536 // 2, hidden // 2)] * 2
    products += [(inner, 16), (16, inner)]  # attention, all heads together
    expected = sum(2e-9 * tokens * k * n for k, n in products)
    assert layer_gflop(WORKLOAD.architecture, 2, 16) == pytest.approx(expected)


def test_times_are_robust_and_finer_than_a_microsecond():
    assert middle_mean([4, 5, 5, 4, 4, 5, 5, 4000]) == pytest.approx(4.75)
    assert middle_mean([3]) == 3


def test_kernels_of_a_recording():
    kernels = kernels_of(read_recording(RECORDING)[1:], WORKLOAD)
    named = {kernel.name: kernel for kernel in kernels}
    product = named["encoder.layer.0.attention.self.projections/MatMul"]
    assert (product.shape, product.element_type) == ("32x384x768", "float")
    assert product.gflop == pytest.approx(2e-9 * 32 * 384 * 768)
    assert product.ms == pytest.approx(0.13, abs=0.1)
    assert not named["Slice_197"].named
    json.dumps([kernel.to_json() for kernel in kernels], allow_nan=False)


def test_a_node_that_ran_in_some_runs_only_is_left_out():
    runs = read_recording(RECORDING)
    shorter = type(runs[1])(runs[1].wall_us, runs[1].nodes[1:])
    assert len(kernels_of([runs[0], shorter], WORKLOAD)) == len(runs[0].nodes) - 1


def test_one_kernel_for_a_whole_layer_has_arithmetic_and_may_tell_its_phases():
    nodes = (_node("encoder.layer.0/EncoderLayer", "EncoderLayer", outputs=[(32, 384)]),)
    run = type(read_recording(RECORDING)[0])(20, nodes)
    phases = {"encoder.layer.0/EncoderLayer": {"attention": 4000, "up": 6000}}
    (kernel,) = kernels_of([run], WORKLOAD, phases)
    assert kernel.gflop == pytest.approx(layer_gflop(WORKLOAD.architecture, 2, 16))
    report = _report([kernel, kernel])
    assert report.phases_ms == pytest.approx({"up": 1.2 * kernel.ms, "attention": 0.8 * kernel.ms})
    assert "Inside the layers' kernels" in profile_text(report)
    assert report.groups[0].name == "layers"


def test_functions_that_ran_in_place_of_our_kernels_are_told():
    kernels = kernels_of(read_recording(RECORDING), WORKLOAD)
    found = {one.code: one for one in not_fused(kernels, BODIES, 0.0)}
    body = found["function-body"]
    assert "DepthwiseConv1D and SpanDynamicConv" in body.text
    assert body.count == 6, "Pad, Slice, Mul, two Conv and the second layer's Transpose"
    assert found["gelu"].count == 1
    assert found["bias"].count == 2, "not the mask, which is added in a module with products"
    assert found["residual"].count == 1
    assert found["attention"].count == 4
    assert found["transpose"].count == 1, "the function's own is counted with the function"


def test_our_kernels_are_no_finding():
    kernels = [_kernel("a/SpanDynamicConv", "SpanDynamicConv"), _kernel("b/D", "DepthwiseConv1D")]
    assert not_fused([*kernels, _kernel("Transpose_1", "Transpose", 0.0001)], BODIES, 0.01) == []


def test_findings_below_the_threshold_are_left_out_and_the_largest_comes_first():
    kernels = [
        _kernel("x.dense/MatMul", "MatMul", 90.0),
        _kernel("x.dense/Add", "Add", 2.0),
        _kernel("x/Gelu", "Gelu", 7.5),
        _kernel("x/Cast", "Cast", 0.5),
    ]
    found = not_fused(kernels, {}, 0.01)
    assert [(one.code, one.share) for one in found] == [("gelu", 0.075), ("bias", 0.02)]
    assert "cast" in {one.code for one in not_fused(kernels, {}, 0.005)}
    assert not_fused([], {}, 0.01) == []


def test_quantizing_in_passes_of_their_own():
    kernels = [_kernel("a.dense/Smooth", "Mul"), _kernel("a.dense/Q", "QuantizeLinear")]
    (found,) = not_fused(kernels, {}, 0.01)
    assert (found.code, found.count) == ("quantizing", 2)


def _report(kernels, **changes):
    fields = {
        "engine": "x.engine",
        "backend": "onnxruntime-cpu fp32",
        "batch": 2,
        "seq": 16,
        "runs": 2,
        "header": {"cpu": "Test CPU"},
        "kernels": tuple(kernels),
    }
    return ProfileReport(**fields | changes)


def test_rows_add_up_and_sections_follow_the_data():
    kernels = kernels_of(read_recording(RECORDING), WORKLOAD)
    report = _report(kernels, profiled_ms=9.0)
    for rows in (report.operators, report.sections, report.groups):
        assert sum(row.ms for row in rows) == pytest.approx(report.kernels_ms)
        assert sum(row.share for row in rows) == pytest.approx(1)
        assert sum(row.count for row in rows) == len(kernels)
    names = [row.name for row in report.sections]
    assert names == ["inputs", "embeddings", "layer 0", "layer 1", "head"]
    assert report.overhead_ms == pytest.approx(9.0 - report.kernels_ms)
    group = next(row for row in report.groups if row.name == "layers attention.self.projections")
    assert (group.operator, group.count) == ("MatMul", 2)


def test_text_lists_the_rest_in_one_row():
    text = profile_text(_report(kernels_of(read_recording(RECORDING), WORKLOAD)), top=3)
    rows = text.split("By operator:")[1].split("By part")[0].splitlines()
    assert "others" in rows[-2] and len([row for row in rows if row.strip()]) == 6
    assert "32x384x768 float" in text


def test_an_untimed_plan_lists_its_kernels():
    plan = {"kernels": {"gemm": 2, "kgen": 3}, "kernel_count": 5, "fused_attention": 1}
    report = _report(_listed(plan), plan=plan, notes=("not timed: no GPU",))
    assert [(row.name, row.count, row.ms) for row in report.operators] == [
        ("kgen", 3, None),
        ("gemm", 2, None),
    ]
    text = profile_text(report)
    assert "kernels: 5" in text and "Note: not timed: no GPU" in text
    assert "Not fused" not in text and "Slowest" not in text
    json.dumps(report.to_json(), allow_nan=False)


def test_layer_times_of_a_plan_are_those_that_tensorrt_reports():
    from convbert_deploy.backends.tensorrt_profile import _layer_times

    fake = type("trt", (), {"IProfiler": type("IProfiler", (), {})})
    times = _layer_times(fake)
    times.report_layer_time("gemm", 0.5)
    times.report_layer_time("gemm", 0.7)
    assert times.spent_ms == {"gemm": [0.5, 0.7]}


@pytest.fixture(scope="module")
def engines(classifier_graph, tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    return {
        plugin: build_engine(
            classifier_graph, folder / f"{plugin}.engine", BuildOptions(plugin=plugin)
        )
        for plugin in (True, False)
    }


@pytest.mark.parametrize("plugin", [True, False])
def test_a_real_engine(engines, plugin):
    engine = Engine.load(engines[plugin].path)
    report = profile(engine, ProfileOptions(batch=2, seq=16, threads=1, runs=3, warmup=1))
    assert report.wall_ms > 0
    assert 0 < report.kernels_ms <= report.profiled_ms
    layers = [row.name for row in report.sections if row.name.startswith("layer")]
    depth = engine.manifest.architecture.num_hidden_layers
    assert layers == [f"layer {index}" for index in range(depth)]
    ours = {"EncoderLayer", "FusedSpanDynamicConv", "SpanDynamicConv"}
    assert any(row.operator in ours for row in report.operators) == plugin
    assert any(one.code == "function-body" for one in report.findings) == (not plugin)
    assert len(report.phases_ms) == (8 if plugin else 0)
    assert not list(engine.path.glob("*onnxruntime*"))


def test_the_layers_parts_add_up_to_the_layers(engines):
    report = profile(Engine.load(engines[True].path), ProfileOptions(batch=2, seq=16, runs=3))
    layers = [kernel for kernel in report.kernels if kernel.op_type == "EncoderLayer"]
    assert layers
    for layer in layers:
        assert sum(layer.phases_ms.values()) == pytest.approx(layer.ms)
        assert all(spent > 0 for spent in layer.phases_ms.values()), layer.phases_ms


def test_a_shape_outside_the_engines_profile_is_refused(engines):
    with pytest.raises(ShapeError):
        profile(engines[True], ProfileOptions(batch=64, seq=16, runs=1))


def test_sessions_are_profiled_only_inside(classifier_graph, tmp_path):
    from convbert_deploy.backends.onnxruntime import OnnxRuntimeRunner, profiled

    with profiled(tmp_path):
        pass
    with OnnxRuntimeRunner(classifier_graph.path):
        pass
    assert not list(tmp_path.iterdir())
    with profiled(tmp_path), OnnxRuntimeRunner(classifier_graph.path):
        pass
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_the_command(engines, tmp_path):
    from click.testing import CliRunner

    from convbert_deploy.cli import main

    pytest.importorskip("matplotlib")
    page = tmp_path / "profile.html"
    arguments = ["profile", str(engines[True].path), "--batch", "1", "--seq", "8", "--runs", "1"]
    shown = CliRunner().invoke(main, arguments)
    assert shown.exit_code == 0 and "By part of the model:" in shown.output
    told = CliRunner().invoke(main, [*arguments, "--json", "--html", str(page)])
    data = json.loads(told.stdout)
    assert (data["kind"], data["batch"], data["seq"]) == ("profile", 1, 8)
    assert "<h1>Profile of True.engine</h1>" in page.read_text()
