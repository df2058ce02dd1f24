#include "daemon/gpu/queues.h"

#include <string>

#include "daemon/base/units.h"

namespace kvferry::gpu {
namespace {

constexpr uint64_t kPageBytes = 4096;

}  // namespace

Result<std::unique_ptr<Queues>> Queues::open(
    std::shared_ptr<const Devices> devices,
    const std::function<QueueOptions(const Device&)>& options_of) {
  std::unique_ptr<Queues> queues(new Queues(std::move(devices)));
  Error last{Code::kUnavailable, "NO_GPU", "there is none", {}};
  for (const auto& device : queues->devices_->all()) {
    const QueueOptions options = options_of(*device);
    auto queue = CopyQueue::open(device, options);
    if (queue) {
      queues->queues_.push_back(std::move(*queue));
      continue;
    }
    if (options.on_retired) options.on_retired();
    last = queue.error();
    device->take_down(last);
  }
  if (queues->queues_.empty()) return tl::unexpected<Error>(std::move(last));
  return queues;
}

Queues::~Queues() {
  (void)close(Time{0});
}

CopyQueue* Queues::of(const Device& device) const {
  for (const auto& queue : queues_)
    if (&queue->device() == &device) return queue.get();
  return nullptr;
}

CopyQueue* Queues::any() const {
  for (const auto& queue : queues_)
    if (!queue->device().down()) return queue.get();
  return nullptr;
}

Result<std::shared_ptr<const HostPins>> Queues::pin(
    const std::vector<std::shared_ptr<memory::Pool>>& pools) {
  auto pins = std::make_shared<HostPins>();
  for (const auto& pool : pools) {
    std::shared_ptr<const PinnedMemory> pinned;
    {
      MutexLock lock(mutex_);
      std::erase_if(pinned_, [](const auto& entry) { return entry.second.expired(); });
      const auto known = pinned_.find(pool.get());
      if (known != pinned_.end()) pinned = known->second.lock();
    }
    if (pinned == nullptr) {
      // Pinning would fill a hole at the daemon's expense.
      if (!pool->usable(monotonic_now()))
        return fail(Code::kFailedPrecondition, "POOL_UNUSABLE", "some of its pages are gone");
      auto fresh =
          PinnedMemory::pin(devices_->all(), pool->base(), round_up(pool->bytes(), kPageBytes));
      KVFERRY_RETURN_IF_ERROR(fresh);
      pinned = std::move(*fresh);
      MutexLock lock(mutex_);
      pinned_[pool.get()] = pinned;
    }
    pins->pools_.push_back(pool);
    pins->pins_.push_back(std::move(pinned));
  }
  return std::shared_ptr<const HostPins>(std::move(pins));
}

Status Queues::close(Time deadline) {
  Status first;
  for (const auto& queue : queues_)
    if (Status closed = queue->close(deadline); !closed && first) first = closed;
  return first;
}

}  // namespace kvferry::gpu
