// Plain C++ for every machine. The loops over 64 bytes are written so that compilers vectorize them (SSE2, NEON).

#include "attention.h"
#include "expand_base3.h"
#include "half.h"
#include "vector_math.h"

namespace ternary {
namespace {

// Adds the products of some lines to sums [num_columns][64]. Each of a line's 64 bytes has its own sum, in 16 bits
// for as many lines as cannot overflow; the four bytes of a row are added up when those are emptied.
void add_two_bit(const uint8_t* lines, int64_t num_quads, const int8_t* columns, int num_columns, int32_t* sums) {
  constexpr int64_t kQuadsPerRound = 64;  // 64 * 2 * 128 = 16384 < 2^15; an invalid code 3 stays below it, too
  for (int c = 0; c < num_columns; ++c) {
    for (int64_t begin = 0; begin < num_quads; begin += kQuadsPerRound) {
      const int64_t end = begin + kQuadsPerRound < num_quads ? begin + kQuadsPerRound : num_quads;
      int16_t products[4][kLineBytes] = {};
      for (int64_t q = begin; q < end; ++q) {
        const uint8_t* line = lines + q * kLineBytes;
        const int8_t* quad = columns + (q * num_columns + c) * kQuad;
        int16_t x[kLineBytes];
        for (int i = 0; i < kLineBytes; ++i) x[i] = quad[i % kQuad];
        for (int p = 0; p < 4; ++p)
          for (int i = 0; i < kLineBytes; ++i)
            products[p][i] = static_cast<int16_t>(products[p][i] + (line[i] >> 2 * p & 3) * x[i]);
      }
      for (int p = 0; p < 4; ++p)
        for (int r = 0; r < 16; ++r)
          for (int i = 0; i < kQuad; ++i) sums[c * kRowsPerBlock + p * 16 + r] += products[p][r * kQuad + i];
    }
  }
}

void dot_two_bit(const uint8_t* lines, int64_t num_quads, const int8_t* columns, int num_columns, int32_t* sums,
                 Prefetch) {
  for (int i = 0; i < num_columns * kRowsPerBlock; ++i) sums[i] = 0;
  add_two_bit(lines, num_quads, columns, num_columns, sums);
}

void dot_base3(const uint8_t* lines, int64_t num_quads, const int8_t* columns, int num_columns, int32_t* sums,
               Prefetch) {
  dot_base3_by_expansion(lines, num_quads, columns, num_columns, sums, add_two_bit);
}

void head_int8(const int8_t* x_q, float x_scale, const int8_t* weight, const float* scale, const int32_t*,
               int64_t num_rows, int64_t count, float* output) {
  for (int64_t row = 0; row < num_rows; ++row) {
    int32_t product = 0;
    for (int64_t i = 0; i < count; ++i) product += x_q[i] * weight[row * count + i];
    output[row] = static_cast<float>(product) * (x_scale * scale[row]);
  }
}

int64_t integer_peak(int64_t iterations) {
  int8_t a[256];
  for (int i = 0; i < 256; ++i) a[i] = static_cast<int8_t>(i);
  int32_t sum = 0;
  for (int64_t n = 0; n < iterations; ++n) {
    a[n % 256] = static_cast<int8_t>(n);
    for (int i = 0; i < 256; ++i) sum += a[i] * a[i];
  }
  volatile int32_t keep = sum;
  (void)keep;
  return iterations * 256;
}

uint64_t read_bytes(const uint8_t* data, int64_t num_bytes) {
  uint64_t folded[8] = {};
  for (int64_t offset = 0; offset + 64 <= num_bytes; offset += 64)
    for (int i = 0; i < 8; ++i) folded[i] ^= load<uint64_t>(data + offset + 8 * i);
  uint64_t all = 0;
  for (const uint64_t word : folded) all ^= word;
  return all;
}

TERNARY_INLINE Float16 half_to_float(const uint16_t* half) {
  float values[kLanes];
  for (int i = 0; i < kLanes; ++i) values[i] = half_to_float_one(half[i]);
  return load<Float16>(values);
}

// Round half to even, as the hardware does; beyond 65504 to infinity.
TERNARY_INLINE uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (bits < 0x38800000) {  // denormal: adding 0.5 shifts the mantissa to its place, rounded
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5F;
    std::memcpy(&bits, &magnitude, sizeof bits);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000));
  }
  bits += 0xfff + (bits >> 13 & 1);
  return static_cast<uint16_t>(sign | (bits - 0x38000000) >> 13);
}

TERNARY_INLINE Float16 multiply_add(Float16 a, Float16 b, Float16 c) { return a * b + c; }

}  // namespace
}  // namespace ternary

#include "attention.inc"
#include "table.inc"

namespace ternary {
const Kernels& scalar_kernels() {
  static constexpr Kernels table = make_table_of(kScalar);
  return table;
}
}  // namespace ternary
