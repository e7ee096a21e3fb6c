// DepthwiseConv1D as a TensorRT plugin: its shapes, its launch.
#include "../runtime/trt_creators.h"
#include "../runtime/trt_plugin.h"
#include "depthwise_conv1d.h"

namespace convbert::trt {
namespace {

struct DepthwiseConv1d {
  static constexpr char const* kName = "DepthwiseConv1D";
  static constexpr int32_t kInputs = 2;  // input, weight
  static constexpr int32_t kOutputWidthInput = 0;
  static constexpr int32_t kFieldCount = 0;  // the kernel size is the weight's first axis
  static constexpr std::array<char const*, kFieldCount> kFieldNames = {};
  using Fields = std::array<int32_t, kFieldCount>;

  static bool validFields(char const*, Fields const&) noexcept { return true; }

  static bool validShapes(Fields const&, Dims const* in) noexcept {
    if (!hasRank(kName, "input", in[0], 3) || !hasRank(kName, "weight", in[1], 2)) {
      return false;
    }
    long long const kernelSize = in[1].d[0];
    if (kernelSize >= 0 && (kernelSize % 2 == 0 || kernelSize > kMaxKernelSize)) {
      error("%s: kernel_size is %lld, expected an odd number up to %d", kName, kernelSize,
            kMaxKernelSize);
      return false;
    }
    return sameExtent(kName, "channels of weight", in[1].d[1], in[0].d[2]);
  }

  static cudaError_t launch(Fields const&, PluginTensorDesc const* in, void const* const* data,
                            int64_t const* mask, void* output, cudaStream_t stream) noexcept {
    DepthwiseConv1dParams params{};
    params.input = data[0];
    params.weight = data[1];
    params.mask = mask;
    params.output = output;
    params.batch = in[0].dims.d[0];
    params.seq = in[0].dims.d[1];
    params.channels = static_cast<int32_t>(in[0].dims.d[2]);
    params.kernelSize = static_cast<int32_t>(in[1].dims.d[0]);
    params.dtype = kernelType(in[0].type);
    setContiguousStrides(params);
    return launchDepthwiseConv1d(params, stream);
  }
};

}  // namespace

IPluginCreatorInterface* depthwiseConv1dCreator() noexcept {
  static Creator<DepthwiseConv1d> creator;
  return &creator;
}

}  // namespace convbert::trt
