// Every block and thread of the CUDA kernel, one after the other on the host. Slow and meant for
// tests: what it proves is the launch plan and the index arithmetic, not the device's behaviour.
#include <new>

#include "span_dynamic_conv.cuh"

namespace convbert {
namespace {

struct Emulator {
  SpanDynamicConvPlan const& plan;

  template <typename T, int K, int kVec>
  void runBlocks(float* shared) {
    for (int64_t block = 0; block < plan.blocks; ++block) {
      // Stale weights must not pass for fresh ones.
      memset(shared, 0xff, static_cast<size_t>(plan.sharedBytes));
      for (int32_t thread = 0; thread < plan.threads; ++thread) {
        stageWeights<T, K>(plan, block, thread, shared);
      }
      for (int32_t thread = 0; thread < plan.threads; ++thread) {
        stageWindow<T, K, kVec>(plan, block, thread, shared);
      }
    }
  }

  template <typename T, int K>
  Status run() {
    float* shared = new (std::nothrow) float[static_cast<size_t>(plan.sharedBytes) / 4];
    if (shared == nullptr) {
      return Status::kOutOfMemory;
    }
    if (plan.vectorised) {
      runBlocks<T, K, 16 / sizeof(T)>(shared);
    } else {
      runBlocks<T, K, 1>(shared);
    }
    delete[] shared;
    return Status::kOk;
  }
};

}  // namespace

Status runEmulated(SpanDynamicConvParams const& params, int32_t multiprocessors) noexcept {
  Status const status = validate(params);
  if (status != Status::kOk || params.batch == 0 || params.seq == 0) {
    return status;
  }
  SpanDynamicConvPlan const plan = makePlan(params, multiprocessors);
  return dispatch(params.dtype, params.kernelSize, Emulator{plan});
}

}  // namespace convbert
