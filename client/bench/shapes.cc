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
  uint32_t index_bytes;
  uint32_t window;
  std::string_view pair;
};

// KV shapes as published with the models.
constexpr Model kModels[] = {
    {"llama-3-8b", 32, 8, 128 * 2, false, 16, "bf16", 0, 0, "tp2:tp4"},
    {"llama-3-70b", 80, 8, 128 * 2, false, 16, "bf16", 0, 0, "tp4:tp8"},
    {"qwen3-235b-a22b", 94, 4, 128, false, 32, "fp8", 0, 0, "tep4:dep16"},
    {"deepseek-r1", 61, 1, 576 * 2, true, 32, "bf16", 0, 0, "dep4:tep8"},
    {"deepseek-r1-fp8", 61, 1, 576, true, 64, "fp8", 0, 0, "dep4:tep8"},
    {"gpt-oss-120b", 36, 8, 64 * 2, false, 16, "bf16", 0, 128, "tp2:tp4"},
    {"minimax-m3-like", 60, 2, 128 * 2, false, 32, "bf16", 128 * 2, 0, "tp2:tp1"},
};

const Model* find_model(std::string_view name) {
  for (const Model& model : kModels)
    if (model.name == name) return &model;
  return nullptr;
}

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

// Names of roles that the bench uses never share a number.
uint64_t role_number(const std::string& role) {
  constexpr std::string_view kRoles[] = {"key", "value", "latent", "index"};
  for (uint64_t i = 0; i < std::size(kRoles); ++i)
    if (kRoles[i] == role) return i;
  return 4 + std::hash<std::string>{}(role) % 12;
}

// Calls fn(address offset, cell bytes, seed) for each cell of the request; with `needed`, of those
// only that a receiver needs.
template <typename Fn>
void for_each_cell(const RankMemory& memory, const RequestCells& request, bool needed, Fn&& fn) {
  for (const client::Group& group : memory.layout.groups) {
    const uint64_t begin = needed ? needed_tokens(group, request.tokens).begin : 0;
    for (const client::Plane& plane : group.planes) {
      const uint64_t role = role_number(plane.role);
      for (uint64_t token = begin; token < request.tokens; ++token) {
        const auto id = static_cast<uint64_t>(request.block_ids[token / group.tokens_per_block]);
        for (uint32_t u = 0; u < plane.unit_count; ++u) {
          const uint64_t at = plane.offset + id * plane.block_stride + u * plane.unit_stride +
                              token % group.tokens_per_block * plane.token_stride;
          fn(at, plane.cell_bytes,
             cell_seed(request.salt, plane.layer, role, plane.unit_begin + u, token));
        }
      }
    }
  }
}

// Bytes of [at, at + bytes) in words that differ from first, first + step, ...
uint64_t wrong_bytes(const std::byte* at, uint64_t bytes, uint64_t first, uint64_t step) {
  uint64_t wrong = 0;
  const uint64_t whole = bytes / 8 * 8;
  for (uint64_t i = 0; i < whole; i += 8, first += step) {
    uint64_t got = 0;
    std::memcpy(&got, at + i, 8);
    wrong += got != first ? 8 : 0;
  }
  if (whole < bytes && std::memcmp(at + whole, &first, bytes - whole) != 0) wrong += bytes - whole;
  return wrong;
}

}  // namespace

std::string Topology::name() const {
  std::string out;
  if (attention_dp) out += "de";
  if (attention_dp || tp > 1 || pp == 1) out += (attention_dp ? "p" : "tp") + std::to_string(tp);
  if (pp > 1) out += "pp" + std::to_string(pp);
  return out;
}

Result<Topology> parse_topology(std::string_view text) {
  Topology topology;
  std::string_view rest = text;
  while (!rest.empty()) {
    const bool expert = rest.starts_with("tep") || rest.starts_with("dep");
    uint32_t* degree = expert || rest.starts_with("tp") ? &topology.tp
                       : rest.starts_with("pp")         ? &topology.pp
                                                        : nullptr;
    if (degree == nullptr)
      return bad("pair", "not like tp2, pp2, tp2pp2, tep8 or dep4: " + std::string(text));
    if (rest.starts_with("dep")) topology.attention_dp = true;
    rest.remove_prefix(expert ? 3 : 2);
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
  return uint64_t{layers} * tokens *
         (uint64_t{kv_heads} * head_bytes * (latent ? 1 : 2) + index_bytes);
}

std::vector<std::string> model_names() {
  std::vector<std::string> names;
  for (const Model& model : kModels) names.emplace_back(model.name);
  return names;
}

Result<Shape> model_shape(std::string_view name, uint64_t tokens) {
  const Model* model = find_model(name);
  if (model == nullptr) return bad("model", "unknown model " + std::string(name));
  Shape shape;
  shape.name = name;
  shape.layers = model->layers;
  shape.kv_heads = model->kv_heads;
  shape.head_bytes = model->head_bytes;
  shape.latent = model->latent;
  shape.tokens_per_block = model->tokens_per_block;
  shape.tokens = tokens;
  shape.type = model->type;
  shape.index_bytes = model->index_bytes;
  shape.window = model->window;
  return shape;
}

std::string usual_pair(std::string_view model) {
  const Model* found = find_model(model);
  return found != nullptr ? std::string(found->pair) : std::string();
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

namespace {

// The heads, block size and block count of a rank, without its layers.
client::AttentionShape attention_of(const Shape& shape, const Topology& topology, uint32_t rank,
                                    uint64_t block_count) {
  client::AttentionShape attention;
  attention.heads_total = shape.kv_heads;
  if (!shape.latent) {
    const uint32_t tp = topology.attention_dp ? 1 : topology.tp;
    attention.head_count = std::max(shape.kv_heads / tp, 1U);
    // With fewer heads than ranks, neighbours hold the same one.
    attention.head_begin = shape.kv_heads * (rank % tp) / tp;
  }
  attention.tokens_per_block = shape.tokens_per_block;
  attention.block_count = block_count;
  attention.head_bytes = shape.head_bytes;
  attention.type = shape.type;
  return attention;
}

// The group of some layers, whose tensors begin at `offsets`.
Result<client::Group> group_of(const Shape& shape, const client::AttentionShape& attention,
                               const std::vector<uint64_t>& offsets) {
  auto group = shape.latent ? client::latent_group(attention, 0, offsets)
                            : client::per_layer_group(attention, 0, offsets);
  if (!group || shape.index_bytes == 0) return group;
  // Keys, values and the index of a block lie behind each other.
  const uint64_t kv_bytes = client::block_bytes(attention);
  const uint64_t block_stride = kv_bytes + uint64_t{shape.tokens_per_block} * shape.index_bytes;
  for (client::Plane& plane : group->planes) plane.block_stride = block_stride;
  for (std::size_t i = 0; i < attention.layers.size(); ++i) {
    client::Plane index;
    index.layer = attention.layers[i];
    index.role = "index";
    index.cell_bytes = shape.index_bytes;
    index.type = shape.type;
    index.offset = offsets[i] + kv_bytes;
    index.block_stride = block_stride;
    index.token_stride = shape.index_bytes;
    group->planes.push_back(std::move(index));
  }
  return group;
}

}  // namespace

Result<RankMemory> rank_memory(const Shape& shape, const Topology& topology, uint32_t rank,
                               double spare, uint64_t seed) {
  const uint32_t heads_tp = topology.attention_dp ? 1 : topology.tp;
  const uint32_t pp_rank = rank / topology.tp;
  if (shape.layers < topology.pp) return bad("pair", "more pipeline stages than layers");
  if (!shape.latent && shape.kv_heads % heads_tp != 0 && heads_tp % shape.kv_heads != 0)
    return bad("pair", "heads and tensor-parallel degree do not divide each other");

  const uint64_t needed = (shape.tokens + shape.tokens_per_block - 1) / shape.tokens_per_block;
  const uint64_t block_count =
      std::max<uint64_t>(needed + 1, static_cast<uint64_t>(static_cast<double>(needed) * spare));
  const client::AttentionShape attention = attention_of(shape, topology, rank, block_count);
  const uint64_t layer_bytes =
      block_count * shape.tokens_per_block *
      (shape.head_bytes * (shape.latent ? 1 : uint64_t{2} * attention.head_count) +
       shape.index_bytes);

  RankMemory memory;
  const uint32_t first = shape.layers * pp_rank / topology.pp;
  const uint32_t end = shape.layers * (pp_rank + 1) / topology.pp;
  // Layers with a window and without one are groups of their own.
  for (const uint64_t window : std::vector<uint64_t>{shape.window, 0}) {
    client::AttentionShape layers = attention;
    std::vector<uint64_t> offsets;
    for (uint32_t layer = first; layer < end; ++layer) {
      if (shape.window != 0 && (layer % 2 == 0) != (window != 0)) continue;
      layers.layers.push_back(layer);
      offsets.push_back((layer - first) * layer_bytes);
    }
    if (!layers.layers.empty()) {
      auto group = group_of(shape, layers, offsets);
      if (!group) return group.error();
      group->sliding_window = window;
      group->id_space = static_cast<uint32_t>(memory.layout.groups.size());
      memory.layout.groups.push_back(std::move(*group));
    }
    if (shape.window == 0) break;
  }
  memory.pool_bytes = layer_bytes * (end - first);
  memory.layout.rank = rank;
  memory.layout.rank_count = topology.ranks();
  memory.layout.dp_group = topology.dp_group_of(rank);
  memory.layout.fingerprint = "kvferry-bench " + shape.name;
  memory.layout.pools.push_back({"kv", memory.pool_bytes});
  std::vector<int32_t> ids(block_count);
  std::iota(ids.begin(), ids.end(), 0);
  std::mt19937_64 random(seed);
  std::shuffle(ids.begin(), ids.end(), random);
  ids.resize(needed);
  memory.block_ids = std::move(ids);
  return memory;
}

client::TokenRange needed_tokens(const client::Group& group, uint64_t tokens) {
  if (group.sliding_window == 0 || tokens + 1 <= group.sliding_window) return {0, tokens};
  const uint64_t first = tokens + 1 - group.sliding_window;
  return {first / group.tokens_per_block * group.tokens_per_block, tokens};
}

uint64_t request_bytes(const client::Layout& layout, uint64_t tokens) {
  uint64_t bytes = 0;
  for (const client::Group& group : layout.groups) {
    const client::TokenRange range = needed_tokens(group, tokens);
    for (const client::Plane& plane : group.planes)
      bytes += plane.cell_bytes * plane.unit_count * (range.end - range.begin);
  }
  return bytes;
}

void fill_request(const RankMemory& memory, const RequestCells& request, std::byte* pool) {
  for_each_cell(memory, request, false, [pool](uint64_t at, uint64_t bytes, uint64_t seed) {
    for (; bytes >= 8; bytes -= 8, at += 8, seed += kStep) std::memcpy(pool + at, &seed, 8);
    std::memcpy(pool + at, &seed, bytes);
  });
}

void fill_cells(const RankMemory& memory, uint64_t tokens, uint64_t salt, std::byte* pool) {
  fill_request(memory, {memory.block_ids, tokens, salt}, pool);
}

void fill_untouched(uint64_t pool_bytes, std::byte* pool) {
  std::memset(pool, 0xA5, pool_bytes);
}

Verdict verify_requests(const RankMemory& memory, std::span<const RequestCells> requests,
                        const std::byte* pool) {
  Verdict verdict;
  const auto compare = [&](uint64_t at, uint64_t bytes, uint64_t first, uint64_t step) {
    const uint64_t wrong = wrong_bytes(pool + at, bytes, first, step);
    if (wrong == 0) return;
    if (verdict.wrong_bytes == 0) verdict.first = "pool offset " + std::to_string(at);
    verdict.wrong_bytes += wrong;
  };
  for (const RequestCells& request : requests) {
    for_each_cell(memory, request, true, [&](uint64_t at, uint64_t bytes, uint64_t seed) {
      verdict.cell_bytes += bytes;
      compare(at, bytes, seed, kStep);
    });
  }
  // All blocks of which no request needs a token. The bytes past a prompt in its last block are the
  // sender's and mean nothing.
  for (const client::Group& group : memory.layout.groups) {
    std::vector<uint8_t> used(group.block_count, 0);
    for (const RequestCells& request : requests) {
      const client::TokenRange range = needed_tokens(group, request.tokens);
      for (uint64_t i = range.begin / group.tokens_per_block;
           i * group.tokens_per_block < range.end; ++i)
        used[static_cast<std::size_t>(request.block_ids[i])] = 1;
    }
    for (const client::Plane& plane : group.planes) {
      for (uint64_t block = 0; block < used.size(); ++block) {
        if (used[block] != 0) continue;
        for (uint32_t u = 0; u < plane.unit_count; ++u) {
          for (uint64_t t = 0; t < group.tokens_per_block; ++t)
            compare(plane.offset + block * plane.block_stride + u * plane.unit_stride +
                        t * plane.token_stride,
                    plane.cell_bytes, kUntouched, 0);
          verdict.outside_bytes += plane.cell_bytes * group.tokens_per_block;
        }
      }
    }
  }
  return verdict;
}

Verdict verify(const RankMemory& memory, uint64_t tokens, uint64_t salt, const std::byte* pool) {
  const RequestCells request{memory.block_ids, tokens, salt};
  Verdict verdict = verify_requests(memory, {&request, 1}, pool);
  if (verdict.cell_bytes == 0) {
    verdict.wrong_bytes = 1;
    verdict.first = "no cell";
  }
  return verdict;
}

}  // namespace kvferry::bench
