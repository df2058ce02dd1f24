// check_compatible: whether one instance can feed another, shape by shape.
#include <algorithm>
#include <set>
#include <tuple>
#include <vector>

#include "daemon/mapping/shards.h"
#include "daemon/mapping/validate.h"

namespace kvferry::mapping {
namespace {

tl::unexpected<Error> incompatible(std::string field, std::string message) {
  return fail(Code::kFailedPrecondition, "INCOMPATIBLE", std::move(message), std::move(field));
}

enum class Covered : uint8_t { kNothing, kPart, kAll };

// How much of the units [begin, end) somebody in the dp group holds, for the cp indices that the
// receiver needs: its own if both deal, else all.
Covered coverage(const Shard& shard, const Group& sender, const Group& receiver,
                 const Plane& plane) {
  const uint64_t begin = plane.unit_begin;
  const uint64_t end = begin + plane.unit_count;
  const bool both_deal = sender.cp_size > 1 && receiver.cp_size > 1;
  uint64_t held = 0;
  for (const Shard::Segment& segment : shard.segments) {
    if (both_deal && segment.cp_index != receiver.cp_index) continue;
    held += intersect({begin, end}, {segment.begin, segment.end}).size();
  }
  const uint64_t wanted = plane.unit_count * (both_deal ? 1 : uint64_t{sender.cp_size});
  return held == wanted ? Covered::kAll : held == 0 ? Covered::kNothing : Covered::kPart;
}

struct Place {
  std::size_t rank, group, plane;
  std::string field(std::string_view name) const {
    return "receiver.ranks[" + std::to_string(rank) + "].groups[" + std::to_string(group) +
           "].planes[" + std::to_string(plane) + "]." + std::string(name);
  }
  std::string group_field(std::string_view name) const {
    return "receiver.ranks[" + std::to_string(rank) + "].groups[" + std::to_string(group) + "]." +
           std::string(name);
  }
};

Status check_shape(const Place& place, const Group& s_group, const Plane& s, const Group& r_group,
                   const Plane& r) {
  const auto differs = [&](const char* name, const auto& mine, const auto& theirs) {
    return incompatible(place.field(name),
                        std::string("the sender's is ") + theirs + ", not " + mine);
  };
  if (r.cell_bytes != s.cell_bytes)
    return differs("cell_bytes", std::to_string(r.cell_bytes), std::to_string(s.cell_bytes));
  if (r.type != s.type) return differs("type", r.type, s.type);
  if (r.units_total != s.units_total)
    return differs("units_total", std::to_string(r.units_total), std::to_string(s.units_total));
  if (r.granularity != s.granularity)
    return incompatible(place.field("granularity"), "the sender's is another");
  const uint64_t block = r_group.tokens_per_block;
  if (r.granularity == Granularity::kBlock &&
      (granule_of(r_group) != block || s_group.tokens_per_block != block ||
       granule_of(s_group) != block))
    return incompatible(place.group_field("tokens_per_block"),
                        "BLOCK planes need one block size, dealt in whole blocks, on both sides");
  if (r_group.cp_size > 1 && s_group.cp_size > 1 &&
      (r_group.cp_size != s_group.cp_size || r_group.cp_interleave != s_group.cp_interleave))
    return incompatible(place.group_field("cp_size"),
                        "both sides deal tokens, and not alike (cp_size, cp_interleave)");
  return {};
}

}  // namespace

Status check_compatible(const Instance& sender, const Instance& receiver) {
  if (sender.ranks.empty() || receiver.ranks.empty())
    return incompatible("ranks", "an instance without ranks");
  if (sender.ranks[0].fingerprint != receiver.ranks[0].fingerprint)
    return incompatible("fingerprint", "the model fingerprints differ");
  auto index = ShardIndex::make(sender);
  if (!index) return tl::unexpected<Error>(std::move(index).error());
  const auto dp_count = static_cast<uint32_t>(index->dp_groups().size());

  // Shards of each key that differ in what they cover; senders of one kind are judged once.
  std::vector<std::vector<std::pair<uint32_t, const Shard*>>> kinds(index->key_count());
  for (uint32_t key = 0; key < index->key_count(); ++key) {
    for (uint32_t dp = 0; dp < dp_count; ++dp) {
      const Shard* shard = index->shard(dp, key);
      const uint32_t kind = shard == nullptr ? kNone : shard->coverage;
      auto& known = kinds[key];
      if (std::none_of(known.begin(), known.end(), [&](const auto& k) { return k.first == kind; }))
        known.emplace_back(kind, shard);
    }
  }

  // BLOCK planes compare block sizes, which may differ between the sender's ranks.
  std::vector<std::set<uint64_t>> block_sizes(index->key_count());
  std::vector<std::vector<const Group*>> sender_groups(index->key_count());
  for (const Holding& rank : sender.ranks)
    for (const Group& group : rank.groups)
      for (const Plane& plane : group.planes) {
        const uint32_t key = index->key_of(plane.layer, plane.role);
        if (block_sizes[key].insert(group.tokens_per_block).second)
          sender_groups[key].push_back(&group);
      }

  using Signature = std::tuple<uint32_t, uint32_t, uint32_t, bool, uint64_t, uint32_t, uint32_t,
                               uint64_t, uint64_t, std::string, uint32_t, Granularity>;
  std::set<Signature> judged;
  for (std::size_t rank = 0; rank < receiver.ranks.size(); ++rank) {
    const Holding& holding = receiver.ranks[rank];
    for (std::size_t g = 0; g < holding.groups.size(); ++g) {
      const Group& group = holding.groups[g];
      for (std::size_t p = 0; p < group.planes.size(); ++p) {
        const Plane& plane = group.planes[p];
        const Place place{rank, g, p};
        const uint32_t key = index->key_of(plane.layer, plane.role);
        if (key == kNone) {
          if (plane.optional) continue;
          return incompatible(place.field("role"), "the sender holds nothing of layer " +
                                                       std::to_string(plane.layer) + " " +
                                                       plane.role);
        }
        if (!judged
                 .emplace(key, plane.unit_begin, plane.unit_count, plane.optional,
                          group.tokens_per_block, group.cp_size, group.cp_index,
                          group.cp_interleave, plane.cell_bytes, plane.type, plane.units_total,
                          plane.granularity)
                 .second)
          continue;
        for (const Group* s_group : sender_groups[key])
          KVFERRY_RETURN_IF_ERROR(
              check_shape(place, *s_group, *index->holder_of(key).second, group, plane));
        for (const auto& [kind, shard] : kinds[key]) {
          const Covered covered =
              shard == nullptr ? Covered::kNothing
                               : coverage(*shard, *index->holder_of(key).first, group, plane);
          if (covered == Covered::kAll || (covered == Covered::kNothing && plane.optional))
            continue;
          return incompatible(place.field("unit_begin"),
                              std::string("a data-parallel group of the sender holds ") +
                                  (covered == Covered::kPart ? "only a part" : "nothing") +
                                  " of these units of layer " + std::to_string(plane.layer) + " " +
                                  plane.role);
        }
      }
    }
  }
  return {};
}

}  // namespace kvferry::mapping
