// What waits for the engine thread: who sleeps is woken once, who is awake is left alone, and
// nothing is lost between the two.
#include "daemon/node/inbox.h"

#include <poll.h>

#include <atomic>
#include <catch2/catch.hpp>
#include <cstdlib>
#include <thread>
#include <variant>
#include <vector>

namespace kvferry::node {
namespace {

Posted question(QuestionFn fn = [](const engine::Engine&, Time) {}) {
  return Posted{engine::RailsUp{}, {}, std::move(fn)};
}

bool readable(const Inbox& inbox, int wait_ms = 0) {
  pollfd entry{inbox.fd(), POLLIN, 0};
  return ::poll(&entry, 1, wait_ms) == 1;
}

TEST_CASE("a thread that is awake is not rung for") {
  Inbox inbox(8);
  std::vector<Posted> out;
  REQUIRE(inbox.post(Inbox::kInternal, question()));
  CHECK_FALSE(readable(inbox));
  // It is told to look before it sleeps.
  CHECK_FALSE(inbox.prepare_sleep());
  inbox.drain(8, out);
  CHECK(out.size() == 1);

  REQUIRE(inbox.prepare_sleep());
  REQUIRE(inbox.post(1, question()));
  CHECK(readable(inbox));
  REQUIRE(inbox.post(2, question()));
  inbox.end_sleep(true);
  CHECK_FALSE(readable(inbox));
  inbox.drain(8, out);
  CHECK(out.size() == 3);

  // A sleep that ended by itself: the next post is for one who is awake.
  REQUIRE(inbox.prepare_sleep());
  inbox.end_sleep(false);
  REQUIRE(inbox.post(1, question()));
  CHECK_FALSE(readable(inbox));
}

TEST_CASE("a post that is refused wakes nobody") {
  Inbox inbox(1);
  std::vector<Posted> out;
  REQUIRE(inbox.post(1, question()));
  inbox.drain(8, out);
  REQUIRE(inbox.prepare_sleep());
  inbox.close();
  CHECK_FALSE(inbox.post(1, question()));
  CHECK_FALSE(readable(inbox));
  inbox.wake();
  CHECK(readable(inbox));
}

TEST_CASE("a source that has its limit waiting is refused, and no other is") {
  Inbox inbox(2);
  REQUIRE(inbox.post(1, question()));
  REQUIRE(inbox.post(1, question()));
  CHECK_FALSE(inbox.post(1, question()));
  CHECK(inbox.waiting() == 2);
  CHECK(inbox.post(2, question()));
  // Answers to what the engine itself has asked for are bounded by that.
  for (int i = 0; i < 5; ++i) CHECK(inbox.post(Inbox::kInternal, question()));
  std::vector<Posted> out;
  inbox.drain(6, out);  // the daemon's own, and one
  CHECK(inbox.post(1, question()));
  CHECK_FALSE(inbox.post(1, question()));
}

TEST_CASE("sources are served in turn, however much one of them has waiting") {
  Inbox inbox(100);
  const auto post = [&](uint64_t source) {
    REQUIRE(inbox.post(source, Posted{engine::WorkerGone{{source}}, {}, {}}));
  };
  const auto drain = [&](std::size_t most) {
    std::vector<Posted> out;
    inbox.drain(most, out);
    std::vector<uint64_t> sources;
    for (const Posted& posted : out)
      sources.push_back(std::get<engine::WorkerGone>(posted.event).worker.value);
    return sources;
  };
  for (int i = 0; i < 50; ++i) post(7);
  post(3);
  post(9);
  post(9);
  CHECK(drain(5) == std::vector<uint64_t>{3, 7, 9, 7, 9});
  post(3);
  // A drain goes on where the last one ended.
  CHECK(drain(3) == std::vector<uint64_t>{3, 7, 7});
  // The daemon's own words come first and take nobody's turn.
  post(Inbox::kInternal);
  post(8);
  CHECK(drain(3) == std::vector<uint64_t>{0, 8, 7});
}

TEST_CASE("posts of many threads reach a thread that sleeps without a limit of time") {
  constexpr int kThreads = 4;
  constexpr int kEach = 20'000;
  Inbox inbox(kThreads * kEach);
  std::vector<std::thread> posters;
  for (uint64_t source = 0; source < kThreads; ++source)
    posters.emplace_back([&inbox, source] {
      for (int i = 0; i < kEach; ++i) {
        if (!inbox.post(source, question())) std::abort();
        if (i % 64 == 0) std::this_thread::yield();  // let it fall asleep
      }
    });
  std::size_t taken = 0;
  std::vector<Posted> out;
  bool stalled = false;
  while (taken < std::size_t{kThreads} * kEach && !stalled) {
    out.clear();
    inbox.drain(100, out);
    taken += out.size();
    if (taken == std::size_t{kThreads} * kEach || !inbox.prepare_sleep()) continue;
    const bool woken = readable(inbox, 30'000);
    stalled = !woken;
    inbox.end_sleep(woken);
  }
  for (std::thread& poster : posters) poster.join();
  CHECK_FALSE(stalled);
  CHECK(taken == std::size_t{kThreads} * kEach);
  CHECK(inbox.waiting() == 0);
}

}  // namespace
}  // namespace kvferry::node
