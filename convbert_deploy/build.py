"""Graph in, engine bundle out."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from convbert_deploy.build_cpu import (
    LayersGraph,
    LayersRequest,
    graph_with_layers,
    report_text,
)
from convbert_deploy.build_golden import check_golden, golden_within
from convbert_deploy.build_precision import (
    CPU,
    check_attention,
    check_gemms,
    check_static_activations,
    engine_capabilities,
    engine_precision,
    graph_in_precision,
    needs_ranges,
)
from convbert_deploy.engine import (
    GOLDEN,
    GRAPH,
    MANIFEST,
    PLAN,
    TOKENIZER,
    Engine,
    Manifest,
    platform_name,
)
from convbert_deploy.errors import PluginError
from convbert_deploy.graph import Graph, write_model
from convbert_deploy.mapped_model import write_mapped_model
from convbert_deploy.operators import DOMAIN, nodes_of, span_dynamic_conv
from convbert_deploy.operators.fused_span_dynamic_conv import fuse
from convbert_deploy.precision import Precision
from convbert_deploy.provenance import atomic_directory, sha256_of_file
from convbert_deploy.shapes import ShapeProfile

if TYPE_CHECKING:
    import onnx

BACKENDS = ("auto", "onnxruntime", "tensorrt", "tensorrt-rtx")
Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """precision: None is the graph's own; a calibrated graph has no other. high: on a GPU, what a
    graph in 8 bits computes the rest in; on a CPU, BF16 for the linears that calibration kept high,
    which are float32 otherwise. plugin: run our operators as our kernels; False is the explicit
    --no-plugin. static_activations: on a CPU, quantize by the steps of a calibrated int8 graph; else
    each token gets its own, on a GPU they are static anyway. compute_capabilities: GPUs a
    tensorrt-rtx plan is for; empty is ``DEFAULT_CAPABILITIES``, of which FP8 takes those that have
    it. tokenizer: files to use instead of those that came with the graph."""

    precision: Precision | None = None
    backend: str = "auto"
    high: Precision = Precision.FP16
    profile: ShapeProfile = dataclasses.field(default_factory=ShapeProfile)
    plugin: bool = True
    static_activations: bool = False
    compute_capabilities: tuple[str, ...] = ()
    tokenizer: tuple[pathlib.Path, ...] = ()
    command: str = ""


@dataclasses.dataclass(frozen=True)
class _Built:
    """What a backend made in the bundle's folder."""

    plugin_library: pathlib.Path | None
    plugin_nodes: int
    target: dict[str, Any]
    plan: dict[str, Any]


def build_engine(
    graph: Graph,
    target: pathlib.Path,
    options: BuildOptions | None = None,
    progress: Progress = lambda _: None,
) -> Engine:
    """Type the graph, build it, check it on the golden request, write ``target`` as a whole.

    Raises:
        EngineError: the build failed, or the engine answers the golden request wrongly.
        GraphError: the graph cannot be had in the precision asked for.
        PluginError: our library is not built, or its operators did not all take its place.
        MissingDependencyError: the backend is not installed.
        OutputError: ``target`` cannot be written.
    """
    options = options or BuildOptions()
    backend = resolve_backend(options.backend)
    precision = engine_precision(graph, options.precision, backend, plugin=options.plugin)
    options = dataclasses.replace(
        options,
        precision=precision,
        compute_capabilities=engine_capabilities(options.compute_capabilities, precision),
    )
    if options.static_activations:
        check_static_activations(graph)
    profile = options.profile.limited_to(graph.info.architecture.max_position_embeddings)
    if backend.startswith("tensorrt"):
        check_attention(graph, profile)
    progress(f"the graph in {precision} for {backend}")
    with atomic_directory(target) as folder:
        progress("building")
        if backend.startswith("onnxruntime"):
            built = _build_onnxruntime(graph, folder, backend, options, progress)
        else:
            built = _build_plan(graph, folder, backend, profile, options)
            check_gemms(graph, built.plan.get("gemms"))
        _copy_tokenizer(options.tokenizer or graph.tokenizer_files, folder)
        golden = golden_within(graph, profile, progress)
        (folder / GOLDEN).write_text(json.dumps(golden.to_json()))
        manifest = _manifest(graph, target.name, backend, profile, options, built, folder)
        _write_manifest(folder, manifest)
        if _runs_here(backend):
            progress("checking the golden request")
            difference = check_golden(Engine.load(folder))
            _write_manifest(folder, dataclasses.replace(manifest, golden_max_abs=difference))
    return Engine.load(target)


def resolve_backend(name: str) -> str:
    """``auto``: TensorRT where it and a GPU are there, else ONNX Runtime on the best device."""
    from convbert_deploy.backends.onnxruntime import cuda_available
    from convbert_deploy.environment import environment

    if name == "auto":
        here = environment()
        name = "tensorrt" if here.gpus and here.versions.get("tensorrt") else "onnxruntime"
    if name == "onnxruntime":
        return "onnxruntime-cuda" if cuda_available() else "onnxruntime-cpu"
    return name


def _arithmetic(options: BuildOptions, backend: str) -> str:
    assert options.precision is not None
    if options.precision.quantized:
        return f"{options.precision}, {Precision.FP32 if backend == CPU else options.high}"
    return str(Precision.FP32 if backend == CPU else options.precision)


def for_our_kernels(model: onnx.ModelProto, backend: str) -> onnx.ModelProto:
    """A copy whose nodes of our operators only our library can run: without their functions nothing
    inlines silently. On GPUs the kernel generators are fused into the convolution; on CPUs ONNX
    Runtime's own matrix product is faster (``benchmarks/fused_span_dynamic_conv.py``)."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if backend != CPU:
        copy = fuse(copy)
    kept = [function for function in copy.functions if function.domain != DOMAIN]
    del copy.functions[:]
    copy.functions.extend(kept)
    return copy


def _model_of(
    graph: Graph, options: BuildOptions, backend: str
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The graph that the backend gets, and what each pass over it did, by name."""
    from convbert_deploy.passes.tensorrt import tensorrt_passes

    assert options.precision is not None
    model = graph_in_precision(graph, options.precision, options.high, backend)
    done: dict[str, str] = {}
    if backend != CPU:
        model, reports = tensorrt_passes(model)
        done = {report.name: report_text(report) for report in reports if report.expected}
    return for_our_kernels(model, backend) if options.plugin else model, done


def _build_onnxruntime(
    graph: Graph, folder: pathlib.Path, backend: str, options: BuildOptions, progress: Progress
) -> _Built:
    from convbert_deploy.plugin_library import ort_library

    library = ort_library() if options.plugin else None
    target: dict[str, Any] = {
        "platform": platform_name(),
        "arithmetic": _arithmetic(options, backend),
    }
    # fp16 has no arithmetic of its own on a CPU: its weights are stored in it
    if library and backend == CPU and options.precision is not Precision.FP16:
        layers = _with_layers(graph, options, progress)
        target["passes"] = {layers.report.name: report_text(layers.report)}
        if layers.model is not None:
            write_mapped_model(layers.model, folder / GRAPH)
            nodes = sum(node.domain == DOMAIN for node in layers.model.graph)
            return _Built(library, nodes, target | {"arithmetic": layers.arithmetic}, {})
    model, done = _model_of(graph, options, backend)
    write_model(model, folder / GRAPH)
    target["passes"] = target.get("passes", {}) | done
    return _Built(library, len(nodes_of(model)) if library else 0, target, {})


def _with_layers(graph: Graph, options: BuildOptions, progress: Progress) -> LayersGraph:
    """``graph_with_layers``, and on ``progress`` where its pass did not fire.

    Raises:
        GraphError: it did not, and the precision asked for can be had in no other way.
        PluginError: some of the model's layers are not in the graph.
    """
    assert options.precision is not None
    high = Precision.BF16 if options.high is Precision.BF16 else Precision.FP32
    request = LayersRequest(options.precision, high, options.static_activations)
    layers = graph_with_layers(graph, request)
    text = report_text(layers.report)
    if layers.model is None:
        if options.precision is Precision.INT8 and graph.info.precision is Precision.FP32:
            raise needs_ranges(graph, options.precision, f" ({layers.report.name}: {text})")
        progress(
            f"{layers.report.name} did not fire: {text}; the layers are left to ONNX Runtime's own "
            "operators"
        )
    elif layers.report.fired != graph.info.architecture.num_hidden_layers:
        raise PluginError(
            f"the graph has {layers.report.fired} encoder layers, expected "
            f"{graph.info.architecture.num_hidden_layers}"
        )
    return layers


def _build_plan(
    graph: Graph,
    folder: pathlib.Path,
    backend: str,
    profile: ShapeProfile,
    options: BuildOptions,
) -> _Built:
    from convbert_deploy.backends.buckets import length_profiles
    from convbert_deploy.backends.tensorrt import PlanOptions, build_plan
    from convbert_deploy.plugin_library import tensorrt_library

    library = tensorrt_library() if options.plugin else None
    model, done = _model_of(graph, options, backend)
    plan_options = PlanOptions(
        kind=backend,
        plugin_library=library,
        compute_capabilities=options.compute_capabilities if backend == "tensorrt-rtx" else (),
        expected_plugin_layers=len(nodes_of(model)) if options.plugin else 0,
    )
    write_model(model, folder / GRAPH)
    # TensorRT-RTX chooses its kernels when a shape first runs, TensorRT by the profile.
    profiles = length_profiles(profile) if backend == "tensorrt" else (profile,)
    plan = build_plan(folder / GRAPH, profiles, plan_options)
    (folder / PLAN).write_bytes(plan.data)
    target = {
        "platform": platform_name(),
        "arithmetic": _arithmetic(options, backend),
        "compute_capabilities": list(plan_options.compute_capabilities) or ["this GPU"],
        "passes": done,
    }
    return _Built(library, plan.facts.plugin_layers, target, plan.facts.to_json())


def _copy_tokenizer(files: tuple[pathlib.Path, ...], folder: pathlib.Path) -> None:
    if files:
        (folder / TOKENIZER).mkdir()
    for file in files:
        shutil.copyfile(file, folder / TOKENIZER / file.name)


def _manifest(
    graph: Graph,
    name: str,
    backend: str,
    profile: ShapeProfile,
    options: BuildOptions,
    built: _Built,
    folder: pathlib.Path,
) -> Manifest:
    from convbert_deploy.environment import versions

    info = graph.info
    operators = len(nodes_of(graph.model, span_dynamic_conv.OP_TYPE))
    if options.plugin and operators != info.architecture.num_hidden_layers:
        raise PluginError(
            f"the graph has {operators} SpanDynamicConv nodes, expected one for each of "
            f"{info.architecture.num_hidden_layers} layers"
        )
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return Manifest(
        name=name,
        backend=backend,
        precision=options.precision,
        task=info.task,
        architecture=info.architecture,
        labels=info.labels,
        problem_type=info.problem_type,
        padding=info.padding,
        profile=profile,
        plugin_nodes=built.plugin_nodes,
        plugin_sha256=sha256_of_file(built.plugin_library) if built.plugin_library else None,
        target=built.target,
        plan=built.plan,
        chain=(*info.chain, graph.origin()),
        calibration=info.calibration,
        versions={package: version for package, version in versions().items() if version},
        command=options.command,
        golden_max_abs=None,
        files={str(path.relative_to(folder)): sha256_of_file(path) for path in files},
    )


def _write_manifest(folder: pathlib.Path, manifest: Manifest) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest.to_json(), indent=2, sort_keys=True) + "\n")


def _runs_here(backend: str) -> bool:
    from convbert_deploy.environment import environment

    return backend.startswith("onnxruntime") or bool(environment().gpus)
