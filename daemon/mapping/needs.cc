#include "daemon/mapping/needs.h"

#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "daemon/mapping/tokens.h"
#include "daemon/mapping/validate.h"

namespace kvferry::mapping {

std::vector<Range> unite_ranges(std::span<const Range> a, std::span<const Range> b) {
  std::vector<Range> all;
  const auto add = [&](const Range& range) {
    if (range.empty()) return;
    if (!all.empty() && all.back().end >= range.begin)
      all.back().end = std::max(all.back().end, range.end);
    else
      all.push_back(range);
  };
  std::size_t i = 0;
  std::size_t j = 0;
  while (i < a.size() || j < b.size()) {
    const bool from_a = j == b.size() || (i < a.size() && a[i].begin <= b[j].begin);
    add(from_a ? a[i++] : b[j++]);
  }
  return all;
}

Result<std::vector<GroupRanges>> needs_by_sender_group(const LegTable& table, uint32_t sender_rank,
                                                       uint32_t receiver_rank,
                                                       std::span<const GroupNeed> needs) {
  const auto owned = table.ownership(sender_rank, receiver_rank);  // checks the rank numbers
  if (!owned) return tl::unexpected<Error>(owned.error());
  const Holding& sender = table.sender().ranks[sender_rank];
  const Holding& receiver = table.receiver().ranks[receiver_rank];
  KVFERRY_RETURN_IF_ERROR(validate_needs(receiver, needs));
  std::set<std::pair<uint32_t, uint32_t>> seen;  // sender group, receiver group
  std::map<uint32_t, std::vector<Range>> wanted;
  for (const Ownership::OwnedPlane& plane : owned->planes) {
    if (!seen.insert({plane.sender_group, plane.receiver_group}).second) continue;
    const auto need = std::find_if(needs.begin(), needs.end(), [&](const GroupNeed& of) {
      return of.group == plane.receiver_group;
    });
    if (need == needs.end()) continue;
    const Group& group = sender.groups[plane.sender_group];
    std::vector<Range> ranges = wanted_ranges(group, *need);
    if (stored_count(ranges, dealing_of(group),
                     dealing_of(receiver.groups[plane.receiver_group])) == 0)
      continue;
    const uint64_t granule = granule_of(group);
    for (Range& range : ranges)
      range = {round_down(range.begin, granule), round_up(range.end, granule)};
    std::vector<Range>& all = wanted[plane.sender_group];
    all = unite_ranges(all, ranges);
  }
  std::vector<GroupRanges> out;
  for (auto& [group, ranges] : wanted) out.push_back({group, std::move(ranges)});
  return out;
}

}  // namespace kvferry::mapping
