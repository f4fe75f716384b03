// The C interface of the ternary kernels. Pointers are to contiguous memory that the caller owns and has checked;
// num_threads counts the caller's thread. No function keeps a pointer, but for those of ternary_decoder.
#pragma once

#include <cstdint>

extern "C" {

// Raised with every change of a declaration below; the Python side refuses another number.
int32_t interface_version();

// The instruction set in use: 0 scalar, 1 AVX2, 2 AVX-512; -1 if MOE_BITNET_ISA names one that is not here.
int32_t ternary_isa();
// Takes another instruction set from now on; returns it, or -1 if this machine does not have it.
int32_t ternary_select_isa(int32_t isa);

// Matrices of one shape, in tiles (layout.h; drawn in moe_bitnet/tiles.py).
//   tiles   [num_matrices][row blocks][block bytes]
//   scales  [num_matrices] float32
//   layout  0: 2 bits, 1: base 3
struct ternary_matrices {
  const uint8_t* tiles;
  const float* scales;
  int64_t num_matrices;
  int64_t out_features;
  int64_t in_features;
  int32_t layout;
};

// Portable bytes [num_rows of all matrices][packed width] to tiles, and back. tile returns how many bytes of the input
// are no code of the layout (they are refused by the caller).
int64_t ternary_tile(const uint8_t* packed, int64_t num_matrices, int64_t out_features, int64_t in_features,
                     int32_t layout, uint8_t* tiles, int32_t num_threads);
void ternary_untile(const uint8_t* tiles, int64_t num_matrices, int64_t out_features, int64_t in_features,
                    int32_t layout, uint8_t* packed, int32_t num_threads);

// Per-row absmax quantization to int8.
//   x      [num_rows, num_features] float32
//   x_q    [num_rows, num_features] int8,   round_half_even(x / scale)
//   scale  [num_rows]               float32, max(|x|, 1e-5) / 127
// Rows with NaN or infinity give that scale and integers of 0.
void ternary_quantize(const float* x, int64_t num_rows, int64_t num_features, int8_t* x_q, float* scale,
                      int32_t num_threads);
// The same of x / rms(x) * norm_weight. This and the functions below return 0, or 1 if there is no memory for scratch.
int32_t ternary_rms_norm_quantize(const float* x, const float* norm_weight, double eps, int64_t num_rows,
                                  int64_t num_features, int8_t* x_q, float* scale, int32_t num_threads);

// Rows sorted by matrix (expert): matrix m owns rows offsets[m] to offsets[m + 1] of x_q, possibly none.
//   x_q      [num_rows, in_features] int8
//   x_scale  [num_rows] float32
//   output   [num_rows, out_features] float32
int32_t ternary_grouped_linear(const int8_t* x_q, const float* x_scale, const ternary_matrices* weight,
                               const int64_t* offsets, float* output, int32_t num_threads);

// The experts of one layer: down(quantize(norm(activation(gate(x)) * up(x)))).
struct ternary_experts {
  ternary_matrices gate, up, down;
  const float* norm_weight;  // [num_experts, intermediate_size]
  double norm_eps;
  int32_t activation;  // 0: SwiGLU, 1: squared ReLU
};
int32_t ternary_expert_ffn(const int8_t* x_q, const float* x_scale, const ternary_experts* experts,
                           const int64_t* offsets, float* output, int32_t num_threads);

// What the machine gives, measured with the same instructions and threads as the kernels: seconds for reading a buffer
// once, and seconds for num_multiply_adds (set by the call) integer multiply-adds in registers.
double ternary_probe_read(const uint8_t* data, int64_t num_bytes, int32_t num_threads);
double ternary_probe_peak(int64_t iterations, int64_t* num_multiply_adds, int32_t num_threads);

}  // extern "C"
