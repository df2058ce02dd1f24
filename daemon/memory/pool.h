// What a layout's pages lie in: memory of a worker, or of the daemon's own that is used like it,
// on the host or on a GPU. Copies know pools only by this.
//
// Shared: the registration holds one reference, each layout and each copy under way another, so the
// memory stays mapped until the last copy has ended. All functions may be called from any thread.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "daemon/base/units.h"

namespace kvferry::gpu {
class Device;
}

namespace kvferry::memory {

class Pool {
 public:
  virtual ~Pool() = default;
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // The first byte, as an address on the pool's device: a value to compute with and to hand to that
  // device. Only a host pool's may be dereferenced by the CPU, and only under run_guarded.
  std::byte* base() const { return base_; }
  uint64_t bytes() const { return bytes_; }
  // Where the memory is; null: on the host. Lives as long as the pool.
  const gpu::Device* device() const { return device_; }

  // Whether a fault of the CPU at this address is one of this pool's memory.
  virtual bool contains(const void* /*address*/) const { return false; }
  // Whether some bytes may be of both. True where that is not known.
  virtual bool same_memory(const Pool& other) const = 0;

  // Set when a copy faulted or the device went down, never cleared: nothing is copied from or to
  // the pool any more.
  virtual bool failed() const { return failed_.load(std::memory_order_acquire); }
  void mark_failed() { failed_.store(true, std::memory_order_release); }
  // Whether a copy may begin now; may look at the memory first.
  virtual bool usable(Time /*now*/) { return !failed(); }

 protected:
  Pool(std::byte* base, uint64_t bytes, const gpu::Device* device)
      : base_(base), bytes_(bytes), device_(device) {}

 private:
  std::byte* const base_;
  const uint64_t bytes_;
  const gpu::Device* const device_;
  std::atomic<bool> failed_{false};
};

}  // namespace kvferry::memory
