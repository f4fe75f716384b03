// Attention over pages with AVX-512: VBMI looks 64 levels up at once, VBMI2 shifts across words, VNNI multiplies.

#include "page_attend.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include "page_vectors.h"

namespace ternary {
namespace {

constexpr int kKeyBias = 128;  // the product is of unsigned and signed bytes, and digits of queries have signs
constexpr int kMaxRows = 4, kCountAtOnce = 4;
constexpr int kMaxFusedRows = 4;

typedef __m512i Word;
typedef __m512i Levels;
typedef __m512i Table;
typedef __m512i Quad;
typedef __m512i Sum;

TERNARY_INLINE Float16 half_to_float(const uint16_t* half) {
  return (Float16)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(half)));
}

TERNARY_INLINE Float16 broadcast_from(const float* value) { return (Float16)_mm512_set1_ps(*value); }

TERNARY_INLINE Float16 multiply_add(Float16 a, Float16 b, Float16 c) {
  return (Float16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

TERNARY_INLINE Float16 larger(Float16 a, Float16 b) { return (Float16)_mm512_max_ps((__m512)a, (__m512)b); }

TERNARY_INLINE Float16 round_even(Float16 x) {
  return (Float16)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

TERNARY_INLINE Int16 round_to_int(Float16 x) { return (Int16)_mm512_cvtps_epi32((__m512)x); }

TERNARY_INLINE Float16 times_power(Float16 x, Float16 n) {
  const __mmask16 is_normal = _mm512_cmp_ps_mask((__m512)n, _mm512_set1_ps(-126.0F), _CMP_GE_OQ);
  return (Float16)_mm512_maskz_scalef_ps(is_normal, (__m512)x, (__m512)n);
}

// Four vectors become one with, in each lane, a quarter of lane % 4's vector; then the quarters are put together.
template <int kRows, class Combine>
TERNARY_INLINE Float16 reduce_rows(const Float16 (&x)[kRows], Combine combine) {
  const __m512 a = (__m512)x[0], b = (__m512)x[kRows > 1 ? 1 : 0], c = (__m512)x[kRows > 2 ? 2 : 0],
               d = (__m512)x[kRows > 3 ? 3 : 0];
  const __m512d ab = (__m512d)combine(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512d cd = (__m512d)combine(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  __m512 all = combine((__m512)_mm512_unpacklo_pd(ab, cd), (__m512)_mm512_unpackhi_pd(ab, cd));
  all = combine(all, _mm512_shuffle_f32x4(all, all, 0x4e));
  return (Float16)combine(all, _mm512_shuffle_f32x4(all, all, 0xb1));
}

template <int kRows>
TERNARY_INLINE Float16 row_maxima(const Float16 (&x)[kRows]) {
  return reduce_rows(x, [](__m512 a, __m512 b) __attribute__((always_inline)) { return _mm512_max_ps(a, b); });
}

template <int kRows>
TERNARY_INLINE Float16 row_sums(const Float16 (&x)[kRows]) {
  return reduce_rows(x, [](__m512 a, __m512 b) __attribute__((always_inline)) { return _mm512_add_ps(a, b); });
}

TERNARY_INLINE Float16 spread(Float16 x, int lane) {
  return (Float16)_mm512_permutexvar_ps(_mm512_set1_epi32(lane), (__m512)x);
}

// Sixteen steps an octave: the step is looked up, and the octave added to the exponent.
TERNARY_INLINE Float16 look_up_scales(const float* scales, const uint8_t* codes) {
  const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  const __m512 step = _mm512_permutexvar_ps(code, _mm512_loadu_ps(scales));  // by the lower four bits
  const __m512i octave = _mm512_slli_epi32(_mm512_srli_epi32(code, 4), 23);
  return (Float16)_mm512_add_epi32((__m512i)step, octave);
}

template <int kByte>
TERNARY_INLINE void gather_bytes(const Int16 (&x)[4], const uint8_t* order, uint8_t* bytes) {
  const __m512i place = _mm512_load_si512(order);
  // bits 0 to 4 of a place choose one of two vectors' 32 integers, bit 5 which two
  const __m512i index =
      _mm512_or_si512(_mm512_slli_epi16(_mm512_and_si512(place, _mm512_set1_epi8(31)), 2), _mm512_set1_epi8(kByte));
  const __m512i low = _mm512_permutex2var_epi8((__m512i)x[0], index, (__m512i)x[1]);
  const __m512i high = _mm512_permutex2var_epi8((__m512i)x[2], index, (__m512i)x[3]);
  _mm512_store_si512(bytes, _mm512_mask_blend_epi8(_mm512_test_epi8_mask(place, _mm512_set1_epi8(32)), low, high));
}

TERNARY_INLINE Word load_word(const uint8_t* bytes) { return _mm512_loadu_si512(bytes); }
TERNARY_INLINE Word no_word() { return _mm512_setzero_si512(); }
TERNARY_INLINE Table load_table(const uint8_t* bytes) { return _mm512_load_si512(bytes); }

TERNARY_INLINE Quad load_quad(const uint8_t* bytes) {
  int32_t quad;
  std::memcpy(&quad, bytes, sizeof quad);
  return _mm512_set1_epi32(quad);
}

template <int kBits, int kIndex, bool kIsKey>
TERNARY_INLINE Levels look_up(Word word, Word next, Table table) {
  if constexpr (kBits == 8) return kIsKey ? _mm512_xor_si512(word, _mm512_set1_epi8(-128)) : word;
  const Word windows = kIndex == 0 ? word : _mm512_shrdi_epi32(word, next, kIndex * kBits % 32);
  return _mm512_permutexvar_epi8(windows, table);
}

// The instruction itself: around the intrinsic GCC 12 copies every sum to another register and back.
template <bool kIsKey>
TERNARY_INLINE void add_products(Sum& sum, Levels levels, Quad digits) {
  if constexpr (kIsKey)
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(levels), "v"(digits));
  else
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(digits), "v"(levels));
}

TERNARY_INLINE Sum sum_of(int32_t value) { return _mm512_set1_epi32(value); }
TERNARY_INLINE Int16 to_ints(Sum sum) { return (Int16)sum; }
template <int kBits>
TERNARY_INLINE Sum shift_left(Sum sum) {
  return _mm512_slli_epi32(sum, kBits);
}

template <int kBits, int kIndex = 0>
TERNARY_INLINE void unpack_word(Word word, Word next, Table table, uint8_t* levels) {
  _mm512_store_si512(levels, look_up<kBits, kIndex, false>(word, next, table));
  if constexpr ((kIndex + 1) * kBits < 8) unpack_word<kBits, kIndex + 1>(word, next, table, levels + 64);
}

template <int kBits>
TERNARY_INLINE void unpack_words(const uint8_t* words, int64_t num_words, const uint8_t* table, uint8_t* levels,
                                 const uint8_t* ahead) {
  const Table levels_of = kBits == 8 ? no_word() : load_table(table);
  Word word = load_word(words);
  for (int64_t w = 0; w < num_words; ++w) {
    __builtin_prefetch(ahead + w * 64);
    const Word next = w + 1 < num_words ? load_word(words + (w + 1) * 64) : no_word();
    unpack_word<kBits>(word, next, levels_of, levels);
    levels += 8 / kBits * 64;
    word = next;
  }
}

void unpack(const uint8_t* words, int64_t num_words, int32_t num_bits, const uint8_t* table, uint8_t* levels,
            const uint8_t* ahead) {
  switch (num_bits) {
    case 8:
      return unpack_words<8>(words, num_words, table, levels, ahead);
    case 4:
      return unpack_words<4>(words, num_words, table, levels, ahead);
    case 2:
      return unpack_words<2>(words, num_words, table, levels, ahead);
    default:
      return unpack_words<1>(words, num_words, table, levels, ahead);
  }
}

}  // namespace
}  // namespace ternary

#include "page_attend.inc"

namespace ternary {
const PageKernels* avx512_page_kernels() { return &kPageKernels; }
}  // namespace ternary

#else
namespace ternary {
const PageKernels* avx512_page_kernels() { return nullptr; }
}  // namespace ternary
#endif
