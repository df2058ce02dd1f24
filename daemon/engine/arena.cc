#include "daemon/engine/arena.h"

#include <algorithm>
#include <bit>

#include "daemon/base/check.h"
#include "daemon/base/units.h"

namespace kvferry::engine {

Arena::Arena(const EngineConfig& config, std::size_t number)
    : frame_bytes_(std::bit_ceil(std::max<uint64_t>(config.chunk_bytes, 1))),
      min_bytes_(
          std::min(std::bit_ceil(std::max<uint64_t>(config.min_region_bytes, 1)), frame_bytes_)),
      staged_ahead_(config.staged_ahead),
      segment_count_(static_cast<uint32_t>(config.arenas.at(number).segment_bytes.size())),
      buddy_(config.arenas.at(number).segment_bytes, min_bytes_) {
  for (std::size_t before = 0; before < number; ++before)
    first_segment_ += static_cast<uint32_t>(config.arenas[before].segment_bytes.size());
  frame_count_ = buddy_.count_fitting_when_empty(frame_bytes_);
  if (config.arenas[number].mapped) {
    KVFERRY_CHECK(frame_count_ > 0, "a mapped arena holds a region of the largest chunk");
    kept_ = share_[index(RegionKind::kLanding)] = frame_count_;
    return;
  }
  kept_ = uint64_t{staged_ahead_} + 2;
  KVFERRY_CHECK(frame_count_ >= kept_,
                "the arena holds two regions of the largest chunk more than are staged ahead");
  share_[index(RegionKind::kLanding)] = frame_count_ - (uint64_t{config.staged_ahead} + 1);
  share_[index(RegionKind::kStaging)] = frame_count_ - 1;
}

Arena::FrameAddress Arena::address_of(const memory::Region& region) const {
  return {region.segment, round_down(region.offset, frame_bytes_)};
}

memory::Region Arena::block_of(FrameAddress address) const {
  return {address.first - first_segment_, address.second, frame_bytes_};
}

void Arena::open(FrameAddress address, const Frame& frame) {
  open_[index(frame.kind)][{frame.owner, frame.slot_bytes}].insert(address);
}

void Arena::shut(FrameAddress address, const Frame& frame) {
  auto& open = open_[index(frame.kind)];
  const auto same = open.find({frame.owner, frame.slot_bytes});
  if (same == open.end()) return;
  same->second.erase(address);
  if (same->second.empty()) open.erase(same);
}

void Arena::count(const Frame& frame, bool in) {
  const auto add = [in](uint64_t& counter) { in ? ++counter : --counter; };
  add(used_[index(frame.kind)]);
  if (frame.quarantined > 0)
    add(quarantined_frames_);
  else if (frame.kind == RegionKind::kLanding && frame.owner == 0)
    add(others_landing_);
  if (frame.owner == 0) return;
  Promise& promise = promises_.at(frame.owner);
  idle_ -= promise.idle();
  add(promise.used);
  idle_ += promise.idle();
}

memory::Region Arena::take_slot(FrameAddress address, Frame& frame) {
  const uint64_t slots = frame_bytes_ / frame.slot_bytes;
  for (std::size_t word = 0; word < frame.taken.size(); ++word) {
    if (frame.taken[word] == ~uint64_t{0}) continue;
    const auto bit = static_cast<uint64_t>(std::countr_one(frame.taken[word]));
    const uint64_t slot = word * 64 + bit;
    KVFERRY_CHECK(slot < slots, "an open frame has a free slot");
    frame.taken[word] |= uint64_t{1} << bit;
    if (++frame.used == slots) shut(address, frame);
    ++region_count_;
    return {address.first, address.second + slot * frame.slot_bytes, frame.slot_bytes};
  }
  KVFERRY_CHECK(false, "an open frame has a free slot");
  return {};
}

memory::Region Arena::take_frame(RegionKind kind, uint64_t owner, uint64_t slot) {
  const auto block = buddy_.allocate(frame_bytes_);
  KVFERRY_CHECK(block.has_value(), "an arena of frames has room for as many as it was cut into");
  const FrameAddress address{first_segment_ + block->segment, block->offset};
  Frame fresh;
  fresh.kind = kind;
  fresh.owner = owner;
  fresh.slot_bytes = slot;
  fresh.taken.assign(ceil_div(frame_bytes_ / slot, 64), 0);
  count(fresh, true);
  open(address, fresh);
  return take_slot(address, table_.emplace(address, std::move(fresh)).first->second);
}

// Whether somebody without a reservation may take one more frame.
bool Arena::may_take_frame(RegionKind kind) const {
  const uint64_t used = used_[0] + used_[1];
  const bool unpromised = used + idle_ < frame_count_;
  if (kind == RegionKind::kStaging)
    return used_[index(kind)] < share_[index(kind)] && used < frame_count_ &&
           (unpromised || used_[index(kind)] < uint64_t{staged_ahead_} + 1);
  return used_[index(kind)] < share_[index(kind)] && used < frame_count_ &&
         (others_landing_ == 0 || (unpromised && used_[index(kind)] + idle_ < share_[index(kind)]));
}

uint64_t Arena::region_bytes(uint64_t bytes) const {
  return std::max(std::bit_ceil(bytes), min_bytes_);
}

std::optional<memory::Region> Arena::take(RegionKind kind, uint64_t bytes) {
  KVFERRY_CHECK(bytes > 0 && bytes <= frame_bytes_, "a region is no larger than the largest chunk");
  const uint64_t slot = region_bytes(bytes);
  auto& open = open_[index(kind)];
  const auto same = open.find({0, slot});
  if (same != open.end()) {
    const FrameAddress address = *same->second.begin();
    return take_slot(address, table_.at(address));
  }
  if (may_take_frame(kind)) return take_frame(kind, 0, slot);
  // A larger slot serves too, rather than wait.
  const auto larger = open.upper_bound({0, slot});
  if (larger == open.end() || larger->first.first != 0) return std::nullopt;
  const FrameAddress address = *larger->second.begin();
  return take_slot(address, table_.at(address));
}

std::optional<memory::Region> Arena::take_reserved(uint64_t reservation, uint64_t bytes) {
  KVFERRY_CHECK(bytes > 0 && bytes <= frame_bytes_, "a region is no larger than the largest chunk");
  const auto promise = promises_.find(reservation);
  if (promise == promises_.end()) return std::nullopt;
  const uint64_t slot = region_bytes(bytes);
  auto& open = open_[index(RegionKind::kLanding)];
  const auto fits = open.lower_bound({reservation, slot});
  if (fits != open.end() && fits->first.first == reservation) {
    const FrameAddress address = *fits->second.begin();
    return take_slot(address, table_.at(address));
  }
  constexpr std::size_t kLanding = static_cast<std::size_t>(RegionKind::kLanding);
  if (promise->second.idle() == 0 || used_[kLanding] >= share_[kLanding] ||
      used_[0] + used_[1] >= frame_count_)
    return std::nullopt;
  return take_frame(RegionKind::kLanding, reservation, slot);
}

void Arena::give_back(RegionKind kind, const memory::Region& region, bool quarantined) {
  const FrameAddress address = address_of(region);
  const auto it = table_.find(address);
  KVFERRY_CHECK(
      it != table_.end() && it->second.kind == kind && it->second.slot_bytes == region.bytes,
      "a region goes back to its frame");
  Frame& frame = it->second;
  const uint64_t slot = (region.offset - address.second) / frame.slot_bytes;
  const uint64_t bit = uint64_t{1} << (slot % 64);
  KVFERRY_CHECK((frame.taken[slot / 64] & bit) != 0, "a region is freed once");
  count(frame, false);
  frame.taken[slot / 64] &= ~bit;
  --frame.used;
  --region_count_;
  if (quarantined) --frame.quarantined;
  if (frame.used > 0) {
    count(frame, true);
    open(address, frame);
  } else {
    shut(address, frame);
    buddy_.free(block_of(address));
    table_.erase(it);
  }
  if (quarantined) share_out();
}

void Arena::quarantine(const memory::Region& region) {
  const FrameAddress address = address_of(region);
  Frame& frame = table_.at(address);
  // The reservation gets another frame for it, if there is one.
  if (frame.owner != 0) change_owner(address, frame, 0);
  count(frame, false);
  ++frame.quarantined;
  count(frame, true);
  share_out();
}

void Arena::change_owner(FrameAddress address, Frame& frame, uint64_t owner) {
  const bool is_open = frame.used < frame_bytes_ / frame.slot_bytes;
  if (is_open) shut(address, frame);
  count(frame, false);
  frame.owner = owner;
  count(frame, true);
  if (is_open) open(address, frame);
}

bool Arena::exhausted(RegionKind kind) const {
  const auto& open = open_[index(kind)];
  if (!open.empty() && open.begin()->first.first == 0) return false;
  return !may_take_frame(kind);
}

// ---- reservations -----------------------------------------------------------------------------

uint64_t Arena::most_reserved() const {
  const uint64_t kept = quarantined_frames_ + kept_;
  return frame_count_ > kept ? frame_count_ - kept : 0;
}

// What may be promised goes to the oldest first.
void Arena::share_out() {
  uint64_t left = most_reserved();
  idle_ = promised_ = 0;
  for (auto& [id, promise] : promises_) {
    promise.promised = std::min(promise.asked, left);
    left -= promise.promised;
    promised_ += promise.promised;
    idle_ += promise.idle();
  }
}

void Arena::reserve(uint64_t reservation, uint64_t frames) {
  KVFERRY_CHECK(reservation != 0 && frames > 0 && asked_ + frames <= most_reserved(),
                "no more is promised than may be");
  KVFERRY_CHECK(promises_.emplace(reservation, Promise{frames, 0, 0}).second,
                "a reservation is made once");
  asked_ += frames;
  share_out();
}

void Arena::unreserve(uint64_t reservation) {
  const auto it = promises_.find(reservation);
  if (it == promises_.end()) return;
  if (it->second.used > 0)
    for (auto& [address, frame] : table_)
      if (frame.owner == reservation) change_owner(address, frame, 0);
  asked_ -= it->second.asked;
  promises_.erase(it);
  share_out();
}

uint64_t Arena::promised(uint64_t reservation) const {
  const auto it = promises_.find(reservation);
  return it == promises_.end() ? 0 : it->second.promised;
}

bool Arena::is_reserved(const memory::Region& region) const {
  const auto it = table_.find(address_of(region));
  return it != table_.end() && it->second.owner != 0;
}

// ---- invariants -------------------------------------------------------------------------------

void Arena::verify(const std::vector<std::pair<RegionKind, memory::Region>>& regions) const {
  buddy_.verify();
  std::set<memory::Region> seen;
  std::map<FrameAddress, uint64_t> per_frame;
  for (const auto& [kind, region] : regions) {
    const FrameAddress address = address_of(region);
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
  std::array<uint64_t, 2> frames{};
  std::map<uint64_t, uint64_t> owned;
  uint64_t quarantined = 0;
  for (const auto& [address, frame] : table_) {
    KVFERRY_CHECK(frame.used > 0 && per_frame[address] == frame.used, "a frame counts its regions");
    KVFERRY_CHECK(frame.quarantined <= frame.used, "a quarantined region is taken");
    KVFERRY_CHECK(buddy_.is_allocated(block_of(address)), "a frame is allocated");
    KVFERRY_CHECK(frame.owner == 0 || (promises_.contains(frame.owner) && frame.quarantined == 0 &&
                                       frame.kind == RegionKind::kLanding),
                  "a reservation's frames are for landing, and whole");
    ++frames[index(frame.kind)];
    if (frame.owner != 0) ++owned[frame.owner];
    quarantined += frame.quarantined > 0;
  }
  KVFERRY_CHECK(frames == used_ && quarantined == quarantined_frames_, "frames are counted");
  KVFERRY_CHECK(buddy_.used_bytes() == (frames[0] + frames[1]) * frame_bytes_,
                "the arena is frames and free space");
  KVFERRY_CHECK(used_[0] <= share_[0] && used_[1] <= share_[1], "the floors are respected");
  uint64_t promised = 0;
  uint64_t idle = 0;
  for (const auto& [id, promise] : promises_) {
    KVFERRY_CHECK(promise.promised <= promise.asked && promise.used == owned[id],
                  "a reservation counts its frames");
    promised += promise.promised;
    idle += promise.idle();
  }
  KVFERRY_CHECK(promised == promised_ && idle == idle_ && promised <= most_reserved(),
                "no more is promised than may be");
}

}  // namespace kvferry::engine
