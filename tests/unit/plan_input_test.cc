// kvferryctl plan, where its input is at fault: what is said names the file and the field, and
// nothing is printed before it.
#include <catch2/catch.hpp>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <iterator>
#include <nlohmann/json.hpp>
#include <regex>
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

constexpr uint64_t kMostBytes = uint64_t{64} << 20;

// Two ranks with one good file, and a place for bad ones.
struct Fixture {
  Files files;
  std::vector<RankLayout> ranks = ranks_of({.tp = 2}, 2, 2, {});
  v1::PlanInstance instance = instance_file(ranks, {32, 0, {1, 2}});
  std::string good = files.write("good.json", as_json(instance));

  std::string bad(const std::string& text) const { return files.write("bad.json", text); }
  std::string bad(const v1::PlanInstance& file) const { return bad(as_json(file)); }
};

void check_refused(const Output& output, std::initializer_list<std::string> words) {
  INFO(output.text.substr(0, 1000) << output.errors);
  CHECK(output.status == 65);
  CHECK(output.text.empty());
  CHECK(output.errors.find("kvferryctl: plan: ") == 0);
  CHECK(output.errors.find('\n') == output.errors.size() - 1);
  for (const std::string& word : words) {
    INFO(word);
    CHECK(output.errors.find(word) != std::string::npos);
  }
}

// As a table and as JSON.
void refused(const std::string& sender, const std::string& receiver,
             std::initializer_list<std::string> words, const std::string& feed = ":") {
  const std::string files = " --sender " + sender + " --receiver " + receiver;
  check_refused(run("plan" + files, feed), words);
  check_refused(run("plan --json --fragments --text" + files, feed), words);
}

}  // namespace

TEST_CASE("plan: files that cannot be read") {
  const Fixture at;
  refused("/nowhere", at.good, {" UNREADABLE /nowhere: open: No such file"});
  refused(at.good, "/tmp", {" UNREADABLE /tmp: read: Is a directory"});
  refused(at.bad(""), at.good, {" BAD_JSON ", "/bad.json: is empty"});
  refused("-", at.good, {" BAD_JSON stdin: is empty"});
  refused(at.good, "-", {" BAD_JSON stdin: is empty"});
}

TEST_CASE("plan: what is no PlanInstance in JSON is named by its place") {
  const Fixture at;
  const auto says = [&](const std::string& text, const std::string& path, const std::string& what) {
    refused(at.bad(text), at.good, {" BAD_JSON " + at.files.path("bad.json") + path + ": ", what});
  };
  // Not JSON.
  says("{", "", "at line 1, column 2");
  says("{\"instance\": \"a\"} x", "", "at line 1, column 19");
  says("{\"ranks\": [{}, {\"groups\": [{\"blockIds\":\n [1, 2 3]}]}]}",
       ".ranks[1].groups[0].blockIds[1]", "at line 2, column 8");
  says("{\"ranks\": [{\"layout\": {\"groups\": [{\"tail\": TAIL_ZERO}]}}]}",
       ".ranks[0].layout.groups[0].tail", "at line 1, column ");
  says("{\"instance\": \"\xff\"}", ".instance", "at line 1, column ");
  const std::string deep = "{\"a\":" + std::string(200000, '[');
  std::string path = ".a";
  for (int i = 0; i < 15; ++i) path += "[0]";
  says(deep, path + "...", "nested more than 100 deep");
  // Not the message.
  says("[1]", "", "an object is expected");
  says("7", "", "an object is expected");
  says("{\"instans\": \"a\"}", ".instans", "Cannot find field");
  says("{\"ranks\": [{}, {\"layout\": {\"grups\": []}}]}", ".ranks[1].layout.grups",
       "Cannot find field");
  says("{\"a: \\u001b[31m\\nb\": 1}", ".a:  [31m b", "Cannot find field");
  says("{\"ranks\": [{\"groups\": [{\"numTokens\": \"abc\"}]}]}", ".ranks[0].groups[0].num_tokens",
       "invalid value");
  says("{\"ranks\": [{\"groups\": [{\"blockIds\": [1, 2, 99999999999]}]}]}",
       ".ranks[0].groups[0].block_ids[2]", "invalid value 99999999999");
  says("{\"ranks\": [{\"layout\": []}]}", ".ranks[0].layout", "not repeating");
  // What protobuf's parser would take, and read otherwise than it is written.
  const std::string block_ids = "{\"ranks\": [{\"groups\": [{\"block_ids\": ";
  says(block_ids + "[7, null, 3]}]}]}", ".ranks[0].groups[0].block_ids[1]", "null in a list");
  says(block_ids + "[[7], 3]}]}]}", ".ranks[0].groups[0].block_ids[0]", "a list in a list");
  says(block_ids + "7}]}]}", ".ranks[0].groups[0].block_ids", "a list is expected");
  says("{\"ranks\": {}}", ".ranks", "a list is expected");
  says("{\"ranks\": [null, {}]}", ".ranks[0]", "null in a list");
  says("{\"ranks\": [[{}]]}", ".ranks[0]", "a list in a list");
  says("{\"dp_group\": 1, \"dpGroup\": 1}", ".dpGroup", "the field is there twice");
  says("{\"instance\": \"a\",}", ".instance", "at line 1, column 18");
  says("{\"instance\": 'a'}", ".instance", "at line 1, column 14");
  says(block_ids + "[1e400]}]}]}", ".ranks[0].groups[0].block_ids", "number overflow");
  says("{\"dpGroup\": {\"a\": 1}}", ".dp_group", "an object where a value is expected");
  says("{\"instance\": 5" + std::string(1000, '0') + "}", ".instance", "...");
}

TEST_CASE("plan: an answer that could not be written is no success") {
  const Fixture at;
  for (const char* form : {"", " --json --fragments"}) {
    const Output output = run(std::string("plan --sender ") + at.good + " --receiver " + at.good +
                              form + " > /dev/full");
    CHECK(output.status == 74);
    CHECK(output.errors.find("OUTPUT_LOST") != std::string::npos);
  }
}

TEST_CASE("plan: an instance at fault is named by its file's fields") {
  const Fixture at;
  const std::string file = at.files.path("bad.json");
  const auto layout_of = [](v1::PlanInstance& instance, int rank) {
    return instance.mutable_ranks(rank)->mutable_layout();
  };
  refused(at.bad("{}"), at.good, {" OUT_OF_RANGE " + file + ".ranks: "});
  refused(at.bad("{\"ranks\": [{}]}"), at.good,
          {" MISSING " + file + ".ranks[0].layout.topology: "});

  v1::PlanInstance bad = at.instance;
  layout_of(bad, 1)->mutable_groups(0)->mutable_planes(1)->set_cell_bytes(1 << 30);
  refused(at.bad(bad), at.good, {" " + file + ".ranks[1].layout.groups[0].planes[1].offset_bytes"});
  bad = at.instance;
  layout_of(bad, 1)->mutable_groups(0)->mutable_planes(0)->set_block_stride_bytes(1);
  refused(at.bad(bad), at.good,
          {" " + file + ".ranks[1].layout.groups[0].planes[0].block_stride_bytes"});
  bad = at.instance;
  layout_of(bad, 0)->mutable_groups(0)->set_cp_interleave_tokens(3);
  refused(at.good, at.bad(bad), {" " + file + ".ranks[0].layout.groups[0].cp_interleave_tokens"});

  // Ranks in another order: the index is the file's.
  bad = at.instance;
  layout_of(bad, 1)->set_fingerprint("another");
  refused(at.bad(bad), at.good,
          {" INSTANCE_INCONSISTENT " + file + ".ranks[1].layout.fingerprint"});
  bad.mutable_ranks()->SwapElements(0, 1);
  refused(at.bad(bad), at.good,
          {" INSTANCE_INCONSISTENT " + file + ".ranks[0].layout.fingerprint"});
  bad = at.instance;
  layout_of(bad, 1)->mutable_topology()->set_rank(0);
  refused(at.bad(bad), at.good, {" " + file + ".ranks[1].layout.topology.rank"});
}

TEST_CASE("plan: blocks at fault are named by their file's fields") {
  const Fixture at;
  const std::string file = at.files.path("bad.json");
  v1::PlanInstance bad = at.instance;
  bad.mutable_ranks(1)->mutable_groups(0)->set_block_ids(1, 8);
  refused(at.good, at.bad(bad),
          {" BLOCK_OUT_OF_RANGE " + file + ".ranks[1].groups[0].block_ids[1]: "});
  refused(at.bad(bad), at.good,
          {" BLOCK_OUT_OF_RANGE " + file + ".ranks[1].groups[0].block_ids[1]: "});
  bad.mutable_ranks()->SwapElements(0, 1);
  refused(at.good, at.bad(bad), {" " + file + ".ranks[0].groups[0].block_ids[1]: "});
  bad = instance_file(at.ranks, {32, 0, {1, 1}});
  refused(at.good, at.bad(bad), {" BLOCK_TWICE " + file + ".ranks[0].groups[0].block_ids[1]: "});
  bad = at.instance;
  bad.mutable_ranks(0)->mutable_groups(0)->set_num_tokens(uint64_t{1} << 60);
  refused(at.good, at.bad(bad), {" " + file + ".ranks[0].groups[0].num_tokens: "});
  refused(at.bad(bad), at.good, {" " + file + ".ranks[0].groups[0].num_tokens: "});
  bad = at.instance;
  *bad.mutable_ranks(1)->add_groups() = bad.ranks(1).groups(0);
  refused(at.bad(bad), at.good, {" GROUP_TWICE " + file + ".ranks[1].groups[1].group: "});
}

TEST_CASE("plan: instances that do not fit are both named") {
  const Fixture at;
  const std::string file = at.files.path("bad.json");
  v1::PlanInstance bad = at.instance;
  for (v1::PlanRank& rank : *bad.mutable_ranks())
    for (v1::Plane& plane : *rank.mutable_layout()->mutable_groups(0)->mutable_planes())
      plane.set_type("fp8");
  refused(at.good, at.bad(bad),
          {" INCOMPATIBLE " + file + ".ranks[0].layout.groups[0].planes[0].type: ",
           "(the sender: " + at.good + ")"});
  bad.mutable_ranks()->SwapElements(0, 1);
  refused(at.good, at.bad(bad), {" " + file + ".ranks[1].layout.groups[0].planes[0].type: "});
  refused(at.bad(bad), at.good, {" INCOMPATIBLE " + at.good + ".ranks[0]", "sender: " + file});
  bad = at.instance;
  for (v1::PlanRank& rank : *bad.mutable_ranks()) rank.mutable_layout()->set_fingerprint("other");
  refused(at.good, at.bad(bad),
          {" INCOMPATIBLE " + file + ".ranks[0].layout.fingerprint: ",
           "(the sender: " + at.good + ")"});
  bad = instance_file(at.ranks, {32, 0, {1, 2}}, 5);
  refused(at.good, at.bad(bad), {" UNKNOWN_DP_GROUP " + file + ".dp_group: "});
  refused(at.bad(bad), at.good, {" UNKNOWN_DP_GROUP " + file + ".dp_group: "});
}

TEST_CASE("plan: a later leg that cannot be worked out leaves no half an answer") {
  // Every second block is a hole, in so many groups that the second leg's description is too long.
  constexpr uint32_t kGroups = 60;
  constexpr int32_t kBlocks = 4096;
  std::vector<RankLayout> ranks = ranks_of({.tp = 2}, 1, 2, {});
  for (RankLayout& rank : ranks) {
    const Range units{rank.topology.rank, rank.topology.rank + 1};
    rank.groups.clear();
    rank.pools.clear();
    for (uint32_t g = 0; g < kGroups; ++g) {
      GroupSpec spec;
      spec.layers = {g};
      spec.units_total = 2;
      spec.units = units;
      spec.block_count = kBlocks;
      spec.id_space = g;
      add_group(rank, spec);
    }
  }
  const Files files;
  Blocks blocks{uint64_t{kBlocks} * 16, 0, {}};
  for (int32_t i = 0; i < kBlocks; ++i) blocks.ids.push_back(i);
  v1::PlanInstance receiver = instance_file(ranks, blocks);
  const std::string sender = files.write("s.json", as_json(receiver));
  const std::string whole = files.write("r.json", as_json(receiver));
  REQUIRE(run("plan --json --sender " + sender + " --receiver " + whole).status == 0);
  for (v1::PlanGroup& group : *receiver.mutable_ranks(1)->mutable_groups())
    for (int32_t i = 1; i < kBlocks; i += 2) group.set_block_ids(i, -1);
  const std::string holes = files.write("r.json", as_json(receiver));
  refused(sender, holes,
          {" TOO_FRAGMENTED " + holes + ".ranks[1].groups: ",
           "(from " + sender + ".ranks[1] to " + holes + ".ranks[1])"});
}

TEST_CASE("plan: what is not offered is named after the whole answer") {
  const Fixture at;
  const std::string file = at.files.path("bad.json");
  const auto lacks = [&](const v1::PlanInstance& sender, const std::string& field) {
    const std::string files = " --sender " + at.bad(sender) + " --receiver " + at.good;
    const Output output = run("plan --json" + files);
    INFO(output.text << output.errors);
    CHECK(output.status == 1);
    CHECK(output.parsed()["legs"].size() == 2);
    CHECK(output.errors.find(" NOT_OFFERED " + file + field + ": ") != std::string::npos);
    CHECK(output.errors.find(at.good + ".ranks[") != std::string::npos);
    CHECK(run("plan" + files).text.find("\n        not offered: group 0 ") != std::string::npos);
    return output.parsed();
  };
  v1::PlanInstance sender = instance_file(at.ranks, {32, 0, {1}});
  CHECK(lacks(sender, ".ranks[0].groups[0].block_ids")["legs"][0]["not_offered"]["position"] == 16);
  sender = instance_file(at.ranks, {16, 0, {1, 2}});
  CHECK(lacks(sender, ".ranks[0].groups[0].num_tokens")["legs"][1]["not_offered"]["layer"] == 0);
  sender = at.instance;
  sender.mutable_ranks(1)->clear_groups();
  sender.mutable_ranks()->SwapElements(0, 1);
  const json answer = lacks(sender, ".ranks[0].groups");
  CHECK(!answer["legs"][0].contains("not_offered"));
  CHECK(answer["legs"][1]["not_offered"]["position"] == 0);
}

TEST_CASE("plan: standard input and pipes, within the same bound as files") {
  const Fixture at;
  const std::string expected = run("plan --sender " + at.good + " --receiver " + at.good).text;
  REQUIRE(!expected.empty());
  const std::string from_good = "cat " + at.good;
  CHECK(run("plan --sender - --receiver " + at.good, from_good).text == expected);
  CHECK(run("plan --receiver=- --sender=" + at.good, from_good).text == expected);
  CHECK(run("plan --receiver /dev/stdin --sender " + at.good, from_good).text == expected);
  const Output both = run("plan --sender - --receiver -", from_good);
  CHECK(both.status == 64);
  CHECK(both.text.empty());
  CHECK(both.errors.find("only one of --sender and --receiver") != std::string::npos);

  // Blanks up to the bound, and one more.
  const std::string text = as_json(at.instance);
  const std::string full = at.files.path("full.json");
  at.files.write("full.json", text + std::string(kMostBytes - text.size(), ' '));
  CHECK(run("plan --sender " + full + " --receiver " + at.good).text == expected);
  CHECK(run("plan --sender - --receiver " + at.good, "cat " + full).text == expected);
  refused("-", at.good, {" TOO_LARGE stdin: goes on, more than the 64 MiB"},
          "(cat " + full + "; echo)");
  std::filesystem::resize_file(full, kMostBytes + 1);
  refused(full, at.good, {" TOO_LARGE " + full + ": has 67108865 bytes, more than the 64 MiB"});
  refused("- <" + full, at.good, {" TOO_LARGE stdin: has 67108865 bytes"});
  // Of what has no size, no more is read than that; of what has one, nothing.
  refused(at.good, "/dev/zero", {" TOO_LARGE /dev/zero: goes on"});
  refused("-", at.good, {" TOO_LARGE stdin: goes on"}, "yes");
  std::filesystem::resize_file(full, uint64_t{1} << 40);
  refused(full, at.good, {" TOO_LARGE " + full + ": has 1099511627776 bytes"});
}

TEST_CASE("plan: its sources include what they name") {
  const std::pair<const char*, const char*> headers[] = {
      {"array", "std::array<"},
      {"cerrno", "errno"},
      {"charconv", "std::from_chars"},
      {"cstddef", "(std::)?size_t"},
      {"cstdint", "u?int(32|64)_t"},
      {"iosfwd|ostream", "std::ostream"},
      {"memory", "std::(shared_ptr|unique_ptr|make_shared)<"},
      {"optional", "std::(optional<|nullopt)"},
      {"string", "std::(string|to_string)"},
      {"string_view", "std::string_view"},
      {"system_error", "std::errc"},
      {"utility", "std::(move|exchange|pair)"},
      {"vector", "std::vector<"},
  };
  const std::string directory = KVFERRY_SOURCE_DIR "/client/ctl/";
  const auto text_of = [&](const std::string& name) {
    std::ifstream file(directory + name, std::ios::binary);
    REQUIRE(file);
    return std::string(std::istreambuf_iterator<char>(file), {});
  };
  for (const std::string unit : {"json_place", "plan", "plan_input"}) {
    const std::string own = text_of(unit + ".h");
    const std::string source = text_of(unit + ".cc");
    for (const auto& [header, name] : headers) {
      const std::regex named("\\b" + std::string(name));
      const std::regex included("#include <(" + std::string(header) + ")>");
      INFO(unit << " names what <" << header << "> declares");
      if (std::regex_search(own, named)) CHECK(std::regex_search(own, included));
      if (std::regex_search(source, named))
        CHECK((std::regex_search(source, included) || std::regex_search(own, included)));
    }
  }
}
