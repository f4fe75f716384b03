// The fused decoder: one team of threads walks all layers of a packed model together.
//
// A layer is a row of phases that alternate between rows (norms, quantization, routing: a thread takes whole tokens)
// and blocks (products: a thread takes 64 output features); all threads meet between phases:
//
//   norm, quantize | query, key, value | rotate, append | attend | merge, norm, quantize | output projection, add
//       decoder_attention.cpp
//   norm, quantize | router | choose | experts (expert_ffn.h) | weigh, add
//       decoder_moe.cpp
//
// Every float step is the reference's; integer sums are exact.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

#include "attention.h"
#include "buffer.h"
#include "expert_ffn.h"
#include "kernels.h"
#include "route.h"
#include "ternary_decoder.h"
#include "thread_pool.h"

namespace ternary {

constexpr int64_t kTokensPerSplit = 512;  // keys that one attention task of a single token takes

class Decoder {
 public:
  Decoder(const ternary_model& model, const ternary_cache& cache, int64_t max_rows, int num_threads);

  void append(const int64_t* token_ids, int64_t num_tokens, int64_t position, float* logits);
  void moe_layer(int64_t layer_index, int64_t num_tokens, float* hidden_states);
  void profile(double* seconds);

 private:
  enum Phase { kProducts, kAttention, kHead, kOther, kNumPhases };

  // What every phase needs to know.
  struct Walk {
    const Kernels& k;
    Worker& worker;
    int64_t num_tokens;
    int64_t position;  // of the first token
  };

  void embed(const Walk& walk, const int64_t* token_ids);
  void attention(const Walk& walk, int64_t layer_index);
  void project(const Walk& walk, const ternary_layer& layer, int num_inputs);
  void rotate_and_append(const Walk& walk, int64_t layer_index);
  void rotate_head(const Walk& walk, int64_t layer_index, int64_t row, int64_t head);
  void attend(const Walk& walk, int64_t layer_index);
  void attend_item(const Walk& walk, int64_t layer_index, int64_t item);
  void merge(const Walk& walk, int64_t row, float* output);
  void moe(const Walk& walk, const ternary_layer& layer);
  void visit_all(int64_t num_tokens);
  void combine(const Walk& walk, const Route& route, const float* outputs, int64_t row, float* sum);
  void choose_experts(int64_t row);
  void score(const Walk& walk, float* logits);
  void quantize_into(const Walk& walk, const float* row_values, int64_t count, int64_t row, SortedColumns& columns);

  template <class Body>
  void for_each_row(const Walk& walk, int64_t count, Body&& body) {
    const int64_t piece = piece_of(count, walk.worker.num_threads());
    walk.worker.for_each_piece(count, piece, [&](int64_t begin, int64_t end, int64_t) {
      for (int64_t row = begin; row < end; ++row) body(row);
    });
    clock(walk, kOther);
  }

  int32_t threads_for(int64_t num_tokens) const;
  void start_clock() { clock_ = std::chrono::steady_clock::now(); }
  void clock(const Walk& walk, Phase phase);
  int64_t num_splits(const Walk& walk) const;

  float* hidden(int64_t row) const { return hidden_.get() + row * model_.hidden_size; }
  float* temporary(const Walk& walk) const { return temporary_.get() + 2 * walk.worker.index() * temporary_stride_; }
  int8_t* temporary_q(const Walk& walk) const { return temporary_q_.get() + walk.worker.index() * temporary_stride_; }
  uint8_t* expanded(const Walk& walk) const { return expanded_.get() + walk.worker.index() * expanded_bytes_; }
  float* projected(int64_t row) const { return projected_.get() + row * (query_size_ + 2 * kv_size_); }
  uint16_t* key_of(int64_t layer_index, int64_t kv_head) const {
    return cache_.key + (layer_index * model_.num_kv_heads + kv_head) * cache_.max_tokens * padded_dim_;
  }
  uint16_t* value_of(int64_t layer_index, int64_t kv_head) const {
    return cache_.value + (layer_index * model_.num_kv_heads + kv_head) * cache_.max_tokens * padded_dim_;
  }

  const ternary_model model_;
  const std::vector<ternary_layer> layers_;
  const ternary_cache cache_;
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
