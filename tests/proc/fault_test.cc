// kill -9 of everything that a transfer runs through, in its middle: the others say why it failed
// and soon, nothing stays behind, and the next transfer succeeds. The moments are drawn at random;
// KVFERRY_FAULT_SEED draws the same ones again.
#include <signal.h>
#include <sys/resource.h>

#include "tests/proc/fault_scene.h"

namespace kvferry::testing {
namespace {

// From a death to the survivors' knowing why and having their memory back.
constexpr double kSoon = 2;
constexpr double kSilence = FaultScene::kSilenceSeconds;  // where only silence can tell

double seconds_since(uint64_t begin_ns, const TransferEnd& end) {
  return static_cast<double>(end.seen_ns - begin_ns) / 1e9;
}

void require_failed(const TransferEnd& end, const std::string& reason) {
  for (const RankEnd& rank : end.ranks) {
    CHECK(rank.state == "FAILED");
    CHECK(rank.reason == reason);
  }
}

}  // namespace

TEST_CASE("a killed worker's counterpart fails soon, and its successor hands over") {
  FaultScene scene({"engine.silence_limit=10s"});  // what is told here is told at once
  for (int round = 0; round < 6; ++round) {
    const int victim = round % 2;
    CAPTURE(round, victim);
    const TransferKey key = scene.begin_and_move();
    const uint64_t killed = FaultScene::now_ns();
    scene.kill_worker(victim);
    const TransferEnd end = scene.end(1 - victim, key);
    require_failed(end, "WORKER_LOST");
    CHECK(seconds_since(killed, end) < kSoon);
    scene.start_worker(victim);
    scene.require_hand_over();
    for (const int side : {0, 1}) scene.require_nothing_held(side);
  }
}

TEST_CASE("a killed rails process is replaced, and transfers go on or end") {
  constexpr double kPatient = 5;  // the new process has to come up within it
  FaultScene scene({"engine.silence_limit=5s"});
  for (int round = 0; round < 6; ++round) {
    const int victim = round % 2;
    CAPTURE(round, victim);
    const TransferKey key = scene.begin_and_move();
    const pid_t rails = scene.daemons().side(victim).rails_pid();
    REQUIRE(rails > 0);
    const uint64_t killed = FaultScene::now_ns();
    REQUIRE(::kill(rails, SIGKILL) == 0);
    const TransferEnd received = scene.end(1, key);
    const TransferEnd sent = scene.end(0, key);
    const bool completed = received.ranks[0].state == "COMPLETED";
    for (const RankEnd& rank : received.ranks) {
      INFO(rank.reason);
      CHECK((rank.state == "COMPLETED" || rank.state == "FAILED"));
      CHECK((rank.reason == "NONE") == (rank.state == "COMPLETED"));
    }
    // Delivered is never said unless all have completed.
    if (sent.ranks[0].state == "DELIVERED") CHECK(completed);
    if (!completed) CHECK(seconds_since(killed, received) < kPatient + kSoon);
    REQUIRE(comes_true([&] {
      const pid_t next = scene.daemons().side(victim).rails_pid();
      return next > 0 && next != rails && !scene.daemons().side(victim).http("/readyz").empty();
    }));
    scene.require_lanes();
    scene.require_hand_over();
    for (const int side : {0, 1}) scene.require_nothing_held(side);
  }
}

// UCX closes a listener whose accept() fails, and could never be connected to again.
TEST_CASE("rails that were out of descriptors when a peer connected take connections again") {
  FaultScene scene;
  for (const int victim : {0, 1}) {
    CAPTURE(victim);
    const pid_t starved = scene.daemons().side(victim).rails_pid();
    REQUIRE(starved > 0);
    rlimit none{};
    REQUIRE(::prlimit(starved, RLIMIT_NOFILE, nullptr, &none) == 0);
    const rlimit before = none;
    none.rlim_cur = 3;
    REQUIRE(::prlimit(starved, RLIMIT_NOFILE, &none, nullptr) == 0);
    REQUIRE(::kill(scene.daemons().side(1 - victim).rails_pid(), SIGKILL) == 0);
    // Its lanes cannot be made anew; it has to find that out by itself.
    CHECK(comes_true([&] { return scene.daemons().side(victim).rails_pid() != starved; }));
    (void)::prlimit(starved, RLIMIT_NOFILE, &before, nullptr);
    scene.require_lanes();
    scene.require_hand_over();
    for (const int side : {0, 1}) {
      // UCX 1.13 keeps the socket of a connection that was refused, for the process's life.
      scene.measure(side);
      scene.require_nothing_held(side);
    }
  }
}

TEST_CASE("a killed daemon is noticed on both sides, and its successor serves the same workers") {
  FaultScene scene;
  for (int round = 0; round < 4; ++round) {
    const int victim = round % 2;
    CAPTURE(round, victim);
    const TransferKey key = scene.begin_and_move();
    const uint64_t killed = FaultScene::now_ns();
    scene.daemons().side(victim).kill_now();
    // Both wait at once, so that each one's time is its own.
    for (const int side : {0, 1}) scene.ask_for_end(side, key);
    const TransferEnd own = scene.worker(victim).next_end();
    const TransferEnd far = scene.worker(1 - victim).next_end();
    REQUIRE(own.error == "");
    REQUIRE(far.error == "");
    require_failed(own, "DAEMON_RESTARTED");
    require_failed(far, "PEER_LOST");
    CHECK(seconds_since(killed, own) < kSoon);
    CHECK(seconds_since(killed, far) < kSilence + kSoon);
    for (const int side : {0, 1}) REQUIRE(scene.worker(side).ask("close " + key.id) == "OK");

    const client::Status again = scene.daemons().restart(victim);
    require_ok(again);
    REQUIRE(scene.worker(victim).ask("reattached 30000") == "REATTACHED");
    scene.require_hand_over();
    scene.require_nothing_held(1 - victim);
    scene.measure(victim);
  }
}

TEST_CASE("a daemon that stands still is given up, and is a peer again when it goes on") {
  FaultScene scene;
  for (int round = 0; round < 4; ++round) {
    const int victim = round % 2;
    const bool rails_too = round >= 2;
    CAPTURE(round, victim, rails_too);
    const TransferKey key = scene.begin_and_move();
    const pid_t daemon = scene.daemons().side(victim).pid();
    const pid_t rails = scene.daemons().side(victim).rails_pid();
    const uint64_t stopped = FaultScene::now_ns();
    REQUIRE(::kill(daemon, SIGSTOP) == 0);
    if (rails_too) REQUIRE(::kill(rails, SIGSTOP) == 0);
    const TransferEnd far = scene.end(1 - victim, key);
    require_failed(far, "PEER_LOST");
    CHECK(seconds_since(stopped, far) < kSilence + kSoon);
    if (rails_too) REQUIRE(::kill(rails, SIGCONT) == 0);
    REQUIRE(::kill(daemon, SIGCONT) == 0);
    // It has been out of the world for longer than its peer stood it.
    const TransferEnd own = scene.end(victim, key);
    for (const RankEnd& rank : own.ranks) CHECK(rank.state == "FAILED");
    scene.require_hand_over();
    for (const int side : {0, 1}) scene.require_nothing_held(side);
  }
}

}  // namespace kvferry::testing
