// From a slice of a leg to a plan bound to memory: the step that turns what both daemons know into
// this side's addresses. Pure, any thread; costs milliseconds for large slices.
#pragma once

#include <cstdint>
#include <memory>

#include "daemon/base/reason.h"
#include "daemon/engine/commands.h"
#include "daemon/engine/ports.h"
#include "daemon/mapping/legs.h"

namespace kvferry::node {

// What the engine carries around for one leg.
struct CompileContext : engine::LegContext {
  std::shared_ptr<const mapping::LegTable> table;
  uint32_t sender_rank = 0;
  uint32_t receiver_rank = 0;
};

engine::Compiled compile_now(const engine::Compile& command);
// Whether that takes some tens of microseconds at most, and so less than a hop to another thread.
// Decided by the number of planes, ranges and blocks; slices on GPUs never are.
bool is_small(const engine::Compile& command);
// The same for a copy between two layouts of this daemon.
engine::CopyCompiled compile_now(const engine::CompileCopy& command);

// The reason that a transfer ends with for an error of the directory or the mapping.
Reason reason_of(const Error& error);

}  // namespace kvferry::node
