// What one link and one transfer may take of a sending engine at most.
#include "tests/unit/engine_lone.h"

namespace kvferry::engine::test {
namespace {

TEST_CASE("a link has so many legs, and what is pulled beyond them is refused by itself") {
  EngineConfig config = small_config(1);
  config.max_legs = 1;
  Lone s(config);
  s.open("a", 4, {1, 2});
  REQUIRE(s.told<MsgEnd>().empty());
  s.send("b", 0, {0, 64}, true);
  s.say(0, s.pull_of("b", 2, {}));
  REQUIRE(s.told<MsgEnd>().size() == 1);
  CHECK(s.told<MsgEnd>()[0].pull.counter == 2);
  CHECK(s.told<MsgEnd>()[0].reason == Reason::kRefused);
  // The first one's chunks go on.
  s.gather_all();
  CHECK(s.seen<SendOffer>().size() == 2);
}

TEST_CASE("a transfer has so many slices, and a Send beyond them is refused") {
  EngineConfig config = small_config(1);
  config.max_slices = 2;
  Lone s(config);
  s.send("a", 0, {0, 8}, false);
  s.send("a", 1, {8, 16}, false);
  REQUIRE(s.last_reply().error.code == Code::kOk);
  s.send("a", 2, {16, 24}, true);
  CHECK(s.last_reply().error.reason == "TOO_MANY_SLICES");
}

TEST_CASE("so many messages wait behind a gap of a lane, and one more costs the lane") {
  EngineConfig config = small_config(1);
  config.max_held_messages = 2;
  Lone s(config);
  uint64_t sequence = 100;
  const auto hold = [&] { s.post(MessageIn{{{1}, 0, 0}, ++sequence, MsgPing{}}); };
  hold();
  hold();
  CHECK(s.drops(DropCause::kLimit) == 0);
  CHECK(s.seen<CloseLane>().empty());
  hold();
  CHECK(s.drops(DropCause::kLimit) == 1);
  REQUIRE(s.seen<CloseLane>().size() == 1);
  CHECK(s.seen<CloseLane>()[0].lane.lane == 0);
}

}  // namespace
}  // namespace kvferry::engine::test
