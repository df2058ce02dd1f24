// The flows of a link's lanes and the choice between them, without an engine.
#pragma once

#include <catch2/catch.hpp>
#include <cstdint>
#include <deque>
#include <map>
#include <vector>

#include "daemon/engine/lane_flow.h"

namespace kvferry::engine::test {

inline constexpr uint64_t kFullChunk = 1 << 20;

// Lanes as a link has them; null is one that is not up.
struct Choices {
  explicit Choices(std::size_t count, uint64_t full_bytes = kFullChunk)
      : flows(count, LaneFlow(full_bytes)) {
    for (LaneFlow& flow : flows) up.push_back(&flow);
  }
  std::size_t next(uint64_t bytes = kFullChunk) const { return choice.pick(up, bytes); }
  // Chooses and offers.
  std::size_t give(uint64_t bytes = kFullChunk) {
    const std::size_t lane = next(bytes);
    REQUIRE(lane < flows.size());
    CHECK(next(bytes) == lane);  // asking again changes nothing
    offered[lane].push_back({choice.give(up, lane, bytes, now), bytes});
    return lane;
  }
  void offer(std::size_t lane, uint64_t bytes = kFullChunk) {
    offered[lane].push_back({flows[lane].offered(bytes, now), bytes});
  }
  // The oldest that is on its way there, or the one behind so many.
  void arrive(std::size_t lane, std::ptrdiff_t behind = 0) {
    const Offered of = take(lane, behind);
    flows[lane].arrived(of.chunk, of.bytes, now);
  }
  void leave(std::size_t lane, std::ptrdiff_t behind = 0) {
    const Offered of = take(lane, behind);
    flows[lane].left(of.chunk, of.bytes, now);
  }
  // Lane `lane` has carried one chunk in `time`, alone.
  void measure(std::size_t lane, Duration time) {
    offer(lane);
    now = now + time;
    arrive(lane, static_cast<std::ptrdiff_t>(offered[lane].size()) - 1);
  }
  uint64_t rate(std::size_t lane) const {
    (void)next();  // which settles
    return flows[lane].rate();
  }
  struct Offered {
    uint64_t chunk = 0;
    uint64_t bytes = 0;
  };
  Offered take(std::size_t lane, std::ptrdiff_t behind) {
    const auto at = offered[lane].begin() + behind;
    const Offered of = *at;
    offered[lane].erase(at);
    return of;
  }
  std::vector<LaneFlow> flows;
  std::map<std::size_t, std::deque<Offered>> offered;
  std::vector<LaneFlow*> up;
  LaneChoice choice;
  Time now{1'000'000};
};

}  // namespace kvferry::engine::test
