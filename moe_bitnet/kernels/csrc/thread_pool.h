// Threads that compute one call together.
//
// A call names how many threads it wants (torch.get_num_threads()); the caller is one of them. Workers are started
// once, spin for a moment after a call, since the next one usually follows at once, and then sleep. If the pool is
// busy with another Python thread's call, a call runs on its own thread alone: never more threads than asked for.
#pragma once

#include <atomic>
#include <cstdint>

namespace ternary {

// What the threads of one call share.
class Team {
 public:
  explicit Team(int num_threads) : num_threads_(num_threads) {}

  int num_threads() const { return num_threads_; }
  // The next piece after those that threads begin with.
  int64_t claim_piece() { return num_threads_ + next_piece_.fetch_add(1, std::memory_order_relaxed); }
  void wait_for_all();

 private:
  const int num_threads_;
  alignas(64) std::atomic<int64_t> next_piece_{0};
  alignas(64) std::atomic<int32_t> num_arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
};

// One thread of a team.
class Worker {
 public:
  Worker(Team& team, int index) : team_(team), index_(index) {}

  int index() const { return index_; }
  int num_threads() const { return team_.num_threads(); }

  // Returns once every thread of the team has come here; what they wrote before is visible afterwards.
  void wait_for_all() { team_.wait_for_all(); }

  // Calls body(begin, end, next) for pieces of [0, count) until none is left, then waits for the others.
  //
  // A thread begins with the piece of its own index, so that it knows in advance what it will read first; the rest goes
  // to whoever is free, so that a thread that lost its core delays the call by one piece only. next is where the
  // thread's next piece begins (count if there is none): a stream from memory can go on there without a pause.
  template <class Body>
  void for_each_piece(int64_t count, int64_t piece, Body&& body) {
    if (num_threads() == 1) {
      if (count > 0) body(int64_t{0}, count, count);
      return;
    }
    for (int64_t begin = index_ * piece; begin < count;) {
      const int64_t claimed = team_.claim_piece() * piece, next = claimed < count ? claimed : count;
      body(begin, begin + piece < count ? begin + piece : count, next);
      begin = next;
    }
    wait_for_all();
  }

 private:
  Team& team_;
  const int index_;
};

using TeamBody = void (*)(void* context, Worker& worker);

// Runs body on up to num_threads threads, the caller included, and returns when all are done.
void run_team(int num_threads, TeamBody body, void* context);

// The same for a callable (Worker& worker).
template <class Body>
void run_team(int num_threads, Body&& body) {
  run_team(num_threads, [](void* context, Worker& worker) { (*static_cast<Body*>(context))(worker); }, &body);
}

// Pieces small enough that a late thread costs little, large enough that threads read long runs of memory.
inline int64_t piece_of(int64_t count, int num_threads) {
  const int64_t piece = count / (16 * static_cast<int64_t>(num_threads));
  return piece > 1 ? piece : 1;
}

// How many pieces a thread takes of a phase that multiplies. A single token in the fused decoder streams its weights
// from memory with nothing beside it: few long runs. Elsewhere other threads (torch's own, spinning after an operation)
// may hold a core: many pieces, so that a late thread costs little.
constexpr int64_t kPiecesOfStream = 2, kPiecesBesideOthers = 16;

inline int64_t piece_of_blocks(int64_t count, int num_threads, bool is_stream) {
  const int64_t piece = count / ((is_stream ? kPiecesOfStream : kPiecesBesideOthers) * num_threads);
  return piece > 1 ? piece : 1;
}

// Work of one element of a norm, quantization or activation in multiply-adds of an integer product.
constexpr int64_t kFloatStepWork = 64;

// Fewer threads where a call is so short that waking and meeting would cost more than they save.
inline int32_t useful_threads(int32_t num_threads, int64_t multiply_adds) {
  constexpr int64_t kWorthAThread = 1 << 20;  // about 2 us
  const int64_t useful = multiply_adds / kWorthAThread + 1;
  return useful < num_threads ? static_cast<int32_t>(useful) : num_threads > 1 ? num_threads : 1;
}

}  // namespace ternary
