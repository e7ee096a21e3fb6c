// PackRows and UnpackRows as ONNX Runtime custom ops.
#include <vector>

#include "../runtime/ort_ops.h"
#include "row_packing.h"

namespace convbert::ort {
namespace {

constexpr char const* kPack = "PackRows";
constexpr char const* kUnpack = "UnpackRows";

struct Kernel {
  int32_t keepPads;
};

Status* createKernel(CustomOp const* op, Api const*, KernelInfo const* info, void** out) {
  Kernel kernel{0};
  CONVBERT_RETURN_IF_STATUS(
      readAttribute(info, op->getName(op), "keep_pads", 0, kernel.keepPads));
  *out = new (std::nothrow) Kernel(kernel);
  return *out != nullptr ? nullptr : api().createStatus(kFail, "PackRows: out of memory");
}

void destroyKernel(void* kernel) { delete static_cast<Kernel*>(kernel); }

// The packing of a batch whose mask is `mask`; rowStarts gets batch + 1 numbers.
Status* packingOf(char const* op, Kernel const& kernel, Tensor const& mask, int64_t channels,
                  RowPacking& packing, int64_t* rowStarts) {
  packing.mask = kernel.keepPads != 0 ? nullptr : static_cast<int64_t const*>(mask.data);
  packing.batch = mask.dims[0];
  packing.seq = mask.dims[1];
  packing.channels = channels;
  convbert::Status const status = countRows(packing, rowStarts);
  return status == convbert::Status::kOk ? nullptr : invalid("%s: %s", op, statusMessage(status));
}

Status* output(KernelContext* context, size_t index, std::initializer_list<int64_t> dims,
               void** data) {
  Value* value = nullptr;
  CONVBERT_RETURN_IF_STATUS(
      api().kernelContextGetOutput(context, index, dims.begin(), dims.size(), &value));
  return api().getTensorMutableData(value, data);
}

Status* pack(void* kernel, KernelContext* context) {
  Tensor hidden, mask;
  CONVBERT_RETURN_IF_STATUS(readInput(context, 0, kPack, "hidden", 3, hidden));
  CONVBERT_RETURN_IF_STATUS(readMask(context, 1, kPack, hidden.dims[0], hidden.dims[1], mask));
  void* starts = nullptr;
  CONVBERT_RETURN_IF_STATUS(output(context, 1, {mask.dims[0] + 1}, &starts));
  auto* rowStarts = static_cast<int64_t*>(starts);
  RowPacking packing{};
  CONVBERT_RETURN_IF_STATUS(packingOf(kPack, *static_cast<Kernel const*>(kernel), mask,
                                      hidden.dims[2], packing, rowStarts));
  void* rows = nullptr;
  CONVBERT_RETURN_IF_STATUS(
      output(context, 0, {rowStarts[packing.batch], packing.channels}, &rows));
  packRows(packing, rowStarts, static_cast<float const*>(hidden.data), static_cast<float*>(rows));
  return nullptr;
}

Status* unpack(void* kernel, KernelContext* context) {
  Tensor rows, mask;
  CONVBERT_RETURN_IF_STATUS(readInput(context, 0, kUnpack, "rows", 2, rows));
  CONVBERT_RETURN_IF_STATUS(readInput(context, 1, kUnpack, "attention_mask", 2, mask));
  std::vector<int64_t> rowStarts(mask.dims[0] + 1);
  RowPacking packing{};
  CONVBERT_RETURN_IF_STATUS(packingOf(kUnpack, *static_cast<Kernel const*>(kernel), mask,
                                      rows.dims[1], packing, rowStarts.data()));
  if (rowStarts.back() != rows.dims[0]) {
    return invalid("%s: %lld rows, expected the mask's %lld", kUnpack, rows.dims[0],
                   static_cast<long long>(rowStarts.back()));
  }
  void* padded = nullptr;
  CONVBERT_RETURN_IF_STATUS(
      output(context, 0, {packing.batch, packing.seq, packing.channels}, &padded));
  unpackRows(packing, rowStarts.data(), static_cast<float const*>(rows.data),
             static_cast<float*>(padded));
  return nullptr;
}

CustomOp describe(char const* (*name)(CustomOp const*), size_t outputs,
                  Status* (*compute)(void*, KernelContext*)) {
  CustomOp op = cpuOp();
  op.getName = name;
  op.getInputTypeCount = [](CustomOp const*) -> size_t { return 2; };
  op.getInputType = [](CustomOp const*, size_t index) { return index == 0 ? kFloat : kInt64; };
  op.getOutputTypeCount = outputs == 1 ? [](CustomOp const*) -> size_t { return 1; }
                                       : [](CustomOp const*) -> size_t { return 2; };
  op.getOutputType = op.getInputType;
  op.createKernelV2 = createKernel;
  op.kernelDestroy = destroyKernel;
  op.kernelComputeV2 = compute;
  return op;
}

}  // namespace

CustomOp const& packRowsOp() noexcept {
  static CustomOp const kOp = describe([](CustomOp const*) { return kPack; }, 2, pack);
  return kOp;
}

CustomOp const& unpackRowsOp() noexcept {
  static CustomOp const kOp = describe([](CustomOp const*) { return kUnpack; }, 1, unpack);
  return kOp;
}

}  // namespace convbert::ort
