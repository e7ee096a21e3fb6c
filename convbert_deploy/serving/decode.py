"""Logits to answers: one function a task, each returning a dict that JSON can hold.

Scores are probabilities, computed in float64 from float32 logits. ``start`` and ``end`` are
character offsets, end exclusive. Logits arrive without batch axis and without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from convbert_deploy.serving.sequences import Sequence as Row
from convbert_deploy.serving.tokenizer import Pieces, Tokenizer

Answer = dict[str, Any]

REGRESSION = "regression"
MULTI_LABEL = "multi_label_classification"


def sequence_classification(
    logits: np.ndarray, labels: Sequence[str], problem_type: str | None
) -> Answer:
    """logits: (labels,). One label is a regression; ``problem_type`` is the config's.

    Regression: ``value``, or ``values`` by label. Multi-label: ``labels`` whose sigmoid is at least
    0.5, best first. Else the best ``label`` with its softmax ``score``. ``scores`` has every label.
    """
    if problem_type == REGRESSION or (len(labels) == 1 and problem_type != MULTI_LABEL):
        if len(labels) == 1:
            return {"value": float(logits[0])}
        return {"values": dict(zip(labels, logits.tolist(), strict=True))}
    if problem_type == MULTI_LABEL:
        sigmoid = 0.5 * (1.0 + np.tanh(0.5 * logits.astype(np.float64)))  # never overflows
        chosen = [labels[i] for i in np.argsort(-sigmoid, kind="stable") if sigmoid[i] >= 0.5]
        return {"labels": chosen, "scores": dict(zip(labels, sigmoid.tolist(), strict=True))}
    scores = softmax(logits)
    best = int(scores.argmax())
    return {
        "label": labels[best],
        "score": float(scores[best]),
        "scores": dict(zip(labels, scores.tolist(), strict=True)),
    }


def token_classification(logits: np.ndarray, pieces: Pieces, labels: Sequence[str]) -> Answer:
    """logits: (pieces, labels). A word takes the label of its first piece.

    ``tokens`` and ``words`` each hold label, score and offsets; a word without pieces has label
    None. ``entities`` is there when the labels are BIO.
    """
    scores = softmax(logits)
    best = scores.argmax(axis=-1)
    tokens = [
        {
            "token": pieces.tokens[i],
            "label": labels[best[i]],
            "score": float(scores[i, best[i]]),
            "start": start,
            "end": end,
        }
        for i, (start, end) in enumerate(pieces.offsets)
    ]
    words = [
        {"word": pieces.text[start:end], "label": None, "score": None, "start": start, "end": end}
        for start, end in pieces.word_spans
    ]
    for i in reversed(range(len(pieces))):  # the first piece writes last
        words[pieces.words[i]].update(label=tokens[i]["label"], score=tokens[i]["score"])
    answer: Answer = {"words": words, "tokens": tokens}
    if is_bio(labels):
        answer["entities"] = entities(words, pieces.text)
    return answer


def is_bio(labels: Sequence[str]) -> bool:
    """Whether the labels are ``O`` with ``B-X`` and ``I-X``."""
    inside = [label for label in labels if label != "O"]
    return bool(inside) and all(label.startswith(("B-", "I-")) for label in inside)


def entities(words: Sequence[Answer], text: str) -> list[Answer]:
    """Group BIO words; an ``I-X`` that continues no ``X`` starts one, as conlleval reads it. Words
    without a label (they hold no piece) neither end a group nor belong to one.

    ``score`` is the mean of the words' scores.
    """
    groups: list[list[Answer]] = []
    kind = None
    for word in words:
        if word["label"] is None:
            continue
        prefix, _, label = word["label"].partition("-")
        if prefix == "O":
            kind = None
            continue
        if prefix == "B" or label != kind:
            groups.append([])
        groups[-1].append(word)
        kind = label
    return [
        {
            "entity": group[0]["label"].partition("-")[2],
            "text": text[group[0]["start"] : group[-1]["end"]],
            "score": float(np.mean([word["score"] for word in group])),
            "start": group[0]["start"],
            "end": group[-1]["end"],
        }
        for group in groups
    ]


def merged_windows(rows: Sequence[Row], logits: Sequence[np.ndarray], count: int) -> np.ndarray:
    """(count, labels) from overlapping windows: each piece from where it has most context.

    logits: one (tokens, labels) array a row, special tokens included.
    """
    out = np.zeros((count, logits[0].shape[-1]), np.float32)
    margin = np.full(count, -1.0)
    for row, values in zip(rows, logits, strict=True):
        stop = row.first + row.count
        index = np.arange(row.first, stop)
        before = index - row.first if row.first else np.full(row.count, np.inf)
        after = stop - 1 - index if stop < count else np.full(row.count, np.inf)
        here = np.minimum(before, after)
        better = here > margin[index]
        out[index[better]] = values[row.start : row.start + row.count][better]
        margin[index[better]] = here[better]
    return out


def question_answering(
    rows: Sequence[Row],
    logits: Sequence[tuple[np.ndarray, np.ndarray]],
    context: Pieces,
    *,
    top_k: int,
    max_answer_tokens: int,
) -> Answer:
    """Best spans of the context; logits: (start, end) of shape (tokens,) for each window.

    A span's logit is start + end, the larger where two windows hold it; its score is the softmax
    over every span of the context of at most ``max_answer_tokens``.
    """
    width = min(max_answer_tokens, len(context))
    spans = np.full((len(context), width), -np.inf)  # [first piece, length - 1]
    for row, (start, end) in zip(rows, logits, strict=True):
        inside = slice(row.start, row.start + row.count)
        starts, ends = start[inside].astype(np.float64), end[inside].astype(np.float64)
        for extra in range(min(width, row.count)):
            view = spans[row.first : row.first + row.count - extra, extra]
            np.maximum(view, starts[: row.count - extra] + ends[extra:], out=view)
    scores = softmax(spans.ravel())
    answers = []
    for flat in _largest(scores, top_k):
        if not np.isfinite(spans.flat[flat]):
            break  # fewer spans than top_k
        first, extra = divmod(int(flat), width)
        begin, stop = context.offsets[first][0], context.offsets[first + extra][1]
        answers.append(
            {
                "text": context.text[begin:stop],
                "score": float(scores[flat]),
                "start": begin,
                "end": stop,
            }
        )
    return {"answer": answers[0]["text"], "answers": answers, "windows": len(rows)}


def masked_lm(logits: np.ndarray, pieces: Pieces, tokenizer: Tokenizer, *, top_k: int) -> Answer:
    """logits: (masks, vocabulary), in text order. ``text`` has each mask's best filling."""
    masks = []
    text, shift = pieces.text, 0
    places = [
        span for span, i in zip(pieces.offsets, pieces.ids, strict=True) if i == tokenizer.mask_id
    ]
    for (start, end), row in zip(places, logits, strict=True):
        scores = softmax(row)
        fillings = [
            {"token": tokenizer.token(int(i)), "id": int(i), "score": float(scores[i])}
            for i in _largest(scores, top_k)
        ]
        masks.append({"start": start, "end": end, "fillings": fillings})
        best = fillings[0]["token"]
        text = text[: start + shift] + best + text[end + shift :]
        shift += len(best) - (end - start)
    return {"text": text, "masks": masks}


def multiple_choice(logits: np.ndarray, choices: Sequence[str]) -> Answer:
    """logits: (choices,)."""
    scores = softmax(logits)
    best = int(scores.argmax())
    return {
        "choice": best,
        "text": choices[best],
        "score": float(scores[best]),
        "scores": scores.tolist(),
    }


def encoder(hidden: np.ndarray) -> Answer:
    """hidden: (tokens, hidden). Mean over all tokens, [CLS] and [SEP] too, and the shape."""
    return {
        "embedding": hidden.astype(np.float64).mean(axis=0).astype(np.float32).tolist(),
        "shape": list(hidden.shape),
    }


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, float64."""
    values = logits.astype(np.float64)
    powers = np.exp(values - values.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _largest(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the ``count`` largest, best first; the lower index wins a tie."""
    count = min(count, scores.size)
    least = np.partition(scores, scores.size - count)[scores.size - count]
    # All that tie with the last one: which of them a partition leaves inside is chance.
    top = np.flatnonzero(scores >= least)
    return top[np.lexsort((top, -scores[top]))][:count]
