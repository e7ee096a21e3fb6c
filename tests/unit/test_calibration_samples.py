"""Reading calibration data and putting it into batches."""

from __future__ import annotations

import itertools
import json
import tracemalloc

import numpy as np
import pytest

from convbert_deploy.architecture import Task
from convbert_deploy.calibration.samples import CalibrationSamples, SampleRow, read_samples
from convbert_deploy.errors import InputError
from convbert_deploy.serving.requests import INPUT_NAMES, InputLimits
from convbert_deploy.serving.tokenizer import Tokenizer


def limits(task: Task = Task.SEQUENCE_CLASSIFICATION, positions: int = 64) -> InputLimits:
    return InputLimits(task, vocab_size=30522, max_positions=positions, type_vocab_size=2)


@pytest.fixture(scope="module")
def tokenizer(sample_path) -> Tokenizer:
    return Tokenizer.load(sample_path)


@pytest.fixture
def write(tmp_path):
    def write(lines, name="texts.jsonl"):
        path = tmp_path / name
        text = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        path.write_bytes(b"\n".join(text) + b"\n")
        return path

    return write


def random_rows(count: int, *, seed: int = 0, longest: int = 12) -> CalibrationSamples:
    random = np.random.default_rng(seed)
    rows = []
    for number in range(1, count + 1):
        ids = random.integers(1, 500, random.integers(1, longest + 1))
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": 0 * ids}
        rows.append(SampleRow(number, inputs))
    return CalibrationSamples("random", "line", tuple(rows))


def test_texts_become_unpadded_rows(write, tokenizer):
    path = write([{"text": "a fine film", "label": 1}, {"text": "dull", "text_pair": "not dull"}])

    samples = read_samples(path, limits=limits(), tokenizer=tokenizer)

    texts = [("a fine film", ""), ("dull", "not dull")]
    for row, (first, second) in zip(samples.rows, texts, strict=True):
        pieces = [tokenizer.pieces(text).ids for text in (first, second)]
        ids = [tokenizer.cls_id, *pieces[0], tokenizer.sep_id]
        types = [0] * len(ids)
        if second:
            ids, types = [*ids, *pieces[1], tokenizer.sep_id], types + [1] * (len(pieces[1]) + 1)
        assert row.inputs["input_ids"].tolist() == ids
        assert row.inputs["token_type_ids"].tolist() == types
        assert row.inputs["attention_mask"].all()
        assert all(array.dtype == np.int64 for array in row.inputs.values())
    assert samples.tokens == sum(row.positions for row in samples.rows)


@pytest.mark.parametrize(
    ("task", "request_"),
    [
        (Task.ENCODER, {"text": "a fine film"}),
        (Task.MASKED_LM, {"text": "a [MASK] film"}),
        (Task.TOKEN_CLASSIFICATION, {"words": ["a", "fine", "film"], "tags": ["DET"]}),
        (Task.QUESTION_ANSWERING, {"question": "what film?", "context": "a fine film"}),
        (Task.MULTIPLE_CHOICE, {"prompt": "a", "choices": [f"film {n}" for n in range(12)]}),
    ],
)
def test_every_task_is_read(write, tokenizer, task, request_):
    samples = read_samples(write([request_]), limits=limits(task), tokenizer=tokenizer)

    (row,) = samples.rows
    assert row.inputs["input_ids"].ndim == len(task.input_axes) - 1
    assert row.tokens > 3


def test_long_sentence_becomes_several_rows_of_one_sample(write, tokenizer):
    words = [["word"] * 3, ["word"] * 200]
    path = write([{"words": part} for part in words])

    samples = read_samples(
        path, limits=limits(Task.TOKEN_CLASSIFICATION), tokenizer=tokenizer, window_overlap=8
    )

    assert samples.samples == 2
    assert [row.number for row in samples.rows] == [1] + [2] * (len(samples.rows) - 1)
    assert len(samples.rows) > 4
    assert max(row.positions for row in samples.rows) == 64


def test_max_length_cuts(write, tokenizer):
    path = write([{"text": "word " * 200}])

    (row,) = read_samples(path, limits=limits(), tokenizer=tokenizer, max_length=10).rows

    assert row.positions == 10


def test_subset_is_spread_reproducible_and_in_order(write, tokenizer):
    path = write([{"text": f"number {index}"} for index in range(400)])

    def numbers(seed):
        chosen = read_samples(path, limits=limits(), tokenizer=tokenizer, samples=40, seed=seed)
        return [row.number for row in chosen.rows]

    first = numbers(0)
    assert len(first) == len(set(first)) == 40
    assert first == sorted(first) == numbers(0) != numbers(1)
    # a head of the file would end at line 40
    assert max(first) > 300
    assert min(first) < 100


def test_digest_is_of_the_content(write, tokenizer):
    def digest(*texts, name="texts.jsonl"):
        path = write([{"text": text} for text in texts], name)
        return read_samples(path, limits=limits(), tokenizer=tokenizer).sha256

    reference = digest("one film", "two")
    assert digest("one film", "two", name="other.jsonl") == reference
    assert len({reference, digest("one film"), digest("two", "one film")}) == 3


def test_digest_tells_shapes_masks_and_types_apart():
    def digest(shape, mask=1, types=0):
        ids = np.full(shape, 5)
        values = (ids, ids * 0 + mask, ids * 0 + types)
        inputs = dict(zip(INPUT_NAMES, values, strict=True))
        return CalibrationSamples("x", "row", (SampleRow(0, inputs),)).sha256

    assert len({digest(4), digest((2, 2)), digest(4, mask=0), digest(4, types=1), digest(5)}) == 5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{not json", "line 3 is not JSON"),
        (b'{"text": "\xff"}', "line 3 is not JSON"),
        (b"[" * 10**5, "line 3 is not JSON"),
        (b'{"words": ["a"]}', "line 3: the request has the keys ['words']"),
        (b'{"text": ""}', "line 3: text is empty"),
        (b'{"text": 5}', "line 3: text is a int"),
        (b"7", "line 3: the request is a int"),
    ],
)
def test_bad_line_is_named(write, tokenizer, line, message):
    path = write([{"text": "fine"}, b"  ", line, {"text": "fine"}])

    with pytest.raises(InputError) as caught:
        read_samples(path, limits=limits(), tokenizer=tokenizer)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_byte_order_mark_and_windows_line_ends(write, tokenizer):
    path = write([b'\xef\xbb\xbf{"text": "fine"}\r', b"\r", b'{"text": "dull"}\r'])

    samples = read_samples(path, limits=limits(), tokenizer=tokenizer)

    assert [samples.place(index) for index in range(2)] == [
        "line 1 of texts.jsonl",
        "line 3 of texts.jsonl",
    ]


def test_files_that_cannot_be_used(write, tokenizer, tmp_path):
    def message(path, **changes):
        with pytest.raises(InputError) as caught:
            read_samples(path, **({"limits": limits(), "tokenizer": tokenizer} | changes))
        return str(caught.value)

    texts = write([{"text": "fine"}])
    assert "does not exist" in message(tmp_path / "none.jsonl")
    assert "holds no sample" in message(write([b"", b"  "], "empty.jsonl"))
    assert "is a .csv file" in message(write([b"a,b"], "table.csv"))
    assert "no tokenizer" in message(texts, tokenizer=None)
    assert "0 calibration samples" in message(texts, samples=0)


def padded_arrays(lengths, width=20):
    random = np.random.default_rng(1)
    lengths = np.asarray(lengths)
    mask = (np.arange(width) < lengths[..., None]).astype(np.int32)
    ids = random.integers(1, 30000, mask.shape).astype(np.int32) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": mask * 0}


def test_arrays_lose_their_padding(tmp_path):
    arrays = padded_arrays([3, 20, 1, 7])
    np.savez(tmp_path / "a.npz", labels=np.arange(4), **arrays)

    samples = read_samples(tmp_path / "a.npz", limits=limits())

    assert [row.positions for row in samples.rows] == [3, 20, 1, 7]
    for index, row in enumerate(samples.rows):
        assert np.array_equal(row.inputs["input_ids"], arrays["input_ids"][index, : row.positions])
        assert row.inputs["input_ids"].dtype == np.int64
        assert row.inputs["input_ids"].base is None, "a view would keep the whole file in memory"
    assert samples.place(2) == "row 2 of a.npz"


def test_choices_are_trimmed_to_the_longest_of_their_request(tmp_path):
    np.savez(tmp_path / "a.npz", **padded_arrays([[3, 5], [20, 2], [4, 4]]))

    samples = read_samples(tmp_path / "a.npz", limits=limits(Task.MULTIPLE_CHOICE))

    assert [row.inputs["input_ids"].shape for row in samples.rows] == [(2, 5), (2, 20), (2, 4)]
    assert [row.tokens for row in samples.rows] == [8, 22, 8]
    assert samples.tokens == 38


def test_arrays_without_mask_and_subset(tmp_path):
    np.savez(tmp_path / "a.npz", input_ids=np.arange(1, 401).reshape(100, 4))

    samples = read_samples(tmp_path / "a.npz", limits=limits(), samples=10)

    assert [row.inputs["input_ids"][0] for row in samples.rows] == [
        row.number * 4 + 1 for row in samples.rows
    ]
    assert samples.samples == 10
    assert all(row.tokens == 4 for row in samples.rows)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"ids": np.ones((2, 3), int)}, "has no input_ids, only: ids"),
        ({"input_ids": np.ones((2, 3))}, "dtype float64"),
        ({"input_ids": np.array([[1, 2], [3, 99999]])}, "row 1, position 1: token id 99999"),
        ({"input_ids": np.ones((2, 100), int)}, "100 tokens a sequence"),
        ({"input_ids": np.ones(3, int)}, "has shape [3]"),
        (
            {"input_ids": np.ones((1, 3), int), "attention_mask": np.array([[0, 1, 1]])},
            "left padding",
        ),
        ({"input_ids": np.array([{}], object)}, "no .npz file, or damaged"),
    ],
)
def test_bad_arrays_are_named(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)

    with pytest.raises(InputError) as caught:
        read_samples(tmp_path / "a.npz", limits=limits())
    assert message in str(caught.value)
    assert "a.npz" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 broken", b"\x93NUMPY\x01\x00"])
def test_damaged_array_files(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)

    with pytest.raises(InputError, match=r"no \.npz file, or damaged"):
        read_samples(tmp_path / "a.npz", limits=limits())


@pytest.mark.parametrize("most", [1, 7, 24, 1000])
def test_batches_hold_every_row_once_unpadded_and_bounded(most):
    samples = random_rows(60)

    batches = list(samples.batches(most))

    seen = list(itertools.chain.from_iterable(indices for indices, _ in batches))
    assert sorted(seen) == list(range(60))
    for indices, batch in batches:
        assert batch["input_ids"].size <= most or len(indices) == 1
        for row, index in enumerate(indices):
            for name in INPUT_NAMES:
                assert np.array_equal(batch[name][row], samples.rows[index].inputs[name])
    assert [indices[0] for indices, _ in batches] == sorted(indices[0] for indices, _ in batches)


def test_batches_are_filled_and_the_same_every_time():
    samples = random_rows(60)
    first, second = (list(samples.batches(24)) for _ in range(2))

    assert [indices for indices, _ in first] == [indices for indices, _ in second]
    lengths = {row.positions for row in samples.rows}
    for length in lengths:
        sizes = [len(i) for i, batch in first if batch["input_ids"].shape[1] == length]
        assert sum(size < max(1, 24 // length) for size in sizes) <= 1


def test_a_large_file_is_not_held_in_memory(write, tokenizer):
    path = write([{"text": f"number {index} " + "x" * 100} for index in range(20_000)])
    tracemalloc.start()
    samples = read_samples(path, limits=limits(), tokenizer=tokenizer, samples=5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert samples.samples == 5
    assert peak < path.stat().st_size / 2
