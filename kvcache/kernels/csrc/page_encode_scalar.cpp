// Plain C++ for every machine: four streams a vector, which compilers put into SSE2 or NEON registers.

#include "page_encode.h"

#define PAGE_ENCODE_VECTOR_BYTES 16
#include "page_encode_vector.h"

namespace ternary {
namespace {

TERNARY_INLINE Floats smaller(Floats a, Floats b) { return a < b ? a : b; }

TERNARY_INLINE Floats smallest_square(Floats a, Floats b, Floats c, Floats d) {
  return smaller(smaller(a * a, b * b), smaller(c * c, d * d));
}

TERNARY_INLINE Floats pick_of_64(const float* table, Ints index) {
  Floats picked{};
  for (int lane = 0; lane < kWidth; ++lane) picked[lane] = table[index[lane]];
  return picked;
}

TERNARY_INLINE Floats pick_of_4(const float* table, Ints index) { return pick_of_64(table, index & 3); }

}  // namespace
}  // namespace ternary

#include "page_encode.inc"

namespace ternary {
const PageEncoder& scalar_page_encoder() { return kPageEncoder; }
}  // namespace ternary
