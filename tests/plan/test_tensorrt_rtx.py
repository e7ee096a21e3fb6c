"""Plans of TensorRT for RTX, built and read with no GPU present."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from convbert_deploy import plugin_library
from convbert_deploy.architecture import Task
from convbert_deploy.backends.tensorrt_plan import PlanOptions, build_plan
from convbert_deploy.errors import EngineError, PluginError, ShapeError
from convbert_deploy.precision import Precision
from convbert_deploy.shapes import ShapeProfile

import factories

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

PROFILE = ShapeProfile.parse("batch=1:8:32,seq=16:128:512")
SMALL = ShapeProfile.parse("batch=1:2:4,choices=2:3:4,seq=8:32:64")


@pytest.fixture(scope="module")
def library() -> pathlib.Path:
    try:
        return plugin_library.tensorrt_library()
    except PluginError as error:
        pytest.skip(f"TensorRT plugin library is not built: {error}")


@pytest.fixture(scope="module")
def graphs():
    """Serialized graphs by (size, task, precision, padding), traced once; ``ours`` as build-engine
    makes them for our kernels."""
    from convbert_deploy.build import for_our_kernels
    from convbert_deploy.calibration.typed import typed_graph
    from convbert_deploy.exporting import traced_graph

    traced: dict[tuple[str, Task, str], object] = {}

    def graph(
        size: str,
        precision: Precision,
        task: Task = Task.SEQUENCE_CLASSIFICATION,
        *,
        padding: str = "hf",
        ours: bool = True,
    ) -> bytes:
        key = size, task, padding
        if key not in traced:
            model = factories.realistic_model(size, task, layers=2)
            traced[key] = traced_graph(model, task, padding)
        typed = typed_graph(traced[key], precision)
        return (for_our_kernels(typed, "tensorrt-rtx") if ours else typed).SerializeToString()

    return graph


#: FusedSpanDynamicConv and DepthwiseConv1D in each of two layers
NODES = 4


def _with(library: pathlib.Path, nodes: int = NODES, **changes) -> PlanOptions:
    return PlanOptions(
        plugin_library=library,
        expected_plugin_layers=nodes,
        compute_capabilities=("SM89",),
        **changes,
    )


WITHOUT = PlanOptions(compute_capabilities=("SM89",))


@pytest.mark.parametrize("padding", ["hf", "masked"])
@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
def test_half_plan_has_plugin_layers_and_fused_attention(
    graphs, library, precision, padding
) -> None:
    """Two layers of the encoder: 41 kernels and 312 MB as transformers exports it (TensorRT-RTX
    1.7.1), 29 and 239 MB as we do without plugins (31 masked)."""
    kind = {"task": Task.ENCODER, "padding": padding}
    ours = build_plan(graphs("base", precision, **kind), PROFILE, _with(library)).facts
    without = build_plan(graphs("base", precision, **kind, ours=False), PROFILE, WITHOUT).facts

    assert ours.plugin_layers == ours.kernels["custom_layer"] == NODES
    assert (without.plugin_layers, "custom_layer" in without.kernels) == (0, False)
    assert ours.fused_attention == without.fused_attention == 2
    assert ours.kernel_count <= 26 < without.kernel_count <= 31
    assert "correlation" not in ours.kernels, "the depthwise convolution is ours"
    assert ours.scratch_bytes < 205e6 < without.scratch_bytes < 245e6
    assert ours.network_layers < without.network_layers


def test_fp32_plan_builds_with_plugin_and_unfused_attention(graphs, library) -> None:
    facts = build_plan(graphs("base", Precision.FP32), PROFILE, _with(library)).facts
    assert (facts.plugin_layers, facts.fused_attention) == (NODES, 0)


def test_unfused_operators_build_too(graphs, library) -> None:
    graph = graphs("tiny", Precision.FP16, ours=False)
    facts = build_plan(graph, SMALL, _with(library)).facts
    assert facts.plugin_layers == NODES, "SpanDynamicConv, not inlined, and DepthwiseConv1D"


def test_two_builds_hold_the_same(graphs, library) -> None:
    graph = graphs("tiny", Precision.FP16)
    facts = [build_plan(graph, SMALL, _with(library)).facts for _ in range(3)]
    assert all(fact == facts[0] for fact in facts)


_BUILD = """
import hashlib, pathlib, sys
from convbert_deploy.backends.tensorrt_plan import PlanOptions, build_plan
from convbert_deploy.shapes import ShapeProfile
options = PlanOptions(
    plugin_library=pathlib.Path(sys.argv[2]),
    expected_plugin_layers=4,
    compute_capabilities=("SM89",),
)
plan = build_plan(pathlib.Path(sys.argv[1]), ShapeProfile.parse(sys.argv[3]), options)
print(hashlib.sha256(plan.data).hexdigest())
"""


def test_two_new_processes_write_the_same_bytes(graphs, library, tmp_path) -> None:
    """TensorRT-RTX orders by heap address, so address randomization must be off."""
    fixed = ["setarch", "-R"]
    if not shutil.which("setarch") or subprocess.run([*fixed, "true"], check=False).returncode:
        pytest.skip("setarch -R is missing or forbidden here")
    path = tmp_path / "graph.onnx"
    path.write_bytes(graphs("tiny", Precision.FP16))
    command = [
        *fixed,
        sys.executable,
        "-c",
        _BUILD,
        str(path),
        str(library),
        "batch=1:2:4,seq=8:32:64",
    ]
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    digests = {
        subprocess.run(command, env=environment, check=True, capture_output=True).stdout
        for _ in range(3)
    }
    assert len(digests) == 1


def test_plan_for_several_targets_and_all(graphs, library) -> None:
    graph = graphs("tiny", Precision.FP16)
    for targets in (("SM86", "SM89", "SM120"), ()):
        options = PlanOptions(
            plugin_library=library, expected_plugin_layers=NODES, compute_capabilities=targets
        )
        assert build_plan(graph, SMALL, options).facts.fused_attention == 2


def test_embedded_plugin_makes_the_plan_larger(graphs, library) -> None:
    graph = graphs("tiny", Precision.FP16)
    beside = build_plan(graph, SMALL, _with(library)).facts.plan_bytes
    inside = build_plan(graph, SMALL, _with(library, embed_plugin=True)).facts.plan_bytes
    assert inside - beside >= library.stat().st_size * 0.9


def test_multiple_choice_has_three_axes(graphs, library) -> None:
    graph = graphs("tiny", Precision.FP16, Task.MULTIPLE_CHOICE)
    assert build_plan(graph, SMALL, _with(library)).facts.plugin_layers == NODES


def test_wrong_number_of_plugin_layers_is_an_error(graphs, library) -> None:
    with pytest.raises(PluginError, match="4 layers run as our plugin, expected 3"):
        build_plan(graphs("tiny", Precision.FP16), SMALL, _with(library, nodes=3))


def test_missing_or_foreign_library_is_an_error(graphs, tmp_path) -> None:
    graph = graphs("tiny", Precision.FP16)
    with pytest.raises(PluginError, match="does not exist"):
        build_plan(graph, SMALL, _with(tmp_path / "absent.so"))
    foreign = tmp_path / "foreign.so"
    foreign.write_bytes(b"no library")
    with pytest.raises(PluginError, match="did not accept"):
        build_plan(graph, SMALL, _with(foreign))


def test_unknown_target_and_damaged_graph_are_errors(graphs) -> None:
    graph = graphs("tiny", Precision.FP16, ours=False)
    with pytest.raises(EngineError, match="cannot build for SM90, expected any of SM120"):
        build_plan(graph, SMALL, PlanOptions(compute_capabilities=("SM90",)))
    import onnx

    unknown = onnx.load_from_string(graph)
    unknown.graph.node[5].op_type = "Nonsense"
    with pytest.raises(EngineError, match=r"cannot parse the graph: .*Nonsense"):
        build_plan(unknown.SerializeToString(), SMALL, WITHOUT)


def test_unnamed_axis_is_an_error(graphs) -> None:
    import onnx

    model = onnx.load_from_string(graphs("tiny", Precision.FP16, ours=False))
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "length"
    with pytest.raises(ShapeError, match="axis 'length', expected one of batch, choices, seq"):
        build_plan(model.SerializeToString(), SMALL, WITHOUT)
