// One pair of workers of a soak that hands over again and again, verifying every byte, and what
// came of it. A Line is a thread; other threads may kill or stop its workers, and read its counts.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "client/bench/shapes.h"
#include "tests/proc/fault_worker.h"

namespace kvferry::testing {

struct SoakCounts {
  uint64_t completed = 0;  // and delivered, on all ranks, all bytes verified
  uint64_t bytes = 0;
  uint64_t with_worker = 0;                 // ended because one of its own workers was killed
  std::map<std::string, uint64_t> failed;   // by both sides' words
  std::map<std::string, uint64_t> refused;  // calls, by reason
  void add(const SoakCounts& more);
};

// What all lines of a run share. Any thread.
class SoakWorld {
 public:
  // While a disturbance lasts, and for what it overlaps, transfers may fail for allowed reasons.
  void begin_disturbance();
  void end_disturbance();
  // Says the same at two moments, and is even, if nothing was disturbed in between.
  uint64_t weather() const { return weather_; }

  // The first thing that must not happen ends the run.
  void violate(const std::string& what);
  std::string violation() const;

  // Lines stop between two transfers while paused; false once the run is over.
  bool may_go_on(std::atomic<bool>& idle);
  void pause(bool paused);
  void end();
  // So many more transfers are to be tried; UINT64_MAX, as at first: any number.
  void allow(uint64_t transfers);

 private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::atomic<uint64_t> weather_{0};  // odd: disturbed
  bool paused_ = false;
  bool over_ = false;
  uint64_t left_ = UINT64_MAX;
  std::string violation_;
};

class SoakLine {
 public:
  struct Plan {
    std::string name;
    std::string topologies[2];  // sender's, receiver's
    bench::Shape shape;
    std::string binary_directory;
    std::string sockets[2];
    uint64_t seed = 0;
  };
  SoakLine(Plan plan, SoakWorld& world);
  // The world has been ended.
  ~SoakLine();
  SoakLine(const SoakLine&) = delete;
  SoakLine& operator=(const SoakLine&) = delete;

  const std::string& name() const { return plan_.name; }
  // SIGKILL, SIGSTOP or SIGCONT to one side's process, if there is one.
  void signal_worker(int side, int signal);
  bool idle() const { return idle_; }
  // CLOCK_MONOTONIC, at the beginning of the last transfer that ended well.
  uint64_t last_good_begin_ns() const { return last_good_begin_ns_; }
  SoakCounts counts() const;

 private:
  void run();
  // Starts what is not there; false: not now.
  bool have_workers();
  void hand_over();
  // Counts what came of it and says what must not be. `ends`: of the sides whose call was queued;
  // `weather`: at its beginning.
  void judge(const std::optional<TransferEnd> (&ends)[2], const std::string& refused,
             uint64_t tokens, uint64_t weather, uint64_t begun_ns);
  // The answer. A worker that has none any more is forgotten, which only a killed one may be.
  std::string ask(int side, const std::string& command);
  bool forget_if_lost(int side, const std::string& answer);
  void count_refusal(const std::string& error, bool calm);

  const Plan plan_;
  SoakWorld& world_;
  std::mt19937_64 random_;
  mutable std::mutex mutex_;  // guards what follows
  std::unique_ptr<WorkerProcess> workers_[2];
  bool killed_[2] = {false, false};
  SoakCounts counts_;
  // Beside the lock.
  std::atomic<bool> idle_{false};
  std::atomic<uint64_t> last_good_begin_ns_{0};
  std::thread thread_;  // last: uses all of the above
};

uint64_t monotonic_ns();

}  // namespace kvferry::testing
