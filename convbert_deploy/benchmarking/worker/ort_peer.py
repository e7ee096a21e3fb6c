"""ONNX Runtime on the graph that torch.onnx makes of transformers' model, nothing changed in it."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from .transformers_model import INPUTS, example, load_model, versions

_ERRORS_ONLY = 3


def convert(settings: dict[str, Any]) -> None:
    """Export to the scratch folder, and quantize for int8."""
    graph = graph_file(settings)
    if settings["precision"] != "int8":
        export(settings["model"], graph, settings["outputs"])
        return
    exported = graph.with_name("exported.onnx")
    export(settings["model"], exported, settings["outputs"])
    from onnxruntime.quantization import quantize_dynamic  # noqa: TID251  as below

    # Its defaults: int8 weights per tensor, uint8 activations with a scale for each run.
    quantize_dynamic(str(exported), str(graph))


def graph_file(settings: dict[str, Any]) -> pathlib.Path:
    return pathlib.Path(settings["scratch"]) / "model.onnx"


def load(settings: dict[str, Any]) -> OrtPeer:
    import onnxruntime as ort  # noqa: TID251  a peer is the runtime as its users get it

    graph = graph_file(settings)
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = settings["threads"]
    gpu = ["CUDAExecutionProvider"] if settings["device"] != "cpu" else []
    session = ort.InferenceSession(str(graph), options, providers=[*gpu, "CPUExecutionProvider"])
    if gpu and gpu[0] not in session.get_providers():
        raise RuntimeError("ONNX Runtime's CUDA provider did not start")
    return OrtPeer(session, graph, settings)


def export(folder: str, target: pathlib.Path, outputs: list[str]) -> None:
    """TorchScript's exporter: its graph is as fast as the newer one's or faster, and optimum's
    users get it too."""
    import torch

    inputs = example()
    axes = {0: "batch", 1: "seq"}
    per_sequence = {0: "batch"}
    model = load_model(folder)
    with torch.no_grad():
        shapes = [model(**inputs)[name].dim() for name in outputs]
        torch.onnx.export(
            model,
            (),
            str(target),
            kwargs=inputs,
            input_names=list(INPUTS),
            output_names=outputs,
            dynamic_axes={
                **dict.fromkeys(INPUTS, axes),
                **{
                    name: axes if rank == 3 or name.endswith("_logits") else per_sequence
                    for name, rank in zip(outputs, shapes, strict=True)
                },
            },
            opset_version=17,
            dynamo=False,
        )


class OrtPeer:
    def __init__(self, session: Any, graph: pathlib.Path, settings: dict[str, Any]) -> None:
        self._session, self._outputs = session, settings["outputs"]
        # The exporter leaves out inputs that the model does not use.
        self._inputs = [value.name for value in session.get_inputs()]
        self.arithmetic = settings["precision"]
        files = (graph, graph.with_name(f"{graph.name}.data"))
        self.weights_bytes = sum(path.stat().st_size for path in files if path.is_file())
        self.versions = versions("onnxruntime", "onnxruntime-gpu", "torch", "transformers")
        self.notes = ["torch.onnx.export, dynamic axes"]
        if self.arithmetic == "int8":
            self.notes.append("quantize_dynamic with its defaults")

    def prepare(self, batches: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        return [{name: batch[name] for name in self._inputs} for batch in batches]

    def infer(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self._outputs, self._session.run(self._outputs, feed), strict=True))
