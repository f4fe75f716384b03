// AVX2: eight streams a vector.

#include "page_encode.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define PAGE_ENCODE_VECTOR_BYTES 32
#include "page_encode_vector.h"

namespace ternary {
namespace {

TERNARY_INLINE Floats smaller(Floats a, Floats b) { return (Floats)_mm256_min_ps((__m256)a, (__m256)b); }

TERNARY_INLINE Floats smallest_square(Floats a, Floats b, Floats c, Floats d) {
  return smaller(smaller(a * a, b * b), smaller(c * c, d * d));
}

TERNARY_INLINE Floats pick_of_4(const float* table, Ints index) {
  return (Floats)_mm256_permutevar_ps(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(table)), (__m256i)index);
}

TERNARY_INLINE Floats pick_of_64(const float* table, Ints index) {
  return (Floats)_mm256_i32gather_ps(table, (__m256i)index, 4);
}

}  // namespace
}  // namespace ternary

#include "page_encode.inc"

namespace ternary {
const PageEncoder* avx2_page_encoder() { return &kPageEncoder; }
}  // namespace ternary

#else
namespace ternary {
const PageEncoder* avx2_page_encoder() { return nullptr; }
}  // namespace ternary
#endif
