"""The calibration table's file."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from convbert_deploy.calibration.observers import METHODS, Observer
from convbert_deploy.calibration.table import CalibrationTable
from convbert_deploy.errors import GraphError, InputError, OutputError

GRAPH = "a" * 64


def make_table(*, channels: int = 24, tensors: int = 3, histograms: bool = True):
    random = np.random.default_rng(0)
    summaries = {}
    for index in range(tensors):
        observer = Observer(histograms=histograms)
        for _ in range(4):
            observer.update(random.standard_t(4, size=(500, channels)).astype(np.float32))
        summaries[f"layer.{index}/Gelu:0"] = observer.summary()
    return CalibrationTable(
        graph_sha256=GRAPH,
        data="texts.jsonl",
        data_sha256="b" * 64,
        samples=12,
        tokens=2000,
        method="entropy",
        percentile=99.9,
        versions={"numpy": "2"},
        tensors=summaries,
    )


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "table.json"
    make_table().save(path)
    return path


@pytest.mark.parametrize("histograms", [True, False])
def test_round_trip_is_exact(tmp_path, histograms):
    table = dataclasses.replace(make_table(histograms=histograms), method="minmax")
    table.save(tmp_path / "first.json")
    loaded = CalibrationTable.load(tmp_path / "first.json")
    loaded.save(tmp_path / "second.json")

    assert loaded == table
    for name, summary in table.tensors.items():
        channels = loaded.tensors[name].channel_amax
        assert (channels is None) == (not histograms)
        if histograms:
            assert channels.dtype == np.float32
            assert np.array_equal(channels, summary.channel_amax)
    assert (tmp_path / "first.json").read_bytes() == (tmp_path / "second.json").read_bytes()


def test_another_method_needs_no_new_collection(saved):
    table, loaded = make_table(), CalibrationTable.load(saved)
    name = "layer.1/Gelu:0"

    found = {method: loaded.amax(name, method) for method in METHODS}

    assert found == {
        method: table.tensors[name].amax(method, percentile=99.9) for method in METHODS
    }
    assert len(set(found.values())) == len(METHODS)
    assert loaded.amax(name) == found["entropy"]
    assert dataclasses.replace(loaded, method="mse").amax(name) == found["mse"]
    assert loaded.amax(name, "percentile", percentile=90) < found["percentile"]


def test_file_is_readable_and_small(tmp_path):
    path = tmp_path / "table.json"
    make_table(channels=3072, tensors=2).save(path)
    lines = path.read_text().splitlines()

    assert any(line.startswith('   "histogram": [') and line.endswith("],") for line in lines)
    assert len(lines) < 40
    # 60 tensors, all as wide as the widest of ConvBERT-base: below 3 MB
    assert path.stat().st_size / 2 * 60 < 3e6


def test_table_of_another_graph_is_refused(saved):
    table = CalibrationTable.load(saved)
    table.check_graph(GRAPH)

    with pytest.raises(
        GraphError, match="of graph aaaaaaaaaaaa, this one is cccccccccccc"
    ) as caught:
        table.check_graph("c" * 64)
    assert "calibrate" in caught.value.hint


def test_unknown_tensor_method_and_percentile(saved):
    table = CalibrationTable.load(saved)

    with pytest.raises(GraphError, match="no tensor layer.9"):
        table.amax("layer.9")
    with pytest.raises(InputError, match="calibration method 'best'"):
        dataclasses.replace(table, method="best")
    with pytest.raises(InputError, match="percentile 101"):
        dataclasses.replace(table, percentile=101)


def change(data: dict, keys: tuple, value: object) -> dict:
    for key in keys[:-1]:
        data = data[key]
    if value is None:
        del data[keys[-1]]
    else:
        data[keys[-1]] = value


TENSOR = ("tensors", "layer.0/Gelu:0")


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("schema",), "table 0", "schema 'table 0', this version reads"),
        (("schema",), None, "schema None"),
        (("graph_sha256",), None, "damaged: 'graph_sha256' is missing"),
        (("tensors",), [], "damaged"),
        (("method",), "best", "damaged: calibration method 'best'"),
        ((*TENSOR, "histogram"), None, "layer.0/Gelu:0: 'histogram' is missing"),
        ((*TENSOR, "histogram"), [1, 2, 3], "layer.0/Gelu:0: the histogram holds 6 values"),
        ((*TENSOR, "histogram"), "many", "layer.0/Gelu:0"),
        ((*TENSOR, "maximum"), 1e6, "layer.0/Gelu:0: largest magnitude"),
        ((*TENSOR, "channel_amax"), [[1], [2, 3]], "layer.0/Gelu:0"),
        ((*TENSOR, "exponent"), 10**9, "layer.0/Gelu:0"),
        (TENSOR, 5, "layer.0/Gelu:0"),
    ],
)
def test_damage_is_named(saved, keys, value, message):
    data = json.loads(saved.read_text())
    change(data, keys, value)
    saved.write_text(json.dumps(data))

    with pytest.raises(GraphError) as caught:
        CalibrationTable.load(saved)
    assert message in str(caught.value)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"\xff\xfe", b"null", b"[" * 10**5])
def test_files_that_are_no_table(saved, content):
    saved.write_bytes(content)

    with pytest.raises(GraphError, match=r"table\.json"):
        CalibrationTable.load(saved)


def test_every_truncation_is_noticed(saved):
    whole = saved.read_bytes()
    for length in range(0, len(whole) - 2, len(whole) // 50):
        saved.write_bytes(whole[:length])
        with pytest.raises(GraphError):
            CalibrationTable.load(saved)


def test_missing_file(tmp_path):
    with pytest.raises(GraphError, match="does not exist"):
        CalibrationTable.load(tmp_path / "none.json")


def test_failed_save_leaves_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()
    monkeypatch.setattr(
        "convbert_deploy.calibration.table._pieces",
        lambda *_: (_ for _ in ()).throw(OSError(28, "")),
    )

    with pytest.raises(OutputError):
        make_table(tensors=1).save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]
