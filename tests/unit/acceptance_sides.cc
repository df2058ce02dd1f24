#include "tests/unit/acceptance_sides.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "daemon/mapping/validate.h"
#include "tests/unit/mapping_support.h"
#include "tests/unit/token_twins.h"

namespace kvferry::acceptance {

using namespace mapping;

void wrong(const std::string& what) {
  throw std::runtime_error(what);
}
void good(const Status& status, const std::string& what) {
  if (!status) wrong(what + ": " + status.error().to_string());
}
bool is_state(const ModelGroup& group) {
  return group.parts.front().granularity == Granularity::kRequest;
}
std::vector<std::byte*> Rank::bases() const {
  std::vector<std::byte*> all;
  for (const auto& pool : memory) all.push_back(pool.data());
  return all;
}
std::vector<SliceSpec> slices_of(const Case& of) {
  if (!of.slices.empty()) return of.slices;
  return {{{0, of.sender.prompt}, std::nullopt}};
}
uint64_t cached_of(const Case& of, const Rank& rank, std::size_t g) {
  if (!of.cached_by_rank.empty() && of.cached_by_rank.size() != rank.layout.topology.rank_count)
    wrong("cached lengths of as many ranks as the receiver has");
  const std::vector<uint64_t>& cached =
      of.cached_by_rank.empty() ? of.cached : of.cached_by_rank[rank.layout.topology.rank];
  return rank.model[g] < cached.size() ? cached[rank.model[g]] : 0;
}

namespace {

struct Position {
  uint32_t pp = 0, tp = 0, cp = 0;
};

Range units_of(const Part& part, const Topology& topology, const Position& at) {
  if (part.heads == 1) return {0, 1};
  if (topology.attention_dp) return {0, part.heads};
  return test::heads_of(part.heads, topology.tp, at.tp);
}

std::vector<uint32_t> common(const std::vector<uint32_t>& a, const std::vector<uint32_t>& b) {
  std::vector<uint32_t> both;
  std::set_intersection(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(both));
  return both;
}

// The layers that this stage has of the group.
std::vector<uint32_t> stage_layers(const SideSpec& side, const ModelGroup& group, uint32_t pp) {
  uint32_t total = 0;
  for (const ModelGroup& of : side.groups) total = std::max(total, of.layers.back() + 1);
  return common(group.layers, test::layers_of(total, side.topology.pp, pp));
}

uint64_t tokens_of(const Part& part, const ModelGroup& group) {
  return part.granularity == Granularity::kToken ? group.block : 1;
}

// Planes in one storage: [block][layer][part][role][unit][token], heads first.
void add_in_one_storage(RankLayout& layout, Group& group, const ModelGroup& model,
                        const std::vector<uint32_t>& layers, const Topology& topology,
                        const Position& at) {
  const auto pool = static_cast<uint32_t>(layout.pools.size());
  uint64_t block_bytes = 0;
  for (const uint32_t layer : layers)
    for (const Part& part : model.parts) {
      if (!part.layers.empty() && common({layer}, part.layers).empty()) continue;
      for (const std::string& role : part.roles) {
        const Range units = units_of(part, topology, at);
        Plane plane;
        plane.layer = layer;
        plane.role = role;
        plane.units_total = part.heads;
        plane.unit_begin = static_cast<uint32_t>(units.begin);
        plane.unit_count = static_cast<uint32_t>(units.size());
        plane.granularity = part.granularity;
        plane.cell_bytes = part.cell_bytes;
        plane.type = part.type;
        plane.optional = part.optional;
        plane.pool = pool;
        plane.offset = block_bytes;
        if (part.granularity == Granularity::kToken) plane.token_stride = part.cell_bytes;
        plane.unit_stride = part.cell_bytes * tokens_of(part, model);
        block_bytes += plane.unit_stride * units.size();
        group.planes.push_back(plane);
      }
    }
  for (Plane& plane : group.planes) plane.block_stride = block_bytes;
  layout.pools.push_back({"pool" + std::to_string(pool), block_bytes * group.block_count});
}

void add_apart(RankLayout& layout, Group& group, const ModelGroup& model,
               const std::vector<uint32_t>& layers, const Topology& topology, const Position& at) {
  for (const Part& part : model.parts) {
    test::GroupSpec spec;
    spec.layers = part.layers.empty() ? layers : common(layers, part.layers);
    if (spec.layers.empty()) continue;
    spec.roles = part.roles;
    spec.units_total = part.heads;
    spec.units = units_of(part, topology, at);
    spec.granularity = part.granularity;
    spec.cell_bytes = part.cell_bytes;
    spec.block = group.tokens_per_block;
    spec.block_count = group.block_count;
    spec.optional = part.optional;
    spec.memory = part.memory;
    test::add_group(layout, spec);
    for (Plane plane : layout.groups.back().planes) {
      plane.type = part.type;
      group.planes.push_back(std::move(plane));
    }
    layout.groups.pop_back();
  }
}

// Positions of the prompt that the rank stores, as blocks of its list.
uint64_t entries_of(const Group& group, uint64_t prompt) {
  const uint64_t entry = group.tokens_per_block * group.blocks_per_id;
  return test::up(test::stored_of(group, prompt), entry) / entry;
}

Rank make_rank(const SideSpec& side, const Position& at, std::mt19937_64& random) {
  const Topology& topology = side.topology;
  Rank rank;
  rank.layout.fingerprint = "model";
  rank.layout.topology.rank = (at.pp * topology.tp + at.tp) * topology.cp + at.cp;
  rank.layout.topology.rank_count = topology.pp * topology.tp * topology.cp;
  rank.layout.topology.dp_group = topology.attention_dp ? at.tp : 0;
  std::map<uint32_t, std::vector<int32_t>> free_ids;  // by id space
  for (std::size_t m = 0; m < side.groups.size(); ++m) {
    const ModelGroup& model = side.groups[m];
    const std::vector<uint32_t> layers = stage_layers(side, model, at.pp);
    if (layers.empty()) continue;
    Group group;
    group.tokens_per_block = is_state(model) ? 1 : model.block;
    group.sliding_window = model.window;
    group.blocks_per_id = model.blocks_per_id;
    group.tail = model.tail;
    if (!is_state(model) && topology.cp > 1) {
      group.cp_size = topology.cp;
      group.cp_index = at.cp;
      group.cp_interleave = topology.interleave;
    }
    const uint64_t entries = entries_of(group, is_state(model) ? 1 : side.prompt);
    group.id_space = static_cast<uint32_t>(model.shares_storage ? m - 1 : m);
    if (model.shares_storage) {
      const Group& before = rank.layout.groups.back();
      if (before.planes.size() != layers.size() * model.parts.front().roles.size())
        wrong("groups that share storage have as many planes");
      group.block_count = before.block_count;
      group.planes = before.planes;
      for (std::size_t i = 0; i < group.planes.size(); ++i)
        group.planes[i].layer = layers[i / model.parts.front().roles.size()];
    } else {
      group.block_count = (2 * entries + 3) * group.blocks_per_id;
      (model.one_storage ? add_in_one_storage : add_apart)(rank.layout, group, model, layers,
                                                           topology, at);
      std::vector<int32_t>& ids = free_ids[group.id_space];
      ids.resize(group.block_count / group.blocks_per_id);
      std::iota(ids.begin(), ids.end(), 0);
      std::shuffle(ids.begin(), ids.end(), random);
    }
    std::vector<int32_t>& ids = free_ids.at(group.id_space);
    GroupBlocks blocks;
    for (uint64_t entry = 0; entry < entries; ++entry) {
      blocks.ids.push_back(ids.back());
      ids.pop_back();
    }
    rank.layout.groups.push_back(std::move(group));
    rank.blocks.push_back(std::move(blocks));
    rank.model.push_back(m);
  }
  if (side.groups_reversed) {
    std::reverse(rank.layout.groups.begin(), rank.layout.groups.end());
    std::reverse(rank.blocks.begin(), rank.blocks.end());
    std::reverse(rank.model.begin(), rank.model.end());
  }
  for (uint32_t g = 0; g < rank.blocks.size(); ++g) rank.blocks[g].group = g;
  good(validate_layout(rank.layout), "rank " + std::to_string(rank.layout.topology.rank));
  return rank;
}

}  // namespace

std::vector<Rank> make_side(const SideSpec& side, std::mt19937_64& random) {
  std::vector<Rank> ranks;
  for (uint32_t pp = 0; pp < side.topology.pp; ++pp)
    for (uint32_t tp = 0; tp < side.topology.tp; ++tp)
      for (uint32_t cp = 0; cp < side.topology.cp; ++cp)
        ranks.push_back(make_rank(side, {pp, tp, cp}, random));
  return ranks;
}

namespace {

// ---- what a cell contains ----------------------------------------------------------------------

void put_content(std::byte* at, const Plane& plane, uint64_t unit, uint64_t position) {
  uint64_t word = 0x9E3779B97F4A7C15ULL;
  const auto mix = [&word](uint64_t value) {
    word = (word ^ value) * 0xBF58476D1CE4E5B9ULL;
    word ^= word >> 29;
  };
  mix(plane.layer + 1);
  for (const char c : plane.role) mix(static_cast<uint8_t>(c));
  mix(unit + 1);
  mix(position + 1);
  for (uint64_t i = 0; i < plane.cell_bytes; ++i) {
    if (i % 8 == 0) mix(i + 1);
    at[i] = static_cast<std::byte>(word >> (8 * (i % 8)));
  }
}

// Calls fn(address of the cell, unit, position) for each cell of the plane in the listed blocks.
template <typename Fn>
void for_each_cell(const Group& group, const Plane& plane, const GroupBlocks& blocks, Fn&& fn) {
  const uint64_t tokens = plane.granularity == Granularity::kToken ? group.tokens_per_block : 1;
  for (uint64_t entry = 0; entry < blocks.ids.size(); ++entry)
    for (uint64_t part = 0; part < group.blocks_per_id; ++part)
      for (uint64_t token = 0; token < tokens; ++token) {
        const uint64_t local =
            (entry * group.blocks_per_id + part) * group.tokens_per_block + token;
        const uint64_t position = test::position_of(group, local);
        const uint64_t block =
            static_cast<uint64_t>(blocks.ids[entry]) * group.blocks_per_id + part;
        for (uint64_t unit = 0; unit < plane.unit_count; ++unit)
          fn(plane.offset + block * plane.block_stride + unit * plane.unit_stride +
                 token * plane.token_stride,
             plane.unit_begin + unit, position);
      }
}

}  // namespace

void fill(const Rank& rank) {
  for (uint32_t g = 0; g < rank.layout.groups.size(); ++g) {
    const Group& group = rank.layout.groups[g];
    for (const Plane& plane : group.planes)
      for_each_cell(group, plane, rank.blocks[g], [&](uint64_t at, uint64_t unit, uint64_t p) {
        put_content(rank.memory[plane.pool].data() + at, plane, unit, p);
      });
  }
}

// ---- what must have arrived --------------------------------------------------------------------

void clean(const Rank& rank) {
  for (const auto& pool : rank.memory) std::fill(pool.begin(), pool.end(), kUntouched);
}

Holders holders_of(const std::vector<Rank>& ranks, uint32_t dp_group) {
  Holders holders;
  for (const Rank& rank : ranks) {
    if (rank.layout.topology.dp_group != dp_group) continue;
    for (const Group& group : rank.layout.groups)
      for (const Plane& plane : group.planes)
        holders[{plane.layer, plane.role}].push_back(
            {{plane.unit_begin, uint64_t{plane.unit_begin} + plane.unit_count}, &group});
  }
  return holders;
}

namespace {

Range rounded(uint64_t begin, uint64_t end, const Group& group) {
  const uint64_t granule = test::granule(group);
  return {test::down(begin, granule), test::up(end, granule)};
}

}  // namespace

std::vector<std::vector<std::byte>> expected_memory(const Case& of, const Rank& rank,
                                                    const Holders& holders, uint64_t& cells) {
  std::vector<std::vector<std::byte>> memory;
  for (const PoolSpan& pool : rank.layout.pools) memory.emplace_back(pool.bytes, kUntouched);
  for (uint32_t g = 0; g < rank.layout.groups.size(); ++g) {
    const Group& group = rank.layout.groups[g];
    const std::size_t m = rank.model[g];
    const uint64_t prompt = is_state(of.receiver.groups[m]) ? 1 : of.receiver.prompt;
    const uint64_t cached = cached_of(of, rank, g);
    uint64_t begin = test::down(cached, test::granule(group));
    if (group.sliding_window != 0 && prompt + 1 > group.sliding_window)
      begin = std::max(begin, prompt + 1 - group.sliding_window);
    if (cached >= prompt || begin >= prompt) continue;
    const Range need = rounded(begin, prompt, group);
    for (const Plane& plane : group.planes) {
      const auto held = holders.find({plane.layer, plane.role});
      if (held == holders.end()) continue;
      for_each_cell(group, plane, rank.blocks[g], [&](uint64_t at, uint64_t unit, uint64_t p) {
        for (const Held& by : held->second) {
          if (unit < by.units.begin || unit >= by.units.end || !test::stores(*by.group, p))
            continue;
          const Range sender_need = rounded(begin, prompt, *by.group);
          std::byte* cell = memory[plane.pool].data() + at;
          if (p >= need.begin && p < need.end && p >= sender_need.begin && p < sender_need.end) {
            put_content(cell, plane, unit, p);
            ++cells;
          }
          const uint64_t last = (prompt - 1) / group.tokens_per_block;
          if (group.tail == Tail::kZero && p >= prompt && p / group.tokens_per_block == last)
            std::fill_n(cell, plane.cell_bytes, std::byte{0});
          return;
        }
      });
    }
  }
  return memory;
}

void compare(const Rank& rank, const std::vector<std::vector<std::byte>>& expected) {
  for (std::size_t pool = 0; pool < expected.size(); ++pool) {
    const auto [ours, theirs] =
        std::mismatch(expected[pool].begin(), expected[pool].end(), rank.memory[pool].begin());
    if (ours == expected[pool].end()) continue;
    wrong("receiver rank " + std::to_string(rank.layout.topology.rank) + " pool " +
          std::to_string(pool) + " byte " + std::to_string(ours - expected[pool].begin()) +
          (*theirs == kUntouched ? " has not come" : " is wrong"));
  }
}

}  // namespace kvferry::acceptance
