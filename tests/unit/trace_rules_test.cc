// What one peer can do to the traces of others.
#include "daemon/node/trace_rules.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <string>

using namespace kvferry;
using namespace kvferry::node;
using std::chrono::milliseconds;
using std::chrono::seconds;

namespace {

constexpr Time kStart{1'000'000'000};

}  // namespace

TEST_CASE("a peer that asks for traces without end leaves the others their answers") {
  TraceBudget budget;
  int greedy = 0;
  for (Time now = kStart; now < kStart + seconds(10); now = now + milliseconds(1)) {
    if (budget.take("greedy", now)) ++greedy;
    if ((now - kStart) % seconds(1) == Duration(0)) CHECK(budget.take("modest", now));
  }
  // Four at once, and five a second.
  CHECK(greedy >= 50);
  CHECK(greedy <= 54);
}

TEST_CASE("all peers together get no more than the engine's thread is to give") {
  TraceBudget budget;
  int answered = 0;
  std::size_t most = 0;
  for (Time now = kStart; now < kStart + seconds(2); now = now + milliseconds(1)) {
    const int64_t peer = (now - kStart) / milliseconds(1);
    if (budget.take("peer" + std::to_string(peer), now)) ++answered;
    most = std::max(most, budget.peers());
  }
  // Sixteen at once, and fifty a second.
  CHECK(answered >= 115);
  CHECK(answered <= 116);
  // Of two thousand who asked, only those are remembered that still owe.
  CHECK(most <= 32);
  CHECK(budget.take("late", kStart + seconds(60)));
  CHECK(budget.peers() == 1);
}

TEST_CASE("a silent peer leaves time to tell what is known here") {
  CHECK(peer_deadline(kStart, kStart + seconds(1)) == kStart + milliseconds(500));
  CHECK(peer_deadline(kStart, kStart + seconds(30)) == kStart + seconds(2));
  CHECK(peer_deadline(kStart, Time::never()) == kStart + seconds(2));
  CHECK(peer_deadline(kStart, kStart + Duration(0)) == kStart);
}

TEST_CASE("a peer's steps are believed only where the transfer can have had them") {
  const Time begin = kStart + seconds(10'000);
  const Time now = begin + seconds(30);
  const TraceWindow window = trace_window(begin, now, seconds(600), seconds(100));
  CHECK(window.holds(begin, now));
  CHECK(window.holds(begin + -seconds(800), now + seconds(1)));
  CHECK_FALSE(window.holds(begin + -seconds(800) + -Duration(1), now));
  CHECK_FALSE(window.holds(begin, now + seconds(1) + Duration(1)));
  CHECK_FALSE(window.holds(now + seconds(1) + Duration(1), now));
  CHECK_FALSE(window.holds(begin, begin + -seconds(801)));
}
