"""A real Triton Inference Server for tests, without GPU, docker or root.

The wheel ``nvidia-pytriton`` holds a tritonserver with the python backend. It and the packages that
a python model imports are installed once with pip, into a cache; every test run adds a virtual
environment of its own, with the package as it is in this checkout.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence

import convbert_deploy
from convbert_deploy import plugin_library
from convbert_deploy.provenance import atomic_directory
from convbert_deploy.serving.client import metric, metrics_page

_SERVER = ("nvidia-pytriton==0.7.0",)
_CACHE = (
    pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
    / "convbert-deploy"
    / "triton-test"
)
_PIP_SECONDS = 600
_START_SECONDS = 120
_STOP_SECONDS = 40
_POLL_SECONDS = 0.05
_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


class TritonUnavailableError(Exception):
    """This machine cannot run the server; the message names what is missing."""


class ServerError(AssertionError):
    """The server did not start, or did not do what it was told; holds the end of its log."""


@dataclasses.dataclass(frozen=True)
class TritonEnvironment:
    """server: folder of bin/tritonserver. backends: folder with the python backend. libraries:
    folders for LD_LIBRARY_PATH. model: a virtual environment for EXECUTION_ENV_PATH, with this
    package, numpy below 2 (under 2 the server answers 200 with empty tensors), ONNX Runtime and
    tokenizers."""

    server: pathlib.Path
    backends: pathlib.Path
    libraries: tuple[pathlib.Path, ...]
    model: pathlib.Path


#: kept for the life of the process, so that its folder is
_WORK: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def triton_environment() -> TritonEnvironment:
    """Server and model environments, made on the first call.

    Raises:
        TritonUnavailableError: something is missing and pip cannot get it.
    """
    if sys.platform != "linux":
        raise TritonUnavailableError(f"tritonserver is for Linux, this is {sys.platform}")
    library = _python_library()
    wheel = installed("server", _SERVER, "--no-deps")
    server = wheel / "pytriton" / "tritonserver"
    stub = server / "python_backend_stubs" / _VERSION / "triton_python_backend_stub"
    if not stub.is_file():
        raise TritonUnavailableError(f"the tritonserver wheel has no stub for Python {_VERSION}")
    packages = installed("model", _model_requirements())
    _WORK.append(tempfile.TemporaryDirectory(prefix="convbert-triton-"))
    work = pathlib.Path(_WORK[-1].name)
    backends = work / "backends"
    shutil.copytree(server / "backends" / "python", backends / "python")
    shutil.copy2(stub, backends / "python")
    model = environment_of(work / "environment", (packages, _copied_package(work)))
    return TritonEnvironment(server, backends, (wheel / "nvidia_pytriton.libs", library), model)


def _model_requirements() -> tuple[str, ...]:
    """The versions of this environment, so that both compute the same."""
    try:
        pinned = [
            f"{name}=={importlib.metadata.version(name)}" for name in ("onnxruntime", "tokenizers")
        ]
    except importlib.metadata.PackageNotFoundError as error:
        raise TritonUnavailableError(f"{error.name} is not installed here") from error
    return ("numpy<2", *pinned)


def _python_library() -> pathlib.Path:
    """Folder of libpython, which the stub links."""
    name = f"libpython{_VERSION}.so.1.0"
    folders = [pathlib.Path(sys.base_prefix) / "lib"]
    folders += [
        pathlib.Path(folder)
        for key in ("LIBDIR", "LIBPL")
        if (folder := sysconfig.get_config_var(key))
    ]
    folders.append(pathlib.Path("/usr/lib") / (sysconfig.get_config_var("MULTIARCH") or ""))
    for folder in folders:
        if (folder / name).is_file():
            return folder
    raise TritonUnavailableError(f"tritonserver's python backend needs {name}, which is not here")


def installed(kind: str, requirements: Sequence[str], *arguments: str) -> pathlib.Path:
    """Folder that pip installed the requirements into, now or in an earlier run.

    Raises:
        TritonUnavailableError: pip cannot get them.
    """
    key = hashlib.sha256("\n".join((_VERSION, *requirements, *arguments)).encode()).hexdigest()
    target = _CACHE / f"{kind}-{key[:12]}"
    _CACHE.mkdir(parents=True, exist_ok=True)
    with (_CACHE / f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            with atomic_directory(target) as folder:
                _pip("--target", str(folder), *arguments, *requirements)
    return target


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise TritonUnavailableError(f"tritonserver: pip took over {_PIP_SECONDS} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        last = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise TritonUnavailableError(
            f"tritonserver is not in the cache {_CACHE} and pip cannot install "
            f"{' '.join(arguments[2:])} (no network?): {last}"
        )


def _copied_package(work: pathlib.Path) -> pathlib.Path:
    """A folder with a copy of this package and its libraries.

    A copy, because a server that runs must not see a checkout change under it; and because an
    editable install keeps the native libraries elsewhere than the sources.
    """
    source, copy = pathlib.Path(convbert_deploy.__file__).parent, work / "package"
    ignored = shutil.ignore_patterns("__pycache__", "lib")
    shutil.copytree(source, copy / "convbert_deploy", ignore=ignored)
    libraries = copy / "convbert_deploy" / "lib"
    libraries.mkdir()
    for short in ("onnxruntime", "kernels"):
        path = plugin_library.available()[short]
        if path is not None:
            shutil.copy2(path, libraries)
    return copy


def environment_of(folder: pathlib.Path, packages: Sequence[pathlib.Path]) -> pathlib.Path:
    """A virtual environment made in ``folder`` that sees the packages in these folders."""
    command = [sys.executable, "-m", "venv", "--without-pip", str(folder)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    site = folder / "lib" / f"python{_VERSION}" / "site-packages"
    (site / "model.pth").write_text("".join(f"{path}\n" for path in packages))
    return folder


class TritonServer:
    """A tritonserver on free ports of 127.0.0.1; ready inside its ``with`` block.

    explicit: models can be loaded and unloaded; all are loaded at the start either way.
    http_url, grpc_url, metrics_url: ``127.0.0.1:PORT``, as tritonclient takes them.
    """

    def __init__(self, repository: pathlib.Path, *, explicit: bool = False) -> None:
        self.repository, self._explicit = repository, explicit
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = pathlib.Path(tempfile.mkdtemp(prefix="convbert-triton-log-"))
        self._shared_memory = f"convbert_test_{os.getpid()}_{id(self)}_"

    def __enter__(self) -> TritonServer:
        try:
            self._start()
            self._wait_until_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        """What the server and its models wrote so far."""
        return (self._folder / "log").read_text(errors="replace")

    def stub_pids(self, model: str | None = None) -> list[int]:
        """Processes of the python models, or those of one model."""
        pids = []
        for pid, parent, command in _processes():
            if parent == self.pid and "triton_python_backend_stub" in command[0]:
                of_model = model is None or f"/{model}/" in f"{' '.join(command)}/"
                pids += [pid] if of_model else []
        return sorted(pids)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's values over the series that have these labels.

        Raises:
            KeyError: no such series.
        """
        return metric(metrics_page(self.metrics_url, timeout=10), name, **labels)

    def load(self, model: str) -> None:
        """Load the model; only with ``explicit``. One that is loaded and whose files are unchanged
        stays as it is, dead process or not: unload it first."""
        _post(f"http://{self.http_url}/v2/repository/models/{model}/load")

    def unload(self, model: str) -> None:
        """Take the model out of service; only with ``explicit``. Returns before it is gone."""
        _post(f"http://{self.http_url}/v2/repository/models/{model}/unload")

    def terminate(self, seconds: float = _STOP_SECONDS) -> int:
        """SIGTERM, then wait; the exit status.

        Raises:
            ServerError: it still runs after ``seconds``.
        """
        assert self._process is not None
        self._process.terminate()
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise ServerError(f"still there {seconds} s after SIGTERM\n{self._tail()}") from error

    def kill(self) -> None:
        """SIGKILL to the server and its models: one whose model died takes its whole exit timeout
        (30 s) to stop otherwise."""
        os.killpg(self.pid, signal.SIGKILL)

    def _start(self) -> None:
        place = triton_environment()
        with _free_ports(3) as (http, grpc, metrics):
            self.http_url, self.grpc_url, self.metrics_url = (
                f"127.0.0.1:{port}" for port in (http, grpc, metrics)
            )
        command = [
            str(place.server / "bin" / "tritonserver"),
            f"--model-repository={self.repository}",
            f"--backend-directory={place.backends}",
            *(f"--{kind}-address=127.0.0.1" for kind in ("http", "grpc", "metrics")),
            f"--http-port={http}",
            f"--grpc-port={grpc}",
            f"--metrics-port={metrics}",
            f"--backend-config=python,shm-region-prefix-name={self._shared_memory}",
        ]
        if self._explicit:
            command += ["--model-control-mode=explicit", "--load-model=*"]
        environment = {
            "HOME": str(self._folder),
            "PATH": "/usr/bin:/bin",
            "LD_LIBRARY_PATH": ":".join(map(str, place.libraries)),
        }
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                cwd=self._folder,  # which python models import from before their environment
                start_new_session=True,  # so that its models' processes can be stopped with it
            )

    def _wait_until_ready(self) -> None:
        def ready() -> bool:
            assert self._process is not None
            if self._process.poll() is not None:
                raise ServerError(f"exited with {self._process.returncode}\n{self._tail()}")
            with contextlib.suppress(OSError):
                _get(f"http://{self.http_url}/v2/health/ready")
                _get(f"http://{self.metrics_url}/metrics")  # the last to start
                return True
            return False

        try:
            wait_until(ready, _START_SECONDS, "the server is ready")
        except TimeoutError as error:
            raise ServerError(f"{error}\n{self._tail()}") from error

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            if process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_STOP_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for left in pathlib.Path("/dev/shm").glob(f"{self._shared_memory}*"):
            left.unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _tail(self, lines: int = 60) -> str:
        return "\n".join(self.log.splitlines()[-lines:])


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Poll until the condition holds. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds} s: {what}")
        time.sleep(_POLL_SECONDS)


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as response:
        return response.read()


def _post(url: str) -> None:
    request = urllib.request.Request(url, data=b"{}", method="POST")
    try:
        with urllib.request.urlopen(request, timeout=_START_SECONDS) as response:
            response.read()
    except urllib.error.HTTPError as error:
        raise ServerError(f"{url}: HTTP {error.code}: {error.read().decode()}") from error


@contextlib.contextmanager
def _free_ports(count: int) -> Iterator[list[int]]:
    """Ports that nobody listens on, held until the end of the block so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        yield [each.getsockname()[1] for each in sockets]


def _processes() -> Iterator[tuple[int, int, list[str]]]:
    """(pid, parent's pid, command line) of every process that can be read."""
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            # the name before the parent's pid may hold spaces and brackets
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                yield int(folder.name), int(parent), command
