// One layer of a page on several threads: every plane of every head is a piece of its own.

#include "page_encode.h"

#include <cstring>
#include <new>

#include "buffer.h"
#include "kernels.h"
#include "thread_pool.h"

namespace ternary {
namespace {

const PageEncoder& page_encoder() {
  return of_instruction_set(avx512_page_encoder(), avx2_page_encoder(), scalar_page_encoder());
}

int64_t plane_bytes(const page_encode_plane& plane, int64_t head_dim) {
  return kPageSize * head_dim * plane.num_bits / 8 + (plane.num_bits == 16 ? 0 : kPageSize);
}

struct Layer {
  const page_encode_constants* constants;
  const page_encode_plane *key, *value;
  int64_t num_kv_heads, head_dim;
  const uint8_t* exact;
  uint8_t* packed;

  // Piece 2 * head is the head's values, which take longer, 2 * head + 1 its keys.
  void encode_piece(int64_t piece, uint8_t* scratch) const {
    const int64_t head = piece / 2, exact_bytes = kPageSize * head_dim * 2;
    const bool is_key = piece % 2 == 1;
    const page_encode_plane& plane = is_key ? *key : *value;
    const int64_t key_bytes = plane_bytes(*key, head_dim), head_bytes = key_bytes + plane_bytes(*value, head_dim);
    const uint8_t* source = exact + (2 * head + (is_key ? 0 : 1)) * exact_bytes;
    uint8_t* target = packed + head * head_bytes + (is_key ? 0 : key_bytes);
    if (plane.num_bits == 16) {
      std::memcpy(target, source, static_cast<size_t>(exact_bytes));
      return;
    }
    const PlaneTask task{constants,
                         &plane,
                         plane.mean + head * head_dim,
                         plane.encode_matrix + head * head_dim * head_dim,
                         plane.segment_weights + head * plane.num_segments,
                         head_dim,
                         reinterpret_cast<const uint16_t*>(source),
                         target,
                         scratch};
    (is_key ? page_encoder().encode_keys : page_encoder().encode_values)(task);
  }
};

}  // namespace
}  // namespace ternary

extern "C" int32_t page_encode(const page_encode_constants* constants, int64_t num_kv_heads, int64_t head_dim,
                               const page_encode_plane* key, const page_encode_plane* value, const uint8_t* exact,
                               uint8_t* packed, int32_t num_threads) {
  using namespace ternary;
  const Layer layer{constants, key, value, num_kv_heads, head_dim, exact, packed};
  const int64_t num_pieces = 2 * num_kv_heads, bytes = page_encode_scratch_bytes(head_dim);
  const int32_t threads = num_pieces < num_threads ? static_cast<int32_t>(num_pieces) : num_threads;
  try {
    const Buffer<uint8_t> scratch(threads * bytes);
    run_team(threads, [&](Worker& worker) {
      worker.for_each_piece(num_pieces, 1, [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t piece = begin; piece < end; ++piece)
          layer.encode_piece(piece, scratch.get() + worker.index() * bytes);
      });
    });
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
