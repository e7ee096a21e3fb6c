"""Engines and model repositories for tests against a real server."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import pytest

from convbert_deploy.architecture import Task
from convbert_deploy.engine import Engine

import factories
from serving.triton_server import TritonEnvironment, TritonUnavailableError
from serving.triton_server import triton_environment as make_triton_environment

#: one request a task, as the text model takes it
REQUESTS: dict[Task, dict] = {
    Task.ENCODER: {"text": "A fine day in June."},
    Task.MASKED_LM: {"text": "A fine [MASK] in June."},
    Task.SEQUENCE_CLASSIFICATION: {"text": "A fine day.", "text_pair": "It rained."},
    Task.TOKEN_CLASSIFICATION: {"text": "A fine day in June."},
    Task.QUESTION_ANSWERING: {"question": "When?", "context": "The club opened in June."},
    Task.MULTIPLE_CHOICE: {"prompt": "The sky is", "choices": ["blue", "a fish", "late"]},
}


def model_name(task: Task) -> str:
    """The text model's; the tensor model's has ``_engine`` behind it."""
    return str(task).replace("-", "_")


@pytest.fixture(scope="session")
def triton_environment() -> TritonEnvironment:
    try:
        return make_triton_environment()
    except TritonUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def engine_of(
    tmp_path_factory: pytest.TempPathFactory, sample_path: pathlib.Path
) -> Callable[[Task], Engine]:
    """A tiny fp32 engine of a task: realistic weights, masked padding, the sample's tokenizer."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxruntime")
    from convbert_deploy.build import BuildOptions, build_engine
    from convbert_deploy.checkpoint import Checkpoint, CheckpointOptions
    from convbert_deploy.exporting import ExportOptions, export
    from convbert_deploy.graph import Graph

    made: dict[Task, Engine] = {}

    def engine_of(task: Task) -> Engine:
        if task not in made:
            folder = tmp_path_factory.mktemp(str(task))
            model = factories.realistic_model("tiny", task, vocab_size=9000)
            torch.save(model.state_dict(), folder / "model.pt")
            options = CheckpointOptions(tokenizer=sample_path, task=task)
            checkpoint = Checkpoint.load(folder / "model.pt", options)
            graph = folder / "model.onnx"
            export(checkpoint, graph, ExportOptions(padding="masked", check=False))
            made[task] = build_engine(
                Graph.load(graph), folder / "model.engine", BuildOptions(backend="onnxruntime")
            )
        return made[task]

    return engine_of


@pytest.fixture(scope="session")
def repository_of(
    engine_of: Callable[[Task], Engine],
    triton_environment: TritonEnvironment,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Task], pathlib.Path]:
    """A model repository of ``engine_of(task)``; its models are ``model_name(task)`` and the same
    with ``_engine``."""
    from convbert_deploy.triton.repository import TritonOptions, package_triton

    made: dict[Task, pathlib.Path] = {}

    def repository_of(task: Task) -> pathlib.Path:
        if task not in made:
            # A delay, so that a batch forms on a machine of few cores too.
            options = TritonOptions(
                name=model_name(task),
                environment=str(triton_environment.model),
                threads=1,
                delay_us=2000,
            )
            target = tmp_path_factory.mktemp("repository") / "models"
            made[task] = package_triton(engine_of(task), target, options).path
        return made[task]

    return repository_of
