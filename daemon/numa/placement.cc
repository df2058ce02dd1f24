#include "daemon/numa/placement.h"

#include <set>

namespace kvferry::numa {
namespace {

// Adds the nodes of the devices that have one; returns the names of those devices, each once.
std::string next_to(std::span<const Device> devices, std::set<uint32_t>& nodes) {
  std::string names;
  std::set<std::string> named;
  for (const Device& device : devices) {
    if (!device.node) continue;
    nodes.insert(*device.node);
    if (named.insert(device.name).second) names += (names.empty() ? "" : ",") + device.name;
  }
  return names;
}

}  // namespace

Placement place(std::span<const Node> nodes, std::span<const Device> rails,
                std::span<const Device> gpus) {
  Placement out;
  out.rails.resize(rails.size());
  if (nodes.size() < 2) {
    out.why = "there is no choice of NUMA nodes";
    return out;
  }
  std::set<uint32_t> arena;
  std::string names = next_to(rails, arena);
  if (arena.empty()) names = next_to(gpus, arena);
  out.why = "next to " + names;
  if (arena.empty()) {
    for (const Node& node : nodes) arena.insert(node.number);
    out.why = "no rail or GPU whose node is known";
  }
  out.arena.assign(arena.begin(), arena.end());
  for (std::size_t i = 0; i < rails.size(); ++i) {
    out.rails[i] = rails[i].node;
    if (!out.rails[i] && out.arena.size() == 1) out.rails[i] = out.arena.front();
  }
  return out;
}

CpuSet cpus_of(std::span<const Node> nodes, uint32_t number) {
  for (const Node& node : nodes)
    if (node.number == number) return node.cpus;
  return {};
}

std::string to_string(std::span<const uint32_t> numbers) {
  std::string out = numbers.size() == 1 ? "node " : "nodes ";
  for (std::size_t i = 0; i < numbers.size(); ++i)
    out += (i == 0 ? "" : ",") + std::to_string(numbers[i]);
  return numbers.size() == 1 ? out : out + " in turn";
}

}  // namespace kvferry::numa
