// What the harness knows of each operator: attributes, shapes, what must be refused, and the CPU
// kernel that says what the answer is.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "../depthwise_conv1d/depthwise_conv1d.h"
#include "../fused_span_dynamic_conv/fused_span_dynamic_conv.h"
#include "../span_dynamic_conv/span_dynamic_conv.h"

namespace harness {

using Fields = std::vector<std::pair<char const*, int32_t>>;

// Extents that vary.
constexpr int64_t kBatch = -1;
constexpr int64_t kSeq = -2;

struct Shape {
  int64_t batch;
  int64_t seq;
};

struct BadExtent {
  size_t input;
  int axis;
  int64_t extent;
};

struct Operator {
  char const* name;
  Fields fields;
  std::vector<Fields> badFields;
  std::vector<std::vector<int64_t>> inputs;  // extents, before the mask; input 0 has the output's
  std::vector<BadExtent> badExtents;
  convbert::Status (*reference)(Shape, convbert::DataType, std::vector<void const*> const& inputs,
                                int64_t const* mask, void* output);
};

// ConvBERT-base: 6 heads of 64 in the convolution branch, 9 taps, 768 hidden channels.
inline std::vector<Operator> const& operators() {
  using namespace convbert;
  static std::vector<Operator> const kOperators = {
      {"SpanDynamicConv",
       {{"num_heads", 6}, {"kernel_size", 9}},
       {{{"num_heads", 6}, {"kernel_size", 8}},
        {{"num_heads", 6}, {"kernel_size", 17}},
        {{"num_heads", 0}, {"kernel_size", 9}},
        {}},
       {{kBatch, kSeq, 384}, {kBatch, kSeq, 54}},
       {{1, 2, 53}, {0, 2, 385}},
       [](Shape shape, DataType type, std::vector<void const*> const& in, int64_t const* mask,
          void* output) {
         SpanDynamicConvParams p{};
         p.value = in[0];
         p.kernelLogits = in[1];
         p.mask = mask;
         p.output = output;
         p.batch = shape.batch;
         p.seq = shape.seq;
         p.numHeads = 6;
         p.headDim = 64;
         p.kernelSize = 9;
         p.dtype = type;
         setContiguousStrides(p);
         return runOnCpu(p);
       }},
      {"DepthwiseConv1D",
       {},
       {},
       {{kBatch, kSeq, 768}, {9, 768}},
       {{1, 0, 8}, {1, 0, 17}, {1, 1, 767}},
       [](Shape shape, DataType type, std::vector<void const*> const& in, int64_t const* mask,
          void* output) {
         DepthwiseConv1dParams p{};
         p.input = in[0];
         p.weight = in[1];
         p.mask = mask;
         p.output = output;
         p.batch = shape.batch;
         p.seq = shape.seq;
         p.channels = 768;
         p.kernelSize = 9;
         p.dtype = type;
         setContiguousStrides(p);
         return runOnCpu(p);
       }},
      {"FusedSpanDynamicConv",
       {{"num_heads", 6}, {"kernel_size", 9}, {"query_offset", 0}, {"value_offset", 1152}},
       {{{"num_heads", 6}, {"kernel_size", 10}}, {{"num_heads", -1}, {"kernel_size", 9}}, {}},
       {{kBatch, kSeq, 384}, {kBatch, kSeq, 1536}, {384, 54}, {54}},
       {{0, 2, 385}, {1, 2, 1535}, {2, 0, 383}, {2, 1, 55}, {3, 0, 53}},
       [](Shape shape, DataType type, std::vector<void const*> const& in, int64_t const* mask,
          void* output) {
         FusedSpanDynamicConvParams p{};
         p.conv.mask = mask;
         p.conv.numHeads = 6;
         p.conv.headDim = 64;
         p.conv.kernelSize = 9;
         p.conv.dtype = type;
         setOperands(p, {shape.batch, shape.seq, 1536, 0, 1152}, in[0], in[1], in[2], in[3], output);
         return runOnCpu(p);
       }},
  };
  return kOperators;
}

}  // namespace harness
