// Checks that print, and the plugin's capabilities.
#pragma once

#include <NvInferRuntime.h>

#include "operators.h"

namespace harness {

// Prints "ok" or "FAIL" and counts the failures.
void check(bool condition, char const* op, char const* what);

template <typename Interface>
Interface* capability(nvinfer1::IPluginV3* plugin, nvinfer1::PluginCapabilityType type) {
  return plugin ? static_cast<Interface*>(plugin->getCapabilityInterface(type)) : nullptr;
}

// Runs a context on the GPU over types, shapes and masks: equality with the CPU kernel, bytes around
// the output untouched, capture in a CUDA graph, and the time beside a copy of the same bytes.
void runOnDevice(nvinfer1::IPluginV3* context, Operator const& op);

}  // namespace harness
