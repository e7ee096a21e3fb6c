"""Eight threads on one Scorer and a real engine: every answer is the one a single thread gets."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import pathlib
import random
import threading

import pytest
import torch

pytest.importorskip("tokenizers")

from convbert_deploy.architecture import Task
from convbert_deploy.backends.base import RunnerOptions
from convbert_deploy.build import BuildOptions, build_engine
from convbert_deploy.checkpoint import Checkpoint, CheckpointOptions
from convbert_deploy.exporting import ExportOptions, export
from convbert_deploy.graph import Graph
from convbert_deploy.serving.answering import engine_tokenizer, scorer_options
from convbert_deploy.serving.scorer import Scorer

import factories

FOLDER = pathlib.Path(__file__).parents[2] / "samples" / "convbert-pos-brown"
THREADS = 8
WORDS = ["the", "film", "was", "long", ",", "and", "she", "said", "it", "is", "not", "so", "good"]


def sentence(dice, most=40):
    return " ".join(dice.choices(WORDS, k=dice.randint(1, most)))


def request_of(task, dice):
    if task is Task.MASKED_LM:
        return {"text": f"{sentence(dice)} [MASK] {sentence(dice)}"}
    if task is Task.QUESTION_ANSWERING:
        return {"question": sentence(dice, 6), "context": sentence(dice, 90)}
    if task is Task.MULTIPLE_CHOICE:
        return {"prompt": sentence(dice), "choices": [sentence(dice) for _ in range(3)]}
    if task is Task.SEQUENCE_CLASSIFICATION and dice.random() < 0.5:
        return {"text": sentence(dice), "text_pair": sentence(dice)}
    return {"text": sentence(dice, 90)}


@pytest.fixture(scope="module")
def engine_for(tmp_path_factory):
    def make(task):
        folder = tmp_path_factory.mktemp(f"{task}")
        model = factories.realistic_model("tiny", task, vocab_size=9000)
        torch.save(model.state_dict(), folder / "m.pt")
        options = CheckpointOptions(tokenizer=FOLDER, task=task)
        checkpoint = Checkpoint.load(folder / "m.pt", options)
        export(checkpoint, folder / "m.onnx", ExportOptions(padding="masked", check=False))
        graph = Graph.load(folder / "m.onnx")
        return build_engine(graph, folder / "m.engine", BuildOptions(backend="onnxruntime"))

    return make


def assert_same(one, other, tolerance):
    """Equal words and places; numbers within ``tolerance``, which company may change by rounding."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key], tolerance)
    elif isinstance(one, list):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right, tolerance)
    elif isinstance(one, float):
        assert one == pytest.approx(other, abs=tolerance)
    else:
        assert one == other


@pytest.mark.parametrize("task", list(Task), ids=str)
def test_eight_threads_get_the_answers_of_one(task, engine_for):
    engine = engine_for(task)
    dice = random.Random(5)
    requests = [request_of(task, dice) for _ in range(24)]
    requests[7], requests[15] = {"text": ""}, {"nothing": 1}
    # Windows over the longer texts, so that threads hold several rows each.
    limits = dataclasses.replace(engine.limits(), max_positions=64)
    options = dataclasses.replace(scorer_options(engine), limits=limits, window_overlap=16, top_k=3)
    barrier = threading.Barrier(THREADS)
    with engine.runner(RunnerOptions(threads=1)) as runner:
        scorer = Scorer(runner, engine_tokenizer(engine), options)
        expected = [scorer.score_json([request])[0] for request in requests]

        def work(number):
            order = list(range(len(requests)))
            random.Random(number).shuffle(order)
            barrier.wait(timeout=60)
            size = 1 + number % 4
            found = {}
            for first in range(0, len(order), size):
                part = order[first : first + size]
                answers = scorer.score_json([requests[index] for index in part])
                found.update(zip(part, answers, strict=True))
            return found

        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            results = list(pool.map(work, range(THREADS), timeout=300))
    assert [("error" in answer) for answer in expected] == [i in (7, 15) for i in range(24)]
    assert len({str(answer) for answer in expected}) > 20
    for found in results:
        assert sorted(found) == list(range(len(requests)))
        for index, answer in found.items():
            assert_same(answer, expected[index], 2e-6)
