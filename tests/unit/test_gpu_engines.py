"""The GPU benchmark's own code, as far as it goes without a GPU."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
import torch

from convbert_deploy.architecture import Task

import factories

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def benchmarks():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import gpu_engines
        import gpu_torch_engine
    return gpu_engines, gpu_torch_engine


def test_module_with_our_kernels_answers_like_transformers(benchmarks) -> None:
    """Emulated kernels in fp32, pads included; then a sabotaged kernel shows."""
    _, engine = benchmarks
    task = Task.SEQUENCE_CLASSIFICATION
    eager = factories.realistic_model("tiny", task, layers=2)
    module = engine.with_kernels(eager, task)
    ids = torch.from_numpy(np.random.default_rng(0).integers(1, 400, (3, 21)))
    mask = (torch.arange(21) < torch.tensor([[21], [13], [2]])).long()
    types = torch.zeros_like(ids)
    with torch.inference_mode():
        expected = eager(ids, mask, types).logits
        (found,) = module(ids, mask, types)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        attention = module.model.convbert.encoder.layer[0].attention.self
        attention.taps_by_channel.data = attention.taps_by_channel.flip(0)
        (wrong,) = module(ids, mask, types)
    assert (wrong - expected).abs().max() > 1e-3


def test_dry_run_measures_every_point_and_names_what_is_missing(benchmarks) -> None:
    bench, _ = benchmarks
    text = bench.run(bench.DRY)
    rows = [line for line in text.splitlines() if line.startswith(("| 1x", "| 2x"))]
    assert len(rows) == len(bench.DRY.points) * 2
    assert "not measured: ours: tensorrt: " in text
    assert "date: 20" in text and "TFLOP/s" in text


def test_a_wrong_candidate_stops_the_benchmark(benchmarks) -> None:
    bench, _ = benchmarks
    eager = factories.realistic_model("tiny", Task.SEQUENCE_CLASSIFICATION, layers=2)
    right = bench.torch_infer(eager, "cpu")
    bench.check({"right": right}, eager, 400)
    with pytest.raises(SystemExit, match="shifted is off by 0.1"):
        bench.check({"shifted": lambda batch: right(batch) + 0.1}, eager, 400)


def test_rows_compare_the_best_of_ours_with_the_best_peer(benchmarks) -> None:
    bench, _ = benchmarks
    spent = {"torch eager": 8.0, "peer": 3.0, bench.OURS + "a": 4.0, bench.OURS + "b": 2.0}
    rows = bench.row((8, 32), spent, 1.0)
    assert [line[0] for line in rows] == ["8x32"] * 4
    assert rows[3][2:] == ["2.000", "4.00", "50 %", "1.50"]
    assert [line[-1] for line in rows[:3]] == ["", "", ""]
