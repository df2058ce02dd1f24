#include "tests/sim/scenario.h"

#include <algorithm>
#include <array>
#include <bit>

#include "tests/sim/rng.h"

namespace kvferry::sim {
namespace {

using std::chrono::milliseconds;

constexpr std::array<std::string_view, kProfileCount> kNames = {"clean",  "lossy", "tiny",
                                                                "revoke", "ends",  "chaos"};

// `regions` chunks as a few segments whose sizes are powers of two times the chunk.
std::vector<uint64_t> segments_of(uint64_t regions, uint64_t chunk_bytes) {
  std::vector<uint64_t> segments;
  while (regions != 0) {
    const uint64_t part = std::bit_floor(regions);
    segments.push_back(part * chunk_bytes);
    regions -= part;
  }
  return segments;
}

void lossy(Faults& faults, Rng& rng) {
  faults.lane_breaks = rng.pick(0, 8);
  faults.silent = rng.pick(0, 500);
  faults.break_landing = rng.chance(500) ? rng.pick(0, 60) : 0;
  faults.vanish = rng.chance(500) ? rng.pick(0, 15) : 0;
  faults.duplicate = rng.pick(0, 40);
  faults.slow_message = rng.pick(0, 60);
  faults.slow_copy = rng.pick(0, 150);
  faults.lost_in_break = rng.pick(200, 1000);
  faults.stalls = rng.pick(0, 3);
  faults.rails_deaths = rng.chance(200) ? 1 : 0;
}

void ends(Habits& habits, Rng& rng) {
  habits.cancel = rng.pick(0, 250);
  habits.open_first = rng.pick(0, 300);
  habits.claim = rng.pick(0, 300);
  habits.decline = rng.pick(0, 150);
  habits.missing_receiver = rng.pick(0, 100);
  habits.missing_sender = rng.pick(0, 100);
  habits.unfinished = rng.pick(0, 60);
  habits.short_deadline = rng.pick(0, 150);
  habits.two_receivers = rng.pick(0, 250);
  habits.crowd = rng.pick(0, 100);
  habits.unknown_group = rng.pick(0, 400);
  habits.wrong_secret = rng.pick(0, 60);
  habits.skewed = rng.pick(0, 60);
  habits.not_offered = rng.pick(0, 60);
  habits.late_condition = rng.pick(0, 300);
  habits.never_ready = rng.pick(0, 40);
  habits.repeat_call = rng.pick(0, 100);
  habits.impatient = rng.pick(0, 60);
}

void chaos(Faults& faults, Rng& rng) {
  faults.rails_deaths = rng.pick(0, 2);
  faults.worker_deaths = rng.pick(0, 2);
  faults.daemon_deaths = rng.pick(0, 2);
  faults.unregisters = rng.chance(200) ? 1 : 0;
  faults.drains = rng.chance(150) ? 1 : 0;
  faults.partitions = rng.chance(300) ? 1 : 0;
  faults.copy_failure = rng.chance(300) ? rng.pick(1, 10) : 0;
  faults.corruption = rng.chance(200) ? rng.pick(1, 10) : 0;
  faults.stale_cards = rng.chance(100) ? 20 : 0;
}

// Beside some arenas, in half of all seeds, mapped ones. Drawn apart from the rest.
void mapped(Scenario& s, bool tiny) {
  if (mix(s.seed ^ 0x3A99) % 2 != 0) return;
  s.mapped = 400 + static_cast<uint32_t>(mix(s.seed ^ 0x3A9A) % 601);
  for (uint32_t n = 0; n < s.nodes; ++n) {
    std::vector<engine::ArenaConfig>& arenas = s.arenas[n];
    const std::size_t ordinary = arenas.size();
    for (std::size_t i = 0; i < ordinary; ++i) {
      const uint64_t draw = mix(s.seed ^ mix(0x3A9B00 + 16 * n + i));
      if (draw % 4 == 0) continue;
      const uint64_t regions = 1 + (tiny ? draw / 4 % 3 : draw / 4 % 24);
      arenas.push_back({segments_of(regions, s.chunk_bytes), true});
    }
  }
}

// In a quarter of all seeds one peer more, an enemy. Drawn apart as well.
void hostile(Scenario& s) {
  if (mix(s.seed ^ 0x40571) % 4 != 0) return;
  s.hostile.acts = static_cast<uint32_t>(30 + mix(s.seed ^ 0x40572) % 470);
  s.hostile.transfers = static_cast<uint32_t>(mix(s.seed ^ 0x40573) % 6);
  // Who lies all the time loses its link at once.
  s.hostile.manners = static_cast<uint32_t>(mix(s.seed ^ 0x40576) % 1000);
  s.hostile.floods = static_cast<uint32_t>(mix(s.seed ^ 0x40574) % 60);
}

Profile profile_of(Rng& rng) {
  const uint64_t roll = rng.below(100);
  if (roll < 8) return Profile::kClean;
  if (roll < 28) return Profile::kLossy;
  if (roll < 45) return Profile::kTiny;
  if (roll < 58) return Profile::kRevoke;
  if (roll < 75) return Profile::kEnds;
  return Profile::kChaos;
}

}  // namespace

std::string_view name_of(Profile profile) {
  return kNames[static_cast<size_t>(profile)];
}

std::optional<Profile> profile_named(std::string_view name) {
  for (size_t i = 0; i < kNames.size(); ++i)
    if (kNames[i] == name) return static_cast<Profile>(i);
  return std::nullopt;
}

Scenario make_scenario(uint64_t seed, std::optional<Profile> wanted) {
  Rng rng(seed);
  Scenario s;
  s.seed = seed;
  const Profile by_seed = profile_of(rng);
  s.profile = wanted.value_or(by_seed);

  s.nodes = rng.chance(300) ? 3 : 2;
  s.lanes = rng.pick(1, 3);
  s.chunk_bytes = uint64_t{128} << rng.below(3);
  s.staged_ahead = rng.pick(0, 3);
  s.leg_credits = rng.pick(1, 8);
  s.max_credits = rng.chance(200) ? rng.pick(1, 4) : 64;
  const uint64_t kind = rng.below(3);
  s.check = kind == 0 ? engine::CheckKind::kNone : engine::CheckKind::kXxh3;
  const bool tiny =
      s.profile == Profile::kTiny || (s.profile != Profile::kClean && rng.chance(250));
  if (tiny) s.staged_ahead = rng.pick(0, 2);
  for (uint32_t n = 0; n < s.nodes; ++n) {
    const uint64_t least = uint64_t{s.staged_ahead} + 2;
    const uint64_t regions =
        tiny ? least + (rng.chance(600) ? 0 : rng.below(3)) : rng.between(8, 64);
    s.arenas.push_back({{segments_of(regions > least ? regions : least, s.chunk_bytes)}});
    const uint64_t more = mix(seed ^ (0xA4E4A + n)) % 3;
    for (uint64_t i = 0; i < more; ++i) {
      const uint64_t further = mix(seed ^ (0xA4E4A0 + 3 * n + i));
      const uint64_t above = tiny ? further % 3 : 1 + further % 24;
      s.arenas.back().push_back({segments_of(least + above, s.chunk_bytes)});
    }
  }

  mapped(s, tiny);

  s.groups = rng.pick(1, 2);
  s.layers_per_group = rng.pick(1, 2);
  s.replicated = rng.chance(250);
  s.data_parallel = rng.chance(250);
  s.spread = s.nodes == 3 && rng.chance(400);
  s.zero_tail = mix(seed ^ 0x7A11) % 2 == 0;
  s.fan_out = s.replicated && mix(seed ^ 0xFA40) % 2 == 0;
  s.weak_digests = mix(seed ^ 0xD16E) % 8 == 0;
  if (mix(seed ^ 0x4E5E) % 3 == 0)
    s.habits.reserve = static_cast<uint32_t>(mix(seed ^ 0x4E5F) % 900);
  if (mix(seed ^ 0x9ACE) % 3 == 0) {
    s.habits.packed = static_cast<uint32_t>(300 + mix(seed ^ 0x9ACF) % 700);
    s.packed_bytes = 500 + mix(seed ^ 0x9AD0) % 20000;
  }
  if (mix(seed ^ 0x10CA) % 2 == 0)
    s.habits.local = static_cast<uint32_t>(100 + mix(seed ^ 0x10CB) % 800);
  if (mix(seed ^ 0x4EA5) % 2 == 0) {
    s.habits.reuse = static_cast<uint32_t>(300 + mix(seed ^ 0x4EA6) % 700);
    s.reuse_entries = 4 + mix(seed ^ 0x4EA7) % 100;
  }
  s.transfers = tiny ? rng.pick(4, 12) : rng.pick(3, 16);
  s.window = milliseconds(rng.between(20, 800));
  s.max_tokens = rng.pick(4, 40);

  s.habits.unknown_group = rng.pick(0, 300);
  s.habits.late_condition = rng.pick(0, 200);
  s.habits.open_first = rng.pick(0, 300);
  s.habits.repeat_call = rng.pick(0, 60);
  s.habits.claim = rng.pick(0, 100);
  s.faults.until = s.window + milliseconds(rng.between(50, 600));
  switch (s.profile) {
    case Profile::kClean:
      s.faults.slow_message = rng.pick(0, 30);
      break;
    case Profile::kLossy:
    case Profile::kTiny:
      lossy(s.faults, rng);
      break;
    case Profile::kRevoke:
      lossy(s.faults, rng);
      s.habits.revoke = rng.pick(300, 900);
      s.faults.ambush = rng.chance(500) ? rng.pick(0, 80) : 0;
      // In a quarter some senders leave out what is needed, beside what they take back.
      if (mix(seed ^ 0x0FFE4) % 4 == 0) s.habits.not_offered = 300;
      break;
    case Profile::kEnds:
      if (rng.chance(500)) lossy(s.faults, rng);
      ends(s.habits, rng);
      if (rng.chance(300)) s.habits.revoke = rng.pick(0, 300);
      break;
    case Profile::kChaos:
      lossy(s.faults, rng);
      ends(s.habits, rng);
      chaos(s.faults, rng);
      if (rng.chance(300)) s.habits.revoke = rng.pick(0, 300);
      break;
  }
  const bool may_end = s.profile == Profile::kEnds || s.profile == Profile::kChaos;
  if (may_end && mix(seed ^ 0x1EA8) % 2 == 0)
    s.faults.leaps = static_cast<uint32_t>(1 + mix(seed ^ 0x1EA7) % 4);
  hostile(s);
  return s;
}

bool Scenario::maps(uint32_t from, uint32_t to) const {
  return mix(seed ^ mix(0x3A9C00 + 16 * from + to)) % 1000 < mapped;
}

bool Scenario::one_host(uint32_t a, uint32_t b) const {
  return mix(seed ^ mix(0x3A9D00 + 16 * std::min(a, b) + std::max(a, b))) % 2 == 0;
}

uint32_t Scenario::slowness(uint32_t a, uint32_t b, uint32_t lane, Time now) const {
  const uint64_t run = mix(seed ^ 0x51044);
  if (run % 2 == 0) return 1;
  constexpr uint32_t kFactors[] = {1, 2, 10, 40};
  // Half of these runs: a lane keeps its speed; else it changes every tenth of a second.
  const uint64_t period = run / 2 % 2 == 0 ? 0 : static_cast<uint64_t>(now.ns) / 100'000'000;
  const uint64_t pair = 16 * std::min(a, b) + std::max(a, b);
  return kFactors[mix(seed ^ mix(0x51045000 + 4096 * period + 256 * lane + pair)) % 4];
}

uint32_t Scenario::ordinary_arenas(uint32_t node) const {
  return static_cast<uint32_t>(
      std::count_if(arenas[node].begin(), arenas[node].end(),
                    [](const engine::ArenaConfig& arena) { return !arena.mapped; }));
}

std::optional<uint32_t> Scenario::mapped_arena(uint32_t node, uint64_t worker) const {
  const uint32_t ordinary = ordinary_arenas(node);
  const uint64_t mapped_ones = arenas[node].size() - ordinary;
  const uint64_t draw = mix(seed ^ mix(0x3A9C00 + worker));
  if (mapped_ones == 0 || draw % 5 == 0) return std::nullopt;
  return ordinary + static_cast<uint32_t>(draw / 5 % mapped_ones);
}

}  // namespace kvferry::sim
