// Between layout.proto's Holding and the mapping library's plain struct. Planes that repeat over
// layers are folded into runs, which keeps a card of a model with hundreds of planes at a few
// hundred bytes. Pure functions, any thread.
#pragma once

#include "daemon/base/result.h"
#include "daemon/mapping/layout.h"
#include "kvferry/v1/layout.pb.h"

namespace kvferry::rpc {

void holding_to_proto(const mapping::Holding& holding, v1::Holding& out);
// Shape and limits only, before anything large is reserved; what it means is checked by
// mapping::validate_holding. INVALID_ARGUMENT naming the field; RESOURCE_EXHAUSTED TOO_FRAGMENTED
// beyond the limits of a layout.
Result<mapping::Holding> holding_from_proto(const v1::Holding& holding);

}  // namespace kvferry::rpc
