// A kvferry-test-worker (worker_main.cc) as a child process. One thread at a time.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "client/bench/shapes.h"
#include "tests/proc/hand_off_party.h"

namespace kvferry::testing {

// What one rank said of a transfer's end.
struct RankEnd {
  std::string state;
  std::string reason;
  std::string released_reason;
};
struct TransferEnd {
  uint64_t seen_ns = 0;  // CLOCK_MONOTONIC, when all ranks had it, memory released
  std::vector<RankEnd> ranks;
  std::string error;  // instead of the above
};

class WorkerProcess {
 public:
  // `more`: words after the shape. Starts it; wait_until_ready() tells whether it has attached and
  // registered.
  WorkerProcess(const std::string& binary_directory, bool sends, const std::string& socket,
                const std::string& instance, const std::string& topology, const bench::Shape& shape,
                const std::vector<std::string>& more = {});
  // SIGKILL, and waits for the end.
  ~WorkerProcess();
  WorkerProcess(const WorkerProcess&) = delete;
  WorkerProcess& operator=(const WorkerProcess&) = delete;

  // Empty, or what went wrong.
  std::string wait_until_ready();
  pid_t pid() const { return pid_; }

  // Sends a command without waiting for its answer; answers come in the order of the commands.
  void tell(const std::string& command);
  // The next answer; "ERROR ..." after `limit` or the process's end.
  std::string next(std::chrono::milliseconds limit = std::chrono::seconds(30));
  std::string ask(const std::string& command) {
    tell(command);
    return next();
  }
  // The answer to a `wait` command.
  TransferEnd next_end();

 private:
  pid_t pid_ = -1;
  int in_ = -1;   // its stdin
  int out_ = -1;  // its stdout
  std::string read_;
};

}  // namespace kvferry::testing
