// The TensorRT side that all operators share: an IPluginV3 and its creator. An operator adds a
// traits class that says what is particular to it; it holds no state beyond its integer attributes.
//
//   struct Traits {
//     static constexpr char const* kName;                      // op_type of the ONNX node
//     static constexpr int32_t kInputs;                        // of the element type, before the mask
//     static constexpr int32_t kFieldCount;                    // integer attributes
//     static constexpr std::array<char const*, kFieldCount> kFieldNames;
//     using Fields = std::array<int32_t, kFieldCount>;
//     static bool validFields(char const* layer, Fields const&);     // logs what is wrong
//     static bool validShapes(Fields const&, Dims const* inputs);    // extent -1: not known yet
//     static constexpr int32_t kOutputWidthInput;              // whose last axis the output has
//     static cudaError_t launch(Fields const&, PluginTensorDesc const* in, void const* const* data,
//                               int64_t const* mask, void* output, cudaStream_t);
//   };
//
// Every operator takes one optional last input: the mask, int64 (batch, seq), 0 at pads. Outputs are
// (batch, seq, channels) of the element type.
#pragma once

#include <array>
#include <cstdio>
#include <cstring>
#include <new>

#include "data_type.h"
#include "trt_log.h"

namespace convbert::trt {

using namespace nvinfer1;

constexpr char const* kPluginVersion = "1";
constexpr char const* kPluginNamespace = "";
// Serialised beside the attributes: enqueue is not told how many inputs there are.
constexpr char const* kHasMask = "has_mask";
constexpr int32_t kMaxInputs = 5;

template <typename... Arguments>
void error(char const* format, Arguments... arguments) noexcept {
  char message[320];
  snprintf(message, sizeof(message), format, arguments...);
  logError(message);
}

inline bool isElementType(nvinfer1::DataType type) noexcept {
  return type == nvinfer1::DataType::kFLOAT || type == nvinfer1::DataType::kHALF ||
         type == nvinfer1::DataType::kBF16;
}

inline convbert::DataType kernelType(nvinfer1::DataType type) noexcept {
  return type == nvinfer1::DataType::kFLOAT  ? convbert::DataType::kFloat32
         : type == nvinfer1::DataType::kHALF ? convbert::DataType::kFloat16
                                             : convbert::DataType::kBFloat16;
}

// Whether `dims` has `rank` axes; otherwise says so.
inline bool hasRank(char const* op, char const* name, Dims const& dims, int32_t rank) noexcept {
  if (dims.nbDims != rank) {
    error("%s: %s has %d axes, expected %d", op, name, dims.nbDims, rank);
  }
  return dims.nbDims == rank;
}

// Whether two extents can be equal; -1 is not known yet and fits anything.
inline bool sameExtent(char const* op, char const* what, long long got,
                       long long expected) noexcept {
  bool const same = got < 0 || expected < 0 || got == expected;
  if (!same) {
    error("%s: %s is %lld, expected %lld", op, what, got, expected);
  }
  return same;
}

template <typename Traits>
class Plugin final : public IPluginV3,
                     public IPluginV3OneCore,
                     public IPluginV3OneBuild,
                     public IPluginV3OneRuntime {
 public:
  using Fields = typename Traits::Fields;

  Plugin(Fields const& fields, bool hasMask) noexcept : fields_(fields), hasMask_(hasMask) {}

  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    switch (type) {
      case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
      case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
      case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
    }
    return nullptr;
  }

  IPluginV3* clone() noexcept override { return new (std::nothrow) Plugin(fields_, hasMask_); }

  AsciiChar const* getPluginName() const noexcept override { return Traits::kName; }
  AsciiChar const* getPluginVersion() const noexcept override { return kPluginVersion; }
  AsciiChar const* getPluginNamespace() const noexcept override { return kPluginNamespace; }

  int32_t getNbOutputs() const noexcept override { return 1; }

  int32_t configurePlugin(DynamicPluginTensorDesc const* in, int32_t inputs,
                          DynamicPluginTensorDesc const*, int32_t outputs) noexcept override {
    Dims dims[kMaxInputs];
    for (int32_t i = 0; i < inputs && i < kMaxInputs; ++i) {
      dims[i] = in[i].max;
    }
    return takeShapes(dims, inputs, outputs) ? 0 : -1;
  }

  bool supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* inOut,
                                 int32_t inputs, int32_t outputs) noexcept override {
    if (!validCounts(inputs, outputs) || position < 0 || position > inputs) {
      return false;
    }
    PluginTensorDesc const& desc = inOut[position].desc;
    bool const isMask = position == Traits::kInputs && position < inputs;
    bool const typed = isMask ? desc.type == nvinfer1::DataType::kINT64
                              : isElementType(desc.type) && desc.type == inOut[0].desc.type;
    return typed && desc.format == PluginFormat::kLINEAR;
  }

  int32_t getOutputDataTypes(nvinfer1::DataType* out, int32_t outputs,
                             nvinfer1::DataType const* in, int32_t inputs) const noexcept override {
    if (!validCounts(inputs, outputs)) {
      return -1;
    }
    for (int32_t i = 0; i < Traits::kInputs; ++i) {
      if (!isElementType(in[i]) || in[i] != in[0]) {
        error("%s: inputs must share one of fp32, fp16, bf16", Traits::kName);
        return -1;
      }
    }
    if (inputs > Traits::kInputs && in[Traits::kInputs] != nvinfer1::DataType::kINT64) {
      error("%s: the mask must be int64", Traits::kName);
      return -1;
    }
    out[0] = in[0];
    return 0;
  }

  int32_t getOutputShapes(DimsExprs const* in, int32_t inputs, DimsExprs const*, int32_t,
                          DimsExprs* out, int32_t outputs, IExprBuilder&) noexcept override {
    if (!validCounts(inputs, outputs)) {
      return -1;
    }
    Dims dims[kMaxInputs];
    for (int32_t i = 0; i < inputs; ++i) {
      dims[i].nbDims = in[i].nbDims;
      for (int32_t d = 0; d < in[i].nbDims && d < Dims::MAX_DIMS; ++d) {
        bool const known = in[i].d[d] != nullptr && in[i].d[d]->isConstant();
        dims[i].d[d] = known ? in[i].d[d]->getConstantValue() : -1;
      }
    }
    if (!takeShapes(dims, inputs, outputs)) {
      return -1;
    }
    out[0] = in[0];
    out[0].d[2] = in[Traits::kOutputWidthInput].d[2];
    return 0;
  }

  size_t getWorkspaceSize(DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*,
                          int32_t) const noexcept override {
    return 0;
  }

  int32_t onShapeChange(PluginTensorDesc const* in, int32_t inputs, PluginTensorDesc const*,
                        int32_t outputs) noexcept override {
    Dims dims[kMaxInputs];
    for (int32_t i = 0; i < inputs && i < kMaxInputs; ++i) {
      dims[i] = in[i].dims;
    }
    return takeShapes(dims, inputs, outputs) ? 0 : -1;
  }

  // Nothing is kept per context: shapes arrive with every enqueue.
  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

  PluginFieldCollection const* getFieldsToSerialize() noexcept override {
    for (int32_t i = 0; i < Traits::kFieldCount; ++i) {
      serialized_[i] =
          PluginField(Traits::kFieldNames[i], &fields_[i], PluginFieldType::kINT32, 1);
    }
    serialized_[Traits::kFieldCount] =
        PluginField(kHasMask, &hasMask_, PluginFieldType::kINT32, 1);
    collection_ = {Traits::kFieldCount + 1, serialized_};
    return &collection_;
  }

  int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs,
                  void* const* outputs, void*, cudaStream_t stream) noexcept override {
    Dims dims[kMaxInputs];
    for (int32_t i = 0; i < Traits::kInputs; ++i) {
      dims[i] = in[i].dims;
    }
    if (!isElementType(in[0].type) || !Traits::validShapes(fields_, dims)) {
      return -1;
    }
    auto const* mask =
        hasMask_ != 0 ? static_cast<int64_t const*>(inputs[Traits::kInputs]) : nullptr;
    cudaError_t const status = Traits::launch(fields_, in, inputs, mask, outputs[0], stream);
    if (status != cudaSuccess) {
      error("%s: CUDA: %s", Traits::kName, cudaGetErrorString(status));
      return -1;
    }
    return 0;
  }

 private:
  static bool validCounts(int32_t inputs, int32_t outputs) noexcept {
    bool const valid = (inputs == Traits::kInputs || inputs == Traits::kInputs + 1) && outputs == 1;
    if (!valid) {
      error("%s: %d inputs and %d outputs, expected %d (and a mask) and 1", Traits::kName, inputs,
            outputs, Traits::kInputs);
    }
    return valid;
  }

  bool takeShapes(Dims const* dims, int32_t inputs, int32_t outputs) noexcept {
    if (!validCounts(inputs, outputs) || !Traits::validShapes(fields_, dims)) {
      return false;
    }
    hasMask_ = inputs > Traits::kInputs ? 1 : 0;
    if (hasMask_ == 0) {
      return true;
    }
    Dims const& mask = dims[Traits::kInputs];
    return hasRank(Traits::kName, "mask", mask, 2) &&
           sameExtent(Traits::kName, "batch of the mask", mask.d[0], dims[0].d[0]) &&
           sameExtent(Traits::kName, "seq of the mask", mask.d[1], dims[0].d[1]);
  }

  Fields fields_;
  int32_t hasMask_;
  PluginField serialized_[Traits::kFieldCount + 1];
  PluginFieldCollection collection_{};
};

template <typename Traits>
class Creator final : public IPluginCreatorV3One {
 public:
  Creator() noexcept {
    for (int32_t i = 0; i < Traits::kFieldCount; ++i) {
      fields_[i] = PluginField(Traits::kFieldNames[i], nullptr, PluginFieldType::kINT32, 1);
    }
    collection_ = {Traits::kFieldCount, fields_};
  }

  AsciiChar const* getPluginName() const noexcept override { return Traits::kName; }
  AsciiChar const* getPluginVersion() const noexcept override { return kPluginVersion; }
  AsciiChar const* getPluginNamespace() const noexcept override { return kPluginNamespace; }
  PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }

  IPluginV3* createPlugin(AsciiChar const* name, PluginFieldCollection const* given,
                          TensorRTPhase) noexcept override {
    char const* layer = name != nullptr ? name : "";
    typename Traits::Fields values{};
    int32_t hasMask = 0;
    for (int32_t i = 0; given != nullptr && i < given->nbFields; ++i) {
      PluginField const& field = given->fields[i];
      if (field.name == nullptr || field.data == nullptr) {
        continue;
      }
      int32_t* target = !strcmp(field.name, kHasMask) ? &hasMask : nullptr;
      for (int32_t k = 0; k < Traits::kFieldCount; ++k) {
        target = !strcmp(field.name, Traits::kFieldNames[k]) ? &values[k] : target;
      }
      // plugin_version, plugin_namespace and whatever later graphs carry are passed over
      if (target != nullptr && !readInteger(layer, field, *target)) {
        return nullptr;
      }
    }
    return Traits::validFields(layer, values)
               ? new (std::nothrow) Plugin<Traits>(values, hasMask != 0)
               : nullptr;
  }

 private:
  static bool readInteger(char const* layer, PluginField const& field, int32_t& out) noexcept {
    if (field.length != 1) {
      error("%s %s: field %s has %d elements, expected 1", Traits::kName, layer, field.name,
            field.length);
      return false;
    }
    if (field.type == PluginFieldType::kINT32) {
      memcpy(&out, field.data, sizeof(int32_t));
      return true;
    }
    if (field.type == PluginFieldType::kINT64) {  // as ONNX stores integers
      int64_t wide = 0;
      memcpy(&wide, field.data, sizeof(wide));
      out = wide >= 0 && wide <= 65536 ? static_cast<int32_t>(wide) : -1;
      return true;
    }
    error("%s %s: field %s is not an integer", Traits::kName, layer, field.name);
    return false;
  }

  // One more than the attributes, so that an operator may have none.
  PluginField fields_[Traits::kFieldCount + 1];
  PluginFieldCollection collection_{};
};

template <typename Traits>
bool positive(char const* layer, char const* field, int32_t value) noexcept {
  if (value < 1) {
    error("%s %s: %s is %d, expected 1 or more", Traits::kName, layer, field, value);
  }
  return value >= 1;
}

template <typename Traits>
bool oddKernelSize(char const* layer, int32_t kernelSize) noexcept {
  bool const valid = kernelSize >= 1 && kernelSize % 2 == 1 && kernelSize <= kMaxKernelSize;
  if (!valid) {
    error("%s %s: kernel_size is %d, expected an odd number up to %d", Traits::kName, layer,
          kernelSize, kMaxKernelSize);
  }
  return valid;
}

}  // namespace convbert::trt
