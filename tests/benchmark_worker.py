"""A worker that computes nothing: it answers with the times it was told, or misbehaves.

Run as a program in place of the real one. ``load`` brings ``costs``, the milliseconds of its runs,
and ``behaviour``: one of ok, dies-loading, dies-running, refuses, not-finite, babbles.
"""

from __future__ import annotations

import os
import pathlib
import sys

import numpy as np

from convbert_deploy.benchmarking.worker.frames import read_frame, write_frame

SCRIPT = pathlib.Path(__file__).resolve()


def main() -> None:
    questions, answers = sys.stdin.buffer, sys.stdout.buffer
    costs, behaviour = iter([]), "ok"
    while (frame := read_frame(questions)) is not None:
        header, arrays = frame
        op = header["op"]
        if op == "load":
            costs, behaviour = iter(header["costs"]), header["behaviour"]
            if behaviour == "dies-loading":
                sys.exit("no such model")
            answer = {
                "op": "ready",
                "convert_ms": 0.0,
                "load_ms": 7.0,
                "loaded_bytes": 1000,
                "versions": {"fake": "1.0"},
                "arithmetic": header.get("arithmetic", "fp32"),
                "weights_bytes": 500,
                "notes": [],
            }
            write_frame(answers, answer)
        elif op == "prepare":
            seen = arrays["0/input_ids"]
            if behaviour == "refuses":
                error = {"op": "error", "kind": "ShapeError", "text": "too long"}
                write_frame(answers, error | {"hint": "cut it", "plain": True})
                continue
            ready = {"op": "prepared", "prepare_ms": 3.0, "notes": ["note"], "weights_bytes": 400}
            write_frame(answers, ready)
        elif op == "run":
            if behaviour == "dies-running":
                os.abort()
            if behaviour == "babbles":
                print("Loading weights... done", flush=True)
            write_frame(answers, {"op": "ran", "ms": [next(costs) for _ in range(header["count"])]})
        elif op == "answer":
            logits = seen.astype(np.float32)[..., None]
            if behaviour == "not-finite":
                logits = logits * np.float32("nan")
            logits = logits + np.float32(header.get("error", 0))
            write_frame(answers, {"op": "answered"}, {"logits": logits})
        elif op == "finish":
            write_frame(answers, {"op": "finished", "peak_bytes": 2000})


if __name__ == "__main__":
    main()
