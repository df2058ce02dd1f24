#include "daemon/engine/coverage.h"

#include <algorithm>
#include <iterator>
#include <set>

namespace kvferry::engine {
namespace {

constexpr std::size_t kMostLayerIntervals = 4096;  // of a group's slices on a leg
constexpr uint64_t kMostRanges = 1 << 20;          // of all slices of a leg

Range all_of(const std::optional<Range>& layers) {
  return layers.value_or(Range{0, UINT64_MAX});
}

}  // namespace

bool Coverage::enter(const std::vector<GroupRanges>& offer, const std::optional<Range>& of) {
  for (const GroupRanges& group : offer) ranges_ += 1 + group.ranges.size();
  if (ranges_ > kMostRanges) return false;
  const Range layers = all_of(of);
  std::set<uint32_t> seen;
  for (const GroupRanges& entry : offer) {
    if (!seen.insert(entry.group).second) return false;
    uint64_t end = 0;
    for (const Range& range : entry.ranges) {
      if (range.empty() || range.begin < end) return false;
      end = range.end;
    }
    if (entry.ranges.empty() || layers.empty()) continue;
    Group& group = groups_[entry.group];
    // Whoever begins further below is too short to reach these layers.
    const uint64_t lowest = layers.begin - std::min(layers.begin, group.most_layers);
    for (auto it = group.layers.lower_bound(Range{lowest, 0});
         it != group.layers.end() && it->first.begin < layers.end; ++it) {
      if (intersect(it->first, layers).empty()) continue;
      for (const Range& range : entry.ranges)
        if (meets(it->second, range)) return false;
    }
    if (group.layers.size() >= kMostLayerIntervals && !group.layers.contains(layers)) return false;
    group.most_layers = std::max(group.most_layers, layers.size());
    Tokens& tokens = group.layers[layers];
    for (const Range& range : entry.ranges) add(tokens, range);
  }
  return true;
}

void Coverage::leave(const std::vector<GroupRanges>& offer, const std::optional<Range>& of) {
  const Range layers = all_of(of);
  for (const GroupRanges& entry : offer) {
    const auto group = groups_.find(entry.group);
    if (group == groups_.end()) continue;
    const auto tokens = group->second.layers.find(layers);
    if (tokens == group->second.layers.end()) continue;
    for (const Range& range : entry.ranges) remove(tokens->second, range);
    if (tokens->second.empty()) group->second.layers.erase(tokens);
  }
}

void Coverage::clear() {
  groups_.clear();
}

uint64_t Coverage::intervals() const {
  uint64_t count = 0;
  for (const auto& [number, group] : groups_)
    for (const auto& [layers, tokens] : group.layers) count += tokens.size();
  return count;
}

bool Coverage::meets(const Tokens& tokens, const Range& range) {
  const auto after = tokens.lower_bound(range.end);  // first that begins at or past its end
  return after != tokens.begin() && std::prev(after)->second > range.begin;
}

// `range` meets none of `tokens`.
void Coverage::add(Tokens& tokens, Range range) {
  auto after = tokens.lower_bound(range.end);
  if (after != tokens.end() && after->first == range.end) {
    range.end = after->second;
    after = tokens.erase(after);
  }
  if (after != tokens.begin()) {
    const auto before = std::prev(after);
    if (before->second == range.begin) {
      before->second = range.end;
      return;
    }
  }
  tokens.emplace_hint(after, range.begin, range.end);
}

// `range` was added.
void Coverage::remove(Tokens& tokens, const Range& range) {
  const auto after = tokens.upper_bound(range.begin);
  if (after == tokens.begin()) return;
  const auto of = std::prev(after);
  const uint64_t end = of->second;
  if (end < range.end) return;
  if (range.end < end) tokens.emplace_hint(after, range.end, end);
  if (of->first < range.begin)
    of->second = range.begin;
  else
    tokens.erase(of);
}

}  // namespace kvferry::engine
