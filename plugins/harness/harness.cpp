// Drives libconvbert_trt_plugins.so through its ABI with no TensorRT library in the process, the
// way TensorRT would: creators, fields, creation, formats, shapes, serialisation, clone, context,
// enqueue. Without a GPU it stops before the first allocation and exits 0 saying so; with one it
// compares the output with the CPU kernel's and times it against a device-to-device copy of the
// same bytes.
//   convbert_plugin_harness path/to/libconvbert_trt_plugins.so
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "../runtime/half.h"
#include "../span_dynamic_conv/span_dynamic_conv.h"

using namespace nvinfer1;

namespace {

int gFailures = 0;

void check(bool condition, char const* what) {
  std::printf("%s %s\n", condition ? "ok  " : "FAIL", what);
  gFailures += condition ? 0 : 1;
}

// Symbolic extents, as the builder passes them: a number, or -1 for a dynamic axis. TensorRT's
// interface classes forward to an implementation object, which is ours here.
class Extent final : public IDimensionExpr, private apiv::VDimensionExpr {
 public:
  explicit Extent(int64_t value) : value_(value) { mImpl = this; }

 private:
  bool isConstant() const override { return value_ >= 0; }
  int64_t getConstantValue() const override { return value_; }
  bool isSizeTensor() const override { return false; }

  int64_t value_;
};

// The plugin needs no arithmetic on extents; any use of this one would crash the harness.
class NoExpressions final : public IExprBuilder {
 public:
  NoExpressions() { mImpl = nullptr; }
};

IPluginV3* create(IPluginCreatorV3One* creator, int32_t heads, int32_t taps) {
  PluginField fields[2] = {{"num_heads", &heads, PluginFieldType::kINT32, 1},
                           {"kernel_size", &taps, PluginFieldType::kINT32, 1}};
  PluginFieldCollection const collection{2, fields};
  return creator->createPlugin("harness", &collection, TensorRTPhase::kBUILD);
}

template <typename Interface>
Interface* capability(IPluginV3* plugin, PluginCapabilityType type) {
  return plugin ? static_cast<Interface*>(plugin->getCapabilityInterface(type)) : nullptr;
}

void checkBuildSide(IPluginV3* plugin) {
  auto* build = capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
  check(build != nullptr && build->getNbOutputs() == 1, "build capability, one output");
  DataType const types[] = {DataType::kFLOAT, DataType::kHALF, DataType::kBF16, DataType::kINT8};
  for (DataType type : types) {
    DynamicPluginTensorDesc io[3] = {};
    for (auto& tensor : io) {
      tensor.desc.type = type;
      tensor.desc.format = TensorFormat::kLINEAR;
    }
    bool all = true;
    for (int32_t i = 0; i < 3; ++i) {
      all = all && build->supportsFormatCombination(i, io, 2, 1);
    }
    check(all == (type != DataType::kINT8), "fp32, fp16, bf16 accepted and int8 refused");
    io[1].desc.type = type == DataType::kFLOAT ? DataType::kHALF : DataType::kFLOAT;
    check(!build->supportsFormatCombination(1, io, 2, 1), "mixed types refused");
    io[0].desc.format = TensorFormat::kCHW32;
    check(!build->supportsFormatCombination(0, io, 2, 1), "vectorised layouts refused");
  }
  DataType in[2] = {DataType::kHALF, DataType::kHALF}, out[1] = {DataType::kFLOAT};
  check(build->getOutputDataTypes(out, 1, in, 2) == 0 && out[0] == DataType::kHALF,
        "output type is the input's");
  Extent dynamic(-1), width(384), taps(54), badTaps(53), badWidth(385);
  NoExpressions builder;
  DimsExprs shapes[2] = {{3, {&dynamic, &dynamic, &width}}, {3, {&dynamic, &dynamic, &taps}}};
  DimsExprs result[1] = {};
  check(build->getOutputShapes(shapes, 2, nullptr, 0, result, 1, builder) == 0 &&
            result[0].nbDims == 3 && result[0].d[2] == &width && result[0].d[1] == &dynamic,
        "output shape is value's, dynamic axes included");
  shapes[1].d[2] = &badTaps;
  check(build->getOutputShapes(shapes, 2, nullptr, 0, result, 1, builder) != 0,
        "kernel_logits of another width refused");
  shapes[1].d[2] = &taps;
  shapes[0].d[2] = &badWidth;
  check(build->getOutputShapes(shapes, 2, nullptr, 0, result, 1, builder) != 0,
        "channels that do not divide into heads refused");
  shapes[0].nbDims = 2;
  check(build->getOutputShapes(shapes, 2, nullptr, 0, result, 1, builder) != 0,
        "two axes refused");
  check(build->getWorkspaceSize(nullptr, 2, nullptr, 1) == 0, "no workspace");
}

// Serialised fields recreate the plugin after the first one is gone.
IPluginV3* roundTrip(IPluginCreatorV3One* creator, IPluginV3* plugin) {
  auto* runtime = capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
  PluginFieldCollection const* fields = runtime->getFieldsToSerialize();
  int32_t values[2] = {0, 0};
  PluginField copies[2];
  check(fields != nullptr && fields->nbFields == 2, "two serialised fields");
  for (int32_t i = 0; i < 2; ++i) {
    PluginField const& field = fields->fields[i];
    check(field.type == PluginFieldType::kINT32 && field.length == 1, "an int32 field");
    std::memcpy(&values[i], field.data, sizeof(int32_t));
    copies[i] = PluginField(field.name, &values[i], field.type, 1);
  }
  check(values[0] == 6 && values[1] == 9, "serialised values");
  delete plugin;
  PluginFieldCollection const collection{2, copies};
  IPluginV3* again = creator->createPlugin("again", &collection, TensorRTPhase::kRUNTIME);
  check(again != nullptr, "recreated from its fields");
  IPluginV3* copy = again->clone();
  auto* core = capability<IPluginV3OneCore>(copy, PluginCapabilityType::kCORE);
  check(core != nullptr && !std::strcmp(core->getPluginName(), "SpanDynamicConv") &&
            !std::strcmp(core->getPluginVersion(), "1") &&
            !std::strcmp(core->getPluginNamespace(), ""),
        "a clone keeps name, version and namespace");
  delete again;
  return copy;
}

struct Case {
  int64_t batch, seq;
  DataType type;
};

int elementBytes(DataType type) { return type == DataType::kFLOAT ? 4 : 2; }

float element(std::vector<char> const& data, DataType type, size_t i) {
  if (type == DataType::kFLOAT) {
    return reinterpret_cast<float const*>(data.data())[i];
  }
  uint16_t const bits = reinterpret_cast<uint16_t const*>(data.data())[i];
  return type == DataType::kHALF ? convbert::toFloat(convbert::Float16{bits})
                                 : convbert::toFloat(convbert::BFloat16{bits});
}

std::vector<char> randomTensor(size_t count, DataType type, uint32_t seed) {
  std::vector<char> data(count * elementBytes(type));
  for (size_t i = 0; i < count; ++i) {
    seed = seed * 1664525u + 1013904223u;
    float const x = (static_cast<float>(seed >> 8) / 8388608.0f - 1.0f) * 3.0f;
    if (type == DataType::kFLOAT) {
      reinterpret_cast<float*>(data.data())[i] = x;
    } else {
      reinterpret_cast<uint16_t*>(data.data())[i] =
          type == DataType::kHALF ? convbert::fromFloat<convbert::Float16>(x).bits
                                  : convbert::fromFloat<convbert::BFloat16>(x).bits;
    }
  }
  return data;
}

// Median of 20 timings of 50 calls, in microseconds.
template <typename Call>
float microseconds(cudaStream_t stream, Call call) {
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  std::vector<float> times;
  for (int i = 0; i < 25; ++i) {
    cudaEventRecord(begin, stream);
    for (int j = 0; j < 50; ++j) call();
    cudaEventRecord(end, stream);
    cudaEventSynchronize(end);
    float milliseconds = 0;
    cudaEventElapsedTime(&milliseconds, begin, end);
    if (i >= 5) times.push_back(milliseconds * 1000 / 50);  // the first five warm up
  }
  std::nth_element(times.begin(), times.begin() + 10, times.end());
  return times[10];
}

void runOnDevice(IPluginV3* context, Case const& shape) {
  size_t const rows = static_cast<size_t>(shape.batch * shape.seq);
  size_t const valueBytes = rows * 384 * elementBytes(shape.type);
  std::vector<char> value = randomTensor(rows * 384, shape.type, 1);
  std::vector<char> logits = randomTensor(rows * 54, shape.type, 2);
  std::vector<char> expected(valueBytes), got(valueBytes);
  PluginTensorDesc in[2] = {
      {Dims{3, {shape.batch, shape.seq, 384}}, shape.type, TensorFormat::kLINEAR, 1.0f},
      {Dims{3, {shape.batch, shape.seq, 54}}, shape.type, TensorFormat::kLINEAR, 1.0f}};
  PluginTensorDesc out[1] = {in[0]};
  auto* runtime = capability<IPluginV3OneRuntime>(context, PluginCapabilityType::kRUNTIME);
  void *v = nullptr, *l = nullptr, *o = nullptr;
  bool good = cudaMalloc(&v, valueBytes) == cudaSuccess &&
              cudaMalloc(&l, logits.size()) == cudaSuccess &&
              cudaMalloc(&o, valueBytes) == cudaSuccess &&
              cudaMemcpy(v, value.data(), valueBytes, cudaMemcpyHostToDevice) == cudaSuccess &&
              cudaMemcpy(l, logits.data(), logits.size(), cudaMemcpyHostToDevice) == cudaSuccess;
  cudaStream_t stream = nullptr;
  good = good && cudaStreamCreate(&stream) == cudaSuccess;
  void const* inputs[2] = {v, l};
  void* outputs[1] = {o};
  good = good && runtime->onShapeChange(in, 2, out, 1) == 0 &&
         runtime->enqueue(in, out, inputs, outputs, nullptr, stream) == 0 &&
         cudaStreamSynchronize(stream) == cudaSuccess &&
         cudaMemcpy(got.data(), o, valueBytes, cudaMemcpyDeviceToHost) == cudaSuccess;
  check(good, "enqueue");
  convbert::SpanDynamicConvParams params{};
  params.value = value.data();
  params.kernelLogits = logits.data();
  params.output = expected.data();
  params.batch = shape.batch;
  params.seq = shape.seq;
  params.numHeads = 6;
  params.headDim = 64;
  params.kernelSize = 9;
  params.dtype = shape.type == DataType::kFLOAT  ? convbert::DataType::kFloat32
                 : shape.type == DataType::kHALF ? convbert::DataType::kFloat16
                                                 : convbert::DataType::kBFloat16;
  convbert::setContiguousStrides(params);
  convbert::runOnCpu(params);
  double worst = 0;
  for (size_t i = 0; i < rows * 384; ++i) {
    double const error = std::fabs(element(got, shape.type, i) - element(expected, shape.type, i));
    worst = std::isfinite(error) ? std::max(worst, error) : 1e30;
  }
  // Both sides round float sums once: they differ by one unit in the last place at most.
  double const limit = shape.type == DataType::kFLOAT  ? 1e-5
                       : shape.type == DataType::kHALF ? 2.0e-3
                                                       : 1.6e-2;
  std::printf("     %lldx%lld type %d: largest difference %.3g, limit %.3g\n",
              static_cast<long long>(shape.batch), static_cast<long long>(shape.seq),
              static_cast<int>(shape.type), worst, limit);
  check(worst <= limit, "equal to the CPU kernel");
  if (good) {
    float const kernel = microseconds(
        stream, [&] { runtime->enqueue(in, out, inputs, outputs, nullptr, stream); });
    float const copy = microseconds(stream, [&] {
      cudaMemcpyAsync(o, v, valueBytes, cudaMemcpyDeviceToDevice, stream);
    });
    std::printf("     kernel %.2f us, copy of the value tensor %.2f us, copy rate reached %.0f %%\n",
                kernel, copy, 100 * copy / kernel);
  }
  cudaStreamDestroy(stream);
  cudaFree(v);
  cudaFree(l);
  cudaFree(o);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s path/to/libconvbert_trt_plugins.so\n", argv[0]);
    return 2;
  }
  void* library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);
  auto getCreators = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"));
  check(getCreators != nullptr, "exports getCreators");
  check(dlsym(library, "setLoggerFinder") != nullptr, "exports setLoggerFinder");
  if (getCreators == nullptr) {
    return 1;
  }
  int32_t count = 0;
  IPluginCreatorInterface* const* creators = getCreators(count);
  check(count == 1 && !std::strcmp(creators[0]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE"),
        "one V3 creator");
  auto* creator = static_cast<IPluginCreatorV3One*>(creators[0]);
  check(!std::strcmp(creator->getPluginName(), "SpanDynamicConv") &&
            creator->getFieldNames()->nbFields == 2,
        "name and fields of the creator");
  check(create(creator, 6, 8) == nullptr, "even kernel_size refused");
  check(create(creator, 6, 17) == nullptr, "kernel_size 17 refused");
  check(create(creator, 0, 9) == nullptr, "no heads refused");
  check(creator->createPlugin("empty", nullptr, TensorRTPhase::kBUILD) == nullptr,
        "missing fields refused");
  IPluginV3* plugin = create(creator, 6, 9);
  check(plugin != nullptr, "created");
  if (plugin == nullptr) {
    return 1;
  }
  checkBuildSide(plugin);
  plugin = roundTrip(creator, plugin);
  auto* runtime = capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
  IPluginV3* context = runtime->attachToContext(nullptr);
  check(context != nullptr && context != plugin, "attached to a context");

  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("no GPU here: stopped before enqueue; %d failures\n", gFailures);
  } else {
    for (DataType type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
      for (auto const& [batch, seq] : {std::pair<int64_t, int64_t>{1, 7}, {1, 128}, {8, 128},
                                       {3, 129}, {32, 512}}) {
        runOnDevice(context, {batch, seq, type});
      }
    }
    std::printf("ran on the GPU; %d failures\n", gFailures);
  }
  delete context;
  delete plugin;
  return gFailures == 0 ? 0 : 1;
}
