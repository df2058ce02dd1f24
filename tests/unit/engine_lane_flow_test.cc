// Which lane gets the next chunk: what is measured, and what follows from it over lanes of
// different speed.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cstdint>
#include <deque>
#include <vector>

#include "daemon/engine/lane_flow.h"

namespace kvferry::engine {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;

constexpr uint64_t kChunk = 1 << 20;
constexpr uint64_t kPerSecond = kChunk * 1000;  // of a lane that takes 1 ms for a chunk

// Lanes as a link has them; null is one that is not up.
struct Choices {
  explicit Choices(std::size_t count) : flows(count) {
    for (LaneFlow& flow : flows) up.push_back(&flow);
  }
  std::size_t next(uint64_t bytes = kChunk) { return choice.next(up, bytes, kChunk); }
  // Chooses and offers.
  std::size_t give(uint64_t bytes = kChunk) {
    const std::size_t lane = next(bytes);
    REQUIRE(lane < flows.size());
    flows[lane].offered(bytes, now);
    return lane;
  }
  // Lane `lane` has carried one chunk in `time`, alone.
  void measure(std::size_t lane, Duration time) {
    flows[lane].offered(kChunk, now);
    now = now + time;
    flows[lane].arrived(kChunk, now);
  }
  std::vector<LaneFlow> flows;
  std::vector<LaneFlow*> up;
  LaneChoice choice;
  Time now{1'000'000};
};

TEST_CASE("lanes of which nothing is known take turns, the one with least on its way first") {
  Choices c(3);
  CHECK(c.give() == 0);
  CHECK(c.give() == 1);
  CHECK(c.give() == 2);
  CHECK(c.give() == 0);
  c.flows[1].left(kChunk);
  CHECK(c.give() == 1);
  CHECK(c.give(4) == 2);  // in turn again: all but the first have one
  CHECK(c.flows[0].in_flight() == 2 * kChunk);
  CHECK(c.flows[2].in_flight() == kChunk + 4);
}

TEST_CASE("single chunks, one after the other, take turns too") {
  Choices c(2);
  std::vector<std::size_t> given;
  for (int i = 0; i < 4; ++i) {
    given.push_back(c.give());
    c.now = c.now + milliseconds(1);
    c.flows[given.back()].arrived(kChunk, c.now);
  }
  CHECK(given == std::vector<std::size_t>{0, 1, 0, 1});
}

TEST_CASE("a lane that is not up is never chosen; without any there is none") {
  Choices c(2);
  c.up[0] = nullptr;
  for (int i = 0; i < 20; ++i) CHECK(c.give() == 1);
  c.up[1] = nullptr;
  CHECK(c.next() == 2);
  LaneChoice none;
  CHECK(none.next({}, kChunk, kChunk) == 0);
}

TEST_CASE("the rate is what arrived by the time in which anything was on its way") {
  Choices c(1);
  LaneFlow& flow = c.flows[0];
  flow.offered(kChunk, c.now);
  flow.offered(kChunk, c.now);
  c.now = c.now + milliseconds(1);
  flow.arrived(kChunk, c.now);
  c.now = c.now + milliseconds(1);
  flow.arrived(kChunk, c.now);
  CHECK(flow.rate() == 0);                // as of the last choice
  c.now = c.now + std::chrono::hours(1);  // idle
  (void)c.next();
  CHECK(flow.rate() == kPerSecond);
  c.measure(0, milliseconds(1));
  (void)c.next();
  CHECK(flow.rate() == kPerSecond);
  CHECK(flow.arrived_bytes() == 3 * kChunk);
}

TEST_CASE("chunks that are told of at one moment share the time") {
  Choices c(1);
  for (int i = 0; i < 8; ++i) c.flows[0].offered(kChunk, c.now);
  c.now = c.now + milliseconds(8);
  for (int i = 0; i < 8; ++i) c.flows[0].arrived(kChunk, c.now);
  (void)c.next();
  CHECK(c.flows[0].rate() == kPerSecond);
}

TEST_CASE("small chunks tell nothing until they make a large one; no time tells nothing") {
  Choices c(1);
  for (int i = 0; i < 15; ++i) {
    c.flows[0].offered(kChunk / 16, c.now);
    c.now = c.now + microseconds(500);
    c.flows[0].arrived(kChunk / 16, c.now);
    (void)c.next();
    CHECK(c.flows[0].rate() == 0);
  }
  c.flows[0].offered(kChunk / 16, c.now);
  c.now = c.now + microseconds(500);
  c.flows[0].arrived(kChunk / 16, c.now);
  (void)c.next();
  CHECK(c.flows[0].rate() == kPerSecond / 8);
  Choices at_once(1);
  at_once.measure(0, Duration{});
  (void)at_once.next();
  CHECK(at_once.flows[0].rate() == 0);
}

TEST_CASE("the mean: the first sample as it is, later ones a quarter; one bad one costs as much") {
  Choices c(1);
  const auto rate_after = [&](Duration time) {
    c.measure(0, time);
    (void)c.next();
    return c.flows[0].rate();
  };
  CHECK(rate_after(milliseconds(4)) == kPerSecond / 4);
  CHECK(rate_after(milliseconds(1)) == kPerSecond / 8 * 5);  // of two
  for (int i = 0; i < 60; ++i) (void)rate_after(milliseconds(1));
  const uint64_t before = c.flows[0].rate();
  CHECK(before > kPerSecond / 100 * 99);
  CHECK(rate_after(std::chrono::seconds(100)) >= before / 4 * 3);
  // A lasting change is believed soon.
  for (int i = 0; i < 8; ++i) (void)rate_after(milliseconds(10));
  CHECK(c.flows[0].rate() < kPerSecond / 5);
}

TEST_CASE("what leaves without having arrived is no part of the rate") {
  Choices c(1);
  c.flows[0].offered(kChunk, c.now);
  c.now = c.now + std::chrono::seconds(5);
  c.flows[0].left(kChunk);
  c.measure(0, milliseconds(1));
  (void)c.next();
  CHECK(c.flows[0].rate() == kPerSecond);
}

TEST_CASE("the next chunk goes where it is expected to arrive first") {
  Choices c(2);
  c.measure(0, milliseconds(1));
  c.measure(1, milliseconds(3));
  // Ends at 1, 2, (3 on both: in turn), ...
  std::vector<std::size_t> given;
  for (int i = 0; i < 8; ++i) given.push_back(c.give());
  CHECK(std::count(given.begin(), given.end(), 0) == 6);
  CHECK(given[0] == 0);
  CHECK(given[1] == 0);
  CHECK(c.give(1) == 0);  // 6 + a bit against 2 * 3 + three bits
}

TEST_CASE("a lane of which nothing is known counts as the fastest") {
  Choices c(3);
  c.measure(0, milliseconds(1));
  c.measure(1, milliseconds(100));
  std::vector<std::size_t> given;
  for (int i = 0; i < 6; ++i) given.push_back(c.give());
  CHECK(std::count(given.begin(), given.end(), 0) == 3);
  CHECK(std::count(given.begin(), given.end(), 2) == 3);
}

TEST_CASE("a slow lane is tried again with one chunk, once the others have carried 16 times that") {
  Choices c(2);
  c.measure(0, milliseconds(1));
  c.measure(1, milliseconds(100));
  uint64_t others = 0;
  while (true) {
    const std::size_t lane = c.give();
    if (lane == 1) break;
    ++others;
    REQUIRE(others < 10'000);
    c.now = c.now + milliseconds(1);
    c.flows[0].arrived(kChunk, c.now);
  }
  CHECK(others >= 16 * 100);
  CHECK(others <= 16 * 100 + 1);
  // While it is on its way there is no second one.
  for (int i = 0; i < 5000; ++i) {
    REQUIRE(c.give() == 0);
    c.now = c.now + milliseconds(1);
    c.flows[0].arrived(kChunk, c.now);
  }
  // It was fast again: it has its part soon.
  c.flows[1].left(kChunk);
  for (int i = 0; i < 6; ++i) {
    c.measure(1, milliseconds(1));
    (void)c.next();
  }
  std::vector<std::size_t> given;
  for (int i = 0; i < 10; ++i) given.push_back(c.give());
  CHECK(std::count(given.begin(), given.end(), 1) >= 4);
}

TEST_CASE("the largest numbers overflow nothing") {
  Choices c(2);
  const uint64_t most = uint64_t{1} << 59;
  c.flows[0].offered(most, c.now);
  c.flows[1].offered(most, c.now);
  c.now = c.now + Duration(1);
  c.flows[0].arrived(most, c.now);
  c.now = c.now + std::chrono::hours(24 * 365);
  c.flows[1].arrived(most, c.now);
  CHECK(c.choice.next(c.up, most, 1) == 0);
  CHECK(c.flows[0].rate() == UINT64_MAX);
  CHECK(c.flows[1].rate() > 0);
}

// A sender with so many credits and as many chunks as it likes, over lanes that carry one chunk
// after the other.
class Road {
 public:
  explicit Road(std::vector<uint64_t> ns_per_chunk)
      : choices_(ns_per_chunk.size()), lanes_(ns_per_chunk.size()) {
    for (std::size_t i = 0; i < lanes_.size(); ++i) lanes_[i].ns_per_chunk = ns_per_chunk[i];
  }
  // The time until the last of `chunks` has arrived.
  Duration carry(uint64_t chunks, uint64_t credits) {
    const Time start = choices_.now;
    uint64_t out = 0;
    while (chunks > 0 || out > 0) {
      for (; chunks > 0 && out < credits; --chunks, ++out) give();
      Lane* first = nullptr;
      for (Lane& lane : lanes_)
        if (!lane.ends.empty() && (first == nullptr || lane.ends.front() < first->ends.front()))
          first = &lane;
      REQUIRE(first != nullptr);
      choices_.now = first->ends.front();
      first->ends.pop_front();
      choices_.flows[static_cast<std::size_t>(first - lanes_.data())].arrived(kChunk, choices_.now);
      --out;
    }
    return choices_.now - start;
  }
  uint64_t carried(std::size_t lane) const { return lanes_[lane].carried; }
  void set_speed(std::size_t lane, uint64_t ns_per_chunk) {
    lanes_[lane].ns_per_chunk = ns_per_chunk;
  }
  // Of so many chunks at the sum of all speeds.
  double ideal(uint64_t chunks) const {
    double per_ns = 0;
    for (const Lane& lane : lanes_) per_ns += 1.0 / static_cast<double>(lane.ns_per_chunk);
    return static_cast<double>(chunks) / per_ns;
  }

 private:
  struct Lane {
    uint64_t ns_per_chunk = 0;
    Time free;
    std::deque<Time> ends;
    uint64_t carried = 0;
  };
  void give() {
    const std::size_t at = choices_.give();
    Lane& lane = lanes_[at];
    lane.free = std::max(lane.free, choices_.now) + Duration(lane.ns_per_chunk);
    lane.ends.push_back(lane.free);
    ++lane.carried;
  }
  Choices choices_;
  std::vector<Lane> lanes_;
};

double over_ideal(Road& road, uint64_t chunks, uint64_t credits) {
  const double ideal = road.ideal(chunks);
  return static_cast<double>(road.carry(chunks, credits).count()) / ideal;
}

TEST_CASE("a transfer takes about as long as at the sum of its lanes' speeds") {
  const auto speeds = GENERATE(
      std::vector<uint64_t>{1'000'000}, std::vector<uint64_t>{1'000'000, 1'000'000},
      std::vector<uint64_t>{1'000'000, 2'000'000}, std::vector<uint64_t>{3'000'000, 1'000'000},
      std::vector<uint64_t>{10'000'000, 1'000'000}, std::vector<uint64_t>{1'000'000, 10'000'000},
      std::vector<uint64_t>{1'000'000, 1'000'000, 4'000'000, 2'000'000},
      std::vector<uint64_t>{1'000'000, 100'000'000});
  const auto credits = GENERATE(8U, 16U, 64U);
  Road road(speeds);
  // What is given before anything is known; a lane a hundred times slower has its share of the
  // first credits.
  (void)road.carry(credits, credits);
  const double first = over_ideal(road, 1000, credits);
  const double second = over_ideal(road, 1000, credits);
  CAPTURE(speeds, credits, first, second);
  CHECK(first >= 0.99);
  CHECK(first < 1.15);
  CHECK(second < 1.15);
}

TEST_CASE("many small transfers are not held back by a slow lane") {
  Road road({1'000'000, 10'000'000});
  (void)road.carry(8, 8);
  // Each alone would take 8 ms; one trial each 160 chunks may cost one of them 10.
  Duration all{};
  for (int i = 0; i < 100; ++i) all += road.carry(8, 8);
  CHECK(all < milliseconds(800 + 100));
  CHECK(road.carried(1) >= 4 + 3);  // it was tried
}

TEST_CASE("a lane that becomes slow in mid-transfer, and fast again") {
  Road road({1'000'000, 1'000'000});
  CHECK(over_ideal(road, 200, 8) < 1.05);
  road.set_speed(1, 10'000'000);
  CHECK(over_ideal(road, 500, 8) <
        1.25);  // until it is noticed, and the tenth that 8 credits leave
  CHECK(over_ideal(road, 1000, 8) < 1.15);
  const uint64_t before = road.carried(1);
  road.set_speed(1, 1'000'000);
  (void)road.carry(400, 8);  // at most 160 until it is tried
  CHECK(over_ideal(road, 400, 8) < 1.05);
  CHECK(road.carried(1) - before > 250);
}

}  // namespace
}  // namespace kvferry::engine
