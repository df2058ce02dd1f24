// The arena's floors and what it promises to reservations: by hand, and random against its own
// invariants and a count of what may be had.
#include "daemon/engine/arena.h"

#include <rapidcheck.h>

#include <catch2/catch.hpp>

namespace kvferry::engine {
namespace {

constexpr uint64_t kFrame = 64;

EngineConfig config_of(uint64_t frames, uint32_t ahead) {
  EngineConfig config;
  config.arenas = {{{frames * kFrame}}};
  config.min_region_bytes = 16;
  config.chunk_bytes = kFrame;
  config.staged_ahead = ahead;
  return config;
}

using Held = std::vector<std::pair<RegionKind, memory::Region>>;

uint64_t take_all(Arena& arena, RegionKind kind, Held& held) {
  uint64_t count = 0;
  while (const auto region = arena.take(kind, kFrame)) {
    held.emplace_back(kind, *region);
    ++count;
  }
  REQUIRE(arena.exhausted(kind));
  arena.verify(held);
  return count;
}
uint64_t take_promised(Arena& arena, uint64_t reservation, uint64_t bytes, Held& held) {
  uint64_t count = 0;
  while (const auto region = arena.take_reserved(reservation, bytes)) {
    held.emplace_back(RegionKind::kLanding, *region);
    ++count;
  }
  arena.verify(held);
  return count;
}

TEST_CASE("without reservations landing leaves E + 1 frames and staging one") {
  Arena arena(config_of(8, 1), 0);
  Held held;
  CHECK(arena.most_reserved_ever() == 5);
  CHECK(take_all(arena, RegionKind::kLanding, held) == 6);
  CHECK(take_all(arena, RegionKind::kStaging, held) == 2);
}

TEST_CASE("a mapped arena is all for landing, from one frame on, and promises nothing") {
  EngineConfig config = config_of(8, 1);
  config.arenas.push_back({{kFrame}, true});
  Arena arena(config, 1);
  Held held;
  CHECK(arena.most_reserved_ever() == 0);
  CHECK(arena.most_reserved() == 0);
  CHECK(arena.exhausted(RegionKind::kStaging));
  CHECK_FALSE(arena.take(RegionKind::kStaging, kFrame));
  CHECK(take_all(arena, RegionKind::kLanding, held) == 1);
  CHECK_FALSE(arena.lost());
  arena.quarantine(held[0].second);
  CHECK(arena.lost());
  arena.give_back(RegionKind::kLanding, held[0].second, true);
  CHECK_FALSE(arena.lost());
  CHECK(arena.take(RegionKind::kLanding, 16));
}

TEST_CASE("what is promised is taken by its owner only") {
  Arena arena(config_of(8, 1), 0);
  Held held;
  arena.reserve(9, 4);
  CHECK(take_all(arena, RegionKind::kLanding, held) == 2);
  CHECK(take_all(arena, RegionKind::kStaging, held) == 2);
  SECTION("whole frames") {
    CHECK(take_promised(arena, 9, kFrame, held) == 4);
  }
  SECTION("small regions share frames") {
    CHECK(take_promised(arena, 9, 16, held) == 16);
  }
  CHECK(arena.is_reserved(held.back().second));
  CHECK_FALSE(arena.is_reserved(held.front().second));
  CHECK_FALSE(arena.take_reserved(8, kFrame));
}

TEST_CASE("arenas have floors and promises of their own, and segments numbered through") {
  EngineConfig config = config_of(4, 1);
  config.arenas[0].segment_bytes.push_back(2 * kFrame);
  config.arenas.push_back({{4 * kFrame, 4 * kFrame}});
  Arena first(config, 0);
  Arena second(config, 1);
  CHECK(first.first_segment() == 0);
  CHECK(first.segment_count() == 2);
  CHECK(second.first_segment() == 2);
  CHECK(second.segment_count() == 2);
  Held held;
  CHECK(take_all(first, RegionKind::kLanding, held) == 4);
  CHECK(take_all(first, RegionKind::kStaging, held) == 2);
  for (const auto& [kind, region] : held) CHECK(region.segment < 2);
  Held beside;
  second.reserve(9, 5);
  CHECK(take_all(second, RegionKind::kLanding, beside) == 1);
  CHECK(take_promised(second, 9, kFrame, beside) == 5);
  CHECK(take_all(second, RegionKind::kStaging, beside) == 2);
  for (const auto& [kind, region] : beside) CHECK((region.segment == 2 || region.segment == 3));
  CHECK(second.is_reserved(beside[1].second));
  for (const auto& [kind, region] : beside) second.give_back(kind, region);
  second.verify({});
}

TEST_CASE("a promise ends: what it used is everybody's") {
  Arena arena(config_of(8, 1), 0);
  Held held;
  arena.reserve(9, 4);
  REQUIRE(arena.take_reserved(9, 16));
  arena.unreserve(9);
  CHECK(arena.asked() == 0);
  CHECK(arena.reserved_frames() == 0);
  // The frame's other three small regions, and five frames more.
  for (int i = 0; i < 3; ++i) REQUIRE(arena.take(RegionKind::kLanding, 16));
  CHECK(arena.used(RegionKind::kLanding) == 1);
  Held more;
  while (const auto region = arena.take(RegionKind::kLanding, kFrame))
    more.emplace_back(RegionKind::kLanding, *region);
  CHECK(more.size() == 5);
}

TEST_CASE("a promise made while the arena is full waits, and stops nobody from giving back") {
  Arena arena(config_of(8, 1), 0);
  Held held;
  REQUIRE(take_all(arena, RegionKind::kLanding, held) == 6);
  arena.reserve(9, 5);
  CHECK_FALSE(arena.take_reserved(9, kFrame));
  // Staging has its E + 1 all the same.
  CHECK(take_all(arena, RegionKind::kStaging, held) == 2);
  // What comes back is the reservation's, until one frame is left to the others.
  arena.give_back(held[0].first, held[0].second);
  CHECK_FALSE(arena.take(RegionKind::kLanding, kFrame));
  CHECK(arena.take_reserved(9, kFrame));
}

TEST_CASE("the others always have a frame for landing") {
  Arena arena(config_of(8, 1), 0);
  Held held;
  arena.reserve(9, 5);
  CHECK(take_all(arena, RegionKind::kLanding, held) == 1);
  CHECK(take_promised(arena, 9, kFrame, held) == 5);
  CHECK(take_all(arena, RegionKind::kStaging, held) == 2);
}

TEST_CASE("quarantine shrinks the newest promises, and gives back what it took") {
  Arena arena(config_of(8, 1), 0);
  arena.reserve(7, 3);
  arena.reserve(9, 2);
  const auto first = arena.take_reserved(7, kFrame);
  REQUIRE(first);
  arena.quarantine(*first);
  CHECK(arena.promised(7) == 3);
  CHECK(arena.promised(9) == 1);
  CHECK_FALSE(arena.is_reserved(*first));
  const auto other = arena.take(RegionKind::kLanding, kFrame);
  REQUIRE(other);
  arena.quarantine(*other);
  CHECK(arena.promised(9) == 0);
  // The others' floor holds in spite of it.
  CHECK(arena.take(RegionKind::kLanding, kFrame));
  arena.give_back(RegionKind::kLanding, *other, true);
  arena.give_back(RegionKind::kLanding, *first, true);
  CHECK(arena.promised(7) == 3);
  CHECK(arena.promised(9) == 2);
}

struct Random {
  Arena arena;
  Held held;
  std::vector<bool> quarantined;
  std::map<uint64_t, uint64_t> promises;
  uint64_t last = 0;

  void keep(RegionKind kind, const std::optional<memory::Region>& region) {
    if (!region) return;
    held.emplace_back(kind, *region);
    quarantined.push_back(false);
  }
  void step(uint32_t what, uint64_t with) {
    const uint64_t bytes = 1 + with % kFrame;
    if (what < 3) {
      keep(RegionKind::kLanding, arena.take(RegionKind::kLanding, bytes));
    } else if (what < 5) {
      keep(RegionKind::kStaging, arena.take(RegionKind::kStaging, bytes));
    } else if (what < 8 && !promises.empty()) {
      auto it = promises.begin();
      std::advance(it, with % promises.size());
      keep(RegionKind::kLanding, arena.take_reserved(it->first, bytes));
    } else if (what < 11 && !held.empty()) {
      const std::size_t at = with % held.size();
      arena.give_back(held[at].first, held[at].second, quarantined[at]);
      held.erase(held.begin() + static_cast<std::ptrdiff_t>(at));
      quarantined.erase(quarantined.begin() + static_cast<std::ptrdiff_t>(at));
    } else if (what == 11 && !held.empty()) {
      const std::size_t at = with % held.size();
      if (held[at].first == RegionKind::kLanding && !quarantined[at]) {
        arena.quarantine(held[at].second);
        quarantined[at] = true;
      }
    } else if (what == 12) {
      const uint64_t frames = 1 + with % 3;
      if (arena.asked() + frames > arena.most_reserved()) return;
      arena.reserve(++last, frames);
      promises[last] = frames;
    } else if (what == 13 && !promises.empty()) {
      auto it = promises.begin();
      std::advance(it, with % promises.size());
      arena.unreserve(it->first);
      promises.erase(it);
    }
  }
};

TEST_CASE("whatever comes, counts agree and each kind keeps its floor") {
  const bool ok = rc::check("arena", [] {
    const auto ahead = *rc::gen::inRange<uint32_t>(0, 3);
    const uint64_t frames = ahead + 2 + *rc::gen::inRange<uint64_t>(0, 9);
    EngineConfig config = config_of(frames, ahead);
    config.arenas.insert(config.arenas.begin(), config.arenas[0]);  // segments from 1
    Random random{Arena(config, 1), {}, {}, {}, 0};
    const auto steps = *rc::gen::container<std::vector<std::pair<uint32_t, uint64_t>>>(
        rc::gen::pair(rc::gen::inRange<uint32_t>(0, 14), rc::gen::arbitrary<uint64_t>()));
    for (const auto& [what, with] : steps) {
      random.step(what, with);
      random.arena.verify(random.held);
    }
    // All that is not staging comes back: then one region of the largest size can be had for
    // landing. The other way round: E + 1 for staging.
    const auto give_back_all = [&](Arena arena, RegionKind kind) {
      for (std::size_t i = 0; i < random.held.size(); ++i)
        if (random.held[i].first == kind && !random.quarantined[i])
          arena.give_back(kind, random.held[i].second);
      return arena;
    };
    uint64_t quarantined = 0;
    for (const bool is : random.quarantined) quarantined += is;
    Arena landing = give_back_all(random.arena, RegionKind::kLanding);
    if (quarantined == 0) RC_ASSERT(landing.take(RegionKind::kLanding, kFrame).has_value());
    Arena staging = give_back_all(random.arena, RegionKind::kStaging);
    for (uint32_t i = 0; i <= ahead; ++i)
      RC_ASSERT(staging.take(RegionKind::kStaging, kFrame).has_value());
  });
  CHECK(ok);
}

}  // namespace
}  // namespace kvferry::engine
