#include "daemon/rails/process/ucx_worker.h"

#include <string_view>

namespace kvferry::rails {
namespace {

// The transports of UCX that stand for ours. One alone: listed together, UCX would choose.
const char* transports_of(const SetupRail& rail) {
  return std::string_view(rail.transport) == "shm" ? "posix" : "tcp";
}

// ucp_config_t with its release.
class UcxConfig {
 public:
  UcxConfig() = default;
  ~UcxConfig() {
    if (config != nullptr) ucp_config_release(config);
  }
  UcxConfig(const UcxConfig&) = delete;
  UcxConfig& operator=(const UcxConfig&) = delete;
  Status set(const char* key, const char* value) {
    const ucs_status_t status = ucp_config_modify(config, key, value);
    if (status != UCS_OK) return fail_ucx(std::string("ucp_config_modify ") + key, status);
    return {};
  }
  ucp_config_t* config = nullptr;
};

}  // namespace

tl::unexpected<Error> fail_ucx(std::string_view call, ucs_status_t status) {
  return fail(Code::kInternal, "UCX_FAILED", std::string(call) + ": " + ucs_status_string(status));
}

Result<std::unique_ptr<UcxWorker>> UcxWorker::make(const SetupRail& rail,
                                                   std::span<const Mapping> segments,
                                                   const Tuning& tuning) {
  std::unique_ptr<UcxWorker> worker(new UcxWorker());
  KVFERRY_RETURN_IF_ERROR(worker->init_context(rail, tuning));
  KVFERRY_RETURN_IF_ERROR(worker->register_segments(segments));
  KVFERRY_RETURN_IF_ERROR(worker->init_worker());
  return worker;
}

Status UcxWorker::init_context(const SetupRail& rail, const Tuning& tuning) {
  UcxConfig config;
  ucs_status_t status = ucp_config_read(nullptr, nullptr, &config.config);
  if (status != UCS_OK) return fail_ucx("ucp_config_read", status);
  KVFERRY_RETURN_IF_ERROR(config.set("TLS", transports_of(rail)));
  if (rail.device[0] != '\0') KVFERRY_RETURN_IF_ERROR(config.set("NET_DEVICES", rail.device));
  if (tuning.keepalive != nullptr)
    KVFERRY_RETURN_IF_ERROR(config.set("KEEPALIVE_INTERVAL", tuning.keepalive));
  ucp_params_t params = {};
  params.field_mask = UCP_PARAM_FIELD_FEATURES;
  params.features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
  status = ucp_init(&params, config.config, &context_);
  if (status != UCS_OK) return fail_ucx("ucp_init", status);
  return {};
}

Status UcxWorker::register_segments(std::span<const Mapping> segments) {
  for (const Mapping& segment : segments) {
    ucp_mem_map_params_t params = {};
    params.field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH;
    params.address = segment.base();
    params.length = segment.bytes();
    ucp_mem_h memory = nullptr;
    const ucs_status_t status = ucp_mem_map(context_, &params, &memory);
    if (status != UCS_OK) return fail_ucx("ucp_mem_map", status);
    registered_.push_back(memory);
  }
  return {};
}

Status UcxWorker::init_worker() {
  ucp_worker_params_t params = {};
  params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  params.thread_mode = UCS_THREAD_MODE_SINGLE;
  ucs_status_t status = ucp_worker_create(context_, &params, &worker_);
  if (status != UCS_OK) return fail_ucx("ucp_worker_create", status);
  status = ucp_worker_get_efd(worker_, &event_fd_);
  if (status != UCS_OK) return fail_ucx("ucp_worker_get_efd", status);
  return {};
}

UcxWorker::~UcxWorker() {
  if (worker_ != nullptr) ucp_worker_destroy(worker_);
  for (ucp_mem_h memory : registered_) ucp_mem_unmap(context_, memory);
  if (context_ != nullptr) ucp_cleanup(context_);
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
