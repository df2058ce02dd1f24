// Which node arenas, rails and copy threads go to, decided from the machine's facts alone. Pure.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "daemon/numa/topology.h"

namespace kvferry::numa {

// A network interface or a GPU.
struct Device {
  std::string name;
  std::optional<uint32_t> node;  // of the topology's nodes; nothing: not known
};

struct Placement {
  // Of host memory and the copy threads: one node, or several in turn. Empty: nothing is bound.
  std::vector<uint32_t> arena;
  std::string why;  // the arena is there, or nothing is bound
  // Where each rail's thread goes; nothing: anywhere.
  std::vector<std::optional<uint32_t>> rails;
};

// `rails` has the device of each rail. The arena goes next to those devices, of which rails and
// network cards read and write it; where no rail's is known, next to the GPUs; else over all nodes.
// A rail whose device has no place of its own, as shared memory has none, goes to the arena's node
// if that is one.
Placement place(std::span<const Node> nodes, std::span<const Device> rails,
                std::span<const Device> gpus);

// The processors of a node of `nodes`.
CpuSet cpus_of(std::span<const Node> nodes, uint32_t number);
// "node 1", "nodes 0,1 in turn".
std::string to_string(std::span<const uint32_t> numbers);

}  // namespace kvferry::numa
