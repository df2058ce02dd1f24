// The threads that copy between workers' pages and the arena in host memory. A job is a function
// over a range of bytes; what it copies is the mapping library's affair. Large jobs are cut into
// pieces that idle threads take one by one; whoever ends the last piece tells the outcome, so no
// thread ever waits for another. Jobs start in the order in which they were submitted: who comes
// first is the engine's decision.
//
// submit() and the statistics may be called from any thread; close() and the destructor by the
// owner.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "daemon/base/cpu_set.h"
#include "daemon/base/mutex.h"
#include "daemon/base/result.h"
#include "daemon/base/units.h"
#include "daemon/memory/pool.h"

namespace kvferry::copy {

enum class Outcome : uint8_t {
  kOk,
  kFaulted,  // a pool's memory was gone; every pool of the job that was hit is now failed()
  kFailed,   // the function said no, a pool had failed before, or the pool of threads closed
};

// One gather (pages to arena), scatter (arena to pages) or local copy (pages to pages).
struct Job {
  uint64_t bytes = 0;
  // Optional: runs once, alone, before the first piece, e.g. to compare the arena's bytes with a
  // check. On false nothing is copied and the job ends kFailed. Under the guard as below.
  std::function<bool()> prepare;
  // Copies bytes [begin, end) of the job; false if it cannot. Called on several copy threads at
  // once with disjoint ranges whose inner borders are multiples of 64 KiB from the job's first
  // byte. It runs under memory::run_guarded: on a fault it is left without unwinding, so it holds
  // no lock and owns no memory (walk the plan, call memcpy). Never called for an empty job.
  std::function<bool(uint64_t begin, uint64_t end)> copy;
  // Called exactly once for a job that was taken, on a copy thread, after the last byte that the
  // job will ever touch. May compute (a check over what was gathered) and submit, but not wait.
  std::function<void(Outcome)> done;
  // The pools that the job touches, all in host memory: kept mapped until done has returned,
  // refused if failed, and marked failed when the fault lies inside.
  std::vector<std::shared_ptr<memory::Pool>> pools;
};

struct Options {
  uint32_t threads = 0;                // 0: default_threads()
  std::size_t max_jobs = 4096;         // taken and not yet ended; beyond it submit() refuses
  uint64_t piece_bytes = 1024 * 1024;  // rounded up to a multiple of 64 KiB
  // Thread i runs on cpus[i % size] only. Empty: anywhere.
  std::vector<CpuSet> cpus{};
};

// min(4, cores of this process's affinity mask), at least 1.
uint32_t default_threads();

// Counters for metrics; each is exact, a set of them read together need not be of one moment.
struct Stats {
  std::atomic<uint64_t> jobs{0};         // ended
  std::atomic<uint64_t> faulted{0};      // ... of them kFaulted
  std::atomic<uint64_t> failed{0};       // ... of them kFailed
  std::atomic<uint64_t> refused{0};      // by submit()
  std::atomic<uint64_t> bytes{0};        // of the pieces that were copied
  std::atomic<uint64_t> busy_ns{0};      // inside copy functions, all threads together
  std::atomic<uint64_t> outstanding{0};  // gauge: jobs taken and not yet ended
};

class CopyPool {
 public:
  // Starts the threads. Throws std::system_error if the system gives none (start-up only).
  explicit CopyPool(const Options& options = {});
  // As close() with a deadline that has passed.
  ~CopyPool();
  CopyPool(const CopyPool&) = delete;
  CopyPool& operator=(const CopyPool&) = delete;

  // Never blocks. RESOURCE_EXHAUSTED COPY_QUEUE_FULL when max_jobs are outstanding (a programming
  // error of the caller, who bounds them) and UNAVAILABLE COPY_POOL_CLOSED after close(): then the
  // job is dropped and done is not called.
  Status submit(Job job);

  // Takes no more jobs, lets those taken end until `deadline` (monotonic), then ends what has not
  // begun with kFailed; a piece that runs is always left to finish. Joins the threads: afterwards
  // no callback runs. DEADLINE_EXCEEDED COPY_DRAIN if something had to be dropped. Idempotent. Not
  // from a copy thread.
  Status close(Time deadline);

  const Stats& stats() const { return stats_; }
  uint32_t threads() const { return static_cast<uint32_t>(threads_.size()); }
  // Why not all threads are where Options::cpus wants them, as errno; 0: they are. Such a thread
  // works all the same.
  int binding_errno() const { return binding_errno_; }

 private:
  // A job that was taken.
  struct Running {
    Job job;
    // Guarded by the pool's mutex.
    bool prepared = false;
    bool preparing = false;
    uint64_t next = 0;     // bytes that somebody has taken
    uint32_t pending = 0;  // steps (preparation, pieces) under way
    Outcome outcome = Outcome::kOk;
  };
  // What a thread does next for a job.
  enum class StepKind : uint8_t { kPrepare, kCopy, kDrop };
  struct Step {
    std::shared_ptr<Running> job;
    StepKind kind = StepKind::kDrop;
    uint64_t begin = 0;
    uint64_t end = 0;
  };

  void run(uint32_t index);
  // The next step in order; false if there is none now.
  bool take(Step& step) KVFERRY_REQUIRES(mutex_);
  // Does it; no lock is held.
  Outcome perform(const Step& step);
  // Books it; true if the job has ended with it.
  bool settle(const Step& step, Outcome outcome) KVFERRY_REQUIRES(mutex_);
  // Tells the outcome and lets the job go.
  void finish(std::shared_ptr<Running> job);

  const uint64_t piece_bytes_;
  const std::size_t max_jobs_;
  Stats stats_;
  Mutex mutex_;
  CondVar work_;     // for the threads: a piece to take, or the end
  CondVar drained_;  // for close(): no job outstanding
  // Jobs with steps that nobody has taken yet, in order.
  std::deque<std::shared_ptr<Running>> queue_ KVFERRY_GUARDED_BY(mutex_);
  std::size_t outstanding_ KVFERRY_GUARDED_BY(mutex_) = 0;
  bool closed_ KVFERRY_GUARDED_BY(mutex_) = false;    // no more jobs
  bool dropping_ KVFERRY_GUARDED_BY(mutex_) = false;  // no more pieces
  bool stop_ KVFERRY_GUARDED_BY(mutex_) = false;      // threads go home
  std::vector<std::thread> threads_;
  int binding_errno_ = 0;
};

}  // namespace kvferry::copy
