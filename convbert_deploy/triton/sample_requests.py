"""A request in words for each task: what a server's golden answer is asked with."""

from __future__ import annotations

from typing import Any

from convbert_deploy.architecture import Task
from convbert_deploy.engine import Engine
from convbert_deploy.serving.answering import engine_tokenizer

_TEXT = "The film was long, but it was a fine one."


def sample_request(engine: Engine) -> dict[str, Any]:
    """A JSON object of the form that the engine's task takes.

    Raises:
        EngineError: the bundle has no tokenizer.
    """
    task = engine.manifest.task
    if task is Task.MASKED_LM:
        return {"text": f"The film was {engine_tokenizer(engine).mask_token}."}
    if task is Task.QUESTION_ANSWERING:
        return {"question": "How was the film?", "context": _TEXT}
    if task is Task.MULTIPLE_CHOICE:
        choices = ["a fine film", "a long day", "the end", "nothing"]
        least = engine.manifest.profile.choices.min
        extra = [f"{number} more" for number in range(len(choices), least)]
        return {"prompt": "It was", "choices": (choices + extra)[: max(2, least)]}
    return {"text": _TEXT}
