// Serves those who wait for regions of one kind, in turn, until nobody waits or nothing fits. Who
// is passed over too often because its size does not fit stops the others until it has its turn.
#pragma once

#include <optional>
#include <set>
#include <vector>

#include "daemon/engine/arena.h"
#include "daemon/engine/fair_queue.h"

namespace kvferry::engine {

// `may`: whether to go on; `size`: bytes that a key asks for; `take(key, bytes)`: a region of them,
// or nothing; `grant(key, region)` uses the region and may change the queue; `passed(key)`: another
// was served before it.
template <typename May, typename Size, typename Take, typename Grant, typename Passed>
void serve_in_turn(FairQueue& queue, Arena& arena, RegionKind kind, std::set<FairKey>& starving,
                   May&& may, Size&& size, Take&& take, Grant&& grant, Passed&& passed) {
  while (!queue.empty() && may() && !arena.exhausted(kind)) {
    std::optional<memory::Region> region;
    FairKey winner;
    uint64_t too_large = UINT64_MAX;  // this size and larger ones do not fit
    std::vector<FairKey> passed_over;
    const auto visit = [&](const FairKey& key) {
      const uint64_t bytes = size(key);
      if (bytes < too_large) region = take(key, bytes);
      if (region) {
        winner = key;
        return true;
      }
      too_large = bytes < too_large ? bytes : too_large;
      passed_over.push_back(key);
      return false;
    };
    if (starving.empty())
      queue.find_if(visit);
    else
      visit(*starving.begin());
    if (!region) return;
    queue.served(winner, size(winner));
    starving.erase(winner);
    for (const FairKey& key : passed_over) passed(key);
    grant(winner, *region);
  }
}

}  // namespace kvferry::engine
