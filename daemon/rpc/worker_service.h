// The gRPC service of workers on a tenant's Unix socket: authenticates each call by the token of
// its lifeline, checks and converts, hands on to a WorkerBackend. Threads are gRPC's; none of them
// waits.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/rpc/worker_backend.h"
#include "daemon/rpc/worker_ops.h"

namespace kvferry::rpc {

struct WorkerServerConfig {
  struct Socket {
    std::string path;  // of the gRPC socket; replaced if stale
    uint32_t mode = 0660;
    std::size_t index = 0;  // a session speaks only on the socket it attached to
  };
  std::vector<Socket> sockets;
  OpLimits limits;
  std::function<void(Code)> on_answer;  // counts each answer; any thread
  uint32_t max_stream_results =
      65536;  // answers a worker has not read yet; beyond it the stream ends
};

class WorkerServer {
 public:
  // Binds all sockets and serves, with gRPC health and reflection. UNAVAILABLE LISTEN_FAILED.
  // The backend outlives it.
  static Result<std::unique_ptr<WorkerServer>> start(const WorkerServerConfig& config,
                                                     WorkerBackend& backend);
  ~WorkerServer();  // as shutdown with a second
  WorkerServer(const WorkerServer&) = delete;
  WorkerServer& operator=(const WorkerServer&) = delete;

  // For calls from now on. Any thread.
  void set_limits(const OpLimits& limits);
  // gRPC health answers NOT_SERVING from now on.
  void set_serving(bool serving);
  // Takes no more calls, cancels what is under way at the deadline. After it returns no call
  // reaches the backend.
  void shutdown(Time deadline);

 private:
  struct Impl;
  explicit WorkerServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvferry::rpc
