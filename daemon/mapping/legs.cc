#include "daemon/mapping/legs.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "daemon/mapping/limits.h"
#include "daemon/mapping/shards.h"
#include "daemon/mapping/validate.h"

namespace kvferry::mapping {
namespace {

// Segments looked at for one pair of dp groups; ordinary pairs need some thousands.
constexpr uint64_t kMaxSegmentSteps = 1 << 26;
// Pairs of dp groups that are remembered; beyond it all are forgotten and worked out anew.
constexpr std::size_t kMaxRemembered = 4096;

Result<void> prefixed(Status status, std::string_view prefix) {
  if (status) return {};
  Error error = std::move(status).error();
  error.field.insert(0, prefix);
  return tl::unexpected<Error>(std::move(error));
}

// Calls fn(units, owner) for the receiver plane's units that somebody in the shard holds, ascending
// within each cp index.
template <typename Fn>
void for_each_owner(const Shard& shard, const Group& receiver_group, const Plane& plane,
                    uint32_t sender_cp_size, uint32_t g, Fn&& fn) {
  const Range wanted{plane.unit_begin, uint64_t{plane.unit_begin} + plane.unit_count};
  const bool both_deal = sender_cp_size > 1 && receiver_group.cp_size > 1;
  for (const Shard::Segment& segment : shard.segments) {
    if (both_deal && segment.cp_index != receiver_group.cp_index) continue;
    const Range units = intersect(wanted, {segment.begin, segment.end});
    if (!units.empty()) fn(units, shard.candidates[segment.first + g % segment.count]);
  }
}

}  // namespace

struct LegTable::Index {
  ShardIndex senders;
  std::vector<std::vector<uint32_t>> receiver_keys;  // per rank: of each plane in list order
};

// Legs of one pair of dp groups.
struct LegTable::DpLegs {
  std::vector<Leg> by_receiver;  // by receiver rank, then sender rank
  std::vector<Leg> by_sender;    // by sender rank, then receiver rank
};

LegTable::LegTable(std::shared_ptr<const Instance> sender, std::shared_ptr<const Instance> receiver)
    : sender_(std::move(sender)), receiver_(std::move(receiver)) {}
LegTable::~LegTable() = default;

Result<std::shared_ptr<const LegTable>> LegTable::make(std::shared_ptr<const Instance> sender,
                                                       std::shared_ptr<const Instance> receiver) {
  KVFERRY_RETURN_IF_ERROR(prefixed(validate_instance(*sender), "sender."));
  KVFERRY_RETURN_IF_ERROR(prefixed(validate_instance(*receiver), "receiver."));
  KVFERRY_RETURN_IF_ERROR(check_compatible(*sender, *receiver));
  std::shared_ptr<LegTable> table(new LegTable(std::move(sender), std::move(receiver)));
  auto senders = ShardIndex::make(table->sender());
  if (!senders) return tl::unexpected<Error>(std::move(senders).error());

  auto index = std::make_unique<Index>();
  index->senders = std::move(*senders);
  for (const Holding& holding : table->receiver().ranks) {
    std::vector<uint32_t>& keys = index->receiver_keys.emplace_back();
    for (const Group& group : holding.groups)
      for (const Plane& plane : group.planes)
        keys.push_back(index->senders.key_of(plane.layer, plane.role));
    table->receiver_dp_.push_back(holding.topology.dp_group);
  }
  std::sort(table->receiver_dp_.begin(), table->receiver_dp_.end());
  table->receiver_dp_.erase(std::unique(table->receiver_dp_.begin(), table->receiver_dp_.end()),
                            table->receiver_dp_.end());
  table->sender_dp_.assign(index->senders.dp_groups().begin(), index->senders.dp_groups().end());
  table->index_ = std::move(index);
  return table;
}

Result<std::shared_ptr<const LegTable::DpLegs>> LegTable::work_out(uint32_t sender_dp,
                                                                   uint32_t receiver_dp) const {
  const uint32_t dp = index_->senders.dp_position(sender_dp);
  const std::span<const uint32_t> senders = index_->senders.ranks_of(dp);
  std::vector<uint32_t> receivers;
  for (uint32_t g = 0; g < receiver_->ranks.size(); ++g)
    if (receiver_->ranks[g].topology.dp_group == receiver_dp) receivers.push_back(g);

  auto legs = std::make_shared<DpLegs>();
  std::vector<bool> sends(sender_->ranks.size());
  std::vector<bool> receives(receiver_->ranks.size());
  uint64_t steps = kMaxSegmentSteps;
  for (const uint32_t g : receivers) {
    std::vector<uint32_t> owners;
    // Planes that differ only in their layer or role have the same owners.
    using Seen = std::tuple<const Shard*, uint32_t, uint32_t, uint32_t, uint32_t>;
    std::vector<Seen> seen;
    std::size_t number = 0;
    for (const Group& group : receiver_->ranks[g].groups) {
      for (const Plane& plane : group.planes) {
        const uint32_t key = index_->receiver_keys[g][number++];
        const Shard* shard = key == kNone ? nullptr : index_->senders.shard(dp, key);
        if (shard == nullptr) continue;
        const uint32_t cp_size = index_->senders.holder_of(key).first->cp_size;
        const uint32_t cp_index = cp_size > 1 && group.cp_size > 1 ? group.cp_index : kNone;
        const Seen now{shard, plane.unit_begin, plane.unit_count, cp_size, cp_index};
        if (std::find(seen.rbegin(), seen.rend(), now) != seen.rend()) continue;
        if (seen.size() < 64) seen.push_back(now);
        if (shard->segments.size() > steps)
          return fail(Code::kResourceExhausted, "TOO_FRAGMENTED",
                      "the instances' unit intervals make too many pieces", "ranks");
        steps -= shard->segments.size();
        for_each_owner(*shard, group, plane, cp_size, g,
                       [&](Range, uint32_t owner) { owners.push_back(owner); });
      }
    }
    std::sort(owners.begin(), owners.end());
    owners.erase(std::unique(owners.begin(), owners.end()), owners.end());
    for (const uint32_t s : owners) {
      legs->by_receiver.push_back({s, g, false, s == owners.front()});
      sends[s] = true;
      receives[g] = true;
    }
  }
  // Nobody stays alone: every rank learns through some leg that the transfer ran and ended.
  std::vector<Leg> empties;
  for (std::size_t i = 0; i < senders.size(); ++i)
    if (!sends[senders[i]]) empties.push_back({senders[i], receivers[i % receivers.size()], true});
  std::vector<bool> reached = receives;
  for (const Leg& leg : empties) reached[leg.receiver_rank] = true;
  for (std::size_t j = 0; j < receivers.size(); ++j)
    if (!reached[receivers[j]])
      empties.push_back({senders[j % senders.size()], receivers[j], true});
  std::sort(empties.begin(), empties.end(), [](const Leg& a, const Leg& b) {
    return std::tie(a.receiver_rank, a.sender_rank) < std::tie(b.receiver_rank, b.sender_rank);
  });
  for (std::size_t i = 0; i < empties.size(); ++i)
    empties[i].carries_aux = !receives[empties[i].receiver_rank] &&
                             (i == 0 || empties[i - 1].receiver_rank != empties[i].receiver_rank);
  legs->by_receiver.insert(legs->by_receiver.end(), empties.begin(), empties.end());
  legs->by_sender = legs->by_receiver;
  std::sort(legs->by_receiver.begin(), legs->by_receiver.end(), [](const Leg& a, const Leg& b) {
    return std::tie(a.receiver_rank, a.sender_rank) < std::tie(b.receiver_rank, b.sender_rank);
  });
  std::sort(legs->by_sender.begin(), legs->by_sender.end(), [](const Leg& a, const Leg& b) {
    return std::tie(a.sender_rank, a.receiver_rank) < std::tie(b.sender_rank, b.receiver_rank);
  });
  return legs;
}

Result<std::shared_ptr<const LegTable::DpLegs>> LegTable::between(uint32_t sender_dp,
                                                                  uint32_t receiver_dp) const {
  const uint64_t key = uint64_t{sender_dp} << 32 | receiver_dp;
  {
    const MutexLock lock(mutex_);
    if (const auto found = legs_.find(key); found != legs_.end()) return found->second;
  }
  auto legs = work_out(sender_dp, receiver_dp);
  if (!legs) return legs;
  const MutexLock lock(mutex_);
  if (legs_.size() >= kMaxRemembered) legs_.clear();
  return legs_.emplace(key, *legs).first->second;
}

bool LegTable::remembers(uint32_t sender_dp, uint32_t receiver_dp) const {
  const MutexLock lock(mutex_);
  return legs_.contains(uint64_t{sender_dp} << 32 | receiver_dp);
}

Result<std::vector<Leg>> LegTable::legs_of_receiver(uint32_t sender_dp, uint32_t g) const {
  if (g >= receiver_->ranks.size())
    return fail(Code::kNotFound, "UNKNOWN_RANK", "the receiver has no such rank", "receiver_rank");
  if (index_->senders.dp_position(sender_dp) == kNone)
    return fail(Code::kNotFound, "UNKNOWN_DP_GROUP", "the sender has no such dp group",
                "sender_dp");
  auto legs = between(sender_dp, receiver_->ranks[g].topology.dp_group);
  if (!legs) return tl::unexpected<Error>(std::move(legs).error());
  const auto [first, last] = std::equal_range(
      (*legs)->by_receiver.begin(), (*legs)->by_receiver.end(), Leg{0, g},
      [](const Leg& a, const Leg& b) { return a.receiver_rank < b.receiver_rank; });
  if (last - first > kMaxLegs)
    return fail(Code::kResourceExhausted, "TOO_FRAGMENTED", "more than 1024 legs to one rank",
                "receiver_rank");
  return std::vector<Leg>(first, last);
}

Result<std::vector<Leg>> LegTable::legs_of_sender(uint32_t s, uint32_t receiver_dp) const {
  if (s >= sender_->ranks.size())
    return fail(Code::kNotFound, "UNKNOWN_RANK", "the sender has no such rank", "sender_rank");
  if (!std::binary_search(receiver_dp_.begin(), receiver_dp_.end(), receiver_dp))
    return fail(Code::kNotFound, "UNKNOWN_DP_GROUP", "the receiver has no such dp group",
                "receiver_dp");
  auto legs = between(sender_->ranks[s].topology.dp_group, receiver_dp);
  if (!legs) return tl::unexpected<Error>(std::move(legs).error());
  const auto [first, last] =
      std::equal_range((*legs)->by_sender.begin(), (*legs)->by_sender.end(), Leg{s, 0},
                       [](const Leg& a, const Leg& b) { return a.sender_rank < b.sender_rank; });
  if (last - first > kMaxLegs)
    return fail(Code::kResourceExhausted, "TOO_FRAGMENTED", "more than 1024 legs from one rank",
                "sender_rank");
  return std::vector<Leg>(first, last);
}

Result<Ownership> LegTable::ownership(uint32_t s, uint32_t g) const {
  if (s >= sender_->ranks.size())
    return fail(Code::kNotFound, "UNKNOWN_RANK", "the sender has no such rank", "sender_rank");
  if (g >= receiver_->ranks.size())
    return fail(Code::kNotFound, "UNKNOWN_RANK", "the receiver has no such rank", "receiver_rank");
  const ShardIndex& senders = index_->senders;
  const uint32_t dp = senders.dp_position(sender_->ranks[s].topology.dp_group);
  Ownership owned;
  std::tuple<const Shard*, uint32_t, uint32_t, uint32_t, bool> last{};
  uint32_t last_units = kNone;
  std::size_t number = 0;
  const Holding& holding = receiver_->ranks[g];
  for (uint32_t rg = 0; rg < holding.groups.size(); ++rg) {
    const Group& group = holding.groups[rg];
    for (uint32_t rp = 0; rp < group.planes.size(); ++rp) {
      const Plane& plane = group.planes[rp];
      const uint32_t key = index_->receiver_keys[g][number++];
      if (key == kNone) continue;
      const ShardIndex::Local* local = senders.local(s, key);
      if (local == nullptr) continue;
      const Group& sender_group = sender_->ranks[s].groups[local->group];
      // Both deal: only positions of one and the same index are on both.
      const bool both_deal = sender_group.cp_size > 1 && group.cp_size > 1;
      if (both_deal && sender_group.cp_index != group.cp_index) continue;
      const uint32_t cp_index = sender_group.cp_size > 1 ? sender_group.cp_index : 0;
      const Shard* shard = senders.shard(dp, key);
      const auto now = std::tuple{shard, plane.unit_begin, plane.unit_count, cp_index, both_deal};
      if (now != last) {
        last = now;
        std::vector<Range> units;
        const Range wanted{plane.unit_begin, uint64_t{plane.unit_begin} + plane.unit_count};
        for (const Shard::Segment& segment : shard->segments) {
          if (segment.cp_index != cp_index) continue;
          const Range part = intersect(wanted, {segment.begin, segment.end});
          if (part.empty() || shard->candidates[segment.first + g % segment.count] != s) continue;
          if (!units.empty() && units.back().end == part.begin)
            units.back().end = part.end;
          else
            units.push_back(part);
        }
        last_units = kNone;
        if (!units.empty()) {
          const auto known = std::find(owned.unit_sets.begin(), owned.unit_sets.end(), units);
          last_units = static_cast<uint32_t>(known - owned.unit_sets.begin());
          if (known == owned.unit_sets.end()) owned.unit_sets.push_back(std::move(units));
        }
      }
      if (last_units == kNone) continue;
      owned.planes.push_back({rg, rp, local->group, last_units, senders.planes_of(s, *local)});
    }
  }
  return owned;
}

}  // namespace kvferry::mapping
