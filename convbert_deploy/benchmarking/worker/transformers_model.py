"""The model every peer starts from: a Hugging Face folder, loaded by transformers."""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
from typing import Any

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def model_class_name(folder: str) -> str:
    """``ConvBertForTokenClassification`` and so on, from the folder's config.json."""
    config = json.loads((pathlib.Path(folder) / "config.json").read_text())
    return config["architectures"][0]


def load_model(folder: str, dtype: Any = None) -> Any:
    """transformers' model in evaluation mode and float32, or in ``dtype``."""
    import transformers

    model_class = getattr(transformers, model_class_name(folder))
    model = model_class.from_pretrained(folder).eval()
    return model if dtype is None else model.to(dtype)


def weights_bytes(model: Any) -> int:
    """Bytes of a torch model's parameters, each once."""
    return sum(one.numel() * one.element_size() for one in model.parameters())


def versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def example(rows: int = 2, seq: int = 16) -> dict[str, Any]:
    """Token ids to trace with: [rows, seq] int64, the last row padded."""
    import torch

    ids = torch.arange(rows * seq).reshape(rows, seq) % 97 + 1
    mask = torch.ones_like(ids)
    mask[-1, seq - 3 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def one_shape(batches: list[dict[str, Any]]) -> bool:
    """Every batch has the same shape: what a static compilation can be made for."""
    return len({batch["input_ids"].shape for batch in batches}) == 1
