// The experts of one layer on rows sorted by expert, computed by a team.
#pragma once

#include <vector>

#include "buffer.h"
#include "columns.h"
#include "matrix.h"
#include "thread_pool.h"

namespace ternary {

// Which rows each matrix (expert) gets. Expert e owns the sorted rows offsets[e] to offsets[e + 1].
struct Groups {
  const int64_t* offsets;
  std::vector<int64_t> active;  // experts that own a row
  bool is_decoder = false;

  // Whether this is a single token of the fused decoder, which has the machine to itself.
  bool is_stream() const { return is_decoder && is_single_row(); }
  // Whether no matrix has more than one row.
  bool is_single_row() const { return offsets[active.back() + 1] == static_cast<int64_t>(active.size()); }

  void set(const int64_t* new_offsets, int64_t count) {
    offsets = new_offsets;
    active.clear();
    for (int64_t e = 0; e < count; ++e)
      if (offsets[e] < offsets[e + 1]) active.push_back(e);
  }
};

// Int8 rows before they are sorted: sorted row i is row source[i], or row i where source is null.
struct SourceRows {
  const int8_t* x_q;
  const float* scales;
  int64_t num_features;
  const int64_t* source;
};

// Sorted rows as the dot kernels read them: every expert's rows are columns of their own.
class SortedColumns {
 public:
  SortedColumns() = default;
  SortedColumns(int64_t max_rows, int64_t num_quads)
      : num_quads_(num_quads), data_(Columns::num_bytes(max_rows, num_quads)), sums_(max_rows), scales_(max_rows) {}

  Columns of(int64_t first, int64_t num_rows) const {
    return Columns(data_.get() + Columns::num_bytes(first, num_quads_), sums_.get() + first, num_rows, num_quads_);
  }
  const float* scales(int64_t first) const { return scales_.get() + first; }

  void set_row(const Groups& groups, int64_t row, const int8_t* x_q, int64_t count, int32_t sum, float scale) {
    scales_[row] = scale;
    int64_t i = 0;
    while (groups.offsets[groups.active[static_cast<size_t>(i)] + 1] <= row) ++i;
    const int64_t expert = groups.active[static_cast<size_t>(i)], first = groups.offsets[expert];
    of(first, groups.offsets[expert + 1] - first).set_row(row - first, x_q, count, sum);
  }

  // The team fills all rows.
  void fill(const Kernels& k, Worker& worker, const Groups& groups, int64_t num_rows, const SourceRows& rows);

 private:
  int64_t num_quads_ = 0;
  Buffer<int8_t> data_;
  Buffer<int32_t> sums_;
  Buffer<float> scales_;
};

// The row blocks of all active experts, numbered one after the other.
class GroupBlocks {
 public:
  GroupBlocks(const Matrices& matrices, const Groups& groups) : matrices_(matrices), groups_(groups) {}

  int64_t count() const { return matrices_.num_blocks() * static_cast<int64_t>(groups_.active.size()); }
  int64_t expert(int64_t item) const { return groups_.active[static_cast<size_t>(item / matrices_.num_blocks())]; }
  int64_t block(int64_t item) const { return item % matrices_.num_blocks(); }
  const uint8_t* data(const Matrices& matrices, int64_t item) const {
    return matrices.block(expert(item), block(item));
  }

 private:
  const Matrices& matrices_;
  const Groups& groups_;
};

// Calls take(sorted row, first output feature, RowSums, number of features) for all products of the active experts.
template <class Take>
void multiply_groups(const Kernels& k, Worker& worker, const Matrices& matrices, const Groups& groups,
                     const SortedColumns& columns, uint8_t* expanded, Take&& take) {
  const GroupBlocks items(matrices, groups);
  const int64_t count = items.count();
  const int64_t piece = piece_of_blocks(count, worker.num_threads(), groups.is_stream());
  worker.for_each_piece(count, piece, [&](int64_t begin, int64_t end, int64_t next) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t expert = items.expert(item), block = items.block(item), first = groups.offsets[expert];
      const int64_t following = item + 1 < end ? item + 1 : next < count ? next : item;
      multiply_block(k, matrices, items.data(matrices, item), items.data(matrices, following), matrices.scale(expert),
                     columns.of(first, groups.offsets[expert + 1] - first), columns.scales(first), expanded,
                     [&](int64_t row, const RowSums& sums) {
                       take(first + row, block * kRowsPerBlock, sums, matrices.block_rows(block));
                     });
    }
  });
}

// Memory that run_experts needs for up to max_rows sorted rows.
struct ExpertScratch {
  ExpertScratch(const ternary_experts& experts, int64_t max_rows, int num_threads);

  int64_t expanded_bytes;  // of one thread
  int64_t inner_stride;    // floats from one inner row to the next
  SortedColumns input, inner_columns;
  Buffer<float> inner;       // [max_rows][inner_stride]
  Buffer<uint8_t> expanded;  // [num_threads][expanded_bytes]
  Buffer<int8_t> row_q;      // [num_threads][intermediate_size]
};

// Every thread of the team calls this. output [num_rows][hidden_size] is in sorted order, unweighted.
void run_experts(const Kernels& k, Worker& worker, const ternary_experts& experts, const Groups& groups,
                 const SourceRows& rows, int64_t num_rows, ExpertScratch& scratch, float* output);

}  // namespace ternary
