// What the bench moves: models' KV shapes and synthetic fragments, laid out for each rank of a
// parallel topology, and the pattern by which every byte is recognised.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kvferry/layout.h"
#include "kvferry/result.h"

namespace kvferry::bench {

using client::Result;

// "tp2", "pp4", "tp2pp2": degrees of one side.
struct Topology {
  uint32_t tp = 1;
  uint32_t pp = 1;
  uint32_t ranks() const { return tp * pp; }
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
  uint64_t bytes() const;  // of the whole request, once
};

// Names that --model takes.
std::vector<std::string> model_names();
Result<Shape> model_shape(std::string_view name, uint64_t tokens);
// `count` pieces of `bytes` each, one piece a block.
Shape fragment_shape(uint64_t count, uint64_t bytes);

// One rank's memory: its layout over one pool, and the shuffled ids of the request's blocks.
struct RankMemory {
  client::Layout layout;
  uint64_t pool_bytes = 0;
  std::vector<int32_t> block_ids;
};
// Pools have `spare` times the blocks that the request needs; ids are drawn with `seed`.
Result<RankMemory> rank_memory(const Shape& shape, const Topology& topology, uint32_t rank,
                               double spare, uint64_t seed);

// Writes the pattern of every cell of the request into the rank's pool.
void fill_cells(const RankMemory& memory, uint64_t tokens, uint64_t salt, std::byte* pool);
// Fills the whole pool with what no cell holds.
void fill_untouched(uint64_t pool_bytes, std::byte* pool);

struct Verdict {
  uint64_t cell_bytes = 0;     // compared
  uint64_t outside_bytes = 0;  // compared
  uint64_t wrong_bytes = 0;    // in 8-byte words that differ
  std::string first;           // where the first wrong word stands
  bool ok() const { return wrong_bytes == 0 && cell_bytes > 0; }
};
// Compares every byte of the pool: cells of the request's first `tokens` with the pattern, all
// other blocks with fill_untouched's. Computes addresses from the layout's strides by itself.
Verdict verify(const RankMemory& memory, uint64_t tokens, uint64_t salt, const std::byte* pool);

}  // namespace kvferry::bench
