// Hosts whose network is cut, one way or both, slow, far or lossy, and that come back: what both
// workers are told and how soon, and that nothing touches pages afterwards. Skipped, with the
// reason, where no network can be made (Roads).
#define CATCH_CONFIG_RUNNER
#include <signal.h>

#include <iostream>
#include <random>

#include "tests/proc/control.h"
#include "tests/proc/distant_scene.h"

namespace kvferry::testing {
namespace {

using Clock = std::chrono::steady_clock;
using How = DistantScene::How;

// From the moment in which a side can know to its worker's having the end and its memory.
constexpr double kSoon = 2;
constexpr double kSilence = DistantScene::kSilenceSeconds;

How how_with(bool mtls) {
  How how;
  how.mtls = mtls;
  return how;
}

}  // namespace

TEST_CASE(
    "a host that is cut off in mid-transfer: both workers are told, and again partners after") {
  const bool mtls = GENERATE(false, true);
  DistantScene scene(how_with(mtls));
  // Both ways, or only what one of them sends.
  for (const int deaf : mtls ? std::vector<int>{-1} : std::vector<int>{-1, 0, 1}) {
    CAPTURE(deaf);
    const TransferKey key = scene.begin_and_move();
    const auto cut = Clock::now();
    if (deaf < 0)
      scene.roads.cut(0);
    else
      scene.roads.cut(0, deaf);
    const auto ended = scene.ends(key, cut);
    INFO(scene.log_tail());
    for (const DistantEnd& end : ended) {
      CHECK(end.text == "FAILED PEER_LOST");
      CHECK(end.seconds < kSilence + kSoon);
    }
    scene.party(1).clean();
    scene.roads.mend(0);
    scene.require_healed();
  }
}

TEST_CASE("a cut that is shorter than the silence limit fails nobody") {
  How how;
  how.settings = {"engine.silence_limit=8s"};
  DistantScene scene(how);
  const TransferKey key = scene.begin_and_move();
  scene.roads.cut(0);
  const double at = scene.received();
  // Ten heartbeats, in which nothing comes.
  std::this_thread::sleep_for(seconds(2));
  CHECK(scene.received() - at < scene.bytes() / 8);
  scene.roads.mend(0);
  scene.require_done(key);
  scene.require_nothing_held();
}

TEST_CASE("one road of two is cut in mid-transfer, the one that gRPC goes by or the other") {
  How how;
  how.speeds = {20 * kMiB, 20 * kMiB};
  how.mtls = true;
  how.tokens = 4096;
  DistantScene scene(how);
  for (const std::size_t victim : {1U, 0U}) {
    CAPTURE(victim);
    const TransferKey key = scene.begin_and_move();
    scene.roads.cut(victim);
    scene.require_done(key);
    scene.require_lanes(1);
    const double by_victim = scene.sent_by(static_cast<int>(victim));
    scene.hand_over();
    CHECK(scene.sent_by(static_cast<int>(victim)) == by_victim);
    scene.roads.mend(victim);
    scene.require_lanes(2);
    scene.hand_over();
    CHECK(comes_true([&] { return scene.sent_by(static_cast<int>(victim)) > by_victim; }));
  }
  scene.require_nothing_held();
}

TEST_CASE("a receive that is called while its peer cannot be reached") {
  DistantScene scene(how_with(true));
  // The link ends first, so that both sides have to find each other anew.
  const TransferKey lost = scene.begin_and_move();
  scene.roads.cut(0);
  const auto lost_ends = scene.ends(lost, Clock::now());
  for (const DistantEnd& end : lost_ends) REQUIRE(end.text == "FAILED PEER_LOST");

  SECTION("waits, and goes on when the road is mended") {
    const TransferKey key = scene.begin();
    const auto peers = [&] { return control(scene.daemon(1), "peers").dump(); };
    const bool fails = comes_true([&] { return peers().find("PEER_") != std::string::npos; });
    INFO(peers());
    CHECK(fails);
    scene.roads.mend(0);
    scene.require_done(key);
  }
  SECTION("ends with its wait, and its sender when that is given up") {
    Party::Receive receive;
    receive.wait = seconds(2);
    const auto begun = Clock::now();
    const TransferKey key = scene.begin(0, receive);
    const auto ended = scene.party(1).wait(key.id, kPatience);
    require_ok(ended);
    const std::chrono::duration<double> took = Clock::now() - begun;
    CHECK(ended->front().state == client::TransferState::kFailed);
    CHECK(ended->front().released);
    CHECK(took.count() < 2 + kSoon);
    const auto cancelled = scene.party(0).rank(0).cancel(scene.party(0).handle(key.id, 0));
    require_ok(cancelled);
    CHECK(scene.ends(key, begun)[0].text == "CANCELLED CANCELLED");
    CHECK(std::string(ended->front().reason) == "DEADLINE");
    scene.party(1).clean();
    scene.roads.mend(0);
  }
  scene.require_healed();
}

TEST_CASE("a host that dies behind a cut road comes back with a new boot id") {
  for (const int victim : {0, 1}) {
    CAPTURE(victim);
    DistantScene scene(how_with(victim == 1));
    const TransferKey key = scene.begin_and_move();
    const auto boot = scene.party(victim).rank(0).boot_id();
    const auto cut = Clock::now();
    scene.roads.cut(0);  // before: a dead process's connections would be reset
    scene.kill_daemon(victim);
    const auto ended = scene.ends(key, cut);
    INFO(scene.log_tail());
    CHECK(ended[victim].text == "FAILED DAEMON_RESTARTED");
    CHECK(ended[victim].seconds < kSoon);
    CHECK(ended[1 - victim].text == "FAILED PEER_LOST");
    CHECK(ended[1 - victim].seconds < kSilence + kSoon);
    scene.party(1).clean();
    scene.return_daemon(victim);
    CHECK(scene.party(victim).rank(0).boot_id() != boot);
    scene.roads.mend(0);
    scene.require_healed();
  }
}

TEST_CASE("a peer's new boot id ends what ran with the old one, long before silence would") {
  How how;
  how.settings = {"engine.silence_limit=20s"};
  DistantScene scene(how);
  const TransferKey old = scene.begin_and_move();
  scene.roads.cut(0);
  scene.kill_daemon(1);
  scene.return_daemon(1);
  const auto mended = Clock::now();
  scene.roads.mend(0);
  // The dial for this one brings the news.
  scene.party(1).clean();
  const TransferKey key = scene.begin(128);
  const auto ended = scene.ends(old, mended);
  INFO(scene.log_tail());
  CHECK(ended[0].text == "FAILED PEER_LOST");
  CHECK(ended[1].text == "FAILED DAEMON_RESTARTED");
  for (const DistantEnd& end : ended) CHECK(end.seconds < 10);
  scene.require_done(key, 128);
  scene.require_healed();
}

TEST_CASE("a lossy road delivers every byte") {
  How how;
  how.settings = {"engine.silence_limit=10s"};
  DistantScene scene(how);
  scene.roads.lose(0, 20);
  for (int i = 0; i < 3; ++i) scene.hand_over();
  CHECK(scene.roads.lost_frames(0) > 20);
  scene.roads.lose(0, 0);
  scene.require_healed();
}

TEST_CASE("a road that loses nearly everything ends transfers, and is good again when it is") {
  DistantScene scene(how_with(true));
  const TransferKey key = scene.begin_and_move();
  const auto begun = Clock::now();
  scene.roads.lose(0, 900);
  const auto ended = scene.ends(key, begun);
  INFO(scene.log_tail());
  // Something gets through now and then, so silence may begin late; the transfer's own limit holds.
  for (const DistantEnd& end : ended) {
    CHECK((end.text == "FAILED PEER_LOST" || end.text == "FAILED DEADLINE"));
    CHECK(end.seconds < 30 + kSoon);
  }
  scene.party(1).clean();
  scene.roads.lose(0, 0);
  scene.require_healed();
}

TEST_CASE("a road too slow for the transfer's deadline") {
  How how;
  how.speeds = {4 * kMiB};
  how.tokens = 6144;  // 24 MiB: six seconds
  DistantScene scene(how);
  Party::Receive receive;
  receive.deadline = milliseconds(3000);
  const auto begun = Clock::now();
  const TransferKey key = scene.begin_and_move(receive);
  const auto ended = scene.ends(key, begun);
  INFO(scene.log_tail());
  for (const DistantEnd& end : ended) {
    CHECK(end.text == "FAILED DEADLINE");
    CHECK(end.seconds < 3 + kSoon);
  }
  scene.party(1).clean();
  for (int i = 0; i < 3; ++i) scene.hand_over(128);
  scene.require_nothing_held();
}

TEST_CASE("a far host is no lost one") {
  How how;
  how.tokens = 512;
  DistantScene scene(how);
  constexpr milliseconds kOneWay(100);
  scene.roads.delay(0, kOneWay);
  scene.hand_over();  // over the link that is there
  // A new link, with all that is asked and answered for it.
  scene.kill_daemon(1);
  scene.return_daemon(1);
  const auto begun = Clock::now();
  scene.hand_over();
  CHECK(Clock::now() - begun > 4 * kOneWay);
  scene.require_nothing_held();
}

TEST_CASE("a road that comes and goes at random moments") {
  const char* const given = std::getenv("KVFERRY_FAULT_SEED");
  const uint64_t seed = given != nullptr ? std::stoull(given) : std::random_device()();
  CAPTURE(seed);
  std::mt19937_64 random(seed);
  const auto draw = [&](int from, int to) {
    return milliseconds(std::uniform_int_distribution<int>(from, to)(random));
  };
  DistantScene scene(How{});
  for (int round = 0; round < 4; ++round) {
    CAPTURE(round);
    const TransferKey key = scene.begin();
    std::this_thread::sleep_for(draw(0, 300));  // the moment is what is tested
    scene.roads.cut(0);
    std::this_thread::sleep_for(draw(100, 3500));
    scene.roads.mend(0);
    const auto ended = scene.ends(key, Clock::now());
    CAPTURE(ended[0].text, ended[1].text);
    INFO(scene.log_tail());
    // Delivered is never said unless it has completed; completed is always true.
    if (ended[0].text == "DELIVERED NONE") CHECK(ended[1].text == "COMPLETED NONE");
    for (const DistantEnd& end : ended)
      CHECK((end.text == "FAILED PEER_LOST" || end.text.ends_with(" NONE")));
    if (ended[1].text == "COMPLETED NONE") scene.require_pages(0);
    scene.hand_over(128);
  }
  scene.require_healed();
}

}  // namespace kvferry::testing

int main(int argc, char** argv) {
  const std::string why_not = kvferry::testing::Roads::why_not();
  if (why_not.empty()) return Catch::Session().run(argc, argv);
  std::cout << "skipped: no network can be made: " << why_not << "\n";
  return 77;
}
