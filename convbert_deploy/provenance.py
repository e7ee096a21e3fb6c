"""Where an artifact comes from: digests, atomic writes, and the chain back to the checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from convbert_deploy.errors import OutputError

_CHUNK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Origin:
    """One link of the chain: what kind of artifact, its name and its sha256."""

    kind: str
    name: str
    sha256: str

    def to_json(self) -> dict[str, str]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Origin:
        return cls(kind=data["kind"], name=data["name"], sha256=data["sha256"])


def sha256_of_file(path: pathlib.Path) -> str:
    return sha256_of_files([path])


def sha256_of_files(paths: Sequence[pathlib.Path]) -> str:
    """One digest over the bytes of those files that exist, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        if path.is_file():
            with path.open("rb") as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _write_errors_named(target: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"cannot write {target}: {reason}",
            hint="free space or choose another place with -o; nothing partial was left",
        ) from error


@contextlib.contextmanager
def atomic_file(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a temporary path beside ``target``; it takes the final name only on success.

    Raises:
        OutputError: the disk is full, the folder is missing or not writable.
    """
    with _write_errors_named(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(handle)
        temporary = pathlib.Path(name)
        try:
            yield temporary
            temporary.chmod(0o644)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a temporary directory beside ``target`` that replaces it as a whole on success.

    Raises:
        OutputError: as ``atomic_file``.
    """
    with _write_errors_named(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        old = temporary.with_name(temporary.name + ".old")
        try:
            yield temporary
            temporary.chmod(0o755)
            if target.exists():
                target.replace(old)
            temporary.replace(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
