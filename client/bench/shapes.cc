#include "client/bench/shapes.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>

namespace kvferry::bench {
namespace {

using client::Code;
using client::Error;

constexpr uint64_t kUntouched = 0xA5A5A5A5A5A5A5A5ULL;

Error bad(std::string field, std::string message) {
  return Error{Code::kInvalidArgument, "BENCH_ARGUMENT", std::move(message), std::move(field)};
}

struct Model {
  std::string_view name;
  uint32_t layers, kv_heads, head_bytes;
  bool latent;
  uint32_t tokens_per_block;
  std::string_view type;
};

// KV shapes as published with the models.
constexpr Model kModels[] = {
    {"llama-3-8b", 32, 8, 128 * 2, false, 16, "bf16"},
    {"llama-3-70b", 80, 8, 128 * 2, false, 16, "bf16"},
    {"qwen3-235b-a22b", 94, 4, 128, false, 32, "fp8"},
    {"deepseek-r1", 61, 1, 576 * 2, true, 32, "bf16"},
};

// A 64-bit mix (the finisher of splitmix64).
uint64_t mix(uint64_t x) {
  x ^= x >> 30;
  x *= 0xBF58476D1CE4E5B9ULL;
  x ^= x >> 27;
  x *= 0x94D049BB133111EBULL;
  return x ^ (x >> 31);
}

// The first word of a cell; word i is this plus i times an odd constant. Depends on what the cell
// means, never on where it lies.
uint64_t cell_seed(uint64_t salt, uint32_t layer, uint64_t role, uint32_t unit, uint64_t token) {
  return mix(salt ^ mix((uint64_t{layer} << 40) ^ (role << 36) ^ (uint64_t{unit} << 48) ^ token));
}
constexpr uint64_t kStep = 0x9E3779B97F4A7C15ULL;

// Calls fn(address offset, cell bytes, seed) for each cell of the request.
template <typename Fn>
void for_each_cell(const RankMemory& memory, uint64_t tokens, uint64_t salt, Fn&& fn) {
  for (const client::Group& group : memory.layout.groups) {
    for (const client::Plane& plane : group.planes) {
      const uint64_t role = std::hash<std::string>{}(plane.role) & 15;
      for (uint64_t token = 0; token < tokens; ++token) {
        const auto id = static_cast<uint64_t>(memory.block_ids[token / group.tokens_per_block]);
        for (uint32_t u = 0; u < plane.unit_count; ++u) {
          const uint64_t at = plane.offset + id * plane.block_stride + u * plane.unit_stride +
                              token % group.tokens_per_block * plane.token_stride;
          fn(at, plane.cell_bytes, cell_seed(salt, plane.layer, role, plane.unit_begin + u, token));
        }
      }
    }
  }
}

}  // namespace

std::string Topology::name() const {
  std::string out;
  if (tp > 1 || pp == 1) out += "tp" + std::to_string(tp);
  if (pp > 1) out += "pp" + std::to_string(pp);
  return out;
}

Result<Topology> parse_topology(std::string_view text) {
  Topology topology;
  std::string_view rest = text;
  while (!rest.empty()) {
    uint32_t* degree = rest.starts_with("tp")   ? &topology.tp
                       : rest.starts_with("pp") ? &topology.pp
                                                : nullptr;
    if (degree == nullptr) return bad("pair", "not like tp2, pp2 or tp2pp2: " + std::string(text));
    rest.remove_prefix(2);
    uint32_t value = 0;
    std::size_t digits = 0;
    while (digits < rest.size() && digits < 3 && rest[digits] >= '0' && rest[digits] <= '9')
      value = value * 10 + static_cast<uint32_t>(rest[digits++] - '0');
    if (value < 1 || value > 64) return bad("pair", "a degree is 1 to 64: " + std::string(text));
    *degree = value;
    rest.remove_prefix(digits);
  }
  if (text.empty()) return bad("pair", "an empty topology");
  return topology;
}

uint64_t Shape::bytes() const {
  return uint64_t{layers} * kv_heads * head_bytes * (latent ? 1 : 2) * tokens;
}

std::vector<std::string> model_names() {
  std::vector<std::string> names;
  for (const Model& model : kModels) names.emplace_back(model.name);
  return names;
}

Result<Shape> model_shape(std::string_view name, uint64_t tokens) {
  for (const Model& model : kModels) {
    if (model.name != name) continue;
    Shape shape;
    shape.name = name;
    shape.layers = model.layers;
    shape.kv_heads = model.kv_heads;
    shape.head_bytes = model.head_bytes;
    shape.latent = model.latent;
    shape.tokens_per_block = model.tokens_per_block;
    shape.tokens = tokens;
    shape.type = model.type;
    return shape;
  }
  return bad("model", "unknown model " + std::string(name));
}

Shape fragment_shape(uint64_t count, uint64_t bytes) {
  Shape shape;
  shape.name = "fragments";
  shape.head_bytes = static_cast<uint32_t>(bytes);
  shape.latent = true;
  shape.tokens_per_block = 1;
  shape.tokens = count;
  shape.type = "u8";
  return shape;
}

Result<RankMemory> rank_memory(const Shape& shape, const Topology& topology, uint32_t rank,
                               double spare, uint64_t seed) {
  const uint32_t tp = topology.tp;
  const uint32_t tp_rank = rank % tp;
  const uint32_t pp_rank = rank / tp;
  if (shape.layers < topology.pp) return bad("pair", "more pipeline stages than layers");
  if (!shape.latent && shape.kv_heads % tp != 0 && tp % shape.kv_heads != 0)
    return bad("pair", "heads and tensor-parallel degree do not divide each other");

  client::AttentionShape attention;
  const uint32_t first = shape.layers * pp_rank / topology.pp;
  const uint32_t end = shape.layers * (pp_rank + 1) / topology.pp;
  for (uint32_t layer = first; layer < end; ++layer) attention.layers.push_back(layer);
  attention.heads_total = shape.kv_heads;
  if (!shape.latent) {
    attention.head_count = std::max(shape.kv_heads / tp, 1U);
    // With fewer heads than ranks, neighbours hold the same one.
    attention.head_begin = shape.kv_heads * tp_rank / tp;
  }
  attention.tokens_per_block = shape.tokens_per_block;
  const uint64_t needed = (shape.tokens + shape.tokens_per_block - 1) / shape.tokens_per_block;
  attention.block_count =
      std::max<uint64_t>(needed + 1, static_cast<uint64_t>(static_cast<double>(needed) * spare));
  attention.head_bytes = shape.head_bytes;
  attention.type = shape.type;

  const uint64_t layer_bytes = attention.block_count * shape.tokens_per_block * shape.head_bytes *
                               (shape.latent ? 1 : uint64_t{2} * attention.head_count);
  std::vector<uint64_t> offsets;
  for (std::size_t i = 0; i < attention.layers.size(); ++i) offsets.push_back(i * layer_bytes);
  auto group = shape.latent ? client::latent_group(attention, 0, offsets)
                            : client::per_layer_group(attention, 0, offsets);
  if (!group) return group.error();

  RankMemory memory;
  memory.pool_bytes = layer_bytes * attention.layers.size();
  memory.layout.rank = rank;
  memory.layout.rank_count = topology.ranks();
  memory.layout.fingerprint = "kvferry-bench " + shape.name;
  memory.layout.groups.push_back(std::move(*group));
  memory.layout.pools.push_back({"kv", memory.pool_bytes});
  std::vector<int32_t> ids(attention.block_count);
  std::iota(ids.begin(), ids.end(), 0);
  std::mt19937_64 random(seed);
  std::shuffle(ids.begin(), ids.end(), random);
  ids.resize(needed);
  memory.block_ids = std::move(ids);
  return memory;
}

void fill_cells(const RankMemory& memory, uint64_t tokens, uint64_t salt, std::byte* pool) {
  for_each_cell(memory, tokens, salt, [pool](uint64_t at, uint64_t bytes, uint64_t seed) {
    for (uint64_t i = 0; i < bytes; i += 8, seed += kStep)
      std::memcpy(pool + at + i, &seed, std::min<uint64_t>(8, bytes - i));
  });
}

void fill_untouched(uint64_t pool_bytes, std::byte* pool) {
  std::memset(pool, 0xA5, pool_bytes);
}

Verdict verify(const RankMemory& memory, uint64_t tokens, uint64_t salt, const std::byte* pool) {
  Verdict verdict;
  const auto compare = [&](uint64_t at, uint64_t bytes, uint64_t expected) {
    uint64_t got = expected;
    std::memcpy(&got, pool + at, bytes);
    // Only the first `bytes` of the word were replaced.
    if (got == expected) return;
    if (verdict.wrong_bytes == 0) verdict.first = "pool offset " + std::to_string(at);
    verdict.wrong_bytes += bytes;
  };
  for_each_cell(memory, tokens, salt, [&](uint64_t at, uint64_t bytes, uint64_t seed) {
    verdict.cell_bytes += bytes;
    for (uint64_t i = 0; i < bytes; i += 8, seed += kStep)
      compare(at + i, std::min<uint64_t>(8, bytes - i), seed);
  });
  // Everything that is no cell of the request: what lies between its blocks in each plane. Planes
  // of one layer interleave inside a block, so whole blocks of the layer are looked at.
  std::vector<uint8_t> used(memory.layout.groups[0].block_count, 0);
  const uint64_t per_block = memory.layout.groups[0].tokens_per_block;
  for (std::size_t i = 0; i < memory.block_ids.size() && i * per_block < tokens; ++i)
    used[static_cast<std::size_t>(memory.block_ids[i])] = 1;
  for (const client::Plane& plane : memory.layout.groups[0].planes) {
    for (uint64_t block = 0; block < used.size(); ++block) {
      if (used[block] != 0) continue;
      for (uint32_t u = 0; u < plane.unit_count; ++u) {
        for (uint64_t t = 0; t < memory.layout.groups[0].tokens_per_block; ++t) {
          const uint64_t at = plane.offset + block * plane.block_stride + u * plane.unit_stride +
                              t * plane.token_stride;
          for (uint64_t i = 0; i < plane.cell_bytes; i += 8)
            compare(at + i, std::min<uint64_t>(8, plane.cell_bytes - i), kUntouched);
          verdict.outside_bytes += plane.cell_bytes;
        }
      }
    }
  }
  // The bytes past the prompt in its last block are the sender's and mean nothing.
  return verdict;
}

}  // namespace kvferry::bench
