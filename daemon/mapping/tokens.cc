#include "daemon/mapping/tokens.h"

#include <algorithm>
#include <charconv>
#include <tuple>

#include "daemon/mapping/limits.h"
#include "daemon/mapping/validate.h"

namespace kvferry::mapping {
namespace {

std::string entry_field(std::size_t entry, std::string_view name) {
  return "groups[" + std::to_string(entry) + "]." + std::string(name);
}

tl::unexpected<Error> too_fragmented(std::string field, std::string message) {
  return fail(Code::kResourceExhausted, "TOO_FRAGMENTED", std::move(message), std::move(field));
}

void add_range(std::vector<Range>& ranges, Range range) {
  if (range.empty()) return;
  if (!ranges.empty() && ranges.back().end >= range.begin)
    ranges.back().end = std::max(ranges.back().end, range.end);
  else
    ranges.push_back(range);
}

// Past this position a group's blocks exceed what one transfer may name.
uint64_t position_limit(const Group& group) {
  return kMaxBlocks * group.tokens_per_block * group.cp_size;  // below 2^62 by the groups' limits
}

// The part of `window` that the block list backs: positions that this rank stores in holes, or past
// the list's end, are left out; positions that it does not store stay in. Ends early, with more
// than kMaxRanges ranges, when there are too many.
std::vector<Range> without_holes(const Group& group, Range window, const GroupBlocks& blocks) {
  const Dealing dealing = dealing_of(group);
  const uint64_t entry_tokens = group.tokens_per_block * group.blocks_per_id;
  const Range local{dealing.stored_below(window.begin), dealing.stored_below(window.end)};
  std::vector<Range> ranges;
  uint64_t at = window.begin;
  const auto leave_out = [&](Range hole) {  // local positions, whole granules
    hole = intersect(hole, local);
    if (hole.empty()) return true;
    if (dealing.size == 1) {
      add_range(ranges, {at, hole.begin});
      at = hole.end;
      return ranges.size() <= kMaxRanges;
    }
    const uint64_t granule = dealing.interleave;
    for (uint64_t i = hole.begin / granule; i < hole.end / granule; ++i) {
      const uint64_t begin = (i * dealing.size + dealing.index) * granule;
      add_range(ranges, {at, begin});
      at = begin + granule;
      if (ranges.size() > kMaxRanges) return false;
    }
    return true;
  };
  uint64_t entry = blocks.first_block;
  if (!leave_out({0, entry * entry_tokens})) return ranges;
  for (const int32_t id : blocks.ids) {
    if (entry * entry_tokens >= local.end) break;
    if (id == kHole && !leave_out({entry * entry_tokens, (entry + 1) * entry_tokens}))
      return ranges;
    ++entry;
  }
  if (!leave_out({entry * entry_tokens, local.end})) return ranges;
  add_range(ranges, {at, window.end});
  return ranges;
}

// A block list's entry for a layout's group, checked up to the prompt's end.
Status check_blocks(const RankLayout& layout, std::size_t entry, const GroupBlocks& blocks,
                    uint64_t prompt) {
  if (blocks.group >= layout.groups.size())
    return invalid(entry_field(entry, "group"), "UNKNOWN_GROUP", "the layout has no such group");
  const Group& group = layout.groups[blocks.group];
  if (prompt > position_limit(group))
    return invalid(entry_field(entry, "prompt"), "OUT_OF_RANGE",
                   "more blocks than a transfer may have");
  if (blocks.first_block > kMaxBlocks / group.blocks_per_id)
    return invalid(entry_field(entry, "first_block"), "OUT_OF_RANGE",
                   "more blocks than a transfer may have");
  if (blocks.ids.size() > kMaxBlocks)
    return invalid(entry_field(entry, "block_ids"), "OUT_OF_RANGE",
                   "more blocks than a transfer may have");
  const uint64_t ids = group.block_count / group.blocks_per_id;
  const uint64_t needed = dealing_of(group).stored_below(prompt);
  for (std::size_t i = 0; i < blocks.ids.size(); ++i) {
    if ((blocks.first_block + i) * group.blocks_per_id * group.tokens_per_block >= needed) break;
    const int32_t id = blocks.ids[i];
    if (id != kHole && (id < 0 || static_cast<uint64_t>(id) >= ids))
      return invalid(
          entry_field(entry, "block_ids[" + std::to_string(i) + "]"), "BLOCK_OUT_OF_RANGE",
          std::to_string(id) + " is not one of the group's " + std::to_string(ids) + " block ids");
  }
  return {};
}

// Calls fn(space, id, entry, index) for each id that the receives need. Holes, and what lies past
// the prompt, are free.
template <typename Fn>
void for_each_needed_id(const RankLayout& layout, std::span<const GroupReceive> receives, Fn&& fn) {
  for (uint32_t e = 0; e < receives.size(); ++e) {
    const GroupReceive& receive = receives[e];
    const Group& group = layout.groups[receive.blocks.group];
    const uint64_t prompt = is_request_group(group) ? 1 : receive.prompt;
    const uint64_t needed = dealing_of(group).stored_below(prompt);
    for (uint32_t i = 0; i < receive.blocks.ids.size(); ++i) {
      const uint64_t block = (receive.blocks.first_block + i) * group.blocks_per_id;
      if (block * group.tokens_per_block >= needed) break;
      if (receive.blocks.ids[i] != kHole) fn(group.id_space, receive.blocks.ids[i], e, i);
    }
  }
}

// Whether some id stands twice in one id space. Ids have been checked against their groups.
bool has_id_twice(const RankLayout& layout, std::span<const GroupReceive> receives) {
  std::vector<uint64_t> keys;
  std::size_t most = 0;
  for (const GroupReceive& receive : receives) most += receive.blocks.ids.size();
  keys.reserve(most);
  uint64_t least = UINT64_MAX;
  uint64_t largest = 0;
  for_each_needed_id(layout, receives, [&](uint32_t space, int32_t id, uint32_t, uint32_t) {
    const uint64_t key = uint64_t{space} << 32 | static_cast<uint32_t>(id);
    least = std::min(least, key);
    largest = std::max(largest, key);
    keys.push_back(key);
  });
  if (keys.size() < 2) return false;
  // A bit an id where they are dense, as a pool's are: sorting 16,384 of them takes a millisecond.
  constexpr uint64_t kBitsPerKey = 64;
  if (largest - least < kBitsPerKey * keys.size()) {
    std::vector<bool> seen(largest - least + 1);
    for (const uint64_t key : keys) {
      if (seen[key - least]) return true;
      seen[key - least] = true;
    }
    return false;
  }
  std::sort(keys.begin(), keys.end());
  return std::adjacent_find(keys.begin(), keys.end()) != keys.end();
}

// An id may stand once in all groups of an id space.
Status check_ids_distinct(const RankLayout& layout, std::span<const GroupReceive> receives) {
  if (!has_id_twice(layout, receives)) return {};
  struct Use {
    uint32_t space;
    int32_t id;
    uint32_t entry;
    uint32_t index;
  };
  std::vector<Use> uses;
  for_each_needed_id(layout, receives, [&](uint32_t space, int32_t id, uint32_t e, uint32_t i) {
    uses.push_back({space, id, e, i});
  });
  std::sort(uses.begin(), uses.end(), [](const Use& a, const Use& b) {
    return std::tie(a.space, a.id, a.entry, a.index) < std::tie(b.space, b.id, b.entry, b.index);
  });
  for (std::size_t i = 1; i < uses.size(); ++i) {
    const Use& a = uses[i - 1];
    const Use& b = uses[i];
    if (a.space != b.space || a.id != b.id) continue;
    return invalid(entry_field(b.entry, "block_ids[" + std::to_string(b.index) + "]"),
                   "BLOCK_TWICE",
                   "id " + std::to_string(b.id) + " stands at " +
                       entry_field(a.entry, "block_ids[" + std::to_string(a.index) + "]") + " too");
  }
  return {};
}

uint64_t first_needed(const Group& group, uint64_t prompt, uint64_t cached) {
  const uint64_t window = group.sliding_window;
  const uint64_t outside = window == 0 || prompt + 1 < window ? 0 : prompt + 1 - window;
  return std::max(round_down(cached, granule_of(group)), outside);
}

Status check_ranges(std::span<const Range> ranges, uint64_t granule, Range window,
                    const std::string& field) {
  if (ranges.size() > kMaxRanges) return too_fragmented(field, "more than 4096 ranges");
  uint64_t at = window.begin;
  bool first = true;
  for (const Range& range : ranges) {
    if (range.begin >= range.end || range.begin < at || (!first && range.begin == at) ||
        range.end > window.end)
      return invalid(field, "BAD_RANGES", "must be ascending, apart and inside the prompt");
    if (range.begin % granule != 0 || range.end % granule != 0)
      return invalid(field, "BAD_RANGES", "must be rounded to the group's granule");
    at = range.end;
    first = false;
  }
  return {};
}

}  // namespace

Result<std::vector<GroupNeed>> compute_needs(const RankLayout& layout,
                                             std::span<const GroupReceive> receives) {
  std::vector<bool> seen(layout.groups.size());
  std::vector<GroupNeed> needs;
  for (std::size_t e = 0; e < receives.size(); ++e) {
    const GroupReceive& receive = receives[e];
    const uint32_t number = receive.blocks.group;
    if (number >= layout.groups.size())
      return invalid(entry_field(e, "group"), "UNKNOWN_GROUP", "the layout has no such group");
    const Group& group = layout.groups[number];
    if (seen[number])
      return invalid(entry_field(e, "group"), "GROUP_TWICE", "the group is named twice");
    seen[number] = true;
    const uint64_t prompt = is_request_group(group) ? 1 : receive.prompt;
    KVFERRY_RETURN_IF_ERROR(check_blocks(layout, e, receive.blocks, prompt));
    if (is_request_group(group) && receive.cached > 1)
      return invalid(entry_field(e, "cached"), "OUT_OF_RANGE", "is 0 or 1 for a REQUEST group");
    if (receive.cached >= prompt) continue;
    const uint64_t granule = granule_of(group);
    GroupNeed need;
    need.group = number;
    need.begin = first_needed(group, prompt, receive.cached);
    need.end = prompt;
    if (need.begin >= need.end) continue;
    need.ranges = without_holes(
        group, {round_down(need.begin, granule), round_up(need.end, granule)}, receive.blocks);
    if (need.ranges.size() > kMaxRanges)
      return too_fragmented(entry_field(e, "block_ids"), "holes cut it into more than 4096 ranges");
    if (!need.ranges.empty()) needs.push_back(std::move(need));
  }
  KVFERRY_RETURN_IF_ERROR(check_ids_distinct(layout, receives));
  std::sort(needs.begin(), needs.end(),
            [](const GroupNeed& a, const GroupNeed& b) { return a.group < b.group; });
  return needs;
}

Result<std::vector<GroupRanges>> round_offer(const RankLayout& layout,
                                             std::span<const GroupOffer> offers) {
  std::vector<bool> seen(layout.groups.size());
  std::vector<GroupRanges> result;
  for (std::size_t e = 0; e < offers.size(); ++e) {
    const GroupOffer& offer = offers[e];
    const uint32_t number = offer.blocks.group;
    if (number >= layout.groups.size())
      return invalid(entry_field(e, "group"), "UNKNOWN_GROUP", "the layout has no such group");
    const Group& group = layout.groups[number];
    if (seen[number])
      return invalid(entry_field(e, "group"), "GROUP_TWICE", "the group is named twice");
    seen[number] = true;
    const uint64_t prompt = is_request_group(group) ? 1 : offer.prompt;
    KVFERRY_RETURN_IF_ERROR(check_blocks(layout, e, offer.blocks, prompt));
    if (offer.tokens.begin > offer.tokens.end || offer.tokens.end > prompt)
      return invalid(entry_field(e, "tokens"), "OUT_OF_RANGE",
                     "must be a half-open range inside the prompt");
    const uint64_t granule = granule_of(group);
    const auto edge = [&](uint64_t position) {
      return position == prompt ? round_up(position, granule) : round_down(position, granule);
    };
    GroupRanges ranges;
    ranges.group = number;
    ranges.ranges =
        without_holes(group, {edge(offer.tokens.begin), edge(offer.tokens.end)}, offer.blocks);
    if (ranges.ranges.size() > kMaxRanges)
      return too_fragmented(entry_field(e, "block_ids"), "holes cut it into more than 4096 ranges");
    if (!ranges.ranges.empty()) result.push_back(std::move(ranges));
  }
  std::sort(result.begin(), result.end(),
            [](const GroupRanges& a, const GroupRanges& b) { return a.group < b.group; });
  return result;
}

Status validate_needs(const Holding& receiver, std::span<const GroupNeed> needs) {
  uint64_t next_group = 0;
  for (std::size_t e = 0; e < needs.size(); ++e) {
    const GroupNeed& need = needs[e];
    if (need.group < next_group || need.group >= receiver.groups.size())
      return invalid(entry_field(e, "group"), "UNKNOWN_GROUP",
                     "groups must be known and ascending");
    next_group = uint64_t{need.group} + 1;
    const Group& group = receiver.groups[need.group];
    if (need.begin >= need.end || need.end > position_limit(group))
      return invalid(entry_field(e, "end"), "OUT_OF_RANGE", "not a range of tokens");
    const uint64_t granule = granule_of(group);
    KVFERRY_RETURN_IF_ERROR(check_ranges(
        need.ranges, granule, {round_down(need.begin, granule), round_up(need.end, granule)},
        entry_field(e, "ranges")));
  }
  return {};
}

Status validate_offer(const Holding& sender, std::span<const GroupRanges> offer) {
  uint64_t next_group = 0;
  for (std::size_t e = 0; e < offer.size(); ++e) {
    const GroupRanges& ranges = offer[e];
    if (ranges.group < next_group || ranges.group >= sender.groups.size())
      return invalid(entry_field(e, "group"), "UNKNOWN_GROUP",
                     "groups must be known and ascending");
    next_group = uint64_t{ranges.group} + 1;
    const Group& group = sender.groups[ranges.group];
    KVFERRY_RETURN_IF_ERROR(check_ranges(ranges.ranges, granule_of(group),
                                         {0, position_limit(group)}, entry_field(e, "ranges")));
  }
  return {};
}

std::vector<Range> wanted_ranges(const Group& sender, const GroupNeed& need) {
  const uint64_t granule = granule_of(sender);
  const Range window{round_down(need.begin, granule), round_up(need.end, granule)};
  return intersect_ranges(need.ranges, std::span(&window, 1));
}

std::vector<Range> intersect_ranges(std::span<const Range> a, std::span<const Range> b) {
  std::vector<Range> common;
  for (std::size_t i = 0, j = 0; i < a.size() && j < b.size();) {
    add_range(common, intersect(a[i], b[j]));
    if (a[i].end < b[j].end)
      ++i;
    else
      ++j;
  }
  return common;
}

uint64_t Dealing::local(uint64_t position) const {
  if (size == 1) return position;
  return position / (interleave * size) * interleave + position % interleave;
}

uint64_t Dealing::stored_below(uint64_t position) const {
  if (size == 1) return position;
  const uint64_t round = interleave * size;
  const uint64_t rest = position % round;
  const uint64_t first = interleave * index;
  return position / round * interleave + std::min(rest > first ? rest - first : 0, interleave);
}

Dealing dealing_of(const Group& group) {
  const uint64_t interleave =
      group.cp_size > 1 && group.cp_interleave != 0 ? group.cp_interleave : group.tokens_per_block;
  return {group.cp_size > 1 ? group.cp_index : 0, group.cp_size, interleave};
}

uint64_t stored_count(std::span<const Range> ranges, const Dealing& a, const Dealing& b) {
  if (a.size > 1 && b.size > 1 && a.index != b.index) return 0;
  const Dealing& dealing = a.size > 1 ? a : b;
  uint64_t count = 0;
  for (const Range& range : ranges)
    count += dealing.stored_below(range.end) - dealing.stored_below(range.begin);
  return count;
}

void append_ranges(std::string& text, std::span<const Range> ranges) {
  char buffer[48];
  for (std::size_t i = 0; i < ranges.size(); ++i) {
    if (i != 0) text += ',';
    char* at = std::to_chars(buffer, buffer + 24, ranges[i].begin).ptr;
    *at++ = '-';
    at = std::to_chars(at, buffer + sizeof buffer, ranges[i].end).ptr;
    text.append(buffer, at);
  }
}

}  // namespace kvferry::mapping
