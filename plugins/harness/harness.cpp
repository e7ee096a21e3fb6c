// Drives libconvbert_trt_plugins.so through its ABI with no TensorRT library in the process, the way
// TensorRT would: creators, fields, types and layouts, shape expressions, serialisation, clones,
// contexts, enqueue. Without a GPU it stops before the first allocation, saying so.
//   convbert_plugin_harness path/to/libconvbert_trt_plugins.so
// One line a check; exit code 1 when one fails.
#include "harness.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <deque>

#include <cuda_runtime_api.h>


using namespace nvinfer1;

namespace harness {
namespace {

int gFailures = 0;

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

// The plugins need no arithmetic on extents; any use of this one would crash the harness.
class NoExpressions final : public IExprBuilder {
 public:
  NoExpressions() { mImpl = nullptr; }
};

IPluginV3* create(IPluginCreatorV3One* creator, Fields const& given) {
  std::vector<PluginField> fields;
  for (auto const& [name, value] : given) {
    fields.push_back({name, &value, PluginFieldType::kINT32, 1});
  }
  PluginFieldCollection const collection{static_cast<int32_t>(fields.size()), fields.data()};
  return creator->createPlugin("harness", &collection, TensorRTPhase::kBUILD);
}

// The symbolic shapes of an operator's inputs, with one extent replaced.
struct Symbols {
  std::deque<std::deque<Extent>> extents;  // an Extent points at itself: it must not move
  std::vector<DimsExprs> shapes;

  Symbols(Operator const& op, bool masked, BadExtent const* bad) {
    auto inputs = op.inputs;
    if (masked) {
      inputs.push_back({kBatch, kSeq});
    }
    if (bad != nullptr) {
      inputs[bad->input][bad->axis] = bad->extent;
    }
    for (auto const& input : inputs) {
      auto& row = extents.emplace_back();
      DimsExprs dims{static_cast<int32_t>(input.size()), {}};
      for (size_t axis = 0; axis < input.size(); ++axis) {
        dims.d[axis] = &row.emplace_back(input[axis]);
      }
      shapes.push_back(dims);
    }
  }
};

void checkFormats(IPluginV3OneBuild* build, Operator const& op, bool masked) {
  int32_t const inputs = static_cast<int32_t>(op.inputs.size()) + (masked ? 1 : 0);
  for (DataType type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16, DataType::kINT8}) {
    std::vector<DynamicPluginTensorDesc> io(inputs + 1);
    for (auto& tensor : io) {
      tensor.desc.type = type;
      tensor.desc.format = TensorFormat::kLINEAR;
    }
    if (masked) {
      io[inputs - 1].desc.type = DataType::kINT64;
    }
    bool all = true;
    for (int32_t i = 0; i <= inputs; ++i) {
      all = all && build->supportsFormatCombination(i, io.data(), inputs, 1);
    }
    check(all == (type != DataType::kINT8), op.name, "fp32, fp16, bf16 accepted and int8 refused");
    io[1].desc.type = type == DataType::kFLOAT ? DataType::kHALF : DataType::kFLOAT;
    check(!build->supportsFormatCombination(1, io.data(), inputs, 1), op.name,
          "mixed types refused");
    io[0].desc.format = TensorFormat::kCHW32;
    check(!build->supportsFormatCombination(0, io.data(), inputs, 1), op.name,
          "vectorised layouts refused");
    if (masked) {
      io[inputs - 1].desc.type = DataType::kINT32;
      check(!build->supportsFormatCombination(inputs - 1, io.data(), inputs, 1), op.name,
            "a mask other than int64 refused");
    }
  }
  std::vector<DataType> in(inputs, DataType::kHALF);
  if (masked) {
    in.back() = DataType::kINT64;
  }
  DataType out[1] = {DataType::kFLOAT};
  check(build->getOutputDataTypes(out, 1, in.data(), inputs) == 0 && out[0] == DataType::kHALF,
        op.name, "output type is the inputs'");
}

int32_t outputShape(IPluginV3OneBuild* build, Symbols& symbols, DimsExprs* result) {
  NoExpressions builder;
  return build->getOutputShapes(symbols.shapes.data(), static_cast<int32_t>(symbols.shapes.size()),
                                nullptr, 0, result, 1, builder);
}

void checkShapes(IPluginV3OneBuild* build, Operator const& op, bool masked) {
  DimsExprs result[1] = {};
  Symbols good(op, masked, nullptr);
  check(outputShape(build, good, result) == 0 && result[0].nbDims == 3 &&
            result[0].d[0] == &good.extents[0][0] && result[0].d[1] == &good.extents[0][1] &&
            result[0].d[2]->getConstantValue() == op.inputs[0][2],
        op.name, "output shape is input 0's, dynamic axes included");
  for (BadExtent const& bad : op.badExtents) {
    Symbols symbols(op, masked, &bad);
    check(outputShape(build, symbols, result) != 0, op.name, "a shape that does not fit refused");
  }
  for (size_t i = 0; i < good.shapes.size(); ++i) {
    Symbols symbols(op, masked, nullptr);
    --symbols.shapes[i].nbDims;
    check(outputShape(build, symbols, result) != 0, op.name, "an axis too few refused");
  }
  check(build->getWorkspaceSize(nullptr, 2, nullptr, 1) == 0, op.name, "no workspace");
}

// Serialised fields recreate the plugin after the first one is gone, its mask included.
IPluginV3* roundTrip(IPluginCreatorV3One* creator, IPluginV3* plugin, Operator const& op,
                     bool masked) {
  auto* runtime = capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
  PluginFieldCollection const* fields = runtime->getFieldsToSerialize();
  check(fields != nullptr && fields->nbFields == static_cast<int32_t>(op.fields.size()) + 1,
        op.name, "attributes and has_mask are serialised");
  std::vector<int32_t> values(fields->nbFields);
  std::vector<PluginField> copies;
  bool sameValues = true;
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    PluginField const& field = fields->fields[i];
    check(field.type == PluginFieldType::kINT32 && field.length == 1, op.name, "an int32 field");
    std::memcpy(&values[i], field.data, sizeof(int32_t));
    copies.emplace_back(field.name, &values[i], field.type, 1);
    int32_t const expected = static_cast<size_t>(i) < op.fields.size() ? op.fields[i].second
                                                                       : int32_t{masked};
    sameValues = sameValues && values[i] == expected;
  }
  check(sameValues, op.name, "serialised values");
  delete plugin;
  PluginFieldCollection const collection{static_cast<int32_t>(copies.size()), copies.data()};
  IPluginV3* again = creator->createPlugin("again", &collection, TensorRTPhase::kRUNTIME);
  check(again != nullptr, op.name, "recreated from its fields");
  IPluginV3* copy = again->clone();
  delete again;
  auto* core = capability<IPluginV3OneCore>(copy, PluginCapabilityType::kCORE);
  check(core != nullptr && !std::strcmp(core->getPluginName(), op.name) &&
            !std::strcmp(core->getPluginVersion(), "1") &&
            !std::strcmp(core->getPluginNamespace(), ""),
        op.name, "a clone keeps name, version and namespace");
  auto* cloned = capability<IPluginV3OneRuntime>(copy, PluginCapabilityType::kRUNTIME);
  int32_t hasMask = -1;
  fields = cloned->getFieldsToSerialize();
  std::memcpy(&hasMask, fields->fields[fields->nbFields - 1].data, sizeof(hasMask));
  check(hasMask == int32_t{masked}, op.name, "a clone keeps its mask");
  return copy;
}

void checkOperator(IPluginCreatorV3One* creator, Operator const& op, bool onDevice) {
  check(creator->getFieldNames()->nbFields == static_cast<int32_t>(op.fields.size()), op.name,
        "field names");
  for (Fields const& bad : op.badFields) {
    check(create(creator, bad) == nullptr, op.name, "bad or missing attributes refused");
  }
  for (bool masked : {false, true}) {
    IPluginV3* plugin = create(creator, op.fields);
    check(plugin != nullptr, op.name, "created");
    auto* build = capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
    if (build == nullptr) {
      check(false, op.name, "build capability");
      return;
    }
    check(build->getNbOutputs() == 1, op.name, "one output");
    checkFormats(build, op, masked);
    checkShapes(build, op, masked);
    plugin = roundTrip(creator, plugin, op, masked);
    auto* runtime = capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
    IPluginV3* context = runtime->attachToContext(nullptr);
    check(context != nullptr && context != plugin, op.name, "attached to a context");
    if (onDevice && !masked) {
      runOnDevice(context, op);  // with and without a mask: a context takes whatever shapes come
    }
    delete context;
    delete plugin;
  }
}

}  // namespace

void check(bool condition, char const* op, char const* what) {
  std::printf("%s %s: %s\n", condition ? "ok  " : "FAIL", op, what);
  gFailures += condition ? 0 : 1;
}

int run(void* library) {
  using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);
  auto getCreators = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"));
  check(getCreators != nullptr, "library", "exports getCreators");
  check(dlsym(library, "setLoggerFinder") != nullptr, "library", "exports setLoggerFinder");
  if (getCreators == nullptr) {
    return 1;
  }
  int devices = 0;
  bool const onDevice = cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
  int32_t count = 0;
  IPluginCreatorInterface* const* creators = getCreators(count);
  check(count == static_cast<int32_t>(operators().size()), "library", "one creator an operator");
  for (Operator const& op : operators()) {
    IPluginCreatorV3One* creator = nullptr;
    for (int32_t i = 0; i < count; ++i) {
      if (!std::strcmp(creators[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE")) {
        auto* candidate = static_cast<IPluginCreatorV3One*>(creators[i]);
        creator = !std::strcmp(candidate->getPluginName(), op.name) ? candidate : creator;
      }
    }
    check(creator != nullptr, op.name, "has a V3 creator");
    if (creator != nullptr) {
      checkOperator(creator, op, onDevice);
    }
  }
  std::printf("%s; %d failures\n",
              onDevice ? "ran on the GPU" : "no GPU here: stopped before enqueue", gFailures);
  return gFailures == 0 ? 0 : 1;
}

}  // namespace harness

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
  return harness::run(library);
}
