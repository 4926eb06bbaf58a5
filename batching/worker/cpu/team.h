// The threads of one parallel region, sharing out one phase of work after another.
//
// One region runs a whole forward pass: entering OpenMP regions, some two hundred times a step,
// would cost a small model more than its arithmetic. Work is taken item by item, so that on a busy
// machine the thread that keeps its core does more of it. A phase ends when its items are done, whoever
// has come: a thread that has lost its core is waited for only if it has an item, and then gets another.
#pragma once

#include <omp.h>

#include <atomic>
#include <cstdint>
#include <memory>

#include "lend.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace slipstream {

class Team {
 public:
  explicit Team(int threads) : threads_(threads), seats_(new Seat[threads]) {}

  int threads() const { return threads_; }

  // Every thread calls this with the same arguments; work(i) runs once for each i in [0, count).
  // Returns when all of it is done.
  template <class Work>
  void share(int count, Work&& work) {
    share_ahead(count, [] {}, [&](int i, int) { work(i); }, [] {});
  }

  // The same for work(i, next) that prefetches what this thread does next (`count` or more: none). A
  // thread that gets work calls first() before and last() after all of it; others may be late, and find
  // memory that it reads in use for something else.
  template <class First, class Work, class Last>
  void share_ahead(int count, First&& first, Work&& work, Last&& last) {
    if (count <= 0) return;
    Seat& seat = seats_[omp_get_thread_num()];
    const uint32_t phase = seat.phase++;
    if (phase == 0) seat.peer.introduce();
    int done = 0;
    for (int i = claim(phase, count), next; i < count; i = next, ++done) {
      if (done == 0) {
        seat.peer.begin();
        seat.busy.store(true, std::memory_order_release);
        first();
      }
      next = claim(phase, count);
      work(i, next);
    }
    if (done > 0) {
      last();
      seat.busy.store(false, std::memory_order_relaxed);
      finish(phase, done, count);
    }
    wait(phase);
  }

 private:
  struct alignas(64) Seat {
    uint32_t phase = 0;  // phases that the thread has begun
    std::atomic<bool> busy{false};
    Peer peer;
  };

  int claim(uint32_t phase, int count) {
    uint64_t now = next_.load(std::memory_order_relaxed);
    do {
      if (now >> 32 != phase || static_cast<uint32_t>(now) >= static_cast<uint32_t>(count))
        return count;
    } while (!next_.compare_exchange_weak(now, now + 1, std::memory_order_relaxed));
    return static_cast<int>(static_cast<uint32_t>(now));
  }

  void finish(uint32_t phase, int items, int count) {
    if (done_.fetch_add(items, std::memory_order_acq_rel) + items < count) return;
    done_.store(0, std::memory_order_relaxed);
    next_.store(uint64_t{phase + 1} << 32, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    phase_.notify_all();
  }

  // Some tens of microseconds: the others are about to finish, or one has lost its core.
  static constexpr int SPINS = 2000;

  void wait(uint32_t phase) {
    for (;;) {
      for (int i = 0; i < SPINS; ++i) {
        if (phase_.load(std::memory_order_acquire) != phase) return;
#if defined(__x86_64__)
        _mm_pause();
#endif
      }
      if (lend()) phase_.wait(phase, std::memory_order_acquire);
    }
  }

  // Whether some thread that has work had no core. It has this one once the caller sleeps.
  bool lend() {
    for (int t = 0; t < threads_; ++t)
      if (seats_[t].busy.load(std::memory_order_acquire) && seats_[t].peer.stands_still()) {
        seats_[t].peer.exchange_cores();
        return true;
      }
    return false;
  }

  const int threads_;
  const std::unique_ptr<Seat[]> seats_;
  alignas(64) std::atomic<uint64_t> next_{0};  // phase, and the next of its items
  alignas(64) std::atomic<int> done_{0};       // items of the phase
  alignas(64) std::atomic<uint32_t> phase_{0};
};

}  // namespace slipstream
