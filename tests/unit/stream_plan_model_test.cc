// Random transfers against a model that knows nothing of intervals, bundles or plans: it looks at
// every cell by itself. Checked are each stream byte's place on both sides, and every byte of the
// receivers' memory after all slices of all legs have been gathered and scattered in random chunks.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <map>
#include <numeric>
#include <optional>
#include <random>
#include <set>
#include <tuple>

#include "daemon/mapping/coverage.h"
#include "daemon/mapping/plan.h"
#include "kernels/host_copy.h"
#include "tests/unit/mapping_support.h"
#include "tests/unit/packed_support.h"
#include "tests/unit/token_twins.h"
#include "tests/unit/twin_support.h"

using namespace kvferry;
using namespace kvferry::mapping;
using namespace kvferry::mapping::test;

namespace {

// ---- A random pair of instances and one transfer between them -----------------------------------

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  uint64_t below(uint64_t n) { return engine_() % n; }
  uint64_t between(uint64_t low, uint64_t high) { return low + below(high - low + 1); }
  bool one_in(uint64_t n) { return below(n) == 0; }
  template <typename T>
  T pick(std::initializer_list<T> list) {
    return *(list.begin() + below(list.size()));
  }
  template <typename T>
  void shuffle(std::vector<T>& list) {
    for (std::size_t i = list.size(); i > 1; --i) std::swap(list[i - 1], list[below(i)]);
  }
  void fill(std::vector<std::byte>& bytes) {
    for (std::size_t at = 0; at < bytes.size(); at += sizeof(uint64_t)) {
      const uint64_t word = engine_();
      std::memcpy(bytes.data() + at, &word, std::min(sizeof(word), bytes.size() - at));
    }
  }
  // A pool form and a nesting with b before t.
  std::string memory() {
    std::vector<char> nest{'b', 't', 'u'};
    std::string apart;
    for (const char axis : {'l', 'r'}) {
      if (one_in(2))
        apart += axis;
      else
        nest.push_back(axis);
    }
    shuffle(nest);
    auto b = std::find(nest.begin(), nest.end(), 'b');
    auto t = std::find(nest.begin(), nest.end(), 't');
    if (b > t) std::swap(*b, *t);
    return apart + "|" + std::string(nest.begin(), nest.end());
  }

 private:
  std::mt19937_64 engine_;
};

struct Engine {
  std::vector<RankLayout> ranks;
  std::vector<std::vector<GroupBlocks>> blocks;             // [rank][group]
  std::vector<std::vector<std::vector<std::byte>>> memory;  // [rank][pool]
};

struct Model {
  // What all ranks of both sides agree on, per group.
  struct Shape {
    std::vector<std::string> roles;
    uint32_t layers = 1;
    uint32_t first_layer = 0;
    uint32_t heads = 1;
    Granularity granularity = Granularity::kToken;
    uint64_t cell_bytes = 4;
    uint64_t window = 0;
    // Extra layers at the end of the model, which either side may lack.
    bool optional = false;
    bool sender_has = true;
    bool receiver_has = true;
    // As many layers as the first shape's, of the same form: on either side, one storage may serve
    // both. Only the last shape is one.
    bool twin = false;
    bool sender_shares = false;
    bool receiver_shares = false;
  };
  std::vector<Shape> shapes;
  uint64_t prompt = 0;
  uint64_t sender_prompt = 0;
  std::vector<std::vector<uint64_t>> cached;  // [receiver rank][group]

  bool shares(std::size_t g, bool receives) const {
    const Shape& twin = shapes.back();
    return twin.twin && (g == 0 || g + 1 == shapes.size()) &&
           (receives ? twin.receiver_shares : twin.sender_shares);
  }
};

// Cuts one plane of the group into two planes of fewer units each, in the same memory.
void split_a_plane(Group& group, Random& random) {
  Plane& plane = group.planes[random.below(group.planes.size())];
  if (plane.unit_count < 2) return;
  Plane second = plane;
  const auto cut = static_cast<uint32_t>(random.between(1, plane.unit_count - 1));
  plane.unit_count = cut;
  second.unit_begin += cut;
  second.unit_count -= cut;
  second.offset += cut * plane.unit_stride;
  group.planes.insert(
      group.planes.begin() + static_cast<std::ptrdiff_t>(random.below(group.planes.size() + 1)),
      second);
}

Engine make_engine(const Model& model, Random& random, const std::vector<GroupSpec>& bases,
                   const Parallel& parallel, bool receives) {
  Engine engine;
  const bool reverse_groups = random.one_in(2);
  for (uint32_t pp = 0; pp < parallel.pp; ++pp)
    for (uint32_t tp = 0; tp < parallel.tp; ++tp)
      for (uint32_t cp = 0; cp < parallel.cp; ++cp) {
        RankLayout layout;
        layout.topology.rank = static_cast<uint32_t>(engine.ranks.size());
        layout.topology.rank_count = parallel.pp * parallel.tp * parallel.cp;
        layout.topology.dp_group = parallel.attention_dp ? tp : 0;
        layout.fingerprint = "model";
        std::optional<Group> storage;  // of the two groups that share it, as the first has it
        for (std::size_t i = 0; i < bases.size(); ++i) {
          const std::size_t g = reverse_groups ? bases.size() - 1 - i : i;
          const Model::Shape& shape = model.shapes[g];
          if (!(receives ? shape.receiver_has : shape.sender_has)) continue;
          GroupSpec spec = bases[g];
          spec.layers.clear();
          const uint32_t stage = shape.optional ? parallel.pp - 1 - pp : pp;
          for (const uint32_t l : layers_of(shape.layers, parallel.pp, stage))
            spec.layers.push_back(shape.first_layer + l);
          if (spec.layers.empty()) continue;
          spec.units_total = shape.heads;
          spec.units = parallel.attention_dp ? Range{0, shape.heads}
                                             : heads_of(shape.heads, parallel.tp, tp);
          if (spec.granularity != Granularity::kRequest) {
            spec.cp_size = parallel.cp;
            spec.cp_index = cp;
          }
          spec.id_space = static_cast<uint32_t>(i);
          const bool shared = model.shares(g, receives);
          if (shared && storage) {
            Group group = *storage;
            const uint32_t first = group.planes.front().layer;
            for (Plane& plane : group.planes)
              plane.layer = plane.layer - first + spec.layers.front();
            group.sliding_window = spec.window;
            group.tail = spec.tail;
            layout.groups.push_back(std::move(group));
          } else {
            add_group(layout, spec);
            if (shared) storage = layout.groups.back();
          }
          if (random.one_in(4)) random.shuffle(layout.groups.back().planes);
          if (random.one_in(4)) split_a_plane(layout.groups.back(), random);
        }
        if (layout.groups.empty()) continue;
        layout.topology.rank = static_cast<uint32_t>(engine.ranks.size());
        engine.ranks.push_back(std::move(layout));
      }
  for (RankLayout& layout : engine.ranks)
    layout.topology.rank_count = static_cast<uint32_t>(engine.ranks.size());
  return engine;
}

// Random distinct ids for the local blocks of the prompt, holes among them. `free_ids` are those of
// the id space that no group has yet; nothing where it is the first.
GroupBlocks make_blocks(const Group& group, uint32_t number, uint64_t prompt, Random& random,
                        uint64_t hole_one_in, std::optional<std::vector<int32_t>>& free_ids) {
  GroupBlocks blocks;
  blocks.group = number;
  const uint64_t per_entry = group.tokens_per_block * group.blocks_per_id;
  if (!free_ids) {
    free_ids.emplace(group.block_count / group.blocks_per_id);
    std::iota(free_ids->begin(), free_ids->end(), 0);
    random.shuffle(*free_ids);
  }
  const uint64_t entries = (stored_of(group, prompt) + per_entry - 1) / per_entry + random.below(2);
  REQUIRE(free_ids->size() >= entries);
  if (hole_one_in != 0 && random.one_in(3)) blocks.first_block = random.below(entries + 1);
  for (uint64_t i = blocks.first_block; i < entries; ++i) {
    blocks.ids.push_back(hole_one_in != 0 && random.one_in(hole_one_in) ? kHole : free_ids->back());
    free_ids->pop_back();
  }
  return blocks;
}

// ---- The model: one cell at a time --------------------------------------------------------------

// The kernel block and the token in it; nothing for a hole.
std::optional<std::pair<uint64_t, uint64_t>> place_of(const Group& group, const GroupBlocks& blocks,
                                                      uint64_t p) {
  const uint64_t local = local_of(group, p);
  const uint64_t block = local / group.tokens_per_block;
  if (block / group.blocks_per_id < blocks.first_block) return std::nullopt;
  const uint64_t entry = block / group.blocks_per_id - blocks.first_block;
  if (entry >= blocks.ids.size() || blocks.ids[entry] == kHole) return std::nullopt;
  return std::pair{
      static_cast<uint64_t>(blocks.ids[entry]) * group.blocks_per_id + block % group.blocks_per_id,
      local % group.tokens_per_block};
}

struct Where {
  uint32_t pool = 0;
  uint64_t offset = 0;
  auto operator<=>(const Where&) const = default;
};

Where address(const Plane& plane, uint64_t unit, std::pair<uint64_t, uint64_t> place) {
  return {plane.pool,
          plane.offset + place.first * plane.block_stride +
              (unit - plane.unit_begin) * plane.unit_stride +
              (plane.granularity == Granularity::kToken ? place.second * plane.token_stride : 0)};
}

const Plane* holds(const RankLayout& layout, uint32_t layer, const std::string& role, uint64_t unit,
                   uint64_t p, uint32_t* group = nullptr) {
  for (uint32_t g = 0; g < layout.groups.size(); ++g)
    for (const Plane& plane : layout.groups[g].planes)
      if (plane.layer == layer && plane.role == role && unit >= plane.unit_begin &&
          unit < uint64_t{plane.unit_begin} + plane.unit_count && stores(layout.groups[g], p)) {
        if (group != nullptr) *group = g;
        return &plane;
      }
  return nullptr;
}

std::optional<uint32_t> owner(const Engine& senders, uint32_t dp, uint32_t g, uint32_t layer,
                              const std::string& role, uint64_t unit, uint64_t p) {
  std::vector<uint32_t> candidates;
  for (uint32_t s = 0; s < senders.ranks.size(); ++s)
    if (senders.ranks[s].topology.dp_group == dp &&
        holds(senders.ranks[s], layer, role, unit, p) != nullptr)
      candidates.push_back(s);
  if (candidates.empty()) return std::nullopt;
  return candidates[g % candidates.size()];
}

struct Slice {
  std::vector<Range> tokens;  // [model group], as the caller says
  std::optional<Range> layers;
};

bool offered(const Group& group, const GroupBlocks& blocks, uint64_t prompt, Range tokens,
             uint64_t p) {
  const auto edge = [&](uint64_t x) {
    return x == prompt ? up(x, granule(group)) : down(x, granule(group));
  };
  return p >= edge(tokens.begin) && p < edge(tokens.end) && place_of(group, blocks, p);
}

struct Cell {
  // Bundle: pair, granularity, cell bytes, units, order.
  uint32_t receiver_group, sender_group, receiver_plane;
  const Plane* receiver_shape;
  uint64_t unit, position;
  Where from, to;
  std::string order;
};

// ---- One run ------------------------------------------------------------------------------------

struct Run {
  Model model;
  Engine senders, receivers;
  std::vector<Slice> slices;
  uint32_t dp = 0;  // the sender's dp group that ran the prefill

  std::size_t model_group(const RankLayout& layout, std::size_t g) const {
    const Plane& plane = layout.groups[g].planes[0];
    for (std::size_t i = 0; i < model.shapes.size(); ++i) {
      const Model::Shape& shape = model.shapes[i];
      if (plane.layer < shape.first_layer || plane.layer >= shape.first_layer + shape.layers)
        continue;
      for (const std::string& role : shape.roles)
        if (role == plane.role) return i;
    }
    return SIZE_MAX;
  }
  uint64_t prompt_of(std::size_t i, uint64_t tokens) const {
    return model.shapes[i].granularity == Granularity::kRequest ? 1 : tokens;
  }
};

Run make_run(uint64_t seed) {
  Random random(seed);
  Run run;
  Model& model = run.model;
  const bool equal_blocks = random.one_in(2);
  const uint64_t block = random.pick<uint64_t>({1, 2, 4, 8});
  const bool both_cp = random.one_in(8);
  const bool sender_cp = both_cp || random.one_in(5);
  const bool receiver_cp = both_cp || (!sender_cp && random.one_in(5));
  const auto cp = static_cast<uint32_t>(random.between(2, 3));

  Parallel sender;
  sender.tp = static_cast<uint32_t>(random.between(1, 4));
  sender.pp = static_cast<uint32_t>(random.between(1, 2));
  sender.cp = sender_cp ? cp : 1;
  sender.attention_dp = random.one_in(4);
  Parallel receiver;
  receiver.tp = static_cast<uint32_t>(random.between(1, 5));
  receiver.pp = static_cast<uint32_t>(random.between(1, 3));
  receiver.cp = receiver_cp ? cp : 1;
  receiver.attention_dp = random.one_in(4);

  const auto layers = static_cast<uint32_t>(random.between(1, 5));
  const bool mla = random.one_in(3);
  Model::Shape kv;
  kv.roles = mla ? std::vector<std::string>{"latent"} : std::vector<std::string>{"key", "value"};
  if (random.one_in(5)) kv.roles.push_back("indexer_key");
  kv.layers = layers;
  kv.heads = mla ? 1 : static_cast<uint32_t>(random.between(1, 7));
  kv.cell_bytes = random.pick<uint64_t>({1, 4, 6, 16, 48});
  if (random.one_in(4)) kv.window = random.between(1, 30);
  model.shapes.push_back(kv);
  const uint64_t interleave = random.one_in(2) ? block : 1;
  const bool scales =
      equal_blocks && (interleave == block || (!sender_cp && !receiver_cp)) && random.one_in(3);
  if (scales) {
    Model::Shape shape;
    shape.roles = {"key_scale"};
    shape.layers = layers;
    shape.heads = kv.heads;
    shape.granularity = Granularity::kBlock;
    shape.cell_bytes = random.pick<uint64_t>({2, 4});
    model.shapes.push_back(shape);
  }
  if (random.one_in(4)) {
    Model::Shape state;
    state.roles = {"ssm", "conv.x"};
    state.layers = static_cast<uint32_t>(random.between(1, 3));
    state.first_layer = 20;
    state.heads = static_cast<uint32_t>(random.between(1, 4));
    state.granularity = Granularity::kRequest;
    state.cell_bytes = random.pick<uint64_t>({8, 10});
    model.shapes.push_back(state);
  }
  if (random.one_in(4)) {
    Model::Shape extra;
    extra.roles = {"mtp.key", "mtp.value"};
    extra.layers = static_cast<uint32_t>(random.between(1, 3));
    extra.first_layer = 12;
    extra.heads = static_cast<uint32_t>(random.between(1, 4));
    extra.cell_bytes = random.pick<uint64_t>({2, 16});
    extra.optional = true;
    extra.sender_has = !random.one_in(3);
    extra.receiver_has = !extra.sender_has || !random.one_in(3);
    model.shapes.push_back(extra);
  }
  if (random.one_in(4)) {
    Model::Shape twin = model.shapes.front();
    twin.first_layer = 30;
    twin.window = random.between(1, 30);
    twin.twin = true;
    twin.sender_shares = random.one_in(2);
    twin.receiver_shares = !twin.sender_shares || random.one_in(2);
    model.shapes.push_back(twin);
  }
  model.prompt = random.between(1, 60);
  model.sender_prompt = model.prompt + (random.one_in(3) ? random.below(20) : 0);

  std::vector<GroupSpec> sender_specs, receiver_specs;
  for (std::size_t g = 0; g < model.shapes.size(); ++g) {
    const Model::Shape& shape = model.shapes[g];
    for (const bool receives : {false, true}) {
      std::vector<GroupSpec>& specs = receives ? receiver_specs : sender_specs;
      if (g != 0 && model.shares(g, receives)) {
        specs.push_back(specs.front());
        specs.back().window = receives ? shape.window : 0;
        continue;
      }
      GroupSpec spec;
      spec.roles = shape.roles;
      spec.granularity = shape.granularity;
      spec.cell_bytes = shape.cell_bytes;
      spec.optional = shape.optional;
      spec.window = receives ? shape.window : 0;
      spec.tail = random.one_in(3) ? Tail::kZero : Tail::kLeave;
      spec.memory = random.memory();
      spec.padding = random.one_in(3) ? random.pick<uint64_t>({1, 16}) : 0;
      const bool deals = receives ? receiver_cp : sender_cp;
      spec.block = equal_blocks || both_cp ? block : random.pick<uint64_t>({1, 2, 3, 4, 6, 16});
      if (deals) {
        spec.interleave = std::gcd(interleave, spec.block);
        if (both_cp) spec.interleave = interleave;
      }
      spec.blocks_per_id = random.one_in(4) ? 2 : 1;
      spec.block_count = (128 / spec.block + 8) * spec.blocks_per_id;
      if (model.shares(g, receives)) spec.block_count *= 2;
      if (shape.granularity == Granularity::kRequest) {
        spec.block = 1;
        spec.interleave = 0;
        spec.block_count = 4;
        spec.blocks_per_id = 1;
      }
      if (shape.granularity == Granularity::kBlock) spec.interleave = deals ? spec.block : 0;
      specs.push_back(spec);
    }
  }
  run.senders = make_engine(model, random, sender_specs, sender, false);
  run.receivers = make_engine(model, random, receiver_specs, receiver, true);
  run.dp = sender.attention_dp
               ? run.senders.ranks[random.below(run.senders.ranks.size())].topology.dp_group
               : 0;

  // Cached prefixes: the same on all ranks, or each rank its own.
  const bool apart = random.one_in(3);
  for (std::size_t rank = 0; rank < run.receivers.ranks.size(); ++rank) {
    std::vector<uint64_t> own;
    for (const Model::Shape& shape : model.shapes)
      own.push_back(shape.granularity == Granularity::kRequest ? random.below(2)
                    : random.one_in(2)                         ? 0
                    : random.one_in(3)                         ? model.prompt
                                                               : random.below(model.prompt + 2));
    if (apart && random.one_in(3))
      for (std::size_t m = 0; m < own.size(); ++m) own[m] = run.prompt_of(m, model.prompt);  // all
    model.cached.push_back(apart || rank == 0 ? own : model.cached.front());
  }

  const bool sender_holes = random.one_in(4);
  const bool receiver_holes = random.one_in(4);
  for (const bool receives : {false, true}) {
    Engine& engine = receives ? run.receivers : run.senders;
    for (const RankLayout& layout : engine.ranks) {
      auto& blocks = engine.blocks.emplace_back();
      std::map<uint32_t, std::optional<std::vector<int32_t>>> free_ids;  // by id space
      for (uint32_t g = 0; g < layout.groups.size(); ++g)
        blocks.push_back(make_blocks(layout.groups[g], g,
                                     run.prompt_of(run.model_group(layout, g),
                                                   receives ? model.prompt : model.sender_prompt),
                                     random, (receives ? receiver_holes : sender_holes) ? 5 : 0,
                                     free_ids[layout.groups[g].id_space]));
      auto& memory = engine.memory.emplace_back();
      for (const PoolSpan& pool : layout.pools) {
        memory.emplace_back(pool.bytes);
        random.fill(memory.back());
      }
    }
  }

  // Slices: token ranges of the sender's prompt, each perhaps cut by layers.
  std::vector<uint64_t> cuts{0, model.sender_prompt};
  while (random.one_in(2)) cuts.push_back(random.below(model.sender_prompt + 1));
  std::sort(cuts.begin(), cuts.end());
  for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
    std::vector<std::optional<Range>> parts{std::nullopt};
    if (random.one_in(3)) {
      const uint64_t cut = random.between(1, 22);
      parts = {Range{0, cut}, Range{cut, 65536}};
    }
    for (const auto& part : parts) {
      Slice slice;
      slice.layers = part;
      for (const Model::Shape& shape : model.shapes)
        slice.tokens.push_back(shape.granularity != Granularity::kRequest
                                   ? Range{cuts[i], cuts[i + 1]}
                                   : Range{0, i + 2 == cuts.size() ? uint64_t{1} : uint64_t{0}});
      run.slices.push_back(slice);
    }
  }
  return run;
}

// The cells of one slice on one leg, in stream order, from the definitions alone.
std::vector<Cell> cells_of(const Run& run, const Slice& slice, uint32_t s, uint32_t g) {
  const RankLayout& from = run.senders.ranks[s];
  const RankLayout& to = run.receivers.ranks[g];
  const Holding holding = holding_of(to);
  std::vector<Cell> cells;
  for (uint32_t rg = 0; rg < to.groups.size(); ++rg) {
    const Group& group = to.groups[rg];
    const std::size_t m = run.model_group(to, rg);
    const uint64_t prompt = run.prompt_of(m, run.model.prompt);
    const uint64_t sender_prompt = run.prompt_of(m, run.model.sender_prompt);
    const uint64_t cached = run.model.cached[g][m];
    if (cached >= prompt) continue;
    uint64_t n0 = down(cached, granule(group));
    if (group.sliding_window != 0 && prompt + 1 > group.sliding_window)
      n0 = std::max(n0, prompt + 1 - group.sliding_window);
    if (n0 >= prompt) continue;
    for (uint32_t rp = 0; rp < group.planes.size(); ++rp) {
      const Plane& plane = group.planes[rp];
      if (slice.layers && (plane.layer < slice.layers->begin || plane.layer >= slice.layers->end))
        continue;
      for (uint64_t unit = plane.unit_begin; unit < uint64_t{plane.unit_begin} + plane.unit_count;
           ++unit) {
        for (uint64_t p = down(n0, granule(group)); p < up(prompt, granule(group)); ++p) {
          if (!stores(group, p)) continue;
          const auto place = place_of(group, run.receivers.blocks[g][rg], p);
          if (!place) continue;
          if (plane.granularity == Granularity::kBlock && place->second != 0) continue;
          if (owner(run.senders, run.dp, g, plane.layer, plane.role, unit, p) != s) continue;
          uint32_t sg = 0;
          const Plane* source = holds(from, plane.layer, plane.role, unit, p, &sg);
          const Group& sender_group = from.groups[sg];
          if (p < down(n0, granule(sender_group)) || p >= up(prompt, granule(sender_group)))
            continue;
          const GroupBlocks& blocks = run.senders.blocks[s][sg];
          if (!offered(sender_group, blocks, sender_prompt, slice.tokens[m], p)) continue;
          cells.push_back({rg, sg, rp, &plane, unit, p,
                           address(*source, unit, *place_of(sender_group, blocks, p)),
                           address(plane, unit, *place), holding.groups[rg].planes[rp].order});
        }
      }
    }
  }
  // The set of units of a plane on this leg belongs to its bundle's identity. It follows from the
  // holdings, not from what this slice moves.
  std::map<std::pair<uint32_t, uint32_t>, std::set<uint64_t>> units;
  for (const Cell& cell : cells)
    units[{cell.receiver_group, cell.receiver_plane}].insert(cell.unit);
  const auto bundle_of = [&](const Cell& cell) {
    return std::tuple{cell.receiver_group,
                      cell.sender_group,
                      cell.receiver_shape->granularity,
                      cell.receiver_shape->cell_bytes,
                      units[{cell.receiver_group, cell.receiver_plane}],
                      cell.order};
  };
  using Bundle = decltype(bundle_of(cells[0]));
  struct Place {
    uint64_t alignment;
    std::pair<uint32_t, uint32_t> first_plane;
    std::map<std::string, uint64_t> roles;
  };
  std::map<Bundle, Place> bundles;
  for (const Cell& cell : cells) {  // in list order
    uint64_t alignment = 16;
    while (cell.receiver_shape->cell_bytes % alignment != 0) alignment /= 2;
    Place& place =
        bundles
            .try_emplace(bundle_of(cell),
                         Place{alignment, {cell.receiver_group, cell.receiver_plane}, {}})
            .first->second;
    place.roles.try_emplace(cell.receiver_shape->role, place.roles.size());
  }
  const auto sort_key = [&](const Cell& cell) {
    const Place& place = bundles.at(bundle_of(cell));
    const Group& group = to.groups[cell.receiver_group];
    const uint64_t local = local_of(group, cell.position);
    std::vector<uint64_t> key{16 - place.alignment, place.first_plane.first,
                              place.first_plane.second};
    for (const char axis : cell.order) {
      if (axis == 'l') key.push_back(cell.receiver_shape->layer);
      if (axis == 'r') key.push_back(place.roles.at(cell.receiver_shape->role));
      if (axis == 'b') key.push_back(local / group.tokens_per_block);
      if (axis == 't') key.push_back(local % group.tokens_per_block);
      if (axis == 'u') key.push_back(cell.unit);
    }
    return key;
  };
  std::vector<std::pair<std::vector<uint64_t>, std::size_t>> order;
  for (std::size_t i = 0; i < cells.size(); ++i) order.emplace_back(sort_key(cells[i]), i);
  std::sort(order.begin(), order.end());
  std::vector<Cell> sorted;
  for (const auto& [key, i] : order) sorted.push_back(cells[i]);
  return sorted;
}

// Every stream byte of the plan, and whether its runs are maximal.
std::vector<Where> bytes_of(const Plan& plan, uint64_t begin, uint64_t end) {
  std::vector<Where> bytes;
  bytes.reserve(end - begin);
  uint64_t expected = begin;
  bool in_order = true;
  bool maximal = true;
  std::optional<Where> last_end;
  plan.for_each_run(begin, end - begin,
                    [&](uint32_t pool, uint64_t offset, uint64_t at, uint64_t length) {
                      in_order = in_order && at == expected && length > 0;
                      maximal = maximal && last_end != Where{pool, offset};
                      for (uint64_t i = 0; i < length; ++i) bytes.push_back({pool, offset + i});
                      expected += length;
                      last_end = Where{pool, offset + length};
                    });
  REQUIRE(in_order);
  REQUIRE(maximal);
  REQUIRE(expected == end);
  return bytes;
}

std::vector<std::byte*> bases_of(std::vector<std::vector<std::byte>>& memory) {
  std::vector<std::byte*> bases;
  for (auto& pool : memory) bases.push_back(pool.data());
  return bases;
}

// The cells at or past the prompt's end, in the blocks where a cell of the same plane and unit has
// come: what a tail of zeros clears.
std::set<std::pair<Where, uint64_t>> tail_of(const Run& run, uint32_t g,
                                             const std::vector<Cell>& cells) {
  const RankLayout& to = run.receivers.ranks[g];
  std::set<std::pair<Where, uint64_t>> tail;  // place and bytes
  for (const Cell& cell : cells) {
    const Group& group = to.groups[cell.receiver_group];
    const Plane& plane = *cell.receiver_shape;
    if (group.tail != Tail::kZero || plane.granularity != Granularity::kToken) continue;
    const uint64_t block = group.tokens_per_block;
    const auto place =
        *place_of(group, run.receivers.blocks[g][cell.receiver_group], cell.position);
    for (uint64_t token = 0; token < block; ++token)
      if (position_of(group, down(local_of(group, cell.position), block) + token) >=
          run.model.prompt)
        tail.insert({address(plane, cell.unit, {place.first, token}), plane.cell_bytes});
  }
  return tail;
}

constexpr uint64_t kEnoughSeeds = 2000;  // for what the generator is to reach
#ifdef __SANITIZE_ADDRESS__
constexpr uint64_t kUsualSeeds = 300;  // many times slower
#else
constexpr uint64_t kUsualSeeds = kEnoughSeeds;
#endif

struct Totals {
  uint64_t legs = 0, cells = 0, bytes = 0, bundles = 0, incomplete = 0;
  uint64_t optional_moved = 0, only_optional = 0, packed = 0, by_kernels = 0;
  uint64_t tail_cells = 0, shared_cells = 0, some_full = 0;
};

// A chunk's way by the kernels' twin.
void copy_by_kernels(const kernels::test::TwinSide& from, const kernels::test::TwinSide& to,
                     Range chunk, bool fused) {
  using kernels::CopyKind;
  using kernels::TwinResult;
  if (fused) {
    REQUIRE(twin_transfer(from, to, chunk.begin, chunk.size(), 0) == TwinResult::kOk);
    return;
  }
  std::vector<std::byte> buffer(chunk.size());
  REQUIRE(twin_copy(CopyKind::kGather, from, chunk.begin, chunk.size(), buffer.data(), 0) ==
          TwinResult::kOk);
  REQUIRE(twin_copy(CopyKind::kScatter, to, chunk.begin, chunk.size(), buffer.data(), 0) ==
          TwinResult::kOk);
}

std::vector<uint64_t> sizes_of(const std::vector<std::vector<std::byte>>& memory) {
  std::vector<uint64_t> sizes;
  for (const auto& pool : memory) sizes.push_back(pool.size());
  return sizes;
}

void check_run(Run& run, Random& random, Totals& totals) {
  for (const Engine* engine : {&run.senders, &run.receivers})
    for (const RankLayout& layout : engine->ranks) {
      const Status status = validate_layout(layout);
      INFO((status ? "" : status.error().to_string()));
      REQUIRE(status);
    }
  const auto table = table_of(run.senders.ranks, run.receivers.ranks);
  auto expected_memory = run.receivers.memory;
  uint64_t full_ranks = 0;
  for (uint32_t g = 0; g < run.receivers.ranks.size(); ++g) {
    const RankLayout& to = run.receivers.ranks[g];
    std::vector<GroupReceive> receives;
    for (uint32_t rg = 0; rg < to.groups.size(); ++rg)
      receives.push_back({run.model.prompt, run.model.cached[g][run.model_group(to, rg)],
                          run.receivers.blocks[g][rg]});
    const auto needs = compute_needs(to, receives);
    INFO((needs ? "" : needs.error().to_string()));
    REQUIRE(needs);
    if (needs->empty()) ++full_ranks;
    bool required = false;
    for (const Group& group : to.groups) required = required || !group.planes[0].optional;
    if (!required) ++totals.only_optional;
    const auto legs = table->legs_of_receiver(run.dp, g);
    REQUIRE(legs);
    std::set<uint32_t> data;
    for (const Leg& leg : *legs)
      if (!leg.empty) data.insert(leg.sender_rank);
    for (uint32_t s = 0; s < run.senders.ranks.size(); ++s) {
      const RankLayout& from = run.senders.ranks[s];
      if (from.topology.dp_group != run.dp) continue;
      ++totals.legs;
      auto coverage = LegCoverage::make(*table, s, g, *needs);
      REQUIRE(coverage);
      uint64_t received = 0;
      for (const Slice& slice : run.slices) {
        std::vector<GroupOffer> offers;
        for (uint32_t sg = 0; sg < from.groups.size(); ++sg) {
          const std::size_t m = run.model_group(from, sg);
          offers.push_back({run.model.sender_prompt, slice.tokens[m], run.senders.blocks[s][sg]});
        }
        const auto offer = round_offer(from, offers);
        REQUIRE(offer);
        const auto stream = compile_stream(*table, s, g, *needs, *offer, slice.layers);
        REQUIRE(stream);
        const std::vector<Cell> cells = cells_of(run, slice, s, g);
        if (!cells.empty()) REQUIRE(data.contains(s));
        uint64_t bytes = 0;
        for (const Cell& cell : cells) {
          bytes += cell.receiver_shape->cell_bytes;
          if (cell.receiver_shape->optional) ++totals.optional_moved;
          const std::size_t m = run.model_group(to, cell.receiver_group);
          if (run.model.shares(m, false) || run.model.shares(m, true)) ++totals.shared_cells;
        }
        REQUIRE(stream->bytes == bytes);
        REQUIRE(coverage->add(*offer, slice.layers));
        received += bytes;
        totals.cells += cells.size();
        totals.bytes += bytes;
        totals.bundles += stream->bundles.size();

        const auto source = bind_plan(*stream, Side::kSender, from, run.senders.blocks[s]);
        const auto destination = bind_plan(*stream, Side::kReceiver, to, run.receivers.blocks[g]);
        REQUIRE(source);
        REQUIRE(destination);
        std::vector<Where> from_bytes, to_bytes;
        for (const Cell& cell : cells)
          for (uint64_t i = 0; i < cell.receiver_shape->cell_bytes; ++i) {
            from_bytes.push_back({cell.from.pool, cell.from.offset + i});
            to_bytes.push_back({cell.to.pool, cell.to.offset + i});
            expected_memory[g][cell.to.pool][cell.to.offset + i] =
                run.senders.memory[s][cell.from.pool][cell.from.offset + i];
          }
        REQUIRE(bytes_of(*source, 0, bytes) == from_bytes);
        REQUIRE(bytes_of(*destination, 0, bytes) == to_bytes);
        uint64_t fragments = 0;
        for (uint64_t i = 0; i < bytes; ++i)
          if (i == 0 ||
              from_bytes[i] != Where{from_bytes[i - 1].pool, from_bytes[i - 1].offset + 1} ||
              to_bytes[i] != Where{to_bytes[i - 1].pool, to_bytes[i - 1].offset + 1})
            ++fragments;
        REQUIRE(fragment_count(*source, *destination) == fragments);

        // The same bytes by way of a packed copy.
        std::vector<std::byte> whole(bytes);
        REQUIRE(kernels::gather(source->form(), bases_of(run.senders.memory[s]), 0, bytes,
                                whole.data()));
        REQUIRE(packed_stream(from, run.senders.blocks[s], bases_of(run.senders.memory[s]), *offer,
                              slice.layers, *stream) == whole);
        if (bytes > 0) ++totals.packed;

        // In chunks that cut cells, in any order.
        std::vector<Range> chunks;
        const uint64_t step = random.between(1, std::max<uint64_t>(1, bytes / 3));
        for (uint64_t at = 0; at < bytes; at += step)
          chunks.push_back({at, std::min(bytes, at + step)});
        random.shuffle(chunks);
        const auto source_bases = bases_of(run.senders.memory[s]);
        const auto destination_bases = bases_of(run.receivers.memory[g]);
        const auto source_sizes = sizes_of(run.senders.memory[s]);
        const auto destination_sizes = sizes_of(run.receivers.memory[g]);
        bool copied = true;
        for (const Range& chunk : chunks) {
          if (random.one_in(2)) {
            copy_by_kernels({source->form(), source_bases, source_sizes},
                            {destination->form(), destination_bases, destination_sizes}, chunk,
                            random.one_in(3));
            ++totals.by_kernels;
            continue;
          }
          if (random.one_in(3)) {
            copied = copied && kernels::transfer(source->form(), source_bases, destination->form(),
                                                 destination_bases, chunk.begin, chunk.size());
            continue;
          }
          std::vector<std::byte> buffer(chunk.size());
          copied = copied &&
                   kernels::gather(source->form(), source_bases, chunk.begin, chunk.size(),
                                   buffer.data()) &&
                   kernels::scatter(destination->form(), destination_bases, chunk.begin,
                                    chunk.size(), buffer.data());
        }
        REQUIRE(copied);

        const auto cleared = tail_of(run, g, cells);
        std::vector<uint64_t> prompts;
        for (uint32_t rg = 0; rg < to.groups.size(); ++rg)
          prompts.push_back(run.prompt_of(run.model_group(to, rg), run.model.prompt));
        const auto tail = bind_tail(*stream, to, run.receivers.blocks[g], prompts);
        REQUIRE(tail);
        REQUIRE(kernels::clear(tail->form(), destination_bases));
        uint64_t cleared_bytes = 0;
        for (const auto& [at, size] : cleared) {
          std::fill_n(expected_memory[g][at.pool].begin() + static_cast<std::ptrdiff_t>(at.offset),
                      size, std::byte{0});
          cleared_bytes += size;
        }
        REQUIRE(tail->bytes() == cleared_bytes);
        totals.tail_cells += cleared.size();
      }
      REQUIRE(received <= coverage->expected_bytes());
      REQUIRE((received == coverage->expected_bytes()) == !coverage->missing().has_value());
      if (coverage->missing()) ++totals.incomplete;
    }
  }
  if (full_ranks > 0 && full_ranks < run.receivers.ranks.size()) ++totals.some_full;
  REQUIRE(run.receivers.memory == expected_memory);
}

}  // namespace

TEST_CASE("random transfers put every byte where a cell-by-cell model puts it") {
  // Other seeds in each run. KVFERRY_SEED replays one; KVFERRY_SEEDS says how many.
  const char* given = std::getenv("KVFERRY_SEED");
  const char* many = std::getenv("KVFERRY_SEEDS");
  const uint64_t first =
      given != nullptr ? std::strtoull(given, nullptr, 10) : std::random_device()();
  const uint64_t count = many != nullptr    ? std::strtoull(many, nullptr, 10)
                         : given != nullptr ? 1
                                            : kUsualSeeds;
  std::cout << "KVFERRY_SEED=" << first << " KVFERRY_SEEDS=" << count << std::endl;
  Totals totals;
  for (uint64_t seed = first; seed < first + count; ++seed) {
    INFO("seed " << seed);
    Run run = make_run(seed);
    Random random(seed * 7919);
    check_run(run, random, totals);
  }
  if (count < kEnoughSeeds) return;
  // The generator reaches what it is meant to reach.
  CHECK(totals.legs > 1000);
  CHECK(totals.cells > 100000);
  CHECK(totals.bundles > 1000);
  CHECK(totals.incomplete > 10);
  CHECK(totals.optional_moved > 1000);
  CHECK(totals.only_optional > 10);
  CHECK(totals.packed > 1000);
  CHECK(totals.by_kernels > 1000);
  CHECK(totals.tail_cells > 10000);
  CHECK(totals.shared_cells > 10000);
  CHECK(totals.some_full > 50);
}
