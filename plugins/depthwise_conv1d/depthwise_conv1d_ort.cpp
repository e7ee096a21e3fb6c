// DepthwiseConv1D as an ONNX Runtime custom op. Reads shapes, refuses bad ones, calls the kernel.
#include "../runtime/ort_ops.h"
#include "depthwise_conv1d.h"

namespace convbert::ort {
namespace {

constexpr char const* kName = "DepthwiseConv1D";

// No attributes, no state: the element type, which the op holds, is all a kernel needs.
Status* createKernel(CustomOp const* op, Api const*, KernelInfo const*, void** out) {
  *out = const_cast<CustomOp*>(op);
  return nullptr;
}

DataType typeOf(void const* kernel) { return self(static_cast<CustomOp const*>(kernel)).dtype; }

// Inputs: input, weight, optionally mask.
Status* prepare(DataType dtype, KernelContext* context, DepthwiseConv1dParams& params) noexcept {
  Tensor input, weight, mask;
  CONVBERT_RETURN_IF_STATUS(readInput(context, 0, kName, "input", 3, input));
  CONVBERT_RETURN_IF_STATUS(readInput(context, 1, kName, "weight", 2, weight));
  auto const& x = input.dims;
  auto const& w = weight.dims;
  if (w[0] < 1 || w[0] % 2 == 0 || w[0] > kMaxKernelSize) {
    return invalid("%s: weight (%lld, %lld): kernel_size is %lld, expected an odd number up to %d",
                   kName, w[0], w[1], w[0], kMaxKernelSize);
  }
  if (x[2] <= 0 || x[2] > INT32_MAX || w[1] != x[2]) {
    return invalid(
        "%s: weight (%lld, %lld) does not fit input (%lld, %lld, %lld): expected "
        "(kernel_size, %lld)",
        kName, w[0], w[1], x[0], x[1], x[2], x[2]);
  }
  CONVBERT_RETURN_IF_STATUS(readMask(context, 2, kName, x[0], x[1], mask));
  params = DepthwiseConv1dParams{};
  CONVBERT_RETURN_IF_STATUS(allocateOutput(context, x[0], x[1], x[2], &params.output));
  params.input = input.data;
  params.weight = weight.data;
  params.mask = static_cast<int64_t const*>(mask.data);
  params.batch = x[0];
  params.seq = x[1];
  params.channels = static_cast<int32_t>(x[2]);
  params.kernelSize = static_cast<int32_t>(w[0]);
  params.dtype = dtype;
  setContiguousStrides(params);
  convbert::Status const status = validate(params);
  return status == convbert::Status::kOk ? nullptr
                                         : invalid("%s: %s", kName, statusMessage(status));
}

void runRows(void const* params, int64_t first, int64_t last) {
  runRowsOnCpu(*static_cast<DepthwiseConv1dParams const*>(params), first, last,
               bestInstructionSet());
}

Status* computeOnCpu(void* kernel, KernelContext* context) {
  DepthwiseConv1dParams params{};
  CONVBERT_RETURN_IF_STATUS(prepare(typeOf(kernel), context, params));
  return forEachRows(context, params.batch * params.seq, params.channels, runRows, &params);
}

#ifdef CONVBERT_WITH_CUDA
Status* computeOnCuda(void* kernel, KernelContext* context) {
  DepthwiseConv1dParams params{};
  CONVBERT_RETURN_IF_STATUS(prepare(typeOf(kernel), context, params));
  void* stream = nullptr;
  CONVBERT_RETURN_IF_STATUS(api().kernelContextGetGpuStream(context, &stream));
  return cudaStatus(kName, launchDepthwiseConv1d(params, static_cast<cudaStream_t>(stream)));
}
#else
constexpr auto computeOnCuda = nullptr;
#endif

}  // namespace

OpSet const& depthwiseConv1dOps() noexcept {
  static OpSet const kOps = makeOps({
      kName, 2, true, createKernel, [](void*) {}, computeOnCpu, computeOnCuda, sameShapeAsInput0,
  });
  return kOps;
}

}  // namespace convbert::ort
