// One call of attention over pages: queries are mapped, tasks of rows and tiles spread over threads, parts merged.

#include "page_attend.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#include "buffer.h"
#include "kernels.h"
#include "thread_pool.h"

namespace ternary {
namespace {

constexpr int64_t kTilesWorthASplit = 8;  // below, waking a thread costs more than it saves
constexpr int64_t kTasksPerThread = 8;

const PageKernels& page_kernels() {
  return of_instruction_set(avx512_page_kernels(), avx2_page_kernels(), scalar_page_kernels());
}

// Rows [first_row, last_row) of a sequence and KV head, over some of its tiles.
struct TaskRange {
  int64_t sequence, head, first_row, last_row, first_tile, last_tile;
  int64_t part, num_parts;  // splits of the same rows
};

// The new tokens of every sequence as half-precision tiles, head by head.
struct NewTiles {
  std::vector<int64_t> first_tile;  // by sequence, in units of tiles
  int64_t num_tiles = 0;

  explicit NewTiles(const page_attend_call& call) {
    for (int64_t s = 0; s < call.num_sequences; ++s) {
      first_tile.push_back(num_tiles);
      num_tiles += (call.row_offsets[s + 1] - call.row_offsets[s] + kTileTokens - 1) / kTileTokens;
    }
  }
};

class Attention {
 public:
  explicit Attention(const page_attend_call& call)
      : call_(call),
        kernels_(page_kernels()),
        heads_(call.num_heads / call.num_kv_heads),
        tiles_(call),
        new_tokens_(call.num_kv_heads * tiles_.num_tiles * tile_halves()),
        queries_(call.key_bits < 16 ? call.num_tokens * call.num_heads : 0),
        digits_(call.key_bits < 16 ? call.num_tokens * call.num_heads * 2 * call.head_dim : 0) {
    plan();
    const int64_t state = state_floats(call.head_dim);
    split_states_ = Buffer<float>(num_split_rows_ * state);
    block_states_ = Buffer<float>(call.num_threads * kRowsPerTask * state);
    scratch_ = Buffer<uint8_t>(call.num_threads * 2 * kTileTokens * call.head_dim);
  }

  void run() {
    const int64_t most = std::max<int64_t>(static_cast<int64_t>(tasks_.size()), 1);
    const int32_t threads = static_cast<int32_t>(std::min<int64_t>(most, call_.num_threads));
    run_team(threads, [&](Worker& worker) {
      worker.for_each_piece(call_.num_kv_heads * call_.num_sequences, 1, [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t i = begin; i < end; ++i) prepare(i / call_.num_sequences, i % call_.num_sequences);
      });
      worker.for_each_piece(static_cast<int64_t>(tasks_.size()), 1, [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t i = begin; i < end; ++i) attend(tasks_[static_cast<size_t>(i)], worker.index());
      });
      if (num_split_rows_ > 0)
        worker.for_each_piece(static_cast<int64_t>(merges_.size()), 1, [&](int64_t begin, int64_t end, int64_t) {
          for (int64_t i = begin; i < end; ++i) merge(merges_[static_cast<size_t>(i)]);
        });
    });
  }

 private:
  int64_t tile_halves() const { return 2 * kTileTokens * call_.head_dim; }
  int64_t num_new(int64_t s) const { return call_.row_offsets[s + 1] - call_.row_offsets[s]; }
  int64_t num_tiles(int64_t s) const {
    return call_.page_offsets[s + 1] - call_.page_offsets[s] + (num_new(s) + kTileTokens - 1) / kTileTokens;
  }

  // Blocks of rows; where there are fewer than threads could use, their tiles are split.
  void plan() {
    int64_t num_blocks = 0;
    for (int64_t s = 0; s < call_.num_sequences; ++s)
      num_blocks += call_.num_kv_heads * ((num_new(s) * heads_ + kRowsPerTask - 1) / kRowsPerTask);
    const int64_t wanted =
        call_.num_threads == 1 ? 1 : (kTasksPerThread * call_.num_threads - 1) / std::max<int64_t>(num_blocks, 1) + 1;
    for (int64_t s = 0; s < call_.num_sequences; ++s)
      for (int64_t head = 0; head < call_.num_kv_heads; ++head)
        for (int64_t row = 0; row < num_new(s) * heads_; row += kRowsPerTask) {
          const int64_t last_row = std::min(row + kRowsPerTask, num_new(s) * heads_);
          const int64_t tiles = num_tiles(s);
          const int64_t parts = std::clamp<int64_t>(tiles / kTilesWorthASplit, 1, wanted);
          if (parts > 1) {
            merges_.push_back({s, head, row, last_row, num_split_rows_, parts});
          }
          for (int64_t part = 0; part < parts; ++part)
            tasks_.push_back({s, head, row, last_row, tiles * part / parts, tiles * (part + 1) / parts,
                              num_split_rows_ + part * (last_row - row), parts});
          if (parts > 1) num_split_rows_ += parts * (last_row - row);
        }
  }

  struct Merge {
    int64_t sequence, head, first_row, last_row, first_state, num_parts;
  };

  int64_t first_query(int64_t s, int64_t head) const {
    return (head * call_.num_tokens + call_.row_offsets[s]) * heads_;
  }

  const float* query_of(int64_t s, int64_t head, int64_t row) const {
    const int64_t token = call_.row_offsets[s] + row / heads_;
    return call_.query + (token * call_.num_heads + head * heads_ + row % heads_) * call_.head_dim;
  }

  float* output_of(int64_t s, int64_t head, int64_t row) const {
    return call_.output + (query_of(s, head, row) - call_.query);
  }

  uint16_t* new_tiles(int64_t s, int64_t head) const {
    return new_tokens_.get() + (head * tiles_.num_tiles + tiles_.first_tile[static_cast<size_t>(s)]) * tile_halves();
  }

  void prepare(int64_t head, int64_t s) {
    const auto to_half = kernels().to_half;
    const int64_t head_dim = call_.head_dim, count = num_new(s);
    for (int64_t t = 0; t < count; ++t) {
      uint16_t* tile = new_tiles(s, head) + t / kTileTokens * tile_halves();
      const int64_t slot = t % kTileTokens;
      if (slot == 0 && count - t < kTileTokens) std::memset(tile, 0, static_cast<size_t>(tile_halves()) * 2);
      const int64_t source = ((call_.row_offsets[s] + t) * call_.num_kv_heads + head) * head_dim;
      to_half(call_.key + source, head_dim, tile + slot, kTileTokens);
      to_half(call_.value + source, head_dim, tile + (kTileTokens + slot) * head_dim, 1);
    }
    if (call_.key_bits == 16 || call_.page_offsets[s + 1] == call_.page_offsets[s]) return;
    for (int64_t row = 0; row < count * heads_; ++row) {
      const int64_t index = first_query(s, head) + row;
      kernels_.map_query(call_, head, query_of(s, head, row), queries_.get()[index],
                         digits_.get() + index * 2 * head_dim);
    }
  }

  void attend(const TaskRange& range, int thread) {
    const int64_t state = state_floats(call_.head_dim), head_dim = call_.head_dim;
    float* states = range.num_parts > 1 ? split_states_.get() + range.part * state
                                        : block_states_.get() + thread * kRowsPerTask * state;
    const PageTask task{&call_,
                        call_.key_bits < 16 ? queries_.get() + first_query(range.sequence, range.head) : nullptr,
                        new_tiles(range.sequence, range.head),
                        range.sequence,
                        range.head,
                        range.first_row,
                        range.last_row,
                        range.first_tile,
                        visible_end(range),
                        states,
                        scratch_.get() + thread * 2 * kTileTokens * head_dim};
    kernels_.attend(task);
    if (range.num_parts == 1)
      for (int64_t row = range.first_row; row < range.last_row; ++row)
        kernels_.finish_row(call_, range.head, states + (row - range.first_row) * state,
                            output_of(range.sequence, range.head, row));
  }

  // New tokens behind a block's last row are hidden from all of its rows.
  int64_t visible_end(const TaskRange& range) const {
    const int64_t pages = call_.page_offsets[range.sequence + 1] - call_.page_offsets[range.sequence];
    const int64_t last_token = (range.last_row - 1) / heads_;
    return std::min(range.last_tile, pages + last_token / kTileTokens + 1);
  }

  void merge(const Merge& merge) {
    const int64_t state = state_floats(call_.head_dim), num_rows = merge.last_row - merge.first_row;
    for (int64_t row = 0; row < num_rows; ++row) {
      float* first = split_states_.get() + (merge.first_state + row) * state;
      for (int64_t part = 1; part < merge.num_parts; ++part)
        kernels_.merge_states(first, first + part * num_rows * state, call_.head_dim);
      kernels_.finish_row(call_, merge.head, first, output_of(merge.sequence, merge.head, merge.first_row + row));
    }
  }

  const page_attend_call& call_;
  const PageKernels& kernels_;
  const int64_t heads_;  // query heads of a KV head
  NewTiles tiles_;
  Buffer<uint16_t> new_tokens_;
  Buffer<RowQuery> queries_;
  Buffer<int8_t> digits_;
  std::vector<TaskRange> tasks_;
  std::vector<Merge> merges_;
  int64_t num_split_rows_ = 0;
  Buffer<float> split_states_{0}, block_states_{0};
  Buffer<uint8_t> scratch_{0};
};

}  // namespace
}  // namespace ternary

extern "C" int32_t page_attend(const page_attend_call* call) {
  try {
    ternary::Attention(*call).run();
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
