// Whole hand-offs in one process: instances of any topology and layout, their memory, slices, and
// the check of every destination byte. The truth is a function of (layer, role, unit, position):
// what a cell must contain, whoever brought it and wherever it lies.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "daemon/mapping/layout.h"

namespace kvferry::acceptance {

// Roles of one shape in a group.
struct Part {
  std::vector<std::string> roles{"key", "value"};
  uint32_t heads = 8;  // units_total; 1 for what is not sharded
  uint64_t cell_bytes = 16;
  std::string type = "bf16";
  mapping::Granularity granularity = mapping::Granularity::kToken;
  std::string memory = "lr|but";  // as GroupSpec::memory
  std::vector<uint32_t> layers;   // of the group's that have it; empty: all
  bool optional = false;
};

// What all ranks have in common of one group, on one side.
struct ModelGroup {
  std::vector<uint32_t> layers;  // global numbers
  std::vector<Part> parts{Part{}};
  uint64_t block = 8;
  uint64_t window = 0;
  uint32_t blocks_per_id = 1;
  mapping::Tail tail = mapping::Tail::kLeave;
  // Lies in the storage of the group before it: the same addresses, other ids.
  bool shares_storage = false;
  // The parts of a block lie behind each other in one storage, layer by layer.
  bool one_storage = false;
};

// tp ranks x pp stages x cp ranks; number (pp * tp_size + tp) * cp_size + cp.
struct Topology {
  uint32_t tp = 1;
  uint32_t pp = 1;
  uint32_t cp = 1;
  bool attention_dp = false;  // every tp rank is a dp group with all heads
  uint64_t interleave = 0;    // cp: tokens; 0: whole blocks
};

struct SideSpec {
  Topology topology;
  std::vector<ModelGroup> groups;
  uint64_t prompt = 0;
  bool groups_reversed = false;  // listed the other way round, as another engine would
};

struct SliceSpec {
  Range tokens;
  std::optional<Range> layers;
};

struct Case {
  std::string name;
  SideSpec sender;
  SideSpec receiver;
  std::vector<uint64_t> cached;  // per group; missing ones are 0
  // The same for each receiver rank by itself, in place of `cached`; empty: all ranks alike.
  std::vector<std::vector<uint64_t>> cached_by_rank;
  std::vector<SliceSpec> slices;  // empty: one that offers all
  uint64_t chunk_bytes = 96;      // cuts cells
  uint64_t seed = 1;
};

struct Outcome {
  uint64_t legs = 0;
  uint64_t empty_legs = 0;
  uint64_t bytes = 0;                          // moved
  std::map<uint32_t, uint64_t> bytes_of_rank;  // of them, to each receiver rank
  uint64_t fragments = 0;                      // of all slices
  uint64_t cells = 0;                          // checked one by one
};

// Runs the hand-off from each dp group of the sender to all receiver ranks and checks each byte of
// the receivers' memory. Throws std::runtime_error with what is wrong and where.
Outcome run_case(const Case& of);

// Both sides have the same groups and the same prompt.
Case between(const std::string& from, const std::string& to, std::vector<ModelGroup> groups,
             uint64_t prompt = 45);
Part part(std::vector<std::string> roles, uint32_t heads, uint64_t cell_bytes, std::string type,
          std::string memory = "lr|but",
          mapping::Granularity granularity = mapping::Granularity::kToken);

// Layers 0 ... n-1 in one group of keys and values.
std::vector<ModelGroup> attention(uint32_t layers, uint32_t heads,
                                  const std::string& memory = "lr|but", uint64_t block = 8);
std::vector<ModelGroup> latent(uint32_t layers, uint64_t block = 8);
// As many groups as windows, which take the layers in turns.
std::vector<ModelGroup> windowed(uint32_t layers, const std::vector<uint64_t>& windows,
                                 uint64_t block = 8);
// Every `period`-th layer, from `first` on.
std::vector<uint32_t> every(uint32_t layers, uint32_t period, uint32_t first);

// "tp2pp2", "tp4pp2 D" (attention data parallelism), "1", "cp4".
Topology topology_named(const std::string& name);

}  // namespace kvferry::acceptance
