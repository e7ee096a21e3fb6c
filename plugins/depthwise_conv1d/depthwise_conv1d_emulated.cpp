// Every block and thread of the CUDA kernel, one after the other on the host. Slow and meant for
// tests: what it proves is the launch plan and the index arithmetic, not the device's behaviour.
#include "depthwise_conv1d.cuh"

namespace convbert {
namespace {

struct Emulator {
  DepthwiseConv1dPlan const& plan;

  template <typename T, int K, int kVec>
  Status runBlocks() {
    for (int64_t block = 0; block < plan.blocks; ++block) {
      for (int32_t thread = 0; thread < kThreads; ++thread) {
        convolveRun<T, K, kVec>(plan, block, thread);
      }
    }
    return Status::kOk;
  }

  template <typename T, int K>
  Status run() {
    return plan.vectorised ? runBlocks<T, K, vectorChannels(sizeof(T), K)>() : runBlocks<T, K, 1>();
  }
};

}  // namespace

Status runEmulated(DepthwiseConv1dParams const& params, int32_t multiprocessors) noexcept {
  Status const status = validate(params);
  if (status != Status::kOk || params.batch == 0 || params.seq == 0) {
    return status;
  }
  DepthwiseConv1dPlan const plan = makePlan(params, multiprocessors);
  return dispatch(params.dtype, params.kernelSize, Emulator{plan});
}

}  // namespace convbert
