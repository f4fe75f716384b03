// Ternary matrices of one shape, as tiles, and the product of one row block with all columns.
#pragma once

#include "columns.h"
#include "kernels.h"
#include "ternary.h"

namespace ternary {

// A view of what ternary_matrices describes.
class Matrices {
 public:
  explicit Matrices(const ternary_matrices& source)
      : tiles_(source.tiles),
        scales_(source.scales),
        out_features_(source.out_features),
        in_features_(source.in_features),
        layout_(static_cast<Layout>(source.layout)),
        num_quads_(ternary::num_quads(source.in_features, layout_)),
        block_bytes_(ternary::block_bytes(source.in_features, layout_)) {}

  int64_t out_features() const { return out_features_; }
  int64_t in_features() const { return in_features_; }
  int64_t num_blocks() const { return num_row_blocks(out_features_); }
  int64_t num_quads() const { return num_quads_; }
  Layout layout() const { return layout_; }
  int64_t num_block_bytes() const { return block_bytes_; }
  float scale(int64_t matrix) const { return scales_[matrix]; }
  const uint8_t* block(int64_t matrix, int64_t index) const {
    return tiles_ + (matrix * num_blocks() + index) * block_bytes_;
  }
  // Rows of a block that exist.
  int64_t block_rows(int64_t index) const {
    const int64_t left = out_features_ - index * kRowsPerBlock;
    return left < kRowsPerBlock ? left : kRowsPerBlock;
  }
  // Bytes of a base-3 block once it is expanded to 2 bits.
  int64_t expanded_bytes() const { return layout_ == kBase3 ? num_quads_ * kLineBytes : 0; }

 private:
  const uint8_t* tiles_;
  const float* scales_;
  int64_t out_features_, in_features_;
  Layout layout_;
  int64_t num_quads_, block_bytes_;
};

// From this many columns on a base-3 block is turned into 2 bits once instead of once a tile of columns.
constexpr int64_t kExpandFromColumns = 2 * kMaxColumns + 1;

// Multiplies one row block with every column and hands each tile's integer sums to take(tile, sums).
//   expanded   scratch of Matrices::expanded_bytes()
template <class Take>
void multiply_block(const Kernels& k, const Matrices& matrices, int64_t matrix, int64_t index, const Columns& columns,
                    uint8_t* expanded, Take&& take) {
  constexpr int64_t kNear = 4096;  // bytes ahead of a stream from memory
  const uint8_t* block = matrices.block(matrix, index);
  const uint8_t* following = block + matrices.num_block_bytes();
  const int64_t num_tiles = columns.num_tiles(), num_quads = matrices.num_quads();
  auto dot = matrices.layout() == kTwoBit ? k.dot_two_bit : k.dot_base3;
  if (matrices.layout() == kBase3 && columns.num_rows() >= kExpandFromColumns) {
    k.expand_base3(block, num_quads, expanded);
    block = expanded;
    dot = k.dot_two_bit;
  }
  alignas(64) int32_t sums[kMaxColumns * kRowsPerBlock];
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    // One pass streams; several passes fetch the next block into L2 while they compute, each its share.
    const Prefetch prefetch = num_tiles == 1
                                  ? Prefetch{block + kNear, kLineBytes}
                                  : Prefetch{following + matrices.num_block_bytes() * tile / num_tiles,
                                             kLineBytes / (num_tiles < kLineBytes ? num_tiles : kLineBytes)};
    dot(block, num_quads, columns.tile_data(tile), columns.num_columns(tile), sums, prefetch);
    take(tile, sums);
  }
}

// The same with results in float: calls take(row, values) for each row (column of the product), 64 values each.
//   scales   of the rows' activations
template <class Take>
void multiply_block_rescaled(const Kernels& k, const Matrices& matrices, int64_t matrix, int64_t index,
                             const Columns& columns, const float* scales, uint8_t* expanded, Take&& take) {
  multiply_block(k, matrices, matrix, index, columns, expanded, [&](int64_t tile, const int32_t* sums) {
    const int64_t first = columns.first_row(tile);
    for (int c = 0; c < columns.num_columns(tile); ++c) {
      alignas(64) float values[kRowsPerBlock];
      const int64_t row = first + c;
      k.rescale(sums + c * kRowsPerBlock, columns.row_sum(row), scales[row] * matrices.scale(matrix), values);
      take(row, values);
    }
  });
}

}  // namespace ternary
