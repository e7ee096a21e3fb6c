"""The batches that parity is taken on: awkward lengths, padding, the whole vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

from convbert_deploy.architecture import Architecture, Task
from convbert_deploy.backends.base import Batch
from convbert_deploy.shapes import ShapeProfile


@dataclasses.dataclass(frozen=True)
class NamedBatch:
    """One case; ``name`` reads like ``b8-s128-padded``."""

    name: str
    batch: Batch


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A case that was not run, and why."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class ParityBatches(Sequence[NamedBatch]):
    """The cases to run, and those that the model, the profile or the budget left out."""

    cases: tuple[NamedBatch, ...]
    left_out: tuple[LeftOut, ...] = ()

    @overload
    def __getitem__(self, index: int) -> NamedBatch: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[NamedBatch, ...]: ...
    def __getitem__(self, index: int | slice) -> NamedBatch | tuple[NamedBatch, ...]:
        return self.cases[index]

    def __len__(self) -> int:
        return len(self.cases)


@dataclasses.dataclass(frozen=True)
class ParityShapes:
    """Which shapes to compare.

    batches: batch sizes.
    seqs: sequence lengths; None takes 1, 2, K-1 (the last seq shorter than the window), 17, 128
        and the model's last position.
    choices: choices of a multiple-choice batch; further numbers are tried at the shortest seq.
    profile: bounds the cases; its own corners are added to them.
    max_tokens: cases of more tokens (batch * choices * seq) are left out.
    """

    batches: tuple[int, ...] = (1, 8)
    seqs: tuple[int, ...] | None = None
    choices: tuple[int, ...] = (2, 3)
    profile: ShapeProfile | None = None
    max_tokens: int = 8192


@dataclasses.dataclass(frozen=True)
class _Shape:
    batch: int
    choices: int | None
    seq: int
    padded: bool

    @property
    def name(self) -> str:
        choices = "" if self.choices is None else f"-c{self.choices}"
        return f"b{self.batch}{choices}-s{self.seq}{'-padded' if self.padded else ''}"

    @property
    def dims(self) -> tuple[int, ...]:
        if self.choices is None:
            return (self.batch, self.seq)
        return (self.batch, self.choices, self.seq)


def parity_batches(
    architecture: Architecture, task: Task, shapes: ParityShapes | None = None, seed: int = 0
) -> ParityBatches:
    """Random batches over the shapes asked for, the same for the same seed.

    Token ids cover the whole vocabulary, token types the model's types. ``-padded`` cases hold
    rows of mixed lengths, padded on the right with the pad id and a zero mask; their first row is
    full, as the tokenizer pads to the longest.
    """
    shapes = shapes or ParityShapes()
    cases, left_out = [], []
    for shape in _wanted(architecture, task, shapes):
        reason = _why_not(shape, architecture, shapes)
        if reason:
            left_out.append(LeftOut(shape.name, reason))
        else:
            # A seed of its own for each case: a case does not depend on which others run.
            rng = np.random.default_rng([seed, *shape.dims, shape.padded])
            cases.append(NamedBatch(shape.name, _random_batch(architecture, shape, rng)))
    return ParityBatches(tuple(cases), tuple(left_out))


def random_batch(
    architecture: Architecture,
    task: Task,
    batch: int,
    seq: int,
    *,
    choices: int = 2,
    padded: bool = False,
    seed: int = 0,
) -> Batch:
    """One random batch, int64 [batch, seq] or [batch, choices, seq], made as for parity."""
    shape = _Shape(batch, choices if task is Task.MULTIPLE_CHOICE else None, seq, padded)
    return _random_batch(architecture, shape, np.random.default_rng([seed, *shape.dims, padded]))


def golden_batch(
    architecture: Architecture, task: Task, padding: str, seq: int, *, choices: int = 2
) -> Batch:
    """A full row and a right-padded one. Of a masked graph's per-token outputs only full rows are
    asked for: what stands at a pad is not defined there."""
    pooled = task in (Task.SEQUENCE_CLASSIFICATION, Task.MULTIPLE_CHOICE)
    padded = seq > 1 and (pooled or padding == "hf")
    return random_batch(architecture, task, 2, seq, choices=choices, padded=padded)


def _wanted(architecture: Architecture, task: Task, shapes: ParityShapes) -> Iterator[_Shape]:
    kernel, last = architecture.conv_kernel_size, architecture.max_position_embeddings
    seqs = set(shapes.seqs if shapes.seqs is not None else (1, 2, kernel - 1, 17, 128, last))
    batches = set(shapes.batches)
    profile = shapes.profile
    if profile:
        limited = profile.limited_to(last)
        seqs |= {limited.seq.min, limited.seq.opt, limited.seq.max}
        if not any(batch in profile.batch for batch in batches):
            batches |= {profile.batch.min, profile.batch.opt}
    choices: tuple[int | None, ...] = (None,)
    if task is Task.MULTIPLE_CHOICE:
        choices = tuple(shapes.choices)
        if profile and not any(number in profile.choices for number in shapes.choices):
            choices = (profile.choices.min, *choices)
    ordered = sorted(seq for seq in seqs if seq > 0)
    seen = set()

    def once(shape: _Shape) -> Iterator[_Shape]:
        if shape not in seen:
            seen.add(shape)
            yield shape

    for seq in ordered:
        for batch in sorted(batches):
            yield from once(_Shape(batch, choices[0], seq, padded=False))
        # One token cannot be padded: a row without a real token is no input.
        if seq > 1:
            yield from once(_Shape(max(batches), choices[0], seq, padded=True))
    for number in choices[1:]:
        yield from once(_Shape(min(batches), number, ordered[0], padded=False))
    if profile:
        yield from once(_Shape(profile.batch.max, choices[0], limited.seq.opt, padded=True))


def _why_not(shape: _Shape, architecture: Architecture, shapes: ParityShapes) -> str | None:
    positions = architecture.max_position_embeddings
    if shape.seq > positions:
        return f"seq {shape.seq} is over the model's {positions} positions"
    profile = shapes.profile
    if profile:
        for axis, size in (("batch", shape.batch), ("seq", shape.seq), ("choices", shape.choices)):
            bounds = getattr(profile, axis)
            if size is not None and size not in bounds:
                return f"{axis} {size} is outside the profile's {bounds}"
    tokens = int(np.prod(shape.dims))
    if tokens > shapes.max_tokens:
        return f"{tokens} tokens are over the limit of {shapes.max_tokens}"
    return None


def _random_batch(
    architecture: Architecture, shape: _Shape, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    dims = shape.dims
    ids = rng.integers(0, architecture.vocab_size, dims, dtype=np.int64)
    # The ends of the embedding table are where an off-by-one reads out of bounds.
    ids.flat[0] = architecture.vocab_size - 1
    types = np.sort(rng.integers(0, architecture.type_vocab_size, dims, dtype=np.int64), axis=-1)
    mask = np.ones(dims, np.int64)
    if shape.padded:
        lengths = rng.integers(1, shape.seq + 1, dims[:-1])
        lengths.flat[0] = shape.seq
        lengths.flat[-1] = max(1, shape.seq // 3)
        mask = (np.arange(shape.seq) < lengths[..., None]).astype(np.int64)
        ids = np.where(mask == 1, ids, architecture.pad_token_id)
        types = types * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
