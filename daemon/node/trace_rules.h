// Rules of traces between daemons: how many questions of peers are answered, how long peers are
// waited for, and which of their times are believed.
#pragma once

#include <map>
#include <string>

#include "daemon/base/mutex.h"
#include "daemon/base/units.h"

namespace kvferry::node {

// A look at all transfers on the engine's thread is no peer's to order as often as it likes: all
// together may ask so many times at once and then once in a while, and each of them less than that,
// so that one who asks without end leaves the others their share. Any thread.
class TraceBudget {
 public:
  static constexpr int kAtOnce = 16;
  static constexpr Duration kBetween = std::chrono::milliseconds(20);
  static constexpr int kAtOncePerPeer = 4;
  static constexpr Duration kBetweenPerPeer = std::chrono::milliseconds(200);

  // Whether that peer may be answered; a refusal costs nobody anything.
  bool take(const std::string& node, Time now);
  // Peers that have asked lately; what all may ask together bounds it.
  std::size_t peers() const;

 private:
  mutable Mutex mutex_;
  // Answers are paid for until then.
  Time paid_ KVFERRY_GUARDED_BY(mutex_){};
  std::map<std::string, Time> paid_of_ KVFERRY_GUARDED_BY(mutex_);
};

// Until when a peer is waited for that is asked at `asked`, for somebody who waits until
// `deadline`: half of that time at most, so that what is known here is told if the peer says
// nothing.
Time peer_deadline(Time asked, Time deadline);

// When a peer's steps of a transfer can have been.
struct TraceWindow {
  Time from;
  Time until;
  bool holds(Time first, Time last) const {
    return first >= from && first <= until && last >= from && last <= until;
  }
};
// `begin`: of the first step here; `kept`: how long closed transfers are known; `longest`: of all
// leases and deadlines, with which a peer's part may have begun before ours and ours be kept.
TraceWindow trace_window(Time begin, Time now, Duration kept, Duration longest);

}  // namespace kvferry::node
