"""The peers that an engine can be timed beside, and what each of them is.

Each runs the user's checkpoint as its users would: from transformers' model, with its own exporter
or compiler and its own defaults, in a process and an environment of its own.
"""

from __future__ import annotations

import dataclasses

from convbert_deploy.errors import ConvBertDeployError


class PeerError(ConvBertDeployError):
    """A peer that is not known, not installed or cannot be installed."""


@dataclasses.dataclass(frozen=True)
class Requirement:
    """A pip requirement and why it is this range."""

    text: str
    reason: str


_TORCH = Requirement("torch>=2.8", "the release that this project's export needs too")
_TRANSFORMERS = Requirement("transformers>=5,<6", "the model whose answers are the truth here")
_SAFETENSORS = Requirement("safetensors>=0.4", "the weights are handed over in this format")
_OPENVINO = Requirement("openvino>=2026.0", "reads transformers 5's traced model")
_NNCF = Requirement("nncf>=3.0", "int8; 3.0 is the first release for OpenVINO 2026")


@dataclasses.dataclass(frozen=True)
class Peer:
    """precisions: what it can run in, its default first. gpu: it runs on one too. shown: what is
    run, for people. worker: the loader and environment that it shares with another peer. reads_graph:
    it runs an exported graph instead of transformers' model."""

    name: str
    precisions: tuple[str, ...]
    requirements: tuple[Requirement, ...]
    shown: str
    gpu: bool = False
    worker: str = ""
    reads_graph: bool = False

    @property
    def kind(self) -> str:
        return self.worker or self.name


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "eager",
            ("fp32", "bf16", "fp16"),
            (_TORCH, _TRANSFORMERS, _SAFETENSORS),
            "transformers' model, eagerly",
            gpu=True,
        ),
        Peer(
            "compile",
            ("fp32", "bf16", "fp16"),
            (_TORCH, _TRANSFORMERS, _SAFETENSORS),
            "torch.compile with frozen weights (needs a C++ compiler)",
            gpu=True,
        ),
        Peer(
            "ort",
            ("fp32", "int8"),
            (
                _TORCH,
                _TRANSFORMERS,
                _SAFETENSORS,
                Requirement("onnx>=1.19", "the exporter writes with it"),
                Requirement("onnxruntime>=1.20", "the range that our own engines run in"),
            ),
            "torch.onnx.export in ONNX Runtime; int8: quantize_dynamic",
            gpu=True,
        ),
        Peer(
            "openvino",
            ("fp32", "bf16", "int8"),
            (_TORCH, _TRANSFORMERS, _SAFETENSORS, _OPENVINO, _NNCF),
            "openvino.convert_model, a static shape for each point; int8: nncf.quantize",
        ),
        Peer(
            "openvino-graph",
            ("fp32", "bf16", "int8"),
            (_TORCH, _TRANSFORMERS, _SAFETENSORS, _OPENVINO, _NNCF),
            "openvino on a graph that export wrote, its operators inlined; else as openvino",
            worker="openvino",
            reads_graph=True,
        ),
        Peer(
            "optimum",
            ("fp32", "bf16", "int8"),
            (
                _TORCH,
                _SAFETENSORS,
                Requirement(
                    "optimum-intel[openvino]>=2.0",
                    "the first for transformers 5; it chooses the release itself",
                ),
                _NNCF,
            ),
            "optimum-intel's OVModel, a static shape for each point; int8: nncf.quantize",
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class PeerRequest:
    """A peer in one precision; ``str()`` is its name in reports: ``openvino bf16``."""

    peer: Peer
    precision: str

    def __str__(self) -> str:
        return f"{self.peer.name} {self.precision}"

    @classmethod
    def parse(cls, text: str) -> PeerRequest:
        """``eager`` or ``openvino:bf16``. Raises PeerError naming what there is."""
        name, _, precision = text.partition(":")
        if name not in PEERS:
            raise PeerError(f"unknown peer {name!r}: expected one of {', '.join(PEERS)}")
        peer = PEERS[name]
        if precision and precision not in peer.precisions:
            raise PeerError(
                f"peer {name} has no precision {precision!r}: expected one of "
                f"{', '.join(peer.precisions)}"
            )
        return cls(peer, precision or peer.precisions[0])
