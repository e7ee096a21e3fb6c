"""Is the machine itself steady? What Linux tells of load, quotas and thermal throttling."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Iterator

from convbert_deploy.benchmarking.measurement import BenchmarkWarning

#: A load average this far above the CPUs left over means that others want the same cores.
_SLACK = 0.5
_THROTTLE_COUNTS = "sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/*_throttle_count"
_FREQUENCIES = "sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq"
_QUOTA = "sys/fs/cgroup/cpu.stat"
#: Change of the mean clock frequency from the start to the end.
_CLOCK_CHANGE = 0.1


@dataclasses.dataclass(frozen=True)
class MachineState:
    """load: mean number of runnable tasks in the last minute. throttled: thermal events so far.
    held_back: periods in which the container's quota stopped its tasks. mhz: mean clock now.
    None where the system does not tell."""

    load: float | None
    throttled: int | None
    held_back: int | None
    mhz: float | None


def machine_state(root: pathlib.Path = pathlib.Path("/")) -> MachineState:
    """Read it now; ``root`` stands in for ``/`` in tests."""
    counts = _numbers(root, _THROTTLE_COUNTS)
    frequencies = _numbers(root, _FREQUENCIES)
    held_back = None
    for line in _text(root / _QUOTA).splitlines():
        key, _, value = line.partition(" ")
        if key == "nr_throttled":
            held_back = int(value)
    load = _text(root / "proc/loadavg").split()
    return MachineState(
        load=float(load[0]) if load else None,
        throttled=sum(counts) if counts else None,
        held_back=held_back,
        mhz=sum(frequencies) / len(frequencies) / 1000 if frequencies else None,
    )


def load_warnings(state: MachineState, threads: int | None) -> Iterator[BenchmarkWarning]:
    """Before the first run: do others use the cores that the candidates are to have?"""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    left = (usable or 1) - (threads or usable or 1)
    if state.load is not None and state.load > left + _SLACK:
        yield BenchmarkWarning(
            "load",
            "",
            "",
            f"other programs were running at the start: load average {state.load:.2g}, with "
            f"{usable} usable CPUs and {threads or usable} threads asked for; use a quiet machine",
        )


def state_warnings(before: MachineState, after: MachineState) -> Iterator[BenchmarkWarning]:
    """After the last run."""
    if (after.throttled or 0) > (before.throttled or 0):
        count = (after.throttled or 0) - (before.throttled or 0)
        yield BenchmarkWarning(
            "throttling", "", "", f"the CPU was throttled {count} times by its temperature"
        )
    if (after.held_back or 0) > (before.held_back or 0):
        count = (after.held_back or 0) - (before.held_back or 0)
        yield BenchmarkWarning(
            "quota",
            "",
            "",
            f"the container's CPU quota stopped its programs in {count} periods: raise it or ask "
            "for fewer --threads",
        )
    if before.mhz and after.mhz and abs(after.mhz / before.mhz - 1) > _CLOCK_CHANGE:
        yield BenchmarkWarning(
            "clock",
            "",
            "",
            f"the clock was at {before.mhz:.0f} MHz at the start and {after.mhz:.0f} at the end: "
            "fix it (cpupower frequency-set) for times that can be repeated",
        )


def _numbers(root: pathlib.Path, pattern: str) -> list[int]:
    texts = (_text(path).strip() for path in sorted(root.glob(pattern)))
    return [int(text) for text in texts if text.isdigit()]


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
