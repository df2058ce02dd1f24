// Which of the credits that a receiver tells its sender takes: withdrawn ones never come, or late.
#include "tests/unit/engine_lone.h"

namespace kvferry::engine::test {
namespace {

// Withdrawn before they were told, or told on a lane that broke.
TEST_CASE("a leg may miss any number of credits") {
  Lone s;
  s.open("a", 1, {});
  s.gather_all();
  for (uint64_t credit = 2; credit <= 600; credit += 2) {
    s.update({credit}, {});
    REQUIRE(s.seen<SendOffer>().size() == credit / 2);
    const SendOffer offer = s.seen<SendOffer>().back();
    CHECK(offer.offer.credit.value == credit);
    s.post(RefuseIn{offer.lane, {offer.offer.pull, offer.offer.offer}});
  }
  CHECK(s.drops(DropCause::kProtocol) == 0);
}

TEST_CASE("a credit that comes after a newer one has been withdrawn") {
  Lone s;
  s.open("a", 2, {});
  s.gather_all();
  s.update({2}, {});
  MsgUpdate late;
  late.pull = {boot_of(2), 1};
  late.credits = {{{1}, kChunk}};
  late.oldest = 1;
  s.say(1, late);
  s.gather_all();
  REQUIRE(s.seen<SendOffer>().size() == 1);
  CHECK(s.seen<SendOffer>()[0].offer.credit.value == 2);
}

TEST_CASE("a parked PULL keeps the newest credits") {
  Lone s;
  s.say(0, s.pull_of("a", 1, {1}));
  for (uint64_t credit = 2; credit <= 300; ++credit) s.update({credit}, {});
  s.update({299, 300}, {});  // a resync
  s.send("a", 0, {0, 2 * kChunk / 10}, true);
  s.resolve();
  s.compile_all();
  s.gather_all();
  REQUIRE(s.seen<SendOffer>().size() == 2);
  CHECK(s.seen<SendOffer>()[0].offer.credit.value == 300);
  CHECK(s.seen<SendOffer>()[1].offer.credit.value == 299);
}

}  // namespace
}  // namespace kvferry::engine::test
