"""A copy of the eager model that traces to a small, regular graph.

Replaced, on a copy: the self-attention of each layer (its convolutions become our operators, its
four projections of the same input one Linear), grouped linears (same maths, fewer transposes) and
the encoder (its mask becomes one additive constant that float16 can hold). The heads are
transformers' own.
"""

from __future__ import annotations

import copy
import enum
import math
from typing import Any

import torch
from torch import nn

from convbert_deploy.architecture import Task
from convbert_deploy.operators import depthwise_conv1d, span_dynamic_conv

#: Added to the attention scores of padded keys. exp(-30000) is 0 in every format, and the sum with
#: any plausible score stays inside float16 (65504), where transformers' finfo.min would not.
MASK_CONSTANT = -30000.0


class Padding(str, enum.Enum):
    """What padding does to the answer.

    HF equals transformers at the same padded shape, whose convolutions read padded positions.
    MASKED equals the unpadded answer whatever the batch: the input of the key convolution and the
    values of the dynamic convolution are zero at pads, exactly as beyond the end of the text.
    """

    HF = "hf"
    MASKED = "masked"

    def __str__(self) -> str:
        return self.value


class TraceableSelfAttention(nn.Module):
    """The mixed attention block (arXiv 2008.02496, section 3.3) with our operator inside."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.heads: int = source.num_attention_heads
        self.head_dim: int = source.attention_head_size
        self.kernel_size: int = source.conv_kernel_size
        branches = (source.query, source.key, source.value, source.conv_out_layer)
        self.projections = _linear(
            torch.cat([b.weight for b in branches]), torch.cat([b.bias for b in branches])
        )
        separable = source.key_conv_attn_layer
        self.depthwise = TraceableDepthwiseConv1D(separable.depthwise)
        self.pointwise = _linear(separable.pointwise.weight.squeeze(-1), separable.bias.squeeze(-1))
        self.kernel_generator = source.conv_kernel_layer
        self._convolve = span_dynamic_conv.torch_operator()

    def forward(
        self,
        hidden: torch.Tensor,
        attention_mask: tuple[torch.Tensor, torch.Tensor | None],
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """hidden (batch, seq, hidden); attention_mask = (additive (batch, 1, 1, seq), int64 (batch,
        seq) or None) -> ((batch, seq, hidden), None)."""
        additive, mask = attention_mask
        query, key, value, conv_value = self.projections(hidden).split(
            self.heads * self.head_dim, dim=-1
        )
        key_conv = self.pointwise(self.depthwise(hidden, mask))
        kernel_logits = self.kernel_generator(key_conv * query)
        convolved = self._convolve(conv_value, kernel_logits, mask, self.heads, self.kernel_size)
        scores = self._by_head(query) @ self._by_head(key).transpose(-1, -2)
        probabilities = torch.softmax(scores / math.sqrt(self.head_dim) + additive, dim=-1)
        context = (probabilities @ self._by_head(value)).transpose(1, 2).flatten(2)
        return torch.cat([context, convolved], dim=-1), None

    def _by_head(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)


class TraceableDepthwiseConv1D(nn.Module):
    """The depthwise half of SeparableConv1D without leaving (batch, seq, channels) layout."""

    def __init__(self, source: nn.Conv1d) -> None:
        super().__init__()
        # (channels, 1, K) -> (K, channels): a tap is then one contiguous row
        self.weight = nn.Parameter(source.weight.detach().squeeze(1).t().contiguous())
        self._convolve = depthwise_conv1d.torch_operator()

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """(batch, seq, channels), int64 (batch, seq) or None -> (batch, seq, channels)."""
        return self._convolve(hidden, self.weight, mask)


class TraceableGroupedLinear(nn.Module):
    """GroupedLinearLayer (section 3.4) without leaving (batch, ..., features) layout."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.groups: int = source.num_groups
        self.weight, self.bias = source.weight, source.bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(batch, seq, in) -> (batch, seq, out); weight (groups, in/groups, out/groups)."""
        grouped = hidden.unflatten(-1, (self.groups, -1)).transpose(1, 2)
        return (grouped @ self.weight).transpose(1, 2).flatten(2) + self.bias


class TraceableEncoder(nn.Module):
    """ConvBertModel without transformers' mask machinery; the sub-modules are its own."""

    def __init__(self, source: nn.Module, padding: Padding, repair_last_token: bool) -> None:
        super().__init__()
        #: the multiple-choice head reads the last position, which may be a pad
        self.repair_last_token = repair_last_token
        self.embeddings = source.embeddings
        self.embeddings_project = getattr(source, "embeddings_project", None)
        self.encoder = source.encoder
        self.padding = padding

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor,
        **_: Any,
    ) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        hidden = self._embed(input_ids, token_type_ids)
        if self.embeddings_project is not None:
            hidden = self.embeddings_project(hidden)
        keep = attention_mask.to(hidden.dtype)
        additive = ((1.0 - keep) * MASK_CONSTANT)[:, None, None, :]
        mask = attention_mask if self.padding is Padding.MASKED else None
        for layer in self.encoder.layer:
            hidden = layer(hidden, (additive, mask))
        if self.repair_last_token:
            last = attention_mask.sum(dim=1)[:, None, None] - 1
            picked = hidden.gather(1, last.expand(-1, 1, hidden.shape[-1]))
            hidden = torch.cat([hidden, picked], dim=1)
        return BaseModelOutput(last_hidden_state=hidden)

    def _embed(self, input_ids: torch.Tensor, token_type_ids: torch.Tensor) -> torch.Tensor:
        tables = self.embeddings
        positions = tables.position_embeddings.weight[: input_ids.shape[1]]
        words = tables.word_embeddings(input_ids)
        return tables.LayerNorm(words + positions + tables.token_type_embeddings(token_type_ids))


class TraceableModel(nn.Module):
    """Three tensors in, the task's outputs out; what ``torch.export`` sees."""

    def __init__(self, eager: nn.Module, task: Task, padding: Padding) -> None:
        super().__init__()
        self.task = task
        model = copy.deepcopy(eager)
        encoder = model if task is Task.ENCODER else model.convbert
        for layer in encoder.encoder.layer:
            layer.attention.self = TraceableSelfAttention(layer.attention.self)
            for block in (layer.intermediate, layer.output):
                if not isinstance(block.dense, nn.Linear):
                    block.dense = TraceableGroupedLinear(block.dense)
        repair = padding is Padding.MASKED and task is Task.MULTIPLE_CHOICE
        traceable = TraceableEncoder(encoder, padding, repair)
        if task is Task.ENCODER:
            self.convbert = traceable
        else:
            model.convbert = traceable
            self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        model = self.convbert if self.task is Task.ENCODER else self.model
        outputs = model(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        )
        return tuple(outputs[name] for name in self.task.output_names)


def _linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight, linear.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    return linear
