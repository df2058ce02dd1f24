// What all runs of a process have seen together: a simulator that never meets a case proves nothing
// about it.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>

#include "daemon/base/reason.h"
#include "daemon/engine/snapshot.h"

namespace kvferry::sim {

struct Totals {
  uint64_t completed = 0;
  uint64_t delivered = 0;
  uint64_t resent_slices = 0;
  uint64_t early_receivers = 0;    // COMPLETED, asked before any Send
  uint64_t late_receivers = 0;     // COMPLETED, asked after every rank's first Send
  uint64_t several_receivers = 0;  // transfers that two receivers or more have COMPLETED
  uint64_t local_receivers = 0;    // COMPLETED, with all senders on their node
  uint64_t mixed_receivers = 0;    // ... with some of them there
  uint64_t claims = 0;
  uint64_t claims_kept = 0;   // ... followed by a Receive that COMPLETED
  uint64_t claims_again = 0;  // repeated calls, answered existing
  uint64_t declines = 0;
  uint64_t cancels = 0;  // of what had not ended
  uint64_t revokes = 0;
  uint64_t reservations = 0;
  uint64_t reuse_commits = 0;
  uint64_t packed_refused = 0;
  uint64_t needs_told = 0;
  uint64_t gathers_on_devices = 0;  // into another arena than host memory's
  uint64_t scatters_on_devices = 0;
  uint64_t asked_again = 0;           // looks at regions that a peer was to be linked again for
  uint64_t late_writes = 0;           // gathers into a peer's region that ended after its transfer
  uint64_t unmapped = 0;              // PeerUnmapped told
  uint64_t gathers_beside = 0;        // ... into another one than that of the send's pages
  uint64_t offers_on_slow_lanes = 0;  // ten times slower than the fastest may be
  uint64_t leaps = 0;                 // of a daemon's clock
  uint64_t credits_known = 0;         // LIVE ones that were looked for at their sender
  uint64_t hostile_transfers = 0;     // of honest workers with a hostile peer's
  uint64_t hostile_links = 0;
  uint64_t hostile_boots = 0;  // ... by a daemon's boot id
  uint64_t hostile_messages = 0;
  uint64_t hostile_offers = 0;
  uint64_t hostile_landings = 0;            // offers of it that were accepted
  uint64_t hostile_served = 0;              // offers made to it
  uint64_t hostile_gathers = 0;             // into what it lends
  uint64_t hostile_drained = 0;             // DRAINED told to it
  uint64_t hostile_writes = 0;              // into mapped regions, after their transfer's end too
  std::map<std::string, uint64_t> reasons;  // of ends that are no success
  engine::EngineStats engine{};

  void add(const engine::EngineStats& stats);
  void add(const Totals& run);
  void print() const;
  // The name of something that never happened; empty if all did.
  std::string missing() const;
};

}  // namespace kvferry::sim
