// Layouts for the mapping tests, made from a drawing of their memory: which axes have pools of
// their own, and how the others nest.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "daemon/mapping/layout.h"
#include "daemon/mapping/legs.h"
#include "daemon/mapping/validate.h"

namespace kvferry::mapping::test {

// A group's content and memory on one rank.
struct GroupSpec {
  std::vector<uint32_t> layers;
  std::vector<std::string> roles{"key", "value"};
  uint32_t units_total = 1;
  Range units{0, 1};
  Granularity granularity = Granularity::kToken;
  uint64_t cell_bytes = 256;
  uint64_t block = 16;
  uint64_t block_count = 8;
  uint64_t window = 0;
  uint32_t cp_size = 1;
  uint32_t cp_index = 0;
  uint64_t interleave = 0;
  uint32_t blocks_per_id = 1;
  uint32_t id_space = 0;
  Tail tail = Tail::kLeave;
  bool optional = false;
  std::string memory = "lr|but";  // axes with pools of their own | nesting, slowest first
  uint64_t padding = 0;           // bytes added to every block
};

// Adds the group's planes, and pools for it alone, to the layout.
inline void add_group(RankLayout& layout, const GroupSpec& spec) {
  Group group;
  group.tokens_per_block = spec.block;
  group.sliding_window = spec.window;
  group.cp_size = spec.cp_size;
  group.cp_index = spec.cp_index;
  group.cp_interleave = spec.interleave;
  group.tail = spec.tail;
  group.block_count = spec.block_count;
  group.id_space = spec.id_space;
  group.blocks_per_id = spec.blocks_per_id;
  const std::size_t bar = spec.memory.find('|');
  const std::string apart = spec.memory.substr(0, bar);
  const std::string nest = spec.memory.substr(bar + 1);
  const auto count = [&](char axis) -> uint64_t {
    switch (axis) {
      case 'l':
        return spec.layers.size();
      case 'r':
        return spec.roles.size();
      case 'b':
        return spec.block_count;
      case 'u':
        return spec.units.size();
      default:
        return spec.granularity == Granularity::kToken ? spec.block : 1;
    }
  };
  uint64_t stride_of[128] = {};
  uint64_t bytes = spec.cell_bytes;
  for (auto axis = nest.rbegin(); axis != nest.rend(); ++axis) {
    if (*axis == 'b') bytes += spec.padding;
    stride_of[static_cast<std::size_t>(*axis)] = bytes;
    bytes *= count(*axis);
  }
  const std::string prefix = "g" + std::to_string(layout.groups.size()) + ".";
  const std::size_t first_pool = layout.pools.size();
  for (std::size_t l = 0; l < spec.layers.size(); ++l) {
    for (std::size_t r = 0; r < spec.roles.size(); ++r) {
      Plane plane;
      plane.layer = spec.layers[l];
      plane.role = spec.roles[r];
      plane.units_total = spec.units_total;
      plane.unit_begin = static_cast<uint32_t>(spec.units.begin);
      plane.unit_count = static_cast<uint32_t>(spec.units.size());
      plane.granularity = spec.granularity;
      plane.cell_bytes = spec.cell_bytes;
      plane.type = "bf16";
      plane.optional = spec.optional;
      plane.block_stride = stride_of['b'];
      plane.unit_stride = stride_of['u'];
      plane.token_stride = stride_of['t'];
      std::size_t pool = 0;
      if (apart.find('l') != std::string::npos)
        pool = l;
      else
        plane.offset += l * stride_of['l'];
      if (apart.find('r') != std::string::npos)
        pool = pool * spec.roles.size() + r;
      else
        plane.offset += r * stride_of['r'];
      plane.pool = static_cast<uint32_t>(first_pool + pool);
      while (layout.pools.size() <= plane.pool)
        layout.pools.push_back({prefix + std::to_string(layout.pools.size()), bytes});
      group.planes.push_back(plane);
    }
  }
  layout.groups.push_back(group);
}

inline Instance instance_of(std::string name, const std::vector<RankLayout>& layouts) {
  Instance instance;
  instance.name = std::move(name);
  for (const RankLayout& layout : layouts) instance.ranks.push_back(holding_of(layout));
  return instance;
}

// Consecutive, whole shares; the first `total % parts` are one longer.
inline Range share(uint64_t total, uint64_t parts, uint64_t part) {
  const uint64_t size = total / parts;
  const uint64_t longer = total % parts;
  const uint64_t begin = part * size + (part < longer ? part : longer);
  return {begin, begin + size + (part < longer ? 1 : 0)};
}

// Heads of one tp rank: shares, or one head that several ranks have.
inline Range heads_of(uint64_t heads, uint64_t tp_size, uint64_t tp) {
  if (tp_size <= heads) return share(heads, tp_size, tp);
  const uint64_t head = tp * heads / tp_size;
  return {head, head + 1};
}

inline std::vector<uint32_t> layers_of(uint32_t layers, uint32_t pp_size, uint32_t pp) {
  const Range range = share(layers, pp_size, pp);
  std::vector<uint32_t> list;
  for (uint64_t l = range.begin; l < range.end; ++l) list.push_back(static_cast<uint32_t>(l));
  return list;
}

struct Parallel {
  uint32_t tp = 1;
  uint32_t pp = 1;
  uint32_t cp = 1;
  bool attention_dp = false;  // every tp rank is a dp group with all heads
};

// A whole instance of one group per rank, number (pp * tp_size + tp) * cp_size + cp.
inline std::vector<RankLayout> ranks_of(const Parallel& parallel, uint32_t layers, uint32_t heads,
                                        const GroupSpec& base) {
  std::vector<RankLayout> ranks;
  for (uint32_t pp = 0; pp < parallel.pp; ++pp)
    for (uint32_t tp = 0; tp < parallel.tp; ++tp)
      for (uint32_t cp = 0; cp < parallel.cp; ++cp) {
        RankLayout layout;
        layout.topology.rank = static_cast<uint32_t>(ranks.size());
        layout.topology.rank_count = parallel.pp * parallel.tp * parallel.cp;
        layout.topology.dp_group = parallel.attention_dp ? tp : 0;
        layout.fingerprint = "model";
        GroupSpec spec = base;
        spec.layers = layers_of(layers, parallel.pp, pp);
        spec.units_total = heads;
        spec.units = parallel.attention_dp ? Range{0, heads} : heads_of(heads, parallel.tp, tp);
        spec.cp_size = parallel.cp;
        spec.cp_index = cp;
        add_group(layout, spec);
        ranks.push_back(std::move(layout));
      }
  return ranks;
}

inline std::shared_ptr<const LegTable> table_of(const std::vector<RankLayout>& sender,
                                                const std::vector<RankLayout>& receiver) {
  auto table = LegTable::make(std::make_shared<Instance>(instance_of("a/prefill", sender)),
                              std::make_shared<Instance>(instance_of("a/decode", receiver)));
  if (!table) throw std::runtime_error(table.error().to_string());
  return *table;
}

}  // namespace kvferry::mapping::test
