#include <limits>

#include "tests/proc/bad_input_rows.h"

namespace kvferry::bad_input {
namespace {

constexpr uint64_t kHuge = std::numeric_limits<uint64_t>::max();

v1::Plane token_plane(uint32_t layer, const std::string& role, uint64_t offset) {
  v1::Plane plane;
  plane.set_layer(layer);
  plane.set_role(role);
  plane.set_units_total(2);
  plane.set_unit_count(2);
  plane.set_granularity(v1::GRANULARITY_TOKEN);
  plane.set_cell_bytes(32);
  plane.set_type("bf16");
  plane.set_offset_bytes(offset);
  plane.set_block_stride_bytes(2048);
  plane.set_unit_stride_bytes(512);
  plane.set_token_stride_bytes(32);
  return plane;
}

void add_token_group(v1::RankLayout& layout, uint32_t layer, uint64_t window) {
  v1::Group& group = *layout.add_groups();
  group.set_tokens_per_block(16);
  group.set_sliding_window_tokens(window);
  group.set_block_count(8);
  *group.add_planes() = token_plane(layer, "key", 0);
  *group.add_planes() = token_plane(layer, "value", 1024);
}

using Spoil = std::function<void(v1::RankLayout&)>;

// Spoils that get at a group or a plane at once.
Spoil group(int g, std::function<void(v1::Group&)> spoil) {
  return [=](v1::RankLayout& layout) { spoil(*layout.mutable_groups(g)); };
}
Spoil plane(int g, int p, std::function<void(v1::Plane&)> spoil) {
  return [=](v1::RankLayout& layout) { spoil(*layout.mutable_groups(g)->mutable_planes(p)); };
}
Spoil plane(std::function<void(v1::Plane&)> spoil) {
  return plane(0, 0, std::move(spoil));
}

constexpr Code kInvalid = Code::kInvalidArgument;

Rows<v1::RankLayout> rank_rows() {
  return {
      {"no topology", [](auto& l) { l.clear_topology(); }, kInvalid, "MISSING", "topology"},
      {"a rank beyond the count", [](auto& l) { l.mutable_topology()->set_rank(1); }, kInvalid,
       "OUT_OF_RANGE", "topology.rank"},
      {"too many ranks", [](auto& l) { l.mutable_topology()->set_rank_count(4097); }, kInvalid,
       "OUT_OF_RANGE", "topology.rank_count"},
      {"a dp group beyond all", [](auto& l) { l.mutable_topology()->set_dp_group(4096); }, kInvalid,
       "OUT_OF_RANGE", "topology.dp_group"},
      {"a long fingerprint", [](auto& l) { l.set_fingerprint(std::string(257, 'f')); }, kInvalid,
       "OUT_OF_RANGE", "fingerprint"},
      {"no group", [](auto& l) { l.clear_groups(); }, kInvalid, "OUT_OF_RANGE", "groups"},
      {"too many groups",
       [](auto& l) {
         while (l.groups_size() < 65) *l.add_groups() = l.groups(0);
       },
       kInvalid, "TOO_FRAGMENTED", "groups"},
      {"too many planes",
       [](auto& l) {
         while (l.groups(0).planes_size() < 4096)
           *l.mutable_groups(0)->add_planes() = l.groups(0).planes(0);
       },
       kInvalid, "TOO_FRAGMENTED", "groups"},
  };
}

Rows<v1::RankLayout> group_rows() {
  return {
      {"a group without planes", group(0, [](auto& g) { g.clear_planes(); }), kInvalid,
       "OUT_OF_RANGE", "groups[0].planes"},
      {"blocks of no token", group(0, [](auto& g) { g.set_tokens_per_block(0); }), kInvalid,
       "OUT_OF_RANGE", "groups[0].tokens_per_block"},
      {"blocks of 2^64 - 1 tokens", group(0, [](auto& g) { g.set_tokens_per_block(kHuge); }),
       kInvalid, "OUT_OF_RANGE", "groups[0].tokens_per_block"},
      {"states of two tokens", group(1, [](auto& g) { g.set_tokens_per_block(2); }), kInvalid,
       "OUT_OF_RANGE", "groups[1].tokens_per_block"},
      {"tokens dealt to too many ranks", group(0, [](auto& g) { g.set_cp_size(4097); }), kInvalid,
       "OUT_OF_RANGE", "groups[0].cp_size"},
      {"states dealt to ranks", group(1, [](auto& g) { g.set_cp_size(2); }), kInvalid,
       "OUT_OF_RANGE", "groups[1].cp_size"},
      {"a place beyond the dealing", group(0, [](auto& g) { g.set_cp_index(1); }), kInvalid,
       "OUT_OF_RANGE", "groups[0].cp_index"},
      {"dealing that splits blocks unevenly",
       group(0, [](auto& g) { g.set_cp_interleave_tokens(5); }), kInvalid, "NOT_A_DIVISOR",
       "groups[0].cp_interleave_tokens"},
      {"an unknown tail", group(0, [](auto& g) { g.set_tail(static_cast<v1::Tail>(9)); }), kInvalid,
       "UNKNOWN_VALUE", "groups[0].tail"},
      {"no block", group(0, [](auto& g) { g.set_block_count(0); }), kInvalid, "OUT_OF_RANGE",
       "groups[0].block_count"},
      {"more blocks than ids", group(0, [](auto& g) { g.set_block_count(uint64_t{1} << 31); }),
       kInvalid, "OUT_OF_RANGE", "groups[0].block_count"},
      {"more blocks than the pool", group(0, [](auto& g) { g.set_block_count(11); }), kInvalid,
       "OUT_OF_RANGE", "groups[0].planes[0].block_stride_bytes"},
      {"ids of more blocks than there are", group(0, [](auto& g) { g.set_blocks_per_id(9); }),
       kInvalid, "OUT_OF_RANGE", "groups[0].blocks_per_id"},
      {"shared storage without a shared id space", group(2, [](auto& g) { g.set_id_space(7); }),
       kInvalid, "GROUPS_OVERLAP", "groups[2].id_space"},
  };
}

Rows<v1::RankLayout> content_rows() {
  return {
      {"a layer beyond all", plane([](auto& p) { p.set_layer(65536); }), kInvalid, "OUT_OF_RANGE",
       "groups[0].planes[0].layer"},
      {"a layer that two groups hold", plane(2, 0, [](auto& p) { p.set_layer(0); }), kInvalid,
       "ROLE_IN_TWO_GROUPS", "groups[2].planes[0].role"},
      {"no role", plane([](auto& p) { p.clear_role(); }), kInvalid, "BAD_NAME",
       "groups[0].planes[0].role"},
      {"a role in capitals", plane([](auto& p) { p.set_role("KEY"); }), kInvalid, "BAD_NAME",
       "groups[0].planes[0].role"},
      {"a long role", plane([](auto& p) { p.set_role(std::string(64, 'k')); }), kInvalid,
       "BAD_NAME", "groups[0].planes[0].role"},
      {"a cell held twice", plane(0, 1, [](auto& p) { p.set_role("key"); }), kInvalid,
       "CELL_HELD_TWICE", "groups[0].planes[1].unit_begin"},
      {"too many units", plane([](auto& p) { p.set_units_total(65537); }), kInvalid, "OUT_OF_RANGE",
       "groups[0].planes[0].units_total"},
      {"a first unit beyond all", plane([](auto& p) { p.set_unit_begin(2); }), kInvalid,
       "OUT_OF_RANGE", "groups[0].planes[0].unit_begin"},
      {"more units than there are", plane([](auto& p) { p.set_unit_count(3); }), kInvalid,
       "OUT_OF_RANGE", "groups[0].planes[0].unit_count"},
      {"units that overflow", plane([](auto& p) {
         p.set_unit_begin(1);
         p.set_unit_count(std::numeric_limits<uint32_t>::max());
       }),
       kInvalid, "OUT_OF_RANGE", "groups[0].planes[0].unit_count"},
      {"no granularity", plane([](auto& p) { p.clear_granularity(); }), kInvalid, "UNKNOWN_VALUE",
       "groups[0].planes[0].granularity"},
      {"an unknown granularity",
       plane([](auto& p) { p.set_granularity(static_cast<v1::Granularity>(9)); }), kInvalid,
       "UNKNOWN_VALUE", "groups[0].planes[0].granularity"},
      {"a state among tokens", plane([](auto& p) { p.set_granularity(v1::GRANULARITY_REQUEST); }),
       kInvalid, "GRANULARITY_MIXED", "groups[0].planes"},
      {"no type", plane([](auto& p) { p.clear_type(); }), kInvalid, "BAD_NAME",
       "groups[0].planes[0].type"},
      {"an order without all axes", plane([](auto& p) { p.set_order("lrb"); }), kInvalid,
       "BAD_ORDER", "groups[0].planes[0].order"},
      {"an order with tokens before blocks", plane([](auto& p) { p.set_order("lrtub"); }), kInvalid,
       "BAD_ORDER", "groups[0].planes[0].order"},
  };
}

Rows<v1::RankLayout> address_rows() {
  return {
      {"cells of no byte", plane([](auto& p) { p.set_cell_bytes(0); }), kInvalid, "OUT_OF_RANGE",
       "groups[0].planes[0].cell_bytes"},
      {"cells of 2^64 - 1 bytes", plane([](auto& p) { p.set_cell_bytes(kHuge); }), kInvalid,
       "OUT_OF_RANGE", "groups[0].planes[0].cell_bytes"},
      {"cells longer than a token", plane([](auto& p) { p.set_cell_bytes(33); }), kInvalid,
       "PLANES_OVERLAP", "groups[0].planes[0].block_stride_bytes"},
      {"a pool that is not listed", plane([](auto& p) { p.set_pool(1); }), kInvalid, "UNKNOWN_POOL",
       "groups[0].planes[0].pool"},
      {"a plane behind its pool", plane([](auto& p) { p.set_offset_bytes(kPoolBytes); }), kInvalid,
       "OUT_OF_RANGE", "groups[0].planes[0].offset_bytes"},
      {"an offset that overflows", plane([](auto& p) { p.set_offset_bytes(kHuge - 16); }), kInvalid,
       "OUT_OF_RANGE", "groups[0].planes[0].offset_bytes"},
      {"planes that meet", plane(0, 1, [](auto& p) { p.set_offset_bytes(512); }), kInvalid,
       "PLANES_OVERLAP", "groups[0].planes[1].offset_bytes"},
      {"blocks closer than tokens", plane([](auto& p) { p.set_block_stride_bytes(16); }), kInvalid,
       "OUT_OF_RANGE", "groups[0].planes[0].block_stride_bytes"},
      {"blocks that overlap", plane([](auto& p) { p.set_block_stride_bytes(512); }), kInvalid,
       "PLANES_OVERLAP", "groups[0].planes[0].block_stride_bytes"},
      {"a block stride that overflows", plane([](auto& p) { p.set_block_stride_bytes(kHuge); }),
       kInvalid, "OUT_OF_RANGE", "groups[0].planes[0].block_stride_bytes"},
      {"a unit stride that overflows", plane([](auto& p) { p.set_unit_stride_bytes(kHuge); }),
       kInvalid, "OUT_OF_RANGE", "groups[0].planes[0].unit_stride_bytes"},
      {"a token stride beyond the pool", plane([](auto& p) { p.set_token_stride_bytes(1024); }),
       kInvalid, "OUT_OF_RANGE", "groups[0].planes[0].token_stride_bytes"},
  };
}

}  // namespace

v1::RankLayout good_layout() {
  v1::RankLayout layout;
  layout.mutable_topology()->set_rank_count(1);
  layout.set_fingerprint("model");
  add_token_group(layout, 0, 0);
  v1::Group& state = *layout.add_groups();
  state.set_tokens_per_block(1);
  state.set_block_count(4);
  state.set_id_space(1);
  v1::Plane& plane = *state.add_planes();
  plane.set_role("state");
  plane.set_granularity(v1::GRANULARITY_REQUEST);
  plane.set_cell_bytes(256);
  plane.set_type("f32");
  plane.set_offset_bytes(16384);
  plane.set_block_stride_bytes(256);
  add_token_group(layout, 1, 64);
  v1::PoolSpan& pool = *layout.add_pools();
  pool.set_name(kPool);
  pool.set_bytes(kPoolBytes);
  return layout;
}

Rows<v1::RankLayout> layout_rows() {
  Rows<v1::RankLayout> rows = rank_rows();
  for (auto* part : {&group_rows, &content_rows, &address_rows})
    for (Row<v1::RankLayout>& row : part()) rows.push_back(std::move(row));
  rows.push_back({"no pool", [](auto& l) { l.clear_pools(); }, kInvalid, "OUT_OF_RANGE", "pools"});
  rows.push_back({"a pool twice", [](auto& l) { *l.add_pools() = l.pools(0); }, kInvalid,
                  "NAME_TWICE", "pools"});
  rows.push_back({"too many pools",
                  [](auto& l) {
                    while (l.pools_size() < 4097) *l.add_pools() = l.pools(0);
                  },
                  kInvalid, "TOO_FRAGMENTED", "pools"});
  rows.push_back({"a pool of no byte", [](auto& l) { l.mutable_pools(0)->set_bytes(0); }, kInvalid,
                  "OUT_OF_RANGE", "pools[0].bytes"});
  return rows;
}

Rows<v1::RankLayout> pool_span_rows() {
  return {
      {"a pool without a name", [](auto& l) { l.mutable_pools(0)->clear_name(); }, kInvalid,
       "BAD_NAME", "pools[0].name"},
      {"a pool with a space", [](auto& l) { l.mutable_pools(0)->set_name("k v"); }, kInvalid,
       "BAD_NAME", "pools[0].name"},
      {"a pool of 2^64 - 1 bytes", [](auto& l) { l.mutable_pools(0)->set_bytes(kHuge); }, kInvalid,
       "OUT_OF_RANGE", "pools[0].bytes"},
      {"a pool too small for its planes", [](auto& l) { l.mutable_pools(0)->set_bytes(16384); },
       kInvalid, "OUT_OF_RANGE", "groups[1].planes[0].offset_bytes"},
  };
}

std::vector<Exempt> layout_exempt() {
  return {
      {"groups.sliding_window_tokens", "a window of any length means something"},
      {"groups.planes.optional", "both values mean something"},
  };
}

}  // namespace kvferry::bad_input
