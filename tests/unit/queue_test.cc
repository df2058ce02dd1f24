#include "daemon/base/queue.h"

#include <atomic>
#include <catch2/catch.hpp>
#include <memory>
#include <thread>

namespace kvferry {
namespace {

constexpr Duration kGenerous = std::chrono::seconds(60);

TEST_CASE("items come out in the order in which one producer pushed them") {
  BoundedQueue<int> queue(8);
  for (int i = 0; i < 5; ++i) REQUIRE(queue.try_push(std::move(i)) == PushResult::kPushed);
  std::vector<int> out{-1};
  REQUIRE(queue.drain(out, 3) == 3);
  REQUIRE(queue.drain(out) == 2);
  REQUIRE(out == std::vector<int>{-1, 0, 1, 2, 3, 4});
  REQUIRE(queue.drain(out) == 0);
}

TEST_CASE("a full queue refuses and leaves the item with the caller") {
  BoundedQueue<std::unique_ptr<int>> queue(1);
  auto first = std::make_unique<int>(1);
  auto second = std::make_unique<int>(2);
  REQUIRE(queue.try_push(std::move(first)) == PushResult::kPushed);
  REQUIRE(queue.try_push(std::move(second)) == PushResult::kFull);
  REQUIRE(second != nullptr);
  REQUIRE(queue.push_until(std::move(second), monotonic_now() + std::chrono::milliseconds(1)) ==
          PushResult::kFull);
  REQUIRE(second != nullptr);
  REQUIRE(queue.size() == 1);
}

TEST_CASE("the consumer is woken once for a batch, and again after it has drained") {
  int wakes = 0;
  BoundedQueue<int> queue(8, [&] { ++wakes; });
  REQUIRE(queue.try_push(1) == PushResult::kPushed);
  REQUIRE(queue.try_push(2) == PushResult::kPushed);
  REQUIRE(wakes == 1);
  std::vector<int> out;
  REQUIRE(queue.drain(out, 1) == 1);
  REQUIRE(queue.try_push(3) == PushResult::kPushed);
  REQUIRE(wakes == 1);
  REQUIRE(queue.drain(out) == 2);
  REQUIRE(queue.try_push(4) == PushResult::kPushed);
  REQUIRE(wakes == 2);
}

TEST_CASE("a closed queue takes nothing, gives out the rest and wakes the consumer once") {
  int wakes = 0;
  BoundedQueue<int> queue(8, [&] { ++wakes; });
  REQUIRE(queue.try_push(1) == PushResult::kPushed);
  queue.close();
  queue.close();
  REQUIRE(wakes == 2);
  REQUIRE(queue.closed());
  REQUIRE(queue.try_push(2) == PushResult::kClosed);
  REQUIRE(queue.push_until(3, Time::never()) == PushResult::kClosed);
  std::vector<int> out;
  REQUIRE(queue.drain_until(out, Time::never()) == 1);
  REQUIRE(queue.drain_until(out, Time::never()) == 0);
}

TEST_CASE("waiting for items ends at the deadline") {
  BoundedQueue<int> queue(1);
  std::vector<int> out;
  const Time deadline = monotonic_now() + std::chrono::milliseconds(5);
  REQUIRE(queue.drain_until(out, deadline) == 0);
  REQUIRE(monotonic_now() >= deadline);
}

TEST_CASE("closing ends a producer that waits for room and a consumer that waits for items") {
  BoundedQueue<int> full(1);
  BoundedQueue<int> empty(1);
  REQUIRE(full.try_push(1) == PushResult::kPushed);
  PushResult pushed = PushResult::kPushed;
  std::size_t drained = 1;
  std::thread producer([&] { pushed = full.push_until(2, Time::never()); });
  std::thread consumer([&] {
    std::vector<int> out;
    drained = empty.drain_until(out, Time::never());
  });
  full.close();
  empty.close();
  producer.join();
  consumer.join();
  REQUIRE(pushed == PushResult::kClosed);
  REQUIRE(drained == 0);
}

TEST_CASE("a consumer that never blocks makes room for a producer that does") {
  constexpr int kItems = 2000;
  BoundedQueue<int> queue(1);
  int pushed = 0;
  std::thread producer([&] {
    const Time deadline = monotonic_now() + std::chrono::seconds(20);
    while (pushed < kItems && queue.push_until(1, deadline) == PushResult::kPushed) ++pushed;
    queue.close();
  });
  std::vector<int> out;
  while (!queue.closed()) queue.drain(out);
  producer.join();
  queue.drain(out);
  REQUIRE(pushed == kItems);
  REQUIRE(out.size() == kItems);
}

TEST_CASE("nothing is lost or reordered between many producers and one consumer") {
  constexpr int kProducers = 4;
  constexpr int kEach = 5000;
  BoundedQueue<std::pair<int, int>> queue(16);
  std::vector<std::thread> producers;
  std::atomic<int> refused{0};
  for (int p = 0; p < kProducers; ++p) {
    producers.emplace_back([&, p] {
      for (int i = 0; i < kEach; ++i)
        if (queue.push_until({p, i}, monotonic_now() + kGenerous) != PushResult::kPushed) ++refused;
    });
  }
  std::vector<int> next(kProducers, 0);
  std::vector<std::pair<int, int>> batch;
  bool in_order = true;
  for (int seen = 0; seen < kProducers * kEach;) {
    batch.clear();
    const std::size_t count = queue.drain_until(batch, monotonic_now() + kGenerous, 7);
    if (count == 0) break;
    seen += static_cast<int>(count);
    for (const auto& [p, i] : batch) in_order &= i == next[static_cast<std::size_t>(p)]++;
  }
  for (std::thread& producer : producers) producer.join();
  REQUIRE(refused == 0);
  REQUIRE(in_order);
  REQUIRE(next == std::vector<int>(kProducers, kEach));
}

}  // namespace
}  // namespace kvferry
