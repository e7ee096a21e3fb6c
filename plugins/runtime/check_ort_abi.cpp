// Compile-time proof that ort_abi.h agrees with a real onnxruntime_c_api.h. Nothing links it.
#include <onnxruntime_c_api.h>

#include "ort_abi.h"

namespace abi = convbert::ort;

static_assert(ORT_API_VERSION >= abi::kApiVersion, "the header is older than the API we ask for");

#define CONVBERT_SAME_SLOT(name, slot) \
  static_assert(offsetof(OrtApi, name) == abi::slot * sizeof(void*), #name)

CONVBERT_SAME_SLOT(CreateStatus, kCreateStatus);
CONVBERT_SAME_SLOT(CreateCustomOpDomain, kCreateCustomOpDomain);
CONVBERT_SAME_SLOT(CustomOpDomain_Add, kCustomOpDomainAdd);
CONVBERT_SAME_SLOT(AddCustomOpDomain, kAddCustomOpDomain);
CONVBERT_SAME_SLOT(GetTensorMutableData, kGetTensorMutableData);
CONVBERT_SAME_SLOT(CreateTensorTypeAndShapeInfo, kCreateTensorTypeAndShapeInfo);
CONVBERT_SAME_SLOT(SetTensorElementType, kSetTensorElementType);
CONVBERT_SAME_SLOT(SetDimensions, kSetDimensions);
CONVBERT_SAME_SLOT(SetSymbolicDimensions, kSetSymbolicDimensions);
CONVBERT_SAME_SLOT(GetTensorElementType, kGetTensorElementType);
CONVBERT_SAME_SLOT(GetDimensionsCount, kGetDimensionsCount);
CONVBERT_SAME_SLOT(GetDimensions, kGetDimensions);
CONVBERT_SAME_SLOT(GetSymbolicDimensions, kGetSymbolicDimensions);
CONVBERT_SAME_SLOT(GetTensorTypeAndShape, kGetTensorTypeAndShape);
CONVBERT_SAME_SLOT(KernelInfoGetAttribute_int64, kKernelInfoGetAttributeInt64);
CONVBERT_SAME_SLOT(KernelInfoGetAttribute_float, kKernelInfoGetAttributeFloat);
CONVBERT_SAME_SLOT(GetSessionConfigEntry, kGetSessionConfigEntry);
CONVBERT_SAME_SLOT(KernelInfo_GetNodeName, kKernelInfoGetNodeName);
CONVBERT_SAME_SLOT(KernelContext_GetInput, kKernelContextGetInput);
CONVBERT_SAME_SLOT(KernelContext_GetOutput, kKernelContextGetOutput);
CONVBERT_SAME_SLOT(ReleaseStatus, kReleaseStatus);
CONVBERT_SAME_SLOT(ReleaseTensorTypeAndShapeInfo, kReleaseTensorTypeAndShapeInfo);
CONVBERT_SAME_SLOT(ReleaseCustomOpDomain, kReleaseCustomOpDomain);
CONVBERT_SAME_SLOT(KernelContext_GetGPUComputeStream, kKernelContextGetGpuComputeStream);
CONVBERT_SAME_SLOT(ShapeInferContext_GetInputTypeShape, kShapeInferContextGetInputTypeShape);
CONVBERT_SAME_SLOT(ShapeInferContext_GetAttribute, kShapeInferContextGetAttribute);
CONVBERT_SAME_SLOT(ReadOpAttr, kReadOpAttr);
CONVBERT_SAME_SLOT(ShapeInferContext_SetOutputTypeShape, kShapeInferContextSetOutputTypeShape);
CONVBERT_SAME_SLOT(KernelContext_ParallelFor, kKernelContextParallelFor);

#define CONVBERT_SAME_FIELD(name, field) \
  static_assert(offsetof(OrtCustomOp, name) == offsetof(abi::CustomOp, field), #name)

CONVBERT_SAME_FIELD(version, version);
CONVBERT_SAME_FIELD(CreateKernel, createKernel);
CONVBERT_SAME_FIELD(GetName, getName);
CONVBERT_SAME_FIELD(GetExecutionProviderType, getExecutionProviderType);
CONVBERT_SAME_FIELD(GetInputType, getInputType);
CONVBERT_SAME_FIELD(GetInputTypeCount, getInputTypeCount);
CONVBERT_SAME_FIELD(GetOutputType, getOutputType);
CONVBERT_SAME_FIELD(GetOutputTypeCount, getOutputTypeCount);
CONVBERT_SAME_FIELD(KernelCompute, kernelCompute);
CONVBERT_SAME_FIELD(KernelDestroy, kernelDestroy);
CONVBERT_SAME_FIELD(GetInputCharacteristic, getInputCharacteristic);
CONVBERT_SAME_FIELD(GetOutputCharacteristic, getOutputCharacteristic);
CONVBERT_SAME_FIELD(GetInputMemoryType, getInputMemoryType);
CONVBERT_SAME_FIELD(CreateKernelV2, createKernelV2);
CONVBERT_SAME_FIELD(KernelComputeV2, kernelComputeV2);
CONVBERT_SAME_FIELD(InferOutputShapeFn, inferOutputShape);
CONVBERT_SAME_FIELD(GetStartVersion, getStartVersion);
CONVBERT_SAME_FIELD(GetEndVersion, getEndVersion);
CONVBERT_SAME_FIELD(GetMayInplace, getMayInplace);
CONVBERT_SAME_FIELD(ReleaseMayInplace, releaseMayInplace);
CONVBERT_SAME_FIELD(GetAliasMap, getAliasMap);
CONVBERT_SAME_FIELD(ReleaseAliasMap, releaseAliasMap);

static_assert(offsetof(OrtApiBase, GetApi) == offsetof(abi::ApiBase, getApi), "GetApi");
static_assert(ORT_FAIL == int(abi::kFail) && ORT_INVALID_ARGUMENT == int(abi::kInvalidArgument) &&
                  ORT_NOT_IMPLEMENTED == int(abi::kNotImplemented) &&
                  ORT_EP_FAIL == int(abi::kEpFail), "error codes");
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT == int(abi::kFloat) &&
                  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 == int(abi::kInt64) &&
                  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 == int(abi::kFloat16) &&
                  ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 == int(abi::kBFloat16), "element types");
static_assert(INPUT_OUTPUT_REQUIRED == int(abi::kRequired) &&
                  OrtMemTypeDefault == int(abi::kMemoryDefault), "characteristics");
