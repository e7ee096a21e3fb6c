// Checks, the cutting into tasks, the choice of the instruction set, and the portable phases.
#include "encoder_layer.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#include "encoder_layer_phases.h"
#include "scratch_pool.h"

namespace convbert {

#ifdef CONVBERT_WITH_X86
extern LayerPhases const kLayerPhasesAvx2;
extern LayerPhases const kLayerPhasesAvx512;
extern LayerPhases const kLayerPhasesAvx512Vnni;
extern LayerPhases const kLayerPhasesAvx512Bf16;
extern LayerPhases const kLayerPhasesAmx;
extern LayerPhases const kLayerPhasesAmxEmulated;
#endif

namespace {

LayerPhases const& phasesOf(InstructionSet instructionSet) noexcept {
#ifdef CONVBERT_WITH_X86
  switch (instructionSet) {
    case InstructionSet::kAvx2: return kLayerPhasesAvx2;
    case InstructionSet::kAvx512: return kLayerPhasesAvx512;
    case InstructionSet::kAvx512Vnni: return kLayerPhasesAvx512Vnni;
    case InstructionSet::kAvx512Bf16: return kLayerPhasesAvx512Bf16;
    case InstructionSet::kAmx: return kLayerPhasesAmx;
    case InstructionSet::kAmxEmulated: return kLayerPhasesAmxEmulated;
    case InstructionSet::kPortable: break;
  }
#else
  (void)instructionSet;
#endif
  return kPhases;
}

bool hasShape(PackedWeight const& w, int64_t inputs, int64_t outputs) {
  return allInputs(w) == inputs && allOutputs(w) == outputs;
}

Status checkShapes(EncoderLayer const& layer) noexcept {
  EncoderLayerParams const& p = layer.params;
  int64_t const width = int64_t(p.numHeads) * p.headDim;
  PackedWeight const* w = layer.weights;
  bool const fits = hasShape(w[kProjections], p.hidden, 4 * width) &&
                    hasShape(w[kPointwise], p.hidden, width) &&
                    hasShape(w[kGenerator], width, int64_t(p.numHeads) * p.kernelSize) &&
                    hasShape(w[kAttentionOutput], 2 * width, p.hidden) &&
                    allInputs(w[kUp]) == p.hidden &&
                    hasShape(w[kDown], allOutputs(w[kUp]), p.hidden);
  return fits ? Status::kOk : Status::kBadWeight;
}

Status checkRowStarts(EncoderLayerParams const& p) noexcept {
  if (p.batch < 0 || p.rows < 0 || p.rowStarts == nullptr) {
    return Status::kBadSize;
  }
  bool rising = p.rowStarts[0] == 0 && p.rowStarts[p.batch] == p.rows;
  for (int64_t b = 0; b < p.batch; ++b) {
    rising = rising && p.rowStarts[b + 1] >= p.rowStarts[b];
  }
  return rising ? Status::kOk : Status::kBadSize;
}

struct RowTasks {
  LayerChunk const* chunk;
  void (*run)(LayerChunk const&, int64_t, int64_t, void*);
  int64_t rows;
  int64_t rowsPerTask;
  size_t scratchBytes;
  std::atomic<bool> failed{false};
};

void runRowTask(void* data, size_t index) {
  RowTasks& tasks = *static_cast<RowTasks*>(data);
  int64_t const first = static_cast<int64_t>(index) * tasks.rowsPerTask;
  int64_t const beyond = first + tasks.rowsPerTask;
  int64_t const last = beyond < tasks.rows ? beyond : tasks.rows;
  Scratch const scratch(tasks.scratchBytes);
  if (scratch.data() == nullptr) {
    tasks.failed = true;
    return;
  }
  tasks.run(*tasks.chunk, first, last, scratch.data());
}

struct AttentionTask {
  int64_t sequence;
  int32_t head;
  int64_t first;
  int64_t last;
};

struct AttentionTasks {
  LayerChunk const* chunk;
  void (*run)(LayerChunk const&, int64_t, int32_t, int64_t, int64_t, void*);
  std::vector<AttentionTask> list;
  size_t scratchBytes;
  std::atomic<bool> failed{false};
};

void runAttentionTask(void* data, size_t index) {
  AttentionTasks& tasks = *static_cast<AttentionTasks*>(data);
  AttentionTask const& task = tasks.list[index];
  Scratch const scratch(tasks.scratchBytes);
  if (scratch.data() == nullptr) {
    tasks.failed = true;
    return;
  }
  tasks.run(*tasks.chunk, task.sequence, task.head, task.first, task.last, scratch.data());
}

// Rows of a task: as many tasks as threads, or a multiple of that, of equal length.
int64_t rowsOfTask(int64_t rows, int32_t threads, InstructionSet instructionSet) {
  // whole tiles of rows: 6 in registers, 16 in AMX
  int64_t const tile = instructionSet >= InstructionSet::kAmx ? 16 : 6;
  int64_t const tasks = roundUp(ceilDivide(rows, kTaskRows), threads);
  int64_t const rowsPerTask = roundUp(ceilDivide(rows, tasks), tile);
  return rowsPerTask < kTaskRows ? rowsPerTask : kTaskRows;
}

bool runRowTasks(LayerChunk const& chunk, ParallelFor const& parallel, int64_t rows,
                 void (*run)(LayerChunk const&, int64_t, int64_t, void*)) {
  int64_t const perTask = rowsOfTask(rows, parallel.threads, chunk.instructionSet);
  RowTasks tasks{&chunk, run, rows, perTask, static_cast<size_t>(rowScratchBytes(*chunk.layer))};
  size_t const count = ceilDivide(rows, perTask);
  return parallel.run(parallel.context, count, runRowTask, &tasks) && !tasks.failed;
}

// Queries of an attention task where several threads share one sequence.
constexpr int64_t kQueriesOfTask = 192;

std::vector<AttentionTask> attentionTasks(LayerChunk const& chunk, int32_t threads) {
  EncoderLayerParams const& p = chunk.layer->params;
  std::vector<AttentionTask> list;
  for (int64_t b = chunk.firstSequence; b < chunk.lastSequence; ++b) {
    int64_t const all = p.rowStarts[b + 1] - p.rowStarts[b];
    int64_t const length = p.firstRowOnly != 0 && all > 1 ? 1 : all;
    int64_t const queries = threads == 1 ? length : kQueriesOfTask;
    for (int32_t head = 0; head < p.numHeads; ++head) {
      for (int64_t first = 0; first < length; first += queries) {
        int64_t const beyond = first + queries;
        list.push_back({b, head, first, beyond < length ? beyond : length});
      }
    }
  }
  return list;
}

int64_t longestSequence(LayerChunk const& chunk) {
  int64_t longest = 0;
  int64_t const* starts = chunk.layer->params.rowStarts;
  for (int64_t b = chunk.firstSequence; b < chunk.lastSequence; ++b) {
    int64_t const length = starts[b + 1] - starts[b];
    longest = length > longest ? length : longest;
  }
  return longest;
}

Status runChunk(LayerChunk& chunk, ParallelFor const& parallel) {
  EncoderLayer const& layer = *chunk.layer;
  EncoderLayerParams const& p = layer.params;
  int64_t const width = int64_t(p.numHeads) * p.headDim;
  int64_t const element = p.halfAttention != 0 ? 2 : 4;
  int64_t const inputBytes = roundUp(chunk.rows * 3 * width * element, 64);
  int64_t const valueBytes = roundUp(chunk.rows * width * 4, 64);
  int64_t const logitBytes = roundUp(chunk.rows * p.numHeads * p.kernelSize * 4, 64);
  int64_t const outputRows =
      p.firstRowOnly != 0 ? chunk.lastSequence - chunk.firstSequence : chunk.rows;
  int64_t const mixedBytes = roundUp(outputRows * 2 * width * 4, 64);
  Scratch const shared(inputBytes + valueBytes + mixedBytes + logitBytes);
  if (shared.data() == nullptr) {
    return Status::kOutOfMemory;
  }
  auto* at = static_cast<unsigned char*>(shared.data());
  chunk.attentionInputs = at;
  chunk.convolutionValue = reinterpret_cast<float*>(at + inputBytes);
  chunk.mixed = reinterpret_cast<float*>(at + inputBytes + valueBytes);
  chunk.logits = reinterpret_cast<float*>(at + inputBytes + valueBytes + mixedBytes);

  LayerPhases const& phases = phasesOf(chunk.instructionSet);
  AttentionTasks attention{&chunk, phases.attend, attentionTasks(chunk, parallel.threads),
                           static_cast<size_t>(attentionScratchBytes(layer, longestSequence(chunk)))};
  bool const done =
      runRowTasks(chunk, parallel, chunk.rows, phases.project) &&
      parallel.run(parallel.context, attention.list.size(), runAttentionTask, &attention) &&
      !attention.failed && runRowTasks(chunk, parallel, outputRows, phases.finish);
  return done ? Status::kOk : Status::kOutOfMemory;
}

// A sequence without rows has no first one.
void clearEmptySequences(EncoderLayerParams const& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    if (p.rowStarts[b] == p.rowStarts[b + 1]) {
      std::fill_n(p.output + b * p.hidden, p.hidden, 0.0f);
    }
  }
}

}  // namespace

Status prepare(EncoderLayerParams const& p, EncoderLayer& layer) noexcept {
  if (p.hidden <= 0 || p.numHeads <= 0 || p.headDim <= 0 || p.kernelSize <= 0) {
    return Status::kBadSize;
  }
  if (p.kernelSize % 2 == 0) {
    return Status::kEvenKernelSize;
  }
  if (p.kernelSize > kMaxKernelSize) {
    return Status::kKernelTooLarge;
  }
  layer.params = p;
  bool given = p.depthwise && p.attentionGamma && p.attentionBeta && p.outputGamma && p.outputBeta;
  for (int i = 0; i < kLinears; ++i) {
    Status const status = parsePackedWeight(p.weights[i], p.weightBytes[i], layer.weights[i]);
    if (status != Status::kOk) {
      return status;
    }
    given = given && p.biases[i];
  }
  bool const writes = p.rows > 0 || (p.firstRowOnly != 0 && p.batch > 0);
  if (!given || (writes && !p.output) || (p.rows > 0 && (!p.input || !p.rowStarts))) {
    return Status::kNullPointer;
  }
  Status const status = checkShapes(layer);
  return status == Status::kOk ? checkRowStarts(p) : status;
}

int64_t rowScratchBytes(EncoderLayer const& layer) noexcept {
  EncoderLayerParams const& p = layer.params;
  int64_t units = 0;
  int64_t groups = 0;
  for (PackedWeight const& w : layer.weights) {
    units = w.groups * unitsOf(w) > units ? w.groups * unitsOf(w) : units;
    groups = w.groups > groups ? w.groups : groups;
  }
  int64_t const converted = units + 1 + groups;
  int64_t const floats = (p.firstRowOnly != 0 ? 3 : 2) * int64_t(p.hidden) + allOutputs(layer.weights[kUp]) +
                         int64_t(p.numHeads) * p.headDim;
  return (converted + floats) * kTaskRows * 4 + 16 * 64;
}

int64_t attentionScratchBytes(EncoderLayer const& layer, int64_t longest) noexcept {
  int64_t const keys = roundUp(longest, 32);
  int64_t const dim = roundUp(layer.params.headDim, kPanelColumns);
  // as layOut() with float32; bfloat16 takes no more
  return (2 * keys * dim + 2 * kQueryRows * dim + 2 * kQueryRows * keys + keys) * 4 + 16 * 64;
}

Status runOnCpu(EncoderLayer const& layer, ParallelFor const& parallel,
                InstructionSet instructionSet, PartTimes* times) noexcept {
  EncoderLayerParams const& p = layer.params;
  try {
    for (int64_t b = 0; b < p.batch;) {
      LayerChunk chunk{};
      chunk.layer = &layer;
      chunk.instructionSet = instructionSet;
      chunk.times = times;
      chunk.firstSequence = b;
      chunk.firstRow = p.rowStarts[b];
      do {
        ++b;
      } while (b < p.batch && p.rowStarts[b + 1] - chunk.firstRow <= kChunkRows);
      chunk.lastSequence = b;
      chunk.rows = p.rowStarts[b] - chunk.firstRow;
      if (chunk.rows == 0) {
        continue;
      }
      Status const status = runChunk(chunk, parallel);
      if (status != Status::kOk) {
        return status;
      }
    }
    if (p.firstRowOnly != 0) {
      clearEmptySequences(p);
    }
  } catch (std::bad_alloc const&) {
    return Status::kOutOfMemory;
  }
  return Status::kOk;
}

}  // namespace convbert
