// What the machine gives, measured as the kernels use it: the denominators of every share that a benchmark prints.

#include <atomic>
#include <chrono>

#include "kernels.h"
#include "ternary.h"
#include "thread_pool.h"

namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

extern "C" double ternary_probe_read(const uint8_t* data, int64_t num_bytes, int32_t num_threads) {
  using namespace ternary;
  const Kernels& k = kernels();
  constexpr int64_t kPiece = 1 << 20;
  const auto start = std::chrono::steady_clock::now();
  run_team(num_threads, [&](Worker& worker) {
    uint64_t folded = 0;
    worker.for_each_piece(num_bytes, kPiece, [&](int64_t begin, int64_t end, int64_t) {
      folded ^= k.read_bytes(data + begin, end - begin);
    });
    volatile uint64_t keep = folded;
    (void)keep;
  });
  return seconds_since(start);
}

extern "C" double ternary_probe_peak(int64_t iterations, int64_t* num_multiply_adds, int32_t num_threads) {
  using namespace ternary;
  const Kernels& k = kernels();
  std::atomic<int64_t> total{0};
  const auto start = std::chrono::steady_clock::now();
  run_team(num_threads, [&](Worker&) { total += k.integer_peak(iterations); });
  *num_multiply_adds = total;
  return seconds_since(start);
}
