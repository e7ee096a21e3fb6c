"""The CUDA kernels on a device, through the C ABI: only torch, nvcc and this repository needed.

Numbers against the references on the CPU, at the same tolerances as the CPU kernels; bytes around the
output; capture in a CUDA graph; two streams at once.
"""

from __future__ import annotations

import ctypes
import dataclasses

import pytest
import torch

from kernels import cases
from kernels import test_depthwise_conv1d as depthwise
from kernels import test_fused_span_dynamic_conv as fused
from kernels.cases import DTYPES, GUARD, SENTINEL

pytestmark = pytest.mark.gpu

SHAPES = [
    (1, 1),
    (1, 2),
    (3, 8),
    (1, 31),
    (32, 33),
    (1, 127),
    (3, 128),
    (8, 129),
    (2, 384),
    (32, 512),
]
#: (heads, head_dim, K)
HEADS = [(6, 64, 9), (2, 8, 1), (4, 48, 9), (3, 32, 15), (2, 80, 5), (1, 128, 3), (3, 5, 7)]


@pytest.fixture(scope="module")
def device(kernels) -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU that torch can use")
    if not kernels.convbert_built_with_cuda():
        pytest.skip("the kernels are built without CUDA: install with nvcc on the PATH")
    return torch.device("cuda")


def buffer(shape, dtype, device):
    """(whole, view): a sentinel-filled output with guards."""
    size = torch.Size(shape).numel()
    store = torch.full((size + 2 * GUARD,), SENTINEL, dtype=dtype, device=device)
    return store, store[GUARD : GUARD + size].view(shape)


def check_guards(store) -> None:
    sentinel = torch.tensor(SENTINEL, dtype=store.dtype, device=store.device)
    assert (store[:GUARD] == sentinel).all(), "wrote before the output"
    assert (store[-GUARD:] == sentinel).all(), "wrote after the output"


def launch(kernels, name: str, params, stream=None) -> None:
    entry = getattr(kernels, f"convbert_{name}_cuda")
    entry.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    stream = stream or torch.cuda.current_stream()
    assert entry(ctypes.byref(params), stream.cuda_stream) == 0


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_span_dynamic_conv(kernels, device, heads, dtype, masked) -> None:
    count, head_dim, taps = heads
    for batch, seq in SHAPES:
        value, logits = cases.inputs(batch, seq, count, head_dim, taps, DTYPES[dtype], seed=seq)
        mask = cases.masks(batch, seq, seed=seq) if masked else None
        if masked:
            cases.poison_pads(mask, value)
        expected = cases.Expected.of(value, logits, count, taps, mask)
        tensors = [value.to(device), logits.to(device)]
        moved = mask.to(device) if masked else None
        store, output = buffer(value.shape, value.dtype, device)
        launch(
            kernels,
            "span_dynamic_conv",
            cases.params_of(*tensors, output, count, taps, moved),
        )
        check_guards(store)
        expected.check(output.cpu(), f"at {batch}x{seq}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 3, 8])
def test_span_dynamic_conv_on_views(kernels, device, dtype, offset) -> None:
    wide, wide_logits = cases.inputs(3, 40, 6, 128, 27, DTYPES[dtype])
    value = wide.to(device)[:, 2:35, offset : offset + 384]
    logits = wide_logits.to(device)[:, 2:35, offset : offset + 54]
    output = torch.full((3, 33, 769), 7.0, dtype=value.dtype, device=device)
    target = output[:, :, 385:]
    launch(kernels, "span_dynamic_conv", cases.params_of(value, logits, target, 6, 9))
    cases.assert_close(target.cpu(), value.cpu(), logits.cpu(), 6, 9)
    assert (output[:, :, :385] == 7.0).all(), "wrote outside its columns"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "taps"), [(768, 9), (5, 1), (37, 15), (256, 3), (384, 5)])
def test_depthwise_conv1d(kernels, device, channels, taps, dtype, masked) -> None:
    for batch, seq in SHAPES:
        source, weight = depthwise.inputs(batch, seq, channels, taps, DTYPES[dtype], seed=seq)
        mask = cases.masks(batch, seq, seed=seq) if masked else None
        if masked:
            cases.poison_pads(mask, source)
        store, output = buffer(source.shape, source.dtype, device)
        tensors = [source.to(device), weight.to(device)]
        moved = mask.to(device) if masked else None
        launch(kernels, "depthwise_conv1d", depthwise.params_of(*tensors, output, moved))
        check_guards(store)
        depthwise.assert_close(output.cpu(), source, weight, mask)


def on_device(case: fused.Case, device) -> fused.Case:
    moved = {
        field.name: value.to(device)
        for field in dataclasses.fields(case)
        if isinstance(value := getattr(case, field.name), torch.Tensor)
    }
    return dataclasses.replace(case, **moved)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_span_dynamic_conv(kernels, device, dtype, masked) -> None:
    for shape in [*fused.SHAPES, (32, 512, 6, 64, 9)]:
        case = fused.make_case(shape, DTYPES[dtype], masked=masked)
        moved = on_device(case, device)
        store, output = buffer(case.key_conv.shape, DTYPES[dtype], device)
        launch(kernels, "fused_span_dynamic_conv", fused.params_of(moved, output))
        check_guards(store)
        fused.assert_close(output.cpu(), case)


def test_captured_in_a_graph_and_on_two_streams(kernels, device) -> None:
    value, logits = cases.inputs(8, 128, 6, 64, 9, torch.float16)
    tensors = [value.to(device), logits.to(device)]
    outputs = [torch.zeros_like(tensors[0]) for _ in range(3)]
    params = [cases.params_of(*tensors, output, 6, 9) for output in outputs]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        launch(kernels, "span_dynamic_conv", params[0])
    graph.replay()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for stream, call in zip(streams, params[1:], strict=True):
        launch(kernels, "span_dynamic_conv", call, stream)
    torch.cuda.synchronize()
    for output in outputs:
        cases.assert_close(output.cpu(), value, logits, 6, 9)


def test_a_refused_launch_returns_its_error(kernels, device) -> None:
    value, logits = (t.to(device) for t in cases.inputs(1, 4, 2, 8, 3, torch.float32))
    params = cases.params_of(value, logits, torch.empty_like(value), 2, 3)
    params.kernel_size = 4
    entry = kernels.convbert_span_dynamic_conv_cuda
    entry.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    assert entry(ctypes.byref(params), None) == 1, "cudaErrorInvalidValue"
