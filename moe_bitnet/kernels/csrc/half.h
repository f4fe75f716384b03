// Half precision without instructions for it.
#pragma once

#include <cstdint>

#include "vectors.h"

namespace ternary {
namespace {

TERNARY_INLINE float half_to_float_one(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, magnitude = half & 0x7fff;
  // move exponent and mantissa in place and let a multiplication set the exponent's bias, denormals included
  uint32_t bits = magnitude << 13;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  value *= 0x1p112F;
  std::memcpy(&bits, &value, sizeof bits);
  if (magnitude >= 0x7c00) bits = 0x7f800000 | (magnitude & 0x3ff) << 13;
  bits |= sign;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace
}  // namespace ternary
