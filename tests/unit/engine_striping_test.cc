// Transfers between two engines over lanes of different speed, and over one that fails.
#include <algorithm>
#include <deque>
#include <vector>

#include "tests/unit/engine_lone.h"

namespace kvferry::engine::test {
namespace {

using std::chrono::milliseconds;

constexpr uint64_t kTokens = 1280;  // 200 chunks

EngineConfig config_of(uint8_t node) {
  EngineConfig config = small_config(node);
  config.arenas = {{{uint64_t{1} << 16}}};
  config.leg_credits = 8;
  return config;
}

// Two daemons and two lanes between them, each carrying what was accepted one after the other.
class Roads {
 public:
  explicit Roads(std::vector<Duration> per_chunk)
      : pair(config_of(1), config_of(2)), lanes_(per_chunk.size()) {
    for (std::size_t i = 0; i < lanes_.size(); ++i) lanes_[i].per_chunk = per_chunk[i];
    pair.needed = {0, kTokens};
    pair.swallow = [this](const Command& command) { return take(command); };
  }
  void begin(const std::string& id) {
    pair.s.post(pair.send_op(id, 0, {0, kTokens}, true));
    pair.r.post(pair.receive_op(id, {0, kTokens}));
    pair.run();
  }
  // The next chunk arrives; false if none is on its way.
  bool step() {
    Lane* first = nullptr;
    for (Lane& lane : lanes_)
      if (!lane.on_way.empty() &&
          (first == nullptr || lane.on_way.front().at < first->on_way.front().at))
        first = &lane;
    if (first == nullptr) return false;
    const Carried chunk = first->on_way.front();
    first->on_way.pop_front();
    ++first->carried;
    const Duration time = chunk.at - pair.s.now;
    pair.s.pass(time);
    pair.r.pass(time);
    pair.land(chunk.of);
    return true;
  }
  Duration carry(const std::string& id) {
    const Time start = pair.s.now;
    begin(id);
    while (step()) {
    }
    CHECK(pair.received(id).state == TransferState::kCompleted);
    CHECK(pair.sent(id).state == TransferState::kDelivered);
    return pair.s.now - start;
  }
  // Both sides see it fail, and it does not come back.
  void fail(uint32_t lane) {
    failed_.insert(lane);
    pair.s.post(LaneFailed{{{1}, lane, 0}});
    pair.r.post(LaneFailed{{{1}, lane, 0}});
    pair.run();
    for (const Carried& chunk : std::exchange(lanes_[lane].on_way, {})) pair.land(chunk.of, false);
  }
  uint64_t carried(uint32_t lane) const { return lanes_[lane].carried; }
  std::size_t on_way(uint32_t lane) const { return lanes_[lane].on_way.size(); }

  Pair pair;

 private:
  struct Carried {
    Time at;
    AcceptOffer of;
  };
  struct Lane {
    Duration per_chunk{};
    Time free;
    std::deque<Carried> on_way;
    uint64_t carried = 0;
  };
  bool take(const Command& command) {
    if (std::holds_alternative<ReopenLane>(command)) return true;
    const auto* of = std::get_if<AcceptOffer>(&command);
    if (of == nullptr) return false;
    REQUIRE_FALSE(failed_.contains(of->lane.lane));
    Lane& lane = lanes_.at(of->lane.lane);
    lane.free = std::max(lane.free, pair.r.now) + lane.per_chunk;
    lane.on_way.push_back({lane.free, *of});
    return true;
  }
  std::vector<Lane> lanes_;
  std::set<uint32_t> failed_;
};

bool empty(const Box& box) {
  const ArenaView arena = box.engine.snapshot(box.now).arenas[0];
  return arena.free_bytes == arena.total_bytes && arena.regions == 0;
}

TEST_CASE("a lane ten times slower does not hold a transfer back") {
  const uint32_t slow = GENERATE(0U, 1U);
  std::vector<Duration> per_chunk{milliseconds(1), milliseconds(1)};
  per_chunk[slow] = milliseconds(10);
  Roads roads(per_chunk);
  // 182 ms at the sum of both speeds, 200 by the fast one alone, 1000 by turns.
  CHECK(roads.carry("a") < milliseconds(205));
  CHECK(roads.carried(slow) >= 4);
  CHECK(roads.carry("b") < milliseconds(215));  // with a trial at its end, perhaps
  const LinkView link = roads.pair.s.engine.snapshot(roads.pair.s.now).links.at(0);
  const uint64_t fast_rate = link.lanes[1 - slow].rate;
  const uint64_t slow_rate = link.lanes[slow].rate;
  CHECK(fast_rate > 64'000 * 9 / 10);
  CHECK(fast_rate < 64'000 * 11 / 10);
  CHECK(slow_rate > 6'400 * 9 / 10);
  CHECK(slow_rate < 6'400 * 11 / 10);
  CHECK(link.lanes[0].in_flight == 0);
  CHECK(link.lanes[1].in_flight == 0);
  CHECK(link.lanes[0].arrived_bytes + link.lanes[1].arrived_bytes == 2 * kTokens * 10);
  CHECK(empty(roads.pair.s));
  CHECK(empty(roads.pair.r));
}

TEST_CASE("a lane half as fast carries a third") {
  Roads roads({milliseconds(2), milliseconds(1)});
  CHECK(roads.carry("a") < milliseconds(150));  // 133 at the sum
  CHECK(roads.carry("b") < milliseconds(140));
  CHECK(roads.carried(0) > 120);
  CHECK(roads.carried(0) < 146);
}

TEST_CASE("a lane that fails in mid-transfer: its chunks go by the other, the transfer completes") {
  const uint32_t failing = GENERATE(0U, 1U);  // 0 carries the control messages, too
  Roads roads({milliseconds(1), milliseconds(1)});
  roads.begin("a");
  for (int i = 0; i < 60; ++i) REQUIRE(roads.step());
  REQUIRE(roads.on_way(failing) >= 3);
  const uint64_t before = roads.carried(failing);
  roads.fail(failing);
  while (roads.step()) {
  }
  CHECK(roads.pair.received("a").state == TransferState::kCompleted);
  CHECK(roads.pair.sent("a").state == TransferState::kDelivered);
  CHECK(roads.pair.received("a").bytes_done == kTokens * 10);
  CHECK(roads.carried(failing) == before);
  CHECK(roads.carried(0) + roads.carried(1) == kTokens * 10 / 64);
  CHECK(roads.pair.s.engine.snapshot(roads.pair.s.now).links.at(0).lanes[failing].in_flight == 0);
  CHECK(empty(roads.pair.s));
  CHECK(empty(roads.pair.r));
}

TEST_CASE("a chunk counts as being on its lane until it is acknowledged, refused or lost") {
  Lone s;
  s.open("a", 3, {1, 2, 3});
  s.gather_all();
  const auto in_flight = [&] {
    std::vector<uint64_t> bytes;
    const LinkView link = s.engine.snapshot(s.now).links.at(0);
    for (const LaneView& lane : link.lanes) bytes.push_back(lane.in_flight);
    return bytes;
  };
  const auto offers = s.seen<SendOffer>();
  REQUIRE(offers.size() == 3);
  const uint64_t rest = offers[2].offer.bytes;  // the last chunk's
  CHECK(in_flight() == std::vector<uint64_t>{kChunk + rest, kChunk});
  s.post(OfferSendEnded{offers[0].offer.offer});  // perhaps in a socket's buffer
  CHECK(in_flight() == std::vector<uint64_t>{kChunk + rest, kChunk});
  s.update({}, {{0, offers[0].offer.chunk}});
  CHECK(in_flight() == std::vector<uint64_t>{rest, kChunk});
  SECTION("refused") {
    s.post(RefuseIn{offers[2].lane, {offers[2].offer.pull, offers[2].offer.offer}});
    CHECK(in_flight() == std::vector<uint64_t>{0, kChunk});
  }
  SECTION("lost, and offered again by the other lane") {
    s.post(LaneFailed{offers[1].lane});
    CHECK(in_flight() == std::vector<uint64_t>{kChunk + rest, 0});
  }
  SECTION("no longer wanted: until it is sent") {
    s.post(CancelOp{{{1}, 2}, std::hash<std::string>{}("a") | 1});
    CHECK(in_flight() == std::vector<uint64_t>{rest, kChunk});
    s.post(OfferSendEnded{offers[2].offer.offer});
    CHECK(in_flight() == std::vector<uint64_t>{0, kChunk});
    s.post(OfferSendEnded{offers[1].offer.offer});
    CHECK(in_flight() == std::vector<uint64_t>{0, 0});
  }
}

}  // namespace
}  // namespace kvferry::engine::test
