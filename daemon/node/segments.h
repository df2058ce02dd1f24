// Bounce memory by segment number, as whoever copies needs it: where a region's bytes lie, for the
// processor and for each GPU. This daemon's own arenas have one such table, and so has what is
// mapped of a peer's.
//
// Filled by one thread, then only read, by any.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "daemon/gpu/device.h"
#include "daemon/gpu/pinned_memory.h"
#include "daemon/memory/pool.h"
#include "daemon/memory/region.h"

namespace kvferry::node {

class Segments {
 public:
  struct Segment {
    uint64_t bytes = 0;
    std::byte* host = nullptr;                     // in host memory, or null
    std::shared_ptr<const gpu::PinnedMemory> pin;  // host: as GPUs see it; null: none does
    const gpu::Device* device = nullptr;           // in this GPU's memory, or null
    cuda::CUdeviceptr base = 0;                    // device: its first byte
    std::shared_ptr<const void> keep;              // what the memory lasts by
    // Host memory of a peer: copies by the processor go under the pool's guard against faults.
    std::shared_ptr<memory::Pool> pool = nullptr;
  };

  // Numbers begin at `first`.
  explicit Segments(uint32_t first = 0) : first_(first) {}

  void add(Segment segment) { segments_.push_back(std::move(segment)); }
  // GPUs see the host's segment from now on. The number is one that was added.
  void pin(uint32_t number, std::shared_ptr<const gpu::PinnedMemory> pin) {
    segments_.at(number - first_).pin = std::move(pin);
  }
  std::size_t count() const { return segments_.size(); }

  // Whether all of the region lies in one of the segments.
  bool holds(const memory::Region& region) const;
  // All below are for a region that holds() has said yes to.
  // The GPU in whose memory it lies; null: host memory.
  const gpu::Device* device_of(const memory::Region& region) const { return at(region).device; }
  // Its first byte; null unless it is in host memory.
  std::byte* host_address(const memory::Region& region) const;
  // Its first byte for kernels on `device`, which may be another than that in whose memory it lies,
  // with peer access; 0: that device does not see it.
  cuda::CUdeviceptr address_on(const gpu::Device& device, const memory::Region& region) const;
  // Null but for host memory of a peer.
  std::shared_ptr<memory::Pool> pool(const memory::Region& region) const { return at(region).pool; }
  // For a copy to hold, which may outlast everybody else if it never ends.
  std::shared_ptr<const void> keep(const memory::Region& region) const;

 private:
  const Segment& at(const memory::Region& region) const {
    return segments_[region.segment - first_];
  }

  uint32_t first_ = 0;
  std::vector<Segment> segments_;
};

}  // namespace kvferry::node
