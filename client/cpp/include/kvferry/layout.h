// How a rank's KV memory lies in its pools, and helpers that describe the layouts that engines use.
// Plain data; pure functions.
//
// address(block, unit, token) = pool base + offset + block * block_stride
//                             + (unit - unit_begin) * unit_stride + token * token_stride
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kvferry/export.h"
#include "kvferry/result.h"

namespace kvferry::client {

inline constexpr int32_t kHole = -1;  // an entry of a block list with nothing behind it

enum class Granularity : uint8_t {
  kToken = 1,    // one cell a unit and token
  kBlock = 2,    // one cell a unit and block (block scales)
  kRequest = 3,  // one cell a unit and transfer (recurrent state)
};

enum class Tail : uint8_t {
  kLeave = 1,  // bytes at or past the prompt's end are left as they arrive
  kZero = 2,   // cleared after the scatter
};

// One role of one layer.
struct Plane {
  uint32_t layer = 0;        // global layer number of the model
  std::string role;          // "key", "value", "latent", ...: [a-z0-9_.]+
  uint32_t units_total = 1;  // global number of heads (or other shard unit) ...
  uint32_t unit_begin = 0;   // ... and the interval that this rank holds
  uint32_t unit_count = 1;
  Granularity granularity = Granularity::kToken;
  uint64_t cell_bytes = 0;    // contiguous bytes of one cell
  std::string type;           // element type, such as "bf16"; equal on both sides
  bool optional = false;      // a receiver does without it where the sender has none
  std::string order;          // permutation of "lrbut", slowest first; empty: derived
  uint32_t pool = 0;          // index into Layout::pools
  uint64_t offset = 0;        // bytes
  uint64_t block_stride = 0;  // bytes
  uint64_t unit_stride = 0;   // bytes
  uint64_t token_stride = 0;  // bytes
};

// Planes that share one block list per transfer, one block size and one attention window.
struct Group {
  uint64_t tokens_per_block = 0;
  uint64_t sliding_window = 0;  // tokens; 0: none
  uint32_t cp_size = 1;         // tokens dealt to context-parallel ranks
  uint32_t cp_index = 0;
  uint64_t cp_interleave = 0;  // tokens; 0: tokens_per_block
  Tail tail = Tail::kLeave;
  uint64_t block_count = 0;  // kernel blocks
  uint32_t id_space = 0;     // groups that share storage name the same id space
  uint32_t blocks_per_id = 1;
  std::vector<Plane> planes;
};

struct PoolSpan {
  std::string name;
  uint64_t bytes = 0;
};

struct Layout {
  uint32_t rank = 0;        // 0 ... rank_count - 1
  uint32_t rank_count = 1;  // of the whole instance
  uint32_t dp_group = 0;
  std::string fingerprint;  // model, revision, quantisation; equal on both sides
  std::vector<Group> groups;
  std::vector<PoolSpan> pools;
};

// Where K and V of one token and head lie. Two attention backends may share shape and strides and
// differ in this, so it is stated, never guessed.
enum class KvPacking : uint8_t {
  kSeparate,      // K and V apart: two tensors, or an outer axis of 2
  kPerToken,      // [block, head, token, K|V] (or token before head): K, then V of the same token
  kPerHeadBlock,  // [block, head, K of all tokens | V of all tokens]
  kHeadAxis,      // [block, 2 * heads, token, dim]: K heads, then V heads
};

// The order of heads and tokens in a block.
enum class TokenOrder : uint8_t {
  kHeadMajor,   // HND
  kTokenMajor,  // NHD
};

// Attention heads of the layers of one rank, all alike.
struct AttentionShape {
  std::vector<uint32_t> layers;  // global layer numbers, in the order of the memory
  uint32_t heads_total = 1;      // KV heads of the model ...
  uint32_t head_begin = 0;       // ... and those of this rank
  uint32_t head_count = 1;
  uint64_t tokens_per_block = 16;
  uint64_t block_count = 0;
  uint64_t head_bytes = 0;  // bytes of one head of one token: dimension * element size
  std::string type = "bf16";
  TokenOrder token_order = TokenOrder::kHeadMajor;
  KvPacking packing = KvPacking::kSeparate;
};

// One tensor a layer. With KvPacking::kSeparate it is [2, blocks, ...] if `kv_outside`, else
// [blocks, 2, ...]. layer_offsets[i]: bytes from the pool's start to the tensor of shape.layers[i].
// INVALID_ARGUMENT LAYOUT_SHAPE for zero sizes, overflow or a wrong number of offsets.
KVFERRY_API Result<Group> per_layer_group(const AttentionShape& shape, uint32_t pool,
                                          const std::vector<uint64_t>& layer_offsets,
                                          bool kv_outside = false);

// K and V of each layer in tensors of their own, [blocks, ...] each.
KVFERRY_API Result<Group> split_group(const AttentionShape& shape, uint32_t pool,
                                      const std::vector<uint64_t>& key_offsets,
                                      const std::vector<uint64_t>& value_offsets);

// One tensor for all layers, [blocks, layers, ...], beginning at `offset`: a block's bytes lie
// together, so that transfers between equal layouts have one fragment a block.
KVFERRY_API Result<Group> cross_layer_group(const AttentionShape& shape, uint32_t pool,
                                            uint64_t offset = 0);

// Latent attention: one [blocks, tokens, latent] tensor a layer, not sharded.
// shape.head_bytes are the bytes of one token's latent; heads and packing are ignored.
KVFERRY_API Result<Group> latent_group(const AttentionShape& shape, uint32_t pool,
                                       const std::vector<uint64_t>& layer_offsets);

// Bytes of one block of one layer, K and V together; 0 on overflow.
KVFERRY_API uint64_t block_bytes(const AttentionShape& shape);

}  // namespace kvferry::client
