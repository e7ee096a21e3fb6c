// EncoderLayer: a whole ConvBERT layer on packed rows, on the CPU. Contract: README.md.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../runtime/data_type.h"
#include "../runtime/instruction_set.h"
#include "../runtime/status.h"
#include "packed_weight.h"
#include "part_times.h"

namespace convbert {

// The layer's linear maps, in the order of the operator's inputs.
enum LinearIndex : int32_t {
  kProjections = 0,      // hidden -> query, key, value and convolution value, each A wide
  kPointwise = 1,        // hidden -> A: the separable convolution's second half
  kGenerator = 2,        // A -> numHeads * kernelSize
  kAttentionOutput = 3,  // 2 A -> hidden
  kUp = 4,               // hidden -> intermediate
  kDown = 5,             // intermediate -> hidden
  kLinears = 6,
};

// Plain data, mirrored field by field by ctypes (tests/kernels/test_encoder_layer.py).
struct EncoderLayerParams {
  float const* input;                // (rows, hidden), contiguous
  float* output;                     // (rows, hidden), or (batch, hidden) with firstRowOnly; overlaps no
                                     // input
  int64_t const* rowStarts;          // (batch + 1): sequence b is rows [rowStarts[b], rowStarts[b+1])
  int64_t const* mask;               // (rows), 0 at rows that are no keys; null: all are
  void const* weights[kLinears];     // packed, see packed_weight.h
  int64_t weightBytes[kLinears];
  float const* biases[kLinears];
  float const* depthwise;            // (kernelSize, hidden)
  float const* attentionGamma;       // (hidden), as the next three
  float const* attentionBeta;
  float const* outputGamma;
  float const* outputBeta;
  int64_t batch;
  int64_t rows;
  int32_t hidden;
  int32_t numHeads;
  int32_t headDim;
  int32_t kernelSize;       // odd, 1 to kMaxKernelSize
  float epsilon;            // of both layer normalizations
  int32_t halfAttention;    // 1: attention on bfloat16, sums in float32
  int32_t firstRowOnly;     // 1: of each sequence its first row, zeros for a sequence without rows
};

// The weights parsed, everything checked.
struct EncoderLayer {
  EncoderLayerParams params;
  PackedWeight weights[kLinears];
};

Status prepare(EncoderLayerParams const& params, EncoderLayer& layer) noexcept;

// Runs task(data, i) for each i in [0, count), in any order and on any threads, and returns when all
// are done; false if it could not.
struct ParallelFor {
  bool (*run)(void* context, size_t count, void (*task)(void* data, size_t index), void* data);
  void* context;
  int32_t threads;  // that tasks are cut for
};

// All rows. Takes memory for at most kChunkRows rows (or the longest sequence) and for the tasks that
// run at a time; it is kept for the next call. `times` is added to, unless null.
Status runOnCpu(EncoderLayer const& layer, ParallelFor const& parallel,
                InstructionSet instructionSet, PartTimes* times = nullptr) noexcept;

// Sequences are taken together up to this many rows.
constexpr int64_t kChunkRows = 2048;

// --- between encoder_layer.cpp and the builds of its phases ---

// Rows [firstRow, firstRow + rows) of the tensors: sequences that are computed together.
struct LayerChunk {
  EncoderLayer const* layer;
  InstructionSet instructionSet;
  PartTimes* times;
  int64_t firstSequence;
  int64_t lastSequence;
  int64_t firstRow;
  int64_t rows;
  // Scratch, one row for each of the chunk's.
  void* attentionInputs;  // query, key, value: (rows, 3 A) float32 or bfloat16
  float* convolutionValue;  // (rows, A)
  float* logits;            // (rows, numHeads * kernelSize)
  float* mixed;             // (rows of the output, 2 A): attention context, convolution
};

// One instruction set's build. `scratch` is aligned to 64 bytes.
struct LayerPhases {
  // query, key, value, convolution value and its kernel logits of rows [first, last) of the chunk
  void (*project)(LayerChunk const& chunk, int64_t first, int64_t last, void* scratch);
  // attention context of rows [first, last) of one sequence, for one head
  void (*attend)(LayerChunk const& chunk, int64_t sequence, int32_t head, int64_t first,
                 int64_t last, void* scratch);
  // the rest, up to the output, of its rows [first, last): the chunk's, or one for each sequence
  void (*finish)(LayerChunk const& chunk, int64_t first, int64_t last, void* scratch);
};

// Row of the output, counted from the chunk's first, that row `row` of a sequence becomes.
inline int64_t outputRow(LayerChunk const& chunk, int64_t sequence, int64_t row) noexcept {
  EncoderLayerParams const& p = chunk.layer->params;
  return p.firstRowOnly != 0 ? sequence - chunk.firstSequence
                             : p.rowStarts[sequence] - chunk.firstRow + row;
}

// Rows of a task at most.
constexpr int64_t kTaskRows = 144;

int64_t rowScratchBytes(EncoderLayer const& layer) noexcept;
int64_t attentionScratchBytes(EncoderLayer const& layer, int64_t longest) noexcept;

}  // namespace convbert
