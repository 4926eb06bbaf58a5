// The threads of one parallel region, sharing out one phase of work after another.
//
// One region runs a whole forward pass: entering OpenMP regions, some two hundred times a step,
// would cost a small model more than its arithmetic. Each thread has a run of the items and goes through it
// front to back, because a core reads fastest what lies side by side in memory. Whoever is done takes from
// the backs of others' runs: on a busy machine the thread that keeps its core does more. A phase ends when
// its items are done, whoever has come: a thread that has lost its core is waited for only if it has an
// item, and then gets another.
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

  // Every thread calls this with the same arguments; work(i) runs once for each i in [0, count).
  // Returns when all of it is done.
  template <class Work>
  void share(int count, Work&& work) {
    share_runs(count, [] {}, [&](int i, int) { work(i); }, [] {});
  }

  static constexpr int END = -1, UNKNOWN = -2;

  // The same for work(i, next), where `next` is what this thread does then, as far as it knows: i + 1,
  // END after the last of its own run, or UNKNOWN. A thread that gets work calls first() before and last()
  // after all of it; others may be late, and find memory that it reads in use for something else.
  template <class First, class Work, class Last>
  void share_runs(int count, First&& first, Work&& work, Last&& last) {
    if (count <= 0) return;
    const int thread = omp_get_thread_num();
    Seat& seat = seats_[thread];
    const uint32_t phase = seat.phase++;
    if (phase == 0) seat.peer.introduce();
    int done = 0;
    for (int i = 0; i < threads_; ++i) {
      const int owner = (thread + i) % threads_;
      const int begin = run_of(owner, count), size = run_of(owner + 1, count) - begin;
      for (int at; (at = take(seats_[owner].taken, phase, size, i == 0)) >= 0; ++done) {
        if (done == 0) {
          seat.peer.begin();
          seat.busy.store(true, std::memory_order_release);
          first();
        }
        work(begin + at, i > 0 ? UNKNOWN : at + 1 < size ? begin + at + 1 : END);
      }
    }
    if (done) {
      last();
      seat.busy.store(false, std::memory_order_relaxed);
      finish(phase, done, count);
    }
    wait(phase, seat);
  }

  // Where the calling thread's run of so many items begins.
  int own_run(int count) const { return run_of(omp_get_thread_num(), count); }

 private:
  struct alignas(64) Seat {
    uint32_t phase = 0;  // phases that the thread has begun
    std::atomic<bool> busy{false};
    Peer peer;
    alignas(64) std::atomic<uint64_t> taken{0};  // of the thread's run: see `take`
  };

  // Where a thread's run of so many items begins, and the one's before it ends.
  int run_of(int thread, int count) const {
    return static_cast<int>(int64_t{count} * thread / threads_);
  }

  // Takes an item from the front or back of a run: its place there, or -1. Of the run, `taken` counts those
  // taken from either end, for the last phase in which any was: 24 bits phase, 20 front, 20 back.
  static int take(std::atomic<uint64_t>& taken, uint32_t phase, int size, bool front) {
    constexpr uint64_t ONE = 1, MASK = (ONE << 20) - 1;
    uint64_t now = taken.load(std::memory_order_relaxed), then;
    int place;
    do {
      if (now >> 40 > phase) return -1;
      then = now >> 40 == phase ? now : uint64_t{phase} << 40;
      const int before = then >> 20 & MASK, behind = then & MASK;
      if (before + behind >= size) return -1;
      place = front ? before : size - 1 - behind;
      then += front ? ONE << 20 : ONE;
    } while (!taken.compare_exchange_weak(now, then, std::memory_order_relaxed));
    return place;
  }

  void finish(uint32_t phase, int items, int count) {
    if (done_.fetch_add(items, std::memory_order_acq_rel) + items < count) return;
    done_.store(0, std::memory_order_relaxed);
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
  alignas(64) std::atomic<int> done_{0};       // items of the phase
  alignas(64) std::atomic<uint32_t> phase_{0};
};

}  // namespace slipstream
