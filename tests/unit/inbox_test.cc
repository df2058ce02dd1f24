// What waits for the engine thread: who sleeps is woken once, who is awake is left alone, and
// nothing is lost between the two.
#include "daemon/node/inbox.h"

#include <poll.h>

#include <atomic>
#include <catch2/catch.hpp>
#include <cstdlib>
#include <thread>
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
