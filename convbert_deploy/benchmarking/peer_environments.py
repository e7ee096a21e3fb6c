"""Environments for peers, made with pip when the user agrees, kept in the cache folder.

An environment is named after its peer and a hash of what it must hold, so a changed range makes a
new one. torch is pinned to the release of the running environment where there is one: the same
torch on both sides, and the same build (CPU or CUDA).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator

from convbert_deploy.benchmarking.peers import Peer, PeerError
from convbert_deploy.provenance import atomic_file

_COMPLETE = "installed.txt"
_SHOWN_LINES = 8
_TORCHVISION = "torchvision"


def cache_folder() -> pathlib.Path:
    """``$XDG_CACHE_HOME/convbert-deploy/peers``, by default below ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME")
    root = pathlib.Path(base) if base else pathlib.Path.home() / ".cache"
    return root / "convbert-deploy" / "peers"


def running_environment_has(peer: Peer) -> bool:
    """The interpreter that runs this satisfies every requirement of the peer."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return False
    for one in peer.requirements:
        required = Requirement(one.text)
        try:
            found = importlib.metadata.version(_installed_name(required.name))
        except importlib.metadata.PackageNotFoundError:
            return False
        if not required.specifier.contains(found, prereleases=True):
            return False
    return True


def _installed_name(name: str) -> str:
    """The GPU build of ONNX Runtime goes by another name."""
    if name == "onnxruntime":
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version("onnxruntime-gpu")
            return "onnxruntime-gpu"
    return name


def requirements(peer: Peer) -> list[str]:
    """pip requirements, with torch as in the running environment."""
    texts = [one.text for one in peer.requirements]
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return texts
    return [f"torch=={torch}" if text.startswith("torch>") else text for text in texts]


def install_command(peer: Peer) -> str:
    """How to make the same environment by hand."""
    return "pip install " + " ".join(shlex.quote(text) for text in requirements(peer))


def peer_folder(peer: Peer) -> pathlib.Path:
    key = "\n".join([sys.version.split()[0], *requirements(peer)])
    return cache_folder() / f"{peer.kind}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def peer_python(
    peer: Peer, *, install: bool, progress: Callable[[str], None] = lambda _: None
) -> pathlib.Path:
    """An interpreter that has the peer: this one, an environment made before, or a new one.

    Raises:
        PeerError: it is absent and ``install`` is False, or pip failed.
    """
    if running_environment_has(peer):
        return pathlib.Path(sys.executable)
    folder = peer_folder(peer)
    python = folder / "bin" / "python"
    if (folder / _COMPLETE).is_file():
        return python
    if not install:
        raise PeerError(
            f"peer {peer.name} is not installed: it needs {', '.join(requirements(peer))}",
            hint="add --install-peers to put it into an environment of its own below "
            f"{cache_folder()}",
        )
    with _locked(folder):
        if not (folder / _COMPLETE).is_file():
            progress(f"installing peer {peer.name} into {folder}")
            _make(peer, folder, python)
    return python


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    """Two benchmarks at once must not fill the same folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(peer: Peer, folder: pathlib.Path, python: pathlib.Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    try:
        _run([sys.executable, "-m", "venv", str(folder)], f"make an environment in {folder}")
        extra = shlex.split(os.environ.get("PIP_ARGS", ""))
        pip = [str(python), "-m", "pip"]
        _run([*pip, "install", "--quiet", *extra, *requirements(peer)], f"install {peer.name}")
        # A CPU build of torch comes from an index of its own; torchvision, if the index lacks it,
        # from PyPI for the other build. It then fails when imported, and transformers with it.
        if not _imports(python, _TORCHVISION):
            _run([*pip, "uninstall", "--quiet", "--yes", _TORCHVISION], "repair torchvision")
        listed = _run([*pip, "freeze", "--disable-pip-version-check"], "list what is installed")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    with atomic_file(folder / _COMPLETE) as temporary:
        temporary.write_text(listed)


def _imports(python: pathlib.Path, module: str) -> bool:
    command = [str(python), "-c", f"import {module}"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _run(command: list[str], what: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise PeerError(f"cannot {what}: {error}") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line and "WARNING" not in line]
        raise PeerError(
            f"cannot {what}: " + " / ".join(said[-_SHOWN_LINES:]),
            hint="packages of another index: PIP_EXTRA_INDEX_URL=URL, or PIP_ARGS='...'",
        )
    return done.stdout
