// Per-row absmax quantization, bit-identical to the reference for finite rows:
// one division by the scale (not a multiplication by its inverse) and rounding half to even.

#include <algorithm>
#include <cmath>

#include "ternary.h"

namespace {

constexpr float kMinAbsmax = 1e-5F;
constexpr float kInt8Max = 127.0F;
// Adding and subtracting 1.5 * 2^23 rounds |value| < 2^22 half to even in the default rounding mode,
// which every compiler vectorizes; values here are at most 127 in magnitude.
constexpr float kRoundingShift = 12582912.0F;

float row_absmax(const float* row, int64_t num_features) {
  float absmax = kMinAbsmax;
  for (int64_t i = 0; i < num_features; ++i) {
    const float magnitude = std::fabs(row[i]);
    // a NaN differs from itself, so it is taken; nothing is larger than it, so it stays
    absmax = magnitude > absmax || magnitude != magnitude ? magnitude : absmax;
  }
  return absmax;
}

}  // namespace

extern "C" int32_t interface_version() { return 1; }

extern "C" void quantize_activation_f32(const float* x, int64_t num_rows, int64_t num_features, int8_t* x_q,
                                        float* scale) {
  for (int64_t row = 0; row < num_rows; ++row) {
    const float* input = x + row * num_features;
    int8_t* output = x_q + row * num_features;
    const float row_scale = row_absmax(input, num_features) / kInt8Max;
    scale[row] = row_scale;
    if (!std::isfinite(row_scale)) {  // converting NaN to an integer is undefined
      std::fill(output, output + num_features, int8_t{0});
      continue;
    }
    for (int64_t i = 0; i < num_features; ++i) {
      const float rounded = (input[i] / row_scale + kRoundingShift) - kRoundingShift;
      output[i] = static_cast<int8_t>(rounded);
    }
  }
}
