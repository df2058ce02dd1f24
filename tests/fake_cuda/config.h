// What the environment says of the fake machine. README.md lists the variables.
#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <vector>

namespace kvferry::fake_cuda {

struct Config {
  std::string directory;     // shared with other processes
  bool temporary = false;    // nobody named one: this process's own, removed at its end
  int machine_devices = 1;   // of the machine
  std::vector<int> visible;  // the machine's devices that this process sees; ordinals index it
  uint64_t memory_bytes = uint64_t{1} << 30;        // of each
  uint64_t granularity = uint64_t{2} << 20;         // of VMM allocations
  uint64_t fabric_granularity = uint64_t{2} << 20;  // of those with a fabric handle
  int version = 13000;                              // of CUDA
  uint64_t seed = 1;
  uint64_t delay_us = 100;
  bool host_visible = false;    // device memory lies at its address for the host, too
  std::set<std::string> lacks;  // features that this machine does not have
  // KVFERRY_FAKE_CUDA_FAIL=function:nth:code
  std::string fail_function;
  uint64_t fail_nth = 0;
  int fail_code = 0;

  bool has(const char* feature) const { return !lacks.contains(feature); }

  static Config from_environment();
};

}  // namespace kvferry::fake_cuda
