// What a daemon cannot have as it would be fastest, or safest: it serves all the same, and counts
// it or tells of it. Each is brought about by the kernel, on any machine.
#include <seccomp.h>
#include <stdlib.h>
#include <sys/prctl.h>

#include <filesystem>
#include <thread>

#include "tests/proc/control.h"
#include "tests/unit/numa_machine.h"

namespace kvferry::testing {
namespace {

double fallbacks(const bench::DaemonProcess& daemon, const std::string& way) {
  return metric(daemon, "kvferry_fallbacks_total", "way=\"" + way + "\"");
}

// Runs on a thread of its own, whose filters and other habits its children inherit.
void on_a_thread(const std::function<void()>& what) {
  std::thread(what).join();
}

// As a container runtime does that keeps SYS_NICE back. Of this thread and its children.
bool refuse_binding_memory() {
  const scmp_filter_ctx filter = seccomp_init(SCMP_ACT_ALLOW);
  const bool set = filter != nullptr &&
                   seccomp_rule_add(filter, SCMP_ACT_ERRNO(EPERM), SCMP_SYS(mbind), 0) == 0 &&
                   seccomp_load(filter) == 0;
  seccomp_release(filter);
  return set;
}

}  // namespace

TEST_CASE("an arena in small pages is counted") {
  const bool forbidden = GENERATE(true, false);
  CAPTURE(forbidden);
  // Inherited by the daemons.
  if (forbidden) REQUIRE(::prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0);
  const auto pair = start_pair();
  REQUIRE(::prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0) == 0);
  for (const int side : {0, 1}) {
    const nlohmann::json arenas = control(pair->side(side), "arenas").at("arenas");
    REQUIRE(arenas.size() == 1);
    INFO(arenas[0].dump());
    const auto number = [&](const char* field) {
      const nlohmann::json value = arenas[0].value(field, nlohmann::json("0"));
      return value.is_string() ? std::stoull(value.get<std::string>()) : value.get<uint64_t>();
    };
    const bool whole = number("huge_page_bytes") == number("total_bytes");
    if (forbidden) CHECK_FALSE(whole);
    CHECK(fallbacks(pair->side(side), "small_pages") == (whole ? 0 : 1));
  }
}

TEST_CASE("an arena that cannot be bound to its NUMA nodes is counted") {
  if (!numa::has_cpus_0_and_1()) return;
  const numa::Machine machine("node:2 core:1 pu:1");
  on_a_thread([] {
    REQUIRE(refuse_binding_memory());
    const auto pair = start_pair();
    const nlohmann::json numa = control(pair->side(0), "status").at("numa");
    INFO(numa.dump());
    CHECK(numa.at(0).at("part") == "arena 0");
    CHECK(numa.at(0).at("problem") != "");
    CHECK(fallbacks(pair->side(0), "numa_unbound") == 1);
  });
}

TEST_CASE("off loopback an operator is told that UCX's ports take whoever reaches them") {
  const bool off_loopback = GENERATE(true, false);
  CAPTURE(off_loopback);
  char directory[] = "/tmp/kvferry-ports.XXXXXX";
  REQUIRE(::mkdtemp(directory) != nullptr);
  bench::DaemonOptions options;
  options.binary_directory = binary_directory();
  options.settings = {"arena.bytes=32MiB", "arena.segment_bytes=16MiB",
                      "rails.port_range=21000-21099"};
  // That there is none ends it once it has told.
  if (off_loopback) options.settings.push_back("rails.devices=nosuchdev0");
  const bench::DaemonProcess::Identity identity{"alone", bench::DaemonProcess::find_port(), "none",
                                                1};
  const auto daemon = bench::DaemonProcess::start(directory, identity, options);
  require_ok(daemon);
  CHECK((*daemon)->wait_until_serving().ok() == !off_loopback);
  const std::string log = (*daemon)->log_tail();
  INFO(log);
  const bool told = log.find("UCX's ports take whoever reaches them") != std::string::npos &&
                    log.find("21000-21099") != std::string::npos;
  CHECK(told == off_loopback);
  std::error_code error;
  std::filesystem::remove_all(directory, error);
}

}  // namespace kvferry::testing
