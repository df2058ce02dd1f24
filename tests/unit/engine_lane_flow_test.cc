// Which lane gets the next chunk: what is measured, and what is chosen by it.
#include <algorithm>
#include <vector>

#include "tests/unit/engine_lane_choices.h"

namespace kvferry::engine::test {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;

constexpr uint64_t kChunk = kFullChunk;
constexpr uint64_t kPerSecond = kChunk * 1000;  // of a lane that takes 1 ms for a chunk

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

TEST_CASE("what carries nothing is no trial: it goes by the lane that is free first") {
  Choices c(2);
  c.measure(0, milliseconds(1));
  c.measure(1, milliseconds(100));
  for (int i = 0; i < 2000 && c.next() == 0; ++i) {
    c.give();
    c.now = c.now + milliseconds(1);
    c.arrive(0);
  }
  REQUIRE(c.next() == 1);  // its trial is due
  c.offer(1);
  CHECK(c.next(0) == 0);
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

}  // namespace
}  // namespace kvferry::engine::test
