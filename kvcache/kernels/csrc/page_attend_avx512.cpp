// Attention over pages with AVX-512: VBMI looks 64 levels up at once, VBMI2 shifts across words, VNNI multiplies.

#include "page_attend.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include "page_vectors.h"

namespace ternary {
namespace {

constexpr int kKeyTiles = 4, kValueTiles = 4;

typedef __m512i Levels;
typedef __m512i Quad;
typedef __m512i Sum;

PAGE_INLINE Float16 half_to_float(const uint16_t* half) {
  return (Float16)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(half)));
}

PAGE_INLINE uint16_t float_to_half(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }

PAGE_INLINE Float16 multiply_add(Float16 a, Float16 b, Float16 c) {
  return (Float16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

PAGE_INLINE Quad load_quad(const void* bytes) {
  int32_t quad;
  std::memcpy(&quad, bytes, sizeof quad);
  return _mm512_set1_epi32(quad);
}

PAGE_INLINE Levels load_levels(const uint8_t* bytes) { return _mm512_load_si512(bytes); }

// The instruction itself: around the intrinsic GCC 12 copies every sum to another register and back.
PAGE_INLINE void add_products(Sum& sum, __m512i unsigned_bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
}

PAGE_INLINE void add_keys(Sum& sum, Levels keys, Quad digits) { add_products(sum, keys, digits); }
PAGE_INLINE void add_values(Sum& sum, Levels values, Quad weights) { add_products(sum, weights, values); }
PAGE_INLINE Sum sum_of(int32_t value) { return _mm512_set1_epi32(value); }
PAGE_INLINE Int16 to_ints(Sum sum) { return (Int16)sum; }

PAGE_INLINE float max_lanes(Float16 x) { return _mm512_reduce_max_ps((__m512)x); }
PAGE_INLINE float sum_lanes(Float16 x) { return _mm512_reduce_add_ps((__m512)x); }
PAGE_INLINE Float16 larger(Float16 a, Float16 b) { return (Float16)_mm512_max_ps((__m512)a, (__m512)b); }
PAGE_INLINE Float16 pick(const float* table, Int16 index) {
  return (Float16)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(table));
}
PAGE_INLINE Int16 load_bytes(const uint8_t* bytes) {
  return (Int16)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
}
PAGE_INLINE void store_bytes(uint8_t* bytes, Int16 integers) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), _mm512_cvtepi32_epi8((__m512i)integers));
}

PAGE_INLINE void permute_bytes(const uint8_t* x, const uint8_t* order, uint8_t* y) {
  _mm512_store_si512(y, _mm512_permutexvar_epi8(_mm512_load_si512(order), _mm512_load_si512(x)));
}

template <int kBits, int kIndex = 0>
PAGE_INLINE void look_up(__m512i word, __m512i next, __m512i table, uint8_t* levels, int64_t level_step) {
  const __m512i windows = kIndex == 0 ? word : _mm512_shrdi_epi32(word, next, kIndex * kBits);
  _mm512_store_si512(levels, _mm512_permutexvar_epi8(windows, table));
  if constexpr ((kIndex + 1) * kBits < 8)
    look_up<kBits, kIndex + 1>(word, next, table, levels + level_step, level_step);
}

template <int kBits>
PAGE_INLINE void unpack_words(const uint8_t* words, int64_t num_words, __m512i table, uint8_t* levels,
                              int64_t level_step, const uint8_t* ahead) {
  __m512i word = _mm512_loadu_si512(words);
  for (int64_t w = 0; w < num_words; ++w) {
    __builtin_prefetch(ahead + w * 64);
    const __m512i next = w + 1 < num_words ? _mm512_loadu_si512(words + (w + 1) * 64) : _mm512_setzero_si512();
    look_up<kBits>(word, next, table, levels, level_step);
    levels += 8 / kBits * level_step;
    word = next;
  }
}

void unpack(const uint8_t* words, int64_t num_words, int32_t num_bits, const uint8_t* table, uint8_t flip,
            uint8_t* levels, int64_t level_step, const uint8_t* ahead) {
  if (num_bits == 8) {
    const __m512i flips = _mm512_set1_epi8(static_cast<char>(flip));
    for (int64_t w = 0; w < num_words; ++w) {
      __builtin_prefetch(ahead + w * 64);
      _mm512_store_si512(levels + w * level_step, _mm512_xor_si512(_mm512_loadu_si512(words + w * 64), flips));
    }
    return;
  }
  const __m512i level_table = _mm512_load_si512(table);
  switch (num_bits) {
    case 4:
      return unpack_words<4>(words, num_words, level_table, levels, level_step, ahead);
    case 2:
      return unpack_words<2>(words, num_words, level_table, levels, level_step, ahead);
    default:
      return unpack_words<1>(words, num_words, level_table, levels, level_step, ahead);
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
