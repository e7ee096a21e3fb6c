"""The generated configs, read back with the server's own schema and held against the engine."""

from __future__ import annotations

import dataclasses

import pytest

from convbert_deploy.architecture import Task
from convbert_deploy.engine import Engine
from convbert_deploy.golden import GoldenOutput
from convbert_deploy.serving.requests import INPUT_NAMES
from convbert_deploy.shapes import ShapeProfile
from convbert_deploy.triton.config import (
    ModelOptions,
    Word,
    engine_config,
    pbtxt,
    text_config,
    triton_backend,
    warm_ups,
)

import triton_engines

model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")
text_format = pytest.importorskip("google.protobuf.text_format")

MASKED = {"padding": "masked"}


def parsed(text: str):
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def engine_parsed(engine: Engine, options: ModelOptions | None = None, **more):
    return parsed(engine_config(engine, options or ModelOptions("m_engine"), **more))


@pytest.mark.parametrize("task", list(Task))
def test_the_tensor_models_config_is_the_engines(task):
    engine = triton_engines.described(task, **MASKED)
    config = engine_parsed(engine)
    rank = len(task.input_axes) - 1
    assert (config.name, config.backend) == ("m_engine", "python")
    assert config.max_batch_size == engine.manifest.profile.batch.max
    assert [entry.name for entry in config.input] == list(INPUT_NAMES)
    for entry in config.input:
        assert entry.data_type == model_config_pb2.TYPE_INT64 and entry.allow_ragged_batch
        assert list(entry.dims) == [-1] * rank
    assert [entry.name for entry in config.output] == list(task.output_names)
    for entry in config.output:
        assert entry.data_type == model_config_pb2.TYPE_FP32
        golden = engine.golden.outputs[entry.name].shape[1:]
        assert len(entry.dims) == len(golden)
        assert all(dim in (-1, size) for dim, size in zip(entry.dims, golden, strict=True))
    fixed = {
        Task.ENCODER: [-1, 64],
        Task.MASKED_LM: [-1, 500],
        Task.SEQUENCE_CLASSIFICATION: [3],
        Task.TOKEN_CLASSIFICATION: [-1, 3],
        Task.QUESTION_ANSWERING: [-1],
        Task.MULTIPLE_CHOICE: [-1],
    }
    assert list(config.output[0].dims) == fixed[task]
    assert config.HasField("dynamic_batching")
    assert not config.dynamic_batching.HasField("default_queue_policy")
    assert config.version_policy.latest.num_versions == 2


def test_choices_of_one_number_are_a_fixed_axis():
    profile = ShapeProfile.parse("choices=4")
    engine = triton_engines.described(Task.MULTIPLE_CHOICE, profile=profile, **MASKED)
    assert all(list(entry.dims) == [4, -1] for entry in engine_parsed(engine).input)


def test_hf_engines_share_batches_only_at_one_shape():
    config = engine_parsed(triton_engines.described(padding="hf"))
    assert not any(entry.allow_ragged_batch for entry in config.input)


def test_every_length_bucket_is_warmed_up_and_the_largest_batch():
    profile = ShapeProfile.parse("batch=2:4:8,seq=20:64:100")
    engine = triton_engines.described(profile=profile, **MASKED)
    config = engine_parsed(engine)
    seen = [
        (warm.batch_size, *warm.inputs["input_ids"].dims, warm.name) for warm in config.model_warmup
    ]
    assert seen == [
        (2, 32, "length-32"),
        (2, 64, "length-64"),
        (2, 100, "length-100"),
        (8, 64, "largest-batch"),
    ]
    for warm, made in zip(config.model_warmup, warm_ups(engine.manifest), strict=True):
        assert set(warm.inputs) == set(INPUT_NAMES)
        for name, entry in warm.inputs.items():
            assert entry.input_data_file == made.file(name)
            assert entry.data_type == model_config_pb2.TYPE_INT64


def test_warm_ups_of_choices_and_of_our_gpu_runner():
    choices = warm_ups(triton_engines.described(Task.MULTIPLE_CHOICE, **MASKED).manifest)
    assert {warm.shape[0] for warm in choices} == {4}
    engine = triton_engines.described(backend="tensorrt-rtx", **MASKED)
    lengths = {warm.shape[-1] for warm in warm_ups(engine.manifest)}
    assert {16, 24, 96, 128} <= lengths  # the runner's own buckets: each is a CUDA graph


def test_the_text_models_config():
    engine = triton_engines.described(**MASKED)
    options = ModelOptions("m", instances=3, environment="/opt/env", delay_us=500)
    config = parsed(text_config(engine, options, "m_engine"))
    assert (config.name, config.backend, len(config.model_warmup)) == ("m", "python", 0)
    for entry, name in ((config.input[0], "REQUEST"), (config.output[0], "ANSWER")):
        assert (entry.name, entry.data_type, list(entry.dims)) == (
            name,
            model_config_pb2.TYPE_STRING,
            [1],
        )
    group = config.instance_group[0]
    assert (group.count, group.kind) == (3, model_config_pb2.ModelInstanceGroup.KIND_CPU)
    assert config.dynamic_batching.max_queue_delay_microseconds == 500
    values = {key: entry.string_value for key, entry in config.parameters.items()}
    assert values == {"engine_model": "m_engine", "EXECUTION_ENV_PATH": "/opt/env"}


@pytest.mark.parametrize(
    ("backend", "kind"),
    [
        ("onnxruntime-cpu", "KIND_CPU"),
        ("onnxruntime-cuda", "KIND_GPU"),
        ("tensorrt", "KIND_GPU"),
        ("tensorrt-rtx", "KIND_GPU"),
    ],
)
def test_instances_and_threads(backend, kind):
    engine = triton_engines.described(backend=backend, **MASKED)
    config = engine_parsed(engine, ModelOptions("m", instances=2, threads=3))
    group = config.instance_group[0]
    assert group.count == 2 and group.kind == group.Kind.Value(kind)
    python = triton_backend(engine.manifest) == "python"
    assert [entry.allow_ragged_batch for entry in config.input] == [python] * 3
    assert dict(config.parameters) if python else not config.parameters
    if python:
        assert config.parameters["threads"].string_value == "3"


def test_plans_and_onnx_graphs_go_to_tritons_own_backends():
    plan = engine_parsed(triton_engines.described(backend="tensorrt", **MASKED))
    assert (plan.platform, plan.default_model_filename) == ("tensorrt_plan", "model.plan")
    assert list(plan.instance_group[0].profile) == ["0", "1"]  # lengths to 64, to 128
    cuda = triton_engines.described(backend="onnxruntime-cuda", **MASKED)
    graph = engine_parsed(cuda, operator_library="/plugins/lib.so")
    assert (graph.backend, graph.default_model_filename) == ("onnxruntime", "model.onnx")
    assert list(graph.model_operations.op_library_filename) == ["/plugins/lib.so"]


def test_strings_survive_the_text_format():
    odd = 'a "quoted" \\ path\twith\n中 and \x01'
    text = pbtxt({"name": odd, "backend": "x", "input": [], "default_model_filename": "é"})
    config = parsed(text)
    assert (config.name, config.default_model_filename) == (odd, "é")
    assert pbtxt({"a": {}, "b": [Word("X"), 2], "c": [{"d": True}, {"d": False}]}) == (
        "a { }\nb: [ X, 2 ]\nc {\n  d: true\n}\nc {\n  d: false\n}\n"
    )


def test_widths_follow_the_golden_answer():
    engine = triton_engines.described(Task.TOKEN_CLASSIFICATION, **MASKED)
    wide = GoldenOutput((2, 16, 13), (0,), (0.0,))
    golden = dataclasses.replace(engine.golden, outputs={"logits": wide})
    config = engine_parsed(dataclasses.replace(engine, golden=golden))
    assert list(config.output[0].dims) == [-1, 13]
