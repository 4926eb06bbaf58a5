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
    known_ = pthread_getcpuclockid(pthread_self(), &clock_) == 0;
  }

  // and this where it begins work that others may wait for.
  void begin() { core_.store(sched_getcpu(), std::memory_order_relaxed); }

  // Whether it has no core now: the time that it has computed does not grow.
  bool stands_still() const {
    timespec before, after;
    return known_ && clock_gettime(clock_, &before) == 0 && clock_gettime(clock_, &after) == 0 &&
           before.tv_nsec == after.tv_nsec && before.tv_sec == after.tv_sec;
  }

  // Exchanges cores with the calling thread. Where the two may run later stays as it was.
  void exchange_cores() {
    const int here = sched_getcpu(), there = core_.exchange(-1, std::memory_order_relaxed);
    if (there < 0) return;  // somebody else is doing it
    Allowed theirs(id_), mine(0);
    if (here != there && theirs.has(here) && mine.has(there)) {
      theirs.move(here);
      mine.move(there);
    }
    core_.store(here, std::memory_order_relaxed);
  }

 private:
  // The cores that a thread may run on.
  class Allowed {
   public:
    explicit Allowed(pid_t thread)
        : thread_(thread), known_(sched_getaffinity(thread, sizeof cores_, &cores_) == 0) {}

    bool has(int core) const {
      return known_ && core >= 0 && core < CPU_SETSIZE && CPU_ISSET(core, &cores_);
    }

    void move(int core) const {
      cpu_set_t only;
      CPU_ZERO(&only);
      CPU_SET(core, &only);
      if (sched_setaffinity(thread_, sizeof only, &only) == 0)
        sched_setaffinity(thread_, sizeof cores_, &cores_);
    }

   private:
    const pid_t thread_;
    cpu_set_t cores_;
    const bool known_;
  };

  pid_t id_ = 0;
  clockid_t clock_{};
  bool known_ = false;
  std::atomic<int> core_{-1};
};

#else

class Peer {
 public:
  void introduce() {}
  void begin() {}
  bool stands_still() const { return true; }
  void exchange_cores() {}
};

#endif

}  // namespace slipstream
