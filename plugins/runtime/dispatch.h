// From an element type and a kernel size known at run time to an instantiation.
#pragma once

#include "data_type.h"
#include "half.h"

namespace convbert {
namespace {

// The one list of kernel sizes.
template <typename T, typename Visitor>
auto dispatchKernelSize(int32_t kernelSize, Visitor&& visit) {
  switch (kernelSize) {
    case 1: return visit.template run<T, 1>();
    case 3: return visit.template run<T, 3>();
    case 5: return visit.template run<T, 5>();
    case 7: return visit.template run<T, 7>();
    case 9: return visit.template run<T, 9>();
    case 11: return visit.template run<T, 11>();
    case 13: return visit.template run<T, 13>();
    default: return visit.template run<T, 15>();  // validate() admits no other size
  }
}

// Calls visit.template run<T, K>().
template <typename Visitor>
auto dispatch(DataType dtype, int32_t kernelSize, Visitor&& visit) {
  switch (dtype) {
    case DataType::kFloat16: return dispatchKernelSize<Float16>(kernelSize, visit);
    case DataType::kBFloat16: return dispatchKernelSize<BFloat16>(kernelSize, visit);
    default: return dispatchKernelSize<float>(kernelSize, visit);
  }
}

}  // namespace
}  // namespace convbert
