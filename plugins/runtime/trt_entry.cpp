// How TensorRT finds our creators: through getCreators (IPluginRegistry::loadLibrary, embedded
// plugins), or, for a host that only opens the library (Triton's `plugins=`, ctypes), because the
// library registers itself when it is loaded. No TensorRT symbol is linked: the registry is looked
// up in the TensorRT that is already in the process, so one binary serves TensorRT and
// TensorRT-RTX.
#include <dlfcn.h>
#include <link.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <NvInferVersion.h>

#include "trt_creators.h"
#include "trt_log.h"

namespace {

using nvinfer1::ILoggerFinder;
using nvinfer1::IPluginCreatorInterface;
using nvinfer1::IPluginRegistry;

IPluginCreatorInterface* const* creators(int32_t& count) noexcept {
  static IPluginCreatorInterface* const kCreators[] = {
      convbert::trt::spanDynamicConvCreator(),
      convbert::trt::depthwiseConv1dCreator(),
      convbert::trt::fusedSpanDynamicConvCreator(),
  };
  count = sizeof(kCreators) / sizeof(kCreators[0]);
  return kCreators;
}

std::atomic<ILoggerFinder*> gLoggerFinder{nullptr};
IPluginRegistry* gRegistered = nullptr;  // where this library registered itself

// A library opened with RTLD_LOCAL is invisible to dlsym(RTLD_DEFAULT): find it by its name among
// the loaded ones. Its path is written to `found` (512 bytes).
int findTensorRT(dl_phdr_info* info, size_t, void* found) {
  char const* slash = strrchr(info->dlpi_name, '/');
  char const* base = slash ? slash + 1 : info->dlpi_name;
  bool const tensorrt = strncmp(base, "libnvinfer.so", 13) == 0 ||
                        strncmp(base, "libtensorrt_rtx.so", 18) == 0;
  if (tensorrt && strlen(info->dlpi_name) < 512) {
    strcpy(static_cast<char*>(found), info->dlpi_name);
    return 1;
  }
  return 0;
}

void* findSymbol(void* library, char const* name) {
  return library ? dlsym(library, name) : dlsym(RTLD_DEFAULT, name);
}

// Under LD_PRELOAD this library comes before TensorRT, which its host opens later. Asked to by
// CONVBERT_LOAD_TENSORRT=1 it opens TensorRT first: only when asked, because LD_PRELOAD is inherited
// by every program that the host starts.
void* loadOnRequest() {
  char const* asked = getenv("CONVBERT_LOAD_TENSORRT");
  if (asked == nullptr || strcmp(asked, "1") != 0) {
    return nullptr;
  }
  char name[32];
  snprintf(name, sizeof(name), "libnvinfer.so.%d", NV_TENSORRT_MAJOR);
  void* library = dlopen(name, RTLD_NOW);
  if (library == nullptr) {
    fprintf(stderr, "[convbert] CONVBERT_LOAD_TENSORRT: %s\n", dlerror());
  }
  // Kept open for good: the reference that loadedRegistry gives back is not the only one.
  return library == nullptr ? nullptr : dlopen(name, RTLD_NOW | RTLD_NOLOAD);
}

// The registry of the TensorRT in this process, or null.
//
// The registry is a table of virtual functions whose order holds within a major version only
// (TensorRT-RTX dropped its first entries: calling through the wrong table crashes). So it is used
// only where the major version is that of the headers we were built with; elsewhere the host calls
// getCreators.
IPluginRegistry* loadedRegistry() {
  void* library = nullptr;
  if (findSymbol(nullptr, "getPluginRegistry") == nullptr) {
    char path[512] = "";
    dl_iterate_phdr(findTensorRT, path);
    library = path[0] != '\0' ? dlopen(path, RTLD_NOW | RTLD_NOLOAD) : loadOnRequest();
    if (library == nullptr) {
      return nullptr;
    }
  }
  IPluginRegistry* registry = nullptr;
  void* const getVersion = findSymbol(library, "getInferLibVersion");
  void* const getRegistry = findSymbol(library, "getPluginRegistry");
  if (getVersion != nullptr && getRegistry != nullptr) {
    int32_t const major = reinterpret_cast<int32_t (*)()>(getVersion)() / 10000;
    if (major == NV_TENSORRT_MAJOR) {
      registry = reinterpret_cast<IPluginRegistry* (*)()>(getRegistry)();
    } else if (major >= 10) {  // TensorRT-RTX counts from 1 and always loads through getCreators
      fprintf(stderr,
              "[convbert] this library was built with TensorRT %d headers and does not register "
              "itself in TensorRT %d: load it with IPluginRegistry::loadLibrary, or rebuild it "
              "with -DTensorRT_ROOT\n",
              NV_TENSORRT_MAJOR, major);
    }
  }
  if (library != nullptr) {
    dlclose(library);  // only the reference that RTLD_NOLOAD added
  }
  return registry;
}

__attribute__((constructor)) void registerWhenLoaded() {
  IPluginRegistry* registry = loadedRegistry();
  int32_t count = 0;
  IPluginCreatorInterface* const* all = creators(count);
  for (int32_t i = 0; registry != nullptr && i < count; ++i) {
    if (registry->registerCreator(*all[i], "")) {
      gRegistered = registry;
    }
  }
}

}  // namespace

namespace convbert::trt {

void logError(char const* message) noexcept {
  ILoggerFinder* finder = gLoggerFinder.load();
  nvinfer1::ILogger* logger = finder ? finder->findLogger() : nullptr;
  if (logger != nullptr) {
    logger->log(nvinfer1::ILogger::Severity::kERROR, message);
  } else {
    fprintf(stderr, "[convbert] %s\n", message);
  }
}

}  // namespace convbert::trt

// Of the headers this library was built with: where it registers itself.
extern "C" __attribute__((visibility("default"))) int32_t convbert_tensorrt_major() noexcept {
  return NV_TENSORRT_MAJOR;
}

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(
    nvinfer1::ILoggerFinder* finder) noexcept {
  gLoggerFinder.store(finder);
}

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const*
getCreators(int32_t& count) noexcept {
  IPluginCreatorInterface* const* all = creators(count);
  // The caller registers what it gets; a creator registered twice is an error to TensorRT.
  for (int32_t i = 0; gRegistered != nullptr && i < count; ++i) {
    gRegistered->deregisterCreator(*all[i]);
  }
  gRegistered = nullptr;
  return all;
}
