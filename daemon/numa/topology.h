// The machine's NUMA nodes, from hwloc: which there are for this process, the node next to a
// device, and memory bound to nodes. Constant once loaded, for any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "daemon/base/cpu_set.h"
#include "daemon/base/result.h"

struct hwloc_topology;

namespace kvferry::numa {

struct Node {
  uint32_t number = 0;  // the kernel's
  CpuSet cpus;          // not empty, and no other node's
};

class Topology {
 public:
  // Nodes that have memory and processors of their own, as far as this process may use them: its
  // cgroup, and the processors and memory policy that it was started with, are kept to. hwloc's
  // environment (HWLOC_XMLFILE, HWLOC_SYNTHETIC, ...) is followed. `sysfs` is where devices are
  // looked up. Blocks while sysfs is read, on large machines some ten milliseconds. INTERNAL
  // NUMA_UNKNOWN; FAILED_PRECONDITION NUMA_ANOTHER_MACHINE where that environment tells of one.
  static Result<Topology> load(std::string sysfs = "/sys");

  // In order of their numbers. Two or more, or there is nothing to choose.
  const std::vector<Node>& nodes() const { return nodes_; }

  // The node of nodes() next to a network interface, by its name; of a bond, bridge or
  // VLAN: if it is the same for all below it. Nothing for one that is no hardware, or whose place
  // is not known.
  std::optional<uint32_t> node_of_interface(const std::string& name) const;
  // The same for a PCI device, such as "0000:3b:00.0".
  std::optional<uint32_t> node_of_pci(const std::string& bus_id) const;

  // Where pages of [data, data + bytes) that nobody has touched yet will come from: the node, or of
  // several nodes page by page in turn. A preference: what is full gives way to the others. For a
  // shared mapping it is the file's, and holds for all who map it. Does nothing if
  // own_memory_policy(). INTERNAL MEMORY_BINDING_FAILED.
  Status bind(const void* data, uint64_t bytes, std::span<const uint32_t> nodes) const;

  // The process was started with a memory policy (numactl, NUMAPolicy=), which stays as it is: a
  // strict one would otherwise give way to a preference.
  bool own_memory_policy() const { return own_memory_policy_; }

 private:
  struct Destroy {
    void operator()(hwloc_topology* topology) const;
  };
  Topology() = default;
  void read_nodes();
  // Of the device's directory, or the nearest one above it that tells.
  std::optional<uint32_t> node_of_directory(const std::string& path) const;

  std::unique_ptr<hwloc_topology, Destroy> hwloc_;
  std::vector<Node> nodes_;
  std::string sysfs_;
  bool own_memory_policy_ = false;
};

}  // namespace kvferry::numa
