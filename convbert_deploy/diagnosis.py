"""What works here, what is missing, and the command that adds it."""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import importlib.metadata
import importlib.util
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from convbert_deploy.environment import Environment, environment
from convbert_deploy.errors import PluginError

#: Package by import name: the extra that brings it and what it is for.
_PACKAGES: dict[str, tuple[str | None, str]] = {
    "onnx": (None, "reading and writing graphs"),
    "torch": ("export", "checkpoints and the eager reference"),
    "transformers": ("export", "checkpoints and the eager reference"),
    "onnxruntime": ("ort", "the onnxruntime engine"),
    "tensorrt_rtx": ("tensorrt-rtx", "the tensorrt-rtx engine"),
    "tensorrt": ("tensorrt", "the tensorrt engine"),
    "tokenizers": ("serve", "text input"),
    "sklearn": ("evaluate", "task metrics"),
    "matplotlib": ("bench", "plots of bench and profile"),
    "tritonclient": ("triton", "probe and load over gRPC"),
    "pyarrow": ("bulk", "bulk scoring of Parquet"),
    "ray": ("ray", "bulk scoring on a cluster"),
}
#: distributions called otherwise than what they hold
_DISTRIBUTIONS = {"sklearn": "scikit-learn"}

_BUILD_LIBRARIES = "make native"


class Status(str, enum.Enum):
    """ok; missing: not there; broken: there and unusable."""

    OK = "ok"
    MISSING = "missing"
    BROKEN = "broken"


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that was looked for. ``fix`` is a command or instruction; None when ok."""

    name: str
    status: Status
    detail: str
    fix: str | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"status": self.status.value}


def doctor(facts: Environment | None = None) -> list[Check]:
    """Check packages, native libraries, compilers and the GPU. Imports no heavy package.

    Args:
        facts: what is known about the machine; None looks now.
    """
    facts = facts or environment()
    return [
        *_packages(facts),
        *_libraries(),
        _tool("c++ compiler", ("c++", "g++", "clang++"), "apt-get install g++"),
        _tool("cmake", ("cmake",), "pip install cmake"),
        _tool("nvcc", ("nvcc",), "install the CUDA toolkit, or: pip install nvidia-cuda-nvcc"),
        _gpu(facts),
    ]


def _packages(facts: Environment) -> Iterator[Check]:
    for name, (extra, purpose) in _PACKAGES.items():
        install = f"pip install 'convbert-deploy{f'[{extra}]' if extra else ''}'"
        version = facts.versions.get(name) or _version(name)
        importable = importlib.util.find_spec(name) is not None
        if version and not importable:
            yield Check(
                name,
                Status.BROKEN,
                f"{version} is installed but cannot be imported ({purpose})",
                install.replace("install", "install --force-reinstall", 1),
            )
        elif importable:
            yield Check(name, Status.OK, f"{version or 'version unknown'} ({purpose})")
        else:
            yield Check(name, Status.MISSING, f"needed for {purpose}", install)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(_DISTRIBUTIONS.get(name, name))
    except importlib.metadata.PackageNotFoundError:
        return None


def _libraries() -> Iterator[Check]:
    from convbert_deploy import plugin_library

    for name, find in (
        ("kernels library", plugin_library.kernels_library),
        ("onnxruntime operators", plugin_library.ort_library),
        ("tensorrt plugins", plugin_library.tensorrt_library),
    ):
        yield check_library(name, find)


def check_library(name: str, find: Callable[[], Path]) -> Check:
    """Find one of our native libraries and load it.

    Loading is a real test: a library that needs a missing one (CUDA, C++ run time) fails here and
    not in the middle of a build. It links no runtime, so nothing else is pulled in.
    """
    try:
        path = find()
    except PluginError as error:
        return Check(name, Status.MISSING, str(error), error.hint or _BUILD_LIBRARIES)
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        return Check(name, Status.BROKEN, str(error), _BUILD_LIBRARIES)
    return Check(name, Status.OK, str(path))


def _tool(name: str, commands: tuple[str, ...], fix: str) -> Check:
    for command in commands:
        path = shutil.which(command)
        if path:
            return Check(name, Status.OK, path)
    return Check(name, Status.MISSING, "only needed to build the libraries", fix)


def _gpu(facts: Environment) -> Check:
    if facts.gpus:
        found = ", ".join(f"{gpu.name} (sm {gpu.capability})" for gpu in facts.gpus)
        return Check("gpu", Status.OK, f"{found}, driver {facts.gpus[0].driver}")
    problem = facts.gpu_problem or "none found"
    status = Status.MISSING if "not found" in problem or "lists no" in problem else Status.BROKEN
    fix = "install an NVIDIA driver; without a GPU use --backend onnxruntime"
    return Check("gpu", status, problem, fix)
