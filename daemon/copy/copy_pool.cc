#include "daemon/copy/copy_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <string>
#include <utility>

#include "daemon/base/check.h"
#include "daemon/memory/fault_guard.h"

namespace kvferry::copy {
namespace {

constexpr uint64_t kPieceGranule = 64 * 1024;

uint64_t rounded_piece(uint64_t bytes) {
  constexpr uint64_t kLargest = uint64_t{1} << 40;
  return round_up(std::clamp(bytes, kPieceGranule, kLargest), kPieceGranule);
}

}  // namespace

uint32_t default_threads() {
  cpu_set_t set;
  CPU_ZERO(&set);
  int cores = 0;
  if (::sched_getaffinity(0, sizeof(set), &set) == 0) cores = CPU_COUNT(&set);
  if (cores <= 0) cores = static_cast<int>(std::thread::hardware_concurrency());
  return static_cast<uint32_t>(std::clamp(cores, 1, 4));
}

CopyPool::CopyPool(const Options& options)
    : piece_bytes_(rounded_piece(options.piece_bytes)), max_jobs_(options.max_jobs) {
  memory::install_fault_guard();
  const uint32_t count = options.threads == 0 ? default_threads() : options.threads;
  threads_.reserve(count);
  try {
    for (uint32_t i = 0; i < count; ++i) {
      threads_.emplace_back([this, i] { run(i); });
      if (options.cpus.empty()) continue;
      const CpuSet& cpus = options.cpus[i % options.cpus.size()];
      if (const int error = bind_thread(threads_.back().native_handle(), cpus); error != 0)
        binding_errno_ = error;
    }
  } catch (...) {
    close(Time{0});
    throw;
  }
}

CopyPool::~CopyPool() {
  close(Time{0});
}

Status CopyPool::submit(Job job) {
  KVFERRY_CHECK(job.done && (job.bytes == 0 || job.copy), "a job has its functions");
  const bool several = job.bytes > piece_bytes_;
  auto running = std::make_shared<Running>();
  running->job = std::move(job);
  running->prepared = !running->job.prepare;
  {
    MutexLock lock(mutex_);
    if (closed_) return fail(Code::kUnavailable, "COPY_POOL_CLOSED", "no more copies are taken");
    if (outstanding_ >= max_jobs_) {
      stats_.refused.fetch_add(1, std::memory_order_relaxed);
      return fail(Code::kResourceExhausted, "COPY_QUEUE_FULL",
                  std::to_string(max_jobs_) + " copies are outstanding");
    }
    ++outstanding_;
    stats_.outstanding.fetch_add(1, std::memory_order_relaxed);
    queue_.push_back(std::move(running));
  }
  if (several)
    work_.notify_all();
  else
    work_.notify_one();
  return {};
}

void CopyPool::run(uint32_t index) {
  pthread_setname_np(pthread_self(), ("kvf-copy-" + std::to_string(index)).substr(0, 15).c_str());
  for (;;) {
    Step step;
    {
      MutexLock lock(mutex_);
      while (!take(step)) {
        if (stop_) return;
        work_.wait(mutex_);
      }
    }
    const Outcome outcome = perform(step);
    bool ended = false;
    bool more = false;
    {
      MutexLock lock(mutex_);
      ended = settle(step, outcome);
      more = step.kind == StepKind::kPrepare && !ended;
      // Others hold it still; whoever tells the outcome shall be the last.
      if (!ended) step.job.reset();
    }
    if (more) work_.notify_all();
    if (ended) finish(std::move(step.job));
  }
}

bool CopyPool::take(Step& step) {
  const auto found =
      std::find_if(queue_.begin(), queue_.end(), [](const auto& job) { return !job->preparing; });
  if (found == queue_.end()) return false;
  Running& job = **found;
  step.job = *found;
  ++job.pending;
  if (dropping_ && job.outcome == Outcome::kOk) job.outcome = Outcome::kFailed;
  if (job.outcome != Outcome::kOk || (job.prepared && job.job.bytes == 0)) {
    step.kind = StepKind::kDrop;
    job.next = job.job.bytes;
    queue_.erase(found);
    return true;
  }
  if (!job.prepared) {
    step.kind = StepKind::kPrepare;
    job.preparing = true;
    return true;
  }
  step.kind = StepKind::kCopy;
  step.begin = job.next;
  step.end = job.next + std::min(piece_bytes_, job.job.bytes - job.next);
  job.next = step.end;
  if (job.next == job.job.bytes) queue_.erase(found);
  return true;
}

Outcome CopyPool::perform(const Step& step) {
  if (step.kind == StepKind::kDrop) return Outcome::kOk;
  const Job& job = step.job->job;
  const Time begin = monotonic_now();
  for (const auto& pool : job.pools)
    if (!pool->usable(begin)) return Outcome::kFailed;
  bool copied = false;
  const void* address = nullptr;
  const bool touched = memory::run_guarded(
      [&] {
        copied = step.kind == StepKind::kPrepare ? job.prepare() : job.copy(step.begin, step.end);
      },
      &address);
  const Duration busy = monotonic_now() - begin;
  stats_.busy_ns.fetch_add(static_cast<uint64_t>(busy.count()), std::memory_order_relaxed);
  if (!touched) {
    for (const auto& pool : job.pools)
      if (pool->contains(address)) pool->mark_failed();
    return Outcome::kFaulted;
  }
  if (!copied) return Outcome::kFailed;
  stats_.bytes.fetch_add(step.end - step.begin, std::memory_order_relaxed);
  return Outcome::kOk;
}

bool CopyPool::settle(const Step& step, Outcome outcome) {
  Running& job = *step.job;
  --job.pending;
  if (step.kind == StepKind::kPrepare) {
    job.preparing = false;
    job.prepared = true;
  }
  // A fault says more than a failure, and explains it where both happen in one job.
  if (outcome == Outcome::kFaulted || job.outcome == Outcome::kOk) job.outcome = outcome;
  // What is left of a failed job, and an empty one after its preparation, is taken off the queue by
  // the next thread that looks.
  const bool queued = !job.prepared || job.next < job.job.bytes ||
                      (step.kind == StepKind::kPrepare && job.job.bytes == 0);
  return job.pending == 0 && !queued;
}

void CopyPool::finish(std::shared_ptr<Running> job) {
  const Outcome outcome = job->outcome;
  stats_.jobs.fetch_add(1, std::memory_order_relaxed);
  if (outcome == Outcome::kFaulted) stats_.faulted.fetch_add(1, std::memory_order_relaxed);
  if (outcome == Outcome::kFailed) stats_.failed.fetch_add(1, std::memory_order_relaxed);
  job->job.done(outcome);
  job.reset();  // unmaps pools that were waiting for this copy
  {
    MutexLock lock(mutex_);
    --outstanding_;
    stats_.outstanding.fetch_sub(1, std::memory_order_relaxed);
    if (outstanding_ != 0) return;
  }
  drained_.notify_all();
}

Status CopyPool::close(Time deadline) {
  bool dropped = false;
  {
    MutexLock lock(mutex_);
    closed_ = true;
    while (outstanding_ != 0 && drained_.wait_until(mutex_, deadline)) {
    }
    if (outstanding_ != 0) {
      dropped = !queue_.empty();
      dropping_ = true;
      work_.notify_all();
      // Bounded by one piece and one callback a thread.
      while (outstanding_ != 0) drained_.wait(mutex_);
    }
    stop_ = true;
  }
  work_.notify_all();
  for (std::thread& thread : threads_)
    if (thread.joinable()) thread.join();
  if (dropped)
    return fail(Code::kDeadlineExceeded, "COPY_DRAIN", "copies were dropped at the deadline");
  return {};
}

}  // namespace kvferry::copy
