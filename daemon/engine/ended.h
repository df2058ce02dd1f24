// The record of a transfer's end, for metrics and logs.
#pragma once

#include "daemon/engine/commands.h"
#include "daemon/engine/state.h"

namespace kvferry::engine {

// A short hash of the transfer's name; says nothing of its secret and is safe to log.
std::string short_hash(const TransferName& name);
TransferEnded ended(const Transfer& transfer, Role role, Time now);

}  // namespace kvferry::engine
