// The thread's side: everything that speaks to the driver.
#include "daemon/gpu/copy_core.h"

#include <pthread.h>
#include <sys/prctl.h>

#include <algorithm>
#include <string>
#include <utility>

#include "daemon/base/check.h"
#include "daemon/gpu/closing.h"

namespace kvferry::gpu {
namespace {

constexpr Duration kLongestRest = std::chrono::milliseconds(100);
constexpr Duration kEventRest = std::chrono::microseconds(50);  // while only events are watched
constexpr Duration kProbe = std::chrono::milliseconds(500);
constexpr Duration kDownRest = std::chrono::milliseconds(5);
constexpr Duration kTellOnce = std::chrono::seconds(1);
// A driver that does not say how far a stream is, so often and for so long, is taken for broken.
constexpr uint32_t kRefusedLooks = 100;
constexpr Duration kRefusedFor = std::chrono::seconds(1);

std::size_t index_of(kernels::CopyKind kind) {
  return static_cast<std::size_t>(kind);
}

}  // namespace

// ---- opening and closing
// -------------------------------------------------------------------------

Status CopyQueue::Core::open() {
  const Device::Current current(*device_);
  KVFERRY_RETURN_IF_ERROR(current.status());
  KVFERRY_RETURN_IF_ERROR(load_kernels());
  const cuda::Api& api = device_->api();
  for (uint32_t i = 0; i < std::max(options_.streams, 1U); ++i) {
    Stream& stream = streams_.emplace_back();
    KVFERRY_RETURN_IF_ERROR(device_->check(
        api.cuStreamCreate(&stream.stream, cuda::CU_STREAM_NON_BLOCKING), "cuStreamCreate"));
  }
  events_.emplace(*device_);
  plans_.emplace(device_, *events_, options_.max_plan_bytes);
  KVFERRY_RETURN_IF_ERROR(plans_->open());
  watch_.emplace(*device_);
  thread_ = std::thread([this] { run(); });
  return {};
}

Status CopyQueue::Core::load_kernels() {
  const cuda::Api& api = device_->api();
  const cuda::CUresult loaded = api.cuModuleLoadData(&module_, kernels::kernel_image().data());
  if (const Status status = device_->check(loaded, "cuModuleLoadData"); !status) {
    return fail(Code::kUnavailable, "NO_KERNELS",
                kernels::kernels_built()
                    ? "the device takes none of this build's kernels: " + status.error().to_string()
                    : "this kvferryd was built without CUDA kernels (no nvcc)");
  }
  for (std::size_t kind = 0; kind < functions_.size(); ++kind) {
    const char* const name = kernels::kernel_name(static_cast<kernels::CopyKind>(kind));
    KVFERRY_RETURN_IF_ERROR(device_->check(
        api.cuModuleGetFunction(&functions_.at(kind), module_, name), "cuModuleGetFunction"));
  }
  return {};
}

CopyQueue::Core::~Core() {
  const Closing current(*device_);
  const cuda::Api& api = device_->api();
  watch_.reset();
  for (const Stream& stream : streams_)
    if (stream.stream != nullptr && current.ok())
      (void)device_->check(api.cuStreamDestroy(stream.stream), "cuStreamDestroy");
  plans_.reset();
  events_.reset();
  if (module_ != nullptr && current.ok())
    (void)device_->check(api.cuModuleUnload(module_), "cuModuleUnload");
}

// ---- the loop
// ------------------------------------------------------------------------------------

void CopyQueue::Core::run() {
  const std::string name = "kvf-gpu-" + std::to_string(device_->facts().ordinal);
  pthread_setname_np(pthread_self(), name.substr(0, 15).c_str());
  // Naps shall be as short as asked: by default the kernel may add 50 us.
  (void)prctl(PR_SET_TIMERSLACK, 1000UL);
  const Device::Current current(*device_);
  if (!current.ok()) device_->take_down(current.status().error());
  last_progress_ = monotonic_now();
  do {
    turn(monotonic_now());
  } while (rest(monotonic_now()));
  watch_->give_up();
  if (options_.on_retired) options_.on_retired();
}

void CopyQueue::Core::turn(Time now) {
  if (options_.tick) options_.tick(now);
  take_fresh();
  bool moved = look_for_ends(now);
  moved = launch_waiting(now) || moved;
  probe(now);
  if (device_->down())
    watch_->give_up();
  else
    moved = watch_->poll() || moved;
  stats_.uploads.store(plans_->stats().uploads, std::memory_order_relaxed);
  stats_.upload_bytes.store(plans_->stats().upload_bytes, std::memory_order_relaxed);
  if (moved) last_progress_ = now;
}

void CopyQueue::Core::take_fresh() {
  std::vector<EventCommand> commands;
  bool abandoning = false;
  {
    MutexLock lock(mutex_);
    for (DeviceJob& job : fresh_) waiting_.push_back(std::move(job));
    fresh_.clear();
    commands.swap(event_commands_);
    dropping_ = phase_ == Phase::kDropping || phase_ == Phase::kAbandoning;
    abandoning = phase_ == Phase::kAbandoning && outstanding_ != 0;
  }
  for (EventCommand& command : commands) {
    if (!command.told) {
      watch_->remove(command.key);
      continue;
    }
    watch_->add(command.key, command.handle, std::move(command.told));
  }
  if (abandoning) abandon();
}

bool CopyQueue::Core::rest(Time now) {
  const bool on_device = any_launched();
  MutexLock lock(mutex_);
  const std::size_t watched = watch_->count();
  watched_ = watched + event_commands_.size();
  stats_.events.store(watched_, std::memory_order_relaxed);
  if (phase_ == Phase::kAbandoning && outstanding_ == 0) return false;
  if (!fresh_.empty() || !event_commands_.empty()) return true;
  // A device that is down may hold what was launched for ever.
  const bool down = device_->down();
  if (on_device && !down && now - last_progress_ < options_.spin) return true;
  Duration rest = kLongestRest;
  if (watched > 0) rest = kEventRest;
  if (on_device) rest = down ? kDownRest : options_.nap;
  (void)work_.wait_until(mutex_, now + rest);
  return true;
}

// ---- ends
// ----------------------------------------------------------------------------------------

bool CopyQueue::Core::look_for_ends(Time now) {
  bool moved = false;
  for (Stream& stream : streams_) {
    while (!dead_ && !stream.launched.empty() && look_at(stream, now)) moved = true;
  }
  if (!dead_) return moved;
  for (Stream& stream : streams_) {
    for (; !stream.launched.empty(); moved = true) {
      Launched launched = std::move(stream.launched.front());
      stream.launched.pop_front();
      end(launched.job, false, {});
    }
  }
  return moved;
}

void CopyQueue::Core::probe(Time now) {
  if (now < next_probe_ || device_->down()) return;
  next_probe_ = now + kProbe;
  const cuda::CUresult state = device_->api().cuStreamQuery(streams_.front().stream);
  if (state != cuda::CUDA_ERROR_NOT_READY) (void)device_->check(state, "cuStreamQuery");
}

// True if the stream's first job has ended.
bool CopyQueue::Core::look_at(Stream& stream, Time now) {
  Launched& first = stream.launched.front();
  const cuda::Api& api = device_->api();
  const cuda::CUresult state =
      first.end ? api.cuEventQuery(first.end.get()) : api.cuStreamQuery(stream.stream);
  if (state == cuda::CUDA_SUCCESS) {
    Launched launched = std::move(first);
    stream.launched.pop_front();
    // What this stream was to bring is there.
    for (const auto& place : launched.places)
      if (place != nullptr && place->stream == stream.stream) place->uploaded.reset();
    // Places and event go back before anybody is told: they are free.
    launched.places = {};
    launched.end.reset();
    end(launched.job, launched.ok, now - launched.since);
    return true;
  }
  if (state == cuda::CUDA_ERROR_NOT_READY) {
    first.refused_looks = 0;
    if (now - first.since > options_.hang_limit && !device_->down()) {
      const Error why{Code::kUnavailable, "GPU_HANGS", "a copy has not ended in its time", {}};
      tell(why, now);
      device_->take_down(why);
    }
    return false;
  }
  const Status status = device_->check(state, first.end ? "cuEventQuery" : "cuStreamQuery");
  if (status.error().code == Code::kUnavailable) {
    // The context is dead, and whatever ran in it.
    dead_ = true;
    tell(status.error(), now);
    return false;
  }
  // It does not tell, so the copy may still run: asked again and again.
  ++first.refused_looks;
  if (first.refused_looks >= kRefusedLooks && now - first.since > kRefusedFor) {
    tell(status.error(), now);
    device_->take_down(status.error());
  }
  return false;
}

void CopyQueue::Core::end(DeviceJob& job, bool ok, Duration on_device) {
  if (!job.done) return;
  const std::size_t kind = index_of(job.kind);
  stats_.jobs.at(kind).fetch_add(1, std::memory_order_relaxed);
  if (ok) {
    stats_.bytes.at(kind).fetch_add(job.bytes, std::memory_order_relaxed);
    if (options_.on_launch_to_done) options_.on_launch_to_done(on_device);
  } else {
    stats_.failed.fetch_add(1, std::memory_order_relaxed);
  }
  job.done(ok ? Outcome::kOk : Outcome::kFailed);
  { const DeviceJob ended = std::move(job); }  // closes pools that were waiting for this copy
  bool drained = false;
  {
    MutexLock lock(mutex_);
    --outstanding_;
    drained = outstanding_ == 0;
    stats_.outstanding.fetch_sub(1, std::memory_order_relaxed);
  }
  if (drained) drained_.notify_all();
}

void CopyQueue::Core::tell(const Error& error, Time now) {
  if (!options_.on_error || (last_told_.ns != 0 && now - last_told_ < kTellOnce)) return;
  last_told_ = now;
  options_.on_error(error);
}

// The last resort of close().
void CopyQueue::Core::abandon() {
  for (Stream& stream : streams_) {
    for (Launched& launched : stream.launched) {
      abandoned_ = true;
      lost_.push_back(std::move(launched));
    }
    stream.launched.clear();
  }
  if (!abandoned_) return;
  device_->take_down({Code::kUnavailable, "GPU_HANGS", "a copy has not ended in its time", {}});
  for (Launched& launched : lost_) {
    DeviceJob told;
    told.kind = launched.job.kind;
    told.done = launched.job.done;
    end(told, false, {});
  }
}

// ---- launches
// ------------------------------------------------------------------------------------

CopyQueue::Core::Stream* CopyQueue::Core::free_stream() {
  Stream* best = nullptr;
  for (Stream& stream : streams_) {
    if (stream.blocked() || stream.launched.size() >= options_.launched_per_stream) continue;
    if (best == nullptr || stream.launched.size() < best->launched.size()) best = &stream;
  }
  return best;
}

bool CopyQueue::Core::launch_waiting(Time now) {
  bool moved = false;
  while (!waiting_.empty()) {
    DeviceJob& job = waiting_.front();
    const bool failed = dropping_ || dead_ || device_->down() ||
                        std::any_of(job.pools.begin(), job.pools.end(),
                                    [&](const auto& pool) { return !pool->usable(now); });
    if (failed || job.bytes == 0) {
      DeviceJob ended = std::move(job);
      waiting_.pop_front();
      end(ended, !failed, {});
      moved = true;
      continue;
    }
    Stream* const stream = free_stream();
    if (stream == nullptr || !launch(job, *stream, now)) break;
    waiting_.pop_front();
    moved = true;
  }
  return moved;
}

bool CopyQueue::Core::launch(DeviceJob& job, Stream& stream, Time now) {
  Launched launched;
  launched.since = now;
  bool touched = false;
  bool later = false;
  const Status status = put(job, stream, launched, touched, later);
  if (later) {
    if (touched) follow(std::move(launched), stream);
    return false;
  }
  launched.ok = status.has_value();
  launched.job = std::move(job);
  if (!status) tell(status.error(), now);
  if (touched) {
    follow(std::move(launched), stream);
    return true;
  }
  launched.places = {};
  end(launched.job, false, {});
  return true;
}

void CopyQueue::Core::follow(Launched launched, Stream& stream) {
  if (auto event = events_->take()) {
    const Status recorded =
        device_->check(device_->api().cuEventRecord(event->get(), stream.stream), "cuEventRecord");
    if (recorded) launched.end = std::move(*event);
  }
  stream.launched.push_back(std::move(launched));
}

Status CopyQueue::Core::put(const DeviceJob& job, Stream& stream, Launched& launched, bool& touched,
                            bool& later) {
  KVFERRY_RETURN_IF_ERROR(open_peers(job));
  kernels::CopyArgs args{};
  args.kind = job.kind;
  args.stream_offset = job.stream_offset;
  args.bytes = job.bytes;
  args.flat = job.flat;
  const auto place = [&](const std::shared_ptr<DevicePlan>& plan, std::size_t slot,
                         kernels::PlanView& view) -> Status {
    PlanStore::Use use = plans_->use(*plan, plan, stream.stream);
    touched = touched || use.touched;
    if (!use.status) {
      // Whatever takes the room will end, unless it is this very job that takes it.
      later = use.status.error().reason == "PLAN_ROOM" && any_launched();
      launched.places.at(slot) = std::move(use.place);
      return use.status;
    }
    view = use.place->view;
    launched.places.at(slot) = std::move(use.place);
    return {};
  };
  KVFERRY_RETURN_IF_ERROR(place(job.plan, 0, args.plan));
  if (job.kind == kernels::CopyKind::kTransfer)
    KVFERRY_RETURN_IF_ERROR(place(job.other, 1, args.other));
  if (args.bytes > args.plan.bytes || args.stream_offset > args.plan.bytes - args.bytes ||
      (job.kind == kernels::CopyKind::kTransfer && args.other.bytes != args.plan.bytes))
    return fail(Code::kInternal, "OUTSIDE_PLAN", "the copy does not lie in its plan");
  const kernels::LaunchShape shape =
      kernels::launch_shape(args, device_->facts().sm_count, job.over_bus);
  std::array<void*, 1> parameters{&args};
  touched = true;
  return device_->check(device_->api().cuLaunchKernel(functions_.at(index_of(job.kind)),
                                                      shape.blocks, 1, 1, shape.threads, 1, 1, 0,
                                                      stream.stream, parameters.data(), nullptr),
                        "cuLaunchKernel");
}

bool CopyQueue::Core::any_launched() const {
  return std::any_of(streams_.begin(), streams_.end(),
                     [](const Stream& stream) { return !stream.launched.empty(); });
}

Status CopyQueue::Core::open_peers(const DeviceJob& job) {
  for (const Device* peer : job.peers) {
    if (peer == device_.get() || std::find(peers_.begin(), peers_.end(), peer) != peers_.end())
      continue;
    KVFERRY_RETURN_IF_ERROR(device_->enable_peer(*peer));
    peers_.push_back(peer);
  }
  return {};
}

}  // namespace kvferry::gpu
