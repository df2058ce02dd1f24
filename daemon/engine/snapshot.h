// What operators see of the engine: copies of its state, made on its thread.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "daemon/base/ids.h"
#include "daemon/base/reason.h"
#include "daemon/base/units.h"
#include "daemon/engine/commands.h"
#include "daemon/engine/timeline.h"

namespace kvferry::engine {

struct TransferView {
  WorkerId worker;
  uint64_t client_handle = 0;
  Role role = Role::kSender;
  std::string instance;
  std::string id;                  // as given; may hold any bytes
  std::string hash;                // short hash, safe to log; the same at sender and receiver
  std::vector<std::string> nodes;  // where its legs go to, as far as known; empty name: this one
  uint32_t rank = 0;
  TransferState state = TransferState::kOpen;
  Reason reason = Reason::kNone;
  bool released = false;
  bool memory_in_use = false;
  uint64_t bytes_done = 0;
  uint64_t bytes_total = 0;
  uint64_t fragments = 0;  // of this side's memory, of all slices that were compiled
  uint64_t chunks = 0;     // that arrived
  uint32_t legs = 0;
  uint32_t legs_ended = 0;
  Duration age{};
};

// One rank's part of a transfer, open or over.
struct TransferTrace {
  TransferView view;  // of one that is gone: as it was when it went
  Timeline timeline;
};

// All that is given must fit.
struct TraceQuery {
  struct Part {
    Role role = Role::kSender;
    WorkerId worker;
    uint64_t client_handle = 0;
    bool operator==(const Part&) const = default;
  };
  std::string hash;  // empty: any
  std::optional<Part> part;
  std::optional<std::string> node;  // a leg of it goes there
  std::size_t most = 256;           // of the answer
};

struct LaneView {
  uint32_t lane = 0;
  uint32_t epoch = 0;
  bool up = false;
  uint64_t rate = 0;           // of what this side sends, bytes a second; 0: not known
  uint64_t in_flight = 0;      // bytes of chunks that went out by it and are not acknowledged
  uint64_t arrived_bytes = 0;  // ... that are, in this epoch
};
struct LinkView {
  LinkId link;
  std::string node;
  BootId boot;
  bool initiator = false;
  std::vector<LaneView> lanes;
  uint64_t chunk_bytes = 0;
  uint32_t legs_out = 0;  // as sender
  uint32_t legs_in = 0;   // as receiver
  uint32_t parked = 0;
  std::vector<uint32_t> mapped;   // the peer's arenas that this daemon has mapped
  std::vector<uint32_t> lent_to;  // own arenas that the peer has mapped
  Duration silent_for{};
};

// Bytes by state; they add up to the arena's size.
struct ArenaView {
  uint64_t total_bytes = 0;
  uint64_t free_bytes = 0;
  uint64_t granted_bytes = 0;
  uint64_t landing_bytes = 0;
  uint64_t landed_bytes = 0;
  uint64_t scattering_bytes = 0;
  uint64_t quarantined_bytes = 0;
  uint64_t staging_bytes = 0;
  uint64_t reserved_bytes = 0;  // promised, used or not; not part of the sum
  uint32_t regions = 0;
  uint32_t quarantined_regions = 0;
  uint32_t segments = 0;
  bool mapped = false;  // lent to peers, for landing alone
};

// Quarantined regions of a mapped arena: the transfer has ended, and that life of a peer may still
// write them. A linked peer says so itself when it has ended (DRAINED); else only its process's end
// or an operator's word frees them.
struct LentView {
  uint32_t arena = 0;
  std::string node;
  BootId boot;
  bool linked = false;
  uint32_t regions = 0;
  uint64_t bytes = 0;
};

// A region that a peer may write by itself now (GRANTED or QUARANTINED); grant 0: none may.
struct Lent {
  uint64_t grant = 0;  // used once
  bool quarantined = false;
};

// A credit that is LIVE at its receiver, of a leg that is open, and has been told as far as a lane
// was there to tell it.
struct LiveCredit {
  LinkId link;
  PullId pull;
  CreditId credit;
};

struct EngineSnapshot {
  std::vector<TransferView> transfers;
  std::vector<LinkView> links;
  std::vector<ArenaView> arenas;  // as configured
  std::vector<LentView> lent;     // by arena, node and boot
  uint32_t workers = 0;
  uint32_t reservations = 0;  // in line or promised
  uint64_t packed_bytes = 0;  // of packed copies, made or promised
  uint32_t packed_copies = 0;
  uint64_t reuse_entries = 0;
  uint64_t reuse_pins = 0;
  bool draining = false;
};

// Why a message or offer had no effect; each is a counter.
enum class DropCause : uint8_t {
  kOldEpoch,
  kUnknownLink,
  kUnknownPull,
  kDuplicate,
  kProtocol,
  kProof,
  kLimit,
  kLate,
};
inline constexpr uint8_t kDropCauseCount = 8;

struct EngineStats {
  uint64_t dropped[kDropCauseCount] = {};
  uint64_t lane_downs = 0;
  uint64_t links_lost = 0;
  uint64_t resyncs = 0;
  uint64_t offers_sent = 0;
  uint64_t offers_accepted = 0;
  uint64_t offers_refused = 0;
  uint64_t offers_dropped = 0;  // without an answer: of what has ended, or is here
  uint64_t credits_granted = 0;
  uint64_t credits_ended = 0;  // granted and LIVE no more: used, withdrawn, or their leg has ended
  uint64_t credits_withdrawn = 0;
  uint64_t quarantines = 0;
  uint64_t chunks_gathered = 0;
  uint64_t chunks_ahead = 0;   // of those: begun without a credit in hand
  uint64_t chunks_shared = 0;  // staged without a gather, for another leg had the same ones there
  uint64_t chunks_acked = 0;
  uint64_t chunks_requeued = 0;  // offered, and their lane went down
  uint64_t chunks_landed = 0;
  uint64_t chunks_scattered = 0;
  uint64_t chunks_corrupt = 0;  // their check was wrong
  // Contiguous pieces of memory that slices were compiled to, before they became chunks.
  uint64_t fragments_sent = 0;
  uint64_t fragments_received = 0;
  uint64_t leases_expired = 0;  // sends whose pages were given back as nobody came
  uint64_t mapped_unused = 0;   // legs that could not land in the mapped arena of their layout
  uint64_t packed_made = 0;
  uint64_t packed_refused = 0;    // Sends, for want of room
  uint64_t chunks_local = 0;      // from page to page, of legs within this daemon
  uint64_t bytes_local = 0;       // ... and their bytes; of neither of the next two
  uint64_t chunks_written = 0;    // gathered straight into peers' regions
  uint64_t chunks_mapped = 0;     // received so
  uint64_t regions_drained = 0;   // quarantined ones that are free since a peer said DRAINED ...
  uint64_t regions_proven = 0;    // ... since its process was seen to end ...
  uint64_t regions_released = 0;  // ... since an operator said so
  uint64_t bytes_sent = 0;        // acknowledged by receivers
  uint64_t bytes_received = 0;    // scattered
  uint64_t reuse_commits = 0;
  uint64_t reuse_lookups = 0;      // by LookupReuse
  uint64_t reuse_lookup_hits = 0;  // groups of which it found something
  uint64_t reuse_withdrawn = 0;    // entries, by WithdrawReuse
  uint64_t reuse_evicted = 0;      // entries, for newer ones
  uint64_t reuse_blocks = 0;       // that receives had from the node
  uint64_t reuse_bytes = 0;        // copied for them
};

}  // namespace kvferry::engine
