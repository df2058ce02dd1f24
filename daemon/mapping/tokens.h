// Which tokens move: what a receiver needs, what a sender's slice offers, and what of both moves
// between a pair of groups. Pure functions, any thread, nothing blocks.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/mapping/layout.h"

namespace kvferry::mapping {

// A receiver rank's request for one group (blocks.group names it).
struct GroupReceive {
  uint64_t prompt = 0;  // tokens; a REQUEST group's is taken as 1
  uint64_t cached = 0;  // tokens of this group that the receiver has already
  GroupBlocks blocks;   // where the rest goes; what lies past the list is a hole
};

// A slice's part of one group (blocks.group names it).
struct GroupOffer {
  uint64_t prompt = 0;  // the whole prompt, not the slice; a REQUEST group's is taken as 1
  Range tokens;         // as the caller says it, not rounded
  GroupBlocks blocks;   // positional; holes and what the list does not reach are not offered
};

// Per group what the rank needs; groups that need nothing are left out. Errors, naming fields like
// "groups[2].block_ids[17]" (groups counted as in `receives`): BLOCK_OUT_OF_RANGE, BLOCK_TWICE (in
// one id space), UNKNOWN_GROUP, GROUP_TWICE, TOO_FRAGMENTED, OUT_OF_RANGE.
Result<std::vector<GroupNeed>> compute_needs(const RankLayout& layout,
                                             std::span<const GroupReceive> receives);

// Per group what a slice offers, rounded to granules and without holes; groups that come to nothing
// are left out. Errors as above; ids may repeat on a sender.
Result<std::vector<GroupRanges>> round_offer(const RankLayout& layout,
                                             std::span<const GroupOffer> offers);

// Checks of what a peer sent, against its rank's holding: known groups, each once and ascending,
// ranges ascending, disjoint, rounded to the granule, inside the window that n0 and n1 give.
// INVALID_ARGUMENT or TOO_FRAGMENTED.
Status validate_needs(const Holding& receiver, std::span<const GroupNeed> needs);
Status validate_offer(const Holding& sender, std::span<const GroupRanges> offer);

// The ranges that a pair would move if the sender offered everything ...
std::vector<Range> wanted_ranges(const Group& sender, const GroupNeed& need);
// ... and what of them an offer covers. Before dealing; ascending, joined.
std::vector<Range> intersect_ranges(std::span<const Range> a, std::span<const Range> b);

// How a group deals its tokens to context-parallel ranks.
struct Dealing {
  uint32_t index = 0;
  uint32_t size = 1;
  uint64_t interleave = 1;
  auto operator<=>(const Dealing&) const = default;

  bool stores(uint64_t position) const {
    return size == 1 || position / interleave % size == index;
  }
  // Local position of one that is stored.
  uint64_t local(uint64_t position) const;
  // How many positions below `position` are stored.
  uint64_t stored_below(uint64_t position) const;
};
Dealing dealing_of(const Group& group);
// Positions of `ranges` that both sides store; they must be dealt alike or one of them not at all.
uint64_t stored_count(std::span<const Range> ranges, const Dealing& a, const Dealing& b);

// "0-64,128-160"
void append_ranges(std::string& text, std::span<const Range> ranges);

}  // namespace kvferry::mapping
