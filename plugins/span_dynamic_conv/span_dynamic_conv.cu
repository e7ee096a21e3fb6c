// Launch: validate, plan, pick the instantiation, enqueue.
#include "span_dynamic_conv.cuh"

namespace convbert {
namespace {

template <typename T, int K, int kVec>
__global__ void __launch_bounds__(kMaxThreads)
    spanDynamicConvKernel(__grid_constant__ SpanDynamicConvPlan const plan) {
  extern __shared__ float weights[];
  int32_t const thread = static_cast<int32_t>(threadIdx.x);
  stageWeights<T, K>(plan, blockIdx.x, thread, weights);
  __syncthreads();
  stageWindow<T, K, kVec>(plan, blockIdx.x, thread, weights);
}

struct Launcher {
  SpanDynamicConvPlan const& plan;
  cudaStream_t stream;

  template <typename T, int K>
  cudaError_t run() {
    dim3 const grid(static_cast<unsigned>(plan.blocks));
    dim3 const block(static_cast<unsigned>(plan.threads));
    if (plan.vectorised) {
      spanDynamicConvKernel<T, K, 16 / sizeof(T)>
          <<<grid, block, plan.sharedBytes, stream>>>(plan);
    } else {
      spanDynamicConvKernel<T, K, 1><<<grid, block, plan.sharedBytes, stream>>>(plan);
    }
    return cudaPeekAtLastError();
  }
};

}  // namespace

cudaError_t launchSpanDynamicConv(SpanDynamicConvParams const& params,
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
  SpanDynamicConvPlan const plan = makePlan(params, multiprocessors);
  if (plan.blocks > INT32_MAX || plan.sharedBytes > 48 * 1024) {
    return cudaErrorInvalidValue;
  }
  return dispatch(params.dtype, params.kernelSize, Launcher{plan, stream});
}

}  // namespace convbert
