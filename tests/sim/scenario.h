// What one seed means: the shape of the world, how much goes wrong in it, and what is asked of it.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "daemon/base/units.h"
#include "daemon/engine/config.h"
#include "daemon/engine/messages.h"

namespace kvferry::sim {

enum class Profile : uint8_t {
  kClean,   // nothing goes wrong: everything must complete
  kLossy,   // lanes break, messages vanish; no side gives up: everything must still complete
  kTiny,    // as kLossy with the smallest arenas allowed and many competing transfers
  kRevoke,  // as kLossy with slices that are taken back and sent again
  kEnds,    // cancels, declines, claims, late and missing counterparts, several receivers
  kChaos,   // all of the above, and workers, rails processes and daemons that die
};
inline constexpr uint32_t kProfileCount = 6;

std::string_view name_of(Profile profile);
std::optional<Profile> profile_named(std::string_view name);

// Rates are in thousandths.
struct Faults {
  Duration until{};          // from the start; then the world is well
  uint32_t lane_breaks = 0;  // in the whole run
  uint32_t break_landing =
      0;                   // of an accepted offer: its wire breaks while the data are on their way
  uint32_t ambush = 0;     // of a SLICE: overtaken by its Revoke over another lane (a few a run)
  uint32_t silent = 0;     // of a break: a side learns of it by silence only
  uint32_t vanish = 0;     // of a control message: lost while its lane stays up
  uint32_t duplicate = 0;  // of a control message
  uint32_t slow_message = 0;   // of a message: takes a hundred times as long
  uint32_t slow_copy = 0;      // of a copy
  uint32_t lost_in_break = 0;  // of what is in flight when a lane breaks
  uint32_t stalls = 0;         // a daemon that does not run for a while
  uint32_t leaps = 0;          // a daemon's clock that is much later at once
  uint32_t rails_deaths = 0;
  uint32_t worker_deaths = 0;
  uint32_t daemon_deaths = 0;
  uint32_t unregisters = 0;
  uint32_t drains = 0;
  uint32_t partitions = 0;
  uint32_t copy_failure = 0;  // of a copy
  uint32_t corruption = 0;    // of a piece of data on its way
  uint32_t stale_cards = 0;   // of a pull
};

// Of a transfer, in thousandths.
struct Habits {
  uint32_t cancel = 0;
  uint32_t revoke = 0;
  uint32_t open_first = 0;
  uint32_t claim = 0;
  uint32_t decline = 0;
  uint32_t missing_receiver = 0;
  uint32_t missing_sender = 0;
  uint32_t unfinished = 0;  // the sender never says which slice is the last
  uint32_t short_deadline = 0;
  uint32_t two_receivers = 0;
  uint32_t crowd = 0;  // one receiver more than there are places
  uint32_t unknown_group = 0;
  uint32_t wrong_secret = 0;
  uint32_t skewed = 0;       // both sides compile different streams
  uint32_t not_offered = 0;  // the sender leaves tokens out
  uint32_t late_condition = 0;
  uint32_t never_ready = 0;
  uint32_t repeat_call = 0;
  uint32_t impatient = 0;  // wait_for_arena off
  uint32_t reserve = 0;
  uint32_t packed = 0;
  uint32_t local = 0;  // sender and receiver have ranks on one node
  uint32_t reuse = 0;  // 0: layouts take no part in it
};

// A peer with an identity of its own that says whatever it likes (hostile.h).
struct HostilePeer {
  uint32_t acts = 0;       // things that it does; 0: there is none
  uint32_t transfers = 0;  // of honest workers with a worker of its own
  uint32_t manners = 0;    // of what it says, in thousandths: as a daemon would
  uint32_t floods = 0;     // of an act, in thousandths: hundreds of one kind at once
};

struct Scenario {
  uint64_t seed = 0;
  Profile profile = Profile::kClean;

  uint32_t nodes = 2;
  uint32_t lanes = 1;
  uint64_t chunk_bytes = 256;
  std::vector<std::vector<engine::ArenaConfig>> arenas;  // of each node
  uint32_t mapped = 0;  // of two daemons, in thousandths: one maps the other's mapped arenas
  uint32_t staged_ahead = 1;
  uint32_t leg_credits = 4;
  uint32_t max_credits = 64;
  engine::CheckKind check = engine::CheckKind::kNone;

  uint32_t groups = 1;
  uint32_t layers_per_group = 2;
  bool replicated = false;     // one unit that every rank holds
  bool fan_out = false;        // ... and instances have one rank or four: legs with equal streams
  bool data_parallel = false;  // instances have two dp groups
  bool spread = false;         // an instance's ranks stand on two nodes
  bool zero_tail = false;      // receivers clear what lies past the prompt's end
  bool weak_digests = false;   // all streams have one digest: it alone must not make them equal

  uint64_t packed_bytes = 0;   // that the engine may keep in packed copies
  uint64_t reuse_entries = 0;  // that the engine keeps of a worker
  uint32_t transfers = 8;
  Duration window{};  // transfers begin within it
  uint32_t max_tokens = 48;
  Faults faults;
  Habits habits;
  HostilePeer hostile;
  bool check_each_step = true;

  // Whether `from` maps what `to` lends, and whether it can see `to`'s process end.
  bool maps(uint32_t from, uint32_t to) const;
  bool one_host(uint32_t a, uint32_t b) const;
  // How many times longer data take on that lane than they might, 1, 2, 10 or 40, in both
  // directions. All 1 in half of all runs; in a quarter it changes as time goes by.
  uint32_t slowness(uint32_t a, uint32_t b, uint32_t lane, Time now) const;
  // Of that node; mapped ones come after them.
  uint32_t ordinary_arenas(uint32_t node) const;
  // For a layout of that worker: one of the node's mapped ones; none where there are none, and of
  // every fifth worker.
  std::optional<uint32_t> mapped_arena(uint32_t node, uint64_t worker) const;
};

// The scenario of a seed; `profile` absent: the seed says which.
Scenario make_scenario(uint64_t seed, std::optional<Profile> profile);

}  // namespace kvferry::sim
