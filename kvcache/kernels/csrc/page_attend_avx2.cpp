// Attention over pages with AVX2: products of 16-bit pairs, which cannot overflow.

#include "page_attend.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include "page_lanes.h"

namespace ternary {
namespace {

constexpr int kKeyBias = 0;
constexpr int kMaxRows = 2, kCountAtOnce = 1;
constexpr int kMaxFusedRows = 0;

struct Quad {
  __m128i bytes;  // four times the same four
};
struct Sum {
  __m256i pairs[4];  // two partial sums a lane
};

TERNARY_INLINE Float16 half_to_float(const uint16_t* half) {
  const auto* source = reinterpret_cast<const __m128i*>(half);
  return {{(Float16::Part)_mm256_cvtph_ps(_mm_loadu_si128(source)),
           (Float16::Part)_mm256_cvtph_ps(_mm_loadu_si128(source + 1))}};
}

TERNARY_INLINE Float16 multiply_add(const Float16& a, const Float16& b, Float16 c) {
  PAGE_UNROLL for (int i = 0; i < kParts; ++i) {
    c.parts[i] = (Float16::Part)_mm256_fmadd_ps((__m256)a.parts[i], (__m256)b.parts[i], (__m256)c.parts[i]);
  }
  return c;
}

TERNARY_INLINE Quad load_quad(const uint8_t* bytes) {
  int32_t quad;
  std::memcpy(&quad, bytes, sizeof quad);
  return {_mm_set1_epi32(quad)};
}

// Levels have signs; so have digits of queries, and those of weights have not.
template <bool kIsKey>
TERNARY_INLINE void add_products(Sum& sum, Levels levels, Quad digits) {
  const __m256i multiplier = kIsKey ? _mm256_cvtepi8_epi16(digits.bytes) : _mm256_cvtepu8_epi16(digits.bytes);
  PAGE_UNROLL for (int i = 0; i < 4; ++i) {
    const __m128i quarter = _mm_loadu_si128(reinterpret_cast<const __m128i*>(levels.bytes) + i);
    sum.pairs[i] = _mm256_add_epi32(sum.pairs[i], _mm256_madd_epi16(_mm256_cvtepi8_epi16(quarter), multiplier));
  }
}

TERNARY_INLINE Sum sum_of(int32_t) {
  const __m256i zero = _mm256_setzero_si256();
  return {{zero, zero, zero, zero}};
}

template <int kBits>
TERNARY_INLINE Sum shift_left(Sum sum) {
  PAGE_UNROLL for (int i = 0; i < 4; ++i) sum.pairs[i] = _mm256_slli_epi32(sum.pairs[i], kBits);
  return sum;
}

TERNARY_INLINE Int16 to_ints(const Sum& sum) {
  Int16 lanes;
  PAGE_UNROLL for (int i = 0; i < kParts; ++i) {
    const __m256i added = _mm256_hadd_epi32(sum.pairs[2 * i], sum.pairs[2 * i + 1]);
    lanes.parts[i] = (Int16::Part)_mm256_permute4x64_epi64(added, 0xd8);
  }
  return lanes;
}

// Sixty-four levels as four shuffles of sixteen; bits 4 and 5 of an index choose among them.
TERNARY_INLINE __m256i look_up_bytes(__m256i index, const __m256i* table) {
  const __m256i low = _mm256_and_si256(index, _mm256_set1_epi8(15));
  const __m256i by_bit_4 = _mm256_slli_epi16(index, 3), by_bit_5 = _mm256_slli_epi16(index, 2);
  const __m256i first =
      _mm256_blendv_epi8(_mm256_shuffle_epi8(table[0], low), _mm256_shuffle_epi8(table[1], low), by_bit_4);
  const __m256i second =
      _mm256_blendv_epi8(_mm256_shuffle_epi8(table[2], low), _mm256_shuffle_epi8(table[3], low), by_bit_4);
  return _mm256_blendv_epi8(first, second, by_bit_5);
}

void unpack(const uint8_t* words, int64_t num_words, int32_t num_bits, const uint8_t* table, uint8_t* levels,
            const uint8_t* ahead) {
  if (num_bits == 8) {
    std::memcpy(levels, words, static_cast<size_t>(num_words) * 64);
    return;
  }
  __m256i tables[4];
  for (int i = 0; i < 4; ++i)
    tables[i] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table) + i));
  const int per_byte = 8 / num_bits;
  for (int64_t w = 0; w < num_words; ++w) {
    __builtin_prefetch(ahead + w * 64);
    for (int half = 0; half < 64; half += 32) {
      const auto load_half = [&](int64_t at) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + at * 64 + half));
      };
      const __m256i word = load_half(w), next = w + 1 < num_words ? load_half(w + 1) : _mm256_setzero_si256();
      for (int i = 0; i < per_byte; ++i) {
        const __m256i windows =
            i == 0 ? word
                   : _mm256_or_si256(_mm256_srli_epi32(word, i * num_bits), _mm256_slli_epi32(next, 32 - i * num_bits));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(levels + (w * per_byte + i) * 64 + half),
                            look_up_bytes(windows, tables));
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
