// The queues of all GPUs, and the host memory that all of them may touch: the arena's segments and,
// at first need, workers' host pools. Made at start, closed before the devices; everything but
// open(), pin_arena() and close() may be called from any thread.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "daemon/base/mutex.h"
#include "daemon/base/result.h"
#include "daemon/gpu/copy_queue.h"
#include "daemon/gpu/device.h"
#include "daemon/gpu/pinned_memory.h"
#include "daemon/memory/pool.h"
#include "daemon/memory/shared_memory.h"

namespace kvferry::gpu {

// Host pools as GPUs see them. Holds the pools, so that they stay mapped while they are registered.
class HostPins {
 public:
  // Where pool i begins for that device; 0: not at all.
  uint64_t address(std::size_t pool, const Device& device) const {
    return pins_.at(pool)->on(device);
  }

 private:
  friend class Queues;
  std::vector<std::shared_ptr<memory::Pool>> pools_;
  std::vector<std::shared_ptr<const PinnedMemory>> pins_;  // goes first
};

class Queues {
 public:
  // A device whose queue cannot be opened is taken down and the others go on; an error if none is
  // left. `options_of` is asked once for each device.
  static Result<std::unique_ptr<Queues>> open(
      std::shared_ptr<const Devices> devices,
      const std::function<QueueOptions(const Device&)>& options_of);
  ~Queues();
  Queues(const Queues&) = delete;
  Queues& operator=(const Queues&) = delete;

  const Devices& devices() const { return *devices_; }
  // Null: this device has none.
  CopyQueue* of(const Device& device) const;
  // For what can be done on any device; the first that is up, or null.
  CopyQueue* any() const;

  // Registers all segments with all devices; the arena outlives the queues. A device that does not
  // see one of them is taken down. FAILED_PRECONDITION PIN_FAILED if none does.
  Status pin_arena(const memory::HostArena& arena);
  // The region's first byte as the device sees it; 0: not at all.
  cuda::CUdeviceptr arena_address(const Device& device, const memory::Region& region) const;
  // Keeps the region registered, for DeviceJob::keep: a copy that never ends may write it after the
  // queues have gone. Only where a device sees the region.
  std::shared_ptr<const void> arena_pin(const memory::Region& region) const {
    return segments_.at(region.segment);
  }

  // Registers host pools, each once as long as somebody holds its registration. Blocks while their
  // pages are pinned. FAILED_PRECONDITION PIN_FAILED, POOL_UNUSABLE.
  Result<std::shared_ptr<const HostPins>> pin(
      const std::vector<std::shared_ptr<memory::Pool>>& pools) KVFERRY_EXCLUDES(mutex_);

  // All queues, as CopyQueue::close(); the first error.
  Status close(Time deadline);

 private:
  explicit Queues(std::shared_ptr<const Devices> devices) : devices_(std::move(devices)) {}

  const std::shared_ptr<const Devices> devices_;
  std::vector<std::unique_ptr<CopyQueue>> queues_;
  std::vector<std::shared_ptr<const PinnedMemory>> segments_;
  Mutex mutex_;
  std::map<const memory::Pool*, std::weak_ptr<const PinnedMemory>> pinned_
      KVFERRY_GUARDED_BY(mutex_);
};

}  // namespace kvferry::gpu
