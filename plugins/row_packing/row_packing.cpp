#include "row_packing.h"

#include <cstring>

namespace convbert {
namespace {

// An empty tensor may have no address, which memcpy must not be given.
void copyRows(void* to, void const* from, int64_t bytes) noexcept {
  if (bytes > 0) {
    memcpy(to, from, bytes);
  }
}

}  // namespace

Status countRows(RowPacking const& packing, int64_t* rowStarts) noexcept {
  rowStarts[0] = 0;
  for (int64_t b = 0; b < packing.batch; ++b) {
    int64_t length = packing.seq;
    if (packing.mask != nullptr) {
      int64_t const* mask = packing.mask + b * packing.seq;
      length = 0;
      while (length < packing.seq && mask[length] != 0) {
        ++length;
      }
      for (int64_t s = length; s < packing.seq; ++s) {
        if (mask[s] != 0) {
          return Status::kBadMask;
        }
      }
    }
    rowStarts[b + 1] = rowStarts[b] + length;
  }
  return Status::kOk;
}

void packRows(RowPacking const& packing, int64_t const* rowStarts, float const* padded,
              float* rows) noexcept {
  int64_t const row = packing.channels * static_cast<int64_t>(sizeof(float));
  for (int64_t b = 0; b < packing.batch; ++b) {
    copyRows(rows + rowStarts[b] * packing.channels, padded + b * packing.seq * packing.channels,
             (rowStarts[b + 1] - rowStarts[b]) * row);
  }
}

void unpackRows(RowPacking const& packing, int64_t const* rowStarts, float const* rows,
                float* padded) noexcept {
  int64_t const row = packing.channels * static_cast<int64_t>(sizeof(float));
  for (int64_t b = 0; b < packing.batch; ++b) {
    int64_t const length = rowStarts[b + 1] - rowStarts[b];
    float* to = padded + b * packing.seq * packing.channels;
    copyRows(to, rows + rowStarts[b] * packing.channels, length * row);
    if (length < packing.seq && row > 0) {
      memset(to + length * packing.channels, 0, (packing.seq - length) * row);
    }
  }
}

}  // namespace convbert
