"""An fp32 graph whose weights are stored in half the bytes and computed with in float32.

For runtimes that have no half-precision arithmetic: ONNX Runtime's CPU provider has no bfloat16
operators and runs most float16 ones between casts. The answers carry the rounding of the weights
only, and the speed is that of float32.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..errors import GraphError
from ..precision import Precision

_TYPES = {Precision.FP16: TensorProto.FLOAT16, Precision.BF16: TensorProto.BFLOAT16}
#: scalars and biases stay as they are: they are no weight on disk
_MIN_ELEMENTS = 1024


def stored_graph(model: onnx.ModelProto, precision: Precision) -> onnx.ModelProto:
    """A copy of ``model`` with its float32 matrices stored as ``precision`` behind a Cast each.

    Raises:
        GraphError: a weight that does not fit the type's range.
    """
    stored = onnx.ModelProto()
    stored.CopyFrom(model)
    if precision is Precision.FP32:
        return stored
    kind = _TYPES[precision]
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    casts = []
    for tensor in stored.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or int(np.prod(tensor.dims)) < _MIN_ELEMENTS:
            continue
        array = numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):
            half = array.astype(dtype)
        if not np.isfinite(half.astype(np.float32)).all():
            raise GraphError(
                f"weight {tensor.name} reaches {float(np.abs(array).max()):.3g}, which {precision} "
                "cannot hold"
            )
        name = f"{tensor.name}.{precision}"
        casts.append(
            helper.make_node(
                "Cast", [name], [tensor.name], name=f"{name}/Cast", to=TensorProto.FLOAT
            )
        )
        tensor.CopyFrom(helper.make_tensor(name, kind, array.shape, half.tobytes(), raw=True))
    for position, cast in enumerate(casts):
        stored.graph.node.insert(position, cast)
    return stored
