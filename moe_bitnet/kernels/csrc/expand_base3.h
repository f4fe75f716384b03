// Base-3 lines to 2-bit lines without a table: comparisons and subtractions of bytes, which every compiler vectorizes.
// Included by the units that have no byte permutation across 128 entries.

#include "kernels.h"

namespace ternary {
namespace {

// Takes the digit of place value kPlace off every byte.
template <int kPlace>
inline void take_digit(uint8_t* rest, uint8_t* digit) {
  for (int i = 0; i < kLineBytes; ++i) {
    const uint8_t count = static_cast<uint8_t>((rest[i] >= kPlace) + (rest[i] >= 2 * kPlace));
    rest[i] = static_cast<uint8_t>(rest[i] - count * kPlace);
    digit[i] = count;
  }
}

void expand_base3(const uint8_t* lines, int64_t num_quads, uint8_t* two_bit_lines) {
  for (int64_t g = 0; g < num_quads / kQuadsPerGroup; ++g) {
    uint8_t* fifth = two_bit_lines + 4 * kLineBytes;
    for (int i = 0; i < kLineBytes; ++i) fifth[i] = 0;
    for (int j = 0; j < kLinesPerGroup; ++j) {
      uint8_t rest[kLineBytes], digits[4][kLineBytes];
      for (int i = 0; i < kLineBytes; ++i) rest[i] = lines[j * kLineBytes + i];
      take_digit<81>(rest, digits[0]);
      for (int i = 0; i < kLineBytes; ++i) fifth[i] = static_cast<uint8_t>(fifth[i] | digits[0][i] << 2 * j);
      take_digit<27>(rest, digits[3]);
      take_digit<9>(rest, digits[2]);
      take_digit<3>(rest, digits[1]);
      for (int i = 0; i < kLineBytes; ++i)
        two_bit_lines[j * kLineBytes + i] =
            static_cast<uint8_t>(rest[i] | digits[1][i] << 2 | digits[2][i] << 4 | digits[3][i] << 6);
    }
    lines += kLinesPerGroup * kLineBytes;
    two_bit_lines += kQuadsPerGroup * kLineBytes;
  }
}

// Sums of a base-3 block: a few groups at a time become 2-bit lines in L1, then the unit's add_two_bit takes them.
template <class AddTwoBit>
inline void dot_base3_by_expansion(const uint8_t* lines, int64_t num_quads, const int8_t* columns, int num_columns,
                                   int32_t* sums, AddTwoBit add_two_bit) {
  constexpr int64_t kGroups = 16;
  alignas(64) uint8_t two_bit[kGroups * kQuadsPerGroup * kLineBytes];
  for (int i = 0; i < num_columns * kRowsPerBlock; ++i) sums[i] = 0;
  const int64_t num_groups = num_quads / kQuadsPerGroup;
  for (int64_t g = 0; g < num_groups; g += kGroups) {
    const int64_t quads = (num_groups - g < kGroups ? num_groups - g : kGroups) * kQuadsPerGroup;
    expand_base3(lines + g * kLinesPerGroup * kLineBytes, quads, two_bit);
    add_two_bit(two_bit, quads, columns + g * kQuadsPerGroup * num_columns * kQuad, num_columns, sums);
  }
}

}  // namespace
}  // namespace ternary
