// The packed copy of a slice: its cells in memory of their own, with the same groups and planes as
// the rank that sends it, but only the blocks and layers that the slice offers, one after the
// other. Streams are bound to it as to pages, and bring the same bytes. Pure functions, any thread.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/mapping/layout.h"
#include "daemon/mapping/plan.h"

namespace kvferry::mapping {

struct PackedShape {
  // Groups and planes are numbered as the sender's. One pool, of `bytes`; planes without a cell in
  // the slice lie nowhere (their strides are 0), and no stream of the slice names them.
  RankLayout layout;
  std::vector<GroupBlocks> blocks;  // the slice's, in that layout
  uint64_t bytes = 0;               // 0: the slice has no cell on this rank
};

// `layout` is the sender's rank, as registered; `offer` one slice, as round_offer gives it;
// `layers` limits it. Whole blocks are kept, of each plane on its own. RESOURCE_EXHAUSTED
// TOO_FRAGMENTED beyond 2^62 bytes; INVALID_ARGUMENT UNKNOWN_GROUP.
Result<PackedShape> packed_shape(const RankLayout& layout, std::span<const GroupRanges> offer,
                                 std::optional<Range> layers = std::nullopt);

// Both ends of the copy that fills it, as plans of one stream: from the pages that `blocks` names,
// to the shape's pool. Only where the shape has bytes. Errors: those of bind_plan.
struct PackedCopy {
  Plan source;
  Plan destination;
};
Result<PackedCopy> bind_packed(const RankLayout& layout, std::span<const GroupBlocks> blocks,
                               std::span<const GroupRanges> offer, std::optional<Range> layers,
                               const PackedShape& shape);

}  // namespace kvferry::mapping
