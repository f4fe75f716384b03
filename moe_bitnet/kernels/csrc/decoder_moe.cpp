// The mixture-of-experts half of a block.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "decoder.h"

namespace ternary {

void Decoder::moe(const Walk& walk, const ternary_layer& layer) {
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
void Decoder::visit_all(int64_t num_tokens) {
  const int64_t count = model_.num_shared_experts;
  if (!count) return;
  for (int64_t slot = 0; slot < num_tokens * count; ++slot) {
    shared_.expert_ids[slot] = slot % count;
    shared_.weights[slot] = 1.0F;
  }
  shared_.sort(num_tokens);
}

// The weighted sum of a token's experts, in the order of its choices.
void Decoder::combine(const Walk& walk, const Route& route, const float* outputs, int64_t row, float* sum) {
  const int64_t size = model_.hidden_size;
  std::memset(sum, 0, static_cast<size_t>(size) * sizeof(float));
  for (int64_t choice = 0; choice < route.top_k; ++choice) {
    const int64_t slot = row * route.top_k + choice;
    walk.k.add_scaled(outputs + route.row_of_slot[slot] * size, route.weights[slot], size, sum);
  }
}

// The best experts of a token, best first, with the softmax over them; its logits are used up.
void Decoder::choose_experts(int64_t row) {
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

}  // namespace ternary
