// Files of a configuration for tests, and what loading them says.
#pragma once

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "daemon/ops/config.h"

namespace kvferry::ops {

// A directory of its own, gone at the end.
class Scratch {
 public:
  Scratch() {
    std::string name = (std::filesystem::temp_directory_path() / "kvferry-config-XXXXXX").string();
    REQUIRE(::mkdtemp(name.data()) != nullptr);
    path_ = name;
  }
  ~Scratch() { std::filesystem::remove_all(path_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  std::string write(const std::string& name, const std::string& text, mode_t mode = 0600) const {
    const std::string file = path_ + "/" + name;
    std::ofstream(file) << text;
    REQUIRE(::chmod(file.c_str(), mode) == 0);
    return file;
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

inline LoadedConfig load_text(const Scratch& scratch, const std::string& text,
                              std::vector<std::string> sets = {},
                              std::vector<std::pair<std::string, std::string>> environment = {}) {
  return load_config(
      {scratch.write("kvferry.toml", text), std::move(sets), std::move(environment)});
}

inline std::string all_of(const std::vector<ConfigProblem>& problems) {
  std::string out;
  for (const ConfigProblem& problem : problems) out += problem.to_string() + "\n";
  return out;
}

inline bool has_problem(const LoadedConfig& loaded, const std::string& key,
                        const std::string& words) {
  return std::any_of(loaded.problems.begin(), loaded.problems.end(), [&](const auto& problem) {
    return problem.key == key && problem.message.find(words) != std::string::npos;
  });
}

}  // namespace kvferry::ops
