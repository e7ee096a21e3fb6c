"""Import TensorRT or TensorRT-RTX and give it our plugin library.

The two are one API under two names; this is the only module that imports either.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import pathlib
import struct
import tempfile
from types import ModuleType
from typing import Any, Literal

from convbert_deploy.errors import EngineError, MissingDependencyError, PluginError

Kind = Literal["tensorrt", "tensorrt-rtx"]

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
#: Before 10.7 the parser inlined a model-local function even where a plugin of its name exists.
_OLDEST_TENSORRT = (10, 7)
_RTX_LIBRARY = "libtensorrt_rtx.so"
#: Kept open for the life of the process: closing one would unload it.
_handles: dict[str, ctypes.CDLL] = {}
_loaded_plugins: set[tuple[str, pathlib.Path]] = set()


def import_tensorrt(kind: Kind) -> ModuleType:
    """The module ``tensorrt`` or ``tensorrt_rtx``.

    Raises:
        MissingDependencyError: not installed.
        EngineError: a TensorRT older than 10.7.
    """
    name = _MODULES[kind]
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(name, needed_for=f"backend {kind}", extra=kind) from error
    version = tuple(int(part) for part in module.__version__.split(".")[:2])
    if kind == "tensorrt" and version < _OLDEST_TENSORRT:
        raise EngineError(
            f"TensorRT is {module.__version__}, expected 10.7 or newer",
            hint="pip install --upgrade tensorrt",
        )
    return module


def capturing_logger(trt: ModuleType) -> Any:
    """An ``ILogger`` that keeps (severity, text) pairs in its list ``messages``."""

    class CapturingLogger(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[tuple[Any, str]] = []

        def log(self, severity: Any, message: str) -> None:
            self.messages.append((severity, message))

    return CapturingLogger()


def first_error(trt: ModuleType, logger: Any) -> str:
    """The first error a capturing logger holds; ``no message`` if there is none."""
    severe = (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)
    return next((text for severity, text in logger.messages if severity in severe), "no message")


def load_plugins(trt: ModuleType, kind: Kind, library: pathlib.Path) -> None:
    """Register the creators in ``library``, once a process (a second time TensorRT refuses them).

    Raises:
        PluginError: the file is missing, or TensorRT does not accept it.
    """
    library = library.resolve()
    if (kind, library) in _loaded_plugins:
        return
    if not library.is_file():
        raise PluginError(f"plugin library {library} does not exist", hint="convbert-deploy doctor")
    if kind == "tensorrt-rtx":
        provide_unversioned_rtx_library(trt)
    if trt.get_plugin_registry().load_library(str(library)) is None:
        raise PluginError(
            f"{kind} {trt.__version__} did not accept the plugin library {library}",
            hint="convbert-deploy doctor",
        )
    _loaded_plugins.add((kind, library))


def provide_unversioned_rtx_library(trt: ModuleType) -> None:
    """Make ``dlopen("libtensorrt_rtx.so")`` find the TensorRT-RTX of this process.

    TensorRT-RTX's ONNX parser opens that name when it meets a plugin, the wheel ships only
    ``libtensorrt_rtx.so.1``, and the parser aborts the process ("terminate called without an active
    exception"). The loader takes an already loaded library of that SONAME, so we load one: an ELF
    file of 450 bytes without code that needs ``libtensorrt_rtx.so.1``. Unlike a symlink beside the
    library it needs no write access to site-packages, unlike a symlink in a private folder it works
    after ``import tensorrt_rtx``, and it cannot resolve to a second installed version, whose plugin
    registry would be empty. No compiler is needed.
    """
    if _RTX_LIBRARY in _handles:
        return
    versioned = f"{_RTX_LIBRARY}.{trt.__version__.split('.')[0]}"
    try:
        ctypes.CDLL(versioned, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError as error:
        raise PluginError(f"{versioned} is not in this process: {error}") from error
    content = forwarding_library(soname=_RTX_LIBRARY, needed=versioned)
    _handles[_RTX_LIBRARY] = _load_from_memory(content, _RTX_LIBRARY)


def _load_from_memory(content: bytes, soname: str) -> ctypes.CDLL:
    """Load an ELF image under its SONAME for the life of the process."""
    try:
        descriptor = os.memfd_create(soname)
    except OSError:  # some sandboxes forbid it
        with tempfile.NamedTemporaryFile(suffix=".so") as file:
            file.write(content)
            file.flush()
            return ctypes.CDLL(file.name, mode=ctypes.RTLD_GLOBAL)
    os.write(descriptor, content)
    # Never closed: the loader knows libraries by path, and would hand this one out again for the
    # next library loaded through a descriptor of the same number.
    library = ctypes.CDLL(f"/proc/self/fd/{descriptor}", mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(soname, mode=os.RTLD_NOLOAD | os.RTLD_NOW)  # raises OSError where it did just that
    return library


def forwarding_library(soname: str, needed: str) -> bytes:
    """A 64-bit little-endian ELF shared object without code: named ``soname``, needing ``needed``.

    Layout (System V gABI, chapters 4 and 5): header, three program headers, one null symbol, a hash
    table with no entries, strings, dynamic section. The machine is that of this process.
    """
    with pathlib.Path("/proc/self/exe").open("rb") as executable:
        (machine,) = struct.unpack_from("<H", executable.read(20), 18)
    strings = b"\0" + soname.encode() + b"\0" + needed.encode() + b"\0"
    header_bytes, program_header_bytes, symbol_bytes = 64, 56, 24
    symbols = header_bytes + 3 * program_header_bytes
    hashes = symbols + symbol_bytes
    text = hashes + 16
    dynamic = (text + len(strings) + 7) // 8 * 8
    entries = [  # (tag, value): NEEDED, SONAME, HASH, STRTAB, SYMTAB, STRSZ, SYMENT, NULL
        (1, 1 + len(soname) + 1),
        (14, 1),
        (4, hashes),
        (5, text),
        (6, symbols),
        (10, len(strings)),
        (11, symbol_bytes),
        (0, 0),
    ]
    dynamic_section = b"".join(struct.pack("<QQ", *entry) for entry in entries)
    end = dynamic + len(dynamic_section)
    read_write = 6

    def program_header(kind: int, start: int, size: int, align: int) -> bytes:
        return struct.pack("<IIQQQQQQ", kind, read_write, start, start, start, size, size, align)

    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack(
        "<HHIQQQIHHHHHH", 3, machine, 1, 0, header_bytes, 0, 0, header_bytes, 56, 3, 64, 0, 0
    )
    load, dynamic_kind, gnu_stack = 1, 2, 0x6474E551
    content = (
        header
        # 64 KiB: the largest page of the machines TensorRT runs on
        + program_header(load, 0, end, 0x10000)
        + program_header(dynamic_kind, dynamic, len(dynamic_section), 8)
        + program_header(gnu_stack, 0, 0, 16)
        + bytes(symbol_bytes)
        + struct.pack("<IIII", 1, 1, 0, 0)
        + strings
    )
    return content.ljust(dynamic, b"\0") + dynamic_section
