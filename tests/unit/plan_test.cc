// kvferryctl plan: the worked examples of the mapping, and the numbers of fragments.
#include <google/protobuf/util/json_util.h>

#include <catch2/catch.hpp>
#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "tests/unit/mapping_support.h"
#include "tests/unit/plan_support.h"

using namespace kvferry;
using namespace kvferry::mapping;
using namespace kvferry::mapping::test;
using namespace kvferry::test;
using nlohmann::json;

namespace {

// The plan of these ranks, with fragments.
json plan(const std::vector<RankLayout>& sender, const std::vector<RankLayout>& receiver,
          const Blocks& from, const Blocks& to, uint32_t sender_dp = 0, uint32_t receiver_dp = 0) {
  Files files;
  const std::string prefill =
      files.write("s.json", as_json(instance_file(sender, from, sender_dp)));
  const std::string decode =
      files.write("r.json", as_json(instance_file(receiver, to, receiver_dp)));
  const Output output =
      run("plan --json --fragments --text --sender " + prefill + " --receiver " + decode);
  INFO(output.text << output.errors);
  REQUIRE(output.status == 0);
  json parsed = output.parsed();
  uint64_t fragments = 0, bytes = 0;
  for (const json& leg : parsed["legs"]) fragments += leg["fragments"].get<uint64_t>();
  for (const json& fragment : parsed["fragments"]) bytes += fragment["bytes"].get<uint64_t>();
  CHECK(parsed["fragments"].size() == fragments);
  CHECK(parsed["totals"]["fragments"] == fragments);
  CHECK(parsed["totals"]["bytes"] == bytes);
  return parsed;
}

std::map<std::pair<int, int>, json> by_ranks(const json& plan) {
  std::map<std::pair<int, int>, json> legs;
  for (const json& leg : plan["legs"])
    legs[{leg["sender_rank"].get<int>(), leg["receiver_rank"].get<int>()}] = leg;
  return legs;
}

// The heads that each leg brings, where it brings any: the units of the only bundle of its text.
std::map<std::pair<int, int>, std::string> heads_of_legs(const json& plan) {
  std::map<std::pair<int, int>, std::string> heads;
  for (const auto& [ranks, leg] : by_ranks(plan)) {
    const std::string text = leg["text"];
    const std::size_t at = text.find(" units ");
    if (at == std::string::npos) continue;
    CHECK(text.find(" units ", at + 1) == std::string::npos);
    const std::size_t begin = at + std::string(" units ").size();
    heads[ranks] = text.substr(begin, text.find(' ', begin) - begin);
  }
  return heads;
}

// Cross-layer blocks [layer][K,V][head][token] of 32 tokens, 256 bytes a cell.
GroupSpec cross_layer() {
  GroupSpec spec;
  spec.block = 32;
  spec.block_count = 4;
  spec.memory = "|blrut";
  return spec;
}

using Legs = std::vector<std::pair<int, int>>;
Legs data_legs(const json& plan) {
  Legs legs;
  for (const auto& [ranks, leg] : by_ranks(plan))
    if (leg["bytes"] > 0) legs.push_back(ranks);
  return legs;
}
Legs empty_legs(const json& plan) {
  Legs legs;
  for (const auto& [ranks, leg] : by_ranks(plan))
    if (leg["empty"]) legs.push_back(ranks);
  return legs;
}

GroupSpec latents() {
  GroupSpec spec;
  spec.roles = {"latent"};
  spec.cell_bytes = 1152;
  spec.memory = "l|btu";
  spec.block = 32;
  return spec;
}

}  // namespace

TEST_CASE("plan: tp2 to tp4 to the byte") {
  const auto senders = ranks_of({.tp = 2}, 8, 8, cross_layer());
  const auto receivers = ranks_of({.tp = 4}, 8, 8, cross_layer());
  const json one = plan(senders, receivers, {32, 0, {0}}, {32, 0, {0}});
  CHECK(data_legs(one) == Legs{{0, 0}, {0, 1}, {1, 2}, {1, 3}});
  int third = 0;
  for (const json& fragment : one["fragments"]) {
    CHECK(fragment["bytes"] == 16384);
    if (fragment["receiver_rank"] != 3) continue;
    if (third++ != 5) continue;  // layer 2, V
    CHECK(fragment["src_offset"] == 180224);
    CHECK(fragment["dst_offset"] == 81920);
    CHECK(fragment["src_pool"] == senders[1].pools[0].name);
  }
  CHECK(third == 16);

  const json two = plan(senders, receivers, {64, 0, {2, 0}}, {64, 0, {3, 1}});
  const json leg = by_ranks(two).at({1, 3});
  CHECK(leg["digest"] == "0f6b1b9ae6d74bbc");
  CHECK(leg["bytes"] == 524288);
  CHECK(leg["fragments"] == 32);
  CHECK(leg["destination_runs"] == 2);
  const std::string text = leg["text"];
  CHECK(text.find("\nbundle blrut TOKEN 256 units 6-8 tokens 0-64 s 0/1/32 r 0/1/32 block 32\n"
                  "plane 0 key\nplane 0 value\nplane 1 key\n") != std::string::npos);
}

TEST_CASE("plan: tp4 to tp2, and pipelines, to the byte") {
  const auto tp4 = ranks_of({.tp = 4}, 8, 8, cross_layer());
  const json back = plan(tp4, ranks_of({.tp = 2}, 8, 8, cross_layer()), {32, 0, {0}}, {32, 0, {0}});
  CHECK(data_legs(back) == Legs{{0, 0}, {1, 0}, {2, 1}, {3, 1}});
  int count = 0;
  for (const json& fragment : back["fragments"]) {
    if (fragment["sender_rank"] != 3 || count++ != 5) continue;
    CHECK(fragment["src_offset"] == 81920);
    CHECK(fragment["dst_offset"] == 180224);
  }
  const json stages =
      plan(ranks_of({.pp = 2}, 8, 8, cross_layer()), tp4, {32, 0, {0}}, {32, 0, {0}});
  CHECK(data_legs(stages).size() == 8);
  for (const auto& [ranks, leg] : by_ranks(stages)) CHECK(leg["fragments"] == 8);
  for (const json& fragment : stages["fragments"])
    if (fragment["sender_rank"] == 1) CHECK(fragment["dst_offset"] >= 4 * 32768);
  const json both =
      plan(ranks_of({.tp = 2, .pp = 2}, 8, 8, cross_layer()), tp4, {32, 0, {0}}, {32, 0, {0}});
  CHECK(data_legs(both) == Legs{{0, 0}, {0, 1}, {1, 2}, {1, 3}, {2, 0}, {2, 1}, {3, 2}, {3, 3}});
  for (const auto& [ranks, leg] : by_ranks(both))
    CHECK(leg["carries_aux"] == (ranks.first == (ranks.second < 2 ? 0 : 1)));
}

TEST_CASE("plan: latents, replicated heads and degrees that do not divide") {
  const Blocks one{32, 0, {1}};
  const json spread = plan(ranks_of({.tp = 4, .attention_dp = true}, 4, 1, latents()),
                           ranks_of({.tp = 8}, 4, 1, latents()), one, one, 2);
  CHECK(data_legs(spread).size() == 8);
  for (const auto& [ranks, leg] : by_ranks(spread)) {
    CHECK(ranks.first == 2);
    CHECK(leg["digest"] == by_ranks(spread).at({2, 0})["digest"]);
  }
  const json gathered =
      plan(ranks_of({.tp = 4}, 4, 1, latents()),
           ranks_of({.tp = 4, .attention_dp = true}, 4, 1, latents()), one, one, 0, 2);
  CHECK(data_legs(gathered) == Legs{{2, 2}});
  CHECK(empty_legs(gathered) == Legs{{0, 2}, {1, 2}, {3, 2}});
  const json narrowed =
      plan(ranks_of({.tp = 8}, 4, 1, latents()), ranks_of({.tp = 4}, 4, 1, latents()), one, one);
  CHECK(data_legs(narrowed) == Legs{{0, 0}, {1, 1}, {2, 2}, {3, 3}});
  CHECK(empty_legs(narrowed) == Legs{{4, 0}, {5, 1}, {6, 2}, {7, 3}});

  const json two = plan(ranks_of({.tp = 4}, 4, 2, {}), ranks_of({.tp = 2}, 4, 2, {}), {16, 0, {1}},
                        {16, 0, {1}});
  CHECK(data_legs(two) == Legs{{0, 0}, {3, 1}});
  CHECK(empty_legs(two) == Legs{{1, 1}, {2, 0}});
  const json wide = plan(ranks_of({.tp = 16}, 1, 8, {}), ranks_of({.tp = 4}, 1, 8, {}),
                         {16, 0, {1}}, {16, 0, {1}});
  CHECK(data_legs(wide) == Legs{{0, 0}, {2, 0}, {5, 1}, {7, 1}, {8, 2}, {10, 2}, {13, 3}, {15, 3}});
  const json uneven = plan(ranks_of({.tp = 6}, 1, 24, {}), ranks_of({.tp = 4}, 1, 24, {}),
                           {16, 0, {1}}, {16, 0, {1}});
  using Heads = std::map<std::pair<int, int>, std::string>;
  CHECK(heads_of_legs(uneven) == Heads{{{0, 0}, "0-4"},
                                       {{1, 0}, "4-6"},
                                       {{1, 1}, "6-8"},
                                       {{2, 1}, "8-12"},
                                       {{3, 2}, "12-16"},
                                       {{4, 2}, "16-18"},
                                       {{4, 3}, "18-20"},
                                       {{5, 3}, "20-24"}});
}

TEST_CASE("plan: context-parallel receivers") {
  std::vector<int32_t> all(7), own(2);
  std::iota(all.begin(), all.end(), 0);
  std::iota(own.begin(), own.end(), 0);
  const auto receivers = ranks_of({.cp = 4}, 4, 1, latents());
  const json one = plan(ranks_of({}, 4, 1, latents()), receivers, {200, 0, all}, {200, 0, own});
  CHECK(data_legs(one) == Legs{{0, 0}, {0, 1}, {0, 2}, {0, 3}});
  const uint64_t block = 4 * 32 * 1152;
  CHECK(by_ranks(one).at({0, 0})["bytes"] == 2 * block);
  CHECK(by_ranks(one).at({0, 3})["bytes"] == block);
  const json four =
      plan(ranks_of({.tp = 4}, 4, 1, latents()), receivers, {200, 0, all}, {200, 0, own});
  CHECK(data_legs(four) == Legs{{0, 0}, {1, 1}, {2, 2}, {3, 3}});
}

TEST_CASE("plan: fragments of a block of 16 tokens and 32 layers") {
  const auto fragments = [](const std::string& from, const std::string& to) {
    GroupSpec spec;
    spec.memory = from;
    const auto senders = ranks_of({}, 32, 8, spec);
    spec.memory = to;
    return plan(senders, ranks_of({}, 32, 8, spec), {16, 0, {3}}, {16, 0, {5}})["legs"][0];
  };
  CHECK(fragments("lr|but", "lr|but")["fragments"] == 64);
  CHECK(fragments("l|butr", "l|butr")["fragments"] == 32);
  CHECK(fragments("|blrut", "|blrut")["fragments"] == 1);
  CHECK(fragments("lr|btu", "lr|but")["fragments"] == 8192);
  CHECK(fragments("lr|btu", "lr|but")["destination_runs"] == 64);
}

TEST_CASE("plan: the example of the README") {
  const std::string files = "--sender " KVFERRY_SOURCE_DIR
                            "/client/ctl/examples/prefill.json --receiver " KVFERRY_SOURCE_DIR
                            "/client/ctl/examples/decode.json";
  const Output output = run("--json plan --fragments " + files);
  INFO(output.text << output.errors);
  REQUIRE(output.status == 0);
  const json parsed = output.parsed();
  CHECK(by_ranks(parsed).at({0, 0})["bytes"] == 3 * 8192);
  CHECK(by_ranks(parsed).at({0, 1})["bytes"] == 2 * 8192);
  CHECK(parsed["fragments"][0] == json{{"sender_rank", 0},
                                       {"receiver_rank", 0},
                                       {"src_pool", "kv"},
                                       {"src_offset", 7 * 16384},
                                       {"dst_pool", "kv"},
                                       {"dst_offset", 8192},
                                       {"bytes", 4096}});
  const Output table = run("plan " + files);
  REQUIRE(table.status == 0);
  CHECK(table.text.find("SENDER  RECEIVER") == 0);
  CHECK(table.text.find(by_ranks(parsed).at({0, 0})["digest"].get<std::string>()) !=
        std::string::npos);
}

TEST_CASE("plan: numbers may be strings, names snake or camel case, ranks in any order") {
  Files files;
  const auto ranks = ranks_of({.tp = 2}, 2, 2, {});
  const v1::PlanInstance file = instance_file(ranks, {32, 0, {1, 2}});
  json document = json::parse(as_json(file));
  std::swap(document["ranks"][0], document["ranks"][1]);
  std::string text = document.dump();
  CHECK(text.find("tokensPerBlock") != std::string::npos);
  google::protobuf::util::JsonPrintOptions snake;
  snake.preserve_proto_field_names = true;
  std::string other;
  REQUIRE(google::protobuf::util::MessageToJsonString(file, &other, snake).ok());
  CHECK(other.find("tokens_per_block") != std::string::npos);
  const std::string a = files.write("a.json", text);
  const std::string b = files.write("b.json", other);
  const Output same = run("plan --json --sender " + a + " --receiver " + b);
  INFO(same.text << same.errors);
  REQUIRE(same.status == 0);
  CHECK(same.parsed()["totals"]["bytes"] == 2 * 2 * 2 * 32 * 256);
}
