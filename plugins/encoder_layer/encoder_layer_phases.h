// The three phases of a layer, written once and compiled once per instruction set
// (encoder_layer.cpp and its siblings). Between them every row may need its neighbours': phase 2
// reads keys and values of the whole sequence, phase 3 the convolution's window.
#pragma once

#include "../depthwise_conv1d/depthwise_conv1d.h"
#include "../span_dynamic_conv/span_dynamic_conv.h"
#include "attention.h"

namespace convbert {
namespace {

// Room for a task's rows, cut from its scratch.
class RowScratch {
 public:
  explicit RowScratch(void* at) : at_(static_cast<unsigned char*>(at)) {}

  template <typename T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(at_);
    at_ += roundUp(count * static_cast<int64_t>(sizeof(T)), 64);
    return taken;
  }

 private:
  unsigned char* at_;
};

// For the widest of the layer's inputs.
inline ActivationBuffers takeActivations(RowScratch& scratch, EncoderLayer const& layer) {
  int64_t units = 0;
  int64_t groups = 0;
  for (PackedWeight const& w : layer.weights) {
    units = w.groups * unitsOf(w) > units ? w.groups * unitsOf(w) : units;
    groups = w.groups > groups ? w.groups : groups;
  }
  ActivationBuffers buffers;
  buffers.units = scratch.take<uint32_t>(kMaxRows * units);
  buffers.steps = scratch.take<float>(kMaxRows);
  buffers.surpluses = scratch.take<int32_t>(groups * kMaxRows);
  return buffers;
}

// Calls run(sequence, length, first, last) for the parts of rows [first, last) of the chunk that lie
// in one sequence; first and last count within it.
template <typename Run>
inline void forEachSequence(LayerChunk const& chunk, int64_t first, int64_t last, Run&& run) {
  int64_t const* starts = chunk.layer->params.rowStarts;
  for (int64_t b = chunk.firstSequence; b < chunk.lastSequence; ++b) {
    int64_t const begin = starts[b] - chunk.firstRow;
    int64_t const end = starts[b + 1] - chunk.firstRow;
    int64_t const low = first > begin ? first : begin;
    int64_t const high = last < end ? last : end;
    if (low < high) {
      run(b, end - begin, low - begin, high - begin);
    }
  }
}

// to: (last - first, hidden)
inline void depthwise(LayerChunk const& chunk, int64_t first, int64_t last, float* to) {
  EncoderLayerParams const& p = chunk.layer->params;
  DepthwiseConv1dParams conv{};
  conv.weight = p.depthwise;
  conv.batch = 1;
  conv.channels = p.hidden;
  conv.kernelSize = p.kernelSize;
  conv.dtype = DataType::kFloat32;
  forEachSequence(chunk, first, last,
                  [&](int64_t sequence, int64_t length, int64_t low, int64_t high) {
    int64_t const start = p.rowStarts[sequence];
    conv.seq = length;
    setContiguousStrides(conv);
    conv.input = p.input + start * p.hidden;
    // `to` begins at row `first` of the chunk, the kernel counts from the sequence's row 0
    conv.output = to + (start - chunk.firstRow - first) * p.hidden;
    runRowsOnCpu(conv, low, high, chunk.instructionSet);
  });
}

// Into the right half of `mixed`, its rows [first, last).
inline void convolve(LayerChunk const& chunk, int64_t first, int64_t last) {
  EncoderLayerParams const& p = chunk.layer->params;
  int64_t const width = int64_t(p.numHeads) * p.headDim;
  SpanDynamicConvParams conv{};
  conv.batch = 1;
  conv.numHeads = p.numHeads;
  conv.headDim = p.headDim;
  conv.kernelSize = p.kernelSize;
  conv.dtype = DataType::kFloat32;
  auto run = [&](int64_t sequence, int64_t length, int64_t low, int64_t high) {
    int64_t const begin = p.rowStarts[sequence] - chunk.firstRow;
    conv.seq = length;
    setContiguousStrides(conv);
    conv.outputRowStride = 2 * width;
    conv.value = chunk.convolutionValue + begin * width;
    conv.kernelLogits = chunk.logits + begin * conv.logitsRowStride;
    conv.output = chunk.mixed + outputRow(chunk, sequence, 0) * 2 * width + width;
    runRowsOnCpu(conv, low, high, chunk.instructionSet);
  };
  if (p.firstRowOnly == 0) {
    forEachSequence(chunk, first, last, run);
    return;
  }
  for (int64_t b = chunk.firstSequence + first; b < chunk.firstSequence + last; ++b) {
    if (int64_t const length = p.rowStarts[b + 1] - p.rowStarts[b]; length > 0) {
      run(b, length, 0, 1);
    }
  }
}

// The layer's input of rows [first, last) of the output: where it lies, or gathered into scratch.
inline float const* residualOf(LayerChunk const& chunk, int64_t first, int64_t last,
                               RowScratch& scratch) {
  EncoderLayerParams const& p = chunk.layer->params;
  if (p.firstRowOnly == 0) {
    return p.input + (chunk.firstRow + first) * p.hidden;
  }
  float* const gathered = scratch.take<float>(kMaxRows * p.hidden);
  for (int64_t i = first; i < last; ++i) {
    int64_t const start = p.rowStarts[chunk.firstSequence + i];
    bool const exists = start < p.rowStarts[chunk.firstSequence + i + 1];
    float* to = gathered + (i - first) * p.hidden;
    for (int64_t c = 0; c < p.hidden; ++c) {
      to[c] = exists ? p.input[start * p.hidden + c] : 0.0f;
    }
  }
  return gathered;
}

// Phase 1. T: element of query, key and value.
template <typename T>
void projectRows(LayerChunk const& chunk, int64_t first, int64_t last, void* memory) {
  EncoderLayer const& layer = *chunk.layer;
  EncoderLayerParams const& p = layer.params;
  int const rows = static_cast<int>(last - first);
  int64_t const width = int64_t(p.numHeads) * p.headDim;
  int64_t const taps = int64_t(p.numHeads) * p.kernelSize;
  RowScratch scratch(memory);
  ActivationBuffers const buffers = takeActivations(scratch, layer);
  float* const separable = scratch.take<float>(kMaxRows * p.hidden);
  float* const product = scratch.take<float>(kMaxRows * width);
  float const* input = p.input + (chunk.firstRow + first) * p.hidden;
  T* const queries = static_cast<T*>(chunk.attentionInputs) + first * 3 * width;
  float* const values = chunk.convolutionValue + first * width;
  PartClock clock(chunk.times);

  // A vector that begins before 3 A and ends after it is taken apart.
  PackedWeight const& projections = layer.weights[kProjections];
  matmul(convertRows(input, p.hidden, rows, projections, buffers), projections,
         p.biases[kProjections], rows, [&](int r, int64_t column, int count, Floats result) {
    int64_t const left = 3 * width - column;
    if (left >= count) {
      storeRounded(queries + r * 3 * width + column, result, count);
    } else if (left <= 0) {
      storeSome(values + r * width - left, result, count);
    } else {
      for (int lane = 0; lane < count; ++lane) {
        if (lane < left) {
          queries[r * 3 * width + column + lane] = fromFloat<T>(result[lane]);
        } else {
          values[r * width + lane - left] = result[lane];
        }
      }
    }
  });

  clock.stop(kProjectionsPart);
  depthwise(chunk, first, last, separable);
  PackedWeight const& pointwise = layer.weights[kPointwise];
  matmul(convertRows(separable, p.hidden, rows, pointwise, buffers), pointwise,
         p.biases[kPointwise], rows, [&](int r, int64_t column, int count, Floats result) {
    T const* query = queries + r * 3 * width + column;
    Floats const factor = count == kWidth ? load(query) : loadPart(query, count);
    storeSome(product + r * width + column, result * factor, count);
  });

  clock.stop(kSeparablePart);
  PackedWeight const& generator = layer.weights[kGenerator];
  float* const logits = chunk.logits + first * taps;
  matmul(convertRows(product, width, rows, generator, buffers), generator, p.biases[kGenerator],
         rows, [&](int r, int64_t column, int count, Floats result) {
    storeSome(logits + r * taps + column, result, count);
  });
  clock.stop(kGeneratorPart);
}

// Phase 2.
template <typename T>
void attendSequence(LayerChunk const& chunk, int64_t sequence, int32_t headIndex, int64_t first,
                    int64_t last, void* memory) {
  EncoderLayerParams const& p = chunk.layer->params;
  int64_t const width = int64_t(p.numHeads) * p.headDim;
  int64_t const start = p.rowStarts[sequence];
  int64_t const begin = start - chunk.firstRow;
  int64_t const offset = int64_t(headIndex) * p.headDim;
  T const* const inputs = static_cast<T const*>(chunk.attentionInputs) + begin * 3 * width + offset;
  Head<T> const head{inputs,
                     inputs + width,
                     inputs + 2 * width,
                     3 * width,
                     p.mask == nullptr ? nullptr : p.mask + start,
                     p.rowStarts[sequence + 1] - start,
                     p.headDim};
  float* const to = chunk.mixed + outputRow(chunk, sequence, 0) * 2 * width + offset;
  PartClock clock(chunk.times);
  attendRows(head, first, last, memory, to, 2 * width);
  clock.stop(kAttentionPart);
}

// Phase 3.
inline void finishRows(LayerChunk const& chunk, int64_t first, int64_t last, void* memory) {
  EncoderLayer const& layer = *chunk.layer;
  EncoderLayerParams const& p = layer.params;
  int const rows = static_cast<int>(last - first);
  int64_t const hidden = p.hidden;
  int64_t const mixedWidth = 2 * int64_t(p.numHeads) * p.headDim;
  RowScratch scratch(memory);
  ActivationBuffers const buffers = takeActivations(scratch, layer);
  int64_t const intermediate = allOutputs(layer.weights[kUp]);
  float* const sums = scratch.take<float>(kMaxRows * hidden);
  float* const middle = scratch.take<float>(kMaxRows * hidden);
  float* const activated = scratch.take<float>(kMaxRows * intermediate);
  float const* residual = residualOf(chunk, first, last, scratch);
  int64_t const before = p.firstRowOnly != 0 ? chunk.firstSequence : chunk.firstRow;
  float* output = p.output + (before + first) * hidden;

  PartClock clock(chunk.times);
  convolve(chunk, first, last);
  clock.stop(kConvolutionPart);
  auto addTo = [&](float const* addend) {
    return [=](int r, int64_t column, int count, Floats result) {
      int64_t const at = r * hidden + column;
      storeSome(sums + at, result + loadSome(addend + at, count), count);
    };
  };
  PackedWeight const& attentionOutput = layer.weights[kAttentionOutput];
  matmul(convertRows(chunk.mixed + first * mixedWidth, mixedWidth, rows, attentionOutput, buffers),
         attentionOutput, p.biases[kAttentionOutput], rows, addTo(residual));
  for (int r = 0; r < rows; ++r) {
    normalize(sums + r * hidden, hidden, p.attentionGamma, p.attentionBeta, p.epsilon,
              middle + r * hidden);
  }
  clock.stop(kAttentionOutputPart);

  PackedWeight const& up = layer.weights[kUp];
  matmul(convertRows(middle, hidden, rows, up, buffers), up, p.biases[kUp], rows,
         [&](int r, int64_t column, int count, Floats result) {
    storeSome(activated + r * intermediate + column, gelu(result), count);
  });
  clock.stop(kUpPart);
  PackedWeight const& down = layer.weights[kDown];
  matmul(convertRows(activated, intermediate, rows, down, buffers), down, p.biases[kDown], rows,
         addTo(middle));
  for (int r = 0; r < rows; ++r) {
    normalize(sums + r * hidden, hidden, p.outputGamma, p.outputBeta, p.epsilon,
              output + r * hidden);
  }
  clock.stop(kDownPart);
}

inline void project(LayerChunk const& chunk, int64_t first, int64_t last, void* scratch) {
  if (chunk.layer->params.halfAttention != 0) {
    projectRows<BFloat16>(chunk, first, last, scratch);
  } else {
    projectRows<float>(chunk, first, last, scratch);
  }
}

inline void attend(LayerChunk const& chunk, int64_t sequence, int32_t head, int64_t first,
                   int64_t last, void* scratch) {
  if (chunk.layer->params.halfAttention != 0) {
    attendSequence<BFloat16>(chunk, sequence, head, first, last, scratch);
  } else {
    attendSequence<float>(chunk, sequence, head, first, last, scratch);
  }
}

constexpr LayerPhases kPhases{project, attend, finishRows};

}  // namespace
}  // namespace convbert
