#include "expert_ffn.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "ternary.h"

namespace ternary {

void SortedColumns::fill(const Kernels& k, Worker& worker, const Groups& groups, int64_t num_rows,
                         const SourceRows& rows) {
  worker.for_each_piece(num_rows, piece_of(num_rows, worker.num_threads()), [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t from = rows.source ? rows.source[row] : row;
      const int8_t* x_q = rows.x_q + from * rows.num_features;
      set_row(groups, row, x_q, rows.num_features, k.sum_int8(x_q, rows.num_features), rows.scales[from]);
    }
  });
}

ExpertScratch::ExpertScratch(const ternary_experts& experts, int64_t max_rows, int num_threads)
    : expanded_bytes(std::max(2 * Matrices(experts.gate).expanded_bytes(), Matrices(experts.down).expanded_bytes())),
      inner_stride(num_row_blocks(experts.gate.out_features) * kRowsPerBlock),
      input(max_rows, Matrices(experts.gate).num_quads()),
      inner_columns(max_rows, Matrices(experts.down).num_quads()),
      inner(max_rows * inner_stride),
      expanded(num_threads * expanded_bytes),
      row_q(num_threads * experts.gate.out_features) {}

// 64 inner features of one expert: gate and up of a tile of rows, then their activation while both are in registers
// and L1.
static void multiply_gate_up(const Kernels& k, const ternary_experts& experts, const Groups& groups, int64_t item,
                             const uint8_t* following, ExpertScratch& scratch, uint8_t* expanded) {
  const Matrices gate(experts.gate), up(experts.up);
  const GroupBlocks items(gate, groups);
  const int64_t expert = items.expert(item), first = groups.offsets[expert];
  const Columns columns = scratch.input.of(first, groups.offsets[expert + 1] - first);
  const float* scales = scratch.input.scales(first);
  float* inner = scratch.inner.get() + first * scratch.inner_stride + items.block(item) * kRowsPerBlock;
  const uint8_t* const blocks[2] = {items.data(gate, item), items.data(up, item)};
  multiply_blocks(k, gate, blocks, following, columns, expanded, [&](int64_t tile, const int32_t* sums) {
    for (int c = 0; c < columns.num_columns(tile); ++c) {
      alignas(64) float values[2][kRowsPerBlock];
      const int64_t row = columns.first_row(tile) + c;
      const int32_t* column_sums = sums + c * kRowsPerBlock;
      k.rescale(column_sums, columns.row_sum(row), scales[row] * gate.scale(expert), values[0]);
      k.rescale(column_sums + kTileSums, columns.row_sum(row), scales[row] * up.scale(expert), values[1]);
      k.gate(values[0], values[1], kRowsPerBlock, experts.activation, inner + row * scratch.inner_stride);
    }
  });
}

// The same for one row an expert, which streams weights from memory: a run of gate, then the same run of up, so that
// a stream is interrupted once a run and not once a block.
static void stream_gate_up(const Kernels& k, const ternary_experts& experts, const Groups& groups, int64_t begin,
                           int64_t end, const uint8_t* then, ExpertScratch& scratch, uint8_t* expanded) {
  const Matrices gate(experts.gate), up(experts.up);
  const GroupBlocks items(gate, groups);
  for (const Matrices* matrices : {&gate, &up})
    for (int64_t item = begin; item < end; ++item) {
      const int64_t expert = items.expert(item), first = groups.offsets[expert];
      float* inner = scratch.inner.get() + first * scratch.inner_stride + items.block(item) * kRowsPerBlock;
      const uint8_t* after_run = matrices == &gate ? items.data(up, begin) : then;
      const uint8_t* following = item + 1 < end ? items.data(*matrices, item + 1) : after_run;
      multiply_block(k, *matrices, items.data(*matrices, item), following, matrices->scale(expert),
                     scratch.input.of(first, 1), scratch.input.scales(first), expanded,
                     [&](int64_t, const RowSums& sums) {
                       if (matrices == &gate) return sums.write(inner, kRowsPerBlock);
                       alignas(64) float values[kRowsPerBlock];
                       sums.write(values, kRowsPerBlock);
                       k.gate(inner, values, kRowsPerBlock, experts.activation, inner);
                     });
    }
}

void run_experts(const Kernels& k, Worker& worker, const ternary_experts& experts, const Groups& groups,
                 const SourceRows& rows, int64_t num_rows, ExpertScratch& scratch, float* output) {
  const Matrices gate(experts.gate), down(experts.down);
  const int64_t inner_size = gate.out_features(), hidden_size = down.out_features(), stride = scratch.inner_stride;
  uint8_t* expanded = scratch.expanded.get() + worker.index() * scratch.expanded_bytes;
  float* inner = scratch.inner.get();

  scratch.input.fill(k, worker, groups, num_rows, rows);

  const GroupBlocks items(gate, groups);
  const int64_t count = items.count();
  const int64_t piece = piece_of_blocks(count, worker.num_threads(), groups.is_stream());
  worker.for_each_piece(count, piece, [&](int64_t begin, int64_t end, int64_t next) {
    if (groups.is_single_row()) {
      const uint8_t* then = items.data(gate, next < count ? next : begin);
      return stream_gate_up(k, experts, groups, begin, end, then, scratch, expanded);
    }
    for (int64_t item = begin; item < end; ++item) {
      const int64_t following = item + 1 < end ? item + 1 : next < count ? next : item;
      multiply_gate_up(k, experts, groups, item, items.data(gate, following), scratch, expanded);
    }
  });

  worker.for_each_piece(num_rows, piece_of(num_rows, worker.num_threads()), [&](int64_t begin, int64_t end, int64_t) {
    int8_t* x_q = scratch.row_q.get() + worker.index() * inner_size;
    size_t index = 0;
    for (int64_t row = begin; row < end; ++row) {
      while (groups.offsets[groups.active[index] + 1] <= row) ++index;
      float* inner_row = inner + row * stride;
      const float* weight = experts.norm_weight + groups.active[index] * inner_size;
      k.rms_norm_row(inner_row, weight, experts.norm_eps, inner_size, inner_row);
      int32_t sum;
      const float scale = k.quantize_row(inner_row, inner_size, x_q, &sum);
      scratch.inner_columns.set_row(groups, row, x_q, inner_size, sum, scale);
    }
  });

  multiply_groups(k, worker, down, groups, scratch.inner_columns, expanded,
                  [&](int64_t row, int64_t feature, const RowSums& sums, int64_t features) {
                    sums.write(output + row * hidden_size + feature, features);
                  });
}

}  // namespace ternary

extern "C" int32_t ternary_expert_ffn(const int8_t* x_q, const float* x_scale, const ternary_experts* experts,
                                      const int64_t* offsets, float* output, int32_t num_threads) {
  using namespace ternary;
  try {
    const Kernels& k = kernels();
    Groups groups;
    groups.set(offsets, experts->gate.num_matrices);
    const int64_t num_rows = offsets[experts->gate.num_matrices];
    if (num_rows == 0) return 0;
    num_threads = useful_threads(num_threads, 3 * num_rows * experts->gate.out_features * experts->gate.in_features);
    ExpertScratch scratch(*experts, num_rows, num_threads);
    const SourceRows rows{x_q, x_scale, experts->gate.in_features, nullptr};
    run_team(num_threads,
             [&](Worker& worker) { run_experts(k, worker, *experts, groups, rows, num_rows, scratch, output); });
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
