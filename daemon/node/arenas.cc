#include "daemon/node/arenas.h"

#include <algorithm>
#include <utility>

#include "daemon/base/units.h"
#include "daemon/gpu/pinned_memory.h"

namespace kvferry::node {
namespace {

constexpr uint64_t kPageBytes = 4096;
constexpr const char* kPinned = "pinned_host";

rails::SegmentKind rails_kind(gpu::ArenaKind kind) {
  switch (kind) {
    case gpu::ArenaKind::kFabricVmm:
      return rails::SegmentKind::kFabricVmm;
    case gpu::ArenaKind::kDeviceVmm:
      return rails::SegmentKind::kDeviceVmm;
    case gpu::ArenaKind::kCudaMalloc:
      break;
  }
  return rails::SegmentKind::kCudaMalloc;
}

rpc::LentKind lent_kind(gpu::ArenaKind kind) {
  switch (kind) {
    case gpu::ArenaKind::kFabricVmm:
      return rpc::LentKind::kFabricVmm;
    case gpu::ArenaKind::kDeviceVmm:
      return rpc::LentKind::kDeviceVmm;
    case gpu::ArenaKind::kCudaMalloc:
      break;
  }
  return rpc::LentKind::kCudaMalloc;
}

}  // namespace

Result<std::unique_ptr<Arenas>> Arenas::create(const std::vector<uint64_t>& segment_bytes,
                                               BindMemory bind) {
  std::unique_ptr<Arenas> out(new Arenas);
  out->bind_ = std::move(bind);
  KVFERRY_RETURN_IF_ERROR(out->add_host("kvferry-arena", segment_bytes, false));
  return out;
}

Status Arenas::add_mapped_host(const std::vector<uint64_t>& segment_bytes) {
  return add_host("kvferry-mapped", segment_bytes, true);
}

Arenas::Arena& Arenas::next(bool mapped, const std::vector<uint64_t>& segment_bytes,
                            rpc::MemoryChoice choice) {
  Arena& arena = all_.emplace_back();
  arena.choice = std::move(choice);
  arena.mapped = mapped;
  arena.first_segment = static_cast<uint32_t>(segments_.count());
  arena.segment_bytes = segment_bytes;
  return arena;
}

Status Arenas::add_host(const std::string& name, const std::vector<uint64_t>& segment_bytes,
                        bool mapped) {
  memory::SharedMemoryOptions options;
  options.huge_pages = true;
  options.populate = true;
  options.last_seals = mapped;  // a peer's seal against writing would keep the others out
  std::string binding_problem;
  if (bind_) {
    options.before_touch = [&](const void* data, uint64_t bytes) {
      const Status bound = bind_(data, bytes);
      if (!bound && binding_problem.empty()) binding_problem = bound.error().message;
    };
  }
  auto host = memory::HostArena::create(name, segment_bytes, options);
  KVFERRY_RETURN_IF_ERROR(host);
  rpc::MemoryChoice choice{"host", "shared_host", mapped ? "configured" : "", 0};
  for (uint32_t i = 0; i < host->segment_count(); ++i)
    choice.huge_page_bytes += host->segment(i).huge_page_bytes();
  Arena& arena = next(mapped, segment_bytes, std::move(choice));
  arena.binding_problem = std::move(binding_problem);
  for (uint32_t i = 0; i < host->segment_count(); ++i) {
    const memory::SharedMemory& segment = host->segment(i);
    segments_.add({segment.bytes(), segment.data(), nullptr, nullptr, 0, nullptr});
    host_fds_.push_back(segment.fd());
  }
  hosts_.push_back(std::move(*host));
  return {};
}

void Arenas::add(std::shared_ptr<const gpu::DeviceArena> memory, bool mapped,
                 const std::vector<uint64_t>& segment_bytes, rpc::MemoryChoice choice) {
  Arena& arena = next(mapped, segment_bytes, std::move(choice));
  arena.device = memory->device().get();
  for (uint32_t i = 0; i < segment_bytes.size(); ++i) {
    const cuda::CUdeviceptr base = *memory->address_of({i, 0, segment_bytes[i]});
    segments_.add({segment_bytes[i], nullptr, nullptr, arena.device, base, memory});
    host_fds_.push_back(-1);
  }
  arena.memory = std::move(memory);
}

Status Arenas::pin(const gpu::Devices& devices) {
  std::vector<std::pair<uint32_t, std::shared_ptr<const gpu::PinnedMemory>>> pins;
  for (const Arena& arena : all_) {
    if (arena.device != nullptr || arena.choice.kind == kPinned) continue;
    for (uint32_t i = 0; i < arena.segment_bytes.size(); ++i) {
      const uint32_t number = arena.first_segment + i;
      const uint64_t bytes = arena.segment_bytes[i];
      auto pinned = gpu::PinnedMemory::pin(
          devices.all(), segments_.host_address({number, 0, bytes}), round_up(bytes, kPageBytes));
      KVFERRY_RETURN_IF_ERROR(pinned);
      for (const auto& device : devices.all())
        if ((*pinned)->on(*device) == 0)
          device->take_down({Code::kUnavailable, "PIN_FAILED", "it does not see the arena", {}});
      pins.emplace_back(number, std::move(*pinned));
    }
  }
  for (auto& [number, pinned] : pins) segments_.pin(number, std::move(pinned));
  for (Arena& arena : all_)
    if (arena.device == nullptr) arena.choice.kind = kPinned;
  return {};
}

uint64_t Arenas::total_bytes() const {
  uint64_t sum = 0;
  for (const Arena& arena : all_)
    for (const uint64_t bytes : arena.segment_bytes) sum += bytes;
  return sum;
}

bool Arenas::rails_use_host_only() const {
  return std::all_of(all_.begin(), all_.end(),
                     [](const Arena& arena) { return arena.device == nullptr || arena.mapped; });
}

uint32_t Arenas::of(const gpu::Device* device) const {
  for (uint32_t i = 1; i < all_.size() && device != nullptr; ++i)
    if (all_[i].device == device && !all_[i].mapped) return i;
  return 0;
}

std::optional<uint32_t> Arenas::mapped_of(const gpu::Device* device) const {
  std::optional<uint32_t> host;
  for (uint32_t i = 1; i < all_.size(); ++i) {
    if (!all_[i].mapped) continue;
    if (all_[i].device == device) return i;
    if (all_[i].device == nullptr) host = i;
  }
  return host;
}

Result<std::vector<rails::Segment>> Arenas::for_rails() {
  std::vector<rails::Segment> out;
  for (const Arena& arena : all_) {
    for (uint32_t i = 0; i < arena.segment_bytes.size() && !arena.mapped; ++i) {
      rails::Segment& segment = out.emplace_back();
      if (arena.device == nullptr) {
        segment.fd = host_fds_[arena.first_segment + i];
        segment.bytes = arena.segment_bytes[i];
        continue;
      }
      auto exported = arena.memory->export_segment(i);
      KVFERRY_RETURN_IF_ERROR(exported);
      segment.kind = rails_kind(exported->kind);
      segment.bytes = exported->bytes;
      segment.handle = exported->handle;
      segment.device_uuid = exported->device_uuid;
      if (exported->fd) segment.fd = exported_.emplace_back(std::move(exported->fd)).get();
    }
  }
  return out;
}

Result<std::vector<LentArena>> Arenas::lent() {
  std::vector<LentArena> out;
  for (uint32_t number = 0; number < all_.size(); ++number) {
    const Arena& arena = all_[number];
    if (!arena.mapped) continue;
    LentArena& lent = out.emplace_back();
    lent.number = number;
    for (uint32_t i = 0; i < arena.segment_bytes.size(); ++i) {
      LentArena::Segment& segment = lent.segments.emplace_back();
      segment.number = arena.first_segment + i;
      segment.bytes = arena.segment_bytes[i];
      if (arena.device == nullptr) {
        segment.fd = host_fds_[segment.number];
        continue;
      }
      auto exported = arena.memory->export_segment(i);
      KVFERRY_RETURN_IF_ERROR(exported);
      lent.kind = lent_kind(exported->kind);
      lent.device_uuid = exported->device_uuid;
      segment.bytes = exported->bytes;
      segment.handle = exported->handle;
      if (exported->fd) segment.fd = exported_.emplace_back(std::move(exported->fd)).get();
    }
  }
  return out;
}

}  // namespace kvferry::node
