// The callers' side: taking jobs, counting them, closing.
#include "daemon/gpu/copy_queue.h"

#include <string>
#include <utility>

#include "daemon/base/check.h"
#include "daemon/gpu/copy_core.h"

namespace kvferry::gpu {

Result<std::unique_ptr<CopyQueue>> CopyQueue::open(std::shared_ptr<const Device> device,
                                                   QueueOptions options) {
  auto core = std::make_unique<Core>(std::move(device), std::move(options));
  KVFERRY_RETURN_IF_ERROR(core->open());
  return std::unique_ptr<CopyQueue>(new CopyQueue(std::move(core)));
}

CopyQueue::CopyQueue(std::unique_ptr<Core> core) : core_(std::move(core)) {}

CopyQueue::~CopyQueue() {
  (void)core_->close(Time{0});
  if (!core_->abandoned()) return;
  // Memory that a copy may still write must not be given to others, not even at the end.
  static Mutex mutex;
  static auto* const lost = new std::vector<std::unique_ptr<Core>>();
  MutexLock lock(mutex);
  lost->push_back(std::move(core_));
}

Status CopyQueue::submit(DeviceJob job) {
  return core_->submit(std::move(job));
}
Status CopyQueue::watch_event(uint64_t key, const EventHandle& handle, EventTold told) {
  return core_->watch(key, handle, std::move(told));
}
void CopyQueue::unwatch_event(uint64_t key) {
  core_->unwatch(key);
}
Status CopyQueue::close(Time deadline) {
  return core_->close(deadline);
}
const Device& CopyQueue::device() const {
  return *core_->device();
}
const CopyQueue::Stats& CopyQueue::stats() const {
  return core_->stats();
}

Status CopyQueue::Core::submit(DeviceJob job) {
  KVFERRY_CHECK(job.done && job.plan != nullptr &&
                    (job.kind != kernels::CopyKind::kTransfer || job.other != nullptr),
                "a job has its plans and somebody to be told");
  if (device_->down()) {
    stats_.refused.fetch_add(1, std::memory_order_relaxed);
    return tl::unexpected<Error>(device_->down_error());
  }
  {
    MutexLock lock(mutex_);
    if (phase_ != Phase::kOpen)
      return fail(Code::kUnavailable, "GPU_QUEUE_CLOSED", "no more copies are taken");
    if (outstanding_ >= options_.max_jobs) {
      stats_.refused.fetch_add(1, std::memory_order_relaxed);
      return fail(Code::kResourceExhausted, "GPU_QUEUE_FULL",
                  std::to_string(options_.max_jobs) + " copies are outstanding");
    }
    ++outstanding_;
    stats_.outstanding.fetch_add(1, std::memory_order_relaxed);
    fresh_.push_back(std::move(job));
  }
  work_.notify_one();
  return {};
}

Status CopyQueue::Core::watch(uint64_t key, const EventHandle& handle, EventTold told) {
  if (device_->down()) return tl::unexpected<Error>(device_->down_error());
  {
    MutexLock lock(mutex_);
    if (phase_ != Phase::kOpen)
      return fail(Code::kUnavailable, "GPU_QUEUE_CLOSED", "no more events are watched");
    if (watched_ >= options_.max_events)
      return fail(Code::kResourceExhausted, "TOO_MANY_EVENTS",
                  std::to_string(options_.max_events) + " events are watched");
    ++watched_;
    stats_.events.fetch_add(1, std::memory_order_relaxed);
    event_commands_.push_back({key, handle, std::move(told)});
  }
  work_.notify_one();
  return {};
}

void CopyQueue::Core::unwatch(uint64_t key) {
  {
    MutexLock lock(mutex_);
    event_commands_.push_back({key, {}, {}});
  }
  work_.notify_one();
}

Status CopyQueue::Core::close(Time deadline) {
  if (!thread_.joinable()) return {};
  bool dropped = false;
  {
    MutexLock lock(mutex_);
    phase_ = Phase::kClosed;
    work_.notify_one();
    while (outstanding_ != 0 && drained_.wait_until(mutex_, deadline)) {
    }
    dropped = outstanding_ != 0;
    phase_ = Phase::kDropping;
    work_.notify_one();
    const Time grace = monotonic_now() + options_.close_grace;
    while (outstanding_ != 0 && drained_.wait_until(mutex_, grace)) {
    }
    phase_ = Phase::kAbandoning;
  }
  work_.notify_one();
  thread_.join();
  if (dropped)
    return fail(Code::kDeadlineExceeded, "GPU_DRAIN", "copies were dropped at the deadline");
  return {};
}

}  // namespace kvferry::gpu
