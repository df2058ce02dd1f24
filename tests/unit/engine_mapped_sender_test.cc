// Mapped arenas at the sender, one engine: it writes the receiver's regions by itself, tells what
// is written, and says when it writes no more.
#include "tests/unit/engine_lone.h"

namespace kvferry::engine::test {
namespace {

constexpr uint32_t kTheirs = 3;  // the peer's mapped arena, as it is numbered there

// The test plays the receiver's daemon.
struct Sending : Lone {
  explicit Sending(EngineConfig config = small_config(1)) : Lone(std::move(config)) {
    post(ArenaMapped{{1}, kTheirs});
  }
  void pull_mapped(const std::string& id, uint64_t counter) {
    MsgPull pull = pull_of(id, counter, {});
    pull.mapped = kTheirs;
    say(0, std::move(pull));
  }
  // A send with one slice, announced on a mapped leg.
  void open_mapped(const std::string& id, uint64_t chunks, bool last = true) {
    send(id, 0, {0, chunks * kChunk / 10}, last);
    pull_mapped(id, 1);
    resolve();
    compile_all();
  }
  static CreditGrant at(uint64_t credit, uint64_t bytes = kChunk) {
    return {{credit}, bytes, RegionPlace{9, credit * kChunk}};
  }
  void lend(std::vector<uint64_t> credits) {
    MsgUpdate update;
    update.pull = {boot_of(2), 1};
    for (const uint64_t credit : credits) update.credits.push_back(at(credit));
    update.oldest = 1;
    say(0, std::move(update));
  }
  void end(Outcome outcome = Outcome::kCancelled, uint64_t pull = 1, uint32_t lane = 0) {
    MsgEnd end;
    end.pull = {boot_of(2), pull};
    end.outcome = outcome;
    end.reason = Reason::kCancelled;
    end.mapped = true;
    say(lane, std::move(end));
  }
  void revoke(const std::string& id, uint64_t from) {
    post(RevokeOp{{{1}, 77}, std::hash<std::string>{}(id) | 1, from});
  }
  void lose_lane_0() { post(LaneFailed{{{1}, 0, 0}}); }
  void lose_lane_0_again() {
    post(LaneReopened{{{1}, 0, 1}});
    post(LaneFailed{{{1}, 0, 1}});
  }
};

TEST_CASE("what is mapped is told once, and again on each new control lane") {
  Sending s;
  CHECK(s.told<MsgMapped>() == std::vector<MsgMapped>{{kTheirs}});
  s.post(ArenaMapped{{1}, kTheirs});
  s.post(ArenaMapped{{8}, kTheirs});  // of a link that is gone
  s.post(ArenaMapped{kLoopedLink, 0});
  CHECK(s.told<MsgMapped>().size() == 1);
  CHECK(s.engine.snapshot(s.now).links.at(0).mapped == std::vector<uint32_t>{kTheirs});
  s.forget();
  s.lose_lane_0();
  CHECK(s.told<MsgMapped>() == std::vector<MsgMapped>{{kTheirs}});
}

TEST_CASE("a mapped PULL for an arena that is not mapped here, or with credits, ends PROTOCOL") {
  Sending s;
  s.send("a", 0, {0, 6}, true);
  MsgPull pull = s.pull_of("a", 1, {});
  pull.mapped = kTheirs + 1;
  s.say(0, pull);
  pull = s.pull_of("a", 2, {1});
  pull.mapped = kTheirs;
  s.say(0, pull);
  REQUIRE(s.told<MsgEnd>().size() == 2);
  for (const MsgEnd& end : s.told<MsgEnd>()) CHECK(end.reason == Reason::kProtocol);
  CHECK(s.drops(DropCause::kProtocol) == 2);
  CHECK(s.seen<ResolvePull>().empty());
  CHECK(s.status("a").state == TransferState::kOpen);
}

TEST_CASE("a chunk is gathered into the region of its credit, and nothing is staged or offered") {
  Sending s;
  s.open_mapped("a", 2);
  CHECK(s.seen<Gather>().empty());  // not without a credit
  s.lend({1, 2});
  const auto gathers = s.seen<Gather>();
  REQUIRE(gathers.size() == 2);
  for (uint64_t i = 0; i < 2; ++i) {
    CHECK(gathers[i].mapped == PeerArena{{1}, kTheirs});
    CHECK(gathers[i].region == memory::Region{9, (i + 1) * kChunk, kChunk});
    CHECK(gathers[i].offset == i * kChunk);
  }
  CHECK(s.arena().free_bytes == s.arena().total_bytes);
  CHECK(s.told<MsgWritten>().empty());
  CHECK_FALSE(s.status("a").released);
  s.gather_all();
  CHECK(s.status("a").released);  // the source is read no more, whatever becomes of the acks
  const auto written = s.told<MsgWritten>();
  REQUIRE(written.size() == 2);
  CHECK(written[1] == MsgWritten{{boot_of(2), 1}, 0, 1, {2}, {}});
  CHECK(s.seen<SendOffer>().empty());
  s.update({}, {{0, 0}, {0, 1}});
  CHECK(s.status("a").state == TransferState::kDelivered);
  CHECK(s.engine.stats().chunks_written == 2);
}

TEST_CASE("credits of a mapped pull name their regions, of another one they do not") {
  Sending s;
  s.open_mapped("a", 2);
  s.update({1}, {});
  CHECK(s.seen<Gather>().empty());
  CHECK(s.drops(DropCause::kProtocol) == 1);
  Lone other;
  other.open("a", 2, {});
  MsgUpdate update;
  update.pull = {boot_of(2), 1};
  update.credits = {Sending::at(1)};
  other.say(0, update);
  CHECK(other.drops(DropCause::kProtocol) == 1);
}

TEST_CASE("a credit for less than the chunk ends the leg, and one is used once") {
  Sending s;
  s.open_mapped("a", 2);
  s.lend({1});
  s.lend({1});
  CHECK(s.seen<Gather>().size() == 1);
  MsgUpdate update;
  update.pull = {boot_of(2), 1};
  update.credits = {Sending::at(2, 40)};
  s.say(0, update);
  CHECK(s.seen<Gather>().size() == 1);
  CHECK(s.status("a").reason == Reason::kProtocol);
}

TEST_CASE("WRITTEN is told again by each resync until its ack") {
  Sending s;
  s.open_mapped("a", 3);
  s.lend({1, 2, 3});
  s.gather_all();
  s.update({}, {{0, 1}});
  s.forget();
  s.lose_lane_0();
  const auto written = s.told<MsgWritten>();
  REQUIRE(written.size() == 2);
  CHECK(written[0].chunk == 0);
  CHECK(written[1].chunk == 2);
  CHECK(s.seen<Gather>().empty());  // what was lost is told again, not written again
}

TEST_CASE("a gather that fails ends the leg, and so does the link's end") {
  Sending s;
  s.open_mapped("a", 2);
  s.lend({1, 2});
  s.post(CopyEnded{s.seen<Gather>()[0].copy, CopyOutcome::kFailed, {}});
  CHECK(s.status("a").reason == Reason::kGatherFailed);
  CHECK(s.status("a").memory_in_use);

  Sending lost;
  lost.open_mapped("a", 2);
  lost.lend({1});
  lost.post(LinkEnded{{1}, Reason::kPeerLost});
  CHECK(lost.status("a").reason == Reason::kPeerLost);
  CHECK_FALSE(lost.status("a").released);  // the gather reads the source as long as it runs
  lost.gather_all();
  CHECK(lost.status("a").released);
}

TEST_CASE("a Revoke: what was written is told until its ack, what has no chunk goes back") {
  Sending s;
  s.open_mapped("a", 4);
  s.lend({1, 2, 3});  // chunks 0 to 2 are being gathered
  const auto gathers = s.seen<Gather>();
  REQUIRE(gathers.size() == 3);
  s.post(CopyEnded{gathers[0].copy, CopyOutcome::kOk, {}});
  s.post(CopyEnded{gathers[1].copy, CopyOutcome::kOk, {}});
  MsgUpdate more;
  more.pull = {boot_of(2), 1};
  more.credits = {Sending::at(4)};
  s.say(0, more);  // chunk 3 as well
  s.update({}, {{0, 0}});
  s.forget();
  s.revoke("a", 0);
  CHECK(s.told<MsgDrop>().size() == 1);
  CHECK(s.told<MsgWritten>().empty());
  s.post(CopyEnded{gathers[2].copy, CopyOutcome::kOk, {}});
  // No chunk is left for it: the region is the receiver's again.
  REQUIRE(s.told<MsgWritten>().size() == 1);
  CHECK(s.told<MsgWritten>()[0].credit == CreditId{3});
  s.forget();
  s.lose_lane_0();
  std::set<uint64_t> told;
  for (const MsgWritten& written : s.told<MsgWritten>()) told.insert(written.credit.value);
  CHECK(told == std::set<uint64_t>{2, 3});
  MsgUpdate acks;
  acks.pull = {boot_of(2), 1};
  acks.acks = {{0, 1}, {0, 2}};
  s.say(1, acks);
  s.forget();
  s.lose_lane_0_again();
  CHECK(s.told<MsgMapped>().size() == 1);  // the resync
  CHECK(s.told<MsgWritten>().empty());
}

TEST_CASE("the credit of a gather that runs at a Revoke serves what is sent anew") {
  Sending s;
  s.open_mapped("a", 1);
  s.lend({1});
  const Gather gather = s.seen<Gather>().at(0);
  s.revoke("a", 0);
  CHECK(s.seen<Reply>().back().op.op_id != 77);  // not while it reads the pages
  s.send("a", 1, {0, 6}, true);
  s.compile_all();
  CHECK(s.seen<Gather>().size() == 1);
  s.forget();
  s.post(CopyEnded{gather.copy, CopyOutcome::kOk, {}});
  CHECK(s.last_reply().op.op_id == 77);
  CHECK(s.told<MsgWritten>().empty());
  REQUIRE(s.seen<Gather>().size() == 1);
  CHECK(s.seen<Gather>()[0].region == gather.region);
}

TEST_CASE("a Revoke gives unused credits back at once, but those that a chunk waits for") {
  EngineConfig config = small_config(1);
  config.mapped_gathers = 1;
  Sending s(config);
  s.open_mapped("a", 4, false);
  s.send("a", 1, {26, 38}, true);  // two chunks more
  s.compile_all();
  s.lend({1, 2, 3, 4, 5, 6});
  CHECK(s.seen<Gather>().size() == 1);  // five credits in hand, for three chunks and two
  s.forget();
  s.revoke("a", 26);
  REQUIRE(s.told<MsgWritten>().size() == 2);
  for (const MsgWritten& written : s.told<MsgWritten>()) CHECK(written.slice == 1);
}

TEST_CASE("no more than so many gathers into peers' regions run at a time") {
  EngineConfig config = small_config(1);
  config.mapped_gathers = 2;
  Sending s(config);
  s.open_mapped("a", 4);
  s.lend({1, 2, 3, 4});
  CHECK(s.seen<Gather>().size() == 2);
  s.post(CopyEnded{s.seen<Gather>()[0].copy, CopyOutcome::kOk, {}});
  CHECK(s.seen<Gather>().size() == 3);
}

TEST_CASE("DRAINED answers END once no gather of the pull runs, again until the pull is closed") {
  Sending s;
  s.open_mapped("a", 3);
  s.lend({1, 2});
  const auto gathers = s.seen<Gather>();
  REQUIRE(gathers.size() == 2);
  s.end();
  CHECK(s.told<MsgEnd>().size() == 1);
  s.post(CopyEnded{gathers[1].copy, CopyOutcome::kOk, {}});
  CHECK(s.told<MsgDrained>().empty());
  s.post(CopyEnded{gathers[0].copy, CopyOutcome::kFailed, {}});
  CHECK(s.told<MsgDrained>() == std::vector<MsgDrained>{{{boot_of(2), 1}}});
  CHECK(s.told<MsgWritten>().empty());
  s.end();  // told again: so is the answer
  CHECK(s.told<MsgDrained>().size() == 2);
  s.forget();
  s.lose_lane_0();
  CHECK(s.told<MsgDrained>().size() == 1);
  MsgUpdate closed;
  closed.pull = {boot_of(2), 0};
  closed.oldest = 2;
  s.say(1, closed);
  s.forget();
  s.lose_lane_0_again();
  CHECK(s.told<MsgMapped>().size() == 1);  // the resync
  CHECK(s.told<MsgDrained>().empty());
}

TEST_CASE("a resync while a gather writes says no DRAINED") {
  Sending s;
  s.open_mapped("a", 1);
  s.lend({1});
  s.end();
  s.lose_lane_0();
  CHECK(s.told<MsgEnd>().size() == 2);
  CHECK(s.told<MsgDrained>().empty());
  s.gather_all();
  CHECK(s.told<MsgDrained>().size() == 1);
}

TEST_CASE("DRAINED is answered for a pull that was never seen, and for one that is parked") {
  Sending s;
  s.end(Outcome::kFailed, 7);
  CHECK(s.told<MsgDrained>() == std::vector<MsgDrained>{{{boot_of(2), 7}}});
  CHECK(s.told<MsgEnd>().size() == 1);
  s.forget();
  s.lose_lane_0();  // also a lost answer comes again
  CHECK(s.told<MsgDrained>().size() == 1);
  s.forget();
  MsgPull pull = s.pull_of("nobody's", 8, {});
  pull.mapped = kTheirs;
  s.say(1, pull);
  s.end(Outcome::kFailed, 8, 1);
  CHECK(s.told<MsgDrained>() == std::vector<MsgDrained>{{{boot_of(2), 8}}});
}

TEST_CASE("a later link's DRAINED waits for the gathers of the earlier one") {
  Sending s;
  s.open_mapped("a", 2);
  s.lend({1});
  const Gather gather = s.seen<Gather>().at(0);
  s.post(LinkUp{{2}, "node2", boot_of(2), true, 1, kChunk, 64, CheckKind::kNone});
  s.post(LaneConnected{{{2}, 0, 0}});
  uint64_t number = 0;
  const auto say = [&](ControlMessage message) {
    s.post(MessageIn{{{2}, 0, 0}, number++, std::move(message)});
  };
  say(MsgHello{false});
  say(MsgHello{true});
  s.forget();
  MsgEnd end;
  end.pull = {boot_of(2), 1};
  end.mapped = true;
  say(end);
  CHECK(s.told<MsgDrained>().empty());
  s.post(CopyEnded{gather.copy, CopyOutcome::kOk, {}});
  CHECK(s.told<MsgDrained>() == std::vector<MsgDrained>{{{boot_of(2), 1}}});
}

}  // namespace
// Boot ids are the peers' word: node3 says node2's, and its pulls are numbered as node2's.
struct SameBoot : Sending {
  SameBoot() {
    post(LinkUp{kNode3, "node3", boot_of(2), true, 1, kChunk, 64, CheckKind::kNone});
    post(LaneConnected{{kNode3, 0, 0}});
    say3(MsgHello{false});
    say3(MsgHello{true});
    post(ArenaMapped{kNode3, kTheirs});
  }
  void say3(ControlMessage message) {
    post(MessageIn{{kNode3, 0, 0}, number++, std::move(message)});
  }
  void end3() {
    MsgEnd end;
    end.pull = {boot_of(2), 1};
    end.mapped = true;
    say3(end);
  }
  // node3 pulls with one chunk, whose gather is handed back.
  Gather write_to_node3() {
    send("c", 0, {0, kChunk / 10}, true);
    MsgPull pull = pull_of("c", 1, {});
    pull.mapped = kTheirs;
    ProofFields fields;
    fields.pull = pull.pull;
    fields.id = pull.transfer.id;
    fields.instance = pull.transfer.instance;
    fields.incarnation = pull.transfer.incarnation;
    fields.sender_node = "node1";
    fields.receiver_node = "node3";
    pull.proof = receiver_proof(key_of("c").secret, fields);
    say3(pull);
    resolve();
    compile_all();
    MsgUpdate update;
    update.pull = {boot_of(2), 1};
    update.credits = {at(1)};
    update.oldest = 1;
    say3(update);
    const auto gathers = seen<Gather>();
    REQUIRE_FALSE(gathers.empty());
    CHECK(gathers.back().link == kNode3);
    return gathers.back();
  }
  // Over which links DRAINED has been told, in order.
  std::vector<LinkId> drained() const {
    std::vector<LinkId> links;
    for (const SendMessage& command : seen<SendMessage>())
      if (std::holds_alternative<MsgDrained>(command.message)) links.push_back(command.lane.link);
    return links;
  }

  static constexpr LinkId kNode3{3};
  uint64_t number = 0;
};

TEST_CASE("DRAINED goes to the node that was written to, not to one with the same boot id") {
  SameBoot s;
  const Gather gather = s.write_to_node3();
  s.end3();
  CHECK(s.drained().empty());
  s.post(CopyEnded{gather.copy, CopyOutcome::kOk, {}});
  CHECK(s.drained() == std::vector<LinkId>{SameBoot::kNode3});
}

TEST_CASE("DRAINED waits for no gather of another node with the same boot id") {
  SameBoot s;
  const Gather gather = s.write_to_node3();
  s.end();  // node2's pull of the same number, of which nothing was ever seen
  CHECK(s.drained() == std::vector<LinkId>{{1}});
  s.end3();
  CHECK(s.drained() == std::vector<LinkId>{{1}});
  s.post(CopyEnded{gather.copy, CopyOutcome::kOk, {}});
  CHECK(s.drained() == std::vector<LinkId>{{1}, SameBoot::kNode3});
}

}  // namespace kvferry::engine::test
