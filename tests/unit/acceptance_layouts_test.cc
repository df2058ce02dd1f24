// Any layout to any other, any prompt, window, cached prefix and slicing: every row is a whole
// hand-off with each byte checked.
#include <algorithm>
#include <catch2/catch.hpp>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "tests/unit/acceptance_support.h"

using namespace kvferry;
using namespace kvferry::acceptance;
using mapping::Granularity;

namespace {

Outcome must(const Case& of) {
  INFO(of.name);
  Outcome outcome;
  REQUIRE_NOTHROW(outcome = run_case(of));
  return outcome;
}

const std::vector<uint64_t> kPrompts{1, 7, 8, 9, 23, 24, 25, 30, 32, 33, 60, 80};

// What a rank gets of one layer, in blocks of 8: all but the cached blocks and those that no window
// reaches any more.
uint64_t moved_tokens(uint64_t prompt, uint64_t cached, uint64_t window) {
  if (cached >= prompt) return 0;
  uint64_t first = cached / 8;
  if (window != 0 && prompt + 1 > window) first = std::max(first, (prompt + 1 - window) / 8);
  const uint64_t blocks = (prompt + 7) / 8;
  return first < blocks ? (blocks - first) * 8 : 0;
}

}  // namespace

TEST_CASE("every memory form to every other") {
  // Apart, [2, blocks, ...], [blocks, 2, ...], packed, cross-layer in all nestings, layers as views
  // of one storage with layers first; heads first and tokens first.
  const std::vector<std::string> forms{"lr|but", "lr|btu", "l|rbut", "l|rbtu", "l|brut",
                                       "l|brtu", "l|butr", "l|btur", "|blrut", "|blrtu",
                                       "|bultr", "|bltur", "r|lbut", "|lrbut", "|rlbtu"};
  for (const std::string& from : forms) {
    for (const std::string& to : forms) {
      Case of = between("tp2", "tp4", attention(3, 4, from), 45);
      of.receiver.groups = attention(3, 4, to);
      of.name = from + " to " + to;
      must(of);
      of.sender.topology = topology_named("tp2pp2");
      of.receiver.topology = topology_named("1");
      of.chunk_bytes = 1000;
      must(of);
    }
  }
}

TEST_CASE("fragments follow from the memory forms alone") {
  const auto fragments = [](const std::string& from, const std::string& to) {
    Case of = between("1", "1", attention(32, 8, from, 16), 16);
    of.receiver.groups = attention(32, 8, to, 16);
    for (SideSpec* side : {&of.sender, &of.receiver})
      side->groups.front().parts.front().cell_bytes = 256;
    of.chunk_bytes = 65536;
    return must(of).fragments;
  };
  CHECK(fragments("lr|but", "lr|but") == 64);
  CHECK(fragments("l|butr", "l|butr") == 32);
  CHECK(fragments("|blrut", "|blrut") == 1);
  CHECK(fragments("lr|btu", "lr|but") == 8192);
}

TEST_CASE("element types, with and without scales") {
  std::vector<std::pair<std::string, std::vector<Part>>> types;
  types.push_back({"bf16", {part({"key", "value"}, 4, 32, "bf16")}});
  types.push_back({"fp8", {part({"key", "value"}, 4, 16, "fp8_e4m3")}});
  types.push_back({"fp32", {part({"key", "value"}, 4, 64, "fp32")}});
  types.push_back({"odd cells", {part({"key", "value"}, 4, 6, "int8")}});
  types.push_back(
      {"nvfp4 with block scales",
       {part({"key", "value"}, 4, 8, "fp4"),
        part({"key_scale", "value_scale"}, 4, 24, "fp8_e4m3", "lr|bu", Granularity::kBlock)}});
  types.push_back({"int8 with a scale a token",
                   {part({"key", "value"}, 4, 16, "int8"),
                    part({"key_scale", "value_scale"}, 4, 4, "fp32", "l|brut")}});
  for (const auto& [name, parts] : types) {
    for (const auto& [from, to] : std::vector<std::pair<std::string, std::string>>{
             {"1", "1"}, {"tp2", "tp4"}, {"tp4", "tp2pp2"}, {"pp2", "tp2"}}) {
      std::vector<ModelGroup> groups = attention(4, 4);
      groups.front().parts = parts;
      Case of = between(from, to, groups, 45);
      of.name += ", " + name;
      must(of);
    }
  }
}

TEST_CASE("block sizes, equal and unequal") {
  for (const uint64_t block : {8U, 16U, 32U, 64U, 128U}) {
    for (const uint64_t prompt : {uint64_t{1}, block - 1, block, block + 1, uint64_t{200}})
      must(between("tp2", "tp4", attention(2, 4, "lr|but", block), prompt));
  }
  for (const auto& [from, to] : std::vector<std::pair<uint64_t, uint64_t>>{
           {16, 64}, {64, 16}, {48, 32}, {32, 48}, {8, 16}, {16, 8}, {1, 16}}) {
    for (const uint64_t prompt : {1U, 16U, 20U, 32U, 50U, 64U, 100U, 130U}) {
      for (const uint64_t cached : {uint64_t{0}, prompt / 2, prompt}) {
        Case of = between("tp2", "tp4", attention(2, 4, "lr|but", from), prompt);
        of.receiver.groups = attention(2, 4, "lr|btu", to);
        of.cached = {cached};
        of.name += ", blocks of " + std::to_string(from) + " to " + std::to_string(to) +
                   ", cached " + std::to_string(cached);
        must(of);
        for (ModelGroup& group : of.receiver.groups) group.tail = mapping::Tail::kZero;
        of.name += ", tail cleared";
        must(of);
      }
    }
  }
}

TEST_CASE("an id may stand for several kernel blocks") {
  for (const uint32_t sender_per_id : {1U, 2U, 4U}) {
    for (const uint32_t receiver_per_id : {1U, 2U}) {
      Case of = between("tp2", "1", attention(2, 4), 75);
      of.sender.groups.front().blocks_per_id = sender_per_id;
      of.receiver.groups.front().blocks_per_id = receiver_per_id;
      must(of);
    }
  }
}

TEST_CASE("prompts, windows and cached prefixes of each group") {
  struct Row {
    std::string name;
    std::vector<uint64_t> windows;
    std::vector<uint64_t> prompts;
  };
  // A window that is longer than all prompts is none: the long ones get prompts that they cut.
  const std::vector<uint64_t> none;
  const std::vector<uint64_t> cut_256{300, 1100};
  const std::vector<uint64_t> cut_1024{1023, 1024, 1100};
  const std::vector<Row> rows{{"none", {0}, none},
                              {"24", {24}, none},
                              {"256 and 24", {256, 24}, cut_256},
                              {"1024", {1024}, cut_1024},
                              {"1024 and 24", {1024, 24}, cut_1024},
                              {"16 and full", {16, 0}, none},
                              {"1024 in five of six", {1024, 1024, 1024, 1024, 1024, 0}, cut_1024}};
  for (const Row& row : rows) {
    std::vector<uint64_t> prompts = kPrompts;
    prompts.insert(prompts.end(), row.prompts.begin(), row.prompts.end());
    for (const uint64_t prompt : prompts) {
      for (const uint64_t cached : {uint64_t{0}, prompt / 2, prompt}) {
        Case of = between("tp2", "tp4", windowed(6, row.windows), prompt);
        uint64_t tokens = 0;  // of a layer, over all layers
        for (std::size_t g = 0; g < row.windows.size(); ++g) {
          // Each group its own: the next one has a block more.
          of.cached.push_back(std::min<uint64_t>(prompt, cached + 8 * g));
          tokens += 6 / row.windows.size() * moved_tokens(prompt, of.cached[g], row.windows[g]);
        }
        of.receiver.groups_reversed = true;
        if (prompt >= 1000) of.chunk_bytes = 4000;
        of.name += ", windows " + row.name + ", cached " + std::to_string(cached);
        // Keys and values, 4 heads, 16 bytes.
        CHECK(must(of).bytes == tokens * 2 * 4 * 16);
      }
    }
  }
}

TEST_CASE("alternating windows of 128 with a long cached prefix move each group's own blocks") {
  Case of = between("tp2", "tp4", windowed(4, {128, 0}, 16), 512);
  of.cached = {0, 480};
  const Outcome outcome = must(of);
  // Two layers, keys and values, 4 heads, 16 bytes: a token of a group is 256 bytes. The window
  // group needs the blocks from (512 + 1 - 128) / 16 on, 8 of 16 tokens; the other two blocks.
  CHECK(outcome.bytes == (8 * 16 + 2 * 16) * 256);
}

TEST_CASE("indexers, masked layers and interleaved planes") {
  // A replicated indexer key beside the latent, on some layers only.
  std::vector<ModelGroup> sparse = latent(6);
  Part indexer = part({"indexer_key"}, 1, 20, "fp8_e4m3", "l|btu");
  sparse.front().parts.push_back(indexer);
  for (const std::vector<uint32_t>& masked :
       {std::vector<uint32_t>{}, std::vector<uint32_t>{0, 2, 5}, std::vector<uint32_t>{3}}) {
    sparse.front().parts.back().layers = masked;
    for (const auto& [from, to] : std::vector<std::pair<std::string, std::string>>{
             {"tp4D", "tp8"}, {"tp2", "tp4"}, {"tp2pp2", "tp2"}, {"pp3", "pp2"}})
      must(between(from, to, sparse, 45));
  }
  // Keys, values and an index behind each other in one storage.
  ModelGroup interleaved;
  interleaved.layers = every(4, 1, 0);
  interleaved.one_storage = true;
  interleaved.parts = {part({"key", "value"}, 2, 32, "bf16"), part({"index"}, 1, 16, "bf16")};
  for (const auto& [from, to] : std::vector<std::pair<std::string, std::string>>{
           {"1", "1"}, {"tp2", "1"}, {"1", "tp2"}, {"tp2pp2", "tp4"}}) {
    must(between(from, to, {interleaved}, 45));
    Case of = between(from, to, {interleaved}, 33);
    of.receiver.groups.front().one_storage = false;
    must(of);
  }
}

TEST_CASE("recurrent state beside attention") {
  ModelGroup mamba;  // convolution in sections, and the state; d_state 16, d_conv 4, 4 heads
  mamba.layers = {1, 3};
  mamba.parts = {part({"conv_x"}, 4, 12, "fp32", "lr|bu", Granularity::kRequest),
                 part({"conv_b", "conv_c"}, 1, 48, "fp32", "lr|bu", Granularity::kRequest),
                 part({"ssm"}, 4, 64, "fp32", "l|bru", Granularity::kRequest)};
  ModelGroup delta;  // sections [Q|K|V] and a state in fp32
  delta.layers = {1, 3};
  delta.parts = {part({"conv_q", "conv_k", "conv_v"}, 4, 6, "bf16", "l|bru", Granularity::kRequest),
                 part({"state"}, 4, 128, "fp32", "lr|bu", Granularity::kRequest)};
  ModelGroup full = attention(4, 4).front();
  full.layers = {0, 2};
  for (const ModelGroup& state : {mamba, delta}) {
    for (const auto& [from, to] : std::vector<std::pair<std::string, std::string>>{
             {"tp4", "tp4"}, {"tp2", "tp4"}, {"tp4", "tp2"}, {"tp2pp2", "tp2"}}) {
      for (const uint64_t cached : {uint64_t{0}, uint64_t{1}}) {
        Case of = between(from, to, {full, state}, 45);
        of.cached = {0, cached};
        of.slices = {{{0, 16}, {}}, {{16, 45}, {}}};
        must(of);
      }
    }
  }
}

TEST_CASE("groups that share storage keep their ids apart") {
  std::vector<ModelGroup> groups = windowed(4, {24, 0});
  groups[1].shares_storage = true;
  for (const auto& [from, to] : std::vector<std::pair<std::string, std::string>>{
           {"1", "1"}, {"tp2", "tp4"}, {"tp4", "tp2"}}) {
    Case of = between(from, to, groups, 60);
    must(of);
    of.receiver.groups[1].shares_storage = false;
    must(of);
    std::swap(of.sender, of.receiver);
    must(of);
  }
}

TEST_CASE("cached prefixes: none, part, all, and each group its own") {
  for (const auto& [from, to] : std::vector<std::pair<std::string, std::string>>{
           {"tp2", "tp4"}, {"tp4D", "tp2"}, {"pp2", "tp2"}}) {
    for (const std::vector<uint64_t>& cached :
         {std::vector<uint64_t>{0, 0}, std::vector<uint64_t>{16, 32}, std::vector<uint64_t>{60, 60},
          std::vector<uint64_t>{60, 0}, std::vector<uint64_t>{13, 59}}) {
      Case of = between(from, to, windowed(4, {24, 0}), 60);
      of.cached = cached;
      const Outcome outcome = must(of);
      CHECK((outcome.bytes == 0) == (cached == std::vector<uint64_t>{60, 60}));
      CHECK(outcome.legs > 0);
    }
  }
}

TEST_CASE("cached prefixes of each rank: some have all, others nothing or a part") {
  const auto groups = windowed(4, {24, 0});
  const std::vector<uint64_t> all{60, 60};
  const std::vector<uint64_t> none{0, 0};
  using Ranks = std::vector<std::vector<uint64_t>>;
  for (const auto& [from, to, cached] : std::vector<std::tuple<std::string, std::string, Ranks>>{
           {"tp2", "tp4", {all, none, none, none}},
           {"pp2", "tp2", {all, none}},
           {"tp4D", "tp2", {all, none}},
           {"tp4", "tp2pp2", {none, all, all, none}},
           {"tp2", "tp4", {{60, 0}, {0, 60}, {13, 59}, all}},
           {"tp2", "cp2", {none, all}}}) {
    Case of = between(from, to, groups, 60);
    const Outcome cold = must(of);
    of.cached_by_rank = cached;
    of.name += ", cached by rank";
    const Outcome warm = must(of);
    // A rank that has all runs its legs, with no byte; what the others get does not depend on it.
    CHECK(warm.legs == cold.legs);
    CHECK(warm.empty_legs == cold.empty_legs);
    for (uint32_t rank = 0; rank < cached.size(); ++rank) {
      INFO(of.name << ", rank " << rank);
      const uint64_t bytes = warm.bytes_of_rank.at(rank);
      if (cached[rank] == all)
        CHECK(bytes == 0);
      else if (cached[rank] == none)
        CHECK(bytes == cold.bytes_of_rank.at(rank));
      else
        CHECK((bytes > 0 && bytes < cold.bytes_of_rank.at(rank)));
    }
    of.slices = {{{0, 32}, {}}, {{32, 60}, {}}};
    must(of);
  }
}

TEST_CASE("slices of every kind") {
  const std::vector<std::pair<std::string, std::vector<SliceSpec>>> ways{
      {"one", {{{0, 75}, {}}}},
      {"chunks of two blocks",
       {{{0, 16}, {}}, {{16, 32}, {}}, {{32, 48}, {}}, {{48, 64}, {}}, {{64, 75}, {}}}},
      {"unaligned ends",
       {{{0, 5}, {}}, {{5, 21}, {}}, {{21, 22}, {}}, {{22, 71}, {}}, {{71, 75}, {}}}},
      {"layer by layer",
       {{{0, 75}, Range{0, 1}},
        {{0, 75}, Range{1, 2}},
        {{0, 75}, Range{2, 3}},
        {{0, 75}, Range{3, 4}}}},
      {"chunks of layers",
       {{{0, 37}, Range{0, 2}},
        {{0, 37}, Range{2, 4}},
        {{37, 75}, Range{0, 2}},
        {{37, 75}, Range{2, 4}}}},
      {"empty inner", {{{0, 32}, {}}, {{32, 32}, {}}, {{32, 75}, {}}}},
      {"empty last", {{{0, 75}, {}}, {{75, 75}, {}}}}};
  for (const auto& [name, slices] : ways) {
    for (const auto& [from, to] : std::vector<std::pair<std::string, std::string>>{
             {"1", "1"}, {"tp2", "tp4"}, {"tp4", "tp2pp2"}, {"pp2", "1"}, {"tp2D", "pp2"}}) {
      for (const uint64_t receiver_block : {8U, 16U}) {
        Case of = between(from, to, windowed(4, {0, 24}), 75);
        for (ModelGroup& group : of.receiver.groups) group.block = receiver_block;
        of.slices = slices;
        of.name += ", " + name;
        must(of);
        of.cached = {24, 8};
        must(of);
      }
    }
  }
}

TEST_CASE("a thousand slices") {
  std::vector<ModelGroup> groups = attention(1, 2);
  groups.front().parts.front().cell_bytes = 4;
  Case of = between("tp2", "1", groups, 8000);
  for (uint64_t at = 0; at < 8000; at += 8) of.slices.push_back({{at, at + 8}, {}});
  CHECK(must(of).bytes == 8000 * 2 * 2 * 4);
}

TEST_CASE("the sender's prompt may be the longer one") {
  for (const uint64_t longer : {1U, 8U}) {
    for (const uint64_t prompt : kPrompts) {
      Case of = between("tp2", "tp4", windowed(4, {0, 24}), prompt);
      of.sender.prompt = prompt + longer;
      must(of);
      of.slices = {{{0, prompt / 2}, {}}, {{prompt / 2, prompt + longer}, {}}};
      must(of);
    }
  }
}
