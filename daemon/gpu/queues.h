// The queues of all GPUs, and the host pools of workers that they have come to touch. Made at
// start, closed before the devices; everything but open() and close() may be called from any
// thread.
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
  Mutex mutex_;
  std::map<const memory::Pool*, std::weak_ptr<const PinnedMemory>> pinned_
      KVFERRY_GUARDED_BY(mutex_);
};

}  // namespace kvferry::gpu
