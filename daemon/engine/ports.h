// What the engine holds but never looks into: the worlds outside (mapping, memory, directory)
// derive from these. The simulator derives its own.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "daemon/base/ids.h"

namespace kvferry::engine {

// A registered layout: a rank of an instance with its pools. Shared by the transfers that use it,
// so its pools stay mapped as long as a copy may touch them.
struct LayoutHandle {
  virtual ~LayoutHandle() = default;
  WorkerId worker;
  std::string instance;  // "tenant/name"
  Incarnation incarnation;
  uint32_t rank = 0;
  uint32_t dp_group = 0;
};

// Everything needed to compile a slice of one leg: both ranks' holdings and the leg table.
struct LegContext {
  virtual ~LegContext() = default;
};

// One side's compiled slice of one leg.
struct Plan {
  virtual ~Plan() = default;
  uint64_t bytes = 0;   // of the stream
  uint64_t digest = 0;  // of the stream's text
  uint64_t runs = 0;    // pieces contiguous on this side, for statistics
};

}  // namespace kvferry::engine
