// std::mutex and its condition variable with clang's thread-safety attributes, so that a field that
// says which lock guards it is checked at compile time (-Wthread-safety; other compilers ignore the
// attributes). No callback, log, RPC or driver call is made while one of these is held.
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>

#include "daemon/base/units.h"

#if defined(__clang__)
#define KVFERRY_THREAD_ANNOTATION(x) __attribute__((x))
#else
#define KVFERRY_THREAD_ANNOTATION(x)
#endif

#define KVFERRY_CAPABILITY(name) KVFERRY_THREAD_ANNOTATION(capability(name))
#define KVFERRY_SCOPED_CAPABILITY KVFERRY_THREAD_ANNOTATION(scoped_lockable)
// On a field: read and written only under the lock.
#define KVFERRY_GUARDED_BY(lock) KVFERRY_THREAD_ANNOTATION(guarded_by(lock))
// On a function: the caller holds the lock ...
#define KVFERRY_REQUIRES(...) KVFERRY_THREAD_ANNOTATION(requires_capability(__VA_ARGS__))
// ... or must not hold it.
#define KVFERRY_EXCLUDES(...) KVFERRY_THREAD_ANNOTATION(locks_excluded(__VA_ARGS__))
#define KVFERRY_ACQUIRE(...) KVFERRY_THREAD_ANNOTATION(acquire_capability(__VA_ARGS__))
#define KVFERRY_RELEASE(...) KVFERRY_THREAD_ANNOTATION(release_capability(__VA_ARGS__))
#define KVFERRY_NO_THREAD_SAFETY_ANALYSIS KVFERRY_THREAD_ANNOTATION(no_thread_safety_analysis)

namespace kvferry {

class KVFERRY_CAPABILITY("mutex") Mutex {
 public:
  Mutex() = default;
  Mutex(const Mutex&) = delete;
  Mutex& operator=(const Mutex&) = delete;

  void lock() KVFERRY_ACQUIRE() { mutex_.lock(); }
  void unlock() KVFERRY_RELEASE() { mutex_.unlock(); }

 private:
  friend class CondVar;
  std::mutex mutex_;
};

// Holds the lock for its scope.
class KVFERRY_SCOPED_CAPABILITY MutexLock {
 public:
  explicit MutexLock(Mutex& mutex) KVFERRY_ACQUIRE(mutex) : mutex_(mutex) { mutex_.lock(); }
  ~MutexLock() KVFERRY_RELEASE() { mutex_.unlock(); }
  MutexLock(const MutexLock&) = delete;
  MutexLock& operator=(const MutexLock&) = delete;

 private:
  Mutex& mutex_;
};

// Waits are for a condition that the caller checks in a loop: a wake-up alone means nothing.
class CondVar {
 public:
  void notify_one() { cv_.notify_one(); }
  void notify_all() { cv_.notify_all(); }

  // Blocks until woken. For threads that somebody is certain to wake, e.g. on close.
  void wait(Mutex& mutex) KVFERRY_REQUIRES(mutex) KVFERRY_NO_THREAD_SAFETY_ANALYSIS {
    std::unique_lock<std::mutex> lock(mutex.mutex_, std::adopt_lock);
    cv_.wait(lock);
    lock.release();
  }

  // Blocks until woken or until `deadline` on the monotonic clock; false once it has passed.
  // Time::never() waits without one.
  bool wait_until(Mutex& mutex, Time deadline)
      KVFERRY_REQUIRES(mutex) KVFERRY_NO_THREAD_SAFETY_ANALYSIS {
    if (deadline == Time::never()) {
      wait(mutex);
      return true;
    }
    std::unique_lock<std::mutex> lock(mutex.mutex_, std::adopt_lock);
    const std::chrono::steady_clock::time_point until{
        std::chrono::duration_cast<std::chrono::steady_clock::duration>(Duration(deadline.ns))};
    const bool in_time = cv_.wait_until(lock, until) == std::cv_status::no_timeout;
    lock.release();
    return in_time;
  }

 private:
  std::condition_variable cv_;
};

}  // namespace kvferry
