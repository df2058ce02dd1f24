// Between layout.proto and the mapping library's plain structs. Shape only: every number is copied,
// what they mean together is checked by mapping::validate_layout. Pure functions, any thread.
#pragma once

#include "daemon/base/result.h"
#include "daemon/mapping/layout.h"
#include "kvferry/v1/layout.pb.h"

namespace kvferry::rpc {

// Fields that read 0 as a default get it. INVALID_ARGUMENT naming the field ("groups[1].tail") for
// values that no enumeration has; TOO_FRAGMENTED beyond the limits of a layout.
Result<mapping::RankLayout> from_proto(const v1::RankLayout& layout);
void to_proto(const mapping::RankLayout& layout, v1::RankLayout& out);

}  // namespace kvferry::rpc
