"""Plans with a profile for each range of lengths, built with no GPU present."""

from __future__ import annotations

import pytest

from convbert_deploy.architecture import Task
from convbert_deploy.backends.buckets import length_profiles
from convbert_deploy.backends.tensorrt_plan import PlanOptions, build_plan
from convbert_deploy.errors import ShapeError
from convbert_deploy.precision import Precision
from convbert_deploy.shapes import ShapeProfile

import factories

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

OPTIONS = PlanOptions(compute_capabilities=("SM89",))


@pytest.fixture(scope="module")
def graph() -> bytes:
    from convbert_deploy.calibration.typed import typed_graph
    from convbert_deploy.exporting import traced_graph
    from convbert_deploy.passes.tensorrt import tensorrt_passes

    task = Task.SEQUENCE_CLASSIFICATION
    traced = traced_graph(factories.realistic_model("tiny", task, layers=2), task, "masked")
    typed, _ = tensorrt_passes(typed_graph(traced, Precision.FP16))
    return typed.SerializeToString()


def test_facts_are_of_one_profile_however_many_there_are(graph) -> None:
    whole = ShapeProfile.parse("batch=1:2:4,seq=8:32:64")
    parts = length_profiles(whole, (16, 32))
    assert len(parts) == 3
    one, several = (build_plan(graph, each, OPTIONS).facts for each in (whole, parts))
    assert (one.profiles, several.profiles) == (1, 3)
    assert several.fused_attention == one.fused_attention == 2
    assert several.kernel_count == one.kernel_count
    assert sum(several.gemms.values()) == several.kernels["gemm"]
    assert several.scratch_bytes == one.scratch_bytes, "of the largest shape"


def test_a_plan_without_profile_is_refused(graph) -> None:
    with pytest.raises(ShapeError, match="expected at least one"):
        build_plan(graph, (), OPTIONS)
