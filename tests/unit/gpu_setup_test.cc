// Which kinds of pools a daemon takes, and what it makes of a machine without a GPU.
#include "daemon/node/gpu_setup.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <catch2/catch.hpp>

#include "daemon/memory/host_pool.h"
#include "tests/fake_cuda/control.h"

namespace kvferry::node {
namespace {

using rpc::PoolKind;
using Kinds = std::vector<PoolKind>;

ops::Config with(std::vector<std::string> kinds, ops::GpuUse use, const std::string& driver) {
  ops::Config config;
  config.pools.kinds = std::move(kinds);
  config.gpu.enabled = use;
  config.gpu.driver = driver;
  return config;
}

std::unique_ptr<Arenas> host_arenas() {
  auto arenas = Arenas::create({1 << 20});
  REQUIRE(arenas);
  return std::move(*arenas);
}

// GPUs and the arenas that they see, in the order in which they go.
struct Opened {
  std::unique_ptr<Arenas> arenas = host_arenas();
  Result<Gpu> gpu;

  explicit operator bool() const { return gpu.has_value(); }
  const Gpu* operator->() const { return &*gpu; }
  const Error& error() const { return gpu.error(); }
  cuda::CUdeviceptr address(const gpu::Device& device, const memory::Region& region) const {
    return arenas->segments().address_on(device, region);
  }
};

Opened open_gpu(const ops::Config& config) {
  static ops::Watchdog watchdog;
  Opened out;
  out.gpu = node::open_gpu(config, find_gpus(config), *out.arenas, watchdog);
  return out;
}

constexpr const char* kNone = "/nonexistent/libcuda.so.1";
constexpr const char* kFake = KVFERRY_FAKE_CUDA_LIBRARY;

fake_cuda::Setup without_fabric() {
  fake_cuda::Setup setup;
  setup.memory_mb = 64;
  setup.lacks = "fabric";
  return setup;
}

}  // namespace

TEST_CASE("All kinds are taken by default, of several tenants only descriptors") {
  ops::Config config;
  CHECK(pool_kinds(config) ==
        Kinds{PoolKind::kHostShm, PoolKind::kCudaVmmFd, PoolKind::kCudaIpc, PoolKind::kCudaFabric});
  config.sockets.emplace_back();
  CHECK(pool_kinds(config).size() == 4);
  config.sockets.back().tenant = "other";
  CHECK(pool_kinds(config) == Kinds{PoolKind::kHostShm, PoolKind::kCudaVmmFd});
  config.pools.kinds = {"cuda_vmm_fd"};
  CHECK(pool_kinds(config) == Kinds{PoolKind::kCudaVmmFd});
}

TEST_CASE("A GPU is used if it is there, unless it must be or must not be") {
  fake_cuda::Machine machine(kFake, without_fabric());
  {
    const auto gpu = open_gpu(with({"auto"}, ops::GpuUse::kAuto, kFake));
    REQUIRE(gpu);
    CHECK(gpu->devices->all().size() == 1);
    CHECK(gpu->imports != nullptr);
    CHECK(gpu->queues != nullptr);
    CHECK(gpu->why_not.empty());
    CHECK(gpu->unused == 0);
    CHECK(gpu->labels().at(0).device == "gpu0");
    CHECK(gpu.arenas->all().at(0).choice.kind == "pinned_host");
    // The devices see the arena.
    const gpu::Device& device = *gpu->devices->all()[0];
    CHECK(gpu.address(device, {0, 0, 4096}) != 0);
    CHECK(gpu.address(device, {0, 4096, 4096}) == gpu.address(device, {0, 0, 4096}) + 4096);
  }
  const auto off = open_gpu(with({"auto"}, ops::GpuUse::kOff, kFake));
  REQUIRE(off);
  CHECK(off->imports == nullptr);
  CHECK(off->why_not.find("gpu.enabled") != std::string::npos);
  const auto none = open_gpu(with({"auto"}, ops::GpuUse::kAuto, kNone));
  REQUIRE(none);
  CHECK(none->imports == nullptr);
  CHECK(none->unused == 0);  // it is not there
  CHECK_FALSE(none->why_not.empty());
  CHECK(open_gpu(with({"auto"}, ops::GpuUse::kOn, kNone)).error().reason == "CONFIGURATION_GPU");
  CHECK(machine->live().total() == 0);
}

TEST_CASE("Whichever call of the set-up fails, GPUs are used or not and why, and nothing is left") {
  fake_cuda::Setup setup;
  setup.devices = 2;
  setup.memory_mb = 64;
  fake_cuda::Machine machine(kFake, setup);
  const ops::Config config = with({"auto"}, ops::GpuUse::kAuto, kFake);
  uint64_t calls = 0;
  {
    const uint64_t before = machine->calls();
    const auto gpu = open_gpu(config);
    REQUIRE(gpu);
    // The queues' threads call as well.
    calls = machine->calls() - before;
  }
  REQUIRE(calls > 50);
  std::size_t unused = 0;
  std::size_t less = 0;
  for (uint64_t n = 1; n <= calls; ++n) {
    INFO("call " << n << " of " << calls);
    machine->fail("", n, cuda::CUDA_ERROR_UNKNOWN);
    {
      const auto gpu = open_gpu(config);
      REQUIRE(gpu);
      if (gpu->devices == nullptr) {
        ++unused;
        CHECK_FALSE(gpu->why_not.empty());
      } else {
        std::size_t up = 0;
        for (const auto& device : gpu->devices->all()) {
          if (device->down()) continue;
          ++up;
          CHECK(gpu->queues->of(*device) != nullptr);
          CHECK(gpu.address(*device, {0, 0, 1}) != 0);
        }
        CHECK(up > 0);
        less += up < 2 ? 1 : 0;
      }
    }
    machine->fail("", 0, 0);
    INFO(machine->live().to_string());
    CHECK(machine->live().total() == 0);
  }
  CHECK(unused > 0);
  CHECK(less > 0);
}

TEST_CASE("The arena stays registered for as long as a copy may write it") {
  fake_cuda::Machine machine(kFake, without_fabric());
  std::shared_ptr<const void> copy;
  {
    const auto gpu = open_gpu(with({"auto"}, ops::GpuUse::kAuto, kFake));
    REQUIRE(gpu);
    copy = gpu.arenas->segments().keep({0, 4096, 4096});
  }
  CHECK(machine->live().registrations == 1);
  copy.reset();
  CHECK(machine->live().total() == 0);
}

TEST_CASE("Host memory that a worker has made a hole in is not registered") {
  fake_cuda::Machine machine(kFake, without_fabric());
  const auto gpu = open_gpu(with({"auto"}, ops::GpuUse::kAuto, kFake));
  REQUIRE(gpu);
  constexpr off_t kBytes = 4 * 4096;
  const UniqueFd worker(::memfd_create("worker", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  REQUIRE(::fallocate(worker.get(), 0, 0, kBytes) == 0);
  REQUIRE(::fcntl(worker.get(), F_ADD_SEALS, F_SEAL_SHRINK) == 0);
  const auto pool = memory::HostPool::import(UniqueFd(::dup(worker.get())), kBytes);
  REQUIRE(pool);
  REQUIRE(::fallocate(worker.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 4096, 4096) == 0);
  const uint64_t before = machine->live().registrations;
  const auto pinned = gpu->queues->pin({*pool});
  REQUIRE_FALSE(pinned);
  CHECK(pinned.error().reason == "POOL_UNUSABLE");
  CHECK(machine->live().registrations == before);
  CHECK((*pool)->failed());
}

TEST_CASE("The arena's kind follows the GPU, and one that is asked for must be there") {
  fake_cuda::Machine machine(kFake, without_fabric());
  ops::Config shared = with({"auto"}, ops::GpuUse::kAuto, kFake);
  shared.arena.kind = ops::ArenaKind::kSharedHost;
  const auto without = open_gpu(shared);
  REQUIRE(without);
  CHECK(without->queues == nullptr);
  CHECK(without->why_not.find("shared_host") != std::string::npos);
  CHECK(without.arenas->all().at(0).choice.kind == "shared_host");
  ops::Config pinned = with({"auto"}, ops::GpuUse::kAuto, kNone);
  pinned.arena.kind = ops::ArenaKind::kPinnedHost;
  CHECK(open_gpu(pinned).error().reason == "CONFIGURATION_ARENA_KIND");
  pinned.gpu.driver = kFake;
  CHECK(open_gpu(pinned));
  // Memory that cannot be pinned, kernels that do not load: no GPU, or an error where one must be.
  for (const char* const call : {"cuMemHostRegister", "cuModuleLoadData", "cuStreamCreate"}) {
    CAPTURE(call);
    ops::Config config = with({"auto"}, ops::GpuUse::kAuto, kFake);
    machine->fail(call, 1, cuda::CUDA_ERROR_UNKNOWN);
    const auto unused = open_gpu(config);
    REQUIRE(unused);
    CHECK(unused->queues == nullptr);
    CHECK_FALSE(unused->why_not.empty());
    CHECK(unused->unused == 1);
    config.gpu.enabled = ops::GpuUse::kOn;
    machine->fail(call, 1, cuda::CUDA_ERROR_UNKNOWN);
    CHECK(open_gpu(config).error().reason == "CONFIGURATION_GPU");
  }
  CHECK(machine->live().total() == 0);
}

TEST_CASE("A kind that is asked for by name must be there") {
  fake_cuda::Machine machine(kFake, without_fabric());
  CHECK(open_gpu(with({"host_shm"}, ops::GpuUse::kAuto, kNone)));
  CHECK(open_gpu(with({"host_shm", "cuda_ipc", "cuda_vmm_fd"}, ops::GpuUse::kAuto, kFake)));
  const auto fabric = open_gpu(with({"cuda_fabric"}, ops::GpuUse::kAuto, kFake));
  CHECK(fabric.error().reason == "CONFIGURATION_POOL_KIND");
  CHECK(fabric.error().field == "pools.kinds");
  CHECK(open_gpu(with({"cuda_ipc"}, ops::GpuUse::kAuto, kNone)).error().reason ==
        "CONFIGURATION_POOL_KIND");
}

}  // namespace kvferry::node
