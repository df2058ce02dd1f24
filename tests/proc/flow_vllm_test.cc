// The flow of an engine whose scheduler hands out ids before its workers send: prefill first with
// claims, or decode first through a router. Every point at which a request may be aborted.
#include "tests/proc/flow_scene.h"

using namespace kvferry::testing;
namespace kc = kvferry::client;

namespace {

kc::ClaimRequest claim_of(const FlowRequest& request, std::size_t rank, milliseconds ttl = {}) {
  kc::ClaimRequest claim;
  claim.key = request.key;
  claim.layout = request.scene.decode[rank]->layout();
  claim.ticket = request.scene.ticket;
  claim.ttl = ttl;
  return claim;
}

void require_reason(FlowWorker& worker, kc::TransferHandle transfer, const std::string& reason) {
  const auto& told = worker.told(transfer);
  CHECK(told.reason == reason);
  CHECK(told.source_released + told.dest_released == 1);
  CHECK(told.completed + told.delivered == 0);
}

}  // namespace

TEST_CASE("prefill first: chunks are pushed, the decode side claims, loads and decodes") {
  FlowScene scene({FlowGroup{}}, {}, 2);
  const std::size_t prefill_pages = scene.prefill[0]->free_pages();
  const std::size_t decode_pages = scene.decode[0]->free_pages();
  // Several requests at once, longer than the pools together: pages go round.
  for (int round = 0; round < 3; ++round) {
    std::vector<std::unique_ptr<FlowRequest>> requests;
    for (const uint64_t tokens : {200U, 33U, 90U, 160U}) {
      auto request = std::make_unique<FlowRequest>(scene, tokens);
      for (std::size_t r = 0; r < scene.decode.size(); ++r)
        require_ok(scene.decode[r]->client().claim(claim_of(*request, r)));
      for (uint64_t begin = 0; begin < tokens; begin += 64) {  // chunked prefill
        const uint64_t end = std::min(tokens, begin + 64);
        request->compute(begin, end);
        request->send(begin, end, end == tokens);
      }
      requests.push_back(std::move(request));
    }
    for (auto& request : requests) request->receive();
    scene.run([&] {
      return std::all_of(requests.begin(), requests.end(),
                         [](const auto& of) { return of->sent() && of->received(); });
    });
    for (auto& request : requests) {
      request->require_well();
      request->close();
    }
  }
  for (const auto& worker : scene.prefill) CHECK(worker->free_pages() == prefill_pages);
  for (const auto& worker : scene.decode) CHECK(worker->free_pages() == decode_pages);
  scene.require_quiet();
}

TEST_CASE("the source is released before the delivery, and the pages may be overwritten at once") {
  FlowScene scene;
  FlowRequest request(scene, 320);
  const uint32_t word = *scene.decode[0]->client().alloc_word();
  request.prefill_all();
  request.receive(
      {}, [&](kc::ReceiveRequest& of) { of.ready = kc::ReadyCondition::timeline(word, 1); });
  // All is gathered and waits at the receiver: the prefill engine reuses its pages meanwhile.
  scene.run([&] {
    return scene.prefill[0]->told(request.sends[0]).source_released == 1 &&
           scene.prefill[1]->told(request.sends[1]).source_released == 1;
  });
  CHECK(scene.decode[0]->told(request.receives[0]).completed == 0);
  require_ok(scene.decode[0]->client().signal(word, 1));
  scene.run([&] { return request.sent() && request.received(); });
  request.require_well();
  request.close();
  scene.require_quiet();
}

TEST_CASE("a request aborted during prefill, after some chunks were sent") {
  FlowScene scene;
  FlowRequest request(scene, 256);
  request.receive();
  request.compute(0, 128);
  request.send(0, 128, false);
  for (std::size_t r = 0; r < 2; ++r)
    require_ok(scene.prefill[r]->client().cancel(request.sends[r]));
  scene.run([&] { return request.sent() && request.received(); });
  for (std::size_t r = 0; r < 2; ++r)
    require_reason(*scene.prefill[r], request.sends[r], "CANCELLED");
  require_reason(*scene.decode[0], request.receives[0], "CANCELLED");
  CHECK(scene.decode[0]->told(request.receives[0]).failed == 1);
  request.close();
  scene.require_quiet();
}

TEST_CASE("a request aborted by the decode side before it was scheduled: declined") {
  FlowScene scene;
  FlowRequest request(scene, 128);
  for (const bool before_send : {true, false}) {
    FlowRequest of(scene, 128);
    const auto decline = [&] { require_ok(scene.decode[0]->client().decline(claim_of(of, 0))); };
    if (before_send) decline();
    of.prefill_all();
    if (!before_send) decline();
    scene.run([&] { return of.sent(); });
    for (std::size_t r = 0; r < 2; ++r) require_reason(*scene.prefill[r], of.sends[r], "DECLINED");
    of.close();
  }
  for (std::size_t r = 0; r < 2; ++r) scene.prefill[r]->give_back(request.prefill_pages[r]);
  scene.require_quiet();
}

TEST_CASE("a request aborted while it waits for its KV: cancelled, pages follow DEST_RELEASED") {
  FlowScene scene;
  FlowRequest request(scene, 256);
  request.receive();
  const auto cancelled = scene.decode[0]->client().cancel(request.receives[0]);
  require_ok(cancelled);
  CHECK(cancelled->state == kc::TransferState::kCancelled);
  // Repeatable, and true about memory.
  require_ok(scene.decode[0]->client().cancel(request.receives[0]));
  request.prefill_all();
  scene.run([&] { return request.sent() && request.received(); });
  require_reason(*scene.decode[0], request.receives[0], "CANCELLED");
  for (std::size_t r = 0; r < 2; ++r) {
    // Whether its PULL had gone out is a matter of moments.
    const auto& told = scene.prefill[r]->told(request.sends[r]);
    CHECK((told.reason == "CANCELLED" || told.reason == "DECLINED"));
    CHECK(told.source_released == 1);
  }
  request.close();
  scene.require_quiet();
}

TEST_CASE("aborts at any moment of running transfers release each page once") {
  FlowScene scene;
  for (std::size_t round = 0; round < 12; ++round) {
    FlowRequest request(scene, 400);
    request.compute(0, 400);
    request.send(0, 200, false);
    request.receive();
    for (std::size_t steps = 0; steps < round; ++steps)
      for (FlowWorker* worker : scene.all()) worker->step();
    if (round % 2 == 0)
      require_ok(scene.decode[0]->client().cancel(request.receives[0]));
    else
      require_ok(scene.prefill[round % 4 / 2]->client().cancel(request.sends[round % 4 / 2]));
    scene.run([&] { return request.received() && request.sent(); });
    CHECK(scene.decode[0]->told(request.receives[0]).completed == 0);
    request.close();
  }
  scene.require_quiet();
}

TEST_CASE("a decode side that never comes: the lease ends and the pages are back") {
  FlowScene scene;
  FlowRequest request(scene, 128);
  request.compute(0, 128);
  request.send(0, 128, true, [](kc::SendRequest& of) { of.lease = milliseconds(200); });
  scene.run([&] { return request.sent(); });
  for (std::size_t r = 0; r < 2; ++r)
    require_reason(*scene.prefill[r], request.sends[r], "EXPIRED");
  request.close();
  scene.require_quiet();
}

TEST_CASE("claims hold the pages over several leases, until the claimer dies") {
  FlowScene scene;
  FlowRequest request(scene, 128);
  require_ok(scene.decode[0]->client().claim(claim_of(request, 0, milliseconds(300))));
  request.compute(0, 128);
  request.send(0, 128, true, [](kc::SendRequest& of) { of.lease = milliseconds(300); });
  const auto begin = std::chrono::steady_clock::now();
  scene.run([&] { return std::chrono::steady_clock::now() - begin > milliseconds(1200); });
  CHECK_FALSE(request.sent());
  scene.decode[0]->die();
  scene.run([&] { return request.sent(); });
  for (std::size_t r = 0; r < 2; ++r)
    require_reason(*scene.prefill[r], request.sends[r], "DECLINED");
}

TEST_CASE("a decode worker that dies while it receives") {
  FlowScene scene;
  FlowRequest request(scene, 256);
  request.compute(0, 256);
  request.receive();
  request.send(0, 128, false);
  scene.run([&] { return scene.prefill[0]->told(request.sends[0]).receiver_ready == 1; });
  scene.decode[0]->die();
  scene.run([&] { return request.sent(); });
  for (std::size_t r = 0; r < 2; ++r)
    require_reason(*scene.prefill[r], request.sends[r], "WORKER_LOST");
}

TEST_CASE("a prefill worker that dies before its source is released") {
  FlowScene scene;
  FlowRequest request(scene, 256);
  request.receive();
  request.compute(0, 128);
  request.send(0, 128, false);
  scene.run([&] { return scene.prefill[0]->told(request.sends[0]).receiver_ready == 1; });
  scene.prefill[1]->die();
  scene.run([&] { return request.received(); });
  require_reason(*scene.decode[0], request.receives[0], "WORKER_LOST");
  scene.run([&] { return scene.prefill[0]->told(request.sends[0]).over(); });
}

TEST_CASE("preemption: chunks are revoked, computed again in other blocks and sent again") {
  FlowScene scene;
  for (const bool receiver_first : {false, true}) {
    FlowRequest request(scene, 256);
    if (receiver_first) request.receive();
    request.compute(0, 192);
    request.send(0, 64, false);
    request.send(64, 192, false);
    // The engine takes blocks of tokens 64 ... away. What it may overwrite, Revoke says.
    std::vector<FlowWorker::Pages> taken(2, FlowWorker::Pages(1));
    uint64_t resume = 256;
    std::set<uint32_t> dropped[2];
    for (std::size_t r = 0; r < 2; ++r) {
      const auto sends = scene.prefill[r]->client().revoke(request.sends[r], 64);
      require_ok(sends);
      dropped[r] = {sends->begin(), sends->end()};
      if (dropped[r].contains(1)) resume = std::min<uint64_t>(resume, 64);
    }
    for (std::size_t r = 0; r < 2; ++r) {
      // A rank that had been gathered already keeps what it sent; its blocks stay with it.
      if (!dropped[r].contains(1)) continue;
      auto& ids = request.prefill_pages[r][0];
      for (std::size_t b = 4; b < ids.size(); ++b) taken[r][0].push_back(ids[b]);
      scene.prefill[r]->revoked(request.sends[r], taken[r]);
      const auto fresh = scene.prefill[r]->allocate(256 - 64);
      std::copy(fresh[0].begin(), fresh[0].end(), ids.begin() + 4);
      scene.prefill[r]->hold(request.sends[r], {fresh[0]});
      scene.prefill[r]->compute(request.number, request.prefill_pages[r], 64, 192);
    }
    for (std::size_t r = 0; r < 2; ++r) {
      scene.prefill[r]->compute(request.number, request.prefill_pages[r], 192, 256);
      const bool again = dropped[r].contains(1);
      scene.prefill[r]->send(request.key, 2, request.prefill_pages[r], again ? 64 : 192, 256, 256,
                             true);
    }
    if (!receiver_first) request.receive();
    scene.run([&] { return request.sent() && request.received(); });
    request.require_well();
    request.close();
  }
  scene.require_quiet();
}

TEST_CASE("a failed load is tried again under a new id, with other blocks") {
  FlowScene scene;
  FlowRequest failed(scene, 128);
  // Nobody ever sends it: the wait ends.
  failed.receive({}, [](kc::ReceiveRequest& of) { of.wait = milliseconds(200); });
  scene.run([&] { return failed.received(); });
  require_reason(*scene.decode[0], failed.receives[0], "DEADLINE");
  FlowRequest again(scene, 128);
  again.prefill_all();
  again.receive();
  scene.run([&] { return again.sent() && again.received(); });
  again.require_well();
  for (std::size_t r = 0; r < 2; ++r) scene.prefill[r]->give_back(failed.prefill_pages[r]);
  // The failed one's id stays dead.
  failed.close();
  const auto pages = scene.decode[0]->allocate(128);
  const auto dead = scene.decode[0]->receive(failed.key, scene.ticket, pages, 128);
  scene.run([&] { return scene.decode[0]->told(dead).rejected.has_value(); });
  CHECK(scene.decode[0]->told(dead).rejected->reason == "TRANSFER_CLOSED");
  again.close();
  scene.require_quiet();
}

TEST_CASE("a full hit needs no byte, and still frees the prefill side") {
  FlowScene scene;
  FlowRequest request(scene, 128);
  request.prefill_all();
  request.receive({128});
  scene.run([&] { return request.sent() && request.received(); });
  request.require_well();
  CHECK(scene.decode[0]->client().status(request.receives[0])->bytes_done == 0);
  request.close();
  scene.require_quiet();
}

TEST_CASE("groups with windows and null blocks, numbered differently on both sides") {
  const FlowGroup full{{0, 2}, 0};
  const FlowGroup window{{1, 3}, 48};
  FlowScene scene({full, window}, {window, full});
  FlowRequest request(scene, 200);
  // The engine has given up the blocks that its window has passed: their ids are null.
  const uint64_t first = (200 + 1 - 48) / kFlowBlock;
  for (std::size_t r = 0; r < 2; ++r) {
    FlowWorker::Pages passed(2);
    for (uint64_t b = 0; b < first; ++b)
      passed[1].push_back(std::exchange(request.prefill_pages[r][1][b], 0));
    scene.prefill[r]->give_back(passed);
  }
  request.compute(0, 200);
  request.send(0, 200, true);
  FlowWorker& decode = *scene.decode[0];
  FlowWorker::Pages pages = decode.allocate(200);
  FlowWorker::Pages passed(2);
  for (uint64_t b = 0; b < first; ++b) passed[0].push_back(std::exchange(pages[0][b], 0));
  decode.give_back(passed);
  const auto receive = decode.receive(request.key, scene.ticket, pages, 200, {0, 64});
  bool right = false;
  decode.on_completed(receive, [&] {
    right = decode.holds(request.number, pages, 0, first * kFlowBlock, 200) &&
            decode.holds(request.number, pages, 1, 64, 200);
  });
  scene.run([&] { return request.sent() && decode.told(receive).over(); });
  CHECK(decode.told(receive).completed == 1);
  CHECK(right);
  // Two layers, K and V, 4 heads: a token of a group is 512 bytes.
  CHECK(decode.client().status(receive)->bytes_done ==
        ((13 - first) * kFlowBlock + (13 - 4) * kFlowBlock) * 2 * 2 * 4 * kFlowCellBytes);
  scene.require_quiet();
}

TEST_CASE(
    "decode first: a router names both sides, the prefill side skips nothing and learns who "
    "waits") {
  FlowScene scene;
  const std::string by_name =
      "kvferry:127.0.0.1:" + std::to_string(scene.pair->side(0).peer_port()) + "/prefill";
  FlowRequest request(scene, 160);
  scene.ticket = by_name;
  request.receive({32});
  for (const auto& worker : scene.prefill) request.sends.push_back(worker->open_send(request.key));
  scene.run([&] {
    return scene.prefill[0]->told(request.sends[0]).receiver_ready == 1 &&
           scene.prefill[1]->told(request.sends[1]).receiver_ready == 1;
  });
  for (uint64_t begin = 0; begin < 160; begin += 80) {
    request.compute(begin, begin + 80);
    request.send(begin, begin + 80, begin == 80);
  }
  scene.run([&] { return request.sent() && request.received(); });
  request.require_well();
  request.close();
  scene.require_quiet();
}

TEST_CASE("decode first, and the prefill side never opens the transfer") {
  FlowScene scene;
  FlowRequest request(scene, 64);
  request.receive({}, [](kc::ReceiveRequest& of) { of.wait = milliseconds(300); });
  scene.run([&] { return request.received(); });
  require_reason(*scene.decode[0], request.receives[0], "DEADLINE");
  // With another secret it is another transfer, which nobody waits for.
  for (std::size_t r = 0; r < 2; ++r) scene.prefill[r]->give_back(request.prefill_pages[r]);
  request.close();
  scene.require_quiet();
}
