#include <algorithm>
#include <catch2/catch.hpp>
#include <cstdint>
#include <string>
#include <vector>

#include "kvferry/layout.h"

namespace kvferry::client {
namespace {

constexpr uint64_t kDim = 8, kTokens = 4, kHeads = 3, kBlocks = 5;

AttentionShape shape_of(KvPacking packing, TokenOrder order) {
  AttentionShape s;
  s.layers = {2, 3};
  s.heads_total = 12;
  s.head_begin = 6;
  s.head_count = kHeads;
  s.tokens_per_block = kTokens;
  s.block_count = kBlocks;
  s.head_bytes = kDim;
  s.packing = packing;
  s.token_order = order;
  return s;
}

uint64_t address(const Plane& p, uint64_t block, uint64_t unit, uint64_t token) {
  return p.offset + block * p.block_stride + unit * p.unit_stride + token * p.token_stride;
}

// The planes of the group fill `bytes` without a gap, no byte twice.
void check_tiles(const Group& group, uint64_t bytes) {
  std::vector<int> covered(bytes, 0);
  for (const Plane& plane : group.planes)
    for (uint64_t block = 0; block < group.block_count; ++block)
      for (uint64_t unit = 0; unit < plane.unit_count; ++unit)
        for (uint64_t token = 0; token < group.tokens_per_block; ++token) {
          const uint64_t at = address(plane, block, unit, token);
          REQUIRE(at + plane.cell_bytes <= bytes);
          for (uint64_t i = 0; i < plane.cell_bytes; ++i) ++covered[at + i];
        }
  CHECK(std::all_of(covered.begin(), covered.end(), [](int n) { return n == 1; }));
}

}  // namespace

TEST_CASE("every packing and order of heads and tokens fills its tensor exactly") {
  const auto packing = GENERATE(KvPacking::kSeparate, KvPacking::kPerToken,
                                KvPacking::kPerHeadBlock, KvPacking::kHeadAxis);
  const auto order = GENERATE(TokenOrder::kHeadMajor, TokenOrder::kTokenMajor);
  const AttentionShape shape = shape_of(packing, order);
  const uint64_t layer = block_bytes(shape) * kBlocks;
  CHECK(layer == 2 * kDim * kTokens * kHeads * kBlocks);

  auto per_layer = per_layer_group(shape, 0, {layer, 0});
  REQUIRE(per_layer);
  check_tiles(*per_layer, 2 * layer);
  CHECK(per_layer->planes[0].layer == 2);
  CHECK(per_layer->planes[0].offset >= layer);
  CHECK(per_layer->planes[3].role == "value");
  CHECK(per_layer->planes[3].unit_begin == 6);

  auto crossed = cross_layer_group(shape, 0);
  REQUIRE(crossed);
  check_tiles(*crossed, 2 * layer);

  if (packing != KvPacking::kSeparate) return;
  auto outside = per_layer_group(shape, 0, {0, layer}, true);
  REQUIRE(outside);
  check_tiles(*outside, 2 * layer);
  auto split = split_group(shape, 0, {0, layer}, {layer / 2, layer + layer / 2});
  REQUIRE(split);
  check_tiles(*split, 2 * layer);
}

TEST_CASE("packings of one shape place value bytes where their backends read them") {
  const auto value = [](KvPacking packing, TokenOrder order) {
    return per_layer_group(shape_of(packing, order), 0, {0, 10000})->planes[1];
  };
  // [blocks, 2, heads, tokens, dim]
  CHECK(value(KvPacking::kSeparate, TokenOrder::kHeadMajor).offset == kDim * kTokens * kHeads);
  // [blocks, heads, tokens, 2 * dim]
  const Plane per_token = value(KvPacking::kPerToken, TokenOrder::kHeadMajor);
  CHECK(per_token.offset == kDim);
  CHECK(per_token.token_stride == 2 * kDim);
  CHECK(per_token.unit_stride == 2 * kDim * kTokens);
  // [blocks, heads, 2, tokens, dim]
  const Plane per_head = value(KvPacking::kPerHeadBlock, TokenOrder::kHeadMajor);
  CHECK(per_head.offset == kDim * kTokens);
  CHECK(per_head.token_stride == kDim);
  CHECK(per_head.unit_stride == 2 * kDim * kTokens);
  // [blocks, tokens, 2 * heads, dim]
  const Plane head_axis = value(KvPacking::kHeadAxis, TokenOrder::kTokenMajor);
  CHECK(head_axis.offset == kDim * kHeads);
  CHECK(head_axis.token_stride == 2 * kDim * kHeads);
}

TEST_CASE("latent layouts hold one unsharded plane a layer") {
  AttentionShape shape = shape_of(KvPacking::kPerToken, TokenOrder::kHeadMajor);
  auto group = latent_group(shape, 1, {0, kDim * kTokens * kBlocks});
  REQUIRE(group);
  REQUIRE(group->planes.size() == 2);
  CHECK(group->planes[0].role == "latent");
  CHECK(group->planes[0].units_total == 1);
  CHECK(group->planes[0].pool == 1);
  check_tiles(*group, 2 * kDim * kTokens * kBlocks);
}

TEST_CASE("shapes that cannot be are refused by field") {
  const auto field_of = [](auto change) {
    AttentionShape shape = shape_of(KvPacking::kSeparate, TokenOrder::kHeadMajor);
    change(shape);
    auto group = cross_layer_group(shape, 0);
    return group ? std::string("accepted") : group.error().field;
  };
  CHECK(field_of([](AttentionShape& s) { s.layers.clear(); }) == "layers");
  CHECK(field_of([](AttentionShape& s) { s.tokens_per_block = 0; }) == "tokens_per_block");
  CHECK(field_of([](AttentionShape& s) { s.block_count = 0; }) == "block_count");
  CHECK(field_of([](AttentionShape& s) { s.head_bytes = 0; }) == "head_bytes");
  CHECK(field_of([](AttentionShape& s) { s.head_begin = 10; }) == "head_count");
  CHECK(field_of([](AttentionShape& s) { s.head_bytes = uint64_t{1} << 63; }).empty());
  const AttentionShape shape = shape_of(KvPacking::kPerToken, TokenOrder::kHeadMajor);
  CHECK(per_layer_group(shape, 0, {0}).error().field == "layer_offsets");
  CHECK(per_layer_group(shape, 0, {0, 1}, true).error().field == "kv_outside");
  CHECK(split_group(shape, 0, {0, 1}, {2, 3}).error().field == "packing");
}

}  // namespace kvferry::client
