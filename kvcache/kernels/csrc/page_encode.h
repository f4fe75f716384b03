// Quantizing one layer of a page (kvcache/codec.py is the specification): the C interface, and what the instruction
// sets implement of it.
//
// The units page_encode_*.cpp are compiled with their own -m flags and share nothing with other units but these
// declarations (moe_bitnet/kernels/csrc/kernels.h says why).
#pragma once

#include <cstdint>

extern "C" {

// Consecutive elements of a stream with one width: 8 (plain int8), or 4, 2, 1 (trellis code).
struct page_segment {
  int32_t num_elements, num_bits;
};

// The keys or the values of all heads. At 16 bits the float16 plane is copied and the pointers are null.
struct page_encode_plane {
  int32_t num_bits;      // 16, 8, 4 or 2
  int32_t num_segments;  // as PlaneFormat.segments has them
  const page_segment* segments;
  const float* mean;             // [num_kv_heads, head_dim]
  const float* encode_matrix;    // [num_kv_heads, head_dim, head_dim]
  const float* segment_weights;  // [num_kv_heads, num_segments]; for keys
};

// What the format fixes once for all pages; the numbers live in kvcache/trellis.py, scale.py and codec.py.
struct page_encode_constants {
  const float* levels;         // [3][64] by window, of 4, 2 and 1 bits
  const float* scales;         // [256]
  const int32_t* scale_steps;  // [num_scale_steps]: the scales to try, in this order
  int64_t num_scale_steps;     // at most 8
  double level_unit;
};

// exact and packed are the layer's bytes as drawn in kvcache/page.py; packed is written. Returns 0, or 1 if there is no
// memory for scratch.
int32_t page_encode(const page_encode_constants* constants, int64_t num_kv_heads, int64_t head_dim,
                    const page_encode_plane* key, const page_encode_plane* value, const uint8_t* exact, uint8_t* packed,
                    int32_t num_threads);
}

namespace ternary {

constexpr int64_t kPageSize = 64;
constexpr int64_t kPageLanes = 16;  // streams whose words lie side by side
constexpr int64_t kMaxScaleSteps = 8;

// One plane of one head.
struct PlaneTask {
  const page_encode_constants* constants;
  const page_encode_plane* plane;
  const float *mean, *encode_matrix, *segment_weights;  // of the head
  int64_t head_dim;
  const uint16_t* exact;  // keys [head_dim][64], values [64][head_dim]
  uint8_t* packed;
  uint8_t* scratch;  // page_encode_scratch_bytes, aligned to 64
};

// Scratch of one plane, in the order of PlaneScratch in page_encode.inc.
inline constexpr int64_t page_encode_scratch_bytes(int64_t head_dim) {
  const int64_t longest = head_dim > kPageSize ? head_dim : kPageSize;
  const int64_t doubles = (kPageSize + kPageLanes) * head_dim;
  const int64_t floats = kPageSize * head_dim + 6 * longest * kPageLanes + kPageSize * kPageLanes;
  return doubles * 8 + floats * 4;
}

struct PageEncoder {
  void (*encode_keys)(const PlaneTask& task);
  void (*encode_values)(const PlaneTask& task);
};

const PageEncoder& scalar_page_encoder();
const PageEncoder* avx2_page_encoder();  // null where the compiler's target is not x86
const PageEncoder* avx512_page_encoder();

}  // namespace ternary
