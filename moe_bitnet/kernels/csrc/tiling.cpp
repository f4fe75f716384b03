// Portable bytes to tiles and back; moe_bitnet/packing.py and moe_bitnet/tiles.py draw both.

#include <atomic>
#include <vector>

#include "layout.h"
#include "ternary.h"
#include "thread_pool.h"

namespace ternary {
namespace {

// The codes of every packed byte; an invalid byte has weight 0 in the place of each invalid code.
struct Codes {
  uint8_t codes[256][5];
  bool is_valid[256];
};

Codes make_codes(Layout layout) {
  Codes table{};
  for (int byte = 0; byte < 256; ++byte) {
    table.is_valid[byte] = true;
    int rest = byte;
    const int radix = layout == kBase3 ? 3 : 4, count = layout == kBase3 ? 5 : 4;
    for (int i = 0; i < count; ++i, rest /= radix) {
      const int code = rest % radix;
      table.codes[byte][i] = static_cast<uint8_t>(code < 3 ? code : 1);
      if (code == 3) table.is_valid[byte] = false;
    }
    if (rest) table.is_valid[byte] = false;
  }
  return table;
}

int64_t per_byte(Layout layout) { return layout == kBase3 ? 5 : 4; }

// The codes of the 64 rows of a block, [64][padded features], padding with the code of weight 0.
int64_t read_portable(const Codes& table, const uint8_t* packed, int64_t num_rows, int64_t in_features, Layout layout,
                      int64_t padded, uint8_t* codes) {
  int64_t num_invalid = 0;
  const int64_t count = per_byte(layout), width = divide_up(in_features, count);
  for (int64_t row = 0; row < kRowsPerBlock; ++row) {
    uint8_t* target = codes + row * padded;
    int64_t column = 0;
    if (row < num_rows) {
      for (int64_t b = 0; b < width; ++b) {
        const uint8_t byte = packed[row * width + b];
        num_invalid += !table.is_valid[byte];
        for (int64_t i = 0; i < count && column < in_features; ++i, ++column) target[column] = table.codes[byte][i];
      }
    }
    for (; column < padded; ++column) target[column] = 1;
  }
  return num_invalid;
}

// Four rows that share a byte of a 2-bit line, and base-3 digits likewise.
void write_tiles(const uint8_t* codes, int64_t padded, Layout layout, uint8_t* lines) {
  const int64_t quads = padded / kQuad;
  auto code = [&](int64_t row, int64_t quad, int64_t i) { return codes[row * padded + quad * kQuad + i]; };
  for (int64_t r = 0; r < 16; ++r)
    for (int64_t quad = 0; quad < quads; ++quad)
      for (int64_t i = 0; i < kQuad; ++i) {
        const int64_t lane = r * kQuad + i;
        if (layout == kTwoBit) {
          lines[quad * kLineBytes + lane] = static_cast<uint8_t>(
              code(r, quad, i) | code(16 + r, quad, i) << 2 | code(32 + r, quad, i) << 4 | code(48 + r, quad, i) << 6);
          continue;
        }
        const int64_t group = quad / kQuadsPerGroup, j = quad % kQuadsPerGroup;
        if (j == 4) continue;  // its codes are the highest digits of the other four
        const int64_t fifth = group * kQuadsPerGroup + 4;
        lines[(group * kLinesPerGroup + j) * kLineBytes + lane] =
            static_cast<uint8_t>(code(r, quad, i) + 3 * code(16 + r, quad, i) + 9 * code(32 + r, quad, i) +
                                 27 * code(48 + r, quad, i) + 81 * code(16 * j + r, fifth, i));
      }
}

void read_tiles(const uint8_t* lines, int64_t padded, Layout layout, uint8_t* codes) {
  const int64_t quads = padded / kQuad;
  auto code = [&](int64_t row, int64_t quad, int64_t i) -> uint8_t& { return codes[row * padded + quad * kQuad + i]; };
  for (int64_t r = 0; r < 16; ++r)
    for (int64_t quad = 0; quad < quads; ++quad)
      for (int64_t i = 0; i < kQuad; ++i) {
        const int64_t lane = r * kQuad + i;
        if (layout == kTwoBit) {
          const uint8_t byte = lines[quad * kLineBytes + lane];
          for (int p = 0; p < 4; ++p) code(16 * p + r, quad, i) = byte >> 2 * p & 3;
          continue;
        }
        const int64_t group = quad / kQuadsPerGroup, j = quad % kQuadsPerGroup;
        if (j == 4) continue;
        uint8_t byte = lines[(group * kLinesPerGroup + j) * kLineBytes + lane];
        for (int p = 0; p < 4; ++p, byte /= 3) code(16 * p + r, quad, i) = byte % 3;
        code(16 * j + r, group * kQuadsPerGroup + 4, i) = byte;
      }
}

void write_portable(const uint8_t* codes, int64_t padded, int64_t num_rows, int64_t in_features, Layout layout,
                    uint8_t* packed) {
  const int64_t count = per_byte(layout), width = divide_up(in_features, count);
  const int radix = layout == kBase3 ? 3 : 4;
  for (int64_t row = 0; row < num_rows; ++row)
    for (int64_t b = 0; b < width; ++b) {
      int byte = 0;
      for (int64_t i = count - 1; i >= 0; --i) {
        const int64_t column = b * count + i;
        byte = byte * radix + (column < in_features ? codes[row * padded + column] : 1);
      }
      packed[row * width + b] = static_cast<uint8_t>(byte);
    }
}

// Calls body(matrix, block, codes buffer) for every row block.
template <class Body>
void for_each_block(int64_t num_matrices, int64_t out_features, int64_t padded, int num_threads, Body&& body) {
  const int64_t blocks = num_row_blocks(out_features);
  run_team(num_threads, [&](Worker& worker) {
    std::vector<uint8_t> codes(static_cast<size_t>(kRowsPerBlock * padded));
    worker.for_each_piece(num_matrices * blocks, 1, [&](int64_t begin, int64_t end, int64_t) {
      for (int64_t item = begin; item < end; ++item) body(item / blocks, item % blocks, codes.data());
    });
  });
}

}  // namespace
}  // namespace ternary

extern "C" int64_t ternary_tile(const uint8_t* packed, int64_t num_matrices, int64_t out_features, int64_t in_features,
                                int32_t layout_code, uint8_t* tiles, int32_t num_threads) {
  using namespace ternary;
  const Layout layout = static_cast<Layout>(layout_code);
  const Codes table = make_codes(layout);
  const int64_t padded = padded_features(in_features, layout), width = divide_up(in_features, per_byte(layout));
  const int64_t bytes = block_bytes(in_features, layout), blocks = num_row_blocks(out_features);
  std::atomic<int64_t> num_invalid{0};
  for_each_block(num_matrices, out_features, padded, num_threads, [&](int64_t matrix, int64_t block, uint8_t* codes) {
    const int64_t first = block * kRowsPerBlock;
    const int64_t rows = out_features - first < kRowsPerBlock ? out_features - first : kRowsPerBlock;
    num_invalid += read_portable(table, packed + (matrix * out_features + first) * width, rows, in_features, layout,
                                 padded, codes);
    write_tiles(codes, padded, layout, tiles + (matrix * blocks + block) * bytes);
  });
  return num_invalid;
}

extern "C" void ternary_untile(const uint8_t* tiles, int64_t num_matrices, int64_t out_features, int64_t in_features,
                               int32_t layout_code, uint8_t* packed, int32_t num_threads) {
  using namespace ternary;
  const Layout layout = static_cast<Layout>(layout_code);
  const int64_t padded = padded_features(in_features, layout), width = divide_up(in_features, per_byte(layout));
  const int64_t bytes = block_bytes(in_features, layout), blocks = num_row_blocks(out_features);
  for_each_block(num_matrices, out_features, padded, num_threads, [&](int64_t matrix, int64_t block, uint8_t* codes) {
    const int64_t first = block * kRowsPerBlock;
    const int64_t rows = out_features - first < kRowsPerBlock ? out_features - first : kRowsPerBlock;
    read_tiles(tiles + (matrix * blocks + block) * bytes, padded, layout, codes);
    write_portable(codes, padded, rows, in_features, layout, packed + (matrix * out_features + first) * width);
  });
}
