// Which token visits which expert.
#pragma once

#include <cstdint>
#include <vector>

#include "buffer.h"
#include "expert_ffn.h"

namespace ternary {

// The choices of some tokens, sorted by expert and stable in the token.
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

}  // namespace ternary
