// AVX-512: sixteen streams a vector.

#include "page_encode.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define PAGE_ENCODE_VECTOR_BYTES 64
#include "page_encode_vector.h"

namespace ternary {
namespace {

TERNARY_INLINE Floats smaller(Floats a, Floats b) { return (Floats)_mm512_min_ps((__m512)a, (__m512)b); }

TERNARY_INLINE Floats smallest_square(Floats a, Floats b, Floats c, Floats d) {
  constexpr int kSmallerMagnitude = 0b1010;  // without its sign
  const __m512 low = _mm512_range_ps((__m512)a, (__m512)b, kSmallerMagnitude);
  const __m512 high = _mm512_range_ps((__m512)c, (__m512)d, kSmallerMagnitude);
  const Floats smallest = (Floats)_mm512_range_ps(low, high, kSmallerMagnitude);
  return smallest * smallest;
}

TERNARY_INLINE Floats pick_of_4(const float* table, Ints index) {
  return (Floats)_mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(table)), (__m512i)index);
}

TERNARY_INLINE Floats pick_of_64(const float* table, Ints index) {
  const __m512i i = (__m512i)index;
  const __m512 low = _mm512_permutex2var_ps(_mm512_loadu_ps(table), i, _mm512_loadu_ps(table + 16));
  const __m512 high = _mm512_permutex2var_ps(_mm512_loadu_ps(table + 32), i, _mm512_loadu_ps(table + 48));
  return (Floats)_mm512_mask_mov_ps(low, _mm512_test_epi32_mask(i, _mm512_set1_epi32(32)), high);
}

}  // namespace
}  // namespace ternary

#include "page_encode.inc"

namespace ternary {
const PageEncoder* avx512_page_encoder() { return &kPageEncoder; }
}  // namespace ternary

#else
namespace ternary {
const PageEncoder* avx512_page_encoder() { return nullptr; }
}  // namespace ternary
#endif
