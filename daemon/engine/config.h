// What the engine is built with. Every limit that keeps a wait or a table finite is here.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "daemon/base/ids.h"
#include "daemon/base/units.h"

namespace kvferry::engine {

// One group of segments; landing and staging share it under the floors, unless it is `mapped`.
struct ArenaConfig {
  std::vector<uint64_t> segment_bytes;
  // For landing alone: its regions are lent to peers that have mapped it and write them by load and
  // store. Nothing is staged in it and no layout names it. It holds at least one region of the
  // largest chunk.
  bool mapped = false;
  // The processor cannot read it, so nothing with a check lands in it.
  bool on_device = false;
};

struct EngineConfig {
  BootId boot;
  std::string node;  // own identity

  std::vector<ArenaConfig> arenas;  // 0: host memory; segments are numbered through, in this order
  uint64_t min_region_bytes = 64 * 1024;
  uint64_t chunk_bytes = 1 << 20;  // own cap; a link uses the smaller one
  uint32_t leg_credits = 8;
  uint32_t staged_ahead = 2;        // E: chunks gathered without a credit in hand, in each arena
  uint32_t starvation_passes = 64;  // passed over so often: newer grants stop
  // In millionths (shares.h): what may be held of an arena's regions of one kind while another
  // waits, by a worker or a tenant's workers together, and by what is of one peer.
  uint32_t worker_share = 500'000;
  uint32_t peer_share = 500'000;

  // Timers.
  Duration default_lease = std::chrono::seconds(30);
  Duration default_wait = std::chrono::seconds(30);
  Duration default_deadline = std::chrono::seconds(30);
  Duration max_deadline = std::chrono::minutes(10);  // longer ones are cut to it
  Duration ready_timeout = std::chrono::seconds(10);
  Duration ping_interval = std::chrono::seconds(1);
  Duration silence_limit = std::chrono::seconds(3);  // lane down; gap open; link dead
  Duration lane_retry_first = std::chrono::milliseconds(100);
  Duration lane_retry_most = std::chrono::seconds(2);
  Duration landing_timeout = std::chrono::seconds(10);
  uint64_t landing_min_rate = 10 * 1000 * 1000;  // bytes a second: longer for big chunks

  // Limits; beyond them is a protocol error or RESOURCE_EXHAUSTED.
  uint32_t max_held_messages = 256;  // behind a gap, each lane
  uint32_t max_parked_pulls = 1024;  // each link
  uint32_t max_tombstones = 65536;   // each link
  uint32_t max_legs = 4096;          // each link
  uint32_t max_slices = 65536;       // each pull
  uint32_t max_transfers_per_worker = 4096;
  uint32_t max_claims_per_worker = 4096;            // held at once: TOO_MANY_CLAIMS
  uint32_t max_declines_per_worker = 16384;         // remembered until no lane may lose them
  uint64_t max_packed_bytes = uint64_t{1} << 30;    // of packed copies: PACKED_MEMORY_FULL
  uint32_t max_packed_copies = 1 << 14;             // the same: each is a mapping of its own
  uint32_t max_reuse_entries = 1 << 20;             // beyond: REUSE_INDEX_FULL ...
  uint32_t max_reuse_entries_per_worker = 1 << 18;  // ... and the worker's oldest go first
  uint32_t reuse_copies = 8;                        // chunks copied at a time
  uint32_t local_copies = 8;                        // ... of legs within this daemon
  uint32_t mapped_gathers = 64;                     // ... into regions of peers
};

}  // namespace kvferry::engine
