"""What a ConvBERT is made of, and how to read it off the shapes of its tensors.

Tensor names are those of transformers' ConvBERT, with the ``convbert.`` prefix kept. Only the
activation, the LayerNorm epsilon and the pad id cannot be seen in the weights; they take the values
every published checkpoint uses unless a config says otherwise.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Mapping
from typing import Any

from convbert_deploy.errors import CheckpointError

Shape = tuple[int, ...]


class Task(str, enum.Enum):
    """What the head computes; detected from the weights."""

    ENCODER = "encoder"
    MASKED_LM = "masked-lm"
    SEQUENCE_CLASSIFICATION = "sequence-classification"
    TOKEN_CLASSIFICATION = "token-classification"
    QUESTION_ANSWERING = "question-answering"
    MULTIPLE_CHOICE = "multiple-choice"

    def __str__(self) -> str:
        return self.value

    @property
    def output_names(self) -> tuple[str, ...]:
        if self is Task.ENCODER:
            return ("last_hidden_state",)
        if self is Task.QUESTION_ANSWERING:
            return ("start_logits", "end_logits")
        return ("logits",)

    @property
    def input_axes(self) -> tuple[str, ...]:
        """Names of the axes of every input."""
        if self is Task.MULTIPLE_CHOICE:
            return ("batch", "choices", "seq")
        return ("batch", "seq")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Sizes of one ConvBERT. Field names are transformers' config names.

    ``num_attention_heads`` and ``head_ratio`` are the config's; the model itself has ``heads``
    attention heads and as many convolution heads, each ``head_dim`` wide.
    """

    vocab_size: int
    embedding_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_ratio: int
    intermediate_size: int
    num_groups: int
    conv_kernel_size: int
    max_position_embeddings: int
    type_vocab_size: int
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0

    @property
    def heads(self) -> int:
        """Heads of the convolution branch (and, equally many, of the attention branch)."""
        return max(1, self.num_attention_heads // self.head_ratio)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads // 2

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Architecture:
        return cls(**data)

    def describe(self) -> str:
        """One line for a person."""
        return (
            f"{self.num_hidden_layers} layers, hidden {self.hidden_size}, embedding "
            f"{self.embedding_size}, {self.heads} attention + {self.heads} convolution heads x "
            f"{self.head_dim}, kernel {self.conv_kernel_size}, intermediate "
            f"{self.intermediate_size} (groups {self.num_groups}), vocabulary {self.vocab_size}, "
            f"positions {self.max_position_embeddings}, {self.hidden_act}, "
            f"eps {self.layer_norm_eps:g}, pad id {self.pad_token_id}"
        )


_SELF_ATTENTION = "convbert.encoder.layer.0.attention.self."
_LAYER = re.compile(r"convbert\.encoder\.layer\.(\d+)\.")


def architecture_from_shapes(shapes: Mapping[str, Shape]) -> Architecture:
    """Read the architecture off canonical tensor names and shapes.

    Raises:
        CheckpointError: not a ConvBERT, a tensor that fixes a size is missing, or even kernel size.
    """

    def shape(name: str, rank: int) -> Shape:
        if name not in shapes:
            raise CheckpointError(
                f"tensor {name} is missing",
                hint="convbert-deploy inspect CHECKPOINT lists what the file holds",
            )
        if len(shapes[name]) != rank:
            raise CheckpointError(
                f"tensor {name} has shape {list(shapes[name])}, expected rank {rank}"
            )
        return shapes[name]

    if not any(name.endswith(".conv_kernel_layer.weight") for name in shapes):
        raise CheckpointError(
            "not a ConvBERT: no tensor is called ...attention.self.conv_kernel_layer.weight",
            hint="convbert-deploy inspect CHECKPOINT lists what the file holds",
        )
    vocab_size, embedding_size = shape("convbert.embeddings.word_embeddings.weight", 2)
    kernel_size = shape(f"{_SELF_ATTENTION}key_conv_attn_layer.depthwise.weight", 3)[-1]
    kernels, _ = shape(f"{_SELF_ATTENTION}conv_kernel_layer.weight", 2)
    _, hidden_size = shape(f"{_SELF_ATTENTION}query.weight", 2)
    if kernel_size % 2 == 0:
        raise CheckpointError(
            f"convolution kernel size {kernel_size} is even: the model's window has no centre and "
            "transformers cannot run it either; expected an odd size"
        )
    if kernels % kernel_size:
        raise CheckpointError(
            f"tensor {_SELF_ATTENTION}conv_kernel_layer.weight has {kernels} rows, expected a "
            f"multiple of the kernel size {kernel_size}"
        )
    heads = kernels // kernel_size
    layers = {int(match[1]) for name in shapes if (match := _LAYER.match(name))}
    if layers != set(range(len(layers))):
        absent = sorted(set(range(max(layers) + 1)) - layers)
        raise CheckpointError(f"encoder layers {absent} are missing: found {sorted(layers)}")
    groups, intermediate_size = _feed_forward(shapes, hidden_size)
    return Architecture(
        vocab_size=vocab_size,
        embedding_size=embedding_size,
        hidden_size=hidden_size,
        num_hidden_layers=len(layers),
        num_attention_heads=heads * 2,
        head_ratio=2,
        intermediate_size=intermediate_size,
        num_groups=groups,
        conv_kernel_size=kernel_size,
        max_position_embeddings=shape("convbert.embeddings.position_embeddings.weight", 2)[0],
        type_vocab_size=shape("convbert.embeddings.token_type_embeddings.weight", 2)[0],
    )


def _feed_forward(shapes: Mapping[str, Shape], hidden_size: int) -> tuple[int, int]:
    """(num_groups, intermediate_size) from the first layer's up projection."""
    name = "convbert.encoder.layer.0.intermediate.dense.weight"
    dims = shapes.get(name)
    if dims is not None and len(dims) == 2:
        return 1, dims[0]
    if dims is not None and len(dims) == 3 and dims[0] * dims[1] == hidden_size:
        return dims[0], dims[0] * dims[2]
    raise CheckpointError(
        f"tensor {name} has shape {None if dims is None else list(dims)}, expected [intermediate, "
        f"{hidden_size}] or [groups, {hidden_size}/groups, intermediate/groups]"
    )


def task_from_shapes(shapes: Mapping[str, Shape]) -> Task:
    """Detect the head from canonical tensor names and shapes.

    A classifier of one row is read as multiple choice; a one-label token classifier has the same
    tensors and needs ``--task``.
    """
    if "classifier.out_proj.weight" in shapes:
        return Task.SEQUENCE_CLASSIFICATION
    if "qa_outputs.weight" in shapes:
        return Task.QUESTION_ANSWERING
    if "generator_predictions.dense.weight" in shapes:
        return Task.MASKED_LM
    if "classifier.weight" in shapes:
        one_row = shapes["classifier.weight"][0] == 1
        return Task.MULTIPLE_CHOICE if one_row else Task.TOKEN_CLASSIFICATION
    return Task.ENCODER


def num_labels_from_shapes(task: Task, shapes: Mapping[str, Shape]) -> int | None:
    """Rows of the head's last linear layer; None where the task has no labels."""
    name = {
        Task.SEQUENCE_CLASSIFICATION: "classifier.out_proj.weight",
        Task.TOKEN_CLASSIFICATION: "classifier.weight",
    }.get(task)
    return shapes[name][0] if name and name in shapes else None
