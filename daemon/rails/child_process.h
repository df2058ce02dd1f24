// One child process: spawned with an environment and descriptors of our making, seen through its
// pidfd. Used by one thread; the child asks to die with the thread that spawned it.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/base/units.h"
#include "daemon/rails/shared_memory.h"

namespace kvferry::rails {

class ChildProcess {
 public:
  struct Exit {
    bool exited = false;  // else ended by `signal`
    int status = 0;
    int signal = 0;
  };

  ChildProcess() = default;
  ChildProcess(ChildProcess&& other) noexcept
      : pidfd_(std::move(other.pidfd_)), pid_(std::exchange(other.pid_, -1)) {}
  ChildProcess& operator=(ChildProcess&& other) noexcept {
    pidfd_ = std::move(other.pidfd_);
    pid_ = std::exchange(other.pid_, -1);
    return *this;
  }
  // A child must have been reaped; an owner calls end() first.
  ~ChildProcess() = default;

  // What the child gets of us.
  struct Ends {
    int channel = -1;  // its descriptor 3; -1: none
    int output = -1;   // its standard output; -1: /dev/null
  };
  // Runs `path` with `arguments` (without argv[0]) and exactly `environment`. The child has
  // /dev/null as its input, our standard error, and `ends`; nothing else. Fails with
  // RAILS_SPAWN_FAILED.
  static Result<ChildProcess> spawn(const std::string& path,
                                    const std::vector<std::string>& arguments,
                                    const std::vector<std::string>& environment, const Ends& ends);

  int pidfd() const { return pidfd_.get(); }
  int pid() const { return pid_; }
  bool alive() const { return pid_ > 0; }

  void kill();
  // True once it has exited: it is reaped and `exit` filled in. Never blocks.
  bool reap(Exit& exit);
  // SIGKILL and reap, waiting at most `limit`.
  void end(Duration limit);

 private:
  UniqueFd pidfd_;
  int pid_ = -1;
};

}  // namespace kvferry::rails
