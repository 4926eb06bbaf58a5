// The threads of one parallel region, sharing out one phase of work after another.
//
// One region runs a whole forward pass: entering OpenMP regions, some two hundred times a step,
// would cost a small model more than its arithmetic. Work is taken item by item, so that on a busy
// machine the thread that keeps its core does more of it.
#pragma once

#include <atomic>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace slipstream {

class Team {
 public:
  explicit Team(int threads) : threads_(threads) {}

  int threads() const { return threads_; }

  // Every thread calls this with the same arguments; work(i) runs once for each i in [0, count).
  // Returns when all of it is done.
  template <class Work>
  void share(int count, Work&& work) {
    for (int i; (i = claim()) < count;) work(i);
    wait();
  }

  // The same for work(i, next) that prefetches what this thread does next (`count` or more: none), and
  // with last() at each thread's end.
  template <class Work, class Last>
  void share_ahead(int count, Work&& work, Last&& last) {
    for (int i = claim(), next; i < count; i = next) {
      next = claim();
      work(i, next);
    }
    last();
    wait();
  }

 private:
  int claim() { return next_.fetch_add(1, std::memory_order_relaxed); }

  // Spin for some tens of microseconds (the others are about to arrive), then sleep: a thread that
  // keeps spinning may hold the very core that a late one waits for.
  static constexpr int SPINS = 2000;

  void wait() {
    const int phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      phase_.notify_all();
      return;
    }
    for (int i = 0; i < SPINS; ++i) {
      if (phase_.load(std::memory_order_acquire) != phase) return;
#if defined(__x86_64__)
      _mm_pause();
#endif
    }
    phase_.wait(phase, std::memory_order_acquire);
  }

  const int threads_;
  alignas(64) std::atomic<int> next_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
};

}  // namespace slipstream
