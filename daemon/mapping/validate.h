// Checks of layouts, holdings and instances, and the step from one to the next. Pure functions, any
// thread, nothing blocks; cost O(n log n) in the planes except where planes interleave in memory.
#pragma once

#include <string>

#include "daemon/base/result.h"
#include "daemon/mapping/layout.h"

namespace kvferry::mapping {

// What RegisterLayout must refuse: numbers out of range, planes outside their pool, planes of a
// group whose bytes meet or cannot be shown not to, groups that meet without a common id space, a
// cell held twice. INVALID_ARGUMENT; the field reads like "groups[2].planes[3].offset".
Status validate_layout(const RankLayout& layout);

// A holding that came from elsewhere: the same without addresses. `order` and `cp_interleave` must
// be filled in.
Status validate_holding(const Holding& holding);

// Ranks numbered 0 ... n-1 in order, each a valid holding, one fingerprint, and a (layer, role)
// shaped and dealt alike on all of them. Fields begin with "ranks[i].".
Status validate_instance(const Instance& instance);

// The layout without pools, addresses, block counts and id spaces; `order` is derived where it was
// not given, cp_interleave is filled in. The layout must be valid.
Holding holding_of(const RankLayout& layout);

// The order of a plane's cells in its own memory: the axes l r b u t by falling step.
std::string derive_order(const Group& group, const Plane& plane);

// Whether every dp group of `sender` can serve every rank of `receiver`. Both must be valid.
// FAILED_PRECONDITION INCOMPATIBLE; the field begins with "receiver.ranks[i]." or names the
// fingerprint.
Status check_compatible(const Instance& sender, const Instance& receiver);

// Tokens that are dealt move in units of the interleave, others in whole blocks.
uint64_t granule_of(const Group& group);
bool is_request_group(const Group& group);

}  // namespace kvferry::mapping
