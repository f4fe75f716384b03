// A whole step of a packed model: embed, walk the layers, score. Python is entered once a step.
//
// One team of threads walks all layers together. A layer is a row of phases that alternate between rows (norms,
// quantization, routing: a thread takes whole tokens) and blocks (products: a thread takes 64 output features):
//
//   norm, quantize | query, key, value | rotate, append | attend | merge, norm, quantize | output projection, add |
//   norm, route, quantize | experts (expert_ffn.h) | weigh, add
//
// All threads meet between phases. Every float step is the reference's; integer sums are exact.

#include "decoder.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "attention.h"
#include "buffer.h"
#include "expert_ffn.h"
#include "kernels.h"
#include "matrix.h"
#include "thread_pool.h"

namespace ternary {
namespace {

constexpr int64_t kTokensPerSplit = 512;  // keys that one attention task of a single token takes
constexpr int64_t kQueriesPerTask = 8;    // tokens that one attention task of a chunk takes
constexpr int64_t kPhasesPerLayer = 10;   // times that all threads meet in a layer

enum Phase { kProducts, kAttention, kHead, kOther, kNumPhases };

// Which token visits which expert, sorted by expert and stable in the token.
struct Route {
  Route(int64_t max_rows, int64_t num_experts, int64_t top_k)
      : num_experts(num_experts),
        top_k(top_k),
        expert_ids(max_rows * top_k),
        weights(max_rows * top_k),
        offsets(num_experts + 1),
        token_of_row(max_rows * top_k),
        row_of_slot(max_rows * top_k) {}

  void sort(int64_t num_tokens) {
    const int64_t num_slots = num_tokens * top_k;
    for (int64_t e = 0; e <= num_experts; ++e) offsets[e] = 0;
    for (int64_t slot = 0; slot < num_slots; ++slot) ++offsets[expert_ids[slot] + 1];
    for (int64_t e = 0; e < num_experts; ++e) offsets[e + 1] += offsets[e];
    std::vector<int64_t> next(offsets.get(), offsets.get() + num_experts);
    for (int64_t slot = 0; slot < num_slots; ++slot) {
      const int64_t row = next[static_cast<size_t>(expert_ids[slot])]++;
      token_of_row[row] = slot / top_k;
      row_of_slot[slot] = row;
    }
    groups.set(offsets.get(), num_experts);
  }

  int64_t num_experts, top_k;
  Buffer<int64_t> expert_ids;  // [tokens, top_k]
  Buffer<float> weights;       // [tokens, top_k]
  Buffer<int64_t> offsets;     // [num_experts + 1]
  Buffer<int64_t> token_of_row, row_of_slot;
  Groups groups;
};

}  // namespace

class Decoder {
 public:
  Decoder(const ternary_model& model, const ternary_cache& cache, int64_t max_rows, int num_threads)
      : model_(model),
        layers_(model.layers, model.layers + model.num_layers),
        cache_(cache),
        max_rows_(max_rows),
        num_threads_(num_threads),
        query_size_(model.num_heads * model.head_dim),
        kv_size_(model.num_kv_heads * model.head_dim),
        padded_dim_(round_up(model.head_dim, 16)),
        max_splits_(std::max<int64_t>(max_rows, divide_up(cache.max_tokens, kTokensPerSplit))),
        temporary_stride_(round_up(std::max({model.hidden_size, query_size_, padded_dim_}), 16)),
        hidden_(max_rows * model.hidden_size),
        temporary_(2 * num_threads * temporary_stride_),
        temporary_q_(num_threads * temporary_stride_),
        projected_(max_rows * (query_size_ + 2 * kv_size_)),
        query_(max_rows * model.num_heads * padded_dim_),
        partial_(max_splits_ * model.num_heads * padded_dim_),
        partial_maximum_(max_splits_ * model.num_heads),
        partial_sum_(max_splits_ * model.num_heads),
        moe_input_(max_rows * model.hidden_size),
        router_logits_(max_rows * model.num_experts),
        moe_q_(max_rows * model.hidden_size),
        moe_scale_(max_rows),
        route_(max_rows, model.num_experts, model.top_k),
        shared_(max_rows, std::max<int64_t>(1, model.num_shared_experts),
                std::max<int64_t>(1, model.num_shared_experts)),
        expert_output_(max_rows * model.top_k * model.hidden_size),
        shared_output_(max_rows * model.num_shared_experts * model.hidden_size) {
    const ternary_layer& first = layers_.front();
    const int64_t input_quads = Matrices(first.query).num_quads(), output_quads = Matrices(first.output).num_quads();
    for (SortedColumns& columns : attention_input_) columns = SortedColumns(max_rows, input_quads);
    output_input_ = SortedColumns(max_rows, output_quads);
    expanded_bytes_ = std::max(Matrices(first.query).expanded_bytes(), Matrices(first.output).expanded_bytes());
    expanded_ = Buffer<uint8_t>(num_threads * expanded_bytes_);
    experts_ = std::make_unique<ExpertScratch>(first.experts, max_rows * model.top_k, num_threads);
    if (model.num_shared_experts)
      shared_experts_ =
          std::make_unique<ExpertScratch>(first.shared_experts, max_rows * model.num_shared_experts, num_threads);
    all_rows_.active.push_back(0);
    all_rows_.offsets = all_rows_offsets_;
  }

  void append(const int64_t* token_ids, int64_t num_tokens, int64_t position, float* logits) {
    start_clock();
    all_rows_offsets_[1] = num_tokens;
    run_team(threads_for(num_tokens), [&](Worker& worker) {
      const Walk walk{kernels(), worker, num_tokens, position};
      embed(walk, token_ids);
      for (int64_t i = 0; i < model_.num_layers; ++i) {
        attention(walk, i);
        moe(walk, layers_[static_cast<size_t>(i)]);
      }
      if (logits) score(walk, logits);
    });
  }

  void moe_layer(int64_t layer_index, int64_t num_tokens, float* hidden_states) {
    start_clock();
    const size_t bytes = static_cast<size_t>(num_tokens * model_.hidden_size) * sizeof(float);
    std::memcpy(hidden_.get(), hidden_states, bytes);
    run_team(threads_for(num_tokens), [&](Worker& worker) {
      moe(Walk{kernels(), worker, num_tokens, 0}, layers_[static_cast<size_t>(layer_index)]);
    });
    std::memcpy(hidden_states, hidden_.get(), bytes);
  }

  void profile(double* seconds) {
    for (int phase = 0; phase < kNumPhases; ++phase) {
      seconds[phase] = seconds_[phase];
      seconds_[phase] = 0;
    }
  }

 private:
  // What every phase needs to know.
  struct Walk {
    const Kernels& k;
    Worker& worker;
    int64_t num_tokens;
    int64_t position;  // of the first token
  };

  float* hidden(int64_t row) const { return hidden_.get() + row * model_.hidden_size; }
  float* temporary(const Walk& walk) const { return temporary_.get() + 2 * walk.worker.index() * temporary_stride_; }
  int8_t* temporary_q(const Walk& walk) const { return temporary_q_.get() + walk.worker.index() * temporary_stride_; }
  uint8_t* expanded(const Walk& walk) const { return expanded_.get() + walk.worker.index() * expanded_bytes_; }
  float* projected(int64_t row) const { return projected_.get() + row * (query_size_ + 2 * kv_size_); }
  // A single token's keys are split over tasks; a chunk's tokens are.
  int64_t num_splits(const Walk& walk) const {
    return walk.num_tokens == 1 ? divide_up(walk.position + 1, kTokensPerSplit) : 1;
  }

  template <class Body>
  void for_each_row(const Walk& walk, int64_t count, Body&& body) {
    const int64_t piece = piece_of(count, walk.worker.num_threads());
    walk.worker.for_each_piece(count, piece, [&](int64_t begin, int64_t end, int64_t) {
      for (int64_t row = begin; row < end; ++row) body(row);
    });
    clock(walk, kOther);
  }

  // A small model's phases are shorter than a meeting of threads.
  int32_t threads_for(int64_t num_tokens) const {
    const int64_t experts = model_.top_k + model_.num_shared_experts;
    const int64_t inner = layers_.front().experts.gate.out_features;
    const int64_t weights =
        2 * model_.hidden_size * (query_size_ + kv_size_) + 3 * experts * inner * model_.hidden_size;
    return useful_threads(num_threads_, num_tokens * weights / kPhasesPerLayer);
  }

  void start_clock() { clock_ = std::chrono::steady_clock::now(); }

  // Adds the time since the last phase; the first thread speaks for all, since they have just met.
  void clock(const Walk& walk, Phase phase) {
    if (walk.worker.index() != 0) return;
    const auto now = std::chrono::steady_clock::now();
    seconds_[phase] += std::chrono::duration<double>(now - clock_).count();
    clock_ = now;
  }

  void embed(const Walk& walk, const int64_t* token_ids) {
    const ternary_table& table = model_.embedding;
    const int64_t size = model_.hidden_size;
    for_each_row(walk, walk.num_tokens, [&](int64_t row) {
      const int64_t id = token_ids[row];
      float* target = hidden(row);
      if (table.kind == kTernaryFloat32) {
        std::memcpy(target, static_cast<const float*>(table.data) + id * size, static_cast<size_t>(size) * 4);
      } else if (table.kind == kTernaryBfloat16) {
        const uint16_t* source = static_cast<const uint16_t*>(table.data) + id * size;
        for (int64_t i = 0; i < size; ++i) {
          const uint32_t bits = static_cast<uint32_t>(source[i]) << 16;
          std::memcpy(target + i, &bits, sizeof bits);
        }
      } else {
        const int8_t* source = static_cast<const int8_t*>(table.data) + id * size;
        for (int64_t i = 0; i < size; ++i) target[i] = static_cast<float>(source[i]) * table.scales[id];
      }
    });
  }

  void quantize_into(const Walk& walk, const float* row_values, int64_t count, int64_t row, SortedColumns& columns) {
    int8_t* x_q = temporary_q(walk);
    int32_t sum;
    const float scale = walk.k.quantize_row(row_values, count, x_q, &sum);
    columns.set_row(all_rows_, row, x_q, count, sum, scale);
  }

  void attention(const Walk& walk, int64_t layer_index) {
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
                    [&](int64_t row, int64_t feature, const float* values, int64_t count) {
                      float* target = hidden(row) + feature;
                      for (int64_t i = 0; i < count; ++i) target[i] += values[i];
                    });
    clock(walk, kProducts);
  }

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

  void project(const Walk& walk, const ternary_layer& layer, int num_inputs) {
    const Projections items(layer);
    const int64_t first_features[3] = {0, query_size_, query_size_ + kv_size_};
    const int64_t count = items.count();
    const int64_t piece = piece_of_blocks(count, walk.worker.num_threads(), items.matrices[0].num_block_bytes());
    walk.worker.for_each_piece(count, piece, [&](int64_t begin, int64_t end, int64_t next) {
      for (int64_t item = begin; item < end; ++item) {
        const int i = items.matrix_of(item);
        const Matrices& matrices = items.matrices[i];
        const int64_t block = items.block_of(item), following = item + 1 < end ? item + 1 : next;
        const SortedColumns& input = attention_input_[num_inputs == 1 ? 0 : i];
        const int64_t feature = first_features[i] + block * kRowsPerBlock;
        const size_t bytes = static_cast<size_t>(matrices.block_rows(block)) * sizeof(float);
        multiply_block_rescaled(
            walk.k, matrices, items.data(item), items.data(following < count ? following : item), matrices.scale(0),
            input.of(0, walk.num_tokens), input.scales(0), expanded(walk),
            [&](int64_t row, const float* values) { std::memcpy(projected(row) + feature, values, bytes); });
      }
    });
    clock(walk, kProducts);
  }

  // Rotary embedding in the half-split order; queries are scaled by 1 / sqrt(head_dim) on the way.
  void rotate_and_append(const Walk& walk, int64_t layer_index) {
    const int64_t heads = model_.num_heads + model_.num_kv_heads;
    for_each_row(walk, walk.num_tokens * heads,
                 [&](int64_t item) { rotate_head(walk, layer_index, item / heads, item % heads); });
  }

  // One query head, or one key head with its value.
  void rotate_head(const Walk& walk, int64_t layer_index, int64_t row, int64_t head) {
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

  uint16_t* key_of(int64_t layer_index, int64_t kv_head) const {
    return cache_.key + (layer_index * model_.num_kv_heads + kv_head) * cache_.max_tokens * padded_dim_;
  }
  uint16_t* value_of(int64_t layer_index, int64_t kv_head) const {
    return cache_.value + (layer_index * model_.num_kv_heads + kv_head) * cache_.max_tokens * padded_dim_;
  }

  // Partial results lie as [split or token][head].
  void attend(const Walk& walk, int64_t layer_index) {
    const int64_t kv_heads = model_.num_kv_heads;
    const bool is_single = walk.num_tokens == 1;
    const int64_t parts = is_single ? num_splits(walk) : divide_up(walk.num_tokens, kQueriesPerTask);
    walk.worker.for_each_piece(kv_heads * parts, 1, [&](int64_t begin_item, int64_t end_item, int64_t) {
      for (int64_t item = begin_item; item < end_item; ++item) attend_item(walk, layer_index, item);
    });
    clock(walk, kAttention);
  }

  // The queries of some tokens (or of one token, over some keys) that share a key/value head.
  void attend_item(const Walk& walk, int64_t layer_index, int64_t item) {
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
  void merge(const Walk& walk, int64_t row, float* output) {
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

  void moe(const Walk& walk, const ternary_layer& layer) {
    const int64_t hidden_size = model_.hidden_size;
    for_each_row(walk, walk.num_tokens, [&](int64_t row) {
      float* normed = moe_input_.get() + row * hidden_size;
      walk.k.rms_norm_row(hidden(row), layer.moe_norm, model_.norm_eps, hidden_size, normed);
      moe_scale_[row] = walk.k.quantize_row(normed, hidden_size, moe_q_.get() + row * hidden_size, nullptr);
    });
    // a single token's router is shared by all threads: it is a matrix of float32
    const int64_t num_experts = model_.num_experts;
    for_each_row(walk, walk.num_tokens * num_experts, [&](int64_t item) {
      const float* normed = moe_input_.get() + item / num_experts * hidden_size;
      const float* scores = layer.router + item % num_experts * hidden_size;
      router_logits_[item] = walk.k.dot_float(normed, scores, hidden_size);
    });
    for_each_row(walk, walk.num_tokens, [&](int64_t row) { choose_experts(row); });
    if (walk.worker.index() == 0) {
      route_.sort(walk.num_tokens);
      visit_all(walk.num_tokens);
    }
    walk.worker.wait_for_all();
    clock(walk, kOther);
    const SourceRows rows{moe_q_.get(), moe_scale_.get(), hidden_size, route_.token_of_row.get()};
    run_experts(walk.k, walk.worker, layer.experts, route_.groups, rows, walk.num_tokens * model_.top_k, *experts_,
                expert_output_.get());
    if (model_.num_shared_experts) {
      const SourceRows shared_rows{moe_q_.get(), moe_scale_.get(), hidden_size, shared_.token_of_row.get()};
      run_experts(walk.k, walk.worker, layer.shared_experts, shared_.groups, shared_rows,
                  walk.num_tokens * model_.num_shared_experts, *shared_experts_, shared_output_.get());
    }
    clock(walk, kProducts);
    for_each_row(walk, walk.num_tokens, [&](int64_t row) {
      float* output = temporary(walk);
      combine(walk, route_, expert_output_.get(), row, output);
      if (model_.num_shared_experts) {
        float* shared_sum = output + temporary_stride_;
        combine(walk, shared_, shared_output_.get(), row, shared_sum);
        walk.k.add_scaled(shared_sum, 1.0F, hidden_size, output);
      }
      walk.k.add_scaled(output, 1.0F, hidden_size, hidden(row));
    });
  }

  // Every token visits every shared expert.
  void visit_all(int64_t num_tokens) {
    const int64_t count = model_.num_shared_experts;
    if (!count) return;
    for (int64_t slot = 0; slot < num_tokens * count; ++slot) {
      shared_.expert_ids[slot] = slot % count;
      shared_.weights[slot] = 1.0F;
    }
    shared_.sort(num_tokens);
  }

  // The weighted sum of a token's experts, in the order of its choices.
  void combine(const Walk& walk, const Route& route, const float* outputs, int64_t row, float* sum) {
    const int64_t size = model_.hidden_size;
    std::memset(sum, 0, static_cast<size_t>(size) * sizeof(float));
    for (int64_t choice = 0; choice < route.top_k; ++choice) {
      const int64_t slot = row * route.top_k + choice;
      walk.k.add_scaled(outputs + route.row_of_slot[slot] * size, route.weights[slot], size, sum);
    }
  }

  // The best experts of a token, best first, with the softmax over them; its logits are used up.
  void choose_experts(int64_t row) {
    const int64_t top_k = model_.top_k;
    float* logits = router_logits_.get() + row * model_.num_experts;
    int64_t* ids = route_.expert_ids.get() + row * top_k;
    float* weights = route_.weights.get() + row * top_k;
    for (int64_t choice = 0; choice < top_k; ++choice) {
      float* best = std::max_element(logits, logits + model_.num_experts);
      ids[choice] = best - logits;
      weights[choice] = *best;
      *best = -std::numeric_limits<float>::infinity();
    }
    float total = 0;
    const float largest = weights[0];
    for (int64_t choice = 0; choice < top_k; ++choice) total += weights[choice] = std::exp(weights[choice] - largest);
    for (int64_t choice = 0; choice < top_k; ++choice) weights[choice] /= total;
  }

  void score(const Walk& walk, float* logits) {
    constexpr int64_t kRows = 64;
    const int64_t size = model_.hidden_size;
    float* normed = temporary(walk);
    // every thread for itself: the row is short
    walk.k.rms_norm_row(hidden(walk.num_tokens - 1), model_.final_norm, model_.norm_eps, size, normed);
    const ternary_table& head = model_.head;
    float scale = 0;
    if (head.kind == kTernaryInt8) scale = walk.k.quantize_row(normed, size, temporary_q(walk), nullptr);
    const int64_t blocks = divide_up(model_.vocab_size, kRows);
    walk.worker.for_each_piece(
        blocks, piece_of(blocks, walk.worker.num_threads()), [&](int64_t begin, int64_t end, int64_t) {
          const int64_t first = begin * kRows, count = std::min(end * kRows, model_.vocab_size) - first;
          if (head.kind == kTernaryFloat32) {
            walk.k.head_float32(normed, static_cast<const float*>(head.data) + first * size, count, size,
                                logits + first);
          } else if (head.kind == kTernaryBfloat16) {
            walk.k.head_bfloat16(normed, static_cast<const uint16_t*>(head.data) + first * size, count, size,
                                 logits + first);
          } else {
            walk.k.head_int8(temporary_q(walk), scale, static_cast<const int8_t*>(head.data) + first * size,
                             head.scales + first, head.row_sums + first, count, size, logits + first);
          }
        });
    clock(walk, kHead);
  }

  const ternary_model model_;
  const std::vector<ternary_layer> layers_;
  const ternary_cache cache_;
  const int64_t max_rows_;
  const int num_threads_;
  const int64_t query_size_, kv_size_, padded_dim_, max_splits_, temporary_stride_;

  Buffer<float> hidden_;        // [rows][hidden_size]: the residual stream
  Buffer<float> temporary_;     // [threads][2][temporary_stride]
  Buffer<int8_t> temporary_q_;  // [threads][temporary_stride]
  Buffer<float> projected_;     // [rows][query, key, value]
  Buffer<float> query_;         // [rows][heads][padded_dim]
  Buffer<float> partial_;       // [splits or rows][heads][padded_dim]
  Buffer<float> partial_maximum_, partial_sum_;
  Buffer<float> moe_input_;      // [rows][hidden_size], normalized
  Buffer<float> router_logits_;  // [rows][experts]
  Buffer<int8_t> moe_q_;         // [rows][hidden_size]
  Buffer<float> moe_scale_;
  Route route_, shared_;
  Buffer<float> expert_output_, shared_output_;
  SortedColumns attention_input_[3], output_input_;
  int64_t expanded_bytes_ = 0;
  Buffer<uint8_t> expanded_;
  std::unique_ptr<ExpertScratch> experts_, shared_experts_;
  int64_t all_rows_offsets_[2] = {0, 0};
  Groups all_rows_{};
  std::chrono::steady_clock::time_point clock_;
  double seconds_[kNumPhases] = {};
};

}  // namespace ternary

struct ternary_decoder {
  ternary::Decoder decoder;
};

extern "C" ternary_decoder* ternary_decoder_create(const ternary_model* model, const ternary_cache* cache,
                                                   int64_t max_rows, int32_t num_threads) {
  try {
    return new ternary_decoder{ternary::Decoder(*model, *cache, max_rows, num_threads)};
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

extern "C" void ternary_decoder_destroy(ternary_decoder* decoder) { delete decoder; }

extern "C" void ternary_decoder_append(ternary_decoder* decoder, const int64_t* token_ids, int64_t num_tokens,
                                       int64_t position, float* logits) {
  decoder->decoder.append(token_ids, num_tokens, position, logits);
}

extern "C" void ternary_decoder_moe_layer(ternary_decoder* decoder, int64_t layer_index, int64_t num_tokens,
                                          float* hidden_states) {
  decoder->decoder.moe_layer(layer_index, num_tokens, hidden_states);
}

extern "C" void ternary_decoder_profile(ternary_decoder* decoder, double* seconds) {
  decoder->decoder.profile(seconds);
}
