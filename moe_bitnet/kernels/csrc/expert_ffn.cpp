#include "expert_ffn.h"

#include <algorithm>
#include <cstring>

#include "ternary.h"

namespace ternary {

void SortedColumns::fill(const Kernels& k, Team& team, const Groups& groups, int64_t num_rows, const SourceRows& rows) {
  team.for_each_piece(num_rows, piece_of(num_rows, team.num_threads()), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t from = rows.source ? rows.source[row] : row;
      const int8_t* x_q = rows.x_q + from * rows.num_features;
      set_row(groups, row, x_q, rows.num_features, k.sum_int8(x_q, rows.num_features), rows.scales[from]);
    }
  });
}

ExpertScratch::ExpertScratch(const ternary_experts& experts, int64_t max_rows, int num_threads)
    : expanded_bytes(std::max(Matrices(experts.gate).expanded_bytes(), Matrices(experts.down).expanded_bytes())),
      inner_stride(num_row_blocks(experts.gate.out_features) * kRowsPerBlock),
      input(max_rows, Matrices(experts.gate).num_quads()),
      inner_columns(max_rows, Matrices(experts.down).num_quads()),
      inner(max_rows * inner_stride),
      expanded(num_threads * expanded_bytes),
      row_q(num_threads * experts.gate.out_features) {}

void run_experts(const Kernels& k, Team& team, int thread_index, const ternary_experts& experts, const Groups& groups,
                 const SourceRows& rows, int64_t num_rows, ExpertScratch& scratch, float* output) {
  const Matrices gate(experts.gate), up(experts.up), down(experts.down);
  const int64_t inner_size = gate.out_features(), hidden_size = down.out_features();
  const int64_t blocks = gate.num_blocks(), items = blocks * static_cast<int64_t>(groups.active.size());
  uint8_t* expanded = scratch.expanded.get() + thread_index * scratch.expanded_bytes;

  scratch.input.fill(k, team, groups, num_rows, rows);

  // A thread computes the same 64 features of gate and up, so that the activation finds both in its cache.
  team.for_each_piece(items, piece_of(items, team.num_threads()), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t expert = groups.active[static_cast<size_t>(item / blocks)], block = item % blocks;
      const int64_t first = groups.offsets[expert];
      const Columns columns = scratch.input.of(first, groups.offsets[expert + 1] - first);
      const float* scales = scratch.input.scales(first);
      float* inner = scratch.inner.get() + first * scratch.inner_stride + block * kRowsPerBlock;
      multiply_block_rescaled(k, gate, expert, block, columns, scales, expanded, [&](int64_t row, const float* values) {
        std::memcpy(inner + row * scratch.inner_stride, values, kRowsPerBlock * sizeof(float));
      });
      multiply_block_rescaled(k, up, expert, block, columns, scales, expanded, [&](int64_t row, const float* values) {
        float* gated = inner + row * scratch.inner_stride;
        k.gate(gated, values, kRowsPerBlock, experts.activation, gated);
      });
    }
  });

  team.for_each_piece(num_rows, piece_of(num_rows, team.num_threads()), [&](int64_t begin, int64_t end) {
    int8_t* x_q = scratch.row_q.get() + thread_index * inner_size;
    size_t index = 0;
    for (int64_t row = begin; row < end; ++row) {
      while (groups.offsets[groups.active[index] + 1] <= row) ++index;
      float* inner = scratch.inner.get() + row * scratch.inner_stride;
      const float* weight = experts.norm_weight + groups.active[index] * inner_size;
      k.rms_norm_row(inner, weight, experts.norm_eps, inner_size, inner);
      int32_t sum;
      const float scale = k.quantize_row(inner, inner_size, x_q, &sum);
      scratch.inner_columns.set_row(groups, row, x_q, inner_size, sum, scale);
    }
  });

  multiply_groups(k, team, down, groups, scratch.inner_columns, expanded,
                  [&](int64_t row, int64_t feature, const float* values, int64_t count) {
                    std::memcpy(output + row * hidden_size + feature, values,
                                static_cast<size_t>(count) * sizeof(float));
                  });
}

}  // namespace ternary

extern "C" void ternary_expert_ffn(const int8_t* x_q, const float* x_scale, const ternary_experts* experts,
                                   const int64_t* offsets, float* output, int32_t num_threads) {
  using namespace ternary;
  const Kernels& k = kernels();
  Groups groups;
  groups.set(offsets, experts->gate.num_matrices);
  const int64_t num_rows = offsets[experts->gate.num_matrices];
  if (num_rows == 0) return;
  num_threads = useful_threads(num_threads, 3 * num_rows * experts->gate.out_features * experts->gate.in_features);
  ExpertScratch scratch(*experts, num_rows, num_threads);
  const SourceRows rows{x_q, x_scale, experts->gate.in_features, nullptr};
  run_team(num_threads, [&](Team& team, int thread_index) {
    run_experts(k, team, thread_index, *experts, groups, rows, num_rows, scratch, output);
  });
}
