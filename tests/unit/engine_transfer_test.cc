// Whole transfers between two engines on a perfect network.
#include "tests/unit/engine_harness.h"

namespace kvferry::engine::test {
namespace {

using std::chrono::seconds;

bool empty(const Box& box) {
  const ArenaView arena = box.engine.snapshot(box.now).arenas[0];
  return arena.free_bytes == arena.total_bytes && arena.regions == 0;
}

TEST_CASE("a transfer of one slice is completed and delivered") {
  Pair pair;
  pair.s.post(pair.send_op("a", 0, {0, 64}, true));
  pair.r.post(pair.receive_op("a", {0, 64}));
  pair.run();
  CHECK(pair.received("a").state == TransferState::kCompleted);
  CHECK(pair.received("a").released);
  CHECK(pair.received("a").bytes_done == 640);
  CHECK(pair.received("a").slices == 1);
  CHECK(pair.sent("a").state == TransferState::kDelivered);
  CHECK(pair.sent("a").delivery == Delivery::kDelivered);
  CHECK(pair.sent("a").released);
  CHECK(pair.sent("a").bytes_done == 640);
  CHECK(empty(pair.s));
  CHECK(empty(pair.r));
  CHECK(pair.s.seen<TransferEnded>().size() == 1);
  CHECK(pair.r.seen<TransferEnded>().front().chunks == 10);
}

TEST_CASE("a receiver that comes first waits for the Send and gets each slice once") {
  Pair pair;
  pair.r.post(pair.receive_op("a", {0, 64}));
  pair.run();
  CHECK(pair.s.engine.snapshot(pair.s.now).links.front().parked == 1);
  pair.s.post(pair.send_op("a", 0, {0, 16}, false));
  pair.run();
  CHECK(pair.received("a").state == TransferState::kActive);
  CHECK(pair.received("a").slices == 1);
  pair.s.post(pair.send_op("a", 1, {16, 64}, false));
  pair.s.post(pair.send_op("a", 2, {}, true));
  pair.run();
  CHECK(pair.received("a").state == TransferState::kCompleted);
  CHECK(pair.received("a").slices == 3);
  CHECK(pair.s.told<MsgSlice>().size() == 3);
  CHECK(pair.sent("a").state == TransferState::kDelivered);
}

TEST_CASE("a late receiver gets the slices sent so far, in order, and the aux with the last") {
  Pair pair;
  pair.s.post(pair.send_op("a", 0, {0, 16}, false));
  SendOp last = pair.send_op("a", 1, {16, 64}, true);
  last.aux = "tokens";
  pair.s.post(std::move(last));
  pair.r.post(pair.receive_op("a", {0, 64}));
  pair.run();
  const auto slices = pair.s.told<MsgSlice>();
  REQUIRE(slices.size() == 2);
  CHECK(slices[0].ordinal == 0);
  CHECK(slices[1].ordinal == 1);
  REQUIRE(pair.received("a").state == TransferState::kCompleted);
  REQUIRE(pair.received("a").aux);
  CHECK(*pair.received("a").aux == "tokens");
}

TEST_CASE("the source is released when all is gathered, before anything is delivered") {
  Pair pair;
  pair.swallow = [](const Command& command) { return std::holds_alternative<SendOffer>(command); };
  pair.s.post(pair.send_op("a", 0, {0, 6}, true));
  pair.needed = {0, 6};
  pair.r.post(pair.receive_op("a", {0, 6}));
  pair.run();
  CHECK(pair.sent("a").released);
  CHECK(pair.sent("a").released_reason == Reason::kNone);
  CHECK(pair.sent("a").state == TransferState::kActive);
}

TEST_CASE("what the last slice leaves out fails the receive") {
  Pair pair;
  pair.s.post(pair.send_op("a", 0, {0, 32}, true));
  pair.r.post(pair.receive_op("a", {0, 64}));
  pair.run();
  CHECK(pair.received("a").state == TransferState::kFailed);
  CHECK(pair.received("a").reason == Reason::kNotOffered);
  CHECK(pair.sent("a").reason == Reason::kNotOffered);
  CHECK(empty(pair.r));
}

TEST_CASE("two sides that compile different streams move nothing") {
  Pair pair;
  pair.skew = 1;
  pair.s.post(pair.send_op("a", 0, {0, 64}, true));
  pair.r.post(pair.receive_op("a", {0, 64}));
  pair.run();
  CHECK(pair.received("a").reason == Reason::kLayoutMismatch);
  CHECK(pair.r.seen<Scatter>().empty());
  CHECK(pair.sent("a").state == TransferState::kFailed);
}

TEST_CASE("another secret is another transfer") {
  Pair pair;
  pair.s.post(pair.send_op("a", 0, {0, 64}, true));
  ReceiveOp op = pair.receive_op("a", {0, 64});
  op.key = key_of("a", 8);
  op.wait = seconds(1);
  op.deadline = seconds(1);
  pair.r.post(std::move(op));
  pair.run();
  CHECK(pair.received("a").state == TransferState::kOpen);
  pair.pass(seconds(2));
  CHECK(pair.received("a").reason == Reason::kDeadline);
  CHECK(pair.sent("a").state == TransferState::kOpen);
}

TEST_CASE("a chunk whose check is wrong fails the transfer with DATA_LOSS") {
  Pair pair;
  pair.scatter_outcome = CopyOutcome::kCheckMismatch;
  pair.s.post(pair.send_op("a", 0, {0, 64}, true));
  pair.r.post(pair.receive_op("a", {0, 64}));
  pair.run();
  CHECK(pair.received("a").reason == Reason::kDataLoss);
  CHECK(pair.received("a").released);
  CHECK(pair.sent("a").reason == Reason::kDataLoss);
  CHECK(empty(pair.r));
  CHECK(empty(pair.s));
}

TEST_CASE("cancel is idempotent, ends both sides and tells whether memory is in use") {
  Pair pair;
  pair.answer_gathers = false;
  pair.s.post(pair.send_op("a", 0, {0, 64}, true));
  pair.r.post(pair.receive_op("a", {0, 64}));
  pair.run();
  REQUIRE_FALSE(pair.s.seen<Gather>().empty());
  pair.s.post(CancelOp{{{1}, 1}, Pair::handle_of("a")});
  CHECK(pair.s.last_reply().state == TransferState::kCancelled);
  CHECK(pair.s.last_reply().memory_in_use);
  pair.run();
  CHECK(pair.received("a").state == TransferState::kFailed);
  CHECK(pair.received("a").reason == Reason::kCancelled);
  CHECK_FALSE(pair.sent("a").released);
  for (const Gather& gather : pair.s.seen<Gather>())
    pair.s.post(CopyEnded{gather.copy, CopyOutcome::kOk, {}});
  CHECK(pair.sent("a").released);
  pair.s.post(CancelOp{{{1}, 2}, Pair::handle_of("a")});
  CHECK_FALSE(pair.s.last_reply().memory_in_use);
  CHECK(empty(pair.s));
}

TEST_CASE("an answer leaves after the status records that it speaks of") {
  Pair pair;
  pair.s.post(pair.send_op("a", 0, {0, 64}, true));
  pair.s.forget();
  pair.s.post(CancelOp{{{1}, 1}, Pair::handle_of("a")});
  std::vector<std::string> order;
  for (const Command& command : pair.s.commands) {
    if (const auto* shown = std::get_if<Publish>(&command))
      order.emplace_back(shown->record.released ? "released" : "held");
    if (const auto* answer = std::get_if<Reply>(&command))
      order.emplace_back(answer->memory_in_use ? "in use" : "free");
  }
  CHECK(order == std::vector<std::string>{"released", "free"});
}

TEST_CASE("nobody comes: the lease ends and the pages are released") {
  Pair pair;
  pair.s.post(pair.send_op("a", 0, {0, 64}, true));
  pair.pass(seconds(31));
  CHECK(pair.sent("a").state == TransferState::kFailed);
  CHECK(pair.sent("a").reason == Reason::kExpired);
  CHECK(pair.sent("a").released);
}

TEST_CASE("a PULL without a Send ends with NO_SEND, at the latest when the receiver ends") {
  Pair pair;
  ReceiveOp op = pair.receive_op("a", {0, 64});
  op.wait = seconds(2);
  op.deadline = seconds(1);
  pair.r.post(std::move(op));
  pair.pass(seconds(4));
  CHECK(pair.received("a").reason == Reason::kDeadline);
  const LinkView link = pair.s.engine.snapshot(pair.s.now).links.front();
  CHECK(link.parked == 0);
  CHECK(pair.r.engine.snapshot(pair.r.now).links.front().legs_in == 0);
}

TEST_CASE("a DECLINE before the Send ends it at once; after the PULL it does nothing") {
  Pair pair;
  DeclineOp decline{{{2}, 1}, key_of("a"), "", pair.r_layout};
  pair.r.post(decline);
  pair.run();
  pair.s.post(pair.send_op("a", 0, {0, 64}, true));
  CHECK(pair.sent("a").reason == Reason::kDeclined);
  CHECK(pair.sent("a").released);

  pair.r.post(pair.receive_op("b", {0, 64}));
  pair.run();
  decline.key = key_of("b");
  pair.r.post(decline);
  pair.run();
  pair.s.post(pair.send_op("b", 0, {0, 64}, true));
  pair.run();
  CHECK(pair.sent("b").state == TransferState::kDelivered);
}

TEST_CASE("a receiver that is turned away for its cards and then ends is not waited for") {
  for (const bool comes_again : {true, false}) {
    Pair pair;
    std::optional<ResolvePull> asked;
    pair.swallow = [&](const Command& command) {
      const auto* pull = std::get_if<ResolvePull>(&command);
      if (pull == nullptr || asked) return false;
      asked = *pull;
      return true;
    };
    pair.s.post(pair.send_op("a", 0, {0, 64}, true));
    pair.r.post(pair.receive_op("a", {0, 64}));
    pair.run();
    REQUIRE(asked);
    if (!comes_again) pair.r.post(WorkerGone{{2}});
    PullResolved stale;
    stale.resolve = asked->resolve;
    stale.reason = Reason::kStaleCards;
    pair.s.post(std::move(stale));
    pair.run();
    CHECK(pair.sent("a").state ==
          (comes_again ? TransferState::kDelivered : TransferState::kFailed));
    CHECK(pair.sent("a").reason == (comes_again ? Reason::kNone : Reason::kWorkerLost));
    CHECK(pair.sent("a").released);
  }
}

TEST_CASE("a receive given up before its sender heard of it declines the transfer") {
  for (const bool resolved_late : {false, true}) {
    Pair pair;
    uint32_t questions = 0;
    std::optional<Resolve> first;
    pair.swallow = [&](const Command& command) {
      const auto* resolve = std::get_if<Resolve>(&command);
      if (resolve == nullptr || ++questions > 1) return false;
      first = *resolve;
      return true;
    };
    pair.r.post(pair.receive_op("a", {0, 64}));
    pair.run();
    REQUIRE(first);
    pair.r.post(CancelOp{{{2}, 3}, Pair::handle_of("a")});
    CHECK(pair.received("a").released);
    if (resolved_late) {
      Resolved late;
      late.resolve = first->resolve;
      late.sender_incarnation = incarnation_of(1);
      late.legs.push_back({0, 0, "node1", false, true, 640, std::make_shared<TestContext>()});
      pair.r.post(std::move(late));
    }
    pair.run();
    pair.s.post(pair.send_op("a", 0, {0, 64}, true));
    pair.run();
    CHECK(pair.sent("a").reason == Reason::kDeclined);
    CHECK(pair.sent("a").released);
  }
}

TEST_CASE("a CLAIM holds the lease until its receiver comes") {
  Pair pair;
  pair.s.post(pair.send_op("a", 0, {0, 64}, true));
  // The transfer's own timer runs from the claim: it must be the longer one here.
  pair.s.post(OpenSendOp{{{1}, 5}, 77, key_of("c"), pair.s_layout, seconds(2), seconds(60), 1});
  ClaimOp claim{{{2}, 1}, 0, key_of("c"), "", pair.r_layout, seconds(3)};
  pair.r.post(claim);
  pair.pass(seconds(20));
  CHECK(pair.s.record({1}, 77).state == TransferState::kOpen);
  pair.r.post(WorkerGone{{2}});
  pair.run();
  CHECK(pair.s.record({1}, 77).reason == Reason::kDeclined);
  CHECK(pair.s.record({1}, 77).released);
}

TEST_CASE("a worker's death ends its transfers on both sides, and its id is free again") {
  Pair pair;
  pair.answer_gathers = false;
  pair.s.post(pair.send_op("a", 0, {0, 64}, true));
  pair.r.post(pair.receive_op("a", {0, 64}));
  pair.run();
  pair.s.post(WorkerGone{{1}});
  pair.run();
  CHECK(pair.received("a").reason == Reason::kWorkerLost);
  for (const Gather& gather : pair.s.seen<Gather>())
    pair.s.post(CopyEnded{gather.copy, CopyOutcome::kOk, {}});
  CHECK(pair.s.engine.snapshot(pair.s.now).transfers.empty());
  CHECK(empty(pair.s));
}

TEST_CASE("a send whose source is released outlives its worker") {
  Pair pair;
  pair.needed = {0, 6};
  std::vector<Command> kept;
  pair.swallow = [&](const Command& command) { return std::holds_alternative<SendOffer>(command); };
  pair.s.post(pair.send_op("a", 0, {0, 6}, true));
  pair.r.post(pair.receive_op("a", {0, 6}));
  pair.run();
  REQUIRE(pair.sent("a").released);
  pair.s.post(WorkerGone{{1}});
  CHECK(pair.s.engine.snapshot(pair.s.now).transfers.size() == 1);
  // Its lane goes down and the chunk is offered again.
  pair.swallow = [](const Command&) { return false; };
  const SendOffer offer = pair.s.seen<SendOffer>().back();
  pair.s.post(OfferSendEnded{offer.offer.offer});
  pair.s.post(LaneFailed{offer.lane});
  pair.run();
  CHECK(pair.received("a").state == TransferState::kCompleted);
  CHECK(pair.s.engine.snapshot(pair.s.now).transfers.empty());
}

TEST_CASE("an end that is told again over a new control lane names its transfer") {
  Pair pair;
  pair.s.post(pair.send_op("a", 0, {0, 64}, true));
  pair.r.post(pair.receive_op("a", {0, 64}));
  pair.run();
  REQUIRE(pair.sent("a").state == TransferState::kDelivered);
  const std::size_t before = pair.s.told<MsgEnd>().size();
  pair.s.post(LaneFailed{{{1}, 0, 0}});
  pair.run();
  const auto ends = pair.s.told<MsgEnd>();
  REQUIRE(ends.size() > before);
  for (const MsgEnd& end : ends) CHECK(end.transfer.id == "a");
}

TEST_CASE("a revoked slice is dropped with the last one and sent again") {
  Pair pair;
  pair.swallow = [](const Command& command) { return std::holds_alternative<SendOffer>(command); };
  pair.s.post(pair.send_op("a", 0, {0, 32}, false));
  pair.s.post(pair.send_op("a", 1, {32, 64}, true));
  pair.r.post(pair.receive_op("a", {0, 64}));
  pair.run();
  pair.s.post(RevokeOp{{{1}, 9}, Pair::handle_of("a"), 40});
  CHECK(pair.s.last_reply().dropped_sends == std::vector<uint32_t>{1});
  pair.s.post(pair.send_op("a", 2, {32, 64}, true));
  pair.swallow = [](const Command&) { return false; };
  for (const SendOffer& offer : pair.s.seen<SendOffer>()) {
    pair.s.post(OfferSendEnded{offer.offer.offer});
    pair.s.post(LaneFailed{offer.lane});
  }
  pair.pass(seconds(1));
  CHECK(pair.received("a").state == TransferState::kCompleted);
  CHECK(pair.received("a").bytes_done == 640);
  CHECK(pair.sent("a").state == TransferState::kDelivered);
}

TEST_CASE("what a Revoke took back and nobody sends anew was not offered") {
  Pair pair;
  pair.answer_gathers = false;
  pair.s.post(pair.send_op("a", 0, {0, 32}, false));
  pair.r.post(pair.receive_op("a", {0, 64}));
  pair.run();
  const auto gathers = pair.s.seen<Gather>();
  REQUIRE_FALSE(gathers.empty());
  pair.s.post(RevokeOp{{{1}, 9}, Pair::handle_of("a"), 0});
  pair.answer_gathers = true;
  for (const Gather& gather : gathers) pair.s.post(CopyEnded{gather.copy, CopyOutcome::kOk, {}});
  pair.run();
  REQUIRE(pair.s.last_reply().dropped_sends == std::vector<uint32_t>{0});
  pair.s.post(pair.send_op("a", 1, {32, 64}, true));
  pair.run();
  CHECK(pair.sent("a").state == TransferState::kFailed);
  CHECK(pair.sent("a").reason == Reason::kNotOffered);
  CHECK(pair.received("a").state == TransferState::kFailed);
  CHECK(pair.received("a").reason == Reason::kNotOffered);
}

TEST_CASE("a silent peer is lost within the limit, and its link is closed") {
  Pair pair;
  pair.s.post(pair.send_op("a", 0, {0, 64}, true));
  pair.swallow = [](const Command& command) {
    return std::holds_alternative<SendOffer>(command) ||
           std::holds_alternative<SendMessage>(command) ||
           std::holds_alternative<ReopenLane>(command) ||
           std::holds_alternative<TellLaneDown>(command);
  };
  pair.r.post(pair.receive_op("a", {0, 64}));
  pair.pass(seconds(4));
  CHECK(pair.received("a").reason == Reason::kPeerLost);
  CHECK(pair.r.seen<CloseLink>().size() == 1);
  CHECK(pair.r.engine.snapshot(pair.r.now).links.empty());
  CHECK(empty(pair.r));
}

// On a slow road a ping waits behind the chunks that were offered before it.
TEST_CASE("a lane by which chunks come is not silent, though nothing else comes by it") {
  Pair pair;
  pair.swallow = [](const Command& command) {
    return std::holds_alternative<AcceptOffer>(command);
  };
  pair.s.post(pair.send_op("a", 0, {0, 64}, true));
  pair.r.post(pair.receive_op("a", {0, 64}));
  pair.run();
  pair.mute = &pair.s;
  std::size_t landed = 0;
  while (landed < 10) {  // 640 bytes in chunks of 64
    const auto accepted = pair.r.seen<AcceptOffer>();
    REQUIRE(accepted.size() > landed);
    pair.pass(seconds(2));
    // One of each lane: the other is as slow.
    for (std::size_t end = std::min(accepted.size(), landed + 2); landed < end; ++landed)
      pair.land(accepted[landed]);
  }
  CHECK(pair.r.seen<TellLaneDown>().empty());
  CHECK(pair.received("a").state == TransferState::kCompleted);
}

TEST_CASE("the rails process dies: everything moves over new lanes") {
  Pair pair;
  bool cut = true;
  pair.swallow = [&](const Command& command) {
    return cut && (std::holds_alternative<SendOffer>(command));
  };
  pair.s.post(pair.send_op("a", 0, {0, 64}, true));
  pair.r.post(pair.receive_op("a", {0, 64}));
  pair.run();
  pair.s.post(RailsDied{});
  pair.run();
  cut = false;
  pair.s.post(RailsUp{});
  pair.pass(seconds(2));
  CHECK(pair.received("a").state == TransferState::kCompleted);
  CHECK(pair.sent("a").state == TransferState::kDelivered);
  CHECK(empty(pair.s));
  CHECK(empty(pair.r));
}

TEST_CASE("a drained daemon takes nothing new and says when it is done") {
  Pair pair;
  pair.s.post(pair.send_op("a", 0, {0, 64}, true));
  pair.s.post(Drain{pair.s.now + seconds(5)});
  pair.s.post(pair.send_op("b", 0, {0, 64}, true));
  CHECK(pair.s.last_reply().error.reason == "DRAINING");
  CHECK(pair.s.seen<Drained>().empty());
  pair.r.post(pair.receive_op("a", {0, 64}));
  pair.run();
  CHECK(pair.sent("a").state == TransferState::kDelivered);
  CHECK(pair.s.seen<Drained>().size() == 1);
}

TEST_CASE("a drain that lasts too long fails what is left with SHUTDOWN") {
  Pair pair;
  pair.s.post(pair.send_op("a", 0, {0, 64}, true));
  pair.s.post(Drain{pair.s.now + seconds(5)});
  pair.pass(seconds(6));
  CHECK(pair.sent("a").reason == Reason::kShutdown);
  CHECK(pair.s.seen<Drained>().size() == 1);
}

TEST_CASE("a layout is quiet once its transfers have failed and no copy reads its pages") {
  Pair pair;
  pair.answer_gathers = false;
  pair.s.post(pair.send_op("a", 0, {0, 64}, true));
  pair.r.post(pair.receive_op("a", {0, 64}));
  pair.run();
  pair.s.post(UnregisterLayout{pair.s_layout, Reason::kUnregistered});
  CHECK(pair.sent("a").reason == Reason::kUnregistered);
  CHECK(pair.s.seen<LayoutQuiet>().empty());
  for (const Gather& gather : pair.s.seen<Gather>())
    pair.s.post(CopyEnded{gather.copy, CopyOutcome::kOk, {}});
  CHECK(pair.s.seen<LayoutQuiet>().size() == 1);
}

TEST_CASE("an arena far smaller than a transfer carries it all the same") {
  EngineConfig s = small_config(1);
  EngineConfig r = small_config(2);
  s.arenas = r.arenas = {{{3 * 64}}};
  Pair pair(s, r);
  for (const char* id : {"a", "b", "c"}) pair.s.post(pair.send_op(id, 0, {0, 64}, true));
  for (const char* id : {"a", "b", "c"}) pair.r.post(pair.receive_op(id, {0, 64}));
  pair.run();
  for (const char* id : {"a", "b", "c"}) {
    CHECK(pair.received(id).state == TransferState::kCompleted);
    CHECK(pair.sent(id).state == TransferState::kDelivered);
  }
}

TEST_CASE("who will not wait for the arena is told so") {
  EngineConfig r = small_config(2);
  r.arenas = {{{3 * 64}}};
  Pair pair(small_config(1), r);
  pair.r.post(pair.receive_op("a", {0, 64}));  // takes the only landing region
  pair.run();
  ReceiveOp op = pair.receive_op("b", {0, 64});
  op.wait_for_arena = false;
  pair.r.post(std::move(op));
  pair.run();
  CHECK(pair.received("b").reason == Reason::kArenaExhausted);
}

}  // namespace
}  // namespace kvferry::engine::test
