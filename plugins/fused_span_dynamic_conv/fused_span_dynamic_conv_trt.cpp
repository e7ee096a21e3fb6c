// FusedSpanDynamicConv as a TensorRT plugin: its shapes, its launch.
#include "../runtime/trt_creators.h"
#include "../runtime/trt_plugin.h"
#include "fused_span_dynamic_conv.h"

namespace convbert::trt {
namespace {

struct FusedSpanDynamicConv {
  static constexpr char const* kName = "FusedSpanDynamicConv";
  static constexpr int32_t kInputs = 4;  // key_conv, projections, weight, bias
  static constexpr int32_t kOutputWidthInput = 0;
  static constexpr int32_t kFieldCount = 4;
  static constexpr std::array<char const*, kFieldCount> kFieldNames = {
      "num_heads", "kernel_size", "query_offset", "value_offset"};
  using Fields = std::array<int32_t, kFieldCount>;

  static bool validFields(char const* layer, Fields const& fields) noexcept {
    if (fields[2] < 0 || fields[3] < 0) {
      error("%s %s: query_offset %d and value_offset %d, expected 0 or more", kName, layer,
            fields[2], fields[3]);
      return false;
    }
    return positive<FusedSpanDynamicConv>(layer, "num_heads", fields[0]) &&
           oddKernelSize<FusedSpanDynamicConv>(layer, fields[1]);
  }

  static bool validShapes(Fields const& fields, Dims const* in) noexcept {
    if (!hasRank(kName, "key_conv", in[0], 3) || !hasRank(kName, "projections", in[1], 3) ||
        !hasRank(kName, "weight", in[2], 2) || !hasRank(kName, "bias", in[3], 1)) {
      return false;
    }
    long long const width = in[0].d[2], all = in[1].d[2];
    if (width >= 0 && (width == 0 || width % fields[0] != 0)) {
      error("%s: %lld channels do not divide into num_heads %d", kName, width, fields[0]);
      return false;
    }
    if (width >= 0 && all >= 0 && (fields[2] + width > all || fields[3] + width > all)) {
      error("%s: projections have %lld channels, too few for %lld from query_offset %d and "
            "value_offset %d", kName, all, width, fields[2], fields[3]);
      return false;
    }
    long long const columns = static_cast<long long>(fields[0]) * fields[1];
    return sameExtent(kName, "batch of projections", in[1].d[0], in[0].d[0]) &&
           sameExtent(kName, "seq of projections", in[1].d[1], in[0].d[1]) &&
           sameExtent(kName, "first axis of weight", in[2].d[0], width) &&
           sameExtent(kName, "second axis of weight", in[2].d[1], columns) &&
           sameExtent(kName, "length of bias", in[3].d[0], columns);
  }

  static cudaError_t launch(Fields const& fields, PluginTensorDesc const* in,
                            void const* const* data, int64_t const* mask, void* output,
                            cudaStream_t stream) noexcept {
    FusedSpanDynamicConvParams params{};
    params.conv.mask = mask;
    params.conv.numHeads = fields[0];
    params.conv.headDim = static_cast<int32_t>(in[0].dims.d[2] / fields[0]);
    params.conv.kernelSize = fields[1];
    params.conv.dtype = kernelType(in[0].type);
    setOperands(params,
                {in[0].dims.d[0], in[0].dims.d[1], in[1].dims.d[2], fields[2], fields[3]}, data[0],
                data[1], data[2], data[3], output);
    return launchFusedSpanDynamicConv(params, stream);
  }
};

}  // namespace

IPluginCreatorInterface* fusedSpanDynamicConvCreator() noexcept {
  static Creator<FusedSpanDynamicConv> creator;
  return &creator;
}

}  // namespace convbert::trt
