#include "daemon/rails/process/ucx_context.h"

namespace kvferry::rails {
namespace {

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

Result<UcxContext> UcxContext::make(const Options& options) {
  UcxConfig config;
  ucs_status_t status = ucp_config_read(nullptr, nullptr, &config.config);
  if (status != UCS_OK) return fail_ucx("ucp_config_read", status);
  KVFERRY_RETURN_IF_ERROR(config.set("TLS", options.transports.c_str()));
  if (!options.device.empty())
    KVFERRY_RETURN_IF_ERROR(config.set("NET_DEVICES", options.device.c_str()));
  if (options.keepalive != nullptr)
    KVFERRY_RETURN_IF_ERROR(config.set("KEEPALIVE_INTERVAL", options.keepalive));
  ucp_params_t params = {};
  params.field_mask = UCP_PARAM_FIELD_FEATURES;
  params.features = options.features;
  UcxContext out;
  status = ucp_init(&params, config.config, &out.handle_);
  if (status != UCS_OK) return fail_ucx("ucp_init", status);
  return out;
}

Result<bool> UcxContext::takes(ucs_memory_type_t type) const {
  ucp_context_attr_t attributes = {};
  attributes.field_mask = UCP_ATTR_FIELD_MEMORY_TYPES;
  const ucs_status_t status = ucp_context_query(handle_, &attributes);
  if (status != UCS_OK) return fail_ucx("ucp_context_query", status);
  return (attributes.memory_types & (uint64_t{1} << type)) != 0;
}

}  // namespace kvferry::rails
