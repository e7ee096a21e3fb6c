"""Dynamic axes and their bounds: ``batch=1:8:32,seq=16:128:512``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from convbert_deploy.errors import ShapeError

_EXAMPLE = "batch=1:8:32,seq=16:128:512"


@dataclasses.dataclass(frozen=True)
class ShapeRange:
    """Inclusive bounds of one dynamic axis and the size it is tuned for: min <= opt <= max."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ShapeError(
                f"shape range {self} is not 1 <= min <= opt <= max", hint=f"for example {_EXAMPLE}"
            )

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"

    def __contains__(self, size: int) -> bool:
        return self.min <= size <= self.max

    @classmethod
    def parse(cls, text: str) -> ShapeRange:
        """``"8"`` is a fixed size, ``"1:32"`` min and max (tuned for max), ``"1:8:32"`` all three."""
        try:
            sizes = [int(part) for part in text.split(":")]
        except ValueError:
            sizes = []
        if len(sizes) == 1:
            return cls(sizes[0], sizes[0], sizes[0])
        if len(sizes) == 2:
            return cls(sizes[0], sizes[1], sizes[1])
        if len(sizes) == 3:
            return cls(*sizes)
        raise ShapeError(
            f"cannot read shape range {text!r}: expected MIN:OPT:MAX",
            hint=f"for example {_EXAMPLE}",
        )


@dataclasses.dataclass(frozen=True)
class ShapeProfile:
    """Bounds of every dynamic axis of the model's inputs.

    Inputs are (batch, seq), or (batch, choices, seq) for multiple choice.
    """

    batch: ShapeRange = ShapeRange(1, 8, 32)
    seq: ShapeRange = ShapeRange(1, 128, 512)
    choices: ShapeRange = ShapeRange(2, 4, 8)

    def __str__(self) -> str:
        return f"batch={self.batch},seq={self.seq}"

    @classmethod
    def parse(cls, text: str) -> ShapeProfile:
        """Read ``axis=MIN:OPT:MAX`` items; axes left out keep their default.

        Raises:
            ShapeError: unknown axis, axis given twice, or a malformed range.
        """
        ranges: dict[str, ShapeRange] = {}
        axes = [field.name for field in dataclasses.fields(cls)]
        for item in text.split(","):
            axis, equals, value = item.strip().partition("=")
            if not equals or axis not in axes or axis in ranges:
                raise ShapeError(
                    f"cannot read shape item {item!r}: expected each of {', '.join(axes)} at most once",
                    hint=f"for example {_EXAMPLE}",
                )
            ranges[axis] = ShapeRange.parse(value)
        return cls(**ranges)

    def limited_to(self, max_positions: int) -> ShapeProfile:
        """The same profile with the sequence axis cut to the model's position table."""
        seq = self.seq
        if seq.min > max_positions:
            raise ShapeError(
                f"the profile starts at seq {seq.min}, the model has {max_positions} positions"
            )
        top = min(seq.max, max_positions)
        return dataclasses.replace(self, seq=ShapeRange(seq.min, min(seq.opt, top), top))

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raises ShapeError where a size lies outside its axis' bounds."""
        for axis, size in sizes.items():
            if size not in getattr(self, axis):
                raise ShapeError(
                    f"input has {axis} {size}, the engine was built for {self}",
                    hint=f"build-engine --shapes {axis}=MIN:OPT:MAX widens it",
                )

    def to_json(self) -> dict[str, list[int]]:
        return {
            field.name: list(dataclasses.astuple(getattr(self, field.name)))
            for field in dataclasses.fields(self)
        }

    @classmethod
    def from_json(cls, data: Mapping[str, list[int]]) -> ShapeProfile:
        return cls(**{axis: ShapeRange(*sizes) for axis, sizes in data.items()})
