// Memory that calls borrow and give back, so that a layer does not map and clear fresh pages each
// time it runs. What is held is what was in use at once at the busiest moment.
#pragma once

#include <cstddef>

namespace convbert {

// Borrowed for the life of the object; data() is null where memory ran out.
class Scratch {
 public:
  explicit Scratch(size_t bytes) noexcept;
  ~Scratch();
  Scratch(Scratch const&) = delete;
  Scratch& operator=(Scratch const&) = delete;

  // Aligned to 64 bytes; the contents are whatever was left there.
  void* data() const noexcept { return data_; }

 private:
  void* data_;
  size_t bytes_;
};

}  // namespace convbert
