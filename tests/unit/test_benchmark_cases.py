"""Shapes, workloads of texts, and the floor time of each."""

from __future__ import annotations

import json

import numpy as np
import pytest

from convbert_deploy.architecture import Architecture, Task
from convbert_deploy.benchmarking.cases import Point, Workload, read_texts, workload_cases
from convbert_deploy.benchmarking.floor import Ceiling, Costs
from convbert_deploy.benchmarking.measurement import CandidateFacts, Measurement
from convbert_deploy.errors import InputError, ShapeError
from convbert_deploy.serving.tokenizer import Tokenizer

_SIZES = Architecture(
    vocab_size=100,
    embedding_size=6,
    hidden_size=8,
    num_hidden_layers=3,
    num_attention_heads=4,
    head_ratio=2,
    intermediate_size=20,
    num_groups=2,
    conv_kernel_size=3,
    max_position_embeddings=64,
    type_vocab_size=2,
    pad_token_id=7,
)
_CEILING = Ceiling(1, {"fp32": 2.0, "int8": 8.0, "bf16": None}, {}, 1.0, 0.8, 1 << 28)


def _rows(*lengths):
    rows = []
    for length in lengths:
        ids = np.arange(1, length + 1, dtype=np.int64)[None] % 7
        ones = np.ones_like(ids)
        rows.append({"input_ids": ids, "attention_mask": ones, "token_type_ids": ones})
    return rows


def test_shapes_are_read_and_others_refused():
    assert Point.parse_list("1x512, 32x128") == (Point(1, 512), Point(32, 128))
    for wrong in ("1", "0x8", "8x", "x", "1x2x3", ""):
        with pytest.raises(ShapeError, match="BATCHxSEQ"):
            Point.parse_list(wrong)


def test_workload_keeps_the_order_and_counts_tokens_and_pads():
    texts, fixed = workload_cases("t", _rows(3, 5, 2, 4, 6), 2, _SIZES, Task.TOKEN_CLASSIFICATION)
    assert [batch["input_ids"].shape for batch in texts.batches] == [(2, 5), (2, 4), (1, 6)]
    assert texts.lengths == (3, 5, 2, 4, 6)
    assert (texts.tokens, texts.padded_tokens) == (20, 10 + 8 + 6)
    first = texts.batches[0]
    assert first["input_ids"][0].tolist() == [1, 2, 3, 7, 7], "padded with the model's pad id"
    assert first["attention_mask"][0].tolist() == [1, 1, 1, 0, 0]
    assert first["token_type_ids"][0].tolist() == [1, 1, 1, 0, 0]
    assert texts.check["input_ids"].shape == (1, 6), "answers are compared without pads"
    assert texts.where.to_json() == {
        "name": "t",
        "sequences": 5,
        "batches": 3,
        "batch_size": 2,
        "mean_tokens": 4.0,
        "longest": 6,
    }
    assert fixed.tokens == fixed.padded_tokens == 16, "2 batches of 2 x 4, as near as 3"
    assert {batch["input_ids"].shape for batch in fixed.batches} == {(2, 4)}


def test_waste_and_ratio_to_fixed_length():
    where = Workload("t", 2, (3, 5))
    facts = {packs: CandidateFacts(packs=packs) for packs in (False, True)}
    padded, packed = (
        Measurement(
            "a", where, 8, (12.0,), (12.0,), padded_tokens=10, facts=facts[packs], fixed_length_ms=8
        )
        for packs in (False, True)
    )
    assert padded.waste == pytest.approx(0.2)
    assert packed.waste == 0
    assert padded.fixed_length_ratio == 1.5
    assert padded.to_json()["case"] == "t" and padded.to_json()["batch"] is None
    assert padded.sequences_per_s == pytest.approx(2 / 0.012)


def test_flops_are_those_counted_by_hand():
    # H 8, heads 2, head_dim 2, so A 4; K 3; I 20 in 2 groups; E 6; per token and layer:
    linears = 4 * 8 * 4 + 8 * 3 + 8 * 4 + 4 * 2 * 3 + 2 * 4 * 8 + 2 * 8 * 20 // 2
    assert linears == 128 + 24 + 32 + 24 + 64 + 160
    window, attention = 4 * 3, 2 * 4
    per_token = 3 * (linears + window) + 6 * 8
    lengths = (5, 2)
    expected = 2 * (per_token * 7 + 3 * attention * (25 + 4))
    assert Costs(_SIZES, Task.TOKEN_CLASSIFICATION).flops(lengths) == expected
    pooled = Costs(_SIZES, Task.SEQUENCE_CLASSIFICATION).flops(lengths)
    last_layer = 2 * (64 + 160) * (7 - 2)
    assert pooled == expected - last_layer + 2 * 64 * 2, "one row of the last layer is read"
    vocabulary = Costs(_SIZES, Task.MASKED_LM).flops(lengths)
    assert vocabulary == expected + 2 * 7 * (8 * 6 + 6 * 100)


def test_flops_agree_with_torch_on_a_real_model(classifier):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model = classifier.eager_model()
    ids = torch.ones(2, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, attention_mask=ids)
    # of the task's own costs, the rows that nobody reads are left out
    counted = Costs(classifier.architecture, Task.ENCODER).flops((16, 16))
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_floor_is_the_larger_of_arithmetic_and_memory():
    costs = Costs(_SIZES, Task.TOKEN_CLASSIFICATION)
    lengths = (32,) * 64
    wide = costs.floor(lengths, 1, "fp32", _CEILING)
    assert wide.bound == "compute"
    assert wide.ms == pytest.approx(costs.flops(lengths) / 2.0e9 * 1e3)
    one = costs.floor((1,), 1, "fp32", _CEILING)
    assert one.bound == "memory"
    assert one.ms == pytest.approx((3 * 432 + 48) * 4 / 1.0e9 * 1e3)
    assert costs.floor((1,), 1, "int8", _CEILING).ms == pytest.approx(one.ms / 4)
    assert costs.floor((1, 1), 2, "fp32", _CEILING).ms == pytest.approx(one.ms * 2)
    assert costs.floor((1,), 1, "bf16", _CEILING) is None, "no library here has a rate for it"
    assert costs.floor(lengths, 1, "fp8", _CEILING).ms == pytest.approx(wide.ms / 4)


def test_a_better_kernel_than_the_ceilings_is_shown_as_such():
    floor = Costs(_SIZES, Task.ENCODER).floor((8,), 1, "fp32", _CEILING)
    one = Measurement("a", Point(1, 8), 8, (floor.ms / 2,), (1.0,), floor=floor)
    assert one.fraction_of_floor == pytest.approx(2)


def test_texts_of_every_form(sample_path, tmp_path):
    tokenizer = Tokenizer.load(sample_path)
    file = tmp_path / "texts.jsonl"
    lines = [
        "a plain line",
        "",
        json.dumps({"text": "a", "text_pair": "b"}),
        json.dumps({"words": ["two", "words"]}),
        json.dumps({"question": "who ?", "context": "a long context " * 40}),
    ]
    file.write_text("\n".join(lines))
    rows = read_texts(file, tokenizer, 32)
    assert len(rows) == 4
    assert rows[1]["token_type_ids"].tolist() == [[0, 0, 0, 1, 1]]
    assert rows[3]["input_ids"].shape == (1, 32), "cut at the model's longest"
    for text, match in (('{"id": 1}', "2 has no text"), ("{broken", "neither"), ("", "no line")):
        file.write_text(f"fine\n{text}" if text else "\n")
        with pytest.raises(InputError, match=match):
            read_texts(file, tokenizer, 32)
    with pytest.raises(InputError, match="unreadable"):
        read_texts(tmp_path / "absent", tokenizer, 32)
