"""A client of Triton's (KServe v2) protocol that needs no package for HTTP, and tritonclient for
gRPC; what ``probe`` and ``load`` speak to a server with.

Over HTTP tensors travel as raw bytes behind a JSON header, so float32 values arrive bit by bit.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import re
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from convbert_deploy.backends.base import Batch
from convbert_deploy.errors import ConvBertDeployError, InputError, MissingDependencyError

#: tensors of the text model: JSON or plain text in, the Scorer's answer as JSON out, both UTF-8
REQUEST, ANSWER = "REQUEST", "ANSWER"
#: port of Triton's metrics where nothing else is said
METRICS_PORT = 8002

_DTYPES = {"FP32": np.float32, "FP16": np.float16, "INT64": np.int64, "INT32": np.int32}


class NoAnswerError(ConvBertDeployError):
    """The server could not be reached, or was silent for longer than the timeout."""


class RefusedError(ConvBertDeployError):
    """The server answered with an error. ``status``: ``400`` over HTTP, ``INVALID_ARGUMENT`` over
    gRPC. ``of_request``: the request is at fault, not the server."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status

    @property
    def of_request(self) -> bool:
        return self.status == "INVALID_ARGUMENT" or re.fullmatch("4..", self.status) is not None


class Client(Protocol):
    """One connection to a server, for one thread at a time; close it in the end."""

    def infer(self, model: str, inputs: Batch, outputs: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Outputs by name, in the dtypes the model gives.

        inputs: int64 arrays, batch axis first.

        Raises:
            NoAnswerError, RefusedError
        """
        ...

    def ask(self, model: str, request: str | bytes) -> dict[str, Any]:
        """A text model's answer to one request, parsed.

        Raises:
            NoAnswerError, RefusedError
        """
        ...

    def close(self) -> None: ...


@contextlib.contextmanager
def connected(url: str, *, grpc: bool = False, timeout: float = 30.0) -> Iterator[Client]:
    """A client of the server at ``url``; nothing is sent yet. timeout: seconds of silence that are
    waited for an answer.

    Raises:
        InputError: ``url`` is none.
        MissingDependencyError: gRPC without tritonclient.
    """
    client: Client = GrpcClient(url, timeout) if grpc else HttpClient(url, timeout)
    try:
        yield client
    finally:
        client.close()


class HttpClient:
    """url: ``HOST:PORT`` or ``http(s)://HOST[:PORT][/PREFIX]``."""

    def __init__(self, url: str, timeout: float) -> None:
        parts = _parts(url, ("http", "https"), "http")
        secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        self._connection = kind(parts.hostname or "", parts.port, timeout=timeout)
        self._prefix, self._url = parts.path.rstrip("/"), url

    def infer(self, model: str, inputs: Batch, outputs: tuple[str, ...]) -> dict[str, np.ndarray]:
        tensors = {
            name: ("INT64", array.shape, np.ascontiguousarray(array, "<i8").tobytes())
            for name, array in inputs.items()
        }
        return self._infer(model, tensors, outputs)

    def ask(self, model: str, request: str | bytes) -> dict[str, Any]:
        text = _encoded(request)
        tensors = {REQUEST: ("BYTES", (1, 1), len(text).to_bytes(4, "little") + text)}
        return _parsed(self._infer(model, tensors, (ANSWER,)))

    def close(self) -> None:
        self._connection.close()

    def _infer(
        self,
        model: str,
        tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]],
        outputs: tuple[str, ...],
    ) -> dict[str, np.ndarray]:
        binary = {"binary_data": True}
        header = {
            "inputs": [
                {
                    "name": name,
                    "datatype": datatype,
                    "shape": list(shape),
                    "parameters": {"binary_data_size": len(data)},
                }
                for name, (datatype, shape, data) in tensors.items()
            ],
            "outputs": [{"name": name, "parameters": binary} for name in outputs],
        }
        head = json.dumps(header).encode()
        body = head + b"".join(data for _, _, data in tensors.values())
        path = f"{self._prefix}/v2/models/{urllib.parse.quote(model)}/infer"
        length, content = self._post(path, body, len(head))
        try:
            return _tensors(json.loads(content[:length]), memoryview(content)[length:])
        except (ValueError, KeyError, TypeError) as error:
            raise NoAnswerError(
                f"{self._url} does not speak the v2 inference protocol: {error}"
            ) from error

    def _post(self, path: str, body: bytes, header_length: int) -> tuple[int, bytes]:
        """The body of a successful answer and the length of its JSON header."""
        headers = {
            "Content-Type": "application/octet-stream",
            "Inference-Header-Content-Length": str(header_length),
        }
        try:
            self._connection.request("POST", path, body, headers)
            response = self._connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()  # the next request opens it again
            raise NoAnswerError(f"no answer from {self._url}: {_reason(error)}") from error
        if response.status != 200:
            raise RefusedError(str(response.status), _message(content))
        header = response.getheader("Inference-Header-Content-Length")
        return int(header or len(content)), content


class GrpcClient:
    """url: ``HOST:PORT``, ``grpc://HOST:PORT`` or, with TLS, ``grpcs://HOST:PORT``."""

    def __init__(self, url: str, timeout: float) -> None:
        parts = _parts(url, ("grpc", "grpcs"), "grpc")
        try:
            import tritonclient.grpc as grpc
        except ImportError as error:
            raise MissingDependencyError(
                "tritonclient[grpc]", needed_for="gRPC", extra="triton"
            ) from error
        self._grpc, self._url, self._timeout = grpc, url, timeout
        self._client = grpc.InferenceServerClient(parts.netloc, ssl=parts.scheme == "grpcs")

    def infer(self, model: str, inputs: Batch, outputs: tuple[str, ...]) -> dict[str, np.ndarray]:
        return self._infer(model, inputs, outputs)

    def ask(self, model: str, request: str | bytes) -> dict[str, Any]:
        text = np.array([[_encoded(request)]], dtype=np.object_)
        return _parsed(self._infer(model, {REQUEST: text}, (ANSWER,)))

    def close(self) -> None:
        self._client.close()

    def _infer(
        self, model: str, inputs: Mapping[str, np.ndarray], outputs: tuple[str, ...]
    ) -> dict[str, np.ndarray]:
        tensors = []
        for name, array in inputs.items():
            kind = "BYTES" if array.dtype == np.object_ else "INT64"
            tensor = self._grpc.InferInput(name, list(array.shape), kind)
            tensor.set_data_from_numpy(array)
            tensors.append(tensor)
        wanted = [self._grpc.InferRequestedOutput(name) for name in outputs]
        from tritonclient.utils import InferenceServerException

        try:
            result = self._client.infer(
                model, tensors, outputs=wanted, client_timeout=self._timeout
            )
        except InferenceServerException as error:
            status = (error.status() or "UNKNOWN").removeprefix("StatusCode.")
            if status in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED"):
                raise NoAnswerError(
                    f"no answer from {self._url}: {status}: {error.message()}"
                ) from error
            raise RefusedError(status, error.message()) from error
        return {name: result.as_numpy(name) for name in outputs}


def metric(text: str, name: str, **labels: str) -> float:
    """The sum of a metric's series with these labels, out of a Prometheus page.

    Raises:
        KeyError: there is none.
    """
    values = [
        float(value)
        for series, value in re.findall(rf"^{re.escape(name)}(\{{.*\}})? (\S+)", text, re.MULTILINE)
        if all(f'{key}="{label}"' in series for key, label in labels.items())
    ]
    if not values:
        raise KeyError(f"{name} {labels}")
    return sum(values)


def metrics_page(url: str, timeout: float) -> str:
    """The server's metrics as Prometheus text. ``url``: as HttpClient's; path /metrics by default.

    Raises:
        InputError: ``url`` is none.
        NoAnswerError
    """
    parts = _parts(url, ("http", "https"), "http")
    secure = parts.scheme == "https"
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port or METRICS_PORT, timeout=timeout)
    try:
        with contextlib.closing(connection):
            connection.request("GET", parts.path if parts.path.strip("/") else "/metrics")
            response = connection.getresponse()
            page = response.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        raise NoAnswerError(f"no metrics from {url}: {_reason(error)}") from error
    if response.status != 200:
        raise NoAnswerError(f"no metrics from {url}: HTTP {response.status}")
    return page


def host_of(url: str) -> str:
    """The host's name. Raises InputError."""
    return _parts(url, ("http", "https", "grpc", "grpcs"), "http").hostname or ""


def largest_difference(expected: Any, seen: Any) -> float:
    """Between two JSON answers: the largest difference of their numbers; infinity where anything
    else differs, or a number is not finite."""
    if isinstance(expected, float) or isinstance(seen, float):
        numbers = all(type(value) in (int, float) for value in (expected, seen))
        difference = abs(expected - seen) if numbers else math.inf
        return difference if math.isfinite(difference) else math.inf
    if type(expected) is not type(seen):
        return math.inf
    if isinstance(expected, dict):
        if expected.keys() != seen.keys():
            return math.inf
        pairs = [(expected[key], seen[key]) for key in expected]
    elif isinstance(expected, list):
        if len(expected) != len(seen):
            return math.inf
        pairs = list(zip(expected, seen, strict=True))
    else:
        return 0.0 if expected == seen else math.inf
    return max((largest_difference(*pair) for pair in pairs), default=0.0)


def _parts(url: str, schemes: tuple[str, ...], default: str) -> urllib.parse.SplitResult:
    parts = urllib.parse.urlsplit(url if "://" in url else f"{default}://{url}")
    try:
        usable = parts.scheme in schemes and bool(parts.hostname)
        _ = parts.port  # a property that checks
    except ValueError:
        usable = False
    if not usable or re.search(r"\s", url):
        raise InputError(
            f"{url!r} is not the address of a server",
            hint=f"expected HOST:PORT or {schemes[0]}://HOST:PORT",
        )
    return parts


def _encoded(request: str | bytes) -> bytes:
    return request.encode() if isinstance(request, str) else request


def _tensors(header: Mapping[str, Any], data: memoryview) -> dict[str, np.ndarray]:
    """Outputs by name: raw bytes where the header gives their size, else its own values."""
    arrays, at = {}, 0
    for output in header["outputs"]:
        shape, datatype = output["shape"], output["datatype"]
        size = output.get("parameters", {}).get("binary_data_size")
        if size is None:
            flat = np.array(output["data"], dtype=_DTYPES.get(datatype, np.object_))
        elif datatype == "BYTES":
            flat = np.array(list(_strings(data[at : at + size])), dtype=np.object_)
        else:
            kind = np.dtype(_DTYPES[datatype]).newbyteorder("<")
            flat = np.frombuffer(data[at : at + size], dtype=kind)
        at += size or 0
        arrays[output["name"]] = flat.reshape(shape)
    return arrays


def _strings(data: memoryview) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        yield bytes(data[at + 4 : at + 4 + size])
        at += 4 + size


def _parsed(outputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    answers = outputs[ANSWER].reshape(-1) if ANSWER in outputs else ()
    try:
        (answer,) = answers
        parsed = json.loads(answer)
    except (ValueError, TypeError) as error:
        raise NoAnswerError(f"the text model's {ANSWER} holds no JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise NoAnswerError(
            f"the text model's {ANSWER} is a {type(parsed).__name__}, not an object"
        )
    return parsed


def _message(content: bytes) -> str:
    text = content.decode(errors="replace")
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return str(json.loads(text)["error"])
    return text.strip()[:200] or "no message"


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "timed out"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
