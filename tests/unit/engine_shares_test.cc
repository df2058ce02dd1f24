// What one worker, tenant or peer may hold of an arena while another waits.
#include <set>

#include "daemon/engine/grants.h"
#include "tests/unit/engine_lone.h"

namespace kvferry::engine::test {
namespace {

using std::chrono::seconds;

// ---- counted ----------------------------------------------------------------------------------

EngineConfig frames(uint64_t count) {
  EngineConfig config = small_config(2);
  config.arenas = {{{count * kChunk}}};
  return config;
}

TEST_CASE("a share is rounded up to whole frames, and one frame is always allowed") {
  const auto most = [](uint64_t frame_count, RegionKind kind, uint32_t share) {
    EngineConfig config = frames(frame_count);
    config.worker_share = share;
    const Arena arena(config, 0);
    const Shares shares(config, arena, kind);
    uint64_t bytes = 0;
    while (shares.worker_may(1, bytes + kChunk)) bytes += kChunk;
    return bytes / kChunk;
  };
  // E is 1: landing has all frames but two, staging all but one.
  CHECK(most(10, RegionKind::kLanding, 500'000) == 4);
  CHECK(most(9, RegionKind::kLanding, 500'000) == 4);
  CHECK(most(10, RegionKind::kStaging, 500'000) == 5);
  CHECK(most(10, RegionKind::kLanding, 1) == 1);
  CHECK(most(3, RegionKind::kLanding, 500'000) == 1);
  CHECK(most(10, RegionKind::kLanding, 1'000'000) == 8);
}

TEST_CASE("what one has beyond his share may go to who lacks it, as far as they are not the same") {
  const EngineConfig config = frames(10);
  const Arena arena(config, 0);
  Shares shares(config, arena, RegionKind::kLanding);  // four frames each
  const Holder first{1, 1, 1};
  const Holder second{1, 2, 1};
  const Holder stranger{2, 3, 2};
  CHECK_FALSE(shares.somebody_spares(second));
  shares.worker_took(first, 6 * kChunk);
  shares.peer_took(1, 6 * kChunk);
  CHECK(shares.somebody_spares(second));
  CHECK(shares.may_move(first, second, 2 * kChunk));
  CHECK_FALSE(shares.may_move(first, second, 3 * kChunk));  // less than a share would be left
  CHECK_FALSE(shares.may_move(first, first, kChunk));
  CHECK(shares.may_move(first, stranger, 2 * kChunk));
  shares.worker_took(stranger, 3 * kChunk);
  shares.peer_took(2, 3 * kChunk);
  CHECK(shares.may_move(first, stranger, kChunk));
  CHECK_FALSE(shares.may_move(first, stranger, 2 * kChunk));  // that would be more than its share
  shares.worker_gave(first, 2 * kChunk);
  shares.peer_gave(1, 2 * kChunk);
  CHECK_FALSE(shares.somebody_spares(second));
  CHECK_FALSE(shares.may_move(first, stranger, kChunk));
}

// ---- landing ----------------------------------------------------------------------------------

// node2 receives by two workers and from two peers, which the test plays. Eight of ten frames are
// for landing: a share is four. A leg may have six credits.
struct Landing : Box {
  static EngineConfig config() {
    EngineConfig config = frames(10);
    config.leg_credits = 6;
    return config;
  }
  explicit Landing(EngineConfig with = config()) : Box(std::move(with)) {
    for (uint64_t worker = 2; worker < 5; ++worker) {
      layouts[worker] = make_layout({worker}, "default/decode" + std::to_string(worker),
                                    static_cast<uint8_t>(worker), 0);
      post(WorkerAttached{{worker}, worker == 4 ? "other" : "default", 64});
    }
    for (const uint8_t peer : {uint8_t{1}, uint8_t{3}}) {
      post(LinkUp{{peer},
                  "node" + std::to_string(peer),
                  boot_of(peer),
                  false,
                  1,
                  kChunk,
                  64,
                  CheckKind::kNone});
      post(LaneConnected{{{peer}, 0, 0}});
      say(peer, MsgHello{false});
      say(peer, MsgHello{true});
    }
  }
  void say(uint8_t peer, ControlMessage message) {
    post(MessageIn{{{peer}, 0, 0}, next[peer]++, std::move(message)});
  }
  // A Receive of ten chunks by that worker, from that peer; its PULL.
  MsgPull pull(const std::string& id, uint64_t worker, uint8_t peer) {
    ReceiveOp op;
    op.op = {{worker}, ++ops};
    op.client_handle = Pair::handle_of(id);
    op.key = key_of(id);
    op.layout = layouts.at(worker);
    op.num_tokens = 64;
    op.needs = {{0, 0, 64, {{0, 64}}}};
    post(op);
    Resolved resolved;
    resolved.resolve = seen<Resolve>().back().resolve;
    resolved.sender_incarnation = incarnation_of(1);
    resolved.legs.push_back(
        {0, 0, "node" + std::to_string(peer), false, true, 10 * kChunk, nullptr});
    post(std::move(resolved));
    return told<MsgPull>().back();
  }
  // ... whose stream is announced.
  MsgPull receive(const std::string& id, uint64_t worker, uint8_t peer) {
    MsgPull pull = this->pull(id, worker, peer);
    MsgSlice slice;
    slice.pull = pull.pull;
    slice.send = {boot_of(peer), 5};
    const std::string node = "node" + std::to_string(peer);
    ProofFields fields;
    fields.pull = pull.pull;
    fields.send = slice.send;
    fields.id = pull.transfer.id;
    fields.instance = pull.transfer.instance;
    fields.incarnation = pull.transfer.incarnation;
    fields.sender_node = node;
    fields.receiver_node = "node2";
    slice.proof = sender_proof(key_of(pull.transfer.id).secret, fields);
    slice.last = true;
    slice.ranges = {{0, {{0, 64}}}};
    slice.bytes = 10 * kChunk;
    slice.digest = 42;
    say(peer, std::move(slice));
    REQUIRE_FALSE(seen<Compile>().empty());
    auto plan = std::make_shared<TestPlan>();
    plan->bytes = 10 * kChunk;
    plan->digest = 42;
    post(Compiled{seen<Compile>().back().compile, Reason::kNone, {}, std::move(plan)});
    return pull;
  }
  // That worker's chunk is offered for the credit, lands and is scattered.
  void bring(const MsgPull& pull, uint8_t peer, uint64_t chunk, CreditId credit) {
    OfferIn in;
    in.lane = {{peer}, 0, 0};
    in.offer.pull = pull.pull;
    in.offer.send = {boot_of(peer), 5};
    in.offer.chunk = chunk;
    in.offer.credit = credit;
    in.offer.offer = {++last_offer};
    in.offer.bytes = kChunk;
    in.descriptor = {last_offer};
    in.announced_bytes = kChunk;
    post(in);
  }
  void land_all() {
    for (const AcceptOffer& of : seen<AcceptOffer>())
      if (landed.insert(of.landing.value).second) post(ReceiveEnded{of.landing, true});
    for (const Scatter& of : seen<Scatter>())
      if (landed.insert(of.copy.value).second) post(CopyEnded{of.copy, CopyOutcome::kOk, {}});
  }
  std::size_t credits_of(const MsgPull& pull) const {
    std::size_t count = pull.credits.size();
    for (const MsgUpdate& message : told<MsgUpdate>())
      if (message.pull == pull.pull) count += message.credits.size();
    return count;
  }
  std::vector<CreditGrant> granted(const MsgPull& pull) const {
    std::vector<CreditGrant> all = pull.credits;
    for (const MsgUpdate& message : told<MsgUpdate>())
      if (message.pull == pull.pull)
        all.insert(all.end(), message.credits.begin(), message.credits.end());
    return all;
  }
  uint64_t withdrawn() const { return engine.stats().credits_withdrawn; }
  ArenaView arena() const { return engine.snapshot(now).arenas[0]; }

  std::map<uint64_t, std::shared_ptr<const TestLayout>> layouts;
  std::map<uint8_t, uint64_t> next;
  std::set<uint64_t> landed;
  uint64_t ops = 0;
  uint64_t last_offer = 0;
};

TEST_CASE("a lone worker has the whole arena") {
  Landing l;
  l.receive("a", 2, 1);
  l.receive("b", 2, 1);
  CHECK(l.arena().granted_bytes == 8 * kChunk);
  CHECK(l.withdrawn() == 0);
}

TEST_CASE(
    "who waits within his share takes what others have not begun to use of more than theirs") {
  Landing l;
  const MsgPull a = l.receive("a", 2, 1);
  const MsgPull b = l.receive("b", 2, 1);
  REQUIRE(l.arena().granted_bytes == 8 * kChunk);

  SECTION("another worker") {
    const MsgPull c = l.receive("c", 3, 3);
    CHECK(l.credits_of(c) == 4);
    CHECK(l.withdrawn() == 4);
  }
  SECTION("of another tenant") {
    const MsgPull c = l.receive("c", 4, 3);
    CHECK(l.credits_of(c) == 4);
  }
  SECTION("the same worker's legs of another peer") {
    const MsgPull c = l.receive("c", 2, 3);
    CHECK(l.credits_of(c) == 4);
    CHECK(l.withdrawn() == 4);
  }
  SECTION("not another transfer of the same worker and peer") {
    CHECK(l.credits_of(l.receive("c", 2, 1)) == 0);
    CHECK(l.withdrawn() == 0);
  }
  SECTION("of who has not brought a slice nothing is different") {
    CHECK(l.credits_of(l.pull("c", 3, 3)) == 0);
    CHECK(l.withdrawn() == 0);
  }
}

TEST_CASE("what frees goes to who waits within his share, whatever the turns") {
  Landing l;
  const MsgPull a = l.receive("a", 2, 1);
  const MsgPull b = l.receive("b", 2, 1);
  // All are in use, so none can be taken back.
  for (uint64_t chunk = 0; chunk < a.credits.size(); ++chunk)
    l.bring(a, 1, chunk, a.credits[chunk].credit);
  const auto of_b = l.granted(b);
  for (uint64_t chunk = 0; chunk < of_b.size(); ++chunk) l.bring(b, 1, chunk, of_b[chunk].credit);
  const std::size_t before = l.credits_of(a) + l.credits_of(b);
  REQUIRE(before == 8);
  const MsgPull c = l.receive("c", 3, 3);
  REQUIRE(l.credits_of(c) == 0);
  // One after another comes back. The newcomer would have every other one by turns.
  const auto accepted = l.seen<AcceptOffer>();
  REQUIRE(accepted.size() == 8);
  const auto come_back = [&](std::size_t i) {
    l.post(ReceiveEnded{accepted[i].landing, true});
    const auto scatters = l.seen<Scatter>();
    l.post(CopyEnded{scatters.back().copy, CopyOutcome::kOk, {}});
  };
  for (std::size_t i = 0; i < 4; ++i) come_back(i);
  CHECK(l.credits_of(c) == 4);
  CHECK(l.credits_of(a) + l.credits_of(b) == before);
  // It has its share now, as the others have. In turn it would not be next.
  for (std::size_t i = 4; i < 6; ++i) come_back(i);
  CHECK(l.credits_of(c) == 4);
  CHECK(l.credits_of(a) + l.credits_of(b) == before + 2);
}

TEST_CASE("of more than two, none loses what is within his share") {
  EngineConfig config = Landing::config();
  config.worker_share = 250'000;  // two frames
  config.peer_share = 1'000'000;
  Landing l(config);
  l.receive("a", 2, 1);
  l.receive("b", 3, 1);
  CHECK(l.arena().granted_bytes == 8 * kChunk);
  const MsgPull c = l.receive("c", 4, 1);
  CHECK(l.credits_of(c) == 2);
  // One of them came by way of the tenant from the second worker, which had it back from the first.
  CHECK(l.withdrawn() == 3);
}

TEST_CASE("shares of 1 leave all to the turns") {
  EngineConfig config = Landing::config();
  config.worker_share = config.peer_share = 1'000'000;
  Landing l(config);
  l.receive("a", 2, 1);
  l.receive("b", 2, 1);
  CHECK(l.credits_of(l.receive("c", 3, 3)) == 0);
  CHECK(l.withdrawn() == 0);
}

TEST_CASE("in the smallest arena workers take turns at the one region there is") {
  EngineConfig config = frames(3);
  Landing l(config);
  const MsgPull a = l.receive("a", 2, 1);
  REQUIRE(l.credits_of(a) == 1);
  const MsgPull c = l.receive("c", 3, 3);
  CHECK(l.credits_of(c) == 0);  // the one that the first has is its share
  CHECK(l.withdrawn() == 0);
}

TEST_CASE("quarantined regions are a peer's and no worker's") {
  Landing l;
  const MsgPull a = l.receive("a", 2, 1);
  for (uint64_t chunk = 0; chunk < a.credits.size(); ++chunk)
    l.bring(a, 1, chunk, a.credits[chunk].credit);
  const auto landings = l.seen<AcceptOffer>();
  REQUIRE(landings.size() == 6);
  CancelOp cancel;
  cancel.op = {{2}, ++l.ops};
  cancel.client_handle = Pair::handle_of("a");
  l.post(cancel);
  REQUIRE(l.arena().quarantined_bytes == 6 * kChunk);
  // The same worker has the last two frames for another peer. It waits for more, and so does
  // another worker, for the peer that may still write six of them.
  const MsgPull c = l.receive("c", 2, 3);
  CHECK(l.credits_of(c) == 2);
  const MsgPull d = l.receive("d", 3, 1);
  CHECK(l.credits_of(d) == 0);
  l.post(ReceiveEnded{landings[0].landing, true});
  l.post(ReceiveEnded{landings[1].landing, true});
  CHECK(l.credits_of(c) == 4);
  CHECK(l.credits_of(d) == 0);
  // Now c has its share, and the peer may have one more.
  l.post(ReceiveEnded{landings[2].landing, true});
  CHECK(l.credits_of(c) == 4);
  CHECK(l.credits_of(d) == 1);
}

// ---- staging ----------------------------------------------------------------------------------

// node1 sends for two workers to two peers. Five of six frames are for staging: a share is three.
TEST_CASE("staging: who has its share waits for who does not") {
  EngineConfig config = small_config(1);
  config.arenas = {{{6 * kChunk}}};
  config.leg_credits = 64;
  Lone s(config);
  s.open("a", 20, {1, 2, 3, 4, 5, 6, 7, 8, 9, 10});
  s.gather_all();
  REQUIRE(s.arena().staging_bytes == 5 * kChunk);  // alone
  // Another worker's send to another daemon.
  s.post(WorkerAttached{{7}, "default", 8});
  s.post(LinkUp{{3}, "node3", boot_of(3), true, 1, kChunk, 64, CheckKind::kNone});
  s.post(LaneConnected{{{3}, 0, 0}});
  s.post(MessageIn{{{3}, 0, 0}, 0, MsgHello{false}});
  s.post(MessageIn{{{3}, 0, 0}, 1, MsgHello{true}});
  const auto mine = s.layout;
  auto other = std::make_shared<TestLayout>(*mine);
  other->worker = {7};
  s.layout = other;
  SendOp op;
  op.op = {{7}, 1};
  op.client_handle = 77;
  op.key = key_of("b");
  op.layout = other;
  op.offer = {{0, {{0, 64}}}};
  op.last = true;
  op.lease = seconds(10);
  s.post(op);
  MsgPull pull = s.pull_of("b", 1, {1, 2, 3, 4, 5, 6});
  pull.pull.receiver = boot_of(3);
  ProofFields fields;
  fields.pull = pull.pull;
  fields.id = pull.transfer.id;
  fields.instance = pull.transfer.instance;
  fields.incarnation = pull.transfer.incarnation;
  fields.sender_node = "node1";
  fields.receiver_node = "node3";
  pull.proof = receiver_proof(key_of("b").secret, fields);
  s.post(MessageIn{{{3}, 0, 0}, 2, pull});
  s.resolve();
  s.compile_all();
  s.gather_all();
  REQUIRE(s.arena().staging_bytes == 5 * kChunk);
  // What the first one gets back goes to the second until the first has less than its share.
  const auto to_node3 = [&] {
    std::size_t count = 0;
    for (const SendOffer& of : s.seen<SendOffer>()) count += of.lane.link == LinkId{3} ? 1U : 0U;
    return count;
  };
  const auto offers = s.seen<SendOffer>();
  REQUIRE(offers.size() == 5);
  for (uint64_t i = 0; i < 2; ++i) {
    s.post(OfferSendEnded{offers[i].offer.offer});
    s.update({}, {{0, offers[i].offer.chunk}});
    s.gather_all();
    CHECK(to_node3() == i + 1);
  }
}

}  // namespace
}  // namespace kvferry::engine::test
