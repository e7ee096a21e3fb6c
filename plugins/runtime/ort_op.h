// What every ONNX Runtime adapter needs: inputs and attributes read and refused with a message, the
// descriptor of one operator for one element type and provider, rows shared out over ONNX Runtime's
// own threads. A failed call comes back as the Status to return.
#pragma once

#include <cstdio>
#include <initializer_list>
#include <new>

#include "data_type.h"
#include "ort_abi.h"

#define CONVBERT_RETURN_IF_STATUS(expression)      \
  do {                                             \
    if (Status* convbertStatus_ = (expression)) {  \
      return convbertStatus_;                      \
    }                                              \
  } while (false)

namespace convbert::ort {

// The table RegisterCustomOps was given; no kernel exists before it is.
Api const& api() noexcept;
void setApi(Api const* table) noexcept;

template <typename... Arguments>
Status* invalid(char const* format, Arguments... arguments) noexcept {
  char message[320];
  snprintf(message, sizeof(message), format, arguments...);
  return api().createStatus(kInvalidArgument, message);
}

constexpr size_t kMaxRank = 3;

struct Tensor {
  void const* data = nullptr;
  long long dims[kMaxRank] = {0, 0, 0};
};

// Input `index`, which must have `rank` axes. `op` and `name` are for messages.
Status* readInput(KernelContext const* context, size_t index, char const* op, char const* name,
                  size_t rank, Tensor& tensor) noexcept;

// Input `index` if the node has one: `data` stays null otherwise.
Status* readOptionalInput(KernelContext const* context, size_t index, char const* op,
                          char const* name, size_t rank, Tensor& tensor) noexcept;

// The optional mask: int64 (batch, seq); `data` stays null without.
Status* readMask(KernelContext const* context, size_t index, char const* op, long long batch,
                 long long seq, Tensor& mask) noexcept;

// Allocates output 0 as (batch, seq, channels).
Status* allocateOutput(KernelContext* context, long long batch, long long seq, long long channels,
                       void** data) noexcept;

// An integer attribute of at least `least`.
Status* readAttribute(KernelInfo const* info, char const* op, char const* name, int64_t least,
                      int32_t& out) noexcept;

// For attributes kernel_size: odd, 1 to kMaxKernelSize.
Status* readKernelSize(KernelInfo const* info, char const* op, int32_t& out) noexcept;

// Calls run(data, first, last) for parts of [0, rows) on ONNX Runtime's threads. `elements` is the
// length of a row: parts are sized to outweigh the cost of handing them out.
Status* forEachRows(KernelContext const* context, int64_t rows, int64_t elements,
                    void (*run)(void const* data, int64_t first, int64_t last), void const* data);

// One operator for one element type on one provider.
struct Op : CustomOp {
  char const* name;
  char const* provider;
  ElementType elementType;
  DataType dtype;
  size_t inputs;  // of elementType
  bool hasMask;   // one more input, int64 and optional
};

inline Op const& self(CustomOp const* op) noexcept { return *static_cast<Op const*>(op); }

// What differs between operators; the element type and the provider are makeOp's.
struct OpTraits {
  char const* name;
  size_t inputs;
  bool hasMask;
  Status* (*createKernel)(CustomOp const*, Api const*, KernelInfo const*, void**);
  void (*destroyKernel)(void*);
  Status* (*computeOnCpu)(void*, KernelContext*);
  Status* (*computeOnCuda)(void*, KernelContext*);  // null without CUDA
  Status* (*inferShape)(CustomOp const*, ShapeInferContext*);
};

// Three element types on the CPU and, where there is a CUDA kernel, three on the GPU.
struct OpSet {
  Op ops[6];
  size_t count;
};

OpSet makeOps(OpTraits const& traits) noexcept;

// What every descriptor says, for the CPU: names, types, counts of inputs and the kernel are missing.
// One float32 output.
CustomOp cpuOp() noexcept;

// For an output of the type and shape of input 0, or with another length of the first axis.
Status* shapeLikeInput0(ShapeInferContext* context, bool otherFirstAxis);

// inferShape for an output of the shape and type of input 0.
Status* sameShapeAsInput0(CustomOp const*, ShapeInferContext* context);

#ifdef CONVBERT_WITH_CUDA
Status* cudaStatus(char const* op, int error) noexcept;
#endif

}  // namespace convbert::ort
