// The lender's thread: one poll loop over the socket, its connections, and the processes whose end
// is awaited. Private to arena_lender.cc; everything but start, stop, wake and the constructor runs
// on the thread.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <thread>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/base/unique_fd.h"
#include "daemon/base/units.h"
#include "daemon/node/arena_lender.h"
#include "daemon/node/arena_wire.h"
#include "daemon/ops/log.h"

namespace kvferry::node {

class ArenaLender::Loop {
 public:
  explicit Loop(ArenaLender& owner) : owner_(owner) {}
  ~Loop() { stop(); }

  Status start();
  void stop();  // idempotent; joins
  void wake();  // any thread

 private:
  struct Connection {
    UniqueFd fd;
    UniqueFd pidfd;  // until a token is shown
    pid_t pid = 0;
    Time show_by;
    std::optional<PeerRef> peer;  // once a token is
  };
  // A process that has, or had, descriptors. One for each life of a peer's daemon.
  struct Process {
    UniqueFd pidfd;
    pid_t pid = 0;
    uint64_t inode = 0;
    std::map<LinkId, bool> links;  // over which it got them: whether it has said UNMAPPED
  };

  void run();
  int next_timeout_ms(Time now) const;
  void accept_some();
  void read_one(uint64_t key);
  // Null, or why the connection is to be ended.
  const char* on_show(Connection& connection, const wire::Show& show);
  void on_unmapped(uint64_t key);
  // Null: there is no room, or that life of a daemon is in another process.
  Process* process_of(Connection& connection, const Life& life);
  bool hand_out(int fd, const rpc::WelcomeProof& proof) const;
  void refuse(uint64_t key, const char* reason);
  void expire(Time now);
  void process_gone(const Life& life);
  // What was said before its link's end has come to count.
  void settle_unmapped();
  void publish();

  ArenaLender& owner_;
  UniqueFd listener_;
  UniqueFd wake_;
  UniqueFd spare_;
  std::map<uint64_t, Connection> connections_;
  std::map<Life, Process> processes_;
  uint64_t next_key_ = 1;
  ops::LogLimiter refusals_{5, std::chrono::minutes(1)};
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

}  // namespace kvferry::node
