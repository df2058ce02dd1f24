// Sender and receiver on one daemon: chunks are copied from page to page, and everything else is as
// between two. One engine; the test ends its copies.
#include <set>

#include "tests/unit/engine_harness.h"

namespace kvferry::engine::test {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr uint64_t kChunk = 64;  // bytes; a token takes 10
constexpr WorkerId kSender{1};
constexpr WorkerId kReceiver{2};

struct SharedLayout : TestLayout {
  bool shares_pages(const LayoutHandle&) const override { return true; }
};

// Compilations and look-ups are answered at once.
struct Home : Box {
  Home() : Box(small_config(1)) {
    from = make_layout(kSender, "default/prefill", 1, 0);
    to = make_layout(kReceiver, "default/decode", 2, 0);
    for (const WorkerId worker : {kSender, kReceiver}) post(WorkerAttached{worker, "default", 64});
  }

  SendOp send_op(const std::string& id, uint32_t index, Range tokens, bool last) {
    SendOp op;
    op.op = {kSender, ++ops};
    op.client_handle = Pair::handle_of(id);
    op.key = key_of(id);
    op.layout = from;
    op.send_index = index;
    op.num_tokens = 64;
    if (!tokens.empty()) op.offer = {{0, {tokens}}};
    op.last = last;
    return op;
  }
  ReceiveOp receive_op(const std::string& id) {
    ReceiveOp op;
    op.op = {kReceiver, ++ops};
    op.client_handle = Pair::handle_of(id);
    op.key = key_of(id);
    op.layout = to;
    op.needs = {{0, 0, 64, {{0, 64}}}};
    op.num_tokens = 64;
    return op;
  }
  void call(Event event) {
    post(std::move(event));
    answer();
  }
  void answer() {
    while (done < commands.size()) {
      const Command command = commands[done++];
      if (const auto* of = std::get_if<Compile>(&command)) {
        auto plan = std::make_shared<TestPlan>();
        for (const GroupRanges& group : of->offer)
          for (const Range& range : group.ranges) plan->bytes += 10 * range.size();
        plan->has_tail = tails && of->side == Role::kReceiver && plan->bytes > 0;
        (of->side == Role::kSender ? source : destination) = plan;
        post(Compiled{of->compile, Reason::kNone, {}, plan});
      } else if (const auto* resolve = std::get_if<Resolve>(&command)) {
        Resolved resolved;
        resolved.resolve = resolve->resolve;
        resolved.sender_incarnation = incarnation_of(1);
        resolved.legs.push_back({0, 0, "node1", false, true, 640, std::make_shared<TestContext>()});
        post(std::move(resolved));
      } else if (const auto* pull = std::get_if<ResolvePull>(&command)) {
        PullResolved resolved;
        resolved.resolve = pull->resolve;
        resolved.legs.push_back({0, false, true});
        resolved.context = std::make_shared<TestContext>();
        post(std::move(resolved));
      }
    }
  }
  // Copies that have begun and not ended, oldest first.
  std::size_t running() const { return seen<LocalCopy>().size() - ended; }
  void end_copy(CopyOutcome outcome = CopyOutcome::kOk) {
    const auto copies = seen<LocalCopy>();
    REQUIRE(ended < copies.size());
    call(CopyEnded{copies[ended++].copy, outcome, {}});
  }
  void end_copies() {
    while (running() > 0) end_copy();
  }
  void clear_tails() {
    for (const ClearTail& clear : seen<ClearTail>())
      if (cleared.insert(clear.copy).second) call(CopyEnded{clear.copy, CopyOutcome::kOk, {}});
  }
  TransferRecord sent(const std::string& id) { return record(kSender, Pair::handle_of(id)); }
  TransferRecord received(const std::string& id) { return record(kReceiver, Pair::handle_of(id)); }

  // Nothing of the arena, of a peer or of the wire was ever asked for.
  void check_nothing_left_home() const {
    CHECK(seen<Gather>().empty());
    CHECK(seen<Scatter>().empty());
    CHECK(seen<SendMessage>().empty());
    CHECK(seen<SendOffer>().empty());
    CHECK(seen<AcceptOffer>().empty());
    CHECK(seen<ConnectLane>().empty());
    const EngineSnapshot now_seen = engine.snapshot(now);
    CHECK(now_seen.links.empty());
    CHECK(now_seen.arenas[0].free_bytes == now_seen.arenas[0].total_bytes);
    CHECK(now_seen.arenas[0].regions == 0);
    CHECK(engine.stats().bytes_sent + engine.stats().bytes_received == 0);
  }

  std::shared_ptr<const LayoutHandle> from;
  std::shared_ptr<const LayoutHandle> to;
  std::shared_ptr<const TestPlan> source;
  std::shared_ptr<const TestPlan> destination;
  bool tails = false;
  uint64_t ops = 0;
  std::size_t done = 0;
  std::size_t ended = 0;
  std::set<CopyId> cleared;
};

}  // namespace

TEST_CASE("both ends on one daemon: copied from page to page, whoever comes first") {
  Home home;
  home.tails = GENERATE(false, true);
  const bool receiver_first = GENERATE(false, true);
  ReceiveOp receive = home.receive_op("a");
  receive.done = DoneWord{3, 7};
  SendOp first = home.send_op("a", 0, {0, 40}, false);
  SendOp last = home.send_op("a", 1, {40, 64}, true);
  first.done = last.done = DoneWord{4, 8};
  last.aux = "first token";
  if (receiver_first) home.call(receive);
  home.call(first);
  if (!receiver_first) home.call(receive);
  CHECK(home.running() == 7);
  home.call(last);
  CHECK(home.running() == 8);  // as many as may be
  const LocalCopy copy = home.seen<LocalCopy>().front();
  CHECK(copy.source != copy.destination);
  CHECK(copy.bytes == kChunk);
  for (int i = 0; i < 10; ++i) home.end_copy();
  CHECK(home.sent("a").memory_in_use);
  CHECK_FALSE(home.sent("a").released);
  CHECK(home.received("a").memory_in_use);
  home.end_copy();
  CHECK(home.sent("a").released);  // before the tails: only a receiver has those
  if (home.tails) {
    CHECK(home.received("a").state == TransferState::kActive);
    home.clear_tails();
  }
  CHECK(home.received("a").state == TransferState::kCompleted);
  CHECK(home.received("a").released);
  CHECK(home.received("a").bytes_done == 640);
  REQUIRE(home.received("a").aux != nullptr);
  CHECK(*home.received("a").aux == "first token");
  CHECK(home.sent("a").state == TransferState::kDelivered);
  CHECK(home.sent("a").bytes_done == 640);
  CHECK(home.seen<SetDoneWord>().size() == 2);
  CHECK(home.seen<ClearTail>().size() == (home.tails ? 2 : 0));
  CHECK(home.engine.stats().bytes_local == 640);
  CHECK(home.engine.stats().chunks_local == 11);
  // Each byte of each stream once.
  std::map<const Plan*, std::map<uint64_t, uint64_t>> copied;
  for (const LocalCopy& of : home.seen<LocalCopy>())
    CHECK(copied[of.destination.get()].emplace(of.offset, of.bytes).second);
  REQUIRE(copied.size() == 2);
  uint64_t bytes = 0;
  for (const auto& [plan, pieces] : copied) {
    uint64_t at = 0;
    for (const auto& [offset, length] : pieces) {
      CHECK(offset == at);
      at += length;
    }
    CHECK(at == plan->bytes);
    bytes += at;
  }
  CHECK(bytes == 640);
  home.check_nothing_left_home();
  for (const WorkerId worker : {kSender, kReceiver}) {
    home.call(CloseOp{{worker, ++home.ops}, Pair::handle_of("a")});
    CHECK(home.last_reply().error.code == Code::kOk);
  }
}

TEST_CASE("an end of either side waits for running copies, and begins no other") {
  Home home;
  home.call(home.receive_op("a"));
  home.call(home.send_op("a", 0, {0, 64}, true));
  const std::size_t begun = home.seen<LocalCopy>().size();
  REQUIRE(home.running() == 8);
  Reason sender_says = Reason::kCancelled;
  Reason receiver_says = Reason::kCancelled;
  SECTION("the sender cancels") {
    home.call(CancelOp{{kSender, ++home.ops}, Pair::handle_of("a")});
  }
  SECTION("the receiver cancels") {
    home.call(CancelOp{{kReceiver, ++home.ops}, Pair::handle_of("a")});
  }
  SECTION("the deadline") {
    sender_says = receiver_says = Reason::kDeadline;
    home.pass(seconds(31));
    home.answer();
  }
  SECTION("the sender's layout is taken back") {
    sender_says = receiver_says = Reason::kUnregistered;
    home.call(UnregisterLayout{home.from});
  }
  CHECK(home.sent("a").reason == sender_says);
  CHECK(home.received("a").reason == receiver_says);
  for (int i = 0; i < 8; ++i) {
    CHECK(home.sent("a").memory_in_use);
    CHECK_FALSE(home.sent("a").released);
    CHECK_FALSE(home.received("a").released);
    CHECK(home.seen<LayoutQuiet>().empty());
    home.end_copy();
  }
  CHECK(home.seen<LocalCopy>().size() == begun);
  CHECK(home.sent("a").released);
  CHECK(home.received("a").released);
  CHECK(home.sent("a").delivery == Delivery::kNo);
  CHECK(home.seen<LayoutQuiet>().size() == (sender_says == Reason::kUnregistered ? 1 : 0));
  home.check_nothing_left_home();
}

TEST_CASE("a sender that is cancelled while the last copy ends cannot know what has arrived") {
  Home home;
  home.call(home.send_op("t", 0, {0, 64}, true));
  home.call(home.receive_op("t"));
  for (int i = 0; i < 9; ++i) home.end_copy();
  REQUIRE(home.running() == 1);
  CancelOp cancel;
  cancel.op = {kSender, ++home.ops};
  cancel.client_handle = Pair::handle_of("t");
  home.post_all({cancel, CopyEnded{home.seen<LocalCopy>().back().copy, CopyOutcome::kOk, {}}});
  CHECK(home.received("t").state == TransferState::kCompleted);
  CHECK(home.sent("t").state == TransferState::kCancelled);
  CHECK(home.sent("t").delivery == Delivery::kUnknown);
}

TEST_CASE("a worker that dies leaves its pages to the copies that run") {
  Home home;
  const WorkerId dies = GENERATE(kSender, kReceiver);
  const WorkerId other = dies == kSender ? kReceiver : kSender;
  home.call(home.receive_op("a"));
  home.call(home.send_op("a", 0, {0, 64}, true));
  home.call(WorkerGone{dies});
  CHECK(home.record(other, Pair::handle_of("a")).reason == Reason::kWorkerLost);
  for (int i = 0; i < 8; ++i) {
    CHECK_FALSE(home.record(other, Pair::handle_of("a")).released);
    home.end_copy();
  }
  CHECK(home.running() == 0);
  CHECK(home.record(other, Pair::handle_of("a")).released);
  home.check_nothing_left_home();
}

TEST_CASE("a Revoke waits for the copies of its slice, and so does what comes anew") {
  Home home;
  home.call(home.receive_op("a"));
  home.call(home.send_op("a", 0, {0, 40}, false));
  home.call(home.send_op("a", 1, {40, 64}, true));
  for (int i = 0; i < 7; ++i) home.end_copy();  // the first slice, and four chunks are under way
  REQUIRE(home.running() == 4);
  const RevokeOp revoke{{kSender, ++home.ops}, Pair::handle_of("a"), 40};
  home.call(revoke);
  home.call(home.send_op("a", 2, {40, 64}, true));
  for (int i = 0; i < 4; ++i) {
    CHECK(home.last_reply().op.op_id != revoke.op.op_id);
    CHECK(home.running() == 4U - static_cast<unsigned>(i));
    home.end_copy();
  }
  bool answered = false;
  for (const Reply& reply : home.seen<Reply>())
    if (reply.op.op_id == revoke.op.op_id) {
      answered = true;
      CHECK(reply.dropped_sends == std::vector<uint32_t>{1});
    }
  CHECK(answered);
  CHECK(home.running() == 4);  // the new slice's
  home.end_copies();
  CHECK(home.received("a").state == TransferState::kCompleted);
  CHECK(home.received("a").bytes_done == 640);
  CHECK(home.sent("a").state == TransferState::kDelivered);
  home.check_nothing_left_home();
}

TEST_CASE("a failed copy fails both sides") {
  Home home;
  home.call(home.receive_op("a"));
  home.call(home.send_op("a", 0, {0, 64}, true));
  home.end_copy();
  home.end_copy(CopyOutcome::kFailed);
  CHECK(home.sent("a").reason == Reason::kScatterFailed);
  CHECK(home.received("a").reason == Reason::kScatterFailed);
  CHECK_FALSE(home.sent("a").released);
  home.end_copies();
  CHECK(home.sent("a").released);
  CHECK(home.received("a").released);
  home.check_nothing_left_home();
}

TEST_CASE("two layouts that share pages are refused") {
  Home home;
  SECTION("one of them says so") {
    auto shared = std::make_shared<SharedLayout>();
    static_cast<LayoutHandle&>(*shared) = *home.from;
    home.from = shared;
  }
  SECTION("they are one") {
    home.to = home.from;
  }
  ReceiveOp receive = home.receive_op("a");
  receive.op.worker = home.to->worker;
  receive.client_handle = 99;
  home.call(receive);
  home.call(home.send_op("a", 0, {0, 64}, true));
  CHECK(home.record(receive.op.worker, 99).reason == Reason::kIncompatible);
  CHECK(home.sent("a").reason == Reason::kIncompatible);
  CHECK(home.sent("a").released);
  CHECK(home.seen<LocalCopy>().empty());
}

TEST_CASE("a packed copy serves a receiver on the same daemon after the pages are free") {
  Home home;
  SendOp op = home.send_op("a", 0, {0, 64}, true);
  op.packed_bytes = 640;
  home.call(op);
  const auto making = home.seen<MakePacked>();
  REQUIRE(making.size() == 1);
  home.call(Packed{making[0].copy, Reason::kNone, {}, make_layout(kSender, "packed", 1, 0), {}});
  CHECK(home.sent("a").released);
  home.call(home.receive_op("a"));
  CHECK(home.running() == 8);
  CHECK_FALSE(home.sent("a").memory_in_use);
  SECTION("to its end") {
    home.end_copies();
    CHECK(home.received("a").state == TransferState::kCompleted);
    CHECK(home.sent("a").state == TransferState::kDelivered);
  }
  SECTION("its worker dies, and the receiver does not mind") {
    home.call(WorkerGone{kSender});
    home.end_copies();
    CHECK(home.received("a").state == TransferState::kCompleted);
  }
  SECTION("cancelled while it is read") {
    home.call(CancelOp{{kSender, ++home.ops}, Pair::handle_of("a")});
    CHECK(home.received("a").reason == Reason::kCancelled);
    CHECK_FALSE(home.received("a").released);
    home.end_copies();
    CHECK(home.received("a").released);
  }
  CHECK(home.engine.snapshot(home.now).packed_bytes == 0);
  home.check_nothing_left_home();
}

TEST_CASE("nothing is copied before the destination is ready") {
  Home home;
  ReceiveOp receive = home.receive_op("a");
  receive.ready = {ReadyCondition::Kind::kTimeline, 0, 1};
  home.call(receive);
  home.call(home.send_op("a", 0, {0, 64}, true));
  CHECK(home.running() == 0);
  SECTION("in time") {
    home.call(ConditionMet{home.seen<WatchCondition>().back().condition});
    CHECK(home.running() == 8);
    home.end_copies();
    CHECK(home.received("a").state == TransferState::kCompleted);
  }
  SECTION("too late") {
    home.pass(seconds(11));
    CHECK(home.received("a").reason == Reason::kNotReady);
    CHECK(home.sent("a").reason == Reason::kNotReady);
    CHECK(home.sent("a").released);
  }
  home.check_nothing_left_home();
}

TEST_CASE("two transfers take turns, whichever came first") {
  Home home;
  for (const char* id : {"a", "b"}) {
    home.call(home.receive_op(id));
    home.call(home.send_op(id, 0, {0, 64}, true));
  }
  CHECK(home.running() == 8);  // all of the first
  while (home.running() > 0) {
    CHECK(home.running() <= 8);
    home.end_copy();
  }
  const auto copies = home.seen<LocalCopy>();
  REQUIRE(copies.size() == 20);
  CHECK(copies[8].source != copies[9].source);
  CHECK(copies[10].source != copies[11].source);
  for (const char* id : {"a", "b"}) {
    CHECK(home.received(id).state == TransferState::kCompleted);
    CHECK(home.sent(id).state == TransferState::kDelivered);
  }
}

TEST_CASE("claims and declines of a receiver on the same daemon are heard") {
  Home home;
  SendOp op = home.send_op("a", 0, {0, 64}, true);
  op.lease = milliseconds(500);
  home.call(op);
  SECTION("claim") {
    ClaimOp claim;
    claim.op = {kReceiver, ++home.ops};
    claim.client_handle = 5;
    claim.key = key_of("a");
    claim.layout = home.to;
    claim.ttl = seconds(2);
    home.call(claim);
    home.pass(seconds(1));
    CHECK(home.sent("a").state == TransferState::kOpen);
    home.call(home.receive_op("a"));
    home.end_copies();
    CHECK(home.sent("a").state == TransferState::kDelivered);
  }
  SECTION("decline") {
    home.call(DeclineOp{{kReceiver, ++home.ops}, key_of("a"), {}, home.to});
    CHECK(home.sent("a").reason == Reason::kDeclined);
    CHECK(home.sent("a").released);
  }
  home.check_nothing_left_home();
}

TEST_CASE("a wrong secret is told apart on the same daemon too") {
  Home home;
  ReceiveOp receive = home.receive_op("a");
  receive.key.secret.bytes.fill(9);
  home.call(home.send_op("a", 0, {0, 64}, true));
  home.call(receive);
  // The name on the wire is made from the secret: they never meet.
  CHECK(home.received("a").state == TransferState::kOpen);
  home.pass(seconds(31));
  CHECK(home.received("a").reason == Reason::kDeadline);
  CHECK(home.sent("a").reason == Reason::kExpired);
  CHECK(home.seen<LocalCopy>().empty());
}

TEST_CASE("a link to the own node is closed, and a rails process that dies is no matter") {
  Home home;
  home.call(home.receive_op("a"));
  home.call(LinkUp{{1}, "node1", boot_of(9), false, 1, 64, 64, CheckKind::kNone});
  REQUIRE(home.seen<CloseLink>().size() == 1);
  CHECK(home.seen<CloseLink>()[0].link == LinkId{1});
  home.call(home.send_op("a", 0, {0, 64}, true));
  home.call(RailsDied{});
  home.pass(seconds(5));
  home.end_copies();
  CHECK(home.received("a").state == TransferState::kCompleted);
  home.check_nothing_left_home();
}

}  // namespace kvferry::engine::test
