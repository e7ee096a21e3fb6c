"""What the command line's ``bench`` asks for, as a BenchRequest."""

from __future__ import annotations

import pathlib

import click

from convbert_deploy.benchmarking.bench import BenchRequest
from convbert_deploy.benchmarking.cases import Point
from convbert_deploy.benchmarking.options import BenchOptions
from convbert_deploy.benchmarking.peers import PeerRequest
from convbert_deploy.checkpoint import Checkpoint
from convbert_deploy.command_line import integers

_MIN_RUNS = 10


def bench_request(
    engines: tuple[pathlib.Path, ...],
    checkpoint: Checkpoint | None,
    *,
    peers: tuple[str, ...],
    install_peers: bool,
    graph: pathlib.Path | None,
    batch: str | None,
    seq: str | None,
    shape: str | None,
    texts: pathlib.Path | None,
    workload_batch: int,
    threads: int | None,
    precision: float,
    min_time: float,
    max_time: float,
    max_runs: int,
    warmup: int,
    no_ceiling: bool,
) -> BenchRequest:
    """Raises click.UsageError for options that exclude each other or are out of range."""
    if shape and (batch or seq):
        raise click.UsageError("--shape stands instead of --batch and --seq")
    try:
        options = BenchOptions(
            min_time_s=min_time,
            max_time_s=max_time,
            max_runs=max_runs,
            min_runs=min(_MIN_RUNS, max_runs),
            warmup=warmup,
            precision=precision / 100 if precision else None,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    points = Point.parse_list(shape) if shape else None
    if texts and not (shape or batch or seq):
        points = ()  # the texts alone
    return BenchRequest(
        engines=engines,
        baseline=checkpoint,
        batches=integers(batch or "1,8"),
        seqs=integers(seq or "32,128"),
        threads=threads,
        options=options,
        peers=tuple(PeerRequest.parse(text) for text in peers),
        install_peers=install_peers,
        graph=graph,
        points=points,
        texts=texts,
        workload_batch=workload_batch,
        ceiling=not no_ceiling,
    )
