// What the bench moves: models' KV shapes and synthetic fragments, laid out for each rank of a
// parallel topology, and the pattern by which every byte is recognised.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvferry/layout.h"
#include "kvferry/result.h"
#include "kvferry/types.h"

namespace kvferry::bench {

using client::Result;

// "tp2", "pp4", "tp2pp2": degrees of one side. "tep8" is tp8 (experts in parallel, which attention
// does not see), "dep4" four ranks with attention data parallelism: each holds all heads, and a
// request lies on one of them.
struct Topology {
  uint32_t tp = 1;
  uint32_t pp = 1;
  bool attention_dp = false;
  uint32_t ranks() const { return tp * pp; }
  uint32_t dp_groups() const { return attention_dp ? tp : 1; }
  uint32_t dp_group_of(uint32_t rank) const { return attention_dp ? rank % tp : 0; }
  std::string name() const;
};
Result<Topology> parse_topology(std::string_view text);

// The KV cache of one request of one model.
struct Shape {
  std::string name;
  uint32_t layers = 1;
  uint32_t kv_heads = 1;    // 1 and latent: not sharded
  uint32_t head_bytes = 0;  // of one token: dimension * element size
  bool latent = false;      // one latent a token instead of keys and values
  uint32_t tokens_per_block = 16;
  uint64_t tokens = 0;
  std::string type = "bf16";
  uint32_t index_bytes = 0;  // of one token: an index beside keys and values, not sharded
  uint64_t window = 0;       // tokens that every other layer, from the first on, looks back
  uint64_t bytes() const;    // of the whole request, once; windows not counted
};

// Names that --model takes.
std::vector<std::string> model_names();
Result<Shape> model_shape(std::string_view name, uint64_t tokens);
// A pair of topologies that this model is served with, as "SENDER:RECEIVER"; empty for no model.
std::string usual_pair(std::string_view model);
// `count` pieces of `bytes` each, one piece a block.
Shape fragment_shape(uint64_t count, uint64_t bytes);

// One rank's memory: its layout over one pool, and shuffled ids of its blocks.
struct RankMemory {
  client::Layout layout;
  uint64_t pool_bytes = 0;
  std::vector<int32_t> block_ids;  // enough for the shape's tokens, of every group
};
// Pools have `spare` times the blocks that the shape's tokens need; ids are drawn with `seed`.
Result<RankMemory> rank_memory(const Shape& shape, const Topology& topology, uint32_t rank,
                               double spare, uint64_t seed);

// One request in a rank's memory. `salt` tells its bytes from those of others.
struct RequestCells {
  std::span<const int32_t> block_ids;  // entry j holds tokens [j * B, (j + 1) * B)
  uint64_t tokens = 0;
  uint64_t salt = 0;
};
// The tokens of a request that a receiver needs of a group: all, or those of its window, from the
// beginning of a block on.
client::TokenRange needed_tokens(const client::Group& group, uint64_t tokens);
// Bytes of a request that one receiver rank gets.
uint64_t request_bytes(const client::Layout& layout, uint64_t tokens);

// Writes the pattern of every cell of the request into the rank's pool.
void fill_request(const RankMemory& memory, const RequestCells& request, std::byte* pool);
void fill_cells(const RankMemory& memory, uint64_t tokens, uint64_t salt, std::byte* pool);
// Fills the whole pool with what no cell holds.
void fill_untouched(uint64_t pool_bytes, std::byte* pool);

struct Verdict {
  uint64_t cell_bytes = 0;     // compared
  uint64_t outside_bytes = 0;  // compared
  uint64_t wrong_bytes = 0;    // in 8-byte words that differ
  std::string first;           // where the first wrong word stands
  bool ok() const { return wrong_bytes == 0; }
};
// Compares every byte of a receiver's pool: the needed cells of the requests with the pattern, all
// blocks that none of them needs with fill_untouched's. Computes addresses from the layout's
// strides by itself.
Verdict verify_requests(const RankMemory& memory, std::span<const RequestCells> requests,
                        const std::byte* pool);
// The same for one request; no cell at all is wrong too.
Verdict verify(const RankMemory& memory, uint64_t tokens, uint64_t salt, const std::byte* pool);

}  // namespace kvferry::bench
