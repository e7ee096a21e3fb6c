// SpanDynamicConv as a TensorRT IPluginV3. Describes shapes and types, calls the launcher.
#include <cstdio>
#include <cstring>
#include <new>

#include "../runtime/trt_log.h"
#include "span_dynamic_conv.h"

namespace convbert::trt {
namespace {

using namespace nvinfer1;

constexpr char const* kName = "SpanDynamicConv";
constexpr char const* kVersion = "1";
constexpr char const* kNamespace = "";

template <typename... Arguments>
void error(char const* format, Arguments... arguments) noexcept {
  char message[320];
  snprintf(message, sizeof(message), format, arguments...);
  logError(message);
}

bool isOurType(nvinfer1::DataType type) noexcept {
  return type == nvinfer1::DataType::kFLOAT || type == nvinfer1::DataType::kHALF ||
         type == nvinfer1::DataType::kBF16;
}

convbert::DataType kernelType(nvinfer1::DataType type) noexcept {
  return type == nvinfer1::DataType::kFLOAT  ? convbert::DataType::kFloat32
         : type == nvinfer1::DataType::kHALF ? convbert::DataType::kFloat16
                                             : convbert::DataType::kBFloat16;
}

class SpanDynamicConvPlugin final : public IPluginV3,
                                    public IPluginV3OneCore,
                                    public IPluginV3OneBuild,
                                    public IPluginV3OneRuntime {
 public:
  SpanDynamicConvPlugin(int32_t numHeads, int32_t kernelSize) noexcept
      : numHeads_(numHeads), kernelSize_(kernelSize) {}

  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    switch (type) {
      case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
      case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
      case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
    }
    return nullptr;
  }

  IPluginV3* clone() noexcept override {
    return new (std::nothrow) SpanDynamicConvPlugin(numHeads_, kernelSize_);
  }

  AsciiChar const* getPluginName() const noexcept override { return kName; }
  AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
  AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t getNbOutputs() const noexcept override { return 1; }

  int32_t configurePlugin(DynamicPluginTensorDesc const* in, int32_t inputs,
                          DynamicPluginTensorDesc const*, int32_t outputs) noexcept override {
    return inputs == 2 && outputs == 1 && checkDims(in[0].max, in[1].max) ? 0 : -1;
  }

  bool supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* inOut,
                                 int32_t inputs, int32_t outputs) noexcept override {
    if (inputs != 2 || outputs != 1 || position < 0 || position > 2) {
      return false;
    }
    PluginTensorDesc const& desc = inOut[position].desc;
    return desc.format == PluginFormat::kLINEAR && isOurType(desc.type) &&
           desc.type == inOut[0].desc.type;
  }

  int32_t getOutputDataTypes(nvinfer1::DataType* out, int32_t outputs,
                             nvinfer1::DataType const* in, int32_t inputs) const noexcept override {
    if (inputs != 2 || outputs != 1) {
      return -1;
    }
    if (!isOurType(in[0]) || in[0] != in[1]) {
      error("SpanDynamicConv: value and kernel_logits must share one of fp32, fp16, bf16");
      return -1;
    }
    out[0] = in[0];
    return 0;
  }

  int32_t getOutputShapes(DimsExprs const* in, int32_t inputs, DimsExprs const*, int32_t,
                          DimsExprs* out, int32_t outputs, IExprBuilder&) noexcept override {
    if (inputs != 2 || outputs != 1) {
      error("SpanDynamicConv: %d inputs and %d outputs, expected 2 and 1", inputs, outputs);
      return -1;
    }
    Dims dims[2];
    for (int32_t i = 0; i < 2; ++i) {
      dims[i].nbDims = in[i].nbDims;
      for (int32_t d = 0; d < in[i].nbDims && d < Dims::MAX_DIMS; ++d) {
        bool const known = in[i].d[d] != nullptr && in[i].d[d]->isConstant();
        dims[i].d[d] = known ? in[i].d[d]->getConstantValue() : -1;
      }
    }
    if (!checkDims(dims[0], dims[1])) {
      return -1;
    }
    out[0] = in[0];
    return 0;
  }

  size_t getWorkspaceSize(DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*,
                          int32_t) const noexcept override {
    return 0;
  }

  int32_t onShapeChange(PluginTensorDesc const* in, int32_t inputs, PluginTensorDesc const*,
                        int32_t outputs) noexcept override {
    return inputs == 2 && outputs == 1 && checkDims(in[0].dims, in[1].dims) ? 0 : -1;
  }

  // Nothing is kept per context: shapes arrive with every enqueue.
  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

  PluginFieldCollection const* getFieldsToSerialize() noexcept override {
    fields_[0] = PluginField("num_heads", &numHeads_, PluginFieldType::kINT32, 1);
    fields_[1] = PluginField("kernel_size", &kernelSize_, PluginFieldType::kINT32, 1);
    collection_.nbFields = 2;
    collection_.fields = fields_;
    return &collection_;
  }

  int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs,
                  void* const* outputs, void*, cudaStream_t stream) noexcept override {
    if (!isOurType(in[0].type) || !checkDims(in[0].dims, in[1].dims)) {
      return -1;
    }
    SpanDynamicConvParams params{};
    params.value = inputs[0];
    params.kernelLogits = inputs[1];
    params.output = outputs[0];
    params.batch = in[0].dims.d[0];
    params.seq = in[0].dims.d[1];
    params.numHeads = numHeads_;
    params.headDim = static_cast<int32_t>(in[0].dims.d[2] / numHeads_);
    params.kernelSize = kernelSize_;
    params.dtype = kernelType(in[0].type);
    setContiguousStrides(params);
    cudaError_t const status = launchSpanDynamicConv(params, stream);
    if (status != cudaSuccess) {
      error("SpanDynamicConv: CUDA: %s", cudaGetErrorString(status));
      return -1;
    }
    return 0;
  }

 private:
  // Extents of -1 are not known yet and fit anything.
  bool checkDims(Dims const& value, Dims const& logits) const noexcept {
    if (value.nbDims != 3 || logits.nbDims != 3) {
      error("SpanDynamicConv: value has %d axes and kernel_logits %d, expected 3 and 3",
            value.nbDims, logits.nbDims);
      return false;
    }
    long long const width = value.d[2], taps = logits.d[2];
    if (width >= 0 && (width == 0 || width % numHeads_ != 0)) {
      error("SpanDynamicConv: %lld channels do not divide into num_heads %d", width, numHeads_);
      return false;
    }
    if (taps >= 0 && taps != static_cast<long long>(numHeads_) * kernelSize_) {
      error("SpanDynamicConv: kernel_logits has %lld channels, expected num_heads %d * "
            "kernel_size %d", taps, numHeads_, kernelSize_);
      return false;
    }
    for (int32_t axis = 0; axis < 2; ++axis) {
      if (value.d[axis] >= 0 && logits.d[axis] >= 0 && value.d[axis] != logits.d[axis]) {
        error("SpanDynamicConv: value and kernel_logits differ on axis %d: %lld and %lld", axis,
              static_cast<long long>(value.d[axis]), static_cast<long long>(logits.d[axis]));
        return false;
      }
    }
    return true;
  }

  int32_t numHeads_;
  int32_t kernelSize_;
  PluginField fields_[2];
  PluginFieldCollection collection_{};
};

class SpanDynamicConvCreator final : public IPluginCreatorV3One {
 public:
  SpanDynamicConvCreator() noexcept {
    fields_[0] = PluginField("num_heads", nullptr, PluginFieldType::kINT32, 1);
    fields_[1] = PluginField("kernel_size", nullptr, PluginFieldType::kINT32, 1);
    collection_.nbFields = 2;
    collection_.fields = fields_;
  }

  AsciiChar const* getPluginName() const noexcept override { return kName; }
  AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
  AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }
  PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }

  IPluginV3* createPlugin(AsciiChar const* name, PluginFieldCollection const* fields,
                          TensorRTPhase) noexcept override {
    int32_t numHeads = 0;
    int32_t kernelSize = 0;
    for (int32_t i = 0; fields != nullptr && i < fields->nbFields; ++i) {
      PluginField const& field = fields->fields[i];
      if (field.name == nullptr || field.data == nullptr) {
        continue;
      }
      int32_t* target = strcmp(field.name, "num_heads") == 0     ? &numHeads
                        : strcmp(field.name, "kernel_size") == 0 ? &kernelSize
                                                                 : nullptr;
      if (target == nullptr) {
        continue;  // plugin_version, plugin_namespace and whatever later graphs carry
      }
      if (field.length != 1) {
        error("SpanDynamicConv %s: field %s has %d elements, expected 1", name ? name : "",
              field.name, field.length);
        return nullptr;
      }
      if (field.type == PluginFieldType::kINT32) {
        memcpy(target, field.data, sizeof(int32_t));
      } else if (field.type == PluginFieldType::kINT64) {  // as ONNX stores integers
        int64_t wide = 0;
        memcpy(&wide, field.data, sizeof(wide));
        *target = wide > 0 && wide <= 65536 ? static_cast<int32_t>(wide) : -1;
      } else {
        error("SpanDynamicConv %s: field %s is not an integer", name ? name : "", field.name);
        return nullptr;
      }
    }
    if (numHeads < 1) {
      error("SpanDynamicConv %s: num_heads is %d, expected 1 or more", name ? name : "", numHeads);
      return nullptr;
    }
    if (kernelSize < 1 || kernelSize % 2 == 0 || kernelSize > kMaxKernelSize) {
      error("SpanDynamicConv %s: kernel_size is %d, expected an odd number up to %d",
            name ? name : "", kernelSize, kMaxKernelSize);
      return nullptr;
    }
    return new (std::nothrow) SpanDynamicConvPlugin(numHeads, kernelSize);
  }

 private:
  PluginField fields_[2];
  PluginFieldCollection collection_{};
};

}  // namespace

IPluginCreatorInterface* spanDynamicConvCreator() noexcept {
  static SpanDynamicConvCreator creator;
  return &creator;
}

}  // namespace convbert::trt
