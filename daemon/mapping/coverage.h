// What the slices of a leg have covered so far: finds overlapping slices, and the first cell that
// is missing when the last slice is in. One owner, no locks.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/mapping/legs.h"
#include "daemon/mapping/tokens.h"

namespace kvferry::mapping {

inline constexpr Range kAllLayers{0, 65536};

// A set of (layer, token) points as rectangles. Also what a sender keeps per group to refuse
// slices that overlap.
class LayerTokenSet {
 public:
  LayerTokenSet();
  // First token of `ranges` that is in the set for one of the layers.
  std::optional<uint64_t> first_common(Range layers, std::span<const Range> ranges) const;
  void insert(Range layers, std::span<const Range> ranges);
  void erase(Range layers, std::span<const Range> ranges);
  // Parts of `ranges` that are not in the set for this layer.
  std::vector<Range> missing(uint64_t layer, std::span<const Range> ranges) const;
  // The parts [begin, end) of the layer axis on which the set does not change.
  std::vector<Range> layer_parts() const;

 private:
  void split_at(uint64_t layer);
  std::map<uint64_t, std::vector<Range>> by_layer_;  // first layer of a part -> tokens
};

struct MissingCell {
  uint32_t sender_group = 0;
  uint32_t receiver_group = 0;
  uint32_t layer = 0;
  uint64_t position = 0;
};

// One leg of one transfer. Slices are named by what they offer.
class LegCoverage {
 public:
  static Result<LegCoverage> make(const LegTable& table, uint32_t sender_rank,
                                  uint32_t receiver_rank, std::span<const GroupNeed> needs);

  // FAILED_PRECONDITION SLICES_OVERLAP, with nothing changed, if a cell of this leg is covered
  // already.
  Status add(std::span<const GroupRanges> offer, std::optional<Range> layers);
  // Takes back what add() accepted with the same arguments.
  void remove(std::span<const GroupRanges> offer, std::optional<Range> layers);
  // The first needed cell that no slice has covered.
  std::optional<MissingCell> missing() const;
  // Bytes of all needed cells.
  uint64_t expected_bytes() const { return expected_bytes_; }

 private:
  struct Pair {
    uint32_t sender_group = 0;
    uint32_t receiver_group = 0;
    std::vector<Range> wanted;
    Dealing sender;
    Dealing receiver;
    std::vector<uint32_t> layers;  // ascending
    LayerTokenSet covered;         // by index into layers
  };
  std::vector<Pair> pairs_;
  uint64_t expected_bytes_ = 0;
};

}  // namespace kvferry::mapping
