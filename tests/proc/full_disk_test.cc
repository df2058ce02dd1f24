// Daemons whose file systems are full: the log's and that of shared memory by name. The test has
// small ones of its own, in a mount namespace; skipped, with the reason, where it cannot.
#define CATCH_CONFIG_RUNNER
#include <fcntl.h>
#include <sched.h>
#include <sys/mount.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <iostream>
#include <sstream>

#include "tests/proc/rails_scene.h"

namespace kvferry::testing {
namespace {

// A file that takes what is left of a file system.
class Filler {
 public:
  explicit Filler(const std::string& directory) : path_(directory + "/filler") {
    const int fd = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    REQUIRE(fd >= 0);
    const std::string page(4096, 'x');
    while (::write(fd, page.data(), page.size()) > 0) {
    }
    const int why = errno;
    ::close(fd);
    REQUIRE(why == ENOSPC);
  }
  ~Filler() { free(); }
  Filler(const Filler&) = delete;
  Filler& operator=(const Filler&) = delete;
  void free() { ::unlink(path_.c_str()); }

 private:
  const std::string path_;
};

std::string read_file(const std::string& path) {
  std::ifstream in(path);
  std::stringstream text;
  text << in.rdbuf();
  return text.str();
}

}  // namespace

TEST_CASE("a daemon whose log finds no room goes on, and logs again when there is some") {
  RailsScene scene({}, {}, 512);
  scene.hand_over();
  Filler filler("/tmp");
  // Both tell of each in their logs: a worker that comes and goes, a transfer that fails.
  const std::string before = read_file(scene.daemon(0).log_file());
  client::AttachOptions attach;
  attach.socket = scene.daemon(0).socket();
  for (int i = 0; i < 100; ++i) {
    attach.name = "guest" + std::to_string(i);
    require_ok(client::Client::attach(attach));
    if (i % 10 == 0) scene.hand_over();
  }
  // The last page of the log may have had room left.
  CHECK(read_file(scene.daemon(0).log_file()).size() < before.size() + 4096);
  filler.free();
  attach.name = "last-guest";
  require_ok(client::Client::attach(attach));
  CHECK(comes_true([&] {
    return read_file(scene.daemon(0).log_file()).find("last-guest") != std::string::npos;
  }));
  scene.hand_over();
}

TEST_CASE("a daemon whose rails need a full /dev/shm says so and ends; with room it serves") {
  bench::DaemonOptions options;
  options.binary_directory = binary_directory();
  options.path = "shm";
  options.settings = {"arena.bytes=32MiB", "arena.segment_bytes=16MiB"};
  if (const char* const rails = std::getenv("KVFERRY_RAILS_BINARY"))
    options.settings.push_back("rails.binary=" + std::string(rails));
  const uint16_t ports[2] = {bench::DaemonProcess::find_port(), bench::DaemonProcess::find_port()};
  const bench::DaemonProcess::Identity who{"sender", ports[0], "receiver", ports[1]};
  Filler filler("/dev/shm");
  {
    auto daemon = bench::DaemonProcess::start("/tmp", who, options);
    require_ok(daemon);
    const auto serving = (*daemon)->wait_until_serving();
    REQUIRE_FALSE(serving);
    INFO(serving.error().message);
    CHECK(serving.error().reason == "DAEMON_ENDED");
    CHECK(serving.error().message.find("the rails refuse") != std::string::npos);
  }
  filler.free();
  auto daemon = bench::DaemonProcess::start("/tmp", who, options);
  require_ok(daemon);
  require_ok((*daemon)->wait_until_serving());
  CHECK((*daemon)->terminate() == 0);
}

}  // namespace kvferry::testing

// UCX 1.22 needs more than 16 MiB of /dev/shm: with less its process ends by SIGSEGV.
int main(int argc, char** argv) {
  const bool own = ::unshare(CLONE_NEWNS) == 0 &&
                   ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
                   ::mount("none", "/tmp", "tmpfs", 0, "size=512k") == 0 &&
                   ::mount("none", "/dev/shm", "tmpfs", 0, "size=64m") == 0;
  if (own) return Catch::Session().run(argc, argv);
  std::cout << "skipped: no file systems of our own: " << std::strerror(errno) << "\n";
  return 77;
}
