// Claims and Declines of one worker: repeated calls, other bodies, what Receive and Close make of
// them, and how many a worker may hold.
#include "tests/unit/engine_harness.h"

namespace kvferry::engine::test {
namespace {

using std::chrono::minutes;
using std::chrono::seconds;

constexpr WorkerId kWorker{2};

struct Claiming : Pair {
  explicit Claiming(EngineConfig receiver = small_config(2))
      : Pair(small_config(1), std::move(receiver)) {}

  ClaimOp claim_op(const std::string& id) {
    ClaimOp op;
    op.op = {kWorker, ++ops};
    op.client_handle = handle_of(id);
    op.key = key_of(id);
    op.ticket = "ticket";
    op.layout = r_layout;
    op.ttl = seconds(3);
    return op;
  }
  DeclineOp decline_op(const std::string& id) {
    return {{kWorker, ++ops}, key_of(id), "ticket", r_layout};
  }
  ReceiveOp receive_of(const std::string& id) const {
    ReceiveOp op = receive_op(id, {0, 64});
    op.ticket = "ticket";
    return op;
  }
  Reply call(Event event) {
    r.post(std::move(event));
    run();
    return r.last_reply();
  }
  // Questions that were asked of the directory, one for each claim or decline that was started.
  std::size_t started() const { return r.seen<Resolve>().size(); }

  uint64_t ops = 0;
};

void require_fresh(const Reply& reply) {
  INFO(reply.error.to_string());
  REQUIRE(reply.error.code == Code::kOk);
  CHECK_FALSE(reply.existing);
}
void require_existing(const Reply& reply) {
  INFO(reply.error.to_string());
  REQUIRE(reply.error.code == Code::kOk);
  CHECK(reply.existing);
}
void require_refused(const Reply& reply, Code code, const char* reason, const char* field) {
  CHECK(reply.error.code == code);
  CHECK(reply.error.reason == reason);
  CHECK(reply.error.field == field);
}

TEST_CASE("the same Claim twice is answered existing; another body names the field") {
  Claiming world;
  require_fresh(world.call(world.claim_op("a")));
  require_existing(world.call(world.claim_op("a")));
  const auto refused = [&](ClaimOp op, const char* field) {
    require_refused(world.call(std::move(op)), Code::kAlreadyExists, "CLAIM_EXISTS", field);
  };
  ClaimOp op = world.claim_op("a");
  op.ttl = seconds(4);
  refused(op, "ttl");
  op = world.claim_op("a");
  op.ticket = "other";
  refused(op, "ticket");
  op = world.claim_op("a");
  op.client_handle += 2;
  refused(op, "client_handle");
  CHECK(world.started() == 1);
  // The first one is as it was.
  require_existing(world.call(world.claim_op("a")));
}

TEST_CASE("a ttl is compared as it is used: 0 is the default, longer than the most is the most") {
  Claiming world;
  ClaimOp op = world.claim_op("a");
  op.ttl = {};
  require_fresh(world.call(op));
  op.ttl = EngineConfig().default_lease;
  require_existing(world.call(op));
  op = world.claim_op("b");
  op.ttl = minutes(2);
  require_fresh(world.call(op));
  op.ttl = minutes(3);
  require_existing(world.call(op));
}

TEST_CASE("a Decline takes a Claim back, and is answered existing when it comes again") {
  Claiming world;
  world.s.post(world.send_op("a", 0, {0, 64}, true));
  require_fresh(world.call(world.claim_op("a")));
  require_fresh(world.call(world.decline_op("a")));
  CHECK(world.sent("a").reason == Reason::kDeclined);
  require_existing(world.call(world.decline_op("a")));
  DeclineOp other = world.decline_op("a");
  other.ticket = "other";
  require_refused(world.call(other), Code::kAlreadyExists, "DECLINED", "ticket");
  require_refused(world.call(world.claim_op("a")), Code::kAlreadyExists, "DECLINED", "transfer.id");
  CHECK(world.started() == 2);
}

TEST_CASE("after its Receive a Claim starts nothing, and a Decline is refused") {
  Claiming world;
  require_fresh(world.call(world.claim_op("a")));
  require_fresh(world.call(world.receive_of("a")));
  const std::size_t claims = world.r.told<MsgClaim>().size();
  require_existing(world.call(world.claim_op("a")));
  ClaimOp op = world.claim_op("a");
  op.client_handle += 2;
  require_refused(world.call(op), Code::kAlreadyExists, "TRANSFER_EXISTS", "client_handle");
  op = world.claim_op("a");
  op.ticket = "other";
  require_refused(world.call(op), Code::kAlreadyExists, "TRANSFER_EXISTS", "ticket");
  require_refused(world.call(world.decline_op("a")), Code::kFailedPrecondition, "ALREADY_RECEIVING",
                  "transfer.id");
  world.pass(seconds(5));
  CHECK(world.r.told<MsgClaim>().size() == claims);
  CHECK(world.r.told<MsgDecline>().empty());
  // The Receive is as it was.
  world.s.post(world.send_op("a", 0, {0, 64}, true));
  world.run();
  CHECK(world.received("a").state == TransferState::kCompleted);
}

TEST_CASE("after Close a Claim and a Decline are too late") {
  Claiming world;
  world.s.post(world.send_op("a", 0, {0, 64}, true));
  require_fresh(world.call(world.receive_of("a")));
  REQUIRE(world.received("a").state == TransferState::kCompleted);
  require_fresh(world.call(CloseOp{{kWorker, ++world.ops}, Pair::handle_of("a")}));
  require_refused(world.call(world.claim_op("a")), Code::kAlreadyExists, "TRANSFER_CLOSED",
                  "transfer.id");
  require_refused(world.call(world.decline_op("a")), Code::kAlreadyExists, "TRANSFER_CLOSED",
                  "transfer.id");
}

TEST_CASE("a worker holds so many claims and no more; what ends one makes room") {
  EngineConfig config = small_config(2);
  config.max_claims_per_worker = 2;
  Claiming world(config);
  require_fresh(world.call(world.claim_op("a")));
  require_fresh(world.call(world.claim_op("b")));
  require_refused(world.call(world.claim_op("c")), Code::kResourceExhausted, "TOO_MANY_CLAIMS", "");
  require_existing(world.call(world.claim_op("a")));
  SECTION("a Decline") {
    require_fresh(world.call(world.decline_op("a")));
  }
  SECTION("a Receive") {
    require_fresh(world.call(world.receive_of("a")));
  }
  SECTION("a ticket that leads nowhere") {
    world.r.post(WorkerGone{kWorker});
    world.r.post(WorkerAttached{kWorker, "default", 64});
    require_refused(world.call(world.claim_op("a")), Code::kAlreadyExists, "DECLINED",
                    "transfer.id");  // its worker had gone
    require_fresh(world.call(world.claim_op("d")));
    world.resolve_reason = Reason::kPeerUnreachable;
    require_fresh(world.call(world.claim_op("e")));
  }
  SECTION("its time") {
    world.pass(minutes(10) + seconds(1));
  }
  require_fresh(world.call(world.claim_op("c")));
}

TEST_CASE("another worker's claims do not count") {
  EngineConfig config = small_config(2);
  config.max_claims_per_worker = 1;
  Claiming world(config);
  require_fresh(world.call(world.claim_op("a")));
  world.r.post(WorkerAttached{{3}, "default", 64});
  ClaimOp op = world.claim_op("b");
  op.op.worker = {3};
  op.layout = make_layout({3}, "default/decode", 2, 1);
  require_fresh(world.call(op));
}

TEST_CASE("a socket's workers share its claims, and other sockets' have their own") {
  Claiming world;
  constexpr WorkerId kNeighbour{3}, kStranger{5};
  world.r.post(WorkerGone{kWorker});
  for (const WorkerId worker : {kWorker, kNeighbour})
    world.r.post(WorkerAttached{worker, "default", 64, 4, {.claims = 2}});
  world.r.post(WorkerAttached{kStranger, "other", 64, 5, {.claims = 2}});
  const auto claim_of = [&](WorkerId worker, const char* id) {
    ClaimOp op = world.claim_op(id);
    op.op.worker = worker;
    if (worker != kWorker)
      op.layout = make_layout(worker, "default/decode", 3, static_cast<uint32_t>(worker.value / 2));
    return op;
  };
  const auto require_full = [](const Reply& reply) {
    require_refused(reply, Code::kResourceExhausted, "SOCKET_LIMIT", "");
    CHECK(reply.error.message.find("limits.max_claims") != std::string::npos);
  };
  require_fresh(world.call(claim_of(kWorker, "a")));
  require_fresh(world.call(claim_of(kNeighbour, "b")));
  require_full(world.call(claim_of(kNeighbour, "c")));
  require_full(world.call(world.decline_op("c")));
  require_existing(world.call(claim_of(kWorker, "a")));
  require_fresh(world.call(claim_of(kStranger, "d")));
  // To take another socket's claim back makes no room on one's own.
  require_fresh(world.call(claim_of(kStranger, "f")));
  DeclineOp of_another = world.decline_op("a");
  of_another.op.worker = kStranger;
  require_full(world.call(of_another));
  // A claim may be taken back; what is said then counts for as long as it is remembered.
  require_fresh(world.call(world.decline_op("a")));
  require_full(world.call(claim_of(kNeighbour, "c")));
  world.pass(seconds(61));
  require_fresh(world.call(claim_of(kWorker, "c")));
  require_full(world.call(claim_of(kNeighbour, "e")));
  // So does what the claims of a worker become that goes.
  world.r.post(WorkerGone{kWorker});
  require_full(world.call(claim_of(kNeighbour, "e")));
  world.pass(seconds(61));
  require_fresh(world.call(claim_of(kNeighbour, "e")));
}

TEST_CASE("declines are bounded too, and are forgotten in time; a refused one keeps the claim") {
  EngineConfig config = small_config(2);
  config.max_declines_per_worker = 1;
  Claiming world(config);
  require_fresh(world.call(world.decline_op("a")));
  require_fresh(world.call(world.claim_op("b")));
  require_refused(world.call(world.decline_op("b")), Code::kResourceExhausted, "TOO_MANY_CLAIMS",
                  "");
  require_existing(world.call(world.claim_op("b")));
  world.pass(seconds(61));
  require_fresh(world.call(world.decline_op("b")));
}

TEST_CASE("a claimer that goes declines what it has claimed, at once and without its memory") {
  for (const bool unregisters : {false, true}) {
    Claiming pair;
    pair.s.post(OpenSendOp{{{1}, 5}, 77, key_of("a"), pair.s_layout, seconds(30), seconds(60), 1});
    const std::weak_ptr<const LayoutHandle> memory = pair.r_layout;
    require_fresh(pair.call(pair.claim_op("a")));
    if (unregisters)
      pair.r.post(UnregisterLayout{pair.r_layout, Reason::kUnregistered});
    else
      pair.r.post(WorkerGone{kWorker});
    pair.run();
    CHECK(pair.s.record({1}, 77).reason == Reason::kDeclined);
    CHECK(pair.s.record({1}, 77).released);
    pair.r.commands.clear();
    pair.r_layout.reset();
    CHECK(memory.expired());
  }
}

TEST_CASE("a claim that nobody has heard of goes with its worker") {
  Claiming pair;
  pair.swallow = [](const Command& command) { return std::holds_alternative<Resolve>(command); };
  pair.s.post(OpenSendOp{{{1}, 5}, 77, key_of("a"), pair.s_layout, seconds(3), seconds(60), 1});
  require_fresh(pair.call(pair.claim_op("a")));
  pair.r.post(WorkerGone{kWorker});
  pair.pass(seconds(4));
  CHECK(pair.s.record({1}, 77).reason == Reason::kExpired);
}

TEST_CASE("a controller's Claim lasts its time from when it was said last, and is not renewed") {
  Claiming claiming;
  const auto controller = std::make_shared<TestLayout>();
  controller->worker = kWorker;
  controller->instance = "default/scheduler";
  const auto claim = [&] {
    ClaimOp op = claiming.claim_op("a");
    op.layout = controller;
    return claiming.call(std::move(op));
  };
  const auto told = [&] { return claiming.r.told<MsgClaim>().size(); };
  require_fresh(claim());
  CHECK(told() == 1);
  claiming.pass(seconds(2));
  CHECK(told() == 1);
  require_existing(claim());
  CHECK(told() == 2);
  CHECK(claiming.started() == 1);
  claiming.pass(seconds(2));  // the first one's time is over, not the second's
  require_existing(claim());
  claiming.pass(seconds(4));
  CHECK(told() == 3);
  require_fresh(claim());
  CHECK(claiming.started() == 2);
}

}  // namespace
}  // namespace kvferry::engine::test
