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

namespace {

// A prompt whose first 64 tokens are sent as slice 0 and the next 128 as slice 1: one chunk and two
// of each rank.
struct Preemption {
  FlowScene& scene;
  FlowRequest request{scene, 256};
  std::set<uint32_t> dropped[2];

  explicit Preemption(FlowScene& of) : scene(of) {}
  void send() {
    request.compute(0, 192);
    request.send(0, 64, false);
    request.send(64, 192, false);
  }
  // The engine takes the blocks of tokens 64 ... away; those of dropped slices are overwritten at
  // once and their tokens computed anew in other blocks.
  void preempt() {
    for (std::size_t r = 0; r < 2; ++r) {
      FlowWorker& worker = *scene.prefill[r];
      const auto sends = worker.client().revoke(request.sends[r], 64);
      require_ok(sends);
      dropped[r] = {sends->begin(), sends->end()};
      if (!dropped[r].contains(1)) continue;
      auto& ids = request.prefill_pages[r][0];
      worker.revoked(request.sends[r], {{ids.begin() + 4, ids.end()}});
      const auto fresh = worker.allocate(256 - 64);
      std::copy(fresh[0].begin(), fresh[0].end(), ids.begin() + 4);
      worker.hold(request.sends[r], fresh);
    }
  }
  void send_rest(uint64_t from) {
    request.compute(from, 256);
    request.send(from, 256, true);
  }
  void finish() {
    scene.run([&] { return request.sent() && request.received(); });
    request.require_well();
    request.close();
  }
  // Chunks of the request that lie in the decode side's arena.
  double landed() const {
    return metric(scene.pair->side(1), "kvferry_arena_bytes", "state=\"landed\"");
  }
  bool gathered(uint64_t slices) const {
    for (std::size_t r = 0; r < 2; ++r)
      if (scene.prefill[r]->client().status(request.sends[r])->slices != slices) return false;
    return true;
  }
};
const std::set<uint32_t> kSliceOne{1};
constexpr double kChunk = 16 << 10;

}  // namespace

TEST_CASE("preemption while chunks wait at the receiver: what has landed of them is never used") {
  // A sender has two chunks under way, and the receiver takes none before its pages are ready.
  FlowScene scene({FlowGroup{}}, {}, 1, {"engine.leg_credits=2", "engine.staged_ahead=0"});
  const uint32_t word = *scene.decode[0]->client().alloc_word();
  Preemption of(scene);
  of.request.receive(
      {}, [&](kc::ReceiveRequest& call) { call.ready = kc::ReadyCondition::timeline(word, 1); });
  of.send();
  // Slice 0 and half of slice 1, of both ranks.
  REQUIRE(comes_true([&] { return of.landed() == 4 * kChunk; }));
  REQUIRE(of.gathered(1));
  of.preempt();
  for (const auto& dropped : of.dropped) CHECK(dropped == kSliceOne);
  of.send_rest(64);
  require_ok(scene.decode[0]->client().signal(word, 1));
  of.finish();
  scene.require_quiet();
}

TEST_CASE("preemption before anybody pulls drops the chunk, after all has been gathered nothing") {
  FlowScene scene;
  Preemption early(scene);
  early.send();
  early.preempt();
  for (const auto& dropped : early.dropped) CHECK(dropped == kSliceOne);
  early.send_rest(64);
  early.request.receive();
  early.finish();

  Preemption late(scene);
  late.request.receive();
  late.send();
  scene.run([&] { return late.gathered(2); });
  late.preempt();
  for (const auto& dropped : late.dropped) CHECK(dropped.empty());
  late.send_rest(192);
  late.finish();
  scene.require_quiet();
}

TEST_CASE(
    "chunks that are sent before the forward pass has written them go when their word says so") {
  FlowScene scene;
  for (const bool packed : {false, true}) {
    CAPTURE(packed);
    FlowRequest request(scene, 192);
    std::vector<uint32_t> words;
    for (const auto& worker : scene.prefill) words.push_back(*worker->client().alloc_word());
    for (uint64_t chunk = 0; chunk < 3; ++chunk)
      request.send(64 * chunk, 64 * (chunk + 1), chunk == 2, [&](kc::SendRequest& of) {
        of.ready = kc::ReadyCondition::timeline(words[of.layout.rank], chunk + 1);
        of.packed_copy = packed;
      });
    request.receive();
    scene.run([&] {
      return scene.prefill[0]->told(request.sends[0]).receiver_ready == 1 &&
             scene.prefill[1]->told(request.sends[1]).receiver_ready == 1;
    });
    // Two layers, keys and values, of all heads.
    constexpr uint64_t kChunkBytes = 64 * 2 * 2 * kFlowHeads * kFlowCellBytes;
    for (uint64_t chunk = 0; chunk < 3; ++chunk) {
      for (std::size_t r = 0; r < 2; ++r)
        CHECK(scene.prefill[r]->told(request.sends[r]).source_released == 0);
      request.compute(64 * chunk, 64 * (chunk + 1));
      for (std::size_t r = 0; r < 2; ++r)
        require_ok(scene.prefill[r]->client().signal(words[r], chunk + 1));
      const auto arrived = [&] {
        const auto status = scene.decode[0]->client().status(request.receives[0]);
        return status ? status->bytes_done : 0;
      };
      scene.run([&] { return arrived() >= kChunkBytes * (chunk + 1); });
      CHECK(arrived() == kChunkBytes * (chunk + 1));
    }
    scene.run([&] { return request.sent() && request.received(); });
    request.require_well();
    request.close();
    for (std::size_t r = 0; r < 2; ++r) scene.prefill[r]->client().free_word(words[r]);
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
  for (std::size_t r = 0; r < 2; ++r) scene.prefill[r]->give_back(request.prefill_pages[r]);
  request.close();
  scene.require_quiet();
}
