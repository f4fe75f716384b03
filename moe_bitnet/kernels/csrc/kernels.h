// What one instruction set implements: a table of functions, chosen once for the process (isa.cpp).
//
// The units that fill the tables are compiled with their own -m flags. They share nothing with other units but these
// declarations: a function of a shared template could be merged by the linker into a copy that the machine cannot run.
#pragma once

#include <cstdint>

#include "layout.h"

namespace ternary {

enum Isa : int32_t { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };

// What a dot kernel fetches ahead while it walks the lines of a block: line i fetches near + i * step, and from
// switch_line on far + i * step. Addresses, not pointers: they are never read through.
struct Prefetch {
  uintptr_t near, far;
  int64_t step, switch_line;

  uintptr_t address(int64_t line) const {
    return (line < switch_line ? near : far) + static_cast<uintptr_t>(line * step);
  }
};

struct Kernels {
  Isa isa;

  // Integer sums of one row block with 1 to kMaxColumns columns:
  //   sums[c * 64 + r] = sum over inputs of (weight + 1) * x, that is: the product plus the column's sum.
  //   lines    one row block (2-bit: num_quads lines; base-3: num_quads / 5 * 4 lines)
  //   columns  [num_quads][num_columns][4] int8
  void (*dot_two_bit)(const uint8_t* lines, int64_t num_quads, const int8_t* columns, int num_columns, int32_t* sums,
                      Prefetch prefetch);
  void (*dot_base3)(const uint8_t* lines, int64_t num_quads, const int8_t* columns, int num_columns, int32_t* sums,
                    Prefetch prefetch);
  // Turns one base-3 row block into the 2-bit block of the same weights.
  void (*expand_base3)(const uint8_t* lines, int64_t num_quads, uint8_t* two_bit_lines);

  // output[r] = float(sums[r] - column_sum) * scale, for 64 rows.
  void (*rescale)(const int32_t* sums, int32_t column_sum, float scale, float* output);
  // output[r] = activation(gate[r]) * up[r]; kind 0: SwiGLU, 1: squared ReLU.
  void (*gate)(const float* gate, const float* up, int64_t count, int32_t kind, float* output);

  // Per-row absmax quantization; returns the scale. x_sum receives the sum of the integers (may be null).
  float (*quantize_row)(const float* x, int64_t count, int8_t* x_q, int32_t* x_sum);
  // output = x / rms(x) * weight (weight may be null).
  void (*rms_norm_row)(const float* x, const float* weight, double eps, int64_t count, float* output);
  int32_t (*sum_int8)(const int8_t* x, int64_t count);
  // output[i] += x[i] * weight
  void (*add_scaled)(const float* x, float weight, int64_t count, float* output);
  float (*dot_float)(const float* x, const float* y, int64_t count);

  // Rows of a head: output[r] = x . weight[r]; weight row-major.
  void (*head_float32)(const float* x, const float* weight, int64_t num_rows, int64_t count, float* output);
  void (*head_bfloat16)(const float* x, const uint16_t* weight, int64_t num_rows, int64_t count, float* output);
  // output[r] = float(x_q . weight[r]) * (x_scale * scale[r]); row_sums[r] is the sum of weight[r].
  void (*head_int8)(const int8_t* x_q, float x_scale, const int8_t* weight, const float* scale, const int32_t* row_sums,
                    int64_t num_rows, int64_t count, float* output);

  // Attention of some query rows of one key/value head over a run of positions; attention.h says more.
  void (*attend)(const struct AttentionTask& task);
  void (*to_half)(const float* x, int64_t count, uint16_t* half, int64_t stride);

  // Independent integer dot products on registers; returns how many multiply-adds were done.
  int64_t (*integer_peak)(int64_t iterations);
  // Reads a buffer once; the result keeps the compiler from dropping it.
  uint64_t (*read_bytes)(const uint8_t* data, int64_t num_bytes);
};

// The table of the process's instruction set.
const Kernels& kernels();

// The same choice among other tables; one that the machine cannot use may be null.
template <class Table>
const Table& of_instruction_set(const Table* avx512, const Table* avx2, const Table& scalar) {
  return kernels().isa == kAvx512 ? *avx512 : kernels().isa == kAvx2 ? *avx2 : scalar;
}

const Kernels& scalar_kernels();
const Kernels* avx2_kernels();  // null where the compiler's target is not x86
const Kernels* avx512_kernels();

}  // namespace ternary
