"""Work that must not count as the candidate's memory or time: converting a model takes torch and
several copies of the weights, which none of those who run the result have loaded."""

from __future__ import annotations

import importlib
import json
import pathlib
import subprocess
import sys
from typing import Any

_SHOWN_LINES = 3


def run_apart(task: str, settings: dict[str, Any]) -> None:
    """``MODULE:FUNCTION`` of this folder with ``settings``, in a process that ends with it.

    Raises:
        RuntimeError: it failed; with the last lines it wrote.
    """
    folder = pathlib.Path(__file__).resolve().parent
    done = subprocess.run(
        [sys.executable, "-B", str(folder), task],
        input=json.dumps(settings),
        capture_output=True,
        text=True,
        check=False,
    )
    sys.stderr.write(done.stderr)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.strip().splitlines() if line.strip()]
        raise RuntimeError(" / ".join(lines[-_SHOWN_LINES:]) or f"exit status {done.returncode}")


def main(task: str) -> None:
    """The other side of ``run_apart``."""
    module, _, function = task.partition(":")
    settings = json.load(sys.stdin)
    getattr(importlib.import_module(f".{module}", __package__), function)(settings)
