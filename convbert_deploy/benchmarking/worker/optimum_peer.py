"""optimum-intel's OpenVINO models, as ``OVModelFor...from_pretrained(export=True)`` makes them."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from .openvino_peer import computed_bytes, for_batches, properties
from .refusal import CannotRun
from .transformers_model import INPUTS, model_class_name, versions

#: optimum-intel's class for each head of transformers' ConvBERT.
_CLASSES = {
    "ConvBertModel": "OVModelForFeatureExtraction",
    "ConvBertForMaskedLM": "OVModelForMaskedLM",
    "ConvBertForSequenceClassification": "OVModelForSequenceClassification",
    "ConvBertForTokenClassification": "OVModelForTokenClassification",
    "ConvBertForQuestionAnswering": "OVModelForQuestionAnswering",
}
_FILE = "openvino_model.xml"


def convert(settings: dict[str, Any]) -> None:
    """Export to the scratch folder."""
    # load_in_8bit=False: it would compress the weights of a large model by itself.
    model = _class(settings).from_pretrained(
        settings["model"], export=True, compile=False, load_in_8bit=False
    )
    model.save_pretrained(settings["scratch"])


def load(settings: dict[str, Any]) -> OptimumPeer:
    config = {key: str(value) for key, value in properties(settings).items()}
    model = _class(settings).from_pretrained(settings["scratch"], compile=False, ov_config=config)
    return OptimumPeer(model, settings)


def _class(settings: dict[str, Any]) -> Any:
    import optimum.intel

    name = model_class_name(settings["model"])
    if name not in _CLASSES:
        raise CannotRun(f"optimum-intel has no class for {name}")
    return getattr(optimum.intel, _CLASSES[name])


class OptimumPeer:
    def __init__(self, model: Any, settings: dict[str, Any]) -> None:
        import openvino

        self._core, self._model, self._settings = openvino.Core(), model, settings
        self._outputs = settings["outputs"]
        self.arithmetic = settings["precision"]
        self.weights_bytes = computed_bytes(model.model, self.arithmetic)
        self.versions = versions("optimum", "optimum-intel", "openvino", "nncf", "transformers")
        self.notes: list[str] = []

    def prepare(self, batches: list[dict[str, np.ndarray]]) -> list[dict[str, Any]]:
        import torch

        file = pathlib.Path(self._settings["scratch"]) / _FILE
        self._model.model, self.notes = for_batches(self._core, file, batches, self._settings)
        self.weights_bytes = computed_bytes(self._model.model, self.arithmetic)
        self._model.request = self._model.compiled_model = None
        self._model.compile()
        return [{name: torch.from_numpy(batch[name]) for name in INPUTS} for batch in batches]

    def infer(self, feed: dict[str, Any]) -> dict[str, np.ndarray]:
        answer = self._model(**feed)
        return {name: answer[name].numpy() for name in self._outputs}
