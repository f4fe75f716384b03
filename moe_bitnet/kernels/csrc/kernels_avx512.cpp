// AVX-512 with VNNI and VBMI.
//
// No field of a packed byte is ever shifted: `line & (3 << 2p)` holds the codes of row group p times 4^p, the integer
// dot product multiplies that as it is, and the finished sum is shifted once. The largest sum, 2 * 64 * 128 * 131071
// inputs, stays within int32. So a line of 256 weights costs four ANDs beside its four dot products a column, and the
// two units that do dot products never wait: the full peak from two columns on.

#if defined(__x86_64__)

#include <immintrin.h>

#include "attention.h"
#include "vector_math.h"

namespace ternary {
namespace {

struct Masks {
  alignas(64) uint8_t bytes[4][64];
};

constexpr Masks make_masks() {
  Masks masks{};
  for (int p = 0; p < 4; ++p)
    for (int i = 0; i < 64; ++i) masks.bytes[p][i] = static_cast<uint8_t>(3 << (2 * p));
  return masks;
}

constexpr Masks kMasks = make_masks();

struct Table {
  alignas(64) uint8_t bytes[128];
};

// Four base-3 digits (0 ... 80) to four 2-bit fields.
constexpr Table make_table() {
  Table table{};
  for (int value = 0; value < 81; ++value)
    table.bytes[value] =
        static_cast<uint8_t>(value % 3 | value / 3 % 3 << 2 | value / 9 % 3 << 4 | value / 27 % 3 << 6);
  return table;
}

constexpr Table kFieldsOfDigits = make_table();

// In assembly, because compilers hoist the masks into registers that the sums need, and then spill sums.
TERNARY_INLINE __m512i field(__m512i line, int p) {
  __m512i result;
  asm("vpandq %2, %1, %0" : "=v"(result) : "v"(line), "m"(*reinterpret_cast<const __m512i*>(kMasks.bytes[p])));
  return result;
}

// sum += dot products of four unsigned and four signed bytes in each lane
TERNARY_INLINE void dot(__m512i& sum, __m512i unsigned_bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
}

TERNARY_INLINE __m512i load_line(const uint8_t* line) { return _mm512_loadu_si512(line); }

template <int kColumns>
TERNARY_INLINE void fetch(uintptr_t address) {
  // one column streams from memory into L1; several columns walk a block that waits in L2
  if constexpr (kColumns == 1) {
    _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T0);
  } else {
    _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T1);
  }
}

// One 2-bit line times one quad of every column.
template <int kColumns>
TERNARY_INLINE void multiply_line(__m512i line, const int32_t* quad, __m512i (&sums)[4][kColumns]) {
  __m512i fields[4];
  unroll<4>([&](auto p) TERNARY_LAMBDA { fields[p] = field(line, p); });
  unroll<kColumns>([&](auto c) TERNARY_LAMBDA {
    const __m512i x = _mm512_set1_epi32(quad[c]);
    unroll<4>([&](auto p) TERNARY_LAMBDA { dot(sums[p][c], fields[p], x); });
  });
}

template <int kColumns>
TERNARY_INLINE void store_sums(const __m512i (&sums)[4][kColumns], int32_t* output) {
  unroll<kColumns>([&](auto c) TERNARY_LAMBDA {
    unroll<4>([&](auto p) TERNARY_LAMBDA {
      _mm512_storeu_si512(output + c * kRowsPerBlock + p * 16, _mm512_srai_epi32(sums[p][c], 2 * p));
    });
  });
}

template <int kColumns>
void dot_two_bit_columns(const uint8_t* lines, int64_t num_quads, const int8_t* columns, int32_t* output,
                         Prefetch prefetch) {
  constexpr int kUnroll = kColumns == 1 ? 4 : kColumns == 2 ? 2 : 1;  // enough sums to hide the latency of dot
  __m512i sums[kUnroll][4][kColumns];
  unroll<kUnroll>([&](auto u) TERNARY_LAMBDA {
    unroll<4>([&](auto p) TERNARY_LAMBDA {
      unroll<kColumns>([&](auto c) TERNARY_LAMBDA { sums[u][p][c] = _mm512_setzero_si512(); });
    });
  });
  const int32_t* quads = reinterpret_cast<const int32_t*>(columns);
  int64_t q = 0;
  for (; q + kUnroll <= num_quads; q += kUnroll) {
    unroll<kUnroll>([&](auto u) TERNARY_LAMBDA {
      fetch<kColumns>(prefetch.address(q + u));
      multiply_line<kColumns>(load_line(lines + (q + u) * kLineBytes), quads + (q + u) * kColumns, sums[u]);
    });
  }
  for (; q < num_quads; ++q) multiply_line<kColumns>(load_line(lines + q * kLineBytes), quads + q * kColumns, sums[0]);
  unroll<kUnroll - 1>([&](auto u) TERNARY_LAMBDA {
    unroll<4>([&](auto p) TERNARY_LAMBDA {
      unroll<kColumns>([&](auto c)
                           TERNARY_LAMBDA { sums[0][p][c] = _mm512_add_epi32(sums[0][p][c], sums[u + 1][p][c]); });
    });
  });
  store_sums<kColumns>(sums[0], output);
}

// A base-3 line b = 81 d + r: r looks up four 2-bit fields; 81 d remains.
struct SplitLine {
  __m512i fields;
  __m512i rest;
};

TERNARY_INLINE SplitLine split(__m512i line, __m512i table_low, __m512i table_high) {
  const __m512i step = _mm512_set1_epi8(81);
  // subtracting 81 wraps around to a larger number exactly when there is no 81 left
  __m512i r = _mm512_min_epu8(line, _mm512_sub_epi8(line, step));
  r = _mm512_min_epu8(r, _mm512_sub_epi8(r, step));
  return {_mm512_permutex2var_epi8(table_low, r, table_high), _mm512_sub_epi8(line, r)};
}

// The 2-bit line of a group's fifth quad from what its four lines left. As bit fields 81 is 01 01 00 01 and
// 162 is 10 10 00 10, so three of the four digits stand in their places already.
TERNARY_INLINE __m512i fifth_line(const __m512i (&rest)[4]) {
  constexpr int kSelect = 0xca;  // mask ? b : c
  const __m512i mask0 = _mm512_set1_epi8(0x03), mask1 = _mm512_set1_epi8(0x0c), mask2 = _mm512_set1_epi8(0x30);
  const __m512i moved = _mm512_slli_epi16(rest[1], 2);
  __m512i line = _mm512_ternarylogic_epi64(mask2, rest[2], rest[3], kSelect);
  line = _mm512_ternarylogic_epi64(mask1, moved, line, kSelect);
  return _mm512_ternarylogic_epi64(mask0, rest[0], line, kSelect);
}

template <int kColumns>
void dot_base3_columns(const uint8_t* lines, int64_t num_quads, const int8_t* columns, int32_t* output,
                       Prefetch prefetch) {
  __m512i sums[4][kColumns];
  unroll<4>([&](auto p) TERNARY_LAMBDA {
    unroll<kColumns>([&](auto c) TERNARY_LAMBDA { sums[p][c] = _mm512_setzero_si512(); });
  });
  const __m512i low = load_line(kFieldsOfDigits.bytes), high = load_line(kFieldsOfDigits.bytes + 64);
  const int32_t* quads = reinterpret_cast<const int32_t*>(columns);
  const int64_t num_groups = num_quads / kQuadsPerGroup;
  for (int64_t g = 0; g < num_groups; ++g) {
    const uint8_t* group = lines + g * kLinesPerGroup * kLineBytes;
    const int32_t* group_quads = quads + g * kQuadsPerGroup * kColumns;
    __m512i rest[4];
    unroll<4>([&](auto j) TERNARY_LAMBDA {
      fetch<kColumns>(prefetch.address(g * kLinesPerGroup + j));
      const SplitLine parts = split(load_line(group + j * kLineBytes), low, high);
      rest[j] = parts.rest;
      multiply_line<kColumns>(parts.fields, group_quads + j * kColumns, sums);
    });
    multiply_line<kColumns>(fifth_line(rest), group_quads + 4 * kColumns, sums);
  }
  store_sums<kColumns>(sums, output);
}

// One column: what the lines leave (81 times the digit) is multiplied as it is and divided by 81 at the end.
void dot_base3_one(const uint8_t* lines, int64_t num_quads, const int8_t* columns, int32_t* output, Prefetch prefetch) {
  __m512i sums[2][4], rest_sums[4];
  unroll<4>([&](auto p) TERNARY_LAMBDA { sums[0][p] = sums[1][p] = rest_sums[p] = _mm512_setzero_si512(); });
  const __m512i low = load_line(kFieldsOfDigits.bytes), high = load_line(kFieldsOfDigits.bytes + 64);
  const int32_t* quads = reinterpret_cast<const int32_t*>(columns);
  const int64_t num_groups = num_quads / kQuadsPerGroup;
  for (int64_t g = 0; g < num_groups; ++g) {
    const uint8_t* group = lines + g * kLinesPerGroup * kLineBytes;
    const int32_t* group_quads = quads + g * kQuadsPerGroup;
    const __m512i fifth = _mm512_set1_epi32(group_quads[4]);
    unroll<4>([&](auto j) TERNARY_LAMBDA {
      fetch<1>(prefetch.address(g * kLinesPerGroup + j));
      const SplitLine parts = split(load_line(group + j * kLineBytes), low, high);
      const __m512i x = _mm512_set1_epi32(group_quads[j]);
      unroll<4>([&](auto p) TERNARY_LAMBDA { dot(sums[j % 2][p], field(parts.fields, p), x); });
      dot(rest_sums[j], parts.rest, fifth);
    });
  }
  // multiples of 81 are divided exactly by its inverse modulo 2^32
  constexpr uint32_t kInverseOf81 = 2014922929U;
  static_assert(kInverseOf81 * 81U == 1U);
  const __m512i inverse = _mm512_set1_epi32(static_cast<int32_t>(kInverseOf81));
  unroll<4>([&](auto p) TERNARY_LAMBDA {
    const __m512i sum = _mm512_srai_epi32(_mm512_add_epi32(sums[0][p], sums[1][p]), 2 * p);
    _mm512_storeu_si512(output + p * 16, _mm512_add_epi32(sum, _mm512_mullo_epi32(rest_sums[p], inverse)));
  });
}

void dot_two_bit(const uint8_t* lines, int64_t num_quads, const int8_t* columns, int num_columns, int32_t* sums,
                 Prefetch prefetch) {
  switch (num_columns) {
    case 1:
      return dot_two_bit_columns<1>(lines, num_quads, columns, sums, prefetch);
    case 2:
      return dot_two_bit_columns<2>(lines, num_quads, columns, sums, prefetch);
    case 3:
      return dot_two_bit_columns<3>(lines, num_quads, columns, sums, prefetch);
    case 4:
      return dot_two_bit_columns<4>(lines, num_quads, columns, sums, prefetch);
    case 5:
      return dot_two_bit_columns<5>(lines, num_quads, columns, sums, prefetch);
    default:
      return dot_two_bit_columns<6>(lines, num_quads, columns, sums, prefetch);
  }
}

void dot_base3(const uint8_t* lines, int64_t num_quads, const int8_t* columns, int num_columns, int32_t* sums,
               Prefetch prefetch) {
  switch (num_columns) {
    case 1:
      return dot_base3_one(lines, num_quads, columns, sums, prefetch);
    case 2:
      return dot_base3_columns<2>(lines, num_quads, columns, sums, prefetch);
    case 3:
      return dot_base3_columns<3>(lines, num_quads, columns, sums, prefetch);
    case 4:
      return dot_base3_columns<4>(lines, num_quads, columns, sums, prefetch);
    case 5:
      return dot_base3_columns<5>(lines, num_quads, columns, sums, prefetch);
    default:
      return dot_base3_columns<6>(lines, num_quads, columns, sums, prefetch);
  }
}

void expand_base3(const uint8_t* lines, int64_t num_quads, uint8_t* two_bit_lines) {
  const __m512i low = load_line(kFieldsOfDigits.bytes), high = load_line(kFieldsOfDigits.bytes + 64);
  for (int64_t g = 0; g < num_quads / kQuadsPerGroup; ++g) {
    const uint8_t* group = lines + g * kLinesPerGroup * kLineBytes;
    uint8_t* output = two_bit_lines + g * kQuadsPerGroup * kLineBytes;
    __m512i rest[4];
    unroll<4>([&](auto j) TERNARY_LAMBDA {
      const SplitLine parts = split(load_line(group + j * kLineBytes), low, high);
      rest[j] = parts.rest;
      _mm512_storeu_si512(output + j * kLineBytes, parts.fields);
    });
    _mm512_storeu_si512(output + 4 * kLineBytes, fifth_line(rest));
  }
}

// x as x + 128 is the unsigned operand; 128 times the row's sum is taken off again.
void head_int8(const int8_t* x_q, float x_scale, const int8_t* weight, const float* scale, const int32_t* row_sums,
               int64_t num_rows, int64_t count, float* output) {
  constexpr int kRows = 4;
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  for (int64_t row = 0; row < num_rows; row += kRows) {
    const int rows = static_cast<int>(num_rows - row < kRows ? num_rows - row : kRows);
    __m512i sums[kRows];
    const int8_t* starts[kRows];
    for (int r = 0; r < kRows; ++r) {
      sums[r] = _mm512_setzero_si512();
      starts[r] = weight + (row + (r < rows ? r : 0)) * count;
    }
    for (int64_t i = 0; i < count; i += 64) {
      const __mmask64 mask = count - i >= 64 ? ~0ULL : (1ULL << (count - i)) - 1;
      const __m512i x = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, x_q + i), flip);
      for (int r = 0; r < kRows; ++r) {
        _mm_prefetch(reinterpret_cast<const char*>(starts[r] + i + kRows * count), _MM_HINT_T0);
        sums[r] = _mm512_dpbusd_epi32(sums[r], x, _mm512_maskz_loadu_epi8(mask, starts[r] + i));
      }
    }
    for (int r = 0; r < rows; ++r) {
      const int32_t product = _mm512_reduce_add_epi32(sums[r]) - 128 * row_sums[row + r];
      output[row + r] = static_cast<float>(product) * (x_scale * scale[row + r]);
    }
  }
}

int64_t integer_peak(int64_t iterations) {
  __m512i sums[16];
  unroll<16>([&](auto i) TERNARY_LAMBDA { sums[i] = _mm512_setzero_si512(); });
  const __m512i a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(2);
  for (int64_t n = 0; n < iterations; ++n) unroll<16>([&](auto i) TERNARY_LAMBDA { dot(sums[i], a, b); });
  unroll<15>([&](auto i) TERNARY_LAMBDA { sums[0] = _mm512_add_epi32(sums[0], sums[i + 1]); });
  volatile int32_t keep = _mm512_reduce_add_epi32(sums[0]);
  (void)keep;
  return iterations * 16 * 64;
}

uint64_t read_bytes(const uint8_t* data, int64_t num_bytes) {
  __m512i folded[8];
  unroll<8>([&](auto i) TERNARY_LAMBDA { folded[i] = _mm512_setzero_si512(); });
  for (int64_t offset = 0; offset + 512 <= num_bytes; offset += 512) {
    unroll<8>([&](auto i) TERNARY_LAMBDA {
      _mm_prefetch(reinterpret_cast<const char*>(data + offset + i * 64 + 4096), _MM_HINT_T0);
      folded[i] = _mm512_xor_si512(folded[i], _mm512_loadu_si512(data + offset + i * 64));
    });
  }
  unroll<7>([&](auto i) TERNARY_LAMBDA { folded[0] = _mm512_xor_si512(folded[0], folded[i + 1]); });
  return static_cast<uint64_t>(_mm512_reduce_add_epi64(folded[0]));
}

TERNARY_INLINE Float16 half_to_float(const uint16_t* half) {
  return (Float16)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(half)));
}

TERNARY_INLINE uint16_t float_to_half(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }

TERNARY_INLINE Float16 multiply_add(Float16 a, Float16 b, Float16 c) {
  return (Float16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

}  // namespace
}  // namespace ternary

#include "attention.inc"
#include "table.inc"

namespace ternary {
const Kernels* avx512_kernels() {
  static constexpr Kernels table = make_table_of(kAvx512);
  return &table;
}
}  // namespace ternary

#else
#include "kernels.h"
namespace ternary {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace ternary
#endif
