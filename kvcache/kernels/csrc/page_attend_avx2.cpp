// Attention over pages with AVX2: products of 16-bit pairs, which cannot overflow.

#include "page_attend.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include "page_lanes.h"

namespace ternary {
namespace {

constexpr int kKeyTiles = 1, kValueTiles = 1;

// Bytes: lanes 0-3, 4-7, 8-11 and 12-15, four levels each.
struct Levels {
  const uint8_t* bytes;
};
struct Quad {
  __m128i bytes;  // four times the same four
};
struct Sum {
  __m256i pairs[4];  // two partial sums a lane
};

PAGE_INLINE Float16 half_to_float(const uint16_t* half) {
  Float16 lanes;
  const __m256 low = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half)));
  const __m256 high = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half + 8)));
  std::memcpy(&lanes, &low, sizeof low);
  std::memcpy(reinterpret_cast<char*>(&lanes) + sizeof low, &high, sizeof high);
  return lanes;
}

PAGE_INLINE uint16_t float_to_half(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }

PAGE_INLINE Float16 multiply_add(Float16 a, Float16 b, Float16 c) {
  __m256 x[2], y[2], z[2];
  std::memcpy(x, &a, sizeof a);
  std::memcpy(y, &b, sizeof b);
  std::memcpy(z, &c, sizeof c);
  for (int i = 0; i < 2; ++i) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
  std::memcpy(&c, z, sizeof c);
  return c;
}

PAGE_INLINE __m128i broadcast_quad(const void* bytes) {
  int32_t quad;
  std::memcpy(&quad, bytes, sizeof quad);
  return _mm_set1_epi32(quad);
}

PAGE_INLINE Levels load_levels(const uint8_t* bytes) { return {bytes}; }
PAGE_INLINE __m128i quarter(Levels levels, int i) {
  return _mm_load_si128(reinterpret_cast<const __m128i*>(levels.bytes) + i);
}

PAGE_INLINE Quad load_quad(const void* bytes) { return {broadcast_quad(bytes)}; }

PAGE_INLINE void add_keys(Sum& sum, Levels keys, Quad digits) {
  const __m256i multiplier = _mm256_cvtepi8_epi16(digits.bytes);
  for (int i = 0; i < 4; ++i)
    sum.pairs[i] =
        _mm256_add_epi32(sum.pairs[i], _mm256_madd_epi16(_mm256_cvtepu8_epi16(quarter(keys, i)), multiplier));
}

PAGE_INLINE void add_values(Sum& sum, Levels values, Quad weights) {
  const __m256i multiplier = _mm256_cvtepu8_epi16(weights.bytes);
  for (int i = 0; i < 4; ++i)
    sum.pairs[i] =
        _mm256_add_epi32(sum.pairs[i], _mm256_madd_epi16(_mm256_cvtepi8_epi16(quarter(values, i)), multiplier));
}

PAGE_INLINE Sum sum_of(int32_t value) {
  const __m256i pairs = _mm256_set1_epi64x(static_cast<uint32_t>(value));  // the first of each pair
  return {{pairs, pairs, pairs, pairs}};
}

PAGE_INLINE Int16 to_ints(const Sum& sum) {
  int32_t pairs[2 * kLanes];
  for (int i = 0; i < 4; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(pairs + 8 * i), sum.pairs[i]);
  Int16 lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = pairs[2 * i] + pairs[2 * i + 1];
  return lanes;
}

// Sixty-four levels as four shuffles of sixteen; bits 4 and 5 of an index choose among them.
PAGE_INLINE __m256i look_up(__m256i index, const __m256i* table) {
  const __m256i low = _mm256_and_si256(index, _mm256_set1_epi8(15));
  const __m256i by_bit_4 = _mm256_slli_epi16(index, 3), by_bit_5 = _mm256_slli_epi16(index, 2);
  const __m256i first =
      _mm256_blendv_epi8(_mm256_shuffle_epi8(table[0], low), _mm256_shuffle_epi8(table[1], low), by_bit_4);
  const __m256i second =
      _mm256_blendv_epi8(_mm256_shuffle_epi8(table[2], low), _mm256_shuffle_epi8(table[3], low), by_bit_4);
  return _mm256_blendv_epi8(first, second, by_bit_5);
}

void unpack(const uint8_t* words, int64_t num_words, int32_t num_bits, const uint8_t* table, uint8_t flip,
            uint8_t* levels, int64_t level_step, const uint8_t* ahead) {
  __m256i tables[4];
  for (int i = 0; i < 4 && table; ++i)
    tables[i] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table) + i));
  for (int64_t w = 0; w < num_words; ++w) {
    __builtin_prefetch(ahead + w * 64);
    for (int half = 0; half < 64; half += 32) {
      const auto load_word = [&](int64_t at) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + at * 64 + half));
      };
      const __m256i word = load_word(w);
      if (num_bits == 8) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(levels + w * level_step + half),
                           _mm256_xor_si256(word, _mm256_set1_epi8(static_cast<char>(flip))));
        continue;
      }
      const __m256i next = w + 1 < num_words ? load_word(w + 1) : _mm256_setzero_si256();
      for (int i = 0; i < 8 / num_bits; ++i) {
        const __m256i windows =
            i == 0 ? word
                   : _mm256_or_si256(_mm256_srli_epi32(word, i * num_bits), _mm256_slli_epi32(next, 32 - i * num_bits));
        _mm256_store_si256(reinterpret_cast<__m256i*>(levels + (w * (8 / num_bits) + i) * level_step + half),
                           look_up(windows, tables));
      }
    }
  }
}

}  // namespace
}  // namespace ternary

#include "page_attend.inc"

namespace ternary {
const PageKernels* avx2_page_kernels() { return &kPageKernels; }
}  // namespace ternary

#else
namespace ternary {
const PageKernels* avx2_page_kernels() { return nullptr; }
}  // namespace ternary
#endif
