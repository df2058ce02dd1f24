// Packed copies: what they keep, where it lies, and that a stream brings the same bytes from there.
// Random layouts go through packed copies in stream_plan_model_test.cc.
#include <catch2/catch.hpp>

#include "tests/unit/mapping_support.h"
#include "tests/unit/packed_support.h"

using namespace kvferry;
using namespace kvferry::mapping;
using namespace kvferry::mapping::test;

namespace {

// Two layers of keys and values, 4 heads, blocks of 16 tokens, 64 bytes a cell: 4 KiB a plane's
// block.
GroupSpec small_group() {
  GroupSpec spec;
  spec.layers = {0, 1};
  spec.units_total = 4;
  spec.units = {0, 4};
  spec.cell_bytes = 64;
  return spec;
}

RankLayout one_group(const GroupSpec& spec) {
  RankLayout layout;
  add_group(layout, spec);
  return layout;
}

constexpr uint64_t kPlaneBlock = 16 * 4 * 64;

std::vector<int32_t> ids_of(const PackedShape& shape) {
  REQUIRE(shape.blocks.size() == 1);
  return shape.blocks[0].ids;
}

}  // namespace

TEST_CASE("a packed copy keeps the blocks that the slice offers, and their order") {
  const RankLayout layout = one_group(small_group());
  const std::vector<GroupRanges> offer{{0, {{16, 48}, {64, 80}}}};
  const auto shape = packed_shape(layout, offer);
  REQUIRE(shape);
  CHECK(shape->bytes == 3 * 4 * kPlaneBlock);
  CHECK(shape->blocks[0].first_block == 1);
  CHECK(ids_of(*shape) == std::vector<int32_t>{0, 1, kHole, 2});
  CHECK(shape->layout.groups[0].block_count == 3);
  CHECK(validate_layout(shape->layout));
  CHECK(holding_of(shape->layout).groups[0].planes[0].order == "lrbut");
}

TEST_CASE("a packed copy of some layers has room for those alone") {
  const RankLayout layout = one_group(small_group());
  const std::vector<GroupRanges> offer{{0, {{0, 32}}}};
  const auto shape = packed_shape(layout, offer, Range{1, 2});
  REQUIRE(shape);
  CHECK(shape->bytes == 2 * 2 * kPlaneBlock);
  const auto none = packed_shape(layout, offer, Range{7, 9});
  REQUIRE(none);
  CHECK(none->bytes == 0);
  CHECK(none->blocks.empty());
}

TEST_CASE("ids that stand for several kernel blocks are kept block by block") {
  GroupSpec spec = small_group();
  spec.blocks_per_id = 2;
  spec.block_count = 8;
  const RankLayout layout = one_group(spec);
  const auto shape = packed_shape(layout, std::vector<GroupRanges>{{0, {{48, 64}}}});
  REQUIRE(shape);
  CHECK(shape->bytes == 4 * kPlaneBlock);
  CHECK(shape->layout.groups[0].blocks_per_id == 1);
  CHECK(shape->blocks[0].first_block == 3);
  CHECK(ids_of(*shape) == std::vector<int32_t>{0});
}

TEST_CASE("dealt tokens: whole local blocks are kept, of this rank's positions only") {
  GroupSpec spec = small_group();
  spec.cp_size = 4;
  spec.cp_index = 1;
  spec.interleave = 4;
  const RankLayout layout = one_group(spec);
  // Positions 4-8 and 20-24 are local 0-8, 132-136 local 32-36.
  const auto first = packed_shape(layout, std::vector<GroupRanges>{{0, {{0, 32}}}});
  REQUIRE(first);
  CHECK(ids_of(*first) == std::vector<int32_t>{0});
  const auto both = packed_shape(layout, std::vector<GroupRanges>{{0, {{0, 32}, {128, 144}}}});
  REQUIRE(both);
  CHECK(ids_of(*both) == std::vector<int32_t>{0, kHole, 1});
  const auto others = packed_shape(layout, std::vector<GroupRanges>{{0, {{8, 20}}}});
  REQUIRE(others);
  CHECK(others->bytes == 0);
}

TEST_CASE("axes nest in a packed copy as they do on the pages") {
  GroupSpec spec = small_group();
  spec.memory = "lr|btu";
  const auto shape = packed_shape(one_group(spec), std::vector<GroupRanges>{{0, {{0, 16}}}});
  REQUIRE(shape);
  const Plane& plane = shape->layout.groups[0].planes[0];
  CHECK(plane.unit_stride == 64);
  CHECK(plane.token_stride == 4 * 64);
}

TEST_CASE("a packed copy beyond what can be addressed, or of an unknown group, is refused") {
  RankLayout layout = one_group(small_group());
  layout.groups[0].planes[0].cell_bytes = uint64_t{1} << 58;
  const auto large = packed_shape(layout, std::vector<GroupRanges>{{0, {{0, 128}}}});
  REQUIRE_FALSE(large);
  CHECK(large.error().reason == "TOO_FRAGMENTED");
  const auto unknown = packed_shape(layout, std::vector<GroupRanges>{{1, {{0, 16}}}});
  REQUIRE_FALSE(unknown);
  CHECK(unknown.error().reason == "UNKNOWN_GROUP");
}

TEST_CASE("a packed copy of blocks that are not there is refused") {
  const RankLayout layout = one_group(small_group());
  const std::vector<GroupRanges> offer{{0, {{0, 32}}}};
  const auto shape = packed_shape(layout, offer);
  REQUIRE(shape);
  const auto bound = [&](std::vector<int32_t> ids) {
    const std::vector<GroupBlocks> blocks{{0, 0, std::move(ids)}};
    const auto copy = bind_packed(layout, blocks, offer, std::nullopt, *shape);
    return copy ? std::string() : copy.error().reason;
  };
  CHECK(bound({3, 5}).empty());
  CHECK(bound({3}) == "BLOCK_MISSING");
  CHECK(bound({3, 8}) == "BLOCK_OUT_OF_RANGE");
}

TEST_CASE("a sender may name one block twice: the packed copy has it twice") {
  const RankLayout layout = one_group(small_group());
  RankLayout to = one_group(small_group());
  const auto table = table_of({layout}, {to});
  const std::vector<GroupRanges> offer{{0, {{0, 32}}}};
  const std::vector<GroupNeed> needs{{0, 0, 32, {{0, 32}}}};
  const auto stream = compile_stream(*table, 0, 0, needs, offer);
  REQUIRE(stream);
  std::vector<std::vector<std::byte>> memory;
  std::vector<std::byte*> bases;
  for (const PoolSpan& pool : layout.pools) {
    memory.emplace_back(pool.bytes);
    for (std::size_t i = 0; i < pool.bytes; ++i)
      memory.back()[i] = static_cast<std::byte>((i * 31 + memory.size()) >> 3);
  }
  for (auto& pool : memory) bases.push_back(pool.data());
  const std::vector<GroupBlocks> blocks{{0, 0, {6, 6}}};
  const auto plan = bind_plan(*stream, Side::kSender, layout, blocks);
  REQUIRE(plan);
  std::vector<std::byte> bytes(stream->bytes);
  REQUIRE(kernels::gather(plan->form(), bases, 0, stream->bytes, bytes.data()));
  CHECK(packed_stream(layout, blocks, bases, offer, std::nullopt, *stream) == bytes);
}
