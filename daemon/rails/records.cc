#include "daemon/rails/records.h"

namespace kvferry::rails {
namespace {

constexpr uint64_t kCounterBytes = 2 * kCacheLineBytes;
static_assert(sizeof(RailCounters) <= kCounterBytes);

bool is_slot_count(uint32_t count) {
  return count >= 1 && count <= kMaxSlotsOfKind;
}

}  // namespace

std::optional<SharedLayout> SharedLayout::make(const Limits& limits, uint32_t rail_count) {
  constexpr uint32_t kMaxCount = 1U << 20;
  const bool good =
      rail_count >= 1 && rail_count <= kMaxRails && is_ring_capacity(limits.ring_records) &&
      is_slot_count(limits.outbound_small) && is_slot_count(limits.outbound_large) &&
      is_slot_count(limits.inbound_small) && is_slot_count(limits.inbound_large) &&
      limits.lanes >= 1 && limits.lanes <= kMaxCount && limits.held_offers >= 1 &&
      limits.held_offers <= kMaxCount && limits.operations >= 1 && limits.operations <= kMaxCount;
  if (!good) return std::nullopt;
  SharedLayout layout;
  layout.limits_ = limits;
  layout.rail_count_ = rail_count;
  // The limits above keep every product far below 2^64.
  layout.outbound_offset_ = layout.rail_bytes() * rail_count;
  layout.inbound_offset_ = layout.outbound_offset_ +
                           uint64_t{limits.outbound_small} * kSmallSlotBytes +
                           uint64_t{limits.outbound_large} * kLargeSlotBytes;
  layout.inbound_rail_bytes_ = uint64_t{limits.inbound_small} * kSmallSlotBytes +
                               uint64_t{limits.inbound_large} * kLargeSlotBytes;
  layout.total_bytes_ = layout.inbound_offset_ + layout.inbound_rail_bytes_ * rail_count;
  return layout;
}

uint64_t SharedLayout::ring_bytes() const {
  return sizeof(RingHeader) + uint64_t{limits_.ring_records} * kRecordBytes;
}

uint64_t SharedLayout::rail_bytes() const {
  return kCounterBytes + 2 * ring_bytes();
}

RailCounters* SharedLayout::counters(std::byte* base, uint32_t rail) const {
  return reinterpret_cast<RailCounters*>(base + rail_bytes() * rail);
}

RingMemory SharedLayout::command_ring(std::byte* base, uint32_t rail) const {
  std::byte* const at = base + rail_bytes() * rail + kCounterBytes;
  return {reinterpret_cast<RingHeader*>(at), at + sizeof(RingHeader), limits_.ring_records};
}

RingMemory SharedLayout::event_ring(std::byte* base, uint32_t rail) const {
  std::byte* const at = base + rail_bytes() * rail + kCounterBytes + ring_bytes();
  return {reinterpret_cast<RingHeader*>(at), at + sizeof(RingHeader), limits_.ring_records};
}

SharedLayout::SlotRange SharedLayout::inbound_small(uint32_t rail) const {
  const uint32_t outbound = limits_.outbound_small + limits_.outbound_large;
  return {outbound + rail * (limits_.inbound_small + limits_.inbound_large), limits_.inbound_small};
}

SharedLayout::SlotRange SharedLayout::inbound_large(uint32_t rail) const {
  const SlotRange small = inbound_small(rail);
  return {small.first + small.count, limits_.inbound_large};
}

std::optional<SharedLayout::Slot> SharedLayout::slot(uint32_t number) const {
  const auto place = [](uint64_t base, uint32_t small_count, uint32_t index) {
    Slot slot;
    if (index < small_count) {
      slot.offset = base + uint64_t{index} * kSmallSlotBytes;
      slot.capacity = kSmallSlotBytes;
    } else {
      slot.offset = base + uint64_t{small_count} * kSmallSlotBytes +
                    uint64_t{index - small_count} * kLargeSlotBytes;
      slot.capacity = kLargeSlotBytes;
    }
    return slot;
  };
  const uint32_t outbound = limits_.outbound_small + limits_.outbound_large;
  if (number < outbound) return place(outbound_offset_, limits_.outbound_small, number);
  const uint32_t inbound = limits_.inbound_small + limits_.inbound_large;
  const uint32_t index = number - outbound;
  const uint32_t rail = index / inbound;
  if (rail >= rail_count_) return std::nullopt;
  Slot slot =
      place(inbound_offset_ + inbound_rail_bytes_ * rail, limits_.inbound_small, index % inbound);
  slot.inbound = true;
  slot.rail = rail;
  return slot;
}

}  // namespace kvferry::rails
