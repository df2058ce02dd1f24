// The files of a configuration, read from disk; shared by the configuration's own files only.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "daemon/ops/config.h"

namespace kvferry::ops {

struct ConfigFile {
  std::string path;
  std::string text;
  bool main = false;  // the one that was named
};

// The file `main`, then conf.d/*.toml beside it in order of name, bytewise. One that cannot be read
// or trusted is left out and a problem. Blocks on the files.
std::vector<ConfigFile> read_config_files(const std::string& main,
                                          std::vector<ConfigProblem>& problems);

// The whole file; CONFIG_FILE if it cannot be read or is longer.
Result<std::string> read_whole_file(const std::string& path, uint64_t max_bytes);

}  // namespace kvferry::ops
