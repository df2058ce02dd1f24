// Serves those who wait for regions of one kind, in turn, until nobody waits or nothing fits. Who
// has his share (shares.h) comes after all that do not. Who is passed over too often because its
// size does not fit stops those behind it until it has its turn.
#pragma once

#include <optional>
#include <set>
#include <vector>

#include "daemon/engine/arena.h"
#include "daemon/engine/fair_queue.h"
#include "daemon/engine/shares.h"

namespace kvferry::engine {

// The shares of those who wait in one queue. Only what several wait for is shared: of a lone
// worker's legs none is beyond its worker's share.
class SharesOfWaiting {
 public:
  SharesOfWaiting(const Shares& shares, const FairQueue& queue) : shares_(shares), queue_(queue) {}

  // Nobody waits who could be another.
  bool alone() const { return queue_.tenants() < 2 && queue_.workers() < 2 && queue_.peers() < 2; }
  bool beyond(const Holder& holder, uint64_t bytes) const {
    return tenant_beyond(holder.tenant, bytes) || worker_beyond(holder.worker, bytes) ||
           (queue_.peers() > 1 && !shares_.peer_may(holder.peer, bytes));
  }
  // Calls visit(key), as FairQueue::find_if does, for those who would not be beyond their share.
  template <typename Holds, typename Size, typename Visit>
  bool find_if(Holds&& holds, Size&& size, Visit&& visit) const {
    return queue_.find_if(
        [&](const FairKey& key) { return !beyond(holds(key), size(key)) && visit(key); },
        [&](uint64_t tenant) { return tenant_beyond(tenant, 1); },
        [&](uint64_t worker) { return worker_beyond(worker, 1); });
  }

 private:
  bool tenant_beyond(uint64_t tenant, uint64_t bytes) const {
    return queue_.tenants() > 1 && !shares_.tenant_may(tenant, bytes);
  }
  bool worker_beyond(uint64_t worker, uint64_t bytes) const {
    return queue_.workers() > 1 && !shares_.worker_may(worker, bytes);
  }

  const Shares& shares_;
  const FairQueue& queue_;
};

// Calls visit(key) in turn, until it answers true, for all that come before the others: those
// within their shares, or everybody if there is none; of several that starve the first one alone.
// `size(key)`: bytes of the region that it would get.
template <typename Holds, typename Size, typename Visit>
void visit_in_turn(const FairQueue& queue, const Shares& shares, const std::set<FairKey>& starving,
                   Holds&& holds, Size&& size, Visit&& visit) {
  const SharesOfWaiting waiting(shares, queue);
  if (!waiting.alone()) {
    for (const FairKey& key : starving) {
      if (waiting.beyond(holds(key), size(key))) continue;
      visit(key);
      return;
    }
    bool any = false;
    waiting.find_if(holds, size, [&](const FairKey& key) {
      any = true;
      return visit(key);
    });
    if (any) return;
  }
  if (starving.empty())
    queue.find_if(visit);
  else
    visit(*starving.begin());
}

// `may`: whether to go on; `holds`: who holds what a key gets; `size`: bytes that a key asks for;
// `take(key, bytes)`: a region of them, or nothing; `grant(key, region)` uses the region and may
// change the queue; `passed(key)`: another was served before it.
template <typename May, typename Holds, typename Size, typename Take, typename Grant,
          typename Passed>
void serve_in_turn(FairQueue& queue, Arena& arena, RegionKind kind, const Shares& shares,
                   std::set<FairKey>& starving, May&& may, Holds&& holds, Size&& size, Take&& take,
                   Grant&& grant, Passed&& passed) {
  const auto region_size = [&](const FairKey& key) { return arena.region_bytes(size(key)); };
  while (!queue.empty() && may() && !arena.exhausted(kind)) {
    std::optional<memory::Region> region;
    FairKey winner;
    uint64_t too_large = UINT64_MAX;  // this size and larger ones do not fit
    std::vector<FairKey> passed_over;
    visit_in_turn(queue, shares, starving, holds, region_size, [&](const FairKey& key) {
      const uint64_t bytes = size(key);
      if (bytes < too_large) region = take(key, bytes);
      if (region) {
        winner = key;
        return true;
      }
      too_large = bytes < too_large ? bytes : too_large;
      passed_over.push_back(key);
      return false;
    });
    if (!region) return;
    queue.served(winner, size(winner));
    starving.erase(winner);
    for (const FairKey& key : passed_over) passed(key);
    grant(winner, *region);
  }
}

}  // namespace kvferry::engine
