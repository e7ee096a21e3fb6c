"""What patterns of nodes are matched with: each step either finds its node or says what is there."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


class MismatchError(Exception):
    """A subgraph is not what a pass looks for; the text says where and what was expected. Passes
    catch it: a user sees it as a reason, never as an error."""


def produced(value: ir.Value | None, op_type: str, domain: str = "") -> ir.Node:
    """The node of this operator that makes ``value``."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != op_type or node.domain != domain:
        raise MismatchError(f"{named(value)} comes from {kind(node)}, expected {op_type}")
    return node


def reader(value: ir.Value, op_type: str) -> ir.Node:
    """The one node that reads ``value``."""
    nodes = list(dict.fromkeys(node for node, _ in value.uses()))
    if len(nodes) != 1 or nodes[0].op_type != op_type:
        found = ", ".join(kind(node) for node in nodes) or "nothing"
        raise MismatchError(f"{named(value)} is read by {found}, expected {op_type}")
    return nodes[0]


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The values of an initializer, None for everything else."""
    if value is None or value.const_value is None or value.producer() is not None:
        return None
    return value.const_value.numpy()


def needed(value: ir.Value | None) -> np.ndarray:
    """The values of what must be an initializer."""
    array = constant(value)
    if array is None:
        raise MismatchError(f"{named(value)} is computed, expected a constant")
    return array


def with_constant(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    """(computed input, constant input) of a node with two inputs, in either order."""
    first, second = node.inputs
    if constant(first) is not None:
        first, second = second, first
    if first is None or second is None or constant(second) is None or constant(first) is not None:
        raise MismatchError(f"{node.name} has no input that is constant, expected one of two")
    return first, second


def check(holds: bool, node: ir.Node, expected: str) -> None:
    """Raise unless ``holds``; ``expected``: what ``node`` should be."""
    if not holds:
        raise MismatchError(f"{node.name or node.op_type}: expected {expected}")


def integers(node: ir.Node, name: str) -> list[int]:
    """An attribute of integers, empty where it is absent."""
    attribute = node.attributes.get(name)
    return [] if attribute is None else list(attribute.as_ints())


def integer(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def transposed(value: ir.Value | None, order: list[int]) -> ir.Value | None:
    """The input of the Transpose that makes ``value``."""
    node = produced(value, "Transpose")
    check(integers(node, "perm") == order, node, f"perm {order}")
    return node.inputs[0]


def reshaped(value: ir.Value | None, target: list[int]) -> ir.Value:
    """The input of the Reshape to ``target`` that makes ``value``."""
    node = produced(value, "Reshape")
    found = needed(node.inputs[1]).tolist()
    check(found == target, node, f"a Reshape to {target}, found {found}")
    assert node.inputs[0] is not None
    return node.inputs[0]


def between(begin: list[ir.Value], end: ir.Value) -> set[ir.Node]:
    """All nodes on the way back from ``end`` to the values in ``begin``, and to initializers."""
    stops = set(begin)
    found: set[ir.Node] = set()
    waiting = [end]
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if value in stops or node is None or node in found:
            continue
        found.add(node)
        waiting += [source for source in node.inputs if source is not None]
    return found


def named(value: ir.Value | None) -> str:
    return "an absent input" if value is None else str(value.name)


def kind(node: ir.Node | None) -> str:
    return "no node" if node is None else node.op_type
