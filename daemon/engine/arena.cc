#include "daemon/engine/arena.h"

#include <algorithm>
#include <bit>

#include "daemon/base/check.h"
#include "daemon/base/units.h"

namespace kvferry::engine {

Arena::Arena(const EngineConfig& config)
    : frame_bytes_(std::bit_ceil(std::max<uint64_t>(config.chunk_bytes, 1))),
      min_bytes_(
          std::min(std::bit_ceil(std::max<uint64_t>(config.min_region_bytes, 1)), frame_bytes_)),
      buddy_(config.segment_bytes, min_bytes_) {
  frame_count_ = buddy_.count_fitting_when_empty(frame_bytes_);
  KVFERRY_CHECK(frame_count_ >= uint64_t{config.staged_ahead} + 2,
                "the arena holds two regions of the largest chunk more than are staged ahead");
  share_[index(RegionKind::kLanding)] = frame_count_ - (uint64_t{config.staged_ahead} + 1);
  share_[index(RegionKind::kStaging)] = frame_count_ - 1;
}

memory::Region Arena::take_slot(FrameAddress address, Frame& frame) {
  const uint64_t slots = frame_bytes_ / frame.slot_bytes;
  for (std::size_t word = 0; word < frame.taken.size(); ++word) {
    if (frame.taken[word] == ~uint64_t{0}) continue;
    const auto bit = static_cast<uint64_t>(std::countr_one(frame.taken[word]));
    const uint64_t slot = word * 64 + bit;
    KVFERRY_CHECK(slot < slots, "an open frame has a free slot");
    frame.taken[word] |= uint64_t{1} << bit;
    if (++frame.used == slots) {
      auto& same = open_[index(frame.kind)];
      const auto it = same.find(frame.slot_bytes);
      it->second.erase(address);
      if (it->second.empty()) same.erase(it);
    }
    ++region_count_;
    return {address.first, address.second + slot * frame.slot_bytes, frame.slot_bytes};
  }
  KVFERRY_CHECK(false, "an open frame has a free slot");
  return {};
}

std::optional<memory::Region> Arena::take(RegionKind kind, uint64_t bytes) {
  KVFERRY_CHECK(bytes > 0 && bytes <= frame_bytes_, "a region is no larger than the largest chunk");
  const uint64_t slot = std::max(std::bit_ceil(bytes), min_bytes_);
  auto& open = open_[index(kind)];
  const auto same = open.find(slot);
  if (same != open.end()) {
    const FrameAddress address = *same->second.begin();
    return take_slot(address, table_.at(address));
  }
  if (used_[index(kind)] < share_[index(kind)]) {
    if (const auto block = buddy_.allocate(frame_bytes_)) {
      const FrameAddress address{block->segment, block->offset};
      Frame frame;
      frame.kind = kind;
      frame.slot_bytes = slot;
      frame.taken.assign(ceil_div(frame_bytes_ / slot, 64), 0);
      ++used_[index(kind)];
      open[slot].insert(address);
      return take_slot(address, table_.emplace(address, std::move(frame)).first->second);
    }
  }
  // A larger slot serves too, rather than wait.
  const auto larger = open.upper_bound(slot);
  if (larger == open.end()) return std::nullopt;
  const FrameAddress address = *larger->second.begin();
  return take_slot(address, table_.at(address));
}

void Arena::give_back(RegionKind kind, const memory::Region& region) {
  const FrameAddress address{region.segment, round_down(region.offset, frame_bytes_)};
  const auto it = table_.find(address);
  KVFERRY_CHECK(
      it != table_.end() && it->second.kind == kind && it->second.slot_bytes == region.bytes,
      "a region goes back to its frame");
  Frame& frame = it->second;
  const uint64_t slot = (region.offset - address.second) / frame.slot_bytes;
  const uint64_t bit = uint64_t{1} << (slot % 64);
  KVFERRY_CHECK((frame.taken[slot / 64] & bit) != 0, "a region is freed once");
  frame.taken[slot / 64] &= ~bit;
  --frame.used;
  --region_count_;
  auto& open = open_[index(kind)];
  if (frame.used > 0) {
    open[frame.slot_bytes].insert(address);
    return;
  }
  const auto same = open.find(frame.slot_bytes);
  if (same != open.end()) {
    same->second.erase(address);
    if (same->second.empty()) open.erase(same);
  }
  buddy_.free({address.first, address.second, frame_bytes_});
  --used_[index(kind)];
  table_.erase(it);
}

bool Arena::exhausted(RegionKind kind) const {
  if (!open_[index(kind)].empty()) return false;
  return used_[index(kind)] >= share_[index(kind)] || !buddy_.can_allocate(frame_bytes_);
}

void Arena::verify(const std::vector<std::pair<RegionKind, memory::Region>>& regions) const {
  buddy_.verify();
  std::set<memory::Region> seen;
  std::map<FrameAddress, uint64_t> per_frame;
  for (const auto& [kind, region] : regions) {
    const FrameAddress address{region.segment, round_down(region.offset, frame_bytes_)};
    const auto it = table_.find(address);
    KVFERRY_CHECK(it != table_.end() && it->second.kind == kind,
                  "a region lies in its kind's frame");
    KVFERRY_CHECK(it->second.slot_bytes == region.bytes, "a region has its frame's size");
    KVFERRY_CHECK(seen.insert(region).second, "a region has one holder");
    const uint64_t slot = (region.offset - address.second) / region.bytes;
    KVFERRY_CHECK((it->second.taken[slot / 64] >> (slot % 64) & 1) != 0, "a held region is taken");
    ++per_frame[address];
  }
  KVFERRY_CHECK(regions.size() == region_count_, "every region taken has a holder");
  uint64_t frames = 0;
  for (const auto& [address, frame] : table_) {
    KVFERRY_CHECK(frame.used > 0 && per_frame[address] == frame.used, "a frame counts its regions");
    KVFERRY_CHECK(buddy_.is_allocated({address.first, address.second, frame_bytes_}),
                  "a frame is allocated");
    ++frames;
  }
  KVFERRY_CHECK(buddy_.used_bytes() == frames * frame_bytes_, "the arena is frames and free space");
  KVFERRY_CHECK(used_[0] <= share_[0] && used_[1] <= share_[1], "the floors are respected");
}

}  // namespace kvferry::engine
