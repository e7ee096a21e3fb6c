// SpanDynamicConv as an ONNX Runtime custom op. Reads shapes, refuses bad ones, calls the kernel.
#include "../runtime/ort_ops.h"
#include "span_dynamic_conv.h"

namespace convbert::ort {
namespace {

constexpr char const* kName = "SpanDynamicConv";

struct Kernel {
  int32_t numHeads;
  int32_t kernelSize;
  DataType dtype;
};

Status* createKernel(CustomOp const* op, Api const*, KernelInfo const* info, void** out) {
  Kernel kernel{0, 0, self(op).dtype};
  CONVBERT_RETURN_IF_STATUS(readAttribute(info, kName, "num_heads", 1, kernel.numHeads));
  CONVBERT_RETURN_IF_STATUS(readKernelSize(info, kName, kernel.kernelSize));
  *out = new (std::nothrow) Kernel(kernel);
  return *out != nullptr ? nullptr : api().createStatus(kFail, "SpanDynamicConv: out of memory");
}

// Inputs: value, kernel_logits, optionally mask.
Status* prepare(Kernel const& kernel, KernelContext* context,
                SpanDynamicConvParams& params) noexcept {
  Tensor value, logits, mask;
  CONVBERT_RETURN_IF_STATUS(readInput(context, 0, kName, "value", 3, value));
  CONVBERT_RETURN_IF_STATUS(readInput(context, 1, kName, "kernel_logits", 3, logits));
  auto const& v = value.dims;
  auto const& l = logits.dims;
  if (v[2] <= 0 || v[2] % kernel.numHeads != 0 || v[2] / kernel.numHeads > INT32_MAX) {
    return invalid("%s: value (%lld, %lld, %lld) does not divide into num_heads %d", kName, v[0],
                   v[1], v[2], kernel.numHeads);
  }
  if (l[0] != v[0] || l[1] != v[1] ||
      l[2] != static_cast<long long>(kernel.numHeads) * kernel.kernelSize) {
    return invalid(
        "%s: kernel_logits (%lld, %lld, %lld) does not fit value (%lld, %lld, %lld): "
        "expected (%lld, %lld, num_heads %d * kernel_size %d)",
        kName, l[0], l[1], l[2], v[0], v[1], v[2], v[0], v[1], kernel.numHeads,
        kernel.kernelSize);
  }
  CONVBERT_RETURN_IF_STATUS(readMask(context, 2, kName, v[0], v[1], mask));
  params = SpanDynamicConvParams{};
  CONVBERT_RETURN_IF_STATUS(allocateOutput(context, v[0], v[1], v[2], &params.output));
  params.value = value.data;
  params.kernelLogits = logits.data;
  params.mask = static_cast<int64_t const*>(mask.data);
  params.batch = v[0];
  params.seq = v[1];
  params.numHeads = kernel.numHeads;
  params.headDim = static_cast<int32_t>(v[2] / kernel.numHeads);
  params.kernelSize = kernel.kernelSize;
  params.dtype = kernel.dtype;
  setContiguousStrides(params);
  convbert::Status const status = validate(params);
  return status == convbert::Status::kOk ? nullptr
                                         : invalid("%s: %s", kName, statusMessage(status));
}

void runRows(void const* params, int64_t first, int64_t last) {
  runRowsOnCpu(*static_cast<SpanDynamicConvParams const*>(params), first, last,
               bestInstructionSet());
}

Status* computeOnCpu(void* kernel, KernelContext* context) {
  SpanDynamicConvParams params{};
  CONVBERT_RETURN_IF_STATUS(prepare(*static_cast<Kernel const*>(kernel), context, params));
  return forEachRows(context, params.batch * params.seq,
                     int64_t(params.numHeads) * params.headDim, runRows, &params);
}

#ifdef CONVBERT_WITH_CUDA
Status* computeOnCuda(void* kernel, KernelContext* context) {
  SpanDynamicConvParams params{};
  CONVBERT_RETURN_IF_STATUS(prepare(*static_cast<Kernel const*>(kernel), context, params));
  void* stream = nullptr;
  CONVBERT_RETURN_IF_STATUS(api().kernelContextGetGpuStream(context, &stream));
  return cudaStatus(kName, launchSpanDynamicConv(params, static_cast<cudaStream_t>(stream)));
}
#else
constexpr auto computeOnCuda = nullptr;
#endif

}  // namespace

OpSet const& spanDynamicConvOps() noexcept {
  static OpSet const kOps = makeOps({
      kName, 2, true, createKernel, [](void* kernel) { delete static_cast<Kernel*>(kernel); },
      computeOnCpu, computeOnCuda, sameShapeAsInput0,
  });
  return kOps;
}

}  // namespace convbert::ort
