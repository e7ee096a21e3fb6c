// SpanDynamicConv as a TensorRT plugin: its shapes, its launch.
#include "../runtime/trt_creators.h"
#include "../runtime/trt_plugin.h"
#include "span_dynamic_conv.h"

namespace convbert::trt {
namespace {

struct SpanDynamicConv {
  static constexpr char const* kName = "SpanDynamicConv";
  static constexpr int32_t kInputs = 2;  // value, kernel_logits
  static constexpr int32_t kOutputWidthInput = 0;
  static constexpr int32_t kFieldCount = 2;
  static constexpr std::array<char const*, kFieldCount> kFieldNames = {"num_heads", "kernel_size"};
  using Fields = std::array<int32_t, kFieldCount>;

  static bool validFields(char const* layer, Fields const& fields) noexcept {
    return positive<SpanDynamicConv>(layer, "num_heads", fields[0]) &&
           oddKernelSize<SpanDynamicConv>(layer, fields[1]);
  }

  static bool validShapes(Fields const& fields, Dims const* in) noexcept {
    if (!hasRank(kName, "value", in[0], 3) || !hasRank(kName, "kernel_logits", in[1], 3)) {
      return false;
    }
    long long const width = in[0].d[2];
    if (width >= 0 && (width == 0 || width % fields[0] != 0)) {
      error("%s: %lld channels do not divide into num_heads %d", kName, width, fields[0]);
      return false;
    }
    return sameExtent(kName, "batch of kernel_logits", in[1].d[0], in[0].d[0]) &&
           sameExtent(kName, "seq of kernel_logits", in[1].d[1], in[0].d[1]) &&
           sameExtent(kName, "width of kernel_logits", in[1].d[2],
                      static_cast<long long>(fields[0]) * fields[1]);
  }

  static cudaError_t launch(Fields const& fields, PluginTensorDesc const* in,
                            void const* const* data, int64_t const* mask, void* output,
                            cudaStream_t stream) noexcept {
    SpanDynamicConvParams params{};
    params.value = data[0];
    params.kernelLogits = data[1];
    params.mask = mask;
    params.output = output;
    params.batch = in[0].dims.d[0];
    params.seq = in[0].dims.d[1];
    params.numHeads = fields[0];
    params.headDim = static_cast<int32_t>(in[0].dims.d[2] / fields[0]);
    params.kernelSize = fields[1];
    params.dtype = kernelType(in[0].type);
    setContiguousStrides(params);
    return launchSpanDynamicConv(params, stream);
  }
};

}  // namespace

IPluginCreatorInterface* spanDynamicConvCreator() noexcept {
  static Creator<SpanDynamicConv> creator;
  return &creator;
}

}  // namespace convbert::trt
