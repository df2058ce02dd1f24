// Runs `kvferryctl plan` as its users do, on files made of layouts.
#pragma once

#include <google/protobuf/util/json_util.h>
#include <sys/wait.h>

#include <array>
#include <catch2/catch.hpp>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "daemon/mapping/layout.h"
#include "daemon/rpc/layout_proto.h"
#include "kvferry/v1/layout.pb.h"

namespace kvferry::test {

class Files {
 public:
  Files() {
    char name[] = "/tmp/kvferry-plan-XXXXXX";
    REQUIRE(mkdtemp(name) != nullptr);
    directory_ = name;
  }
  ~Files() { std::filesystem::remove_all(directory_); }
  std::string path(const std::string& name) const { return directory_ + "/" + name; }
  std::string write(const std::string& name, const std::string& text) const {
    std::ofstream(path(name), std::ios::binary) << text;
    return path(name);
  }

 private:
  std::string directory_;
};

struct Blocks {
  uint64_t prompt = 64;
  uint64_t cached = 0;
  std::vector<int32_t> ids;
};

inline v1::PlanInstance instance_file(const std::vector<mapping::RankLayout>& ranks,
                                      const Blocks& blocks, uint32_t dp_group = 0) {
  v1::PlanInstance file;
  file.set_instance("an instance");
  file.set_dp_group(dp_group);
  for (const mapping::RankLayout& layout : ranks) {
    v1::PlanRank* rank = file.add_ranks();
    rpc::to_proto(layout, *rank->mutable_layout());
    for (uint32_t g = 0; g < layout.groups.size(); ++g) {
      v1::PlanGroup* group = rank->add_groups();
      group->set_group(g);
      group->set_num_tokens(blocks.prompt);
      group->set_cached_tokens(blocks.cached);
      for (const int32_t id : blocks.ids) group->add_block_ids(id);
    }
  }
  return file;
}

inline std::string as_json(const v1::PlanInstance& file) {
  std::string text;
  REQUIRE(google::protobuf::util::MessageToJsonString(file, &text).ok());
  return text;
}

struct Output {
  int status = -1;
  std::string text;    // standard output
  std::string errors;  // standard error
  nlohmann::json parsed() const { return nlohmann::json::parse(text); }
};

// The program's exit code and output; `feed` is a shell command whose output it has as its input.
inline Output run(const std::string& arguments, const std::string& feed = ":") {
  const Files files;
  const std::string errors = files.path("errors");
  const std::string command =
      feed + " | " + std::string(KVFERRY_CTL) + " " + arguments + " 2>" + errors;
  FILE* pipe = popen(command.c_str(), "r");
  REQUIRE(pipe != nullptr);
  Output output;
  std::array<char, 4096> buffer;
  for (std::size_t n = 0; (n = fread(buffer.data(), 1, buffer.size(), pipe)) > 0;)
    output.text.append(buffer.data(), n);
  const int status = pclose(pipe);
  output.status = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  std::ifstream said(errors, std::ios::binary);
  output.errors.assign(std::istreambuf_iterator<char>(said), {});
  return output;
}

}  // namespace kvferry::test
