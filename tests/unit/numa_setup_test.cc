// What a daemon makes of a machine with several NUMA nodes: from its configuration and devices to
// sets of processors, bound arenas and the rows that operators see.
#include "daemon/node/numa_setup.h"

#include <catch2/catch.hpp>

#include "daemon/node/gpu_setup.h"
#include "tests/fake_cuda/control.h"
#include "tests/unit/numa_machine.h"

namespace kvferry::node {
namespace {

constexpr const char* kFake = KVFERRY_FAKE_CUDA_LIBRARY;
constexpr const char* kTwoNodes = "node:2 core:1 pu:1";
const std::vector<rails::RailSpec> kRails{{"tcp", "eth0"}, {"shm", ""}, {"tcp", "eth1"}};

CpuSet cpu(std::size_t number) {
  return CpuSet().set(number);
}

std::unique_ptr<Arenas> arenas_with(BindMemory bind) {
  auto arenas = Arenas::create({1 << 20, 1 << 20}, std::move(bind));
  REQUIRE(arenas);
  REQUIRE((*arenas)->add_mapped_host({1 << 20}));
  return std::move(*arenas);
}

}  // namespace

TEST_CASE("Arenas and threads go to the nodes of the rails' devices") {
  if (!numa::has_cpus_0_and_1()) return;
  const numa::Machine machine(kTwoNodes);
  const numa::FakeSysfs sysfs;
  sysfs.add_interface("eth0", "0000:00:03.0", 1);
  sysfs.add_interface("eth1", "0000:00:04.0", 1);
  const NumaPlan plan = NumaPlan::make({}, kRails, nullptr, sysfs.path());
  REQUIRE(plan.memory_binding());
  CHECK(plan.copy_cpus() == std::vector<CpuSet>{cpu(1)});
  for (std::size_t i = 0; i < kRails.size(); ++i) CHECK(plan.rail_cpus(i) == cpu(1));
  CHECK(plan.describe_rail(0).part == "rail 0");
  CHECK(plan.describe_rail(0).place == "node 1");
  CHECK(plan.describe_rail(0).reason == "tcp/eth0, processors 1");
}

TEST_CASE("Rails of two nodes have the arena between them, and copy threads on both") {
  if (!numa::has_cpus_0_and_1()) return;
  const numa::Machine machine(kTwoNodes);
  const numa::FakeSysfs sysfs;
  sysfs.add_interface("eth0", "0000:00:03.0", 1);
  sysfs.add_interface("eth1", "0000:00:04.0", 0);
  const NumaPlan plan = NumaPlan::make({}, kRails, nullptr, sysfs.path());
  CHECK(plan.copy_cpus() == std::vector<CpuSet>{cpu(0), cpu(1)});
  CHECK(plan.rail_cpus(0) == cpu(1));
  CHECK(plan.rail_cpus(1).none());
  CHECK(plan.describe_rail(1).place.empty());
  CHECK(plan.rail_cpus(2) == cpu(0));

  // Each host segment is handed over, and what fails is told of.
  std::vector<uint64_t> bound;
  const auto arenas = arenas_with([&](const void*, uint64_t bytes) -> Status {
    bound.push_back(bytes);
    if (bound.size() < 3) return {};
    return fail(Code::kInternal, "MEMORY_BINDING_FAILED", "the node is gone");
  });
  CHECK(bound == std::vector<uint64_t>{1 << 20, 1 << 20, 1 << 20});
  const auto rows = plan.describe(*arenas, EINVAL);
  REQUIRE(rows.size() == 3);
  CHECK(rows[0].part == "arena 0");
  CHECK(rows[0].place == "nodes 0,1 in turn");
  CHECK(rows[0].reason == "next to eth0,eth1");
  CHECK(rows[0].problem.empty());
  CHECK(rows[1].part == "arena 1");
  CHECK(rows[1].problem == "the node is gone");
  CHECK(rows[2].part == "copy threads");
  CHECK(rows[2].reason == "processors 0 | 1");
  CHECK(rows[2].problem == binding_error(EINVAL));
  CHECK(plan.describe(*arenas, 0)[2].problem.empty());
}

TEST_CASE("Where no rail has a place the GPUs' counts") {
  if (!numa::has_cpus_0_and_1()) return;
  fake_cuda::Setup setup;
  setup.devices = 2;
  setup.memory_mb = 64;
  fake_cuda::Machine gpus(kFake, setup);
  const numa::Machine machine(kTwoNodes);
  const numa::FakeSysfs sysfs;
  sysfs.add_pci("0000:01:00.0", 1);
  sysfs.add_pci("0000:02:00.0", 1);
  ops::Config config;
  config.gpu.driver = kFake;
  const auto devices = find_gpus(config);
  REQUIRE(devices);
  const NumaPlan plan = NumaPlan::make(config, {{"tcp", "lo"}}, devices->get(), sysfs.path());
  CHECK(plan.copy_cpus() == std::vector<CpuSet>{cpu(1)});
  CHECK(plan.rail_cpus(0) == cpu(1));
  CHECK(plan.describe(*arenas_with(nullptr), 0).at(0).reason == "next to gpu0,gpu1");
}

TEST_CASE("What is off, has no choice or cannot be found out binds nothing and says why") {
  const auto unbound = [](const NumaPlan& plan) {
    CHECK_FALSE(plan.memory_binding());
    CHECK(plan.copy_cpus().empty());
    CHECK(plan.rail_cpus(0).none());
    CHECK(plan.describe_rail(0).place.empty());
    const auto rows = plan.describe(*arenas_with(plan.memory_binding()), 0);
    REQUIRE(rows.size() == 1);
    CHECK(rows[0].place == "left to the kernel");
    return rows[0];
  };
  ops::Config off;
  off.numa.bind = ops::NumaBind::kOff;
  {
    const numa::Machine machine(kTwoNodes);
    CHECK(unbound(NumaPlan::make(off, kRails, nullptr)).reason == "numa.bind is \"off\"");
  }
  if (numa::own_cpus().test(0)) {
    const numa::Machine machine("node:1 core:1 pu:1");
    const rpc::NumaInfo row = unbound(NumaPlan::make({}, kRails, nullptr));
    CHECK_FALSE(row.reason.empty());
    CHECK(row.problem.empty());
  }
  const numa::Machine machine(kTwoNodes, false);
  CHECK_FALSE(unbound(NumaPlan::make({}, kRails, nullptr)).problem.empty());
}

}  // namespace kvferry::node
