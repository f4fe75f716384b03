// Vectors of 16 lanes in the compiler's own types, which it splits where registers are narrower. Everything is in an
// unnamed namespace: each including unit is compiled with its own flags.
#pragma once

#include <cstdint>
#include <cstring>

#define PAGE_INLINE __attribute__((always_inline)) inline

namespace ternary {
namespace {

typedef float Float16 __attribute__((vector_size(64)));
typedef int32_t Int16 __attribute__((vector_size(64)));
typedef uint8_t Byte16 __attribute__((vector_size(16)));

constexpr int64_t kLanes = 16;

template <class Vector, class Element>
PAGE_INLINE Vector load(const Element* source) {
  Vector vector;
  std::memcpy(&vector, source, sizeof vector);
  return vector;
}

template <class Vector, class Element>
PAGE_INLINE void store(Element* target, Vector vector) {
  std::memcpy(target, &vector, sizeof vector);
}

PAGE_INLINE Float16 broadcast(float value) { return Float16{} + value; }

}  // namespace
}  // namespace ternary
