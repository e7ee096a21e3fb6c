// Every block and thread of the CUDA kernel, one after the other on the host, with plain code for the
// tensor cores' tiles. See span_dynamic_conv_emulated.cpp for what that proves.
#include <new>

#include "fused_span_dynamic_conv.cuh"

namespace convbert {
namespace {

// What a block's threads hold between the stages.
struct BlockState {
  alignas(128) unsigned char shared[48 * 1024];
  LaneTile tiles[kMaxThreads][kMaxTilesPerWarp];
};

struct Emulator {
  FusedSpanDynamicConvPlan const& plan;
  BlockState& state;

  template <typename Stage>
  void forEachThread(Stage stage) {
    for (int32_t thread = 0; thread < plan.conv.threads; ++thread) {
      stage(thread);
    }
  }

  template <typename T, int K, int kVec>
  void runBlock(int64_t block) {
    int64_t const channels = int64_t(plan.conv.params.numHeads) * plan.conv.params.headDim;
    // Stale contents must not pass for fresh ones.
    memset(state.shared, 0xff, sizeof(state.shared));
    forEachThread([&](int32_t thread) {
      for (LaneTile& tile : state.tiles[thread]) clear(tile);
    });
    for (int64_t channel = 0; channel < channels; channel += kStepChannels<T>) {
      forEachThread([&](int32_t thread) {
        stageOperands<T>(plan, block, thread, channel, state.shared);
      });
      forEachThread([&](int32_t thread) {
        stageMultiply<T>(plan, thread, state.shared, state.tiles[thread]);
      });
    }
    forEachThread([&](int32_t thread) {
      stageLogits(plan, thread, state.shared, state.tiles[thread]);
    });
    forEachThread([&](int32_t thread) {
      stageSoftmax<T, K>(plan, block, thread, state.shared);
    });
    forEachThread([&](int32_t thread) {
      stageWindow<T, K, kVec>(plan.conv, block, thread, reinterpret_cast<float*>(state.shared));
    });
  }

  template <typename T, int K>
  Status run() {
    for (int64_t block = 0; block < plan.conv.blocks; ++block) {
      if (plan.conv.vectorised) {
        runBlock<T, K, 16 / sizeof(T)>(block);
      } else {
        runBlock<T, K, 1>(block);
      }
    }
    return Status::kOk;
  }
};

}  // namespace

Status runEmulated(FusedSpanDynamicConvParams const& params, int32_t multiprocessors) noexcept {
  Status const status = validate(params);
  if (status != Status::kOk || params.conv.batch == 0 || params.conv.seq == 0) {
    return status;
  }
  FusedSpanDynamicConvPlan const plan = makePlan(params, multiprocessors);
  if (plan.sharedBytes > static_cast<int32_t>(sizeof(BlockState::shared))) {
    return Status::kBadSize;
  }
  BlockState* state = new (std::nothrow) BlockState;
  if (state == nullptr) {
    return Status::kOutOfMemory;
  }
  Status const result = dispatch(params.conv.dtype, params.conv.kernelSize, Emulator{plan, *state});
  delete state;
  return result;
}

}  // namespace convbert
