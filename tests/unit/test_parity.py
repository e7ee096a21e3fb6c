"""The comparison finds what it must find, and says what it did not look at."""

from __future__ import annotations

import json

import numpy as np
import pytest

from convbert_deploy.architecture import Task
from convbert_deploy.parity import CompareOptions, compare
from convbert_deploy.parity_cases import NamedBatch, ParityShapes, parity_batches, random_batch
from convbert_deploy.parity_errors import measure_errors
from convbert_deploy.precision import Precision
from convbert_deploy.tolerances import Tolerance, tolerance_for

from factories import (
    ONNX_SABOTAGES,
    SABOTAGES,
    FixedRunner,
    ModuleRunner,
    architecture_of,
    default_model,
    realistic_model,
    sabotage,
    sabotage_onnx,
)

_FP32 = tolerance_for("onnx", Precision.FP32)
_TENTH = Tolerance(max_abs=0.1)
_TINY_ARCHITECTURE = architecture_of(realistic_model("tiny", Task.ENCODER))


def _batches(model, task, **shapes):
    chosen = {"seqs": (1, 2, 17), "batches": (1, 4)} | shapes
    return parity_batches(architecture_of(model), task, ParityShapes(**chosen))


def _logits_runner(name, logits):
    return FixedRunner(name, lambda batch: {"logits": np.asarray(logits, np.float32)})


def _compare_logits(expected, got, tolerance=_TENTH, batch=None, options=None):
    batch = batch or random_batch(
        _TINY_ARCHITECTURE, Task.SEQUENCE_CLASSIFICATION, len(expected), 7
    )
    return compare(
        _logits_runner("truth", expected),
        _logits_runner("candidate", got),
        [NamedBatch("only", batch)],
        tolerance,
        options=options,
    )


def _replay(model, batches):
    """A runner that gives the model's answers of now, computed once."""
    eager = ModuleRunner(model)
    answers = {id(case.batch): eager.infer(case.batch) for case in batches}
    return FixedRunner("eager", lambda batch: answers[id(batch)])


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Small models gain nothing from threads, and lose much where the cores are shared."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def small():
    return realistic_model("small", Task.SEQUENCE_CLASSIFICATION)


@pytest.fixture(scope="module")
def truth(small):
    """(batches, runner that replays the small model's fp32 answers)."""
    batches = _batches(small, Task.SEQUENCE_CLASSIFICATION)
    return batches, _replay(small, batches)


@pytest.mark.parametrize("kind", SABOTAGES)
def test_every_fault_in_the_convolution_fails_at_every_precision(small, truth, kind):
    batches, reference = truth
    with sabotage(small, kind):
        candidate = _replay(small, batches)
    for precision in Precision:
        report = compare(reference, candidate, batches, tolerance_for("tensorrt", precision))
        assert not report.passed, f"{kind} passes as {precision}"


@pytest.mark.parametrize("kind", SABOTAGES)
def test_the_model_is_whole_again_after_a_sabotage(small, truth, kind):
    batches, reference = truth
    with sabotage(small, kind):
        pass
    assert compare(reference, ModuleRunner(small), batches, Tolerance(max_abs=1e-6)).passed


@pytest.mark.parametrize("kind", [kind for kind in SABOTAGES if kind != "shift-by-one"])
def test_default_weights_would_hide_the_fault(kind):
    """Why every test uses realistic weights: with transformers' own initialisation the kernel
    softmax is almost uniform, and a wrong kernel stays within a half-precision tolerance. (A
    shift moves the values, whatever the kernel: visible with any weights.)"""
    model = default_model("small", Task.SEQUENCE_CLASSIFICATION)
    batches = _batches(model, Task.SEQUENCE_CLASSIFICATION)
    reference = _replay(model, batches)
    with sabotage(model, kind):
        report = compare(
            reference, ModuleRunner(model), batches, tolerance_for("tensorrt", Precision.FP16)
        )
    assert report.passed
    assert report.outputs["logits"].max_abs < 1e-4


def test_half_precision_control_is_within_its_tolerance_and_outside_fp32s(small, truth):
    batches, reference = truth
    for precision, dtype in ((Precision.FP16, "float16"), (Precision.BF16, "bfloat16")):
        control = ModuleRunner(small, dtype, dtype)
        assert compare(reference, control, batches, tolerance_for("onnx", precision)).reasons == ()
        assert not compare(reference, control, batches, _FP32).passed


@pytest.mark.parametrize("task", Task)
def test_every_task_is_compared_and_a_fault_in_it_found(task):
    model = realistic_model("groups-2", task)
    batches = _batches(model, task)
    reference, again = _replay(model, batches), ModuleRunner(model)
    assert compare(reference, again, batches, _FP32).passed
    with sabotage(model, "reversed-taps"):
        report = compare(reference, again, batches, _FP32)
    assert set(report.outputs) == set(task.output_names)
    assert all(summary.max_abs > 1e-2 for summary in report.outputs.values())


@pytest.mark.parametrize("kind", ONNX_SABOTAGES)
def test_onnx_faults_do_what_the_eager_ones_do(kind):
    """On one operator: the sabotaged node equals the reference fed with the faulty input."""
    import onnx
    import onnx.parser
    import onnx.reference
    import torch

    from convbert_deploy.reference import span_dynamic_conv

    heads, taps, dim, seq = 3, 5, 4, 6
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17, "convbert" : 1]>
        agraph (float[b, s, {heads * dim}] value, float[b, s, {heads * taps}] logits)
            => (float[b, s, {heads * dim}] out)
        {{ out = convbert.SpanDynamicConv <num_heads = {heads}, kernel_size = {taps}>
                 (value, logits) }}"""
    )
    faulty = sabotage_onnx(model, kind)
    fault = onnx.ModelProto()
    fault.CopyFrom(faulty)
    node = fault.graph.node[-1]
    changed = node.input[0] if kind == "shift-by-one" else node.input[1]
    del fault.graph.node[-1]
    del fault.graph.output[:]
    fault.graph.output.append(onnx.helper.make_tensor_value_info(changed, 1, ["b", "s", None]))
    rng = np.random.default_rng(0)
    value = rng.standard_normal((2, seq, heads * dim)).astype(np.float32)
    logits = rng.standard_normal((2, seq, heads * taps)).astype(np.float32)
    (got,) = onnx.reference.ReferenceEvaluator(fault).run(None, {"value": value, "logits": logits})
    grouped = logits.reshape(2, seq, heads, taps)
    expected = {
        "uniform-kernel": np.zeros_like(logits),
        "reversed-taps": grouped[..., ::-1].reshape(logits.shape),
        "rolled-heads": np.roll(grouped, 1, axis=2).reshape(logits.shape),
        "shift-by-one": np.concatenate([value[:, 1:], 0 * value[:, :1]], axis=1),
    }[kind]
    np.testing.assert_array_equal(got, expected)
    conv = {"num_heads": heads, "kernel_size": taps}
    right = span_dynamic_conv(torch.from_numpy(value), torch.from_numpy(logits), **conv)
    inputs = (got, logits) if kind == "shift-by-one" else (value, got)
    wrong = span_dynamic_conv(*map(torch.from_numpy, map(np.ascontiguousarray, inputs)), **conv)
    assert (wrong - right).abs().max() > 0.1
    assert model.graph.node[0].input[1] == "logits", "the original must stay as it was"


def test_a_sabotage_that_changes_nothing_is_refused():
    model = realistic_model("one-head", Task.ENCODER)
    with pytest.raises(ValueError, match="changes nothing"), sabotage(model, "rolled-heads"):
        pass


def test_errors_of_known_arrays():
    errors = measure_errors(
        "logits", np.array([[3.0, 4.0], [0.0, 1e-9]]), np.array([[3.0, 4.5], [0.5, 1e-9]])
    )
    assert errors.max_abs == pytest.approx(0.5)
    assert errors.mean_abs == pytest.approx(0.25)
    # rms of the reference is 2.5: the zero element is measured against that, not against 0
    assert errors.max_rel == pytest.approx(0.2)
    # the second row has no length: no direction to compare
    assert errors.min_cosine == pytest.approx((9 + 18) / (5 * np.hypot(3, 4.5)))
    assert (errors.argmax_matches, errors.argmax_rows) == (1, 2)
    assert errors.argmax_agreement == 0.5


def test_a_hidden_state_and_a_single_logit_have_no_argmax():
    assert measure_errors("last_hidden_state", np.ones((2, 3)), np.ones((2, 3))).argmax_rows == 0
    assert measure_errors("logits", np.ones((2, 1)), np.ones((2, 1))).argmax_agreement is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_fails_and_is_counted(bad):
    report = _compare_logits([[1.0, 2.0]], [[1.0, bad]], Tolerance())
    assert not report.passed
    errors = report.outputs["logits"].errors
    assert errors.nan_count + errors.inf_count == 1
    assert errors.max_abs == 0.0, "the finite element is right"
    json.dumps(report.to_json(), allow_nan=False)


def test_wrong_shape_missing_and_unexpected_outputs_are_reasons():
    assert "shape [1, 3]" in _compare_logits([[1.0, 2.0]], [[1.0, 2.0, 3.0]]).reasons[0]
    batch = random_batch(_TINY_ARCHITECTURE, Task.ENCODER, 1, 4)
    report = compare(
        _logits_runner("truth", [[1.0, 2.0]]),
        FixedRunner("candidate", lambda batch: {"logit": np.zeros((1, 2), np.float32)}),
        [NamedBatch("only", batch)],
        Tolerance(),
    )
    assert len(report.reasons) == 2
    assert "missing" in report.reasons[0]
    assert "unexpected" in report.reasons[1]


def test_padded_positions_count_unless_only_real_tokens_are_asked_for():
    batch = random_batch(_TINY_ARCHITECTURE, Task.TOKEN_CLASSIFICATION, 2, 6, padded=True)
    expected = np.random.default_rng(0).standard_normal((2, 6, 3)).astype(np.float32)
    got = expected.copy()
    got[batch["attention_mask"] == 0] += 5
    assert (batch["attention_mask"] == 0).any()
    everywhere = _compare_logits(expected, got, batch=batch)
    assert not everywhere.passed
    assert everywhere.outputs["logits"].errors.max_abs == pytest.approx(5, rel=1e-5)
    assert everywhere.outputs["logits"].real_tokens.max_abs == 0
    only_real = CompareOptions(real_tokens_only=True)
    real = _compare_logits(expected, got, batch=batch, options=only_real)
    assert real.passed
    got[0, 0] += 1
    again = _compare_logits(expected, got, batch=batch, options=only_real)
    assert not again.passed


def test_spans_are_compared_without_the_pads_of_their_row():
    batch = random_batch(_TINY_ARCHITECTURE, Task.QUESTION_ANSWERING, 1, 4)
    batch["attention_mask"][0, 2:] = 0
    report = compare(
        FixedRunner("truth", lambda _: {"start_logits": np.array([[1, 2, 0, 0]], np.float32)}),
        FixedRunner("other", lambda _: {"start_logits": np.array([[1, 2, 9, 0]], np.float32)}),
        [NamedBatch("only", batch)],
        Tolerance(min_argmax_agreement=1.0),
    )
    summary = report.outputs["start_logits"]
    assert summary.errors.argmax_agreement == 0
    assert summary.real_tokens.argmax_agreement == 1
    assert report.passed, "which pad scores highest is not judged"


def test_labels_as_many_as_tokens_are_not_taken_for_tokens():
    batch = random_batch(_TINY_ARCHITECTURE, Task.SEQUENCE_CLASSIFICATION, 1, 3)
    batch["attention_mask"][0, 2:] = 0
    report = _compare_logits(
        [[1.0, 2.0, 3.0]],
        [[1.0, 2.0, 9.0]],
        batch=batch,
        options=CompareOptions(real_tokens_only=True),
    )
    assert not report.passed


def test_the_scale_is_pooled_so_one_flat_case_cannot_inflate_the_error():
    batch = random_batch(_TINY_ARCHITECTURE, Task.SEQUENCE_CLASSIFICATION, 1, 2)
    other = random_batch(_TINY_ARCHITECTURE, Task.SEQUENCE_CLASSIFICATION, 1, 3)
    logits = {2: [[1.0, 1.0001]], 3: [[-3.0, 3.0]]}

    def answer(batch):
        return {"logits": np.asarray(logits[batch["input_ids"].shape[1]], np.float32)}

    def off(batch):
        return {"logits": answer(batch)["logits"] + np.float32(0.01)}

    cases = [NamedBatch("flat", batch), NamedBatch("wide", other)]
    report = compare(
        FixedRunner("a", answer), FixedRunner("b", off), cases, Tolerance(max_scaled=0.01)
    )
    assert report.passed
    assert report.outputs["logits"].scale == pytest.approx(np.std([1, 1.0001, -3, 3]))


def test_bad_intermediates_fail_although_the_outputs_agree():
    report = _compare_logits(
        [[1.0, 2.0]],
        [[1.0, 2.0]],
        options=CompareOptions(intermediates=lambda batch: [("fine", 0, 0), ("scores", 3, 1)]),
    )
    assert not report.passed
    assert report.intermediates_checked == ("only",)
    assert [one.tensor for one in report.bad_intermediates] == ["scores"]


def test_large_batches_are_not_asked_for_their_intermediates():
    report = _compare_logits(
        [[1.0, 2.0]],
        [[1.0, 2.0]],
        options=CompareOptions(
            intermediates=lambda batch: [("x", 1, 0)], intermediates_max_tokens=6
        ),
    )
    assert report.passed
    assert report.intermediates_checked == ()


def test_nothing_to_compare_is_not_a_pass():
    with pytest.raises(ValueError, match="no batches"):
        compare(_logits_runner("a", [[1]]), _logits_runner("b", [[1]]), [], Tolerance())
