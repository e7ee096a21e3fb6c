// The part of ONNX Runtime's stable C ABI that a custom-op library uses, declared by ourselves so
// that building needs no download: no registry ships ONNX Runtime's headers.
//
// The C API is a table of function pointers whose order never changes; new versions only append.
// Slots are named by their index in that table, and the version asked for at run time is 17 (the
// first with shape inference and thread-pool access for custom ops), so any ONNX Runtime since 1.17
// serves. tests/kernels/test_ort_abi.py compiles check_ort_abi.cpp, which compares every index and
// offset below with the real header when ONNXRUNTIME_INCLUDE_DIR names one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace convbert::ort {

constexpr uint32_t kApiVersion = 17;

// Opaque to us.
struct Status;
struct Value;
struct TensorInfo;
struct KernelInfo;
struct KernelContext;
struct ShapeInferContext;
struct SessionOptions;
struct CustomOpDomain;
struct OpAttr;

enum ErrorCode : int32_t { kFail = 1, kInvalidArgument = 2, kNotImplemented = 9, kEpFail = 11 };
enum ElementType : int32_t { kUndefined = 0, kFloat = 1, kUint8 = 2, kInt64 = 7, kFloat16 = 10, kBFloat16 = 16 };
enum Characteristic : int32_t { kRequired = 0, kOptional = 1, kVariadic = 2 };
enum MemoryType : int32_t { kMemoryDefault = 0 };
enum OpAttrType : int32_t { kAttrInt = 1 };

enum Slot : size_t {
  kCreateStatus = 0,
  kCreateCustomOpDomain = 26,
  kCustomOpDomainAdd = 27,
  kAddCustomOpDomain = 28,
  kGetTensorMutableData = 51,
  kCreateTensorTypeAndShapeInfo = 57,
  kSetTensorElementType = 58,
  kSetDimensions = 59,
  kGetTensorElementType = 60,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kGetSymbolicDimensions = 63,
  kGetTensorTypeAndShape = 65,
  kKernelInfoGetAttributeFloat = 85,
  kKernelInfoGetAttributeInt64 = 86,
  kKernelContextGetInput = 90,
  kKernelContextGetOutput = 91,
  kReleaseStatus = 93,
  kReleaseTensorTypeAndShapeInfo = 99,
  kReleaseCustomOpDomain = 101,
  kKernelContextGetGpuComputeStream = 193,
  kGetSessionConfigEntry = 238,
  kKernelInfoGetNodeName = 244,
  kShapeInferContextGetInputTypeShape = 268,
  kShapeInferContextGetAttribute = 269,
  kShapeInferContextSetOutputTypeShape = 270,
  kSetSymbolicDimensions = 271,
  kReadOpAttr = 272,
  kKernelContextParallelFor = 274,
  kSlotsDeclared = 275,
};

struct Api {
  void* slots[kSlotsDeclared];

  template <typename Result, typename... Arguments>
  Result call(Slot slot, Arguments... arguments) const noexcept {
    using Function = Result (*)(Arguments...);
    return reinterpret_cast<Function>(slots[slot])(arguments...);
  }

  Status* createStatus(ErrorCode code, char const* message) const noexcept {
    return call<Status*>(kCreateStatus, code, message);
  }
  void releaseStatus(Status* status) const noexcept { call<void>(kReleaseStatus, status); }
  Status* createCustomOpDomain(char const* name, CustomOpDomain** out) const noexcept {
    return call<Status*>(kCreateCustomOpDomain, name, out);
  }
  Status* customOpDomainAdd(CustomOpDomain* domain, struct CustomOp const* op) const noexcept {
    return call<Status*>(kCustomOpDomainAdd, domain, op);
  }
  Status* addCustomOpDomain(SessionOptions* options, CustomOpDomain* domain) const noexcept {
    return call<Status*>(kAddCustomOpDomain, options, domain);
  }
  void releaseCustomOpDomain(CustomOpDomain* domain) const noexcept {
    call<void>(kReleaseCustomOpDomain, domain);
  }
  Status* getTensorMutableData(Value* value, void** out) const noexcept {
    return call<Status*>(kGetTensorMutableData, value, out);
  }
  Status* createTensorInfo(TensorInfo** out) const noexcept {
    return call<Status*>(kCreateTensorTypeAndShapeInfo, out);
  }
  Status* setTensorElementType(TensorInfo* info, ElementType type) const noexcept {
    return call<Status*>(kSetTensorElementType, info, type);
  }
  Status* setDimensions(TensorInfo* info, int64_t const* dims, size_t count) const noexcept {
    return call<Status*>(kSetDimensions, info, dims, count);
  }
  // Reads the names during the call only.
  Status* setSymbolicDimensions(TensorInfo* info, char const** names,
                                size_t count) const noexcept {
    return call<Status*>(kSetSymbolicDimensions, info, names, count);
  }
  Status* getTensorElementType(TensorInfo const* info, ElementType* out) const noexcept {
    return call<Status*>(kGetTensorElementType, info, out);
  }
  Status* getDimensionsCount(TensorInfo const* info, size_t* out) const noexcept {
    return call<Status*>(kGetDimensionsCount, info, out);
  }
  Status* getDimensions(TensorInfo const* info, int64_t* out, size_t count) const noexcept {
    return call<Status*>(kGetDimensions, info, out, count);
  }
  Status* getSymbolicDimensions(TensorInfo const* info, char const** out,
                                size_t count) const noexcept {
    return call<Status*>(kGetSymbolicDimensions, info, out, count);
  }
  Status* getTensorTypeAndShape(Value const* value, TensorInfo** out) const noexcept {
    return call<Status*>(kGetTensorTypeAndShape, value, out);
  }
  void releaseTensorInfo(TensorInfo* info) const noexcept {
    call<void>(kReleaseTensorTypeAndShapeInfo, info);
  }
  Status* kernelInfoGetInt64(KernelInfo const* info, char const* name,
                             int64_t* out) const noexcept {
    return call<Status*>(kKernelInfoGetAttributeInt64, info, name, out);
  }
  Status* kernelInfoGetFloat(KernelInfo const* info, char const* name, float* out) const noexcept {
    return call<Status*>(kKernelInfoGetAttributeFloat, info, name, out);
  }
  // `size`: of `name` in, of the name with its terminating zero out. Fails where it does not fit.
  Status* kernelInfoGetNodeName(KernelInfo const* info, char* name, size_t* size) const noexcept {
    return call<Status*>(kKernelInfoGetNodeName, info, name, size);
  }
  // `size`: of `value` in, of the entry with its terminating zero out. Fails where there is none.
  Status* getSessionConfigEntry(SessionOptions const* options, char const* key, char* value,
                                size_t* size) const noexcept {
    return call<Status*>(kGetSessionConfigEntry, options, key, value, size);
  }
  Status* kernelContextGetInput(KernelContext const* context, size_t index,
                                Value const** out) const noexcept {
    return call<Status*>(kKernelContextGetInput, context, index, out);
  }
  Status* kernelContextGetOutput(KernelContext* context, size_t index, int64_t const* dims,
                                 size_t count, Value** out) const noexcept {
    return call<Status*>(kKernelContextGetOutput, context, index, dims, count, out);
  }
  Status* kernelContextGetGpuStream(KernelContext const* context, void** out) const noexcept {
    return call<Status*>(kKernelContextGetGpuComputeStream, context, out);
  }
  Status* kernelContextParallelFor(KernelContext const* context, void (*function)(void*, size_t),
                                   size_t total, size_t batches, void* data) const noexcept {
    return call<Status*>(kKernelContextParallelFor, context, function, total, batches, data);
  }
  // The info stays the context's: it is not released.
  Status* shapeInferGetInput(ShapeInferContext const* context, size_t index,
                             TensorInfo** out) const noexcept {
    return call<Status*>(kShapeInferContextGetInputTypeShape, context, index, out);
  }
  // The attribute stays the context's.
  Status* shapeInferGetAttribute(ShapeInferContext const* context, char const* name,
                                 OpAttr const** out) const noexcept {
    return call<Status*>(kShapeInferContextGetAttribute, context, name, out);
  }
  Status* readOpAttr(OpAttr const* attribute, OpAttrType type, void* data, size_t length,
                     size_t* out) const noexcept {
    return call<Status*>(kReadOpAttr, attribute, type, data, length, out);
  }
  Status* shapeInferSetOutput(ShapeInferContext const* context, size_t index,
                              TensorInfo const* info) const noexcept {
    return call<Status*>(kShapeInferContextSetOutputTypeShape, context, index, info);
  }
};

struct ApiBase {
  Api const* (*getApi)(uint32_t version) noexcept;
  char const* (*getVersionString)() noexcept;
};

// The descriptor of one operator on one provider, as of API 17 (later fields are never read when
// `version` says 17).
struct CustomOp {
  uint32_t version;
  void* (*createKernel)(CustomOp const*, Api const*, KernelInfo const*);
  char const* (*getName)(CustomOp const*);
  char const* (*getExecutionProviderType)(CustomOp const*);
  ElementType (*getInputType)(CustomOp const*, size_t);
  size_t (*getInputTypeCount)(CustomOp const*);
  ElementType (*getOutputType)(CustomOp const*, size_t);
  size_t (*getOutputTypeCount)(CustomOp const*);
  void (*kernelCompute)(void*, KernelContext*);
  void (*kernelDestroy)(void*);
  Characteristic (*getInputCharacteristic)(CustomOp const*, size_t);
  Characteristic (*getOutputCharacteristic)(CustomOp const*, size_t);
  MemoryType (*getInputMemoryType)(CustomOp const*, size_t);
  int (*getVariadicInputMinArity)(CustomOp const*);
  int (*getVariadicInputHomogeneity)(CustomOp const*);
  int (*getVariadicOutputMinArity)(CustomOp const*);
  int (*getVariadicOutputHomogeneity)(CustomOp const*);
  Status* (*createKernelV2)(CustomOp const*, Api const*, KernelInfo const*, void**);
  Status* (*kernelComputeV2)(void*, KernelContext*);
  Status* (*inferOutputShape)(CustomOp const*, ShapeInferContext*);
  int (*getStartVersion)(CustomOp const*);
  int (*getEndVersion)(CustomOp const*);
  size_t (*getMayInplace)(int**, int**);
  void (*releaseMayInplace)(int*, int*);
  size_t (*getAliasMap)(int**, int**);
  void (*releaseAliasMap)(int*, int*);
};

}  // namespace convbert::ort
