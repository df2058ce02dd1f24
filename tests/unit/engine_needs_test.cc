// RECEIVER_READY, and what the receivers that have come need.
#include "tests/unit/engine_lone.h"

namespace kvferry::engine::test {
namespace {

using std::chrono::seconds;

constexpr uint64_t kHandle = 9;

using Needs = std::vector<GroupRanges>;

struct Opened : Lone {
  explicit Opened(uint32_t receivers = 1, std::string id = "a") : id_(std::move(id)) {
    post(OpenSendOp{{{1}, 1}, kHandle, key_of(id_), layout, seconds(5), seconds(5), receivers});
  }
  void pull(uint64_t counter, uint32_t rank = 0, uint8_t life = 2) {
    say(0, pull_of(id_, counter, {}, life, rank));
  }
  Reply ask(uint64_t handle = kHandle) {
    post(ReceiverNeedsOp{{{1}, 77}, handle});
    return last_reply();
  }
  bool ready() const { return record({1}, kHandle).receiver_ready; }
  std::string id_;
};

TEST_CASE("RECEIVER_READY waits for all legs of one receiver, by holdings") {
  Opened s;
  CHECK(s.ask().receivers.empty());
  s.pull(1, 0);
  s.resolve({0, 1, 2}, 0, {{0, {{16, 64}}}});
  CHECK_FALSE(s.ready());
  s.pull(2, 2);
  s.resolve({0, 1, 2}, 0, {});  // an empty leg needs nothing, and must come all the same
  CHECK_FALSE(s.ready());
  REQUIRE(s.ask().receivers.size() == 1);
  CHECK_FALSE(s.ask().receivers[0].ready);
  s.pull(3, 1);
  CHECK_FALSE(s.ready());  // pulled, and not resolved yet
  s.resolve({0, 1, 2}, 0, {{0, {{48, 96}}}, {2, {{0, 16}}}});
  CHECK(s.ready());
  const Reply answer = s.ask();
  REQUIRE(answer.receivers.size() == 1);
  CHECK(answer.receivers[0].ready);
  CHECK(answer.receivers[0].instance == "default/decode");
  CHECK(answer.receivers[0].incarnation == incarnation_of(2));
  CHECK(answer.receivers[0].needs == Needs{{0, {{16, 96}}}, {2, {{0, 16}}}});
}

TEST_CASE("the needs of several legs are united by group") {
  Opened s;
  s.pull(1, 0);
  s.resolve({0, 1}, 0, {{1, {{0, 16}, {64, 80}}}, {3, {{32, 48}}}});
  s.pull(2, 1);
  s.resolve({0, 1}, 0, {{0, {{0, 8}}}, {1, {{16, 32}, {72, 96}, {128, 144}}}});
  CHECK(s.ask().receivers.at(0).needs ==
        Needs{{0, {{0, 8}}}, {1, {{0, 32}, {64, 96}, {128, 144}}}, {3, {{32, 48}}}});
}

TEST_CASE("each receiver has needs of its own, and one that is whole makes RECEIVER_READY") {
  Opened s(3);
  s.pull(1, 0, 2);
  s.resolve({0, 1}, 0, {{0, {{0, 16}}}});
  CHECK_FALSE(s.ready());
  s.pull(2, 0, 3);  // another life of the instance: another receiver
  s.resolve({0}, 1, {{0, {{32, 48}}}});
  CHECK(s.ready());
  const Reply answer = s.ask();
  REQUIRE(answer.receivers.size() == 2);
  CHECK_FALSE(answer.receivers[0].ready);
  CHECK(answer.receivers[0].needs == Needs{{0, {{0, 16}}}});
  CHECK(answer.receivers[1].ready);
  CHECK(answer.receivers[1].dp_group == 1);
  CHECK(answer.receivers[1].needs == Needs{{0, {{32, 48}}}});
}

TEST_CASE("a receiver that failed or was given back needs nothing; READY is not taken back") {
  Opened s(2);
  s.pull(1);
  s.resolve({0}, 0, {{0, {{0, 16}}}});
  CHECK(s.ready());
  const bool released = GENERATE(true, false);
  s.say(0, MsgEnd{{boot_of(2), 1},
                  wire_name(key_of("a"), incarnation_of(1)),
                  released ? Outcome::kReleased : Outcome::kFailed,
                  released ? Reason::kReleased : Reason::kCancelled,
                  std::nullopt});
  CHECK(s.ask().receivers.empty());
  CHECK(s.ready());
}

TEST_CASE("a receiver of which one leg failed never becomes ready") {
  Opened s(2);
  s.pull(1, 0);
  s.resolve({0, 1}, 0, {{0, {{0, 16}}}});
  s.say(0, MsgEnd{{boot_of(2), 1},
                  wire_name(key_of("a"), incarnation_of(1)),
                  Outcome::kFailed,
                  Reason::kCancelled,
                  std::nullopt});
  s.pull(2, 1);
  s.resolve({0, 1}, 0, {{0, {{0, 16}}}});
  CHECK_FALSE(s.ready());
  CHECK(s.ask().receivers.empty());
}

TEST_CASE("a pull that is turned away says nothing of needs") {
  Opened s;
  s.pull(1);
  PullResolved stale;
  stale.resolve = s.seen<ResolvePull>().back().resolve;
  stale.reason = Reason::kStaleCards;
  stale.needs = {{0, {{0, 16}}}};
  s.post(std::move(stale));
  CHECK(s.ask().receivers.empty());
  s.pull(2);
  s.resolve({0}, 0, {{0, {{16, 32}}}});
  CHECK(s.ready());
  CHECK(s.ask().receivers.at(0).needs == Needs{{0, {{16, 32}}}});
}

TEST_CASE("needs in too many pieces are told as what spans them") {
  Opened s;
  Needs pieces{{0, {}}, {5, {{8, 16}}}};
  for (uint64_t i = 0; i < 1024; ++i) pieces[0].ranges.push_back({32 * i + 16, 32 * i + 32});
  s.pull(1);
  s.resolve({0}, 0, pieces);
  CHECK(s.ask().receivers.at(0).needs == Needs{{0, {{16, 32 * 1024}}}, {5, {{8, 16}}}});
}

TEST_CASE("ReceiverNeeds is refused for what is no open send") {
  Opened s;
  CHECK(s.ask(kHandle + 1).error.reason == "TRANSFER_UNKNOWN");
  CHECK(s.ask(kHandle + 1).error.field == "client_handle");
  s.post(CancelOp{{{1}, 3}, kHandle});
  CHECK(s.ask().error.code == Code::kFailedPrecondition);
  CHECK(s.ask().error.reason == "TRANSFER_ENDED");
  s.post(CloseOp{{{1}, 4}, kHandle});
  CHECK(s.ask().error.code == Code::kNotFound);
}

}  // namespace
}  // namespace kvferry::engine::test
