"""A packaged engine on a real server: text in, answers out, as ``run`` answers on the same engine."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator

import numpy as np
import pytest

import convbert_deploy as cd
from convbert_deploy.architecture import Task
from convbert_deploy.engine import MANIFEST, Engine
from convbert_deploy.golden import GoldenRequest
from convbert_deploy.triton.repository import Repository, TritonOptions, package_triton

from serving.triton_server import TritonEnvironment, TritonServer, wait_until

grpc_client = pytest.importorskip("tritonclient.grpc")
http_client = pytest.importorskip("tritonclient.http")
pytestmark = pytest.mark.serving

#: fp32: what the batch a row stood in may change by rounding
TOLERANCE = 1e-6
TEXTS = [
    "A fine day.",
    "The club opened in June, and nobody came; it rained all day.",
    "Long " * 150 + "sentences are cut or put into windows.",
    "naïve café 中 🙂",
]
REQUESTS: dict[Task, list[dict]] = {
    Task.ENCODER: [{"text": text} for text in TEXTS],
    Task.MASKED_LM: [{"text": f"A [MASK] day. {text} The [MASK]."} for text in TEXTS[:2]],
    Task.SEQUENCE_CLASSIFICATION: [
        *({"text": text} for text in TEXTS),
        {"text": TEXTS[0], "text_pair": TEXTS[1]},
    ],
    Task.TOKEN_CLASSIFICATION: [
        *({"text": text} for text in TEXTS),
        {"words": ["The", "sky", "is", "blue"]},
    ],
    Task.QUESTION_ANSWERING: [{"question": "When did it open?", "context": text} for text in TEXTS],
    Task.MULTIPLE_CHOICE: [
        {"prompt": text, "choices": choices}
        for text in TEXTS[:3]
        for choices in (["blue", "a fish"], ["late", "a fine day", "in June", "never"])
    ],
}


@pytest.fixture(scope="module")
def repositories(repository_of: Callable[[Task], pathlib.Path]) -> dict[Task, Repository]:
    return {task: Repository.load(repository_of(task)) for task in Task}


@pytest.fixture(scope="module")
def server(
    repositories: dict[Task, Repository], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    """The models of all six tasks in one server."""
    folder = tmp_path_factory.mktemp("repositories")
    for repository in repositories.values():
        for name in (repository.name, repository.engine_name):
            (folder / name).symlink_to(repository.path / name)
    with TritonServer(folder) as running:
        yield running


@pytest.fixture(scope="module", params=["http", "grpc"])
def client(request: pytest.FixtureRequest, server: TritonServer):
    """tritonclient's module and a client of it."""
    module, url = {
        "http": (http_client, server.http_url),
        "grpc": (grpc_client, server.grpc_url),
    }[request.param]
    with module.InferenceServerClient(url) as connected:
        yield module, connected


def ask(client, model: str, *payloads: bytes) -> list:
    """Answers to the payloads, which travel as one request."""
    module, connected = client
    values = np.array([[payload] for payload in payloads], dtype=np.object_)
    tensor = module.InferInput("REQUEST", list(values.shape), "BYTES")
    tensor.set_data_from_numpy(values)
    answers = connected.infer(model, [tensor]).as_numpy("ANSWER")
    assert answers.shape == values.shape
    return [json.loads(answer) for answer in answers.reshape(-1)]


def tensors(client, batch: dict[str, np.ndarray]) -> list:
    inputs = []
    for name, array in batch.items():
        tensor = client[0].InferInput(name, list(array.shape), "INT64")
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


def assert_same(found, expected, place: str = "answer") -> None:
    """Equal but for floats, which may differ by TOLERANCE."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key, value in expected.items():
            assert_same(found[key], value, f"{place}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for index, value in enumerate(expected):
            assert_same(found[index], value, f"{place}[{index}]")
    elif isinstance(expected, float):
        assert abs(found - expected) <= TOLERANCE, f"{place}: {found}, expected {expected}"
    else:
        assert found == expected, place


@pytest.mark.parametrize("task", list(Task))
def test_answers_are_those_of_run(
    task: Task,
    client,
    repositories: dict[Task, Repository],
    engine_of: Callable[[Task], Engine],
):
    model = repositories[task].name
    lines = [json.dumps(request) for request in REQUESTS[task]]
    expected = list(cd.run(engine_of(task), lines))
    assert not [answer for answer in expected if "error" in answer]
    for line, answer in zip(lines, expected, strict=True):
        assert_same(ask(client, model, line.encode()), [answer])
    assert_same(ask(client, model, *(line.encode() for line in lines)), expected)


def test_plain_text_is_a_request(
    client, repositories: dict[Task, Repository], engine_of: Callable[[Task], Engine]
):
    task = Task.SEQUENCE_CLASSIFICATION
    expected = list(cd.run(engine_of(task), ["A fine day."]))
    assert_same(ask(client, repositories[task].name, b"A fine day."), expected)


@pytest.mark.parametrize("task", list(Task))
def test_the_tensor_model_answers_the_golden_request(
    task: Task, client, repositories: dict[Task, Repository]
):
    repository = repositories[task]
    golden = GoldenRequest.from_json(repository.manifest["golden"])
    result = client[1].infer(repository.engine_name, tensors(client, golden.batch()))
    outputs = {name: result.as_numpy(name) for name in task.output_names}
    assert golden.max_abs_difference(outputs) <= repository.manifest["golden"]["max_abs"]
    words = repository.manifest["golden_text"]
    assert_same(
        ask(client, repository.name, json.dumps(words["request"]).encode()), [words["answer"]]
    )


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"\xff\xfe a", "not UTF-8"),
        (b"", "empty"),
        (b'{"text": ', "neither text nor JSON"),
        (b'{"words": ["a"]}', "sequence-classification does not take"),
        (b'{"text": "\\ud800"}', "not valid Unicode"),
        (b'{"text": ' + b"[" * 100_000, "nested too deeply"),
        (b"a" * 1_000_000, "1000000 characters"),
    ],
)
def test_a_bad_text_is_the_clients_error(
    client, repositories: dict[Task, Repository], payload: bytes, message: str
):
    model = repositories[Task.SEQUENCE_CLASSIFICATION].name
    with pytest.raises(client[0].InferenceServerException, match=message) as caught:
        ask(client, model, payload)
    assert caught.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("input_ids", 9000, "token id 9000 is outside"),
        ("input_ids", -1, "token id -1 is outside"),
        ("attention_mask", 0, "all zeros"),
        ("attention_mask", 2, "mask value 2"),
        ("token_type_ids", 2, "token type 2"),
    ],
)
def test_bad_tensors_are_the_clients_error(
    client, repositories: dict[Task, Repository], name: str, value: int, message: str
):
    model = repositories[Task.SEQUENCE_CLASSIFICATION].engine_name
    batch = {
        "input_ids": np.full((1, 5), 7, np.int64),
        "attention_mask": np.ones((1, 5), np.int64),
        "token_type_ids": np.zeros((1, 5), np.int64),
    }
    batch[name][:] = value
    with pytest.raises(client[0].InferenceServerException, match=message) as caught:
        client[1].infer(model, tensors(client, batch))
    assert caught.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")


def test_an_engine_that_is_gone_is_the_servers_error(
    engine_of: Callable[[Task], Engine], triton_environment: TritonEnvironment, tmp_path
):
    engine = engine_of(Task.SEQUENCE_CLASSIFICATION)
    options = TritonOptions(name="texts", environment=str(triton_environment.model))
    repository = package_triton(engine, tmp_path / "repository", options)
    with TritonServer(repository.path, explicit=True) as running:
        client = http_client, http_client.InferenceServerClient(running.http_url)
        with client[1]:
            assert "label" in ask(client, "texts", b"A fine day.")[0]
            running.unload("texts_engine")
            wait_until(lambda: not client[1].is_model_ready("texts_engine"), 30, "unloaded")
            with pytest.raises(http_client.InferenceServerException) as caught:
                ask(client, "texts", b"A fine day.")
            assert caught.value.status() == "500"
            with pytest.raises(http_client.InferenceServerException, match="empty") as caught:
                ask(client, "texts", b" ")
            assert caught.value.status() == "400"
            running.load("texts_engine")
            assert "label" in ask(client, "texts", b"A fine day.")[0]


def test_a_new_version_takes_over_and_the_old_one_keeps_its_engine(
    engine_of: Callable[[Task], Engine], triton_environment: TritonEnvironment, tmp_path
):
    first = engine_of(Task.SEQUENCE_CLASSIFICATION)
    second = relabelled(first, tmp_path / "second.engine", ("low", "middle", "high"))
    environment = str(triton_environment.model)
    options = TritonOptions(name="texts", environment=environment)
    target = package_triton(first, tmp_path / "repository", options).path
    with TritonServer(target, explicit=True) as running:
        client = http_client, http_client.InferenceServerClient(running.http_url)
        with client[1]:
            old = ask(client, "texts", b"A fine day.")[0]
            package_triton(second, target, TritonOptions(environment=environment, add_version=True))
            running.load("texts_engine")
            before = executed(running)
            assert ask(client, "texts", b"A fine day.") == [old]
            assert np.subtract(executed(running), before).tolist() == [1, 0]
            running.load("texts")
            before = executed(running)
            new = ask(client, "texts", b"A fine day.")[0]
            assert executed(running)[1] - before[1] == 1
    assert set(old["scores"]) == {"LABEL_0", "LABEL_1", "LABEL_2"}
    assert set(new["scores"]) == {"low", "middle", "high"}
    assert list(new["scores"].values()) == pytest.approx(list(old["scores"].values()), abs=1e-6)


def executed(running: TritonServer) -> list[float]:
    """Batches that versions 1 and 2 of the engine ran, their warm-ups too."""
    return [
        running.metric("nv_inference_exec_count", model="texts_engine", version=version)
        for version in ("1", "2")
    ]


def relabelled(engine: Engine, target: pathlib.Path, labels: tuple[str, ...]) -> Engine:
    """A copy that gives the same scores other names."""
    shutil.copytree(engine.path, target)
    manifest = dataclasses.replace(engine.manifest, labels=labels)
    (target / MANIFEST).write_text(json.dumps(manifest.to_json()))
    return Engine.load(target)
