// FusedSpanDynamicConv as an ONNX Runtime custom op.
#include "../runtime/ort_ops.h"
#include "fused_span_dynamic_conv.h"

namespace convbert::ort {
namespace {

constexpr char const* kName = "FusedSpanDynamicConv";

struct Kernel {
  int32_t numHeads;
  int32_t kernelSize;
  int32_t queryOffset;
  int32_t valueOffset;
  DataType dtype;
};

Status* createKernel(CustomOp const* op, Api const*, KernelInfo const* info, void** out) {
  Kernel kernel{0, 0, 0, 0, self(op).dtype};
  CONVBERT_RETURN_IF_STATUS(readAttribute(info, kName, "num_heads", 1, kernel.numHeads));
  CONVBERT_RETURN_IF_STATUS(readKernelSize(info, kName, kernel.kernelSize));
  CONVBERT_RETURN_IF_STATUS(readAttribute(info, kName, "query_offset", 0, kernel.queryOffset));
  CONVBERT_RETURN_IF_STATUS(readAttribute(info, kName, "value_offset", 0, kernel.valueOffset));
  *out = new (std::nothrow) Kernel(kernel);
  return *out != nullptr ? nullptr
                         : api().createStatus(kFail, "FusedSpanDynamicConv: out of memory");
}

// Inputs: key_conv, projections, weight, bias, optionally mask.
Status* prepare(Kernel const& kernel, KernelContext* context,
                FusedSpanDynamicConvParams& params) noexcept {
  Tensor keyConv, projections, weight, bias, mask;
  CONVBERT_RETURN_IF_STATUS(readInput(context, 0, kName, "key_conv", 3, keyConv));
  CONVBERT_RETURN_IF_STATUS(readInput(context, 1, kName, "projections", 3, projections));
  CONVBERT_RETURN_IF_STATUS(readInput(context, 2, kName, "weight", 2, weight));
  CONVBERT_RETURN_IF_STATUS(readInput(context, 3, kName, "bias", 1, bias));
  auto const& k = keyConv.dims;
  auto const& p = projections.dims;
  long long const columns = static_cast<long long>(kernel.numHeads) * kernel.kernelSize;
  if (k[2] <= 0 || k[2] % kernel.numHeads != 0 || k[2] / kernel.numHeads > INT32_MAX) {
    return invalid("%s: key_conv (%lld, %lld, %lld) does not divide into num_heads %d", kName,
                   k[0], k[1], k[2], kernel.numHeads);
  }
  if (p[0] != k[0] || p[1] != k[1] || kernel.queryOffset + k[2] > p[2] ||
      kernel.valueOffset + k[2] > p[2]) {
    return invalid(
        "%s: projections (%lld, %lld, %lld) do not fit key_conv (%lld, %lld, %lld) with "
        "query_offset %d and value_offset %d",
        kName, p[0], p[1], p[2], k[0], k[1], k[2], kernel.queryOffset, kernel.valueOffset);
  }
  if (weight.dims[0] != k[2] || weight.dims[1] != columns || bias.dims[0] != columns) {
    return invalid("%s: weight (%lld, %lld) and bias (%lld), expected (%lld, %lld) and (%lld)",
                   kName, weight.dims[0], weight.dims[1], bias.dims[0], k[2], columns, columns);
  }
  CONVBERT_RETURN_IF_STATUS(readMask(context, 4, kName, k[0], k[1], mask));
  void* output = nullptr;
  CONVBERT_RETURN_IF_STATUS(allocateOutput(context, k[0], k[1], k[2], &output));
  params.conv.mask = static_cast<int64_t const*>(mask.data);
  params.conv.numHeads = kernel.numHeads;
  params.conv.headDim = static_cast<int32_t>(k[2] / kernel.numHeads);
  params.conv.kernelSize = kernel.kernelSize;
  params.conv.dtype = kernel.dtype;
  setOperands(params, {k[0], k[1], p[2], kernel.queryOffset, kernel.valueOffset}, keyConv.data,
              projections.data, weight.data, bias.data, output);
  convbert::Status const status = validate(params);
  return status == convbert::Status::kOk ? nullptr
                                         : invalid("%s: %s", kName, statusMessage(status));
}

void runRows(void const* params, int64_t first, int64_t last) {
  runRowsOnCpu(*static_cast<FusedSpanDynamicConvParams const*>(params), first, last,
               bestInstructionSet());
}

Status* computeOnCpu(void* kernel, KernelContext* context) {
  FusedSpanDynamicConvParams params{};
  CONVBERT_RETURN_IF_STATUS(prepare(*static_cast<Kernel const*>(kernel), context, params));
  SpanDynamicConvParams const& conv = params.conv;
  return forEachRows(context, conv.batch * conv.seq, int64_t(conv.numHeads) * conv.headDim, runRows,
                     &params);
}

#ifdef CONVBERT_WITH_CUDA
Status* computeOnCuda(void* kernel, KernelContext* context) {
  FusedSpanDynamicConvParams params{};
  CONVBERT_RETURN_IF_STATUS(prepare(*static_cast<Kernel const*>(kernel), context, params));
  void* stream = nullptr;
  CONVBERT_RETURN_IF_STATUS(api().kernelContextGetGpuStream(context, &stream));
  return cudaStatus(kName, launchFusedSpanDynamicConv(params, static_cast<cudaStream_t>(stream)));
}
#else
constexpr auto computeOnCuda = nullptr;
#endif

}  // namespace

OpSet const& fusedSpanDynamicConvOps() noexcept {
  static OpSet const kOps = makeOps({
      kName, 4, true, createKernel, [](void* kernel) { delete static_cast<Kernel*>(kernel); },
      computeOnCpu, computeOnCuda, sameShapeAsInput0,
  });
  return kOps;
}

}  // namespace convbert::ort
