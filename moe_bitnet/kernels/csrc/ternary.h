// The C interface of the ternary kernels. Pointers are to contiguous memory that the caller owns and has checked.
#pragma once

#include <cstdint>

extern "C" {

// Raised with every change of a signature below; the Python side refuses another number.
int32_t interface_version();

// Per-row absmax quantization to int8.
//   x      [num_rows, num_features] float32
//   x_q    [num_rows, num_features] int8,   round_half_even(x / scale) clamped to [-128, 127]
//   scale  [num_rows]               float32, max(|x|, 1e-5) / 127
// Rows with NaN or infinity give that scale and integers of 0.
void quantize_activation_f32(const float* x, int64_t num_rows, int64_t num_features, int8_t* x_q, float* scale);

}  // extern "C"
