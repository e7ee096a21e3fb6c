"""FusedSpanDynamicConv against its specification: CPU kernels, emulated CUDA kernel, ORT operator."""

from __future__ import annotations

import ctypes
import dataclasses

import numpy as np
import onnx
import pytest
import torch

from convbert_deploy.reference import fused_span_dynamic_conv

from kernels.cases import CPU_ROUTES, DTYPES, GUARD, ROUTES, SENTINEL, Params

#: (batch, seq, heads, head_dim, K): every seq, batch, head dim and K of the matrix at least once,
#: the corners together; the last three have more heads, columns or channels than one block holds.
SHAPES = [
    (1, 1, 1, 8, 1),
    (3, 2, 2, 32, 3),
    (2, 8, 6, 48, 9),
    (32, 9, 2, 8, 9),
    (1, 31, 4, 80, 5),
    (2, 33, 6, 64, 9),
    (1, 127, 2, 128, 15),
    (1, 128, 6, 64, 9),
    (3, 129, 4, 48, 9),
    (1, 384, 2, 64, 9),
    (1, 512, 1, 32, 15),
    (2, 21, 3, 5, 7),
    (1, 20, 40, 8, 9),
    (1, 17, 16, 16, 15),
    (1, 18, 300, 4, 3),
]


class FusedParams(ctypes.Structure):
    """FusedSpanDynamicConvParams of fused_span_dynamic_conv.h, field by field."""

    _fields_ = [
        ("conv", Params),
        *[(name, ctypes.c_void_p) for name in ("query", "key_conv", "weight", "bias")],
        *[
            (f"{tensor}_{axis}_stride", ctypes.c_int64)
            for tensor in ("query", "key_conv")
            for axis in ("batch", "row")
        ],
    ]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call's tensors and attributes."""

    key_conv: torch.Tensor
    projections: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    mask: torch.Tensor | None
    num_heads: int
    kernel_size: int
    query_offset: int
    value_offset: int

    def reference(self, *, upcast: bool = True, double: bool = False, **changes) -> torch.Tensor:
        """float64 throughout with ``double``."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | changes
        tensors = [fields.pop(name) for name in ("key_conv", "projections", "weight", "bias")]
        if double:
            tensors, upcast = [tensor.double() for tensor in tensors], False
        return fused_span_dynamic_conv(*tensors, upcast=upcast, **fields)


def make_case(shape, dtype, *, masked=False, seed=0) -> Case:
    """Logits with the spread of a trained layer; pads hold NaN where only a value can be."""
    batch, seq, heads, head_dim, kernel_size = shape
    channels = heads * head_dim
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    projections = normal(batch, seq, 4 * channels)
    mask = None
    if masked:
        lengths = torch.randint(1, seq + 1, (batch, 1), generator=generator)
        mask = (torch.arange(seq) < lengths).long()
        projections[:, :, 3 * channels :][mask == 0] = float("nan")
    return Case(
        key_conv=normal(batch, seq, channels).to(dtype),
        projections=projections.to(dtype),
        weight=(normal(channels, heads * kernel_size) * 2 / channels**0.5).to(dtype),
        bias=(normal(heads * kernel_size) * 0.1).to(dtype),
        mask=mask,
        num_heads=heads,
        kernel_size=kernel_size,
        query_offset=0,
        value_offset=3 * channels,
    )


def params_of(case: Case, output: torch.Tensor) -> FusedParams:
    batch, seq, channels = case.key_conv.shape
    element = case.projections.element_size()
    start = case.projections.data_ptr()
    rows = (case.projections.stride(0), case.projections.stride(1))
    params = FusedParams(
        query=start + case.query_offset * element,
        key_conv=case.key_conv.data_ptr(),
        weight=case.weight.data_ptr(),
        bias=case.bias.data_ptr(),
        query_batch_stride=rows[0],
        query_row_stride=rows[1],
        key_conv_batch_stride=case.key_conv.stride(0),
        key_conv_row_stride=case.key_conv.stride(1),
    )
    conv = params.conv
    conv.value = start + case.value_offset * element
    conv.mask = None if case.mask is None else case.mask.data_ptr()
    conv.output = output.data_ptr()
    conv.batch, conv.seq = batch, seq
    conv.value_batch_stride, conv.value_row_stride = rows
    conv.mask_batch_stride = seq
    conv.output_batch_stride, conv.output_row_stride = output.stride(0), output.stride(1)
    conv.num_heads, conv.head_dim = case.num_heads, channels // case.num_heads
    conv.kernel_size = case.kernel_size
    conv.dtype = list(DTYPES.values()).index(output.dtype)
    return params


def call(kernels, route: str, params: FusedParams) -> int:
    if route not in CPU_ROUTES:
        return kernels.convbert_fused_span_dynamic_conv_emulated(
            ctypes.byref(params), int(route.split("-")[1])
        )
    if CPU_ROUTES[route] > kernels.convbert_best_instruction_set():
        pytest.skip(f"this CPU has no {route}")
    rows = params.conv.batch * params.conv.seq
    run_rows = kernels.convbert_fused_span_dynamic_conv_cpu_rows
    run_rows.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int32]
    cut = (2 * rows + 2) // 3  # uneven parts, as an adapter's threads would take them
    return run_rows(ctypes.byref(params), 0, cut, CPU_ROUTES[route]) or run_rows(
        ctypes.byref(params), cut, rows, CPU_ROUTES[route]
    )


def run(kernels, route: str, case: Case) -> torch.Tensor:
    """Into a sentinel-filled buffer with guards; fails when a guard changes."""
    size = case.key_conv.numel()
    store = torch.full((size + 2 * GUARD,), SENTINEL, dtype=case.key_conv.dtype)
    output = store[GUARD : GUARD + size].view(case.key_conv.shape)
    status = call(kernels, route, params_of(case, output))
    assert status == 0, kernels.convbert_status_message(status)
    sentinel = torch.tensor(SENTINEL, dtype=store.dtype)
    assert (store[:GUARD] == sentinel).all()
    assert (store[GUARD + size :] == sentinel).all()
    return output


def assert_close(got: torch.Tensor, case: Case) -> None:
    """fp32: 2e-5 absolute (sums of up to 1200 products before the softmax). Half precision: no
    worse than twice plain torch in the same precision, plus one unit in the last place of the
    largest output."""
    truth = case.reference(double=True)
    error = (got.double() - truth).abs().max().item()
    assert np.isfinite(error), "error: NaN or infinity in the output"
    if got.dtype == torch.float32:
        limit = 2e-5
    else:
        control = (case.reference(upcast=False).double() - truth).abs().max().item()
        limit = 2 * control + torch.finfo(got.dtype).eps * truth.abs().max().item()
    assert error <= limit, f"error {error:.3g} above {limit:.3g}"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", ROUTES)
def test_matches_reference(kernels, route, dtype, masked) -> None:
    for shape in SHAPES:
        case = make_case(shape, DTYPES[dtype], masked=masked)
        assert_close(run(kernels, route, case), case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", ROUTES)
def test_misaligned_views(kernels, route, dtype) -> None:
    case = make_case((3, 40, 6, 16, 9), DTYPES[dtype])
    for offset in (1, 3, 8):
        wide = torch.nn.functional.pad(case.projections, (offset, 5))
        moved = dataclasses.replace(
            case,
            projections=wide,
            query_offset=offset,
            value_offset=case.value_offset + offset,
            key_conv=torch.nn.functional.pad(case.key_conv, (0, 3))[:, :, : case.key_conv.shape[2]],
        )
        output = torch.full((3, 40, 2 * 96 + 1), 7.0, dtype=wide.dtype)
        target = output[:, :, 97:]  # the right half of a concatenation, misaligned
        assert call(kernels, route, params_of(moved, target)) == 0
        assert_close(target, moved)
        assert (output[:, :, :97] == 7.0).all(), "wrote outside its columns"


FAULTS = {
    "query from the key": lambda case: {"query_offset": case.value_offset // 3},
    "value from the attention": lambda case: {"value_offset": case.value_offset * 2 // 3},
    "bias dropped": lambda case: {"bias": case.bias * 0},
    "channels shifted by one": lambda case: {"weight": case.weight.roll(1, 0)},
    "heads rolled": lambda case: {"weight": case.weight.roll(case.kernel_size, 1)},
    "last channels left out": lambda case: {
        "weight": torch.cat([case.weight[:-16], 0 * case.weight[-16:]])
    },
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_comparison_catches_a_wrong_kernel(kernels, fault, dtype) -> None:
    case = make_case((2, 33, 4, 32, 9), DTYPES[dtype])
    wrong = dataclasses.replace(case, **FAULTS[fault](case))
    output = run(kernels, "portable", wrong)
    assert_close(output, wrong)
    with pytest.raises(AssertionError, match="error"):
        assert_close(output, case)


def test_refusals(kernels) -> None:
    case = make_case((1, 4, 2, 8, 3), torch.float32)
    output = torch.full_like(case.key_conv, 5.0)
    changes = [
        ("conv.kernel_size", 4, b"even"),
        ("conv.num_heads", 0, b"size"),
        ("query_row_stride", 3, b"stride"),
        ("key_conv", None, b"null"),
        ("weight", None, b"null"),
        ("bias", None, b"null"),
    ]
    for field, bad, message in changes:
        params = params_of(case, output)
        owner = params.conv if field.startswith("conv.") else params
        setattr(owner, field.removeprefix("conv."), bad)
        for status in (
            kernels.convbert_fused_span_dynamic_conv_cpu(ctypes.byref(params)),
            kernels.convbert_fused_span_dynamic_conv_emulated(ctypes.byref(params), 4),
        ):
            assert status, field
            assert message in kernels.convbert_status_message(status), field
    assert (output == 5.0).all(), "a refused call wrote to its output"


# ---- the ONNX Runtime operator ----------------------------------------------------------------


def session(library, case: Case, **changes):
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    attributes = {
        name: getattr(case, name)
        for name in ("num_heads", "kernel_size", "query_offset", "value_offset")
    } | changes
    typed = ("key_conv", "projections", "weight", "bias")
    element = {
        torch.float32: onnx.TensorProto.FLOAT,
        torch.float16: onnx.TensorProto.FLOAT16,
        torch.bfloat16: onnx.TensorProto.BFLOAT16,
    }[case.key_conv.dtype]
    # bfloat16 cannot cross numpy: the graph casts at its edges
    edge = onnx.TensorProto.FLOAT if element == onnx.TensorProto.BFLOAT16 else element
    infos = [
        onnx.helper.make_tensor_value_info(name, edge, [None] * getattr(case, name).ndim)
        for name in typed
    ]
    if case.mask is not None:
        infos.append(
            onnx.helper.make_tensor_value_info("mask", onnx.TensorProto.INT64, [None, None])
        )
    nodes = [onnx.helper.make_node("Cast", [name], [f"{name}.t"], to=element) for name in typed]
    nodes.append(
        onnx.helper.make_node(
            "FusedSpanDynamicConv",
            [f"{name}.t" for name in typed] + ([] if case.mask is None else ["mask"]),
            ["out.t"],
            domain="convbert",
            **attributes,
        )
    )
    nodes.append(onnx.helper.make_node("Cast", ["out.t"], ["out"], to=edge))
    output = onnx.helper.make_tensor_value_info("out", edge, [None, None, None])
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "one", infos, [output]),
        opset_imports=[onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("convbert", 1)],
        ir_version=10,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def feed(case: Case) -> dict[str, np.ndarray]:
    def array(tensor):
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()

    names = ("key_conv", "projections", "weight", "bias", "mask")
    return {n: array(getattr(case, n)) for n in names if getattr(case, n) is not None}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_onnxruntime_operator(ort_library, dtype, masked) -> None:
    for shape in SHAPES[:10]:
        case = make_case(shape, DTYPES[dtype], masked=masked)
        (output,) = session(ort_library, case).run(None, feed(case))
        assert_close(torch.from_numpy(output).to(DTYPES[dtype]), case)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"projections": (1, 4, 63)}, "value_offset 48"),
        ({"projections": (1, 5, 64)}, "do not fit key_conv"),
        ({"weight": (16, 7)}, r"expected \(16, 6\) and \(6\)"),
        ({"bias": (5,)}, r"bias \(5\)"),
        ({"mask": (1, 3)}, r"mask \(1, 3\) does not fit, expected \(1, 4\)"),
        ({"key_conv": (1, 4, 15)}, "does not divide into num_heads 2"),
    ],
)
def test_onnxruntime_names_bad_shapes(ort_library, change, words) -> None:
    case = make_case((1, 4, 2, 8, 3), torch.float32, masked=True)
    feeds = feed(case)
    for name, shape in change.items():
        feeds[name] = np.zeros(shape, feeds[name].dtype)
    with pytest.raises(Exception, match=words):
        session(ort_library, case).run(None, feeds)


def test_onnxruntime_refuses_bad_attributes(ort_library) -> None:
    case = make_case((1, 4, 2, 8, 3), torch.float32)
    with pytest.raises(Exception, match="query_offset is -1, expected 0 or more"):
        session(ort_library, case, query_offset=-1)
    with pytest.raises(Exception, match="kernel_size is 4, expected an odd number"):
        session(ort_library, case, kernel_size=4)
