"""What a user installs: one top-level name, and help without any heavy package."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import venv
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
COMMANDS = ["export", "build-engine", "verify", "bench", "run", "inspect", "doctor", "demo"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """The wheel without native libraries: quick, and the same Python files."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT],
        check=True,
        env=os.environ | {"CONVBERT_DEPLOY_PURE_PYTHON": "1"},
    )
    return next(folder.glob("*.whl"))


def test_only_top_level_name_is_ours(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"convbert_deploy"}
    assert {"convbert_deploy/cli.py", "convbert_deploy/calibration/__init__.py"} <= set(names)


@pytest.fixture(scope="module")
def bare_python(wheel, tmp_path_factory) -> pathlib.Path:
    """An environment with the wheel and click, and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "click"], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True)
    return python


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_needs_only_click(bare_python, command):
    script = bare_python.parent / "convbert-deploy"
    arguments = [script, *([command] if command else []), "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


def test_import_loads_nothing_heavy(bare_python):
    code = "import convbert_deploy, sys; print([m for m in sys.modules if m in ('torch','numpy')])"
    out = subprocess.check_output([bare_python, "-c", code], text=True)
    assert out.strip() == "[]"


def test_cli_runs_from_the_checkout():
    done = subprocess.run(
        [sys.executable, "cli.py", "--version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "convbert-deploy" in done.stdout


def test_stray_import_of_calibration_fails():
    """A second copy of the module would have its own exception classes."""
    code = "import sys; sys.path.insert(0, '.'); import calibration.typed"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "relative import" in done.stderr
