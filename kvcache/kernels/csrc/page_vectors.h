// Vectors of 16 lanes. Everything is in an unnamed namespace: each including unit is compiled with its own flags.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#define PAGE_INLINE __attribute__((always_inline)) inline
#define PAGE_LAMBDA __attribute__((always_inline))
// Unrolled early, so that small arrays become registers.
#define PAGE_UNROLL _Pragma("GCC unroll 16")

namespace ternary {
namespace {

constexpr int64_t kLanes = 16;

template <class Body, int... kIndices>
PAGE_INLINE void unroll_indices(Body&& body, std::integer_sequence<int, kIndices...>) {
  (body(std::integral_constant<int, kIndices>{}), ...);
}

// Calls body(i) for i = 0 .. kCount - 1, each a constant.
template <int kCount, class Body>
PAGE_INLINE void unroll(Body&& body) {
  unroll_indices(body, std::make_integer_sequence<int, kCount>{});
}

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

#if defined(__AVX512F__)

typedef float Float16 __attribute__((vector_size(64)));
typedef int32_t Int16 __attribute__((vector_size(64)));

PAGE_INLINE Float16 broadcast(float value) { return Float16{} + value; }
PAGE_INLINE Float16 to_floats(Int16 x) { return __builtin_convertvector(x, Float16); }

#else

#if defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif
constexpr int kParts = 64 / kRegisterBytes;

// Sixteen lanes in several registers. Compilers split vectors wider than a register, too, but through memory.
template <class Element>
struct Lanes {
  typedef Element Part __attribute__((vector_size(kRegisterBytes)));
  Part parts[kParts];

  PAGE_INLINE static Lanes all(Element value) {
    Lanes lanes;
    PAGE_UNROLL for (int i = 0; i < kParts; ++i) lanes.parts[i] = Part{} + value;
    return lanes;
  }
  Element operator[](int64_t lane) const {
    Element elements[kLanes];
    std::memcpy(elements, parts, sizeof parts);
    return elements[lane];
  }

#define PAGE_OPERATOR(op)                                                                 \
  PAGE_INLINE friend Lanes operator op(Lanes a, const Lanes& b) {                         \
    PAGE_UNROLL for (int i = 0; i < kParts; ++i) a.parts[i] = a.parts[i] op b.parts[i];   \
    return a;                                                                             \
  }                                                                                       \
  PAGE_INLINE friend Lanes operator op(const Lanes& a, Element b) { return a op all(b); } \
  PAGE_INLINE friend Lanes operator op(Element a, const Lanes& b) { return all(a) op b; }
  PAGE_OPERATOR(+)
  PAGE_OPERATOR(-)
  PAGE_OPERATOR(*)
  PAGE_OPERATOR(/)
#undef PAGE_OPERATOR
  PAGE_INLINE Lanes& operator+=(const Lanes& other) { return *this = *this + other; }
};

typedef Lanes<float> Float16;
typedef Lanes<int32_t> Int16;

PAGE_INLINE Float16 broadcast(float value) { return Float16::all(value); }

PAGE_INLINE Float16 to_floats(const Int16& x) {
  Float16 floats;
  PAGE_UNROLL for (int i = 0; i < kParts; ++i) floats.parts[i] = __builtin_convertvector(x.parts[i], Float16::Part);
  return floats;
}

#endif

}  // namespace
}  // namespace ternary
