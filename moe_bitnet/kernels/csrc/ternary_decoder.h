// The C interface of the fused decoder: a whole step of a packed model in one call.
#pragma once

#include <cstdint>

#include "ternary.h"

extern "C" {

// Elements of the embedding and the head.
enum ternary_float_kind : int32_t { kTernaryFloat32 = 0, kTernaryBfloat16 = 1, kTernaryInt8 = 2 };

// A float matrix [num_rows, num_features], row-major; for int8 with a scale and the sum of the integers of each row.
struct ternary_table {
  const void* data;
  const float* scales;
  const int32_t* row_sums;
  int32_t kind;
};

// One block. A norm that the recipe does not have is null: norm (before query, key and value together) in one recipe,
// query_norm, key_norm and value_norm in the other.
struct ternary_layer {
  ternary_matrices query, key, value, output;
  const float* norm;
  const float* query_norm;
  const float* key_norm;
  const float* value_norm;
  const float* output_norm;
  const float* moe_norm;
  const float* router;  // [num_experts, hidden_size]
  ternary_experts experts;
  ternary_experts shared_experts;  // num_matrices 0: none
};

struct ternary_model {
  int64_t num_layers, hidden_size, num_heads, num_kv_heads, head_dim, vocab_size, num_experts, top_k;
  int64_t num_shared_experts;
  double norm_eps;
  const ternary_layer* layers;
  ternary_table embedding, head;
  const float* final_norm;
};

// Keys and values of one sequence, and the rotary tables; laid out as attention.h says.
//   key    [num_layers, num_kv_heads, max_tokens / 64, padded_dim, 64] float16
//   value  [num_layers, num_kv_heads, max_tokens, padded_dim]          float16
//   cos, sin  [max_tokens, head_dim / 2] float32
// max_tokens is a multiple of 64; padded_dim is head_dim rounded up to 16. All are zero at first.
struct ternary_cache {
  uint16_t* key;
  uint16_t* value;
  const float* cos;
  const float* sin;
  int64_t max_tokens;
};

struct ternary_decoder;

// Keeps the pointers of both; max_rows is the most tokens of one call. Null if there is no memory.
ternary_decoder* ternary_decoder_create(const ternary_model* model, const ternary_cache* cache, int64_t max_rows,
                                        int32_t num_threads);
void ternary_decoder_destroy(ternary_decoder* decoder);

// Appends tokens at a position and scores the one after the last.
//   token_ids  [num_tokens], checked by the caller; position + num_tokens <= max_tokens
//   logits     [vocab_size] float32, or null if they are not wanted
void ternary_decoder_append(ternary_decoder* decoder, const int64_t* token_ids, int64_t num_tokens, int64_t position,
                            float* logits);

// One MoE layer alone: hidden_states + layer(hidden_states) for [num_tokens, hidden_size] rows, in place.
void ternary_decoder_moe_layer(ternary_decoder* decoder, int64_t layer_index, int64_t num_tokens, float* hidden_states);

// Seconds spent since the last call in: ternary products, attention, head, everything else (norms, routing, rotary
// embedding, waiting included). Sets them back to zero.
void ternary_decoder_profile(ternary_decoder* decoder, double* seconds);

}  // extern "C"
