// Timelines of transfers: what they tell of a hand-over, of an early end, and how long.
#include "daemon/engine/traces.h"
#include "tests/unit/engine_harness.h"

namespace kvferry::engine::test {
namespace {

using std::chrono::milliseconds;
using std::chrono::minutes;
using std::chrono::seconds;

std::vector<TransferTrace> traces(const Box& box, const TraceQuery& query = {}) {
  return box.engine.traces(query, box.now);
}

TransferTrace only(const Box& box) {
  const auto found = traces(box);
  REQUIRE(found.size() == 1);
  return found.front();
}

uint64_t count(const TransferTrace& trace, Step step) {
  return trace.timeline.of(step).count;
}
Time first(const TransferTrace& trace, Step step) {
  return trace.timeline.of(step).first;
}
Time last(const TransferTrace& trace, Step step) {
  return trace.timeline.of(step).last;
}

void close(Box& box, WorkerId worker, uint64_t handle) {
  CloseOp op;
  op.op = {worker, 900};
  op.client_handle = handle;
  box.post(op);
}

TEST_CASE("both timelines have every step of a hand-over, counted and in order") {
  Pair pair;
  pair.r.post(pair.receive_op("a", {0, 64}));
  pair.run();
  pair.pass(milliseconds(300));
  pair.s.post(pair.send_op("a", 0, {0, 16}, false));
  pair.run();
  pair.pass(milliseconds(200));
  pair.s.post(pair.send_op("a", 1, {16, 64}, true));
  pair.run();
  REQUIRE(pair.received("a").state == TransferState::kCompleted);

  // Slices of 160 and 480 bytes are 3 and 8 chunks of 64.
  const TransferTrace sent = only(pair.s);
  CHECK(count(sent, Step::kAsked) == 2);
  CHECK(count(sent, Step::kPulled) == 1);
  CHECK(count(sent, Step::kMatched) == 1);
  CHECK(count(sent, Step::kSlice) == 2);
  CHECK(count(sent, Step::kReady) == 2);
  CHECK(count(sent, Step::kGathering) == 11);
  CHECK(count(sent, Step::kGathered) == 11);
  CHECK(count(sent, Step::kOffered) >= 11);
  CHECK(count(sent, Step::kGranted) >= 11);
  CHECK(count(sent, Step::kArrived) == 11);
  CHECK(count(sent, Step::kEnded) == 1);
  CHECK(count(sent, Step::kReleased) == 1);
  CHECK(count(sent, Step::kScattered) == 0);
  CHECK(last(sent, Step::kAsked) - first(sent, Step::kAsked) == milliseconds(200));
  CHECK(last(sent, Step::kArrived) - first(sent, Step::kArrived) == milliseconds(200));
  CHECK(sent.view.nodes == std::vector<std::string>{"node2"});
  CHECK(sent.view.state == TransferState::kDelivered);

  const TransferTrace received = only(pair.r);
  CHECK(count(received, Step::kAsked) == 1);
  CHECK(count(received, Step::kResolved) == 1);
  CHECK(count(received, Step::kPulled) == 1);
  CHECK(count(received, Step::kMatched) == 1);
  CHECK(count(received, Step::kSlice) == 2);
  CHECK(count(received, Step::kReady) == 1);
  CHECK(count(received, Step::kOffered) == 11);
  CHECK(count(received, Step::kArrived) == 11);
  CHECK(count(received, Step::kScattering) == 11);
  CHECK(count(received, Step::kScattered) == 11);
  CHECK(count(received, Step::kGathered) == 0);
  CHECK(first(received, Step::kMatched) - first(received, Step::kAsked) == milliseconds(300));
  CHECK(first(received, Step::kEnded) - first(received, Step::kAsked) == milliseconds(500));
  CHECK(received.view.nodes == std::vector<std::string>{"node1"});
  // One transfer has one name at both.
  CHECK(sent.view.hash == received.view.hash);
}

TEST_CASE("a receive by an instance's name is known by the same hash once the life is known") {
  Pair pair;
  ReceiveOp op = pair.receive_op("a", {0, 64});
  op.key.incarnation = {};
  pair.r.post(std::move(op));
  pair.run();
  pair.s.post(pair.send_op("a", 0, {0, 64}, true));
  pair.run();
  REQUIRE(pair.received("a").state == TransferState::kCompleted);
  CHECK(only(pair.s).view.hash == only(pair.r).view.hash);
}

TEST_CASE("an early end leaves later steps out") {
  Pair pair;
  ReceiveOp op = pair.receive_op("a", {0, 64});
  op.wait = seconds(1);
  pair.r.post(std::move(op));
  pair.run();
  pair.pass(seconds(2));
  const TransferTrace trace = only(pair.r);
  CHECK(trace.view.reason == Reason::kDeadline);
  CHECK(count(trace, Step::kPulled) == 1);
  CHECK(count(trace, Step::kMatched) == 0);
  CHECK(count(trace, Step::kArrived) == 0);
  CHECK(last(trace, Step::kEnded) - first(trace, Step::kAsked) == seconds(1));
  CHECK(traces(pair.s).empty());
}

TEST_CASE("a failed copy is begun and never counted as done") {
  Pair pair;
  pair.scatter_outcome = CopyOutcome::kCheckMismatch;
  pair.s.post(pair.send_op("a", 0, {0, 6}, true));
  pair.needed = {0, 6};
  pair.r.post(pair.receive_op("a", {0, 6}));
  pair.run();
  const TransferTrace trace = only(pair.r);
  CHECK(trace.view.reason == Reason::kDataLoss);
  CHECK(count(trace, Step::kScattering) == 1);
  CHECK(count(trace, Step::kScattered) == 0);
}

TEST_CASE("a transfer that is closed is told of for ten minutes") {
  Pair pair;
  pair.s.post(pair.send_op("a", 0, {0, 64}, true));
  pair.r.post(pair.receive_op("a", {0, 64}));
  pair.run();
  close(pair.r, {2}, Pair::handle_of("a"));
  CHECK(pair.r.engine.snapshot(pair.r.now).transfers.empty());
  CHECK(count(only(pair.r), Step::kScattered) == 10);
  pair.pass(minutes(10) - milliseconds(1));
  CHECK(traces(pair.r).size() == 1);
  pair.pass(milliseconds(1));
  CHECK(traces(pair.r).empty());
  // Which its worker's open one is not bounded by.
  CHECK(traces(pair.s).size() == 1);
}

TEST_CASE("no more than so many timelines are kept, the youngest") {
  Pair pair;
  pair.r.verify = false;
  const std::size_t made = kMostKeptTraces + 10;
  for (std::size_t i = 0; i < made; ++i) {
    const std::string id = "t" + std::to_string(i);
    pair.r.post(pair.receive_op(id, {0, 64}));
    CancelOp cancel;
    cancel.op = {{2}, 300};
    cancel.client_handle = Pair::handle_of(id);
    pair.r.post(cancel);
    close(pair.r, {2}, Pair::handle_of(id));
    pair.r.forget();
  }
  TraceQuery all;
  all.most = 2 * made;
  const auto found = traces(pair.r, all);
  REQUIRE(found.size() == kMostKeptTraces);
  CHECK(found.front().view.id == "t" + std::to_string(made - 1));
  CHECK(found.back().view.id == "t10");
  all.most = 5;
  CHECK(traces(pair.r, all).size() == 5);
}

TEST_CASE("a question is answered with what fits all of it") {
  Pair pair;
  for (const char* id : {"a", "b"}) {
    pair.s.post(pair.send_op(id, 0, {0, 64}, true));
    pair.r.post(pair.receive_op(id, {0, 64}));
    pair.run();
  }
  TraceQuery query;
  query.part = TraceQuery::Part{Role::kSender, {1}, Pair::handle_of("b")};
  auto found = traces(pair.s, query);
  REQUIRE(found.size() == 1);
  CHECK(found.front().view.id == "b");
  query.hash = found.front().view.hash;
  query.node = "node2";
  CHECK(traces(pair.s, query).size() == 1);
  query.node = "node3";  // which takes no part in it
  CHECK(traces(pair.s, query).empty());
  query.node.reset();
  query.part->role = Role::kReceiver;
  CHECK(traces(pair.s, query).empty());
  query.part.reset();
  query.hash = "00000000";
  CHECK(traces(pair.s, query).empty());
}

}  // namespace
}  // namespace kvferry::engine::test
