"""Engines behind a real Triton server, beside the eager model behind the same server.

``python benchmarks/triton_serving.py CKPT --engine base.fp32.engine --engine base.int8.engine --texts
texts.txt --threads 2``. Every server runs for the whole time and is asked in turns, ``--rounds``
times, by the client of ``convbert-deploy load``; medians of the rounds. The peer is what a user would
write: transformers' tokenizer and model in a python model that pads each batch to its longest text.

The server is the one of the tests (python backend, no GPU); the peer's packages are installed with
pip once, into the tests' cache.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import statistics
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tests"))

from convbert_deploy.checkpoint import Checkpoint
from convbert_deploy.engine import Engine
from convbert_deploy.serving.client import ANSWER, REQUEST
from convbert_deploy.serving.load import LoadLevel, LoadOptions, load, read_requests
from convbert_deploy.triton.repository import TritonOptions, package_triton

from serving.triton_server import TritonServer, environment_of, installed, triton_environment

_PEER_PACKAGES = ("torch==2.13.0", "transformers==5.23.0", "numpy<2")
_PEER_CONFIG = """name: "eager"
backend: "python"
max_batch_size: 32
input {{ name: "{request}" data_type: TYPE_STRING dims: [ 1 ] }}
output {{ name: "{answer}" data_type: TYPE_STRING dims: [ 1 ] }}
instance_group {{ count: 1 kind: KIND_CPU }}
dynamic_batching {{ }}
parameters {{ key: "EXECUTION_ENV_PATH" value {{ string_value: "{environment}" }} }}
"""
_PEER_MODEL = """
import json
import pathlib

import numpy as np
import torch
import transformers
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        folder = pathlib.Path(args["model_repository"], "1", "checkpoint")
        torch.set_num_threads({threads})
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        automatic = transformers.AutoModelForSequenceClassification
        self._model = automatic.from_pretrained(folder).eval()

    @torch.inference_mode()
    def execute(self, requests):
        arrays = [pb_utils.get_input_tensor_by_name(r, "{request}").as_numpy() for r in requests]
        texts = [value.decode() for array in arrays for value in array.reshape(-1)]
        batch = self._tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        scores = torch.softmax(self._model(**batch).logits, -1).tolist()
        answers = iter([json.dumps({{"scores": row}}).encode() for row in scores])
        responses = []
        for array in arrays:
            own = [next(answers) for _ in range(array.size)]
            tensor = pb_utils.Tensor("{answer}", np.array(own, np.object_).reshape(array.shape))
            responses.append(pb_utils.InferenceResponse([tensor]))
        return responses
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="a sequence classifier with a tokenizer")
    parser.add_argument("--engine", action="append", required=True, type=pathlib.Path)
    parser.add_argument("--texts", required=True, type=pathlib.Path, help="lines of text")
    parser.add_argument("--tokenizer", type=pathlib.Path, help="folder, where CKPT has none")
    parser.add_argument("--concurrency", default="1,4,8")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    texts = read_requests(args.texts)
    options = LoadOptions(
        concurrency=tuple(int(count) for count in args.concurrency.split(",")),
        requests=args.requests,
    )
    levels: dict[str, list[tuple[LoadLevel, ...]]] = {}
    with tempfile.TemporaryDirectory() as work, contextlib.ExitStack() as stack:
        servers = {"eager": _peer(pathlib.Path(work), args)}
        for path in args.engine:
            engine = Engine.load(path)
            servers[engine.label] = _ours(pathlib.Path(work), engine, args.threads)
        running = {
            label: (stack.enter_context(TritonServer(repository)), name)
            for label, (repository, name) in servers.items()
        }
        for number in range(args.rounds):
            for label, (server, name) in running.items():
                print(f"round {number + 1}: {label}", file=sys.stderr)
                report = load(server.http_url, name, texts, options)
                levels.setdefault(label, []).append(report.levels)
    _print(levels, options)


def _ours(work: pathlib.Path, engine: Engine, threads: int) -> tuple[pathlib.Path, str]:
    options = TritonOptions(
        name="engine", threads=threads, environment=str(triton_environment().model)
    )
    folder = work / engine.manifest.name / "models"
    return package_triton(engine, folder, options).path, "engine"


def _peer(work: pathlib.Path, args: argparse.Namespace) -> tuple[pathlib.Path, str]:
    import transformers

    repository = work / "peer"
    checkpoint = repository / "eager" / "1" / "checkpoint"
    loaded = Checkpoint.load(args.checkpoint)
    loaded.eager_model().save_pretrained(checkpoint)
    tokenizer = args.tokenizer or pathlib.Path(args.checkpoint)
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(checkpoint)
    names = {"request": REQUEST, "answer": ANSWER, "threads": args.threads}
    packages = installed("peer", _PEER_PACKAGES)
    environment = environment_of(work / "peer-environment", (packages,))
    config = _PEER_CONFIG.format(**names, environment=environment)
    (repository / "eager" / "config.pbtxt").write_text(config)
    (repository / "eager" / "1" / "model.py").write_text(_PEER_MODEL.format(**names))
    return repository, "eager"


def _print(levels: dict[str, list[tuple[LoadLevel, ...]]], options: LoadOptions) -> None:
    print(
        "| served | clients | p50 ms | p99 ms | texts/s | beside eager | "
        f"answers that differ by more than {options.tolerance:g}, most |"
    )
    print("|---|---:|---:|---:|---:|---:|---|")
    for place, clients in enumerate(options.concurrency):
        rates = {
            label: [found[place].per_second for found in rounds] for label, rounds in levels.items()
        }
        for label, rounds in levels.items():
            of_level = [found[place] for found in rounds]
            ratios = [own / base for own, base in zip(rates[label], rates["eager"], strict=True)]
            different = sum(level.different for level in of_level)
            asked = sum(level.requests for level in of_level)
            errors = sum(sum(level.errors.values()) for level in of_level)
            most = max(level.max_abs for level in of_level)
            print(
                f"| {label} | {clients} "
                f"| {statistics.median(level.percentile_ms(50) for level in of_level):.1f} "
                f"| {statistics.median(level.percentile_ms(99) for level in of_level):.1f} "
                f"| {statistics.median(rates[label]):.1f} | {statistics.median(ratios):.2f} "
                f"| {different} of {asked}, {most:.1g}{f'; {errors} errors' if errors else ''} |"
            )


if __name__ == "__main__":
    main()
