// Hands out regions of an arena: a binary buddy allocator over one or more segments. It knows only
// numbers and does no I/O, so the engine owns one and the simulator runs the same code. One thread
// at a time. Everything it answers follows from the calls made, never from addresses or hashes: the
// same calls give the same regions.
//
// A segment's size need not be a power of two: it is cut into the largest aligned blocks that fit,
// and what is left below the minimum block is not used.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include "daemon/memory/region.h"

namespace kvferry::memory {

class BuddyAllocator {
 public:
  // `min_block_bytes` is a power of two (anything else is a broken invariant: configuration checks
  // it). Sizes are bytes; a segment smaller than a block gives nothing.
  BuddyAllocator(const std::vector<uint64_t>& segment_bytes, uint64_t min_block_bytes);

  // A region of `bytes` rounded up to a power of two, at least the minimum block, aligned to its
  // own size within its segment. Of the smallest free blocks that hold it the one with the lowest
  // (segment, offset); the lower half is taken on a split. nullopt if no block is large enough.
  // O(log n).
  std::optional<Region> allocate(uint64_t bytes);

  // Takes back a region exactly as allocate() gave it. Anything else (freed twice, foreign, of
  // other size) is a broken invariant and ends the process. O(log n).
  void free(const Region& region);

  // Whether allocate(bytes) would succeed now.
  bool can_allocate(uint64_t bytes) const;
  // How many regions of `bytes` could be allocated now, one after the other ...
  uint64_t count_fitting(uint64_t bytes) const;
  // ... and if nothing were allocated.
  uint64_t count_fitting_when_empty(uint64_t bytes) const;
  // What allocate(bytes) takes: the power of two; 0 if that is beyond 2^63.
  uint64_t block_bytes(uint64_t bytes) const;

  uint64_t capacity_bytes() const { return capacity_bytes_; }
  uint64_t used_bytes() const { return used_bytes_; }
  uint64_t free_bytes() const { return capacity_bytes_ - used_bytes_; }
  // Bytes of the largest free block; 0 if there is none.
  uint64_t largest_free_bytes() const;
  // ... and of the largest block of an empty arena.
  uint64_t largest_block_bytes() const;
  uint64_t region_count() const { return allocated_.size(); }

  // Whether `region` is allocated, exactly so.
  bool is_allocated(const Region& region) const;

  // Checks its own tables (every byte in exactly one block, no two free buddies); ends the process
  // on a contradiction. O(n log n): for tests and the simulator.
  void verify() const;

 private:
  static constexpr std::size_t kOrders = 64;
  using Address = std::pair<uint32_t, uint64_t>;  // segment, offset
  struct AddressHash {
    std::size_t operator()(const Address& a) const {
      return static_cast<std::size_t>((a.second ^ (uint64_t{a.first} << 48)) *
                                      0x9E3779B97F4A7C15ULL);
    }
  };

  // The order (log2) of the block that `bytes` needs; kOrders if there is none.
  std::size_t order_for(uint64_t bytes) const;
  void insert_free(std::size_t order, Address address);
  void erase_free(std::size_t order, Address address);

  std::size_t min_order_ = 0;
  uint64_t capacity_bytes_ = 0;
  uint64_t used_bytes_ = 0;
  uint64_t free_orders_ = 0;               // bit k: free_[k] is not empty
  std::vector<uint64_t> segment_bytes_;    // usable
  std::array<uint64_t, kOrders> roots_{};  // blocks by order when empty
  std::array<std::set<Address>, kOrders> free_;
  std::unordered_map<Address, uint8_t, AddressHash> allocated_;  // to the order
};

}  // namespace kvferry::memory
