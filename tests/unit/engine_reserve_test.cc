// Reserve: who is promised what, who waits, when it ends, and that it counts when the arena is
// full.
#include "tests/unit/engine_harness.h"

namespace kvferry::engine::test {
namespace {

using std::chrono::seconds;

constexpr uint64_t kFrame = 64;
constexpr WorkerId kWorker{2};

struct Reserving : Box {
  Reserving() : Box(small_config(2)) {
    layout = make_layout(kWorker, "default/decode", 2, 0);
    post(WorkerAttached{kWorker, "default", 64});
    post(LinkUp{{1}, "node1", boot_of(1), false, 1, 64, 64, CheckKind::kNone});
    post(LaneConnected{{{1}, 0, 0}});
    say(MsgHello{false});
    say(MsgHello{true});
  }
  void say(ControlMessage message) {
    post(MessageIn{{{1}, 0, 0}, next_message++, std::move(message)});
  }
  // Time passes while the peer lives.
  void wait(Duration time) {
    for (Duration left = time; left > Duration{}; left -= seconds(1)) {
      say(MsgPing{});
      pass(std::min<Duration>(left, seconds(1)));
    }
  }
  ReserveOp op(const std::string& id, uint64_t frames, bool may_wait = true) {
    ReserveOp out;
    out.op = {kWorker, ++ops};
    out.key = key_of(id);
    out.layout = layout;
    out.bytes = frames * kFrame;
    out.may_wait = may_wait;
    out.lease = seconds(5);
    return out;
  }
  // The answer to a call; nothing while it waits.
  std::optional<Reply> answer(const ReserveOp& op) const {
    std::optional<Reply> found;
    for (const Reply& reply : seen<Reply>())
      if (reply.op.op_id == op.op.op_id) found = reply;
    return found;
  }
  ReserveOp ask(const std::string& id, uint64_t frames, bool may_wait = true) {
    ReserveOp out = op(id, frames, may_wait);
    post(out);
    return out;
  }
  // A receive of so many chunks whose one leg comes from node1; its credits.
  std::size_t receive(const std::string& id, uint64_t chunks, bool waits = true) {
    ReceiveOp op;
    op.op = {kWorker, ++ops};
    op.client_handle = Pair::handle_of(id);
    op.key = key_of(id);
    op.layout = layout;
    op.num_tokens = 64;
    op.needs = {{0, 0, 64, {{0, 64}}}};
    op.wait_for_arena = waits;
    post(op);
    Resolved resolved;
    resolved.resolve = seen<Resolve>().back().resolve;
    resolved.sender_incarnation = incarnation_of(1);
    resolved.legs.push_back({0, 0, "node1", false, true, chunks * kFrame, nullptr});
    post(std::move(resolved));
    const auto pulls = told<MsgPull>();
    if (pulls.empty() || pulls.back().transfer.id != id) return 0;
    return pulls.back().credits.size();
  }
  std::size_t credits_of(const std::string& id) const {
    std::size_t count = 0;
    std::optional<PullId> pull;
    for (const MsgPull& message : told<MsgPull>())
      if (message.transfer.id == id) {
        pull = message.pull;
        count = message.credits.size();
      }
    for (const MsgUpdate& message : told<MsgUpdate>())
      if (pull && message.pull == *pull) count += message.credits.size();
    return count;
  }
  void cancel(const std::string& id) { post(CancelOp{{kWorker, ++ops}, Pair::handle_of(id)}); }
  std::shared_ptr<const TestLayout> layout;
  uint64_t ops = 0;
  uint64_t next_message = 0;
};

TEST_CASE("a reservation is answered with its bytes and lease, and ends with it") {
  Reserving box;
  const ReserveOp whole = box.ask("a", 3);
  REQUIRE(box.answer(whole));
  CHECK(box.answer(whole)->error.code == Code::kOk);
  CHECK(box.answer(whole)->reserved_bytes == 3 * kFrame);
  CHECK(box.answer(whole)->lease == Duration(seconds(5)));
  ReserveOp least = box.op("b", 0);
  least.lease = {};
  box.post(least);
  CHECK(box.answer(least)->reserved_bytes == kFrame);
  CHECK(box.answer(least)->lease == EngineConfig{}.default_lease);
  ReserveOp odd = box.op("c", 0);
  odd.bytes = kFrame + 1;
  box.post(odd);
  CHECK(box.answer(odd)->reserved_bytes == 2 * kFrame);
  CHECK(box.engine.snapshot(box.now).arenas[0].reserved_bytes == 6 * kFrame);
  box.wait(seconds(6));
  CHECK(box.engine.snapshot(box.now).reservations == 1);
  box.wait(seconds(30));
  CHECK(box.engine.snapshot(box.now).arenas[0].reserved_bytes == 0);
}

TEST_CASE("a socket's workers share its reservations, and other sockets' have their own") {
  Reserving box;
  constexpr WorkerId kNeighbour{3}, kStranger{5};
  box.post(WorkerGone{kWorker});
  for (const WorkerId worker : {kWorker, kNeighbour})
    box.post(WorkerAttached{worker, "default", 64, 4, {.reservations = 2}});
  box.post(WorkerAttached{kStranger, "other", 64, 5, {.reservations = 2}});
  const auto ask = [&](WorkerId worker, const char* id) {
    ReserveOp op = box.op(id, 1);
    op.op.worker = worker;
    if (worker != kWorker)
      op.layout = make_layout(worker, "default/decode", 3, static_cast<uint32_t>(worker.value / 2));
    box.post(op);
    const std::optional<Reply> reply = box.answer(op);
    REQUIRE(reply);
    if (reply->error.code != Code::kOk)
      CHECK(reply->error.message.find("limits.max_reservations") != std::string::npos);
    return reply->error.reason;
  };
  CHECK(ask(kWorker, "a") == "");
  CHECK(ask(kNeighbour, "b") == "");
  CHECK(ask(kNeighbour, "c") == "SOCKET_LIMIT");
  CHECK(ask(kWorker, "c") == "SOCKET_LIMIT");
  CHECK(ask(kStranger, "d") == "");
  box.post(WorkerGone{kWorker});
  CHECK(ask(kNeighbour, "c") == "");
  CHECK(ask(kNeighbour, "e") == "SOCKET_LIMIT");
  // Their leases end.
  box.wait(seconds(6));
  CHECK(ask(kNeighbour, "e") == "");
}

TEST_CASE("the same reservation again starts nothing, another one is refused by its field") {
  Reserving box;
  const ReserveOp first = box.ask("a", 3);
  ReserveOp again = first;
  again.op.op_id = 90;
  box.post(again);
  CHECK(box.answer(again)->existing);
  CHECK(box.answer(again)->reserved_bytes == 3 * kFrame);
  CHECK(box.engine.snapshot(box.now).arenas[0].reserved_bytes == 3 * kFrame);
  const auto differs = [&](auto change, const std::string& field) {
    ReserveOp other = first;
    other.op.op_id = ++box.ops;
    change(other);
    box.post(other);
    CHECK(box.answer(other)->error.code == Code::kAlreadyExists);
    CHECK(box.answer(other)->error.field == field);
  };
  differs([](ReserveOp& o) { o.bytes += 1; }, "bytes");
  differs([](ReserveOp& o) { o.may_wait = false; }, "arena_full");
  differs([](ReserveOp& o) { o.lease = seconds(6); }, "lease");
}

TEST_CASE("what an empty arena could not promise is refused, whatever its size") {
  Reserving box;
  // 16 frames less E + 2.
  CHECK(box.answer(box.ask("a", 13))->error.code == Code::kOk);
  ReserveOp huge = box.op("b", 14);
  box.post(huge);
  CHECK(box.answer(huge)->error.reason == "RESERVATION_TOO_LARGE");
  CHECK(box.answer(huge)->error.field == "bytes");
  huge = box.op("c", 0);
  huge.bytes = UINT64_MAX;
  box.post(huge);
  CHECK(box.answer(huge)->error.reason == "RESERVATION_TOO_LARGE");
}

TEST_CASE("who does not fit fails, or stands in line, in order, for a bounded time") {
  Reserving box;
  box.ask("a", 10);
  const ReserveOp fails = box.ask("b", 4, false);
  CHECK(box.answer(fails)->error.code == Code::kResourceExhausted);
  CHECK(box.answer(fails)->error.reason == "ARENA_EXHAUSTED");
  const ReserveOp waits = box.ask("c", 6);
  const ReserveOp behind = box.ask("d", 1);
  CHECK_FALSE(box.answer(waits));
  CHECK_FALSE(box.answer(behind));  // it would fit, but others came first
  const ReserveOp impatient = box.ask("e", 1, false);
  CHECK(box.answer(impatient)->error.reason == "ARENA_EXHAUSTED");
  SECTION("a lease ends") {
    box.wait(seconds(6));
    CHECK(box.answer(waits)->reserved_bytes == 6 * kFrame);
    CHECK(box.answer(behind)->error.code == Code::kOk);
  }
  SECTION("nothing ends in time") {
    box.receive("a", 1);
    box.wait(seconds(29));
    CHECK_FALSE(box.answer(waits));
    box.wait(seconds(2));
    CHECK(box.answer(waits)->error.reason == "ARENA_EXHAUSTED");
  }
  SECTION("the worker goes") {
    box.post(WorkerGone{kWorker});
    CHECK(box.answer(waits)->error.code == Code::kFailedPrecondition);
    CHECK(box.engine.snapshot(box.now).reservations == 0);
  }
  SECTION("the layout is taken back") {
    box.post(UnregisterLayout{box.layout, Reason::kUnregistered});
    CHECK(box.answer(waits)->error.reason == "UNREGISTERED");
    CHECK(box.engine.snapshot(box.now).reservations == 0);
    CHECK(box.seen<LayoutQuiet>().size() == 1);
  }
  SECTION("the daemon drains") {
    box.post(Drain{box.now + seconds(60)});
    CHECK(box.answer(waits)->error.reason == "DRAINING");
    CHECK(box.engine.snapshot(box.now).reservations == 1);
  }
}

TEST_CASE("a reserved transfer has its credits while others have filled the arena") {
  Reserving box;
  box.ask("r", 4);
  // Without a slice each gets its four credits as long as there are frames that nobody was
  // promised.
  std::size_t others = 0;
  for (int i = 0; i < 6; ++i) others += box.receive("o" + std::to_string(i), 100);
  CHECK(others == 10);  // 16 less E + 1 for staging, less 4
  CHECK(box.receive("r", 100) == 4);
  // Nobody takes them away, and they come back when it ends.
  CHECK(box.engine.snapshot(box.now).arenas[0].granted_bytes == 14 * kFrame);
  box.cancel("r");
  CHECK(box.engine.snapshot(box.now).arenas[0].reserved_bytes == 0);
  CHECK(box.engine.snapshot(box.now).arenas[0].granted_bytes == 14 * kFrame);
}

TEST_CASE("a reservation lasts as long as its transfer, not its lease") {
  Reserving box;
  box.ask("r", 2);
  box.receive("r", 1);
  box.wait(seconds(20));
  CHECK(box.engine.snapshot(box.now).reservations == 1);
  box.wait(seconds(45));  // the receive's own limits
  CHECK(box.record(kWorker, Pair::handle_of("r")).state == TransferState::kFailed);
  CHECK(box.engine.snapshot(box.now).reservations == 0);
}

TEST_CASE("a receive that will not wait goes by its reservation") {
  Reserving box;
  std::size_t others = 0;
  for (int i = 0; i < 6; ++i) others += box.receive("o" + std::to_string(i), 100);
  REQUIRE(others == 14);
  // All is granted to legs without a slice: a promise is made, and waits for what they give back.
  REQUIRE(box.answer(box.ask("r", 3))->error.code == Code::kOk);
  CHECK(box.receive("r", 100, false) == 0);
  CHECK(box.record(kWorker, Pair::handle_of("r")).state == TransferState::kOpen);
  box.cancel("o0");
  CHECK(box.credits_of("r") >= 3);
  CHECK(box.receive("s", 100, false) == 0);
  CHECK(box.record(kWorker, Pair::handle_of("s")).reason == Reason::kArenaExhausted);
}

TEST_CASE("a Receive before its reservation is promised keeps its place in line") {
  Reserving box;
  box.ask("a", 13);
  const ReserveOp waits = box.ask("r", 2);
  box.receive("r", 100);
  CHECK_FALSE(box.answer(waits));
  box.wait(seconds(6));
  CHECK(box.answer(waits)->reserved_bytes == 2 * kFrame);
  SECTION("then it ends with the receive") {
    box.cancel("r");
    CHECK(box.engine.snapshot(box.now).reservations == 0);
  }
}

TEST_CASE("a reservation behind its Receive, or of a closed id, is refused") {
  Reserving box;
  box.receive("r", 1);
  CHECK(box.answer(box.ask("r", 1))->error.reason == "ALREADY_RECEIVING");
  box.cancel("r");
  box.post(CloseOp{{kWorker, ++box.ops}, Pair::handle_of("r")});
  CHECK(box.answer(box.ask("r", 1))->error.reason == "TRANSFER_CLOSED");
  ReserveOp bad = box.op("", 1);
  box.post(bad);
  CHECK(box.answer(bad)->error.field == "transfer.id");
}

}  // namespace
}  // namespace kvferry::engine::test
