// The arena's regions and the floors between landing and staging. It knows sizes and kinds, not
// legs. Owned by the engine; one thread.
//
// The arena is cut into frames, each as large as the largest chunk's region. A frame serves one
// kind (landing or staging) and one size of region at a time, and is nobody's when its last region
// is freed. So small regions of one kind never stand in the way of the other kind, and the floors,
// counted in frames, hold whatever the sizes are:
//   landing never takes the last E + 1 frames, staging never the last one (E: chunks staged ahead).
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "daemon/engine/config.h"
#include "daemon/memory/buddy.h"
#include "daemon/memory/region.h"

namespace kvferry::engine {

enum class RegionKind : uint8_t { kLanding = 0, kStaging = 1 };

class Arena {
 public:
  // The arena must hold at least E + 2 frames (configuration checks that; here it is an invariant).
  explicit Arena(const EngineConfig& config);

  // A region of at least `bytes` (> 0, at most the largest chunk), or nothing if the kind's share
  // is used up. O(log frames + regions of a frame / 64).
  std::optional<memory::Region> take(RegionKind kind, uint64_t bytes);
  void give_back(RegionKind kind, const memory::Region& region);
  // Whether take() of any size would fail.
  bool exhausted(RegionKind kind) const;

  uint64_t frame_bytes() const { return frame_bytes_; }
  uint64_t total_bytes() const { return buddy_.capacity_bytes(); }
  uint64_t frames() const { return frame_count_; }
  // Frames in use by this kind, and how many it may use.
  uint64_t used(RegionKind kind) const { return used_[index(kind)]; }
  uint64_t share(RegionKind kind) const { return share_[index(kind)]; }
  uint64_t region_count() const { return region_count_; }

  // Ends the process unless `regions` are exactly the regions handed out, disjoint and of their
  // kind's frames, and the shares are respected.
  void verify(const std::vector<std::pair<RegionKind, memory::Region>>& regions) const;

 private:
  using FrameAddress = std::pair<uint32_t, uint64_t>;  // segment, offset
  struct Frame {
    RegionKind kind = RegionKind::kLanding;
    uint64_t slot_bytes = 0;
    uint64_t used = 0;
    std::vector<uint64_t> taken;  // bits
  };
  static std::size_t index(RegionKind kind) { return static_cast<std::size_t>(kind); }
  memory::Region take_slot(FrameAddress address, Frame& frame);

  uint64_t frame_bytes_;
  uint64_t min_bytes_;
  memory::BuddyAllocator buddy_;
  uint64_t frame_count_ = 0;
  uint64_t region_count_ = 0;
  std::array<uint64_t, 2> share_{};
  std::array<uint64_t, 2> used_{};
  std::map<FrameAddress, Frame> table_;
  // Frames with a free slot, by kind and slot size.
  std::array<std::map<uint64_t, std::set<FrameAddress>>, 2> open_;
};

}  // namespace kvferry::engine
