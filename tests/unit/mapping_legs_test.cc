// Which sender feeds which receiver: the legs of real parallelism pairs.
#include <algorithm>
#include <catch2/catch.hpp>
#include <vector>

#include "tests/unit/mapping_support.h"

using namespace kvferry;
using namespace kvferry::mapping;
using namespace kvferry::mapping::test;

namespace {

using Senders = std::vector<uint32_t>;

Senders data_senders(const LegTable& table, uint32_t dp, uint32_t g) {
  Senders senders;
  const auto legs = table.legs_of_receiver(dp, g);
  REQUIRE(legs);
  for (const Leg& leg : *legs)
    if (!leg.empty) senders.push_back(leg.sender_rank);
  return senders;
}

Senders empty_senders(const LegTable& table, uint32_t dp, uint32_t g) {
  Senders senders;
  const auto legs = table.legs_of_receiver(dp, g);
  REQUIRE(legs);
  for (const Leg& leg : *legs)
    if (leg.empty) senders.push_back(leg.sender_rank);
  return senders;
}

uint32_t aux_sender(const LegTable& table, uint32_t dp, uint32_t g) {
  std::vector<uint32_t> carriers;
  const auto legs = table.legs_of_receiver(dp, g);
  REQUIRE(legs);
  for (const Leg& leg : *legs)
    if (leg.carries_aux) carriers.push_back(leg.sender_rank);
  REQUIRE(carriers.size() == 1);
  return carriers[0];
}

GroupSpec kv() {
  return {};
}

GroupSpec mla() {
  GroupSpec spec;
  spec.roles = {"latent"};
  spec.memory = "l|brut";
  return spec;
}

std::shared_ptr<const LegTable> heads_table(uint32_t heads, Parallel sender, Parallel receiver,
                                            uint32_t layers = 8) {
  return table_of(ranks_of(sender, layers, heads, kv()), ranks_of(receiver, layers, heads, kv()));
}

}  // namespace

TEST_CASE("tp2 to tp4 halves each sender") {
  const auto table = heads_table(8, {.tp = 2}, {.tp = 4});
  CHECK(data_senders(*table, 0, 0) == Senders{0});
  CHECK(data_senders(*table, 0, 1) == Senders{0});
  CHECK(data_senders(*table, 0, 2) == Senders{1});
  CHECK(data_senders(*table, 0, 3) == Senders{1});
  CHECK(empty_senders(*table, 0, 3).empty());
}

TEST_CASE("tp4 to tp2 joins two senders") {
  const auto table = heads_table(8, {.tp = 4}, {.tp = 2});
  CHECK(data_senders(*table, 0, 0) == Senders{0, 1});
  CHECK(data_senders(*table, 0, 1) == Senders{2, 3});
  CHECK(aux_sender(*table, 0, 1) == 2);
}

TEST_CASE("pipeline stages all feed every receiver") {
  const auto table = heads_table(8, {.tp = 1, .pp = 2}, {.tp = 4});
  for (uint32_t g = 0; g < 4; ++g) CHECK(data_senders(*table, 0, g) == Senders{0, 1});
}

TEST_CASE("tp2pp2 to tp4 takes aux from the lowest sender") {
  const auto table = heads_table(8, {.tp = 2, .pp = 2}, {.tp = 4});
  for (uint32_t g = 0; g < 2; ++g) {
    CHECK(data_senders(*table, 0, g) == Senders{0, 2});
    CHECK(aux_sender(*table, 0, g) == 0);
  }
  for (uint32_t g = 2; g < 4; ++g) {
    CHECK(data_senders(*table, 0, g) == Senders{1, 3});
    CHECK(aux_sender(*table, 0, g) == 1);
  }
}

TEST_CASE("latent planes under attention data parallelism come from the group's one sender") {
  const auto table = table_of(ranks_of({.tp = 4, .attention_dp = true}, 8, 1, mla()),
                              ranks_of({.tp = 8}, 8, 1, mla()));
  for (uint32_t dp = 0; dp < 4; ++dp) {
    for (uint32_t g = 0; g < 8; ++g) CHECK(data_senders(*table, dp, g) == Senders{dp});
    CHECK(table->legs_of_sender(dp, 0)->size() == 8);
  }
}

TEST_CASE("replicated latents spread over receivers and the rest get empty legs") {
  const auto to_dp = table_of(ranks_of({.tp = 4}, 8, 1, mla()),
                              ranks_of({.tp = 4, .attention_dp = true}, 8, 1, mla()));
  for (uint32_t d = 0; d < 4; ++d) {
    CHECK(data_senders(*to_dp, 0, d) == Senders{d});
    Senders others;
    for (uint32_t s = 0; s < 4; ++s)
      if (s != d) others.push_back(s);
    CHECK(empty_senders(*to_dp, 0, d) == others);
    CHECK(aux_sender(*to_dp, 0, d) == d);
  }
  const auto narrower =
      table_of(ranks_of({.tp = 8}, 8, 1, mla()), ranks_of({.tp = 4}, 8, 1, mla()));
  for (uint32_t g = 0; g < 4; ++g) {
    CHECK(data_senders(*narrower, 0, g) == Senders{g});
    CHECK(empty_senders(*narrower, 0, g) == Senders{g + 4});
  }
}

TEST_CASE("replicated heads: two KV heads, tp4 to tp2") {
  const auto table = heads_table(2, {.tp = 4}, {.tp = 2});
  CHECK(data_senders(*table, 0, 0) == Senders{0});
  CHECK(data_senders(*table, 0, 1) == Senders{3});
  CHECK(empty_senders(*table, 0, 1) == Senders{1});
  CHECK(empty_senders(*table, 0, 0) == Senders{2});
}

TEST_CASE("replicated heads: eight KV heads, tp16 to tp4") {
  const auto table = heads_table(8, {.tp = 16}, {.tp = 4});
  CHECK(data_senders(*table, 0, 0) == Senders{0, 2});
  CHECK(data_senders(*table, 0, 1) == Senders{5, 7});
  CHECK(data_senders(*table, 0, 2) == Senders{8, 10});
  CHECK(data_senders(*table, 0, 3) == Senders{13, 15});
}

TEST_CASE("degrees that do not divide each other share senders") {
  const auto table = heads_table(24, {.tp = 6}, {.tp = 4});
  const std::vector<Senders> expected{{0, 1}, {1, 2}, {3, 4}, {4, 5}};
  for (uint32_t g = 0; g < 4; ++g) CHECK(data_senders(*table, 0, g) == expected[g]);
  const auto units = [&](uint32_t s, uint32_t g) {
    const auto owned = table->ownership(s, g);
    REQUIRE(owned);
    REQUIRE(owned->unit_sets.size() == 1);
    return owned->unit_sets[0];
  };
  CHECK(units(0, 0) == std::vector<Range>{{0, 4}});
  CHECK(units(1, 0) == std::vector<Range>{{4, 6}});
  CHECK(units(1, 1) == std::vector<Range>{{6, 8}});
  CHECK(units(2, 1) == std::vector<Range>{{8, 12}});
  CHECK(units(4, 2) == std::vector<Range>{{16, 18}});
  CHECK(units(4, 3) == std::vector<Range>{{18, 20}});
  CHECK(units(5, 3) == std::vector<Range>{{20, 24}});
}

TEST_CASE("context-parallel receivers take their share from one sender, or each from its twin") {
  GroupSpec spec = mla();
  spec.block = 32;
  const auto wide = ranks_of({.tp = 1, .cp = 4}, 8, 1, spec);
  const auto from_one = table_of(ranks_of({}, 8, 1, spec), wide);
  for (uint32_t g = 0; g < 4; ++g) CHECK(data_senders(*from_one, 0, g) == Senders{0});
  const auto replicated = table_of(ranks_of({.tp = 4}, 8, 1, spec), wide);
  for (uint32_t g = 0; g < 4; ++g) CHECK(data_senders(*replicated, 0, g) == Senders{g});
  const auto alike = table_of(wide, wide);
  for (uint32_t g = 0; g < 4; ++g) CHECK(data_senders(*alike, 0, g) == Senders{g});
  const auto joined = table_of(wide, ranks_of({}, 8, 1, spec));
  CHECK(data_senders(*joined, 0, 0) == Senders{0, 1, 2, 3});
}

TEST_CASE("a receiver without any cell still has one leg, which brings its aux") {
  GroupSpec spec = kv();
  std::vector<RankLayout> receivers = ranks_of({.tp = 2}, 2, 2, spec);
  RankLayout draft = receivers[0];
  draft.groups.clear();
  draft.pools.clear();
  GroupSpec extra = kv();
  extra.layers = {60};
  extra.optional = true;
  add_group(draft, extra);
  draft.topology.rank = 2;
  receivers.push_back(draft);
  for (RankLayout& layout : receivers) layout.topology.rank_count = 3;
  const auto table = table_of(ranks_of({.tp = 2}, 2, 2, spec), receivers);
  CHECK(data_senders(*table, 0, 2).empty());
  CHECK(empty_senders(*table, 0, 2) == Senders{0});  // S[2 mod 2]
  CHECK(aux_sender(*table, 0, 2) == 0);
}

TEST_CASE("legs seen from both ends are the same") {
  const auto table = heads_table(6, {.tp = 3, .pp = 2}, {.tp = 4, .pp = 3}, 9);
  std::vector<Leg> from_receivers;
  std::vector<Leg> from_senders;
  for (uint32_t g = 0; g < 12; ++g) {
    const auto legs = table->legs_of_receiver(0, g).value();
    from_receivers.insert(from_receivers.end(), legs.begin(), legs.end());
  }
  for (uint32_t s = 0; s < 6; ++s) {
    const auto legs = table->legs_of_sender(s, 0).value();
    from_senders.insert(from_senders.end(), legs.begin(), legs.end());
  }
  std::sort(from_receivers.begin(), from_receivers.end());
  CHECK(from_receivers == from_senders);
}

TEST_CASE("unknown ranks and dp groups are not found") {
  const auto table = heads_table(8, {.tp = 2}, {.tp = 2});
  CHECK(table->legs_of_receiver(0, 2).error().code == Code::kNotFound);
  CHECK(table->legs_of_receiver(7, 0).error().code == Code::kNotFound);
  CHECK(table->legs_of_sender(2, 0).error().code == Code::kNotFound);
  CHECK(table->legs_of_sender(0, 9).error().code == Code::kNotFound);
  CHECK(table->ownership(0, 2).error().code == Code::kNotFound);
}
