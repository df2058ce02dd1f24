// One arena's regions, the floors between landing and staging, and what is promised to
// reservations. It knows sizes and kinds, not legs, and nothing of other arenas but that their
// segments are numbered before or after its own. Owned by the engine; one thread.
//
// The arena is cut into frames, each as large as the largest chunk's region. A frame serves one
// kind (landing or staging), one owner (a reservation, or all others together) and one size of
// region at a time, and is nobody's when its last region is freed. So small regions of one kind
// never stand in the way of the other kind, and the floors, counted in frames, hold whatever the
// sizes are:
//   landing never takes the last E + 1 frames, staging never the last one (E: chunks staged ahead);
//   frames that a reservation has been promised and does not use are taken by nobody else, but by
//   staging up to E + 1 frames and by the others' landing up to one: a promise made while the arena
//   is full waits for those to come back, and stops nobody from giving them back.
// A mapped arena is all for landing, holds one frame at least and promises nothing.
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
  // Arena `number` of the configuration. It must hold at least E + 2 frames, a mapped one one
  // (configuration checks that; here it is an invariant).
  Arena(const EngineConfig& config, std::size_t number);

  // A region of at least `bytes` (> 0, at most the largest chunk), or nothing if the kind's share
  // is used up. O(log frames + regions of a frame / 64).
  std::optional<memory::Region> take(RegionKind kind, uint64_t bytes);
  // ... a landing region out of what `reservation` has been promised, or nothing.
  std::optional<memory::Region> take_reserved(uint64_t reservation, uint64_t bytes);
  // `quarantined`: quarantine() was told of the region.
  void give_back(RegionKind kind, const memory::Region& region, bool quarantined = false);
  // The region stays taken, nobody knows for how long: reservations shrink if they must.
  void quarantine(const memory::Region& region);
  // What a region of so many bytes takes, unless only a larger one is free.
  uint64_t region_bytes(uint64_t bytes) const;
  // Whether take() of any size would fail.
  bool exhausted(RegionKind kind) const;

  // How many frames all reservations together may be promised now, and in an empty arena.
  uint64_t most_reserved() const;
  uint64_t most_reserved_ever() const { return frame_count_ - kept_; }
  uint64_t asked() const { return asked_; }
  // Promises frames (0 < frames, asked() + frames <= most_reserved()) to a number not used before.
  // If quarantine later takes too much, the newest promises shrink first, and grow again after it.
  void reserve(uint64_t reservation, uint64_t frames);
  // What is still in use belongs to nobody's reservation from now on.
  void unreserve(uint64_t reservation);
  // Frames that it may count on now.
  uint64_t promised(uint64_t reservation) const;
  // Whether the region lies in a frame of a reservation.
  bool is_reserved(const memory::Region& region) const;
  // Promised frames, used and unused.
  uint64_t reserved_frames() const { return promised_; }

  uint64_t frame_bytes() const { return frame_bytes_; }
  uint64_t total_bytes() const { return buddy_.capacity_bytes(); }
  uint64_t frames() const { return frame_count_; }
  // Its segments among those of all arenas.
  uint32_t first_segment() const { return first_segment_; }
  uint32_t segment_count() const { return segment_count_; }
  // Frames in use by this kind, and how many it may use.
  uint64_t used(RegionKind kind) const { return used_[index(kind)]; }
  uint64_t share(RegionKind kind) const { return share_[index(kind)]; }
  uint64_t region_count() const { return region_count_; }
  // Whether every frame has a region that nobody knows when it comes back.
  bool lost() const { return quarantined_frames_ == frame_count_; }

  // Ends the process unless `regions` are exactly the regions handed out, disjoint and of their
  // kind's frames, and the shares are respected.
  void verify(const std::vector<std::pair<RegionKind, memory::Region>>& regions) const;

 private:
  using FrameAddress = std::pair<uint32_t, uint64_t>;  // segment, offset
  using OpenKey = std::pair<uint64_t, uint64_t>;       // owner, slot size
  struct Frame {
    RegionKind kind = RegionKind::kLanding;
    uint64_t owner = 0;  // a reservation; 0: none
    uint64_t slot_bytes = 0;
    uint64_t used = 0;
    uint64_t quarantined = 0;
    std::vector<uint64_t> taken;  // bits
  };
  struct Promise {
    uint64_t asked = 0;
    uint64_t promised = 0;
    uint64_t used = 0;  // frames
    uint64_t idle() const { return promised > used ? promised - used : 0; }
  };
  static std::size_t index(RegionKind kind) { return static_cast<std::size_t>(kind); }
  FrameAddress address_of(const memory::Region& region) const;
  // The frame as the allocator knows it, whose segments are numbered from 0.
  memory::Region block_of(FrameAddress address) const;
  bool may_take_frame(RegionKind kind) const;
  memory::Region take_slot(FrameAddress address, Frame& frame);
  memory::Region take_frame(RegionKind kind, uint64_t owner, uint64_t slot);
  void open(FrameAddress address, const Frame& frame);
  void shut(FrameAddress address, const Frame& frame);
  // Adds the frame to the counters, or takes it out of them before it changes.
  void count(const Frame& frame, bool in);
  void change_owner(FrameAddress address, Frame& frame, uint64_t owner);
  void share_out();

  uint64_t frame_bytes_;
  uint64_t min_bytes_;
  uint32_t staged_ahead_;
  uint64_t kept_ = 0;  // frames that are never promised
  uint32_t first_segment_ = 0;
  uint32_t segment_count_;
  memory::BuddyAllocator buddy_;
  uint64_t frame_count_ = 0;
  uint64_t region_count_ = 0;
  std::array<uint64_t, 2> share_{};
  std::array<uint64_t, 2> used_{};
  std::map<FrameAddress, Frame> table_;
  // Frames with a free slot, by kind, owner and slot size.
  std::array<std::map<OpenKey, std::set<FrameAddress>>, 2> open_;
  std::map<uint64_t, Promise> promises_;  // oldest first
  uint64_t asked_ = 0;                    // sums over promises
  uint64_t promised_ = 0;
  uint64_t idle_ = 0;
  uint64_t quarantined_frames_ = 0;  // with at least one such region
  uint64_t others_landing_ = 0;      // frames of landing, of no reservation, with none
};

}  // namespace kvferry::engine
