// The symbol that SessionOptions.register_custom_ops_library calls.
#include "ort_ops.h"

namespace {

char const* const kDomain = "convbert";

}  // namespace

extern "C" __attribute__((visibility("default"))) convbert::ort::Status* RegisterCustomOps(
    convbert::ort::SessionOptions* options, convbert::ort::ApiBase const* base) noexcept {
  using namespace convbert::ort;
  Api const* api = base->getApi(kApiVersion);
  if (api == nullptr) {
    // No API of our version, but creating a status is slot 0 of every version.
    Api const* old = base->getApi(1);
    return old == nullptr ? nullptr
                          : old->createStatus(kFail,
                                              "convbert ops need ONNX Runtime 1.17 or newer");
  }
  setApi(api);
  CustomOpDomain* domain = nullptr;
  if (Status* status = api->createCustomOpDomain(kDomain, &domain)) {
    return status;
  }
  for (auto* ops : {spanDynamicConvOps, depthwiseConv1dOps, fusedSpanDynamicConvOps}) {
    OpSet const& set = ops();
    for (size_t i = 0; i < set.count; ++i) {
      if (Status* status = api->customOpDomainAdd(domain, &set.ops[i])) {
        api->releaseCustomOpDomain(domain);
        return status;
      }
    }
  }
  CustomOp const* const layer = encoderLayerOp(options);
  if (layer == nullptr) {
    return api->createStatus(kFail, "EncoderLayer: out of memory");
  }
  for (CustomOp const* op : {&packRowsOp(), &unpackRowsOp(), layer}) {
    if (Status* status = api->customOpDomainAdd(domain, op)) {
      api->releaseCustomOpDomain(domain);
      return status;
    }
  }
  // The session keeps a reference to the domain's contents and no one tells us when it ends, so the
  // handle (a few hundred bytes a session) is left to the process.
  if (Status* status = api->addCustomOpDomain(options, domain)) {
    api->releaseCustomOpDomain(domain);
    return status;
  }
  return nullptr;
}
