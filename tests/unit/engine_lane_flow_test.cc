// Which lane gets the next chunk: what is measured, and what follows from it over lanes of
// different speed.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cstdint>
#include <deque>
#include <map>
#include <utility>
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
  explicit Choices(std::size_t count, uint64_t full_bytes = kChunk)
      : flows(count, LaneFlow(full_bytes)) {
    for (LaneFlow& flow : flows) up.push_back(&flow);
  }
  std::size_t next(uint64_t bytes = kChunk) const { return choice.pick(up, bytes); }
  // Chooses and offers.
  std::size_t give(uint64_t bytes = kChunk) {
    const std::size_t lane = next(bytes);
    REQUIRE(lane < flows.size());
    CHECK(next(bytes) == lane);  // asking again changes nothing
    offered[lane].push_back({choice.give(up, lane, bytes, now), bytes});
    return lane;
  }
  void offer(std::size_t lane, uint64_t bytes = kChunk) {
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

TEST_CASE("lanes of which nothing is known take turns, the one with least on its way first") {
  Choices c(3);
  CHECK(c.give() == 0);
  CHECK(c.give() == 1);
  CHECK(c.give() == 2);
  CHECK(c.give() == 0);
  c.leave(1);
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
    c.arrive(given.back());
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
  CHECK(none.pick({}, kChunk) == 0);
}

TEST_CASE("the rate is what arrived by the time in which anything was on its way") {
  Choices c(1);
  c.offer(0);
  c.offer(0);
  c.now = c.now + milliseconds(1);
  c.arrive(0);
  c.now = c.now + milliseconds(1);
  c.arrive(0);
  CHECK(c.flows[0].rate() == 0);          // as of the last choice
  c.now = c.now + std::chrono::hours(1);  // idle
  CHECK(c.rate(0) == kPerSecond);
  c.measure(0, milliseconds(1));
  CHECK(c.rate(0) == kPerSecond);
  CHECK(c.flows[0].arrived_bytes() == 3 * kChunk);
}

TEST_CASE("chunks that are told of at one moment share the time, in whatever order") {
  Choices c(1);
  const bool backwards = GENERATE(false, true);
  for (int i = 0; i < 8; ++i) c.offer(0);
  c.now = c.now + milliseconds(8);
  for (int i = 7; i >= 0; --i) c.arrive(0, backwards ? i : 0);
  CHECK(c.rate(0) == kPerSecond);
  CHECK(c.flows[0].in_flight() == 0);
  CHECK(c.flows[0].queued() == 0);
}

TEST_CASE("acknowledgements that were held up together do not make a lane fast") {
  Choices c(2);
  c.measure(0, milliseconds(1));
  c.measure(1, milliseconds(1));
  CHECK(c.rate(0) == kPerSecond);
  for (int i = 0; i < 8; ++i) c.offer(0);
  c.now = c.now + milliseconds(8);
  for (int i = 0; i < 4; ++i) c.arrive(0);
  CHECK(c.rate(0) == kPerSecond * 3 / 4);  // 4 in 8 ms, in the mean of two
  c.now = c.now + Duration(1);
  for (int i = 0; i < 4; ++i) c.arrive(0);
  CHECK(c.rate(0) < kPerSecond * 5 / 4);  // 4 in a nanosecond
  CHECK(c.rate(0) > kPerSecond);
}

TEST_CASE("small chunks give bounds once they make a large one; no time tells nothing") {
  Choices c(1);
  const auto small = [&](std::chrono::microseconds time) {
    for (int i = 0; i < 16; ++i) {
      c.offer(0, kChunk / 16);
      c.now = c.now + time;
      c.arrive(0);
      if (i < 15) (void)c.rate(0);
    }
  };
  c.offer(0, kChunk / 16);
  c.now = c.now + microseconds(500);
  c.arrive(0);
  CHECK(c.rate(0) == 0);
  Choices at_once(1);
  at_once.measure(0, Duration{});
  CHECK(at_once.rate(0) == 0);

  c = Choices(1);
  small(microseconds(500));
  CHECK(c.rate(0) == 2 * kPerSecond);  // full ones would have been so fast at most
  for (int i = 0; i < 20; ++i) c.measure(0, milliseconds(1)), (void)c.rate(0);
  const uint64_t full = c.rate(0);
  CHECK(full > kPerSecond);
  CHECK(full < kPerSecond / 100 * 101);
  for (int i = 0; i < 20; ++i) small(microseconds(500));
  CHECK(c.rate(0) == full);  // which says nothing against it
  for (int i = 0; i < 20; ++i) small(milliseconds(4));
  CHECK(c.rate(0) < kPerSecond / 100 * 26);  // but a full one takes no less time than a small one
  CHECK(c.rate(0) >= kPerSecond / 4);
}

TEST_CASE("the mean: the first sample as it is, later ones a quarter; one bad one costs as much") {
  Choices c(1);
  const auto rate_after = [&](Duration time) {
    c.measure(0, time);
    (void)c.next();
    return c.flows[0].rate();
  };
  CHECK(rate_after(milliseconds(4)) == kPerSecond / 4);
  CHECK(rate_after(milliseconds(2)) == kPerSecond / 8 * 3);  // of two
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
  c.offer(0);
  SECTION("alone") {
    c.now = c.now + std::chrono::seconds(5);
    c.leave(0);
  }
  SECTION("before another one, which has the lane from then on") {
    c.offer(0);
    c.now = c.now + std::chrono::seconds(5);
    c.leave(0);
    c.now = c.now + milliseconds(1);
    c.arrive(0);
  }
  SECTION("behind another one, which had the lane all the time") {
    c.offer(0);
    c.now = c.now + microseconds(500);
    c.leave(0, 1);
    c.now = c.now + microseconds(500);
    c.arrive(0);
  }
  c.measure(0, milliseconds(1));
  CHECK(c.rate(0) == kPerSecond);
  CHECK(c.flows[0].queued() == 0);
}

TEST_CASE("a chunk that waits at the receiver is no part of the lane's time, nor in its way") {
  Choices c(1);
  for (int i = 0; i < 3; ++i) c.offer(0);  // stay
  for (int i = 0; i < 50; ++i) {
    c.now = c.now + milliseconds(100);  // idle
    c.measure(0, milliseconds(1));
    CHECK(c.flows[0].queued() == 0);
    CHECK(c.flows[0].in_flight() == 3 * kChunk);
    CHECK(c.rate(0) == kPerSecond);
  }
  SECTION("it arrives") {
    for (int i = 0; i < 3; ++i) c.arrive(0);
    c.measure(0, milliseconds(1));
    CHECK(c.rate(0) >= kPerSecond);
    CHECK(c.rate(0) <= kPerSecond / 4 * 5);
  }
  SECTION("it is cancelled") {
    for (int i = 0; i < 3; ++i) c.leave(0);
    c.measure(0, milliseconds(1));
    CHECK(c.rate(0) == kPerSecond);
  }
  CHECK(c.flows[0].in_flight() == 0);
}

TEST_CASE("a small chunk that comes before a large one does not overtake it") {
  Choices c(1);
  c.offer(0, kChunk / 16);
  c.offer(0);
  c.offer(0, kChunk / 8);
  c.now = c.now + milliseconds(1);
  c.arrive(0, 2);
  CHECK(c.flows[0].in_flight() == kChunk + kChunk / 16);
  CHECK(c.flows[0].queued() == kChunk);
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
    c.arrive(0);
  }
  CHECK(others >= 16 * 100);
  CHECK(others <= 16 * 100 + 1);
  // While it is on its way a second one has to wait twice as long.
  for (int i = 0; i < 3200; ++i) {
    REQUIRE(c.give() == 0);
    c.now = c.now + milliseconds(1);
    c.arrive(0);
  }
  CHECK(c.give() == 1);
  // It was fast again: it has its part soon.
  c.leave(1);
  c.leave(1);
  for (int i = 0; i < 6; ++i) {
    c.measure(1, milliseconds(1));
    (void)c.next();
  }
  std::vector<std::size_t> given;
  for (int i = 0; i < 10; ++i) given.push_back(c.give());
  CHECK(std::count(given.begin(), given.end(), 1) >= 4);
}

TEST_CASE("a lane on which nothing moves is given less and less, however fast it was") {
  Choices c(2);
  c.measure(0, milliseconds(1));
  c.measure(1, milliseconds(1));
  for (int i = 0; i < 2; ++i) c.offer(1);
  std::vector<int> tried;
  for (int i = 0; i < 16 * (1 + 2 + 4 + 8) + 4; ++i) {
    if (c.give() == 1) {
      tried.push_back(i);
      continue;
    }
    c.now = c.now + milliseconds(1);
    c.arrive(0);
  }
  CHECK(tried == std::vector<int>{16, 16 + 33, 49 + 65, 114 + 129});
}

TEST_CASE("the largest numbers overflow nothing") {
  const uint64_t most = uint64_t{1} << 51;
  Choices c(2, most);
  c.offer(0, most);
  c.offer(1, most);
  c.now = c.now + Duration(1);
  c.arrive(0);
  c.now = c.now + std::chrono::hours(24 * 365);
  c.arrive(1);
  CHECK(c.next(most) == 0);
  CHECK(c.flows[0].rate() == UINT64_MAX);
  CHECK(c.flows[1].rate() > 0);
  CHECK(c.give(most) == 0);
  CHECK(c.next(most) == 0);
}

// A sender with so many credits and as many chunks as it likes, over lanes that carry one chunk
// after the other; it learns of each `latency` later.
class Road {
 public:
  explicit Road(std::vector<uint64_t> ns_per_chunk, Duration latency = {})
      : choices_(ns_per_chunk.size()), latency_(latency), lanes_(ns_per_chunk.size()) {
    for (std::size_t i = 0; i < lanes_.size(); ++i) lanes_[i].ns_per_chunk = ns_per_chunk[i];
  }
  // The time until the last of `chunks`, and of one of `tail` bytes behind them, has arrived.
  Duration carry(uint64_t chunks, uint64_t credits, uint64_t tail = 0) {
    const Time start = choices_.now;
    uint64_t out = 0;
    while (chunks > 0 || tail > 0 || out > 0) {
      for (; (chunks > 0 || tail > 0) && out < credits; ++out) {
        if (chunks > 0) {
          --chunks;
          give(kChunk);
        } else {
          give(std::exchange(tail, 0));
        }
      }
      Lane* first = nullptr;
      for (Lane& lane : lanes_)
        if (!lane.ends.empty() && (first == nullptr || lane.ends.front() < first->ends.front()))
          first = &lane;
      REQUIRE(first != nullptr);
      choices_.now = std::max(choices_.now, first->ends.front());
      first->ends.pop_front();
      choices_.arrive(static_cast<std::size_t>(first - lanes_.data()), first->stays);
      --out;
    }
    return choices_.now - start;
  }
  void pause(Duration time) { choices_.now = choices_.now + time; }
  // So many chunks are carried, and stay at a receiver that is not ready, until they arrive.
  void strand(std::size_t lane, int chunks) {
    for (int i = 0; i < chunks; ++i) choices_.offer(lane);
    lanes_[lane].stays = chunks;
  }
  void arrive_stranded(std::size_t lane) {
    for (; lanes_[lane].stays > 0; --lanes_[lane].stays) choices_.arrive(lane);
  }
  void forget(std::size_t lane) { choices_.flows[lane] = LaneFlow(kChunk); }
  Choices& choices() { return choices_; }
  // Full chunks.
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
    std::ptrdiff_t stays = 0;
  };
  void give(uint64_t bytes) {
    Lane& lane = lanes_[choices_.give(bytes)];
    lane.free = std::max(lane.free, choices_.now) + Duration(lane.ns_per_chunk * bytes / kChunk);
    lane.ends.push_back(lane.free + latency_);
    lane.carried += bytes / kChunk;
  }
  Choices choices_;
  Duration latency_{};
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

TEST_CASE("a lane that is fast again is found, whatever the tails of transfers") {
  const uint64_t tail = GENERATE(0U, 4096U, 16384U, 65536U, 262144U, 524288U);
  const uint64_t chunks = GENERATE(1U, 4U, 64U);
  const uint64_t slower = GENERATE(4U, 20U, 500U);
  CAPTURE(tail, chunks, slower);
  Road road({1'000'000, 1'000'000}, microseconds(200));
  for (int i = 0; i < 20; ++i) (void)road.carry(64, 8, tail);
  road.set_speed(1, slower * 1'000'000);
  for (int i = 0; i < 20; ++i) (void)road.carry(64, 8, tail);
  for (int i = 0; i < 200; ++i) (void)road.carry(chunks, 8, tail);
  road.set_speed(1, 1'000'000);
  // As many as are due before a trial at most, and some more until the mean is there.
  const uint64_t others = road.carried(0);
  const uint64_t before = road.carried(1);
  while (road.carried(0) - others < 16 * std::min<uint64_t>(slower, 256) + 200)
    (void)road.carry(chunks, 8, tail);
  CHECK(road.carried(1) > before);
  Duration time{};
  for (int i = 0; i < 10; ++i) time += road.carry(64, 8, tail);
  CHECK(static_cast<double>(time.count()) < road.ideal(640) * 1.08);
}

TEST_CASE("short slices with tails and pauses leave the lanes as fast as they are") {
  const uint64_t tail = GENERATE(4096U, 16384U, 65536U, 262144U);
  const uint64_t chunks = GENERATE(0U, 1U, 2U);
  CAPTURE(tail, chunks);
  Road road({1'000'000, 1'000'000}, microseconds(200));
  for (int i = 0; i < 2000; ++i) {
    (void)road.carry(chunks, 8, tail);
    road.pause(milliseconds(5));
  }
  const uint64_t rates[] = {road.choices().rate(0), road.choices().rate(1)};
  CAPTURE(rates[0], rates[1]);
  CHECK(rates[0] < rates[1] * 3 / 2);
  CHECK(rates[1] < rates[0] * 3 / 2);
  const uint64_t before = road.carried(1);
  CHECK(over_ideal(road, 64, 8) < 1.08);
  CHECK(road.carried(1) - before > 26);
}

TEST_CASE("transfers of small chunks alone keep off a lane that is slower than latency hides") {
  Road road({1'000'000, 100'000'000}, microseconds(200));
  for (int i = 0; i < 200; ++i) (void)road.carry(0, 8, kChunk / 16);
  Duration time{};
  for (int i = 0; i < 1000; ++i) time += road.carry(0, 8, kChunk / 16);
  CHECK(time < milliseconds(263 * 3 / 2));  // by turns: 3,300
}

TEST_CASE("a receiver that is not ready costs others no lane") {
  const int chunks = GENERATE(1, 4, 8);
  const uint64_t each = GENERATE(1U, 2U, 8U);
  CAPTURE(chunks, each);
  Road road({1'000'000, 1'000'000}, microseconds(200));
  CHECK(over_ideal(road, 200, 8) < 1.05);
  road.strand(0, chunks);
  for (int i = 0; i < 90; ++i) {
    (void)road.carry(each, 8);
    road.pause(milliseconds(100));
  }
  CHECK(over_ideal(road, 1000, 8) < 1.05);
  road.arrive_stranded(0);
  CHECK(over_ideal(road, 1000, 8) < 1.05);
  CHECK(road.choices().flows[0].in_flight() == 0);
  CHECK(road.choices().flows[0].queued() == 0);
}

TEST_CASE("a lane whose first chunks were acknowledged very late is used again") {
  Road road({1'000'000, 1'000'000}, microseconds(200));
  (void)road.carry(200, 8);
  road.forget(0);
  Choices& c = road.choices();
  for (int i = 0; i < 4; ++i) c.offer(0);
  c.now = c.now + std::chrono::seconds(9);
  for (int i = 0; i < 4; ++i) c.arrive(0);
  (void)road.carry(16 * 256 + 64, 8);
  CHECK(over_ideal(road, 200, 8) < 1.05);
}

TEST_CASE("a dead slow lane holds few of many small transfers back") {
  Road road({1'000'000, 1'000'000'000});
  (void)road.carry(8, 8);
  Duration all{};
  for (int i = 0; i < 5120; ++i) all += road.carry(8, 8);
  // Ten trials at most, one each 4096 chunks.
  CHECK(all < milliseconds(5120 * 8) + std::chrono::seconds(11));
}

}  // namespace
}  // namespace kvferry::engine
