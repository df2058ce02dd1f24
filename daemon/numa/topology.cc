#include "daemon/numa/topology.h"

#include <hwloc.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <string_view>
#include <utility>

namespace kvferry::numa {
namespace {

struct FreeBitmap {
  void operator()(hwloc_bitmap_s* bitmap) const { hwloc_bitmap_free(bitmap); }
};
using Bitmap = std::unique_ptr<hwloc_bitmap_s, FreeBitmap>;

Bitmap make_bitmap() {
  return Bitmap(hwloc_bitmap_alloc());
}

CpuSet cpus_of(hwloc_const_bitmap_t bitmap) {
  CpuSet cpus;
  for (int cpu = hwloc_bitmap_first(bitmap); cpu >= 0; cpu = hwloc_bitmap_next(bitmap, cpu))
    if (static_cast<std::size_t>(cpu) < cpus.size()) cpus.set(static_cast<std::size_t>(cpu));
  return cpus;
}

// The cgroup's sets hwloc has left out already. taskset, numactl and the service manager's
// settings are an operator's word, too, and binding a thread or memory would override them.
// Sets `memory_policy` if there is one of the process's own.
Status keep_to_own_binding(hwloc_topology_t topology, bool& memory_policy) {
  const Bitmap cpus = make_bitmap();
  const Bitmap nodes = make_bitmap();
  hwloc_membind_policy_t policy = HWLOC_MEMBIND_FIRSTTOUCH;
  if (hwloc_get_cpubind(topology, cpus.get(), HWLOC_CPUBIND_PROCESS) != 0)
    return fail_errno("NUMA_UNKNOWN", "hwloc_get_cpubind", errno);
  if (hwloc_topology_restrict(topology, cpus.get(), 0) != 0)
    return fail_errno("NUMA_UNKNOWN", "hwloc_topology_restrict", errno);
  // Where the kernel does not tell (seccomp may keep get_mempolicy from us), no policy is known.
  if (hwloc_get_membind(topology, nodes.get(), &policy,
                        HWLOC_MEMBIND_THREAD | HWLOC_MEMBIND_BYNODESET) != 0 ||
      policy == HWLOC_MEMBIND_FIRSTTOUCH)
    return {};
  memory_policy = true;
  if (hwloc_topology_restrict(topology, nodes.get(), HWLOC_RESTRICT_FLAG_BYNODESET) != 0)
    return fail_errno("NUMA_UNKNOWN", "hwloc_topology_restrict", errno);
  return {};
}

}  // namespace

void Topology::Destroy::operator()(hwloc_topology* topology) const {
  hwloc_topology_destroy(topology);
}

Result<Topology> Topology::load(std::string sysfs) {
  hwloc_topology_t topology = nullptr;
  if (hwloc_topology_init(&topology) != 0)
    return fail_errno("NUMA_UNKNOWN", "hwloc_topology_init", errno);
  Topology out;
  out.hwloc_.reset(topology);
  out.sysfs_ = std::move(sysfs);
  // Without I/O devices, which is hwloc's default: looking for those may start GPUs' libraries.
  if (hwloc_topology_load(topology) != 0)
    return fail_errno("NUMA_UNKNOWN", "hwloc_topology_load", errno);
  // hwloc would only pretend to bind.
  if (hwloc_topology_is_thissystem(topology) == 0)
    return fail(Code::kFailedPrecondition, "NUMA_ANOTHER_MACHINE",
                "hwloc's environment (HWLOC_*) tells of another machine");
  KVFERRY_RETURN_IF_ERROR(keep_to_own_binding(topology, out.own_memory_policy_));
  out.read_nodes();
  return out;
}

void Topology::read_nodes() {
  CpuSet taken;
  hwloc_obj_t object = nullptr;
  while ((object = hwloc_get_next_obj_by_type(hwloc_.get(), HWLOC_OBJ_NUMANODE, object))) {
    const CpuSet cpus = cpus_of(object->cpuset);
    // Memory of another kind beside a node that is here already (HBM, CXL, a GPU's), which hwloc
    // orders behind it, or that has no processors.
    if (cpus.none() || (cpus & taken).any()) continue;
    if (object->attr->numanode.local_memory == 0) continue;
    taken |= cpus;
    nodes_.push_back({object->os_index, cpus});
  }
  std::sort(nodes_.begin(), nodes_.end(),
            [](const Node& a, const Node& b) { return a.number < b.number; });
}

std::optional<uint32_t> Topology::node_of_directory(const std::string& path) const {
  std::error_code error;
  std::filesystem::path at = std::filesystem::canonical(path, error);
  if (error) return std::nullopt;
  for (; at.has_relative_path(); at = at.parent_path()) {
    int number = -1;
    std::ifstream file(at / "numa_node");
    if (!(file >> number)) continue;
    const auto found = std::find_if(nodes_.begin(), nodes_.end(), [number](const Node& node) {
      return std::cmp_equal(node.number, number);
    });
    if (found == nodes_.end()) return std::nullopt;
    return found->number;
  }
  return std::nullopt;
}

std::optional<uint32_t> Topology::node_of_interface(const std::string& name) const {
  if (name.empty() || name.find('/') != std::string::npos) return std::nullopt;
  const std::string path = sysfs_ + "/class/net/" + name;
  std::error_code error;
  if (std::filesystem::exists(path + "/device", error)) return node_of_directory(path + "/device");
  std::optional<uint32_t> common;
  std::filesystem::directory_iterator entry(path, error);
  for (; !error && entry != std::filesystem::directory_iterator(); entry.increment(error)) {
    constexpr std::string_view kBelow = "lower_";
    const std::string link = entry->path().filename().string();
    if (!link.starts_with(kBelow)) continue;
    const std::optional<uint32_t> node = node_of_interface(link.substr(kBelow.size()));
    if (!node || (common && common != node)) return std::nullopt;
    common = node;
  }
  return common;
}

std::optional<uint32_t> Topology::node_of_pci(const std::string& bus_id) const {
  if (bus_id.empty() || bus_id.find('/') != std::string::npos) return std::nullopt;
  return node_of_directory(sysfs_ + "/bus/pci/devices/" + bus_id);
}

Status Topology::bind(const void* data, uint64_t bytes, std::span<const uint32_t> nodes) const {
  if (own_memory_policy_) return {};
  const Bitmap set = make_bitmap();
  for (const uint32_t node : nodes) hwloc_bitmap_set(set.get(), node);
  const auto policy = nodes.size() > 1 ? HWLOC_MEMBIND_INTERLEAVE : HWLOC_MEMBIND_BIND;
  // Without HWLOC_MEMBIND_STRICT the kernel is asked for MPOL_PREFERRED.
  if (hwloc_set_area_membind(hwloc_.get(), data, bytes, set.get(), policy,
                             HWLOC_MEMBIND_BYNODESET) != 0)
    return fail_errno("MEMORY_BINDING_FAILED", "hwloc_set_area_membind", errno);
  return {};
}

}  // namespace kvferry::numa
