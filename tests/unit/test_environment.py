"""Facts about a machine, from texts of machines we do not have, and what doctor makes of them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from convbert_deploy import diagnosis as doctor_module
from convbert_deploy.diagnosis import Status, check_library, doctor
from convbert_deploy.environment import (
    Gpu,
    benchmark_header,
    environment,
    read_cpu,
    read_gpus,
    versions,
)
from convbert_deploy.errors import PluginError

_CPUINFO = """processor : 0
model name : Intel(R) Xeon(R) Platinum 8481C
physical id : 0
core id : 0
flags : fpu fma avx2 avx512f avx512dq avx512bw avx512vl avx512_vnni amx_bf16 amx_tile amx_int8

processor : 1
model name : Intel(R) Xeon(R) Platinum 8481C
physical id : 0
core id : 0
flags : fpu fma avx2

processor : 2
physical id : 1
core id : 0
"""


@pytest.fixture(scope="module")
def facts():
    return environment()


def test_cpu_of_another_machine():
    cpu = read_cpu(_CPUINFO)
    assert cpu.model == "Intel(R) Xeon(R) Platinum 8481C"
    assert cpu.cores == 2, "two threads of one core, and a second socket"
    assert cpu.isa == ("avx2", "avx512", "avx512_vnni", "amx_bf16", "amx_int8")


def test_amx_without_tiles_is_no_amx():
    assert read_cpu("flags : amx_bf16 avx2").isa == ()


def test_gpus_from_nvidia_smi():
    text = "NVIDIA H200, 9.0, 575.57.08, 143771\nNVIDIA A10, 8.6, 575.57.08, [N/A]\nbroken line\n"
    assert read_gpus(text) == (
        Gpu("NVIDIA H200", "9.0", "575.57.08", 143771),
        Gpu("NVIDIA A10", "8.6", "575.57.08", 0),
    )


def test_this_machine_is_described_and_serialisable(facts):
    assert facts.python == ".".join(map(str, sys.version_info[:3]))
    assert facts.cpu.usable >= 1
    assert facts.versions["onnx"]
    assert bool(facts.gpus) == (facts.gpu_problem is None)
    json.dumps(facts.to_json())


def test_versions_cover_what_an_artifact_depends_on():
    assert {"torch", "transformers", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx"} <= set(
        versions()
    )
    assert versions()["convbert_deploy"]


def test_looking_imports_no_heavy_package():
    code = (
        "import sys; from convbert_deploy.environment import environment; environment(); "
        "from convbert_deploy.diagnosis import doctor; import convbert_deploy.report; "
        "print([m for m in ('torch', 'transformers', 'onnxruntime', 'tensorrt_rtx') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_benchmark_header_names_the_device_and_threads(facts):
    gpu = Gpu("NVIDIA H200", "9.0", "575.57.08", 143771)
    header = benchmark_header(dataclasses.replace(facts, gpus=(gpu,)), threads=4, device="cuda")
    assert "NVIDIA H200" in header["gpu"]
    assert header["threads"] == "4"
    assert "onnx" in header["versions"]
    header = benchmark_header(facts, threads=None)
    assert "default" in header["threads"]
    assert "gpu" not in header


def test_missing_library_carries_the_build_command():
    def find():
        raise PluginError("libx.so is not built", hint="make native")

    check = check_library("x", find)
    assert (check.status, check.fix) == (Status.MISSING, "make native")


def test_library_that_does_not_load_is_broken_not_ok(tmp_path):
    library = tmp_path / "libx.so"
    library.write_bytes(b"not a library")
    check = check_library("x", lambda: library)
    assert check.status is Status.BROKEN
    assert str(library) in check.detail
    assert check.fix


def test_doctor_finds_what_is_absent_and_what_is_broken(facts, monkeypatch):
    monkeypatch.setattr(doctor_module, "_libraries", lambda: iter(()))
    monkeypatch.setattr(doctor_module.shutil, "which", lambda name: None)
    specs = {"onnx": object(), "tensorrt": None, "torch": None}
    monkeypatch.setattr(
        doctor_module.importlib.util, "find_spec", lambda name: specs.get(name, object())
    )
    seen = dataclasses.replace(
        facts,
        versions={"onnx": "1.23", "torch": "2.13", "tensorrt": None},
        gpus=(),
        gpu_problem="nvidia-smi failed: driver mismatch",
    )
    checks = {check.name: check for check in doctor(seen)}
    assert checks["onnx"].status is Status.OK
    assert checks["onnx"].fix is None
    assert checks["torch"].status is Status.BROKEN
    assert checks["tensorrt"].status is Status.MISSING
    assert "convbert-deploy[tensorrt]" in checks["tensorrt"].fix
    assert checks["nvcc"].status is Status.MISSING
    assert checks["gpu"].status is Status.BROKEN
    assert all(check.fix for check in checks.values() if check.status is not Status.OK)
