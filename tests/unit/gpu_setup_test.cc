// Which kinds of pools a daemon takes, and what it makes of a machine without a GPU.
#include "daemon/node/gpu_setup.h"

#include <catch2/catch.hpp>

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
    CHECK(gpu->why_not.empty());
  }
  const auto off = open_gpu(with({"auto"}, ops::GpuUse::kOff, kFake));
  REQUIRE(off);
  CHECK(off->imports == nullptr);
  CHECK(off->why_not.find("gpu.enabled") != std::string::npos);
  const auto none = open_gpu(with({"auto"}, ops::GpuUse::kAuto, kNone));
  REQUIRE(none);
  CHECK(none->imports == nullptr);
  CHECK_FALSE(none->why_not.empty());
  CHECK(open_gpu(with({"auto"}, ops::GpuUse::kOn, kNone)).error().reason == "CONFIGURATION_GPU");
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
