// Two daemons and two workers in processes of their own, to be killed in the middle of a transfer,
// and the books of what the daemons hold. One thread at a time.
#pragma once

#include <filesystem>
#include <memory>
#include <random>
#include <string>

#include "tests/proc/books.h"
#include "tests/proc/fault_worker.h"
#include "tests/proc/hand_off_daemons.h"

namespace kvferry::testing {

class FaultScene {
 public:
  // Starts everything, and hands over once with many bytes and once with few. `settings` are added.
  explicit FaultScene(std::vector<std::string> settings = {});
  // The silence limit that is set unless `settings` say otherwise.
  static constexpr double kSilenceSeconds = 2;

  DaemonPair& daemons() { return *pair_; }
  WorkerProcess& worker(int side) { return *workers_[side]; }
  // Ends that worker by SIGKILL.
  void kill_worker(int side) { workers_[side].reset(); }
  // A new one of the same instance.
  void start_worker(int side);

  // A transfer of many bytes that is under way: at a share of it that is drawn at random.
  TransferKey begin_and_move();
  // A small one to the end, verified.
  void require_hand_over();
  // Waits until each daemon has a lane to the other.
  void require_lanes();

  // What that worker says at the end of the transfer, which it then forgets. Asks first.
  void ask_for_end(int side, const TransferKey& key);
  TransferEnd end(int side, const TransferKey& key);

  // Waits until that daemon holds nothing: no transfers, the arena wholly free, and what it has
  // open back at the level of before.
  void require_nothing_held(int side);
  // That daemon is another one from now on.
  void measure(int side);

  static uint64_t now_ns();
  std::mt19937_64& random() { return random_; }

 private:
  TransferKey begin(uint64_t tokens);
  void require_done(const TransferKey& key, uint64_t tokens);
  double received_bytes() const;

  std::unique_ptr<DaemonPair> pair_;
  std::unique_ptr<WorkerProcess> workers_[2];
  Level before_[2];
  std::mt19937_64 random_;
};

}  // namespace kvferry::testing
