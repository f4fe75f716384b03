// Attention over pages in plain C++, for any machine.

#include "page_attend.h"
#include "page_lanes.h"

namespace ternary {
namespace {

constexpr int kKeyBias = 0;
constexpr int kMaxRows = 4, kCountAtOnce = 1;
constexpr int kMaxFusedRows = 0;

// A word stays in memory: four levels of every lane.
struct Word {
  const uint8_t* bytes;
};
typedef Word Levels;
struct Table {};
struct Quad {
  uint8_t bytes[4];
};
struct Sum {
  int32_t lanes[kLanes];
};

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
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = half_to_float_one(half[i]);
  return load<Float16>(lanes);
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

PAGE_INLINE Float16 multiply_add(const Float16& a, const Float16& b, const Float16& c) { return a * b + c; }

PAGE_INLINE Word load_word(const uint8_t* bytes) { return {bytes}; }
PAGE_INLINE Word no_word() { return {nullptr}; }
PAGE_INLINE Table load_table(const uint8_t*) { return {}; }

template <int kBits, int kIndex, bool kIsKey>
PAGE_INLINE Levels look_up(Word word, Word, Table) {
  static_assert(kBits == 8);
  return word;
}

PAGE_INLINE Quad load_quad(const uint8_t* bytes) {
  Quad quad;
  std::memcpy(quad.bytes, bytes, sizeof quad.bytes);
  return quad;
}

// Levels have signs; so have digits of queries, and those of weights have not.
template <bool kIsKey>
PAGE_INLINE void add_products(Sum& sum, Levels levels, Quad digits) {
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < 4; ++j) {
      const int digit = kIsKey ? static_cast<int8_t>(digits.bytes[j]) : digits.bytes[j];
      sum.lanes[i] += static_cast<int8_t>(levels.bytes[4 * i + j]) * digit;
    }
}

PAGE_INLINE Sum sum_of(int32_t value) {
  Sum sum;
  for (int32_t& lane : sum.lanes) lane = value;
  return sum;
}

template <int kBits>
PAGE_INLINE Sum shift_left(Sum sum) {
  for (int32_t& lane : sum.lanes) lane *= 1 << kBits;
  return sum;
}

PAGE_INLINE Int16 to_ints(const Sum& sum) { return load<Int16>(sum.lanes); }

void unpack(const uint8_t* words, int64_t num_words, int32_t num_bits, const uint8_t* table, uint8_t* levels,
            const uint8_t*) {
  for (int64_t w = 0; w < num_words; ++w)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      uint32_t word, next = 0;
      std::memcpy(&word, words + w * 64 + lane * 4, sizeof word);
      if (w + 1 < num_words) std::memcpy(&next, words + (w + 1) * 64 + lane * 4, sizeof next);
      const uint64_t stream = static_cast<uint64_t>(next) << 32 | word;
      for (int i = 0; i < 8 / num_bits; ++i)
        for (int j = 0; j < 4; ++j) {
          const uint64_t bits = stream >> (8 * j + i * num_bits);
          levels[(w * (8 / num_bits) + i) * 64 + lane * 4 + j] =
              num_bits == 8 ? static_cast<uint8_t>(bits) : table[bits & 63];
        }
    }
}

}  // namespace
}  // namespace ternary

#include "page_attend.inc"

namespace ternary {
const PageKernels& scalar_page_kernels() { return kPageKernels; }
}  // namespace ternary
