// Attention over pages in plain C++, for any machine.

#include "half.h"
#include "page_attend.h"
#include "page_lanes.h"

namespace ternary {
namespace {

constexpr int kKeyBias = 0;
constexpr int kMaxRows = 4, kCountAtOnce = 1;
constexpr int kMaxFusedRows = 0;

struct Quad {
  uint8_t bytes[4];
};
struct Sum {
  int32_t lanes[kLanes];
};

TERNARY_INLINE Float16 half_to_float(const uint16_t* half) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = half_to_float_one(half[i]);
  return load<Float16>(lanes);
}

TERNARY_INLINE Float16 multiply_add(const Float16& a, const Float16& b, const Float16& c) { return a * b + c; }

TERNARY_INLINE Quad load_quad(const uint8_t* bytes) {
  Quad quad;
  std::memcpy(quad.bytes, bytes, sizeof quad.bytes);
  return quad;
}

// Levels have signs; so have digits of queries, and those of weights have not.
template <bool kIsKey>
TERNARY_INLINE void add_products(Sum& sum, Levels levels, Quad digits) {
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < 4; ++j) {
      const int digit = kIsKey ? static_cast<int8_t>(digits.bytes[j]) : digits.bytes[j];
      sum.lanes[i] += static_cast<int8_t>(levels.bytes[4 * i + j]) * digit;
    }
}

TERNARY_INLINE Sum sum_of(int32_t value) {
  Sum sum;
  for (int32_t& lane : sum.lanes) lane = value;
  return sum;
}

template <int kBits>
TERNARY_INLINE Sum shift_left(Sum sum) {
  for (int32_t& lane : sum.lanes) lane *= 1 << kBits;
  return sum;
}

TERNARY_INLINE Int16 to_ints(const Sum& sum) { return load<Int16>(sum.lanes); }

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
