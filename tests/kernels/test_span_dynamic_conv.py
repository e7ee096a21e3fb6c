"""SpanDynamicConv against its specification: CPU kernels, emulated CUDA kernel, ORT operator."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest

from kernels.cases import DTYPES, assert_close, inputs, params_of, torch

SEQS = [1, 2, 8, 9, 31, 33, 127, 128, 129, 384, 512]
HEAD_DIMS = [8, 32, 48, 64, 80, 128]
KERNEL_SIZES = [1, 3, 5, 9, 15]
ROUTES = ["portable", "avx2", "avx512", "emulated-1", "emulated-132"]
GUARD = 64  # elements before and after the output


def run_route(kernels, route, params) -> int:
    by_name = {"portable": 0, "avx2": 1, "avx512": 2}
    if route in by_name:
        if by_name[route] > kernels.convbert_best_instruction_set():
            pytest.skip(f"this CPU has no {route}")
        rows = params.batch * params.seq
        # Uneven parts, as an adapter's threads would take them.
        cuts = sorted({0, rows // 3, (2 * rows + 2) // 3, rows})
        for first, last in itertools.pairwise(cuts):
            status = kernels.convbert_span_dynamic_conv_cpu_rows(
                ctypes.byref(params), first, last, by_name[route]
            )
            if status:
                return status
        return 0
    multiprocessors = int(route.split("-")[1])
    return kernels.convbert_span_dynamic_conv_emulated(ctypes.byref(params), multiprocessors)


def run(kernels, route, value, logits, num_heads, kernel_size):
    """Into a sentinel-filled buffer with guards; fails when a guard changes."""
    size = value.numel()
    store = torch.full((size + 2 * GUARD,), 12345.0, dtype=value.dtype)
    output = store[GUARD : GUARD + size].view(value.shape)
    status = run_route(kernels, route, params_of(value, logits, output, num_heads, kernel_size))
    assert status == 0, kernels.convbert_status_message(status)
    sentinel = torch.tensor(12345.0, dtype=value.dtype)
    assert (store[:GUARD] == sentinel).all()
    assert (store[GUARD + size :] == sentinel).all()
    return output


@pytest.mark.parametrize("kernel_size", KERNEL_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", ROUTES)
def test_matches_reference(kernels, route, dtype, kernel_size) -> None:
    for head_dim, seq in itertools.product(HEAD_DIMS, SEQS):
        batch = 3 if seq < 128 else 1
        heads = 2 if seq > 129 or route.startswith("emulated") else 3
        if route.startswith("emulated") and seq > 129 and head_dim > 48:
            continue  # the emulation is slow; long sequences are covered with smaller heads
        value, logits = inputs(batch, seq, heads, head_dim, kernel_size, DTYPES[dtype])
        output = run(kernels, route, value, logits, heads, kernel_size)
        assert_close(output, value, logits, heads, kernel_size)


@pytest.mark.parametrize("head_dim", [1, 5, 12, 20, 100, 300])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", ROUTES)
def test_unusual_head_dims(kernels, route, dtype, head_dim) -> None:
    value, logits = inputs(2, 21, 3, head_dim, 9, DTYPES[dtype])
    assert_close(run(kernels, route, value, logits, 3, 9), value, logits, 3, 9)


@pytest.mark.parametrize("route", ROUTES)
def test_more_heads_than_a_block_holds(kernels, route) -> None:
    value, logits = inputs(1, 20, 300, 8, 7, torch.float32)
    assert_close(run(kernels, route, value, logits, 300, 7), value, logits, 300, 7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", ROUTES)
def test_slices_and_misaligned_views(kernels, route, dtype) -> None:
    heads, head_dim, taps = 6, 64, 9
    wide, wide_logits = inputs(3, 40, heads, head_dim * 4, taps * 3, DTYPES[dtype])
    width = heads * head_dim
    for offset in (0, 1, 3, width):  # the last is how a merged Q/K/V/conv_out product is cut
        value = wide[:, 2:35, offset : offset + width]
        logits = wide_logits[:, 2:35, offset % 7 : offset % 7 + heads * taps]
        output = torch.full((3, 33, 2 * width + 1), 7.0, dtype=value.dtype)
        target = output[:, :, width + 1 :]  # the right half of a concatenation
        assert run_route(kernels, route, params_of(value, logits, target, heads, taps)) == 0
        assert_close(target, value, logits, heads, taps)
        assert (output[:, :, : width + 1] == 7.0).all(), "wrote outside its columns"


@pytest.mark.parametrize("route", ROUTES)
def test_extreme_logits(kernels, route) -> None:
    value, logits = inputs(1, 12, 2, 16, 9, torch.float32)
    logits[0, 3] = 1e4
    logits[0, 4, 2] = 3e38
    logits[0, 5] = -1e30
    logits[0, 6, :4] = float("-inf")
    assert_close(run(kernels, route, value, logits, 2, 9), value, logits, 2, 9)
    logits[0, 7, 3] = float("nan")
    output = run(kernels, route, value, logits, 2, 9)
    assert torch.isnan(output[0, 7, :16]).all(), "a NaN logit was hidden"
    assert torch.isfinite(output[0, 7, 16:]).all()
    assert torch.isfinite(output[0, 6]).all()


def _drop_last_tap(value, logits, heads, taps):
    return value, torch.where(torch.arange(heads * taps) % taps == taps - 1, -1e30, logits)


def _reverse_taps(value, logits, heads, taps):
    shape = (*logits.shape[:2], heads, taps)
    return value, logits.reshape(shape).flip(-1).reshape(logits.shape)


def _shift_one(value, logits, heads, taps):
    return torch.roll(value, 1, dims=1), logits


def _roll_heads(value, logits, heads, taps):
    return value, torch.roll(logits, taps, dims=-1)


@pytest.mark.parametrize("fault", [_drop_last_tap, _reverse_taps, _shift_one, _roll_heads])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_comparison_catches_a_wrong_convolution(kernels, fault, dtype) -> None:
    value, logits = inputs(1, 33, 4, 32, 9, DTYPES[dtype])
    wrong = [t.to(value.dtype).contiguous() for t in fault(value, logits, 4, 9)]
    output = run(kernels, "portable", *wrong, 4, 9)
    with pytest.raises(AssertionError, match="error"):
        assert_close(output, value, logits, 4, 9)


def test_refusals(kernels) -> None:
    value, logits = inputs(1, 4, 2, 8, 3, torch.float32)
    output = torch.full_like(value, 5.0)
    good = params_of(value, logits, output, 2, 3)
    changes = [
        ("kernel_size", 4, b"even"),
        ("kernel_size", 17, b"above 15"),
        ("num_heads", 0, b"size"),
        ("dtype", 9, b"dtype"),
        ("value_row_stride", 3, b"stride"),
        ("value", None, b"null"),
        ("seq", -1, b"negative"),
    ]
    for field, bad, message in changes:
        params = type(good).from_buffer_copy(good)
        setattr(params, field, bad)
        for entry in ("cpu", "emulated"):
            call = getattr(kernels, f"convbert_span_dynamic_conv_{entry}")
            arguments = [ctypes.byref(params)] + ([4] if entry == "emulated" else [])
            status = call(*arguments)
            assert status, (field, entry)
            assert message in kernels.convbert_status_message(status), (field, entry)
    assert (output == 5.0).all(), "a refused call wrote to its output"


# ---- the ONNX Runtime operator ----------------------------------------------------------------


def one_node_model(dtype: str, num_heads: int, kernel_size: int) -> bytes:
    import onnx
    from onnx import TensorProto, helper

    element = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}.get(dtype)
    element = element or TensorProto.BFLOAT16
    info = [helper.make_tensor_value_info(n, element, ["b", "s", n]) for n in ("v", "l", "o")]
    # bfloat16 cannot cross numpy: the graph casts at its edges.
    edge = TensorProto.FLOAT if dtype == "bf16" else element
    for value_info in info:
        value_info.type.tensor_type.elem_type = edge
    node = helper.make_node(
        "SpanDynamicConv",
        ["vc", "lc"],
        ["oc"],
        domain="convbert",
        num_heads=num_heads,
        kernel_size=kernel_size,
        plugin_version="1",
        plugin_namespace="",
    )
    nodes = [
        helper.make_node("Cast", ["v"], ["vc"], to=element),
        helper.make_node("Cast", ["l"], ["lc"], to=element),
        node,
        helper.make_node("Cast", ["oc"], ["o"], to=edge),
    ]
    graph = helper.make_graph(nodes, "one", info[:2], info[2:])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("convbert", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def session(library, model: bytes, threads: int = 2):
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("kernel_size", [1, 9, 15])
@pytest.mark.parametrize("dtype", DTYPES)
def test_onnxruntime_operator(ort_library, dtype, kernel_size) -> None:
    heads = 6
    runner = session(ort_library, one_node_model(dtype, heads, kernel_size))
    for head_dim, seq, batch in itertools.product([8, 48, 64], [1, 9, 129, 512], [1, 3]):
        value, logits = inputs(batch, seq, heads, head_dim, kernel_size, DTYPES[dtype])
        edge = torch.float32 if dtype == "bf16" else value.dtype
        feed = {"v": value.to(edge).numpy(), "l": logits.to(edge).numpy()}
        output = torch.from_numpy(runner.run(None, feed)[0]).to(value.dtype)
        assert_close(output, value, logits, heads, kernel_size)


def test_onnxruntime_infers_the_output_shape(ort_library) -> None:
    outputs = session(ort_library, one_node_model("fp32", 2, 3)).get_outputs()
    assert outputs[0].type == "tensor(float)"
    assert len(outputs[0].shape) == 3


@pytest.mark.parametrize(
    ("value_shape", "logits_shape", "words"),
    [
        ((1, 4, 17), (1, 4, 6), "does not divide into num_heads 2"),
        ((1, 4, 16), (1, 4, 7), r"expected \(1, 4, num_heads 2 \* kernel_size 3\)"),
        ((1, 4, 16), (1, 5, 6), "kernel_logits"),
    ],
)
def test_onnxruntime_names_bad_shapes(ort_library, value_shape, logits_shape, words) -> None:
    runner = session(ort_library, one_node_model("fp32", 2, 3))
    feed = {"v": np.zeros(value_shape, np.float32), "l": np.zeros(logits_shape, np.float32)}
    with pytest.raises(Exception, match=words):
        runner.run(None, feed)


def test_onnxruntime_refuses_even_kernels(ort_library) -> None:
    with pytest.raises(Exception, match="kernel_size is 4, expected an odd number up to 15"):
        session(ort_library, one_node_model("fp32", 2, 4))


def test_onnxruntime_accepts_an_empty_batch(ort_library) -> None:
    runner = session(ort_library, one_node_model("fp32", 2, 3))
    feed = {"v": np.zeros((0, 4, 16), np.float32), "l": np.zeros((0, 4, 6), np.float32)}
    assert runner.run(None, feed)[0].shape == (0, 4, 16)
