"""Models, batches, clocks and faults that the tests share.

A randomly initialised ConvBERT cannot test its convolution: with transformers' initialisation the
softmax over the taps is almost uniform, so a wrong convolution moves the logits by less than a
plausible tolerance. ``realistic_model`` therefore draws weights at the scale of trained ones, and
``sabotage`` / ``sabotage_onnx`` put in the faults that every comparison must catch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from convbert_deploy.architecture import Architecture, Task, architecture_from_shapes
from convbert_deploy.backends.base import Batch

from faults import ONNX_SABOTAGES, SABOTAGES, sabotage, sabotage_onnx

__all__ = [
    "ODD_SHAPES",
    "ONNX_SABOTAGES",
    "SABOTAGES",
    "SIZES",
    "FakeTimer",
    "FixedRunner",
    "ModuleRunner",
    "architecture_of",
    "default_model",
    "fake_candidate_runner",
    "make_config",
    "realistic_model",
    "sabotage",
    "sabotage_onnx",
]

#: The three published sizes; everything not named here is the config class's default.
SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 256,
        "embedding_size": 128,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
    },
    "medium-small": {
        "hidden_size": 384,
        "embedding_size": 128,
        "num_attention_heads": 8,
        "intermediate_size": 1536,
        "num_groups": 2,
    },
    "base": {
        "hidden_size": 768,
        "embedding_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
}


def _tiny(**changes: Any) -> dict[str, Any]:
    tiny = {
        "hidden_size": 64,
        "embedding_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "vocab_size": 500,
        "max_position_embeddings": 128,
    }
    return tiny | changes


#: Shapes seen in public checkpoints, and the corners around them; two layers each, so quick to run.
ODD_SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _tiny(),
    "head-dim-8": _tiny(hidden_size=32),
    "head-dim-32": _tiny(hidden_size=128),
    "head-dim-128": _tiny(hidden_size=512),
    "intermediate-37": _tiny(intermediate_size=37),
    "groups-2": _tiny(num_groups=2),
    "vocab-96000": _tiny(vocab_size=96000, embedding_size=16),
    "positions-26": _tiny(max_position_embeddings=26),
    "embedding-larger": _tiny(embedding_size=96),
    "embedding-equal": _tiny(embedding_size=64),
    "one-type": _tiny(type_vocab_size=1),
    "one-head": _tiny(num_attention_heads=2),
    "head-ratio-4": _tiny(num_attention_heads=8, head_ratio=4),
    "kernel-1": _tiny(conv_kernel_size=1),
    "kernel-3": _tiny(conv_kernel_size=3),
    "kernel-5": _tiny(conv_kernel_size=5),
    "kernel-15": _tiny(conv_kernel_size=15),
}

_MODEL_CLASSES = {
    Task.ENCODER: "ConvBertModel",
    Task.MASKED_LM: "ConvBertForMaskedLM",
    Task.SEQUENCE_CLASSIFICATION: "ConvBertForSequenceClassification",
    Task.TOKEN_CLASSIFICATION: "ConvBertForTokenClassification",
    Task.QUESTION_ANSWERING: "ConvBertForQuestionAnswering",
    Task.MULTIPLE_CHOICE: "ConvBertForMultipleChoice",
}


def make_config(size: str | Mapping[str, Any], *, layers: int | None = None, **changes: Any) -> Any:
    """A transformers ConvBertConfig; ``size`` names a row of SIZES or ODD_SHAPES, or is one.

    The pad id is 0 as in every published checkpoint (the config class says 1).
    """
    from transformers import ConvBertConfig

    shape = {**SIZES, **ODD_SHAPES}[size] if isinstance(size, str) else dict(size)
    depth = {} if layers is None else {"num_hidden_layers": layers}
    return ConvBertConfig(**{"pad_token_id": 0, "num_labels": 3, **shape, **depth, **changes})


def default_model(
    size: str | Mapping[str, Any],
    task: Task = Task.SEQUENCE_CLASSIFICATION,
    seed: int = 0,
    *,
    layers: int | None = None,
    **changes: Any,
) -> Any:
    """An eager model as transformers initialises it: blind to faults in the convolution."""
    import torch
    import transformers

    if task is Task.QUESTION_ANSWERING:
        changes["num_labels"] = 2  # start and end; the head splits its output in two
    config = make_config(size, layers=layers, **changes)
    # Seeded without touching the generator of the caller.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(transformers, _MODEL_CLASSES[task])(config).eval()


def realistic_model(
    size: str | Mapping[str, Any],
    task: Task = Task.SEQUENCE_CLASSIFICATION,
    seed: int = 0,
    *,
    layers: int | None = None,
    **changes: Any,
) -> Any:
    """An eager fp32 model whose weights have the scale of trained ones.

    Linear layers 1/sqrt(fan_in), query and key 1.5 times that, depthwise 1/sqrt(K), embeddings
    0.05, biases 0.1, LayerNorm weights 1 +- 0.1.
    """
    import torch

    model = default_model(size, task, seed, layers=layers, **changes)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale, offset = _weight_scale(name, parameter.shape)
            parameter.copy_(offset + scale * noise)
    return model


def _weight_scale(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """(standard deviation, mean) of one parameter."""
    if "LayerNorm.weight" in name:
        return 0.1, 1.0
    if name.endswith("bias"):
        return 0.1, 0.0
    if "depthwise" in name:
        return 1 / math.sqrt(shape[-1]), 0.0
    if "_embeddings.weight" in name:
        return 0.05, 0.0
    sharper = 1.5 if ".query." in name or ".key." in name else 1.0
    # Linear [out, in], pointwise [out, in, 1] and grouped [groups, in, out]: fan-in is axis 1.
    return sharper / math.sqrt(shape[1]), 0.0


def architecture_of(model: Any) -> Architecture:
    """The Architecture of an eager model, read off its tensors."""
    tensors = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if not any(name.startswith("convbert.") for name in tensors):
        tensors = {f"convbert.{name}": shape for name, shape in tensors.items()}
    return architecture_from_shapes(tensors)


class ModuleRunner:
    """An eager model as a Runner. ``dtype`` names the torch type it computes in.

    With a half type this is the control: how far plain torch itself is off in that type.
    """

    input_names = ("input_ids", "attention_mask", "token_type_ids")

    def __init__(self, model: Any, name: str = "eager", dtype: str = "float32") -> None:
        import copy

        import torch

        kind = type(model).__name__
        task = next(task for task, cls in _MODEL_CLASSES.items() if cls == kind)
        self.name = name
        self.output_names = task.output_names
        # A sabotaged model must stay the very object that carries the fault.
        self._model = (
            model if dtype == "float32" else copy.deepcopy(model).to(getattr(torch, dtype))
        )

    def __enter__(self) -> ModuleRunner:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def infer(self, batch: Batch) -> dict[str, np.ndarray]:
        import torch

        with torch.inference_mode():
            outputs = self._model(**{key: torch.from_numpy(batch[key]) for key in batch})
        return {name: outputs[name].float().numpy() for name in self.output_names}


class FixedRunner:
    """A Runner that returns what ``answer(batch)`` returns."""

    input_names = ("input_ids", "attention_mask", "token_type_ids")

    def __init__(self, name: str, answer: Callable[[Batch], dict[str, np.ndarray]]) -> None:
        self.name = name
        self.output_names = ("logits",)
        self._answer = answer

    def __enter__(self) -> FixedRunner:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def infer(self, batch: Batch) -> dict[str, np.ndarray]:
        return self._answer(batch)


class FakeTimer:
    """A clock that only ``advance`` moves: a test of the benchmark times nothing."""

    def __init__(self) -> None:
        self.now_ms = 0.0

    def advance(self, milliseconds: float) -> None:
        self.now_ms += milliseconds

    def time_ms(self, call: Callable[[], object]) -> float:
        before = self.now_ms
        call()
        return self.now_ms - before


def fake_candidate_runner(
    name: str, timer: FakeTimer, costs_ms: Iterator[float], log: list[str] | None = None
) -> FixedRunner:
    """A Runner whose every call takes the next of ``costs_ms`` on ``timer`` and is noted in log."""

    def answer(batch: Batch) -> dict[str, np.ndarray]:
        timer.advance(next(costs_ms))
        if log is not None:
            log.append(name)
        return {"logits": np.zeros((batch["input_ids"].shape[0], 2), np.float32)}

    return FixedRunner(name, answer)
