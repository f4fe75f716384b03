// The vectors of page_encode.inc, in the compiler's own vector types, as wide as the unit's registers: a lane is a
// stream of its own, so all widths give the same bits. Everything is in an unnamed namespace.

#include <cstdint>

#include "vectors.h"

namespace ternary {
namespace {

typedef float Floats __attribute__((vector_size(PAGE_ENCODE_VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(PAGE_ENCODE_VECTOR_BYTES)));
typedef double Doubles __attribute__((vector_size(PAGE_ENCODE_VECTOR_BYTES)));
typedef float HalfFloats __attribute__((vector_size(PAGE_ENCODE_VECTOR_BYTES / 2)));

constexpr int64_t kWidth = PAGE_ENCODE_VECTOR_BYTES / 4;

TERNARY_INLINE Floats broadcast(float value) { return Floats{} + value; }
TERNARY_INLINE Ints broadcast(int32_t value) { return Ints{} + value; }

// What a unit adds before it includes page_encode.inc:
//   smaller(a, b)                  a < b ? a : b
//   smallest_square(a, b, c, d)    the least of their squares
//   pick_of_4(table, index)        table[index & 3]
//   pick_of_64(table, index)       table[index], 0 <= index < 64

}  // namespace
}  // namespace ternary
