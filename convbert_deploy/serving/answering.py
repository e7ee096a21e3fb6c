"""From an engine bundle and lines of text to answers."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Iterable, Iterator

from convbert_deploy.backends.base import RunnerOptions
from convbert_deploy.engine import Engine
from convbert_deploy.errors import ConvBertDeployError, EngineError, InputError
from convbert_deploy.serving.decode import Answer
from convbert_deploy.serving.requests import Request, request_from_json
from convbert_deploy.serving.scorer import Scorer, ScorerOptions
from convbert_deploy.serving.tokenizer import Tokenizer

#: lines scored at once: enough to fill batches, few enough that answers come as lines go in
_LINES_AT_ONCE = 64


def scorer_options(engine: Engine) -> ScorerOptions:
    """How requests are put to this engine, and read back from it."""
    manifest = engine.manifest
    return ScorerOptions(
        limits=engine.limits(),
        labels=manifest.labels,
        problem_type=manifest.problem_type,
        profile=manifest.profile,
        padding=manifest.padding,
    )


def engine_tokenizer(engine: Engine) -> Tokenizer:
    """Raises EngineError where the bundle has no tokenizer."""
    if engine.tokenizer_folder is None:
        raise EngineError(
            f"{engine.path} has no tokenizer, so it takes token ids, not text",
            hint="build-engine GRAPH --tokenizer FOLDER puts one in",
        )
    return Tokenizer.load(engine.tokenizer_folder)


@contextlib.contextmanager
def open_scorer(engine: Engine, *, threads: int | None = None) -> Iterator[Scorer]:
    """A Scorer on the engine's runner and tokenizer, open inside the block.

    Raises:
        EngineError: the bundle has no tokenizer, or cannot run here.
    """
    tokenizer, options = engine_tokenizer(engine), scorer_options(engine)
    with engine.runner(RunnerOptions(threads=threads)) as runner:
        yield Scorer(runner, tokenizer, options)


def run(
    engine: Engine | pathlib.Path, lines: Iterable[str], *, threads: int | None = None
) -> Iterator[Answer]:
    """Answer each line: a JSON object of the task's form (see ``serving.requests``), or plain text.

    Yields one JSON-able dict a line, in order; a line that cannot be scored yields
    ``{"error": ..., "hint": ...}`` and does not touch its neighbours.
    """
    engine = engine if isinstance(engine, Engine) else Engine.load(engine)
    with open_scorer(engine, threads=threads) as scorer:
        pending: list[Request | ConvBertDeployError] = []
        for line in lines:
            pending.append(request_of_line(scorer.options, line))
            if len(pending) == _LINES_AT_ONCE:
                yield from scorer.score(pending)
                pending = []
        if pending:
            yield from scorer.score(pending)


def request_of_line(options: ScorerOptions, line: str) -> Request | ConvBertDeployError:
    try:
        return request_from_json(options.task, _object(line))
    except ConvBertDeployError as error:
        return error


def _object(line: str) -> object:
    if not line.lstrip().startswith("{"):
        return {"text": line}
    try:
        return json.loads(line)
    except RecursionError as error:
        raise InputError("line is JSON that is nested too deeply") from error
    except ValueError as error:
        raise InputError(f"line is neither text nor JSON: {error}") from error
