// The attention half of a block, with its cache in half precision.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "decoder.h"
#include "matrix.h"

namespace ternary {
namespace {

constexpr int64_t kQueriesPerTask = 8;  // tokens that one attention task of a chunk takes

// The blocks of query, key and value, numbered one after the other.
struct Projections {
  explicit Projections(const ternary_layer& layer)
      : matrices{Matrices(layer.query), Matrices(layer.key), Matrices(layer.value)} {
    for (int i = 0; i < 3; ++i) ends[i] = (i ? ends[i - 1] : 0) + matrices[i].num_blocks();
  }

  int64_t count() const { return ends[2]; }
  int matrix_of(int64_t item) const { return item < ends[0] ? 0 : item < ends[1] ? 1 : 2; }
  int64_t block_of(int64_t item) const {
    const int i = matrix_of(item);
    return i ? item - ends[i - 1] : item;
  }
  const uint8_t* data(int64_t item) const { return matrices[matrix_of(item)].block(0, block_of(item)); }

  Matrices matrices[3];
  int64_t ends[3];
};

}  // namespace

// A single token's keys are split over tasks; a chunk's tokens are.
int64_t Decoder::num_splits(const Walk& walk) const {
  return walk.num_tokens == 1 ? divide_up(walk.position + 1, kTokensPerSplit) : 1;
}

void Decoder::quantize_into(const Walk& walk, const float* row_values, int64_t count, int64_t row,
                            SortedColumns& columns) {
  int8_t* x_q = temporary_q(walk);
  int32_t sum;
  const float scale = walk.k.quantize_row(row_values, count, x_q, &sum);
  columns.set_row(all_rows_, row, x_q, count, sum, scale);
}

void Decoder::attention(const Walk& walk, int64_t layer_index) {
  const ternary_layer& layer = layers_[static_cast<size_t>(layer_index)];
  const Kernels& k = walk.k;
  const int64_t hidden_size = model_.hidden_size;
  const float* inner_norms[3] = {layer.query_norm, layer.key_norm, layer.value_norm};
  const int num_inputs = layer.norm ? 1 : 3;
  for_each_row(walk, walk.num_tokens, [&](int64_t row) {
    for (int i = 0; i < num_inputs; ++i) {
      k.rms_norm_row(hidden(row), layer.norm ? layer.norm : inner_norms[i], model_.norm_eps, hidden_size,
                     temporary(walk));
      quantize_into(walk, temporary(walk), hidden_size, row, attention_input_[i]);
    }
  });
  project(walk, layer, num_inputs);
  rotate_and_append(walk, layer_index);
  attend(walk, layer_index);
  for_each_row(walk, walk.num_tokens, [&](int64_t row) {
    float* merged = temporary(walk);
    merge(walk, row, merged);
    k.rms_norm_row(merged, layer.output_norm, model_.norm_eps, query_size_, merged);
    quantize_into(walk, merged, query_size_, row, output_input_);
  });
  multiply_groups(k, walk.worker, Matrices(layer.output), all_rows_, output_input_, expanded(walk),
                  [&](int64_t row, int64_t feature, const RowSums& sums, int64_t features) {
                    sums.add_to(hidden(row) + feature, features);
                  });
  clock(walk, kProducts);
}

void Decoder::project(const Walk& walk, const ternary_layer& layer, int num_inputs) {
  const Projections items(layer);
  const int64_t first_features[3] = {0, query_size_, query_size_ + kv_size_};
  const int64_t count = items.count();
  const int64_t piece = piece_of_blocks(count, walk.worker.num_threads(), walk.num_tokens == 1);
  walk.worker.for_each_piece(count, piece, [&](int64_t begin, int64_t end, int64_t next) {
    for (int64_t item = begin; item < end; ++item) {
      const int i = items.matrix_of(item);
      const Matrices& matrices = items.matrices[i];
      const int64_t block = items.block_of(item), following = item + 1 < end ? item + 1 : next;
      const SortedColumns& input = attention_input_[num_inputs == 1 ? 0 : i];
      const int64_t feature = first_features[i] + block * kRowsPerBlock;
      const int64_t features = matrices.block_rows(block);
      multiply_block(walk.k, matrices, items.data(item), items.data(following < count ? following : item),
                     matrices.scale(0), input.of(0, walk.num_tokens), input.scales(0), expanded(walk),
                     [&](int64_t row, const RowSums& sums) { sums.write(projected(row) + feature, features); });
    }
  });
  clock(walk, kProducts);
}

// Rotary embedding in the half-split order; queries are scaled by 1 / sqrt(head_dim) on the way.
void Decoder::rotate_and_append(const Walk& walk, int64_t layer_index) {
  const int64_t heads = model_.num_heads + model_.num_kv_heads;
  for_each_row(walk, walk.num_tokens * heads,
               [&](int64_t item) { rotate_head(walk, layer_index, item / heads, item % heads); });
}

// One query head, or one key head with its value.
void Decoder::rotate_head(const Walk& walk, int64_t layer_index, int64_t row, int64_t head) {
  const int64_t dim = model_.head_dim, half = dim / 2, heads = model_.num_heads;
  const bool is_query = head < heads;
  const int64_t token = walk.position + row, kv_head = head - heads;
  const float* cos = cache_.cos + token * half;
  const float* sin = cache_.sin + token * half;
  const float scale = is_query ? 1.0F / std::sqrt(static_cast<float>(dim)) : 1.0F;
  const float* source = projected(row) + head * dim;
  float* target = is_query ? query_.get() + (row * heads + head) * padded_dim_ : temporary(walk);
  for (int64_t i = 0; i < half; ++i) {
    target[i] = (source[i] * cos[i] - source[half + i] * sin[i]) * scale;
    target[half + i] = (source[half + i] * cos[i] + source[i] * sin[i]) * scale;
  }
  if (is_query) {
    for (int64_t i = dim; i < padded_dim_; ++i) target[i] = 0;
    return;
  }
  uint16_t* keys = key_of(layer_index, kv_head) + token / kTokensPerTile * padded_dim_ * kTokensPerTile;
  walk.k.to_half(target, dim, keys + token % kTokensPerTile, kTokensPerTile);
  const float* value = projected(row) + query_size_ + kv_size_ + kv_head * dim;
  walk.k.to_half(value, dim, value_of(layer_index, kv_head) + token * padded_dim_, 1);
}

// Partial results lie as [split or token][head].
void Decoder::attend(const Walk& walk, int64_t layer_index) {
  const int64_t kv_heads = model_.num_kv_heads;
  const bool is_single = walk.num_tokens == 1;
  const int64_t parts = is_single ? num_splits(walk) : divide_up(walk.num_tokens, kQueriesPerTask);
  walk.worker.for_each_piece(kv_heads * parts, 1, [&](int64_t begin_item, int64_t end_item, int64_t) {
    for (int64_t item = begin_item; item < end_item; ++item) attend_item(walk, layer_index, item);
  });
  clock(walk, kAttention);
}

// The queries of some tokens (or of one token, over some keys) that share a key/value head.
void Decoder::attend_item(const Walk& walk, int64_t layer_index, int64_t item) {
  const int64_t heads = model_.num_heads, kv_heads = model_.num_kv_heads, group = heads / kv_heads;
  const bool is_single = walk.num_tokens == 1;
  const int64_t kv_head = item % kv_heads, part = item / kv_heads;
  const int64_t first_token = is_single ? 0 : part * kQueriesPerTask;
  const int64_t tokens = is_single ? 1 : std::min(kQueriesPerTask, walk.num_tokens - first_token);
  const int64_t num_keys = walk.position + first_token + tokens;
  std::vector<AttentionRow> rows;
  rows.reserve(static_cast<size_t>(tokens * group));
  for (int64_t token = first_token; token < first_token + tokens; ++token)
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      const int64_t at = (is_single ? part : token) * heads + head;
      rows.push_back({query_.get() + (token * heads + head) * padded_dim_, walk.position + token + 1,
                      partial_.get() + at * padded_dim_, partial_maximum_.get() + at, partial_sum_.get() + at});
    }
  const int64_t begin = is_single ? part * kTokensPerSplit : 0;
  const int64_t end = is_single ? std::min(num_keys, begin + kTokensPerSplit) : num_keys;
  walk.k.attend({rows.data(), static_cast<int64_t>(rows.size()), key_of(layer_index, kv_head),
                 value_of(layer_index, kv_head), padded_dim_, begin, end});
}

// The attention output of one token, all heads, from its partial results.
void Decoder::merge(const Walk& walk, int64_t row, float* output) {
  const int64_t splits = num_splits(walk), dim = model_.head_dim, heads = model_.num_heads;
  for (int64_t head = 0; head < heads; ++head) {
    float maximum = -std::numeric_limits<float>::infinity(), total = 0;
    for (int64_t split = 0; split < splits; ++split)
      maximum = std::max(maximum, partial_maximum_[(row + split) * heads + head]);
    float* target = output + head * dim;
    for (int64_t i = 0; i < dim; ++i) target[i] = 0;
    for (int64_t split = 0; split < splits; ++split) {
      const int64_t at = (row + split) * heads + head;
      const float weight = std::exp(partial_maximum_[at] - maximum);
      total += partial_sum_[at] * weight;
      const float* part = partial_.get() + at * padded_dim_;
      for (int64_t i = 0; i < dim; ++i) target[i] += part[i] * weight;
    }
    for (int64_t i = 0; i < dim; ++i) target[i] /= total;
  }
}

}  // namespace ternary
