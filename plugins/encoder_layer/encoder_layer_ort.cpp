// EncoderLayer as an ONNX Runtime custom op. Weights are used where ONNX Runtime keeps them.
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "../runtime/ort_ops.h"
#include "encoder_layer.h"

namespace convbert::ort {
namespace {

constexpr char const* kName = "EncoderLayer";
constexpr char const* kFirstRowOnly = "first_row_only";
constexpr char const* kThreadsKey = "custom_op.EncoderLayer.threads";
constexpr char const* kTimesKey = "custom_op.EncoderLayer.times";

// Inputs by index. The optional one is the last, so that a node without it ends before it: ONNX
// Runtime up to 1.23 crashes on a custom operator with an input that is named "".
enum Input : size_t {
  kRows = 0,
  kRowStarts = 1,
  kProjectionsWeight = 2,
  kDepthwise = 4,
  kPointwiseWeight = 5,
  kGeneratorWeight = 7,
  kAttentionOutputWeight = 9,
  kAttentionGamma = 11,
  kAttentionBeta = 12,
  kUpWeight = 13,
  kDownWeight = 15,
  kOutputGamma = 17,
  kOutputBeta = 18,
  kMask = 19,
  kInputs = 20,
};

// Each weight, its bias the input after it; in the order of LinearIndex.
constexpr size_t kWeightInputs[kLinears] = {kProjectionsWeight, kPointwiseWeight,
                                            kGeneratorWeight,   kAttentionOutputWeight,
                                            kUpWeight,          kDownWeight};

constexpr bool isWeight(size_t index) {
  for (size_t weight : kWeightInputs) {
    if (weight == index) {
      return true;
    }
  }
  return false;
}

// A session's descriptor knows how many threads the session has, and the file into which its kernels
// write their times when it is closed (none if empty).
struct LayerOp : CustomOp {
  int32_t threads;
  char timesFile[1024];
};

struct Kernel {
  int32_t numHeads;
  int32_t kernelSize;
  int32_t halfAttention;
  int32_t firstRowOnly;
  float epsilon;
  int32_t threads;
  char const* timesFile;  // null: not timed
  char name[256];
  PartTimes times;
};

Status* createKernel(CustomOp const* op, Api const*, KernelInfo const* info, void** out) {
  Kernel kernel{};
  auto const& layerOp = *static_cast<LayerOp const*>(op);
  kernel.threads = layerOp.threads;
  if (layerOp.timesFile[0] != '\0') {
    kernel.timesFile = layerOp.timesFile;
    size_t size = sizeof(kernel.name);
    CONVBERT_RETURN_IF_STATUS(api().kernelInfoGetNodeName(info, kernel.name, &size));
  }
  CONVBERT_RETURN_IF_STATUS(readAttribute(info, kName, "num_heads", 1, kernel.numHeads));
  CONVBERT_RETURN_IF_STATUS(readKernelSize(info, kName, kernel.kernelSize));
  CONVBERT_RETURN_IF_STATUS(readAttribute(info, kName, "attention", 0, kernel.halfAttention));
  CONVBERT_RETURN_IF_STATUS(readAttribute(info, kName, kFirstRowOnly, 0, kernel.firstRowOnly));
  CONVBERT_RETURN_IF_STATUS(api().kernelInfoGetFloat(info, "epsilon", &kernel.epsilon));
  if (!(kernel.epsilon > 0) || kernel.halfAttention > 1 || kernel.firstRowOnly > 1) {
    return invalid("%s: epsilon %g, attention %d and first_row_only %d, expected a positive number "
                   "and twice 0 or 1",
                   kName, static_cast<double>(kernel.epsilon), kernel.halfAttention,
                   kernel.firstRowOnly);
  }
  *out = new (std::nothrow) Kernel(kernel);
  return *out != nullptr ? nullptr : api().createStatus(kFail, "EncoderLayer: out of memory");
}

Status* readVector(KernelContext const* context, size_t index, char const* name, int64_t length,
                   float const** data) {
  Tensor tensor;
  CONVBERT_RETURN_IF_STATUS(readInput(context, index, kName, name, 1, tensor));
  if (tensor.dims[0] != length) {
    return invalid("%s: %s has %lld elements, expected %lld", kName, name, tensor.dims[0],
                   static_cast<long long>(length));
  }
  *data = static_cast<float const*>(tensor.data);
  return nullptr;
}

// Weights and vectors; those that have no shape of their own yet are sized by the others.
Status* readParameters(KernelContext const* context, EncoderLayerParams& params,
                       EncoderLayer& layer) {
  static char const* const kNames[kLinears] = {"projections", "pointwise", "generator",
                                               "attention_output", "up", "down"};
  for (int i = 0; i < kLinears; ++i) {
    Tensor blob;
    CONVBERT_RETURN_IF_STATUS(readInput(context, kWeightInputs[i], kName, kNames[i], 1, blob));
    params.weights[i] = blob.data;
    params.weightBytes[i] = blob.dims[0];
    convbert::Status const status = parsePackedWeight(blob.data, blob.dims[0], layer.weights[i]);
    if (status != convbert::Status::kOk) {
      return invalid("%s: %s.weight: %s", kName, kNames[i], statusMessage(status));
    }
    CONVBERT_RETURN_IF_STATUS(readVector(context, kWeightInputs[i] + 1, kNames[i],
                                         allOutputs(layer.weights[i]), &params.biases[i]));
  }
  params.headDim = static_cast<int32_t>(allOutputs(layer.weights[kPointwise]) / params.numHeads);
  Tensor depthwise;
  CONVBERT_RETURN_IF_STATUS(readInput(context, kDepthwise, kName, "depthwise", 2, depthwise));
  if (depthwise.dims[0] != params.kernelSize || depthwise.dims[1] != params.hidden) {
    return invalid("%s: depthwise (%lld, %lld), expected (%d, %d)", kName, depthwise.dims[0],
                   depthwise.dims[1], params.kernelSize, params.hidden);
  }
  params.depthwise = static_cast<float const*>(depthwise.data);
  struct {
    size_t index;
    char const* name;
    float const** data;
  } const vectors[] = {{kAttentionGamma, "attention_norm.gamma", &params.attentionGamma},
                       {kAttentionBeta, "attention_norm.beta", &params.attentionBeta},
                       {kOutputGamma, "output_norm.gamma", &params.outputGamma},
                       {kOutputBeta, "output_norm.beta", &params.outputBeta}};
  for (auto const& vector : vectors) {
    CONVBERT_RETURN_IF_STATUS(
        readVector(context, vector.index, vector.name, params.hidden, vector.data));
  }
  return nullptr;
}

bool parallelFor(void* context, size_t count, void (*task)(void*, size_t), void* data) {
  if (count == 1) {
    task(data, 0);
    return true;
  }
  Status* status = api().kernelContextParallelFor(static_cast<KernelContext const*>(context), task,
                                                  count, 0, data);
  if (status != nullptr) {
    api().releaseStatus(status);
  }
  return status == nullptr;
}

Status* compute(void* kernelPointer, KernelContext* context) {
  Kernel& kernel = *static_cast<Kernel*>(kernelPointer);
  Tensor rows, starts, mask;
  CONVBERT_RETURN_IF_STATUS(readInput(context, kRows, kName, "rows", 2, rows));
  CONVBERT_RETURN_IF_STATUS(readInput(context, kRowStarts, kName, "row_starts", 1, starts));
  CONVBERT_RETURN_IF_STATUS(
      readOptionalInput(context, kMask, kName, "attention_mask", 2, mask));
  if (mask.data != nullptr && mask.dims[0] * mask.dims[1] != rows.dims[0]) {
    return invalid("%s: attention_mask (%lld, %lld) does not fit %lld rows", kName, mask.dims[0],
                   mask.dims[1], rows.dims[0]);
  }
  if (starts.dims[0] < 1 || rows.dims[1] < 1 || rows.dims[1] > INT32_MAX) {
    return invalid("%s: rows (%lld, %lld) and %lld row_starts", kName, rows.dims[0], rows.dims[1],
                   starts.dims[0]);
  }
  EncoderLayerParams params{};
  params.input = static_cast<float const*>(rows.data);
  params.rowStarts = static_cast<int64_t const*>(starts.data);
  params.mask = static_cast<int64_t const*>(mask.data);
  params.batch = starts.dims[0] - 1;
  params.rows = rows.dims[0];
  params.hidden = static_cast<int32_t>(rows.dims[1]);
  params.numHeads = kernel.numHeads;
  params.kernelSize = kernel.kernelSize;
  params.epsilon = kernel.epsilon;
  params.halfAttention = kernel.halfAttention;
  params.firstRowOnly = kernel.firstRowOnly;
  EncoderLayer layer;
  CONVBERT_RETURN_IF_STATUS(readParameters(context, params, layer));
  int64_t const dims[2] = {kernel.firstRowOnly != 0 ? params.batch : params.rows, params.hidden};
  Value* output = nullptr;
  CONVBERT_RETURN_IF_STATUS(api().kernelContextGetOutput(context, 0, dims, 2, &output));
  void* data = nullptr;
  CONVBERT_RETURN_IF_STATUS(api().getTensorMutableData(output, &data));
  params.output = static_cast<float*>(data);
  convbert::Status status = prepare(params, layer);
  if (status == convbert::Status::kOk) {
    status = runOnCpu(layer, {parallelFor, context, kernel.threads}, bestInstructionSet(),
                      kernel.timesFile != nullptr ? &kernel.times : nullptr);
  }
  return status == convbert::Status::kOk ? nullptr : invalid("%s: %s", kName, statusMessage(status));
}

// A line for each part: node, part, nanoseconds, with tabs between.
void writeTimes(Kernel const& kernel) {
  FILE* file = fopen(kernel.timesFile, "a");
  if (file == nullptr) {
    return;
  }
  for (int part = 0; part < kParts; ++part) {
    fprintf(file, "%s\t%s\t%lld\n", kernel.name, kPartNames[part],
            static_cast<long long>(kernel.times.nanoseconds[part]));
  }
  fclose(file);
}

void destroyKernel(void* pointer) {
  auto const* kernel = static_cast<Kernel const*>(pointer);
  if (kernel->timesFile != nullptr) {
    writeTimes(*kernel);
  }
  delete kernel;
}

Status* inferShape(CustomOp const*, ShapeInferContext* context) {
  OpAttr const* attribute = nullptr;
  int64_t firstRowOnly = 0;
  size_t size = 0;
  CONVBERT_RETURN_IF_STATUS(api().shapeInferGetAttribute(context, kFirstRowOnly, &attribute));
  CONVBERT_RETURN_IF_STATUS(
      api().readOpAttr(attribute, kAttrInt, &firstRowOnly, sizeof(firstRowOnly), &size));
  return shapeLikeInput0(context, firstRowOnly != 0);
}

LayerOp describe() {
  LayerOp op{};
  static_cast<CustomOp&>(op) = cpuOp();
  op.getName = [](CustomOp const*) { return kName; };
  op.getInputTypeCount = [](CustomOp const*) -> size_t { return kInputs; };
  op.getInputType = [](CustomOp const*, size_t index) {
    return index == kRowStarts || index == kMask ? kInt64 : isWeight(index) ? kUint8 : kFloat;
  };
  op.getInputCharacteristic = [](CustomOp const*, size_t index) {
    return index == kMask ? kOptional : kRequired;
  };
  op.createKernelV2 = createKernel;
  op.kernelDestroy = destroyKernel;
  op.kernelComputeV2 = compute;
  op.inferOutputShape = inferShape;
  return op;
}

// The session's entry `key`; empty if it has none or one that is too long.
template <size_t kSize>
void readConfig(SessionOptions const* options, char const* key, char (&text)[kSize]) {
  size_t size = kSize;
  Status* status = api().getSessionConfigEntry(options, key, text, &size);
  if (status != nullptr) {
    api().releaseStatus(status);
    text[0] = '\0';
  }
}

// What the session's owner says, or as many as ONNX Runtime would take.
int32_t threadsOf(SessionOptions const* options) {
  char text[16];
  readConfig(options, kThreadsKey, text);
  if (int const threads = std::atoi(text); threads > 0) {
    return threads;
  }
  unsigned const here = std::thread::hardware_concurrency();
  return here > 0 ? static_cast<int32_t>(here) : 1;
}

}  // namespace

CustomOp const* encoderLayerOp(SessionOptions const* options) noexcept {
  auto* op = new (std::nothrow) LayerOp(describe());
  if (op != nullptr) {
    op->threads = threadsOf(options);
    readConfig(options, kTimesKey, op->timesFile);
  }
  return op;
}

}  // namespace convbert::ort
