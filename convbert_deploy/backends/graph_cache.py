"""Work that is captured in a CUDA graph once and replayed, and a bounded store of such work."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from convbert_deploy.errors import ConvBertDeployError

Shape = tuple[int, ...]
Value = TypeVar("Value")


class CaptureRefusedError(ConvBertDeployError):
    """The driver or the runtime cannot capture this work in a CUDA graph."""


class Device(Protocol):
    """What captured work needs of a GPU (``cuda_device.TorchCuda``; a fake in tests)."""

    def working(self) -> contextlib.AbstractContextManager[None]:
        """Inside, work goes to this device's stream."""
        ...

    def synchronize(self) -> None:
        """Wait for the stream."""
        ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture the work, which does not run, and return what replays it.

        Raises CaptureRefusedError.
        """
        ...


class GraphedCall:
    """Work on a fixed set of buffers: run plainly the first time, replayed after that.

    ``refused``: why it could not be captured and stays plain, else None.
    """

    def __init__(self, device: Device, work: Callable[[], None], *, capture: bool) -> None:
        self._device, self._work, self._run = device, work, work
        self._to_capture = capture
        self.refused: str | None = None

    @property
    def captured(self) -> bool:
        return self._run is not self._work

    def __call__(self) -> None:
        """Returns when the work is done."""
        with self._device.working():
            self._run()
            self._device.synchronize()
            if self._to_capture:
                self._capture()

    def _capture(self) -> None:
        """After a plain run: runtimes make their lazy allocations in that."""
        self._to_capture = False
        try:
            self._run = self._device.capture(self._work)
        except CaptureRefusedError as error:
            self.refused = str(error)


class ShapeCache(Generic[Value]):
    """What was made for each shape, the ``limit`` used last; the others are dropped with all they
    hold. ``make`` takes the shape."""

    def __init__(self, limit: int, make: Callable[[Shape], Value]) -> None:
        self._limit, self._make = max(limit, 1), make
        self._values: collections.OrderedDict[Shape, Value] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, shape: Shape) -> bool:
        return shape in self._values

    def get(self, shape: Shape) -> Value:
        """The value for ``shape``, made if it is not there; the one unused longest makes room
        first, so that at most ``limit`` exist at any time."""
        if shape not in self._values:
            while len(self._values) >= self._limit:
                self._values.popitem(last=False)
            self._values[shape] = self._make(shape)
        self._values.move_to_end(shape)
        return self._values[shape]

    def clear(self) -> None:
        self._values.clear()
