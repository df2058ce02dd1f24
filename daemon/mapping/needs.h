// What a receiver rank's needs ask of one sender rank, in the sender's own groups. Pure, any
// thread, nothing blocks.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/mapping/layout.h"
#include "daemon/mapping/legs.h"

namespace kvferry::mapping {

// The tokens that the leg (sender_rank, receiver_rank) takes from each of the sender's groups if
// everything is offered; groups of which it takes nothing are left out. Ranges are rounded outward
// to the group's granule, so that an offer of them brings all that is needed; the last one may end
// past the prompt, where a caller cuts it. Before dealing: a context-parallel rank is named the
// positions of others too. Errors: those of validate_needs; NOT_FOUND for unknown ranks.
Result<std::vector<GroupRanges>> needs_by_sender_group(const LegTable& table, uint32_t sender_rank,
                                                       uint32_t receiver_rank,
                                                       std::span<const GroupNeed> needs);

// The union of two lists of ranges, each ascending and disjoint; ascending, touching ones joined.
std::vector<Range> unite_ranges(std::span<const Range> a, std::span<const Range> b);

}  // namespace kvferry::mapping
