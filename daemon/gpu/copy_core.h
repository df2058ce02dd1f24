// What stands behind a CopyQueue: the jobs that wait, those on the device, and the thread between
// them. Split from it so that the driver's part (the thread's) is read apart from the callers'
// part.
#pragma once

#include <array>
#include <deque>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "daemon/base/mutex.h"
#include "daemon/gpu/copy_queue.h"
#include "daemon/gpu/event_pool.h"
#include "daemon/gpu/plan_store.h"

namespace kvferry::gpu {

class CopyQueue::Core {
 public:
  Core(std::shared_ptr<const Device> device, QueueOptions options)
      : device_(std::move(device)), options_(std::move(options)) {}
  // The thread has ended. Closes all that the device was given.
  ~Core();
  Core(const Core&) = delete;
  Core& operator=(const Core&) = delete;

  Status open();

  // ---- callers
  Status submit(DeviceJob job) KVFERRY_EXCLUDES(mutex_);
  Status watch(uint64_t key, const EventHandle& handle, EventTold told) KVFERRY_EXCLUDES(mutex_);
  void unwatch(uint64_t key) KVFERRY_EXCLUDES(mutex_);
  Status close(Time deadline) KVFERRY_EXCLUDES(mutex_);
  // Something is still on the device for ever: the core must not be destroyed.
  bool abandoned() const { return abandoned_; }

  const std::shared_ptr<const Device>& device() const { return device_; }
  const Stats& stats() const { return stats_; }

 private:
  struct EventCommand {
    uint64_t key = 0;
    EventHandle handle{};
    EventTold told;  // absent: unwatch
  };
  // A job of which something has been put into a stream. Without `job.done` it is only the bringing
  // of a plan whose job has to wait for room for the other one.
  struct Launched {
    DeviceJob job;
    std::array<std::shared_ptr<DevicePlan::Place>, 2> places;
    Event end;        // behind all of it; absent: it could not be recorded, the stream tells
    bool ok = false;  // all of it was put there
    Time since;
    uint32_t refused_looks = 0;  // the driver would not say how far it is
  };
  struct Stream {
    cuda::CUstream stream = nullptr;
    std::deque<Launched> launched;
    // Its last job has no event of its own, so nothing may be put behind it.
    bool blocked() const { return !launched.empty() && !launched.back().end; }
  };
  enum class Phase : uint8_t { kOpen, kClosed, kDropping, kAbandoning };

  // ---- the thread's, with the context current
  Status load_kernels();
  void run();
  void turn(Time now);
  void take_fresh();
  bool look_for_ends(Time now);
  // A device that fails while it is idle shall be seen, too.
  void probe(Time now);
  bool look_at(Stream& stream, Time now);
  bool any_launched() const;
  bool launch_waiting(Time now);
  Stream* free_stream();
  // Ends or launches it; false, leaving it as it is, if it has to wait for others to end.
  bool launch(DeviceJob& job, Stream& stream, Time now);
  // Behind all that has been put there: from now on it ends by evidence alone.
  void follow(Launched launched, Stream& stream);
  Status put(const DeviceJob& job, Stream& stream, Launched& launched, bool& touched, bool& later);
  Status open_peers(const DeviceJob& job);
  void end(DeviceJob& job, bool ok, Duration on_device);
  void tell(const Error& error, Time now);
  void abandon();
  // Until there is something to do; true to go on.
  bool rest(Time now) KVFERRY_EXCLUDES(mutex_);

  const std::shared_ptr<const Device> device_;
  const QueueOptions options_;
  Stats stats_;

  Mutex mutex_;
  CondVar work_;     // for the thread
  CondVar drained_;  // for close()
  std::deque<DeviceJob> fresh_ KVFERRY_GUARDED_BY(mutex_);
  std::vector<EventCommand> event_commands_ KVFERRY_GUARDED_BY(mutex_);
  std::size_t outstanding_ KVFERRY_GUARDED_BY(mutex_) = 0;
  std::size_t watched_ KVFERRY_GUARDED_BY(mutex_) = 0;
  Phase phase_ KVFERRY_GUARDED_BY(mutex_) = Phase::kOpen;

  // The thread's own, after open().
  cuda::CUmodule module_ = nullptr;
  std::array<cuda::CUfunction, 4> functions_{};  // by CopyKind
  std::optional<EventPool> events_;
  std::optional<PlanStore> plans_;
  std::optional<EventWatch> watch_;
  std::deque<Stream> streams_;
  std::deque<DeviceJob> waiting_;
  std::vector<const Device*> peers_;  // access to them is open
  bool dropping_ = false;
  bool dead_ = false;  // the context is: nothing of it touches memory any more
  Time last_progress_{};
  Time last_told_{};
  Time next_probe_{};           // of an idle device
  std::vector<Launched> lost_;  // by abandon()
  bool abandoned_ = false;

  std::thread thread_;
};

}  // namespace kvferry::gpu
