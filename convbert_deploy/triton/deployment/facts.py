"""What a deployment has to know about a model repository."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from typing import TYPE_CHECKING, Any, Literal

from convbert_deploy.errors import EngineError

if TYPE_CHECKING:
    from convbert_deploy.engine import Engine
    from convbert_deploy.triton.repository import Repository

#: where the image keeps what is beside the Dockerfile
IMAGE_FOLDER = "/opt/convbert"

#: python: our CPU engine in Triton's python backend
Backend = Literal["python", "onnxruntime", "tensorrt"]

#: what the python backend needs to run an engine itself (Triton's own backends need nothing): the
#: extra of convbert-deploy, the distribution, and its name among an engine's versions
_RUNTIMES = {
    "onnxruntime-cpu": ("ort", "onnxruntime", "onnxruntime"),
    "onnxruntime-cuda": ("ort-gpu", "onnxruntime-gpu", "onnxruntime"),
    "tensorrt": ("tensorrt", "tensorrt", "tensorrt"),
    "tensorrt-rtx": ("tensorrt-rtx", "tensorrt-rtx", "tensorrt_rtx"),
}

_BACKENDS = ("python", "onnxruntime", "tensorrt")
#: written into shell, YAML and Dockerfiles unquoted, so nothing that either of them reads
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_FOLDER = re.compile(r"(/[A-Za-z0-9][A-Za-z0-9._-]*)+")
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]*")
_VERSION = re.compile(r"[0-9]+(\.[0-9]+)*([.+-]?[A-Za-z0-9]+)*")
_REQUIREMENT = re.compile(rf"[a-z-]+=={_VERSION.pattern}")
#: a Kubernetes label has 63 characters; the chart appends up to ten
_LONGEST_NAME = 50
#: less than the ten seconds after which Docker and Kubernetes end the probe
_PROBE_SECONDS = 8
_GIBIBYTE = 1 << 30


@dataclasses.dataclass(frozen=True)
class DeploymentFacts:
    """A model repository seen from outside.

    model: the text model's name; ``engine_model`` is the tensor model it calls. backend: Triton's,
    for the tensor model. package_version: of convbert-deploy, installed into the image.
    model_bytes: size of the engine's files, from which the memory request is reckoned.
    tensorrt_version: that the plan was built with, ``10.13.3`` or longer; the image is checked
    against it. plugin_library: file name, inside ``plugins/``, of our library that TensorRT or ONNX
    Runtime loads.
    repository: folder name of the model repository, beside the written files.
    plugin_folder: where ``plugins/`` lies in the image, as the models' configs name it.
    triton_image: the server image to build on. image: name and tag of the image that is built.
    golden_text: the repository's golden request in words, None where it has none. The probe sends
    it too, so that the death of the text model's process is seen. extras: of convbert-deploy, that
    the python models need. runtime: what runs the engine in the python backend, as pip takes it, in
    the version it was built and checked with: ``onnxruntime==1.31.1``.

    Raises:
        EngineError: a name, version or port that the files cannot hold.
    """

    model: str
    backend: Backend
    package_version: str
    tensorrt_version: str | None = None
    needs_gpu: bool = False
    plugin_library: str | None = None
    model_bytes: int = 0
    max_batch_size: int = 32
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    repository: str = "models"
    triton_image: str = "nvcr.io/nvidia/tritonserver:26.07-py3"
    image: str | None = None
    plugin_folder: str = "/plugins"
    golden_text: str | None = None
    extras: tuple[str, ...] | None = None
    runtime: str | None = None

    def __post_init__(self) -> None:
        _check("model name", self.model, _NAME)
        _check("repository folder", self.repository, _NAME)
        _check("Triton image", self.triton_image, _IMAGE)
        _check("package version", self.package_version, _VERSION)
        if self.image is not None:
            _check("image", self.image, _IMAGE)
        if self.plugin_library is not None:
            _check("plugin library", self.plugin_library, _NAME)
        if self.tensorrt_version is not None:
            _check("TensorRT version", self.tensorrt_version, _VERSION)
        if self.runtime is not None:
            _check("runtime", self.runtime, _REQUIREMENT)
        _check("plugin folder", self.plugin_folder, _FOLDER)
        if self.backend not in _BACKENDS:
            raise EngineError(f"backend {self.backend!r}, expected one of {', '.join(_BACKENDS)}")
        if self.backend == "tensorrt" and self.tensorrt_version is None:
            raise EngineError("a TensorRT plan needs the version of TensorRT it was built with")
        ports = (self.http_port, self.grpc_port, self.metrics_port)
        # A process that is not root cannot listen below 1024.
        if len(set(ports)) != 3 or not all(1024 <= port <= 65535 for port in ports):
            raise EngineError(f"ports {ports}, expected three different ones in 1024..65535")
        if self.max_batch_size < 0 or self.model_bytes < 0:
            raise EngineError(
                f"max_batch_size {self.max_batch_size}, model_bytes {self.model_bytes}: expected "
                "at least 0"
            )

    @property
    def engine_model(self) -> str:
        return f"{self.model}_engine"

    @property
    def kubernetes_name(self) -> str:
        """The model's name as Kubernetes takes it: lower case, digits and dashes."""
        name = re.sub(r"[^a-z0-9-]+", "-", self.model.lower())[:_LONGEST_NAME].strip("-")
        return name if name[:1].isalpha() else f"model-{name}".strip("-")

    def probe_command(self, repository: str) -> list[str]:
        """The golden request to a server on this host. repository: its path here."""
        url = f"http://127.0.0.1:{self.http_port}"
        arguments = self._probe_arguments()
        return ["convbert-deploy", "probe", url, "--manifest", repository, *arguments]

    def _probe_arguments(self) -> list[str]:
        text = [] if self.golden_text is None else ["--text"]
        return ["--timeout", str(_PROBE_SECONDS), *text]

    def flags(self) -> dict[str, bool]:
        """Which conditional lines of the templates are kept."""
        return {
            "gpu": self.needs_gpu,
            "plugin": self.plugin_library is not None,
            "tensorrt_plugin": self.plugin_library is not None and self.backend == "tensorrt",
            "tensorrt": self.backend == "tensorrt",
            "runtime": self.runtime is not None,
        }

    def values(self) -> dict[str, str]:
        """Text for each ``@name@`` of the templates."""
        image = self.image or f"{self.kubernetes_name}-triton:{self.package_version}"
        image_name, image_tag = _split_image(image)
        extras = self.extras or (("ort", "serve") if self.backend == "python" else ("serve",))
        probe = self.probe_command(f"{IMAGE_FOLDER}/{self.repository}")
        return {
            "model": self.model,
            "engine_model": self.engine_model,
            "kubernetes_name": self.kubernetes_name,
            "backend": self.backend,
            "repository": self.repository,
            "package_version": self.package_version,
            "chart_version": _semantic(self.package_version),
            "extras": ",".join(extras),
            "runtime": self.runtime or "",
            "tensorrt_version": self.tensorrt_version or "none",
            "tensorrt_library": ".".join((self.tensorrt_version or "").split(".")[:3]),
            "plugin_library": self.plugin_library or "",
            "http_port": str(self.http_port),
            "grpc_port": str(self.grpc_port),
            "metrics_port": str(self.metrics_port),
            "max_batch_size": str(self.max_batch_size),
            "triton_image": self.triton_image,
            "image": image,
            "image_name": image_name,
            "image_tag": image_tag,
            "gpus": "1" if self.needs_gpu else "0",
            "memory": f"{self.memory_gibibytes}Gi",
            "memory_compose": f"{self.memory_gibibytes}g",
            "example_request": shlex.quote(json.dumps(self._example_request())),
            "image_folder": IMAGE_FOLDER,
            "plugin_folder": self.plugin_folder,
            "probe_command": json.dumps(probe),
            "probe_compose": json.dumps(["CMD", *probe]),
            "probe_shell": shlex.join(self.probe_command(self.repository)),
            "probe_arguments": json.dumps(self._probe_arguments()),
        }

    def _example_request(self) -> dict[str, object]:
        text = self.golden_text or "A fine film."
        tensor = {"name": "REQUEST", "datatype": "BYTES", "shape": [1, 1], "data": [text]}
        return {"inputs": [tensor]}

    @property
    def memory_gibibytes(self) -> int:
        """Memory to ask for: server, text model and stub in 2 GiB, and an engine may hold its file,
        its unpacked weights and its scratch at once."""
        return 2 + -(-3 * self.model_bytes // _GIBIBYTE)


def facts_of(repository: Repository, engine: Engine, **changes: Any) -> DeploymentFacts:
    """Facts of a packaged engine, from the repository's manifest and the engine's.

    changes: fields of ``DeploymentFacts`` that the manifests do not decide (ports, images).

    Raises:
        EngineError: as ``DeploymentFacts``.
    """
    from convbert_deploy import __version__

    packaged, built = repository.manifest, engine.manifest
    backend, golden_text = packaged["triton_backend"], packaged.get("golden_text")
    tensorrt = built.versions.get("tensorrt") if backend == "tensorrt" else None
    extras, runtime = ("serve",), None
    if backend == "python":
        extra, distribution, name = _RUNTIMES[built.backend]
        extras = (*extras, extra)
        runtime = f"{distribution}=={built.versions[name]}" if name in built.versions else None
    facts = {
        "model": packaged["text_model"],
        "backend": backend,
        "package_version": __version__,
        "tensorrt_version": tensorrt,
        "needs_gpu": built.backend != "onnxruntime-cpu",
        "plugin_library": next(iter(packaged["plugins"]), None),
        "model_bytes": sum((engine.path / name).stat().st_size for name in built.files),
        "max_batch_size": packaged["max_batch_size"],
        "repository": repository.path.name,
        "golden_text": json.dumps(golden_text["request"]) if golden_text else None,
        "extras": extras,
        "runtime": runtime,
    }
    return DeploymentFacts(**(facts | changes))


def _check(what: str, value: str, pattern: re.Pattern[str]) -> None:
    if not pattern.fullmatch(value):
        raise EngineError(
            f"{what} {value!r} has characters that the deployment files cannot hold: expected "
            f"{pattern.pattern}"
        )


def _split_image(image: str) -> tuple[str, str]:
    """Name and tag; a colon before a slash belongs to the registry's port."""
    name, colon, tag = image.rpartition(":")
    if not colon or "/" in tag:
        return image, "latest"
    return name, tag


def _semantic(version: str) -> str:
    """A chart's version has three numbers: ``0.2`` is ``0.2.0``, ``0.2.0.dev3`` ``0.2.0-dev3``."""
    numbers = re.match(r"[0-9]+(\.[0-9]+){0,2}", version).group()
    rest = re.sub(r"[^0-9A-Za-z.-]+", "-", version[len(numbers) :]).strip(".-")
    numbers += ".0" * (2 - numbers.count("."))
    return f"{numbers}-{rest}" if rest else numbers
