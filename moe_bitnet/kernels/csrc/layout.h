// How weights and activations lie in memory; moe_bitnet/tiles.py draws the tiles.
#pragma once

#include <cstdint>

namespace ternary {

constexpr int64_t kRowsPerBlock = 64;       // rows of a weight matrix that one kernel call multiplies
constexpr int64_t kLineBytes = 64;          // one vector register of packed weights
constexpr int64_t kQuad = 4;                // inputs that one lane of an integer dot product takes
constexpr int64_t kQuadsPerGroup = 5;       // base-3: 20 inputs in four lines
constexpr int64_t kLinesPerGroup = 4;       // base-3
constexpr int64_t kMaxInFeatures = 131071;  // beyond, a float32 does not hold every sum exactly
constexpr int kMaxColumns = 6;              // 64 rows x 6 columns fill 24 of 32 vector registers with sums

enum Layout : int32_t { kTwoBit = 0, kBase3 = 1 };

constexpr int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }
constexpr int64_t round_up(int64_t value, int64_t multiple) { return divide_up(value, multiple) * multiple; }

constexpr int64_t num_row_blocks(int64_t out_features) { return divide_up(out_features, kRowsPerBlock); }

// Quads of one row, padded to whole units of the layout.
constexpr int64_t num_quads(int64_t in_features, Layout layout) {
  const int64_t quads = divide_up(in_features, kQuad);
  return layout == kBase3 ? round_up(quads, kQuadsPerGroup) : quads;
}

// Inputs of one row with their padding; activations are padded with zeros up to here.
constexpr int64_t padded_features(int64_t in_features, Layout layout) { return num_quads(in_features, layout) * kQuad; }

constexpr int64_t block_bytes(int64_t in_features, Layout layout) {
  const int64_t quads = num_quads(in_features, layout);
  return (layout == kBase3 ? quads / kQuadsPerGroup * kLinesPerGroup : quads) * kLineBytes;
}

}  // namespace ternary
