// Memory made real before it is needed, in the idle time of the cores.
//
// The system provides memory when it is first written. In virtual machines that can take seconds per
// gigabyte, as the host has to find it too; a step on blocks that were never used would wait for it.
// Nor may a step wait for this: a system call of the lowest priority, too, keeps its core for a while.
#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

namespace slipstream {

inline std::atomic<int> at_work{0};  // calls that compute

struct AtWork {
  AtWork() { at_work.fetch_add(1, std::memory_order_relaxed); }
  ~AtWork() { at_work.fetch_sub(1, std::memory_order_relaxed); }
};

struct Span {
  char* start;
  int64_t bytes;
};

// Writes to every page of the spans, without changing it, from a thread of the lowest priority. All
// spans are gone through side by side from their beginnings, since low blocks are used first.
class Toucher {
 public:
  explicit Toucher(std::vector<Span> spans)
      : thread_([this, spans = std::move(spans)] { run(spans); }) {}

  ~Toucher() {
    stop_ = true;
    thread_.join();
  }

 private:
  static constexpr int64_t STRETCH = 2 << 20, PAGE = 4096;

  void run(const std::vector<Span>& spans) {
#ifdef SCHED_IDLE
    const sched_param none{};
    if (sched_setscheduler(0, SCHED_IDLE, &none)) return;  // it would compete with steps
    int64_t longest = 0;
    for (const Span& span : spans) longest = std::max(longest, span.bytes);
    for (int64_t from = 0; from < longest; from += STRETCH)
      for (const Span& span : spans)
        for (int64_t at = from; at < std::min(span.bytes, from + STRETCH); at += PAGE) {
          while (at_work.load(std::memory_order_relaxed) && !stop_)
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
          if (stop_) return;
          // Atomic, because a step may be writing the same word.
          __atomic_fetch_or(reinterpret_cast<uint32_t*>(span.start + at), 0, __ATOMIC_RELAXED);
        }
#endif
  }

  std::atomic<bool> stop_{false};
  std::thread thread_;  // last: it uses the rest
};

}  // namespace slipstream
