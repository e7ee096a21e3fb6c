// PackRows and UnpackRows: between (batch, seq, channels) and the rows of real tokens. Contract:
// README.md.
#pragma once

#include <cstdint>

#include "../runtime/status.h"

namespace convbert {

// The shape of a batch and its mask, 0 at pads; null where every row is kept.
struct RowPacking {
  int64_t const* mask;  // (batch, seq)
  int64_t batch;
  int64_t seq;
  int64_t channels;
};

// rowStarts: (batch + 1). Kept rows of an item are its first ones: kBadMask where a token follows a
// pad, because closing the gap would bring tokens together that were apart.
Status countRows(RowPacking const& packing, int64_t* rowStarts) noexcept;

// padded (batch, seq, channels) -> rows (rowStarts[batch], channels)
void packRows(RowPacking const& packing, int64_t const* rowStarts, float const* padded,
              float* rows) noexcept;

// The other way; zeros at pads.
void unpackRows(RowPacking const& packing, int64_t const* rowStarts, float const* rows,
                float* padded) noexcept;

}  // namespace convbert
