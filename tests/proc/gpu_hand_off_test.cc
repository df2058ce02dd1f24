// Hand-offs of memory on GPUs between real processes: two daemons and workers over the fake driver,
// which all share one machine of two GPUs. Every byte verified; what a killed worker had is free
// again at once.
#include <fstream>
#include <sstream>

#include "tests/fake_cuda/control.h"
#include "tests/proc/fault_worker.h"
#include "tests/proc/hand_off_daemons.h"

namespace kvferry::testing {
namespace {

constexpr const char* kLibrary = KVFERRY_FAKE_CUDA_LIBRARY;
constexpr uint64_t kTokens = 650;  // with a partly filled last block

fake_cuda::Setup two_gpus() {
  fake_cuda::Setup setup;
  setup.devices = 2;
  setup.memory_mb = 512;
  setup.delay_us = 20;
  return setup;
}

bench::Shape shape_of(uint64_t tokens) {
  bench::Shape shape;
  shape.name = "test";
  shape.layers = 4;
  shape.kv_heads = 8;
  shape.head_bytes = 256;
  shape.tokens = tokens;
  return shape;
}

struct GpuScene {
  fake_cuda::Machine machine{kLibrary, two_gpus()};
  std::unique_ptr<DaemonPair> pair;
  std::unique_ptr<WorkerProcess> workers[2];
  std::string ticket;

  // `fail`: what fails in each daemon, as KVFERRY_FAKE_CUDA_FAIL has it.
  explicit GpuScene(std::vector<std::string> settings = {}, const std::string& fail = {}) {
    ::setenv("KVFERRY_CUDA_DRIVER", kLibrary, 1);
    settings.push_back("gpu.enabled=on");
    settings.push_back("gpu.driver=" + std::string(kLibrary));
    settings.insert(settings.begin(), "engine.chunk_bytes=256KiB");
    settings.push_back("engine.silence_limit=15s");  // silence is not what tells here
    ::setenv("KVFERRY_FAKE_CUDA_FAIL", fail.c_str(), 1);
    pair = start_pair(settings);
    ::unsetenv("KVFERRY_FAKE_CUDA_FAIL");
  }
  std::vector<std::string> receiver_more;  // words of the receiver
  // `both_here`: sender and receiver are workers of one daemon.
  void start_workers(const std::string& from, const std::string& from_memory, const std::string& to,
                     const std::string& to_memory, uint64_t tokens = kTokens,
                     bool both_here = false) {
    start_worker(0, from, from_memory, tokens, both_here);
    start_worker(1, to, to_memory, tokens, both_here);
    std::istringstream words(workers[0]->ask("ticket"));
    std::string word;
    words >> word >> ticket;
    REQUIRE(word == "TICKET");
  }
  void start_worker(int side, const std::string& topology, const std::string& memory,
                    uint64_t tokens, bool both_here = false) {
    workers[side].reset();
    std::vector<std::string> more{memory, "2"};
    if (side == 1) more.insert(more.end(), receiver_more.begin(), receiver_more.end());
    workers[side] = std::make_unique<WorkerProcess>(
        binary_directory(), side == 0, pair->side(both_here ? 0 : side).socket(),
        side == 0 ? "prefill" : "decode", topology, shape_of(tokens), more);
    const std::string trouble = workers[side]->wait_until_ready();
    INFO(trouble);
    INFO(pair->log_tail());
    REQUIRE(trouble.empty());
  }
  TransferKey begin(uint64_t tokens, const std::string& ready = {}, const std::string& how = {}) {
    const TransferKey key = new_key("prefill");
    const std::string name = key.id + " " + client::to_text(key.secret);
    REQUIRE(workers[0]->ask("send " + name + " " + std::to_string(tokens) + " " + how) == "OK");
    REQUIRE(workers[1]->ask("receive " + name + " " + ticket + " " + std::to_string(tokens) + " " +
                            ready) == "OK");
    return key;
  }
  TransferEnd end(int side, const TransferKey& key) {
    workers[side]->tell("wait " + key.id + " 30000");
    return workers[side]->next_end();
  }
  void require_hand_over(uint64_t tokens = kTokens, const std::string& ready = {},
                         const std::string& how = {}) {
    const TransferKey key = begin(tokens, ready, how);
    const TransferEnd received = end(1, key);
    INFO(received.error);
    INFO(pair->log_tail());
    REQUIRE_FALSE(received.ranks.empty());
    for (const RankEnd& rank : received.ranks) {
      INFO(rank.reason);
      REQUIRE(rank.state == "COMPLETED");
    }
    for (const RankEnd& rank : end(0, key).ranks) REQUIRE(rank.state == "DELIVERED");
    REQUIRE(workers[1]->ask("verify " + std::to_string(tokens)) == "VERIFIED");
    if (!receiver_more.empty())
      REQUIRE(workers[1]->ask("tail " + std::to_string(tokens)) == "CLEARED");
    REQUIRE(workers[1]->ask("clean") == "OK");
    for (auto& worker : workers) REQUIRE(worker->ask("close " + key.id) == "OK");
  }
  uint64_t device_bytes() const { return machine->device_bytes(0) + machine->device_bytes(1); }
};

}  // namespace

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
