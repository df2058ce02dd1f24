// The copies of one GPU: gather, scatter, transfer and clear as kernel launches on a few streams,
// and a thread that launches them, looks for their ends, and tells them. Beside that the thread
// looks at the events of workers that say when pages may be touched; nothing is ever put into a
// stream that waits for something a worker controls.
//
// A job ends exactly once, and only when nothing on the device touches its memory any more: after
// the event behind its last command, or when the driver says that the context is dead. A device
// that neither goes on nor fails is taken down, but what was launched on it stays outstanding.
//
// submit(), watch_event(), unwatch_event() and the statistics may be called from any thread and
// never block; close() and the destructor by the owner.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/base/units.h"
#include "daemon/gpu/device.h"
#include "daemon/gpu/device_plan.h"
#include "daemon/gpu/event_watch.h"
#include "daemon/memory/pool.h"
#include "kernels/device_copy.h"

namespace kvferry::gpu {

enum class Outcome : uint8_t {
  kOk,
  kFailed,  // a call of the driver failed, the device went down, a pool had failed, or close()
};

// stream[stream_offset, stream_offset + bytes) of the plan, in the direction that `kind` says.
struct DeviceJob {
  kernels::CopyKind kind = kernels::CopyKind::kGather;
  std::shared_ptr<DevicePlan> plan;   // of this queue's device
  std::shared_ptr<DevicePlan> other;  // transfer: where to
  uint64_t stream_offset = 0;
  uint64_t bytes = 0;
  // Gather: where to; scatter: where from; an address that this device may use (PinnedMemory::on).
  cuda::CUdeviceptr flat = 0;
  // Whether one side is host memory: then a few SMs saturate the bus.
  kernels::FlatMemory over_bus = kernels::FlatMemory::kHost;
  // Kept open until done has returned; the job is refused by itself (kFailed) if one is not usable.
  std::vector<std::shared_ptr<memory::Pool>> pools;
  // Pools' devices other than the queue's: access to them is opened at the first such job.
  std::vector<const Device*> peers;
  // Whatever else the memory needs to stay as it is, e.g. a registration.
  std::shared_ptr<const void> keep;
  // Called exactly once for a job that was taken, on the queue's thread. May submit, but not wait.
  std::function<void(Outcome)> done;
};

struct QueueOptions {
  uint32_t streams = 4;
  uint32_t launched_per_stream = 8;      // others wait in the daemon
  std::size_t max_jobs = 4096;           // taken and not yet ended; beyond it submit() refuses
  std::size_t max_events = 4096;         // watched; beyond it watch_event() refuses
  uint64_t max_plan_bytes = 256u << 20;  // of device memory for plans
  Duration spin = std::chrono::microseconds(20);   // looking without sleep after the last progress
  Duration nap = std::chrono::microseconds(20);    // between two looks from then on
  Duration hang_limit = std::chrono::seconds(30);  // a launched job without end: the device is down
  Duration close_grace = std::chrono::seconds(1);
  // All optional, called on the queue's thread.
  std::function<void()> on_retired;                 // there is no thread any more
  std::function<void(Time)> tick;                   // each turn, at least every 100 ms
  std::function<void(Duration)> on_launch_to_done;  // of a job that ended well
  std::function<void(const Error&)> on_error;       // why a job failed; not for each of many
};

class CopyQueue {
 public:
  // Loads the kernels, makes the streams and starts the thread. UNAVAILABLE NO_KERNELS if this
  // build has none for the device; else as Device::check.
  static Result<std::unique_ptr<CopyQueue>> open(std::shared_ptr<const Device> device,
                                                 QueueOptions options = {});
  // As close() with a deadline that has passed.
  ~CopyQueue();
  CopyQueue(const CopyQueue&) = delete;
  CopyQueue& operator=(const CopyQueue&) = delete;

  // RESOURCE_EXHAUSTED GPU_QUEUE_FULL (a programming error of the caller, who bounds them),
  // UNAVAILABLE GPU_DOWN or GPU_QUEUE_CLOSED: then the job is dropped and done is not called.
  Status submit(DeviceJob job);

  // Opens another process's event and tells once, on the queue's thread, when it is reached. `key`
  // is the caller's, unique among those watched. RESOURCE_EXHAUSTED TOO_MANY_EVENTS, UNAVAILABLE
  // as submit().
  Status watch_event(uint64_t key, const EventHandle& handle, std::function<void(EventState)> told);
  // Nobody waits any more; it may be told all the same if that is under way.
  void unwatch_event(uint64_t key);

  // Takes no more jobs, lets those taken end until `deadline` (monotonic), then ends what has not
  // been launched with kFailed and gives the rest `close_grace`. Joins the thread: afterwards no
  // callback runs. DEADLINE_EXCEEDED GPU_DRAIN if something was dropped. A copy that has not ended
  // even then is told as kFailed, takes the device down, and what it touches (pools, plans, `keep`)
  // is never given back. Idempotent. Not from the queue's thread.
  Status close(Time deadline);

  const Device& device() const;

  // Counters for metrics; each is exact, a set of them read together need not be of one moment.
  struct Stats {
    std::array<std::atomic<uint64_t>, 4> jobs{};   // ended, by CopyKind
    std::array<std::atomic<uint64_t>, 4> bytes{};  // of those that ended well
    std::atomic<uint64_t> failed{0};
    std::atomic<uint64_t> refused{0};  // by submit()
    std::atomic<uint64_t> uploads{0};  // plans
    std::atomic<uint64_t> upload_bytes{0};
    std::atomic<uint64_t> outstanding{0};  // gauge
    std::atomic<uint64_t> events{0};       // gauge: watched
  };
  const Stats& stats() const;

 private:
  class Core;

  explicit CopyQueue(std::unique_ptr<Core> core);
  std::unique_ptr<Core> core_;
};

}  // namespace kvferry::gpu
