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

// How far ahead of a stream from memory to fetch.
constexpr int64_t kFetchAhead = 4096;

// A single pass over a block streams it, and fetches the beginning of the next block while it reads the end of this.
inline Prefetch stream(const uint8_t* lines, int64_t num_lines, const uint8_t* next) {
  const uintptr_t end = static_cast<uintptr_t>(num_lines * kLineBytes);
  return {reinterpret_cast<uintptr_t>(lines) + kFetchAhead, reinterpret_cast<uintptr_t>(next) + kFetchAhead - end,
          kLineBytes, num_lines - kFetchAhead / kLineBytes};
}

// Of several passes over a block each fetches its share of the following block into L2.
inline Prefetch share_of_next(const uint8_t* following, int64_t num_bytes, int64_t num_lines, int64_t pass,
                              int64_t num_passes) {
  const int64_t share = num_bytes / num_passes, step = share / num_lines;
  return {reinterpret_cast<uintptr_t>(following) + static_cast<uintptr_t>(share * pass), 0, step > 0 ? step : 1,
          num_lines};
}

// Multiplies a row block of each of some matrices of one shape with every column, tile by tile, and hands the integer
// sums to take(tile, sums): those of matrix i begin at sums[i * kTileSums].
//   blocks     of the matrices; they are read one after the other
//   following  the block that this thread reads afterwards
//   expanded   scratch of Matrices::expanded_bytes() for each matrix
constexpr int64_t kTileSums = kMaxColumns * kRowsPerBlock;

template <int kMatrices, class Take>
void multiply_blocks(const Kernels& k, const Matrices& matrices, const uint8_t* const (&blocks)[kMatrices],
                     const uint8_t* following, const Columns& columns, uint8_t* expanded, Take&& take) {
  const int64_t num_tiles = columns.num_tiles(), num_quads = matrices.num_quads();
  const int64_t num_bytes = matrices.num_block_bytes();
  const bool is_expanded = matrices.layout() == kBase3 && columns.num_rows() >= kExpandFromColumns;
  const uint8_t* lines[kMatrices];
  for (int i = 0; i < kMatrices; ++i) {
    lines[i] = blocks[i];
    if (!is_expanded) continue;
    uint8_t* two_bit = expanded + i * matrices.expanded_bytes();
    k.expand_base3(blocks[i], num_quads, two_bit);
    lines[i] = two_bit;
  }
  const auto dot = is_expanded || matrices.layout() == kTwoBit ? k.dot_two_bit : k.dot_base3;
  const int64_t num_lines = is_expanded ? num_quads : num_bytes / kLineBytes;
  alignas(64) int32_t sums[kMatrices * kTileSums];
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    for (int i = 0; i < kMatrices; ++i) {
      const uint8_t* next = i + 1 < kMatrices ? blocks[i + 1] : following;
      const Prefetch prefetch = num_tiles == 1 ? stream(lines[i], num_lines, next)
                                               : share_of_next(following, num_bytes, num_lines, tile, num_tiles);
      dot(lines[i], num_quads, columns.tile_data(tile), columns.num_columns(tile), sums + i * kTileSums, prefetch);
    }
    take(tile, sums);
  }
}

// The integer sums of 64 output features of one row, and what turns them into floats.
struct RowSums {
  const Kernels& k;
  const int32_t* sums;  // [64]
  int32_t column_sum;
  float scale;

  // Writes the first count features.
  void write(float* output, int64_t count) const {
    if (count == kRowsPerBlock) return k.rescale(sums, column_sum, scale, output);
    alignas(64) float values[kRowsPerBlock];
    k.rescale(sums, column_sum, scale, values);
    std::memcpy(output, values, static_cast<size_t>(count) * sizeof(float));
  }

  // Adds the first count features.
  void add_to(float* output, int64_t count) const {
    alignas(64) float values[kRowsPerBlock];
    k.rescale(sums, column_sum, scale, values);
    for (int64_t i = 0; i < count; ++i) output[i] += values[i];
  }
};

// The product of one matrix: calls take(row, RowSums) for each row (column of the product).
//   weight_scale  of the block's matrix
//   scales        of the rows' activations
template <class Take>
void multiply_block(const Kernels& k, const Matrices& matrices, const uint8_t* block, const uint8_t* following,
                    float weight_scale, const Columns& columns, const float* scales, uint8_t* expanded, Take&& take) {
  const uint8_t* const blocks[1] = {block};
  multiply_blocks(k, matrices, blocks, following, columns, expanded, [&](int64_t tile, const int32_t* sums) {
    const int64_t first = columns.first_row(tile);
    for (int c = 0; c < columns.num_columns(tile); ++c) {
      const int64_t row = first + c;
      take(row, RowSums{k, sums + c * kRowsPerBlock, columns.row_sum(row), scales[row] * weight_scale});
    }
  });
}

}  // namespace ternary
