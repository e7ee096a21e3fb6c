"""What goes wrong on a real server: bad requests among good ones, a process that dies, a restart
and a stop with a request on its way.

When a model's process dies the server goes on saying that it and the model are ready; only the
probe sees it. The way back is a restart of the server, which a failing liveness probe brings about.
The server then takes its whole exit timeout (30 s) to stop, and exits with 1. Under
``--model-control-mode=explicit`` the model alone can be brought back, in about two seconds:

    curl -X POST http://HOST:8000/v2/repository/models/NAME_engine/unload
    curl -X POST http://HOST:8000/v2/repository/models/NAME_engine/load

``load`` without ``unload`` answers 200 and does nothing: the model's files have not changed.

SIGTERM is waited out by what is on its way, but for one case: a text that came over gRPC and has not
reached the engine's model yet gets an error, because a server that stops takes no request, its own
models' neither. So requests must stop before SIGTERM comes: a preStop sleep. HTTP connections that
clients keep open hold the server back for its exit timeout.
"""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import signal
import threading
import urllib.request
from collections.abc import Callable

import numpy as np
import pytest

from convbert_deploy.architecture import Task
from convbert_deploy.serving.answering import run
from convbert_deploy.serving.client import Client, RefusedError, connected, largest_difference
from convbert_deploy.serving.probe import Expectation, ProbeOptions, probe

from serving.conftest import model_name
from serving.triton_server import TritonServer, wait_until

pytestmark = pytest.mark.serving

TASK = Task.SEQUENCE_CLASSIFICATION
NAME = model_name(TASK)
ENGINE = f"{NAME}_engine"
ROUNDS, GOOD = 20, 7
#: seconds between two liveness probes, and what one may take
PERIOD = 10.0
TEXTS = ["Good.", "A fine day in June.", "It was a long film about nothing at all. " * 4]
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def server(repository_of):
    with TritonServer(repository_of(TASK)) as server:
        yield server


@pytest.fixture(scope="module")
def expectation(repository_of) -> Expectation:
    return Expectation.of_repository(repository_of(TASK))


@pytest.fixture(scope="module")
def answers(engine_of) -> dict[str, dict]:
    """Each text's answer from an engine in this process."""
    return {text: next(iter(run(engine_of(TASK), [text]))) for text in TEXTS}


def batch_of(ids: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
    }


def a_bad_batch(name: str, column: int, value: int) -> dict[str, np.ndarray]:
    batch = batch_of(np.arange(5, 25)[None])
    batch[name][0, column] = value
    return batch


# what is wrong: what is sent, and words of the message that says so
BAD_BATCHES = {
    "id-too-large": (a_bad_batch("input_ids", 3, 9000), "token id 9000"),
    "id-negative": (a_bad_batch("input_ids", 3, -1), "token id -1"),
    "mask-with-a-gap": (a_bad_batch("attention_mask", 3, 0), "0 before a 1"),
    "mask-of-nothing": (
        batch_of(np.arange(5, 25)[None]) | {"attention_mask": np.zeros((1, 20), np.int64)},
        "all zeros",
    ),
    "mask-value": (a_bad_batch("attention_mask", 3, 7), "mask value 7"),
    "type": (a_bad_batch("token_type_ids", 3, 2), "token type 2"),
    "over-long": (batch_of(np.full((1, 129), 7)), "129 tokens"),
    "empty": (batch_of(np.zeros((1, 0), np.int64)), "at least 1"),
}
BAD_TEXTS = {
    "empty": (b"", "empty"),
    "blank": (b'{"text": "  "}', "empty"),
    "broken-utf-8": (b"a fine \xff\xfe day", "UTF-8"),
    "one-megabyte": (b"a fine day " * 100_000, "characters"),
    "broken-json": (b'{"text": ', "JSON"),
    "form-of-another-task": (b'{"question": "a"}', "does not take"),
    "surrogate": (b'{"text": "\\ud800"}', "Unicode"),
}


def round_of(calls: list[Callable[[Client], object]], url: str, grpc: bool) -> list[object]:
    """Each call with a client of its own, all sent at the same moment; what each gave or raised."""
    together = threading.Barrier(len(calls), timeout=30)

    def ask(call):
        with connected(url, grpc=grpc, timeout=30) as client:
            together.wait()
            try:
                return call(client)
            except RefusedError as error:
                return error

    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(ask, calls, timeout=60))


def check_refused(answer: object, grpc: bool, words: str) -> None:
    assert isinstance(answer, RefusedError), answer
    assert answer.of_request and answer.status == ("INVALID_ARGUMENT" if grpc else "400"), answer
    assert words in str(answer)


@pytest.mark.parametrize("grpc", [False, True], ids=["http", "grpc"])
def test_a_bad_batch_of_ids_spoils_only_itself(server, engine_of, grpc):
    generator = np.random.default_rng(0)
    goods = [batch_of(generator.integers(5, 9000, (1, n))) for n in (3, 128, 17, 40, 40, 64, 9)]
    with engine_of(TASK).runner() as runner:
        expected = [runner.infer(batch)["logits"] for batch in goods]
    url = server.grpc_url if grpc else server.http_url
    kinds = list(BAD_BATCHES.values())
    for number in range(ROUNDS):
        bad, words = kinds[number % len(kinds)]
        batches = [*goods]
        batches.insert(number % (GOOD + 1), bad)
        calls = [
            lambda client, batch=batch: client.infer(ENGINE, batch, ("logits",))["logits"]
            for batch in batches
        ]
        results = round_of(calls, url, grpc)
        check_refused(results.pop(number % (GOOD + 1)), grpc, words)
        for result, right in zip(results, expected, strict=True):
            assert np.abs(result - right).max() <= TOLERANCE


@pytest.mark.parametrize("grpc", [False, True], ids=["http", "grpc"])
def test_a_bad_text_spoils_only_itself(server, answers, grpc):
    url = server.grpc_url if grpc else server.http_url
    kinds = list(BAD_TEXTS.values())
    goods = [TEXTS[number % len(TEXTS)] for number in range(GOOD)]
    for number in range(ROUNDS):
        bad, words = kinds[number % len(kinds)]
        requests: list[str | bytes] = [*goods]
        requests.insert(number % (GOOD + 1), bad)
        calls = [lambda client, text=text: client.ask(NAME, text) for text in requests]
        results = round_of(calls, url, grpc)
        check_refused(results.pop(number % (GOOD + 1)), grpc, words)
        for result, text in zip(results, goods, strict=True):
            assert largest_difference(answers[text], result) <= TOLERANCE


def test_a_tensor_of_another_rank_or_name_is_refused(server):
    batch = batch_of(np.arange(5, 25)[None])
    with connected(server.http_url) as client:
        for wrong in (
            {name: array[0] for name, array in batch.items()},
            {name: array[None] for name, array in batch.items()},
            batch | {"ids": batch["input_ids"]},
            batch_of(np.full((33, 4), 7)),
        ):
            with pytest.raises(RefusedError) as caught:
                client.infer(ENGINE, wrong, ("logits",))
            assert caught.value.of_request


@pytest.mark.parametrize("grpc", [False, True], ids=["http", "grpc"])
def test_the_probe_compares_values(server, expectation, grpc):
    url = server.grpc_url if grpc else server.http_url
    result = probe(url, expectation, ProbeOptions(grpc=grpc, text=True))
    assert result.passed, result
    assert result.max_abs <= 2e-5 and result.latency_ms > 0 and result.text_latency_ms > 0


@pytest.mark.parametrize("killed", [ENGINE, NAME])
def test_a_killed_process_is_seen_by_the_probe_and_a_load_brings_it_back(
    repository_of, expectation, killed
):
    options = ProbeOptions(timeout=PERIOD, text=True)
    with TritonServer(repository_of(TASK), explicit=True) as server:
        assert probe(server.http_url, expectation, options).passed
        (pid,) = server.stub_pids(killed)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: pid not in server.stub_pids(killed), 10, "the process is gone")
        result = probe(server.http_url, expectation, options)
        assert not result.passed and result.error
        # what a probe of the server's own health would have said
        with urllib.request.urlopen(
            f"http://{server.http_url}/v2/health/ready", timeout=5
        ) as ready:
            assert ready.status == 200
        server.unload(killed)
        server.load(killed)
        result = probe(server.http_url, expectation, options)
        assert result.passed, result
        server.kill()


def test_a_restarted_server_gives_the_same_values(repository_of):
    def asked() -> tuple[list[dict], np.ndarray]:
        batch = batch_of(np.arange(5, 69)[None])
        with TritonServer(repository_of(TASK)) as server, connected(server.http_url) as client:
            texts = [client.ask(NAME, text) for text in TEXTS]
            return texts, client.infer(ENGINE, batch, ("logits",))["logits"]

    texts, logits = asked()
    texts_again, logits_again = asked()
    assert texts == texts_again
    assert np.array_equal(logits, logits_again)


@pytest.fixture(scope="module")
def patient_repository(engine_of, triton_environment, tmp_path_factory):
    """Its requests wait 1.5 s for others, so that they can be met on their way."""
    from convbert_deploy.triton.repository import TritonOptions, package_triton

    options = TritonOptions(
        name=NAME, environment=str(triton_environment.model), threads=1, delay_us=1_500_000
    )
    target = tmp_path_factory.mktemp("patient") / "models"
    return package_triton(engine_of(TASK), target, options).path


@pytest.mark.parametrize("grpc", [False, True], ids=["http", "grpc"])
def test_sigterm_waits_for_a_request_on_its_way(patient_repository, engine_of, grpc):
    batch = batch_of(np.arange(5, 69)[None])
    with engine_of(TASK).runner() as runner:
        expected = runner.infer(batch)["logits"]
    answer = answered_while_it_stops(
        patient_repository, lambda client: client.infer(ENGINE, batch, ("logits",)), grpc
    )
    assert np.abs(answer["logits"] - expected).max() <= TOLERANCE


def test_sigterm_waits_for_a_text_on_its_way(patient_repository, answers):
    """Its way leads through the engine's model."""
    answer = answered_while_it_stops(patient_repository, lambda client: client.ask(NAME, TEXTS[1]))
    assert largest_difference(answers[TEXTS[1]], answer) <= TOLERANCE


def answered_while_it_stops(
    repository: pathlib.Path, call: Callable[[Client], dict], grpc: bool = False
) -> dict:
    """The answer to a call; SIGTERM comes while it waits in the queue of the engine's model."""

    def ask() -> dict:
        # Closed when answered: the server waits for connections that are open, up to 30 s.
        url = server.grpc_url if grpc else server.http_url
        with connected(url, grpc=grpc) as client:
            return call(client)

    def on_its_way() -> bool:
        if asked.done():
            raise AssertionError(f"not seen waiting: {asked.result()}")
        return server.metric("nv_inference_pending_request_count", model=ENGINE) == 1

    with TritonServer(repository) as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask)
        wait_until(on_its_way, 10, "the request waits")
        assert server.terminate() == 0
        return asked.result(timeout=10)
