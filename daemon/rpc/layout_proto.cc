#include "daemon/rpc/layout_proto.h"

#include <algorithm>
#include <string>

#include "daemon/mapping/limits.h"

namespace kvferry::rpc {
namespace {

Result<mapping::Plane> from_proto(const v1::Plane& from, const std::string& field) {
  mapping::Plane plane;
  plane.layer = from.layer();
  plane.role = from.role();
  plane.units_total = std::max<uint32_t>(from.units_total(), 1);
  plane.unit_begin = from.unit_begin();
  plane.unit_count = std::max<uint32_t>(from.unit_count(), 1);
  switch (from.granularity()) {
    case v1::GRANULARITY_TOKEN:
      plane.granularity = mapping::Granularity::kToken;
      break;
    case v1::GRANULARITY_BLOCK:
      plane.granularity = mapping::Granularity::kBlock;
      break;
    case v1::GRANULARITY_REQUEST:
      plane.granularity = mapping::Granularity::kRequest;
      break;
    default:
      return invalid(field + ".granularity", "UNKNOWN_VALUE", "TOKEN, BLOCK or REQUEST");
  }
  plane.cell_bytes = from.cell_bytes();
  plane.type = from.type();
  plane.optional = from.optional();
  plane.order = from.order();
  plane.pool = from.pool();
  plane.offset = from.offset_bytes();
  plane.block_stride = from.block_stride_bytes();
  plane.unit_stride = from.unit_stride_bytes();
  plane.token_stride = from.token_stride_bytes();
  return plane;
}

Result<mapping::Group> from_proto(const v1::Group& from, const std::string& field) {
  mapping::Group group;
  group.tokens_per_block = from.tokens_per_block();
  group.sliding_window = from.sliding_window_tokens();
  group.cp_size = std::max<uint32_t>(from.cp_size(), 1);
  group.cp_index = from.cp_index();
  group.cp_interleave = from.cp_interleave_tokens();
  switch (from.tail()) {
    case v1::TAIL_UNSPECIFIED:
    case v1::TAIL_LEAVE:
      group.tail = mapping::Tail::kLeave;
      break;
    case v1::TAIL_ZERO:
      group.tail = mapping::Tail::kZero;
      break;
    default:
      return invalid(field + ".tail", "UNKNOWN_VALUE", "LEAVE or ZERO");
  }
  group.block_count = from.block_count();
  group.id_space = from.id_space();
  group.blocks_per_id = std::max<uint32_t>(from.blocks_per_id(), 1);
  for (int i = 0; i < from.planes_size(); ++i) {
    auto plane = from_proto(from.planes(i), field + ".planes[" + std::to_string(i) + "]");
    if (!plane) return tl::unexpected(plane.error());
    group.planes.push_back(std::move(*plane));
  }
  return group;
}

}  // namespace

Result<mapping::RankLayout> from_proto(const v1::RankLayout& from) {
  mapping::RankLayout layout;
  if (!from.has_topology()) return invalid("topology", "MISSING", "a rank has a topology");
  layout.topology.rank = from.topology().rank();
  layout.topology.rank_count = std::max<uint32_t>(from.topology().rank_count(), 1);
  layout.topology.dp_group = from.topology().dp_group();
  layout.fingerprint = from.fingerprint();
  if (from.groups_size() > static_cast<int>(mapping::kMaxGroups))
    return invalid("groups", "TOO_FRAGMENTED", std::to_string(from.groups_size()) + " groups");
  if (from.pools_size() > static_cast<int>(mapping::kMaxPools))
    return invalid("pools", "TOO_FRAGMENTED", std::to_string(from.pools_size()) + " pools");
  uint64_t planes = 0;
  for (int i = 0; i < from.groups_size(); ++i) {
    planes += static_cast<uint64_t>(from.groups(i).planes_size());
    if (planes > mapping::kMaxPlanes)
      return invalid("groups", "TOO_FRAGMENTED", "more planes than a rank may have");
    auto group = from_proto(from.groups(i), "groups[" + std::to_string(i) + "]");
    if (!group) return tl::unexpected(group.error());
    layout.groups.push_back(std::move(*group));
  }
  for (const v1::PoolSpan& pool : from.pools()) layout.pools.push_back({pool.name(), pool.bytes()});
  return layout;
}

void to_proto(const mapping::RankLayout& from, v1::RankLayout& out) {
  out.Clear();
  out.mutable_topology()->set_rank(from.topology.rank);
  out.mutable_topology()->set_rank_count(from.topology.rank_count);
  out.mutable_topology()->set_dp_group(from.topology.dp_group);
  out.set_fingerprint(from.fingerprint);
  for (const mapping::PoolSpan& pool : from.pools) {
    v1::PoolSpan* span = out.add_pools();
    span->set_name(pool.name);
    span->set_bytes(pool.bytes);
  }
  for (const mapping::Group& group : from.groups) {
    v1::Group* to = out.add_groups();
    to->set_tokens_per_block(group.tokens_per_block);
    to->set_sliding_window_tokens(group.sliding_window);
    to->set_cp_size(group.cp_size);
    to->set_cp_index(group.cp_index);
    to->set_cp_interleave_tokens(group.cp_interleave);
    to->set_tail(group.tail == mapping::Tail::kZero ? v1::TAIL_ZERO : v1::TAIL_LEAVE);
    to->set_block_count(group.block_count);
    to->set_id_space(group.id_space);
    to->set_blocks_per_id(group.blocks_per_id);
    for (const mapping::Plane& plane : group.planes) {
      v1::Plane* p = to->add_planes();
      p->set_layer(plane.layer);
      p->set_role(plane.role);
      p->set_units_total(plane.units_total);
      p->set_unit_begin(plane.unit_begin);
      p->set_unit_count(plane.unit_count);
      p->set_granularity(plane.granularity == mapping::Granularity::kToken ? v1::GRANULARITY_TOKEN
                         : plane.granularity == mapping::Granularity::kBlock
                             ? v1::GRANULARITY_BLOCK
                             : v1::GRANULARITY_REQUEST);
      p->set_cell_bytes(plane.cell_bytes);
      p->set_type(plane.type);
      p->set_optional(plane.optional);
      p->set_order(plane.order);
      p->set_pool(plane.pool);
      p->set_offset_bytes(plane.offset);
      p->set_block_stride_bytes(plane.block_stride);
      p->set_unit_stride_bytes(plane.unit_stride);
      p->set_token_stride_bytes(plane.token_stride);
    }
  }
}

}  // namespace kvferry::rpc
