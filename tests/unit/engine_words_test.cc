// Done words, and aux that somebody promised and nobody brought.
#include "tests/unit/engine_harness.h"

namespace kvferry::engine::test {
namespace {

SendOp with_done(SendOp op, uint32_t word, uint64_t value) {
  op.done = DoneWord{word, value};
  return op;
}

TEST_CASE("done words are set once: the source's at its release, the destination's when complete") {
  Pair pair;
  pair.swallow = [](const Command& command) { return std::holds_alternative<Scatter>(command); };
  pair.needed = {0, 6};
  pair.s.post(with_done(pair.send_op("a", 0, {0, 6}, true), 3, 70));
  ReceiveOp receive = pair.receive_op("a", {0, 6});
  receive.done = DoneWord{4, 80};
  pair.r.post(receive);
  pair.run();
  REQUIRE(pair.sent("a").released);
  REQUIRE(pair.s.seen<SetDoneWord>().size() == 1);
  CHECK(pair.s.seen<SetDoneWord>()[0].worker == WorkerId{1});
  CHECK(pair.s.seen<SetDoneWord>()[0].word == 3);
  CHECK(pair.s.seen<SetDoneWord>()[0].value == 70);
  CHECK(pair.r.seen<SetDoneWord>().empty());
  pair.r.post(CopyEnded{pair.r.seen<Scatter>()[0].copy, CopyOutcome::kOk, {}});
  pair.run();
  REQUIRE(pair.received("a").state == TransferState::kCompleted);
  REQUIRE(pair.r.seen<SetDoneWord>().size() == 1);
  CHECK(pair.r.seen<SetDoneWord>()[0].word == 4);
  CHECK(pair.r.seen<SetDoneWord>()[0].value == 80);
  CHECK(pair.s.seen<SetDoneWord>().size() == 1);
}

TEST_CASE("a receive that does not complete sets no done word; a source that is released does") {
  Pair pair;
  pair.s.post(with_done(pair.send_op("a", 0, {0, 64}, true), 3, 70));
  ReceiveOp receive = pair.receive_op("a", {0, 64});
  receive.done = DoneWord{4, 80};
  pair.scatter_outcome = CopyOutcome::kFailed;
  pair.r.post(receive);
  pair.run();
  CHECK(pair.received("a").released);
  CHECK(pair.r.seen<SetDoneWord>().empty());
  CHECK(pair.s.seen<SetDoneWord>().size() == 1);
}

TEST_CASE("nothing is stored for a worker that is gone") {
  Pair pair;
  pair.answer_gathers = false;
  pair.s.post(with_done(pair.send_op("a", 0, {0, 64}, true), 3, 70));
  pair.r.post(pair.receive_op("a", {0, 64}));
  pair.run();
  pair.s.post(WorkerGone{{1}});
  for (const Gather& gather : pair.s.seen<Gather>())
    pair.s.post(CopyEnded{gather.copy, CopyOutcome::kOk, {}});
  CHECK(pair.s.seen<SetDoneWord>().empty());
}

TEST_CASE("a transfer has one done word, whichever of its Sends names it") {
  Pair pair;
  pair.s.post(pair.send_op("a", 0, {0, 16}, false));
  pair.s.post(with_done(pair.send_op("a", 1, {16, 32}, false), 3, 70));
  pair.s.post(with_done(pair.send_op("a", 2, {32, 64}, false), 3, 71));
  CHECK(pair.s.last_reply().error.reason == "DONE_WORD_DIFFERS");
  CHECK(pair.s.last_reply().error.field == "done");
  pair.s.post(with_done(pair.send_op("a", 2, {32, 64}, true), 3, 70));
  CHECK(pair.s.last_reply().error.code == Code::kOk);
  // The same call again, but for its word.
  pair.s.post(pair.send_op("a", 2, {32, 64}, true));
  CHECK(pair.s.last_reply().error.code == Code::kAlreadyExists);
  CHECK(pair.s.last_reply().error.field == "done");
  ReceiveOp receive = pair.receive_op("a", {0, 64});
  pair.r.post(receive);
  receive.done = DoneWord{1, 1};
  pair.r.post(receive);
  CHECK(pair.r.last_reply().error.field == "done");
  pair.run();
  CHECK(pair.s.seen<SetDoneWord>().size() == 1);
}

// Two sender ranks on node1; rank 0's leg carries the aux.
struct TwoRanks : Pair {
  TwoRanks() {
    second = make_layout({1}, "default/prefill", 1, 1);
    swallow = [this](const Command& command) {
      if (const auto* resolve = std::get_if<Resolve>(&command)) {
        Resolved resolved;
        resolved.resolve = resolve->resolve;
        resolved.sender_incarnation = incarnation_of(1);
        for (uint32_t rank = 0; rank < 2; ++rank)
          resolved.legs.push_back({rank, 0, "node1", false, rank == 0, 640, nullptr});
        r.post(std::move(resolved));
        return true;
      }
      if (const auto* resolve = std::get_if<ResolvePull>(&command)) {
        PullResolved resolved;
        resolved.resolve = resolve->resolve;
        resolved.legs.push_back({0, false, resolve->layout->rank == 0});
        s.post(std::move(resolved));
        return true;
      }
      return false;
    };
  }
  void send(uint32_t rank, std::optional<std::string> aux) {
    SendOp op = send_op("a", 0, {0, 64}, true);
    if (rank == 1) {
      op.layout = second;
      op.client_handle = 17;
    }
    op.aux = std::move(aux);
    s.post(std::move(op));
  }
  std::shared_ptr<const TestLayout> second;
};

TEST_CASE("aux that another rank's Send had, but not the one that carries it, is missed") {
  TwoRanks pair;
  SECTION("all give it") {
    pair.send(0, "tokens");
    pair.send(1, "tokens");
    pair.r.post(pair.receive_op("a", {0, 64}));
    pair.run();
    REQUIRE(pair.received("a").state == TransferState::kCompleted);
    CHECK(*pair.received("a").aux == "tokens");
    // It has travelled once.
    std::size_t carried = 0;
    for (const MsgSlice& slice : pair.s.told<MsgSlice>()) {
      CHECK(slice.with_aux);
      carried += slice.aux.has_value();
    }
    CHECK(carried == 1);
  }
  SECTION("none gives it") {
    pair.send(0, {});
    pair.send(1, {});
    pair.r.post(pair.receive_op("a", {0, 64}));
    pair.run();
    CHECK(pair.received("a").state == TransferState::kCompleted);
    CHECK(pair.received("a").aux == nullptr);
  }
  SECTION("the other one alone gives it") {
    const bool carrier_first = GENERATE(false, true);
    pair.send(carrier_first ? 0 : 1,
              carrier_first ? std::nullopt : std::optional<std::string>("t"));
    pair.r.post(pair.receive_op("a", {0, 64}));
    pair.run();
    pair.send(carrier_first ? 1 : 0,
              carrier_first ? std::optional<std::string>("t") : std::nullopt);
    pair.run();
    CHECK(pair.received("a").state == TransferState::kFailed);
    CHECK(pair.received("a").reason == Reason::kAuxMissing);
    CHECK(pair.received("a").released);
  }
  SECTION("empty aux is aux") {
    pair.send(0, "");
    pair.send(1, "");
    pair.r.post(pair.receive_op("a", {0, 64}));
    pair.run();
    REQUIRE(pair.received("a").aux);
    CHECK(pair.received("a").aux->empty());
  }
}

}  // namespace
}  // namespace kvferry::engine::test
