// Legs whose streams are equal: what is gathered for one of them serves the others. The test plays
// all receivers.
#include <algorithm>
#include <deque>

#include "tests/unit/engine_lone.h"

namespace kvferry::engine::test {
namespace {

using std::chrono::seconds;

constexpr uint64_t kTokens = 32;  // 320 bytes: five chunks

// Offers of one chunk, by pull.
std::map<uint64_t, SendOffer> offers_of(const Box& s, uint64_t chunk) {
  std::map<uint64_t, SendOffer> found;
  for (const SendOffer& offer : s.seen<SendOffer>())
    if (offer.offer.chunk == chunk) found[offer.offer.pull.counter] = offer;
  return found;
}

// Several receiver ranks (pulls 1, 2, ...) of one instance that need the same of one sender rank.
struct Sharing : Lone {
  explicit Sharing(EngineConfig config = small_config(1), uint32_t lanes = 2)
      : Lone(std::move(config), lanes) {
    source = 1;
  }

  static std::vector<uint64_t> numbers(uint64_t count) {
    std::vector<uint64_t> all;
    for (uint64_t number = 1; number <= count; ++number) all.push_back(number);
    return all;
  }
  // All legs stand before anything is compiled.
  void open_all(uint32_t ranks, uint64_t tokens, uint64_t credits) {
    send("a", 0, {0, tokens}, true);
    std::vector<uint32_t> all;
    for (uint32_t rank = 0; rank < ranks; ++rank) all.push_back(rank);
    for (uint32_t rank = 0; rank < ranks; ++rank) {
      say(0, pull_of("a", rank + 1, numbers(credits), 2, rank));
      resolve(all);
    }
    compile_all();
  }
  // A receiver of its own, with one rank.
  void pull_alone(uint64_t pull, uint64_t credits) {
    say(0, pull_of("a", pull, numbers(credits), static_cast<uint8_t>(10 + pull)));
    resolve();
    compile_all();
  }
  // Two receivers with a chunk and a credit each.
  void two_alone() {
    send("a", 0, {0, 6}, true, 2);
    pull_alone(1, 1);
    pull_alone(2, 1);
  }
  void end(uint64_t pull, Outcome outcome = Outcome::kCancelled) {
    MsgEnd message;
    message.pull = {boot_of(2), pull};
    message.transfer = wire_name(key_of("a"), incarnation_of(1));
    message.outcome = outcome;
    message.reason = outcome == Outcome::kCompleted ? Reason::kNone : Reason::kCancelled;
    say(0, message);
  }
  // All lanes, after the rails process was gone.
  void lanes_again() {
    for (uint32_t lane = 0; lane < 2; ++lane) {
      next[lane] = 0;
      const auto on = [&](ControlMessage message) {
        post(MessageIn{{{1}, lane, 1}, next[lane]++, std::move(message)});
      };
      post(LaneReopened{{{1}, lane, 1}});
      post(LaneConnected{{{1}, lane, 1}});
      on(MsgHello{false});
      on(MsgHello{true});
    }
  }
  void sends_end(const std::vector<SendOffer>& offers) {
    for (const SendOffer& offer : offers) post(OfferSendEnded{offer.offer.offer});
  }
  uint64_t staging() const { return arena().staging_bytes; }
  uint64_t gathered() const { return engine.stats().chunks_gathered; }
  uint64_t shared() const { return engine.stats().chunks_shared; }
};

TEST_CASE("eight legs with equal streams: each chunk is gathered once") {
  Sharing s;
  s.open_all(8, kTokens, 5);
  REQUIRE(s.seen<Gather>().size() == 5);
  CHECK(s.staging() == 5 * kChunk);
  CHECK(s.seen<SendOffer>().empty());
  CHECK_FALSE(s.status("a").released);
  s.gather_all();
  CHECK(s.status("a").released);  // five gathers, and nobody reads the source any more
  const auto offers = s.seen<SendOffer>();
  CHECK(offers.size() == 40);
  for (uint64_t chunk = 0; chunk < 5; ++chunk) {
    const auto of = offers_of(s, chunk);
    REQUIRE(of.size() == 8);
    for (const auto& [pull, offer] : of) CHECK(offer.region == s.seen<Gather>().at(chunk).region);
  }
  CHECK(s.gathered() == 5);
  CHECK(s.shared() == 35);
}

TEST_CASE("a shared region is free when the last leg's ack and the last send have come") {
  Sharing s;
  s.open_all(3, 6, 1);
  s.gather_all();
  const auto offers = s.seen<SendOffer>();
  REQUIRE(offers.size() == 3);
  s.sends_end({offers[0], offers[1]});
  s.update({}, {{0, 0}}, 1);
  s.update({}, {{0, 0}}, 2);
  CHECK(s.staging() == kChunk);
  s.update({}, {{0, 0}}, 3);
  CHECK(s.status("a").state == TransferState::kDelivered);
  CHECK(s.staging() == kChunk);  // UCX still reads it
  s.sends_end({offers[2]});
  CHECK(s.staging() == 0);
}

TEST_CASE("a checksum of the region serves all") {
  Sharing s;
  s.open_all(2, 6, 1);
  Check check;
  check.kind = CheckKind::kXxh3;
  check.value[3] = 9;
  s.post(CopyEnded{s.seen<Gather>().at(0).copy, CopyOutcome::kOk, check});
  REQUIRE(s.seen<SendOffer>().size() == 2);
  for (const SendOffer& offer : s.seen<SendOffer>()) CHECK(offer.offer.check == check);
}

TEST_CASE("who comes later takes what is there, whichever chunks, and gathers the rest") {
  EngineConfig config = small_config(1);
  config.staged_ahead = 0;
  Sharing s(config);
  s.send("a", 0, {0, kTokens}, true, 2);
  s.pull_alone(1, 2);
  s.gather_all();
  const auto first = s.seen<SendOffer>();
  REQUIRE(first.size() == 2);
  s.sends_end(first);
  s.update({3, 4}, {{0, 0}, {0, 1}}, 1);  // chunks 0 and 1 are gone, 2 and 3 under way
  CHECK(s.staging() == 2 * kChunk);
  s.forget();
  s.pull_alone(2, 3);
  REQUIRE(s.seen<Gather>().size() == 1);  // one more credit than there are chunks under way
  CHECK(s.seen<Gather>().at(0).offset == 0);
  s.gather_all();
  CHECK(offers_of(s, 0).size() == 1);
  CHECK(s.seen<SendOffer>().size() == 1);  // 2 and 3 are still being gathered, by the other's turn
}

TEST_CASE("legs that are apart meet again: chunks behind the cursor that are there are taken") {
  EngineConfig config = small_config(1);
  config.staged_ahead = 0;
  Sharing s(config);
  s.send("a", 0, {0, kTokens}, true, 2);
  s.pull_alone(1, 3);
  s.gather_all();
  s.pull_alone(2, 1);
  s.gather_all();
  CHECK(s.shared() == 1);
  CHECK(offers_of(s, 0).size() == 2);
  s.update({2, 3, 4, 5}, {}, 2);  // 1 and 2 are there, 3 and 4 are to be gathered
  s.gather_all();
  CHECK(s.shared() == 3);
  CHECK(s.gathered() == 5);
  s.update({4, 5}, {}, 1);  // which now serve the first
  CHECK(s.shared() == 5);
  CHECK(s.gathered() == 5);
  CHECK(s.staging() == 5 * kChunk);
  s.sends_end(s.seen<SendOffer>());
  for (uint64_t pull = 1; pull <= 2; ++pull)
    s.update({}, {{0, 0}, {0, 1}, {0, 2}, {0, 3}, {0, 4}}, pull);
  CHECK(s.status("a").state == TransferState::kDelivered);
  CHECK(s.staging() == 0);
}

TEST_CASE("chunks of a later slice are not brought before the slice that the leg is at") {
  EngineConfig config = small_config(1);
  config.staged_ahead = 0;
  Sharing s(config);
  s.send("a", 0, {0, 6}, false, 2);
  s.send("a", 1, {6, 12}, true, 2);
  s.pull_alone(1, 2);
  s.gather_all();
  REQUIRE(s.gathered() == 2);
  s.sends_end(s.seen<SendOffer>());
  s.update({}, {{0, 0}}, 1);
  s.pull_alone(2, 1);
  CHECK(s.shared() == 0);
  s.gather_all();
  CHECK(s.gathered() == 3);
  s.update({2}, {}, 2);
  CHECK(s.shared() == 1);
}

TEST_CASE("a leg that ends while its gather runs leaves the region to the other") {
  Sharing s;
  s.two_alone();
  REQUIRE(s.seen<Gather>().size() == 1);
  s.end(1);
  CHECK(s.staging() == kChunk);
  s.gather_all();
  REQUIRE(s.seen<SendOffer>().size() == 1);
  CHECK(s.seen<SendOffer>()[0].offer.pull.counter == 2);
  CHECK(s.gathered() == 1);
  CHECK(s.shared() == 0);
  s.sends_end(s.seen<SendOffer>());
  s.update({}, {{0, 0}}, 2);
  CHECK(s.status("a").state == TransferState::kDelivered);
  CHECK(s.staging() == 0);
}

TEST_CASE("a leg that ends while it shares leaves the region to the one that had it gathered") {
  Sharing s;
  s.two_alone();
  s.gather_all();
  s.sends_end(s.seen<SendOffer>());
  s.end(2);
  CHECK(s.staging() == kChunk);
  s.end(1, Outcome::kCompleted);
  CHECK(s.status("a").state == TransferState::kDelivered);
  CHECK(s.staging() == 0);
}

TEST_CASE("a receiver that takes nothing holds up nobody, and its region alone") {
  Sharing s;
  s.send("a", 0, {0, kTokens}, true, 2);
  s.pull_alone(1, 1);
  s.pull_alone(2, 5);
  s.gather_all();
  s.sends_end(s.seen<SendOffer>());
  s.update({}, {{0, 0}, {0, 1}, {0, 2}, {0, 3}, {0, 4}}, 2);
  CHECK(s.told<MsgEnd>().size() == 1);  // DELIVERED
  CHECK(s.staging() == 2 * kChunk);     // chunk 0 and one that is staged ahead
  s.end(1);
  CHECK(s.staging() == 0);
}

TEST_CASE("a gather that fails fails all who waited for it") {
  Sharing s;
  s.two_alone();
  s.post(CopyEnded{s.seen<Gather>().at(0).copy, CopyOutcome::kFailed, {}});
  REQUIRE(s.told<MsgEnd>().size() == 2);
  for (const MsgEnd& end : s.told<MsgEnd>()) CHECK(end.reason == Reason::kGatherFailed);
  CHECK(s.staging() == 0);
  CHECK(s.status("a").released);
}

TEST_CASE("who is staged without a credit counts as ahead, with or without a gather") {
  Sharing s;  // E: 1
  s.open_all(3, kTokens, 0);
  s.gather_all();
  CHECK(s.seen<Gather>().size() == 1);
  CHECK(s.shared() == 0);
  s.update({1}, {}, 1);  // chunk 0 is offered; the turn ahead is still this leg's
  CHECK(s.seen<Gather>().size() == 2);
  CHECK(s.shared() == 0);
  s.update({1}, {}, 3);  // with a credit it takes what is there, whoever has the turn
  CHECK(s.shared() == 1);
  CHECK(s.seen<SendOffer>().size() == 2);
  s.gather_all();
  s.update({2}, {}, 1);  // now the turn is leg 2's, which finds a chunk there
  CHECK(s.seen<Gather>().size() == 2);
  CHECK(s.shared() == 2);
}

TEST_CASE("lane down: only the offers that went by it go again, from the region all share") {
  Sharing s;
  s.open_all(4, 6, 1);
  s.gather_all();
  const auto offers = s.seen<SendOffer>();
  REQUIRE(offers.size() == 4);
  const uint32_t lane = offers[0].lane.lane;
  const auto lost = static_cast<uint64_t>(
      std::count_if(offers.begin(), offers.end(),
                    [&](const SendOffer& offer) { return offer.lane.lane == lane; }));
  CHECK(lost == 2);
  s.forget();
  s.post(LaneFailed{offers[0].lane});
  REQUIRE(s.seen<SendOffer>().size() == lost);
  for (const SendOffer& again : s.seen<SendOffer>()) CHECK(again.region == offers[0].region);
  CHECK(s.seen<Gather>().empty());
  CHECK(s.staging() == kChunk);
}

TEST_CASE("a refused offer of a shared region goes again with the next credit") {
  Sharing s;
  s.open_all(2, 6, 1);
  s.gather_all();
  const auto offers = s.seen<SendOffer>();
  REQUIRE(offers.size() == 2);
  s.post(RefuseIn{offers[1].lane, {offers[1].offer.pull, offers[1].offer.offer}});
  s.sends_end(offers);
  s.update({}, {{0, 0}}, offers[0].offer.pull.counter);
  CHECK(s.staging() == kChunk);
  s.update({2}, {}, offers[1].offer.pull.counter);
  REQUIRE(s.seen<SendOffer>().size() == 3);
  CHECK(s.seen<SendOffer>()[2].region == offers[1].region);
}

TEST_CASE("the rails process dies: its sends have ended, what is staged goes again") {
  Sharing s;
  s.open_all(2, 6, 1);
  s.gather_all();
  REQUIRE(s.seen<SendOffer>().size() == 2);
  const memory::Region region = s.seen<SendOffer>()[0].region;
  s.post(RailsDied{});
  CHECK(s.staging() == kChunk);  // both chunks are wanted
  s.forget();
  s.post(RailsUp{});
  s.lanes_again();
  REQUIRE(s.seen<SendOffer>().size() == 2);
  for (const SendOffer& offer : s.seen<SendOffer>()) CHECK(offer.region == region);
  CHECK(s.seen<Gather>().empty());
  s.sends_end(s.seen<SendOffer>());
  s.post(CancelOp{{{1}, 9}, std::hash<std::string>{}("a") | 1});
  CHECK(s.staging() == 0);  // nothing is left that reads it
}

TEST_CASE("a Revoke waits for the one gather of all legs, and the region goes with it") {
  Sharing s;
  s.open_all(3, 6, 1);
  REQUIRE(s.seen<Gather>().size() == 1);
  s.post(RevokeOp{{{1}, 77}, std::hash<std::string>{}("a") | 1, 0});
  CHECK(s.told<MsgDrop>().size() == 3);
  CHECK(s.staging() == kChunk);
  const auto answered = [&] {
    const auto replies = s.seen<Reply>();
    return std::any_of(replies.begin(), replies.end(),
                       [](const Reply& reply) { return reply.op.op_id == 77; });
  };
  CHECK_FALSE(answered());
  s.gather_all();
  CHECK(answered());
  CHECK(s.staging() == 0);
  CHECK(s.seen<SendOffer>().empty());
  s.send("a", 1, {0, 6}, true);  // anew: the legs still have a credit each, and share again
  s.compile_all();
  s.gather_all();
  CHECK(s.seen<SendOffer>().size() == 3);
  CHECK(s.gathered() == 1);
  CHECK(s.shared() == 2);
}

TEST_CASE("equal digests alone, other streams and other sends share nothing") {
  EngineConfig config = small_config(1);
  config.staged_ahead = 0;
  SECTION("the plans read other bytes") {
    Sharing s(config);
    s.source = 0;
    s.open_all(2, 6, 1);
    CHECK(s.seen<Gather>().size() == 2);
    s.gather_all();
    CHECK(s.shared() == 0);
  }
  SECTION("another transfer") {
    Sharing s(config);
    for (const std::string id : {"a", "b"}) {
      s.send(id, 0, {0, 6}, true);
      s.say(0, s.pull_of(id, id == "a" ? 1 : 2, {1}));
      s.resolve();
      s.compile_all();
    }
    CHECK(s.seen<Gather>().size() == 2);
    s.gather_all();
    CHECK(s.shared() == 0);
  }
  SECTION("another slice") {
    Sharing s(config);
    s.send("a", 0, {0, 6}, false);
    s.send("a", 1, {0, 6}, true);
    s.say(0, s.pull_of("a", 1, {1, 2}));
    s.resolve();
    s.compile_all();
    CHECK(s.seen<Gather>().size() == 2);
    s.gather_all();
    CHECK(s.shared() == 0);
  }
}

TEST_CASE("chunks that a link cuts or checks in another way are not shared") {
  const auto [chunk_bytes, check, shared] =
      GENERATE(table<uint64_t, CheckKind, uint64_t>({{kChunk, CheckKind::kNone, 1},
                                                     {kChunk / 2, CheckKind::kNone, 0},
                                                     {kChunk, CheckKind::kXxh3, 0}}));
  EngineConfig config = small_config(1);
  config.staged_ahead = 0;
  Sharing s(config);
  s.send("a", 0, {0, 6}, true, 2);
  s.pull_alone(1, 2);
  const BootId third = boot_of(3);
  s.post(LinkUp{{2}, "node3", third, true, 1, chunk_bytes, 64, check});
  s.post(LaneConnected{{{2}, 0, 0}});
  MsgPull pull = s.pull_of("a", 1, {1, 2}, 30);
  pull.pull.receiver = third;
  ProofFields fields;
  fields.pull = pull.pull;
  fields.id = pull.transfer.id;
  fields.instance = pull.transfer.instance;
  fields.incarnation = pull.transfer.incarnation;
  fields.sender_node = "node1";
  fields.receiver_node = "node3";
  pull.proof = receiver_proof(key_of("a").secret, fields);
  uint64_t next = 0;
  for (ControlMessage message :
       {ControlMessage{MsgHello{false}}, ControlMessage{MsgHello{true}}, ControlMessage{pull}})
    s.post(MessageIn{{{2}, 0, 0}, next++, std::move(message)});
  s.resolve();
  s.compile_all();
  s.gather_all();
  CHECK(s.shared() == shared);
  CHECK(s.seen<SendOffer>().size() == 1 + ceil_div(uint64_t{60}, chunk_bytes));
}

TEST_CASE(
    "of a stream that is wholly acknowledged nothing is kept, nor of a leg's that has ended") {
  Sharing s;
  s.send("a", 0, {0, 6}, true, 3);
  const uint64_t before = TestPlan::alive;
  s.pull_alone(1, 1);
  s.pull_alone(2, 1);
  s.gather_all();
  s.sends_end(s.seen<SendOffer>());
  s.forget();
  CHECK(TestPlan::alive == before + 1);  // one plan for both
  s.update({}, {{0, 0}}, 1);
  CHECK(TestPlan::alive == before + 1);
  s.end(2);
  CHECK(TestPlan::alive == before);
  s.pull_alone(3, 1);  // who comes after all that gathers for itself
  CHECK(s.seen<Gather>().size() == 1);
}

// Eight receivers of one transfer, each with `credits` regions at a time: every step each takes
// what it is offered, and acknowledges its oldest chunk if `ready` says so. Returns the chunks
// gathered.
struct Crowd {
  static constexpr uint32_t kReceivers = 8;
  static constexpr uint64_t kChunks = 60;
  uint64_t credits = 8;
  uint64_t frames = 128;
  std::function<bool(uint32_t receiver, uint64_t step)> ready;
  std::function<uint64_t(uint32_t receiver)> starts = [](uint32_t) { return 0; };

  uint64_t gathers() const {
    EngineConfig config = small_config(1);
    config.arenas = {{{frames * kChunk}}};
    config.staged_ahead = 2;
    Sharing s(config);
    s.verify = false;
    s.send("a", 0, {0, kChunks * kChunk / 10}, true, kReceivers);
    std::vector<std::deque<uint64_t>> taken(kReceivers);
    std::vector<uint64_t> last_credit(kReceivers, credits);
    uint64_t acked = 0;
    for (uint64_t step = 0; acked < kReceivers * kChunks; ++step) {
      REQUIRE(step < 100 * kChunks);
      for (uint32_t r = 0; r < kReceivers; ++r)
        if (starts(r) == step) s.pull_alone(r + 1, credits);
      for (std::size_t before = SIZE_MAX; before != s.done.size();) {
        before = s.done.size();
        s.gather_all();
      }
      const auto offers = s.seen<SendOffer>();
      s.forget();
      for (const SendOffer& offer : offers)
        taken[offer.offer.pull.counter - 1].push_back(offer.offer.chunk);
      s.sends_end(offers);
      for (uint32_t r = 0; r < kReceivers; ++r) {
        if (taken[r].empty() || !ready(r, step)) continue;
        const uint64_t chunk = taken[r].front();
        taken[r].pop_front();
        ++acked;
        s.update({++last_credit[r]}, {{0, chunk}}, r + 1);
      }
    }
    s.engine.check_invariants();
    CHECK(s.status("a").state == TransferState::kDelivered);
    CHECK(s.staging() == 0);
    CHECK(s.gathered() + s.shared() == kReceivers * kChunks);
    return s.gathered();
  }
};

TEST_CASE("how much eight receivers of the same share") {
  const auto random = [](uint32_t receiver, uint64_t step) {
    uint64_t word = (step * 8 + receiver + 1) * 0x9E3779B97F4A7C15ULL;
    word = (word ^ (word >> 29)) * 0xBF58476D1CE4E5B9ULL;
    return word >> 40;
  };
  Crowd crowd;
  SECTION("all of one pace") {
    crowd.ready = [](uint32_t, uint64_t) { return true; };
    CHECK(crowd.gathers() == Crowd::kChunks);
  }
  SECTION("each now and then, by chance") {
    crowd.ready = [&](uint32_t r, uint64_t step) { return random(r, step) % 3 == 0; };
    const uint64_t gathers = crowd.gathers();
    INFO(gathers);
    CHECK(gathers <= 70);
  }
  SECTION("one at a quarter of the others' pace") {
    crowd.ready = [](uint32_t r, uint64_t step) { return r != 0 || step % 4 == 0; };
    const uint64_t gathers = crowd.gathers();
    INFO(gathers);
    CHECK(gathers <= 100);
  }
  SECTION("they come one after another, three steps apart") {
    crowd.ready = [](uint32_t, uint64_t) { return true; };
    crowd.starts = [](uint32_t r) { return uint64_t{3} * r; };
    const uint64_t gathers = crowd.gathers();
    INFO(gathers);
    CHECK(gathers <= 85);
  }
  SECTION("in an arena with room for a quarter of what they could have under way") {
    crowd.frames = 16;
    crowd.ready = [&](uint32_t r, uint64_t step) { return random(r, step) % 3 == 0; };
    const uint64_t gathers = crowd.gathers();
    INFO(gathers);
    CHECK(gathers <= 70);
  }
}

}  // namespace
}  // namespace kvferry::engine::test
