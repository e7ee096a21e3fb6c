// Time by part of a layer, for `profile`; taken only where somebody asks for it.
#pragma once

#include <time.h>

#include <cstdint>

namespace convbert {

enum LayerPart : int32_t {
  kProjectionsPart = 0,
  kSeparablePart,
  kGeneratorPart,
  kAttentionPart,
  kConvolutionPart,
  kAttentionOutputPart,
  kUpPart,
  kDownPart,
  kParts,
};

constexpr char const* kPartNames[kParts] = {
    "query, key, value projections", "separable convolution", "kernel generator",
    "attention",                     "dynamic convolution",   "attention output, LayerNorm",
    "feed-forward up, GELU",         "feed-forward down, LayerNorm"};

// Of all threads and calls together.
struct PartTimes {
  int64_t nanoseconds[kParts];
};

namespace {

// Time between its calls goes to the part they name.
class PartClock {
 public:
  explicit PartClock(PartTimes* times) : times_(times), before_(times != nullptr ? now() : 0) {}

  void stop(LayerPart part) {
    if (times_ != nullptr) {
      int64_t const here = now();
      __atomic_fetch_add(&times_->nanoseconds[part], here - before_, __ATOMIC_RELAXED);
      before_ = here;
    }
  }

 private:
  static int64_t now() {
    timespec time{};
    clock_gettime(CLOCK_MONOTONIC, &time);
    return int64_t(time.tv_sec) * 1000000000 + time.tv_nsec;
  }

  PartTimes* times_;
  int64_t before_;
};

}  // namespace
}  // namespace convbert
