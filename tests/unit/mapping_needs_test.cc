// What a receiver's needs ask of one sender rank, in the sender's groups.
#include <catch2/catch.hpp>

#include "daemon/mapping/needs.h"
#include "tests/unit/mapping_support.h"

namespace kvferry::mapping::test {
namespace {

using Ranges = std::vector<Range>;
using Needs = std::vector<GroupRanges>;

GroupSpec of_layers(std::vector<uint32_t> layers, uint64_t block = 16) {
  GroupSpec spec;
  spec.layers = std::move(layers);
  spec.block = block;
  spec.block_count = 64;
  return spec;
}
std::vector<RankLayout> one_rank(const std::vector<GroupSpec>& groups) {
  RankLayout layout;
  layout.fingerprint = "model";
  for (const GroupSpec& spec : groups) add_group(layout, spec);
  return {layout};
}
Needs needs_of(const LegTable& table, uint32_t sender, uint32_t receiver,
               const std::vector<GroupNeed>& needs) {
  const auto found = needs_by_sender_group(table, sender, receiver, needs);
  REQUIRE(found);
  return *found;
}

}  // namespace

TEST_CASE("needs are told in the sender's groups, however both number them") {
  const auto table = table_of(one_rank({of_layers({0, 2}), of_layers({1, 3})}),
                              one_rank({of_layers({1, 3}), of_layers({0, 2})}));
  const std::vector<GroupNeed> needs = {{0, 64, 100, {{64, 112}}}, {1, 0, 100, {{0, 112}}}};
  CHECK(needs_of(*table, 0, 0, needs) == Needs{{0, {{0, 112}}}, {1, {{64, 112}}}});
  CHECK(needs_of(*table, 0, 0, {needs[1]}) == Needs{{0, {{0, 112}}}});
  CHECK(needs_of(*table, 0, 0, {}).empty());
}

TEST_CASE("one group of the sender serves several of the receiver: the union") {
  const auto table =
      table_of(one_rank({of_layers({0, 1})}), one_rank({of_layers({0}), of_layers({1})}));
  CHECK(needs_of(*table, 0, 0, {{0, 0, 40, {{0, 48}}}, {1, 96, 120, {{96, 128}}}}) ==
        Needs{{0, {{0, 48}, {96, 128}}}});
  CHECK(needs_of(*table, 0, 0, {{0, 0, 40, {{0, 48}}}, {1, 32, 120, {{32, 128}}}}) ==
        Needs{{0, {{0, 128}}}});
}

TEST_CASE("ranges are rounded outward to the sender's blocks") {
  const auto table = table_of(one_rank({of_layers({0}, 64)}), one_rank({of_layers({0}, 16)}));
  CHECK(needs_of(*table, 0, 0, {{0, 80, 150, {{80, 160}}}}) == Needs{{0, {{64, 192}}}});
}

TEST_CASE("each stage is asked for its own layers, and a rank without a part for nothing") {
  const auto stages = table_of(ranks_of({.pp = 2}, 4, 4, {}), ranks_of({.tp = 2}, 4, 4, {}));
  const std::vector<GroupNeed> needs = {{0, 0, 100, {{0, 112}}}};
  for (const uint32_t sender : {0U, 1U})
    CHECK(needs_of(*stages, sender, 1, needs) == Needs{{0, {{0, 112}}}});
  const auto heads = table_of(ranks_of({.tp = 2}, 4, 4, {}), ranks_of({.tp = 2}, 4, 4, {}));
  CHECK(needs_of(*heads, 0, 0, needs) == Needs{{0, {{0, 112}}}});
  CHECK(needs_of(*heads, 0, 1, needs).empty());
}

TEST_CASE("wrong needs and wrong ranks are refused") {
  const auto table = table_of(one_rank({of_layers({0})}), one_rank({of_layers({0})}));
  CHECK_FALSE(needs_by_sender_group(*table, 0, 0, std::vector<GroupNeed>{{1, 0, 16, {{0, 16}}}}));
  CHECK_FALSE(needs_by_sender_group(*table, 0, 0, std::vector<GroupNeed>{{0, 0, 16, {{0, 9}}}}));
  const auto unknown = needs_by_sender_group(*table, 0, 7, std::vector<GroupNeed>{});
  REQUIRE_FALSE(unknown);
  CHECK(unknown.error().code == Code::kNotFound);
}

TEST_CASE("ranges are united, touching ones joined") {
  const auto unite = [](Ranges a, Ranges b) { return unite_ranges(a, b); };
  CHECK(unite({}, {}).empty());
  CHECK(unite({{0, 4}}, {{4, 8}}) == Ranges{{0, 8}});
  CHECK(unite({{0, 4}, {8, 12}, {20, 24}}, {{2, 9}, {24, 30}, {40, 41}}) ==
        Ranges{{0, 12}, {20, 30}, {40, 41}});
  CHECK(unite({{0, 100}}, {{5, 10}, {90, 110}}) == Ranges{{0, 110}});
  CHECK(unite({{3, 3}}, {{1, 2}}) == Ranges{{1, 2}});
}

}  // namespace kvferry::mapping::test
