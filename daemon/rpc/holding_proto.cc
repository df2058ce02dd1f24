#include "daemon/rpc/holding_proto.h"

#include <algorithm>
#include <string>

#include "daemon/base/units.h"
#include "daemon/mapping/limits.h"

namespace kvferry::rpc {
namespace {

constexpr std::size_t kLongestPattern = 8;

v1::Granularity to_proto(mapping::Granularity granularity) {
  switch (granularity) {
    case mapping::Granularity::kToken:
      return v1::GRANULARITY_TOKEN;
    case mapping::Granularity::kBlock:
      return v1::GRANULARITY_BLOCK;
    case mapping::Granularity::kRequest:
      return v1::GRANULARITY_REQUEST;
  }
  return v1::GRANULARITY_UNSPECIFIED;
}

bool same_but_layer(const mapping::Plane& a, const mapping::Plane& b) {
  return a.role == b.role && a.units_total == b.units_total && a.unit_begin == b.unit_begin &&
         a.unit_count == b.unit_count && a.granularity == b.granularity &&
         a.cell_bytes == b.cell_bytes && a.type == b.type && a.optional == b.optional &&
         a.order == b.order;
}

struct Run {
  std::size_t pattern = 1;
  std::size_t repeat = 1;
  uint32_t step = 0;
};

// How often the `pattern` planes from `at` on come again, each time a fixed number of layers later.
Run run_of(const std::vector<mapping::Plane>& planes, std::size_t at, std::size_t pattern) {
  Run run{pattern, 1, 0};
  if (at + 2 * pattern > planes.size() || planes[at + pattern].layer < planes[at].layer) return run;
  const uint32_t step = planes[at + pattern].layer - planes[at].layer;
  for (std::size_t i = at + pattern; i + pattern <= planes.size(); i += pattern) {
    for (std::size_t j = i; j < i + pattern; ++j) {
      const mapping::Plane& before = planes[j - pattern];
      if (!same_but_layer(before, planes[j]) || planes[j].layer - before.layer != step) return run;
    }
    ++run.repeat;
    run.step = step;
  }
  return run;
}

Run longest_run(const std::vector<mapping::Plane>& planes, std::size_t at) {
  Run best;
  for (std::size_t pattern = 1; pattern <= kLongestPattern; ++pattern) {
    const Run run = run_of(planes, at, pattern);
    if (run.repeat > 1 && run.pattern * run.repeat > best.pattern * best.repeat) best = run;
  }
  return best;
}

void plane_to_proto(const mapping::Plane& plane, v1::HoldingPlane& out) {
  out.set_layer(plane.layer);
  out.set_role(plane.role);
  out.set_units_total(plane.units_total);
  out.set_unit_begin(plane.unit_begin);
  out.set_unit_count(plane.unit_count);
  out.set_granularity(to_proto(plane.granularity));
  out.set_cell_bytes(plane.cell_bytes);
  out.set_type(plane.type);
  out.set_optional(plane.optional);
  out.set_order(plane.order);
}

Result<mapping::Plane> plane_from_proto(const v1::HoldingPlane& in, const std::string& field) {
  mapping::Plane plane;
  switch (in.granularity()) {
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
      return invalid(field + ".granularity", "OUT_OF_RANGE", "no granularity has this number");
  }
  plane.layer = in.layer();
  plane.role = in.role();
  plane.units_total = in.units_total();
  plane.unit_begin = in.unit_begin();
  plane.unit_count = in.unit_count();
  plane.cell_bytes = in.cell_bytes();
  plane.type = in.type();
  plane.optional = in.optional();
  plane.order = in.order();
  return plane;
}

Status run_from_proto(const v1::HoldingRun& run, const std::string& field, std::size_t& left,
                      std::vector<mapping::Plane>& out) {
  const auto pattern = static_cast<std::size_t>(run.pattern_size());
  uint64_t count = 0;
  if (run.repeat() == 0 || pattern == 0)
    return invalid(field, "OUT_OF_RANGE", "a run without planes");
  if (!checked_mul(pattern, run.repeat(), count) || count > left)
    return fail(Code::kResourceExhausted, "TOO_FRAGMENTED", "too many planes", field);
  left -= count;
  std::vector<mapping::Plane> planes;
  for (const v1::HoldingPlane& in : run.pattern()) {
    Result<mapping::Plane> plane = plane_from_proto(in, field);
    if (!plane) return tl::unexpected<Error>(std::move(plane).error());
    planes.push_back(std::move(*plane));
  }
  for (uint32_t i = 0; i < run.repeat(); ++i) {
    for (mapping::Plane plane : planes) {
      const uint64_t layer = plane.layer + uint64_t{i} * run.layer_step();
      if (layer >= mapping::kMaxLayers)
        return invalid(field + ".layer", "OUT_OF_RANGE", "the layer is too high");
      plane.layer = static_cast<uint32_t>(layer);
      out.push_back(std::move(plane));
    }
  }
  return {};
}

}  // namespace

void holding_to_proto(const mapping::Holding& holding, v1::Holding& out) {
  out.mutable_topology()->set_rank(holding.topology.rank);
  out.mutable_topology()->set_rank_count(holding.topology.rank_count);
  out.mutable_topology()->set_dp_group(holding.topology.dp_group);
  out.set_fingerprint(holding.fingerprint);
  for (const mapping::Group& group : holding.groups) {
    v1::HoldingGroup& to = *out.add_groups();
    to.set_tokens_per_block(group.tokens_per_block);
    to.set_sliding_window_tokens(group.sliding_window);
    to.set_cp_size(group.cp_size);
    to.set_cp_index(group.cp_index);
    to.set_cp_interleave_tokens(group.cp_interleave);
    to.set_tail(group.tail == mapping::Tail::kZero ? v1::TAIL_ZERO : v1::TAIL_LEAVE);
    for (std::size_t at = 0; at < group.planes.size();) {
      const Run run = longest_run(group.planes, at);
      v1::HoldingRun& run_out = *to.add_runs();
      for (std::size_t i = 0; i < run.pattern; ++i)
        plane_to_proto(group.planes[at + i], *run_out.add_pattern());
      run_out.set_repeat(static_cast<uint32_t>(run.repeat));
      run_out.set_layer_step(run.step);
      at += run.pattern * run.repeat;
    }
  }
}

Result<mapping::Holding> holding_from_proto(const v1::Holding& in) {
  mapping::Holding out;
  out.topology = {in.topology().rank(), in.topology().rank_count(), in.topology().dp_group()};
  out.fingerprint = in.fingerprint();
  if (static_cast<uint32_t>(in.groups_size()) > mapping::kMaxGroups)
    return fail(Code::kResourceExhausted, "TOO_FRAGMENTED", "too many groups", "holding.groups");
  std::size_t left = mapping::kMaxPlanes;
  for (int i = 0; i < in.groups_size(); ++i) {
    const v1::HoldingGroup& from = in.groups(i);
    const std::string field = "holding.groups[" + std::to_string(i) + "]";
    mapping::Group group;
    group.tokens_per_block = from.tokens_per_block();
    group.sliding_window = from.sliding_window_tokens();
    group.cp_size = from.cp_size();
    group.cp_index = from.cp_index();
    group.cp_interleave = from.cp_interleave_tokens();
    if (from.tail() != v1::TAIL_ZERO && from.tail() != v1::TAIL_LEAVE)
      return invalid(field + ".tail", "OUT_OF_RANGE", "no tail has this number");
    group.tail = from.tail() == v1::TAIL_ZERO ? mapping::Tail::kZero : mapping::Tail::kLeave;
    for (int j = 0; j < from.runs_size(); ++j)
      KVFERRY_RETURN_IF_ERROR(run_from_proto(
          from.runs(j), field + ".runs[" + std::to_string(j) + "]", left, group.planes));
    out.groups.push_back(std::move(group));
  }
  return out;
}

}  // namespace kvferry::rpc
