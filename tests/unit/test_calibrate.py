"""``calibrate`` from a graph file to another: what it loses, what it writes, what it refuses."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from convbert_deploy.calibration import eight_bit
from convbert_deploy.calibration.budget import Budget
from convbert_deploy.calibration.calibrating import (
    CalibrateOptions,
    Progress,
    calibrate,
)
from convbert_deploy.calibration.quantization_check import quantization_faults
from convbert_deploy.calibration.smoothing import SmoothingOptions
from convbert_deploy.calibration.table import CalibrationTable
from convbert_deploy.errors import ConvBertDeployError, GraphError, InputError, OutputError
from convbert_deploy.graph import Graph, sha256_of_graph, tokenizer_files
from convbert_deploy.precision import Precision
from convbert_deploy.provenance import sha256_of_file

pytest_plugins = ["quantized_sample"]
pytest.importorskip("tokenizers")
pytest.importorskip("sklearn")

PRECISIONS = ["int8", "fp8", "fp16", "bf16"]
#: 7 linears in each of 4 layers: the feed-forward block has two groups
SAMPLE_LINEARS = 28
PLAIN = SmoothingOptions(None)


def _written(folder: pathlib.Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


BOUNDS = {
    "int8": Budget(metric_drop=0.3, agreement=99.0, mean_error=0.03),
    "fp8": Budget(metric_drop=0.3, agreement=99.0, mean_error=0.03),
    "fp16": Budget(metric_drop=0.0, agreement=99.8, mean_error=0.001),
    "bf16": Budget(metric_drop=0.1, agreement=99.8, mean_error=0.015),
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_trained_tagger_keeps_its_answers(calibrated, precision) -> None:
    losses = calibrated(precision).record["losses"]
    found = dataclasses.make_dataclass("Losses", losses)(**losses)
    assert BOUNDS[precision].violations(found) == []
    assert losses["max_error"] > 0, "something was changed"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_written_says_what_it_is(calibrated, tagger_graph, precision) -> None:
    result = calibrated(precision)
    written = Graph.load(result.path)
    onnx.checker.check_model(written.model, full_check=True)
    source = Graph.load(tagger_graph)
    assert written.info.precision is Precision(precision)
    assert written.info.calibration == json.loads(json.dumps(result.record))
    parent = written.info.chain[-1]
    assert written.info.chain[:-1] == source.info.chain, "the checkpoint first"
    assert (parent.kind, parent.name) == ("graph", "tagger.onnx")
    assert parent.sha256 == sha256_of_graph(tagger_graph)
    assert [file.name for file in written.tokenizer_files] == [
        file.name for file in tokenizer_files(tagger_graph)
    ]
    for ours, theirs in zip(written.tokenizer_files, source.tokenizer_files, strict=True):
        assert ours.read_bytes() == theirs.read_bytes()
    assert result.bytes == result.path.stat().st_size < tagger_graph.stat().st_size / 1.7


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_statistics_lie_beside_it(calibrated, tagger_graph, precision) -> None:
    result = calibrated(precision)
    assert result.table == result.path.with_name(f"tagger.{precision}.calibration.json")
    table = CalibrationTable.load(result.table)
    table.check_graph(sha256_of_graph(tagger_graph))
    record = result.record
    assert record["table_sha256"] == sha256_of_file(result.table)
    assert (table.samples, table.tokens) == (record["samples"], record["tokens"])
    assert (table.data, table.data_sha256) == (record["data"], record["data_sha256"])
    assert table.samples == 64 and table.data == "brown-pos.jsonl"
    left = {path.name for path in result.path.parent.iterdir()}
    stem = f"tagger.{precision}"
    assert left == {f"{stem}.onnx", f"{stem}.calibration.json", f"{stem}.tokenizer"}


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_every_linear_is_in_8_bits(calibrated, precision) -> None:
    result = calibrated(precision)
    model = onnx.load(result.path)
    kind = TensorProto.INT8 if precision == "int8" else TensorProto.FLOAT8E4M3FN
    stored = [t for t in model.graph.initializer if t.data_type == kind and len(t.dims) == 2]
    names = result.record["quantized"]
    assert len(names) == len(stored) == SAMPLE_LINEARS
    assert result.record["high"] == [] and result.record["sensitivities"] == []
    assert set(result.record["smoothquant"]) == set(names)
    nodes = {node.name: node for node in model.graph.node}
    for name in names:
        product = nodes[f"{name}/MatMul"]
        makers = [next(n for n in model.graph.node if x in n.output) for x in product.input]
        assert [maker.op_type for maker in makers] == ["DequantizeLinear"] * 2
    merged = [name for name in names if name.endswith("self.projections")]
    assert len(merged) == 4, "q, k, v and the convolution's value are one product"


@pytest.mark.parametrize(
    ("precision", "attention"), [("int8", False), ("fp8", False), ("fp8", True)]
)
def test_the_form_of_what_is_written_is_right(calibrated, precision, attention) -> None:
    result = calibrated(precision, **({"fp8_attention": True} if attention else {}))
    model = onnx.load(result.path)
    assert quantization_faults(model) == []
    pairs = sum(node.op_type == "QuantizeLinear" for node in model.graph.node)
    # 7 activations a layer, q and k and v and the softmax's result in attention
    assert pairs == SAMPLE_LINEARS + 16 * attention
    assert result.record["fp8_attention"] == attention


def test_smoothing_is_never_worse_than_none(calibrated) -> None:
    smoothed = calibrated("int8").record
    plain = calibrated("int8", smooth=False).record
    assert any(alpha is not None for alpha in smoothed["smoothquant"].values())
    assert all(alpha is None for alpha in plain["smoothquant"].values())
    assert smoothed["losses"]["mean_error"] <= plain["losses"]["mean_error"]


def test_rows_of_ids_need_no_tokenizer(tiny, token_rows) -> None:
    record = tiny().record
    assert (record["samples"], record["tokens"]) == (24, 2 * sum(range(5, 17)))
    assert record["data"] == "rows.npz"
    assert record["losses"]["metric_drop"] is None
    assert 0 < record["losses"]["mean_error"] < 0.05


def test_texts_need_a_tokenizer(tiny, tmp_path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "a film"}\n')
    with pytest.raises(InputError, match="the graph has no tokenizer") as caught:
        tiny(data=texts)
    assert "--tokenizer" in caught.value.hint
    assert _written(tmp_path) == {"texts.jsonl"}


def test_tokenizer_given_by_hand_is_used_and_kept(
    tagger_graph, sample_path, sample_texts, tmp_path
):
    bare = tmp_path / "bare.onnx"
    bare.write_bytes(tagger_graph.read_bytes())
    files = (sample_path / "tokenizer.json", sample_path / "tokenizer_config.json")
    options = CalibrateOptions(precision=Precision.BF16, samples=4, tokenizer=files)
    result = calibrate(bare, sample_texts, tmp_path / "out.onnx", options)
    assert {file.name for file in tokenizer_files(result.path)} == {file.name for file in files}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_calibrated_graph_is_refused(tiny, precision) -> None:
    first = tiny("first.onnx", precision=Precision(precision), smoothing=PLAIN)
    with pytest.raises(GraphError, match=f"is {precision} already, expected an fp32 graph"):
        tiny("second.onnx", graph=first.path)


def test_a_table_of_another_graph_is_refused(tiny, calibrated, tmp_path) -> None:
    with pytest.raises(GraphError, match="the calibration table is of graph"):
        tiny(table=calibrated("int8").table)
    assert _written(tmp_path) == set()


def test_a_table_read_again_gives_the_same_bytes(tiny) -> None:
    first = tiny("first.onnx")
    counted = []
    again = Progress(count=lambda what, done, of: counted.append(what))
    second = tiny("second.onnx", table=first.table, progress=again)
    assert second.path.read_bytes() == first.path.read_bytes()
    assert second.table.read_bytes() == first.table.read_bytes()
    assert counted and "collecting ranges" not in counted
    assert tiny("third.onnx").path.read_bytes() == first.path.read_bytes(), "nor by chance"


@pytest.mark.parametrize("method", ["moving-average", "percentile", "entropy", "mse"])
def test_another_method_from_the_same_table(tiny, method) -> None:
    first = tiny("first.onnx", smoothing=PLAIN)
    other = tiny("other.onnx", table=first.table, method=method, percentile=99.0, smoothing=PLAIN)
    assert other.record["method"] == CalibrationTable.load(other.table).method == method
    scales = [
        [
            numpy_helper.to_array(t)
            for t in onnx.load(path).graph.initializer
            if "input_scale" in t.name
        ]
        for path in (first.path, other.path)
    ]
    assert all(ours <= theirs for theirs, ours in zip(*scales, strict=True))
    assert scales[0] != scales[1]


def test_a_table_without_histograms_is_refused_where_they_are_needed(tiny) -> None:
    half = tiny("half.onnx", precision=Precision.FP16)
    with pytest.raises(GraphError, match="channels' ranges") as caught:
        tiny(table=half.table)
    assert "--smoothquant off" in caught.value.hint
    with pytest.raises(GraphError, match="histogram"):
        tiny(table=half.table, smoothing=PLAIN, method="entropy")
    assert tiny(table=half.table, smoothing=PLAIN).record["losses"]["mean_error"] < 0.05


class _Stopped(Exception):
    """Stands for Ctrl-C."""


def test_an_interrupted_collection_goes_on_to_the_same_bytes(tiny, rows_of, tmp_path) -> None:
    """64 lengths are as many batches; the state is saved every 50."""
    options = {"data": rows_of(np.arange(5, 69)), "smoothing": PLAIN}
    whole = tiny("whole.onnx", **options)

    def stop(what: str, done: int, of: int) -> None:
        if what == "collecting ranges" and done == 60:
            raise _Stopped

    with pytest.raises(_Stopped):
        tiny("parts.onnx", **options, progress=Progress(count=stop))
    assert (tmp_path / "parts.calibration.partial.json").is_file()
    assert not (tmp_path / "parts.onnx").exists()
    notes, counted = [], []
    progress = Progress(notes.append, lambda *step: counted.append(step))
    parts = tiny("parts.onnx", **options, progress=progress)
    assert any("going on from" in note for note in notes)
    collected = [done for what, done, _ in counted if what == "collecting ranges"]
    assert len(collected) < 64
    assert parts.path.read_bytes() == whole.path.read_bytes()
    assert parts.table.read_bytes() == whole.table.read_bytes()
    assert not (tmp_path / "parts.calibration.partial.json").exists()


def test_nothing_is_written_where_the_graph_cannot_be(tiny, tmp_path) -> None:
    (tmp_path / "out.onnx").mkdir()
    with pytest.raises(OutputError, match="out.onnx"):
        tiny(smoothing=PLAIN)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="out.onnx: .*file"):
        tiny("file/out.onnx", smoothing=PLAIN)
    assert _written(tmp_path) == {"out.onnx", "file"}


def test_the_graph_itself_is_not_overwritten(tiny, classifier_graph, tmp_path) -> None:
    graph = tmp_path / "own.onnx"
    graph.write_bytes(classifier_graph.path.read_bytes())
    before = graph.read_bytes()
    with pytest.raises(OutputError, match="own.onnx"):
        tiny("own.onnx", graph=graph)
    assert graph.read_bytes() == before


def test_a_budget_keeps_the_fewest_layers_high(tiny, monkeypatch) -> None:
    everything = tiny("all.onnx", smoothing=PLAIN)
    bound = 0.6 * everything.record["losses"]["mean_error"]
    checked = []

    def choose(plans, order, budget, measure, progress):
        choice = eight_bit_choose(plans, order, budget, measure, progress)
        high = [plan for plan in plans if plan.linears[0].name in choice.high]
        for plan in high:
            assert budget.violations(measure([*choice.quantized, plan])), "one less would do"
            checked.extend(linear.name for linear in plan.linears)
        return choice

    eight_bit_choose = eight_bit.choose
    monkeypatch.setattr(eight_bit, "choose", choose)
    result = tiny(
        "some.onnx", table=everything.table, smoothing=PLAIN, budget=Budget(mean_error=bound)
    )
    record = result.record
    assert record["losses"]["mean_error"] <= bound
    assert set(checked) == set(record["high"]) != set()
    assert record["quantized"], "some are in 8 bits"
    assert sorted(record["high"] + record["quantized"]) == sorted(everything.record["quantized"])
    errors = [found["mean_error"] for found in record["sensitivities"]]
    assert len(errors) == 10 and errors == sorted(errors, reverse=True)
    assert 0 < record["price"]["arithmetic"] < 1
    assert everything.bytes < result.bytes
    model = onnx.load(result.path)
    floats = {t.name: t.data_type for t in model.graph.initializer}
    for name in record["high"]:
        (product,) = [node for node in model.graph.node if node.name == f"{name}/MatMul"]
        assert floats[product.input[1]] == TensorProto.FLOAT


def test_a_wide_budget_costs_nothing(tiny) -> None:
    record = tiny(smoothing=PLAIN, budget=Budget(mean_error=1.0)).record
    assert record["high"] == [] and record["price"] == {"arithmetic": 0.0, "extra_bytes": 0}
    assert record["budget"] == "mean error <= 1"


def test_an_impossible_budget_writes_nothing(tiny, tmp_path) -> None:
    with pytest.raises(GraphError, match="no layer can be quantized within the budget") as caught:
        tiny(smoothing=PLAIN, budget=Budget(mean_error=0.0))
    assert "widen the budget" in caught.value.hint
    assert _written(tmp_path) == set()


def test_a_metric_budget_needs_labels_before_any_work(tiny, tmp_path) -> None:
    counted = []
    progress = Progress(count=lambda *step: counted.append(step))
    with pytest.raises(ConvBertDeployError, match="metric"):
        tiny(budget=Budget(metric_drop=0.3), progress=progress)
    assert _written(tmp_path) == set()
    assert counted == [], "it is known before minutes of work"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": Precision.FP32}, "the graph is fp32 already"),
        ({"method": "median"}, "calibration method 'median'"),
        ({"percentile": 0.0}, "percentile 0.0"),
        ({"fp8_attention": True}, "fp8 attention in an int8 graph"),
        ({"precision": Precision.FP16, "budget": Budget(mean_error=1)}, "fp16 has none"),
        ({"samples": 0}, "0 calibration samples"),
    ],
)
def test_options_that_make_no_sense_are_refused(tiny, options, message) -> None:
    with pytest.raises(InputError, match=message):
        tiny(**options)
