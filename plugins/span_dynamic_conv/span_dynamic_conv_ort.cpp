// SpanDynamicConv as an ONNX Runtime custom op. Reads shapes, refuses bad ones, calls the kernel.
#include <cstdio>
#include <new>

#include "../runtime/ort_ops.h"
#include "span_dynamic_conv.h"

namespace convbert::ort {
namespace {

Api const* gApi = nullptr;

#define CONVBERT_RETURN_IF_STATUS(expression)      \
  do {                                             \
    if (Status* convbertStatus_ = (expression)) {  \
      return convbertStatus_;                      \
    }                                              \
  } while (false)

template <typename... Arguments>
Status* invalid(char const* format, Arguments... arguments) noexcept {
  char message[256];
  snprintf(message, sizeof(message), format, arguments...);
  return gApi->createStatus(kInvalidArgument, message);
}

struct Kernel {
  int32_t numHeads;
  int32_t kernelSize;
  DataType dtype;
};

struct Tensor {
  void const* data = nullptr;
  int64_t dims[3] = {0, 0, 0};
};

Status* readInput(KernelContext const* context, size_t index, char const* name,
                  Tensor& tensor) noexcept {
  Value const* value = nullptr;
  CONVBERT_RETURN_IF_STATUS(gApi->kernelContextGetInput(context, index, &value));
  if (value == nullptr) {
    return invalid("SpanDynamicConv: input %s is missing", name);
  }
  TensorInfo* info = nullptr;
  CONVBERT_RETURN_IF_STATUS(gApi->getTensorTypeAndShape(value, &info));
  size_t rank = 0;
  Status* status = gApi->getDimensionsCount(info, &rank);
  if (status == nullptr && rank != 3) {
    status = invalid("SpanDynamicConv: %s has %zu axes, expected 3 (batch, seq, channels)", name,
                     rank);
  }
  if (status == nullptr) {
    status = gApi->getDimensions(info, tensor.dims, 3);
  }
  gApi->releaseTensorInfo(info);
  CONVBERT_RETURN_IF_STATUS(status);
  // The C API has one accessor, for mutable data; inputs are only read.
  void* data = nullptr;
  CONVBERT_RETURN_IF_STATUS(gApi->getTensorMutableData(const_cast<Value*>(value), &data));
  tensor.data = data;
  return nullptr;
}

Status* prepare(Kernel const& kernel, KernelContext* context,
                SpanDynamicConvParams& params) noexcept {
  Tensor value, logits;
  CONVBERT_RETURN_IF_STATUS(readInput(context, 0, "value", value));
  CONVBERT_RETURN_IF_STATUS(readInput(context, 1, "kernel_logits", logits));
  long long const* v = reinterpret_cast<long long const*>(value.dims);
  long long const* l = reinterpret_cast<long long const*>(logits.dims);
  int64_t const taps = int64_t(kernel.numHeads) * kernel.kernelSize;
  if (value.dims[2] <= 0 || value.dims[2] % kernel.numHeads != 0 ||
      value.dims[2] / kernel.numHeads > INT32_MAX) {
    return invalid("SpanDynamicConv: value (%lld, %lld, %lld) does not divide into num_heads %d",
                   v[0], v[1], v[2], kernel.numHeads);
  }
  if (logits.dims[0] != value.dims[0] || logits.dims[1] != value.dims[1] ||
      logits.dims[2] != taps) {
    return invalid(
        "SpanDynamicConv: kernel_logits (%lld, %lld, %lld) does not fit value (%lld, %lld, %lld): "
        "expected (%lld, %lld, num_heads %d * kernel_size %d)",
        l[0], l[1], l[2], v[0], v[1], v[2], v[0], v[1], kernel.numHeads, kernel.kernelSize);
  }
  Value* output = nullptr;
  void* data = nullptr;
  CONVBERT_RETURN_IF_STATUS(gApi->kernelContextGetOutput(context, 0, value.dims, 3, &output));
  CONVBERT_RETURN_IF_STATUS(gApi->getTensorMutableData(output, &data));
  params = SpanDynamicConvParams{};
  params.value = value.data;
  params.kernelLogits = logits.data;
  params.output = data;
  params.batch = value.dims[0];
  params.seq = value.dims[1];
  params.numHeads = kernel.numHeads;
  params.headDim = static_cast<int32_t>(value.dims[2] / kernel.numHeads);
  params.kernelSize = kernel.kernelSize;
  params.dtype = kernel.dtype;
  setContiguousStrides(params);
  convbert::Status const status = validate(params);
  return status == convbert::Status::kOk ? nullptr
                                         : invalid("SpanDynamicConv: %s", statusMessage(status));
}

struct CpuTask {
  SpanDynamicConvParams params;
  InstructionSet instructionSet;
  int64_t rows;
  int64_t rowsPerPart;
};

void runPart(void* data, size_t part) {
  CpuTask const& task = *static_cast<CpuTask const*>(data);
  int64_t const first = static_cast<int64_t>(part) * task.rowsPerPart;
  int64_t const last = first + task.rowsPerPart;
  runRowsOnCpu(task.params, first, last < task.rows ? last : task.rows, task.instructionSet);
}

Status* computeOnCpu(void* kernel, KernelContext* context) {
  CpuTask task{};
  CONVBERT_RETURN_IF_STATUS(prepare(*static_cast<Kernel const*>(kernel), context, task.params));
  task.instructionSet = bestInstructionSet();
  task.rows = task.params.batch * task.params.seq;
  if (task.rows == 0) {
    return nullptr;
  }
  // About 5 microseconds of work a part: less would cost more to hand out than to do.
  int64_t const width = int64_t(task.params.numHeads) * task.params.headDim;
  task.rowsPerPart = (8192 + width - 1) / width;
  task.rowsPerPart = (task.rowsPerPart + 31) / 32 * 32;
  int64_t const parts = (task.rows + task.rowsPerPart - 1) / task.rowsPerPart;
  if (parts == 1) {
    runPart(&task, 0);
    return nullptr;
  }
  return gApi->kernelContextParallelFor(context, runPart, static_cast<size_t>(parts), 0, &task);
}

#ifdef CONVBERT_WITH_CUDA
Status* computeOnCuda(void* kernel, KernelContext* context) {
  SpanDynamicConvParams params{};
  CONVBERT_RETURN_IF_STATUS(prepare(*static_cast<Kernel const*>(kernel), context, params));
  void* stream = nullptr;
  CONVBERT_RETURN_IF_STATUS(gApi->kernelContextGetGpuStream(context, &stream));
  cudaError_t const error = launchSpanDynamicConv(params, static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) {
    char message[256];
    snprintf(message, sizeof(message), "SpanDynamicConv: CUDA: %s", cudaGetErrorString(error));
    return gApi->createStatus(kEpFail, message);
  }
  return nullptr;
}
#endif

struct Op : CustomOp {
  DataType dtype;
  ElementType elementType;
  char const* provider;
};

Op const& self(CustomOp const* op) noexcept { return *static_cast<Op const*>(op); }

Status* readAttribute(KernelInfo const* info, char const* name, int32_t& out) noexcept {
  int64_t value = 0;
  CONVBERT_RETURN_IF_STATUS(gApi->kernelInfoGetInt64(info, name, &value));
  if (value < 1 || value > 65536) {
    return invalid("SpanDynamicConv: %s is %lld, expected 1 or more", name,
                   static_cast<long long>(value));
  }
  out = static_cast<int32_t>(value);
  return nullptr;
}

Status* createKernel(CustomOp const* op, Api const*, KernelInfo const* info, void** out) {
  Kernel kernel{0, 0, self(op).dtype};
  CONVBERT_RETURN_IF_STATUS(readAttribute(info, "num_heads", kernel.numHeads));
  CONVBERT_RETURN_IF_STATUS(readAttribute(info, "kernel_size", kernel.kernelSize));
  if (kernel.kernelSize % 2 == 0 || kernel.kernelSize > kMaxKernelSize) {
    return invalid("SpanDynamicConv: kernel_size is %d, expected an odd number up to %d",
                   kernel.kernelSize, kMaxKernelSize);
  }
  *out = new (std::nothrow) Kernel(kernel);
  return *out != nullptr ? nullptr : gApi->createStatus(kFail, "SpanDynamicConv: out of memory");
}

// The output has the shape and the type of `value`, symbolic axes included. An axis that is neither a
// number nor a name comes back from ONNX Runtime as -1, and would be handed on as the number -1: then
// nothing is said about the output, which is always right.
Status* inferShape(CustomOp const*, ShapeInferContext* context) {
  TensorInfo* info = nullptr;
  CONVBERT_RETURN_IF_STATUS(gApi->shapeInferGetInput(context, 0, &info));
  size_t rank = 0;
  CONVBERT_RETURN_IF_STATUS(gApi->getDimensionsCount(info, &rank));
  int64_t dims[3];
  char const* names[3] = {};
  if (rank != 3) {
    return nullptr;
  }
  CONVBERT_RETURN_IF_STATUS(gApi->getDimensions(info, dims, rank));
  CONVBERT_RETURN_IF_STATUS(gApi->getSymbolicDimensions(info, names, rank));
  for (size_t axis = 0; axis < rank; ++axis) {
    bool const named = names[axis] != nullptr && names[axis][0] != '\0';
    if (dims[axis] < 0 && !named) {
      return nullptr;
    }
  }
  return gApi->shapeInferSetOutput(context, 0, info);
}

Op makeOp(DataType dtype, ElementType elementType, char const* provider,
          Status* (*compute)(void*, KernelContext*)) noexcept {
  Op op{};
  op.dtype = dtype;
  op.elementType = elementType;
  op.provider = provider;
  op.version = kApiVersion;
  op.getName = [](CustomOp const*) { return "SpanDynamicConv"; };
  op.getExecutionProviderType = [](CustomOp const* it) { return self(it).provider; };
  op.getInputType = [](CustomOp const* it, size_t) { return self(it).elementType; };
  op.getInputTypeCount = [](CustomOp const*) -> size_t { return 2; };
  op.getOutputType = op.getInputType;
  op.getOutputTypeCount = [](CustomOp const*) -> size_t { return 1; };
  op.kernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.getInputCharacteristic = [](CustomOp const*, size_t) { return kRequired; };
  op.getOutputCharacteristic = op.getInputCharacteristic;
  op.getInputMemoryType = [](CustomOp const*, size_t) { return kMemoryDefault; };
  op.getVariadicInputMinArity = [](CustomOp const*) { return 1; };
  op.getVariadicInputHomogeneity = [](CustomOp const*) { return 1; };
  op.getVariadicOutputMinArity = op.getVariadicInputMinArity;
  op.getVariadicOutputHomogeneity = op.getVariadicInputHomogeneity;
  op.createKernelV2 = createKernel;
  op.kernelComputeV2 = compute;
  op.inferOutputShape = inferShape;
  op.getStartVersion = [](CustomOp const*) { return 1; };
  op.getEndVersion = [](CustomOp const*) { return INT32_MAX; };
  return op;
}

}  // namespace

void setApi(Api const* api) noexcept { gApi = api; }

CustomOpList spanDynamicConvOps() noexcept {
  char const* const cpu = "CPUExecutionProvider";
  static Op const kCpu[] = {
      makeOp(DataType::kFloat32, kFloat, cpu, computeOnCpu),
      makeOp(DataType::kFloat16, kFloat16, cpu, computeOnCpu),
      makeOp(DataType::kBFloat16, kBFloat16, cpu, computeOnCpu),
  };
#ifdef CONVBERT_WITH_CUDA
  char const* const cuda = "CUDAExecutionProvider";
  static Op const kCuda[] = {
      makeOp(DataType::kFloat32, kFloat, cuda, computeOnCuda),
      makeOp(DataType::kFloat16, kFloat16, cuda, computeOnCuda),
      makeOp(DataType::kBFloat16, kBFloat16, cuda, computeOnCuda),
  };
  static CustomOp const* const kAll[] = {&kCpu[0],  &kCpu[1],  &kCpu[2],
                                         &kCuda[0], &kCuda[1], &kCuda[2]};
#else
  static CustomOp const* const kAll[] = {&kCpu[0], &kCpu[1], &kCpu[2]};
#endif
  return {kAll, sizeof(kAll) / sizeof(kAll[0])};
}

}  // namespace convbert::ort
