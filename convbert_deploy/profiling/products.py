"""How much arithmetic a kernel did, as far as its shapes tell."""

from __future__ import annotations

import dataclasses
import math

from convbert_deploy.architecture import Architecture
from convbert_deploy.profiling.recording import NodeRun

#: Operators whose first output is a matrix product of their first input with something.
_PRODUCTS = frozenset(
    {
        "DynamicQuantizeMatMul",
        "FusedGemm",
        "FusedMatMul",
        "FusedMatMulActivation",
        "Gemm",
        "MatMul",
        "MatMulBnb4",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QGemm",
        "QLinearMatMul",
    }
)


@dataclasses.dataclass(frozen=True)
class Product:
    """``m`` rows of length ``k`` times ``k`` x ``n``; a batch of products counts its rows in
    ``m``. ``type``: element type of the left side, as ONNX Runtime writes it."""

    m: int
    k: int
    n: int
    type: str

    @property
    def gflop(self) -> float:
        """One multiplication and one addition for each of m k n."""
        return 2e-9 * self.m * self.k * self.n

    def __str__(self) -> str:
        return f"{self.m}x{self.k}x{self.n}"


def product_of(node: NodeRun) -> Product | None:
    """The matrix product a node computes; None where it is none or its shapes do not say."""
    if node.op_type not in _PRODUCTS or not node.inputs or not node.outputs:
        return None
    left, out = node.inputs[0], node.outputs[0]
    if not out.shape or not math.prod(out.shape):
        return None
    # Of the left side only the number of values is used: a fused transposition may have swapped
    # its axes, and a packed weight is not listed at all.
    n = out.shape[-1]
    m = math.prod(out.shape) // n
    k, rest = divmod(math.prod(left.shape), m)
    return Product(m, k, n, left.type) if k and not rest else None


def layer_gflop(architecture: Architecture, batch: int, seq: int) -> float:
    """GFLOP of the matrix products of one encoder layer on ``batch`` full rows of ``seq`` tokens:
    the linear layers and both products of the attention. The convolutions themselves (under 1 % of
    it) are left out."""
    hidden, intermediate = architecture.hidden_size, architecture.intermediate_size
    inner = architecture.heads * architecture.head_dim
    weights = (
        4 * inner * hidden  # query, key, value, value of the convolution
        + hidden * inner  # pointwise
        + inner * architecture.heads * architecture.conv_kernel_size  # kernel generator
        + 2 * inner * hidden  # output of the attention
        + 2 * hidden * intermediate // architecture.num_groups  # up and down
    )
    attention = 2 * seq * inner  # queries with keys, scores with values
    return 2e-9 * batch * seq * (weights + attention)
