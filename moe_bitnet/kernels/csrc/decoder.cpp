// A whole step of a packed model in one call: embed, walk the layers, score.

#include "decoder.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "matrix.h"

namespace ternary {
namespace {

constexpr int64_t kPhasesPerLayer = 15;  // times that all threads meet in a layer

}  // namespace

Decoder::Decoder(const ternary_model& model, const ternary_cache& cache, int64_t max_rows, int num_threads)
    : model_(model),
      layers_(model.layers, model.layers + model.num_layers),
      cache_(cache),
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
      shared_(max_rows, std::max<int64_t>(1, model.num_shared_experts), std::max<int64_t>(1, model.num_shared_experts)),
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
  all_rows_.is_decoder = route_.groups.is_decoder = shared_.groups.is_decoder = true;
  all_rows_.offsets = all_rows_offsets_;
}

void Decoder::append(const int64_t* token_ids, int64_t num_tokens, int64_t position, float* logits) {
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

void Decoder::moe_layer(int64_t layer_index, int64_t num_tokens, float* hidden_states) {
  start_clock();
  const size_t bytes = static_cast<size_t>(num_tokens * model_.hidden_size) * sizeof(float);
  std::memcpy(hidden_.get(), hidden_states, bytes);
  run_team(threads_for(num_tokens), [&](Worker& worker) {
    moe(Walk{kernels(), worker, num_tokens, 0}, layers_[static_cast<size_t>(layer_index)]);
  });
  std::memcpy(hidden_states, hidden_.get(), bytes);
}

void Decoder::profile(double* seconds) {
  for (int phase = 0; phase < kNumPhases; ++phase) {
    seconds[phase] = seconds_[phase];
    seconds_[phase] = 0;
  }
}

// A small model's phases are shorter than a meeting of threads.
int32_t Decoder::threads_for(int64_t num_tokens) const {
  const int64_t experts = model_.top_k + model_.num_shared_experts;
  const int64_t inner = layers_.front().experts.gate.out_features;
  const int64_t weights = 2 * model_.hidden_size * (query_size_ + kv_size_) + 3 * experts * inner * model_.hidden_size;
  return useful_threads(num_threads_, num_tokens * weights / kPhasesPerLayer);
}

// Adds the time since the last phase; the first thread speaks for all, since they have just met.
void Decoder::clock(const Walk& walk, Phase phase) {
  if (walk.worker.index() != 0) return;
  const auto now = std::chrono::steady_clock::now();
  seconds_[phase] += std::chrono::duration<double>(now - clock_).count();
  clock_ = now;
}

void Decoder::embed(const Walk& walk, const int64_t* token_ids) {
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

void Decoder::score(const Walk& walk, float* logits) {
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
          walk.k.head_float32(normed, static_cast<const float*>(head.data) + first * size, count, size, logits + first);
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
