// Which arenas a daemon has: what the configuration, the machine and the rails' UCX allow, and what
// is said of it.
#include "daemon/node/arena_setup.h"

#include <catch2/catch.hpp>

#include "tests/fake_cuda/control.h"

namespace kvferry::node {
namespace {

constexpr uint64_t kMiB = 1 << 20;
constexpr const char* kFake = KVFERRY_FAKE_CUDA_LIBRARY;

fake_cuda::Setup two_gpus(const std::string& lacks = {}) {
  fake_cuda::Setup setup;
  setup.devices = 2;
  setup.memory_mb = 256;
  setup.lacks = lacks;
  return setup;
}

ops::Config config_of(ops::ArenaKind kind) {
  ops::Config config;
  config.gpu.driver = kFake;
  config.arena.kind = kind;
  config.arena.bytes = 4 * kMiB;
  config.arena.segment_bytes = 2 * kMiB;
  config.arena.device_bytes = 8 * kMiB;
  config.arena.device_segment_bytes = 4 * kMiB;
  return config;
}

rails::RailsCapabilities with_cuda() {
  rails::RailsCapabilities out;
  out.ucx_version = "1.22.0";
  out.memory_types = {"host", "cuda"};
  return out;
}

rails::RailsCapabilities without_cuda() {
  rails::RailsCapabilities out;
  out.ucx_version = "1.13.1";
  out.memory_types = {"host"};
  out.cuda_missing = "built without";
  return out;
}

// In the order in which they go.
struct Node {
  std::unique_ptr<Arenas> arenas;
  Gpu gpu;
  int asked = 0;

  Status set_up(const ops::Config& config, Result<rails::RailsCapabilities> answer) {
    static ops::Watchdog watchdog;
    auto made = Arenas::create(std::vector<uint64_t>(
        config.arena.bytes / config.arena.segment_bytes, config.arena.segment_bytes));
    KVFERRY_RETURN_IF_ERROR(made);
    arenas = std::move(*made);
    auto opened = open_gpu(config, find_gpus(config), *arenas, watchdog);
    KVFERRY_RETURN_IF_ERROR(opened);
    gpu = std::move(*opened);
    return add_device_arenas(
        config, gpu,
        [&] {
          ++asked;
          return answer;
        },
        *arenas);
  }
  const gpu::Device* device(std::size_t i) const { return gpu.devices->all().at(i).get(); }
  std::string host_reason() const { return arenas->all().at(0).choice.reason; }
};

}  // namespace

TEST_CASE("Each GPU has an arena of the configured kind, in segments numbered through") {
  fake_cuda::Machine machine(kFake, two_gpus());
  const auto [kind, word, rails_kind] =
      GENERATE(table<ops::ArenaKind, const char*, rails::SegmentKind>(
          {{ops::ArenaKind::kFabricVmm, "fabric_vmm", rails::SegmentKind::kFabricVmm},
           {ops::ArenaKind::kDeviceVmm, "device_vmm", rails::SegmentKind::kDeviceVmm},
           {ops::ArenaKind::kCudaMalloc, "cuda_malloc", rails::SegmentKind::kCudaMalloc}}));
  {
    Node node;
    const Status made = node.set_up(config_of(kind), with_cuda());
    if (!made) FAIL(made.error().to_string());
    CHECK(node.asked == 1);
    const auto& all = node.arenas->all();
    REQUIRE(all.size() == 3);
    CHECK(all[0].choice.device == "host");
    CHECK(all[0].choice.kind == "pinned_host");
    CHECK(all[1].choice.device == "gpu0");
    CHECK(all[1].choice.kind == word);
    CHECK(all[1].choice.reason == "configured");
    CHECK(all[2].choice.device == "gpu1");
    CHECK(all[2].segment_bytes == std::vector<uint64_t>{4 * kMiB, 4 * kMiB});
    CHECK(node.arenas->total_bytes() == 20 * kMiB);
    CHECK(node.arenas->of(nullptr) == 0);
    CHECK(node.arenas->of(node.device(0)) == 1);
    CHECK(node.arenas->of(node.device(1)) == 2);

    const Segments& segments = node.arenas->segments();
    REQUIRE(segments.count() == 6);
    CHECK(segments.host_address({1, 0, 2 * kMiB}) != nullptr);
    CHECK(segments.host_address({2, 0, 1}) == nullptr);
    CHECK(segments.device_of({1, 0, 1}) == nullptr);
    CHECK(segments.device_of({3, 0, 1}) == node.device(0));
    CHECK(segments.device_of({4, 0, 1}) == node.device(1));
    CHECK(segments.address_on(*node.device(1), {5, 4096, 1}) ==
          segments.address_on(*node.device(1), {5, 0, 1}) + 4096);
    CHECK(segments.holds({5, 4 * kMiB - 1, 1}));
    CHECK_FALSE(segments.holds({5, 4 * kMiB, 1}));
    CHECK_FALSE(segments.holds({5, UINT64_MAX, 2}));
    CHECK_FALSE(segments.holds({5, 2, UINT64_MAX}));
    CHECK_FALSE(segments.holds({6, 0, 1}));

    auto for_rails = node.arenas->for_rails();
    REQUIRE(for_rails);
    REQUIRE(for_rails->size() == 6);
    CHECK(for_rails->at(1).kind == rails::SegmentKind::kHost);
    CHECK(for_rails->at(1).fd >= 0);
    for (std::size_t i = 2; i < 6; ++i) {
      CHECK(for_rails->at(i).kind == rails_kind);
      CHECK((for_rails->at(i).fd >= 0) == (kind == ops::ArenaKind::kDeviceVmm));
      CHECK(for_rails->at(i).bytes >= 4 * kMiB);
      CHECK(for_rails->at(i).device_uuid == node.device(i < 4 ? 0 : 1)->facts().uuid);
    }
  }
  INFO(machine->live().to_string());
  CHECK(machine->live().total() == 0);
}

TEST_CASE("A kind that was configured and does not work is an error that says why") {
  fake_cuda::Machine machine(kFake, two_gpus("imex"));
  {
    Node node;
    const Status made = node.set_up(config_of(ops::ArenaKind::kFabricVmm), with_cuda());
    REQUIRE_FALSE(made);
    CHECK(made.error().reason == "CONFIGURATION_ARENA_KIND");
    CHECK(made.error().field == "arena.kind");
    CHECK(made.error().message.find("gpu0") != std::string::npos);
  }
  {
    Node node;
    const Status made = node.set_up(config_of(ops::ArenaKind::kDeviceVmm), without_cuda());
    REQUIRE_FALSE(made);
    CHECK(made.error().reason == "CONFIGURATION_ARENA_KIND");
    CHECK(made.error().message == "UCX 1.13.1 cannot use it: built without");
  }
  {
    Node node;
    const Status made = node.set_up(config_of(ops::ArenaKind::kDeviceVmm),
                                    fail(Code::kUnavailable, "CAPABILITIES_TIMEOUT", "no answer"));
    REQUIRE_FALSE(made);
    CHECK(made.error().reason == "CAPABILITIES_TIMEOUT");
  }
  {
    Node node;
    ops::Config config = config_of(ops::ArenaKind::kCudaMalloc);
    config.arena.device_share = 0.01;
    const Status made = node.set_up(config, with_cuda());
    REQUIRE_FALSE(made);
    CHECK(made.error().reason == "CONFIGURATION_ARENA_SHARE");
    CHECK(made.error().field == "arena.device_share");
  }
  {
    Node node;
    ops::Config config = config_of(ops::ArenaKind::kDeviceVmm);
    config.gpu.driver = "/nonexistent/libcuda.so.1";
    const Status made = node.set_up(config, with_cuda());
    REQUIRE_FALSE(made);
    CHECK(made.error().reason == "CONFIGURATION_ARENA_KIND");
    CHECK(node.asked == 0);
  }
  CHECK(machine->live().total() == 0);
}

TEST_CASE(
    "Kind auto goes through host memory where that is better or all that works, and says so") {
  fake_cuda::Machine machine(kFake, two_gpus());
  struct Row {
    std::function<void(ops::Config&)> change;
    const char* reason;
  };
  const Row rows[] = {
      {[](ops::Config&) {}, "its rails read host memory only"},
      {[](ops::Config& config) {
         config.rails.transports = {"tcp", "shm"};
       },
       "its rails read host memory only"},
      {[](ops::Config& config) { config.arena.device_bytes = 0; }, "arena.device_bytes is 0"},
      {[](ops::Config& config) { config.checks.kind = ops::CheckKind::kXxh3; }, "checks.kind"},
      {[](ops::Config& config) { config.engine.chunk_bytes = 8 * kMiB; }, "engine.chunk_bytes"},
  };
  for (const Row& row : rows) {
    ops::Config config = config_of(ops::ArenaKind::kAuto);
    row.change(config);
    Node node;
    const Status made = node.set_up(config, with_cuda());
    if (!made) FAIL(made.error().to_string());
    CHECK(node.asked == 0);
    CHECK(node.arenas->all().size() == 1);
    CHECK(node.arenas->of(node.device(0)) == 0);
    CHECK(node.arenas->all()[0].choice.kind == "pinned_host");
    INFO(node.host_reason());
    CHECK(node.host_reason().find(row.reason) != std::string::npos);
  }
}

TEST_CASE("Without a GPU the arena is shared host memory") {
  Node node;
  ops::Config config = config_of(ops::ArenaKind::kAuto);
  config.gpu.driver = "/nonexistent/libcuda.so.1";
  REQUIRE(node.set_up(config, with_cuda()));
  CHECK(node.asked == 0);
  CHECK(node.arenas->all()[0].choice.kind == "shared_host");
  CHECK(node.host_reason().find("no GPU: ") == 0);
  CHECK(node.arenas->segments().keep({0, 0, 1}) == nullptr);
}

}  // namespace kvferry::node
