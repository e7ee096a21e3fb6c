"""``config.pbtxt`` of the two models, from what the engine's manifest says.

No ``default_queue_policy`` is written: older servers stall requests by half a second with one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from convbert_deploy.architecture import Task
from convbert_deploy.backends.buckets import Buckets, length_profiles
from convbert_deploy.engine import Engine, Manifest
from convbert_deploy.precision import Precision
from convbert_deploy.serving.client import ANSWER, REQUEST
from convbert_deploy.serving.requests import INPUT_NAMES

#: sequence lengths that CPU engines and plans are warmed up at, with the longest they take
WARM_LENGTHS = (32, 64, 128, 256, 512)

TritonBackend = Literal["python", "onnxruntime", "tensorrt"]


class Word(str):
    """A value written without quotes: an enum's name."""


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """What both models' configs take from the person who packages.

    name: of the model. instances: copies of it that run at a time. environment: folder or archive
    of the Python environment on the server, None for the server's own. delay_us: microseconds that
    a request may wait for batch-mates; 0 batches what waits anyway. threads: CPU threads of each
    instance, None leaves the runtime's default. own_runner: see ``triton_backend``.
    """

    name: str
    instances: int = 1
    environment: str | None = None
    delay_us: int = 0
    threads: int | None = None
    own_runner: bool = False


@dataclasses.dataclass(frozen=True)
class WarmUp:
    """One request that the server runs before the model is ready: ``batch`` rows of full length.

    shape: of one row, (seq,) or (choices, seq).
    """

    name: str
    batch: int
    shape: tuple[int, ...]

    def file(self, input_name: str) -> str:
        """Name of the file in the model's ``warmup`` folder that holds one row as raw int64."""
        return f"{self.name}.{input_name}"


def triton_backend(manifest: Manifest, *, own_runner: bool = False) -> TritonBackend:
    """Which of Triton's backends runs the engine. There is none for TensorRT-RTX, and that for ONNX
    Runtime cannot be told what FP8 needs: these run, as CPU engines do, in the python backend with
    our own runner; with ``own_runner`` every engine does."""
    if own_runner:
        return "python"
    if manifest.backend == "tensorrt":
        return "tensorrt"
    onnxruntime = manifest.backend == "onnxruntime-cuda" and manifest.precision is not Precision.FP8
    return "onnxruntime" if onnxruntime else "python"


def warm_ups(manifest: Manifest, *, own_runner: bool = False) -> tuple[WarmUp, ...]:
    """A row of every length bucket, then the largest batch that the Scorer makes, so that memory
    which does not suffice is found while the model loads."""
    profile = manifest.profile
    python = triton_backend(manifest, own_runner=own_runner) == "python"
    # our runner on a GPU records a CUDA graph for each of its buckets
    graphs = python and manifest.backend != "onnxruntime-cpu"
    lengths = set(Buckets.of(profile, manifest.padding).seq) if graphs else set()
    lengths |= {length for length in WARM_LENGTHS if length in profile.seq} | {profile.seq.max}
    choices = (profile.choices.opt,) if manifest.task is Task.MULTIPLE_CHOICE else ()
    least = profile.batch.min
    small = [WarmUp(f"length-{n}", least, (*choices, n)) for n in sorted(lengths)]
    return (*small, WarmUp("largest-batch", profile.batch.max, (*choices, profile.seq.opt)))


def engine_config(
    engine: Engine, options: ModelOptions, *, operator_library: str | None = None
) -> str:
    """Text of the tensor model's config.

    operator_library: path on the server of our ONNX Runtime operators, for backend onnxruntime.
    """
    manifest = engine.manifest
    backend = triton_backend(manifest, own_runner=options.own_runner)
    ragged = backend == "python" and manifest.padding == "masked"
    config: dict[str, Any] = {
        "name": options.name,
        **_backend_fields(backend),
        "max_batch_size": manifest.profile.batch.max,
        "input": [
            {"name": name, "data_type": Word("TYPE_INT64"), "dims": _input_dims(manifest)}
            # the python model pads requests of unlike length itself
            | ({"allow_ragged_batch": True} if ragged else {})
            for name in INPUT_NAMES
        ],
        "output": [
            {"name": name, "data_type": Word("TYPE_FP32"), "dims": dims}
            for name, dims in output_dims(engine).items()
        ],
        "instance_group": [_instances(manifest, options)],
        "dynamic_batching": _batching(options),
        # the last version too: the text model of that asks for it until the new one is ready
        "version_policy": {"latest": {"num_versions": 2}},
        "model_warmup": [
            _warm_up(warm) for warm in warm_ups(manifest, own_runner=options.own_runner)
        ],
    }
    if operator_library is not None:
        config["model_operations"] = {"op_library_filename": [operator_library]}
    parameters = _python_parameters(options) if backend == "python" else {}
    return pbtxt(config | _entries("parameters", parameters))


def text_config(engine: Engine, options: ModelOptions, engine_name: str) -> str:
    """Text of the config of the model that takes requests in words and asks ``engine_name``.

    It has no warm-up: Triton loads both models at once, so the engine may not be there yet.
    """
    parameters = {"engine_model": engine_name} | _python_parameters(options)
    text = {"data_type": Word("TYPE_STRING"), "dims": [1]}
    return pbtxt(
        {
            "name": options.name,
            "backend": "python",
            "max_batch_size": engine.manifest.profile.batch.max,
            "input": [{"name": REQUEST} | text],
            "output": [{"name": ANSWER} | text],
            "instance_group": [{"count": options.instances, "kind": Word("KIND_CPU")}],
            "dynamic_batching": _batching(options),
            "version_policy": {"latest": {"num_versions": 1}},
        }
        | _entries("parameters", parameters)
    )


def output_dims(engine: Engine) -> dict[str, list[int]]:
    """Dims of each output without the batch axis, -1 for choices and tokens; widths are those of
    the golden answer."""
    task = engine.manifest.task
    dims: dict[str, list[int]] = {}
    for name in task.output_names:
        _, *rest = engine.golden.outputs[name].shape
        if task is Task.MULTIPLE_CHOICE:
            dims[name] = [-1]
        elif task is Task.SEQUENCE_CLASSIFICATION:
            dims[name] = rest
        else:
            dims[name] = [-1, *rest[1:]]
    return dims


def pbtxt(message: Mapping[str, Any], indent: str = "") -> str:
    """Protobuf text format. A list of mappings is one block each; other lists stand in brackets."""
    lines = []
    for name, value in message.items():
        values = value if _is_blocks(value) else [value]
        for item in values:
            if isinstance(item, Mapping):
                inner = pbtxt(item, indent + "  ")
                lines.append(
                    f"{indent}{name} {{\n{inner}{indent}}}" if inner else f"{indent}{name} {{ }}"
                )
            else:
                lines.append(f"{indent}{name}: {_scalar(item)}")
    return "".join(f"{line}\n" for line in lines)


def _is_blocks(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, Mapping) for item in value)


def _scalar(value: Any) -> str:
    if isinstance(value, Word):
        return value
    if isinstance(value, list):
        return "[ " + ", ".join(_scalar(item) for item in value) + " ]"
    # true, numbers and quoted strings are written as in JSON
    return json.dumps(value, ensure_ascii=False)


def _entries(field: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A protobuf map of string parameters."""
    entries = [{"key": key, "value": {"string_value": text}} for key, text in values.items()]
    return {field: entries} if entries else {}


def _backend_fields(backend: TritonBackend) -> dict[str, str]:
    if backend == "tensorrt":
        return {"platform": "tensorrt_plan", "default_model_filename": "model.plan"}
    if backend == "onnxruntime":
        return {"backend": backend, "default_model_filename": "model.onnx"}
    return {"backend": backend}


def _input_dims(manifest: Manifest) -> list[int]:
    choices = manifest.profile.choices
    if manifest.task is not Task.MULTIPLE_CHOICE:
        return [-1]
    return [choices.max if choices.min == choices.max else -1, -1]


def _instances(manifest: Manifest, options: ModelOptions) -> dict[str, Any]:
    kind = "KIND_CPU" if manifest.backend == "onnxruntime-cpu" else "KIND_GPU"
    group: dict[str, Any] = {"count": options.instances, "kind": Word(kind)}
    if triton_backend(manifest, own_runner=options.own_runner) == "tensorrt":
        # by number; Triton takes for each batch the profile that fits it best
        profiles = range(len(length_profiles(manifest.profile)))
        group["profile"] = [str(number) for number in profiles]
    return group


def _batching(options: ModelOptions) -> dict[str, Any]:
    return {"max_queue_delay_microseconds": options.delay_us} if options.delay_us else {}


def _python_parameters(options: ModelOptions) -> dict[str, str]:
    parameters = {} if options.threads is None else {"threads": str(options.threads)}
    if options.environment is not None:
        parameters["EXECUTION_ENV_PATH"] = options.environment
    return parameters


def _warm_up(warm: WarmUp) -> dict[str, Any]:
    inputs: Sequence[Mapping[str, Any]] = [
        {
            "key": name,
            "value": {
                "data_type": Word("TYPE_INT64"),
                "dims": list(warm.shape),
                "input_data_file": warm.file(name),
            },
        }
        for name in INPUT_NAMES
    ]
    return {"name": warm.name, "batch_size": warm.batch, "inputs": list(inputs)}
