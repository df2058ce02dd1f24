// Several arenas: each transfer lands and is staged in its layout's, and one that is full, starved
// or quarantined holds up nobody in another.
#include "tests/unit/engine_lone.h"

namespace kvferry::engine::test {
namespace {

using std::chrono::seconds;

// Four frames each: segments 0 and 1 are the first one's, segment 2 the second's. E is 1, so two
// frames are for landing, three for staging.
EngineConfig two_arenas(uint8_t node) {
  EngineConfig config = small_config(node);
  config.arenas = {{{2 * kChunk, 2 * kChunk}}, {{4 * kChunk}}};
  return config;
}
uint32_t arena_of(const memory::Region& region) {
  return region.segment < 2 ? 0 : 1;
}
std::shared_ptr<const TestLayout> layout_in(uint32_t arena, const TestLayout& like) {
  auto layout = std::make_shared<TestLayout>(like);
  layout->arena = arena;
  return layout;
}

// node2 receives from node1, which the test plays, by one layout in each arena.
struct Receiving : Box {
  explicit Receiving(EngineConfig config = two_arenas(2)) : Box(std::move(config)) {
    const auto like = make_layout({2}, "default/decode", 2, 0);
    for (uint32_t arena = 0; arena < 2; ++arena) layouts.push_back(layout_in(arena, *like));
    post(WorkerAttached{{2}, "default", 64});
    post(LinkUp{{1}, "node1", boot_of(1), false, 1, kChunk, 64, CheckKind::kNone});
    post(LaneConnected{{{1}, 0, 0}});
    say(MsgHello{false});
    say(MsgHello{true});
  }
  void say(ControlMessage message) { post(MessageIn{{{1}, 0, 0}, next++, std::move(message)}); }

  ReceiveOp op(const std::string& id, uint32_t arena) {
    ReceiveOp op;
    op.op = {{2}, ++ops};
    op.client_handle = Pair::handle_of(id);
    op.key = key_of(id);
    op.layout = layouts[arena];
    op.num_tokens = 64;
    op.needs = {{0, 0, 64, {{0, 64}}}};
    op.wait_for_arena = waits;
    return op;
  }
  // A Receive into that arena of so many bytes; its PULL, with the credits there were.
  MsgPull pull(const std::string& id, uint32_t arena, uint64_t expected) {
    post(op(id, arena));
    Resolved resolved;
    resolved.resolve = seen<Resolve>().back().resolve;
    resolved.sender_incarnation = incarnation_of(1);
    resolved.legs.push_back({0, 0, "node1", false, true, expected, nullptr});
    post(std::move(resolved));
    return told<MsgPull>().back();
  }
  // Its whole stream is announced.
  void slice(const MsgPull& pull, uint64_t bytes) {
    MsgSlice slice;
    slice.pull = pull.pull;
    slice.send = {boot_of(1), 5};
    ProofFields fields;
    fields.pull = pull.pull;
    fields.send = slice.send;
    fields.id = pull.transfer.id;
    fields.instance = pull.transfer.instance;
    fields.incarnation = pull.transfer.incarnation;
    fields.sender_node = "node1";
    fields.receiver_node = "node2";
    slice.proof = sender_proof(key_of(pull.transfer.id).secret, fields);
    slice.last = true;
    slice.ranges = {{0, {{0, 64}}}};
    slice.bytes = bytes;
    slice.digest = 42;
    say(std::move(slice));
    auto plan = std::make_shared<TestPlan>();
    plan->bytes = bytes;
    plan->digest = 42;
    post(Compiled{seen<Compile>().back().compile, Reason::kNone, {}, std::move(plan)});
  }
  void offer(const MsgPull& pull, uint64_t chunk, CreditId credit) {
    OfferIn in;
    in.lane = {{1}, 0, 0};
    in.offer.pull = pull.pull;
    in.offer.send = {boot_of(1), 5};
    in.offer.chunk = chunk;
    in.offer.credit = credit;
    in.offer.offer = {++last_offer};
    in.offer.bytes = kChunk;
    in.descriptor = {last_offer};
    in.announced_bytes = kChunk;
    post(in);
  }
  // All credits that the pull has been told of.
  std::size_t credits_of(const MsgPull& pull) const {
    std::size_t count = pull.credits.size();
    for (const MsgUpdate& message : told<MsgUpdate>())
      if (message.pull == pull.pull) count += message.credits.size();
    return count;
  }
  // The answer to a Reserve of so many frames; nothing while it waits.
  std::optional<Reply> reserve(const std::string& id, uint32_t arena, uint64_t frames,
                               bool may_wait = true) {
    ReserveOp op;
    op.op = {{2}, ++ops};
    op.key = key_of(id);
    op.layout = layouts[arena];
    op.bytes = frames * kChunk;
    op.may_wait = may_wait;
    op.lease = seconds(5);
    post(op);
    std::optional<Reply> found;
    for (const Reply& reply : seen<Reply>())
      if (reply.op.op_id == op.op.op_id) found = reply;
    return found;
  }
  ArenaView arena(uint32_t number) const { return engine.snapshot(now).arenas.at(number); }

  std::vector<std::shared_ptr<const TestLayout>> layouts;
  uint64_t next = 0;
  uint64_t ops = 0;
  uint64_t last_offer = 0;
  bool waits = true;  // for room
};

TEST_CASE("a receive lands in its layout's arena, whatever is full beside it") {
  Receiving r;
  CHECK(r.arena(0).segments == 2);
  CHECK(r.arena(1).segments == 1);
  const MsgPull host = r.pull("host", 0, 640);
  r.slice(host, 640);
  CHECK(host.credits.size() == 2);
  CHECK(r.arena(0).granted_bytes == 2 * kChunk);
  CHECK(r.arena(1).granted_bytes == 0);

  SECTION("the other one has its own floor") {
    CHECK(r.pull("device", 1, 640).credits.size() == 2);
    CHECK(r.arena(1).granted_bytes == 2 * kChunk);
  }
  SECTION("chunks are posted into its own segments") {
    const MsgPull device = r.pull("device", 1, 640);
    r.slice(device, 640);
    r.offer(device, 0, device.credits[0].credit);
    r.offer(host, 0, host.credits[0].credit);
    const auto accepted = r.seen<AcceptOffer>();
    REQUIRE(accepted.size() == 2);
    CHECK(arena_of(accepted[0].region) == 1);
    CHECK(arena_of(accepted[1].region) == 0);
  }
  SECTION("who waits takes credits back in its own arena only, and only it waits") {
    const MsgPull idle = r.pull("idle", 1, 640);
    const MsgPull waits = r.pull("waits", 0, 640);
    r.slice(waits, 640);
    CHECK(r.credits_of(waits) == 0);
    CHECK(r.engine.stats().credits_withdrawn == 0);
    // A leg without a slice has what is left over in its arena although one with a slice waits.
    r.post(CancelOp{{{2}, ++r.ops}, Pair::handle_of("idle")});
    CHECK(r.pull("next", 1, 640).credits.size() == 2);
    CHECK(idle.credits.size() == 2);
  }
  SECTION("who will not wait is told of its own arena") {
    r.waits = false;
    CHECK(r.pull("beside", 1, 640).credits.size() == 2);
    (void)r.pull("full", 0, 640);
    CHECK(r.record({2}, Pair::handle_of("full")).reason == Reason::kArenaExhausted);
  }
}

TEST_CASE("a leg that was passed over too often stops its own arena's grants only") {
  EngineConfig config = two_arenas(2);
  config.starvation_passes = 1;
  Receiving r(config);
  // A frame of small regions and one whole: what is large waits, what is small fits.
  const auto started = [&](const std::string& id, uint32_t arena, uint64_t bytes) {
    const MsgPull pull = r.pull(id, arena, bytes);
    r.slice(pull, bytes);
    return pull;
  };
  const auto fill = [&](uint32_t arena) {
    const std::string of = std::to_string(arena);
    REQUIRE(r.credits_of(started("small" + of, arena, 16)) == 1);
    REQUIRE(r.credits_of(started("whole" + of, arena, 64)) == 1);
  };
  fill(0);
  fill(1);
  REQUIRE(r.credits_of(started("large", 0, 64)) == 0);
  REQUIRE(r.credits_of(started("passes", 0, 16)) == 1);
  CHECK(r.credits_of(started("stopped", 0, 16)) == 0);
  CHECK(r.credits_of(started("beside", 1, 16)) == 1);
}

TEST_CASE("reservations stand in line for their own arena") {
  Receiving r;
  REQUIRE(r.reserve("a", 0, 1));
  CHECK(r.arena(0).reserved_bytes == kChunk);
  CHECK(r.arena(1).reserved_bytes == 0);
  CHECK_FALSE(r.reserve("b", 0, 1));
  CHECK(r.reserve("c", 0, 1, false)->error.reason == "ARENA_EXHAUSTED");
  CHECK(r.reserve("d", 1, 1, false)->error.code == Code::kOk);
  CHECK(r.arena(1).reserved_bytes == kChunk);

  SECTION("a Receive into another arena than was promised is refused, and takes nothing") {
    r.post(r.op("a", 1));
    CHECK(r.last_reply().error.reason == "RESERVATION_EXISTS");
    CHECK(r.last_reply().error.field == "layout");
    CHECK(r.pull("a", 0, 640).credits.size() == 2);
  }
  SECTION("the line moves when its own arena has room") {
    r.post(UnregisterLayout{r.layouts[1], Reason::kUnregistered});
    CHECK(r.arena(1).reserved_bytes == 0);
    CHECK(r.engine.snapshot(r.now).reservations == 2);
    r.forget();
    r.pass(seconds(6));  // the first one's lease
    CHECK(r.seen<Reply>().size() == 1);
    CHECK(r.last_reply().reserved_bytes == kChunk);
    CHECK(r.arena(0).reserved_bytes == kChunk);
  }
}

TEST_CASE("quarantine shrinks the promises of its own arena") {
  Receiving r;
  const MsgPull pull = r.pull("q", 0, 640);
  r.slice(pull, 640);
  r.offer(pull, 0, pull.credits.at(0).credit);
  REQUIRE(r.seen<AcceptOffer>().size() == 1);
  REQUIRE(r.reserve("a", 0, 1));
  REQUIRE(r.reserve("b", 1, 1));
  r.post(CancelOp{{{2}, ++r.ops}, Pair::handle_of("q")});
  CHECK(r.arena(0).quarantined_bytes == kChunk);
  CHECK(r.arena(1).quarantined_bytes == 0);
  CHECK(r.arena(0).reserved_bytes == 0);
  CHECK(r.arena(1).reserved_bytes == kChunk);
  r.post(ReceiveEnded{r.seen<AcceptOffer>()[0].landing, false});
  CHECK(r.arena(0).quarantined_bytes == 0);
  CHECK(r.arena(0).reserved_bytes == kChunk);
}

// node1 sends to node2, which the test plays; `id`'s slices are of `chunks` chunks.
struct Sending : Lone {
  Sending() : Lone(two_arenas(1), 1) {
    host = layout;
    device = layout_in(1, *layout);
  }
  void open_in(uint32_t arena, const std::string& id, uint64_t pull, uint64_t chunks,
               std::vector<uint64_t> credits) {
    layout = arena == 0 ? host : device;
    send(id, 0, {0, chunks * kChunk / 10}, true);
    say(0, pull_of(id, pull, std::move(credits)));
    resolve();
    compile_new();
  }
  void compile_new() {
    for (const Compile& compile : seen<Compile>()) {
      if (!compiled.insert(compile.compile).second) continue;
      auto plan = std::make_shared<TestPlan>();
      for (const GroupRanges& group : compile.offer)
        for (const Range& range : group.ranges) plan->bytes += range.size() * 10;
      plan->digest = 42;
      post(Compiled{compile.compile, Reason::kNone, {}, std::move(plan)});
    }
  }
  std::vector<std::size_t> gathers() const {
    std::vector<std::size_t> counts(2);
    for (const Gather& gather : seen<Gather>()) ++counts[arena_of(gather.region)];
    return counts;
  }
  ArenaView arena(uint32_t number) const { return engine.snapshot(now).arenas.at(number); }
  using Counts = std::vector<std::size_t>;

  std::shared_ptr<const TestLayout> host;
  std::shared_ptr<const TestLayout> device;
  std::set<CompileId> compiled;
};

TEST_CASE("a send is staged in its layout's arena, whatever is full beside it") {
  Sending s;
  s.open_in(0, "host", 1, 5, {1, 2, 3, 4, 5});
  CHECK(s.gathers() == Sending::Counts{3, 0});
  s.open_in(1, "device", 2, 5, {1, 2, 3, 4, 5});
  CHECK(s.gathers() == Sending::Counts{3, 3});
  CHECK(s.arena(0).staging_bytes == 3 * kChunk);
  CHECK(s.arena(1).staging_bytes == 3 * kChunk);
}

TEST_CASE("chunks staged ahead are counted for each arena") {
  Sending s;
  s.open_in(0, "host", 1, 5, {});
  CHECK(s.gathers() == Sending::Counts{1, 0});
  s.open_in(1, "device", 2, 5, {});
  CHECK(s.gathers() == Sending::Counts{1, 1});
  s.open_in(1, "more", 3, 5, {});
  CHECK(s.gathers() == Sending::Counts{1, 1});
}

TEST_CASE(
    "a packed copy is staged in its own arena; the leg goes on in that of the pages after it") {
  Sending s;
  s.layout = s.device;
  SendOp packed;
  packed.op = {{1}, 1};
  packed.client_handle = std::hash<std::string>{}("a") | 1;
  packed.key = key_of("a");
  packed.layout = s.device;
  packed.offer = {{0, {{0, 12}}}};  // two chunks
  packed.packed_bytes = 120;
  packed.lease = seconds(10);
  s.post(packed);
  Packed made;
  made.copy = s.seen<MakePacked>().back().copy;
  made.layout = s.host;
  made.blocks = {{0, 0, {0}}};
  s.post(std::move(made));
  s.send("a", 1, {12, 24}, true);
  s.say(0, s.pull_of("a", 1, {1, 2, 3}));
  s.resolve();
  s.compile_new();
  s.gather_all();
  CHECK(s.gathers() == Sending::Counts{2, 0});
  s.update({}, {{0, 0}});
  CHECK(s.gathers() == Sending::Counts{2, 0});
  SECTION("when all of it is acknowledged, what it has ahead counts in the other arena") {
    s.update({}, {{0, 1}});
    CHECK(s.gathers() == Sending::Counts{2, 2});  // one of them with a credit
    s.open_in(1, "device", 2, 1, {});
    CHECK(s.gathers() == Sending::Counts{2, 2});
    s.open_in(0, "host", 3, 1, {});
    CHECK(s.gathers() == Sending::Counts{3, 2});
  }
  SECTION("a leg that was to go on here and loses the slice goes on there") {
    s.update({}, {{0, 1}});
    s.post(RevokeOp{{{1}, 9}, std::hash<std::string>{}("a") | 1, 12});
    s.open_in(1, "device", 2, 5, {});
    CHECK(s.gathers() == Sending::Counts{2, 3});
  }
}

TEST_CASE("transfers through several small arenas complete side by side") {
  EngineConfig config = small_config(1);
  config.arenas = {{{3 * kChunk}}, {{4 * kChunk}}, {{3 * kChunk}}};
  EngineConfig other = config;
  other.boot = boot_of(2);
  other.node = "node2";
  Pair pair(config, other);
  const auto from = pair.s_layout;
  const auto to = pair.r_layout;
  const std::vector<std::string> ids{"a", "b", "c", "d", "e", "f"};
  for (uint32_t i = 0; i < ids.size(); ++i) {
    pair.s_layout = layout_in(i % 3, *from);
    pair.r_layout = layout_in((i + 1) % 3, *to);
    pair.s.post(pair.send_op(ids[i], 0, {0, 64}, true));
    pair.r.post(pair.receive_op(ids[i], {0, 64}));
  }
  pair.run();
  for (const std::string& id : ids) {
    CHECK(pair.received(id).state == TransferState::kCompleted);
    CHECK(pair.sent(id).state == TransferState::kDelivered);
  }
  for (const Box* box : {&pair.s, &pair.r})
    for (const ArenaView& arena : box->engine.snapshot(box->now).arenas)
      CHECK(arena.free_bytes == arena.total_bytes);
}

}  // namespace
}  // namespace kvferry::engine::test
