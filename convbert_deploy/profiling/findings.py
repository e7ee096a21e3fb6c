"""What still runs as a kernel of its own and could be part of another."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from convbert_deploy.profiling.attribution import place_of
from convbert_deploy.profiling.kernels import Kernel

#: Below this share of the kernels' time a finding is not worth a line.
THRESHOLD = 0.01
_GELUS = ("Gelu", "BiasGelu", "FastGelu", "QuickGelu", "Erf")
_MOVES = {
    "Cast": "conversions between types",
    "Concat": "tensors put together by copying",
    "Expand": "tensors repeated by copying",
    "Reshape": "reshapes that became copies or calls",
    "Slice": "pieces cut out by copying",
    "Split": "tensors taken apart by copying",
    "Transpose": "axes swapped by copying",
}
_QUANTIZING = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")


@dataclasses.dataclass(frozen=True)
class Finding:
    """``code`` is stable, for programs; ``text`` is for people. ``share`` of the kernels' time."""

    code: str
    text: str
    count: int
    ms: float
    share: float

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def not_fused(
    kernels: Sequence[Kernel], function_bodies: dict[str, frozenset[str]], threshold: float
) -> list[Finding]:
    """The findings whose share reaches ``threshold``, the largest first.

    Args:
        kernels: timed, of one forward pass.
        function_bodies: for each of our operators in the graph, the operators of the function that
            stands in for it.
        threshold: share of the kernels' time, 0 to 1. Operators of ours that ran as functions are
            always told.
    """
    total = sum(kernel.ms or 0.0 for kernel in kernels)
    if not total:
        return []
    bodies = _function_bodies(kernels, function_bodies)
    inlined = {id(kernel) for _, _, members in bodies for kernel in members}
    others = [kernel for kernel in kernels if id(kernel) not in inlined]
    found = []
    for code, text, members in (*bodies, *_patterns(others)):
        spent = sum(kernel.ms or 0.0 for kernel in members)
        share = spent / total
        if members and (share >= threshold or code == "function-body"):
            found.append(Finding(code, text, len(members), spent, share))
    return sorted(found, key=lambda one: -one.ms)


_Group = tuple[str, str, list[Kernel]]


def _function_bodies(
    kernels: Sequence[Kernel], function_bodies: dict[str, frozenset[str]]
) -> list[_Group]:
    """Inlined nodes have no module's name and an operator that such a body uses."""
    ran = {kernel.op_type for kernel in kernels}
    absent = sorted(op_type for op_type in function_bodies if op_type not in ran)
    used = frozenset().union(*(function_bodies[op_type] for op_type in absent))
    members = [kernel for kernel in kernels if not kernel.named and kernel.op_type in used]
    if not members:
        return []
    text = (
        f"{' and '.join(absent)} ran as standard operators (the function in the graph), not as our "
        "kernels: build the engine without --no-plugin"
    )
    return [("function-body", text, members)]


def _patterns(kernels: Sequence[Kernel]) -> Iterable[_Group]:
    modules = _modules(kernels)

    def chosen(*op_types: str) -> list[Kernel]:
        return [kernel for kernel in kernels if kernel.op_type in op_types]

    attention = [kernel for kernel in kernels if _attends(kernel, modules)]
    adds = [kernel for kernel in chosen("Add") if kernel.named and kernel not in attention]
    bias = [one for one in adds if any(map(_multiplies, modules[_module(one)]))]
    residual = [one for one in adds if f"{_module(one)}.LayerNorm" in modules]
    scaling = [one for one in kernels if one.name.endswith("/Smooth")]
    yield (
        "attention",
        "attention as matrix products, masking and softmax, each over the whole score matrix",
        attention,
    )
    yield "bias", "bias added in a pass of its own after the matrix product", bias
    yield "residual", "residual added in a pass of its own before LayerNorm", residual
    yield "layer-norm", "LayerNorm in a pass of its own", chosen("LayerNormalization")
    yield "gelu", "GELU in a pass of its own after the matrix product", chosen(*_GELUS)
    yield (
        "quantizing",
        "scaling and quantizing in passes of their own before 8-bit products",
        [*scaling, *chosen(*_QUANTIZING)],
    )
    for op_type, text in _MOVES.items():
        yield op_type.lower(), text, chosen(op_type)


def _multiplies(op_type: str) -> bool:
    return "MatMul" in op_type or "Gemm" in op_type


def _module(kernel: Kernel) -> str:
    return kernel.name.partition("/")[0] if kernel.named else ""


def _modules(kernels: Sequence[Kernel]) -> dict[str, set[str]]:
    """Operators that ran in each module, by the module's path."""
    modules: dict[str, set[str]] = {}
    for kernel in kernels:
        if kernel.named:
            modules.setdefault(_module(kernel), set()).add(kernel.op_type)
    return modules


def _attends(kernel: Kernel, modules: dict[str, set[str]]) -> bool:
    """Products, masking and softmax in a module that computes a softmax over its scores."""
    place = place_of(kernel.name)
    return (
        place is not None
        and place.layer is not None
        and kernel.op_type in ("MatMul", "FusedMatMul", "Add", "Div", "Softmax")
        and "Softmax" in modules.get(_module(kernel), set())
    )
