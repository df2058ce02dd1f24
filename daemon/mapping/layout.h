// What a rank's KV memory looks like: groups of planes described with strides. Plain data; the
// functions that check, match and compile it stand in the other headers of this folder.
//
// address(block, unit, token) = pool base + offset + block * block_stride
//                             + (unit - unit_begin) * unit_stride + token * token_stride
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "daemon/base/ids.h"
#include "daemon/base/units.h"

namespace kvferry::mapping {

inline constexpr int32_t kHole = -1;  // a block list entry with nothing behind it

enum class Granularity : uint8_t {
  kToken,    // one cell a unit and token
  kBlock,    // one cell a unit and block (block scales); no token term in the address
  kRequest,  // one cell a unit and transfer (recurrent state)
};

enum class Tail : uint8_t {
  kLeave,  // bytes at or past the prompt's end are left as they arrive
  kZero,   // cleared after the scatter
};

// One role of one layer in a pool.
struct Plane {
  uint32_t layer = 0;        // global layer number of the model
  std::string role;          // "key", "value", "latent", ...: [a-z0-9_.]+
  uint32_t units_total = 1;  // the shard axis: global number of heads (or other unit) ...
  uint32_t unit_begin = 0;   // ... and the interval that this rank holds
  uint32_t unit_count = 1;
  Granularity granularity = Granularity::kToken;
  uint64_t cell_bytes = 0;  // contiguous bytes of one cell
  std::string type;         // element type name; equal on both sides
  bool optional = false;    // a receiver does without it where the sender holds nothing of it
  std::string order;        // permutation of "lrbut" (slowest first); empty: derived from strides

  // Addresses; not part of the holding.
  uint32_t pool = 0;          // index into RankLayout::pools
  uint64_t offset = 0;        // bytes from the pool's first byte
  uint64_t block_stride = 0;  // bytes
  uint64_t unit_stride = 0;   // bytes
  uint64_t token_stride = 0;  // bytes
  bool operator==(const Plane&) const = default;
};

// Planes that share one block list per transfer, one block size and one attention window.
struct Group {
  uint64_t tokens_per_block = 0;
  uint64_t sliding_window = 0;  // tokens; 0: none
  uint32_t cp_size = 1;         // tokens dealt to context-parallel ranks
  uint32_t cp_index = 0;
  uint64_t cp_interleave = 0;  // tokens; 0: tokens_per_block
  Tail tail = Tail::kLeave;
  std::vector<Plane> planes;

  // Not part of the holding.
  uint64_t block_count = 0;    // kernel blocks: ids are 0 ... block_count / blocks_per_id - 1
  uint32_t id_space = 0;       // groups that share storage name the same id space
  uint32_t blocks_per_id = 1;  // id i means kernel blocks i*n ... i*n + n-1
  bool operator==(const Group&) const = default;
};

// A rank's position in its instance.
struct Topology {
  uint32_t rank = 0;        // 0 ... rank_count - 1
  uint32_t rank_count = 1;  // of the whole instance
  uint32_t dp_group = 0;    // attention data parallelism: which group this rank belongs to
  bool operator==(const Topology&) const = default;
};

struct PoolSpan {
  std::string name;
  uint64_t bytes = 0;
  bool operator==(const PoolSpan&) const = default;
};

struct RankLayout {
  Topology topology;
  std::string fingerprint;  // model, revision, quantisation; at most 256 bytes
  std::vector<Group> groups;
  std::vector<PoolSpan> pools;  // empty in a holding
  bool operator==(const RankLayout&) const = default;
};

// A holding is a RankLayout without pools, offsets, strides, block counts, id spaces and ids; it is
// all that a peer learns of a rank. `order` is always filled in.
using Holding = RankLayout;

// One instance as its cards describe it: ranks 0 ... n-1 in order.
struct Instance {
  std::string name;  // "tenant/name"
  Incarnation incarnation;
  std::vector<Holding> ranks;
};

// Which tokens of which group. Ranges are ascending and disjoint; touching ones are joined.
struct GroupRanges {
  uint32_t group = 0;
  std::vector<Range> ranges;
  auto operator<=>(const GroupRanges&) const = default;
};

// What a receiver rank needs of one group (mapping: need).
struct GroupNeed {
  uint32_t group = 0;
  uint64_t begin = 0;         // n0, before rounding
  uint64_t end = 0;           // n1
  std::vector<Range> ranges;  // rounded to the group's granule, without the rank's holes
  auto operator<=>(const GroupNeed&) const = default;
};

// Block ids of one group for a transfer or slice. Entry j stands for the group's local positions
// [(first_block + j) * n * B, (first_block + j + 1) * n * B), n being blocks_per_id: first_block
// counts as the ids do.
struct GroupBlocks {
  uint32_t group = 0;
  uint64_t first_block = 0;
  std::vector<int32_t> ids;  // kHole: nothing there
  auto operator<=>(const GroupBlocks&) const = default;
};

}  // namespace kvferry::mapping
