"""Whether an engine's time is linear in the tokens of a batch, and its memory bounded.

``python benchmarks/scaling.py ENGINE --seq 512 --batch 4,8,16,32,64,128 --threads 1``. Batches of
full sequences, the sizes in turns, three rounds; the medians, the straight line through them
(least squares) with its R squared, and the peak memory after each size.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

import numpy as np

from convbert_deploy.backends.base import RunnerOptions
from convbert_deploy.engine import Engine
from convbert_deploy.parity_cases import random_batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine")
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--batch", default="4,8,16,32,64,128")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    engine = Engine.load(args.engine)
    sizes = [int(size) for size in args.batch.split(",")]
    manifest = engine.manifest
    times: dict[int, list[float]] = {size: [] for size in sizes}
    peaks: dict[int, float] = {}
    with engine.runner(RunnerOptions(threads=args.threads)) as runner:
        for done in range(args.rounds):
            for size in sizes:
                batch = random_batch(manifest.architecture, manifest.task, size, args.seq)
                start = time.perf_counter()
                runner.infer(batch)
                times[size].append(time.perf_counter() - start)
                if done == 0:
                    peaks[size] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                print(f"round {done + 1}: {size}x{args.seq}", file=sys.stderr)
    tokens = np.array([size * args.seq for size in sizes], np.float64)
    seconds = np.array([np.median(times[size]) for size in sizes])
    slope, start = np.polyfit(tokens, seconds, 1)
    residual = seconds - (slope * tokens + start)
    r_squared = 1 - (residual**2).sum() / ((seconds - seconds.mean()) ** 2).sum()
    print("| batch x seq | tokens | ms | tokens/s | peak MB |\n|---|---:|---:|---:|---:|")
    for size, count, spent in zip(sizes, tokens, seconds, strict=True):
        row = f"{count:.0f} | {spent * 1e3:.0f} | {count / spent:.0f} | {peaks[size]:.0f}"
        print(f"| {size}x{args.seq} | {row} |")
    line = f"{1e6 * slope:.1f} us a token, R^2 {r_squared:.5f}"
    print(f"\n{engine.label}, {args.threads} threads: {line}")


if __name__ == "__main__":
    main()
