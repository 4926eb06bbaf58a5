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
    run_phase(count, [] {}, [&](int first, auto&& claim) {
      int done = 0;
      for (int i = first; i < count; i = claim(), ++done) work(i);
      return done;
    }, [] {});
  }

  // The same for work(i, next) that prefetches what this thread does next (`count` or more: none). A
  // thread that gets work calls first() before and last() after all of it; others may be late, and find
  // memory that it reads in use for something else.
  template <class First, class Work, class Last>
  void share_ahead(int count, First&& first, Work&& work, Last&& last) {
    run_phase(count, first, [&](int i, auto&& claim) {
      int done = 0;
      for (int next; i < count; i = next, ++done) {
        next = claim();
        work(i, next);
      }
      return done;
    }, last);
  }

 private:
  struct alignas(64) Seat {
    uint32_t phase = 0;  // phases that the thread has begun
    std::atomic<bool> busy{false};
    Peer peer;
  };

  // work(i, claim) does item i and all that claim() gives it, and returns how many these were.
  template <class First, class Work, class Last>
  void run_phase(int count, First&& first, Work&& work, Last&& last) {
    if (count <= 0) return;
    Seat& seat = seats_[omp_get_thread_num()];
    const uint32_t phase = seat.phase++;
    if (phase == 0) seat.peer.introduce();
    if (const int item = claim(phase, count); item < count) {
      seat.peer.begin();
      seat.busy.store(true, std::memory_order_release);
      first();
      const int done = work(item, [&] { return claim(phase, count); });
      last();
      seat.busy.store(false, std::memory_order_relaxed);
      finish(phase, done, count);
    }
    wait(phase, seat);
  }

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

  // The others are about to finish: spin, some ten microseconds at a time, and see whether one has lost
  // its core. Who spins for long takes cores, or a container's quota of them, from those that compute.
  static constexpr int SPINS = 2000, ROUNDS = 32;

  void wait(uint32_t phase, Seat& seat) {
    for (int round = 0; round < ROUNDS; ++round) {
      for (int i = 0; i < SPINS; ++i) {
        if (phase_.load(std::memory_order_acquire) != phase) return;
        pause();
      }
      if (lend(seat)) break;
    }
    phase_.wait(phase, std::memory_order_acquire);
  }

  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#endif
  }

  // Whether some thread that has work had no core, and has this one once the caller sleeps.
  bool lend(Seat& own) {
    for (int t = 0; t < threads_; ++t) {
      Seat& seat = seats_[t];
      if (seat.busy.load(std::memory_order_acquire) && seat.peer.stands_still() &&
          seat.peer.exchange_cores(own.peer))
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
