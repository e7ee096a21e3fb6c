"""Faults in the Q/DQ nodes of the tagger's int8 engine: which check finds which, and what none does.

Three look: ``quantization_faults`` at the graph's form, ``verify`` at the answers to random ids,
``evaluate`` at those to real sentences.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from convbert_deploy.backends import eager
from convbert_deploy.calibration.budget import Budget
from convbert_deploy.calibration.quantization_check import quantization_faults
from convbert_deploy.engine import GRAPH, MANIFEST, Engine
from convbert_deploy.errors import ConvBertDeployError
from convbert_deploy.evaluation.compare import ReportOptions
from convbert_deploy.evaluation.evaluating import EvaluateOptions, evaluate
from convbert_deploy.evaluation.evaluation_report import EvaluationReport
from convbert_deploy.parity_cases import ParityShapes
from convbert_deploy.provenance import sha256_of_file
from convbert_deploy.verification import VerifyOptions, verify

pytest_plugins = ["quantized_sample"]
pytest.importorskip("tokenizers")
pytest.importorskip("sklearn")

BUDGET = Budget.parse("agreement >= 99%, mean error <= 0.03")
#: one of each kind, in the second of four layers
LAYER = "encoder.layer.1."
KINDS = (
    "attention.self.projections",
    "attention.self.pointwise",
    "attention.output.dense",
    "intermediate.dense.group0",
    "output.dense.group0",
)

Change = Callable[[onnx.ModelProto], None]


def _node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    (node,) = [node for node in model.graph.node if node.name == f"{LAYER}{name}"]
    return node


def _edit(model: onnx.ModelProto, node: onnx.NodeProto, index: int, change, *, alone=False) -> None:
    """Change an initializer that ``node`` reads; ``alone``: for this node, not for other readers."""
    name = node.input[index]
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    values = change(numpy_helper.to_array(tensor).copy())
    if alone:
        name = node.input[index] = f"{name}.alone"
        tensor = model.graph.initializer.add()
    tensor.CopyFrom(numpy_helper.from_array(values, name))


def _double(values: np.ndarray) -> np.ndarray:
    return values * np.float32(2)


def weight_scale_doubled(kind: str) -> Change:
    return lambda m: _edit(m, _node(m, f"{kind}.weight/DequantizeLinear"), 1, _double)


def column_scale_doubled(kind: str) -> Change:
    def change(values: np.ndarray) -> np.ndarray:
        values[7] *= 2
        return values

    return lambda m: _edit(m, _node(m, f"{kind}.weight/DequantizeLinear"), 1, change)


def rows_swapped(kind: str) -> Change:
    def change(values: np.ndarray) -> np.ndarray:
        values[[3, 50]] = values[[50, 3]]
        return values

    return lambda m: _edit(m, _node(m, f"{kind}.weight/DequantizeLinear"), 0, change)


def rows_rolled(kind: str) -> Change:
    roll = lambda values: np.roll(values, 1, axis=0)  # noqa: E731
    return lambda m: _edit(m, _node(m, f"{kind}.weight/DequantizeLinear"), 0, roll)


def axis_swapped(kind: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        node = _node(model, f"{kind}.weight/DequantizeLinear")
        (axis,) = [attribute for attribute in node.attribute if attribute.name == "axis"]
        axis.i = 0

    return change


def zero_point(kind: str, off: int, *, both: bool) -> Change:
    def change(model: onnx.ModelProto) -> None:
        quantize = _node(model, f"{kind}/QuantizeLinear")
        _edit(model, quantize, 2, lambda values: values + np.int8(off), alone=not both)

    return change


def activation_scale_doubled(kind: str, *, both: bool) -> Change:
    def change(model: onnx.ModelProto) -> None:
        node = _node(model, f"{kind}/DequantizeLinear")
        _edit(model, node, 1, _double, alone=not both)

    return change


@pytest.fixture(scope="module", autouse=True)
def remembered(sample):
    """One eager model answers each batch once; every fault is compared with the same answers."""
    answers: dict[str, dict[str, np.ndarray]] = {}
    model = sample.eager_model()

    class Remembering(eager.EagerRunner):
        def infer(self, batch):
            key = hashlib.sha256()
            for name in sorted(batch):
                key.update(f"{name}{batch[name].shape}".encode() + batch[name].tobytes())
            if key.hexdigest() not in answers:
                answers[key.hexdigest()] = super().infer(batch)
            return answers[key.hexdigest()]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager, "EagerRunner", Remembering)
        patch.setattr(type(sample), "eager_model", lambda self: model)
        yield


class Checks:
    """The three checks on a copy of the bundle with a fault in its graph."""

    def __init__(self, engine: Engine, sample, texts: pathlib.Path, folder: pathlib.Path) -> None:
        self._engine, self._sample, self._texts, self._folder = engine, sample, texts, folder

    def broken(self, change: Change) -> Engine:
        path = shutil.copytree(self._engine.path, self._folder / "broken.engine")
        model = onnx.load(path / GRAPH)
        before = model.SerializeToString()
        change(model)
        assert model.SerializeToString() != before
        onnx.save(model, path / GRAPH)
        manifest = json.loads((path / MANIFEST).read_text())
        manifest["files"][GRAPH] = sha256_of_file(path / GRAPH)
        (path / MANIFEST).write_text(json.dumps(manifest))
        return Engine.load(path)

    def by_form(self, engine: Engine) -> list[str]:
        return quantization_faults(onnx.load(engine.path / GRAPH))

    def by_verify(self, engine: Engine) -> bool:
        # one thread: torch's wait for each other where other processes run
        options = VerifyOptions(shapes=ParityShapes(seqs=(2, 17), max_tokens=256), threads=1)
        try:
            return not verify(engine, self._sample, options).passed
        except ConvBertDeployError:
            return True

    def evaluation(self, engine: Engine) -> EvaluationReport:
        options = EvaluateOptions(
            budget=BUDGET, limit=30, threads=1, report=ReportOptions(resamples=0)
        )
        return evaluate(engine, self._texts, self._sample, options)


@pytest.fixture
def checks(int8_engine, sample, sample_texts, tmp_path) -> Checks:
    return Checks(int8_engine, sample, sample_texts, tmp_path)


@pytest.fixture(scope="module")
def sound_error(int8_engine, sample, sample_texts, remembered) -> float:
    """Mean error of the engine without a fault."""
    report = Checks(int8_engine, sample, sample_texts, pathlib.Path()).evaluation(int8_engine)
    assert report.mean_error is not None
    return report.mean_error


def test_the_engine_passes_all_three(checks, int8_engine) -> None:
    assert checks.by_form(int8_engine) == []
    assert not checks.by_verify(int8_engine)
    assert checks.evaluation(int8_engine).passed


@pytest.mark.parametrize("kind", KINDS)
def test_a_weights_scale_doubled(checks, kind) -> None:
    engine = checks.broken(weight_scale_doubled(kind))
    assert checks.by_verify(engine)
    assert not checks.evaluation(engine).passed


@pytest.mark.parametrize("kind", KINDS)
def test_an_activations_scale_doubled_in_dequantize(checks, kind) -> None:
    engine = checks.broken(activation_scale_doubled(kind, both=False))
    assert any("scale" in fault and kind in fault for fault in checks.by_form(engine))
    assert checks.by_verify(engine)
    assert not checks.evaluation(engine).passed


def test_an_axis_swapped(checks) -> None:
    """ONNX Runtime's integer product takes a square weight's scales by column whatever the axis
    says, so its answers stay; another runtime's would not."""
    engine = checks.broken(axis_swapped("attention.output.dense"))
    assert any("axis 0" in fault for fault in checks.by_form(engine))
    assert checks.evaluation(engine).passed
    assert checks.by_verify(engine), "verify looks at the form too"


@pytest.mark.parametrize("both", [False, True], ids=["Q", "both"])
@pytest.mark.parametrize("off", [1, 3, 10])
@pytest.mark.parametrize("kind", ["attention.self.projections", "output.dense.group0"])
def test_a_zero_point_off(checks, kind, off, both) -> None:
    engine = checks.broken(zero_point(kind, off, both=both))
    assert any("zero point" in fault and kind in fault for fault in checks.by_form(engine))


def test_a_zero_point_one_off_fails_verify(checks) -> None:
    """By its form: the answers stay."""
    engine = checks.broken(zero_point("attention.output.dense", 1, both=True))
    assert checks.by_verify(engine)
    assert checks.evaluation(engine).passed


def test_a_zero_point_far_off_breaks_the_budget(checks) -> None:
    engine = checks.broken(zero_point("output.dense.group0", 10, both=False))
    assert not checks.evaluation(engine).passed


@pytest.mark.parametrize("kind", ["attention.self.pointwise", "intermediate.dense.group0"])
def test_rows_of_a_weight_rolled(checks, kind) -> None:
    engine = checks.broken(rows_rolled(kind))
    assert checks.by_verify(engine)
    assert not checks.evaluation(engine).passed


WITHIN = {
    "an activation's scale doubled in both": activation_scale_doubled(KINDS[4], both=True),
    "one column's scale doubled": column_scale_doubled(KINDS[4]),
    "two rows swapped": rows_swapped(KINDS[2]),
}


@pytest.mark.parametrize("fault", WITHIN)
def test_what_no_check_finds_stays_within_the_budget(checks, sound_error, fault) -> None:
    """Wrong and possible: the form is right, and the loss is less than int8's own may be."""
    engine = checks.broken(WITHIN[fault])
    assert checks.by_form(engine) == []
    report = checks.evaluation(engine)
    assert report.passed
    assert sound_error < report.mean_error < 3 * sound_error
