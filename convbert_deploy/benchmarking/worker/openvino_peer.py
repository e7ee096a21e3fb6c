"""OpenVINO on transformers' model, or a graph, as ``openvino.convert_model`` reads it, for one static
shape.

int8 is NNCF's post-training quantization, made for each shape: on dynamic shapes it takes the
sequence for a channel of some activations, and the model then runs at no other length.
"""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from .apart import run_apart
from .refusal import CannotRun
from .transformers_model import INPUTS, example, load_model, one_shape, versions

#: Batches that NNCF's statistics are taken on: the case's own, and others of its shape.
_CALIBRATION_BATCHES = 32
_HINTS = {"fp32": "f32", "bf16": "bf16"}


def convert(settings: dict[str, Any]) -> None:
    """transformers' model, or the graph given instead, to ``model.xml`` in the scratch folder, weights
    in float32."""
    import openvino

    if settings.get("graph"):
        model = openvino.convert_model(settings["graph"])
    else:
        model = openvino.convert_model(load_model(settings["model"]), example_input=example())
    openvino.save_model(model, model_file(settings), compress_to_fp16=False)


def load(settings: dict[str, Any]) -> OpenVinoPeer:
    import openvino

    return OpenVinoPeer(openvino.Core(), settings)


def model_file(settings: dict[str, Any]) -> pathlib.Path:
    return pathlib.Path(settings["scratch"]) / "model.xml"


def properties(settings: dict[str, Any]) -> dict[str, Any]:
    """How the CPU plugin is asked to run."""
    chosen: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": settings["threads"],
        "NUM_STREAMS": 1,
    }
    # What int8 leaves unquantized runs in the plugin's own choice (bf16 where the CPU has AMX).
    if settings["precision"] in _HINTS:
        chosen["INFERENCE_PRECISION_HINT"] = _HINTS[settings["precision"]]
    return chosen


def for_batches(
    core: Any, file: pathlib.Path, batches: list[dict[str, np.ndarray]], settings: dict[str, Any]
) -> tuple[Any, list[str]]:
    """The model for these batches (static where they have one shape; quantized for int8), and what
    was done, for people.

    Raises:
        CannotRun: int8 for batches of several shapes.
    """
    fixed = one_shape(batches)
    if settings["precision"] != "int8":
        model = core.read_model(file)
        if not fixed:
            return model, ["compiled for any shape"]
        reshape(model, batches[0])
        return model, ["compiled for each point's shape"]
    if not fixed:
        raise CannotRun("NNCF's int8 needs one static shape, the texts have many")
    scratch = pathlib.Path(settings["scratch"])
    np.savez(scratch / "batch.npz", **batches[0])
    run_apart("openvino_peer:quantize", {**settings, "file": str(file)})
    notes = ["quantized by NNCF and compiled for each point's shape"]
    return core.read_model(scratch / "quantized.xml"), notes


def quantize(settings: dict[str, Any]) -> None:
    """``nncf.quantize`` with its settings for transformers, on random ids of the case's shape."""
    import nncf
    import openvino

    scratch = pathlib.Path(settings["scratch"])
    model = openvino.Core().read_model(settings["file"])
    with np.load(scratch / "batch.npz") as stored:
        batch = {name: stored[name] for name in INPUTS}
    reshape(model, batch)
    rng = np.random.default_rng(0)
    shape, high = batch["input_ids"].shape, settings["vocabulary"]
    feeds = [batch] + [
        {**batch, "input_ids": rng.integers(0, high, shape, dtype=np.int64)}
        for _ in range(_CALIBRATION_BATCHES - 1)
    ]
    result = nncf.quantize(
        model,
        nncf.Dataset(feeds),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(feeds),
    )
    openvino.save_model(result, scratch / "quantized.xml", compress_to_fp16=False)


def reshape(model: Any, batch: dict[str, np.ndarray]) -> None:
    shape = list(batch["input_ids"].shape)
    model.reshape({port.get_any_name(): shape for port in model.inputs})


def computed_bytes(model: Any, precision: str) -> int:
    """Bytes of an ``openvino.Model``'s constants as the plugin keeps them: for bf16 it converts
    them when it compiles."""
    constants = (op for op in model.get_ops() if op.get_type_name() == "Constant")
    stored = sum(op.get_byte_size() for op in constants)
    return stored // 2 if precision == "bf16" else stored


class OpenVinoPeer:
    def __init__(self, core: Any, settings: dict[str, Any]) -> None:
        self._core, self._settings = core, settings
        self._outputs = settings["outputs"]
        self._compiled: Any = None
        self.arithmetic = settings["precision"]
        model = core.read_model(model_file(settings))
        self.weights_bytes = computed_bytes(model, self.arithmetic)
        self.versions = versions("openvino", "nncf", "torch", "transformers")
        self.notes: list[str] = []

    def prepare(self, batches: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        self._compiled = None
        file = model_file(self._settings)
        model, self.notes = for_batches(self._core, file, batches, self._settings)
        self.weights_bytes = computed_bytes(model, self.arithmetic)
        self._compiled = self._core.compile_model(model, "CPU", properties(self._settings))
        names = {port.get_any_name() for port in model.inputs}
        return [{name: batch[name] for name in INPUTS if name in names} for batch in batches]

    def infer(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        answer = self._compiled(feed)
        return {name: answer[index] for index, name in enumerate(self._outputs)}
