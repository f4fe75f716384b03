// What every unit with vectors needs, whatever their width: loads and stores, and loops that are unrolled for certain.
//
// Everything is in an unnamed namespace: each including unit is compiled with its own flags (kernels.h says why).
#pragma once

#include <cstring>
#include <utility>

#define TERNARY_INLINE __attribute__((always_inline)) inline
#define TERNARY_LAMBDA __attribute__((always_inline))

namespace ternary {
namespace {

template <class Vector, class Element>
TERNARY_INLINE Vector load(const Element* source) {
  Vector vector;
  std::memcpy(&vector, source, sizeof vector);
  return vector;
}

template <class Vector, class Element>
TERNARY_INLINE void store(Element* target, Vector vector) {
  std::memcpy(target, &vector, sizeof vector);
}

template <class Body, int... kIndices>
TERNARY_INLINE void unroll_over(Body&& body, std::integer_sequence<int, kIndices...>) {
  (body(std::integral_constant<int, kIndices>{}), ...);
}

// Calls body(i) for i = 0 .. kCount - 1, each a constant: compilers keep 24 sums in registers only if every index is a
// constant from the start.
template <int kCount, class Body>
TERNARY_INLINE void unroll(Body&& body) {
  unroll_over(body, std::make_integer_sequence<int, kCount>{});
}

}  // namespace
}  // namespace ternary
