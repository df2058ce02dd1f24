// Needs, offers and what moves between groups of different block sizes.
#include <algorithm>
#include <catch2/catch.hpp>
#include <numeric>
#include <random>

#include "daemon/mapping/coverage.h"
#include "daemon/mapping/tokens.h"
#include "tests/unit/mapping_support.h"

using namespace kvferry;
using namespace kvferry::mapping;
using namespace kvferry::mapping::test;

namespace {

using Ranges = std::vector<Range>;

RankLayout layout_with(uint64_t block, uint64_t window = 0, uint64_t block_count = 1024) {
  RankLayout layout;
  GroupSpec spec;
  spec.layers = {0};
  spec.block = block;
  spec.window = window;
  spec.block_count = block_count;
  spec.cell_bytes = 16;
  add_group(layout, spec);
  return layout;
}

GroupBlocks first_ids(uint64_t count) {
  GroupBlocks blocks;
  blocks.ids.resize(count);
  std::iota(blocks.ids.begin(), blocks.ids.end(), 0);
  return blocks;
}

Ranges need_of(const RankLayout& layout, uint64_t prompt, uint64_t cached) {
  const uint64_t count = ceil_div(prompt, layout.groups[0].tokens_per_block);
  const GroupReceive receive{prompt, cached, first_ids(count)};
  const auto needs = compute_needs(layout, std::span(&receive, 1));
  REQUIRE(needs);
  return needs->empty() ? Ranges{} : needs->at(0).ranges;
}

Ranges moved_between(uint64_t sender_block, uint64_t receiver_block, uint64_t prompt,
                     uint64_t cached, uint64_t window) {
  const RankLayout sender = layout_with(sender_block);
  const RankLayout receiver = layout_with(receiver_block, window);
  const GroupReceive receive{prompt, cached, first_ids(ceil_div(prompt, receiver_block))};
  const GroupOffer offer{prompt, {0, prompt}, first_ids(ceil_div(prompt, sender_block))};
  const auto needs = compute_needs(receiver, std::span(&receive, 1));
  const auto offered = round_offer(sender, std::span(&offer, 1));
  REQUIRE(needs);
  REQUIRE(offered);
  return intersect_ranges(wanted_ranges(sender.groups[0], needs->at(0)), offered->at(0).ranges);
}

Ranges offer_of(const RankLayout& layout, uint64_t prompt, Range tokens, GroupBlocks blocks) {
  const GroupOffer offer{prompt, tokens, std::move(blocks)};
  const auto offered = round_offer(layout, std::span(&offer, 1));
  REQUIRE(offered);
  return offered->empty() ? Ranges{} : offered->at(0).ranges;
}

}  // namespace

TEST_CASE("a window and a cached prefix leave the blocks that are still needed") {
  const RankLayout w16 = layout_with(8, 16);
  CHECK(need_of(w16, 32, 0) == Ranges{{16, 32}});
  CHECK(need_of(w16, 32, 24) == Ranges{{24, 32}});
  CHECK(need_of(w16, 32, 32).empty());
  CHECK(need_of(layout_with(8, 24), 32, 16) == Ranges{{16, 32}});
  CHECK(need_of(layout_with(8, 0), 32, 0) == Ranges{{0, 32}});
  CHECK(need_of(layout_with(8, 100), 32, 0) == Ranges{{0, 32}});
  CHECK(need_of(layout_with(8, 0), 0, 0).empty());
}

TEST_CASE("unequal blocks move what both sides' rounding allows") {
  CHECK(moved_between(16, 64, 20, 0, 0) == Ranges{{0, 32}});
  CHECK(moved_between(64, 16, 20, 0, 0) == Ranges{{0, 32}});
  CHECK(moved_between(48, 32, 50, 0, 0) == Ranges{{0, 64}});
  CHECK(moved_between(8, 16, 40, 0, 16) == Ranges{{24, 40}});
  CHECK(moved_between(16, 8, 40, 0, 16) == Ranges{{24, 40}});
  CHECK(moved_between(48, 32, 100, 50, 0) == Ranges{{32, 128}});
}

TEST_CASE("an offer's edges round down, but up at the prompt's end") {
  const RankLayout layout = layout_with(16);
  CHECK(offer_of(layout, 50, {0, 20}, first_ids(2)) == Ranges{{0, 16}});
  CHECK(offer_of(layout, 50, {20, 50}, first_ids(4)) == Ranges{{16, 64}});
  CHECK(offer_of(layout, 50, {50, 50}, first_ids(4)).empty());
  CHECK(offer_of(layout, 50, {33, 40}, first_ids(4)).empty());
  GroupBlocks later = first_ids(2);
  later.first_block = 2;
  CHECK(offer_of(layout, 50, {0, 50}, later) == Ranges{{32, 64}});
}

TEST_CASE("holes are neither needed nor offered") {
  const RankLayout layout = layout_with(16);
  GroupBlocks blocks;
  blocks.ids = {kHole, 4, kHole, kHole, 9, 7};
  CHECK(offer_of(layout, 96, {0, 96}, blocks) == Ranges{{16, 32}, {64, 96}});
  const GroupReceive receive{90, 0, blocks};
  const auto needs = compute_needs(layout, std::span(&receive, 1));
  REQUIRE(needs);
  CHECK(needs->at(0).begin == 0);
  CHECK(needs->at(0).end == 90);
  CHECK(needs->at(0).ranges == Ranges{{16, 32}, {64, 96}});
}

TEST_CASE("holes of a dealt group leave out only what the rank stores") {
  RankLayout layout = layout_with(8);
  layout.groups[0].cp_size = 2;
  layout.groups[0].cp_index = 1;
  layout.groups[0].cp_interleave = 4;
  GroupBlocks blocks;
  blocks.ids = {3, kHole, 5};
  // Local block 1 is local positions 8 to 15: globally 20-23 and 28-31.
  const GroupReceive receive{48, 0, blocks};
  const auto needs = compute_needs(layout, std::span(&receive, 1));
  REQUIRE(needs);
  CHECK(needs->at(0).ranges == Ranges{{0, 20}, {24, 28}, {32, 48}});
}

TEST_CASE("dealt positions are found by closed forms") {
  for (const uint64_t interleave : {1U, 3U, 8U}) {
    for (const uint32_t size : {1U, 2U, 5U}) {
      for (uint32_t index = 0; index < size; ++index) {
        const Dealing dealing{index, size, interleave};
        uint64_t stored = 0;
        for (uint64_t position = 0; position < 200; ++position) {
          REQUIRE(dealing.stored_below(position) == stored);
          if (!dealing.stores(position)) continue;
          REQUIRE(dealing.local(position) == stored);
          ++stored;
        }
      }
    }
  }
}

TEST_CASE("block ids are checked up to the prompt's end") {
  const RankLayout layout = layout_with(16, 0, 10);
  const auto error_of = [&](std::vector<int32_t> ids, uint64_t prompt) {
    GroupReceive receive{prompt, 0, {}};
    receive.blocks.ids = std::move(ids);
    const auto needs = compute_needs(layout, std::span(&receive, 1));
    return needs ? Error{} : needs.error();
  };
  CHECK(error_of({1, 10}, 32).reason == "BLOCK_OUT_OF_RANGE");
  CHECK(error_of({1, 10}, 32).field == "groups[0].block_ids[1]");
  CHECK(error_of({1, 10}, 16).reason.empty());  // past the prompt
  CHECK(error_of({1, -2}, 32).reason == "BLOCK_OUT_OF_RANGE");
  CHECK(error_of({4, kHole, 4}, 48).reason == "BLOCK_TWICE");
  CHECK(error_of({4, kHole, 4}, 48).field == "groups[0].block_ids[2]");
  CHECK(error_of({1, 2}, UINT64_MAX).reason == "OUT_OF_RANGE");
  GroupReceive receive{16, 0, {}};
  receive.blocks.group = 1;
  CHECK(compute_needs(layout, std::span(&receive, 1)).error().reason == "UNKNOWN_GROUP");
  const std::vector<GroupReceive> twice(2, GroupReceive{16, 0, first_ids(1)});
  CHECK(compute_needs(layout, twice).error().reason == "GROUP_TWICE");
}

TEST_CASE("an id that stands twice is found among few and many, near and far") {
  constexpr uint64_t kIds = 1U << 30;
  const RankLayout layout = layout_with(16, 0, kIds);
  for (const int32_t stride : {1, 3, 70, 1'000'003}) {
    for (const std::size_t count : {2U, 3U, 63U, 1000U}) {
      CAPTURE(stride, count);
      GroupReceive receive{16 * count, 0, {}};
      for (std::size_t i = 0; i < count; ++i)
        receive.blocks.ids.push_back(static_cast<int32_t>(count - i) * stride);
      CHECK(compute_needs(layout, std::span(&receive, 1)));
      receive.blocks.ids.back() = receive.blocks.ids.front();
      const auto needs = compute_needs(layout, std::span(&receive, 1));
      REQUIRE_FALSE(needs);
      CHECK(needs.error().reason == "BLOCK_TWICE");
      CHECK(needs.error().field == "groups[0].block_ids[" + std::to_string(count - 1) + "]");
    }
  }
}

TEST_CASE("an id stands once in all groups of an id space") {
  RankLayout layout = layout_with(16);
  GroupSpec spec;
  spec.layers = {1};
  add_group(layout, spec);
  std::vector<GroupReceive> receives(2, GroupReceive{16, 0, first_ids(1)});
  receives[1].blocks.group = 1;
  const auto needs = compute_needs(layout, receives);
  REQUIRE_FALSE(needs);
  CHECK(needs.error().reason == "BLOCK_TWICE");
  CHECK(needs.error().field == "groups[1].block_ids[0]");
  layout.groups[1].id_space = 1;
  CHECK(compute_needs(layout, receives));
  const std::vector<GroupOffer> offers{{16, {0, 16}, first_ids(1)}, {16, {0, 16}, {1, 0, {0}}}};
  layout.groups[1].id_space = 0;
  CHECK(round_offer(layout, offers));  // a sender may name a block twice
}

TEST_CASE("ranges beyond the limit are refused") {
  const RankLayout layout = layout_with(1, 0, 1 << 20);
  GroupBlocks blocks;
  for (int32_t i = 0; i < 10000; ++i) blocks.ids.push_back(i % 2 == 0 ? i : kHole);
  const GroupReceive receive{10000, 0, blocks};
  const auto needs = compute_needs(layout, std::span(&receive, 1));
  REQUIRE_FALSE(needs);
  CHECK(needs.error().reason == "TOO_FRAGMENTED");
}

TEST_CASE("a peer's ranges are checked against its holding") {
  const Holding holding = holding_of(layout_with(16));
  const auto reason = [&](GroupNeed need) {
    const Status status = validate_needs(holding, std::span(&need, 1));
    return status ? std::string() : status.error().reason;
  };
  CHECK(reason({0, 0, 40, {{0, 48}}}).empty());
  CHECK(reason({0, 0, 40, {{0, 16}, {32, 48}}}).empty());
  CHECK(reason({0, 0, 40, {{0, 64}}}) == "BAD_RANGES");            // past the end
  CHECK(reason({0, 20, 40, {{0, 48}}}) == "BAD_RANGES");           // before the start
  CHECK(reason({0, 0, 40, {{0, 16}, {16, 32}}}) == "BAD_RANGES");  // touching
  CHECK(reason({0, 0, 40, {{16, 32}, {0, 16}}}) == "BAD_RANGES");
  CHECK(reason({0, 0, 40, {{0, 40}}}) == "BAD_RANGES");  // not rounded
  CHECK(reason({0, 40, 40, {}}) == "OUT_OF_RANGE");
  CHECK(reason({0, 0, UINT64_MAX, {}}) == "OUT_OF_RANGE");
  CHECK(reason({1, 0, 40, {}}) == "UNKNOWN_GROUP");
  GroupRanges offer{0, {{0, UINT64_MAX - 15}}};
  CHECK_FALSE(validate_offer(holding, std::span(&offer, 1)));
  offer.ranges = {{16, 16}};
  CHECK_FALSE(validate_offer(holding, std::span(&offer, 1)));
  offer.ranges = {{16, 64}};
  CHECK(validate_offer(holding, std::span(&offer, 1)));
}

TEST_CASE("a request group moves its one slot, or nothing if it is cached") {
  RankLayout layout;
  GroupSpec spec;
  spec.layers = {0};
  spec.roles = {"conv"};
  spec.granularity = Granularity::kRequest;
  spec.block = 1;
  add_group(layout, spec);
  REQUIRE_FALSE(layout.pools.empty());
  GroupReceive receive{777, 0, {0, 0, {5}}};
  CHECK(compute_needs(layout, std::span(&receive, 1))->at(0).ranges == Ranges{{0, 1}});
  receive.cached = 1;
  CHECK(compute_needs(layout, std::span(&receive, 1))->empty());
  receive.cached = 2;
  CHECK_FALSE(compute_needs(layout, std::span(&receive, 1)));
}

TEST_CASE("a set of layers and tokens agrees with a plain grid") {
  std::mt19937 random(7);
  constexpr uint64_t kLayers = 12;
  constexpr uint64_t kTokens = 40;
  for (int round = 0; round < 200; ++round) {
    LayerTokenSet set;
    bool grid[kLayers][kTokens] = {};
    for (int step = 0; step < 12; ++step) {
      const uint64_t l = random() % kLayers;
      const Range layers{l, l + 1 + random() % (kLayers - l)};
      Ranges ranges;
      for (uint64_t t = random() % 10; t < kTokens; t += 1 + random() % 12) {
        const uint64_t end = std::min(kTokens, t + 1 + random() % 8);
        ranges.push_back({t, end});
        t = end;
      }
      std::optional<uint64_t> common;
      for (uint64_t t = kTokens; t-- > 0;)
        for (uint64_t layer = layers.begin; layer < layers.end; ++layer)
          for (const Range& range : ranges)
            if (t >= range.begin && t < range.end && grid[layer][t]) common = t;
      REQUIRE(set.first_common(layers, ranges) == common);
      const bool add = random() % 3 != 0;
      if (add)
        set.insert(layers, ranges);
      else
        set.erase(layers, ranges);
      for (uint64_t layer = layers.begin; layer < layers.end; ++layer)
        for (const Range& range : ranges)
          for (uint64_t t = range.begin; t < range.end; ++t) grid[layer][t] = add;
    }
    const Range all{0, kTokens};
    for (uint64_t layer = 0; layer < kLayers; ++layer) {
      const Ranges missing = set.missing(layer, std::span(&all, 1));
      for (uint64_t t = 0; t < kTokens; ++t) {
        const bool absent = std::any_of(missing.begin(), missing.end(), [&](const Range& range) {
          return t >= range.begin && t < range.end;
        });
        REQUIRE(absent == !grid[layer][t]);
      }
    }
  }
}
