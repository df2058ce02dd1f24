// Two rails between two daemons: of different speed, and one that is cut in mid-transfer. Skipped,
// with the reason, where no network can be made (Roads).
#define CATCH_CONFIG_RUNNER
#include <sys/stat.h>

#include <fstream>
#include <iostream>

#include "tests/proc/rails_scene.h"
#include "tests/proc/roads.h"

namespace kvferry::testing {
namespace {

constexpr uint64_t kChunk = 256 << 10;

// Daemons whose rails processes, and nothing else of them, stand in namespaces of their own that
// are joined by roads.
class Distant {
 public:
  // `connections`: of the sender's daemon by each road.
  explicit Distant(const std::vector<uint64_t>& speeds, uint64_t tokens, int connections = 1)
      : roads(speeds) {
    char directory[] = "/tmp/kvferry-roads.XXXXXX";
    REQUIRE(::mkdtemp(directory) != nullptr);
    directory_ = directory;
    const char* const other = std::getenv("KVFERRY_RAILS_BINARY");
    const std::string rails = other != nullptr ? other : binary_directory() + "/kvferry-rails";
    std::string devices = "rails.devices=";
    for (std::size_t road = 0; road < speeds.size(); ++road)
      devices += (road == 0 ? "road" : ",road") + std::to_string(road);
    std::vector<std::string> settings[2];
    for (int side = 0; side < 2; ++side) {
      const std::string wrapper = directory_ + "/rails" + std::to_string(side);
      std::ofstream(wrapper) << "#!/bin/sh\nexec " << roads.inside(side) << " " << rails
                             << " \"$@\"\n";
      REQUIRE(::chmod(wrapper.c_str(), 0700) == 0);
      settings[side] = {"rails.binary=" + wrapper,         devices,
                        "rails.port_range=20000-20999",    "engine.chunk_bytes=256KiB",
                        "engine.heartbeat_interval=200ms", "engine.silence_limit=1s"};
    }
    settings[0].push_back("rails.connections=" + std::to_string(connections));
    scene = std::make_unique<RailsScene>(settings[0], settings[1], tokens);
    scene->hand_over();  // which makes the link
    scene->require_lanes(static_cast<int>(speeds.size()) * connections);
  }
  ~Distant() {
    scene.reset();
    std::error_code error;
    std::filesystem::remove_all(directory_, error);
  }
  Distant(const Distant&) = delete;
  Distant& operator=(const Distant&) = delete;

  Roads roads;
  std::unique_ptr<RailsScene> scene;

 private:
  std::string directory_;
};

}  // namespace

TEST_CASE("a rail that is cut in mid-transfer: its chunks go by the other, and it comes back") {
  constexpr uint64_t kTokens = 8192;  // 32 MiB
  Distant distant({20 * kMiB, 20 * kMiB}, kTokens);
  RailsScene& scene = *distant.scene;
  scene.hand_over();
  for (const int rail : {0, 1}) CHECK(comes_true([&] { return scene.sent_by(rail) > 4 * kMiB; }));
  for (const std::size_t victim : {1U, 0U}) {  // 0 carries the control messages, too
    CAPTURE(victim);
    const double before = scene.received();
    const TransferKey key = scene.begin();
    const bool moves = comes_true([&] { return scene.received() - before > 8 * kMiB; });
    INFO(scene.log_tail());
    REQUIRE(moves);
    distant.roads.cut(victim);
    REQUIRE(scene.received() - before < kTokens * 4096);
    scene.require_done(key);
    scene.require_lanes(1);
    const double by_victim = scene.sent_by(static_cast<int>(victim));
    scene.hand_over();
    CHECK(scene.sent_by(static_cast<int>(victim)) == by_victim);
    distant.roads.mend(victim);
    scene.require_lanes(2);
    scene.hand_over();
    CHECK(
        comes_true([&] { return scene.sent_by(static_cast<int>(victim)) > by_victim + 4 * kMiB; }));
  }
}

TEST_CASE("several connections by each device meet their like at a peer with one by each") {
  Distant distant({40 * kMiB, 40 * kMiB}, 2048, 2);
  RailsScene& scene = *distant.scene;
  scene.hand_over();
  for (const int rail : {0, 1, 2, 3}) {
    CAPTURE(rail);
    CHECK(scene.is_up(rail, "road" + std::to_string(rail % 2)));
    CHECK(comes_true([&] { return scene.sent_by(rail) >= kChunk; }));
  }
}

// Transfers of eight chunks, which are all under way at once: nothing but what was measured before
// can keep them off the slow rail. Both roads run on this machine's processors: while these are
// taken the fast road is slower than it should be, and the slow one rightly gets more.
TEST_CASE("a rail that is forty times slower gets few chunks") {
  constexpr uint64_t kTokens = 512;
  constexpr double kBytes = kTokens * 4096;
  constexpr int kTransfers = 16;
  const std::size_t slow = GENERATE(0U, 1U);
  std::vector<uint64_t> speeds(2, 40 * kMiB);
  speeds[slow] = kMiB;
  Distant distant(speeds, kTokens);
  RailsScene& scene = *distant.scene;
  for (int i = 0; i < kTransfers; ++i) scene.hand_over();
  // The daemon's count of what its rails have sent may be a moment behind.
  REQUIRE(
      comes_true([&] { return scene.sent_by(0) + scene.sent_by(1) >= (kTransfers + 1) * kBytes; }));
  const double slow_bytes = scene.sent_by(static_cast<int>(slow));
  CAPTURE(slow, slow_bytes);
  CHECK(slow_bytes < kTransfers * kBytes / 4);  // half, if they took turns
}

}  // namespace kvferry::testing

int main(int argc, char** argv) {
  const std::string why_not = kvferry::testing::Roads::why_not();
  if (why_not.empty()) return Catch::Session().run(argc, argv);
  std::cout << "skipped: no network can be made: " << why_not << "\n";
  return 77;
}
