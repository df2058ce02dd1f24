#include "daemon/mapping/packed.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "daemon/mapping/legs.h"
#include "daemon/mapping/limits.h"
#include "daemon/mapping/stream.h"
#include "daemon/mapping/tokens.h"
#include "daemon/mapping/validate.h"

namespace kvferry::mapping {
namespace {

constexpr uint64_t kPlaneAlignment = 64;  // bytes; a copy's widest step divides it

tl::unexpected<Error> too_large() {
  return fail(Code::kResourceExhausted, "TOO_FRAGMENTED", "more bytes than a packed copy may have",
              "ranges");
}

bool in_layers(const Plane& plane, const std::optional<Range>& layers) {
  return !layers || (plane.layer >= layers->begin && plane.layer < layers->end);
}

// The kernel blocks of this rank, counted as the group's local positions are, that hold a position
// of the ranges: ascending, disjoint.
std::vector<Range> blocks_touched(const Group& group, const std::vector<Range>& ranges) {
  const Dealing dealing = dealing_of(group);
  std::vector<Range> blocks;
  for (const Range& range : ranges) {
    const Range local{dealing.stored_below(range.begin), dealing.stored_below(range.end)};
    if (local.empty()) continue;
    const Range touched{local.begin / group.tokens_per_block,
                        ceil_div(local.end, group.tokens_per_block)};
    if (!blocks.empty() && touched.begin <= blocks.back().end)
      blocks.back().end = std::max(blocks.back().end, touched.end);
    else
      blocks.push_back(touched);
  }
  return blocks;
}

// Places one plane behind what has been placed, its axes nested as on the pages.
Status place(Plane& plane, const Group& group, uint64_t block_count, uint64_t& bytes) {
  const bool has_tokens = plane.granularity == Granularity::kToken;
  const uint64_t tokens = has_tokens ? group.tokens_per_block : 1;
  uint64_t all_tokens = 0;
  uint64_t all_units = 0;
  uint64_t block = 0;
  uint64_t end = 0;
  if (!checked_mul(plane.cell_bytes, tokens, all_tokens) ||
      !checked_mul(plane.cell_bytes, plane.unit_count, all_units) ||
      !checked_mul(all_tokens, plane.unit_count, block) || !checked_mul(block, block_count, end) ||
      !checked_add(end, bytes, end) || end > (uint64_t{1} << 62))
    return too_large();
  const bool unit_first = plane.unit_stride >= plane.token_stride;
  plane.unit_stride = unit_first ? all_tokens : plane.cell_bytes;
  plane.token_stride = unit_first ? plane.cell_bytes : all_units;
  plane.block_stride = block;
  plane.offset = bytes;
  bytes = round_up(end, kPlaneAlignment);
  return {};
}

GroupBlocks dense(uint32_t group, const std::vector<Range>& touched) {
  GroupBlocks blocks{group, touched.front().begin, {}};
  blocks.ids.reserve(touched.back().end - touched.front().begin);
  int32_t next = 0;
  for (const Range& range : touched) {
    blocks.ids.resize(range.begin - blocks.first_block, kHole);
    for (uint64_t block = range.begin; block < range.end; ++block) blocks.ids.push_back(next++);
  }
  return blocks;
}

// What of the offer this rank has cells of: one entry a group, with the local blocks it touches.
struct Part {
  uint32_t group = 0;
  std::vector<Range> blocks;
};
std::vector<Part> parts_of(const RankLayout& layout, std::span<const GroupRanges> offer,
                           const std::optional<Range>& layers) {
  std::vector<Part> parts;
  for (const GroupRanges& of : offer) {
    const Group& group = layout.groups[of.group];
    if (std::none_of(group.planes.begin(), group.planes.end(),
                     [&](const Plane& plane) { return in_layers(plane, layers); }))
      continue;
    Part part{of.group, blocks_touched(group, of.ranges)};
    if (!part.blocks.empty()) parts.push_back(std::move(part));
  }
  return parts;
}

// A layout as the copy sees it: the groups and planes of the slice alone, and of them the local
// positions, so that neither windows nor dealing have a say.
RankLayout plain(const RankLayout& layout, const std::vector<Part>& parts,
                 const std::optional<Range>& layers) {
  RankLayout copied;
  copied.pools = layout.pools;
  for (const Part& of : parts) {
    const Group& group = layout.groups[of.group];
    Group& one = copied.groups.emplace_back();
    one.tokens_per_block = group.tokens_per_block;
    one.block_count = group.block_count;
    one.blocks_per_id = group.blocks_per_id;
    one.id_space = group.id_space;
    for (const Plane& plane : group.planes)
      if (in_layers(plane, layers)) one.planes.push_back(plane);
    for (Plane& plane : one.planes) plane.order.clear();  // as it lies in memory
  }
  return copied;
}

Instance alone(const RankLayout& layout) {
  Instance instance;
  instance.ranks.push_back(holding_of(layout));
  return instance;
}

// The slice's lists of block ids, for the groups as plain() numbers them.
std::vector<GroupBlocks> lists_of(std::span<const GroupBlocks> blocks,
                                  const std::vector<Part>& parts) {
  std::vector<GroupBlocks> lists;
  for (uint32_t number = 0; number < parts.size(); ++number) {
    for (const GroupBlocks& of : blocks) {
      if (of.group != parts[number].group) continue;
      lists.push_back({number, of.first_block, of.ids});
      break;
    }
  }
  return lists;
}

}  // namespace

Result<PackedShape> packed_shape(const RankLayout& layout, std::span<const GroupRanges> offer,
                                 std::optional<Range> layers) {
  PackedShape shape;
  shape.layout = layout;
  shape.layout.pools.clear();
  for (Group& group : shape.layout.groups) {
    group.block_count = 1;
    group.blocks_per_id = 1;
    for (Plane& plane : group.planes) {
      plane.pool = 0;
      plane.offset = 0;
      plane.block_stride = 0;
    }
  }
  if (std::any_of(offer.begin(), offer.end(),
                  [&](const GroupRanges& of) { return of.group >= layout.groups.size(); }))
    return invalid("groups", "UNKNOWN_GROUP", "the layout has no such group");
  for (const Part& of : parts_of(layout, offer, layers)) {
    Group& group = shape.layout.groups[of.group];
    uint64_t count = 0;
    for (const Range& range : of.blocks) count += range.size();
    if (of.blocks.back().end > kMaxBlocks) return too_large();
    for (Plane& plane : group.planes)
      if (in_layers(plane, layers))
        KVFERRY_RETURN_IF_ERROR(place(plane, group, count, shape.bytes));
    group.block_count = count;
    shape.blocks.push_back(dense(of.group, of.blocks));
  }
  shape.layout.pools.push_back({"packed", shape.bytes});
  return shape;
}

Result<PackedCopy> bind_packed(const RankLayout& layout, std::span<const GroupBlocks> blocks,
                               std::span<const GroupRanges> offer, std::optional<Range> layers,
                               const PackedShape& shape) {
  const std::vector<Part> parts = parts_of(layout, offer, layers);
  const RankLayout from = plain(layout, parts, layers);
  const RankLayout to = plain(shape.layout, parts, layers);
  std::vector<GroupNeed> needs;
  std::vector<GroupRanges> all;
  for (uint32_t number = 0; number < parts.size(); ++number) {
    const uint64_t block = from.groups[number].tokens_per_block;
    std::vector<Range> ranges = parts[number].blocks;
    for (Range& range : ranges) range = {range.begin * block, range.end * block};
    needs.push_back({number, ranges.front().begin, ranges.back().end, ranges});
    all.push_back({number, std::move(ranges)});
  }
  const auto table = LegTable::make(std::make_shared<const Instance>(alone(from)),
                                    std::make_shared<const Instance>(alone(to)));
  if (!table) return tl::unexpected<Error>(table.error());
  const Result<Stream> stream = compile_stream(**table, 0, 0, needs, all);
  if (!stream) return tl::unexpected<Error>(stream.error());
  Result<Plan> source = bind_plan(*stream, Side::kSender, from, lists_of(blocks, parts));
  if (!source) return tl::unexpected<Error>(std::move(source).error());
  Result<Plan> destination = bind_plan(*stream, Side::kReceiver, to, lists_of(shape.blocks, parts));
  if (!destination) return tl::unexpected<Error>(std::move(destination).error());
  return PackedCopy{std::move(*source), std::move(*destination)};
}

}  // namespace kvferry::mapping
