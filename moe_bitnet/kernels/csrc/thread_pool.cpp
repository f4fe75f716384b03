#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ternary {
namespace {

constexpr int kMaxThreads = 256;
// A ticket is the number of a call and how many threads it has, read in one piece.
constexpr uint32_t kTicketsPerCall = 512;
constexpr int kSpinsBeforeYield = 4096;
// Between two tokens of a generation lie some 50 us of Python; a sleeping worker takes longer than that to wake.
constexpr std::chrono::microseconds kSpinBeforeSleep{200};

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void run_alone(TeamBody body, void* context) {
  Team team(1);
  Worker caller(team, 0);
  body(context, caller);
}

class Pool {
 public:
  void run(int num_threads, TeamBody body, void* context) {
    std::unique_lock<std::mutex> lock(in_use_, std::try_to_lock);
    num_threads = std::min(num_threads, kMaxThreads);
    if (num_threads <= 1 || !lock.owns_lock()) {
      run_alone(body, context);
      return;
    }
    num_threads = std::min(num_threads, start_workers(num_threads - 1) + 1);
    Team team(num_threads);
    team_ = &team;
    body_ = body;
    context_ = context;
    num_running_.store(num_threads - 1, std::memory_order_relaxed);
    const uint32_t call = ticket_.load(std::memory_order_relaxed) / kTicketsPerCall + 1;
    ticket_.store(call * kTicketsPerCall + static_cast<uint32_t>(num_threads), std::memory_order_release);
    ticket_.notify_all();
    Worker caller(team, 0);
    body(context, caller);
    for (int spins = 0; num_running_.load(std::memory_order_acquire) != 0; ++spins) {
      if (spins < kSpinsBeforeYield) {
        pause();
      } else {
        sched_yield();
      }
    }
  }

 private:
  // Starts workers until there are so many, or until the system gives no more; returns how many there are.
  int start_workers(int wanted) {
    try {
      for (; num_workers_ < wanted; ++num_workers_) {
        const int index = num_workers_ + 1;
        // a worker sleeps when it has nothing to do and ends with the process
        std::thread([this, index, seen = ticket_.load()] { work(index, seen); }).detach();
      }
    } catch (const std::system_error&) {
    }
    return num_workers_;
  }

  void work(int index, uint32_t seen) {
    for (;;) {
      wait_for_ticket(seen);
      seen = ticket_.load(std::memory_order_acquire);
      // A call that counts this worker in cannot end without it, so the fields below are that call's.
      if (static_cast<uint32_t>(index) >= seen % kTicketsPerCall) continue;
      Worker worker(*team_, index);
      body_(context_, worker);
      num_running_.fetch_sub(1, std::memory_order_release);
    }
  }

  void wait_for_ticket(uint32_t seen) const {
    const auto sleep_at = std::chrono::steady_clock::now() + kSpinBeforeSleep;
    for (int spins = 0; ticket_.load(std::memory_order_acquire) == seen; ++spins) {
      pause();
      if (spins % 64 == 63 && std::chrono::steady_clock::now() > sleep_at) {
        ticket_.wait(seen, std::memory_order_acquire);
        return;
      }
    }
  }

  std::mutex in_use_;
  int num_workers_ = 0;
  std::atomic<uint32_t> ticket_{0};
  std::atomic<int> num_running_{0};
  Team* team_ = nullptr;
  TeamBody body_ = nullptr;
  void* context_ = nullptr;
};

std::atomic<Pool*> pool{nullptr};
std::once_flag fork_handler;

// A child of fork() has none of its parent's threads and starts a pool of its own. The old one is left as it is.
void forget_pool() { pool.store(nullptr); }

Pool& current_pool() {
  std::call_once(fork_handler, [] { pthread_atfork(nullptr, nullptr, forget_pool); });
  Pool* existing = pool.load(std::memory_order_acquire);
  if (!existing) {
    Pool* fresh = new Pool;  // lives as long as the process: its workers may outlast static destructors
    if (pool.compare_exchange_strong(existing, fresh)) return *fresh;
    delete fresh;
  }
  return *existing;
}

}  // namespace

void Team::wait_for_all() {
  if (num_threads_ == 1) return;
  const uint32_t generation = generation_.load(std::memory_order_relaxed);
  if (num_arrived_.fetch_add(1, std::memory_order_acq_rel) == num_threads_ - 1) {
    num_arrived_.store(0, std::memory_order_relaxed);
    next_piece_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
    if (spins < kSpinsBeforeYield) {
      pause();
    } else {
      sched_yield();  // the other thread may be waiting for this core
    }
  }
}

void run_team(int num_threads, TeamBody body, void* context) {
  if (num_threads <= 1) {
    run_alone(body, context);
    return;
  }
  current_pool().run(num_threads, body, context);
}

}  // namespace ternary
