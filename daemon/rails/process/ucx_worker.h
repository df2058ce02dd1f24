// One UCX context and worker bound to one transport and device, with the arena segments registered.
// With segments in GPU memory the context has UCX's copies to and from it beside its transport.
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
#include "daemon/gpu/device.h"
#include "daemon/rails/process/setup.h"
#include "daemon/rails/process/ucx_context.h"

namespace kvferry::rails {

class UcxWorker {
 public:
  struct Tuning {
    const char* keepalive = nullptr;  // replaces UCX_KEEPALIVE_INTERVAL
    // With segments on devices: whose context is current while UCX opens its CUDA domain.
    const gpu::Device* device = nullptr;
  };

  static Result<std::unique_ptr<UcxWorker>> make(const SetupRail& rail,
                                                 std::span<const SegmentMemory> segments,
                                                 const Tuning& tuning);
  // Endpoints must have been closed; UCX destroys the rest.
  ~UcxWorker();
  UcxWorker(const UcxWorker&) = delete;
  UcxWorker& operator=(const UcxWorker&) = delete;

  ucp_worker_h handle() const { return worker_; }
  int event_fd() const { return event_fd_; }
  // What a request says of the memory that it reads or writes: a segment's, by its number.
  void name_memory(ucp_request_param_t& param, std::size_t segment) const;
  Result<std::vector<uint8_t>> address() const;
  Status set_handler(unsigned id, ucp_am_recv_callback_t callback, void* argument);
  // An endpoint in peer error mode; `callback` tells its failure and must not close it.
  Result<ucp_ep_h> connect(std::span<const uint8_t> address, ucp_err_handler_cb_t callback,
                           void* argument);
  unsigned progress() { return ucp_worker_progress(worker_); }

 private:
  UcxWorker() = default;
  Status register_segment(const SegmentMemory& segment);
  Status init_worker();

  // One segment, as UCX knows it.
  struct Registered {
    ucp_mem_h handle = nullptr;
    bool on_device = false;
  };
  UcxContext context_;
  ucp_worker_h worker_ = nullptr;
  int event_fd_ = -1;
  std::vector<Registered> registered_;
};

}  // namespace kvferry::rails
