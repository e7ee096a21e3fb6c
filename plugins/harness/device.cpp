// The part of the harness that needs a GPU.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>

#include <cuda_runtime_api.h>

#include "../runtime/half.h"
#include "harness.h"

using namespace nvinfer1;

namespace harness {
namespace {

constexpr size_t kGuardBytes = 256;
constexpr unsigned char kGuard = 0xa5;

int elementBytes(DataType type) { return type == DataType::kFLOAT ? 4 : 2; }

convbert::DataType kernelType(DataType type) {
  return type == DataType::kFLOAT  ? convbert::DataType::kFloat32
         : type == DataType::kHALF ? convbert::DataType::kFloat16
                                   : convbert::DataType::kBFloat16;
}

char const* typeName(DataType type) {
  return type == DataType::kFLOAT ? "fp32" : type == DataType::kHALF ? "fp16" : "bf16";
}

float element(std::vector<unsigned char> const& data, DataType type, size_t i) {
  if (type == DataType::kFLOAT) {
    return reinterpret_cast<float const*>(data.data())[i];
  }
  uint16_t const bits = reinterpret_cast<uint16_t const*>(data.data())[i];
  return type == DataType::kHALF ? convbert::toFloat(convbert::Float16{bits})
                                 : convbert::toFloat(convbert::BFloat16{bits});
}

std::vector<unsigned char> randomTensor(size_t count, DataType type, float scale, uint32_t seed) {
  std::vector<unsigned char> data(count * elementBytes(type));
  std::mt19937 generator(seed);
  for (size_t i = 0; i < count; ++i) {
    float const x = scale * (static_cast<float>(generator()) / 2147483648.0f - 1.0f);
    if (type == DataType::kFLOAT) {
      reinterpret_cast<float*>(data.data())[i] = x;
    } else {
      reinterpret_cast<uint16_t*>(data.data())[i] =
          type == DataType::kHALF ? convbert::fromFloat<convbert::Float16>(x).bits
                                  : convbert::fromFloat<convbert::BFloat16>(x).bits;
    }
  }
  return data;
}

std::vector<unsigned char> randomMask(Shape shape) {
  std::vector<int64_t> mask(shape.batch * shape.seq, 1);
  for (int64_t b = 0; b < shape.batch; ++b) {  // lengths seq, seq - 3, ...; a hole in the second
    for (int64_t s = std::max<int64_t>(1, shape.seq - 3 * b); s < shape.seq; ++s) {
      mask[b * shape.seq + s] = 0;
    }
  }
  if (shape.batch > 1) {
    mask[shape.seq] = 0;
  }
  auto const* bytes = reinterpret_cast<unsigned char const*>(mask.data());
  return {bytes, bytes + mask.size() * sizeof(int64_t)};
}

// One call's tensors, on the host and on the device.
class Call {
 public:
  Call(Operator const& op, Shape shape, DataType type, bool masked) : op_(op), shape_(shape) {
    for (size_t i = 0; i < op.inputs.size(); ++i) {
      Dims dims = dimsOf(op.inputs[i]);
      size_t count = 1;
      for (int32_t axis = 0; axis < dims.nbDims; ++axis) count *= dims.d[axis];
      // Weights of a sum over hundreds of channels are small.
      float const scale = dims.nbDims == 2 && dims.d[0] > 100 ? 0.1f : 2.0f;
      uint32_t const seed = static_cast<uint32_t>(i) + 1;
      add(dims, type, randomTensor(count, type, scale, seed));
    }
    if (masked) {
      add(dimsOf({kBatch, kSeq}), DataType::kINT64, randomMask(shape));
    }
    out_ = in_[0];
    outputBytes_ = host_[0].size();
    ok_ = cudaMalloc(&output_, outputBytes_ + 2 * kGuardBytes) == cudaSuccess && ok_;
  }

  ~Call() {
    for (void* pointer : device_) cudaFree(pointer);
    cudaFree(output_);
  }

  Call(Call const&) = delete;
  Call& operator=(Call const&) = delete;

  bool ok() const { return ok_; }

  double copyBytes() const { return 2.0 * outputBytes_; }

  double bytes() const {
    double total = outputBytes_;
    for (auto const& input : host_) total += input.size();
    return total;
  }

  bool prepare(IPluginV3OneRuntime* runtime) {
    return cudaMemset(output_, kGuard, outputBytes_ + 2 * kGuardBytes) == cudaSuccess &&
           runtime->onShapeChange(in_.data(), static_cast<int32_t>(in_.size()), &out_, 1) == 0;
  }

  int32_t enqueue(IPluginV3OneRuntime* runtime, cudaStream_t stream) {
    void* outputs[1] = {static_cast<unsigned char*>(output_) + kGuardBytes};
    return runtime->enqueue(in_.data(), &out_, const_cast<void const* const*>(device_.data()),
                            outputs, nullptr, stream);
  }

  void copyInput(cudaStream_t stream) {
    cudaMemcpyAsync(static_cast<unsigned char*>(output_) + kGuardBytes, device_[0], outputBytes_,
                    cudaMemcpyDeviceToDevice, stream);
  }

  // Largest difference to the CPU kernel in units of the largest output; infinite when a guard byte
  // changed or something failed.
  double difference() {
    std::vector<unsigned char> got(outputBytes_ + 2 * kGuardBytes), expected(outputBytes_);
    std::vector<void const*> inputs;
    for (size_t i = 0; i < op_.inputs.size(); ++i) inputs.push_back(host_[i].data());
    int64_t const* mask = host_.size() > op_.inputs.size()
                              ? reinterpret_cast<int64_t const*>(host_.back().data())
                              : nullptr;
    if (cudaMemcpy(got.data(), output_, got.size(), cudaMemcpyDeviceToHost) != cudaSuccess ||
        op_.reference(shape_, kernelType(in_[0].type), inputs, mask, expected.data()) !=
            convbert::Status::kOk) {
      return INFINITY;
    }
    for (size_t i = 0; i < kGuardBytes; ++i) {
      if (got[i] != kGuard || got[got.size() - 1 - i] != kGuard) return INFINITY;
    }
    got.erase(got.begin(), got.begin() + kGuardBytes);
    double worst = 0, largest = 1e-30;
    for (size_t i = 0; i < outputBytes_ / elementBytes(in_[0].type); ++i) {
      double const truth = element(expected, in_[0].type, i);
      double const error = std::fabs(element(got, in_[0].type, i) - truth);
      worst = std::isfinite(error) ? std::max(worst, error) : INFINITY;
      largest = std::max(largest, std::fabs(truth));
    }
    return worst / largest;
  }

 private:
  Dims dimsOf(std::vector<int64_t> const& extents) const {
    Dims dims{static_cast<int32_t>(extents.size()), {}};
    for (size_t axis = 0; axis < extents.size(); ++axis) {
      int64_t const extent = extents[axis];
      dims.d[axis] = extent == kBatch ? shape_.batch : extent == kSeq ? shape_.seq : extent;
    }
    return dims;
  }

  void add(Dims const& dims, DataType type, std::vector<unsigned char> data) {
    void* pointer = nullptr;
    ok_ = cudaMalloc(&pointer, data.size()) == cudaSuccess && ok_;
    device_.push_back(pointer);
    ok_ = ok_ && cudaMemcpy(pointer, data.data(), data.size(), cudaMemcpyHostToDevice) ==
                     cudaSuccess;
    in_.push_back({dims, type, TensorFormat::kLINEAR, 1.0f});
    host_.push_back(std::move(data));
  }

  Operator const& op_;
  Shape shape_;
  std::vector<PluginTensorDesc> in_;
  PluginTensorDesc out_{};
  std::vector<std::vector<unsigned char>> host_;
  std::vector<void*> device_;
  void* output_ = nullptr;
  size_t outputBytes_ = 0;
  bool ok_ = true;
};

// Median of 20 timings of 50 calls, in microseconds.
template <typename Function>
float microseconds(cudaStream_t stream, Function call) {
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  std::vector<float> times;
  for (int i = 0; i < 25; ++i) {
    cudaEventRecord(begin, stream);
    for (int j = 0; j < 50; ++j) call();
    cudaEventRecord(end, stream);
    cudaEventSynchronize(end);
    float milliseconds = 0;
    cudaEventElapsedTime(&milliseconds, begin, end);
    if (i >= 5) times.push_back(milliseconds * 1000 / 50);  // the first five warm up
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  std::nth_element(times.begin(), times.begin() + 10, times.end());
  return times[10];
}

// The call captured in a CUDA graph and replayed.
bool replay(Call& call, IPluginV3OneRuntime* runtime, cudaStream_t stream) {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  bool good = cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess;
  good = call.enqueue(runtime, stream) == 0 && good;
  good = cudaStreamEndCapture(stream, &graph) == cudaSuccess && good;
  good = good && cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess &&
         cudaGraphLaunch(exec, stream) == cudaSuccess &&
         cudaStreamSynchronize(stream) == cudaSuccess;
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  return good;
}

// Both sides sum in float and round once: a half type differs by one unit in the last place, the
// fused operator's by what rounding query * key_conv first does to a logit.
double limitOf(Operator const& op, DataType type) {
  bool const fused = !std::strcmp(op.name, "FusedSpanDynamicConv");
  return type == DataType::kFLOAT  ? 1e-5
         : type == DataType::kHALF ? (fused ? 4e-3 : 1e-3)
                                   : (fused ? 3e-2 : 8e-3);
}

}  // namespace

void runOnDevice(IPluginV3* context, Operator const& op) {
  auto* runtime = capability<IPluginV3OneRuntime>(context, PluginCapabilityType::kRUNTIME);
  cudaStream_t stream = nullptr;
  check(cudaStreamCreate(&stream) == cudaSuccess, op.name, "a stream");
  for (DataType type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
    for (Shape shape : {Shape{1, 1}, {1, 7}, {1, 128}, {3, 129}, {8, 128}, {32, 512}}) {
      for (bool masked : {false, true}) {
        Call call(op, shape, type, masked);
        bool good = call.ok() && call.prepare(runtime) && call.enqueue(runtime, stream) == 0 &&
                    cudaStreamSynchronize(stream) == cudaSuccess;
        double worst = call.difference();
        check(good && worst <= limitOf(op, type), op.name, "equal to the CPU kernel");
        good = call.prepare(runtime) && replay(call, runtime, stream);
        check(good && call.difference() <= limitOf(op, type), op.name, "replayed from a CUDA graph");
        float const kernel = microseconds(stream, [&] { call.enqueue(runtime, stream); });
        float const copy = microseconds(stream, [&] { call.copyInput(stream); });
        // Rates count what must move: every input once, the output once; a copy moves it twice.
        double const rate = call.bytes() / kernel, copyRate = call.copyBytes() / copy;
        std::printf("     %s %lldx%lld %s%s: difference %.2g, %.2f us, %.0f GB/s; device-to-device "
                    "copy of input 0 %.2f us, %.0f GB/s; ratio %.2f\n",
                    op.name, static_cast<long long>(shape.batch),
                    static_cast<long long>(shape.seq), typeName(type), masked ? " masked" : "",
                    worst, kernel, rate / 1e3, copy, copyRate / 1e3, rate / copyRate);
      }
    }
  }
  cudaStreamDestroy(stream);
}

}  // namespace harness
