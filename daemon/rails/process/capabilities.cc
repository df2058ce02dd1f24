#include "daemon/rails/process/capabilities.h"

#include <ucp/api/ucp.h>
#include <uct/api/uct.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <vector>

#include "daemon/rails/process/device_memory.h"
#include "daemon/rails/process/ucx_context.h"
#include "kernels/cuda/driver.h"

namespace kvferry::rails {
namespace {

// "tcp/eth0", "cuda_copy/cuda": transports and devices of one memory domain.
void list_domain(uct_component_h component, const char* name, std::vector<std::string>& out) {
  uct_md_config_t* config = nullptr;
  if (uct_md_config_read(component, nullptr, nullptr, &config) != UCS_OK) return;
  uct_md_h domain = nullptr;
  // One that cannot be opened is none: UCX passes it over as well.
  const ucs_status_t opened = uct_md_open(component, name, config, &domain);
  uct_config_release(config);
  if (opened != UCS_OK) return;
  uct_tl_resource_desc_t* resources = nullptr;
  unsigned count = 0;
  if (uct_md_query_tl_resources(domain, &resources, &count) == UCS_OK) {
    for (unsigned i = 0; i < count; ++i)
      out.push_back(std::string(resources[i].tl_name) + "/" + resources[i].dev_name);
    uct_release_tl_resource_list(resources);
  }
  uct_md_close(domain);
}

void list_component(uct_component_h component, std::vector<std::string>& out) {
  uct_component_attr_t attributes = {};
  attributes.field_mask = UCT_COMPONENT_ATTR_FIELD_MD_RESOURCE_COUNT;
  if (uct_component_query(component, &attributes) != UCS_OK) return;
  std::vector<uct_md_resource_desc_t> domains(attributes.md_resource_count);
  attributes.field_mask = UCT_COMPONENT_ATTR_FIELD_MD_RESOURCES;
  attributes.md_resources = domains.data();
  if (domains.empty() || uct_component_query(component, &attributes) != UCS_OK) return;
  for (const uct_md_resource_desc_t& domain : domains) list_domain(component, domain.md_name, out);
}

Result<std::vector<std::string>> list_transports() {
  uct_component_h* components = nullptr;
  unsigned count = 0;
  const ucs_status_t status = uct_query_components(&components, &count);
  if (status != UCS_OK) return fail_ucx("uct_query_components", status);
  std::vector<std::string> out;
  for (unsigned i = 0; i < count; ++i) list_component(components[i], out);
  uct_release_component_list(components);
  std::sort(out.begin(), out.end());
  out.erase(std::unique(out.begin(), out.end()), out.end());
  return out;
}

bool has_transport(const std::vector<std::string>& all, const std::string& name) {
  return std::any_of(all.begin(), all.end(),
                     [&](const std::string& one) { return one.starts_with(name + "/"); });
}

// Why device memory cannot be registered; empty: it can.
Result<std::string> what_device_memory_lacks(const std::vector<std::string>& transports) {
  const DeviceMemoryUse use = device_memory_use();
  std::string names = "self";
  if (use.transport != nullptr) {
    if (!has_transport(transports, use.transport))
      return "UCX " + ucx_version() + " has no transport " + use.transport +
             ": it was built without CUDA, or its CUDA module finds no driver or no device";
    names += std::string(",") + use.transport;
  }
  const auto context = UcxContext::make({names, {}, nullptr, UCP_FEATURE_AM});
  if (!context) return tl::unexpected<Error>(context.error());
  const auto takes = context->takes(use.type);
  if (!takes) return tl::unexpected<Error>(takes.error());
  if (!*takes)
    return "UCX " + ucx_version() + " takes no memory of the type " +
           ucs_memory_type_names[use.type];
  return std::string();
}

}  // namespace

std::string ucx_version() {
  unsigned major = 0;
  unsigned minor = 0;
  unsigned release = 0;
  ucp_get_version(&major, &minor, &release);
  return std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(release);
}

Status check_device_memory() {
  auto transports = list_transports();
  if (!transports) return tl::unexpected<Error>(transports.error());
  const auto lacks = what_device_memory_lacks(*transports);
  if (!lacks) return tl::unexpected<Error>(lacks.error());
  if (lacks->empty()) return {};
  return fail(Code::kFailedPrecondition, "UCX_WITHOUT_CUDA",
              *lacks +
                  "; arenas in GPU memory need UCX 1.22 with CUDA, else choose arenas of the "
                  "kind pinned_host");
}

Result<std::string> capabilities_json(const std::string& cuda_driver) {
  // First: UCX's CUDA module then finds the driver loaded, wherever it lies.
  const auto driver =
      cuda::Driver::load(cuda_driver.empty() ? cuda::Driver::kDefaultLibrary : cuda_driver);
  auto transports = list_transports();
  if (!transports) return tl::unexpected<Error>(transports.error());
  auto lacks = what_device_memory_lacks(*transports);
  if (!lacks) return tl::unexpected<Error>(lacks.error());
  if (!lacks->empty() && !driver) *lacks += "; " + driver.error().to_string();
  std::vector<std::string> memory_types = {"host"};
  if (lacks->empty()) memory_types.push_back("cuda");
  const nlohmann::ordered_json out = {
      {"ucx_version", ucx_version()},
      {"ucx_built_for", std::to_string(UCP_API_MAJOR) + "." + std::to_string(UCP_API_MINOR)},
      {"memory_types", memory_types},
      {"transports", *transports},
      {"cuda_missing", *lacks},
  };
  return out.dump(-1, ' ', true, nlohmann::ordered_json::error_handler_t::replace);
}

}  // namespace kvferry::rails
