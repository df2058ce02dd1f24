#include "daemon/mapping/coverage.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "daemon/mapping/stream.h"

namespace kvferry::mapping {
namespace {

// Adds `ranges` to `set`; both ascending and joined.
std::vector<Range> united(const std::vector<Range>& set, std::span<const Range> ranges) {
  std::vector<Range> all;
  all.reserve(set.size() + ranges.size());
  std::merge(set.begin(), set.end(), ranges.begin(), ranges.end(), std::back_inserter(all));
  std::vector<Range> joined;
  for (const Range& range : all) {
    if (range.empty()) continue;
    if (!joined.empty() && joined.back().end >= range.begin)
      joined.back().end = std::max(joined.back().end, range.end);
    else
      joined.push_back(range);
  }
  return joined;
}

std::vector<Range> subtracted(std::span<const Range> from, std::span<const Range> what) {
  std::vector<Range> left;
  std::size_t j = 0;
  for (Range range : from) {
    while (j < what.size() && what[j].end <= range.begin) ++j;
    for (std::size_t k = j; k < what.size() && what[k].begin < range.end; ++k) {
      if (what[k].begin > range.begin) left.push_back({range.begin, what[k].begin});
      range.begin = std::min(range.end, what[k].end);
    }
    if (!range.empty()) left.push_back(range);
  }
  return left;
}

// First position of `ranges` that both sides store.
std::optional<uint64_t> first_stored(std::span<const Range> ranges, const Dealing& a,
                                     const Dealing& b) {
  for (const Range& range : ranges) {
    if (stored_count(std::span(&range, 1), a, b) == 0) continue;
    const Dealing& dealing = a.size > 1 ? a : b;
    uint64_t position = range.begin;
    while (!dealing.stores(position))
      position = (position / dealing.interleave + 1) * dealing.interleave;
    return position;
  }
  return std::nullopt;
}

}  // namespace

LayerTokenSet::LayerTokenSet() {
  by_layer_.emplace(0, std::vector<Range>{});
}

void LayerTokenSet::split_at(uint64_t layer) {
  const auto after = by_layer_.upper_bound(layer);
  const auto part = std::prev(after);
  if (part->first != layer) by_layer_.emplace_hint(after, layer, part->second);
}

std::optional<uint64_t> LayerTokenSet::first_common(Range layers,
                                                    std::span<const Range> ranges) const {
  if (layers.empty()) return std::nullopt;
  std::optional<uint64_t> first;
  for (auto part = std::prev(by_layer_.upper_bound(layers.begin));
       part != by_layer_.end() && part->first < layers.end; ++part) {
    const std::vector<Range> common = intersect_ranges(part->second, ranges);
    if (!common.empty() && (!first || common.front().begin < *first)) first = common.front().begin;
  }
  return first;
}

void LayerTokenSet::insert(Range layers, std::span<const Range> ranges) {
  if (layers.empty() || ranges.empty()) return;
  split_at(layers.begin);
  split_at(layers.end);
  for (auto part = by_layer_.find(layers.begin); part->first < layers.end; ++part)
    part->second = united(part->second, ranges);
}

void LayerTokenSet::erase(Range layers, std::span<const Range> ranges) {
  if (layers.empty() || ranges.empty()) return;
  split_at(layers.begin);
  split_at(layers.end);
  for (auto part = by_layer_.find(layers.begin); part->first < layers.end; ++part)
    part->second = subtracted(part->second, ranges);
}

std::vector<Range> LayerTokenSet::missing(uint64_t layer, std::span<const Range> ranges) const {
  return subtracted(ranges, std::prev(by_layer_.upper_bound(layer))->second);
}

std::vector<Range> LayerTokenSet::layer_parts() const {
  std::vector<Range> parts;
  for (auto part = by_layer_.begin(); part != by_layer_.end(); ++part) {
    const auto next = std::next(part);
    parts.push_back({part->first, next == by_layer_.end() ? kAllLayers.end : next->first});
  }
  return parts;
}

Result<LegCoverage> LegCoverage::make(const LegTable& table, uint32_t sender_rank,
                                      uint32_t receiver_rank, std::span<const GroupNeed> needs) {
  LegCoverage coverage;
  const auto expected = mapping::expected_bytes(table, sender_rank, receiver_rank, needs);
  if (!expected) return tl::unexpected<Error>(expected.error());
  coverage.expected_bytes_ = *expected;
  const auto owned = table.ownership(sender_rank, receiver_rank);
  if (!owned) return tl::unexpected<Error>(owned.error());
  const Holding& sender = table.sender().ranks[sender_rank];
  const Holding& receiver = table.receiver().ranks[receiver_rank];
  for (const Ownership::OwnedPlane& plane : owned->planes) {
    auto pair = std::find_if(coverage.pairs_.begin(), coverage.pairs_.end(), [&](const Pair& p) {
      return p.sender_group == plane.sender_group && p.receiver_group == plane.receiver_group;
    });
    const Group& receiver_group = receiver.groups[plane.receiver_group];
    if (pair == coverage.pairs_.end()) {
      const auto need = std::find_if(needs.begin(), needs.end(), [&](const GroupNeed& n) {
        return n.group == plane.receiver_group;
      });
      const Group& sender_group = sender.groups[plane.sender_group];
      pair = coverage.pairs_.insert(pair, Pair{});
      pair->sender_group = plane.sender_group;
      pair->receiver_group = plane.receiver_group;
      if (need != needs.end()) pair->wanted = wanted_ranges(sender_group, *need);
      pair->sender = dealing_of(sender_group);
      pair->receiver = dealing_of(receiver_group);
    }
    pair->layers.push_back(receiver_group.planes[plane.receiver_plane].layer);
  }
  for (Pair& pair : coverage.pairs_) {
    std::sort(pair.layers.begin(), pair.layers.end());
    pair.layers.erase(std::unique(pair.layers.begin(), pair.layers.end()), pair.layers.end());
  }
  return coverage;
}

namespace {

std::span<const Range> ranges_of(std::span<const GroupRanges> offer, uint32_t group) {
  for (const GroupRanges& ranges : offer)
    if (ranges.group == group) return ranges.ranges;
  return {};
}

// Layers as indices into the pair's list, so that a set has no more parts than the leg has layers.
Range indices_of(const std::vector<uint32_t>& layers, std::optional<Range> range) {
  if (!range) return {0, layers.size()};
  const auto first = std::lower_bound(layers.begin(), layers.end(), range->begin);
  const auto last = std::lower_bound(first, layers.end(), range->end);
  return {static_cast<uint64_t>(first - layers.begin()),
          static_cast<uint64_t>(last - layers.begin())};
}

}  // namespace

Status LegCoverage::add(std::span<const GroupRanges> offer, std::optional<Range> layers) {
  std::vector<std::vector<Range>> moved;
  for (const Pair& pair : pairs_) {
    moved.push_back(intersect_ranges(pair.wanted, ranges_of(offer, pair.sender_group)));
    if (moved.back().empty()) continue;
    const Range in = indices_of(pair.layers, layers);
    for (const Range& part : pair.covered.layer_parts()) {
      const Range common = intersect(part, in);
      if (common.empty()) continue;
      const std::vector<Range> fresh = pair.covered.missing(common.begin, moved.back());
      const auto again = first_stored(subtracted(moved.back(), fresh), pair.sender, pair.receiver);
      if (again)
        return fail(Code::kFailedPrecondition, "SLICES_OVERLAP",
                    "an earlier slice has brought position " + std::to_string(*again) +
                        " of the sender's group " + std::to_string(pair.sender_group),
                    "ranges");
    }
  }
  for (std::size_t i = 0; i < pairs_.size(); ++i)
    pairs_[i].covered.insert(indices_of(pairs_[i].layers, layers), moved[i]);
  return {};
}

void LegCoverage::remove(std::span<const GroupRanges> offer, std::optional<Range> layers) {
  for (Pair& pair : pairs_)
    pair.covered.erase(indices_of(pair.layers, layers),
                       intersect_ranges(pair.wanted, ranges_of(offer, pair.sender_group)));
}

std::optional<MissingCell> LegCoverage::missing() const {
  for (const Pair& pair : pairs_) {
    for (const Range& part : pair.covered.layer_parts()) {
      if (part.begin >= pair.layers.size()) continue;
      const auto position =
          first_stored(pair.covered.missing(part.begin, pair.wanted), pair.sender, pair.receiver);
      if (position)
        return MissingCell{pair.sender_group, pair.receiver_group, pair.layers[part.begin],
                           *position};
    }
  }
  return std::nullopt;
}

}  // namespace kvferry::mapping
