"""What this machine is and what is installed on it, as data.

Versions come from package metadata: nothing heavy is imported, so this is quick and works when a
package is broken. ``convbert_deploy.diagnosis`` turns the facts into checks.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Distributions that can provide each package; the first one installed counts.
DISTRIBUTIONS: dict[str, tuple[str, ...]] = {
    "convbert_deploy": ("convbert-deploy",),
    "torch": ("torch",),
    "transformers": ("transformers",),
    "tokenizers": ("tokenizers",),
    "onnx": ("onnx",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt_rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
}

#: Instruction sets that decide which CPU kernels can run: our name and the flags of /proc/cpuinfo.
_ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "avx2": ("avx2", "fma"),
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
    "avx512_vnni": ("avx512_vnni",),
    "avx512_bf16": ("avx512_bf16",),
    "amx_bf16": ("amx_tile", "amx_bf16"),
    "amx_int8": ("amx_tile", "amx_int8"),
}

_GPU_QUERY = ("name", "compute_cap", "driver_version", "memory.total")


@dataclasses.dataclass(frozen=True)
class Cpu:
    """model: the name the kernel gives; cores: physical, 0 if unknown; usable: logical CPUs this
    process may run on; isa: of avx2, avx512, avx512_vnni, avx512_bf16, amx_bf16, amx_int8."""

    model: str
    cores: int
    usable: int
    isa: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One CUDA device; ``capability`` like ``9.0``, memory in MiB."""

    name: str
    capability: str
    driver: str
    memory_mib: int


@dataclasses.dataclass(frozen=True)
class Environment:
    """Facts about this machine.

    memory_mib: of the machine, or the container's limit if that is lower.
    gpu_problem: why no GPU was found, None if one was.
    versions: by import name; None where not installed.
    onnxruntime_providers: execution providers whose library the installed package holds.
    """

    python: str
    os: str
    cpu: Cpu
    memory_mib: int
    gpus: tuple[Gpu, ...]
    gpu_problem: str | None
    versions: Mapping[str, str | None]
    onnxruntime_providers: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def environment() -> Environment:
    """Look at this machine. Never raises for something absent."""
    gpus, problem = _gpus()
    return Environment(
        python=platform.python_version(),
        os=_os_name(),
        cpu=read_cpu(_text("/proc/cpuinfo")),
        memory_mib=_memory_mib(),
        gpus=gpus,
        gpu_problem=problem,
        versions=versions(),
        onnxruntime_providers=_onnxruntime_providers(),
    )


def versions() -> dict[str, str | None]:
    """Version of each package that a figure or an artifact can depend on; None if absent."""
    from convbert_deploy import __version__

    found = {name: _installed_version(candidates) for name, candidates in DISTRIBUTIONS.items()}
    return found | {"convbert_deploy": __version__}


def benchmark_header(
    facts: Environment, *, threads: int | None, device: str = "cpu"
) -> dict[str, str]:
    """What a timing depends on, as lines to print above it.

    Args:
        threads: intra-op CPU threads asked for; None means each runtime's default.
        device: ``cpu`` or ``cuda``.
    """
    isa = ", ".join(facts.cpu.isa) or "no AVX2"
    cpu = f"{facts.cpu.model}, {facts.cpu.usable} usable CPUs, {isa}"
    header = {"cpu": cpu}
    if device == "cuda" and facts.gpus:
        gpu = facts.gpus[0]
        header["gpu"] = f"{gpu.name}, compute capability {gpu.capability}, driver {gpu.driver}"
    chosen = "each runtime's default" if threads is None else str(threads)
    installed = [f"{name} {version}" for name, version in facts.versions.items() if version]
    return {
        "device": device,
        **header,
        "threads": chosen,
        "system": f"{facts.os}, Python {facts.python}",
        "versions": ", ".join(installed),
    }


def read_cpu(cpuinfo: str) -> Cpu:
    """Cpu from the text of /proc/cpuinfo (x86 and Arm); other systems get what Python knows."""
    fields: dict[str, str] = {}
    cores = set()
    physical = ""
    for line in cpuinfo.splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        fields.setdefault(key, value)
        if key == "physical id":
            physical = value
        elif key == "core id":
            cores.add((physical, value))
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return Cpu(
        model=fields.get("model name") or platform.processor() or platform.machine(),
        cores=len(cores),
        usable=_usable_cpus(),
        isa=tuple(name for name, needed in _ISA_FLAGS.items() if flags.issuperset(needed)),
    )


def read_gpus(nvidia_smi: str) -> tuple[Gpu, ...]:
    """Gpus from ``nvidia-smi --query-gpu=name,compute_cap,driver_version,memory.total``
    in ``csv,noheader,nounits``; rows it cannot read are left out."""
    gpus = []
    for row in csv.reader(nvidia_smi.splitlines(), skipinitialspace=True):
        if len(row) == len(_GPU_QUERY):
            name, capability, driver, memory = (cell.strip() for cell in row)
            gpus.append(Gpu(name, capability, driver, int(memory) if memory.isdigit() else 0))
    return tuple(gpus)


def _gpus() -> tuple[tuple[Gpu, ...], str | None]:
    query = ["nvidia-smi", f"--query-gpu={','.join(_GPU_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except FileNotFoundError:
        return (), "nvidia-smi not found: no NVIDIA driver is installed"
    except (OSError, subprocess.TimeoutExpired) as error:
        return (), f"nvidia-smi failed: {error}"
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        return (), f"nvidia-smi failed: {said[0] if said else f'exit status {done.returncode}'}"
    gpus = read_gpus(done.stdout)
    return gpus, None if gpus else "nvidia-smi lists no GPU"


def _installed_version(candidates: tuple[str, ...]) -> str | None:
    for name in candidates:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _onnxruntime_providers() -> tuple[str, ...]:
    """From the provider libraries that the package holds; the CPU one is built in."""
    for name in DISTRIBUTIONS["onnxruntime"]:
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        names = {path.name for path in files}
        known = {"TensorrtExecutionProvider": "tensorrt", "CUDAExecutionProvider": "cuda"}
        return (
            *(
                provider
                for provider, stem in known.items()
                if any(file.startswith(f"libonnxruntime_providers_{stem}") for file in names)
            ),
            "CPUExecutionProvider",
        )
    return ()


def _os_name() -> str:
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']} {platform.machine()}"
    except (OSError, KeyError):
        return f"{platform.system()} {platform.release()} {platform.machine()}"


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_mib() -> int:
    sizes = []
    for line in _text("/proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            sizes.append(int(line.split()[1]) // 1024)
    limit = _text("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit():
        sizes.append(int(limit) // 2**20)
    return min(sizes, default=0)


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
