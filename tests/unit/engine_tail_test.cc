// Tails: the cells past the prompt's end are cleared after a slice's last scatter, as a write to
// the pages like the scatters before it.
#include "tests/unit/engine_harness.h"

namespace kvferry::engine::test {
namespace {

bool is_clear(const Command& command) {
  return std::holds_alternative<ClearTail>(command);
}
bool is_scatter(const Command& command) {
  return std::holds_alternative<Scatter>(command);
}

// A transfer of one slice of ten chunks whose tail is being cleared.
struct Clearing : Pair {
  Clearing() {
    tails = true;
    swallow = is_clear;
    s.post(send_op("a", 0, {0, 64}, true));
    r.post(receive_op("a", {0, 64}));
    run();
    REQUIRE(r.seen<ClearTail>().size() == 1);
    REQUIRE(r.seen<Scatter>().size() == 10);
    REQUIRE(received("a").state == TransferState::kActive);
  }
  void cleared(CopyOutcome outcome) {
    r.post(CopyEnded{r.seen<ClearTail>().front().copy, outcome, {}});
    run();
  }
};

TEST_CASE("a slice with a tail is done and its last chunk acknowledged once the tail is cleared") {
  Clearing pair;
  CHECK(pair.received("a").slices == 0);
  CHECK(pair.received("a").bytes_done == 9 * 64);
  CHECK(pair.received("a").memory_in_use);
  CHECK(pair.sent("a").bytes_done == 9 * 64);
  CHECK(pair.sent("a").state == TransferState::kActive);
  pair.cleared(CopyOutcome::kOk);
  CHECK(pair.received("a").state == TransferState::kCompleted);
  CHECK(pair.received("a").slices == 1);
  CHECK(pair.received("a").bytes_done == 640);
  CHECK(pair.received("a").released);
  CHECK(pair.sent("a").state == TransferState::kDelivered);
  CHECK(pair.r.engine.stats().chunks_scattered == 10);
}

TEST_CASE("a tail that cannot be cleared fails the transfer") {
  Clearing pair;
  pair.cleared(CopyOutcome::kFailed);
  CHECK(pair.received("a").reason == Reason::kScatterFailed);
  CHECK(pair.received("a").released);
  CHECK(pair.sent("a").reason == Reason::kScatterFailed);
}

TEST_CASE("no tail is cleared before every chunk of its slice is scattered, whatever their order") {
  Pair pair;
  pair.tails = true;
  pair.swallow = is_scatter;
  pair.needed = {0, 12};
  pair.s.post(pair.send_op("a", 0, {0, 12}, true));
  pair.r.post(pair.receive_op("a", {0, 12}));
  pair.run();
  const auto scatters = pair.r.seen<Scatter>();
  REQUIRE(scatters.size() == 2);
  pair.r.post(CopyEnded{scatters[1].copy, CopyOutcome::kOk, {}});
  CHECK(pair.r.seen<ClearTail>().empty());
  pair.r.post(CopyEnded{scatters[0].copy, CopyOutcome::kOk, {}});
  CHECK(pair.r.seen<ClearTail>().size() == 1);
  pair.run();
  CHECK(pair.received("a").state == TransferState::kCompleted);
}

TEST_CASE("each slice that reaches the prompt's end clears its own tail; empty ones have none") {
  Pair pair;
  pair.tails = true;
  for (uint32_t half = 0; half < 2; ++half) {
    SendOp op = pair.send_op("a", half, {0, 32}, false);
    op.layers = Range{half, half + 1};
    pair.s.post(std::move(op));
  }
  pair.s.post(pair.send_op("a", 2, {}, true));
  pair.r.post(pair.receive_op("a", {0, 64}));
  pair.run();
  CHECK(pair.r.seen<ClearTail>().size() == 2);
  CHECK(pair.received("a").state == TransferState::kCompleted);
  CHECK(pair.received("a").slices == 3);
}

TEST_CASE("a transfer that ends while a tail is cleared keeps its pages until that has ended") {
  Clearing pair;
  SECTION("cancelled") {
    pair.r.post(CancelOp{{{2}, 9}, Pair::handle_of("a")});
  }
  SECTION("its layout goes") {
    pair.r.post(UnregisterLayout{pair.r_layout, Reason::kUnregistered});
    CHECK(pair.r.seen<LayoutQuiet>().empty());
  }
  SECTION("the sender ends it") {
    pair.s.post(CancelOp{{{1}, 9}, Pair::handle_of("a")});
  }
  SECTION("its worker dies") {
    pair.r.post(WorkerGone{{2}});
    CHECK(pair.r.engine.snapshot(pair.r.now).transfers.size() == 1);
    pair.cleared(CopyOutcome::kOk);
    CHECK(pair.r.engine.snapshot(pair.r.now).transfers.empty());
    return;
  }
  pair.run();
  CHECK(pair.received("a").state >= TransferState::kFailed);
  CHECK_FALSE(pair.received("a").released);
  CHECK(pair.received("a").memory_in_use);
  pair.cleared(CopyOutcome::kOk);
  CHECK(pair.received("a").released);
  CHECK(pair.r.seen<ClearTail>().size() == 1);
  const ArenaView arena = pair.r.engine.snapshot(pair.r.now).arenas[0];
  CHECK(arena.free_bytes == arena.total_bytes);
}

TEST_CASE(
    "a slice dropped while its tail is cleared is not acknowledged, and its successor waits") {
  Pair pair;
  pair.tails = true;
  pair.swallow = is_clear;
  // An open send: its slice is not wholly gathered for all who may come.
  SendOp op = pair.send_op("a", 0, {0, 64}, false);
  op.max_receivers = 2;
  pair.s.post(std::move(op));
  pair.r.post(pair.receive_op("a", {0, 64}));
  pair.run();
  REQUIRE(pair.r.seen<ClearTail>().size() == 1);
  pair.s.post(RevokeOp{{{1}, 9}, Pair::handle_of("a"), 0});
  pair.run();
  CHECK(pair.s.last_reply().dropped_sends == std::vector<uint32_t>{0});
  SendOp again = pair.send_op("a", 1, {0, 64}, true);
  again.max_receivers = 2;
  pair.s.post(std::move(again));
  pair.run();
  // The new slice's bytes have landed, as many as there are credits, and wait for the clearing.
  CHECK(pair.r.seen<Scatter>().size() == 10);
  CHECK(pair.r.engine.snapshot(pair.r.now).arenas[0].landed_bytes > 0);
  const CopyId first = pair.r.seen<ClearTail>().front().copy;
  SECTION("which ends well") {
    pair.r.post(CopyEnded{first, CopyOutcome::kOk, {}});
  }
  SECTION("or badly: nobody needs it any more") {
    pair.r.post(CopyEnded{first, CopyOutcome::kFailed, {}});
  }
  pair.run();
  CHECK(pair.r.seen<Scatter>().size() == 20);
  REQUIRE(pair.r.seen<ClearTail>().size() == 2);
  CHECK(pair.received("a").state == TransferState::kActive);
  pair.r.post(CopyEnded{pair.r.seen<ClearTail>().back().copy, CopyOutcome::kOk, {}});
  pair.run();
  CHECK(pair.received("a").state == TransferState::kCompleted);
  CHECK(pair.received("a").bytes_done == 640);
}

}  // namespace
}  // namespace kvferry::engine::test
