// Which instruction set runs: the best that the machine has, or what MOE_BITNET_ISA names (scalar, avx2, avx512).

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "kernels.h"
#include "ternary.h"

namespace ternary {
namespace {

bool is_supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  switch (isa) {
    case kScalar:
      return true;
    case kAvx2:
      return avx2_kernels() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case kAvx512:
      return avx512_kernels() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
             __builtin_cpu_supports("avx512vnni");
  }
  return false;
#else
  return isa == kScalar;
#endif
}

const Kernels* table_of(Isa isa) {
  return isa == kAvx512 ? avx512_kernels() : isa == kAvx2 ? avx2_kernels() : &scalar_kernels();
}

const Kernels* choose() {
  constexpr Isa kBestFirst[] = {kAvx512, kAvx2, kScalar};
  constexpr const char* kNames[] = {"avx512", "avx2", "scalar"};
  const char* wanted = std::getenv("MOE_BITNET_ISA");
  for (int i = 0; i < 3; ++i) {
    const bool is_named = !wanted || !*wanted || std::strcmp(wanted, kNames[i]) == 0;
    if (is_named && is_supported(kBestFirst[i])) return table_of(kBestFirst[i]);
  }
  return nullptr;  // a name that is unknown or not supported here; ternary_isa() reports it
}

std::atomic<const Kernels*> current{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* table = current.load(std::memory_order_acquire);
  if (!table) {
    table = choose();
    if (!table) table = &scalar_kernels();
    current.store(table, std::memory_order_release);
  }
  return *table;
}

}  // namespace ternary

extern "C" int32_t ternary_isa() { return ternary::choose() ? ternary::kernels().isa : -1; }

extern "C" int32_t ternary_select_isa(int32_t isa) {
  if (isa < ternary::kScalar || isa > ternary::kAvx512 || !ternary::is_supported(static_cast<ternary::Isa>(isa)))
    return -1;
  ternary::current.store(ternary::table_of(static_cast<ternary::Isa>(isa)), std::memory_order_release);
  return isa;
}
