#include "daemon/node/trace_rules.h"

#include <algorithm>

namespace kvferry::node {
namespace {

// The longest that a peer is waited for.
constexpr Duration kPeerPatience = std::chrono::seconds(2);
// By how much a peer's clock may run otherwise than ours.
constexpr Duration kSlack = std::chrono::seconds(1);

}  // namespace

bool TraceBudget::take(const std::string& node, Time now) {
  MutexLock lock(mutex_);
  std::erase_if(paid_of_, [&](const auto& peer) { return peer.second <= now; });
  const auto it = paid_of_.find(node);
  const Time all = std::max(paid_, now) + kBetween;
  const Time own = (it == paid_of_.end() ? now : it->second) + kBetweenPerPeer;
  if (all - now > kAtOnce * kBetween || own - now > kAtOncePerPeer * kBetweenPerPeer) return false;
  paid_ = all;
  paid_of_[node] = own;
  return true;
}

std::size_t TraceBudget::peers() const {
  MutexLock lock(mutex_);
  return paid_of_.size();
}

Time peer_deadline(Time asked, Time deadline) {
  return std::min(asked + (deadline - asked) / 2, asked + kPeerPatience);
}

TraceWindow trace_window(Time begin, Time now, Duration kept, Duration longest) {
  return {begin + -(kept + 2 * longest), now + kSlack};
}

}  // namespace kvferry::node
