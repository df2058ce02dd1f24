// Layouts and instances that must be refused, and the field that each refusal names.
#include <algorithm>
#include <catch2/catch.hpp>
#include <functional>
#include <random>

#include "tests/unit/mapping_support.h"

using namespace kvferry;
using namespace kvferry::mapping;
using namespace kvferry::mapping::test;

namespace {

RankLayout good() {
  RankLayout layout = ranks_of({}, 2, 4, {})[0];
  GroupSpec latent;
  latent.layers = {2, 3};
  latent.roles = {"latent", "indexer_key"};
  latent.memory = "|brltu";
  latent.block = 32;
  latent.id_space = 1;
  add_group(layout, latent);
  return layout;
}

struct Case {
  const char* field;
  const char* reason;
  std::function<void(RankLayout&)> spoil;
};

std::vector<RankLayout> two_ranks() {
  return ranks_of({.tp = 2}, 2, 4, {});
}

}  // namespace

TEST_CASE("an ordinary layout is accepted in every memory form") {
  CHECK(validate_layout(good()));
  for (const char* memory :
       {"lr|but", "lr|btu", "l|brut", "l|brtu", "l|butr", "l|btur", "|blrut", "|blrtu", "|bultr",
        "|bltur", "|lrbut", "r|lbtu", "|ubrlt", "|rublt"}) {
    GroupSpec spec;
    spec.memory = memory;
    spec.padding = 64;
    INFO(memory);
    const Status status = validate_layout(ranks_of({}, 6, 4, spec)[0]);
    CHECK((status ? "" : status.error().to_string()) == std::string());
  }
}

TEST_CASE("every bad number of a layout is refused with its field's name") {
  const auto plane = [](RankLayout& layout) -> Plane& { return layout.groups[1].planes[2]; };
  const std::vector<Case> cases{
      {"topology.rank", "OUT_OF_RANGE", [](RankLayout& l) { l.topology.rank = 1; }},
      {"topology.rank_count", "OUT_OF_RANGE", [](RankLayout& l) { l.topology.rank_count = 0; }},
      {"topology.rank_count", "OUT_OF_RANGE", [](RankLayout& l) { l.topology.rank_count = 4097; }},
      {"topology.dp_group", "OUT_OF_RANGE", [](RankLayout& l) { l.topology.dp_group = 4096; }},
      {"fingerprint", "OUT_OF_RANGE", [](RankLayout& l) { l.fingerprint.assign(257, 'x'); }},
      {"groups", "OUT_OF_RANGE", [](RankLayout& l) { l.groups.clear(); }},
      {"groups", "OUT_OF_RANGE", [](RankLayout& l) { l.groups.resize(65); }},
      {"groups", "TOO_FRAGMENTED",
       [](RankLayout& l) { l.groups[0].planes.resize(4097, l.groups[0].planes[0]); }},
      {"pools", "OUT_OF_RANGE", [](RankLayout& l) { l.pools.clear(); }},
      {"pools[0].name", "BAD_NAME", [](RankLayout& l) { l.pools[0].name = "-x"; }},
      {"pools[1].bytes", "OUT_OF_RANGE", [](RankLayout& l) { l.pools[1].bytes = 0; }},
      {"pools[1].bytes", "OUT_OF_RANGE", [](RankLayout& l) { l.pools[1].bytes = UINT64_MAX; }},
      {"pools", "NAME_TWICE", [](RankLayout& l) { l.pools[1].name = l.pools[0].name; }},
      {"groups[1].planes", "OUT_OF_RANGE", [](RankLayout& l) { l.groups[1].planes.clear(); }},
      {"groups[1].tokens_per_block", "OUT_OF_RANGE",
       [](RankLayout& l) { l.groups[1].tokens_per_block = 0; }},
      {"groups[1].tokens_per_block", "OUT_OF_RANGE",
       [](RankLayout& l) { l.groups[1].tokens_per_block = UINT64_MAX; }},
      {"groups[1].cp_size", "OUT_OF_RANGE", [](RankLayout& l) { l.groups[1].cp_size = 0; }},
      {"groups[1].cp_index", "OUT_OF_RANGE", [](RankLayout& l) { l.groups[1].cp_index = 1; }},
      {"groups[1].cp_interleave", "NOT_A_DIVISOR",
       [](RankLayout& l) { l.groups[1].cp_interleave = 24; }},
      {"groups[1].cp_interleave", "NOT_A_DIVISOR",
       [](RankLayout& l) { l.groups[1].cp_interleave = UINT64_MAX; }},
      {"groups[1].tail", "OUT_OF_RANGE",
       [](RankLayout& l) { l.groups[1].tail = static_cast<Tail>(9); }},
      {"groups[1].block_count", "OUT_OF_RANGE", [](RankLayout& l) { l.groups[1].block_count = 0; }},
      {"groups[1].block_count", "OUT_OF_RANGE",
       [](RankLayout& l) { l.groups[1].block_count = UINT64_MAX; }},
      {"groups[1].blocks_per_id", "OUT_OF_RANGE",
       [](RankLayout& l) { l.groups[1].blocks_per_id = 0; }},
      {"groups[1].blocks_per_id", "OUT_OF_RANGE",
       [](RankLayout& l) { l.groups[1].blocks_per_id = 9; }},
      {"groups[1].planes[2].layer", "OUT_OF_RANGE", [&](RankLayout& l) { plane(l).layer = 65536; }},
      {"groups[1].planes[2].role", "BAD_NAME", [&](RankLayout& l) { plane(l).role = ""; }},
      {"groups[1].planes[2].role", "BAD_NAME", [&](RankLayout& l) { plane(l).role = "Key"; }},
      {"groups[1].planes[2].role", "BAD_NAME",
       [&](RankLayout& l) { plane(l).role.assign(64, 'a'); }},
      {"groups[1].planes[2].type", "BAD_NAME", [&](RankLayout& l) { plane(l).type = "b f"; }},
      {"groups[1].planes[2].order", "BAD_ORDER", [&](RankLayout& l) { plane(l).order = "lrtub"; }},
      {"groups[1].planes[2].order", "BAD_ORDER", [&](RankLayout& l) { plane(l).order = "lrbu"; }},
      {"groups[1].planes[2].order", "BAD_ORDER", [&](RankLayout& l) { plane(l).order = "lrbbt"; }},
      {"groups[1].planes[2].granularity", "OUT_OF_RANGE",
       [&](RankLayout& l) { plane(l).granularity = static_cast<Granularity>(7); }},
      {"groups[1].planes", "GRANULARITY_MIXED",
       [&](RankLayout& l) { plane(l).granularity = Granularity::kRequest; }},
      {"groups[1].tokens_per_block", "OUT_OF_RANGE",
       [](RankLayout& l) {
         for (Plane& p : l.groups[1].planes) p.granularity = Granularity::kRequest;
       }},
      {"groups[1].planes[2].cell_bytes", "OUT_OF_RANGE",
       [&](RankLayout& l) { plane(l).cell_bytes = 0; }},
      {"groups[1].planes[2].cell_bytes", "OUT_OF_RANGE",
       [&](RankLayout& l) { plane(l).cell_bytes = UINT64_MAX; }},
      {"groups[0].planes[1].units_total", "OUT_OF_RANGE",
       [](RankLayout& l) { l.groups[0].planes[1].units_total = 0; }},
      {"groups[0].planes[1].units_total", "OUT_OF_RANGE",
       [](RankLayout& l) { l.groups[0].planes[1].units_total = 65537; }},
      {"groups[0].planes[1].unit_begin", "OUT_OF_RANGE",
       [](RankLayout& l) { l.groups[0].planes[1].unit_begin = 4; }},
      {"groups[0].planes[1].unit_count", "OUT_OF_RANGE",
       [](RankLayout& l) { l.groups[0].planes[1].unit_count = 5; }},
      {"groups[0].planes[1].unit_count", "OUT_OF_RANGE",
       [](RankLayout& l) { l.groups[0].planes[1].unit_count = 0; }},
      {"groups[0].planes[1].unit_count", "OUT_OF_RANGE",
       [](RankLayout& l) { l.groups[0].planes[1].unit_count = UINT32_MAX; }},
      {"groups[1].planes[2].pool", "UNKNOWN_POOL", [&](RankLayout& l) { plane(l).pool = 5; }},
      {"groups[1].planes[2].offset", "OUT_OF_RANGE",
       [&](RankLayout& l) { plane(l).offset = l.pools[4].bytes - 255; }},
      {"groups[1].planes[2].offset", "OUT_OF_RANGE",
       [&](RankLayout& l) { plane(l).offset = UINT64_MAX - 255; }},
      {"groups[1].planes[2].block_stride", "OUT_OF_RANGE",
       [&](RankLayout& l) { plane(l).block_stride = UINT64_MAX / 4; }},
      {"groups[1].planes[2].block_stride", "OUT_OF_RANGE",
       [&](RankLayout& l) { plane(l).block_stride = 128; }},  // below the token stride
      {"groups[1].planes[2].block_stride", "OUT_OF_RANGE",
       [&](RankLayout& l) { plane(l).token_stride = uint64_t{1} << 63; }},  // below this one
      {"groups[1].planes[1].token_stride", "OUT_OF_RANGE",
       [](RankLayout& l) { l.pools[4].bytes -= 1 + 256 * 32; }},
      {"groups[0].planes[1].unit_stride", "OUT_OF_RANGE",
       [](RankLayout& l) { l.groups[0].planes[1].unit_stride = uint64_t{1} << 62; }},
      // Memory that meets.
      {"groups[1].planes[2].offset", "PLANES_OVERLAP",
       [&](RankLayout& l) { plane(l).offset -= 16; }},
      {"groups[0].planes[1].block_stride", "PLANES_OVERLAP",
       [](RankLayout& l) { l.groups[0].planes[1].token_stride = 128; }},
      {"groups[0].planes[1].block_stride", "PLANES_OVERLAP",
       [](RankLayout& l) { l.groups[0].planes[1].unit_stride = 0; }},
      {"groups[1].id_space", "GROUPS_OVERLAP",
       [](RankLayout& l) {
         for (Plane& p : l.groups[1].planes) p.pool = 0, p.offset = 0;
         l.groups[1].planes.resize(1);
         l.groups[1].block_count = 2;
         l.groups[1].planes[0].block_stride = 32 * 256;
       }},
      // Cells.
      {"groups[1].planes[2].unit_begin", "CELL_HELD_TWICE",
       [&](RankLayout& l) {
         plane(l).layer = l.groups[1].planes[0].layer;
         plane(l).role = l.groups[1].planes[0].role;
       }},
      {"groups[1].planes[2].role", "ROLE_IN_TWO_GROUPS",
       [&](RankLayout& l) {
         plane(l).layer = 1;
         plane(l).role = "key";
       }},
  };
  for (const Case& bad : cases) {
    RankLayout layout = good();
    bad.spoil(layout);
    const Status status = validate_layout(layout);
    INFO(bad.field << " " << bad.reason);
    REQUIRE_FALSE(status);
    INFO(status.error().to_string());
    CHECK(status.error().reason == bad.reason);
    CHECK(status.error().field == bad.field);
    CHECK(
        status.error().code ==
        (status.error().reason == "TOO_FRAGMENTED" ? status.error().code : Code::kInvalidArgument));
  }
}

TEST_CASE("planes that meet are never accepted, and planes that nest are never refused") {
  std::mt19937 random(11);
  int accepted = 0;
  int met = 0;
  for (int round = 0; round < 4000; ++round) {
    RankLayout layout;
    layout.pools.push_back({"p", 4096});
    Group group;
    group.tokens_per_block = 1 + random() % 3;
    group.block_count = 1 + random() % 4;
    group.blocks_per_id = 1 + static_cast<uint32_t>(random() % group.block_count);
    for (uint32_t p = 0; p < 2; ++p) {
      Plane plane;
      plane.role = p == 0 ? "key" : "value";
      plane.type = "u8";
      plane.unit_count = 1 + static_cast<uint32_t>(random() % 3);
      plane.units_total = plane.unit_count;
      plane.cell_bytes = 1 + random() % 4;
      plane.offset = random() % 24;
      plane.token_stride = random() % 24;
      plane.unit_stride = random() % 24;
      plane.block_stride = plane.token_stride + random() % 24;
      group.planes.push_back(plane);
    }
    if (random() % 2 == 0) {  // the same strides more often
      Plane& second = group.planes[1];
      const uint64_t offset = second.offset;
      second = group.planes[0];
      second.role = "value";
      second.offset = offset;
    }
    layout.groups.push_back(group);
    std::vector<int> used(4096);
    for (const Plane& plane : group.planes)
      for (uint64_t b = 0; b < round_down(group.block_count, group.blocks_per_id); ++b)
        for (uint64_t u = 0; u < plane.unit_count; ++u)
          for (uint64_t t = 0; t < group.tokens_per_block; ++t)
            for (uint64_t i = 0; i < plane.cell_bytes; ++i)
              ++used[plane.offset + b * plane.block_stride + u * plane.unit_stride +
                     t * plane.token_stride + i];
    const bool meets = *std::max_element(used.begin(), used.end()) > 1;
    const Status status = validate_layout(layout);
    INFO("round " << round);
    if (meets) REQUIRE_FALSE(status);
    if (meets) ++met;
    if (status) ++accepted;
  }
  CHECK(met > 500);
  CHECK(accepted > 100);
}

TEST_CASE("thousands of interleaved planes are judged in bounded time") {
  GroupSpec spec;
  for (uint32_t l = 0; l < 1024; ++l) spec.layers.push_back(l);
  spec.units_total = 8;
  spec.units = {0, 8};
  spec.cell_bytes = 2;
  spec.block_count = 4;
  spec.memory = "|bultr";
  RankLayout layout;
  add_group(layout, spec);
  CHECK(validate_layout(layout));
}

TEST_CASE("groups that share storage need one id space and blocks that ids keep apart") {
  RankLayout layout;
  GroupSpec spec;
  spec.layers = {0};
  spec.memory = "|brut";
  add_group(layout, spec);
  spec.layers = {1};
  add_group(layout, spec);
  for (Plane& plane : layout.groups[1].planes) plane.pool = 0;
  CHECK(validate_layout(layout));
  layout.groups[1].id_space = 1;
  CHECK(validate_layout(layout).error().reason == "GROUPS_OVERLAP");
  layout.groups[1].id_space = 0;
  // Smaller blocks in the same storage: different ids would meet.
  for (Plane& plane : layout.groups[1].planes) plane.block_stride /= 2, plane.offset /= 2;
  layout.groups[1].tokens_per_block /= 2;
  CHECK(validate_layout(layout).error().reason == "PLANES_OVERLAP");
  // Two such blocks a common id keep them apart again.
  layout.groups[1].blocks_per_id = 2;
  layout.groups[1].block_count = 16;
  const Status status = validate_layout(layout);
  CHECK((status ? "" : status.error().to_string()) == std::string());
}

TEST_CASE("a holding has no addresses and all defaults filled in") {
  const RankLayout layout = good();
  const Holding holding = holding_of(layout);
  CHECK(holding.pools.empty());
  CHECK(holding.groups[0].cp_interleave == 16);
  CHECK(holding.groups[0].block_count == 0);
  CHECK(holding.groups[1].id_space == 0);
  for (const Group& group : holding.groups)
    for (const Plane& plane : group.planes) {
      CHECK(plane.order.size() == 5);
      CHECK((plane.pool | plane.offset | plane.block_stride | plane.unit_stride |
             plane.token_stride) == 0);
    }
  CHECK(validate_holding(holding));
  Holding bare = holding;
  bare.groups[0].planes[0].order.clear();
  CHECK(validate_holding(bare).error().field == "groups[0].planes[0].order");
  bare = holding;
  bare.groups[1].cp_interleave = 0;
  CHECK(validate_holding(bare).error().field == "groups[1].cp_interleave");
}

TEST_CASE("the ranks of an instance must agree") {
  const auto field = [](const std::function<void(Instance&)>& spoil) {
    Instance instance = instance_of("a/i", two_ranks());
    spoil(instance);
    const Status status = validate_instance(instance);
    return status ? std::string() : status.error().field;
  };
  CHECK(field([](Instance&) {}).empty());
  CHECK(field([](Instance& i) { i.ranks.clear(); }) == "ranks");
  CHECK(field([](Instance& i) { i.ranks.pop_back(); }) == "ranks[0].topology.rank");
  CHECK(field([](Instance& i) { std::swap(i.ranks[0], i.ranks[1]); }) == "ranks[0].topology.rank");
  CHECK(field([](Instance& i) { i.ranks[1].fingerprint = "x"; }) == "ranks[1].fingerprint");
  CHECK(field([](Instance& i) { i.ranks[1].groups[0].planes[1].cell_bytes = 8; }) ==
        "ranks[1].groups[0].planes[1].cell_bytes");
  CHECK(field([](Instance& i) {
          i.ranks[1].groups[0].cp_size = 2;
          i.ranks[1].groups[0].cp_interleave = 4;
        }) == "ranks[1].groups[0].cp_size");
  CHECK(field([](Instance& i) { i.ranks[1].groups[0].planes[0].role = "KEY"; }) ==
        "ranks[1].groups[0].planes[0].role");
}

TEST_CASE("instances that do not fit are told apart by field") {
  const auto field = [](const std::function<void(Instance&, Instance&)>& spoil) {
    Instance sender = instance_of("a/s", two_ranks());
    Instance receiver = instance_of("a/r", ranks_of({}, 2, 4, {}));
    spoil(sender, receiver);
    const Status status = check_compatible(sender, receiver);
    if (status) return std::string();
    CHECK(status.error().code == Code::kFailedPrecondition);
    CHECK(status.error().reason == "INCOMPATIBLE");
    return status.error().field;
  };
  const std::string plane = "receiver.ranks[0].groups[0].planes[1].";
  CHECK(field([](Instance&, Instance&) {}).empty());
  CHECK(field([](Instance& s, Instance&) {
          for (Holding& rank : s.ranks) rank.fingerprint = "other";
        }) == "fingerprint");
  const auto receiver_plane = [](Instance& r) -> Plane& { return r.ranks[0].groups[0].planes[1]; };
  CHECK(field([&](Instance&, Instance& r) { receiver_plane(r).cell_bytes = 8; }) ==
        plane + "cell_bytes");
  CHECK(field([&](Instance&, Instance& r) { receiver_plane(r).type = "fp8"; }) == plane + "type");
  CHECK(field([&](Instance&, Instance& r) { receiver_plane(r).units_total = 8; }) ==
        plane + "units_total");
  CHECK(field([&](Instance&, Instance& r) {
          receiver_plane(r).granularity = Granularity::kBlock;
        }) == plane + "granularity");
  // A required plane that is missing, wholly or in part; an optional one.
  CHECK(field([&](Instance&, Instance& r) { receiver_plane(r).layer = 9; }) == plane + "role");
  CHECK(field([&](Instance&, Instance& r) {
          receiver_plane(r).layer = 9;
          receiver_plane(r).optional = true;
        }).empty());
  const auto lose = [](Instance& s) {
    s.ranks[1].groups[0].planes.erase(s.ranks[1].groups[0].planes.begin() + 1);
  };
  CHECK(field([&](Instance& s, Instance&) { lose(s); }) == plane + "unit_begin");
  CHECK(field([&](Instance& s, Instance& r) {
          lose(s);
          receiver_plane(r).optional = true;
        }) == plane + "unit_begin");
  CHECK(field([&](Instance& s, Instance& r) {
          lose(s);
          receiver_plane(r).unit_count = 2;
        }).empty());
}

TEST_CASE("block planes need one block size, and dealt sides must be dealt alike") {
  GroupSpec scales;
  scales.granularity = Granularity::kBlock;
  scales.memory = "lr|bu";
  const auto with_block = [&](uint64_t block, uint32_t cp, uint64_t interleave) {
    GroupSpec spec = scales;
    spec.block = block;
    spec.interleave = interleave;
    return instance_of("a/x", ranks_of({.cp = cp}, 2, 1, spec));
  };
  CHECK(check_compatible(with_block(16, 1, 0), with_block(16, 1, 0)));
  CHECK(check_compatible(with_block(16, 2, 16), with_block(16, 1, 0)));
  CHECK_FALSE(check_compatible(with_block(16, 1, 0), with_block(32, 1, 0)));
  CHECK_FALSE(check_compatible(with_block(16, 2, 8), with_block(16, 1, 0)));
  GroupSpec tokens;
  const auto dealt = [&](uint32_t cp, uint64_t interleave) {
    GroupSpec spec = tokens;
    spec.interleave = interleave;
    return instance_of("a/x", ranks_of({.cp = cp}, 2, 1, spec));
  };
  CHECK(check_compatible(dealt(2, 8), dealt(2, 8)));
  CHECK(check_compatible(dealt(2, 8), dealt(1, 0)));
  CHECK_FALSE(check_compatible(dealt(2, 8), dealt(2, 16)));
  CHECK_FALSE(check_compatible(dealt(2, 8), dealt(4, 8)));
  // A dealing rank that is not there leaves positions that nobody holds.
  Instance half = dealt(2, 8);
  half.ranks.pop_back();
  half.ranks[0].topology.rank_count = 1;
  CHECK_FALSE(check_compatible(half, dealt(1, 0)));
}

TEST_CASE("a table is refused where its instances are not valid or do not fit") {
  const auto ranks = two_ranks();
  const auto instance = std::make_shared<Instance>(instance_of("a/s", ranks));
  auto bad = std::make_shared<Instance>(*instance);
  bad->ranks[1].groups[0].planes[0].cell_bytes = 0;
  CHECK(LegTable::make(bad, instance).error().field ==
        "sender.ranks[1].groups[0].planes[0].cell_bytes");
  CHECK(LegTable::make(instance, bad).error().field ==
        "receiver.ranks[1].groups[0].planes[0].cell_bytes");
  CHECK(LegTable::make(instance, instance));
}
