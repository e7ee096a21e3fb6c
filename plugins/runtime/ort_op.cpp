#include "ort_op.h"

#include <atomic>

#ifdef CONVBERT_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace convbert::ort {
namespace {

Api const* gApi = nullptr;

}  // namespace

Api const& api() noexcept { return *gApi; }
void setApi(Api const* table) noexcept { gApi = table; }

Status* readOptionalInput(KernelContext const* context, size_t index, char const* op,
                          char const* name, size_t rank, Tensor& tensor) noexcept {
  Value const* value = nullptr;
  CONVBERT_RETURN_IF_STATUS(api().kernelContextGetInput(context, index, &value));
  if (value == nullptr) {
    return nullptr;
  }
  TensorInfo* info = nullptr;
  CONVBERT_RETURN_IF_STATUS(api().getTensorTypeAndShape(value, &info));
  size_t axes = 0;
  int64_t dims[kMaxRank] = {};
  Status* status = api().getDimensionsCount(info, &axes);
  if (status == nullptr && axes != rank) {
    status = invalid("%s: input %s has %zu axes, expected %zu", op, name, axes, rank);
  }
  if (status == nullptr) {
    status = api().getDimensions(info, dims, rank);
  }
  api().releaseTensorInfo(info);
  CONVBERT_RETURN_IF_STATUS(status);
  for (size_t axis = 0; axis < rank; ++axis) {
    tensor.dims[axis] = dims[axis];
  }
  // The C API has one accessor, for mutable data; inputs are only read.
  void* data = nullptr;
  CONVBERT_RETURN_IF_STATUS(api().getTensorMutableData(const_cast<Value*>(value), &data));
  tensor.data = data;
  return nullptr;
}

Status* readInput(KernelContext const* context, size_t index, char const* op, char const* name,
                  size_t rank, Tensor& tensor) noexcept {
  Value const* value = nullptr;
  CONVBERT_RETURN_IF_STATUS(api().kernelContextGetInput(context, index, &value));
  if (value == nullptr) {
    return invalid("%s: input %s is missing", op, name);
  }
  return readOptionalInput(context, index, op, name, rank, tensor);
}

Status* readMask(KernelContext const* context, size_t index, char const* op, long long batch,
                 long long seq, Tensor& mask) noexcept {
  CONVBERT_RETURN_IF_STATUS(readOptionalInput(context, index, op, "mask", 2, mask));
  if (mask.data != nullptr && (mask.dims[0] != batch || mask.dims[1] != seq)) {
    return invalid("%s: mask (%lld, %lld) does not fit, expected (%lld, %lld)", op, mask.dims[0],
                   mask.dims[1], batch, seq);
  }
  return nullptr;
}

Status* allocateOutput(KernelContext* context, long long batch, long long seq, long long channels,
                       void** data) noexcept {
  int64_t const dims[3] = {batch, seq, channels};
  Value* output = nullptr;
  CONVBERT_RETURN_IF_STATUS(api().kernelContextGetOutput(context, 0, dims, 3, &output));
  return api().getTensorMutableData(output, data);
}

Status* readAttribute(KernelInfo const* info, char const* op, char const* name, int64_t least,
                      int32_t& out) noexcept {
  int64_t value = 0;
  CONVBERT_RETURN_IF_STATUS(api().kernelInfoGetInt64(info, name, &value));
  if (value < least || value > 65536) {
    return invalid("%s: %s is %lld, expected %lld or more", op, name,
                   static_cast<long long>(value), static_cast<long long>(least));
  }
  out = static_cast<int32_t>(value);
  return nullptr;
}

Status* readKernelSize(KernelInfo const* info, char const* op, int32_t& out) noexcept {
  CONVBERT_RETURN_IF_STATUS(readAttribute(info, op, "kernel_size", 1, out));
  if (out % 2 == 0 || out > kMaxKernelSize) {
    return invalid("%s: kernel_size is %d, expected an odd number up to %d", op, out,
                   kMaxKernelSize);
  }
  return nullptr;
}

namespace {

struct RowsTask {
  void (*run)(void const*, int64_t, int64_t);
  void const* data;
  int64_t rows;
  int64_t rowsPerPart;
};

void runPart(void* data, size_t part) {
  RowsTask const& task = *static_cast<RowsTask const*>(data);
  int64_t const first = static_cast<int64_t>(part) * task.rowsPerPart;
  int64_t const last = first + task.rowsPerPart;
  task.run(task.data, first, last < task.rows ? last : task.rows);
}

}  // namespace

Status* forEachRows(KernelContext const* context, int64_t rows, int64_t elements,
                    void (*run)(void const* data, int64_t first, int64_t last), void const* data) {
  if (rows == 0) {
    return nullptr;
  }
  // About 5 microseconds of work a part: less would cost more to hand out than to do.
  RowsTask task{run, data, rows, (8192 + elements - 1) / elements};
  task.rowsPerPart = (task.rowsPerPart + 31) / 32 * 32;
  int64_t const parts = (rows + task.rowsPerPart - 1) / task.rowsPerPart;
  if (parts == 1) {
    runPart(&task, 0);
    return nullptr;
  }
  return api().kernelContextParallelFor(context, runPart, static_cast<size_t>(parts), 0, &task);
}

// An axis that is neither a number nor a name would be handed on as the number -1, and without an
// answer ONNX Runtime knows no shape from here on (and leaves its fusions out). So it gets a name of
// its own: one name for two axes would claim that they are equal.
Status* shapeLikeInput0(ShapeInferContext* context, bool otherFirstAxis) {
  TensorInfo* input = nullptr;
  // The type too is the input's: `op` may be the descriptor of another element type.
  ElementType elementType = kUndefined;
  CONVBERT_RETURN_IF_STATUS(api().shapeInferGetInput(context, 0, &input));
  size_t rank = 0;
  CONVBERT_RETURN_IF_STATUS(api().getTensorElementType(input, &elementType));
  CONVBERT_RETURN_IF_STATUS(api().getDimensionsCount(input, &rank));
  if (rank == 0 || rank > kMaxRank) {
    return nullptr;  // unknown, or refused when the kernel runs
  }
  int64_t dims[kMaxRank];
  char const* names[kMaxRank] = {};
  CONVBERT_RETURN_IF_STATUS(api().getDimensions(input, dims, rank));
  CONVBERT_RETURN_IF_STATUS(api().getSymbolicDimensions(input, names, rank));
  if (otherFirstAxis) {
    dims[0] = -1;
    names[0] = nullptr;
  }
  static std::atomic<unsigned> unnamed{0};
  char made[kMaxRank][32];
  for (size_t axis = 0; axis < rank; ++axis) {
    if (names[axis] == nullptr || names[axis][0] == '\0') {
      made[axis][0] = '\0';
      if (dims[axis] < 0) {
        snprintf(made[axis], sizeof(made[axis]), "convbert_axis_%u", unnamed.fetch_add(1));
      }
      names[axis] = made[axis];
    }
  }
  TensorInfo* output = nullptr;
  CONVBERT_RETURN_IF_STATUS(api().createTensorInfo(&output));
  Status* status = api().setTensorElementType(output, elementType);
  status = status != nullptr ? status : api().setDimensions(output, dims, rank);
  status = status != nullptr ? status : api().setSymbolicDimensions(output, names, rank);
  status = status != nullptr ? status : api().shapeInferSetOutput(context, 0, output);
  api().releaseTensorInfo(output);
  return status;
}

Status* sameShapeAsInput0(CustomOp const*, ShapeInferContext* context) {
  return shapeLikeInput0(context, false);
}

CustomOp cpuOp() noexcept {
  CustomOp op{};
  op.version = kApiVersion;
  op.getExecutionProviderType = [](CustomOp const*) { return "CPUExecutionProvider"; };
  op.getInputCharacteristic = [](CustomOp const*, size_t) { return kRequired; };
  op.getInputMemoryType = [](CustomOp const*, size_t) { return kMemoryDefault; };
  op.getOutputTypeCount = [](CustomOp const*) -> size_t { return 1; };
  op.getOutputType = [](CustomOp const*, size_t) { return kFloat; };
  op.getOutputCharacteristic = [](CustomOp const*, size_t) { return kRequired; };
  op.getVariadicInputMinArity = [](CustomOp const*) { return 1; };
  op.getVariadicInputHomogeneity = [](CustomOp const*) { return 1; };
  op.getVariadicOutputMinArity = op.getVariadicInputMinArity;
  op.getVariadicOutputHomogeneity = op.getVariadicInputHomogeneity;
  op.getStartVersion = [](CustomOp const*) { return 1; };
  op.getEndVersion = [](CustomOp const*) { return INT32_MAX; };
  return op;
}

OpSet makeOps(OpTraits const& traits) noexcept {
  struct Variant {
    DataType dtype;
    ElementType elementType;
  };
  constexpr Variant kVariants[] = {{DataType::kFloat32, kFloat},
                                   {DataType::kFloat16, kFloat16},
                                   {DataType::kBFloat16, kBFloat16}};
  OpSet set{};
  for (bool cuda : {false, true}) {
    if (cuda && traits.computeOnCuda == nullptr) {
      continue;
    }
    for (Variant const& variant : kVariants) {
      Op& op = set.ops[set.count++];
      static_cast<CustomOp&>(op) = cpuOp();
      op.name = traits.name;
      op.provider = cuda ? "CUDAExecutionProvider" : "CPUExecutionProvider";
      op.elementType = variant.elementType;
      op.dtype = variant.dtype;
      op.inputs = traits.inputs;
      op.hasMask = traits.hasMask;
      op.getName = [](CustomOp const* it) { return self(it).name; };
      op.getExecutionProviderType = [](CustomOp const* it) { return self(it).provider; };
      op.getInputTypeCount = [](CustomOp const* it) -> size_t {
        return self(it).inputs + (self(it).hasMask ? 1 : 0);
      };
      op.getInputType = [](CustomOp const* it, size_t index) {
        return index < self(it).inputs ? self(it).elementType : kInt64;
      };
      op.getInputCharacteristic = [](CustomOp const* it, size_t index) {
        return index < self(it).inputs ? kRequired : kOptional;
      };
      op.getOutputType = [](CustomOp const* it, size_t) { return self(it).elementType; };
      op.createKernelV2 = traits.createKernel;
      op.kernelDestroy = traits.destroyKernel;
      op.kernelComputeV2 = cuda ? traits.computeOnCuda : traits.computeOnCpu;
      op.inferOutputShape = traits.inferShape;
    }
  }
  return set;
}

#ifdef CONVBERT_WITH_CUDA
Status* cudaStatus(char const* op, int error) noexcept {
  if (error == cudaSuccess) {
    return nullptr;
  }
  char message[256];
  snprintf(message, sizeof(message), "%s: CUDA: %s", op,
           cudaGetErrorString(static_cast<cudaError_t>(error)));
  return api().createStatus(kEpFail, message);
}
#endif

}  // namespace convbert::ort
