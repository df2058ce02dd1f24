// Daemons that take this machine for one with two NUMA nodes of one processor each: what the kernel
// knows of their arenas and threads afterwards, and what they tell an operator. With one real node
// this says nothing about where pages come from.
#include <stdlib.h>

#include <filesystem>
#include <fstream>

#include "tests/proc/control.h"
#include "tests/unit/cpus.h"

namespace kvferry::testing {
namespace {

using Json = nlohmann::json;

Json numa_of(const bench::DaemonProcess& daemon) {
  return control(daemon, "status").at("numa");
}

std::string line_of(const std::filesystem::path& path, const std::string& part) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);)
    if (line.find(part) != std::string::npos) return line;
  return {};
}

// As the kernel writes it, of the thread with that name.
std::string cpus_of(const bench::DaemonProcess& daemon, const std::string& thread) {
  const std::string tasks = "/proc/" + std::to_string(daemon.pid()) + "/task";
  for (const auto& task : std::filesystem::directory_iterator(tasks)) {
    if (line_of(task.path() / "comm", thread).empty()) continue;
    const std::string line = line_of(task.path() / "status", "Cpus_allowed_list:");
    return line.substr(line.find_last_of("\t ") + 1);
  }
  FAIL("no thread is called " << thread);
  return {};
}

std::string policy_of(const bench::DaemonProcess& daemon, const std::string& memory) {
  return line_of("/proc/" + std::to_string(daemon.pid()) + "/numa_maps", memory);
}

const std::vector<std::string> kSettings{"copy.threads=2", "mapped.host_bytes=16MiB",
                                         "mapped.segment_bytes=8MiB"};

}  // namespace

TEST_CASE("Two nodes: arenas between them, copy threads on both, and the operator is told") {
  const CpuSet own = usable_cpus(0);
  REQUIRE(own.any());
  if (!own.test(0) || !own.test(1)) {
    WARN("not tested: this process may not use the processors 0 and 1");
    return;
  }
  ::setenv("HWLOC_SYNTHETIC", "node:2 core:1 pu:1", 1);
  ::setenv("HWLOC_THISSYSTEM", "1", 1);
  const auto pair = start_pair(kSettings);
  const bench::DaemonProcess& daemon = pair->side(0);
  CHECK(cpus_of(daemon, "kvf-copy-0") == "0");
  CHECK(cpus_of(daemon, "kvf-copy-1") == "1");
  const Json numa = numa_of(daemon);
  INFO(numa.dump());
  // Its rail is on lo, which is nowhere.
  REQUIRE(numa.size() == 3);
  for (const std::size_t arena : {0U, 1U}) {
    CHECK(numa[arena]["part"] == "arena " + std::to_string(arena));
    CHECK(numa[arena]["place"] == "nodes 0,1 in turn");
    const std::string problem = numa[arena]["problem"];
    const std::string memory = arena == 0 ? "kvferry-arena" : "kvferry-mapped";
    const std::string policy = policy_of(daemon, memory);
    if (problem.empty() && policy.empty())
      WARN("not looked at: the daemon's memory policy, which takes CAP_SYS_PTRACE");
    else if (problem.empty())
      CHECK(policy.find(" interleave:") != std::string::npos);
    else
      WARN("mbind is refused here, which is told: " << problem);
  }
  CHECK(numa[2]["part"] == "copy threads");
  CHECK(numa[2]["reason"] == "processors 0 | 1");
  CHECK(numa[2]["problem"] == "");
}

TEST_CASE("numa.bind = off leaves all of it to the kernel") {
  ::setenv("HWLOC_SYNTHETIC", "node:2 core:1 pu:1", 1);
  ::setenv("HWLOC_THISSYSTEM", "1", 1);
  std::vector<std::string> settings = kSettings;
  settings.push_back("numa.bind=off");
  const auto pair = start_pair(settings);
  const bench::DaemonProcess& daemon = pair->side(0);
  const std::string own = line_of("/proc/self/status", "Cpus_allowed_list:");
  CHECK(cpus_of(daemon, "kvf-copy-1") == own.substr(own.find_last_of("\t ") + 1));
  const Json numa = numa_of(daemon);
  REQUIRE(numa.size() == 1);
  CHECK(numa[0]["place"] == "left to the kernel");
  CHECK(numa[0]["reason"] == "numa.bind is \"off\"");
}

}  // namespace kvferry::testing
