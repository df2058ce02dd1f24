#include "daemon/memory/buddy.h"

#include <bit>

#include "daemon/base/check.h"
#include "daemon/base/units.h"

namespace kvferry::memory {
namespace {

uint64_t bytes_of_order(std::size_t order) {
  return uint64_t{1} << order;
}

}  // namespace

BuddyAllocator::BuddyAllocator(const std::vector<uint64_t>& segment_bytes,
                               uint64_t min_block_bytes) {
  KVFERRY_CHECK(std::has_single_bit(min_block_bytes), "the minimum block is a power of two");
  KVFERRY_CHECK(segment_bytes.size() <= UINT32_MAX, "segments fit their index");
  min_order_ = static_cast<std::size_t>(std::countr_zero(min_block_bytes));
  for (std::size_t i = 0; i < segment_bytes.size(); ++i) {
    const uint64_t usable = round_down(segment_bytes[i], min_block_bytes);
    segment_bytes_.push_back(usable);
    KVFERRY_CHECK(checked_add(capacity_bytes_, usable, capacity_bytes_),
                  "the arena's size fits 64 bits");
    // The largest power of two that is left is always aligned here: what lies before it is a sum of
    // larger ones.
    for (uint64_t offset = 0; offset < usable;) {
      const uint64_t block = std::bit_floor(usable - offset);
      const auto order = static_cast<std::size_t>(std::countr_zero(block));
      insert_free(order, {static_cast<uint32_t>(i), offset});
      ++roots_[order];
      offset += block;
    }
  }
}

std::size_t BuddyAllocator::order_for(uint64_t bytes) const {
  if (bytes <= bytes_of_order(min_order_)) return min_order_;
  if (bytes > bytes_of_order(kOrders - 1)) return kOrders;
  return static_cast<std::size_t>(std::countr_zero(std::bit_ceil(bytes)));
}

void BuddyAllocator::insert_free(std::size_t order, Address address) {
  const bool inserted = free_[order].insert(address).second;
  KVFERRY_CHECK(inserted, "a block is free only once");
  free_orders_ |= uint64_t{1} << order;
}

void BuddyAllocator::erase_free(std::size_t order, Address address) {
  const bool erased = free_[order].erase(address) == 1;
  KVFERRY_CHECK(erased, "the block is free");
  if (free_[order].empty()) free_orders_ &= ~(uint64_t{1} << order);
}

std::optional<Region> BuddyAllocator::allocate(uint64_t bytes) {
  const std::size_t wanted = order_for(bytes);
  if (wanted == kOrders) return std::nullopt;
  const uint64_t large_enough = free_orders_ & (~uint64_t{0} << wanted);
  if (large_enough == 0) return std::nullopt;
  auto order = static_cast<std::size_t>(std::countr_zero(large_enough));
  const Address address = *free_[order].begin();
  erase_free(order, address);
  while (order > wanted) {
    --order;
    insert_free(order, {address.first, address.second + bytes_of_order(order)});
  }
  allocated_.emplace(address, static_cast<uint8_t>(wanted));
  used_bytes_ += bytes_of_order(wanted);
  return Region{address.first, address.second, bytes_of_order(wanted)};
}

void BuddyAllocator::free(const Region& region) {
  KVFERRY_CHECK(is_allocated(region), "a freed region is allocated, exactly as it was given out");
  allocated_.erase({region.segment, region.offset});
  used_bytes_ -= region.bytes;
  auto order = static_cast<std::size_t>(std::countr_zero(region.bytes));
  Address address{region.segment, region.offset};
  // A buddy that reaches past the segment's end, or that belongs to a block of another size, is
  // never in the table of this order, so joining stops by itself at the blocks the segment was cut
  // into.
  while (order + 1 < kOrders) {
    const Address buddy{address.first, address.second ^ bytes_of_order(order)};
    if (!free_[order].contains(buddy)) break;
    erase_free(order, buddy);
    address.second &= ~bytes_of_order(order);
    ++order;
  }
  insert_free(order, address);
}

bool BuddyAllocator::can_allocate(uint64_t bytes) const {
  const std::size_t wanted = order_for(bytes);
  return wanted != kOrders && (free_orders_ & (~uint64_t{0} << wanted)) != 0;
}

uint64_t BuddyAllocator::count_fitting(uint64_t bytes) const {
  const std::size_t wanted = order_for(bytes);
  uint64_t count = 0;
  for (std::size_t order = wanted; order < kOrders; ++order)
    count += uint64_t{free_[order].size()} << (order - wanted);
  return count;
}

uint64_t BuddyAllocator::count_fitting_when_empty(uint64_t bytes) const {
  const std::size_t wanted = order_for(bytes);
  uint64_t count = 0;
  for (std::size_t order = wanted; order < kOrders; ++order)
    count += roots_[order] << (order - wanted);
  return count;
}

uint64_t BuddyAllocator::block_bytes(uint64_t bytes) const {
  const std::size_t order = order_for(bytes);
  return order == kOrders ? 0 : bytes_of_order(order);
}

uint64_t BuddyAllocator::largest_free_bytes() const {
  return std::bit_floor(free_orders_);
}

uint64_t BuddyAllocator::largest_block_bytes() const {
  for (std::size_t order = kOrders; order-- > 0;)
    if (roots_[order] != 0) return bytes_of_order(order);
  return 0;
}

bool BuddyAllocator::is_allocated(const Region& region) const {
  const auto found = allocated_.find({region.segment, region.offset});
  return found != allocated_.end() && bytes_of_order(found->second) == region.bytes;
}

void BuddyAllocator::verify() const {
  // All blocks, free and allocated, by address; they must tile each segment.
  std::set<std::pair<Address, std::size_t>> blocks;
  uint64_t used = 0;
  for (const auto& [address, order] : allocated_) {
    blocks.emplace(address, order);
    used += bytes_of_order(order);
  }
  for (std::size_t order = 0; order < kOrders; ++order) {
    KVFERRY_CHECK(free_[order].empty() == ((free_orders_ >> order & 1) == 0),
                  "the mask of orders tells which have free blocks");
    for (const Address& address : free_[order]) {
      blocks.emplace(address, order);
      const Address buddy{address.first, address.second ^ bytes_of_order(order)};
      KVFERRY_CHECK(!free_[order].contains(buddy), "two free buddies are one block");
    }
  }
  KVFERRY_CHECK(used == used_bytes_, "the used bytes are those of the allocated blocks");
  auto block = blocks.begin();
  for (std::size_t segment = 0; segment < segment_bytes_.size(); ++segment) {
    uint64_t offset = 0;
    while (offset < segment_bytes_[segment]) {
      KVFERRY_CHECK(block != blocks.end() && block->first.first == segment &&
                        block->first.second == offset && block->second >= min_order_ &&
                        offset % bytes_of_order(block->second) == 0,
                    "the blocks tile their segment");
      offset += bytes_of_order(block->second);
      ++block;
    }
    KVFERRY_CHECK(offset == segment_bytes_[segment], "no block reaches past its segment");
  }
  KVFERRY_CHECK(block == blocks.end(), "no block lies outside the segments");
}

}  // namespace kvferry::memory
