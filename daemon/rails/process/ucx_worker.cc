#include "daemon/rails/process/ucx_worker.h"

#include <algorithm>
#include <optional>
#include <string_view>

#include "daemon/rails/process/device_memory.h"

namespace kvferry::rails {
namespace {

// The transports of UCX that stand for ours. One alone: listed together, UCX would choose.
const char* transports_of(const SetupRail& rail) {
  return std::string_view(rail.transport) == "shm" ? "posix" : "tcp";
}

bool any_on_device(std::span<const SegmentMemory> segments) {
  return std::any_of(segments.begin(), segments.end(),
                     [](const SegmentMemory& segment) { return segment.on_device; });
}

}  // namespace

Result<std::unique_ptr<UcxWorker>> UcxWorker::make(const SetupRail& rail,
                                                   std::span<const SegmentMemory> segments,
                                                   const Tuning& tuning) {
  std::unique_ptr<UcxWorker> worker(new UcxWorker());
  // With a context current UCX would pin the host segments for CUDA, which nothing here profits by.
  std::optional<gpu::Device::Current> current;
  const auto enter = [&]() -> Status {
    if (tuning.device == nullptr) return {};
    return current.emplace(*tuning.device).status();
  };
  KVFERRY_RETURN_IF_ERROR(enter());
  UcxContext::Options options{transports_of(rail), rail.device, tuning.keepalive};
  const char* const copies = device_memory_use().transport;
  if (any_on_device(segments) && copies != nullptr) options.transports += std::string(",") + copies;
  auto context = UcxContext::make(options);
  if (!context) return tl::unexpected<Error>(context.error());
  worker->context_ = std::move(*context);
  current.reset();
  for (const SegmentMemory& segment : segments)
    KVFERRY_RETURN_IF_ERROR(worker->register_segment(segment));
  KVFERRY_RETURN_IF_ERROR(enter());
  KVFERRY_RETURN_IF_ERROR(worker->init_worker());
  return worker;
}

Status UcxWorker::register_segment(const SegmentMemory& segment) {
  ucp_mem_map_params_t params = {};
  params.field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH |
                      UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE;
  params.address = segment.base;
  params.length = segment.bytes;
  params.memory_type = segment.on_device ? device_memory_use().type : UCS_MEMORY_TYPE_HOST;
  ucp_mem_h memory = nullptr;
  const ucs_status_t status = ucp_mem_map(context_.handle(), &params, &memory);
  if (status != UCS_OK && segment.on_device)
    return fail(Code::kFailedPrecondition, "DEVICE_MEMORY_REFUSED",
                "UCX does not register " + std::to_string(segment.bytes) +
                    " bytes of GPU memory: " + ucs_status_string(status));
  if (status != UCS_OK) return fail_ucx("ucp_mem_map", status);
  registered_.push_back({memory, segment.on_device});
  return {};
}

void UcxWorker::name_memory(ucp_request_param_t& param, std::size_t segment) const {
  const Registered& memory = registered_[segment];
  param.op_attr_mask |= UCP_OP_ATTR_FIELD_MEMORY_TYPE;
  param.memory_type = UCS_MEMORY_TYPE_HOST;
  if (!memory.on_device) return;
  param.op_attr_mask |= UCP_OP_ATTR_FIELD_MEMH;
  param.memory_type = device_memory_use().type;
  param.memh = memory.handle;
}

Status UcxWorker::init_worker() {
  ucp_worker_params_t params = {};
  params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  params.thread_mode = UCS_THREAD_MODE_SINGLE;
  ucs_status_t status = ucp_worker_create(context_.handle(), &params, &worker_);
  if (status != UCS_OK) return fail_ucx("ucp_worker_create", status);
  status = ucp_worker_get_efd(worker_, &event_fd_);
  if (status != UCS_OK) return fail_ucx("ucp_worker_get_efd", status);
  return {};
}

UcxWorker::~UcxWorker() {
  if (worker_ != nullptr) ucp_worker_destroy(worker_);
  for (const Registered& memory : registered_) ucp_mem_unmap(context_.handle(), memory.handle);
}

Result<std::vector<uint8_t>> UcxWorker::address() const {
  ucp_address_t* address = nullptr;
  std::size_t bytes = 0;
  const ucs_status_t status = ucp_worker_get_address(worker_, &address, &bytes);
  if (status != UCS_OK) return fail_ucx("ucp_worker_get_address", status);
  const auto* const at = reinterpret_cast<const uint8_t*>(address);
  std::vector<uint8_t> copy(at, at + bytes);
  ucp_worker_release_address(worker_, address);
  return copy;
}

Status UcxWorker::set_handler(unsigned id, ucp_am_recv_callback_t callback, void* argument) {
  ucp_am_handler_param_t params = {};
  params.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS |
                      UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
  params.id = id;
  params.flags = UCP_AM_FLAG_WHOLE_MSG;
  params.cb = callback;
  params.arg = argument;
  const ucs_status_t status = ucp_worker_set_am_recv_handler(worker_, &params);
  if (status != UCS_OK) return fail_ucx("ucp_worker_set_am_recv_handler", status);
  return {};
}

Result<ucp_ep_h> UcxWorker::connect(std::span<const uint8_t> address, ucp_err_handler_cb_t callback,
                                    void* argument) {
  ucp_ep_params_t params = {};
  params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                      UCP_EP_PARAM_FIELD_ERR_HANDLER;
  params.address = reinterpret_cast<const ucp_address_t*>(address.data());
  params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
  params.err_handler.cb = callback;
  params.err_handler.arg = argument;
  ucp_ep_h endpoint = nullptr;
  const ucs_status_t status = ucp_ep_create(worker_, &params, &endpoint);
  if (status != UCS_OK) return fail_ucx("ucp_ep_create", status);
  return endpoint;
}

}  // namespace kvferry::rails
