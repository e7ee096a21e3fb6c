"""A plan with TensorRT's own profiler attached.

Written after TensorRT's documentation of ``IProfiler``; not run yet, for want of a GPU.
"""

from __future__ import annotations

from typing import Any

from convbert_deploy.backends.tensorrt import TensorRTRunner


class ProfilingRunner(TensorRTRunner):
    """A TensorRTRunner that keeps the time of every layer of every ``infer``."""

    def __enter__(self) -> ProfilingRunner:
        """Raises as ``TensorRTRunner.__enter__`` does."""
        super().__enter__()
        self._times = _layer_times(self._trt)
        return self

    def _context_made(self, context: Any) -> None:
        # with a profiler set, each enqueue reports to it once the stream has been waited for
        context.profiler = self._times

    def forget(self) -> None:
        """Drop what was kept so far, such as warm-up runs."""
        self._times.spent_ms.clear()

    def layer_times_ms(self) -> dict[str, list[float]]:
        """Milliseconds of each run by layer, in the order the layers ran."""
        return {name: list(spent) for name, spent in self._times.spent_ms.items()}


def _layer_times(trt: Any) -> Any:
    """An ``IProfiler``; its class is made here because its base is known only at run time."""

    class LayerTimes(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.spent_ms: dict[str, list[float]] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.spent_ms.setdefault(layer_name, []).append(ms)

    return LayerTimes()
