"""The rules of graph, backend and GPU that decide an engine's precision."""

from __future__ import annotations

import dataclasses

import onnx
import pytest
from onnx import TensorProto

from convbert_deploy.build_precision import (
    CPU,
    DEFAULT_CAPABILITIES,
    check_attention,
    check_gemms,
    check_static_activations,
    engine_capabilities,
    engine_precision,
    graph_in_precision,
)
from convbert_deploy.calibration.calibrating import CalibrateOptions, calibrate
from convbert_deploy.calibration.smoothing import SmoothingOptions
from convbert_deploy.errors import EngineError, GraphError
from convbert_deploy.graph import Graph
from convbert_deploy.precision import Precision
from convbert_deploy.shapes import ShapeProfile

pytest_plugins = ["quantized_sample"]

GPU = "tensorrt-rtx"
BACKENDS = [CPU, "onnxruntime-cuda", "tensorrt", GPU]
FP32, FP16, BF16 = Precision.FP32, Precision.FP16, Precision.BF16
INT8, FP8 = Precision.INT8, Precision.FP8


@pytest.fixture
def graph_of(classifier_graph):
    """The exported graph, said to be of another precision; nothing below looks at its nodes."""

    def make(precision: Precision, **calibration) -> Graph:
        record = calibration or None
        info = dataclasses.replace(classifier_graph.info, precision=precision, calibration=record)
        return dataclasses.replace(classifier_graph, info=info)

    return make


@pytest.fixture(scope="module")
def int8_graph(classifier_graph, token_rows, tmp_path_factory) -> Graph:
    target = tmp_path_factory.mktemp("int8") / "c.int8.onnx"
    options = CalibrateOptions(smoothing=SmoothingOptions(None))
    calibrate(classifier_graph.path, token_rows, target, options)
    return Graph.load(target)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("asked", [None, FP32, FP16, BF16])
def test_an_exported_graph_may_have_any_float_precision(graph_of, asked, backend) -> None:
    assert engine_precision(graph_of(FP32), asked, backend) is (asked or FP32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("asked", [INT8, FP8])
def test_8_bits_of_an_exported_graph_need_ranges(graph_of, asked, backend) -> None:
    with pytest.raises(GraphError, match=f"{asked} needs ranges") as caught:
        engine_precision(graph_of(FP32), asked, backend, plugin=False)
    assert f"--{asked} --data" in caught.value.hint


def test_our_kernels_on_a_cpu_need_none_for_int8(graph_of) -> None:
    assert engine_precision(graph_of(FP32), INT8, CPU) is INT8
    for backend in set(BACKENDS) - {CPU}:
        with pytest.raises(GraphError, match="int8 needs ranges"):
            engine_precision(graph_of(FP32), INT8, backend)
    with pytest.raises(GraphError, match="fp8 needs ranges"):
        engine_precision(graph_of(FP32), FP8, CPU)


def test_static_activations_are_those_of_a_calibrated_graph(graph_of) -> None:
    check_static_activations(graph_of(INT8))
    for own in (FP32, FP16, BF16):
        with pytest.raises(GraphError, match=f"is {own}") as caught:
            check_static_activations(graph_of(own))
        assert "calibrate" in caught.value.hint


@pytest.mark.parametrize("own", [FP16, BF16, INT8, FP8])
def test_a_calibrated_graph_decides(graph_of, own) -> None:
    assert engine_precision(graph_of(own), None, GPU) is own
    assert engine_precision(graph_of(own), own, GPU) is own
    for asked in set(Precision) - {own}:
        with pytest.raises(GraphError, match=f"was calibrated as {own}, not {asked}") as caught:
            engine_precision(graph_of(own), asked, GPU)
        assert f"leave out --{asked}" in caught.value.hint


def test_what_a_cpu_computes_in(graph_of) -> None:
    assert engine_precision(graph_of(INT8), None, CPU) is INT8
    with pytest.raises(EngineError, match="no CPU computes in fp8") as caught:
        engine_precision(graph_of(FP8), None, CPU)
    assert "--int8" in caught.value.hint
    for own in (FP16, BF16):
        with pytest.raises(EngineError, match=f"is typed {own} for GPUs") as caught:
            engine_precision(graph_of(own), None, CPU)
        assert "from the fp32 graph" in caught.value.hint


@pytest.mark.parametrize("precision", [FP32, FP16, BF16, INT8])
def test_capabilities_are_as_asked_or_the_default(precision) -> None:
    assert engine_capabilities((), precision) == DEFAULT_CAPABILITIES
    assert engine_capabilities(("SM86",), precision) == ("SM86",)


def test_capabilities_of_fp8() -> None:
    assert engine_capabilities((), FP8) == ("SM89", "SM120")
    assert engine_capabilities(("SM120", "SM89"), FP8) == ("SM120", "SM89")
    with pytest.raises(EngineError, match="SM86, SM80 cannot compute in fp8") as caught:
        engine_capabilities(("SM86", "SM89", "SM80"), FP8)
    assert caught.value.hint == "--int8"
    # the builder knows the names and says what is wrong with this one
    assert engine_capabilities(("Ada",), FP8) == ("Ada",)


def test_attention_in_fp8_needs_one_length(graph_of) -> None:
    fixed = ShapeProfile.parse("batch=1:8:32,seq=128")
    moving = ShapeProfile.parse("batch=1:8:32,seq=16:128:512")
    in_fp8 = graph_of(FP8, fp8_attention=True)
    check_attention(in_fp8, fixed)
    with pytest.raises(EngineError, match=r"fixed sequence length only.*16:128:512") as caught:
        check_attention(in_fp8, moving)
    assert "seq=128:128:128" in caught.value.hint
    for other in (graph_of(FP8, fp8_attention=False), graph_of(FP32), graph_of(INT8)):
        check_attention(other, moving)


def _types(model: onnx.ModelProto) -> dict[str, int]:
    return {tensor.name: tensor.data_type for tensor in model.graph.initializer}


EMBEDDING = "embeddings.word_embeddings.weight"


def test_a_cpu_gets_a_calibrated_graph_as_it_is(int8_graph) -> None:
    assert graph_in_precision(int8_graph, INT8, FP16, CPU) is int8_graph.model


@pytest.mark.parametrize(
    ("precision", "stored"), [(FP16, TensorProto.FLOAT16), (BF16, TensorProto.BFLOAT16)]
)
def test_a_cpu_stores_halves_and_computes_in_fp32(classifier_graph, precision, stored) -> None:
    model = graph_in_precision(classifier_graph, precision, FP16, CPU)
    assert {t.data_type for t in model.graph.initializer if len(t.raw_data) > 4096} == {stored}
    assert {value.type.tensor_type.elem_type for value in model.graph.output} == {1}
    assert any(node.op_type == "Cast" for node in model.graph.node)
    assert _types(classifier_graph.model)[EMBEDDING] == TensorProto.FLOAT, "a copy was changed"


@pytest.mark.parametrize(
    ("high", "kind"),
    [(FP16, TensorProto.FLOAT16), (BF16, TensorProto.BFLOAT16), (FP32, TensorProto.FLOAT)],
)
def test_a_gpu_gets_the_rest_in_the_high_precision(int8_graph, high, kind) -> None:
    types = _types(graph_in_precision(int8_graph, INT8, high, GPU))
    assert types[EMBEDDING] == kind
    scales = {types[name] for name in types if name.endswith("scale")}
    assert scales == {kind}, "strongly typed: scales as their activations"
    assert sum(kind == TensorProto.INT8 for kind in types.values()) >= 10


def test_what_left_fp16_stays_fp32_in_fp16_alone(int8_graph) -> None:
    """What calibrate found over fp16's range, here named by hand."""
    node = "encoder.layer.1.output.LayerNorm/LayerNormalization"
    assert node in {one.name for one in int8_graph.model.graph.node}
    kept = [{"node": node, "tensor": "x", "largest": 1e5, "limit": 16376.0}]
    record = int8_graph.info.calibration | {"kept_fp32": kept}
    info = dataclasses.replace(int8_graph.info, calibration=record)
    graph = dataclasses.replace(int8_graph, info=info)
    weight = "encoder.layer.1.output.LayerNorm.weight"
    kinds = {high: _types(graph_in_precision(graph, INT8, high, GPU)) for high in (FP16, BF16)}
    assert kinds[FP16][weight] == TensorProto.FLOAT
    assert kinds[FP16]["encoder.layer.0.output.LayerNorm.weight"] == TensorProto.FLOAT16
    assert kinds[BF16][weight] == TensorProto.BFLOAT16


def test_a_gpu_gets_a_typed_graph_as_it_is(graph_of) -> None:
    graph = graph_of(FP16)
    assert graph_in_precision(graph, FP16, FP16, GPU) is graph.model


def test_a_gpu_gets_an_exported_graph_typed(classifier_graph) -> None:
    typed = graph_in_precision(classifier_graph, FP16, BF16, GPU)
    assert _types(typed)[EMBEDDING] == TensorProto.FLOAT16


def test_a_plan_with_too_few_8_bit_products_is_refused(graph_of) -> None:
    graph = graph_of(
        INT8, quantized=["encoder.layer.0.output.dense", "encoder.layer.1.output.dense"]
    )
    check_gemms(graph_of(FP32), {"Half": 3})
    check_gemms(graph, {"Half": 1, "Int8": 2})
    check_gemms(graph, {"FP8": 2})
    check_gemms(graph, None)  # not listed
    with pytest.raises(EngineError, match="1 products in 8 bits, expected 2"):
        check_gemms(graph, {"Half": 2, "Int8": 1})
