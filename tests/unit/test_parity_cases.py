"""The batches parity is taken on, the tolerance table, and the models the tests are made of."""

from __future__ import annotations

import numpy as np
import pytest

from convbert_deploy.architecture import Task
from convbert_deploy.errors import ConvBertDeployError
from convbert_deploy.parity import compare
from convbert_deploy.parity_cases import ParityShapes, parity_batches, random_batch
from convbert_deploy.parity_errors import measure_errors
from convbert_deploy.precision import Precision
from convbert_deploy.shapes import ShapeProfile
from convbert_deploy.tolerances import TOLERANCES, Tolerance, tolerance_for

from factories import ODD_SHAPES, FixedRunner, ModuleRunner, architecture_of, realistic_model

_TINY_ARCHITECTURE = architecture_of(realistic_model("tiny", Task.ENCODER))


def test_the_default_cases_are_the_awkward_ones():
    names = [case.name for case in parity_batches(_TINY_ARCHITECTURE, Task.ENCODER)]
    for seq in (1, 2, 8, 17, 128):
        assert {f"b1-s{seq}", f"b8-s{seq}"} <= set(names)
        assert (f"b8-s{seq}-padded" in names) == (seq > 1)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("shape", ["tiny", "one-type", "positions-26", "vocab-96000"])
def test_inputs_are_within_the_model_and_use_all_of_it(shape):
    architecture = architecture_of(realistic_model(shape, Task.ENCODER))
    batches = parity_batches(architecture, Task.ENCODER)
    ids = np.concatenate([case.batch["input_ids"].ravel() for case in batches])
    types = np.concatenate([case.batch["token_type_ids"].ravel() for case in batches])
    assert ids.min() >= 0
    assert ids.max() == architecture.vocab_size - 1
    assert set(types) == set(range(architecture.type_vocab_size))
    for case in batches:
        mask, tokens = case.batch["attention_mask"], case.batch["input_ids"]
        assert tokens.shape[1] <= architecture.max_position_embeddings
        assert {array.dtype for array in case.batch.values()} == {np.dtype(np.int64)}
        assert (np.diff(mask, axis=-1) <= 0).all(), "padding is on the right"
        assert (mask[:, 0] == 1).all()
        assert (tokens[mask == 0] == architecture.pad_token_id).all()
        if case.name.endswith("padded"):
            assert len(set(mask.sum(axis=-1))) > 1
            assert mask[0].all(), "padded to the longest, not further"


def test_cases_beyond_the_positions_are_listed_as_left_out():
    architecture = architecture_of(realistic_model("positions-26", Task.ENCODER))
    batches = parity_batches(architecture, Task.ENCODER)
    assert "b1-s26" in [case.name for case in batches]
    assert {case.name for case in batches.left_out} == {"b1-s128", "b8-s128", "b8-s128-padded"}
    assert "26 positions" in batches.left_out[0].reason
    report = compare(
        FixedRunner("a", lambda b: {"logits": np.ones((1, 2), np.float32)}),
        FixedRunner("b", lambda b: {"logits": np.ones((1, 2), np.float32)}),
        batches,
        Tolerance(),
    )
    assert report.left_out == batches.left_out


def test_a_profile_bounds_the_cases_and_adds_its_own_corners():
    profile = ShapeProfile.parse("batch=2:4:6,seq=20:30:40")
    batches = parity_batches(_TINY_ARCHITECTURE, Task.ENCODER, ParityShapes(profile=profile))
    shapes = {case.batch["input_ids"].shape for case in batches}
    assert {(2, 20), (4, 30), (2, 40), (6, 30)} <= shapes
    assert all(2 <= batch <= 6 and 20 <= seq <= 40 for batch, seq in shapes)
    assert all("outside the profile" in case.reason for case in batches.left_out)
    assert batches.left_out


def test_multiple_choice_has_a_choice_axis():
    batches = parity_batches(_TINY_ARCHITECTURE, Task.MULTIPLE_CHOICE)
    choices = {case.batch["input_ids"].shape[1] for case in batches}
    assert all(case.batch["input_ids"].ndim == 3 for case in batches)
    assert choices == {2, 3}


def test_the_same_seed_gives_the_same_batch_whichever_cases_run():
    one = parity_batches(_TINY_ARCHITECTURE, Task.ENCODER, ParityShapes(seqs=(17,)))
    many = parity_batches(_TINY_ARCHITECTURE, Task.ENCODER, ParityShapes(seqs=(2, 17)))
    by_name = {case.name: case.batch for case in many}
    for case in one:
        np.testing.assert_array_equal(case.batch["input_ids"], by_name[case.name]["input_ids"])
    other = parity_batches(_TINY_ARCHITECTURE, Task.ENCODER, ParityShapes(seqs=(17,)), seed=1)
    assert (other[0].batch["input_ids"] != one[0].batch["input_ids"]).any()


def test_too_many_tokens_are_left_out_by_name():
    shapes = ParityShapes(seqs=(2, 128), max_tokens=256)
    batches = parity_batches(_TINY_ARCHITECTURE, Task.ENCODER, shapes)
    assert [case.name for case in batches.left_out] == ["b8-s128", "b8-s128-padded"]
    assert "1024 tokens" in batches.left_out[0].reason


def test_every_backend_has_every_precision_and_fp32_on_cpu_is_2e_5():
    backends = {backend for backend, _ in TOLERANCES}
    assert backends == {
        "onnx",
        "onnxruntime-cpu",
        "onnxruntime-cuda",
        "tensorrt",
        "tensorrt-rtx",
    }
    assert set(TOLERANCES) == {(backend, one) for backend in backends for one in Precision}
    assert tolerance_for("onnxruntime-cpu", "fp32").max_abs == 2e-5


def test_an_unknown_row_is_a_users_error():
    with pytest.raises(ConvBertDeployError, match="openvino"):
        tolerance_for("openvino", Precision.FP32)


def test_each_bound_is_enforced_and_nan_breaks_it():
    errors = measure_errors("logits", np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]]))

    def broken(tolerance, scale=1.0):
        return len(list(tolerance.violations(errors, scale, errors.argmax_agreement)))

    assert broken(Tolerance()) == 0
    assert broken(Tolerance(max_abs=0.9)) == 1
    assert broken(Tolerance(max_scaled=0.9)) == 1
    assert broken(Tolerance(max_scaled=0.9), scale=2.0) == 0
    assert broken(Tolerance(mean_scaled=0.9)) == 1
    assert broken(Tolerance(min_cosine=0.5)) == 1
    assert broken(Tolerance(min_argmax_agreement=0.5)) == 1
    assert broken(Tolerance(max_scaled=0.9), scale=float("nan")) == 1
    assert Tolerance(max_abs=0.1, max_scaled=0.01).largest_abs(2.0) == pytest.approx(0.02)


@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_odd_shapes_run_and_are_read_back_from_their_tensors(shape):
    model = realistic_model(shape, Task.ENCODER)
    architecture = architecture_of(model)
    runner = ModuleRunner(model)
    for seq in (1, 5, architecture.max_position_embeddings):
        batch = random_batch(architecture, Task.ENCODER, 2, seq, padded=seq > 1)
        (output,) = runner.infer(batch).values()
        assert output.shape == (2, seq, architecture.hidden_size)
        assert np.isfinite(output).all()
