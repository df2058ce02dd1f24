// Packed copies: made when the slice's condition holds, counted against their limit, a source like
// pages for every leg, and gone with their slice or send. SOURCE_RELEASED does not wait for pulls.
#include "tests/unit/engine_lone.h"

namespace kvferry::engine::test {
namespace {

using std::chrono::seconds;

constexpr uint64_t kLimit = 1000;

EngineConfig with_room() {
  EngineConfig config = small_config(1);
  config.max_packed_bytes = kLimit;
  return config;
}

// A pair whose packed copies are made at once, unless `hold` is set.
struct Packing : Pair {
  explicit Packing(EngineConfig sender = with_room()) : Pair(std::move(sender), small_config(2)) {
    swallow = [this](const Command& command) {
      return hold && std::holds_alternative<MakePacked>(command);
    };
  }
  SendOp packed_op(const std::string& id, uint32_t index, Range tokens, bool last) const {
    SendOp op = send_op(id, index, tokens, last);
    op.packed_bytes = tokens.size() * kBytesPerToken;
    op.lease = seconds(10);
    return op;
  }
  void send(SendOp op) {
    s.post(std::move(op));
    run();
  }
  void receive(const std::string& id) {
    r.post(receive_op(id, {0, 64}));
    run();
  }
  // The copies that were held are made now.
  void make(std::size_t number) { packed(s, s.seen<MakePacked>().at(number)), run(); }
  void cancel(const std::string& id) {
    s.post(CancelOp{{{1}, 9}, handle_of(id)});
    run();
  }
  std::vector<uint32_t> revoke(const std::string& id, uint64_t from) {
    s.post(RevokeOp{{{1}, 9}, handle_of(id), from});
    run();
    return s.last_reply().dropped_sends;
  }
  uint64_t bytes() const { return s.engine.snapshot(s.now).packed_bytes; }
  uint32_t copies() const { return s.engine.snapshot(s.now).packed_copies; }

  bool hold = false;
};

TEST_CASE("a packed send is released before anybody pulls, and delivered afterwards") {
  Packing pair;
  pair.hold = true;
  pair.send(pair.packed_op("a", 0, {0, 64}, true));
  CHECK(pair.bytes() == 640);
  CHECK(pair.sent("a").memory_in_use);
  CHECK_FALSE(pair.sent("a").released);
  pair.make(0);
  CHECK(pair.sent("a").released);
  CHECK(pair.sent("a").released_reason == Reason::kNone);
  CHECK_FALSE(pair.sent("a").memory_in_use);
  CHECK(pair.sent("a").state == TransferState::kOpen);
  CHECK(pair.copies() == 1);

  pair.receive("a");
  CHECK(pair.received("a").state == TransferState::kCompleted);
  CHECK(pair.received("a").bytes_done == 640);
  CHECK(pair.sent("a").state == TransferState::kDelivered);
  CHECK(pair.bytes() == 0);
  CHECK(pair.copies() == 0);
  CHECK(pair.s.engine.stats().packed_made == 1);
}

TEST_CASE("legs are compiled from the copy, once it is there, and in the order of the slices") {
  Packing pair;
  pair.hold = true;
  pair.receive("a");
  pair.send(pair.packed_op("a", 0, {0, 32}, false));
  pair.send(pair.send_op("a", 1, {32, 64}, true));
  CHECK(pair.s.seen<Compile>().empty());
  pair.make(0);
  const auto compiles = pair.s.seen<Compile>();
  REQUIRE(compiles.size() == 2);
  CHECK(compiles[0].send->layout->instance == "packed");
  CHECK(compiles[0].send->blocks.front().ids == std::vector<int32_t>{0});
  CHECK(compiles[0].offer == std::vector<GroupRanges>{{0, {{0, 32}}}});
  CHECK(compiles[1].send->layout == pair.s_layout);
  CHECK(pair.received("a").state == TransferState::kCompleted);
  CHECK(pair.sent("a").slices == 2);
}

TEST_CASE("a copy is made when the slice's condition holds, not before") {
  Packing pair;
  SendOp op = pair.packed_op("a", 0, {0, 64}, true);
  op.ready = {ReadyCondition::Kind::kTimeline, 0, 5};
  pair.send(std::move(op));
  CHECK(pair.s.seen<MakePacked>().empty());
  CHECK(pair.bytes() == 640);
  CHECK_FALSE(pair.sent("a").released);
  SECTION("it holds") {
    pair.s.post(ConditionMet{pair.s.seen<WatchCondition>().front().condition});
    CHECK(pair.sent("a").memory_in_use);
    pair.run();
    CHECK(pair.sent("a").released);
    return;
  }
  SECTION("the send is cancelled before") {
    pair.cancel("a");
    CHECK(pair.s.seen<UnwatchCondition>().size() == 1);
  }
  SECTION("nobody comes before the lease is over") {
    pair.pass(seconds(11));
    CHECK(pair.sent("a").reason == Reason::kExpired);
  }
  CHECK(pair.s.seen<MakePacked>().empty());
  CHECK(pair.bytes() == 0);
}

TEST_CASE("a Send whose copy finds no room is refused, and nothing else changes") {
  Packing pair;
  pair.send(pair.packed_op("a", 0, {0, 64}, true));
  const auto refused = [&](SendOp op) {
    pair.send(std::move(op));
    const Error error = pair.s.last_reply().error;
    CHECK(error.code == Code::kResourceExhausted);
    CHECK(error.reason == "PACKED_MEMORY_FULL");
    CHECK(error.field == "packed_copy");
    CHECK(pair.bytes() == 640);
  };
  SECTION("the first of a transfer: there is no transfer") {
    refused(pair.packed_op("b", 0, {0, 37}, true));
    CHECK(pair.s.engine.snapshot(pair.s.now).transfers.size() == 1);
    pair.send(pair.packed_op("b", 0, {0, 36}, true));
    CHECK(pair.s.last_reply().error.code == Code::kOk);
    CHECK(pair.bytes() == 1000);
  }
  SECTION("a later one: the transfer goes on without a copy of it") {
    pair.send(pair.send_op("b", 0, {0, 16}, false));
    refused(pair.packed_op("b", 1, {16, 64}, true));
    pair.send(pair.send_op("b", 1, {16, 64}, true));
    pair.receive("b");
    CHECK(pair.received("b").state == TransferState::kCompleted);
  }
  SECTION("bytes beyond all numbers") {
    SendOp op = pair.packed_op("b", 0, {0, 64}, true);
    op.packed_bytes = UINT64_MAX;
    refused(std::move(op));
  }
  CHECK(pair.s.engine.stats().packed_refused == 1);
  pair.cancel("a");
  pair.cancel("b");
  CHECK(pair.bytes() == 0);
}

TEST_CASE("copies are counted too: each is a mapping of its own") {
  EngineConfig config = small_config(1);
  config.max_packed_copies = 2;
  Packing pair(config);
  pair.send(pair.packed_op("a", 0, {0, 8}, false));
  pair.send(pair.packed_op("a", 1, {8, 16}, false));
  pair.send(pair.packed_op("a", 2, {16, 64}, true));
  CHECK(pair.s.last_reply().error.reason == "PACKED_MEMORY_FULL");
  CHECK(pair.s.last_reply().error.field == "packed_copy");
  pair.cancel("a");
  pair.send(pair.packed_op("b", 0, {0, 64}, true));
  CHECK(pair.s.last_reply().error.code == Code::kOk);
}

TEST_CASE("a repeated Send takes no more room, and must ask for the same") {
  Packing pair;
  pair.send(pair.packed_op("a", 0, {0, 64}, true));
  pair.send(pair.packed_op("a", 0, {0, 64}, true));
  CHECK(pair.s.last_reply().existing);
  CHECK(pair.bytes() == 640);
  pair.send(pair.send_op("a", 0, {0, 64}, true));
  CHECK(pair.s.last_reply().error.reason == "SEND_EXISTS");
  CHECK(pair.s.last_reply().error.field == "packed_copy");
}

TEST_CASE("an end takes the copies along, those under way when they have ended") {
  const Reason outcome = GENERATE(Reason::kNone, Reason::kGatherFailed);
  Packing pair;
  pair.hold = true;
  pair.send(pair.packed_op("a", 0, {0, 32}, false));
  pair.send(pair.packed_op("a", 1, {32, 64}, true));
  pair.make(0);
  SECTION("cancelled") {
    pair.cancel("a");
  }
  SECTION("its worker dies before the release") {
    pair.s.post(WorkerGone{{1}});
    CHECK(pair.s.engine.snapshot(pair.s.now).transfers.size() == 1);
    pair.make(1);
    CHECK(pair.s.engine.snapshot(pair.s.now).transfers.empty());
    CHECK(pair.bytes() == 0);
    return;
  }
  SECTION("its layout goes") {
    pair.s.post(UnregisterLayout{pair.s_layout, Reason::kUnregistered});
    CHECK(pair.s.seen<LayoutQuiet>().empty());
  }
  CHECK(pair.bytes() == 320);
  CHECK(pair.sent("a").memory_in_use);
  CHECK_FALSE(pair.sent("a").released);
  pair.packed_reason = outcome;  // of the copy that is under way
  pair.make(1);
  CHECK(pair.bytes() == 0);
  CHECK(pair.sent("a").released);
}

TEST_CASE("a copy that cannot be made fails the send") {
  Packing pair;
  pair.packed_reason = Reason::kGatherFailed;
  pair.receive("a");
  pair.send(pair.packed_op("a", 0, {0, 64}, true));
  CHECK(pair.sent("a").state == TransferState::kFailed);
  CHECK(pair.sent("a").reason == Reason::kGatherFailed);
  CHECK(pair.sent("a").released);
  CHECK(pair.received("a").reason == Reason::kGatherFailed);
  CHECK(pair.bytes() == 0);
}

TEST_CASE("a packed send that was released goes on without its worker") {
  Packing pair;
  pair.send(pair.packed_op("a", 0, {0, 64}, true));
  REQUIRE(pair.sent("a").released);
  pair.s.post(WorkerGone{{1}});
  SECTION("and is delivered") {
    pair.receive("a");
    CHECK(pair.received("a").state == TransferState::kCompleted);
  }
  SECTION("until its lease is over") {
    CHECK(pair.bytes() == 640);
    pair.pass(seconds(11));
  }
  CHECK(pair.s.engine.snapshot(pair.s.now).transfers.empty());
  CHECK(pair.bytes() == 0);
}

TEST_CASE("a send without its worker is forgotten, however it ends") {
  Lone lone(with_room());
  SendOp op;
  op.op = {{1}, 1};
  op.client_handle = 5;
  op.key = key_of("a");
  op.layout = lone.layout;
  op.offer = {{0, {{0, 10}}}};
  op.packed_bytes = 100;
  op.last = true;
  op.lease = seconds(10);
  lone.post(std::move(op));
  Packed made;
  made.copy = lone.seen<MakePacked>().back().copy;
  made.layout = make_layout({1}, "packed", 1, 0);
  made.blocks = {{0, 0, {0}}};
  lone.post(std::move(made));
  REQUIRE(lone.record({1}, 5).released);
  lone.post(WorkerGone{{1}});
  const auto transfers = [&] { return lone.engine.snapshot(lone.now).transfers.size(); };
  CHECK(transfers() == 1);
  SECTION("its receiver gives up before it is known") {
    lone.say(0, lone.pull_of("a", 1, {}));
    lone.say(0, MsgEnd{{boot_of(2), 1},
                       wire_name(key_of("a"), incarnation_of(1)),
                       Outcome::kFailed,
                       Reason::kCancelled,
                       std::nullopt});
  }
  SECTION("its layout goes") {
    lone.post(UnregisterLayout{lone.layout, Reason::kUnregistered});
  }
  SECTION("the daemon drains") {
    lone.post(Drain{lone.now});
    lone.pass(std::chrono::milliseconds(1));
  }
  CHECK(transfers() == 0);
  CHECK(lone.engine.snapshot(lone.now).packed_bytes == 0);
}

TEST_CASE("released pages do not turn away receivers that have a place") {
  Packing pair;
  SendOp op = pair.packed_op("a", 0, {0, 64}, true);
  op.max_receivers = 2;
  pair.send(std::move(op));
  pair.receive("a");
  CHECK(pair.received("a").state == TransferState::kCompleted);
  CHECK(pair.bytes() == 640);
  ReceiveOp second = pair.receive_op("a", {0, 64});
  second.client_handle = 77;
  second.layout = make_layout({2}, "default/other", 3, 0);
  SECTION("another one comes") {
    pair.r.post(std::move(second));
    pair.run();
    CHECK(pair.r.record({2}, 77).state == TransferState::kCompleted);
  }
  SECTION("or comes too late") {
    pair.pass(seconds(11));
    pair.r.post(std::move(second));
    pair.run();
    CHECK(pair.r.record({2}, 77).state == TransferState::kFailed);
  }
  CHECK(pair.sent("a").state == TransferState::kDelivered);
  CHECK(pair.bytes() == 0);
}

TEST_CASE("where not all slices are packed, the pages wait for the gathers of the others") {
  Packing pair;
  pair.answer_gathers = false;
  const bool packed_last = GENERATE(false, true);
  if (packed_last) {
    pair.send(pair.send_op("a", 0, {0, 6}, false));
    pair.send(pair.packed_op("a", 1, {6, 64}, true));
  } else {
    pair.send(pair.packed_op("a", 0, {0, 58}, false));
    pair.send(pair.send_op("a", 1, {58, 64}, true));
  }
  CHECK_FALSE(pair.sent("a").released);
  pair.receive("a");
  CHECK_FALSE(pair.sent("a").released);
  // Each gather is answered until the pages are free: with the packed slice last, after the first.
  std::size_t answered = 0;
  while (!pair.sent("a").released && answered < pair.s.seen<Gather>().size()) {
    const Gather gather = pair.s.seen<Gather>().at(answered++);
    pair.s.post(CopyEnded{gather.copy, CopyOutcome::kOk, {}});
    pair.run();
  }
  CHECK(pair.sent("a").released);
  CHECK(answered == (packed_last ? 1 : 11));
  CHECK(pair.sent("a").memory_in_use == false);
  for (; answered < pair.s.seen<Gather>().size(); ++answered) {
    pair.s.post(CopyEnded{pair.s.seen<Gather>().at(answered).copy, CopyOutcome::kOk, {}});
    pair.run();
  }
  CHECK(pair.received("a").state == TransferState::kCompleted);
  CHECK(pair.bytes() == 0);
}

TEST_CASE("slices that offer nothing need no pages: they keep no packed send from its release") {
  Packing pair;
  pair.send(pair.packed_op("a", 0, {0, 64}, false));
  CHECK_FALSE(pair.sent("a").released);
  SECTION("an empty last slice") {
    pair.send(pair.send_op("a", 1, {}, true));
  }
  SECTION("a packed one without a cell on this rank") {
    SendOp op = pair.packed_op("a", 1, {64, 80}, true);
    op.packed_bytes = 0;
    pair.send(std::move(op));
    CHECK(pair.s.seen<MakePacked>().size() == 1);
  }
  CHECK(pair.sent("a").released);
  CHECK(pair.copies() == 1);
}

TEST_CASE("a Revoke drops packed slices with their memory, until the pages are released") {
  Packing pair;
  SECTION("made") {
    pair.send(pair.packed_op("a", 0, {0, 32}, false));
    pair.send(pair.packed_op("a", 1, {32, 48}, false));
    CHECK(pair.bytes() == 480);
    CHECK(pair.revoke("a", 40) == std::vector<uint32_t>{1});
    CHECK(pair.bytes() == 320);
    pair.send(pair.packed_op("a", 2, {32, 64}, true));
    CHECK(pair.sent("a").released);
    SECTION("afterwards there is nothing to drop") {
      CHECK(pair.revoke("a", 0).empty());
    }
  }
  SECTION("being made: answered when no page is read any more") {
    pair.hold = true;
    pair.send(pair.packed_op("a", 0, {0, 64}, true));
    const std::size_t replies = pair.s.seen<Reply>().size();
    (void)pair.revoke("a", 0);
    CHECK(pair.s.seen<Reply>().size() == replies);
    pair.make(0);
    CHECK(pair.s.last_reply().dropped_sends == std::vector<uint32_t>{0});
    CHECK(pair.bytes() == 0);
    pair.hold = false;
    pair.send(pair.packed_op("a", 1, {0, 64}, true));
  }
  SECTION("awaited") {
    SendOp op = pair.packed_op("a", 0, {0, 64}, true);
    op.ready = {ReadyCondition::Kind::kTimeline, 0, 5};
    pair.send(std::move(op));
    CHECK(pair.revoke("a", 0) == std::vector<uint32_t>{0});
    CHECK(pair.bytes() == 0);
    pair.send(pair.packed_op("a", 1, {0, 64}, true));
  }
  SECTION("being gathered: its memory stays as long as it is read") {
    pair.answer_gathers = false;
    pair.receive("a");
    pair.send(pair.packed_op("a", 0, {0, 64}, false));
    const std::size_t replies = pair.s.seen<Reply>().size();
    const std::vector<Gather> gathers = pair.s.seen<Gather>();
    REQUIRE_FALSE(gathers.empty());
    CHECK(pair.revoke("a", 0) == std::vector<uint32_t>{0});
    CHECK(pair.s.seen<Reply>().size() == replies + 1);
    CHECK(pair.bytes() == 640);
    for (const Gather& gather : gathers) pair.s.post(CopyEnded{gather.copy, CopyOutcome::kOk, {}});
    CHECK(pair.bytes() == 0);
    pair.answer_gathers = true;
    pair.send(pair.packed_op("a", 1, {0, 64}, true));
  }
  if (!pair.sent("a").receiver_ready) pair.receive("a");
  CHECK(pair.received("a").state == TransferState::kCompleted);
  CHECK(pair.sent("a").state == TransferState::kDelivered);
  CHECK(pair.bytes() == 0);
}

TEST_CASE("a gather from a packed copy does not keep the layout in use, but the copy") {
  Packing pair;
  pair.answer_gathers = false;
  pair.receive("a");
  pair.send(pair.packed_op("a", 0, {0, 64}, true));
  const std::vector<Gather> gathers = pair.s.seen<Gather>();
  REQUIRE_FALSE(gathers.empty());
  CHECK(pair.sent("a").released);
  CHECK_FALSE(pair.sent("a").memory_in_use);
  pair.s.post(UnregisterLayout{pair.s_layout, Reason::kUnregistered});
  CHECK(pair.s.seen<LayoutQuiet>().size() == 1);
  CHECK(pair.sent("a").reason == Reason::kUnregistered);
  CHECK(pair.bytes() == 640);
  for (const Gather& gather : gathers) pair.s.post(CopyEnded{gather.copy, CopyOutcome::kOk, {}});
  CHECK(pair.bytes() == 0);
}

}  // namespace
}  // namespace kvferry::engine::test
