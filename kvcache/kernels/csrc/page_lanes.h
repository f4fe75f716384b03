// Steps across lanes without instructions of their own.
#pragma once

#include "page_vectors.h"

namespace ternary {
namespace {

PAGE_INLINE Float16 larger(Float16 a, Float16 b) { return a > b ? a : b; }

PAGE_INLINE float max_lanes(Float16 x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int width = 8; width >= 1; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  return lanes[0];
}

PAGE_INLINE float sum_lanes(Float16 x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int width = 8; width >= 1; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

PAGE_INLINE Float16 pick(const float* table, Int16 index) {
  Float16 lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = table[index[i]];
  return lanes;
}

PAGE_INLINE Int16 load_bytes(const uint8_t* bytes) { return __builtin_convertvector(load<Byte16>(bytes), Int16); }
PAGE_INLINE void store_bytes(uint8_t* bytes, Int16 integers) {
  store(bytes, __builtin_convertvector(integers, Byte16));
}

PAGE_INLINE void permute_bytes(const uint8_t* x, const uint8_t* order, uint8_t* y) {
  for (int i = 0; i < 64; ++i) y[i] = x[order[i]];
}

}  // namespace
}  // namespace ternary
