// Several rails by one device, of numbers that differ between two daemons.
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <set>

#include "tests/proc/control.h"
#include "tests/proc/rails_scene.h"

namespace kvferry::testing {
namespace {

constexpr uint64_t kChunk = 64 << 10;

// Root owns what /proc shows of a process that nobody may look into, the process's user and group
// the rest.
bool may_be_looked_into(pid_t pid) {
  struct stat found = {};
  REQUIRE(::stat(("/proc/" + std::to_string(pid) + "/status").c_str(), &found) == 0);
  return found.st_uid == ::geteuid() && found.st_gid == ::getegid();
}

}  // namespace

TEST_CASE("a daemon is not looked into by others of its user, whatever its rails may open") {
  // Lest root's own processes look the same either way.
  const gid_t before = ::getgid();
  const bool is_root = ::geteuid() == 0;
  if (is_root) REQUIRE(::setregid(1, 1) == 0);
  {  // Any other program is.
    const pid_t other = ::fork();
    REQUIRE(other >= 0);
    if (other == 0) {
      ::execlp("sleep", "sleep", "60", nullptr);
      ::_exit(1);
    }
    CHECK(comes_true([&] { return may_be_looked_into(other); }));
    ::kill(other, SIGKILL);
    REQUIRE(::waitpid(other, nullptr, 0) == other);
  }
  {
    const std::string transport = GENERATE("tcp", "shm");
    RailsScene scene({"rails.transports=" + transport}, {"rails.transports=" + transport}, 1024);
    for (const int side : {0, 1}) CHECK_FALSE(may_be_looked_into(scene.daemon(side).pid()));
  }
  if (is_root) REQUIRE(::setregid(before, before) == 0);
}

TEST_CASE("several connections by one device: as many lanes as the side with more has") {
  RailsScene scene({"rails.connections=3", "engine.chunk_bytes=64KiB"},
                   {"rails.connections=2", "engine.chunk_bytes=64KiB"}, 8192);
  scene.hand_over();
  scene.require_lanes(3);
  scene.hand_over();
  // How much each carries is a matter of speed, and of this machine's mood.
  for (const int rail : {0, 1, 2}) CHECK(comes_true([&] { return scene.sent_by(rail) >= kChunk; }));
  const auto rails = control(scene.daemon(0), "rails")["rails"];
  REQUIRE(rails.size() == 3);
  std::set<std::string> addresses;
  for (std::size_t i = 0; i < 3; ++i) {
    CHECK(rails[i]["device"] == "lo");
    CHECK(rails[i]["connection"] == i);
    CHECK(rails[i]["settings"]["seccomp"] == "on");
    addresses.insert(rails[i]["address"].get<std::string>());
  }
  CHECK(addresses.size() == 3);  // each listens at a port of its own
  CHECK(control(scene.daemon(1), "rails")["rails"].size() == 2);
  const auto lanes = control(scene.daemon(0), "peers")["peers"][0]["lanes"];
  REQUIRE(lanes.size() == 3);
  for (std::size_t i = 0; i < 3; ++i) {
    CHECK(lanes[i]["rail"] == i);
    CHECK(lanes[i]["up"] == true);
    CHECK(lanes[i]["arrived_bytes"] >= kChunk);
    CHECK(lanes[i]["send_bytes_per_second"] > 0);
    CHECK(lanes[i]["in_flight_bytes"] == 0);
  }
  CHECK(control(scene.daemon(1), "peers")["peers"][0]["lanes"][2]["rail"] == 0);
}

}  // namespace kvferry::testing
