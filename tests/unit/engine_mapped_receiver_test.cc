// Mapped arenas at the receiver, and both engines together: regions are lent to the sender, and
// only evidence says that it writes them no more.
#include <set>

#include "daemon/engine/proofs.h"
#include "tests/unit/engine_harness.h"

namespace kvferry::engine::test {
namespace {

using std::chrono::seconds;

constexpr uint64_t kChunk = 64;

// Arena 0 as ever, arena 1 with four frames for what is mapped.
EngineConfig with_mapped(uint8_t node) {
  EngineConfig config = small_config(node);
  config.arenas = {{{16 * kChunk}}, {{4 * kChunk}, true}};
  return config;
}

std::shared_ptr<const TestLayout> receivers_layout() {
  auto layout = std::make_shared<TestLayout>(*make_layout({2}, "default/decode", 2, 0));
  layout->mapped_arena = 1;
  return layout;
}

// The test plays the sender's daemon.
struct Receiving : Box {
  explicit Receiving(EngineConfig config = with_mapped(2)) : Box(std::move(config)) {
    layout = receivers_layout();
    post(WorkerAttached{{2}, "default", 64});
    link_up(1);
    post(ArenaLent{link, 1});
    say(MsgMapped{1});
  }
  void link_up(uint64_t number, uint8_t life = 1, CheckKind check = CheckKind::kNone) {
    link = {number};
    next = {0, 0};
    senders_life = life;
    post(LinkUp{link, "node1", boot_of(life), false, 2, kChunk, 64, check});
    for (uint32_t lane = 0; lane < 2; ++lane) {
      post(LaneConnected{{link, lane, 0}});
      say(MsgHello{false}, lane);
      say(MsgHello{true}, lane);
    }
  }
  void say(ControlMessage message, uint32_t lane = 0) {
    post(MessageIn{{link, lane, 0}, next[lane]++, std::move(message)});
  }
  // A Receive of so many chunks whose PULL has gone out.
  MsgPull pull(const std::string& id, uint64_t chunks, bool waits = true) {
    ReceiveOp op;
    op.op = {{2}, ++ops};
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
    resolved.legs.push_back({0, 0, "node1", false, true, chunks * kChunk, nullptr});
    post(std::move(resolved));
    const auto pulls = told<MsgPull>();
    return pulls.empty() ? MsgPull{} : pulls.back();
  }
  void announce(const MsgPull& pull, uint64_t ordinal, Range tokens, uint64_t chunks, bool last,
                uint32_t lane = 0) {
    MsgSlice slice;
    slice.pull = pull.pull;
    slice.send = {boot_of(senders_life), 5};
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
    slice.ranges = {{0, {tokens}}};
    slice.bytes = chunks * kChunk;
    slice.digest = 42;
    say(std::move(slice), lane);
  }
  void compile(uint64_t chunks) {
    auto plan = std::make_shared<TestPlan>();
    plan->bytes = chunks * kChunk;
    plan->digest = 42;
    post(Compiled{seen<Compile>().back().compile, Reason::kNone, {}, std::move(plan)});
  }
  void slice(const MsgPull& pull, uint64_t chunks) {
    announce(pull, 0, {0, 64}, chunks, true);
    compile(chunks);
  }
  MsgWritten written(const MsgPull& pull, uint64_t chunk, uint64_t credit,
                     uint64_t ordinal = 0) const {
    return {pull.pull, ordinal, chunk, {credit}, {}};
  }
  std::vector<CreditGrant> credits(const MsgPull& pull) const {
    std::vector<CreditGrant> found;
    for (const MsgUpdate& update : told<MsgUpdate>())
      if (update.pull == pull.pull)
        found.insert(found.end(), update.credits.begin(), update.credits.end());
    return found;
  }
  std::vector<Ack> acks(const MsgPull& pull) const {
    std::vector<Ack> found;
    for (const MsgUpdate& update : told<MsgUpdate>())
      if (update.pull == pull.pull)
        found.insert(found.end(), update.acks.begin(), update.acks.end());
    return found;
  }
  void scatter_all() {
    const auto scatters = seen<Scatter>();
    for (const Scatter& scatter : scatters)
      if (done.insert(scatter.copy).second) post(CopyEnded{scatter.copy, CopyOutcome::kOk, {}});
  }
  void cancel(const std::string& id) { post(CancelOp{{{2}, ++ops}, Pair::handle_of(id)}); }
  TransferRecord status(const std::string& id) const { return record({2}, Pair::handle_of(id)); }
  ArenaView arena(uint32_t number) const { return engine.snapshot(now).arenas.at(number); }
  std::vector<LentView> lent() const { return engine.snapshot(now).lent; }
  uint64_t drops(DropCause cause) const {
    return engine.stats().dropped[static_cast<std::size_t>(cause)];
  }
  QuarantineReleased release(std::string node, std::optional<BootId> boot = {}) {
    post(ReleaseQuarantine{5, std::move(node), boot});
    return seen<QuarantineReleased>().back();
  }

  std::shared_ptr<const TestLayout> layout;
  LinkId link;
  uint8_t senders_life = 1;
  std::vector<uint64_t> next;
  uint64_t ops = 0;
  std::set<CopyId> done;
};

TEST_CASE("a mapped pull brings no credit; they come for the chunks that are known, with places") {
  Receiving r;
  const MsgPull pull = r.pull("a", 3);
  CHECK(pull.mapped == 1);
  CHECK(pull.credits.empty());
  CHECK(r.credits(pull).empty());
  r.announce(pull, 0, {0, 32}, 2, false);
  CHECK(r.credits(pull).empty());  // not before it is compiled
  r.compile(2);
  const auto credits = r.credits(pull);
  REQUIRE(credits.size() == 2);  // of three chunks to come two are there
  for (const CreditGrant& credit : credits) {
    REQUIRE(credit.place);
    CHECK(credit.place->segment == 1);
    CHECK(credit.bytes == kChunk);
    CHECK(r.engine.lent({1, credit.place->offset, kChunk}).grant != 0);
  }
  CHECK(r.arena(1).mapped);
  CHECK(r.arena(1).granted_bytes == 2 * kChunk);
  CHECK(r.arena(0).free_bytes == r.arena(0).total_bytes);
}

TEST_CASE("only new pulls are mapped, and only where the layout's mapped arena is") {
  EngineConfig config = with_mapped(2);
  config.arenas.push_back({{16 * kChunk}, true});
  Receiving other(config);
  auto elsewhere = std::make_shared<TestLayout>(*other.layout);
  elsewhere->mapped_arena = std::nullopt;
  other.layout = elsewhere;
  CHECK_FALSE(other.pull("none", 3).mapped);
  elsewhere = std::make_shared<TestLayout>(*other.layout);
  elsewhere->mapped_arena = 2;
  other.layout = elsewhere;
  CHECK_FALSE(other.pull("a", 3).mapped);

  other.link_up(2);  // whose peer has mapped nothing yet
  other.layout = receivers_layout();
  const MsgPull before = other.pull("b", 3);
  CHECK_FALSE(before.mapped);
  CHECK(before.credits.size() == 3);
  other.post(ArenaLent{other.link, 1});
  other.say(MsgMapped{1});
  CHECK(other.pull("c", 3).mapped == 1);
  other.post(LaneFailed{{{2}, 0, 0}});
  for (const MsgPull& pull : other.told<MsgPull>())
    if (pull.pull == before.pull) CHECK_FALSE(pull.mapped);  // all its life
}

TEST_CASE("with a check nothing lands where the processor cannot read, and promised room is used") {
  EngineConfig config = with_mapped(2);
  config.arenas[1].on_device = true;
  for (const CheckKind check : {CheckKind::kNone, CheckKind::kXxh3}) {
    Receiving r(config);
    r.link_up(2, 1, check);
    r.post(ArenaLent{r.link, 1});
    r.say(MsgMapped{1});
    CHECK(r.pull("a", 3).mapped.has_value() == (check == CheckKind::kNone));
    CHECK(r.engine.stats().mapped_unused == (check == CheckKind::kNone ? 0 : 1));
  }
  Receiving r;
  ReserveOp reserve;
  reserve.op = {{2}, ++r.ops};
  reserve.key = key_of("b");
  reserve.layout = r.layout;
  reserve.lease = seconds(10);
  r.post(reserve);
  CHECK_FALSE(r.pull("b", 3).mapped);
  CHECK(r.pull("c", 3).mapped == 1);
  CHECK(r.engine.stats().mapped_unused == 0);  // nothing is slower for want of anything
}

TEST_CASE("MAPPED of an arena that was not lent to that peer is a protocol error") {
  Receiving bare;
  bare.link_up(2);  // given nothing
  bare.say(MsgMapped{1});
  CHECK(bare.drops(DropCause::kProtocol) == 1);
  Receiving r;
  r.say(MsgMapped{0});
  r.say(MsgMapped{2});
  r.say(MsgMapped{UINT32_MAX});
  CHECK(r.drops(DropCause::kProtocol) == 3);
  CHECK(r.engine.snapshot(r.now).links.at(0).lent_to == std::vector<uint32_t>{1});
}

TEST_CASE("WRITTEN lands, is scattered and acknowledged; told again it is acknowledged again") {
  Receiving r;
  const MsgPull pull = r.pull("a", 2);
  r.slice(pull, 2);
  REQUIRE(r.credits(pull).size() == 2);
  const CreditGrant credit = r.credits(pull)[1];
  r.say(r.written(pull, 0, credit.credit.value));
  const auto scatters = r.seen<Scatter>();
  REQUIRE(scatters.size() == 1);
  CHECK(scatters[0].region == memory::Region{1, credit.place->offset, kChunk});
  r.say(r.written(pull, 0, credit.credit.value));  // being scattered: the ack will come
  CHECK(r.seen<Scatter>().size() == 1);
  CHECK(r.acks(pull).empty());
  r.scatter_all();
  CHECK(r.acks(pull) == std::vector<Ack>{{0, 0}});
  r.say(r.written(pull, 0, credit.credit.value));
  CHECK(r.acks(pull).size() == 2);
  r.say(r.written(pull, 1, 1));
  r.scatter_all();
  CHECK(r.status("a").state == TransferState::kCompleted);
  CHECK(r.arena(1).free_bytes == r.arena(1).total_bytes);
  CHECK(r.engine.stats().chunks_mapped == 2);
  CHECK(r.seen<AcceptOffer>().empty());
}

TEST_CASE("WRITTEN waits for its slice's compilation") {
  Receiving r;
  const MsgPull pull = r.pull("a", 2);
  r.announce(pull, 0, {0, 32}, 1, false);
  r.compile(1);
  r.announce(pull, 1, {32, 64}, 1, true);
  r.say(r.written(pull, 0, 1, 1));
  r.say(r.written(pull, 0, 1, 1));
  CHECK(r.seen<Scatter>().empty());
  CHECK(r.status("a").state == TransferState::kActive);
  r.compile(1);
  CHECK(r.seen<Scatter>().size() == 1);
}

TEST_CASE("a WRITTEN that contradicts what is known ends the transfer") {
  Receiving r;
  const MsgPull pull = r.pull("a", 4);
  r.slice(pull, 4);
  REQUIRE(r.credits(pull).size() == 4);
  MsgWritten wrong = r.written(pull, 0, 1);
  SECTION("unknown slice") {
    wrong.slice = 9;
  }
  SECTION("a credit that was never given") {
    wrong.credit = {5};
  }
  SECTION("no credit") {
    wrong.credit = {0};
  }
  SECTION("a chunk beyond the slice") {
    wrong.chunk = 4;
  }
  SECTION("another check than agreed") {
    wrong.check.kind = CheckKind::kXxh3;
  }
  SECTION("a credit that is spent") {
    r.say(r.written(pull, 1, 1));
    r.scatter_all();
  }
  SECTION("a chunk twice") {
    r.say(r.written(pull, 0, 2));
  }
  r.say(wrong);
  CHECK(r.status("a").reason == Reason::kProtocol);
}

TEST_CASE("a mapped pull takes no offers, another one no WRITTEN") {
  Receiving r;
  const MsgPull pull = r.pull("a", 2);
  r.slice(pull, 2);
  OfferIn in;
  in.lane = {{1}, 0, 0};
  in.offer = {pull.pull, {boot_of(1), 5}, 0, 0, {1}, {1}, kChunk, {}};
  in.descriptor = {1};
  in.announced_bytes = kChunk;
  r.post(in);
  CHECK(r.seen<AcceptOffer>().empty());
  CHECK(r.seen<DropOffer>().size() == 1);
  CHECK(r.drops(DropCause::kProtocol) == 1);

  Receiving plain;
  plain.link_up(2);
  const MsgPull other = plain.pull("b", 2);
  plain.slice(other, 2);
  plain.say(plain.written(other, 0, 1));
  CHECK(plain.status("b").reason == Reason::kProtocol);
}

TEST_CASE("WRITTEN of a dropped slice spends its credit, and is acknowledged each time") {
  Receiving r;
  const MsgPull pull = r.pull("a", 2);
  r.slice(pull, 2);
  r.say(r.written(pull, 0, 1));  // being scattered
  r.say(MsgDrop{pull.pull, 0});
  CHECK(r.arena(1).granted_bytes == kChunk);  // it may be gathering
  r.say(r.written(pull, 1, 2));
  CHECK(r.arena(1).granted_bytes == 0);
  CHECK(r.acks(pull) == std::vector<Ack>{{0, 1}});
  r.say(r.written(pull, 1, 2));
  CHECK(r.acks(pull).size() == 2);
  r.scatter_all();
  CHECK(r.acks(pull).size() == 3);
  CHECK(r.arena(1).free_bytes == r.arena(1).total_bytes);
  CHECK(r.status("a").state == TransferState::kActive);
}

TEST_CASE("nobody's unused credits are taken back, and reservations are of the other arena") {
  Receiving r;
  ReserveOp reserve;
  reserve.op = {{2}, 900};
  reserve.key = key_of("c");
  reserve.layout = r.layout;
  reserve.bytes = 4 * kChunk;
  reserve.lease = seconds(5);
  r.post(reserve);
  CHECK(r.last_reply().reserved_bytes == 4 * kChunk);
  CHECK(r.arena(0).reserved_bytes == 4 * kChunk);
  CHECK(r.arena(1).reserved_bytes == 0);
  const MsgPull a = r.pull("a", 4);
  r.slice(a, 4);
  REQUIRE(r.credits(a).size() == 4);
  const MsgPull b = r.pull("b", 2);
  r.slice(b, 2);
  const MsgPull c = r.pull("c", 2);
  r.slice(c, 2);
  CHECK(r.credits(b).empty());
  CHECK(r.credits(c).empty());
  CHECK(r.engine.stats().credits_withdrawn == 0);
  CHECK(r.status("c").state == TransferState::kActive);
  (void)r.pull("d", 2, false);  // does not wait
  CHECK(r.status("d").reason == Reason::kArenaExhausted);
  r.say(r.written(a, 0, 1));
  r.scatter_all();
  CHECK(r.credits(b).size() == 1);
}

// A transfer that ends with a chunk scattered and two credits that the peer may use.
struct Ended : Receiving {
  Ended() {
    ended = pull("a", 3);
    slice(ended, 3);
    REQUIRE(credits(ended).size() == 3);
    say(written(ended, 0, 1));
    scatter_all();
    forget();
    cancel("a");
  }
  MsgPull ended;
};

TEST_CASE("what the peer may still write when the transfer ends waits for its DRAINED") {
  Ended r;
  REQUIRE(r.told<MsgEnd>().size() == 1);
  CHECK(r.told<MsgEnd>()[0].mapped);
  CHECK(r.arena(1).quarantined_bytes == 2 * kChunk);
  REQUIRE(r.lent().size() == 1);
  CHECK(r.lent()[0].node == "node1");
  CHECK(r.lent()[0].boot == boot_of(1));
  CHECK(r.lent()[0].arena == 1);
  CHECK(r.lent()[0].regions == 2);
  CHECK(r.lent()[0].bytes == 2 * kChunk);
  CHECK(r.lent()[0].linked);
  // Neither what was written, nor its END, nor time says that.
  r.say(r.written(r.ended, 1, 2));
  r.say(MsgEnd{r.ended.pull, r.ended.transfer, Outcome::kFailed, Reason::kCancelled, {}});
  for (int i = 0; i < 20; ++i) {
    r.say(MsgPing{}, 0);
    r.say(MsgPing{}, 1);
    r.pass(seconds(1));
  }
  CHECK(r.arena(1).quarantined_bytes == 2 * kChunk);
  r.forget();
  r.post(LaneFailed{{{1}, 0, 0}});
  CHECK(r.told<MsgEnd>().size() == 1);  // until DRAINED
  r.say(MsgDrained{r.ended.pull}, 1);
  CHECK(r.arena(1).free_bytes == r.arena(1).total_bytes);
  CHECK(r.lent().empty());
  CHECK(r.engine.snapshot(r.now).links.at(0).legs_in == 0);
  CHECK(r.engine.stats().regions_drained == 2);
  r.say(MsgDrained{r.ended.pull}, 1);  // again
  CHECK(r.drops(DropCause::kProtocol) == 0);
}

TEST_CASE("DRAINED for a pull that is open, or not mapped, frees nothing") {
  Receiving r;
  const MsgPull pull = r.pull("a", 2);
  r.slice(pull, 2);
  r.say(MsgDrained{pull.pull});
  CHECK(r.drops(DropCause::kProtocol) == 1);
  CHECK(r.arena(1).granted_bytes == 2 * kChunk);
  CHECK(r.status("a").state == TransferState::kActive);
}

TEST_CASE(
    "a leg of which nothing was lent is closed by DRAINED as well, and without a link at once") {
  Receiving r;
  const MsgPull pull = r.pull("a", 2);
  r.cancel("a");
  r.say(MsgEnd{pull.pull, pull.transfer, Outcome::kFailed, Reason::kCancelled, {}});
  CHECK(r.engine.snapshot(r.now).links.at(0).legs_in == 1);
  r.say(MsgDrained{pull.pull});
  CHECK(r.engine.snapshot(r.now).links.at(0).legs_in == 0);
  (void)r.pull("b", 2);
  r.post(LinkEnded{{1}, Reason::kPeerLost});
  CHECK(r.status("b").reason == Reason::kPeerLost);
  CHECK(r.lent().empty());
}

TEST_CASE("the link's end is no evidence; the end of the peer's process is") {
  Ended r;
  r.post(LinkEnded{{1}, Reason::kPeerLost});
  r.pass(seconds(100));
  CHECK(r.arena(1).quarantined_bytes == 2 * kChunk);
  REQUIRE(r.lent().size() == 1);
  CHECK_FALSE(r.lent()[0].linked);
  r.post(PeerProcessGone{boot_of(9), "node1"});
  r.post(PeerProcessGone{boot_of(1), "node7"});  // another node that calls itself so
  r.post(RailsDied{});
  CHECK(r.arena(1).quarantined_bytes == 2 * kChunk);
  r.post(PeerProcessGone{boot_of(1), "node1"});
  CHECK(r.arena(1).free_bytes == r.arena(1).total_bytes);
  CHECK(r.engine.stats().regions_proven == 2);
}

TEST_CASE("a peer that has unmapped what was lent over an ended link writes no more of it") {
  Ended r;
  r.post(PeerUnmapped{{1}});  // the link is up
  CHECK(r.arena(1).quarantined_bytes == 2 * kChunk);
  r.post(LinkEnded{{1}, Reason::kPeerLost});
  r.post(PeerUnmapped{{2}});
  CHECK(r.arena(1).quarantined_bytes == 2 * kChunk);
  r.link_up(2);  // to the same life, whose older mapping it is about
  r.post(PeerUnmapped{{1}});
  CHECK(r.arena(1).free_bytes == r.arena(1).total_bytes);
  CHECK(r.lent().empty());
  CHECK(r.engine.stats().regions_proven == 2);
}

TEST_CASE("the end of the peer's process ends its link, and frees what open transfers had lent") {
  Receiving r;
  const MsgPull pull = r.pull("a", 3);
  r.slice(pull, 3);
  r.post(PeerProcessGone{boot_of(1), "node1"});
  CHECK(r.status("a").reason == Reason::kPeerLost);
  CHECK(r.seen<CloseLink>().size() == 1);
  CHECK(r.engine.snapshot(r.now).links.empty());
  CHECK(r.arena(1).free_bytes == r.arena(1).total_bytes);
  CHECK(r.engine.stats().regions_proven == 3);
}

TEST_CASE("it is evidence too of a peer that says the boot id of this daemon") {
  Receiving r;
  r.link_up(2, 2);
  r.post(ArenaLent{r.link, 1});
  r.say(MsgMapped{1});
  const MsgPull pull = r.pull("a", 3);
  r.slice(pull, 3);
  r.cancel("a");
  CHECK(r.arena(1).quarantined_bytes == 3 * kChunk);
  r.post(PeerProcessGone{boot_of(2), "node1"});
  CHECK(r.arena(1).free_bytes == r.arena(1).total_bytes);
  CHECK(r.engine.snapshot(r.now).links.empty());
}

TEST_CASE(
    "an operator frees what a peer without a link may write, and nothing of one with a link") {
  Ended r;
  CHECK(r.release("node1").linked == 2);
  CHECK(r.arena(1).quarantined_bytes == 2 * kChunk);
  r.post(LinkEnded{{1}, Reason::kPeerLost});
  CHECK(r.release("").regions == 0);
  CHECK(r.release("node7").regions == 0);
  CHECK(r.release("node1", boot_of(7)).regions == 0);
  SECTION("by node") {
    CHECK(r.release("node1").regions == 2);
  }
  SECTION("not by its life alone, which another node may say too") {
    CHECK(r.release("", boot_of(1)).regions == 0);
    CHECK(r.release("node1", boot_of(1)).bytes == 2 * kChunk);
  }
  SECTION("by both, beside a new life") {
    r.link_up(2, 3);
    CHECK(r.release("node1", boot_of(1)).regions == 2);
  }
  CHECK(r.seen<QuarantineReleased>().back().call == 5);
  CHECK(r.arena(1).free_bytes == r.arena(1).total_bytes);
  CHECK(r.engine.stats().regions_released == 2);
}

TEST_CASE("a later link to the same life of the peer is asked, one to another life is not") {
  Ended r;
  r.post(LinkEnded{{1}, Reason::kPeerLost});
  r.forget();
  r.link_up(2, 3);
  CHECK(r.told<MsgEnd>().empty());
  r.post(LinkEnded{{2}, Reason::kPeerLost});
  r.link_up(3);
  REQUIRE(r.told<MsgEnd>().size() == 1);
  CHECK(r.told<MsgEnd>()[0].pull == r.ended.pull);
  CHECK(r.told<MsgEnd>()[0].mapped);
  CHECK(r.lent().at(0).linked);
  r.say(MsgDrained{r.ended.pull});
  CHECK(r.arena(1).free_bytes == r.arena(1).total_bytes);
  CHECK(r.engine.snapshot(r.now).links.at(0).legs_in == 0);
}

TEST_CASE("when all of the mapped arena is quarantined, new pulls land beside it") {
  Receiving r;
  const MsgPull a = r.pull("a", 4);
  r.slice(a, 4);
  r.cancel("a");
  CHECK(r.arena(1).quarantined_bytes == 4 * kChunk);
  const MsgPull b = r.pull("b", 2);
  CHECK_FALSE(b.mapped);
  CHECK(r.engine.stats().mapped_unused == 1);
  CHECK(b.credits.size() == 2);
  r.say(MsgDrained{a.pull});
  CHECK(r.pull("c", 2).mapped == 1);
}

// ---- both -------------------------------------------------------------------------------------

TEST_CASE("a transfer into a mapped arena completes on both sides and leaves nothing") {
  Pair world(small_config(1), with_mapped(2));
  world.r_layout = receivers_layout();
  world.r.post(ArenaLent{{1}, 1});
  world.s.post(ArenaMapped{{1}, 1});
  world.run();
  world.s.post(world.send_op("a", 0, {0, 32}, false));
  world.r.post(world.receive_op("a", {0, 64}));
  world.run();
  world.s.post(world.send_op("a", 1, {32, 64}, true));
  world.run();
  CHECK(world.sent("a").state == TransferState::kDelivered);
  CHECK(world.received("a").state == TransferState::kCompleted);
  CHECK(world.s.seen<SendOffer>().empty());
  CHECK(world.s.told<MsgWritten>().size() == 10);
  CHECK(world.s.told<MsgDrained>().size() == 1);
  CHECK(world.r.engine.snapshot(world.r.now).links.at(0).legs_in == 0);
  for (const ArenaView& arena : world.r.engine.snapshot(world.r.now).arenas)
    CHECK(arena.free_bytes == arena.total_bytes);
  for (const MsgUpdate& update : world.r.told<MsgUpdate>())
    for (const CreditGrant& credit : update.credits) CHECK(credit.place);
}

TEST_CASE("a Revoke on a mapped leg brings what is sent anew") {
  EngineConfig small = with_mapped(2);
  small.arenas[1].segment_bytes = {kChunk};  // one region for all of it
  Pair world(small_config(1), small);
  world.r_layout = receivers_layout();
  world.r.post(ArenaLent{{1}, 1});
  world.s.post(ArenaMapped{{1}, 1});
  world.run();
  world.answer_gathers = false;
  world.s.post(world.send_op("a", 0, {0, 64}, true));
  world.r.post(world.receive_op("a", {0, 64}));
  world.run();
  const auto gathers = world.s.seen<Gather>();
  REQUIRE(gathers.size() == 1);
  world.s.post(RevokeOp{{{1}, 9}, Pair::handle_of("a"), 0});
  world.run();
  world.answer_gathers = true;
  world.s.post(CopyEnded{gathers[0].copy, CopyOutcome::kOk, {}});
  world.run();
  CHECK(world.r.engine.snapshot(world.r.now).arenas[1].granted_bytes == 0);
  world.s.post(world.send_op("a", 1, {0, 64}, true));
  world.run();
  CHECK(world.sent("a").state == TransferState::kDelivered);
  CHECK(world.received("a").state == TransferState::kCompleted);
}

}  // namespace
}  // namespace kvferry::engine::test
