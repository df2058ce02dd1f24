// What the engine holds but never looks into: the worlds outside (mapping, memory, directory)
// derive from these. The simulator derives its own.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "daemon/base/ids.h"

namespace kvferry::engine {

// What the reuse index has to know of a group.
struct ReuseGroup {
  uint64_t block_tokens = 0;  // of a block id; 0: its blocks are not named by hashes
  uint64_t window = 0;        // tokens; 0: none
  uint32_t id_space = 0;      // groups of one share their blocks' memory
};

// A registered layout: a rank of an instance with its pools. Shared by the transfers that use it,
// so its pools stay mapped as long as a copy may touch them.
struct LayoutHandle {
  virtual ~LayoutHandle() = default;
  WorkerId worker;
  std::string instance;  // "tenant/name"
  Incarnation incarnation;
  uint32_t rank = 0;
  uint32_t dp_group = 0;
  // Where its chunks land and are staged: a number of EngineConfig::arenas, of no mapped one.
  uint32_t arena = 0;
  // The mapped one where chunks land if their sender has mapped it; none: they land in `arena`.
  std::optional<uint32_t> mapped_arena;
  // Blocks of layouts of one space hold the same where their hashes are the same; zero: no reuse.
  Digest16 reuse_space;
  std::vector<ReuseGroup> reuse_groups;  // as the layout's groups
  // Whether a block of `group` has every cell that a block of `other_group` of `other` needs.
  virtual bool serves(uint32_t /*group*/, const LayoutHandle& /*other*/,
                      uint32_t /*other_group*/) const {
    return false;
  }
  // Whether some byte may be a page of both.
  virtual bool shares_pages(const LayoutHandle& other) const { return this == &other; }
};

// Everything needed to compile a slice of one leg: both ranks' holdings and the leg table.
struct LegContext {
  virtual ~LegContext() = default;
};

// One side's compiled slice of one leg.
struct Plan {
  virtual ~Plan() = default;
  // Sender: whether both streams are the same bytes of the same memory in the same order, so that
  // what one plan gathers is what the other one would. Asked where `bytes` and `digest` are equal;
  // equal digests alone are no proof, as a receiver has a say in the text. Cheap next to a
  // compilation.
  virtual bool same_source(const Plan& /*other*/) const { return false; }
  uint64_t bytes = 0;      // of the stream
  uint64_t digest = 0;     // of the stream's text
  uint64_t fragments = 0;  // about: contiguous pieces of this side's memory
  bool has_tail = false;   // receiver: cells to be cleared once the whole stream is scattered
};

}  // namespace kvferry::engine
