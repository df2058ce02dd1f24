// Calls of workers: idempotency, bad input, slots. And the parts that stand alone: arena, turns,
// timers, proofs.
#include <algorithm>

#include "daemon/engine/arena.h"
#include "daemon/engine/fair_queue.h"
#include "daemon/engine/proofs.h"
#include "daemon/engine/timers.h"
#include "tests/unit/engine_harness.h"

namespace kvferry::engine::test {
namespace {

TEST_CASE("the same call twice is answered existing; another body names the field") {
  Pair pair;
  pair.s.post(pair.send_op("a", 0, {0, 16}, false));
  const uint32_t slot = pair.s.last_reply().slot;
  CHECK_FALSE(pair.s.last_reply().existing);
  pair.s.post(pair.send_op("a", 0, {0, 16}, false));
  CHECK(pair.s.last_reply().existing);
  CHECK(pair.s.last_reply().slot == slot);

  const auto refused = [&](SendOp op, const std::string& field) {
    pair.s.post(std::move(op));
    CHECK(pair.s.last_reply().error.code == Code::kAlreadyExists);
    CHECK(pair.s.last_reply().error.field == field);
  };
  refused(pair.send_op("a", 0, {0, 17}, false), "offer");
  refused(pair.send_op("a", 0, {0, 16}, true), "last");
  SendOp op = pair.send_op("a", 0, {0, 16}, false);
  op.num_tokens = 65;
  refused(op, "num_tokens");
  op = pair.send_op("a", 0, {0, 16}, false);
  op.aux = "x";
  refused(op, "aux");
  op = pair.send_op("a", 0, {0, 16}, false);
  op.layers = Range{0, 2};
  refused(op, "layers");
  op = pair.send_op("a", 0, {0, 16}, false);
  op.blocks = {{0, 0, {1, 2}}};
  refused(op, "blocks");
  op = pair.send_op("a", 0, {0, 16}, false);
  op.ready = {ReadyCondition::Kind::kTimeline, 1, 1};
  refused(op, "ready");
  op = pair.send_op("a", 0, {0, 16}, false);
  op.max_receivers = 2;
  refused(op, "max_receivers");
  op = pair.send_op("a", 0, {0, 16}, false);
  op.client_handle = 12345;
  refused(op, "client_handle");
  op = pair.send_op("a", 0, {0, 16}, false);
  op.lease += std::chrono::seconds(1);
  refused(op, "lease");
  op = pair.send_op("a", 0, {0, 16}, false);
  op.deadline += std::chrono::seconds(1);
  refused(op, "deadline");
  CHECK(pair.s.engine.snapshot(pair.s.now).transfers.size() == 1);
}

TEST_CASE("a repeated OpenSend is answered existing; other times are named") {
  Pair pair;
  using std::chrono::seconds;
  const OpenSendOp op{{{1}, 5}, 77, key_of("c"), pair.s_layout, seconds(2), seconds(60), 1};
  pair.s.post(op);
  pair.s.post(op);
  CHECK(pair.s.last_reply().existing);
  OpenSendOp other = op;
  other.lease = seconds(3);
  pair.s.post(other);
  CHECK(pair.s.last_reply().error.field == "lease");
  other = op;
  other.deadline = seconds(3);
  pair.s.post(other);
  CHECK(pair.s.last_reply().error.code == Code::kAlreadyExists);
  CHECK(pair.s.last_reply().error.field == "deadline");
}

TEST_CASE("a repeated Receive is answered existing; another body names the field") {
  Pair pair;
  pair.r.post(pair.receive_op("a", {0, 64}));
  pair.r.post(pair.receive_op("a", {0, 64}));
  CHECK(pair.r.last_reply().existing);
  CHECK(pair.r.seen<Resolve>().size() == 1);
  ReceiveOp op = pair.receive_op("a", {0, 32});
  pair.r.post(op);
  CHECK(pair.r.last_reply().error.field == "needs");
  op = pair.receive_op("a", {0, 64});
  op.ticket = "other";
  pair.r.post(op);
  CHECK(pair.r.last_reply().error.field == "ticket");
  op = pair.receive_op("a", {0, 64});
  op.wait_for_arena = false;
  pair.r.post(op);
  CHECK(pair.r.last_reply().error.field == "wait_for_arena");
  op = pair.receive_op("a", {0, 64});
  op.wait += std::chrono::seconds(1);
  pair.r.post(op);
  CHECK(pair.r.last_reply().error.field == "wait");
  op = pair.receive_op("a", {0, 64});
  op.deadline += std::chrono::seconds(1);
  pair.r.post(op);
  CHECK(pair.r.last_reply().error.field == "deadline");
}

TEST_CASE("send indices have no gap, and nothing comes after the last") {
  Pair pair;
  pair.s.post(pair.send_op("a", 1, {0, 16}, false));
  CHECK(pair.s.last_reply().error.reason == "SEND_INDEX_GAP");
  pair.s.post(pair.send_op("a", 0, {0, 16}, true));
  pair.s.post(pair.send_op("a", 1, {16, 32}, false));
  CHECK(pair.s.last_reply().error.reason == "AFTER_LAST");
  CHECK(pair.s.last_reply().error.field == "send_index");
}

TEST_CASE("bad input names its field and changes nothing") {
  Pair pair;
  const auto field = [&](SendOp op) {
    pair.s.post(std::move(op));
    CHECK(pair.s.last_reply().error.code == Code::kInvalidArgument);
    return pair.s.last_reply().error.field;
  };
  SendOp op = pair.send_op("a", 0, {0, 16}, false);
  op.key.id = "";
  CHECK(field(op) == "transfer.id");
  op = pair.send_op("a", 0, {0, 16}, false);
  op.key.id = std::string(65, 'x');
  CHECK(field(op) == "transfer.id");
  op = pair.send_op("a", 0, {0, 16}, false);
  op.layout = nullptr;
  CHECK(field(op) == "layout");
  op = pair.send_op("a", 0, {0, 16}, false);
  op.key.instance = "default/other";
  CHECK(field(op) == "transfer.instance");
  CHECK(pair.s.engine.snapshot(pair.s.now).transfers.empty());
}

TEST_CASE("a slot is freed by Close only after the end, and the id stays dead") {
  Pair pair;
  pair.s.post(pair.send_op("a", 0, {0, 64}, true));
  const CloseOp close{{{1}, 4}, Pair::handle_of("a")};
  pair.s.post(close);
  CHECK(pair.s.last_reply().error.reason == "STILL_OPEN");
  pair.s.post(CancelOp{{{1}, 3}, Pair::handle_of("a")});
  pair.s.post(close);
  CHECK(pair.s.last_reply().error.code == Code::kOk);
  CHECK(pair.s.seen<FreeSlot>().size() == 1);
  pair.s.post(close);
  CHECK(pair.s.last_reply().existing);
  pair.s.post(pair.send_op("a", 0, {0, 64}, true));
  CHECK(pair.s.last_reply().error.code == Code::kAlreadyExists);
  CHECK(pair.s.last_reply().error.reason == "TRANSFER_CLOSED");
  // A PULL for it is told why it ended.
  pair.r.post(pair.receive_op("a", {0, 64}));
  pair.run();
  CHECK(pair.received("a").reason == Reason::kCancelled);
}

TEST_CASE("a full status table is RESOURCE_EXHAUSTED, and a freed slot is used again") {
  Pair pair;
  pair.s.post(WorkerGone{{1}});
  pair.s.post(WorkerAttached{{1}, "default", 2});
  for (const char* id : {"a", "b"}) pair.s.post(pair.send_op(id, 0, {0, 16}, false));
  pair.s.post(pair.send_op("c", 0, {0, 16}, false));
  CHECK(pair.s.last_reply().error.code == Code::kResourceExhausted);
  pair.s.post(CancelOp{{{1}, 3}, Pair::handle_of("a")});
  pair.s.post(CloseOp{{{1}, 4}, Pair::handle_of("a")});
  pair.s.post(pair.send_op("c", 0, {0, 16}, false));
  CHECK(pair.s.last_reply().error.code == Code::kOk);
  CHECK(pair.s.last_reply().slot == 0);
}

TEST_CASE("a socket's workers share its transfers, and other sockets' have their own") {
  Pair pair;
  pair.s.post(WorkerGone{{1}});
  for (const uint64_t worker : {uint64_t{1}, uint64_t{3}})
    pair.s.post(WorkerAttached{{worker}, "default", 8, 4, {2}});
  pair.s.post(WorkerAttached{{5}, "other", 8, 5, {2}});
  // Of another name for each worker, as one rank is one worker's.
  const auto reason_of_send = [&](uint64_t worker, const char* id) {
    SendOp op = pair.send_op(id, 0, {0, 16}, false);
    auto layout = std::make_shared<LayoutHandle>(*op.layout);
    layout->worker = {worker};
    op.op.worker = {worker};
    op.layout = layout;
    pair.s.post(op);
    return pair.s.last_reply().error.reason;
  };
  CHECK(reason_of_send(1, "a") == "");
  CHECK(reason_of_send(1, "b") == "");
  CHECK(reason_of_send(3, "c") == "SOCKET_LIMIT");
  CHECK(pair.s.last_reply().error.code == Code::kResourceExhausted);
  CHECK(pair.s.last_reply().error.message.find("limits.max_transfers") != std::string::npos);
  CHECK(reason_of_send(5, "d") == "");
  // What the first one gives back, the other may have.
  pair.s.post(CancelOp{{{1}, 3}, Pair::handle_of("a")});
  CHECK(reason_of_send(3, "c") == "SOCKET_LIMIT");
  pair.s.post(CloseOp{{{1}, 4}, Pair::handle_of("a")});
  CHECK(reason_of_send(3, "c") == "");
  CHECK(reason_of_send(3, "e") == "SOCKET_LIMIT");
  pair.s.post(WorkerGone{{1}});
  CHECK(reason_of_send(3, "e") == "");
  CHECK(reason_of_send(3, "f") == "SOCKET_LIMIT");
}

TEST_CASE("handles that name nothing are NOT_FOUND") {
  Pair pair;
  pair.s.post(CancelOp{{{1}, 3}, 4711});
  CHECK(pair.s.last_reply().error.code == Code::kNotFound);
  pair.s.post(RevokeOp{{{1}, 3}, 4711, 0});
  CHECK(pair.s.last_reply().error.code == Code::kNotFound);
}

TEST_CASE("a worker that is not attached is told so") {
  Pair pair;
  SendOp op = pair.send_op("a", 0, {0, 16}, false);
  op.op.worker = {9};
  pair.s.post(op);
  CHECK(pair.s.last_reply().error.reason == "NOT_ATTACHED");
}

// ---- arena
// -----------------------------------------------------------------------------------------

TEST_CASE("landing leaves E + 1 frames to staging, staging one to landing") {
  EngineConfig config = small_config(1);
  config.arenas = {{{4 * 64}}};
  config.staged_ahead = 1;
  Arena arena(config, 0);
  REQUIRE(arena.frames() == 4);
  std::vector<memory::Region> landing;
  while (const auto region = arena.take(RegionKind::kLanding, 64)) landing.push_back(*region);
  CHECK(landing.size() == 2);
  std::vector<memory::Region> staging;
  while (const auto region = arena.take(RegionKind::kStaging, 64)) staging.push_back(*region);
  CHECK(staging.size() == 2);
  for (const auto& region : landing) arena.give_back(RegionKind::kLanding, region);
  while (const auto region = arena.take(RegionKind::kStaging, 64)) staging.push_back(*region);
  CHECK(staging.size() == 3);
  CHECK(arena.take(RegionKind::kLanding, 64));
}

TEST_CASE("small regions of one kind never fragment the frames of the other") {
  EngineConfig config = small_config(1);
  config.arenas = {{{4 * 64}}};
  Arena arena(config, 0);
  std::vector<memory::Region> small;
  while (const auto region = arena.take(RegionKind::kLanding, 10)) {
    CHECK(region->bytes == 16);
    small.push_back(*region);
  }
  CHECK(small.size() == 8);  // two frames of four
  CHECK(arena.exhausted(RegionKind::kLanding));
  CHECK(arena.take(RegionKind::kStaging, 64));
  CHECK(arena.take(RegionKind::kStaging, 64));
  arena.give_back(RegionKind::kLanding, small[3]);
  CHECK(arena.take(RegionKind::kLanding, 16) == small[3]);
  CHECK_FALSE(arena.take(RegionKind::kLanding, 64));
}

TEST_CASE("a larger slot serves when no other is left") {
  EngineConfig config = small_config(1);
  config.arenas = {{{4 * 64}}};
  config.staged_ahead = 2;  // one landing frame
  Arena arena(config, 0);
  const auto first = arena.take(RegionKind::kLanding, 32);
  REQUIRE(first);
  const auto second = arena.take(RegionKind::kLanding, 16);
  REQUIRE(second);
  CHECK(second->bytes == 32);
  CHECK_FALSE(arena.take(RegionKind::kLanding, 16));
}

// ---- turns
// -----------------------------------------------------------------------------------------

std::vector<uint64_t> turns(FairQueue& queue, int count) {
  std::vector<uint64_t> legs;
  for (int i = 0; i < count; ++i) {
    const FairKey next = queue.front();
    queue.served(next, 1);
    legs.push_back(next.leg);
  }
  return legs;
}

TEST_CASE("turns go round tenants, then workers, transfers and legs") {
  FairQueue queue;
  queue.insert({1, 1, 1, 11});
  queue.insert({1, 1, 1, 12});
  queue.insert({1, 1, 2, 21});
  queue.insert({1, 2, 3, 31});
  queue.insert({2, 3, 4, 41});
  CHECK(queue.size() == 5);
  CHECK(turns(queue, 8) == std::vector<uint64_t>{11, 41, 31, 41, 21, 41, 31, 41});
  CHECK(turns(queue, 4) == std::vector<uint64_t>{12, 41, 31, 41});
  queue.erase({2, 3, 4, 41});
  queue.erase({2, 3, 4, 41});
  CHECK(queue.size() == 4);
  CHECK(turns(queue, 2) == std::vector<uint64_t>{21, 31});
}

TEST_CASE("who comes back waits behind those who were there") {
  FairQueue queue;
  queue.insert({1, 1, 1, 1});
  queue.insert({1, 1, 1, 2});
  queue.insert({1, 1, 1, 3});
  queue.erase({1, 1, 1, 1});
  queue.insert({1, 1, 1, 1});
  CHECK(turns(queue, 3) == std::vector<uint64_t>{2, 3, 1});
}

TEST_CASE("turns are shared by bytes: small chunks need not wait for as many large ones") {
  FairQueue queue;
  queue.insert({1, 1, 1, 10});
  for (uint64_t leg = 20; leg < 28; ++leg) queue.insert({1, 2, 2, leg});
  // A transfer of one leg with chunks of 8 beside one of eight legs with chunks of 1.
  std::map<uint64_t, uint64_t> had;
  for (int i = 0; i < 90; ++i) {
    const FairKey next = queue.front();
    const uint64_t bytes = next.transfer == 1 ? 8 : 1;
    queue.served(next, bytes);
    had[next.transfer] += bytes;
    had[next.leg] += bytes;
  }
  CHECK(had[1] == 80);
  CHECK(had[2] == 80);
  for (uint64_t leg = 20; leg < 28; ++leg) CHECK(had[leg] == 10);
}

TEST_CASE("newcomers wait for a round and not for more, and nobody waits for them for ever") {
  FairQueue queue;
  queue.insert({1, 1, 1, 1});
  for (int i = 0; i < 100; ++i) queue.served({1, 1, 1, 1}, 1000);
  queue.insert({1, 1, 1, 2});
  queue.insert({1, 1, 1, 3});
  CHECK(turns(queue, 3) == std::vector<uint64_t>{1, 2, 3});
  // One comes for each that is served; the first still has its turn.
  queue.insert({1, 1, 1, 4});
  uint64_t waited = 0;
  for (uint64_t leg = 5;; ++leg, ++waited) {
    queue.insert({1, 1, 1, leg});
    if (turns(queue, 1) == std::vector<uint64_t>{4}) break;
    REQUIRE(waited < 10);
  }
}

// ---- timers
// ----------------------------------------------------------------------------------------

TEST_CASE("timers come in order of time, then of being set; setting again moves them") {
  Timers timers;
  CHECK(timers.next() == Time::never());
  timers.set({TimerKind::kPing, 1, 0}, {20});
  timers.set({TimerKind::kPing, 2, 0}, {10});
  timers.set({TimerKind::kPing, 3, 0}, {10});
  timers.set({TimerKind::kPing, 4, 0}, {5});
  timers.set({TimerKind::kPing, 4, 0}, {30});
  timers.cancel({TimerKind::kPing, 9, 0});
  CHECK(timers.next() == Time{10});
  CHECK_FALSE(timers.pop_due({9}));
  CHECK(timers.pop_due({25})->a == 2);
  CHECK(timers.pop_due({25})->a == 3);
  CHECK(timers.pop_due({25})->a == 1);
  CHECK_FALSE(timers.pop_due({25}));
  timers.cancel({TimerKind::kPing, 4, 0});
  CHECK(timers.next() == Time::never());
}

// ---- proofs
// ----------------------------------------------------------------------------------------

TEST_CASE("a proof binds every field, and no two fields run into each other") {
  const Secret secret = key_of("a").secret;
  ProofFields base;
  base.pull = {boot_of(2), 3};
  base.send = {boot_of(1), 4};
  base.id = "id";
  base.instance = "t/name";
  base.incarnation = incarnation_of(5);
  base.sender_rank = 6;
  base.receiver_rank = 7;
  base.sender_node = "s";
  base.receiver_node = "r";
  base.cards.bytes[0] = 8;
  std::vector<ProofFields> others(14, base);
  others[0].pull.counter = 4;
  others[1].pull.receiver = boot_of(9);
  others[2].send.counter = 5;
  others[3].send.sender = boot_of(9);
  others[4].id = "ie";
  others[5].instance = "t/nam";
  others[6].incarnation = incarnation_of(6);
  others[7].sender_rank = 7;
  others[8].receiver_rank = 6;
  others[9].sender_node = "sr";
  others[9].receiver_node = "";
  others[10].receiver_node = "R";
  others[11].cards.bytes[1] = 1;
  others[12].id = "idt";
  others[12].instance = "/name";
  others[13].sender_node = "";
  others[13].receiver_node = "sr";
  std::vector<Proof> proofs{sender_proof(secret, base), receiver_proof(secret, base)};
  for (const ProofFields& other : others) proofs.push_back(sender_proof(secret, other));
  Secret another = secret;
  another.bytes[0] ^= 1;
  proofs.push_back(sender_proof(another, base));
  std::sort(proofs.begin(), proofs.end());
  CHECK(std::adjacent_find(proofs.begin(), proofs.end()) == proofs.end());
  CHECK(same_proof(sender_proof(secret, base), sender_proof(secret, base)));
  CHECK(secret_tag(secret) != secret_tag(another));
}

}  // namespace
}  // namespace kvferry::engine::test
