// Hand-offs of memory on GPUs between real processes: two daemons and workers over the fake driver,
// which all share one machine of two GPUs. Every byte verified; what a killed worker had is free
// again at once.
#include "tests/proc/gpu_scene.h"

namespace kvferry::testing {
TEST_CASE("KV in device memory arrives whole: tp2 to tp4 and back, by descriptor and by handle") {
  struct Row {
    const char* from;
    const char* from_memory;
    const char* to;
    const char* to_memory;
  };
  const Row row = GENERATE(Row{"tp2", "vmm", "tp4", "vmm"}, Row{"tp4", "cuda", "tp2", "cuda"},
                           Row{"tp2", "cuda", "tp4", "vmm"}, Row{"tp2", "host", "tp1", "vmm"},
                           Row{"tp1", "vmm", "tp2", "host"});
  CAPTURE(row.from, row.from_memory, row.to, row.to_memory);
  GpuScene scene;
  scene.start_workers(row.from, row.from_memory, row.to, row.to_memory);
  scene.require_hand_over();
  scene.require_hand_over(17);
  const bool sends = std::string(row.from_memory) != "host";
  const double copied = metric(scene.pair->side(sends ? 0 : 1), "kvferry_gpu_copy_bytes_total",
                               sends ? "kind=\"gather\"" : "kind=\"scatter\"");
  CHECK(copied > 0);
  CHECK(metric(scene.pair->side(0), "kvferry_gpu_up") == 2);
  CHECK(metric(scene.pair->side(0), "kvferry_arena_info", "kind=\"pinned_host\"") == 1);
}

TEST_CASE("checks, and a destination that is ready by a CUDA event") {
  GpuScene scene({"checks.kind=xxh3"});
  scene.start_workers("tp2", "vmm", "tp1", "cuda");
  scene.require_hand_over();
  scene.require_hand_over(kTokens, "event");
}

TEST_CASE("a packed copy of device memory serves receivers, and tails are cleared on a GPU") {
  GpuScene scene;
  scene.receiver_more = {"zero"};
  scene.start_workers("tp2", "vmm", "tp4", "cuda");
  scene.require_hand_over();
  scene.require_hand_over(kTokens, {}, "packed");
  CHECK(metric(scene.pair->side(0), "kvferry_packed_made_total") == 2);
  CHECK(metric(scene.pair->side(0), "kvferry_gpu_copies_total", "kind=\"transfer\"") == 2);
  CHECK(metric(scene.pair->side(1), "kvferry_gpu_copies_total", "kind=\"clear\"") > 0);
}

TEST_CASE("within one daemon the GPU copies from pages to pages, also from and to the host") {
  struct Row {
    const char* from;
    const char* to;
  };
  const Row row = GENERATE(Row{"vmm", "vmm"}, Row{"vmm", "host"}, Row{"host", "vmm"});
  CAPTURE(row.from, row.to);
  GpuScene scene;
  scene.start_workers("tp2", row.from, "tp4", row.to, kTokens, true);
  scene.require_hand_over();
  CHECK(metric(scene.pair->side(0), "kvferry_gpu_copy_bytes_total", "kind=\"transfer\"") > 0);
}

TEST_CASE("a killed worker's device memory is free again within a second") {
  const std::string memory = GENERATE("vmm", "cuda");
  CAPTURE(memory);
  GpuScene scene;
  const uint64_t before = scene.device_bytes();  // what the daemons need
  scene.start_workers("tp2", memory, "tp2", memory);
  scene.require_hand_over();
  REQUIRE(scene.device_bytes() > before);
  for (const int victim : {1, 0}) {
    const uint64_t held = scene.device_bytes();
    scene.workers[victim].reset();  // SIGKILL, with its pools imported
    CHECK(comes_true([&] { return scene.device_bytes() < held; }, seconds(1)));
  }
  CHECK(comes_true([&] { return scene.device_bytes() == before; }, seconds(1)));
}

TEST_CASE("a worker killed in mid-transfer: the other fails soon and its memory is free") {
  GpuScene scene({"engine.chunk_bytes=16KiB", "engine.leg_credits=2"});
  const uint64_t before = scene.device_bytes();
  constexpr uint64_t kMany = 8192;
  scene.start_workers("tp2", "cuda", "tp2", "vmm", kMany);
  const TransferKey key = scene.begin(kMany);
  REQUIRE(comes_true(
      [&] { return metric(scene.pair->side(1), "kvferry_gpu_copies_total", "scatter") > 20; }));
  const uint64_t held = scene.device_bytes();
  scene.workers[0].reset();
  CHECK(comes_true([&] { return scene.device_bytes() < held; }, seconds(1)));
  for (const RankEnd& rank : scene.end(1, key).ranks) {
    CHECK(rank.state == "FAILED");
    CHECK(rank.reason == "WORKER_LOST");
  }
  scene.workers[1].reset();
  CHECK(comes_true([&] { return scene.device_bytes() == before; }, seconds(1)));
}

TEST_CASE("a call of the driver that fails costs its transfer, and the next one arrives") {
  const std::string call = GENERATE("cuLaunchKernel:1", "cuLaunchKernel:4", "cuMemcpyHtoDAsync:1",
                                    "cuEventCreate:1", "cuEventRecord:2");
  CAPTURE(call);
  GpuScene scene({}, call + ":" + std::to_string(cuda::CUDA_ERROR_UNKNOWN));
  scene.start_workers("tp2", "cuda", "tp4", "vmm");
  // Once in each daemon, perhaps in two transfers.
  for (int i = 0; i < 2; ++i) {
    const TransferKey key = scene.begin(kTokens);
    for (const RankEnd& rank : scene.end(1, key).ranks)
      CHECK((rank.state == "COMPLETED" || rank.state == "FAILED"));
    for (const RankEnd& rank : scene.end(0, key).ranks)
      CHECK((rank.state == "DELIVERED" || rank.state == "FAILED"));
    for (auto& worker : scene.workers) REQUIRE(worker->ask("close " + key.id) == "OK");
  }
  REQUIRE(scene.workers[1]->ask("clean") == "OK");
  scene.require_hand_over();
  for (int side : {0, 1}) CHECK(metric(scene.pair->side(side), "kvferry_gpu_up") == 2);
}

TEST_CASE("a GPU that fails is told of, fails its transfers, and leaves the other one its work") {
  GpuScene scene;
  scene.start_workers("tp2", "vmm", "tp1", "vmm");  // the sender has a rank on each
  scene.require_hand_over();
  std::ofstream(scene.machine.directory() + "/fault.1") << cuda::CUDA_ERROR_ILLEGAL_ADDRESS;
  const TransferKey key = scene.begin(kTokens);
  for (const RankEnd& rank : scene.end(1, key).ranks) CHECK(rank.state == "FAILED");
  const bench::DaemonProcess& daemon = scene.pair->side(0);
  CHECK(comes_true([&] { return metric(daemon, "kvferry_gpu_up") == 1; }));
  CHECK(daemon.http("/healthz").find("gpu1 is down") != std::string::npos);
  // Workers of the other GPU alone are served.
  scene.start_workers("tp1", "vmm", "tp1", "vmm");
  scene.require_hand_over();
}

}  // namespace kvferry::testing
