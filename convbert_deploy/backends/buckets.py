"""The sizes a GPU runner rounds a batch up to, so that few CUDA graphs serve many shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from convbert_deploy.architecture import Task
from convbert_deploy.backends.base import Batch
from convbert_deploy.errors import ShapeError
from convbert_deploy.shapes import ShapeProfile, ShapeRange

#: last sequence length of each profile of a plan with several
LENGTHS = (64, 128, 256)


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Sizes of the batch and of the sequence axis, ascending; an axis without any stays as it is.

    Padding a sequence changes the answer of a graph with ``hf`` padding, whose convolutions read
    pads: there every shape is its own bucket.
    """

    batch: tuple[int, ...] = ()
    seq: tuple[int, ...] = ()

    @classmethod
    def of(cls, profile: ShapeProfile, padding: str) -> Buckets:
        """Buckets of an engine. padding: ``hf`` or ``masked``."""
        if padding != "masked":
            return cls()
        return cls(_sizes(profile.batch), _sizes(profile.seq))

    def shape_for(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape (batch, [choices,] seq) that a batch of ``shape`` is padded to.

        Raises:
            ShapeError: larger than the largest bucket.
        """
        batch, *between, seq = shape
        return (_up(batch, self.batch, "batch"), *between, _up(seq, self.seq, "seq"))


def _sizes(axis: ShapeRange) -> tuple[int, ...]:
    """The profile's own sizes, powers of two and what is halfway: at most a third is padding from
    4 up."""
    steps = {1 << n for n in range(axis.max.bit_length())}
    steps |= {3 * step // 2 for step in steps if step > 1}
    return tuple(sorted({size for size in steps if size in axis} | {axis.min, axis.opt, axis.max}))


def _up(size: int, sizes: Sequence[int], axis: str) -> int:
    if not sizes:
        return size
    fitting = [bucket for bucket in sizes if bucket >= size]
    if not fitting:
        raise ShapeError(
            f"input has {axis} {size}, the engine takes at most {sizes[-1]}",
            hint=f"build-engine --shapes {axis}=MIN:OPT:MAX widens it",
        )
    return fitting[0]


def write_padded(target: np.ndarray, name: str, array: np.ndarray) -> None:
    """Fill ``target`` with ``array`` (batch, [choices,] seq) and padding after it on both axes.

    Added positions are masked and hold id 0. Added rows are one token and pads: an all-zero mask
    would make their softmax NaN in some runtimes.
    """
    rows, seq = array.shape[0], array.shape[-1]
    target[:rows, ..., :seq] = array
    target[:rows, ..., seq:] = 0
    target[rows:] = 0
    if name == "attention_mask":
        target[rows:, ..., 0] = 1


def cut(output: np.ndarray, shape: Sequence[int], task: Task) -> np.ndarray:
    """A copy of what belongs to the batch of ``shape`` in an answer to the padded one."""
    if task in (Task.SEQUENCE_CLASSIFICATION, Task.MULTIPLE_CHOICE):
        return output[: shape[0]].copy()
    return output[: shape[0], : shape[-1]].copy()


def shape_of(batch: Batch) -> tuple[int, ...]:
    return tuple(batch["input_ids"].shape)


def length_profiles(
    profile: ShapeProfile, lengths: Sequence[int] = LENGTHS
) -> tuple[ShapeProfile, ...]:
    """``profile`` cut at ``lengths``: each part is tuned for its longest sequence, the one that
    holds the profile's own optimum for that."""
    tops = [top for top in sorted(set(lengths)) if profile.seq.min <= top < profile.seq.max]
    parts, first = [], profile.seq.min
    for top in [*tops, profile.seq.max]:
        opt = profile.seq.opt if first <= profile.seq.opt <= top else top
        parts.append(dataclasses.replace(profile, seq=ShapeRange(first, opt, top)))
        first = top + 1
    return tuple(parts)


def output_shape(axes: Sequence[int | str], shape: Sequence[int], task: Task) -> tuple[int, ...]:
    """Sizes of an output whose axes are numbers or names of the input's axes.

    Raises:
        ShapeError: an axis with another name.
    """
    sizes: Mapping[str, int] = dict(zip(task.input_axes, shape, strict=True))
    unknown = [axis for axis in axes if not isinstance(axis, int) and axis not in sizes]
    if unknown:
        raise ShapeError(f"an output has the axis {unknown[0]!r}, expected {', '.join(sizes)}")
    return tuple(axis if isinstance(axis, int) else sizes[axis] for axis in axes)
