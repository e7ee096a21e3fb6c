"""Calibrated graphs as plans of TensorRT for RTX, built and read with no GPU present."""

from __future__ import annotations

import functools
import json
import re

import onnx
import pytest
from click.testing import CliRunner

from convbert_deploy import plugin_library
from convbert_deploy.backends import tensorrt_plan
from convbert_deploy.backends.tensorrt_plan import PlanFacts, PlanOptions, build_plan, listed_gemms
from convbert_deploy.build import for_our_kernels
from convbert_deploy.build_precision import graph_in_precision
from convbert_deploy.calibration.quantization_check import quantization_faults
from convbert_deploy.cli import main
from convbert_deploy.engine import Engine
from convbert_deploy.graph import Graph
from convbert_deploy.operators import nodes_of
from convbert_deploy.precision import Precision
from convbert_deploy.shapes import ShapeProfile

pytest_plugins = ["quantized_sample"]
pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
pytest.importorskip("tokenizers")

PROFILE = ShapeProfile.parse("batch=1:8:32,seq=16:128:512")
FIXED = ShapeProfile.parse("batch=1:8:32,seq=128")
LAYERS = 4
#: as TensorRT's listing names the types
TYPES = {"int8": "Int8", "fp8": "FP8", "fp16": "Half", "bf16": "BFloat16"}


@pytest.fixture(scope="module")
def library():
    try:
        return plugin_library.tensorrt_library()
    except plugin_library.PluginError as error:
        pytest.skip(f"TensorRT plugin library is not built: {error}")


@pytest.fixture(scope="module")
def plan_of(calibrated, library):
    """(facts, the builder's listing) of the calibrated tagger's plan for SM89; each built once."""

    @functools.cache
    def build(
        precision: str,
        profile: ShapeProfile = PROFILE,
        high: Precision = Precision.FP16,
        **calibration: bool,
    ) -> tuple[PlanFacts, str]:
        graph = Graph.load(calibrated(precision, **calibration).path)
        typed = graph_in_precision(graph, graph.info.precision, high, "tensorrt-rtx")
        model = for_our_kernels(typed, "tensorrt-rtx")
        options = PlanOptions(
            plugin_library=library,
            compute_capabilities=("SM89",),
            expected_plugin_layers=len(nodes_of(model)),
        )
        logs = []
        with pytest.MonkeyPatch.context() as patch:
            real = tensorrt_plan._listing
            patch.setattr(tensorrt_plan, "_listing", lambda log: (logs.append(log), real(log))[1])
            facts = build_plan(model.SerializeToString(), profile, options).facts
        return facts, logs[0]

    return build


def _layers(log: str, kind: str) -> list[str]:
    return [line for line in log.splitlines() if line.startswith("Name: ") and kind in line]


def _fused_attention(log: str) -> list[str]:
    return [line for line in _layers(log, "_mha_") if "_mha_" in line.split(",")[0]]


def _input_types(line: str) -> list[str]:
    inputs = line.partition("Inputs: [")[2].partition("], Constants:")[0]
    return re.findall(r"Datatype: (\w+)", inputs)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_every_linear_is_one_8_bit_gemm(plan_of, calibrated, precision) -> None:
    facts, log = plan_of(precision)
    names = calibrated(precision).record["quantized"]
    gemms = listed_gemms(log)
    in_8_bits = [name for name, kind in gemms if kind == TYPES[precision]]
    for name in names:
        # "_myl0_17" and the like follow
        found = [gemm for gemm in in_8_bits if gemm.startswith(f"{name}/MatMul_")]
        assert len(found) == 1, f"{name}: {found}"
    assert len(in_8_bits) == len(names) == facts.gemms[TYPES[precision]] == 28
    assert sum(facts.gemms.values()) == facts.kernels["gemm"] == len(gemms)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_queries_keys_values_and_convolution_are_one_product(plan_of, precision) -> None:
    _, log = plan_of(precision)
    merged = [name for name, _ in listed_gemms(log) if ".projections/" in name]
    assert len(merged) == LAYERS
    for part in ("query", "key", "value", "conv_out_layer"):
        assert not [name for name, _ in listed_gemms(log) if f".{part}/" in name]


@pytest.mark.parametrize("precision", TYPES)
def test_attention_is_fused_and_ours_is_ours(plan_of, precision) -> None:
    facts, _ = plan_of(precision)
    assert facts.fused_attention == LAYERS
    assert facts.plugin_layers == facts.kernels["custom_layer"] == 2 * LAYERS


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_plans_have_no_other_products(plan_of, precision) -> None:
    facts, log = plan_of(precision)
    assert set(facts.gemms) == {TYPES[precision]}
    assert all(kind == TYPES[precision] for _, kind in listed_gemms(log))


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_8_bits_make_the_plan_smaller(plan_of, precision) -> None:
    """A linear's weights take one byte a number instead of two; embeddings stay."""
    half, _ = plan_of("fp16")
    facts, _ = plan_of(precision)
    linears = LAYERS * (384 * 768 + 384 * 192 + 384 * 384 + 2 * 2 * 192 * 768)
    assert half.plan_bytes - facts.plan_bytes > 0.6 * linears, "the kernels themselves take some"
    assert facts.scratch_bytes < half.scratch_bytes


def test_smoothing_costs_no_kernel(plan_of, calibrated) -> None:
    smoothed, _ = plan_of("int8")
    plain, _ = plan_of("int8", smooth=False)
    nodes = [node.name for node in onnx.load(calibrated("int8").path).graph.node]
    assert sum(name.endswith("/Smooth") for name in nodes) >= 2 * LAYERS, "explicit ones"
    assert smoothed.kernels == plain.kernels
    assert smoothed.gemms == plain.gemms


def test_the_rest_in_bf16(plan_of) -> None:
    facts, log = plan_of("int8", high=Precision.BF16)
    assert facts.gemms["Int8"] == 28 and "Half" not in facts.gemms
    assert facts.fused_attention == LAYERS
    for line in _fused_attention(log):
        assert "BFloat16" in _input_types(line)


def test_attention_in_fp8_for_one_length(plan_of) -> None:
    facts, log = plan_of("fp8", profile=FIXED, fp8_attention=True)
    assert facts.fused_attention == LAYERS
    attention = _fused_attention(log)
    for line in attention:
        assert _input_types(line).count("FP8") == 3, "queries, keys and values"
    without, log = plan_of("fp8", profile=FIXED)
    assert without.fused_attention == LAYERS
    assert not any("FP8" in _input_types(line) for line in _fused_attention(log))
    assert facts.gemms["FP8"] == without.gemms["FP8"] == 28


@pytest.fixture
def engine(calibrated, library, tmp_path):
    """build-engine of a calibrated graph for a GPU; its result and folder."""

    def build(precision: str, *arguments: str, **calibration: bool):
        path = calibrated(precision, **calibration).path
        target = tmp_path / f"{precision}.engine"
        command = ["build-engine", path, "--backend", "tensorrt-rtx", "-o", target, *arguments]
        return CliRunner().invoke(main, [str(word) for word in command]), target

    return build


SHAPES = ("--shapes", "batch=1:8:32,seq=16:128:512")


def test_build_engine_says_what_is_in_the_plan(engine, sample_path) -> None:
    result, path = engine("int8", "--target", "SM89", *SHAPES)
    assert result.exit_code == 0, result.output
    assert "gemms: {'Half': 1, 'Int8': 28}" in result.stdout
    manifest = Engine.load(path).manifest
    assert manifest.plan["gemms"] == {"Half": 1, "Int8": 28}
    assert manifest.target["arithmetic"] == "int8, fp16"
    assert quantization_faults(onnx.load(path / "model.onnx")) == [], "half scales are exact"


def test_the_graph_of_a_plan_can_be_evaluated_here(engine, sample_path, sample_texts) -> None:
    pytest.importorskip("sklearn")
    _, path = engine("int8", "--target", "SM89", *SHAPES)
    budget = "metric drop <= 0.3, agreement >= 99%, mean error <= 0.03"
    against = ("--against", sample_path, "--graph", "--threads", 1, "--limit", 20)
    command = ["evaluate", path, "--data", sample_texts, *against, "--budget", budget, "--json"]
    result = CliRunner().invoke(main, [str(word) for word in command])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["distance"]["max_error"] > 1e-3


def test_fp8_is_for_gpus_that_have_it(engine) -> None:
    refused, path = engine("fp8", "--target", "SM86", *SHAPES)
    assert refused.exit_code == 3 and "SM86 cannot compute in fp8" in refused.stderr
    assert not path.exists()
    built, path = engine("fp8", *SHAPES)
    assert built.exit_code == 0, built.output
    assert Engine.load(path).manifest.target["compute_capabilities"] == ["SM89", "SM120"]


def test_fp8_attention_is_refused_for_many_lengths(engine) -> None:
    refused, path = engine("fp8", "--target", "SM89", *SHAPES, fp8_attention=True)
    assert refused.exit_code == 3, refused.output
    assert "fixed sequence length only" in refused.stderr and "seq=128:128:128" in refused.stderr
    assert not path.exists()
