// Giving one's core to a thread that has lost its own.
//
// When another process takes a core for some milliseconds, the thread that computed there holds work that
// all others soon wait for, while the system waits even longer before it moves a thread that has just run.
// So one that waits exchanges cores with it.
#pragma once

#include <atomic>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#endif

namespace slipstream {

#if defined(__linux__)

// A thread as others see it.
class Peer {
 public:
  // The thread itself calls this first,
  void introduce() {
    id_ = static_cast<pid_t>(syscall(SYS_gettid));
    known_ = pthread_getcpuclockid(pthread_self(), &clock_) == 0 &&
             sched_getaffinity(id_, sizeof allowed_, &allowed_) == 0;
  }

  // and this where it begins work that others may wait for.
  void begin() { core_.store(sched_getcpu(), std::memory_order_relaxed); }

  // Whether it has no core now, because the time that it has computed does not grow.
  bool stands_still() const {
    timespec before, after;
    return known_ && clock_gettime(clock_, &before) == 0 && clock_gettime(clock_, &after) == 0 &&
           before.tv_nsec == after.tv_nsec && before.tv_sec == after.tv_sec;
  }

  // Whether it has exchanged cores with `self`, the calling thread, which may be back only when it gets
  // its turn on the other core. Later both may run where they might when they were introduced.
  bool exchange_cores(const Peer& self) {
    const int here = sched_getcpu(), there = core_.exchange(-1, std::memory_order_relaxed);
    if (there < 0) return false;  // somebody else is doing it
    if (here == there || !self.known_ || !may_run(here) || !self.may_run(there) || !move(here)) {
      core_.store(there, std::memory_order_relaxed);
      return false;
    }
    self.move(there);
    core_.store(here, std::memory_order_relaxed);
    return true;
  }

 private:
  bool may_run(int core) const {
    return core >= 0 && core < CPU_SETSIZE && CPU_ISSET(core, &allowed_);
  }

  bool move(int core) const {
    cpu_set_t only;
    CPU_ZERO(&only);
    CPU_SET(core, &only);
    return sched_setaffinity(id_, sizeof only, &only) == 0 &&
           sched_setaffinity(id_, sizeof allowed_, &allowed_) == 0;
  }

  pid_t id_ = 0;
  clockid_t clock_{};
  cpu_set_t allowed_;
  bool known_ = false;
  std::atomic<int> core_{-1};
};

#else

class Peer {
 public:
  void introduce() {}
  void begin() {}
  bool stands_still() const { return false; }
  bool exchange_cores(const Peer&) { return false; }
};

#endif

}  // namespace slipstream
