// What hwloc and sysfs say of NUMA nodes, which of them arenas and threads go to, and memory bound
// before it is touched. Machines are hwloc's synthetic ones; what would need several real nodes to
// be seen (pages on another node) is not seen here.
#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <catch2/catch.hpp>

#include "daemon/memory/shared_memory.h"
#include "daemon/numa/placement.h"
#include "tests/unit/numa_machine.h"

namespace kvferry::numa {
namespace {

using Nodes = std::vector<uint32_t>;

CpuSet cpus(std::initializer_list<std::size_t> numbers) {
  CpuSet out;
  for (const std::size_t number : numbers) out.set(number);
  return out;
}

const std::vector<Node> kTwo{{0, cpus({0, 1})}, {1, cpus({2, 3})}};
const std::vector<Node> kFour{{0, cpus({0})}, {2, cpus({1})}, {4, cpus({2})}, {8, cpus({3, 900})}};
const Device kLoopback{"lo", {}};

}  // namespace

TEST_CASE("One node, or none that is known, binds nothing") {
  const std::vector<Device> rails{{"eth0", 0}, {"eth1", {}}};
  for (const std::size_t count : {0U, 1U}) {
    const Placement placement = place(std::span(kTwo).first(count), rails, {});
    CHECK(placement.arena.empty());
    CHECK(placement.rails == std::vector<std::optional<uint32_t>>(2));
    CHECK_FALSE(placement.why.empty());
  }
}

TEST_CASE("The arena goes next to the rails' devices, then the GPUs, then everywhere") {
  struct Row {
    std::vector<Device> rails;
    std::vector<Device> gpus;
    Nodes arena;
    std::vector<std::optional<uint32_t>> rail_nodes;
    std::string why;
  };
  const std::vector<Row> rows{
      {{{"eth0", 4}}, {{"gpu0", 0}}, {4}, {4}, "next to eth0"},
      // One device, two transports.
      {{{"eth0", 4}, {"eth0", 4}}, {}, {4}, {4, 4}, "next to eth0"},
      // Spread devices, in any order.
      {{{"eth1", 8}, {"eth0", 0}}, {}, {0, 8}, {8, 0}, "next to eth1,eth0"},
      // Without a place of its own: to the arena, but only where that is one place.
      {{{"eth0", 2}, kLoopback}, {}, {2}, {2, 2}, "next to eth0"},
      {{{"eth0", 2}, {"eth1", 8}, {"", {}}}, {}, {2, 8}, {2, 8, {}}, "next to eth0,eth1"},
      {{kLoopback}, {{"gpu0", 2}, {"gpu1", 2}}, {2}, {2}, "next to gpu0,gpu1"},
      {{kLoopback}, {{"gpu0", {}}, {"gpu1", 8}}, {8}, {8}, "next to gpu1"},
      {{kLoopback}, {}, {0, 2, 4, 8}, {{}}, "no rail or GPU whose node is known"},
  };
  for (const Row& row : rows) {
    INFO(row.why);
    const Placement placement = place(kFour, row.rails, row.gpus);
    CHECK(placement.arena == row.arena);
    CHECK(placement.rails == row.rail_nodes);
    CHECK(placement.why == row.why);
  }
  CHECK(to_string(Nodes{4}) == "node 4");
  CHECK(to_string(Nodes{0, 8}) == "nodes 0,8 in turn");
  CHECK(cpus_of(kFour, 8) == cpus({3, 900}));
  CHECK(cpus_of(kFour, 7).none());
}

TEST_CASE("Sets of processors are written as the kernel writes them") {
  CHECK(kvferry::to_string(CpuSet()).empty());
  CHECK(kvferry::to_string(cpus({0, 1, 2, 3, 8})) == "0-3,8");
  CHECK(kvferry::to_string(cpus({5, 1022, 1023})) == "5,1022-1023");
}

TEST_CASE("A machine that hwloc's environment tells of is refused, not pretended to be bound to") {
  const Machine machine("node:2 core:1 pu:1", false);
  const auto topology = Topology::load();
  REQUIRE_FALSE(topology);
  CHECK(topology.error().reason == "NUMA_ANOTHER_MACHINE");
}

TEST_CASE("The real machine has its nodes, each with processors of its own") {
  const auto topology = Topology::load();
  if (!topology) FAIL(topology.error().to_string());
  REQUIRE_FALSE(topology->nodes().empty());
  CpuSet all;
  for (const Node& node : topology->nodes()) {
    CHECK(node.cpus.any());
    CHECK((node.cpus & all).none());
    all |= node.cpus;
  }
  CHECK((all & ~own_cpus()).none());
}

TEST_CASE("Nodes are those that this process may use") {
  if (!has_cpus_0_and_1()) return;
  {
    const Machine machine("node:2 core:1 pu:1");
    const auto topology = Topology::load();
    REQUIRE(topology);
    REQUIRE(topology->nodes().size() == 2);
    CHECK(topology->nodes()[0].number == 0);
    CHECK(topology->nodes()[0].cpus == cpus({0}));
    CHECK(topology->nodes()[1].number == 1);
    CHECK(topology->nodes()[1].cpus == cpus({1}));
  }
  {
    // A second kind of memory beside each node.
    const Machine machine("pack:2 [numa(memory=1GB)] [numa(memory=1GB)] core:1 pu:1");
    const auto topology = Topology::load();
    REQUIRE(topology);
    REQUIRE(topology->nodes().size() == 2);
    CHECK(topology->nodes()[0].number == 0);
    CHECK(topology->nodes()[1].cpus == cpus({1}));
  }
  // taskset -c 1
  const CpuSet before = own_cpus();
  REQUIRE(bind_thread(::pthread_self(), cpus({1})) == 0);
  {
    const Machine machine("node:2 core:1 pu:1");
    const auto topology = Topology::load();
    REQUIRE(topology);
    REQUIRE(topology->nodes().size() == 1);
    CHECK(topology->nodes()[0].number == 1);
  }
  REQUIRE(bind_thread(::pthread_self(), before) == 0);
  // numactl --preferred=0
  const unsigned long node_0 = 1;
  if (::syscall(SYS_set_mempolicy, MPOL_PREFERRED, &node_0, 64) != 0) {
    WARN("not tested: set_mempolicy is not permitted here");
    return;
  }
  {
    const Machine machine("node:2 core:1 pu:1");
    const auto topology = Topology::load();
    REQUIRE(topology);
    REQUIRE(topology->nodes().size() == 1);
    CHECK(topology->nodes()[0].number == 0);
    CHECK(topology->own_memory_policy());
    // Left as it is: the memory has no policy of its own.
    auto memory = memory::SharedMemory::create("own", 4096);
    REQUIRE(memory);
    REQUIRE(topology->bind(memory->data(), memory->bytes(), std::vector<uint32_t>{0}));
    int mode = -1;
    REQUIRE(::syscall(SYS_get_mempolicy, &mode, nullptr, 0, memory->data(), MPOL_F_ADDR) == 0);
    CHECK(mode == MPOL_DEFAULT);
  }
  REQUIRE(::syscall(SYS_set_mempolicy, MPOL_DEFAULT, nullptr, 0) == 0);
}

TEST_CASE("Devices are found at the node of their slot") {
  if (!has_cpus_0_and_1()) return;
  const Machine machine("node:2 core:1 pu:1");
  const FakeSysfs sysfs;
  sysfs.add_interface("eth0", "0000:00:03.0", 1);
  sysfs.add_interface("eth1", "0000:80:00.0", 0);
  sysfs.add_interface("eth2", "0000:81:00.0", 1);
  sysfs.add_interface("unknown", "0000:82:00.0", -1);
  sysfs.add_interface("elsewhere", "0000:83:00.0", 7);  // not a node of ours
  sysfs.add_virtual("lo", {});
  sysfs.add_virtual("bond0", {"eth0", "eth2"});
  sysfs.add_virtual("vlan5", {"bond0"});
  sysfs.add_virtual("bond1", {"eth0", "eth1"});
  sysfs.add_virtual("bond2", {"eth0", "lo"});
  const auto topology = Topology::load(sysfs.path());
  REQUIRE(topology);
  REQUIRE(topology->nodes().size() == 2);
  CHECK(topology->node_of_interface("eth0") == 1U);
  CHECK(topology->node_of_interface("eth1") == 0U);
  CHECK(topology->node_of_interface("bond0") == 1U);
  CHECK(topology->node_of_interface("vlan5") == 1U);
  for (const char* name :
       {"unknown", "elsewhere", "lo", "bond1", "bond2", "absent", "", "../net/eth0"})
    CHECK_FALSE(topology->node_of_interface(name));
  CHECK(topology->node_of_pci("0000:80:00.0") == 0U);
  CHECK(topology->node_of_pci("0000:81:00.0") == 1U);
  CHECK_FALSE(topology->node_of_pci("0000:82:00.0"));
  CHECK_FALSE(topology->node_of_pci("0000:99:00.0"));
}

TEST_CASE("Memory is bound before a page of it is there, as a preference") {
  const auto topology = Topology::load();
  REQUIRE(topology);
  const Nodes first{topology->nodes().at(0).number};
  int calls = 0;
  bool touched = false;
  Status bound;
  memory::SharedMemoryOptions options;
  options.huge_pages = true;
  options.populate = true;
  options.before_touch = [&](std::byte* data, uint64_t bytes) {
    ++calls;
    std::vector<unsigned char> pages(bytes / 4096);
    REQUIRE(::mincore(data, bytes, pages.data()) == 0);
    touched = std::any_of(pages.begin(), pages.end(), [](unsigned char p) { return (p & 1) != 0; });
    bound = topology->bind(data, bytes, first);
  };
  const auto memory = memory::SharedMemory::create("numa-test", 4 << 20, options);
  REQUIRE(memory);
  CHECK(calls == 1);
  CHECK_FALSE(touched);
  if (!bound && bound.error().message.find("not permitted") != std::string::npos) {
    WARN("mbind is not permitted here: " << bound.error().message);
    return;
  }
  if (!bound) FAIL(bound.error().to_string());
  int mode = -1;
  REQUIRE(::syscall(SYS_get_mempolicy, &mode, nullptr, 0, memory->data(), MPOL_F_ADDR) == 0);
  constexpr int kPreferredMany = 5;
  CHECK((mode == MPOL_PREFERRED || mode == kPreferredMany));
  // And a node that no machine here has.
  const Status none = topology->bind(memory->data(), memory->bytes(), Nodes{900});
  REQUIRE_FALSE(none);
  CHECK(none.error().reason == "MEMORY_BINDING_FAILED");
}

}  // namespace kvferry::numa
