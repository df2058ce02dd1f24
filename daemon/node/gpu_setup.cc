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

std::string label_of(const gpu::Device& device) {
  return "gpu" + std::to_string(device.facts().ordinal);
}

Result<std::unique_ptr<gpu::Queues>> open_queues(const ops::Config& config, const Gpu& gpu,
                                                 ops::Watchdog& watchdog) {
  const auto options_of = [&, counting = gpu.counting.get()](const gpu::Device& device) {
    const std::string label = label_of(device);
    std::size_t index = 0;
    while (gpu.devices->all().at(index).get() != &device) ++index;
    gpu::QueueOptions options;
    options.streams = config.gpu.streams;
    ops::Ticker& ticker = watchdog.add(label, config.watchdog.limit, monotonic_now());
    options.tick = [&ticker](Time now) { ticker.tick(now); };
    options.on_retired = [&ticker] { ticker.retire(); };
    options.on_launch_to_done = [counting, index](Duration taken) {
      if (auto* metrics = counting->metrics.load(std::memory_order_acquire))
        metrics->gpu(index).launch_to_done->observe(taken);
    };
    options.on_error = [label](const Error& error) {
      ops::log_warning("gpu copy failed", {ops::field("gpu", label), ops::field("error", error)});
    };
    return options;
  };
  return gpu::Queues::open(gpu.devices, options_of);
}

// All of it, or an error and nothing.
Result<Gpu> open_all(const ops::Config& config, std::shared_ptr<const gpu::Devices> devices,
                     Arenas& arenas, ops::Watchdog& watchdog) {
  Gpu out;
  out.devices = std::move(devices);
  out.imports = std::make_unique<gpu::Imports>(out.devices);
  out.counting = std::make_unique<GpuCounting>();
  auto queues = open_queues(config, out, watchdog);
  KVFERRY_RETURN_IF_ERROR(queues);
  out.queues = std::move(*queues);
  KVFERRY_RETURN_IF_ERROR(arenas.pin(*out.devices));
  log_devices(*out.devices, *out.imports);
  out.unused = static_cast<uint32_t>(out.devices->problems().size());
  return out;
}

}  // namespace

std::vector<ops::GpuLabels> Gpu::labels() const {
  std::vector<ops::GpuLabels> out;
  if (devices == nullptr) return out;
  for (const auto& device : devices->all())
    out.push_back({label_of(*device), gpu::to_string(device->facts().uuid), device->facts().name});
  return out;
}

bool Gpu::watches_events() const {
  return devices != nullptr &&
         std::any_of(devices->all().begin(), devices->all().end(),
                     [](const auto& device) { return device->facts().events_by_ipc; });
}

Result<std::shared_ptr<const gpu::Devices>> find_gpus(const ops::Config& config) {
  if (config.gpu.enabled == ops::GpuUse::kOff)
    return fail(Code::kFailedPrecondition, "NO_GPU", "gpu.enabled is \"off\"");
  // Not shown to any GPU.
  if (config.arena.kind == ops::ArenaKind::kSharedHost)
    return fail(Code::kFailedPrecondition, "NO_GPU", "arena.kind is \"shared_host\"");
  auto driver = cuda::Driver::load(config.gpu.driver);
  if (!driver) return fail(Code::kUnavailable, "NO_CUDA_DRIVER", driver.error().to_string());
  return gpu::Devices::open(std::move(*driver));
}

Result<Gpu> open_gpu(const ops::Config& config, Result<std::shared_ptr<const gpu::Devices>> devices,
                     Arenas& arenas, ops::Watchdog& watchdog) {
  Gpu out;
  const bool shared_arena = config.arena.kind == ops::ArenaKind::kSharedHost;
  Result<Gpu> opened = tl::unexpected<Error>(Error{});
  if (devices)
    opened = open_all(config, std::move(*devices), arenas, watchdog);
  else
    opened.error() = std::move(devices).error();
  if (opened) {
    out = std::move(*opened);
  } else if (config.gpu.enabled == ops::GpuUse::kOn) {
    return fail(Code::kFailedPrecondition, "CONFIGURATION_GPU", opened.error().to_string(),
                "gpu.enabled");
  } else if (config.arena.kind != ops::ArenaKind::kAuto && !shared_arena) {
    return fail(Code::kFailedPrecondition, "CONFIGURATION_ARENA_KIND",
                "it needs a GPU: " + opened.error().to_string(), "arena.kind");
  } else {
    out.why_not = opened.error().message;
    const ops::LogField why = ops::field("why", opened.error().to_string());
    // A GPU that is there and could not be used is worth a look.
    if (config.gpu.enabled == ops::GpuUse::kOff || shared_arena ||
        opened.error().reason == "NO_CUDA_DRIVER") {
      ops::log_info("no gpu", {why});
    } else {
      ops::log_warning("gpu not used", {why});
      out.unused = 1;  // at least
    }
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
