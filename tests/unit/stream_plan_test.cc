// Streams and plans of known transfers: digests, offsets and numbers of fragments.
#include <catch2/catch.hpp>
#include <cstring>
#include <numeric>

#include "daemon/mapping/coverage.h"
#include "daemon/mapping/plan.h"
#include "kernels/host_copy.h"
#include "tests/unit/mapping_support.h"

using namespace kvferry;
using namespace kvferry::mapping;
using namespace kvferry::mapping::test;

namespace {

GroupBlocks blocks_with(std::vector<int32_t> ids) {
  return {0, 0, std::move(ids)};
}

GroupBlocks first_ids(uint64_t count) {
  std::vector<int32_t> ids(count);
  std::iota(ids.begin(), ids.end(), 0);
  return blocks_with(std::move(ids));
}

struct Leg2 {
  Stream stream;
  Plan source{{}};
  Plan destination{{}};
};

// One slice that offers the whole prompt on one leg.
Leg2 whole_leg(const std::vector<RankLayout>& senders, const std::vector<RankLayout>& receivers,
               uint32_t s, uint32_t g, uint64_t prompt, const GroupBlocks& from,
               const GroupBlocks& to) {
  const auto table = table_of(senders, receivers);
  const GroupReceive receive{prompt, 0, to};
  const GroupOffer offer{prompt, {0, prompt}, from};
  const auto needs = compute_needs(receivers[g], std::span(&receive, 1));
  const auto offered = round_offer(senders[s], std::span(&offer, 1));
  REQUIRE(needs);
  REQUIRE(offered);
  auto stream = compile_stream(*table, s, g, *needs, *offered);
  REQUIRE(stream);
  auto source = bind_plan(*stream, Side::kSender, senders[s], std::span(&from, 1));
  auto destination = bind_plan(*stream, Side::kReceiver, receivers[g], std::span(&to, 1));
  REQUIRE(source);
  REQUIRE(destination);
  REQUIRE(source->bytes() == stream->bytes);
  REQUIRE(destination->bytes() == stream->bytes);
  CHECK(*expected_bytes(*table, s, g, *needs) == stream->bytes);
  return {std::move(*stream), std::move(*source), std::move(*destination)};
}

// Cross-layer blocks [layer][K,V][head][token] of 32 tokens, 256 bytes a cell.
GroupSpec cross_layer() {
  GroupSpec spec;
  spec.block = 32;
  spec.block_count = 4;
  spec.memory = "|blrut";
  return spec;
}

}  // namespace

TEST_CASE("tp2 to tp4: fragments, offsets and digest of the worked example") {
  const auto senders = ranks_of({.tp = 2}, 8, 8, cross_layer());
  const auto receivers = ranks_of({.tp = 4}, 8, 8, cross_layer());
  const Leg2 one = whole_leg(senders, receivers, 1, 3, 32, blocks_with({0}), blocks_with({0}));
  const auto fragments = fragments_of(one.source, one.destination);
  REQUIRE(fragments.size() == 16);
  for (const Fragment& fragment : fragments) CHECK(fragment.bytes == 16384);
  // Receiver 3, layer 2, V.
  CHECK(fragments[5].source_offset == 180224);
  CHECK(fragments[5].destination_offset == 81920);

  const Leg2 two =
      whole_leg(senders, receivers, 1, 3, 64, blocks_with({2, 0}), blocks_with({3, 1}));
  const std::string text = text_of(two.stream);
  const std::string expected =
      "kvferry stream 1\n"
      "bundle blrut TOKEN 256 units 6-8 tokens 0-64 s 0/1/32 r 0/1/32 block 32\n"
      "plane 0 key\nplane 0 value\nplane 1 key\n";
  CHECK(text.substr(0, expected.size()) == expected);
  CHECK(text.substr(text.size() - 14) == "plane 7 value\n");
  CHECK(two.stream.digest == 0x0f6b1b9ae6d74bbcULL);
  CHECK(two.stream.bytes == 2 * 262144);
  CHECK(fragment_count(two.source, two.destination) == 32);
  CHECK(two.destination.run_count() == 2);
}

TEST_CASE("tp4 to tp2: the reverse has the reverse offsets") {
  const auto senders = ranks_of({.tp = 4}, 8, 8, cross_layer());
  const auto receivers = ranks_of({.tp = 2}, 8, 8, cross_layer());
  const Leg2 leg = whole_leg(senders, receivers, 3, 1, 32, blocks_with({0}), blocks_with({0}));
  const auto fragments = fragments_of(leg.source, leg.destination);
  REQUIRE(fragments.size() == 16);
  CHECK(fragments[5].source_offset == 81920);
  CHECK(fragments[5].destination_offset == 180224);
}

TEST_CASE("pp2 to tp4: each stage's layers land at their place") {
  const auto senders = ranks_of({.pp = 2}, 8, 8, cross_layer());
  const auto receivers = ranks_of({.tp = 4}, 8, 8, cross_layer());
  for (uint32_t stage = 0; stage < 2; ++stage) {
    const Leg2 leg =
        whole_leg(senders, receivers, stage, 2, 32, blocks_with({0}), blocks_with({0}));
    const auto fragments = fragments_of(leg.source, leg.destination);
    REQUIRE(fragments.size() == 8);
    CHECK(fragments[0].destination_offset == uint64_t{stage} * 4 * 32768);
  }
}

TEST_CASE("the pieces of a large plan are estimated from its first ones") {
  GroupSpec spec = cross_layer();
  spec.block_count = 1000;
  const auto senders = ranks_of({.tp = 2}, 32, 8, spec);
  spec.memory = "lr|btu";
  const auto receivers = ranks_of({.tp = 4}, 32, 8, spec);
  std::vector<int32_t> blocks;
  for (int32_t block = 0; block < 400; ++block) blocks.push_back(2 * block);  // none beside another
  const uint64_t tokens = 32 * (blocks.size() - 1) + 5;  // the last one is begun
  const Leg2 leg =
      whole_leg(senders, receivers, 0, 0, tokens, blocks_with(blocks), blocks_with(blocks));
  for (const Plan* plan : {&leg.source, &leg.destination}) {
    const auto exact = static_cast<double>(plan->run_count());
    CHECK(exact > 20'000);
    CHECK(static_cast<double>(plan->estimate_pieces()) == Approx(exact).epsilon(0.01));
  }
}

TEST_CASE("fragments of a block of 16 tokens and 32 layers") {
  const auto count = [](const std::string& from, const std::string& to) {
    GroupSpec spec;
    spec.memory = from;
    const auto senders = ranks_of({}, 32, 8, spec);
    spec.memory = to;
    const auto receivers = ranks_of({}, 32, 8, spec);
    const Leg2 leg = whole_leg(senders, receivers, 0, 0, 16, blocks_with({3}), blocks_with({5}));
    CHECK(leg.source.estimate_pieces() == leg.source.run_count());
    CHECK(leg.destination.estimate_pieces() == leg.destination.run_count());
    return std::pair{fragment_count(leg.source, leg.destination), leg.destination.run_count()};
  };
  CHECK(count("lr|but", "lr|but") == std::pair<uint64_t, uint64_t>{64, 64});
  CHECK(count("l|butr", "l|butr") == std::pair<uint64_t, uint64_t>{32, 32});
  CHECK(count("|blrut", "|blrut") == std::pair<uint64_t, uint64_t>{1, 1});
  CHECK(count("lr|btu", "lr|but") == std::pair<uint64_t, uint64_t>{8192, 64});
  CHECK(count("lr|but", "lr|btu") == std::pair<uint64_t, uint64_t>{8192, 64});
}

TEST_CASE("orders follow from strides") {
  const auto order = [](const std::string& memory) {
    GroupSpec spec;
    spec.memory = memory;
    const auto ranks = ranks_of({}, 4, 8, spec);
    return holding_of(ranks[0]).groups[0].planes[0].order;
  };
  CHECK(order("lr|but") == "lrbut");
  CHECK(order("lr|btu") == "lrbtu");
  CHECK(order("l|brut") == "lbrut");
  CHECK(order("l|brtu") == "lbrtu");
  CHECK(order("l|butr") == "lbutr");
  CHECK(order("l|btur") == "lbtur");
  CHECK(order("|blrut") == "blrut");
  CHECK(order("|blrtu") == "blrtu");
  CHECK(order("|bultr") == "bultr");
  CHECK(order("|bltur") == "bltur");
}

TEST_CASE("equal texts come from unequal receivers that want the same") {
  GroupSpec spec;
  spec.roles = {"latent"};
  spec.memory = "l|but";
  const auto senders = ranks_of({}, 4, 1, spec);
  const auto receivers = ranks_of({.tp = 8}, 4, 1, spec);
  const Leg2 a = whole_leg(senders, receivers, 0, 1, 40, first_ids(3), first_ids(3));
  const Leg2 b = whole_leg(senders, receivers, 0, 6, 40, blocks_with({1, 5, 2}), first_ids(3));
  CHECK(text_of(a.stream) == text_of(b.stream));
  CHECK(a.stream.digest == b.stream.digest);
  CHECK_FALSE(a.source.same_places(b.source));  // other blocks of the sender
}

TEST_CASE("streams of one sender rank with equal texts lie at the same places") {
  GroupSpec spec;
  spec.roles = {"latent"};
  spec.memory = "l|but";
  const auto senders = ranks_of({}, 4, 1, spec);
  const auto receivers = ranks_of({.tp = 8}, 4, 1, spec);
  GroupSpec padded = spec;
  padded.padding = 64;  // another memory with the same order of cells
  const auto others = ranks_of({.tp = 8}, 4, 1, padded);
  const GroupBlocks from = blocks_with({1, 5, 2});
  const Leg2 first = whole_leg(senders, receivers, 0, 0, 40, from, first_ids(3));
  for (uint32_t g = 1; g < 8; ++g) {
    const Leg2 same = whole_leg(senders, receivers, 0, g, 40, from, blocks_with({2, 0, 1}));
    CHECK(same.stream.digest == first.stream.digest);
    CHECK(same.source.same_places(first.source));
    CHECK(first.source.same_places(same.source));
  }
  CHECK(whole_leg(senders, others, 0, 3, 40, from, first_ids(3)).source.same_places(first.source));
  // Another prompt, other blocks, other memory at the sender.
  CHECK_FALSE(
      whole_leg(senders, receivers, 0, 0, 20, from, first_ids(3)).source.same_places(first.source));
  CHECK_FALSE(whole_leg(senders, receivers, 0, 0, 40, blocks_with({1, 2, 5}), first_ids(3))
                  .source.same_places(first.source));
  CHECK_FALSE(
      whole_leg(others, receivers, 0, 0, 40, from, first_ids(3)).source.same_places(first.source));
}

TEST_CASE("streams of as many bytes of other heads or layers lie elsewhere") {
  const auto senders = ranks_of({}, 8, 8, cross_layer());
  const auto receivers = ranks_of({.tp = 4}, 8, 8, cross_layer());
  const Leg2 a = whole_leg(senders, receivers, 0, 1, 32, blocks_with({1}), blocks_with({0}));
  const Leg2 b = whole_leg(senders, receivers, 0, 2, 32, blocks_with({1}), blocks_with({0}));
  CHECK(a.stream.bytes == b.stream.bytes);
  CHECK_FALSE(a.source.same_places(b.source));
  const auto stages = ranks_of({.pp = 2}, 8, 8, cross_layer());
  const Leg2 early = whole_leg(senders, stages, 0, 0, 32, blocks_with({1}), blocks_with({0}));
  const Leg2 late = whole_leg(senders, stages, 0, 1, 32, blocks_with({1}), blocks_with({0}));
  CHECK(early.stream.bytes == late.stream.bytes);
  CHECK_FALSE(early.source.same_places(late.source));
}

TEST_CASE("bundles stand by alignment, then by their first plane") {
  RankLayout layout;
  layout.fingerprint = "m";
  GroupSpec spec;
  spec.layers = {0, 1};
  spec.roles = {"key_scale"};
  spec.cell_bytes = 6;
  spec.memory = "lr|but";
  add_group(layout, spec);
  spec.roles = {"key"};
  spec.cell_bytes = 48;
  add_group(layout, spec);
  spec.roles = {"value"};
  spec.cell_bytes = 32;
  add_group(layout, spec);
  const auto table = table_of({layout}, {layout});
  std::vector<GroupNeed> needs;
  std::vector<GroupRanges> offer;
  for (uint32_t g = 0; g < 3; ++g) {
    needs.push_back({g, 0, 20, {{0, 32}}});
    offer.push_back({g, {{0, 32}}});
  }
  const auto stream = compile_stream(*table, 0, 0, needs, offer);
  REQUIRE(stream);
  REQUIRE(stream->bundles.size() == 3);
  CHECK(stream->bundles[0].receiver_group == 1);
  CHECK(stream->bundles[1].receiver_group == 2);
  CHECK(stream->bundles[2].receiver_group == 0);
  // A slice of one layer, and one that offers only a group.
  const auto layer = compile_stream(*table, 0, 0, needs, offer, Range{1, 2});
  REQUIRE(layer);
  CHECK(layer->bytes * 2 == stream->bytes);
  const auto part = compile_stream(*table, 0, 0, needs, std::span(offer).first(1));
  REQUIRE(part);
  CHECK(part->bundles.size() == 1);
  const auto nothing = compile_stream(*table, 0, 0, needs, {});
  REQUIRE(nothing);
  CHECK(nothing->bytes == 0);
  CHECK(text_of(*nothing) == "kvferry stream 1\n");
}

TEST_CASE("coverage tells what is missing and what came twice") {
  GroupSpec spec;
  const auto ranks = ranks_of({}, 4, 2, spec);
  const auto table = table_of(ranks, ranks);
  const std::vector<GroupNeed> needs{{0, 0, 60, {{0, 64}}}};
  auto coverage = LegCoverage::make(*table, 0, 0, needs);
  REQUIRE(coverage);
  CHECK(coverage->expected_bytes() == 4 * 2 * 2 * 64 * 256);
  REQUIRE(coverage->missing());
  CHECK(coverage->missing()->position == 0);
  const std::vector<GroupRanges> first{{0, {{0, 32}}}};
  const std::vector<GroupRanges> second{{0, {{32, 64}}}};
  CHECK(coverage->add(first, std::nullopt));
  CHECK(coverage->add(second, Range{0, 3}));
  REQUIRE(coverage->missing());
  CHECK(coverage->missing()->position == 32);
  CHECK(coverage->missing()->layer == 3);
  const auto again = coverage->add(second, Range{2, 4});
  REQUIRE_FALSE(again);
  CHECK(again.error().reason == "SLICES_OVERLAP");
  CHECK(coverage->add(second, Range{3, 4}));
  CHECK_FALSE(coverage->missing());
  coverage->remove(first, std::nullopt);
  REQUIRE(coverage->missing());
  CHECK(coverage->missing()->position == 0);
  CHECK(coverage->add(first, std::nullopt));
  CHECK_FALSE(coverage->missing());
}

TEST_CASE("a bound plan refuses blocks and layouts that do not fit") {
  GroupSpec spec;
  const auto ranks = ranks_of({}, 2, 2, spec);
  const auto table = table_of(ranks, ranks);
  const std::vector<GroupNeed> needs{{0, 0, 32, {{0, 32}}}};
  const std::vector<GroupRanges> offer{{0, {{0, 32}}}};
  const auto stream = compile_stream(*table, 0, 0, needs, offer);
  REQUIRE(stream);
  const auto reason = [&](const RankLayout& layout, std::vector<int32_t> ids) {
    const GroupBlocks blocks = blocks_with(std::move(ids));
    const auto plan = bind_plan(*stream, Side::kReceiver, layout, std::span(&blocks, 1));
    return plan ? std::string() : plan.error().reason;
  };
  CHECK(reason(ranks[0], {0, 1}).empty());
  CHECK(reason(ranks[0], {0}) == "BLOCK_MISSING");
  CHECK(reason(ranks[0], {0, kHole}) == "BLOCK_MISSING");
  CHECK(reason(ranks[0], {0, 8}) == "BLOCK_OUT_OF_RANGE");
  CHECK(reason(ranks[0], {0, -7}) == "BLOCK_OUT_OF_RANGE");
  RankLayout other = ranks[0];
  other.groups[0].planes.pop_back();
  CHECK(reason(other, {0, 1}) == "LAYOUT_MISMATCH");
  other = ranks[0];
  other.groups[0].planes[1].role = "latent";
  CHECK(reason(other, {0, 1}) == "LAYOUT_MISMATCH");
  other = ranks[0];
  other.groups[0].planes[1].unit_count = 1;
  CHECK(reason(other, {0, 1}) == "LAYOUT_MISMATCH");
  other = ranks[0];
  other.groups[0].tokens_per_block = 32;
  CHECK(reason(other, {0, 1}) == "LAYOUT_MISMATCH");
  other = ranks[0];
  other.groups.clear();
  CHECK(reason(other, {0, 1}) == "LAYOUT_MISMATCH");
}

TEST_CASE("copies outside the plan are refused and touch nothing") {
  GroupSpec spec;
  spec.layers = {0};
  const auto ranks = ranks_of({}, 1, 2, spec);
  const Leg2 leg = whole_leg(ranks, ranks, 0, 0, 16, blocks_with({0}), blocks_with({0}));
  std::vector<std::byte> memory(ranks[0].pools[0].bytes);
  std::vector<std::byte> stream(leg.stream.bytes);
  const std::vector<std::byte*> bases{memory.data(), memory.data()};
  CHECK_FALSE(kernels::gather(leg.source.form(), bases, 1, leg.stream.bytes, stream.data()));
  CHECK_FALSE(kernels::gather(leg.source.form(), bases, leg.stream.bytes + 1, 0, stream.data()));
  CHECK_FALSE(kernels::scatter(leg.source.form(), bases, 1, UINT64_MAX, stream.data()));
  CHECK_FALSE(kernels::gather(leg.source.form(), std::span(bases).first(1), 0, 1, stream.data()));
  CHECK(kernels::gather(leg.source.form(), bases, 0, leg.stream.bytes, stream.data()));
  CHECK(kernels::gather(leg.source.form(), bases, leg.stream.bytes, 0, stream.data()));
}

TEST_CASE("the tail of the last block is cleared and nothing else") {
  GroupSpec spec;
  spec.layers = {0, 1};
  spec.tail = Tail::kZero;
  spec.memory = "|blrtu";
  spec.block = 8;
  spec.cell_bytes = 4;
  spec.block_count = 4;
  const auto receivers = ranks_of({}, 2, 2, spec);
  spec.tail = Tail::kLeave;
  spec.block = 4;
  spec.block_count = 8;
  const auto senders = ranks_of({}, 2, 2, spec);
  const GroupBlocks to = blocks_with({3, 1});
  const Leg2 leg = whole_leg(senders, receivers, 0, 0, 10, first_ids(3), to);
  const std::vector<uint64_t> prompts{10};
  const auto tail = bind_tail(leg.stream, receivers[0], std::span(&to, 1), prompts);
  REQUIRE(tail);
  // Tokens 10 to 15 are positions 2 to 7 of block 1, though the sender's blocks end at 12.
  std::vector<std::byte> memory(receivers[0].pools[0].bytes, std::byte{0xAA});
  std::vector<std::byte> expected = memory;
  for (const Plane& plane : receivers[0].groups[0].planes)
    for (uint64_t unit = 0; unit < 2; ++unit)
      for (uint64_t token = 2; token < 8; ++token)
        std::memset(expected.data() + plane.offset + plane.block_stride + unit * plane.unit_stride +
                        token * plane.token_stride,
                    0, 4);
  std::byte* base = memory.data();
  CHECK(kernels::clear(tail->form(), std::span(&base, 1)));
  CHECK(memory == expected);
  const std::vector<uint64_t> full{16};
  CHECK(bind_tail(leg.stream, receivers[0], std::span(&to, 1), full)->bytes() == 0);
}

TEST_CASE("a stream too large to describe is refused") {
  RankLayout layout;
  layout.fingerprint = "m";
  GroupSpec spec;
  for (uint32_t l = 0; l < 64; ++l) spec.layers.push_back(l);
  spec.roles.clear();
  for (int i = 0; i < 63; ++i)
    spec.roles.push_back(std::string(63, static_cast<char>('a' + i % 26)));
  for (int i = 0; i < 63; ++i) {
    std::string& role = spec.roles[static_cast<std::size_t>(i)];
    role[0] = static_cast<char>('a' + i / 26);
  }
  spec.cell_bytes = 2;
  spec.block = 1;
  spec.block_count = 2;
  spec.memory = "|blrut";
  add_group(layout, spec);
  const auto table = table_of({layout}, {layout});
  const std::vector<GroupNeed> small{{0, 0, 1, {{0, 1}}}};
  const std::vector<GroupRanges> offer{{0, {{0, 1}}}};
  CHECK(compile_stream(*table, 0, 0, small, offer));  // 4,032 planes, 300 kB
  // 64 groups of 63 planes with 4,096 ranges each pass a megabyte.
  RankLayout many;
  many.fingerprint = "m";
  for (uint32_t g = 0; g < 64; ++g) {
    GroupSpec one;
    one.layers = {g};
    one.roles = {"k"};
    one.cell_bytes = 2;
    one.block = 1;
    one.block_count = 2;
    add_group(many, one);
  }
  const auto wide = table_of({many}, {many});
  std::vector<GroupNeed> needs;
  std::vector<GroupRanges> offers;
  for (uint32_t g = 0; g < 64; ++g) {
    needs.push_back({g, 0, 1000000, {{0, 1000000}}});
    offers.push_back({g, {}});
    for (uint64_t i = 0; i < 4096; ++i) offers.back().ranges.push_back({i * 200, i * 200 + 100});
  }
  const auto refused = compile_stream(*wide, 0, 0, needs, offers);
  REQUIRE_FALSE(refused);
  CHECK(refused.error().reason == "TOO_FRAGMENTED");
}
