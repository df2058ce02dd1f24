#include "daemon/engine/timers.h"

namespace kvferry::engine {

void Timers::set(TimerKey key, Time at) {
  cancel(key);
  if (at == Time::never()) return;
  const Due due{at, ++last_order_};
  by_key_.emplace(key, due);
  by_time_.emplace(due, key);
}

void Timers::cancel(TimerKey key) {
  const auto it = by_key_.find(key);
  if (it == by_key_.end()) return;
  by_time_.erase(it->second);
  by_key_.erase(it);
}

Time Timers::next() const {
  return by_time_.empty() ? Time::never() : by_time_.begin()->first.at;
}

std::optional<TimerKey> Timers::pop_due(Time now) {
  if (by_time_.empty() || by_time_.begin()->first.at > now) return std::nullopt;
  const TimerKey key = by_time_.begin()->second;
  by_time_.erase(by_time_.begin());
  by_key_.erase(key);
  return key;
}

}  // namespace kvferry::engine
