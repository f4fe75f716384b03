// Int8 activations as the dot kernels read them.
//
// Rows are cut into tiles of at most kMaxColumns, as even as possible; a tile lies as [quad][column][4 inputs], so that
// a kernel walks weights and activations forward together and broadcasts 4 bytes a column. Padding inputs are zero.
#pragma once

#include <cstring>

#include "kernels.h"

namespace ternary {

class Columns {
 public:
  Columns() = default;
  // data holds num_rows * num_quads * 4 bytes, sums num_rows integers; both are filled by set_row.
  Columns(int8_t* data, int32_t* sums, int64_t num_rows, int64_t num_quads)
      : data_(data), sums_(sums), num_rows_(num_rows), num_quads_(num_quads) {}

  static int64_t num_bytes(int64_t num_rows, int64_t num_quads) { return num_rows * num_quads * kQuad; }

  int64_t num_rows() const { return num_rows_; }
  int64_t num_tiles() const { return divide_up(num_rows_, kMaxColumns); }
  int64_t first_row(int64_t tile) const { return tile * num_rows_ / num_tiles(); }
  int num_columns(int64_t tile) const { return static_cast<int>(first_row(tile + 1) - first_row(tile)); }
  const int8_t* tile_data(int64_t tile) const { return data_ + first_row(tile) * num_quads_ * kQuad; }
  int32_t row_sum(int64_t row) const { return sums_[row]; }

  // Takes one row of count integers, whose sum is known.
  void set_row(int64_t row, const int8_t* x_q, int64_t count, int32_t sum) {
    sums_[row] = sum;
    const int64_t tile = ((row + 1) * num_tiles() - 1) / num_rows_;
    const int64_t columns = num_columns(tile), column = row - first_row(tile);
    int8_t* target = data_ + first_row(tile) * num_quads_ * kQuad + column * kQuad;
    if (columns == 1) {
      std::memcpy(target, x_q, static_cast<size_t>(count));
      std::memset(target + count, 0, static_cast<size_t>(num_quads_ * kQuad - count));
      return;
    }
    const int64_t whole = count / kQuad;
    for (int64_t q = 0; q < whole; ++q) std::memcpy(target + q * columns * kQuad, x_q + q * kQuad, kQuad);
    for (int64_t q = whole; q < num_quads_; ++q) {
      int8_t padded[kQuad] = {};
      if (q == whole && count % kQuad) std::memcpy(padded, x_q + q * kQuad, static_cast<size_t>(count % kQuad));
      std::memcpy(target + q * columns * kQuad, padded, kQuad);
    }
  }

 private:
  int8_t* data_ = nullptr;
  int32_t* sums_ = nullptr;
  int64_t num_rows_ = 0;
  int64_t num_quads_ = 0;
};

}  // namespace ternary
