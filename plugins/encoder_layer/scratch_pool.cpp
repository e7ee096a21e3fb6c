#include "scratch_pool.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace convbert {
namespace {

struct Buffer {
  void* data;
  size_t bytes;
};

struct Pool {
  std::mutex mutex;
  std::vector<Buffer> free;
};

// Never destroyed: a thread may still compute while the process exits.
Pool& pool() {
  static Pool* const kPool = new Pool;
  return *kPool;
}

constexpr size_t kPage = 4096;

}  // namespace

Scratch::Scratch(size_t bytes) noexcept : data_(nullptr), bytes_(0) {
  size_t const wanted = (bytes + kPage - 1) / kPage * kPage;
  {
    std::lock_guard<std::mutex> const lock(pool().mutex);
    std::vector<Buffer>& free = pool().free;
    size_t best = free.size();
    for (size_t i = 0; i < free.size(); ++i) {
      bool const fits = free[i].bytes >= wanted;
      if (fits && (best == free.size() || free[i].bytes < free[best].bytes)) {
        best = i;
      }
    }
    if (best == free.size() && !free.empty()) {
      // None is large enough: one too small makes way for one that is.
      std::free(free.back().data);
      free.pop_back();
    } else if (best < free.size()) {
      data_ = free[best].data;
      bytes_ = free[best].bytes;
      free[best] = free.back();
      free.pop_back();
      return;
    }
  }
  data_ = std::aligned_alloc(kPage, wanted == 0 ? kPage : wanted);
  bytes_ = data_ == nullptr ? 0 : (wanted == 0 ? kPage : wanted);
}

Scratch::~Scratch() {
  if (data_ == nullptr) {
    return;
  }
  std::lock_guard<std::mutex> const lock(pool().mutex);
  try {
    pool().free.push_back({data_, bytes_});
  } catch (std::bad_alloc const&) {
    std::free(data_);
  }
}

}  // namespace convbert
