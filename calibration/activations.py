"""The values of tensors inside a graph, batch by batch over calibration data."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..backends.base import RunnerOptions
from ..errors import GraphError, InputError
from .samples import CalibrationSamples
from .workspace import Workspace

if TYPE_CHECKING:
    import onnx

    from ..backends.onnxruntime import OnnxRuntimeRunner

#: Positions a batch may have however few bytes of them are observed: the runtime's own activations
#: grow with them too, and larger batches are no faster per token.
_MOST_POSITIONS = 2048
_LEAST_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True)
class CollectOptions:
    """How the graph is run.

    max_bytes: of observed activations a batch may have; None is an eighth of the weights' bytes (at
        least 4 MiB), because the runtime holds them once more while it hands them over and has
        activations of its own. A single row that needs more is still run, alone.
    save_every: batches between two savings of the partial state.
    threads: intra-op CPU threads; None leaves the runtime's default.
    histograms: of which tensors histograms and channels' ranges are kept, True for all; of the rest
        only their range (min-max and moving average), in about half the time.
    """

    max_bytes: int | None = None
    save_every: int = 50
    threads: int | None = None
    histograms: bool | frozenset[str] = True

    def __post_init__(self) -> None:
        for name in ("max_bytes", "save_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}, expected at least 1")

    def histogram_of(self, name: str) -> bool:
        """Whether this tensor gets a histogram."""
        return self.histograms if isinstance(self.histograms, bool) else name in self.histograms


@dataclasses.dataclass(frozen=True)
class Observed:
    """The observed tensors of one batch: ``rows`` are indices into the samples."""

    rows: tuple[int, ...]
    values: dict[str, np.ndarray]


def activations(
    workspace: Workspace,
    names: tuple[str, ...],
    samples: CalibrationSamples,
    options: CollectOptions,
    skipped: int = 0,
) -> Iterator[Observed]:
    """The tensors' values as (rows, channels), batch by batch; the caller may empty the dicts.

    The first ``skipped`` batches are not run and have no values.
    """
    model = workspace.model()
    _check_names(model, names)
    max_bytes = options.max_bytes or max(_LEAST_BYTES, _weight_bytes(model) // 8)
    # the graph's own outputs are not read: a masked language model's are larger than all the rest
    del model.graph.output[:]
    runner_options = RunnerOptions(threads=options.threads)
    with workspace.runner(model, outputs=names, options=runner_options) as runner:
        batches = samples.batches(_positions_a_batch(runner, names, samples, max_bytes))
        for rows, _ in itertools.islice(batches, skipped):
            yield Observed(rows, {})
        for rows, batch in batches:
            values = runner.infer(batch)
            for name in names:
                kept = _without_pads(values[name], batch["attention_mask"])
                if not np.isfinite(kept).all():
                    raise _not_finite(name, values[name], batch["attention_mask"], rows, samples)
                values[name] = kept.reshape(-1, kept.shape[-1])
            yield Observed(rows, values)


def _positions_a_batch(
    runner: OnnxRuntimeRunner, names: Sequence[str], samples: CalibrationSamples, max_bytes: int
) -> int:
    """How many positions fit ``max_bytes``, measured on the shortest and on the longest row.

    Both, because a tensor may have one vector a text (most bytes a position in a short one) or the
    square of the length (in a long one).
    """
    by_length = sorted(range(len(samples.rows)), key=lambda index: samples.rows[index].positions)
    most = 0.0
    for index in {by_length[0], by_length[-1]}:
        values = runner.infer(samples.batch([index]))
        for name in names:
            if values[name].dtype != np.float32 or not values[name].ndim:
                raise GraphError(
                    f"tensor {name} is {values[name].dtype} of shape {list(values[name].shape)}, "
                    "expected float32 with at least one axis",
                    hint="calibrate the fp32 graph that convbert-deploy export wrote",
                )
        size = sum(values[name].nbytes for name in names)
        most = max(most, size / samples.rows[index].positions)
    return max(1, min(_MOST_POSITIONS, int(max_bytes / most) if most else _MOST_POSITIONS))


def _weight_bytes(model: onnx.ModelProto) -> int:
    from onnx import helper

    return sum(
        math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in model.graph.initializer
    )


def _check_names(model: onnx.ModelProto, names: Sequence[str]) -> None:
    known = {output for node in model.graph.node for output in node.output}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise GraphError(
            f"the graph computes no tensor {', '.join(unknown[:3])}"
            + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        )


def _pads(values: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
    """Which (batch, seq) of ``values`` are pads; None where there are none or no such axes."""
    flat = mask.reshape(-1, mask.shape[-1])
    return None if flat.all() or values.shape[:2] != flat.shape else flat == 0


def _without_pads(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    pads = _pads(values, mask)
    return values if pads is None else values[~pads]


def _not_finite(
    name: str,
    values: np.ndarray,
    mask: np.ndarray,
    rows: tuple[int, ...],
    samples: CalibrationSamples,
) -> GraphError:
    """Names the first sample at fault. Choices share the first axis with the batch."""
    bad = ~np.isfinite(values)
    pads = _pads(values, mask)
    if pads is not None:
        bad[pads] = False
    index = tuple(np.argwhere(bad)[0])
    kind = "NaN" if np.isnan(values[index]) else "infinity"
    if len(values) % len(rows) == 0:
        place = samples.place(rows[index[0] // (len(values) // len(rows))])
    else:
        place = f"a batch of {', '.join(samples.place(row) for row in rows[:3])}"
    return GraphError(
        f"tensor {name} holds {kind} for {place}, expected finite values",
        hint="convbert-deploy verify ENGINE --against CHECKPOINT tells whether the weights or the "
        "graph compute it",
    )
