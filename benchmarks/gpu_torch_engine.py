"""A torch model whose convolutions run as our CUDA kernels, called through the C ABI.

For machines with torch and nvcc but neither TensorRT nor ONNX Runtime for CUDA. Each kernel is a
torch custom operator, so the module can be captured in a CUDA graph as it is or compiled around
them; on a CPU the operators run the same kernels emulated, which is how the module is tested.
"""

from __future__ import annotations

import ctypes
import functools
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tests"))

import torch

from convbert_deploy.architecture import Task
from convbert_deploy.plugin_library import kernels_library
from convbert_deploy.traceable import Padding, TraceableModel, TraceableSelfAttention

from kernels import cases
from kernels import test_depthwise_conv1d as depthwise
from kernels import test_fused_span_dynamic_conv as fused


@functools.cache
def _kernels() -> ctypes.CDLL:
    return cases.load_kernels(kernels_library())


def _launch(name: str, params: ctypes.Structure, like: torch.Tensor) -> None:
    """On the current stream of the tensor's GPU, or emulated. Raises RuntimeError on failure."""
    if like.is_cuda:
        entry = getattr(_kernels(), f"convbert_{name}_cuda")
        entry.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        status = entry(ctypes.byref(params), torch.cuda.current_stream().cuda_stream)
    else:
        status = getattr(_kernels(), f"convbert_{name}_emulated")(ctypes.byref(params), 1)
    if status:
        raise RuntimeError(f"{name} returned status {status}")


def _depthwise(input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    output = torch.empty_like(input)
    _launch("depthwise_conv1d", depthwise.params_of(input, weight, output), input)
    return output


def _fused(
    key_conv: torch.Tensor,
    projections: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    num_heads: int,
    kernel_size: int,
    value_offset: int,
) -> torch.Tensor:
    output = torch.empty_like(key_conv)
    case = fused.Case(
        key_conv, projections, weight, bias, None, num_heads, kernel_size, 0, value_offset
    )
    _launch("fused_span_dynamic_conv", fused.params_of(case, output), key_conv)
    return output


@functools.cache
def operators() -> tuple[Any, Any]:
    """(depthwise_conv1d, fused_span_dynamic_conv), registered once."""
    made = []
    for name, function, schema in (
        ("depthwise_conv1d", _depthwise, "(Tensor input, Tensor weight) -> Tensor"),
        (
            "fused_span_dynamic_conv",
            _fused,
            "(Tensor key_conv, Tensor projections, Tensor weight, Tensor bias, int num_heads, "
            "int kernel_size, int value_offset) -> Tensor",
        ),
    ):
        operator = torch.library.custom_op(
            f"convbert_gpu::{name}", function, mutates_args=(), schema=schema
        )
        operator.register_fake(lambda first, *_: torch.empty_like(first))
        made.append(operator)
    return made[0], made[1]


class KernelSelfAttention(torch.nn.Module):
    """The mixed attention block: our two kernels, torch's products and its fused attention."""

    def __init__(self, source: TraceableSelfAttention) -> None:
        super().__init__()
        self.heads, self.taps = source.heads, source.kernel_size
        self.width = source.heads * source.head_dim
        self.projections, self.pointwise = source.projections, source.pointwise
        self.taps_by_channel = source.depthwise.weight
        generator = source.kernel_generator
        self.generator = torch.nn.Parameter(generator.weight.detach().t().contiguous())
        self.generator_bias = torch.nn.Parameter(generator.bias.detach().contiguous())
        self._depthwise, self._fused = operators()

    def forward(
        self, hidden: torch.Tensor, attention_mask: tuple[torch.Tensor, None], **_: Any
    ) -> tuple[torch.Tensor, None]:
        """As ``TraceableSelfAttention.forward`` of a graph with ``hf`` padding."""
        additive, _mask = attention_mask
        projected = self.projections(hidden)
        key_conv = self.pointwise(self._depthwise(hidden.contiguous(), self.taps_by_channel))
        convolved = self._fused(
            key_conv,
            projected,
            self.generator,
            self.generator_bias,
            self.heads,
            self.taps,
            3 * self.width,
        )
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in projected[..., : 3 * self.width].split(self.width, dim=-1)
        )
        context = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=additive
        )
        return torch.cat([context.transpose(1, 2).flatten(2), convolved], dim=-1), None


def with_kernels(eager: torch.nn.Module, task: Task) -> torch.nn.Module:
    """A copy of a transformers ConvBERT: (input_ids, attention_mask, token_type_ids), int64 (batch,
    seq), -> the task's outputs as a tuple. Padding as transformers treats it."""
    model = TraceableModel(eager, task, Padding.HF).eval()
    encoder = model.convbert if task is Task.ENCODER else model.model.convbert
    for layer in encoder.encoder.layer:
        layer.attention.self = KernelSelfAttention(layer.attention.self)
    return model
