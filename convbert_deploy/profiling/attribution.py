"""Which part of the model a node belongs to."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from convbert_deploy.profiling.recording import NodeRun

_LAYER = re.compile(r"(?:^|.*[./])layer\.(\d+)(?:[./](.*))?$")
#: Fusions of ONNX Runtime that keep the name of a node they replaced and add their own.
_FUSION = re.compile(r"/\w*Fusion\w*$")

INPUTS, EMBEDDINGS, ENCODER, HEAD = "inputs", "embeddings", "encoder", "head"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a node stands in the model.

    section: ``inputs`` (masks and positions), ``embeddings``, ``layer 3``, ``encoder`` (around its
        layers, such as packing rows), ``head``.
    part: module path within the section, such as ``attention.self.projections``; empty where ONNX
        Runtime made the node itself (fused or inlined) and gave it no module's name.
    """

    section: str
    part: str

    @property
    def layer(self) -> int | None:
        """Index of the encoder layer, None outside."""
        kind, _, index = self.section.partition(" ")
        return int(index) if kind == "layer" else None


def place_of(name: str) -> Place | None:
    """The place that a node's name tells; None for names that tell none (``BiasGelu_token_58``)."""
    module, slash, _ = _FUSION.sub("", name).rpartition("/")
    if not slash:
        return None
    match = _LAYER.match(module)
    if match:
        return Place(f"layer {match[1]}", match[2] or "")
    if module.startswith("inputs"):
        return Place(INPUTS, module.partition(".")[2])
    if module.startswith("embeddings"):
        return Place(EMBEDDINGS, module.removeprefix("embeddings").lstrip("._"))
    if module == ENCODER:
        return Place(ENCODER, "")
    return Place(HEAD, module)


def places(nodes: Sequence[NodeRun]) -> list[Place]:
    """The place of every node of one run, which must be in the order they ran in.

    A node without a telling name takes the section that ran around it. That is exact for encoder
    layers, because everything in a layer reads what the layer before it ended with, and ends in
    its own last LayerNorm: between the first and the last named node of a layer only that layer
    runs (or the mask, which is named), and after the last one the next has begun.
    """
    told = [place_of(node.name) for node in nodes]
    last = {place.section: index for index, place in enumerate(told) if place is not None}
    found: list[Place] = []
    current = INPUTS
    for index, place in enumerate(told):
        if place is not None:
            found.append(place)
            # masks are computed wherever they are first needed: they do not end a layer
            current = current if place.section == INPUTS else place.section
        elif last.get(current, -1) > index:
            found.append(Place(current, ""))
        else:
            found.append(Place(_next_section(told, index) or current, ""))
    return found


def _next_section(told: Sequence[Place | None], index: int) -> str | None:
    for place in told[index:]:
        if place is not None and place.section != INPUTS:
            return place.section
    return None
