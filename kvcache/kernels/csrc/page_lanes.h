// Steps for which an instruction set has no instructions of its own, on vectors of several registers.
#pragma once

#include "page_vectors.h"

namespace ternary {
namespace {

// A word stays in memory: four levels of every lane, unpacked.
struct Word {
  const uint8_t* bytes;
};
typedef Word Levels;
struct Table {};

TERNARY_INLINE Word load_word(const uint8_t* bytes) { return {bytes}; }
TERNARY_INLINE Word no_word() { return {nullptr}; }
TERNARY_INLINE Table load_table(const uint8_t*) { return {}; }

template <int kBits, int kIndex, bool kIsKey>
TERNARY_INLINE Levels look_up(Word word, Word, Table) {
  static_assert(kBits == 8);
  return word;
}

TERNARY_INLINE Float16 broadcast_from(const float* value) { return broadcast(*value); }

TERNARY_INLINE Float16 larger(Float16 a, const Float16& b) {
  PAGE_UNROLL for (int i = 0; i < kParts; ++i) a.parts[i] = a.parts[i] > b.parts[i] ? a.parts[i] : b.parts[i];
  return a;
}

constexpr float kRoundsToEven = 12582912.0F;  // adding and subtracting 1.5 * 2^23 does
TERNARY_INLINE Float16 round_even(const Float16& x) { return (x + kRoundsToEven) - kRoundsToEven; }

TERNARY_INLINE Int16 round_to_int(const Float16& x) {
  const Float16 rounded = round_even(x);
  Int16 integers;
  PAGE_UNROLL for (int i = 0; i < kParts; ++i) integers.parts[i] =
      __builtin_convertvector(rounded.parts[i], Int16::Part);
  return integers;
}

TERNARY_INLINE Float16 times_power(Float16 x, const Float16& n) {
  const Int16 exponent = round_to_int(n);
  PAGE_UNROLL for (int i = 0; i < kParts; ++i) {
    const auto power = (Float16::Part)((exponent.parts[i] + 127) << 23);
    x.parts[i] = n.parts[i] >= -126.0F ? x.parts[i] * power : Float16::Part{};
  }
  return x;
}

template <class Combine>
TERNARY_INLINE float reduce(const Float16& x, Combine combine) {
  Float16::Part part = x.parts[0];
  for (int i = 1; i < kParts; ++i)
    for (int lane = 0; lane < kRegisterBytes / 4; ++lane) part[lane] = combine(part[lane], x.parts[i][lane]);
  float lanes[kRegisterBytes / 4];
  store(lanes, part);
  for (int width = kRegisterBytes / 8; width >= 1; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = combine(lanes[i], lanes[i + width]);
  return lanes[0];
}

template <int kRows, class Combine>
TERNARY_INLINE Float16 reduce_rows(const Float16 (&x)[kRows], Combine combine) {
  float lanes[kLanes] = {};
  for (int r = 0; r < kRows; ++r) lanes[r] = reduce(x[r], combine);
  return load<Float16>(lanes);
}

template <int kRows>
TERNARY_INLINE Float16 row_maxima(const Float16 (&x)[kRows]) {
  return reduce_rows(x, [](float a, float b) { return a > b ? a : b; });
}

template <int kRows>
TERNARY_INLINE Float16 row_sums(const Float16 (&x)[kRows]) {
  return reduce_rows(x, [](float a, float b) { return a + b; });
}

TERNARY_INLINE Float16 spread(const Float16& x, int lane) { return broadcast(x[lane]); }

TERNARY_INLINE Float16 look_up_scales(const float* scales, const uint8_t* codes) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = scales[codes[i]];
  return load<Float16>(lanes);
}

template <int kByte>
TERNARY_INLINE void gather_bytes(const Int16 (&x)[4], const uint8_t* order, uint8_t* bytes) {
  int32_t integers[4 * kLanes];
  for (int t = 0; t < 4; ++t) store(integers + t * kLanes, x[t]);
  for (int i = 0; i < 4 * kLanes; ++i) bytes[i] = static_cast<uint8_t>(integers[order[i]] >> 8 * kByte);
}

}  // namespace
}  // namespace ternary
