// The creators that trt_entry.cpp hands out: one function for each folder of plugins/.
#pragma once

#include <NvInferRuntime.h>

namespace convbert::trt {

nvinfer1::IPluginCreatorInterface* spanDynamicConvCreator() noexcept;
nvinfer1::IPluginCreatorInterface* depthwiseConv1dCreator() noexcept;
nvinfer1::IPluginCreatorInterface* fusedSpanDynamicConvCreator() noexcept;

}  // namespace convbert::trt
