"""Faults in the convolution that every comparison must catch, for eager and ONNX models."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

#: Faults in the span-based dynamic convolution that every comparison must catch.
SABOTAGES = (
    "uniform-kernel",
    "reversed-taps",
    "rolled-heads",
    "shift-by-one",
    "depthwise-dropped",
)
#: Those that can be put into any graph with SpanDynamicConv nodes.
ONNX_SABOTAGES = SABOTAGES[:4]


@contextlib.contextmanager
def sabotage(model: Any, kind: str) -> Iterator[Any]:
    """Put one fault into the convolution of every layer of an eager model, inside the block.

    Hooks on the modules that feed the convolution; nothing global is patched.

    Raises:
        ValueError: unknown kind, or a fault that is none in this shape (rolling a single head,
            reversing a single tap).
    """
    if kind not in SABOTAGES:
        raise ValueError(f"unknown sabotage {kind!r}: expected one of {', '.join(SABOTAGES)}")
    encoder = getattr(model, "convbert", model).encoder
    hooks = []
    for layer in encoder.layer:
        attention = layer.attention.self
        heads, taps = attention.num_attention_heads, attention.conv_kernel_size
        _require_visible(kind, heads, taps)
        target = {
            "depthwise-dropped": attention.key_conv_attn_layer.depthwise,
            "shift-by-one": attention.conv_out_layer,
        }.get(kind, attention.conv_kernel_layer)
        hooks.append(target.register_forward_hook(_torch_fault(kind, heads, taps)))
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def _require_visible(kind: str, heads: int, taps: int) -> None:
    if (kind == "rolled-heads" and heads == 1) or (
        kind in ("reversed-taps", "uniform-kernel") and taps == 1
    ):
        raise ValueError(f"{kind} changes nothing with {heads} heads and {taps} taps")


def _torch_fault(kind: str, heads: int, taps: int) -> Callable[..., Any]:
    import torch

    def fault(module: Any, inputs: Any, output: Any) -> Any:
        if kind in ("uniform-kernel", "depthwise-dropped"):
            return output * 0
        if kind == "shift-by-one":
            return torch.cat([output[:, 1:], output[:, :1] * 0], dim=1)
        grouped = output.unflatten(-1, (heads, taps))
        changed = grouped.flip(-1) if kind == "reversed-taps" else grouped.roll(1, -2)
        return changed.flatten(-2)

    return fault


def sabotage_onnx(model: Any, kind: str) -> Any:
    """A copy of an ONNX ModelProto with one fault before every SpanDynamicConv node.

    The nodes put in are typed like their input, so the graph may be fp32, fp16 or bf16.

    Raises:
        ValueError: unknown kind, no such node, or a fault that is none in this shape.
    """
    import onnx

    if kind not in ONNX_SABOTAGES:
        raise ValueError(f"unknown sabotage {kind!r}: expected one of {', '.join(ONNX_SABOTAGES)}")
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    nodes: list[Any] = []
    found = 0
    for node in changed.graph.node:
        if node.domain == "convbert" and node.op_type == "SpanDynamicConv":
            sizes = {
                attribute.name: attribute.i
                for attribute in node.attribute
                if attribute.name in ("num_heads", "kernel_size")
            }
            position = 0 if kind == "shift-by-one" else 1
            nodes += _onnx_fault(
                kind,
                node.input[position],
                f"sabotage_{found}",
                (sizes["num_heads"], sizes["kernel_size"]),
            )
            node.input[position] = f"sabotage_{found}"
            found += 1
        nodes.append(node)
    if not found:
        raise ValueError("the graph has no convbert.SpanDynamicConv node to sabotage")
    nodes = [_copy_node(node) for node in nodes]
    del changed.graph.node[:]
    changed.graph.node.extend(nodes)
    return changed


def _copy_node(node: Any) -> Any:
    import onnx

    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy


def _onnx_fault(kind: str, source: str, target: str, sizes: tuple[int, int]) -> list[Any]:
    """Nodes computing ``target`` = ``source`` with the fault; sizes are (heads, taps)."""
    import onnx

    heads, taps = sizes
    _require_visible(kind, heads, taps)
    nodes: list[Any] = []

    def add(op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(onnx.helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def integers(name: str, *values: int) -> str:
        array = onnx.numpy_helper.from_array(np.asarray(values, np.int64))
        return add("Constant", [], f"{target}_{name}", value=array)

    if kind == "uniform-kernel":
        # x - x is zero in any float type, without knowing which.
        add("Sub", [source, source], target)
    elif kind == "shift-by-one":
        bounds = [integers("one", 1), integers("end", 2**31 - 1), integers("axis", 1)]
        longer = add("Pad", [source, integers("pads", 0, 0, 0, 0, 1, 0)], f"{target}_longer")
        add("Slice", [longer, *bounds], target)
    else:
        grouped_shape = integers("grouped_shape", 0, 0, heads, taps)
        grouped = add("Reshape", [source, grouped_shape], f"{target}_grouped")
        reverse = kind == "reversed-taps"
        order = (
            range(taps - 1, -1, -1) if reverse else [(head - 1) % heads for head in range(heads)]
        )
        picked = add(
            "Gather",
            [grouped, integers("order", *order)],
            f"{target}_picked",
            axis=3 if reverse else 2,
        )
        add("Reshape", [picked, integers("flat_shape", 0, 0, heads * taps)], target)
    return nodes
