#include "daemon/mapping/validate.h"

#include <algorithm>
#include <limits>
#include <map>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "daemon/mapping/limits.h"
#include "daemon/mapping/overlap.h"

namespace kvferry::mapping {
namespace {

// Offsets and their differences stay inside a signed 64-bit number.
constexpr uint64_t kMaxPoolBytes = uint64_t{1} << 62;
// Steps of the search for meeting planes; ordinary layouts need a few per pair of planes that
// interleave.
constexpr uint64_t kOverlapSteps = 1 << 26;

std::string group_field(std::size_t group, std::string_view name) {
  return "groups[" + std::to_string(group) + "]." + std::string(name);
}

std::string plane_field(std::size_t group, std::size_t plane, std::string_view name) {
  return group_field(group, "planes[" + std::to_string(plane) + "]." + std::string(name));
}

tl::unexpected<Error> out_of_range(std::string field, std::string message) {
  return invalid(std::move(field), "OUT_OF_RANGE", std::move(message));
}

bool is_alphanumeric(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
}

bool is_name(std::string_view name) {
  if (name.empty() || name.size() > kMaxNameBytes || !is_alphanumeric(name[0])) return false;
  return std::all_of(name.begin(), name.end(), [](char c) {
    return is_alphanumeric(c) || c == '.' || c == '_' || c == ':' || c == '+' || c == '-';
  });
}

bool is_role(std::string_view role) {
  if (role.empty() || role.size() > kMaxNameBytes) return false;
  return std::all_of(role.begin(), role.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_' || c == '.';
  });
}

bool is_order(std::string_view order) {
  std::string sorted(order);
  std::sort(sorted.begin(), sorted.end());
  return sorted == "blrtu" && order.find('b') < order.find('t');
}

Status check_topology(const RankLayout& layout) {
  const Topology& topology = layout.topology;
  if (topology.rank_count == 0 || topology.rank_count > kMaxRanks)
    return out_of_range("topology.rank_count", "must be 1 to 4096");
  if (topology.rank >= topology.rank_count)
    return out_of_range("topology.rank", "must be below rank_count");
  if (topology.dp_group >= kMaxRanks)
    return out_of_range("topology.dp_group", "must be below 4096");
  if (layout.fingerprint.size() > kMaxFingerprintBytes)
    return out_of_range("fingerprint", "must be at most 256 bytes");
  if (layout.groups.empty() || layout.groups.size() > kMaxGroups)
    return out_of_range("groups", "must be 1 to 64 groups");
  uint64_t planes = 0;
  for (const Group& group : layout.groups) planes += group.planes.size();
  if (planes > kMaxPlanes)
    return invalid("groups", "TOO_FRAGMENTED", "more than 4096 planes in one rank");
  return {};
}

Status check_group(const Group& group, std::size_t g, bool filled_in) {
  if (group.planes.empty()) return out_of_range(group_field(g, "planes"), "no plane");
  const uint64_t block = group.tokens_per_block;
  if (block == 0 || block > kMaxTokensPerBlock)
    return out_of_range(group_field(g, "tokens_per_block"), "must be 1 to 2^30");
  if (group.cp_size == 0 || group.cp_size > kMaxRanks)
    return out_of_range(group_field(g, "cp_size"), "must be 1 to 4096");
  if (group.cp_index >= group.cp_size)
    return out_of_range(group_field(g, "cp_index"), "must be below cp_size");
  const bool defaulted = group.cp_interleave == 0;
  if (defaulted ? filled_in : block % group.cp_interleave != 0)
    return invalid(group_field(g, "cp_interleave"), "NOT_A_DIVISOR",
                   "must divide tokens_per_block");
  if (filled_in && group.cp_size == 1 && group.cp_interleave != block)
    return out_of_range(group_field(g, "cp_interleave"),
                        "must be tokens_per_block where tokens are not dealt");
  if (group.tail > Tail::kZero) return out_of_range(group_field(g, "tail"), "unknown value");
  const auto requests =
      std::count_if(group.planes.begin(), group.planes.end(),
                    [](const Plane& plane) { return plane.granularity == Granularity::kRequest; });
  if (requests == 0) return {};
  if (static_cast<std::size_t>(requests) != group.planes.size())
    return invalid(group_field(g, "planes"), "GRANULARITY_MIXED",
                   "a group of REQUEST planes holds no others");
  if (block != 1)
    return out_of_range(group_field(g, "tokens_per_block"), "must be 1 in a REQUEST group");
  if (group.cp_size != 1)
    return out_of_range(group_field(g, "cp_size"), "must be 1 in a REQUEST group");
  return {};
}

Status check_plane(const Plane& plane, std::size_t g, std::size_t p, bool filled_in) {
  if (plane.layer >= kMaxLayers)
    return out_of_range(plane_field(g, p, "layer"), "must be below 65536");
  if (!is_role(plane.role))
    return invalid(plane_field(g, p, "role"), "BAD_NAME", "must be 1 to 63 of [a-z0-9_.]");
  if (plane.units_total == 0 || plane.units_total > kMaxUnits)
    return out_of_range(plane_field(g, p, "units_total"), "must be 1 to 65536");
  if (plane.unit_begin >= plane.units_total)
    return out_of_range(plane_field(g, p, "unit_begin"), "must be below units_total");
  if (plane.unit_count == 0 || plane.unit_count > plane.units_total - plane.unit_begin)
    return out_of_range(plane_field(g, p, "unit_count"),
                        "must be at least 1 and end within units_total");
  if (plane.granularity > Granularity::kRequest)
    return out_of_range(plane_field(g, p, "granularity"), "unknown value");
  if (plane.cell_bytes == 0 || plane.cell_bytes > kMaxPoolBytes)
    return out_of_range(plane_field(g, p, "cell_bytes"), "must be 1 to 2^62");
  if (!is_name(plane.type))
    return invalid(plane_field(g, p, "type"), "BAD_NAME",
                   "must be a name of 1 to 63 characters of [A-Za-z0-9._:+-]");
  if (plane.order.empty() ? filled_in : !is_order(plane.order))
    return invalid(plane_field(g, p, "order"), "BAD_ORDER",
                   "must be a permutation of lrbut with b before t");
  return {};
}

// offset + the last index of every axis + the cell, inside the pool.
Status check_address(const RankLayout& layout, std::size_t g, std::size_t p) {
  const Group& group = layout.groups[g];
  const Plane& plane = group.planes[p];
  if (plane.pool >= layout.pools.size())
    return invalid(plane_field(g, p, "pool"), "UNKNOWN_POOL", "no such pool");
  const bool has_tokens = plane.granularity == Granularity::kToken && group.tokens_per_block > 1;
  if (has_tokens && plane.block_stride < plane.token_stride)
    return out_of_range(plane_field(g, p, "block_stride"), "is below token_stride");
  const uint64_t bytes = layout.pools[plane.pool].bytes;
  uint64_t end = 0;
  uint64_t reach = 0;
  if (!checked_add(plane.offset, plane.cell_bytes, end) || end > bytes)
    return out_of_range(plane_field(g, p, "offset"), "the plane starts outside its pool");
  if (!checked_mul(group.block_count - 1, plane.block_stride, reach) ||
      !checked_add(end, reach, end) || end > bytes)
    return out_of_range(plane_field(g, p, "block_stride"), "the last block is outside the pool");
  if (!checked_mul(plane.unit_count - 1, plane.unit_stride, reach) ||
      !checked_add(end, reach, end) || end > bytes)
    return out_of_range(plane_field(g, p, "unit_stride"), "the last unit is outside the pool");
  if (has_tokens && (!checked_mul(group.tokens_per_block - 1, plane.token_stride, reach) ||
                     !checked_add(end, reach, end) || end > bytes))
    return out_of_range(plane_field(g, p, "token_stride"), "the last token is outside the pool");
  return {};
}

bool same_shape(const Plane& a, const Plane& b) {
  return a.units_total == b.units_total && a.granularity == b.granularity &&
         a.cell_bytes == b.cell_bytes && a.type == b.type;
}

// A cell is held once, and a (layer, role) lies in one group and has one shape.
Status check_cells(const RankLayout& layout) {
  struct Entry {
    const Plane* plane;
    std::size_t group, number;
  };
  std::vector<Entry> entries;
  for (std::size_t g = 0; g < layout.groups.size(); ++g)
    for (std::size_t p = 0; p < layout.groups[g].planes.size(); ++p)
      entries.push_back({&layout.groups[g].planes[p], g, p});
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::tie(a.plane->layer, a.plane->role, a.plane->unit_begin, a.group, a.number) <
           std::tie(b.plane->layer, b.plane->role, b.plane->unit_begin, b.group, b.number);
  });
  for (std::size_t i = 1; i < entries.size(); ++i) {
    const Entry& a = entries[i - 1];
    const Entry& b = entries[i];
    if (a.plane->layer != b.plane->layer || a.plane->role != b.plane->role) continue;
    if (a.group != b.group)
      return invalid(plane_field(b.group, b.number, "role"), "ROLE_IN_TWO_GROUPS",
                     "group " + std::to_string(a.group) + " has this role of this layer too");
    if (b.plane->unit_begin < a.plane->unit_begin + a.plane->unit_count)
      return invalid(plane_field(b.group, b.number, "unit_begin"), "CELL_HELD_TWICE",
                     "plane " + std::to_string(a.number) + " holds a unit of it too");
    if (!same_shape(*a.plane, *b.plane))
      return invalid(plane_field(b.group, b.number, "cell_bytes"), "SHAPES_DIFFER",
                     "plane " + std::to_string(a.number) +
                         " of the same layer and role has another cell, type or granularity");
  }
  return {};
}

// Planes of one pool, swept by address, so that only those whose extents meet are compared.
Status check_memory(const RankLayout& layout) {
  struct Entry {
    StridedBox box;
    std::size_t group, number;
    uint32_t pool;
  };
  std::vector<Entry> entries;
  for (std::size_t g = 0; g < layout.groups.size(); ++g) {
    const Group& group = layout.groups[g];
    for (std::size_t p = 0; p < group.planes.size(); ++p) {
      entries.push_back({box_of(group, group.planes[p]), g, p, group.planes[p].pool});
      if (!steps_over_itself(entries.back().box))
        return invalid(plane_field(g, p, "block_stride"), "PLANES_OVERLAP",
                       "the strides do not keep the plane's own cells apart");
    }
  }
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::tie(a.pool, a.box.offset, a.group, a.number) <
           std::tie(b.pool, b.box.offset, b.group, b.number);
  });
  uint64_t steps = kOverlapSteps;
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const Entry& a = entries[i];
    for (std::size_t j = i + 1; j < entries.size(); ++j) {
      const Entry& b = entries[j];
      if (b.pool != a.pool || b.box.offset >= a.box.offset + a.box.extent) break;
      const bool one_group = a.group == b.group;
      const bool one_space =
          !one_group && layout.groups[a.group].id_space == layout.groups[b.group].id_space;
      const SameId same_id = one_space ? SameId::kMayMeet : SameId::kMustNotMeet;
      if (shown_disjoint(a.box, b.box, same_id, steps)) continue;
      const std::string other =
          "groups[" + std::to_string(a.group) + "].planes[" + std::to_string(a.number) + "]";
      if (one_group || one_space)
        return invalid(plane_field(b.group, b.number, "offset"), "PLANES_OVERLAP",
                       "meets the bytes of " + other + ", or cannot be shown not to");
      return invalid(group_field(b.group, "id_space"), "GROUPS_OVERLAP",
                     "shares memory with " + other + " without a common id space");
    }
  }
  return {};
}

Status check_pools(const RankLayout& layout) {
  if (layout.pools.empty() || layout.pools.size() > kMaxPools)
    return out_of_range("pools", "must be 1 to 4096 pools");
  std::vector<std::string_view> names;
  for (std::size_t i = 0; i < layout.pools.size(); ++i) {
    const std::string field = "pools[" + std::to_string(i) + "].";
    if (!is_name(layout.pools[i].name))
      return invalid(field + "name", "BAD_NAME",
                     "must be a name of 1 to 63 characters of [A-Za-z0-9._:+-]");
    if (layout.pools[i].bytes == 0 || layout.pools[i].bytes > kMaxPoolBytes)
      return out_of_range(field + "bytes", "must be 1 to 2^62");
    names.push_back(layout.pools[i].name);
  }
  std::sort(names.begin(), names.end());
  if (std::adjacent_find(names.begin(), names.end()) != names.end())
    return invalid("pools", "NAME_TWICE", "two pools have one name");
  return {};
}

Status check_rank(const RankLayout& layout, bool filled_in) {
  KVFERRY_RETURN_IF_ERROR(check_topology(layout));
  for (std::size_t g = 0; g < layout.groups.size(); ++g) {
    const Group& group = layout.groups[g];
    KVFERRY_RETURN_IF_ERROR(check_group(group, g, filled_in));
    for (std::size_t p = 0; p < group.planes.size(); ++p)
      KVFERRY_RETURN_IF_ERROR(check_plane(group.planes[p], g, p, filled_in));
  }
  return check_cells(layout);
}

std::string order_from(uint64_t layer_step, uint64_t role_step, const Group& group,
                       const Plane& plane) {
  const bool has_tokens = plane.granularity == Granularity::kToken && group.tokens_per_block > 1;
  std::pair<uint64_t, char> axes[] = {
      {layer_step, 'l'},
      {role_step, 'r'},
      {plane.block_stride, 'b'},
      {plane.unit_count > 1 ? plane.unit_stride : 0, 'u'},
      {has_tokens ? plane.token_stride : 0, 't'},
  };
  std::stable_sort(std::begin(axes), std::end(axes),
                   [](const auto& a, const auto& b) { return a.first > b.first; });
  std::string order;
  for (const auto& axis : axes) order += axis.second;
  return order;
}

// Steps of the layer axis per (role, pool) and of the role axis per (layer, pool), each worked out
// once a group.
class StepTable {
 public:
  explicit StepTable(const Group& group) : group_(group) {
    for (const Plane& plane : group.planes) {
      roles_.emplace(plane.role, roles_.size());
      by_role_[{roles_.at(plane.role), plane.pool}].emplace_back(plane.offset, plane.layer);
      by_layer_[{plane.layer, plane.pool}].emplace_back(plane.offset, roles_.at(plane.role));
    }
    for (auto* table : {&by_role_, &by_layer_})
      for (auto& [key, offsets] : *table) steps_[{table, key}] = smallest(offsets);
  }

  std::string order(const Plane& plane) const {
    return order_from(steps_.at({&by_role_, {roles_.at(plane.role), plane.pool}}),
                      steps_.at({&by_layer_, {plane.layer, plane.pool}}), group_, plane);
  }

 private:
  using Key = std::pair<uint64_t, uint64_t>;
  using Table = std::map<Key, std::vector<std::pair<uint64_t, uint64_t>>>;

  static uint64_t smallest(std::vector<std::pair<uint64_t, uint64_t>>& offsets) {
    std::sort(offsets.begin(), offsets.end());
    uint64_t best = std::numeric_limits<uint64_t>::max();
    for (std::size_t i = 1; i < offsets.size(); ++i)
      if (offsets[i].second != offsets[i - 1].second)
        best = std::min(best, offsets[i].first - offsets[i - 1].first);
    return best;
  }

  const Group& group_;
  std::map<std::string, uint64_t, std::less<>> roles_;
  Table by_role_;
  Table by_layer_;
  std::map<std::pair<const Table*, Key>, uint64_t> steps_;
};

}  // namespace

Status validate_layout(const RankLayout& layout) {
  KVFERRY_RETURN_IF_ERROR(check_pools(layout));
  KVFERRY_RETURN_IF_ERROR(check_rank(layout, false));
  for (std::size_t g = 0; g < layout.groups.size(); ++g) {
    const Group& group = layout.groups[g];
    if (group.block_count == 0 || group.block_count > kMaxBlockCount)
      return out_of_range(group_field(g, "block_count"), "must be 1 to 2^31 - 1");
    if (group.blocks_per_id == 0 || group.blocks_per_id > group.block_count)
      return out_of_range(group_field(g, "blocks_per_id"), "must be 1 to block_count");
    for (std::size_t p = 0; p < group.planes.size(); ++p)
      KVFERRY_RETURN_IF_ERROR(check_address(layout, g, p));
  }
  return check_memory(layout);
}

Status validate_holding(const Holding& holding) {
  return check_rank(holding, true);
}

Status validate_instance(const Instance& instance) {
  if (instance.ranks.empty() || instance.ranks.size() > kMaxRanks)
    return out_of_range("ranks", "must be 1 to 4096 ranks");
  struct Shape {
    const Group* group;
    const Plane* plane;
    std::size_t rank;
  };
  std::map<std::pair<uint32_t, std::string_view>, Shape> shapes;
  for (std::size_t i = 0; i < instance.ranks.size(); ++i) {
    const Holding& holding = instance.ranks[i];
    const std::string prefix = "ranks[" + std::to_string(i) + "].";
    if (Status status = check_rank(holding, true); !status) {
      Error error = std::move(status).error();
      error.field.insert(0, prefix);
      return tl::unexpected<Error>(std::move(error));
    }
    if (holding.topology.rank != i || holding.topology.rank_count != instance.ranks.size())
      return out_of_range(prefix + "topology.rank", "ranks must be numbered 0 to n-1, all of them");
    if (holding.fingerprint != instance.ranks[0].fingerprint)
      return invalid(prefix + "fingerprint", "INSTANCE_INCONSISTENT", "differs from rank 0's");
    for (std::size_t g = 0; g < holding.groups.size(); ++g) {
      const Group& group = holding.groups[g];
      for (std::size_t p = 0; p < group.planes.size(); ++p) {
        const Plane& plane = group.planes[p];
        const auto [known, fresh] =
            shapes.try_emplace({plane.layer, plane.role}, Shape{&group, &plane, i});
        if (fresh) continue;
        const Shape& other = known->second;
        const std::string where = "differs from rank " + std::to_string(other.rank) + "'s";
        if (!same_shape(plane, *other.plane))
          return invalid(prefix + plane_field(g, p, "cell_bytes"), "INSTANCE_INCONSISTENT",
                         "cell, type, units or granularity of this layer and role " + where);
        if (group.cp_size != other.group->cp_size ||
            (group.cp_size > 1 && group.cp_interleave != other.group->cp_interleave))
          return invalid(prefix + group_field(g, "cp_size"), "INSTANCE_INCONSISTENT",
                         "the dealing of layer " + std::to_string(plane.layer) + " " + plane.role +
                             " " + where);
      }
    }
  }
  return {};
}

Holding holding_of(const RankLayout& layout) {
  Holding holding = layout;
  holding.pools.clear();
  for (std::size_t g = 0; g < holding.groups.size(); ++g) {
    Group& group = holding.groups[g];
    const StepTable steps(layout.groups[g]);
    if (group.cp_interleave == 0 || group.cp_size == 1)
      group.cp_interleave = group.tokens_per_block;
    group.block_count = 0;
    group.id_space = 0;
    group.blocks_per_id = 1;
    for (std::size_t p = 0; p < group.planes.size(); ++p) {
      Plane& plane = group.planes[p];
      if (plane.order.empty()) plane.order = steps.order(layout.groups[g].planes[p]);
      plane.pool = 0;
      plane.offset = 0;
      plane.block_stride = 0;
      plane.unit_stride = 0;
      plane.token_stride = 0;
    }
  }
  return holding;
}

std::string derive_order(const Group& group, const Plane& plane) {
  return StepTable(group).order(plane);
}

uint64_t granule_of(const Group& group) {
  if (group.cp_size > 1 && group.cp_interleave != 0) return group.cp_interleave;
  return group.tokens_per_block;
}

bool is_request_group(const Group& group) {
  return !group.planes.empty() && group.planes[0].granularity == Granularity::kRequest;
}

}  // namespace kvferry::mapping
