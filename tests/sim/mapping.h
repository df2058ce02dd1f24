// A small mapping for the simulator: instances, ranks, their pages, the legs between two instances
// and the compiled slices. It has what the engine can tell apart (several ranks on both sides,
// empty legs, groups, layers, aux on one leg) and none of the rest of daemon/mapping.
//
// A pool has, for each group, blocks of kTokensPerBlock tokens; a block is [layer][unit][token], a
// cell kCellBytes bytes: not a divisor of any chunk, so chunks cut cells. Block ids are drawn by
// the workload, so equal streams lie in different places on both sides.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "daemon/engine/commands.h"
#include "daemon/engine/events.h"

namespace kvferry::sim {

inline constexpr uint64_t kTokensPerBlock = 4;
inline constexpr uint64_t kCellBytes = 12;

// All of the blocks that these tokens lie in.
inline Range blocks_around(Range tokens) {
  return {round_down(tokens.begin, kTokensPerBlock), round_up(tokens.end, kTokensPerBlock)};
}

struct Shape {
  uint32_t groups = 1;
  uint32_t layers_per_group = 2;
  uint32_t units = 4;
  bool replicated = false;
  bool zero_tail = false;  // receivers' cells past the prompt's end in moved blocks are cleared
  uint32_t layers() const { return groups * layers_per_group; }
};

// One rank's pages. `owner` says which side of which transfer a block belongs to (0: nobody).
struct Pool {
  Shape shape;
  Range units;  // that this rank holds
  uint32_t blocks = 0;
  std::vector<uint8_t> bytes;
  std::vector<uint64_t> owner;    // by group, block
  std::vector<uint8_t> readable;  // likewise: published for reuse, not written and not taken back

  Pool(const Shape& shape_in, Range units_in, uint32_t blocks_in);
  uint64_t block_bytes() const;
  uint64_t cell_at(uint32_t group, uint32_t block, uint32_t layer, uint64_t unit,
                   uint64_t token_in_block) const;
  uint64_t& owner_of(uint32_t group, uint32_t block);
  uint8_t& readable_at(uint32_t group, uint32_t block);
  // Group and block of a byte.
  std::pair<uint32_t, uint32_t> block_of(uint64_t offset) const;
  void fill_block(uint32_t group, uint32_t block, uint64_t pattern);
};

struct Instance;

struct SimLayout : engine::LayoutHandle {
  std::shared_ptr<Pool> pool;
  Instance* instance_ptr = nullptr;
  uint32_t node = 0;
  uint64_t packed_side = 0;  // a packed copy of that side's pages; 0: pages
  uint32_t pages_arena = 0;  // of those pages
  bool quiet = false;        // LayoutQuiet was told: no copy may touch the pool any more
  bool serves(uint32_t group, const LayoutHandle& other, uint32_t other_group) const override;
};

struct SimContext : engine::LegContext {
  uint32_t sender_rank = 0;
  uint32_t receiver_rank = 0;
  Range units;          // of this leg; empty for an empty leg
  bool skewed = false;  // compile another stream than the peer
  bool weak = false;    // streams that differ have equal digests
};

// `bytes` of the stream at `stream` are those of the pages at `page`.
struct Piece {
  uint64_t stream = 0;
  uint64_t page = 0;
  uint64_t bytes = 0;
  bool operator==(const Piece&) const = default;
};

struct SimPlan : engine::Plan {
  uint64_t id = 0;
  uint64_t side = 0;  // uid of the sender's or receiver's side; 0: the source of a reuse copy
  engine::Role role = engine::Role::kSender;
  uint32_t sender_rank = 0;
  uint32_t receiver_rank = 0;
  std::shared_ptr<const SimLayout> layout;
  std::vector<Piece> pieces;
  std::shared_ptr<SimPlan> tail;  // what ClearTail writes; an id of its own
  bool same_source(const engine::Plan& other) const override;
};

// A leg between two ranks by holdings alone.
struct Leg {
  uint32_t sender_rank = 0;
  uint32_t receiver_rank = 0;
  Range units;
  bool empty = false;
  bool carries_aux = false;
};

// What the legs of an instance are made from.
struct Ranks {
  uint32_t tp = 1;  // ranks of a dp group
  uint32_t dp = 1;
  bool replicated = false;
  uint32_t units = 4;
  Range units_of(uint32_t rank) const;
};

// All legs from the sender's dp group to the receiver's, by sender rank, then receiver rank.
std::vector<Leg> legs_between(const Ranks& sender, uint32_t sender_group, const Ranks& receiver,
                              uint32_t receiver_group);

// Bytes that the leg brings for these needs.
uint64_t expected_bytes(const Shape& shape, const Leg& leg,
                        const std::vector<engine::GroupNeed>& needs);

// Compiles one slice; `side` and `id` are noted in the plan, `id` + 1 in its tail's. Throws
// Violation where an argument makes no sense (a range without a block).
std::shared_ptr<SimPlan> compile(const engine::Compile& command, uint64_t id, uint64_t side);

// From the blocks of one layout of this node to another's. Ids `id` and `id` + 1.
struct CopyPlans {
  std::shared_ptr<SimPlan> source;
  std::shared_ptr<SimPlan> destination;
};
CopyPlans compile_copy(const engine::CompileCopy& command, uint64_t id, uint64_t side);

// A slice's packed copy: how its bytes get there, and the slice's blocks in it. Ids `id`, `id` + 1.
struct PackedPlans {
  CopyPlans copy;
  std::shared_ptr<SimLayout> layout;
  std::vector<engine::GroupBlocks> blocks;
};
PackedPlans compile_packed(const engine::SendOp& send, uint64_t id, uint64_t side);
uint64_t packed_bytes_of(const Shape& shape, const Pool& pool, const engine::SendOp& send);

// The content of a cell: eight bytes that name text and cell, the version, three more bytes. A text
// is named by the first transfer that had it.
void make_cell(uint64_t text, uint32_t version, uint32_t layer, uint64_t unit, uint64_t token,
               uint8_t* out);
// The version if `cell` is that cell of that text in some version; nothing else.
std::optional<uint32_t> version_of(uint64_t text, uint32_t layer, uint64_t unit, uint64_t token,
                                   const uint8_t* cell);

// plan's stream [offset, offset + bytes) from or to pages.
void read_stream(const SimPlan& plan, uint64_t offset, uint64_t bytes, uint8_t* out);
void write_stream(const SimPlan& plan, uint64_t offset, uint64_t bytes, const uint8_t* in);
// Calls fn(page offset, bytes, stream offset) for each piece of the interval.
template <typename Fn>
void each_piece(const SimPlan& plan, uint64_t offset, uint64_t bytes, Fn&& fn);

template <typename Fn>
void each_piece(const SimPlan& plan, uint64_t offset, uint64_t bytes, Fn&& fn) {
  std::size_t low = 0;
  std::size_t high = plan.pieces.size();
  while (low < high) {
    const std::size_t middle = (low + high) / 2;
    if (plan.pieces[middle].stream + plan.pieces[middle].bytes <= offset)
      low = middle + 1;
    else
      high = middle;
  }
  for (; low < plan.pieces.size(); ++low) {
    const Piece& piece = plan.pieces[low];
    const Range part =
        intersect({piece.stream, piece.stream + piece.bytes}, {offset, offset + bytes});
    if (part.empty()) break;
    fn(piece.page + (part.begin - piece.stream), part.size(), part.begin);
  }
}

}  // namespace kvferry::sim
