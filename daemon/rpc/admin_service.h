// The operator's gRPC service, on a Unix socket of its own that workers cannot open. Turns calls
// into questions to an AdminBackend and snapshots into messages; decides nothing. Threads are
// gRPC's; none of them waits.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "daemon/base/result.h"
#include "daemon/base/units.h"
#include "daemon/ops/metrics.h"
#include "daemon/rpc/admin_backend.h"

namespace kvferry::rpc {

struct AdminServerConfig {
  std::string path;      // of the socket; replaced if nobody listens on it
  uint32_t mode = 0600;  // 0660 with a group
  std::string group;     // who owns the socket beside the daemon's user; empty: unchanged
};

class AdminServer {
 public:
  // Binds and serves. UNAVAILABLE LISTEN_FAILED, also when another daemon still serves the path.
  // Narrows the process's umask while it binds: call it from the thread that starts everything.
  // Backend and metrics must outlive the server.
  static Result<std::unique_ptr<AdminServer>> start(const AdminServerConfig& config,
                                                    AdminBackend& backend, ops::Metrics& metrics);
  ~AdminServer();  // as shutdown with a second
  AdminServer(const AdminServer&) = delete;
  AdminServer& operator=(const AdminServer&) = delete;

  // Takes no more calls, cancels what is under way at the deadline, removes the socket. After it
  // returns no call reaches the backend. Waits for answers that the backend still owes: it owes
  // each by the call's deadline.
  void shutdown(Time deadline);

 private:
  struct Impl;
  explicit AdminServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// Printable ASCII as it is; quotes, backslashes and all else as \xNN.
std::string escape_bytes(const std::string& bytes);

}  // namespace kvferry::rpc
