#include "daemon/rails/process/outbox.h"

#include <algorithm>
#include <cstring>

#include "daemon/rails/shared_memory.h"

namespace kvferry::rails {
namespace {

// What a kept message costs beside its bytes.
constexpr uint64_t kKeptOverheadBytes = 128;

}  // namespace

Outbox::Outbox(const SharedLayout& layout, std::byte* shared, uint32_t rail, int doorbell)
    : layout_(layout),
      shared_(shared),
      doorbell_(doorbell),
      ring_(layout.event_ring(shared, rail)),
      small_(layout.inbound_small(rail)),
      large_(layout.inbound_large(rail)),
      out_(small_.count + large_.count, false) {
  for (uint32_t i = small_.count; i > 0; --i) free_small_.push_back(small_.first + i - 1);
  for (uint32_t i = large_.count; i > 0; --i) free_large_.push_back(large_.first + i - 1);
}

void Outbox::emit(const Record& record, Wake wake) {
  if (!records_.empty() || ring_.push(record) != RingState::kOk) records_.push_back(record);
  unrung_ = std::min(unrung_.value_or(wake), wake);
}

bool Outbox::place(Record record, std::span<const uint8_t> bytes) {
  std::vector<uint32_t>* free = &free_small_;
  if (bytes.size() > kSmallSlotBytes || free->empty()) free = &free_large_;
  if (free->empty()) return false;
  const uint32_t number = free->back();
  free->pop_back();
  out_[number - small_.first] = true;
  if (!bytes.empty())
    std::memcpy(shared_ + layout_.slot(number)->offset, bytes.data(), bytes.size());
  record.slot = number;
  record.slot_bytes = static_cast<uint32_t>(bytes.size());
  emit(record);
  return true;
}

bool Outbox::emit_message(const Record& record, std::span<const uint8_t> bytes) {
  if (bytes.size() > kLargeSlotBytes) return false;
  if (messages_.empty() && place(record, bytes)) return true;
  const uint64_t cost = bytes.size() + kKeptOverheadBytes;
  if (kept_bytes_ + cost > layout_.limits().backlog_bytes) return false;
  kept_bytes_ += cost;
  messages_.push_back({record, {bytes.begin(), bytes.end()}});
  return true;
}

bool Outbox::take_back(uint32_t slot) {
  if (slot < small_.first || slot - small_.first >= out_.size() || !out_[slot - small_.first])
    return false;
  out_[slot - small_.first] = false;
  (slot < large_.first ? free_small_ : free_large_).push_back(slot);
  return true;
}

bool Outbox::flush() {
  bool moved = false;
  while (!records_.empty() && ring_.push(records_.front()) == RingState::kOk) {
    records_.pop_front();
    unrung_ = Wake::kWork;
    moved = true;
  }
  while (!messages_.empty() && place(messages_.front().record, messages_.front().bytes)) {
    kept_bytes_ -= messages_.front().bytes.size() + kKeptOverheadBytes;
    messages_.pop_front();
    moved = true;
  }
  ring();
  return moved;
}

void Outbox::ring() {
  if (!unrung_) return;
  if (ring_.take_wake(*unrung_)) ring_doorbell(doorbell_);
  unrung_.reset();
}

}  // namespace kvferry::rails
