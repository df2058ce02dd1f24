// What a configuration that was read again changes. Pure functions; any thread.
#pragma once

#include <string>
#include <vector>

#include "daemon/ops/config.h"

namespace kvferry::ops {

// The keys that differ, as they are written ("engine.lease"), but for [[peers]] and log.level,
// which a running daemon takes over: [[socket]] and [ucx] as a whole.
std::vector<std::string> changed_keys(Config running, Config read);

}  // namespace kvferry::ops
