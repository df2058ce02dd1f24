// The rows of the sender's tables, one engine at a time: the test plays the receiver's daemon.
#include "tests/unit/engine_lone.h"

namespace kvferry::engine::test {
namespace {

using std::chrono::seconds;

TEST_CASE("a PULL with a wrong proof ends that pull alone") {
  Lone s;
  s.send("a", 0, {0, 10}, true);
  MsgPull pull = s.pull_of("a", 1, {1});
  pull.proof.bytes[0] ^= 1;
  s.say(0, pull);
  REQUIRE(s.told<MsgEnd>().size() == 1);
  CHECK(s.told<MsgEnd>()[0].reason == Reason::kPermission);
  CHECK(s.seen<ResolvePull>().empty());
  s.forget();
  s.say(0, s.pull_of("a", 2, {1}));
  CHECK(s.seen<ResolvePull>().size() == 1);
  s.resolve();
  CHECK(s.status("a").state == TransferState::kActive);
}

TEST_CASE("an OpenSend meets a parked PULL: RECEIVER_READY, no slice yet") {
  Lone s;
  s.say(0, s.pull_of("a", 1, {1, 2}));
  CHECK(s.engine.snapshot(s.now).links[0].parked == 1);
  s.post(OpenSendOp{{{1}, 1}, 9, key_of("a"), s.layout, seconds(5), seconds(5), 1});
  CHECK(s.record({1}, 9).state == TransferState::kActive);
  CHECK_FALSE(s.record({1}, 9).receiver_ready);
  CHECK(s.engine.snapshot(s.now).links[0].parked == 0);
  s.resolve();
  CHECK(s.record({1}, 9).receiver_ready);
  CHECK(s.told<MsgSlice>().empty());
}

TEST_CASE("chunks are gathered with a credit in hand, and E ahead") {
  Lone s;
  s.open("a", 6, {1, 2});
  CHECK(s.seen<Gather>().size() == 3);  // two credits, one ahead
  s.gather_all();
  CHECK(s.seen<SendOffer>().size() == 2);
  CHECK(s.seen<SendOffer>()[0].lane.lane != s.seen<SendOffer>()[1].lane.lane);
  s.update({3}, {});
  CHECK(s.seen<SendOffer>().size() == 3);  // the staged one goes first
  CHECK(s.seen<Gather>().size() == 4);     // and another is staged ahead
}

TEST_CASE("credits are used once, however often they are told") {
  Lone s;
  s.open("a", 6, {1, 2});
  s.gather_all();
  s.say(0, s.pull_of("a", 1, {1, 2}));
  s.update({1, 2}, {});
  s.gather_all();
  CHECK(s.seen<SendOffer>().size() == 2);
}

TEST_CASE("staging is held until the ack and until every UCX send has ended") {
  Lone s;
  s.open("a", 2, {1, 2});
  s.gather_all();
  const auto offers = s.seen<SendOffer>();
  REQUIRE(offers.size() == 2);
  s.post(OfferSendEnded{offers[0].offer.offer});
  CHECK(s.arena().staging_bytes == 2 * kChunk);  // a send's end says nothing of delivery
  s.update({}, {{0, 0}});
  CHECK(s.arena().staging_bytes == kChunk);
  s.update({}, {{0, 1}});
  CHECK(s.status("a").state == TransferState::kDelivered);
  CHECK(s.arena().staging_bytes == kChunk);  // UCX still reads it
  s.post(OfferSendEnded{offers[1].offer.offer});
  CHECK(s.arena().staging_bytes == 0);
}

TEST_CASE("a REFUSE of the newest offer stages the chunk; its credit is gone") {
  Lone s;
  s.open("a", 1, {1});
  s.gather_all();
  const SendOffer first = s.seen<SendOffer>().at(0);
  s.post(RefuseIn{first.lane, {first.offer.pull, first.offer.offer}});
  CHECK(s.seen<SendOffer>().size() == 1);
  s.update({2}, {});
  REQUIRE(s.seen<SendOffer>().size() == 2);
  CHECK(s.seen<SendOffer>()[1].offer.credit.value == 2);
  s.post(RefuseIn{first.lane, {first.offer.pull, first.offer.offer}});  // of an old offer
  CHECK(s.drops(DropCause::kLate) == 1);
}

TEST_CASE("lane down: un-acked chunks go again with their credits, whatever their sends said") {
  Lone s;
  s.open("a", 2, {1, 2});
  s.gather_all();
  const auto offers = s.seen<SendOffer>();
  REQUIRE(offers.size() == 2);
  const SendOffer& lost = offers[0];
  s.post(OfferSendEnded{lost.offer.offer});
  s.forget();
  s.post(LaneFailed{lost.lane});
  REQUIRE(s.seen<SendOffer>().size() == 1);
  CHECK(s.seen<SendOffer>()[0].offer.chunk == lost.offer.chunk);
  CHECK(s.seen<SendOffer>()[0].offer.credit == lost.offer.credit);
  CHECK(s.seen<SendOffer>()[0].lane.lane != lost.lane.lane);
  CHECK(s.told<MsgSlice>().size() == 1);  // resync
}

TEST_CASE("an ack of an earlier offer does not lose the credit of a later one") {
  Lone s;
  s.open("a", 3, {1});
  s.gather_all();
  const SendOffer first = s.seen<SendOffer>().at(0);
  s.post(LaneFailed{first.lane});
  const SendOffer second = s.seen<SendOffer>().at(1);
  CHECK(second.offer.credit == first.offer.credit);
  s.post(LaneReopened{{{1}, first.lane.lane, 1}});
  s.post(LaneConnected{{{1}, first.lane.lane, 1}});
  s.post(MessageIn{{{1}, first.lane.lane, 1}, 0, MsgHello{true}});
  MsgUpdate acked;
  acked.pull = second.offer.pull;
  acked.acks = {{0, second.offer.chunk}};
  s.post(MessageIn{second.lane, s.next[second.lane.lane]++, acked});
  s.gather_all();
  s.post(LaneFailed{second.lane});
  REQUIRE(s.seen<SendOffer>().size() == 3);
  CHECK(s.seen<SendOffer>()[2].offer.credit == first.offer.credit);
}

void refuse(Lone& s, const SendOffer& of) {
  s.post(RefuseIn{of.lane, {of.offer.pull, of.offer.offer}});
}

// A leg of four chunks whose credits are all gone: chunk 0 is known to be refused, the others'
// gathers run.
std::vector<Gather> without_credits(Lone& s) {
  s.open("a", 4, {1, 2, 3});
  const auto gathers = s.seen<Gather>();
  REQUIRE(gathers.size() == 4);
  s.post(CopyEnded{gathers[0].copy, CopyOutcome::kOk, {}});
  for (int credit = 0; credit < 3; ++credit) refuse(s, s.seen<SendOffer>().back());
  REQUIRE(s.seen<SendOffer>().size() == 3);
  s.forget();
  return gathers;
}

TEST_CASE("beyond E, chunks without a credit are offered under a spent one, one at a time") {
  Lone s;
  const auto gathers = without_credits(s);
  for (std::size_t chunk = 1; chunk < 4; ++chunk)
    s.post(CopyEnded{gathers[chunk].copy, CopyOutcome::kOk, {}});
  REQUIRE(s.seen<SendOffer>().size() == 1);
  const SendOffer first = s.seen<SendOffer>()[0];
  CHECK(first.offer.chunk == 1);
  CHECK(first.offer.credit.value == 1);  // the newest that was refused
  refuse(s, first);                      // now the peer knows
  REQUIRE(s.seen<SendOffer>().size() == 2);
  const SendOffer second = s.seen<SendOffer>()[1];
  CHECK(second.offer.chunk == 2);
  s.post(LaneFailed{second.lane});  // lost: asked again
  REQUIRE(s.seen<SendOffer>().size() == 3);
  const SendOffer again = s.seen<SendOffer>()[2];
  CHECK(again.offer.chunk == 2);
  CHECK(again.offer.credit == second.offer.credit);
  MsgUpdate acked;
  acked.pull = again.offer.pull;
  acked.acks = {{0, 2}};
  s.say(again.lane.lane, acked);  // an earlier offer of it had come
  REQUIRE(s.seen<SendOffer>().size() == 4);
  CHECK(s.seen<SendOffer>()[3].offer.chunk == 3);
}

TEST_CASE("an offer that is to be refused takes no lane's turn") {
  Lone s;
  const auto gathers = without_credits(s);
  for (std::size_t chunk = 1; chunk < 4; ++chunk)
    s.post(CopyEnded{gathers[chunk].copy, CopyOutcome::kOk, {}});
  REQUIRE(s.seen<SendOffer>().size() == 1);
  const SendOffer asked = s.seen<SendOffer>()[0];
  const EngineSnapshot seen = s.engine.snapshot(s.now);
  for (const LaneView& lane : seen.links.at(0).lanes) CHECK(lane.in_flight == 0);
  s.update({7}, {});
  REQUIRE(s.seen<SendOffer>().size() == 2);
  CHECK(s.seen<SendOffer>()[1].offer.credit.value == 7);
  CHECK(s.seen<SendOffer>()[1].lane.lane == asked.lane.lane);
}

TEST_CASE("a spent credit that a dropped chunk was offered under is not used as if it were good") {
  Lone s;
  const auto gathers = without_credits(s);
  s.post(CopyEnded{gathers[1].copy, CopyOutcome::kOk, {}});
  REQUIRE(s.seen<SendOffer>().size() == 1);
  const SendOffer asked = s.seen<SendOffer>()[0];
  s.post(RevokeOp{{{1}, 2}, std::hash<std::string>{}("a") | 1, 0});
  s.post(CopyEnded{gathers[2].copy, CopyOutcome::kOk, {}});
  s.post(CopyEnded{gathers[3].copy, CopyOutcome::kOk, {}});
  REQUIRE(s.last_reply().dropped_sends == std::vector<uint32_t>{0});
  s.post(LaneFailed{asked.lane});
  s.forget();
  s.send("a", 1, {0, 6}, true);
  s.compile_all();
  s.gather_all();
  REQUIRE(s.seen<Gather>().size() == 1);  // ahead
  CHECK(s.seen<SendOffer>().empty());
}

TEST_CASE("all acked and a last one: DELIVERED, END; END(COMPLETED) does not wait for acks") {
  Lone s;
  s.open("a", 2, {1, 2});
  s.gather_all();
  SECTION("acks") {
    s.update({}, {{0, 0}, {0, 1}});
    CHECK(s.told<MsgEnd>().back().outcome == Outcome::kDelivered);
  }
  SECTION("END") {
    s.say(0, MsgEnd{{boot_of(2), 1}, {}, Outcome::kCompleted, Reason::kNone, std::nullopt});
  }
  CHECK(s.status("a").state == TransferState::kDelivered);
  CHECK(s.status("a").released);
}

TEST_CASE("a receiver that is complete before any last slice was told breaks the protocol") {
  Lone s;
  s.send("a", 0, {0, 6}, false);
  s.say(0, s.pull_of("a", 1, {1}));
  s.resolve();
  s.compile_all();
  s.say(0, MsgEnd{{boot_of(2), 1}, {}, Outcome::kCompleted, Reason::kNone, std::nullopt});
  CHECK(s.status("a").state == TransferState::kFailed);
  CHECK(s.status("a").reason == Reason::kProtocol);
}

TEST_CASE("an ack for a chunk that was never offered fails the leg") {
  Lone s;
  s.open("a", 4, {1});
  s.update({}, {{0, 3}});
  CHECK(s.status("a").reason == Reason::kProtocol);
  CHECK(s.told<MsgEnd>().back().reason == Reason::kProtocol);
}

TEST_CASE("a failed gather fails the leg; a running one holds the source") {
  Lone s;
  s.open("a", 4, {1, 2});
  const auto gathers = s.seen<Gather>();
  s.post(CopyEnded{gathers[0].copy, CopyOutcome::kFailed, {}});
  CHECK(s.status("a").reason == Reason::kGatherFailed);
  CHECK_FALSE(s.status("a").released);
  for (std::size_t i = 1; i < gathers.size(); ++i)
    s.post(CopyEnded{gathers[i].copy, CopyOutcome::kOk, {}});
  CHECK(s.status("a").released);
  CHECK(s.arena().staging_bytes == 0);
}

TEST_CASE("an END of the receiver fails the send with its reason, and is answered") {
  Lone s;
  s.open("a", 4, {1});
  const MsgEnd end{{boot_of(2), 1}, {}, Outcome::kFailed, Reason::kDataLoss, std::nullopt};
  s.say(0, end);
  CHECK(s.status("a").reason == Reason::kDataLoss);
  REQUIRE(s.told<MsgEnd>().size() == 1);
  s.say(0, end);
  CHECK(s.told<MsgEnd>().size() == 2);
  s.say(0, s.pull_of("a", 1, {}));
  CHECK(s.told<MsgEnd>().size() == 3);
}

TEST_CASE("END(RELEASED) is no failure: CANCELLED, or nothing before the Send") {
  Lone s;
  SECTION("with a Send") {
    s.open("a", 4, {});
    s.say(0, MsgEnd{{boot_of(2), 1}, {}, Outcome::kReleased, Reason::kReleased, std::nullopt});
    CHECK(s.status("a").state == TransferState::kCancelled);
    CHECK(s.status("a").reason == Reason::kReleased);
  }
  SECTION("before it") {
    s.say(0, s.pull_of("a", 1, {}));
    s.say(0, MsgEnd{{boot_of(2), 1}, {}, Outcome::kReleased, Reason::kReleased, std::nullopt});
    s.send("a", 0, {0, 10}, true);
    CHECK(s.status("a").state == TransferState::kOpen);
  }
  SECTION("another END before the Send is remembered") {
    s.say(0, s.pull_of("a", 1, {}));
    s.say(0, MsgEnd{{boot_of(2), 1}, {}, Outcome::kFailed, Reason::kDeadline, std::nullopt});
    s.send("a", 0, {0, 10}, true);
    CHECK(s.status("a").reason == Reason::kDeadline);
  }
}

TEST_CASE("a slice is announced when its source is ready, in order") {
  Lone s;
  SendOp op;
  op.op = {{1}, 1};
  op.client_handle = 3;
  op.key = key_of("a");
  op.layout = s.layout;
  op.offer = {{0, {{0, 10}}}};
  op.ready = {ReadyCondition::Kind::kTimeline, 1, 5};
  s.post(op);
  op.send_index = 1;
  op.offer = {{0, {{10, 20}}}};
  op.ready = {};
  op.last = true;
  s.post(op);
  s.say(0, s.pull_of("a", 1, {1}));
  s.resolve();
  s.compile_all();
  CHECK(s.told<MsgSlice>().empty());
  s.post(ConditionMet{s.seen<WatchCondition>().at(0).condition});
  REQUIRE(s.told<MsgSlice>().size() == 2);
  CHECK(s.told<MsgSlice>()[0].ordinal == 0);
}

TEST_CASE("a source whose event cannot be watched fails its transfer at once") {
  Lone s;
  SendOp op;
  op.op = {{1}, 1};
  op.client_handle = std::hash<std::string>{}("a") | 1;
  op.key = key_of("a");
  op.layout = s.layout;
  op.offer = {{0, {{0, 10}}}};
  op.ready.kind = ReadyCondition::Kind::kCudaEvent;
  op.last = true;
  s.post(op);
  const WatchCondition watch = s.seen<WatchCondition>().at(0);
  CHECK(watch.layout == s.layout);
  s.post(ConditionFailed{watch.condition});
  CHECK(s.status("a").state == TransferState::kFailed);
  CHECK(s.status("a").reason == Reason::kNotReady);
  CHECK(s.status("a").released);
  s.post(ConditionFailed{watch.condition});  // told twice: nothing more
  s.post(ConditionMet{watch.condition});
  CHECK(s.seen<UnwatchCondition>().empty());
}

TEST_CASE("several receivers: places, refusals, one failure of two") {
  Lone s;
  s.send("a", 0, {0, 6}, true, 2);
  s.say(0, s.pull_of("a", 1, {1}, 2));
  s.resolve();
  s.say(0, s.pull_of("a", 2, {1}, 3));
  s.resolve();
  s.say(0, s.pull_of("a", 3, {1}, 4));
  s.resolve();
  CHECK(s.told<MsgEnd>().back().pull.counter == 3);
  CHECK(s.told<MsgEnd>().back().reason == Reason::kRefused);
  s.say(0, MsgEnd{{boot_of(2), 1}, {}, Outcome::kFailed, Reason::kDataLoss, std::nullopt});
  CHECK(s.status("a").state == TransferState::kActive);
  s.compile_all();
  s.gather_all();
  CHECK(s.status("a").released);
  s.update({}, {{0, 0}}, 2);
  CHECK(s.status("a").state == TransferState::kDelivered);
}

TEST_CASE("several receivers: the lease closes the places, who is in stays in") {
  Lone s;
  s.send("a", 0, {0, 6}, true, 2);
  s.say(0, s.pull_of("a", 1, {1}, 2));
  s.resolve();
  s.compile_all();
  s.gather_all();
  CHECK_FALSE(s.status("a").released);
  for (int i = 0; i < 15 && s.status("a").state == TransferState::kActive; ++i) {
    s.pass(seconds(1));
    s.say(0, MsgPing{});
    if (i == 5) s.update({}, {{0, 0}});
  }
  CHECK(s.status("a").state == TransferState::kDelivered);
  CHECK(s.status("a").released);
}

TEST_CASE("one receiver of two ranks: both legs must come before the source is released") {
  Lone s;
  s.send("a", 0, {0, 6}, true);
  s.say(0, s.pull_of("a", 1, {1}, 2, 0));
  s.resolve({0, 1});
  s.compile_all();
  s.gather_all();
  CHECK_FALSE(s.status("a").released);
  s.say(0, s.pull_of("a", 2, {1}, 2, 1));
  s.resolve({0, 1});
  s.post(Compiled{s.seen<Compile>().back().compile, Reason::kNone, {}, [] {
                    auto plan = std::make_shared<TestPlan>();
                    plan->bytes = 60;
                    return plan;
                  }()});
  s.gather_all();
  CHECK(s.status("a").released);
  CHECK(s.status("a").state == TransferState::kActive);
}

TEST_CASE("a duplicate, a stale epoch and a foreign link have no effect but a counter") {
  Lone s;
  s.post(MessageIn{{{1}, 0, 0}, 0, MsgHello{false}});
  CHECK(s.drops(DropCause::kDuplicate) == 1);
  s.post(MessageIn{{{1}, 0, 3}, 0, MsgHello{false}});
  CHECK(s.drops(DropCause::kOldEpoch) == 1);
  s.post(MessageIn{{{9}, 0, 0}, 0, MsgHello{false}});
  CHECK(s.drops(DropCause::kUnknownLink) == 1);
}

TEST_CASE("what comes by a reopened lane before the answer to its reopening is not lost") {
  Lone s;
  const auto up = [&] { return s.engine.snapshot(s.now).links.at(0).lanes.at(0); };
  const auto say = [&](uint32_t epoch, uint64_t number, ControlMessage message) {
    s.post(MessageIn{{{1}, 0, epoch}, number, std::move(message)});
  };
  s.post(LaneFailed{{{1}, 0, 0}});
  s.pass(seconds(1));
  REQUIRE(s.seen<ReopenLane>().size() == 1);
  const uint32_t epoch = s.seen<ReopenLane>()[0].lane.epoch;
  say(epoch + 1, 0, MsgHello{false});  // of what nobody has proposed
  CHECK(s.drops(DropCause::kOldEpoch) == 1);
  say(epoch, 1, MsgPing{});
  say(epoch, 0, MsgHello{false});
  CHECK_FALSE(up().up);
  s.post(LaneReopened{{{1}, 0, epoch}});
  s.post(LaneConnected{{{1}, 0, epoch}});
  CHECK(up().epoch == epoch);
  CHECK(up().up);
  say(epoch, 2, MsgHello{true});
  CHECK(s.drops(DropCause::kOldEpoch) == 1);
  for (uint64_t number = 3; number < 6; ++number) say(epoch, number, MsgPing{});
  s.pass(std::chrono::milliseconds(1));
  CHECK(up().up);
}

TEST_CASE("a later message waits for the gap; a gap that stays costs the lane") {
  Lone s;
  s.send("a", 0, {0, 6}, true);
  const uint64_t gap = s.next[0]++;
  s.say(0, s.pull_of("a", 1, {1}));
  CHECK(s.seen<ResolvePull>().empty());
  SECTION("filled") {
    s.post(MessageIn{{{1}, 0, 0}, gap, MsgPing{}});
    CHECK(s.seen<ResolvePull>().size() == 1);
  }
  SECTION("never filled") {
    for (int i = 0; i < 4; ++i) {
      s.pass(seconds(1));
      s.say(0, MsgPing{});  // the lane lives, but behind the gap
      s.say(1, MsgPing{});
    }
    REQUIRE_FALSE(s.seen<CloseLane>().empty());
    CHECK(s.seen<CloseLane>()[0].lane.lane == 0);
    CHECK(s.told<MsgLaneDown>().at(0).lane == 0);
  }
}

TEST_CASE(
    "a credit too small for its chunk fails all legs of that receiver, also who is next to offer") {
  Lone s;
  s.send("a", 0, {0, 6}, true);
  for (uint32_t rank = 0; rank < 2; ++rank) {
    MsgPull pull = s.pull_of("a", 1 + rank, {10 + rank}, 2, rank);
    pull.credits.at(0).bytes = kChunk / 4;
    s.say(0, pull);
    s.resolve({0, 1});
  }
  s.compile_all();
  const auto gathers = s.seen<Gather>();
  REQUIRE(gathers.size() == 2);
  // Both can offer in the same flush.
  s.post_all({CopyEnded{gathers[0].copy, CopyOutcome::kOk, {}},
              CopyEnded{gathers[1].copy, CopyOutcome::kOk, {}}});
  CHECK(s.seen<SendOffer>().empty());
  const auto ends = s.told<MsgEnd>();
  REQUIRE(ends.size() == 2);
  CHECK(ends[0].reason == Reason::kProtocol);
  CHECK(ends[1].reason == Reason::kProtocol);
  CHECK(s.status("a").state == TransferState::kFailed);
}

TEST_CASE("a peer that keeps breaking the protocol loses its link") {
  Lone s;
  for (int i = 0; i < 20; ++i) {
    MsgPull pull = s.pull_of("a", 1, {});
    pull.pull.receiver = boot_of(9);
    if (s.seen<CloseLink>().empty()) s.say(0, pull);
  }
  CHECK(s.seen<CloseLink>().size() == 1);
  CHECK(s.engine.snapshot(s.now).links.empty());
}

TEST_CASE("a pull that is turned away may be history at once, among too many ended ones") {
  EngineConfig config = small_config(1);
  config.max_tombstones = 1;
  Lone s(config);
  s.send("a", 0, {0, 10}, true);
  s.say(0, s.pull_of("a", 1, {1}));
  const ResolveId resolve = s.seen<ResolvePull>().back().resolve;
  for (uint64_t counter = 2; counter <= 3; ++counter) {
    MsgPull wrong = s.pull_of("a", counter, {});
    wrong.proof.bytes[0] ^= 1;
    s.say(0, wrong);
  }
  s.forget();
  PullResolved stale;
  stale.resolve = resolve;
  stale.reason = Reason::kStaleCards;
  s.post(std::move(stale));  // writes to nothing that is gone: the address sanitizer looks at this
  REQUIRE(s.told<MsgEnd>().size() == 1);
  CHECK(s.told<MsgEnd>()[0].pull.counter == 1);
  CHECK(s.told<MsgEnd>()[0].reason == Reason::kStaleCards);
  CHECK(s.engine.snapshot(s.now).links[0].legs_out == 0);
  s.forget();
  s.say(0, s.pull_of("a", 1, {1}));
  CHECK(s.told<MsgEnd>().empty());  // it is dropped as late
  CHECK(s.drops(DropCause::kLate) == 1);
}

TEST_CASE("what is held behind gaps is bounded for all lanes of a link together") {
  Lone s;
  uint64_t sequence = 100;
  const auto hold = [&](uint32_t lane) {
    MsgSlice slice;
    slice.pull = {boot_of(1), 1};
    slice.aux.emplace(60 << 10, 'x');
    s.post(MessageIn{{{1}, lane, 0}, ++sequence, std::move(slice)});
  };
  for (int i = 0; i < 40; ++i) hold(0);  // 2.4 MiB
  REQUIRE(s.drops(DropCause::kLimit) == 0);
  for (int i = 0; i < 40 && s.drops(DropCause::kLimit) == 0; ++i) hold(1);
  CHECK(s.drops(DropCause::kLimit) == 1);
  CHECK(s.seen<CloseLane>().back().lane.lane == 1);
  // What that lane held is forgotten, so the other one may hold more.
  for (int i = 0; i < 20; ++i) hold(0);
  CHECK(s.drops(DropCause::kLimit) == 1);
}

TEST_CASE("parked pulls are bounded: the oldest goes") {
  EngineConfig config = small_config(1);
  config.max_parked_pulls = 2;
  Lone s(config);
  for (uint64_t pull = 1; pull <= 3; ++pull)
    s.say(0, s.pull_of("t" + std::to_string(pull), pull, {}));
  CHECK(s.engine.snapshot(s.now).links[0].parked == 2);
  REQUIRE(s.told<MsgEnd>().size() == 1);
  CHECK(s.told<MsgEnd>()[0].pull.counter == 1);
}

}  // namespace
}  // namespace kvferry::engine::test
