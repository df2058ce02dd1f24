// Notices a thread that stopped turning. Each thread ticks a counter of its own, more often than
// its limit even when idle; whoever asks for health reads them all.
//
// add() from any thread (a short lock); tick() wait-free by the thread watched; stale() from any
// thread. A Ticker lives as long as the Watchdog.
#pragma once

#include <atomic>
#include <deque>
#include <string>
#include <vector>

#include "daemon/base/mutex.h"
#include "daemon/base/units.h"

namespace kvferry::ops {

class Ticker {
 public:
  void tick(Time now) { last_ns_.store(now.ns, std::memory_order_relaxed); }
  // A thread that ends on purpose is watched no more.
  void retire() { last_ns_.store(Time::never().ns, std::memory_order_relaxed); }

 private:
  friend class Watchdog;
  std::string name_;
  Duration limit_{};
  std::atomic<int64_t> last_ns_{0};
};

struct StaleTicker {
  std::string name;
  Duration silent{};
};

class Watchdog {
 public:
  // Counts as ticked at `now`, so a thread has its limit to start in.
  Ticker& add(std::string name, Duration limit, Time now);
  // Those silent for longer than their limit.
  std::vector<StaleTicker> stale(Time now) const;

 private:
  mutable Mutex mutex_;
  std::deque<Ticker> tickers_ KVFERRY_GUARDED_BY(mutex_);  // addresses stay
};

}  // namespace kvferry::ops
