// What the choice of lanes makes of transfers over lanes of different and changing speed.
#include <algorithm>
#include <deque>
#include <utility>
#include <vector>

#include "tests/unit/engine_lane_choices.h"

namespace kvferry::engine::test {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;

constexpr uint64_t kChunk = kFullChunk;

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
}  // namespace kvferry::engine::test
