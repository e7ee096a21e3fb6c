"""Statistics collected from a running graph: right and bounded."""

from __future__ import annotations

import tracemalloc

import numpy as np
import onnx
import pytest

from convbert_deploy.backends.onnxruntime import OnnxRuntimeRunner
from convbert_deploy.calibration.collect import CollectOptions, collect, sample_rows
from convbert_deploy.calibration.observers import Observer
from convbert_deploy.calibration.samples import CalibrationSamples
from convbert_deploy.calibration.table import CalibrationTable
from convbert_deploy.calibration.workspace import Workspace
from convbert_deploy.errors import GraphError, InputError

from collected import (
    GRAPH,
    HIDDEN,
    INFINITY_ID,
    NAN_ID,
    SMALL,
    TENSORS,
    embeddings,
    hidden_rows,
    make_graph,
    make_samples,
    row_of,
)


@pytest.fixture
def workspace():
    with Workspace.open(make_graph()) as opened:
        yield opened


def test_statistics_are_those_of_all_tokens(workspace):
    samples = make_samples()
    hidden = hidden_rows(samples)

    table = collect(workspace, TENSORS, samples, GRAPH, SMALL)

    for name, values in (("hidden", hidden), ("relu", np.maximum(hidden, 0))):
        expected = Observer()
        expected.update(values)
        expected = expected.summary()
        found = table.tensors[name]
        assert (found.count, found.zeros) == (expected.count, expected.zeros)
        assert (found.minimum, found.maximum) == (expected.minimum, expected.maximum)
        assert np.array_equal(found.histogram, expected.histogram)
        assert np.array_equal(found.channel_amax, expected.channel_amax)
    assert list(table.tensors) == list(TENSORS)
    assert table.tensors["pooled"].count == len(samples.rows) * HIDDEN
    assert (table.samples, table.tokens) == (len(samples.rows), len(hidden))
    assert (table.graph_sha256, table.data_sha256) == (GRAPH, samples.sha256)
    assert {"numpy", "onnx", "onnxruntime", "convbert_deploy"} == set(table.versions)


def test_moving_average_is_over_the_batches_in_their_order(workspace, monkeypatch):
    shapes = []
    infer = OnnxRuntimeRunner.infer

    def spied(self, batch):
        shapes.append(np.abs(embeddings()[batch["input_ids"]]).max())
        return infer(self, batch)

    monkeypatch.setattr(OnnxRuntimeRunner, "infer", spied)
    table = collect(workspace, ["hidden"], make_samples(), GRAPH, SMALL)

    first, *rest = shapes[2:]  # two probes measure the memory
    for amax in rest:
        first = 0.9 * first + 0.1 * amax
    assert table.tensors["hidden"].moving_average == pytest.approx(first, rel=1e-6)


def test_attention_shaped_tensors_have_no_channels(workspace):
    table = collect(workspace, ["scores"], make_samples(), GRAPH, SMALL)

    assert table.tensors["scores"].channel_amax is None
    assert table.tensors["scores"].amax("entropy") > 0


def test_ranges_without_histograms(workspace):
    samples = make_samples()
    options = CollectOptions(max_bytes=8 << 10, histograms=False)

    table = collect(workspace, ["hidden"], samples, GRAPH, options)

    assert table.tensors["hidden"].histogram is None
    assert table.amax("hidden", "minmax") == np.abs(hidden_rows(samples)).max()


def test_pads_of_short_choices_take_no_part():
    pad = int(np.abs(np.nan_to_num(embeddings())).max(axis=1).argmax())
    ids = [[[1, 2, 3, 4], [5, 6, pad, pad]], [[7, 8, 9, 10], [11, pad, pad, pad]]]
    mask = [[[1, 1, 1, 1], [1, 1, 0, 0]], [[1, 1, 1, 1], [1, 0, 0, 0]]]
    rows = tuple(row_of(n, *pair) for n, pair in enumerate(zip(ids, mask, strict=True), 1))
    samples = CalibrationSamples("choices.jsonl", "line", rows)
    real = embeddings()[np.array(ids)[np.array(mask) == 1]]

    with Workspace.open(make_graph(rank=3)) as workspace:
        table = collect(workspace, ["hidden", "pooled"], samples, GRAPH)
        drawn = sample_rows(workspace, ["hidden"], samples)

    assert table.tensors["hidden"].count == real.size
    assert table.amax("hidden") == np.abs(real).max()
    assert table.tensors["pooled"].count == 4 * HIDDEN
    assert np.array_equal(drawn["hidden"], real)
    assert table.tokens == 11


@pytest.mark.parametrize(("poison", "kind"), [(NAN_ID, "NaN"), (INFINITY_ID, "infinity")])
def test_not_finite_values_name_tensor_and_line(workspace, poison, kind):
    samples = make_samples()
    rows = list(samples.rows)
    ids = rows[17].inputs["input_ids"].copy()
    ids[-1] = poison
    rows[17] = row_of(18, ids)
    samples = CalibrationSamples("texts.jsonl", "line", tuple(rows))

    for run in (collect, sample_rows):
        arguments = {"graph_sha256": GRAPH} if run is collect else {}
        with pytest.raises(GraphError, match=f"tensor hidden holds {kind} for line 18 of texts"):
            run(workspace, ["hidden"], samples, options=SMALL, **arguments)


def test_not_finite_value_of_one_choice_names_its_request():
    rows = [row_of(n, [[1, 2], [3, 4]]) for n in (1, 2, 3)]
    rows.append(row_of(4, [[1, 2], [3, NAN_ID]]))
    samples = CalibrationSamples("choices.jsonl", "line", tuple(rows))

    with (
        Workspace.open(make_graph(rank=3)) as workspace,
        pytest.raises(GraphError, match="line 4 of choices"),
    ):
        collect(workspace, ["hidden"], samples, GRAPH)


def test_tensors_that_cannot_be_observed(workspace):
    samples = make_samples(3)

    with pytest.raises(GraphError, match="no tensor layer.0, layer.1"):
        collect(workspace, ["hidden", "layer.0", "layer.1"], samples, GRAPH)
    with pytest.raises(GraphError, match="no tensor to observe"):
        collect(workspace, [], samples, GRAPH)
    with (
        Workspace.open(make_graph(rank=3)) as other,
        pytest.raises(GraphError, match="flat_ids is int64 of shape"),
    ):
        collect(
            other, ["flat_ids"], CalibrationSamples("c", "line", (row_of(1, [[1], [2]]),)), GRAPH
        )
    with pytest.raises(InputError, match="max_bytes is 0"):
        CollectOptions(max_bytes=0)


def peak_of(call, argument) -> int:
    tracemalloc.start()
    call(argument)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_data(workspace):
    options = CollectOptions(max_bytes=64 << 10, threads=1)
    few, many = (make_samples(count, longest=40) for count in (1000, 6000))
    more = 2 * (hidden_rows(many).nbytes - hidden_rows(few).nbytes)
    assert more > 16 << 20

    def collected(samples):
        collect(workspace, ["hidden", "relu"], samples, GRAPH, options)

    def sampled(samples):
        sample_rows(workspace, ["hidden", "relu"], samples, 64, options=options)

    for run in (collected, sampled):
        run(few)  # what is imported at the first use counts for neither
        # the order of the rows is all that grows
        assert peak_of(run, many) - peak_of(run, few) < 1 << 20


@pytest.mark.parametrize("tensors", [["hidden", "relu"], ["pooled"], ["scores"], TENSORS])
def test_batches_keep_to_the_bytes(workspace, monkeypatch, tensors):
    sizes, rows = [], []
    infer = OnnxRuntimeRunner.infer

    def spied(self, batch):
        outputs = infer(self, batch)
        assert set(outputs) == set(tensors), "other outputs only take memory"
        sizes.append(sum(array.nbytes for array in outputs.values()))
        rows.append(len(batch["input_ids"]))
        return outputs

    monkeypatch.setattr(OnnxRuntimeRunner, "infer", spied)
    collect(workspace, tensors, make_samples(200), GRAPH, SMALL)

    assert max(sizes) <= SMALL.max_bytes
    assert max(rows) > 1


def test_row_beyond_the_bytes_runs_alone(workspace):
    samples = make_samples()

    table = collect(workspace, ["hidden"], samples, GRAPH, CollectOptions(max_bytes=1))

    assert table.tensors["hidden"].count == hidden_rows(samples).size


def test_sampled_rows_are_rows_of_the_data_and_reproducible(workspace):
    samples = make_samples(200)
    everything = {row.tobytes() for row in hidden_rows(samples)}

    def draw(seed, names=("hidden", "pooled", "relu")):
        return sample_rows(workspace, names, samples, 50, seed, SMALL)

    first, again, other = draw(0), draw(0), draw(1)

    assert first["hidden"].shape == first["pooled"].shape == (50, HIDDEN)
    assert first["hidden"].dtype == np.float32
    assert all(row.tobytes() in everything for row in first["hidden"])
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["hidden"], other["hidden"])
    assert np.array_equal(first["relu"], np.maximum(first["hidden"], 0)), "the same tokens"


def test_sample_is_everything_where_there_is_less(workspace):
    samples = make_samples(10)

    rows = sample_rows(workspace, ["hidden"], samples, 10_000, options=SMALL)["hidden"]

    expected = hidden_rows(samples)
    assert sorted(map(bytes, rows)) == sorted(map(bytes, expected))


def test_every_token_is_equally_likely_to_be_sampled(workspace):
    # ids 0..89 once each, in rows of different lengths, most of them a batch of their own
    parts = np.split(np.arange(90), [1, 3, 6, 10, 15, 21, 28, 36, 45, 55, 66, 78])
    samples = CalibrationSamples("t", "line", tuple(row_of(n, p) for n, p in enumerate(parts)))
    places = {row.tobytes(): index for index, row in enumerate(embeddings()[:90])}
    hits = np.zeros(90)
    for seed in range(150):
        drawn = sample_rows(workspace, ["hidden"], samples, 10, seed, SMALL)["hidden"]
        hits[[places[row.tobytes()] for row in drawn]] += 1

    assert hits.sum() == 150 * 10
    # hypergeometric: of each third 500 are expected, deviation 17
    assert np.abs(hits.reshape(3, 30).sum(axis=1) - 500).max() < 5 * 17


def test_sampling_refuses_what_it_cannot(workspace):
    samples = make_samples(20)

    with pytest.raises(GraphError, match="tensor scores has .* channels in one batch"):
        sample_rows(workspace, ["scores"], samples, options=SMALL)
    with pytest.raises(InputError, match="0 rows a tensor"):
        sample_rows(workspace, ["hidden"], samples, 0)


def test_exported_graph(classifier_graph, tmp_path):
    """The inputs of all linear layers, against runs of one row at a time."""
    model = onnx.ModelProto()
    model.CopyFrom(classifier_graph.model)
    weights = {tensor.name for tensor in model.graph.initializer}
    names = list(
        dict.fromkeys(
            node.input[0]
            for node in model.graph.node
            if node.op_type in ("MatMul", "Gemm") and node.input[1] in weights
        )
    )
    random = np.random.default_rng(2)
    rows = [row_of(n, random.integers(5, 500, n % 7 + 2)) for n in range(1, 21)]
    samples = CalibrationSamples("texts.jsonl", "line", tuple(rows))

    with Workspace.open(model) as workspace:
        table = collect(workspace, names, samples, GRAPH, CollectOptions(max_bytes=100_000))
        copy = workspace.model()
        with workspace.runner(copy, outputs=names) as runner:
            single = [runner.infer(samples.batch([index])) for index in range(len(rows))]

    assert len(names) > 8
    for name in names:
        values = np.concatenate([out[name].reshape(-1, out[name].shape[-1]) for out in single])
        found = table.tensors[name]
        assert found.count == values.size
        assert found.amax() == pytest.approx(np.abs(values).max(), rel=1e-4)
        np.testing.assert_allclose(found.channel_amax, np.abs(values).max(axis=0), rtol=1e-3)
        assert 0 < found.amax("entropy") <= found.amax()
    table.save(tmp_path / "table.json")
    assert CalibrationTable.load(tmp_path / "table.json") == table
