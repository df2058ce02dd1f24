// Daemons as child processes: one (DaemonProcess), or two joined over a path (DaemonPair), in a
// private directory that goes with them. Used by the bench and by the tests of real processes.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "daemon/base/unique_fd.h"
#include "kvferry/result.h"

namespace kvferry::bench {

using client::Result;
using client::Status;

// Sums of one scrape: metric with labels -> value.
using Metrics = std::map<std::string, double>;

struct DaemonOptions {
  std::string path = "tcp";           // "tcp" or "shm"
  std::string binary_directory;       // where kvferryd and kvferry-rails are
  std::vector<std::string> settings;  // "section.key=value"
  // SIGTERM when the thread that starts it ends, however that happens.
  bool ends_with_starter = false;
  // Words of a command line that runs the program behind them in its own process, for a daemon that
  // stands in a network namespace of its own.
  std::vector<std::string> inside = {};
  // That namespace, in which its HTTP port is asked; -1: the caller's. Outlives the daemon.
  int network = -1;
};

class DaemonProcess {
 public:
  struct Identity {
    std::string name;  // node id; names its files too
    uint16_t peer_port = 0;
    std::string other;  // the peer that it may talk to
    uint16_t other_port = 0;
    std::map<std::string, uint16_t> more = {};  // further peers: name -> port
    // Instead of the node's id and all peers: the end of the configuration, as TOML. Empty: none.
    std::string toml = {};
    std::string host = "127.0.0.1";  // where it takes its peers' handshakes
  };
  // A port for a daemon's peers, free and this program's until it ends; 0: none was found. From one
  // thread at a time.
  static uint16_t find_port();
  // Writes the configuration into `directory` and starts the daemon; does not wait for it.
  static Result<std::unique_ptr<DaemonProcess>> start(const std::string& directory,
                                                      const Identity& identity,
                                                      const DaemonOptions& options);
  // SIGTERM, at most 10 s of patience, then SIGKILL.
  ~DaemonProcess();
  DaemonProcess(const DaemonProcess&) = delete;
  DaemonProcess& operator=(const DaemonProcess&) = delete;

  // At most 30 s until /readyz says yes; an error as soon as the process ends.
  Status wait_until_serving();
  // Sends SIGTERM and waits; the exit status, or -1 if it had to be killed.
  int terminate();
  // SIGKILL, and waits for the end.
  void kill_now();

  pid_t pid() const { return pid_; }
  // The rails process; -1 while there is none.
  pid_t rails_pid() const;
  const std::string& socket() const { return socket_; }
  const std::string& admin_socket() const { return admin_; }
  uint16_t http_port() const { return http_port_; }
  uint16_t peer_port() const { return peer_port_; }
  // Processor time used so far, by all threads, user and system.
  struct Cpu {
    double daemon_seconds = 0;
    double rails_seconds = 0;  // of the rails process that runs now
  };
  Cpu cpu() const;
  // Memory that is the daemon's alone: without pools and arena, which are shared; 0 if it is gone.
  uint64_t private_bytes() const;
  Result<Metrics> metrics() const;
  // The sum of a metric's series whose labels hold both parts; 0 if the daemon does not answer.
  double sum(const std::string& name, const std::string& part = {},
             const std::string& other = {}) const;
  // Body of a GET that was answered 200, else empty.
  std::string http(const std::string& path) const;
  std::string log_tail() const;
  const std::string& log_file() const { return log_; }
  const std::string& config_file() const { return config_; }

 private:
  DaemonProcess() = default;
  pid_t pid_ = -1;
  std::string config_;
  std::string socket_;
  std::string admin_;
  std::string log_;
  uint16_t http_port_ = 0;
  UniqueFd http_hold_;  // keeps others from taking it
  uint16_t peer_port_ = 0;
  int network_ = -1;
};

// A sender's and a receiver's daemon.
class DaemonPair {
 public:
  // Starts both and waits until they serve.
  static Result<std::unique_ptr<DaemonPair>> start(const DaemonOptions& options);
  ~DaemonPair();
  DaemonPair(const DaemonPair&) = delete;
  DaemonPair& operator=(const DaemonPair&) = delete;

  DaemonProcess& side(int side) { return *sides_[side]; }  // 0 sender, 1 receiver
  const DaemonProcess& side(int side) const { return *sides_[side]; }
  // Starts that side anew under the same name and addresses, after it has ended.
  Status restart(int side);
  // The end of both logs, for error reports.
  std::string log_tail() const;

 private:
  DaemonPair() = default;
  DaemonOptions options_;
  std::string directory_;
  DaemonProcess::Identity identities_[2];
  std::unique_ptr<DaemonProcess> sides_[2];
};

}  // namespace kvferry::bench
