"""What the CPU benchmarks of single operators share: one thread, interleaved runs, a table."""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Callable

from convbert_deploy.backends.base import Batch, RunnerOptions
from convbert_deploy.benchmarking import BenchOptions, Candidate, Point, measure
from convbert_deploy.environment import benchmark_header, environment
from convbert_deploy.report import to_markdown

ONE_THREAD = RunnerOptions(threads=1)
OPTIONS = BenchOptions(min_time_s=2.0, min_runs=100, max_runs=1000, warmup=5)


def markdown_target(description: str | None) -> pathlib.Path | None:
    """The file that the command line names, if any."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--markdown", type=pathlib.Path)
    return parser.parse_args().markdown


def report(
    candidates: list[Candidate],
    points: list[Point],
    make_batch: Callable[[Point], Batch],
    target: pathlib.Path | None,
) -> None:
    """Time the candidates, the first as the baseline; print the table and write it to ``target``."""
    measured = measure(
        candidates,
        points,
        make_batch,
        OPTIONS,
        header=benchmark_header(environment(), threads=1),
        progress=lambda text: print(text, file=sys.stderr),
    )
    text = to_markdown(measured)
    print(text)
    if target:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text + "\n")
