// Launch: validate, plan, pick the instantiation, enqueue.
#include "fused_span_dynamic_conv.cuh"

namespace convbert {
namespace {

// Not inlined: it is the same for every K, and by far the larger part of the code.
template <typename T>
__device__ __noinline__ void generateLogits(FusedSpanDynamicConvPlan const& plan,
                                            unsigned char* shared) {
  int32_t const thread = static_cast<int32_t>(threadIdx.x);
  int64_t const channels = int64_t(plan.conv.params.numHeads) * plan.conv.params.headDim;
  typename TileOf<T>::Type tiles[kMaxTilesPerWarp];
#pragma unroll
  for (int t = 0; t < kMaxTilesPerWarp; ++t) clear(tiles[t]);
  for (int64_t channel = 0; channel < channels; channel += kStepChannels<T>) {
    stageOperands<T>(plan, blockIdx.x, thread, channel, shared);
    __syncthreads();
    stageMultiply<T>(plan, thread, shared, tiles);
    __syncthreads();
  }
  stageLogits(plan, thread, shared, tiles);
  __syncthreads();
}

template <typename T, int K, int kVec>
__global__ void __launch_bounds__(kMaxThreads)
    fusedSpanDynamicConvKernel(__grid_constant__ FusedSpanDynamicConvPlan const plan) {
  extern __shared__ __align__(128) unsigned char shared[];
  int32_t const thread = static_cast<int32_t>(threadIdx.x);
  generateLogits<T>(plan, shared);
  stageSoftmax<T, K>(plan, blockIdx.x, thread, shared);
  __syncthreads();
  stageWindow<T, K, kVec>(plan.conv, blockIdx.x, thread, reinterpret_cast<float*>(shared));
}

struct Launcher {
  FusedSpanDynamicConvPlan const& plan;
  cudaStream_t stream;

  template <typename T, int K>
  cudaError_t run() {
    dim3 const grid(static_cast<unsigned>(plan.conv.blocks));
    dim3 const block(static_cast<unsigned>(plan.conv.threads));
    if (plan.conv.vectorised) {
      fusedSpanDynamicConvKernel<T, K, 16 / sizeof(T)>
          <<<grid, block, plan.sharedBytes, stream>>>(plan);
    } else {
      fusedSpanDynamicConvKernel<T, K, 1><<<grid, block, plan.sharedBytes, stream>>>(plan);
    }
    return cudaPeekAtLastError();
  }
};

}  // namespace

cudaError_t launchFusedSpanDynamicConv(FusedSpanDynamicConvParams const& params,
                                       cudaStream_t stream) noexcept {
  if (validate(params) != Status::kOk) {
    return cudaErrorInvalidValue;
  }
  if (params.conv.batch == 0 || params.conv.seq == 0) {
    return cudaSuccess;
  }
  int device = 0;
  int multiprocessors = 0;
  CONVBERT_RETURN_IF_CUDA_ERROR(cudaGetDevice(&device));
  CONVBERT_RETURN_IF_CUDA_ERROR(
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  FusedSpanDynamicConvPlan const plan = makePlan(params, multiprocessors);
  if (plan.conv.blocks > INT32_MAX || plan.sharedBytes > 48 * 1024) {
    return cudaErrorInvalidValue;
  }
  return dispatch(params.conv.dtype, params.conv.kernelSize, Launcher{plan, stream});
}

}  // namespace convbert
