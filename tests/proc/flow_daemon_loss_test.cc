// An engine whose daemon is killed under it, and one whose peer's daemon is: every page comes back
// once, and after the restart the same engines hand over again. An old ticket finds nothing then.
#include "tests/proc/flow_scene.h"

using namespace kvferry::testing;
namespace kc = kvferry::client;

namespace {

const std::vector<std::string> kSettings{"engine.heartbeat_interval=200ms",
                                         "engine.silence_limit=2s"};

// Half of the prompt has been sent and received; the rest stays out.
void half_way(FlowRequest& request) {
  request.compute(0, request.prompt / 2);
  request.send(0, request.prompt / 2, false);
  request.receive();
  FlowScene& scene = request.scene;
  scene.run([&] {
    for (std::size_t r = 0; r < scene.decode.size(); ++r) {
      const auto status = scene.decode[r]->client().status(request.receives[r]);
      if (!status || status->slices == 0) return false;
    }
    return true;
  });
}

void require_failed(FlowWorker& worker, kc::TransferHandle transfer, const std::string& reason) {
  const auto& told = worker.told(transfer);
  CHECK(told.failed == 1);
  CHECK(told.reason == reason);
  CHECK(told.source_released + told.dest_released == 1);
  CHECK(told.completed + told.delivered + told.cancelled == 0);
}

using Workers = std::vector<std::unique_ptr<FlowWorker>>;

void restart(FlowScene& scene, int side, const Workers& workers, uint32_t times) {
  require_ok(scene.pair->restart(side));
  scene.run([&] {
    return std::all_of(workers.begin(), workers.end(),
                       [&](const auto& worker) { return worker->reattached() == times; });
  });
  for (const auto& worker : workers) CHECK(worker->daemon_restarts() == times);
}

void require_hand_over(FlowScene& scene) {
  FlowRequest request(scene, 200);
  request.prefill_all();
  request.receive();
  scene.run([&] { return request.sent() && request.received(); });
  request.require_well();
  request.close();
}

}  // namespace

TEST_CASE("the decode side's daemon is killed while its engine waits for KV") {
  FlowScene scene({FlowGroup{}}, {}, 2, kSettings);
  FlowRequest request(scene, 400);
  half_way(request);
  scene.pair->side(1).kill_now();
  scene.run([&] { return request.sent() && request.received(); });
  for (std::size_t r = 0; r < 2; ++r) {
    require_failed(*scene.decode[r], request.receives[r], "DAEMON_RESTARTED");
    require_failed(*scene.prefill[r], request.sends[r], "PEER_LOST");
  }
  request.close();
  restart(scene, 1, scene.decode, 1);
  require_hand_over(scene);
  scene.require_quiet();
}

TEST_CASE("the prefill side's daemon is killed; its old ticket finds nothing in its successor") {
  FlowScene scene({FlowGroup{}}, {}, 2, kSettings);
  FlowRequest request(scene, 400);
  half_way(request);
  scene.pair->side(0).kill_now();
  scene.run([&] { return request.sent() && request.received(); });
  for (std::size_t r = 0; r < 2; ++r) {
    require_failed(*scene.prefill[r], request.sends[r], "DAEMON_RESTARTED");
    require_failed(*scene.decode[r], request.receives[r], "PEER_LOST");
  }
  request.close();
  restart(scene, 0, scene.prefill, 1);

  // The same names, new pages: who still has the ticket of before gets nothing from them.
  const std::string old = scene.ticket;
  FlowRequest stale(scene, 64);
  stale.compute(0, 64);
  stale.send(0, 64, true, [](kc::SendRequest& of) { of.lease = milliseconds(1000); });
  stale.receive({}, [](kc::ReceiveRequest& of) { of.wait = milliseconds(500); });
  scene.run([&] { return stale.received() && stale.sent(); });
  for (std::size_t r = 0; r < 2; ++r) {
    const auto& told = scene.decode[r]->told(stale.receives[r]);
    CHECK(told.failed == 1);
    CHECK((told.reason == "DEADLINE" || told.reason == "STALE_CARDS"));
    CHECK(told.dest_released == 1);
    CHECK(scene.decode[r]->client().status(stale.receives[r])->bytes_done == 0);
    require_failed(*scene.prefill[r], stale.sends[r], "EXPIRED");
  }
  stale.close();

  const auto fresh = scene.prefill[0]->client().ticket("prefill");
  require_ok(fresh);
  CHECK(*fresh != old);
  scene.ticket = *fresh;
  require_hand_over(scene);
  scene.require_quiet();
}

TEST_CASE("requests that wait when the peer's daemon dies are all ended, none hangs") {
  FlowScene scene({FlowGroup{}}, {}, 1, kSettings);
  // Sent and unclaimed, opened, half way, and received before anybody sends.
  FlowRequest sent(scene, 64);
  sent.compute(0, 64);
  sent.send(0, 64, true, [](kc::SendRequest& of) { of.lease = milliseconds(1500); });
  FlowRequest opened(scene, 64);
  for (const auto& worker : scene.prefill)
    opened.sends.push_back(worker->open_send(opened.key, milliseconds(1500)));
  FlowRequest running(scene, 256);
  half_way(running);
  FlowRequest waiting(scene, 64);
  waiting.receive({}, [](kc::ReceiveRequest& of) { of.wait = seconds(20); });
  scene.pair->side(0).kill_now();
  scene.run([&] {
    return sent.sent() && opened.sent() && running.sent() && running.received() &&
           waiting.received();
  });
  for (std::size_t r = 0; r < 2; ++r) {
    require_failed(*scene.prefill[r], sent.sends[r], "DAEMON_RESTARTED");
    require_failed(*scene.prefill[r], opened.sends[r], "DAEMON_RESTARTED");
    require_failed(*scene.prefill[r], running.sends[r], "DAEMON_RESTARTED");
    // Nothing of these was ever handed to a daemon.
    scene.prefill[r]->give_back(opened.prefill_pages[r]);
    scene.prefill[r]->give_back(waiting.prefill_pages[r]);
  }
  require_failed(*scene.decode[0], running.receives[0], "PEER_LOST");
  require_failed(*scene.decode[0], waiting.receives[0], "PEER_LOST");
  for (FlowWorker* worker : scene.all()) CHECK_NOTHROW(worker->check_free_pages());
  CHECK(comes_true([&] { return arena_in_use(scene.pair->side(1)) == 0; }));
}
