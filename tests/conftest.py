"""Fixtures shared by all tests; ``--require`` turns named skips into failures."""

from __future__ import annotations

import pathlib

import pytest

from convbert_deploy import plugin_library
from convbert_deploy.architecture import Task
from convbert_deploy.checkpoint import Checkpoint

import factories

ROOT = pathlib.Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "samples" / "convbert-pos-brown"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require",
        default="",
        help="comma list of words: a skip whose reason holds one of them is a failure",
    )

    parser.addoption(
        "--libraries",
        type=pathlib.Path,
        help="folder of native libraries to test instead of the installed ones",
    )


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("--libraries")
    if folder:
        plugin_library._candidate = lambda name: folder.resolve() / name


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = (yield).get_result()
    words = [word for word in item.config.getoption("--require").split(",") if word]
    reason = str(report.longrepr) if report.skipped else ""
    if any(word in reason for word in words):
        report.outcome = "failed"
        report.longrepr = f"required, but skipped: {reason}"


@pytest.fixture(scope="session")
def sample_path() -> pathlib.Path:
    return SAMPLE


@pytest.fixture(scope="session")
def sample_texts() -> pathlib.Path:
    """Labelled sentences, one JSON object a line."""
    return SAMPLE.parent / "brown-pos.jsonl"


@pytest.fixture(scope="session")
def sample(sample_path: pathlib.Path) -> Checkpoint:
    """The trained part-of-speech tagger of samples/."""
    return Checkpoint.load(sample_path)


@pytest.fixture(scope="session")
def save_checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """Writes a realistic model of one task as a bare state dict and loads it back."""
    import torch

    def save(size="tiny", task: Task = Task.SEQUENCE_CLASSIFICATION, **changes) -> Checkpoint:
        model = factories.realistic_model(size, task, **changes)
        path = tmp_path_factory.mktemp("checkpoint") / f"{task}.pt"
        torch.save(model.state_dict(), path)
        return Checkpoint.load(path)

    return save


@pytest.fixture(scope="session")
def classifier(save_checkpoint) -> Checkpoint:
    """A two-layer sequence classifier with realistic weights."""
    return save_checkpoint()


@pytest.fixture(scope="session")
def classifier_graph(classifier: Checkpoint, tmp_path_factory: pytest.TempPathFactory):
    from convbert_deploy.exporting import export
    from convbert_deploy.graph import Graph

    path = tmp_path_factory.mktemp("graph") / "classifier.onnx"
    export(classifier, path)
    return Graph.load(path)
