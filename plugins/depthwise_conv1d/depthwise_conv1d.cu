// Launch: validate, plan, pick the instantiation, enqueue.
#include "depthwise_conv1d.cuh"

namespace convbert {
namespace {

// Four blocks a multiprocessor may take 128 registers a thread, three 168.
constexpr int minBlocks(int kernelSize, int vec) { return kernelSize * vec * 2 <= 96 ? 4 : 3; }

template <typename T, int K, int kVec>
__global__ void __launch_bounds__(kThreads, minBlocks(K, kVec))
    depthwiseConv1dKernel(__grid_constant__ DepthwiseConv1dPlan const plan) {
  convolveRun<T, K, kVec>(plan, blockIdx.x, static_cast<int32_t>(threadIdx.x));
}

struct Launcher {
  DepthwiseConv1dPlan const& plan;
  cudaStream_t stream;

  template <typename T, int K>
  cudaError_t run() {
    unsigned const grid = static_cast<unsigned>(plan.blocks);
    if (plan.vectorised) {
      depthwiseConv1dKernel<T, K, vectorChannels(sizeof(T), K)>
          <<<grid, kThreads, 0, stream>>>(plan);
    } else {
      depthwiseConv1dKernel<T, K, 1><<<grid, kThreads, 0, stream>>>(plan);
    }
    return cudaPeekAtLastError();
  }
};

}  // namespace

cudaError_t launchDepthwiseConv1d(DepthwiseConv1dParams const& params,
                                  cudaStream_t stream) noexcept {
  if (validate(params) != Status::kOk) {
    return cudaErrorInvalidValue;
  }
  if (params.batch == 0 || params.seq == 0) {
    return cudaSuccess;
  }
  int device = 0;
  int multiprocessors = 0;
  CONVBERT_RETURN_IF_CUDA_ERROR(cudaGetDevice(&device));
  CONVBERT_RETURN_IF_CUDA_ERROR(
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  DepthwiseConv1dPlan const plan = makePlan(params, multiprocessors);
  if (plan.blocks > INT32_MAX) {
    return cudaErrorInvalidValue;
  }
  return dispatch(params.dtype, params.kernelSize, Launcher{plan, stream});
}

}  // namespace convbert
