// Attention over pages: what one call is given, and what one instruction set implements.
//
// A call has tokens of several sequences. A *row* is one query head of one new token; rows of a sequence that share a
// KV head are numbered token by token. Keys and values come in *tiles* of 64 tokens: the pages of the sequence, then
// its new tokens themselves.
#pragma once

#include <cstdint>

extern "C" {

constexpr int32_t kMaxSegments = 3;

// Mirrored by cpp_attention.py. Pointers of sizes [..] are contiguous; G num_kv_heads, D head_dim, T num_rows.
struct page_attend_call {
  int64_t num_kv_heads, num_heads, head_dim, num_tokens, num_sequences;
  int32_t key_bits, value_bits, num_segments, num_threads;
  int32_t segment_words[kMaxSegments], segment_bits[kMaxSegments];
  const int8_t* levels;              // [3][64]: of 4, 2 and 1 bits
  const float* scales;               // [256]
  const float* query_matrix;         // [G][D][D]: maps a query into the keys' frame, row vectors
  const float* key_mean;             // [G][D]
  const float* value_matrix;         // [G][D][D]: maps weighted values back
  const float* value_mean;           // [G][D]
  const float *query, *key, *value;  // [T][N][D], [T][G][D] twice
  float* output;                     // [T][N][D]
  const uint8_t *packed, *exact;     // the layer's first byte in page 0
  int64_t packed_stride, exact_stride;
  const int64_t *row_offsets, *page_offsets;  // [sequences + 1]
  const int32_t* page_ids;
  const uint8_t* page_is_packed;
  const int32_t* page_num_tokens;
  float scale;
};

int32_t page_attend(const page_attend_call* call);
}

namespace ternary {

constexpr int64_t kTileTokens = 64;
constexpr int64_t kQuadBytes = 4;
constexpr int64_t kRowsPerTask = 64;  // rows that share unpacked levels: their states stay in L2

// A row's query in the keys' frame: int8 digits in the order in which levels are unpacked, high digits, then low ones.
struct RowQuery {
  float units[kMaxSegments];
  float offset;                // query . mean, scaled
  int32_t bias[kMaxSegments];  // what sums begin with where keys are multiplied as level + 128
  const int8_t* digits;        // [2][D]
};

// Rows of one KV head over a run of tiles. A row's state: maximum, weight_sum, packed_sum, then at kStateHead the sums
// of packed values (in their frame) and of exact ones.
constexpr int64_t kStateHead = 16;
inline int64_t state_floats(int64_t head_dim) { return kStateHead + 2 * head_dim; }

struct PageTask {
  const page_attend_call* call;
  const RowQuery* queries;     // of the head's first row of the sequence
  const uint16_t* new_tokens;  // [tiles][key f16 [D][64], value f16 [64][D]] of the sequence and head
  int64_t sequence, head;
  int64_t first_row, last_row;
  int64_t first_tile, last_tile;
  float* states;     // [rows][state_floats]
  uint8_t* scratch;  // levels of a page: keys [4][D / 4][64], values [D / 16][16][64]
};

struct PageKernels {
  void (*attend)(const PageTask& task);
  // Adds split states into the first; all are of one row.
  void (*merge_states)(float* state, const float* other, int64_t head_dim);
  // The row's output from its finished state.
  void (*finish_row)(const page_attend_call& call, int64_t head, const float* state, float* output);
  void (*map_query)(const page_attend_call& call, int64_t head, const float* query, RowQuery& row, int8_t* digits);
};

const PageKernels& scalar_page_kernels();
const PageKernels* avx2_page_kernels();  // null where the compiler's target is not x86
const PageKernels* avx512_page_kernels();

}  // namespace ternary
