// Hand-offs through bounce arenas in the memory of GPUs, between real processes over the fake
// driver and real UCX. The rails are of a machine whose processor reaches that memory (the UCX here
// has no CUDA); all else is as built.
#include <csignal>

#include "tests/proc/gpu_scene.h"

namespace kvferry::testing {
namespace {

std::vector<std::string> arenas_of(const std::string& kind, std::vector<std::string> more = {}) {
  std::vector<std::string> settings{"arena.kind=" + kind, "arena.device_bytes=16MiB",
                                    "arena.device_segment_bytes=8MiB"};
  settings.insert(settings.end(), more.begin(), more.end());
  return settings;
}

// Bytes in that state, in the arenas of GPUs.
double on_devices(const bench::DaemonProcess& daemon, const std::string& state) {
  double sum = 0;
  for (const char* const gpu : {"gpu0", "gpu1"})
    sum += metric(daemon, "kvferry_arena_bytes",
                  "device=\"" + std::string(gpu) + "\",state=\"" + state + "\"");
  return sum;
}

}  // namespace

TEST_CASE("KV goes through arenas on GPUs of each kind, also from and to pages of the host") {
  struct Row {
    const char* kind;
    const char* from;
    const char* from_memory;
    const char* to;
    const char* to_memory;
  };
  const Row row = GENERATE(Row{"fabric_vmm", "tp2", "vmm", "tp4", "cuda"},
                           Row{"device_vmm", "tp4", "cuda", "tp2", "vmm"},
                           Row{"cuda_malloc", "tp2", "vmm", "tp1", "vmm"},
                           Row{"device_vmm", "tp2", "host", "tp1", "vmm"},
                           Row{"cuda_malloc", "tp1", "vmm", "tp2", "host"});
  CAPTURE(row.kind, row.from, row.from_memory, row.to, row.to_memory);
  GpuScene scene(arenas_of(row.kind), {}, GpuScene::Rails::kCoherent);
  for (const int side : {0, 1}) {
    const bench::DaemonProcess& daemon = scene.pair->side(side);
    CHECK(metric(daemon, "kvferry_arena_info", "kind=\"" + std::string(row.kind) + "\"") == 2);
    CHECK(on_devices(daemon, "free") == 2 * (16 << 20));
    CHECK(metric(daemon, "kvferry_fallbacks_total", "way=\"host_arena\"") == 0);
  }
  scene.start_workers(row.from, row.from_memory, row.to, row.to_memory);
  scene.require_hand_over();
  scene.require_hand_over(17);
  for (const int side : {0, 1})
    CHECK(comes_true([&] { return on_devices(scene.pair->side(side), "free") == 2 * (16 << 20); }));
}

TEST_CASE("chunks are staged and land on the device; a killed rails process imports it anew") {
  const std::string kind = GENERATE("fabric_vmm", "device_vmm", "cuda_malloc");
  CAPTURE(kind);
  GpuScene scene(arenas_of(kind, {"engine.chunk_bytes=16KiB", "engine.leg_credits=2"}), {},
                 GpuScene::Rails::kCoherent);
  constexpr uint64_t kMany = 8192;
  scene.start_workers("tp2", "cuda", "tp2", "vmm", kMany);
  const uint64_t held = scene.device_bytes();
  const TransferKey key = scene.begin(kMany);
  CHECK(comes_true([&] { return on_devices(scene.pair->side(0), "staging") > 0; }));
  CHECK(comes_true([&] {
    return on_devices(scene.pair->side(1), "granted") + on_devices(scene.pair->side(1), "landing") >
           0;
  }));
  const pid_t rails = scene.pair->side(1).rails_pid();
  REQUIRE(rails > 0);
  REQUIRE(::kill(rails, SIGKILL) == 0);
  for (const RankEnd& rank : scene.end(1, key).ranks) CHECK(rank.state == "COMPLETED");
  for (const RankEnd& rank : scene.end(0, key).ranks) CHECK(rank.state == "DELIVERED");
  CHECK(scene.workers[1]->ask("verify " + std::to_string(kMany)) == "VERIFIED");
  CHECK(metric(scene.pair->side(1), "kvferry_rails_process_restarts_total") >= 1);
  for (auto& worker : scene.workers) REQUIRE(worker->ask("close " + key.id) == "OK");
  CHECK(comes_true([&] { return scene.device_bytes() == held; }));
}

TEST_CASE("a GPU that fails takes its arena along, and leaves the other one its work") {
  GpuScene scene(arenas_of("device_vmm"), {}, GpuScene::Rails::kCoherent);
  scene.start_workers("tp2", "vmm", "tp1", "vmm");
  scene.require_hand_over();
  std::ofstream(scene.machine.directory() + "/fault.1") << cuda::CUDA_ERROR_ILLEGAL_ADDRESS;
  const TransferKey key = scene.begin(kTokens);
  for (const RankEnd& rank : scene.end(1, key).ranks) CHECK(rank.state == "FAILED");
  CHECK(comes_true([&] { return metric(scene.pair->side(0), "kvferry_gpu_up") == 1; }));
  scene.start_workers("tp1", "vmm", "tp1", "vmm");
  scene.require_hand_over();
}

TEST_CASE(
    "where the UCX of the rails has no CUDA, auto copies to host memory, and a kind is refused") {
  {
    GpuScene scene({"arena.device_bytes=16MiB", "arena.device_segment_bytes=8MiB"});
    CHECK(metric(scene.pair->side(0), "kvferry_arena_info", "kind=\"pinned_host\"") == 1);
    CHECK(metric(scene.pair->side(0), "kvferry_arena_info") == 1);
    // Which is slower, of either GPU.
    CHECK(metric(scene.pair->side(0), "kvferry_fallbacks_total", "way=\"host_arena\"") == 2);
  }
  bench::DaemonOptions options;
  options.binary_directory = binary_directory();
  options.settings = arenas_of("device_vmm", {"gpu.driver=" + std::string(kLibrary)});
  if (const char* const rails = std::getenv("KVFERRY_RAILS_BINARY"))
    options.settings.push_back("rails.binary=" + std::string(rails));
  const fake_cuda::Machine machine(kLibrary, two_gpus());
  const auto pair = DaemonPair::start(options);
  REQUIRE_FALSE(pair);
  INFO(pair.error().to_string());
  CHECK(pair.error().to_string().find("CONFIGURATION_ARENA_KIND") != std::string::npos);
  CHECK(pair.error().to_string().find("cannot use it") != std::string::npos);
}

}  // namespace kvferry::testing
