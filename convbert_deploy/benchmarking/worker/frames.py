"""Messages between the benchmark and its workers: a JSON header and raw arrays, no pickle.

A frame is ``b"CVB1"``, the header's length as a little-endian uint32, the header in UTF-8, then the
bytes of each array, C-contiguous, in the order of the header's ``arrays``:
``[{"name", "dtype", "shape"}, ...]``.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

_MAGIC = b"CVB1"
_LIMIT = 64 << 20  # a header is a few hundred bytes: more is not a frame


class FrameError(Exception):
    """What came is not a frame, or the stream ended inside one."""


def write_frame(
    stream: BinaryIO, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None
) -> None:
    contiguous = {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items()}
    described = [
        {"name": name, "dtype": array.dtype.str, "shape": list(array.shape)}
        for name, array in contiguous.items()
    ]
    text = json.dumps({**header, "arrays": described}).encode()
    stream.write(_MAGIC + struct.pack("<I", len(text)) + text)
    for array in contiguous.values():
        stream.write(array.tobytes())
    stream.flush()


def read_frame(stream: BinaryIO) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """The next header and arrays; None where the other end closed between two frames.

    Raises:
        FrameError: other bytes than a frame, or an end inside one.
    """
    start = stream.read(8)
    if not start:
        return None
    if len(start) < 8 or start[:4] != _MAGIC:
        raise FrameError(f"expected a frame, got {start!r}")
    (length,) = struct.unpack("<I", start[4:])
    if length > _LIMIT:
        raise FrameError(f"a header of {length} bytes")
    header = json.loads(_exactly(stream, length))
    arrays = {}
    for described in header.pop("arrays"):
        dtype, shape = np.dtype(described["dtype"]), tuple(described["shape"])
        count = int(np.prod(shape, dtype=np.int64))
        data = _exactly(stream, count * dtype.itemsize)
        arrays[described["name"]] = np.frombuffer(data, dtype).reshape(shape).copy()
    return header, arrays


def _exactly(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise FrameError(f"the stream ended after {len(data)} of {count} bytes")
    return data
