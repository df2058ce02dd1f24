// One UCX context and worker bound to one transport and device, with the arena segments registered.
// Errors of UCX's calls become kvferry errors here. Used by one thread at a time (the worker is
// made for a single thread).
#pragma once

#include <ucp/api/ucp.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/rails/records.h"
#include "daemon/rails/shared_memory.h"

namespace kvferry::rails {

// UCX_FAILED with "ucp_ep_create(tcp/lo): Destination is unreachable".
tl::unexpected<Error> fail_ucx(std::string_view call, ucs_status_t status);

class UcxWorker {
 public:
  struct Tuning {
    const char* keepalive = nullptr;  // replaces UCX_KEEPALIVE_INTERVAL
  };

  static Result<std::unique_ptr<UcxWorker>> make(const SetupRail& rail,
                                                 std::span<const Mapping> segments,
                                                 const Tuning& tuning);
  // Endpoints must have been closed; UCX destroys the rest.
  ~UcxWorker();
  UcxWorker(const UcxWorker&) = delete;
  UcxWorker& operator=(const UcxWorker&) = delete;

  ucp_worker_h handle() const { return worker_; }
  int event_fd() const { return event_fd_; }
  Result<std::vector<uint8_t>> address() const;
  Status set_handler(unsigned id, ucp_am_recv_callback_t callback, void* argument);
  // An endpoint in peer error mode; `callback` tells its failure and must not close it.
  Result<ucp_ep_h> connect(std::span<const uint8_t> address, ucp_err_handler_cb_t callback,
                           void* argument);
  unsigned progress() { return ucp_worker_progress(worker_); }

 private:
  UcxWorker() = default;
  Status init_context(const SetupRail& rail, const Tuning& tuning);
  Status register_segments(std::span<const Mapping> segments);
  Status init_worker();

  ucp_context_h context_ = nullptr;
  ucp_worker_h worker_ = nullptr;
  int event_fd_ = -1;
  std::vector<ucp_mem_h> registered_;
};

}  // namespace kvferry::rails
