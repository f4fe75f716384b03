// AVX2 with FMA and F16C, for x86 machines without AVX-512 VNNI.
//
// A product of a code (0, 1, 2) and an int8 pair fits 16 bits, so sums stay in 16 bits for a round of quads
// (VPMADDUBSW and VPADDW) and are widened at its end. Saturation cannot occur: 32 * 2 * 2 * 128 = 16384.

#if defined(__x86_64__)

#include <immintrin.h>

#include "attention.h"
#include "expand_base3.h"
#include "vector_math.h"

namespace ternary {
namespace {

constexpr int64_t kQuadsPerRound = 32;  // also with an invalid code 3: 32 * 2 * 3 * 128 < 2^15

// Half a line (8 rows of each of the four row groups) times one or two columns.
template <int kColumns>
TERNARY_INLINE void add_half(const uint8_t* lines, int64_t num_quads, const int8_t* columns, int num_columns,
                             int32_t* sums) {
  const __m256i code = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
  for (int64_t begin = 0; begin < num_quads; begin += kQuadsPerRound) {
    const int64_t end = begin + kQuadsPerRound < num_quads ? begin + kQuadsPerRound : num_quads;
    __m256i pairs[kColumns][4];
    for (int c = 0; c < kColumns; ++c)
      for (int p = 0; p < 4; ++p) pairs[c][p] = _mm256_setzero_si256();
    for (int64_t q = begin; q < end; ++q) {
      const __m256i line = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lines + q * kLineBytes));
      __m256i x[kColumns];
      for (int c = 0; c < kColumns; ++c) {
        int32_t quad;
        std::memcpy(&quad, columns + (q * num_columns + c) * kQuad, sizeof quad);
        x[c] = _mm256_set1_epi32(quad);
      }
      for (int p = 0; p < 4; ++p) {
        const __m256i codes = _mm256_and_si256(_mm256_srli_epi16(line, 2 * p), code);
        for (int c = 0; c < kColumns; ++c)
          pairs[c][p] = _mm256_add_epi16(pairs[c][p], _mm256_maddubs_epi16(codes, x[c]));
      }
    }
    for (int c = 0; c < kColumns; ++c)
      for (int p = 0; p < 4; ++p) {
        __m256i* target = reinterpret_cast<__m256i*>(sums + c * kRowsPerBlock + p * 16);
        const __m256i products = _mm256_madd_epi16(pairs[c][p], ones);
        _mm256_storeu_si256(target, _mm256_add_epi32(_mm256_loadu_si256(target), products));
      }
  }
}

void add_two_bit(const uint8_t* lines, int64_t num_quads, const int8_t* columns, int num_columns, int32_t* sums) {
  for (int half = 0; half < 2; ++half) {
    const uint8_t* half_lines = lines + half * 32;
    int32_t* half_sums = sums + half * 8;
    int c = 0;
    for (; c + 2 <= num_columns; c += 2)
      add_half<2>(half_lines, num_quads, columns + c * kQuad, num_columns, half_sums + c * kRowsPerBlock);
    if (c < num_columns)
      add_half<1>(half_lines, num_quads, columns + c * kQuad, num_columns, half_sums + c * kRowsPerBlock);
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
    const int8_t* w = weight + row * count;
    __m256i sums = _mm256_setzero_si256();
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
      const __m256i x16 = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x_q + i)));
      const __m256i w16 = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + i)));
      sums = _mm256_add_epi32(sums, _mm256_madd_epi16(x16, w16));
    }
    int32_t lanes[8], product = 0;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), sums);
    for (const int32_t lane : lanes) product += lane;
    for (; i < count; ++i) product += x_q[i] * w[i];
    output[row] = static_cast<float>(product) * (x_scale * scale[row]);
  }
}

int64_t integer_peak(int64_t iterations) {
  __m256i sums[12];
  for (__m256i& sum : sums) sum = _mm256_setzero_si256();
  __m256i a = _mm256_set1_epi8(1);
  const __m256i b = _mm256_set1_epi8(2);
  for (int64_t n = 0; n < iterations; ++n) {
    asm("" : "+x"(a));  // a new value, as far as the compiler knows: nothing moves out of the loop
    for (__m256i& sum : sums) sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b));
  }
  for (int i = 1; i < 12; ++i) sums[0] = _mm256_add_epi16(sums[0], sums[i]);
  volatile int32_t keep = _mm256_extract_epi32(sums[0], 0);
  (void)keep;
  return iterations * 12 * 32;
}

uint64_t read_bytes(const uint8_t* data, int64_t num_bytes) {
  __m256i folded[8];
  for (__m256i& fold : folded) fold = _mm256_setzero_si256();
  for (int64_t offset = 0; offset + 256 <= num_bytes; offset += 256)
    for (int i = 0; i < 8; ++i) {
      const uint8_t* address = data + offset + i * 32;
      if (i % 2 == 0) _mm_prefetch(reinterpret_cast<const char*>(address + 4096), _MM_HINT_T0);
      folded[i] = _mm256_xor_si256(folded[i], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(address)));
    }
  for (int i = 1; i < 8; ++i) folded[0] = _mm256_xor_si256(folded[0], folded[i]);
  return static_cast<uint64_t>(_mm256_extract_epi64(folded[0], 0) ^ _mm256_extract_epi64(folded[0], 1) ^
                               _mm256_extract_epi64(folded[0], 2) ^ _mm256_extract_epi64(folded[0], 3));
}

TERNARY_INLINE Float16 half_to_float(const uint16_t* half) {
  float values[kLanes];
  for (int i = 0; i < kLanes; i += 8)
    _mm256_storeu_ps(values + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half + i))));
  return load<Float16>(values);
}

TERNARY_INLINE uint16_t float_to_half(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }

TERNARY_INLINE Float16 multiply_add(Float16 a, Float16 b, Float16 c) {
  __m256 x[2], y[2], z[2];
  std::memcpy(x, &a, sizeof a);
  std::memcpy(y, &b, sizeof b);
  std::memcpy(z, &c, sizeof c);
  for (int i = 0; i < 2; ++i) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
  Float16 result;
  std::memcpy(&result, z, sizeof result);
  return result;
}

}  // namespace
}  // namespace ternary

#include "attention.inc"
#include "table.inc"

namespace ternary {
const Kernels* avx2_kernels() {
  static constexpr Kernels table = make_table_of(kAvx2);
  return &table;
}
}  // namespace ternary

#else
#include "kernels.h"
namespace ternary {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace ternary
#endif
