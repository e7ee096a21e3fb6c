"""An ONNX file whose weights lie beside it, so that a runtime maps them instead of copying them."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

from convbert_deploy.provenance import atomic_file

if TYPE_CHECKING:
    import onnx_ir as ir

#: smaller tensors stay in the file: runtimes read shapes and axes before they map anything
_MIN_BYTES = 1024
_PAGE = 4096
#: from here on a tensor has pages of its own
_LARGE_BYTES = 1 << 20
_CACHE_LINE = 64


def write_mapped_model(model: ir.Model, target: pathlib.Path) -> None:
    """``target`` and, with every tensor at an aligned offset, ``TARGET.data``.

    The large weights of ``model`` become references into that file; their memory is given back.

    Raises:
        OutputError: a file cannot be written.
    """
    import onnx_ir as ir

    data = pathlib.Path(f"{target}.data")
    with atomic_file(data) as temporary, temporary.open("wb") as stream:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < _MIN_BYTES:
                continue
            alignment = _PAGE if tensor.nbytes >= _LARGE_BYTES else _CACHE_LINE
            stream.write(bytes(-stream.tell() % alignment))
            value.const_value = ir.ExternalTensor(
                data.name,
                stream.tell(),
                tensor.nbytes,
                tensor.dtype,
                shape=tensor.shape,
                name=str(value.name),
                base_dir=target.parent,
            )
            stream.write(tensor.tobytes())
    with atomic_file(target) as temporary:
        temporary.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
