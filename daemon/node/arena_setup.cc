#include "daemon/node/arena_setup.h"

#include <algorithm>
#include <bit>
#include <string>
#include <utility>
#include <vector>

#include "daemon/ops/log.h"

namespace kvferry::node {
namespace {

std::vector<gpu::ArenaKind> wanted_kinds(ops::ArenaKind kind) {
  switch (kind) {
    case ops::ArenaKind::kAuto:
      return {gpu::ArenaKind::kFabricVmm, gpu::ArenaKind::kDeviceVmm, gpu::ArenaKind::kCudaMalloc};
    case ops::ArenaKind::kFabricVmm:
      return {gpu::ArenaKind::kFabricVmm};
    case ops::ArenaKind::kDeviceVmm:
      return {gpu::ArenaKind::kDeviceVmm};
    case ops::ArenaKind::kCudaMalloc:
      return {gpu::ArenaKind::kCudaMalloc};
    case ops::ArenaKind::kSharedHost:
    case ops::ArenaKind::kPinnedHost:
      break;
  }
  return {};
}

// Why kind auto does without arenas on the devices, from the configuration alone; empty: it does
// not.
std::string why_host(const ops::Config& config) {
  const ops::ArenaConfig& arena = config.arena;
  if (arena.device_bytes == 0) return "arena.device_bytes is 0";
  if (config.checks.kind != ops::CheckKind::kNone)
    return "checks.kind is computed by the processor";
  if (arena.device_bytes < ops::least_arena_bytes(config) ||
      arena.device_segment_bytes < std::bit_ceil(config.engine.chunk_bytes))
    return "engine.chunk_bytes is too much for arena.device_bytes";
  // These take bytes from a GPU's memory by way of host memory of their own, which is one copy more
  // than if the gather kernel writes to host memory.
  const auto by_way_of_host = [](const std::string& transport) {
    return transport == "tcp" || transport == "shm";
  };
  if (std::all_of(config.rails.transports.begin(), config.rails.transports.end(), by_way_of_host))
    return "its rails read host memory only";
  return {};
}

Result<std::string> check_rails(const AskRails& ask_rails) {
  auto answer = ask_rails();
  KVFERRY_RETURN_IF_ERROR(answer);
  if (answer->has_cuda()) return std::string();
  return "UCX " + answer->ucx_version + " cannot use it" +
         (answer->cuda_missing.empty() ? "" : ": " + answer->cuda_missing);
}

struct Made {
  std::unique_ptr<gpu::DeviceArena> arena;
  std::string reason;
};

Result<Made> make_arena(const std::shared_ptr<const gpu::Device>& device, ops::ArenaKind kind,
                        const std::vector<uint64_t>& segment_bytes, double share) {
  const std::vector<gpu::ArenaKind> wanted = wanted_kinds(kind);
  auto choice = gpu::probe(device, wanted);
  KVFERRY_RETURN_IF_ERROR(choice);
  Made made;
  made.reason = kind == ops::ArenaKind::kAuto ? "the first that works" : "configured";
  for (const auto& refused : choice->refused)
    made.reason += "; " + std::string(name_of(refused.kind)) + ": " + refused.why.message;
  auto arena = gpu::DeviceArena::create(device, choice->kind, segment_bytes, share);
  KVFERRY_RETURN_IF_ERROR(arena);
  made.arena = std::move(*arena);
  return made;
}

tl::unexpected<Error> refused(const std::string& gpu, const Error& why, std::string_view key) {
  if (why.reason == "DEVICE_MEMORY_SHARE")
    return fail(Code::kFailedPrecondition, "CONFIGURATION_ARENA_SHARE", gpu + ": " + why.message,
                "arena.device_share");
  return fail(Code::kFailedPrecondition, "CONFIGURATION_ARENA_KIND", gpu + ": " + why.to_string(),
              std::string(key));
}

std::vector<uint64_t> segments_of(uint64_t bytes, uint64_t segment_bytes) {
  return std::vector<uint64_t>(bytes / segment_bytes, segment_bytes);
}

}  // namespace

Status add_device_arenas(const ops::Config& config, const Gpu& gpu, const AskRails& ask_rails,
                         Arenas& arenas) {
  const bool automatic = config.arena.kind == ops::ArenaKind::kAuto;
  if (gpu.queues == nullptr) {
    // A kind on the device has been refused by now.
    arenas.set_host_reason(automatic ? "no GPU: " + gpu.why_not : "configured");
    return {};
  }
  if (config.arena.kind == ops::ArenaKind::kPinnedHost) {
    arenas.set_host_reason("configured");
    return {};
  }
  std::string why = automatic ? why_host(config) : "";
  if (why.empty()) {
    auto cannot = check_rails(ask_rails);
    if (!cannot) return tl::unexpected<Error>(std::move(cannot.error()));
    if (!cannot->empty() && !automatic)
      return fail(Code::kFailedPrecondition, "CONFIGURATION_ARENA_KIND", *cannot, "arena.kind");
    why = *cannot;
  }
  if (!why.empty()) {
    arenas.set_host_reason("GPUs copy to and from it: " + why);
    return {};
  }
  const std::vector<uint64_t> segment_bytes =
      segments_of(config.arena.device_bytes, config.arena.device_segment_bytes);
  std::string without;
  const auto labels = gpu.labels();
  for (std::size_t i = 0; i < labels.size(); ++i) {
    const std::shared_ptr<const gpu::Device>& device = gpu.devices->all()[i];
    auto made = make_arena(device, config.arena.kind, segment_bytes, config.arena.device_share);
    if (made) {
      const std::string kind(name_of(made->arena->kind()));
      arenas.add(std::move(made->arena), false, segment_bytes,
                 {labels[i].device, kind, std::move(made->reason)});
      continue;
    }
    if (!automatic) return refused(labels[i].device, made.error(), "arena.kind");
    ops::log_warning("gpu without an arena of its own",
                     {ops::field("gpu", labels[i].device), ops::field("error", made.error())});
    without += "; " + labels[i].device + " copies to and from it: " + made.error().message;
  }
  arenas.set_host_reason("for pages of the host" + without);
  return {};
}

Status add_mapped_arenas(const ops::Config& config, const Gpu& gpu, Arenas& arenas) {
  if (config.mapped.host_bytes != 0) {
    KVFERRY_RETURN_IF_ERROR(
        arenas.add_mapped_host(segments_of(config.mapped.host_bytes, config.mapped.segment_bytes)));
    if (gpu.queues != nullptr) KVFERRY_RETURN_IF_ERROR(arenas.pin(*gpu.devices));
  }
  if (config.mapped.device_bytes == 0) return {};
  if (gpu.queues == nullptr)
    return fail(Code::kFailedPrecondition, "CONFIGURATION_ARENA_KIND",
                "it needs a GPU: " + gpu.why_not, "mapped.device_bytes");
  const std::vector<uint64_t> segment_bytes =
      segments_of(config.mapped.device_bytes, config.mapped.segment_bytes);
  const auto labels = gpu.labels();
  for (std::size_t i = 0; i < labels.size(); ++i) {
    auto made = make_arena(gpu.devices->all()[i], config.mapped.device_kind, segment_bytes,
                           config.arena.device_share);
    if (!made) return refused(labels[i].device, made.error(), "mapped.device_kind");
    const std::string kind(name_of(made->arena->kind()));
    arenas.add(std::move(made->arena), true, segment_bytes,
               {labels[i].device, kind, std::move(made->reason)});
  }
  return {};
}

}  // namespace kvferry::node
