"""The probe: what it sends, and what it says of servers that are right, wrong, silent or gone."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from click.testing import CliRunner

from convbert_deploy.cli import main
from convbert_deploy.errors import EngineError, InputError
from convbert_deploy.golden import GoldenOutput, GoldenRequest
from convbert_deploy.serving.client import RefusedError, connected
from convbert_deploy.serving.command import probe as probe_command
from convbert_deploy.serving.probe import Expectation, ProbeOptions, probe
from convbert_deploy.shapes import ShapeRange

IDS = [[5, 6, 7, 8], [9, 10, 11, 12]]
LOGITS = np.array([[0.5, -1.25, 3.0], [1.5, 0.1, -0.7]], np.float32)
GOLDEN = GoldenRequest(
    {
        "input_ids": IDS,
        "attention_mask": np.ones((2, 4), int).tolist(),
        "token_type_ids": np.zeros((2, 4), int).tolist(),
    },
    {"logits": GoldenOutput.of(LOGITS)},
)
TEXT = {"text": "a fine day"}
TEXT_ANSWER = {"label": "B", "score": 0.75, "tokens_scored": 5}
EXPECTATION = Expectation(GOLDEN, 2e-5, ShapeRange(1, 8, 32), "tiny_engine", "tiny")
IN_WORDS = dataclasses.replace(EXPECTATION, text=TEXT, text_answer=TEXT_ANSWER)


class FakeTriton:
    """A v2 server over HTTP that answers the golden rows; ``change`` alters what it says.

    status: of every answer. wait: an event before which nothing is answered. asked: the requests:
    (model, inputs by name, int64 or bytes).
    """

    def __init__(self):
        self.change = lambda logits: logits
        self.text_answer = TEXT_ANSWER
        self.status, self.wait, self.asked = 200, None, []

    def answer(self, path, headers, body):
        size = int(headers["Inference-Header-Content-Length"])
        header, data = json.loads(body[:size]), body[size:]
        inputs, at = {}, 0
        for tensor in header["inputs"]:
            end = at + tensor["parameters"]["binary_data_size"]
            if tensor["datatype"] == "BYTES":
                inputs[tensor["name"]] = data[at + 4 : end]
            else:
                flat = np.frombuffer(data[at:end], "<i8")
                inputs[tensor["name"]] = flat.reshape(tensor["shape"])
            at = end
        self.asked.append((path.split("/")[-2], inputs))
        if "REQUEST" in inputs:
            text = json.dumps(self.text_answer).encode()
            payload = len(text).to_bytes(4, "little") + text
            return self.outputs("ANSWER", "BYTES", [1, 1], payload)
        rows = [IDS.index(row) for row in inputs["input_ids"].tolist()]
        logits = self.change(LOGITS[rows])
        return self.outputs("logits", "FP32", list(logits.shape), logits.tobytes())

    @staticmethod
    def outputs(name, datatype, shape, payload):
        parameters = {"binary_data_size": len(payload)}
        output = {"name": name, "datatype": datatype, "shape": shape, "parameters": parameters}
        return json.dumps({"outputs": [output]}).encode(), payload


@pytest.fixture
def triton():
    fake = FakeTriton()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if fake.wait is not None:
                fake.wait.wait(30)
            head, payload = (b'{"error": "model is not ready"}', b"")
            if fake.status == 200:
                head, payload = fake.answer(self.path, self.headers, body)
            with contextlib.suppress(OSError):  # a client that gave up
                self.send_response(fake.status)
                self.send_header("Inference-Header-Content-Length", str(len(head)))
                self.send_header("Content-Length", str(len(head) + len(payload)))
                self.end_headers()
                self.wfile.write(head + payload)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    fake.url = f"127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        if fake.wait is not None:
            fake.wait.set()
        server.shutdown()
        server.server_close()


def test_right_values_pass(triton):
    result = probe(triton.url, EXPECTATION)
    assert result.passed and result.max_abs == 0 and result.error is None
    assert result.latency_ms > 0 and result.text_latency_ms is None
    ((model, inputs),) = triton.asked
    assert model == "tiny_engine"
    assert {name: array.tolist() for name, array in inputs.items()} == GOLDEN.inputs


@pytest.mark.parametrize("url", ["http://{}", "http://{}/", "http://{}/triton/one"])
def test_addresses(triton, url):
    assert probe(url.format(triton.url), EXPECTATION).passed


@pytest.mark.parametrize(
    ("rows", "sent"), [(ShapeRange(1, 1, 1), [1, 1]), (ShapeRange(4, 4, 8), [4])]
)
def test_requests_have_as_many_rows_as_the_model_takes(triton, rows, sent):
    assert probe(triton.url, dataclasses.replace(EXPECTATION, rows=rows)).passed
    assert [len(inputs["input_ids"]) for _, inputs in triton.asked] == sent


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda logits: logits + np.float32(1e-3), 1e-3),
        (lambda logits: logits[:, ::-1].copy(), 2.5),
        (lambda logits: logits * np.nan, np.inf),
        (lambda logits: logits[:, :2].copy(), np.inf),
        (lambda logits: logits[:0].copy(), np.inf),  # 200 with an empty tensor
        (lambda logits: logits[:1].copy(), np.inf),
    ],
    ids=["shifted", "permuted", "nan", "columns", "empty", "rows"],
)
def test_wrong_values_fail(triton, change, difference):
    triton.change = change
    result = probe(triton.url, EXPECTATION)
    assert not result.passed and "wrong values" in result.error
    assert result.max_abs == pytest.approx(difference, rel=1e-3)
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["passed"] is False


def test_an_output_of_another_name_fails(triton):
    golden = GoldenRequest(GOLDEN.inputs, {"start_logits": GOLDEN.outputs["logits"]})
    result = probe(triton.url, dataclasses.replace(EXPECTATION, golden=golden))
    assert not result.passed and "missing" in result.error


def test_refusals_and_servers_that_are_gone_fail(triton):
    triton.status = 400
    result = probe(triton.url, EXPECTATION)
    assert not result.passed and result.error == "400: model is not ready"
    gone = probe("127.0.0.1:1", EXPECTATION)
    assert not gone.passed and "no answer" in gone.error


def test_a_silent_server_fails_in_time(triton):
    triton.wait = threading.Event()
    started = time.monotonic()
    result = probe(triton.url, EXPECTATION, ProbeOptions(timeout=0.3))
    assert not result.passed and time.monotonic() - started < 5
    assert "within 0.3 s" in result.error or "timed out" in result.error


def test_words(triton):
    result = probe(triton.url, IN_WORDS, ProbeOptions(text=True))
    assert result.passed and result.text_latency_ms > 0
    assert [model for model, _ in triton.asked] == ["tiny_engine", "tiny"]
    assert json.loads(triton.asked[1][1]["REQUEST"]) == TEXT
    triton.text_answer = TEXT_ANSWER | {"label": "A"}
    wrong = probe(triton.url, IN_WORDS, ProbeOptions(text=True))
    assert not wrong.passed and "tiny answers" in wrong.error
    triton.text_answer = TEXT_ANSWER | {"score": 0.75001}
    assert probe(triton.url, IN_WORDS, ProbeOptions(text=True)).passed


def test_what_the_user_can_fix_is_raised():
    for url in ("", "http://", "ftp://a:1", "127.0.0.1:port", "a b:8000", "grpc://a:1"):
        with pytest.raises(InputError):
            probe(url, EXPECTATION)
    with pytest.raises(InputError, match="which model"):
        probe("127.0.0.1:1", dataclasses.replace(EXPECTATION, model=None))
    with pytest.raises(InputError, match="in words"):
        probe("127.0.0.1:1", EXPECTATION, ProbeOptions(text=True))
    with pytest.raises(InputError, match="timeout"):
        ProbeOptions(timeout=0)


def test_a_client_reads_values_that_travel_as_json(triton):
    """A server or gateway without the binary extension."""
    triton.outputs = lambda name, datatype, shape, payload: (
        json.dumps(
            {
                "outputs": [
                    {"name": name, "datatype": datatype, "shape": shape, "data": LOGITS.tolist()}
                ]
            }
        ).encode(),
        b"",
    )
    with connected(triton.url) as client:
        outputs = client.infer("tiny_engine", GOLDEN.batch(), ("logits",))
    assert outputs["logits"].dtype == np.float32 and np.array_equal(outputs["logits"], LOGITS)


def test_refusals_tell_whose_fault_it_is():
    assert RefusedError("400", "x").of_request and RefusedError("INVALID_ARGUMENT", "x").of_request
    assert not RefusedError("500", "x").of_request
    assert not RefusedError("INTERNAL", "x").of_request


# --- manifests and the command


@pytest.fixture
def manifest(tmp_path):
    file = tmp_path / "convbert_manifest.json"
    profile = {"batch": [1, 8, 32], "seq": [1, 64, 128], "choices": [2, 4, 8]}
    file.write_text(
        json.dumps(
            {
                "golden": GOLDEN.to_json() | {"max_abs": 2e-5},
                "golden_text": {"request": TEXT, "answer": TEXT_ANSWER},
                "profile": profile,
                "engine_model": "tiny_engine",
                "text_model": "tiny",
            }
        )
    )
    return file


def test_a_repository_says_what_to_expect(manifest):
    for place in (manifest, manifest.parent):
        found = Expectation.of_repository(place)
        assert found == dataclasses.replace(IN_WORDS, golden=found.golden)
        assert found.golden.inputs == GOLDEN.inputs
        assert found.golden.max_abs_difference({"logits": LOGITS}) == 0
    named = Expectation.of_repository(manifest).named("other")
    assert (named.model, named.text_model) == ("other_engine", "other")


def test_an_engine_says_what_to_expect(tmp_path):
    profile = {"batch": [1, 8, 32], "seq": [1, 64, 128], "choices": [2, 4, 8]}
    (tmp_path / "manifest.json").write_text(
        json.dumps({"backend": "onnxruntime-cpu", "precision": "fp32", "profile": profile})
    )
    (tmp_path / "golden.json").write_text(json.dumps(GOLDEN.to_json()))
    found = Expectation.of_engine(tmp_path)
    assert found.allowed == 2e-5 and found.model is None and found.rows == ShapeRange(1, 8, 32)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"golden": 1, "golden_text": 2}'])
def test_damaged_manifests_are_named(tmp_path, content):
    file = tmp_path / "convbert_manifest.json"
    file.write_text(content)
    with pytest.raises(EngineError, match=r"convbert_manifest.json is damaged"):
        Expectation.of_repository(file)
    with pytest.raises(EngineError, match="cannot read"):
        Expectation.of_repository(tmp_path / "nowhere.json")
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(EngineError):
        Expectation.of_engine(tmp_path)


def test_the_command_exits_0_1_or_3(triton, manifest):
    def invoked(*arguments):
        # the group turns errors into exit 3
        if "probe" not in main.commands:
            main.add_command(probe_command)
        return CliRunner().invoke(main, ["probe", *arguments])

    right = invoked(triton.url, "--manifest", str(manifest), "--text", "--json")
    assert right.exit_code == 0 and json.loads(right.stdout)["passed"]
    triton.change = lambda logits: logits + 1
    wrong = invoked(triton.url, "--manifest", str(manifest))
    assert wrong.exit_code == 1 and wrong.stdout.startswith("FAIL tiny_engine: wrong values")
    assert invoked("nonsense:port", "--manifest", str(manifest)).exit_code == 3
    assert invoked(triton.url, "--manifest", "nowhere").exit_code == 3
    both = invoked(triton.url, "--manifest", str(manifest), "--engine", "x")
    assert both.exit_code == 2


def test_a_probe_loads_neither_torch_nor_a_runtime():
    heavy = ("torch", "transformers", "onnx", "onnxruntime", "tokenizers", "tritonclient")
    code = (
        "import sys, convbert_deploy.serving.probe, convbert_deploy.serving.command;"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
