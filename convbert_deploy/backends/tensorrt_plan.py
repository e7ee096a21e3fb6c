"""Graph in, TensorRT or TensorRT-RTX plan out, with the facts of what was built."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from convbert_deploy.backends.tensorrt_loading import (
    Kind,
    capturing_logger,
    first_error,
    import_tensorrt,
    load_plugins,
)
from convbert_deploy.errors import EngineError, PluginError, ShapeError
from convbert_deploy.shapes import ShapeProfile

#: Lines of an engine listing that run no kernel of their own.
_NO_KERNEL = frozenset({"signal", "wait", "shape_call", "shape", "constant"})
_LISTED_LAYER = re.compile(r"^Name: (.*?), LayerType: (\w+)", re.MULTILINE)
_SCRATCH = re.compile(r"Max Scratch Memory: (\d+) bytes")
#: A matrix product and the type of its left side; the types of a list come in its order.
_LISTED_GEMM = re.compile(
    r"^Name: (.*?), LayerType: gemm, Inputs: \[ \{[^}]*?Datatype: (\w+)", re.MULTILINE
)
#: Of a plan with several profiles, the one a listed layer belongs to.
_PROFILE_OF = re.compile(r"_myl(\d+)_\d+$")
#: TensorRT names the kernel of a whole attention ``_gemm_mha_v2``.
_FUSED_ATTENTION = "_mha_"


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """How a plan is built.

    plugin_library: None runs our operators as their model-local functions (``--no-plugin``).
    compute_capabilities: TensorRT-RTX targets such as ``("SM86", "SM89", "SM120")``; empty means
        all it supports. TensorRT builds for the GPU present and takes none.
    embed_plugin: put the library into the plan. Whoever runs the plan runs native code out of it.
    expected_plugin_layers: nodes of our operators in the graph; a plan with fewer would be slow and
        say nothing. Ignored without a plugin library.
    """

    kind: Kind = "tensorrt-rtx"
    plugin_library: pathlib.Path | None = None
    compute_capabilities: tuple[str, ...] = ()
    embed_plugin: bool = False
    expected_plugin_layers: int = 0


@dataclasses.dataclass(frozen=True)
class PlanFacts:
    """What is in a plan; sizes in bytes. Same graph and options, same facts.

    ``kernels`` counts launches by TensorRT's layer class (TensorRT-RTX: kgen, gemm, runtime_fusion,
    correlation, custom_layer, ...); those that only order streams or compute shapes are left out.
    ``gemms`` counts those of class gemm by the type they multiply (Half, BFloat16, Float, Int8,
    FP8); products that were fused into larger kernels are not among them. Of several profiles these
    are the last one's. ``scratch_bytes`` is at the largest shape of all. All are None where the
    builder did not print its listing. The file's own digest is no fact: TensorRT-RTX 1.7 numbers its
    internal tensors, and lays out its constants, by heap address. Two new processes without address
    randomization (``setarch -R``) write equal bytes.
    """

    runtime: str
    network_layers: int
    plugin_layers: int
    kernels: dict[str, int] | None
    gemms: dict[str, int] | None
    fused_attention: int | None
    scratch_bytes: int | None
    plan_bytes: int
    profiles: int = 1

    @property
    def kernel_count(self) -> int | None:
        return None if self.kernels is None else sum(self.kernels.values())

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "kernel_count": self.kernel_count}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A serialized engine."""

    data: bytes
    facts: PlanFacts


def build_plan(
    graph: pathlib.Path | bytes,
    profile: ShapeProfile | Sequence[ShapeProfile],
    options: PlanOptions,
) -> Plan:
    """Build a strongly typed plan of an ONNX graph.

    Args:
        graph: path (external data beside it is found) or serialized model; inputs int64 with axes
            named ``batch``, ``seq`` and, for multiple choice, ``choices``.
        profile: bounds of those axes; several make a plan that is tuned for each, the largest last
            (``buckets.length_profiles``).
        options: target and plugin.

    Raises:
        EngineError: TensorRT cannot parse or build the graph; its first message is quoted.
        PluginError: the library is missing or refused, or did not take all its nodes.
        ShapeError: an input axis is neither fixed nor named as above.
        MissingDependencyError: the backend is not installed.
    """
    trt = import_tensorrt(options.kind)
    logger = capturing_logger(trt)
    if options.plugin_library is not None:
        load_plugins(trt, options.kind, options.plugin_library)
    builder = trt.Builder(logger)
    if builder is None:
        raise EngineError(
            f"{options.kind} cannot start its builder: {first_error(trt, logger)}",
            hint="convbert-deploy doctor",
        )
    network = builder.create_network(_network_flags(trt))
    plugin_layers = _parse(trt, logger, network, graph, options)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # Branches on streams of their own keep their tensors apart: 239 MB of scratch instead of 201
    # for two fp16 layers of base at 32 x 512 (TensorRT-RTX 1.7).
    config.max_aux_streams = 0
    profiles = (profile,) if isinstance(profile, ShapeProfile) else tuple(profile)
    if not profiles:
        raise ShapeError("a plan needs a shape profile, expected at least one")
    for each in profiles:
        config.add_optimization_profile(_optimization_profile(builder, network, graph, each))
    _set_targets(trt, config, options)
    if options.embed_plugin and options.plugin_library is not None:
        config.plugins_to_serialize = [str(options.plugin_library.resolve())]
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise EngineError(f"{options.kind} cannot build the graph: {first_error(trt, logger)}")
    data = bytes(serialized)
    log = "\n".join(text for _, text in logger.messages)
    kernels, fused = _listing(log)
    scratch = _SCRATCH.findall(log)
    facts = PlanFacts(
        runtime=f"{options.kind} {trt.__version__}",
        network_layers=network.num_layers,
        plugin_layers=plugin_layers,
        kernels=kernels,
        gemms=None if kernels is None else _gemms(log),
        fused_attention=fused,
        scratch_bytes=max(map(int, scratch)) if scratch else None,
        plan_bytes=len(data),
        profiles=len(profiles),
    )
    return Plan(data, facts)


def _network_flags(trt: ModuleType) -> int:
    """TensorRT 10 has to be told what TensorRT 11 and RTX always do."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _parse(
    trt: ModuleType, logger: Any, network: Any, graph: pathlib.Path | bytes, options: PlanOptions
) -> int:
    """Fill ``network``; the number of plugin layers in it."""
    parser = trt.OnnxParser(network, logger)
    with_plugin = options.plugin_library is not None
    if with_plugin:
        parser.set_flag(trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)
        parsed = (
            parser.parse(graph) if isinstance(graph, bytes) else parser.parse_from_file(str(graph))
        )
    else:
        content, origin = _without_plugin_request(graph)
        parsed = parser.parse(content) if origin is None else parser.parse(content, origin)
    if not parsed:
        message = first_error(trt, logger)
        if parser.num_errors:
            error = parser.get_error(0)
            message = f"{error.desc()} (node {error.node_name()}, {error.node_operator()})"
        raise EngineError(f"{options.kind} cannot parse the graph: {message}")
    if not network.num_outputs:
        raise EngineError(f"{options.kind} found no outputs in the graph: it is no ONNX model")
    layers = (network.get_layer(index) for index in range(network.num_layers))
    found = sum(layer.type == trt.LayerType.PLUGIN_V3 for layer in layers)
    if with_plugin and found != options.expected_plugin_layers:
        raise PluginError(
            f"{found} layers run as our plugin, expected {options.expected_plugin_layers}: "
            f"{options.kind} did not map the nodes of our operators to {options.plugin_library}",
            hint="export the checkpoint again, or build with --no-plugin",
        )
    return found


def _without_plugin_request(graph: pathlib.Path | bytes) -> tuple[bytes, str | None]:
    """(serialized model, path its external data is relative to) that asks for no plugin.

    A node with ``plugin_namespace`` takes the plugin if this process has loaded it for another
    build; without, its model-local function is inlined whatever came before.
    """
    import onnx

    model = (
        onnx.load_from_string(graph)
        if isinstance(graph, bytes)
        else onnx.load(graph, load_external_data=False)
    )
    functions = {(function.domain, function.name) for function in model.functions}
    for node in model.graph.node:
        if (node.domain, node.op_type) in functions:
            kept = [a for a in node.attribute if a.name != "plugin_namespace"]
            del node.attribute[:]
            node.attribute.extend(kept)
    origin = None if isinstance(graph, bytes) else str(graph)
    return model.SerializeToString(deterministic=True), origin


def _optimization_profile(
    builder: Any, network: Any, graph: pathlib.Path | bytes, profile: ShapeProfile
) -> Any:
    axes = _input_axes(graph)
    built = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        name = network.get_input(index).name
        built.set_shape(name, *profile_shapes(name, axes[name], profile))
    return built


def profile_shapes(
    name: str, axes: tuple[int | str, ...], profile: ShapeProfile
) -> tuple[tuple[int, ...], ...]:
    """(min, opt, max) shape of an input whose axes are sizes or names of the profile's axes.

    Raises:
        ShapeError: an axis has another name, or none.
    """
    known = {field.name for field in dataclasses.fields(profile)}
    unknown = [axis for axis in axes if not isinstance(axis, int) and axis not in known]
    if unknown:
        raise ShapeError(
            f"input {name} has the axis {unknown[0]!r}, expected one of {', '.join(sorted(known))}"
        )
    return tuple(
        tuple(
            axis if isinstance(axis, int) else getattr(getattr(profile, axis), bound)
            for axis in axes
        )
        for bound in ("min", "opt", "max")
    )


def _input_axes(graph: pathlib.Path | bytes) -> dict[str, tuple[int | str, ...]]:
    """Axes of the graph's inputs; TensorRT's own tensors lose the names."""
    import onnx

    model = (
        onnx.load_from_string(graph)
        if isinstance(graph, bytes)
        else onnx.load(graph, load_external_data=False)
    )
    return {
        value.name: tuple(
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param
            for dim in value.type.tensor_type.shape.dim
        )
        for value in model.graph.input
    }


def _set_targets(trt: ModuleType, config: Any, options: PlanOptions) -> None:
    names = options.compute_capabilities
    if options.kind == "tensorrt":
        if names:
            raise EngineError(
                f"tensorrt builds for the GPU present, it cannot build for {', '.join(names)}",
                hint="build with --backend tensorrt-rtx, or leave the target out",
            )
        return
    # "NONE" and "CURRENT" are members too, but no GPU to build for here
    known = sorted(name for name in vars(trt.ComputeCapability) if name.startswith("SM"))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise EngineError(
            f"tensorrt-rtx {trt.__version__} cannot build for {unknown[0]}, "
            f"expected any of {', '.join(known)}"
        )
    if names:
        config.num_compute_capabilities = len(names)
        for index, name in enumerate(names):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), index)


def _listing(log: str) -> tuple[dict[str, int] | None, int | None]:
    """(kernels by class, fused attentions) from the layer listing a DETAILED build prints."""
    listed = _of_last_profile(_LISTED_LAYER.findall(log))
    listed = [(name, kind) for name, kind in listed if kind not in _NO_KERNEL]
    if not listed:
        return None, None
    kernels = collections.Counter(kind for _, kind in listed)
    fused = sum(_FUSED_ATTENTION in name for name, _ in listed)
    return dict(sorted(kernels.items())), fused


def _of_last_profile(listed: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those of the (layer name, anything) whose name bears the highest profile's number."""
    numbers = [
        int(found.group(1)) if (found := _PROFILE_OF.search(name)) else 0 for name, _ in listed
    ]
    last = max(numbers, default=0)
    return [entry for entry, number in zip(listed, numbers, strict=True) if number == last]


def _gemms(log: str) -> dict[str, int]:
    """Matrix products by the type of their left side."""
    return dict(sorted(collections.Counter(kind for _, kind in listed_gemms(log)).items()))


def listed_gemms(log: str) -> list[tuple[str, str]]:
    """(layer name, type of its left side) of each kernel of class gemm in a DETAILED listing, of the
    last profile. The name begins with that of the ONNX node."""
    return _of_last_profile(_LISTED_GEMM.findall(log))
