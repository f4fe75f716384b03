// Vectors of 16 lanes. Everything is in an unnamed namespace: each including unit is compiled with its own flags.
#pragma once

#include <cstdint>

#include "vectors.h"

// Unrolled early, so that small arrays become registers.
#define PAGE_UNROLL _Pragma("GCC unroll 16")

namespace ternary {
namespace {

constexpr int64_t kLanes = 16;

#if defined(__AVX512F__)

typedef float Float16 __attribute__((vector_size(64)));
typedef int32_t Int16 __attribute__((vector_size(64)));

TERNARY_INLINE Float16 broadcast(float value) { return Float16{} + value; }
TERNARY_INLINE Float16 to_floats(Int16 x) { return __builtin_convertvector(x, Float16); }

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

  TERNARY_INLINE static Lanes all(Element value) {
    Lanes lanes;
    PAGE_UNROLL for (int i = 0; i < kParts; ++i) lanes.parts[i] = Part{} + value;
    return lanes;
  }
  Element operator[](int64_t lane) const {
    Element elements[kLanes];
    std::memcpy(elements, parts, sizeof parts);
    return elements[lane];
  }

#define PAGE_OPERATOR(op)                                                                    \
  TERNARY_INLINE friend Lanes operator op(Lanes a, const Lanes& b) {                         \
    PAGE_UNROLL for (int i = 0; i < kParts; ++i) a.parts[i] = a.parts[i] op b.parts[i];      \
    return a;                                                                                \
  }                                                                                          \
  TERNARY_INLINE friend Lanes operator op(const Lanes& a, Element b) { return a op all(b); } \
  TERNARY_INLINE friend Lanes operator op(Element a, const Lanes& b) { return all(a) op b; }
  PAGE_OPERATOR(+)
  PAGE_OPERATOR(-)
  PAGE_OPERATOR(*)
  PAGE_OPERATOR(/)
#undef PAGE_OPERATOR
  TERNARY_INLINE Lanes& operator+=(const Lanes& other) { return *this = *this + other; }
};

typedef Lanes<float> Float16;
typedef Lanes<int32_t> Int16;

TERNARY_INLINE Float16 broadcast(float value) { return Float16::all(value); }

TERNARY_INLINE Float16 to_floats(const Int16& x) {
  Float16 floats;
  PAGE_UNROLL for (int i = 0; i < kParts; ++i) floats.parts[i] = __builtin_convertvector(x.parts[i], Float16::Part);
  return floats;
}

#endif

}  // namespace
}  // namespace ternary
