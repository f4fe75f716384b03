// Attention of a few query rows over a run of keys and values held in half precision.
//
// Keys lie as [tile of 64 tokens][head_dim][64], so that a vector lane is a token and scores need no horizontal sums;
// values as [token][head_dim]. head_dim is padded with zeros to a multiple of 16.
#pragma once

#include <cstdint>

namespace ternary {

constexpr int64_t kTokensPerTile = 64;

// One query and where its result goes, to be merged over tasks:
// output = sum of exp(score - maximum) * value, not normalized, and exp_sum = sum of exp(score - maximum).
struct AttentionRow {
  const float* query;  // [padded_dim], scaled already
  int64_t limit;       // sees the keys below
  float* output;       // [padded_dim]
  float* maximum;
  float* exp_sum;
};

struct AttentionTask {
  const AttentionRow* rows;
  int64_t num_rows;
  const uint16_t* key;    // [tiles][padded_dim][64]
  const uint16_t* value;  // [tokens][padded_dim]
  int64_t padded_dim;
  int64_t begin, end;  // keys of this task; begin is a multiple of 64
};

}  // namespace ternary
