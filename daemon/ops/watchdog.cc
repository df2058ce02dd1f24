#include "daemon/ops/watchdog.h"

#include <utility>

namespace kvferry::ops {

Ticker& Watchdog::add(std::string name, Duration limit, Time now) {
  const MutexLock lock(mutex_);
  Ticker& ticker = tickers_.emplace_back();
  ticker.name_ = std::move(name);
  ticker.limit_ = limit;
  ticker.tick(now);
  return ticker;
}

std::vector<StaleTicker> Watchdog::stale(Time now) const {
  std::vector<StaleTicker> out;
  const MutexLock lock(mutex_);
  for (const Ticker& ticker : tickers_) {
    const Time last{ticker.last_ns_.load(std::memory_order_relaxed)};
    // A tick may have come after `now` was taken.
    if (last >= now) continue;
    if (now - last > ticker.limit_) out.push_back({ticker.name_, now - last});
  }
  return out;
}

}  // namespace kvferry::ops
