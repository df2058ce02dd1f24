// The engine's timers: a deterministic queue keyed by what each timer is for. Setting a key again
// moves it; two timers due at the same moment come in the order in which they were set.
#pragma once

#include <compare>
#include <cstdint>
#include <map>
#include <optional>

#include "daemon/base/units.h"

namespace kvferry::engine {

enum class TimerKind : uint8_t {
  kPing,             // a: link
  kLaneSilence,      // a: link, b: lane
  kLinkSilence,      // a: link
  kGap,              // a: link, b: lane
  kLaneRetry,        // a: link, b: lane
  kLease,            // a: send
  kSendDeadline,     // a: send
  kLegDeadline,      // a: sender leg
  kParked,           // a: link, b: pull
  kRemembered,       // a: what was remembered
  kWait,             // a: receive
  kReceiveDeadline,  // a: receive
  kReady,            // a: receive
  kLanding,          // a: region
  kClaimRenew,       // a: claim
  kClaimEnd,         // a: claim
  kDeclineEnd,       // a: decline
  kReusePin,         // a: pin
  kReservation,      // a: reservation
  kDrain,
};

struct TimerKey {
  TimerKind kind = TimerKind::kPing;
  uint64_t a = 0;
  uint64_t b = 0;
  auto operator<=>(const TimerKey&) const = default;
};

class Timers {
 public:
  void set(TimerKey key, Time at);
  void cancel(TimerKey key);
  bool pending(TimerKey key) const { return by_key_.contains(key); }
  // Time::never() if nothing is set.
  Time next() const;
  // Takes the first timer that is due at `now`.
  std::optional<TimerKey> pop_due(Time now);

 private:
  struct Due {
    Time at;
    uint64_t order = 0;
    auto operator<=>(const Due&) const = default;
  };
  std::map<TimerKey, Due> by_key_;
  std::map<Due, TimerKey> by_time_;
  uint64_t last_order_ = 0;
};

}  // namespace kvferry::engine
