#include "daemon/node/gpu_setup.h"

#include <algorithm>
#include <utility>

#include "daemon/ops/log.h"

namespace kvferry::node {
namespace {

constexpr std::pair<rpc::PoolKind, gpu::ImportKind> kDeviceKinds[] = {
    {rpc::PoolKind::kCudaVmmFd, gpu::ImportKind::kCudaVmmFd},
    {rpc::PoolKind::kCudaIpc, gpu::ImportKind::kCudaIpc},
    {rpc::PoolKind::kCudaFabric, gpu::ImportKind::kCudaFabric}};

Result<std::shared_ptr<const gpu::Devices>> open_devices(const ops::GpuConfig& config) {
  auto driver = cuda::Driver::load(config.driver);
  if (!driver) return fail(Code::kUnavailable, "NO_CUDA_DRIVER", driver.error().to_string());
  return gpu::Devices::open(std::move(*driver));
}

void log_devices(const gpu::Devices& devices, const gpu::Imports& imports) {
  for (const auto& device : devices.all()) {
    const gpu::DeviceFacts& facts = device->facts();
    ops::log_info("gpu", {ops::field("uuid", gpu::to_string(facts.uuid)),
                          ops::field("name", facts.name), ops::field("bytes", facts.total_bytes),
                          ops::field("driver", devices.driver().version())});
  }
  for (const Error& problem : devices.problems())
    ops::log_warning("gpu not usable", {ops::field("error", problem)});
  std::string kinds;
  for (const auto& [kind, import] : kDeviceKinds)
    if (imports.serves(import)) kinds += (kinds.empty() ? "" : ",") + std::string(name_of(kind));
  ops::log_info("gpu pools", {ops::field("kinds", kinds)});
}

}  // namespace

Result<Gpu> open_gpu(const ops::Config& config) {
  Gpu out;
  if (config.gpu.enabled == ops::GpuUse::kOff) {
    out.why_not = "gpu.enabled is \"off\"";
  } else if (auto devices = open_devices(config.gpu)) {
    out.devices = std::move(*devices);
    out.imports = std::make_unique<gpu::Imports>(out.devices);
    log_devices(*out.devices, *out.imports);
  } else if (config.gpu.enabled == ops::GpuUse::kOn) {
    return fail(Code::kFailedPrecondition, "CONFIGURATION_GPU", devices.error().to_string(),
                "gpu.enabled");
  } else {
    out.why_not = devices.error().message;
    ops::log_info("no gpu", {ops::field("why", devices.error().to_string())});
  }
  if (config.pools.automatic()) return out;
  const std::vector<rpc::PoolKind> wanted = pool_kinds(config);
  for (const auto& [kind, import] : kDeviceKinds) {
    if (std::find(wanted.begin(), wanted.end(), kind) == wanted.end()) continue;
    if (out.imports != nullptr && out.imports->serves(import)) continue;
    return fail(Code::kFailedPrecondition, "CONFIGURATION_POOL_KIND",
                std::string(name_of(kind)) + " cannot be served here: " +
                    (out.imports == nullptr ? out.why_not : "no device shares memory so"),
                "pools.kinds");
  }
  return out;
}

std::vector<rpc::PoolKind> pool_kinds(const ops::Config& config) {
  std::vector<rpc::PoolKind> kinds;
  for (const rpc::PoolKind kind : {rpc::PoolKind::kHostShm, rpc::PoolKind::kCudaVmmFd,
                                   rpc::PoolKind::kCudaIpc, rpc::PoolKind::kCudaFabric}) {
    const auto& named = config.pools.kinds;
    const bool wanted =
        config.pools.automatic()
            ? !(rpc::is_value(kind) && ops::several_tenants(config))
            : std::find(named.begin(), named.end(), rpc::name_of(kind)) != named.end();
    if (wanted) kinds.push_back(kind);
  }
  return kinds;
}

}  // namespace kvferry::node
