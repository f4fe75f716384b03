// The float steps between integer products, written once for every instruction set.
//
// Included by kernels_*.cpp, each compiled with its own flags; everything is in an unnamed namespace. Vectors of 16
// floats are spelled in the compiler's own vector types, which it splits where registers are narrower. Sums run in the
// same order everywhere and nothing is contracted to a fused multiply-add, so all instruction sets give the same bits.

#include "kernels.h"
#include "vectors.h"

namespace ternary {
namespace {

typedef float Float16 __attribute__((vector_size(64)));
typedef int32_t Int16 __attribute__((vector_size(64)));
typedef float Float8 __attribute__((vector_size(32)));
typedef double Double8 __attribute__((vector_size(64)));
typedef int64_t Long8 __attribute__((vector_size(64)));
typedef int32_t Int8 __attribute__((vector_size(32)));
typedef int8_t Byte16 __attribute__((vector_size(16)));

constexpr int64_t kLanes = 16;

// Up to 16 floats, with zeros behind the last.
TERNARY_INLINE Float16 load_floats(const float* source, int64_t count) {
  if (count >= kLanes) return load<Float16>(source);
  float padded[kLanes] = {};
  std::memcpy(padded, source, static_cast<size_t>(count) * sizeof(float));
  return load<Float16>(padded);
}

TERNARY_INLINE void store_floats(float* target, Float16 vector, int64_t count) {
  if (count >= kLanes) return store(target, vector);
  float padded[kLanes];
  store(padded, vector);
  std::memcpy(target, padded, static_cast<size_t>(count) * sizeof(float));
}

TERNARY_INLINE Float16 broadcast(float value) { return Float16{} + value; }

TERNARY_INLINE Float16 absolute(Float16 x) { return (Float16)((Int16)x & 0x7fffffff); }

// A fixed tree, so that the sum of lanes does not depend on how wide registers are.
TERNARY_INLINE float sum_lanes(Float16 x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int width = 8; width >= 1; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

constexpr float kMinAbsmax = 1e-5F;
constexpr float kInt8Max = 127.0F;
// Adding and subtracting 1.5 * 2^23 rounds |value| < 2^22 half to even; values here are at most 127 in magnitude.
constexpr float kRoundingShift = 12582912.0F;

float row_absmax(const float* x, int64_t count) {
  Float16 largest = broadcast(kMinAbsmax);
  for (int64_t i = 0; i < count; i += kLanes) {
    const Float16 magnitude = absolute(load_floats(x + i, count - i));
    // a NaN differs from itself, so it is taken; nothing is larger than it, so it stays
    largest = (magnitude > largest) | (magnitude != magnitude) ? magnitude : largest;
  }
  float lanes[kLanes];
  store(lanes, largest);
  float absmax = kMinAbsmax;
  for (const float lane : lanes) absmax = lane > absmax || lane != lane ? lane : absmax;
  return absmax;
}

float quantize_row(const float* x, int64_t count, int8_t* x_q, int32_t* x_sum) {
  const float scale = row_absmax(x, count) / kInt8Max;
  if (x_sum) *x_sum = 0;
  if (!(scale <= 3.4028234663852886e38F)) {  // NaN or infinity: converting them to integers is undefined
    std::memset(x_q, 0, static_cast<size_t>(count));
    return scale;
  }
  Int16 sums{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Float16 rounded = (load_floats(x + i, count - i) / scale + kRoundingShift) - kRoundingShift;
    const Int16 integers = __builtin_convertvector(rounded, Int16);
    sums += integers;
    const Byte16 bytes = __builtin_convertvector(integers, Byte16);
    std::memcpy(x_q + i, &bytes, static_cast<size_t>(count - i < kLanes ? count - i : kLanes));
  }
  if (x_sum) {
    int32_t lanes[kLanes];
    store(lanes, sums);
    for (const int32_t lane : lanes) *x_sum += lane;
  }
  return scale;
}

// The factor is computed in double and rounded once: its float result does not depend on the order of the sum.
void rms_norm_row(const float* x, const float* weight, double eps, int64_t count, float* output) {
  Double8 low{}, high{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Float16 values = load_floats(x + i, count - i);
    float lanes[kLanes];
    store(lanes, values);
    const Double8 first = __builtin_convertvector(load<Float8>(lanes), Double8);
    const Double8 second = __builtin_convertvector(load<Float8>(lanes + 8), Double8);
    low += first * first;
    high += second * second;
  }
  low += high;
  double sum = 0;
  for (int i = 0; i < 8; ++i) sum += low[i];
  const float inverse = static_cast<float>(1.0 / __builtin_sqrt(sum / static_cast<double>(count) + eps));
  for (int64_t i = 0; i < count; i += kLanes) {
    Float16 values = load_floats(x + i, count - i) * inverse;
    if (weight) values *= load_floats(weight + i, count - i);
    store_floats(output + i, values, count - i);
  }
}

// exp in double, good to 2^-50: rounded to float afterwards it is the correctly rounded value but in rare near-ties.
TERNARY_INLINE Double8 exp_of(Double8 x) {
  constexpr double kLimit = 708.0;  // exp stays a normal number
  x = x < -kLimit ? Double8{} - kLimit : x;
  x = x > kLimit ? Double8{} + kLimit : x;
  constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52 rounds to the nearest integer
  const Double8 shifted = x * 1.4426950408889634 + kShift;
  const Double8 n = shifted - kShift;
  const Double8 r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  // Taylor to r^12, |r| <= ln(2) / 2, in pairs: a chain of twelve steps would keep the processor waiting
  const Double8 r2 = r * r, r4 = r2 * r2, r8 = r4 * r4;
  const Double8 low = (1.0 + r) + (0.5 + r * (1.0 / 6)) * r2;
  const Double8 middle = (1.0 / 24 + r * (1.0 / 120)) + (1.0 / 720 + r * (1.0 / 5040)) * r2;
  const Double8 high = (1.0 / 40320 + r * (1.0 / 362880)) + (1.0 / 3628800 + r * (1.0 / 39916800)) * r2;
  const Double8 series = low + middle * r4 + (high + r4 * (1.0 / 479001600)) * r8;
  const Long8 power = ((Long8)shifted - (Long8)(Double8{} + kShift) + 1023) << 52;
  return series * (Double8)power;
}

// Eight lanes at a time, so that no vector is put together from the halves that doubles come in.
TERNARY_INLINE Float8 gate_lanes(Float8 g, Float8 u, int32_t kind) {
  if (kind == 1) {
    const Float8 positive = g < 0.0F ? Float8{} : g;  // a NaN stays
    return positive * positive * u;
  }
  const Double8 sigmoid = 1.0 / (1.0 + exp_of(-__builtin_convertvector(g, Double8)));
  return g * __builtin_convertvector(sigmoid, Float8) * u;
}

void gate(const float* gate_values, const float* up, int64_t count, int32_t kind, float* output) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    store(output + i, gate_lanes(load<Float8>(gate_values + i), load<Float8>(up + i), kind));
  if (i == count) return;
  float lanes[3][8] = {};
  const size_t bytes = static_cast<size_t>(count - i) * sizeof(float);
  std::memcpy(lanes[0], gate_values + i, bytes);
  std::memcpy(lanes[1], up + i, bytes);
  store(lanes[2], gate_lanes(load<Float8>(lanes[0]), load<Float8>(lanes[1]), kind));
  std::memcpy(output + i, lanes[2], bytes);
}

void rescale(const int32_t* sums, int32_t column_sum, float scale, float* output) {
  for (int64_t i = 0; i < kRowsPerBlock; i += kLanes) {
    const Int16 products = load<Int16>(sums + i) - column_sum;
    store(output + i, __builtin_convertvector(products, Float16) * scale);
  }
}

int32_t sum_int8(const int8_t* x, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += x[i];
  return sum;
}

void add_scaled(const float* x, float weight, int64_t count, float* output) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Float16 sum = load_floats(output + i, count - i) + load_floats(x + i, count - i) * weight;
    store_floats(output + i, sum, count - i);
  }
}

float dot_float(const float* x, const float* y, int64_t count) {
  Float16 sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes)
    for (int j = 0; j < 2; ++j) sums[j] += load<Float16>(x + i + j * kLanes) * load<Float16>(y + i + j * kLanes);
  for (; i < count; i += kLanes) sums[0] += load_floats(x + i, count - i) * load_floats(y + i, count - i);
  return sum_lanes(sums[0] + sums[1]);
}

void head_float32(const float* x, const float* weight, int64_t num_rows, int64_t count, float* output) {
  for (int64_t row = 0; row < num_rows; ++row) output[row] = dot_float(x, weight + row * count, count);
}

void head_bfloat16(const float* x, const uint16_t* weight, int64_t num_rows, int64_t count, float* output) {
  for (int64_t row = 0; row < num_rows; ++row) {
    const uint16_t* w = weight + row * count;
    typedef uint16_t Short16 __attribute__((vector_size(32)));
    Float16 sums[2] = {};
    int64_t i = 0;
    for (; i + 2 * kLanes <= count; i += 2 * kLanes)
      for (int j = 0; j < 2; ++j) {
        __builtin_prefetch(w + i + j * kLanes + 2048);
        const Int16 bits = __builtin_convertvector(load<Short16>(w + i + j * kLanes), Int16) << 16;
        sums[j] += load<Float16>(x + i + j * kLanes) * (Float16)bits;
      }
    float sum = sum_lanes(sums[0] + sums[1]);
    for (; i < count; ++i) {
      const uint32_t bits = static_cast<uint32_t>(w[i]) << 16;
      float value;
      std::memcpy(&value, &bits, sizeof value);
      sum += x[i] * value;
    }
    output[row] = sum;
  }
}

}  // namespace
}  // namespace ternary
