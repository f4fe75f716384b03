// Products of rows with one matrix or with a matrix an expert, and quantization of rows.

#include <cstring>
#include <new>

#include "buffer.h"
#include "expert_ffn.h"
#include "matrix.h"
#include "ternary.h"
#include "thread_pool.h"

extern "C" int32_t interface_version() { return 4; }

extern "C" int32_t ternary_grouped_linear(const int8_t* x_q, const float* x_scale, const ternary_matrices* weight,
                                          const int64_t* offsets, float* output, int32_t num_threads) {
  using namespace ternary;
  try {
    const Kernels& k = kernels();
    const Matrices matrices(*weight);
    Groups groups;
    groups.set(offsets, weight->num_matrices);
    const int64_t num_rows = offsets[weight->num_matrices], out_features = matrices.out_features();
    if (num_rows == 0) return 0;
    num_threads = useful_threads(num_threads, num_rows * out_features * matrices.in_features());
    SortedColumns columns(num_rows, matrices.num_quads());
    Buffer<uint8_t> expanded(num_threads * matrices.expanded_bytes());
    const SourceRows rows{x_q, x_scale, matrices.in_features(), nullptr};
    run_team(num_threads, [&](Worker& worker) {
      columns.fill(k, worker, groups, num_rows, rows);
      multiply_groups(k, worker, matrices, groups, columns, expanded.get() + worker.index() * matrices.expanded_bytes(),
                      [&](int64_t row, int64_t feature, const RowSums& sums, int64_t features) {
                        sums.write(output + row * out_features + feature, features);
                      });
    });
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

extern "C" void ternary_quantize(const float* x, int64_t num_rows, int64_t num_features, int8_t* x_q, float* scale,
                                 int32_t num_threads) {
  using namespace ternary;
  const Kernels& k = kernels();
  num_threads = useful_threads(num_threads, num_rows * num_features * kFloatStepWork);
  run_team(num_threads, [&](Worker& worker) {
    worker.for_each_piece(num_rows, piece_of(num_rows, num_threads), [&](int64_t begin, int64_t end, int64_t) {
      for (int64_t row = begin; row < end; ++row)
        scale[row] = k.quantize_row(x + row * num_features, num_features, x_q + row * num_features, nullptr);
    });
  });
}

extern "C" int32_t ternary_rms_norm_quantize(const float* x, const float* norm_weight, double eps, int64_t num_rows,
                                             int64_t num_features, int8_t* x_q, float* scale, int32_t num_threads) {
  using namespace ternary;
  try {
    const Kernels& k = kernels();
    num_threads = useful_threads(num_threads, num_rows * num_features * kFloatStepWork);
    Buffer<float> normed(num_threads * num_features);
    run_team(num_threads, [&](Worker& worker) {
      float* row_normed = normed.get() + worker.index() * num_features;
      worker.for_each_piece(num_rows, piece_of(num_rows, num_threads), [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t row = begin; row < end; ++row) {
          k.rms_norm_row(x + row * num_features, norm_weight, eps, num_features, row_normed);
          scale[row] = k.quantize_row(row_normed, num_features, x_q + row * num_features, nullptr);
        }
      });
    });
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
