// The rows of the receiver's tables, one engine at a time: the test plays the sender's daemon.
#include "daemon/engine/proofs.h"
#include "tests/unit/engine_harness.h"

namespace kvferry::engine::test {
namespace {

using std::chrono::seconds;

constexpr uint64_t kChunk = 64;

// node2 receives from node1, which the test plays. Tokens are 10 bytes on the one leg.
struct Lone : Box {
  explicit Lone(EngineConfig config = small_config(2), uint32_t lanes = 2)
      : Box(std::move(config)) {
    layout = make_layout({2}, "default/decode", 2, 0);
    post(WorkerAttached{{2}, "default", 8});
    post(LinkUp{{1}, "node1", boot_of(1), false, lanes, kChunk, 64, CheckKind::kNone});
    for (uint32_t lane = 0; lane < lanes; ++lane) {
      post(LaneConnected{{{1}, lane, 0}});
      say(lane, MsgHello{false});
      say(lane, MsgHello{true});
    }
  }

  void say(uint32_t lane, ControlMessage message, uint32_t epoch = 0) {
    post(MessageIn{{{1}, lane, epoch}, next[lane]++, std::move(message)});
  }

  // A Receive whose PULL has gone out; `expected` bytes must come.
  MsgPull pull(const std::string& id, uint64_t expected, ReadyCondition ready = {}) {
    ReceiveOp op;
    op.op = {{2}, 1};
    op.client_handle = ++handle;
    op.key = key_of(id);
    op.layout = layout;
    op.needs = {{0, 0, 64, {{0, 64}}}};
    op.ready = ready;
    post(std::move(op));
    Resolved resolved;
    resolved.resolve = seen<Resolve>().back().resolve;
    resolved.sender_incarnation = incarnation_of(1);
    resolved.legs.push_back({0, 0, "node1", expected == 0, true, expected, nullptr});
    post(std::move(resolved));
    return told<MsgPull>().back();
  }

  MsgSlice slice_of(const MsgPull& pull, uint64_t ordinal, Range tokens, bool last,
                    uint64_t send = 5) const {
    MsgSlice slice;
    slice.pull = pull.pull;
    slice.send = {boot_of(1), send};
    ProofFields fields;
    fields.pull = pull.pull;
    fields.send = slice.send;
    fields.id = pull.transfer.id;
    fields.instance = pull.transfer.instance;
    fields.incarnation = pull.transfer.incarnation;
    fields.sender_node = "node1";
    fields.receiver_node = "node2";
    slice.proof = sender_proof(key_of(pull.transfer.id).secret, fields);
    slice.ordinal = ordinal;
    slice.last = last;
    if (!tokens.empty()) slice.ranges = {{0, {tokens}}};
    slice.bytes = tokens.size() * 10;
    slice.digest = 42;
    return slice;
  }
  void compile(uint64_t bytes) {
    auto plan = std::make_shared<TestPlan>();
    plan->bytes = bytes;
    plan->digest = 42;
    post(Compiled{seen<Compile>().back().compile, Reason::kNone, {}, std::move(plan)});
  }
  void slice(const MsgPull& pull, uint64_t ordinal, Range tokens, bool last) {
    say(0, slice_of(pull, ordinal, tokens, last));
    compile(tokens.size() * 10);
  }
  DescriptorId offer(const MsgPull& pull, uint64_t of_slice, uint64_t chunk, CreditId credit,
                     uint64_t bytes = kChunk, uint32_t lane = 0) {
    OfferIn in;
    in.lane = {{1}, lane, 0};
    in.offer.pull = pull.pull;
    in.offer.send = {boot_of(1), 5};
    in.offer.slice = of_slice;
    in.offer.chunk = chunk;
    in.offer.credit = credit;
    in.offer.offer = {++last_offer};
    in.offer.bytes = bytes;
    in.descriptor = {last_offer};
    in.announced_bytes = bytes;
    post(in);
    return in.descriptor;
  }
  bool dropped(DescriptorId descriptor) const {
    for (const DropOffer& drop : seen<DropOffer>())
      if (drop.descriptor == descriptor) return true;
    return false;
  }
  ArenaView arena() const { return engine.snapshot(now).arenas[0]; }
  TransferRecord status() const { return record({2}, handle); }

  std::shared_ptr<const TestLayout> layout;
  std::map<uint32_t, uint64_t> next;
  uint64_t handle = 0;
  uint64_t last_offer = 0;
};

TEST_CASE("first credits ride on the PULL, as many as the leg can use") {
  Lone r;
  const MsgPull pull = r.pull("a", 3 * kChunk);
  CHECK(pull.credits.size() == 3);
  CHECK(pull.credits[0].bytes == kChunk);
  CHECK(r.arena().granted_bytes == 3 * kChunk);
  CHECK(pull.sender_rank == 0);
  CHECK(pull.remaining_ms > 0);
}

TEST_CASE("a small leg is given small regions") {
  Lone r;
  const MsgPull pull = r.pull("a", 20);
  REQUIRE(pull.credits.size() == 1);
  CHECK(pull.credits[0].bytes == 32);
}

TEST_CASE("an offer before its SLICE is held, then accepted") {
  Lone r;
  const MsgPull pull = r.pull("a", 640);
  r.offer(pull, 0, 0, pull.credits[0].credit);
  CHECK(r.seen<AcceptOffer>().empty());
  r.slice(pull, 0, {0, 64}, true);
  REQUIRE(r.seen<AcceptOffer>().size() == 1);
  CHECK(r.arena().landing_bytes == kChunk);
}

TEST_CASE("an offer of a needed chunk with a spent credit is refused on the lane it came by") {
  Lone r;
  const MsgPull pull = r.pull("a", 640);
  r.slice(pull, 0, {0, 64}, true);
  r.offer(pull, 0, 0, pull.credits[0].credit);
  const DescriptorId second = r.offer(pull, 0, 1, pull.credits[0].credit, kChunk, 1);
  CHECK(r.dropped(second));
  REQUIRE(r.seen<SendRefuse>().size() == 1);
  CHECK(r.seen<SendRefuse>()[0].lane.lane == 1);
  CHECK(r.seen<SendRefuse>()[0].message.offer.value == second.value);
}

TEST_CASE("every offer spends its credit: of a chunk that has landed, and of one that is done") {
  Lone r;
  const MsgPull pull = r.pull("a", 640);
  r.slice(pull, 0, {0, 64}, true);
  r.offer(pull, 0, 0, pull.credits[0].credit);
  const LandingId landing = r.seen<AcceptOffer>()[0].landing;
  r.post(ReceiveEnded{landing, true});
  r.forget();
  const DescriptorId twice = r.offer(pull, 0, 0, pull.credits[1].credit);
  CHECK(r.dropped(twice));
  CHECK(r.seen<SendRefuse>().empty());
  CHECK(r.engine.stats().credits_granted == 5);  // the spent one was replaced
}

TEST_CASE("an offer of a chunk that is done repeats its ack") {
  Lone r;
  const MsgPull pull = r.pull("a", 640);
  r.slice(pull, 0, {0, 64}, true);
  r.offer(pull, 0, 0, pull.credits[0].credit);
  r.post(ReceiveEnded{r.seen<AcceptOffer>()[0].landing, true});
  r.post(CopyEnded{r.seen<Scatter>()[0].copy, CopyOutcome::kOk, {}});
  REQUIRE(r.told<MsgUpdate>().back().acks == std::vector<Ack>{{0, 0}});
  r.forget();
  const DescriptorId again = r.offer(pull, 0, 0, pull.credits[1].credit);
  CHECK(r.dropped(again));
  REQUIRE_FALSE(r.told<MsgUpdate>().empty());
  CHECK(r.told<MsgUpdate>().back().acks == std::vector<Ack>{{0, 0}});
}

TEST_CASE("a second offer of a landing chunk is held; it is dropped when the chunk is here") {
  Lone r;
  const MsgPull pull = r.pull("a", 640);
  r.slice(pull, 0, {0, 64}, true);
  r.offer(pull, 0, 0, pull.credits[0].credit);
  const DescriptorId second = r.offer(pull, 0, 0, pull.credits[1].credit, kChunk, 1);
  CHECK_FALSE(r.dropped(second));
  r.post(ReceiveEnded{r.seen<AcceptOffer>()[0].landing, true});
  CHECK(r.dropped(second));
  CHECK(r.seen<Scatter>().size() == 1);
}

TEST_CASE("a receive that ends in error frees its region and takes the held offer of the chunk") {
  Lone r;
  const MsgPull pull = r.pull("a", 640);
  r.slice(pull, 0, {0, 64}, true);
  r.offer(pull, 0, 0, pull.credits[0].credit);
  r.offer(pull, 0, 0, pull.credits[1].credit, kChunk, 1);
  r.post(ReceiveEnded{r.seen<AcceptOffer>()[0].landing, false});
  CHECK(r.seen<AcceptOffer>().size() == 2);
  CHECK(r.arena().quarantined_bytes == 0);
  CHECK(r.seen<CloseLane>().size() == 1);
  CHECK(r.told<MsgLaneDown>().size() == 1);
}

TEST_CASE(
    "lane down: a landing region is quarantined until its receive ends, and never scattered") {
  Lone r;
  const MsgPull pull = r.pull("a", 640);
  r.slice(pull, 0, {0, 64}, true);
  r.offer(pull, 0, 0, pull.credits[0].credit, kChunk, 1);
  const LandingId landing = r.seen<AcceptOffer>()[0].landing;
  r.post(LaneFailed{{{1}, 1, 0}});
  CHECK(r.arena().quarantined_bytes == kChunk);
  REQUIRE(r.told<MsgUpdate>().size() == 2);
  CHECK(r.told<MsgUpdate>()[0].credits.size() == 3);  // resync: all LIVE ones
  CHECK(r.told<MsgUpdate>()[1].credits.size() == 1);  // and one in place of the lost one
  r.pass(seconds(2));
  CHECK(r.arena().quarantined_bytes == kChunk);
  r.post(ReceiveEnded{landing, true});
  CHECK(r.arena().quarantined_bytes == 0);
  CHECK(r.seen<Scatter>().empty());
}

TEST_CASE("the exit of the rails process is evidence for every receive it had") {
  Lone r;
  const MsgPull pull = r.pull("a", 640);
  r.slice(pull, 0, {0, 64}, true);
  r.offer(pull, 0, 0, pull.credits[0].credit);
  r.post(RailsDied{});
  CHECK(r.arena().quarantined_bytes == 0);
  CHECK(r.arena().landing_bytes == 0);
}

TEST_CASE("more slices than a pull may have end the transfer") {
  EngineConfig config = small_config(2);
  config.max_slices = 2;
  Lone r(config);
  const MsgPull pull = r.pull("a", 640);
  r.slice(pull, 0, {0, 8}, false);
  r.slice(pull, 1, {8, 16}, false);
  REQUIRE(r.status().state == TransferState::kActive);
  r.say(0, r.slice_of(pull, 2, {16, 24}, false));
  CHECK(r.status().state == TransferState::kFailed);
  CHECK(r.status().reason == Reason::kProtocol);
}

TEST_CASE("a transfer of too many legs is not begun, nor one more leg than its link may have") {
  EngineConfig config = small_config(2);
  config.max_legs = 1;
  Lone r(config);
  r.pull("a", 640);
  ReceiveOp op;
  op.op = {{2}, 1};
  op.client_handle = ++r.handle;
  op.key = key_of("b");
  op.layout = r.layout;
  op.needs = {{0, 0, 64, {{0, 64}}}};
  r.post(op);
  Resolved resolved;
  resolved.resolve = r.seen<Resolve>().back().resolve;
  resolved.sender_incarnation = incarnation_of(1);
  const std::size_t legs = GENERATE(1U, 1025U);
  for (uint32_t rank = 0; rank < legs; ++rank)
    resolved.legs.push_back({rank, 0, "node1", false, rank == 0, 10, nullptr});
  r.post(std::move(resolved));
  CHECK(r.status().state == TransferState::kFailed);
  CHECK(r.status().reason == (legs == 1 ? Reason::kRefused : Reason::kTooFragmented));
  CHECK(r.told<MsgPull>().size() == 1);
}

TEST_CASE("a landing that takes too long costs its lane") {
  EngineConfig config = small_config(2);
  config.landing_timeout = std::chrono::milliseconds(500);
  Lone r(config);
  const MsgPull pull = r.pull("a", 640);
  r.slice(pull, 0, {0, 64}, true);
  r.offer(pull, 0, 0, pull.credits[0].credit);
  r.pass(seconds(1));
  CHECK(r.seen<CloseLane>().size() == 1);
  CHECK(r.arena().quarantined_bytes == kChunk);
}

TEST_CASE("a landing of many bytes has as long as the least rate gives it") {
  EngineConfig config = small_config(2);
  config.landing_timeout = std::chrono::milliseconds(500);
  config.landing_min_rate = kChunk / 2;  // a chunk may take two seconds
  Lone r(config);
  const MsgPull pull = r.pull("a", 640);
  r.slice(pull, 0, {0, 64}, true);
  r.offer(pull, 0, 0, pull.credits[0].credit);
  r.pass(std::chrono::milliseconds(1900));
  CHECK(r.seen<CloseLane>().empty());
  r.pass(std::chrono::milliseconds(200));
  CHECK(r.seen<CloseLane>().size() == 1);
}

TEST_CASE("terminal: granted and landed regions are free, landing ones are quarantined") {
  Lone r;
  const MsgPull pull = r.pull("a", 640, {ReadyCondition::Kind::kTimeline, 0, 1});
  r.slice(pull, 0, {0, 64}, true);
  r.offer(pull, 0, 0, pull.credits[0].credit);
  r.offer(pull, 0, 1, pull.credits[1].credit);
  r.post(ReceiveEnded{r.seen<AcceptOffer>()[0].landing, true});
  REQUIRE(r.arena().landed_bytes == kChunk);
  r.post(CancelOp{{{2}, 2}, r.handle});
  CHECK(r.arena().granted_bytes == 0);
  CHECK(r.arena().landed_bytes == 0);
  CHECK(r.arena().quarantined_bytes == kChunk);
  CHECK(r.status().released);
  CHECK(r.told<MsgEnd>().back().outcome == Outcome::kCancelled);
  CHECK(r.told<MsgEnd>().back().pull == pull.pull);
}

TEST_CASE("a running scatter goes on after the end, and holds DEST_RELEASED") {
  Lone r;
  const MsgPull pull = r.pull("a", 640);
  r.slice(pull, 0, {0, 64}, true);
  r.offer(pull, 0, 0, pull.credits[0].credit);
  r.post(ReceiveEnded{r.seen<AcceptOffer>()[0].landing, true});
  r.post(CancelOp{{{2}, 2}, r.handle});
  CHECK_FALSE(r.status().released);
  CHECK(r.status().memory_in_use);
  r.post(CopyEnded{r.seen<Scatter>()[0].copy, CopyOutcome::kOk, {}});
  CHECK(r.status().released);
  CHECK(r.arena().scattering_bytes == 0);
}

TEST_CASE("a destination that does not get ready fails the transfer, bounded by its own timer") {
  Lone r;
  const MsgPull pull = r.pull("a", 640, {ReadyCondition::Kind::kTimeline, 3, 9});
  REQUIRE(r.seen<WatchCondition>().size() == 1);
  r.slice(pull, 0, {0, 64}, true);
  r.offer(pull, 0, 0, pull.credits[0].credit);
  r.post(ReceiveEnded{r.seen<AcceptOffer>()[0].landing, true});
  CHECK(r.seen<Scatter>().empty());
  for (int i = 0; i < 11; ++i) {
    r.pass(seconds(1));
    r.say(0, MsgPing{});
    r.say(1, MsgPing{});
  }
  CHECK(r.status().reason == Reason::kNotReady);
  CHECK(r.seen<UnwatchCondition>().size() == 1);
}

TEST_CASE("a destination whose event cannot be watched fails the transfer at once") {
  Lone r;
  ReadyCondition ready;
  ready.kind = ReadyCondition::Kind::kCudaEvent;
  (void)r.pull("a", 640, ready);
  r.post(ConditionFailed{r.seen<WatchCondition>().at(0).condition});
  CHECK(r.status().state == TransferState::kFailed);
  CHECK(r.status().reason == Reason::kNotReady);
  CHECK(r.seen<UnwatchCondition>().empty());
}

TEST_CASE("a wrong proof in a SLICE is counted and binds nothing") {
  Lone r;
  const MsgPull pull = r.pull("a", 640);
  MsgSlice slice = r.slice_of(pull, 0, {0, 64}, true);
  slice.proof.bytes[3] ^= 1;
  r.say(0, slice);
  CHECK(r.seen<Compile>().empty());
  CHECK(r.engine.stats().dropped[static_cast<std::size_t>(DropCause::kProof)] == 1);
  r.slice(pull, 0, {0, 64}, true);
  r.say(0, r.slice_of(pull, 1, {64, 70}, false, 6));  // another send, though proven
  CHECK(r.seen<Compile>().size() == 1);
}

TEST_CASE("tokens that come twice on a leg are a protocol error; other layers are not") {
  Lone r;
  const MsgPull pull = r.pull("a", 640);
  MsgSlice first = r.slice_of(pull, 0, {0, 32}, false);
  first.layers = Range{0, 4};
  r.say(0, first);
  r.compile(320);
  MsgSlice other = r.slice_of(pull, 1, {0, 32}, false);
  other.layers = Range{4, 8};
  r.say(0, other);
  r.compile(320);
  CHECK(r.status().state == TransferState::kActive);
  MsgSlice again = r.slice_of(pull, 2, {31, 40}, false);
  again.layers = Range{3, 5};
  r.say(0, again);
  CHECK(r.status().reason == Reason::kProtocol);
}

TEST_CASE("an offer that contradicts the plan fails the transfer") {
  Lone r;
  const MsgPull pull = r.pull("a", 640);
  r.slice(pull, 0, {0, 64}, true);
  SECTION("length") {
    r.offer(pull, 0, 0, pull.credits[0].credit, 32);
  }
  SECTION("chunk") {
    r.offer(pull, 0, 10, pull.credits[0].credit);
  }
  SECTION("credit that was never given") {
    r.offer(pull, 0, 0, CreditId{99});
  }
  CHECK(r.status().reason == Reason::kProtocol);
  CHECK(r.seen<AcceptOffer>().empty());
}

TEST_CASE("more held offers than credits and lanes explain are a protocol error") {
  Lone r(small_config(2), 1);
  const MsgPull pull = r.pull("a", 2 * kChunk);
  REQUIRE(pull.credits.size() == 2);
  r.offer(pull, 0, 0, pull.credits[0].credit);
  r.offer(pull, 0, 1, pull.credits[1].credit);
  CHECK(r.seen<DropOffer>().empty());
  r.offer(pull, 0, 0, pull.credits[0].credit);
  CHECK(r.status().reason == Reason::kProtocol);
  CHECK(r.seen<DropOffer>().size() == 3);
}

// Its first slice is here, one credit is spent and three are good.
MsgPull with_spent_credit(Lone& r) {
  const MsgPull pull = r.pull("a", 640);
  REQUIRE(pull.credits.size() == 4);
  r.slice(pull, 0, {0, 16}, false);
  r.offer(pull, 0, 0, pull.credits[0].credit);
  REQUIRE(r.seen<AcceptOffer>().size() == 1);
  return pull;
}

TEST_CASE("an offer under a spent credit is refused at once, though its slice is not known") {
  Lone r(small_config(2), 1);
  const MsgPull pull = with_spent_credit(r);
  const CreditId spent = pull.credits[0].credit;
  for (uint64_t chunk = 0; chunk < 4; ++chunk) CHECK(r.dropped(r.offer(pull, 1, chunk, spent)));
  r.say(0, r.slice_of(pull, 1, {16, 64}, true));  // is being compiled
  for (uint64_t chunk = 4; chunk < 8; ++chunk) CHECK(r.dropped(r.offer(pull, 1, chunk, spent)));
  CHECK(r.seen<SendRefuse>().size() == 8);
  const DescriptorId good = r.offer(pull, 1, 0, pull.credits[1].credit);
  CHECK_FALSE(r.dropped(good));  // held
  r.compile(480);
  REQUIRE(r.seen<AcceptOffer>().size() == 2);
  CHECK(r.seen<AcceptOffer>()[1].descriptor == good);
}

TEST_CASE("a chunk that is refused before its slice is known may take others' unused credits") {
  EngineConfig config = small_config(2);
  config.arenas = {{{4 * kChunk}}};  // two landing regions
  Lone r(config);
  const MsgPull late = r.pull("b", 640);
  REQUIRE(late.credits.size() == 2);
  const MsgPull first = r.pull("a", 640);
  r.slice(first, 0, {0, 64}, true);  // has both now
  r.slice(late, 0, {0, 16}, false);
  REQUIRE(r.engine.stats().credits_withdrawn == 2);
  r.forget();
  r.offer(late, 1, 0, late.credits[0].credit);
  CHECK(r.engine.stats().credits_withdrawn == 3);
  REQUIRE(r.told<MsgUpdate>().size() == 1);
  CHECK(r.told<MsgUpdate>()[0].pull == late.pull);
  CHECK(r.told<MsgUpdate>()[0].credits.size() == 1);
}

TEST_CASE("a chunk that is accepted leaves a refused one without a credit, which others have") {
  EngineConfig config = small_config(2);
  config.arenas = {{{4 * kChunk}}};  // two landing regions
  Lone r(config);
  const MsgPull late = r.pull("b", 640);
  const MsgPull first = r.pull("a", 640);
  r.slice(first, 0, {0, 64}, true);
  r.slice(late, 0, {0, 16}, false);
  r.forget();
  r.offer(late, 1, 0, late.credits[0].credit);
  REQUIRE(r.told<MsgUpdate>().size() == 1);
  const CreditId credit = r.told<MsgUpdate>()[0].credits.at(0).credit;
  REQUIRE(r.engine.stats().credits_withdrawn == 3);
  r.offer(late, 0, 0, credit);
  CHECK(r.seen<AcceptOffer>().size() == 1);
  CHECK(r.engine.stats().credits_withdrawn == 4);
  CHECK(r.told<MsgUpdate>().back().pull == late.pull);
}

TEST_CASE("a chunk that was refused before its slice came must be one of the slice") {
  Lone r;
  const MsgPull pull = with_spent_credit(r);
  r.offer(pull, 1, 8, pull.credits[0].credit);
  const bool dropped = GENERATE(false, true);
  if (dropped) {
    r.say(0, MsgDrop{pull.pull, 1});
    r.say(0, r.slice_of(pull, 2, {16, 64}, true));
  } else {
    r.say(0, r.slice_of(pull, 1, {16, 64}, true));
  }
  r.compile(480);  // eight chunks
  CHECK((r.status().state == TransferState::kFailed) == !dropped);
  CHECK((r.status().reason == Reason::kProtocol) == !dropped);
}

TEST_CASE("refusals before the slice are bounded, and then so is what is held") {
  Lone r(small_config(2), 1);
  r.verify = false;
  const MsgPull pull = with_spent_credit(r);
  uint64_t chunk = 0;
  while (r.status().state != TransferState::kFailed && chunk < 2000)
    r.offer(pull, 1, chunk++, pull.credits[0].credit);
  CHECK(r.status().reason == Reason::kProtocol);
  constexpr uint64_t kKnown = 3;  // chunks of its first slice
  CHECK(r.seen<SendRefuse>().size() == 1024 + kKnown);
  CHECK(chunk == 1024 + kKnown + 4 + 1);  // then as many are held as there were credits
}

TEST_CASE("DROP: landed regions are free, done cells are needed again, new scatters wait") {
  Lone r;
  const MsgPull pull = r.pull("a", 2 * kChunk + 32);
  MsgSlice slice = r.slice_of(pull, 0, {0, 16}, false);  // 160 bytes: 64, 64, 32
  r.say(0, slice);
  r.compile(160);
  r.offer(pull, 0, 0, pull.credits[0].credit);
  r.offer(pull, 0, 1, pull.credits[1].credit);
  r.post(ReceiveEnded{r.seen<AcceptOffer>()[0].landing, true});
  r.post(CopyEnded{r.seen<Scatter>()[0].copy, CopyOutcome::kOk, {}});
  r.post(ReceiveEnded{r.seen<AcceptOffer>()[1].landing, true});
  REQUIRE(r.seen<Scatter>().size() == 2);  // the second one runs
  r.say(0, MsgDrop{pull.pull, 0});
  CHECK(r.status().bytes_done == 0);
  r.say(0, r.slice_of(pull, 1, {0, 16}, true));
  r.compile(160);
  const CreditId fresh = r.told<MsgUpdate>().back().credits.back().credit;
  r.offer(pull, 1, 0, fresh);
  r.post(ReceiveEnded{r.seen<AcceptOffer>()[2].landing, true});
  CHECK(r.seen<Scatter>().size() == 2);  // waits for the dropped slice's scatter
  r.post(CopyEnded{r.seen<Scatter>()[1].copy, CopyOutcome::kOk, {}});
  CHECK(r.seen<Scatter>().size() == 3);
  r.forget();
  r.say(0, r.slice_of(pull, 0, {0, 16}, false));  // an old SLICE does not undo its DROP
  CHECK(r.seen<Compile>().empty());
}

TEST_CASE("a DROP that comes before its SLICE is final too") {
  Lone r;
  const MsgPull pull = r.pull("a", 640);
  r.say(0, MsgDrop{pull.pull, 0});
  r.say(0, r.slice_of(pull, 0, {0, 64}, true));
  CHECK(r.seen<Compile>().empty());
  const DescriptorId offer = r.offer(pull, 0, 0, pull.credits[0].credit);
  CHECK(r.dropped(offer));
  CHECK(r.seen<SendRefuse>().empty());
}

TEST_CASE("an unknown pull is answered END and its offer dropped") {
  Lone r;
  const MsgPull pull = r.pull("a", 640);
  r.post(CancelOp{{{2}, 2}, r.handle});
  r.say(0, MsgEnd{pull.pull, pull.transfer, Outcome::kFailed, Reason::kCancelled, std::nullopt});
  CHECK(r.engine.snapshot(r.now).links[0].legs_in == 0);
  r.forget();
  const DescriptorId late = r.offer(pull, 0, 0, pull.credits[0].credit);
  CHECK(r.dropped(late));
  CHECK(r.told<MsgEnd>().size() == 1);
}

TEST_CASE("credits of a leg without a SLICE are taken back when another one waits") {
  EngineConfig config = small_config(2);
  config.arenas = {{{4 * kChunk}}};  // two landing regions
  Lone r(config);
  const MsgPull idle = r.pull("a", 640);
  REQUIRE(idle.credits.size() == 2);
  const MsgPull busy = r.pull("b", 640);
  CHECK(busy.credits.empty());
  r.say(0, r.slice_of(busy, 0, {0, 64}, true));
  CHECK(r.engine.stats().credits_withdrawn == 2);
  CHECK(r.told<MsgUpdate>().back().pull == busy.pull);
  CHECK(r.told<MsgUpdate>().back().credits.size() == 2);
}

TEST_CASE("an unknown dp group: the first SLICE decides, the others are released") {
  Lone r;
  ReceiveOp op;
  op.op = {{2}, 1};
  op.client_handle = ++r.handle;
  op.key = key_of("a");
  op.layout = r.layout;
  r.post(op);
  Resolved resolved;
  resolved.resolve = r.seen<Resolve>().back().resolve;
  resolved.sender_incarnation = incarnation_of(1);
  for (uint32_t group = 0; group < 3; ++group)
    resolved.legs.push_back({group, group, "node1", false, group == 0, 640, nullptr});
  r.post(std::move(resolved));
  const auto pulls = r.told<MsgPull>();
  REQUIRE(pulls.size() == 3);
  for (const MsgPull& pull : pulls) CHECK(pull.credits.empty());
  r.forget();
  // A group that does not have it is dropped; that is no failure.
  r.say(0,
        MsgEnd{pulls[2].pull, pulls[2].transfer, Outcome::kFailed, Reason::kNoSend, std::nullopt});
  MsgSlice slice = r.slice_of(pulls[1], 0, {0, 64}, true);
  ProofFields fields;
  fields.pull = pulls[1].pull;
  fields.send = slice.send;
  fields.id = "a";
  fields.instance = "default/prefill";
  fields.incarnation = incarnation_of(1);
  fields.sender_rank = 1;
  fields.sender_node = "node1";
  fields.receiver_node = "node2";
  slice.proof = sender_proof(key_of("a").secret, fields);
  r.say(0, slice);
  REQUIRE(r.told<MsgEnd>().size() == 1);
  CHECK(r.told<MsgEnd>()[0].pull == pulls[0].pull);
  CHECK(r.told<MsgEnd>()[0].outcome == Outcome::kReleased);
  CHECK(r.told<MsgUpdate>().back().pull == pulls[1].pull);
  CHECK(r.told<MsgUpdate>().back().credits.size() == 4);
  r.say(0, MsgEnd{pulls[0].pull, pulls[0].transfer, Outcome::kFailed, Reason::kDeadline,
                  std::nullopt});
  CHECK(r.status().state == TransferState::kActive);  // an END of a released leg is nothing
}

TEST_CASE("stale cards: resolved again, with new pulls, a bounded number of times") {
  Lone r;
  MsgPull pull = r.pull("a", 640);
  for (int attempt = 0; attempt < 2; ++attempt) {
    r.say(0, MsgEnd{pull.pull, pull.transfer, Outcome::kFailed, Reason::kStaleCards, std::nullopt});
    Resolved resolved;
    resolved.resolve = r.seen<Resolve>().back().resolve;
    resolved.sender_incarnation = incarnation_of(1);
    resolved.legs.push_back({0, 0, "node1", false, true, 640, nullptr});
    r.post(std::move(resolved));
    CHECK(r.told<MsgPull>().back().pull != pull.pull);
    pull = r.told<MsgPull>().back();
  }
  r.say(0, MsgEnd{pull.pull, pull.transfer, Outcome::kFailed, Reason::kStaleCards, std::nullopt});
  CHECK(r.status().reason == Reason::kStaleCards);
}

TEST_CASE("a leg on a node without a link fails the receive") {
  Lone r;
  ReceiveOp op;
  op.op = {{2}, 1};
  op.client_handle = ++r.handle;
  op.key = key_of("a");
  op.layout = r.layout;
  r.post(op);
  Resolved resolved;
  resolved.resolve = r.seen<Resolve>().back().resolve;
  resolved.legs.push_back({0, 0, "node9", false, true, 640, nullptr});
  r.post(std::move(resolved));
  CHECK(r.status().reason == Reason::kPeerLost);
}

}  // namespace
}  // namespace kvferry::engine::test
