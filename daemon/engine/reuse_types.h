// What the reuse index and the receives that use it name. Plain data.
#pragma once

#include <compare>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "daemon/base/ids.h"
#include "daemon/engine/ports.h"
#include "daemon/mapping/layout.h"

namespace kvferry::engine {

// Where a block's bytes lie: groups that share an id space share them.
struct BlockPlace {
  uint64_t layout = 0;  // the index's number for it
  uint32_t id_space = 0;
  int32_t block = 0;
  auto operator<=>(const BlockPlace&) const = default;
};

// What a block holds: the prompt up to its end, as the workers of one space hash it.
struct ReuseKey {
  Digest16 space;
  std::string hash;
  auto operator<=>(const ReuseKey&) const = default;
};

// A block that holds what was asked for.
struct ReuseHolder {
  std::shared_ptr<const LayoutHandle> layout;
  uint32_t group = 0;
  BlockPlace place;
};

// A receive's copy from the blocks of one group of one layout to one of its own groups.
struct ReuseCopy {
  std::shared_ptr<const LayoutHandle> source;
  mapping::GroupBlocks source_blocks;  // counted as the destination's
  mapping::GroupNeed need;
  std::vector<BlockPlace> places;  // read from now until it is done
  CompileId compile;
  std::shared_ptr<const Plan> from;
  std::shared_ptr<const Plan> to;
  uint64_t started = 0;  // bytes of the stream
  uint64_t done = 0;
  uint32_t running = 0;
  bool queued = false;
};

}  // namespace kvferry::engine
