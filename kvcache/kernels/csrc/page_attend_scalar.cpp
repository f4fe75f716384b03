// Attention over pages in plain C++, for any machine.

#include "page_attend.h"
#include "page_lanes.h"

namespace ternary {
namespace {

constexpr int kKeyTiles = 1, kValueTiles = 1;

struct Levels {
  const uint8_t* bytes;
};
struct Quad {
  uint8_t bytes[4];
};
typedef Int16 Sum;

float half_to_float_one(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, magnitude = half & 0x7fff;
  float value;
  if (magnitude < 0x400) {  // zero and subnormal numbers
    value = static_cast<float>(magnitude) * 5.9604644775390625e-8F;
  } else {
    const uint32_t bits = (magnitude << 13) + (magnitude < 0x7c00 ? 0x38000000U : 0x70000000U);
    std::memcpy(&value, &bits, sizeof value);
  }
  return sign ? -value : value;
}

PAGE_INLINE Float16 half_to_float(const uint16_t* half) {
  Float16 lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = half_to_float_one(half[i]);
  return lanes;
}

// Nearest even; numbers are finite in half precision.
uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits < 0x38800000) {  // below the smallest normal half: adding 0.5 rounds to multiples of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5F;
    std::memcpy(&bits, &magnitude, sizeof bits);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | ((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13));
}

PAGE_INLINE Float16 multiply_add(Float16 a, Float16 b, Float16 c) { return a * b + c; }

PAGE_INLINE Quad load_quad(const void* bytes) {
  Quad quad;
  std::memcpy(quad.bytes, bytes, sizeof quad.bytes);
  return quad;
}

PAGE_INLINE Levels load_levels(const uint8_t* bytes) { return {bytes}; }

PAGE_INLINE void add_keys(Sum& sum, Levels keys, Quad digits) {
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < 4; ++j) sum[i] += keys.bytes[4 * i + j] * static_cast<int8_t>(digits.bytes[j]);
}

PAGE_INLINE void add_values(Sum& sum, Levels values, Quad weights) {
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < 4; ++j) sum[i] += static_cast<int8_t>(values.bytes[4 * i + j]) * weights.bytes[j];
}

PAGE_INLINE Sum sum_of(int32_t value) { return Sum{} + value; }
PAGE_INLINE Int16 to_ints(Sum sum) { return sum; }

void unpack(const uint8_t* words, int64_t num_words, int32_t num_bits, const uint8_t* table, uint8_t flip,
            uint8_t* levels, int64_t level_step, const uint8_t*) {
  for (int64_t w = 0; w < num_words; ++w)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      uint64_t stream = 0;
      std::memcpy(&stream, words + w * 64 + lane * 4, 4);
      if (w + 1 < num_words) {
        uint32_t next;
        std::memcpy(&next, words + (w + 1) * 64 + lane * 4, 4);
        stream |= static_cast<uint64_t>(next) << 32;
      }
      for (int i = 0; i < 8 / num_bits; ++i)
        for (int j = 0; j < 4; ++j) {
          const uint64_t bits = stream >> (8 * j + i * num_bits);
          levels[(w * (8 / num_bits) + i) * level_step + lane * 4 + j] =
              num_bits == 8 ? static_cast<uint8_t>((bits & 255) ^ flip) : table[bits & 63];
        }
    }
}

}  // namespace
}  // namespace ternary

#include "page_attend.inc"

namespace ternary {
const PageKernels& scalar_page_kernels() { return kPageKernels; }
}  // namespace ternary
