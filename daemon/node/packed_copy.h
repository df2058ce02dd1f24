// The packed copy of a slice, before it is made: memory of its own as a layout, and the two plans
// of the copy that fills it. Any thread; blocks while the kernel zeroes the memory.
#pragma once

#include <memory>
#include <vector>

#include "daemon/engine/events.h"
#include "daemon/node/registered_layout.h"

namespace kvferry::node {

struct PackedPlan {
  std::shared_ptr<const RegisteredLayout> layout;  // the copy; its memory lasts as long as this
  std::vector<mapping::GroupBlocks> blocks;        // the slice's, in it
  std::shared_ptr<const CompiledPlan> source;
  std::shared_ptr<const CompiledPlan> destination;
};

// `send` offers some cell of its rank. RESOURCE_EXHAUSTED MEMORY_EXHAUSTED, and what the mapping
// finds wrong.
Result<PackedPlan> prepare_packed(const engine::SendOp& send);

}  // namespace kvferry::node
