#include "daemon/mapping/shards.h"

#include <algorithm>
#include <tuple>

namespace kvferry::mapping {
namespace {

// Entries of all candidate lists together. Ordinary instances need a few per rank.
constexpr uint64_t kMaxCandidates = 1 << 24;

using PieceKey = std::vector<uint32_t>;  // cp_index, begin, end, rank of each piece

// Cuts the pieces of one cp index at their edges; each cut lists the ranks that hold it.
void add_segments(Shard& shard, std::span<const uint32_t> flat, uint64_t& budget) {
  struct Edge {
    uint32_t unit;
    bool enters;
    uint32_t rank;
  };
  std::vector<Edge> edges;
  for (std::size_t i = 0; i < flat.size(); i += 4) {
    edges.push_back({flat[i + 1], true, flat[i + 3]});
    edges.push_back({flat[i + 2], false, flat[i + 3]});
  }
  std::sort(edges.begin(), edges.end(), [](const Edge& a, const Edge& b) {
    return std::tie(a.unit, a.enters, a.rank) < std::tie(b.unit, b.enters, b.rank);
  });
  std::vector<uint32_t> active;
  for (std::size_t i = 0; i < edges.size();) {
    const uint32_t unit = edges[i].unit;
    for (; i < edges.size() && edges[i].unit == unit; ++i) {
      const auto at = std::lower_bound(active.begin(), active.end(), edges[i].rank);
      if (edges[i].enters)
        active.insert(at, edges[i].rank);
      else
        active.erase(at);
    }
    if (active.empty() || i == edges.size()) continue;
    if (active.size() > budget) {
      budget = 0;
      return;
    }
    budget -= active.size();
    shard.segments.push_back({flat[0], unit, edges[i].unit,
                              static_cast<uint32_t>(shard.candidates.size()),
                              static_cast<uint32_t>(active.size())});
    shard.candidates.insert(shard.candidates.end(), active.begin(), active.end());
  }
}

PieceKey coverage_of(const Shard& shard) {
  PieceKey covered;
  for (const Shard::Segment& segment : shard.segments) {
    if (!covered.empty() && covered[covered.size() - 3] == segment.cp_index &&
        covered.back() == segment.begin) {
      covered.back() = segment.end;
      continue;
    }
    covered.insert(covered.end(), {segment.cp_index, segment.begin, segment.end});
  }
  return covered;
}

}  // namespace

Result<ShardIndex> ShardIndex::make(const Instance& instance) {
  ShardIndex index;
  for (const Holding& holding : instance.ranks)
    index.dp_groups_.push_back(holding.topology.dp_group);
  std::sort(index.dp_groups_.begin(), index.dp_groups_.end());
  index.dp_groups_.erase(std::unique(index.dp_groups_.begin(), index.dp_groups_.end()),
                         index.dp_groups_.end());
  index.ranks_.resize(index.dp_groups_.size());
  index.shard_of_key_.resize(index.dp_groups_.size());
  index.locals_.resize(instance.ranks.size());
  index.local_planes_.resize(instance.ranks.size());
  std::vector<Piece> pieces;
  for (uint32_t rank = 0; rank < instance.ranks.size(); ++rank)
    index.index_rank(instance.ranks[rank], rank, pieces);
  KVFERRY_RETURN_IF_ERROR(index.build_shards(pieces));
  return index;
}

void ShardIndex::index_rank(const Holding& holding, uint32_t rank, std::vector<Piece>& pieces) {
  struct Held {
    uint32_t key, unit_begin, group, plane;
  };
  std::vector<Held> held;
  const uint32_t dp = dp_position(holding.topology.dp_group);
  ranks_[dp].push_back(rank);
  for (uint32_t g = 0; g < holding.groups.size(); ++g) {
    const Group& group = holding.groups[g];
    for (uint32_t p = 0; p < group.planes.size(); ++p) {
      const Plane& plane = group.planes[p];
      auto role = roles_.find(plane.role);
      if (role == roles_.end())
        role = roles_.emplace(plane.role, static_cast<uint32_t>(roles_.size())).first;
      const uint64_t name = uint64_t{role->second} << 32 | plane.layer;
      const auto [key, fresh] = keys_.emplace(name, key_count());
      if (fresh) first_holder_.emplace_back(&group, &plane);
      held.push_back({key->second, plane.unit_begin, g, p});
      pieces.push_back({dp, key->second, group.cp_size > 1 ? group.cp_index : 0, plane.unit_begin,
                        plane.unit_begin + plane.unit_count, rank});
    }
  }
  std::sort(held.begin(), held.end(), [](const Held& a, const Held& b) {
    return std::tie(a.key, a.unit_begin) < std::tie(b.key, b.unit_begin);
  });
  for (const Held& h : held) {
    auto& locals = locals_[rank];
    if (locals.empty() || locals.back().key != h.key)
      locals.push_back({h.key, h.group, static_cast<uint32_t>(local_planes_[rank].size()), 0});
    ++locals.back().count;
    local_planes_[rank].push_back(h.plane);
  }
}

Status ShardIndex::build_shards(std::vector<Piece>& pieces) {
  std::sort(pieces.begin(), pieces.end());
  std::map<PieceKey, uint32_t> known;
  std::map<PieceKey, uint32_t> coverages;
  uint64_t budget = kMaxCandidates;
  for (std::size_t i = 0; i < pieces.size();) {
    const uint32_t dp = pieces[i].dp;
    const uint32_t key = pieces[i].key;
    PieceKey content;
    for (; i < pieces.size() && pieces[i].dp == dp && pieces[i].key == key; ++i)
      content.insert(content.end(),
                     {pieces[i].cp_index, pieces[i].begin, pieces[i].end, pieces[i].rank});
    const auto [found, fresh] = known.emplace(content, static_cast<uint32_t>(shards_.size()));
    shard_of_key_[dp].emplace_back(key, found->second);
    if (!fresh) continue;
    Shard shard;
    for (std::size_t first = 0; first < content.size();) {
      std::size_t last = first;
      while (last < content.size() && content[last] == content[first]) last += 4;
      add_segments(shard, std::span(content).subspan(first, last - first), budget);
      first = last;
    }
    if (budget == 0)
      return fail(Code::kResourceExhausted, "TOO_FRAGMENTED",
                  "the ranks' unit intervals overlap in too many ways", "ranks");
    shard.coverage = coverages.emplace(coverage_of(shard), static_cast<uint32_t>(coverages.size()))
                         .first->second;
    shards_.push_back(std::move(shard));
  }
  return {};
}

uint32_t ShardIndex::key_of(uint32_t layer, std::string_view role) const {
  const auto found_role = roles_.find(role);
  if (found_role == roles_.end()) return kNone;
  const auto key = keys_.find(uint64_t{found_role->second} << 32 | layer);
  return key == keys_.end() ? kNone : key->second;
}

uint32_t ShardIndex::dp_position(uint32_t dp_group) const {
  const auto at = std::lower_bound(dp_groups_.begin(), dp_groups_.end(), dp_group);
  if (at == dp_groups_.end() || *at != dp_group) return kNone;
  return static_cast<uint32_t>(at - dp_groups_.begin());
}

const Shard* ShardIndex::shard(uint32_t dp_position, uint32_t key) const {
  const auto& shards = shard_of_key_[dp_position];
  const auto at = std::lower_bound(shards.begin(), shards.end(), std::pair{key, uint32_t{0}});
  return at == shards.end() || at->first != key ? nullptr : &shards_[at->second];
}

const ShardIndex::Local* ShardIndex::local(uint32_t rank, uint32_t key) const {
  const auto& locals = locals_[rank];
  const auto at = std::lower_bound(locals.begin(), locals.end(), key,
                                   [](const Local& l, uint32_t k) { return l.key < k; });
  return at == locals.end() || at->key != key ? nullptr : &*at;
}

}  // namespace kvferry::mapping
