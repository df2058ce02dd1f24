#include "daemon/gpu/device_arena.h"

#include <fcntl.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "daemon/base/units.h"
#include "daemon/gpu/closing.h"
#include "daemon/gpu/device_arena_view.h"
#include "daemon/gpu/mapping.h"

namespace kvferry::gpu {
namespace {

// The driver cuts smaller allocations of cudaMalloc out of blocks of this size, and who opens the
// handle of one gets its neighbours too.
constexpr uint64_t kMallocGranularity = 2 << 20;

cuda::CUmemAllocationHandleType handle_type(ArenaKind kind) {
  return kind == ArenaKind::kFabricVmm ? cuda::CU_MEM_HANDLE_TYPE_FABRIC
                                       : cuda::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
}

cuda::CUmemAllocationProp properties_of(const Device& device, ArenaKind kind) {
  cuda::CUmemAllocationProp properties{};
  properties.type = cuda::CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.requestedHandleTypes = handle_type(kind);
  properties.location = {cuda::CU_MEM_LOCATION_TYPE_DEVICE, device.handle()};
  properties.allocFlags.gpuDirectRDMACapable = device.facts().rdma_with_vmm ? 1 : 0;
  return properties;
}

// Asked for with the very properties of the allocation: it is larger for some.
Result<uint64_t> granularity_of(const Device& device, ArenaKind kind) {
  if (kind == ArenaKind::kCudaMalloc) return kMallocGranularity;
  const Device::Current current(device);
  KVFERRY_RETURN_IF_ERROR(current.status());
  const cuda::CUmemAllocationProp properties = properties_of(device, kind);
  std::size_t granularity = 0;
  KVFERRY_RETURN_IF_ERROR(
      device.check(device.api().cuMemGetAllocationGranularity(
                       &granularity, &properties, cuda::CU_MEM_ALLOC_GRANULARITY_MINIMUM),
                   "cuMemGetAllocationGranularity"));
  if (granularity == 0)
    return fail(Code::kInternal, "CUDA_INVALID_VALUE",
                "cuMemGetAllocationGranularity: the driver says 0");
  return granularity;
}

}  // namespace

std::string_view name_of(ArenaKind kind) {
  switch (kind) {
    case ArenaKind::kFabricVmm:
      return "fabric_vmm";
    case ArenaKind::kDeviceVmm:
      return "device_vmm";
    case ArenaKind::kCudaMalloc:
      return "cuda_malloc";
  }
  return "unknown";
}

std::optional<cuda::CUdeviceptr> address_in(cuda::CUdeviceptr base, uint64_t bytes,
                                            const memory::Region& region) {
  if (region.bytes == 0 || region.bytes > bytes || region.offset > bytes - region.bytes)
    return std::nullopt;
  return base + region.offset;
}

// ---- a segment ---------------------------------------------------------------------------------

// Owns what it has got so far, so that a step that fails undoes those before it.
class DeviceArena::Segment {
 public:
  explicit Segment(std::shared_ptr<const Device> device) : device_(std::move(device)) {}
  ~Segment() {
    (void)mapping_.close();
    const Closing current(*device_);
    if (!current.ok()) return;
    const cuda::Api& api = device_->api();
    if (handle_ != 0) (void)device_->check(api.cuMemRelease(handle_), "cuMemRelease");
    if (malloced_ != 0) (void)device_->check(api.cuMemFree(malloced_), "cuMemFree");
  }
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  Status allocate(ArenaKind kind, uint64_t bytes) {
    const cuda::Api& api = device_->api();
    const Device::Current current(*device_);
    KVFERRY_RETURN_IF_ERROR(current.status());
    if (kind == ArenaKind::kCudaMalloc) {
      cuda::CUdeviceptr address = 0;
      KVFERRY_RETURN_IF_ERROR(device_->check(api.cuMemAlloc(&address, bytes), "cuMemAlloc"));
      malloced_ = address;
      return {};
    }
    const cuda::CUmemAllocationProp properties = properties_of(*device_, kind);
    cuda::CUmemGenericAllocationHandle handle = 0;
    KVFERRY_RETURN_IF_ERROR(
        device_->check(api.cuMemCreate(&handle, bytes, &properties, 0), "cuMemCreate"));
    handle_ = handle;
    auto mapping = Mapping::reserve(device_, bytes);
    KVFERRY_RETURN_IF_ERROR(mapping);
    mapping_ = std::move(*mapping);
    KVFERRY_RETURN_IF_ERROR(mapping_.map(handle_, bytes));
    return mapping_.open_access({device_});
  }

  cuda::CUdeviceptr base() const { return malloced_ != 0 ? malloced_ : mapping_.base(); }

  Status export_to(ExportedSegment& out) const {
    const cuda::Api& api = device_->api();
    const Device::Current current(*device_);
    KVFERRY_RETURN_IF_ERROR(current.status());
    switch (out.kind) {
      case ArenaKind::kFabricVmm: {
        cuda::CUmemFabricHandle value{};
        KVFERRY_RETURN_IF_ERROR(device_->check(
            api.cuMemExportToShareableHandle(&value, handle_, handle_type(out.kind), 0),
            "cuMemExportToShareableHandle"));
        static_assert(sizeof value == kHandleBytes);
        std::memcpy(out.handle.data(), &value, sizeof value);
        return {};
      }
      case ArenaKind::kDeviceVmm: {
        int fd = -1;
        KVFERRY_RETURN_IF_ERROR(
            device_->check(api.cuMemExportToShareableHandle(&fd, handle_, handle_type(out.kind), 0),
                           "cuMemExportToShareableHandle"));
        out.fd.reset(fd);
        // A program that is started later must not keep the memory.
        if (::fcntl(fd, F_SETFD, FD_CLOEXEC) != 0)
          return fail_errno("ARENA_EXPORT", "fcntl", errno);
        return {};
      }
      case ArenaKind::kCudaMalloc: {
        cuda::CUipcMemHandle value{};
        KVFERRY_RETURN_IF_ERROR(
            device_->check(api.cuIpcGetMemHandle(&value, malloced_), "cuIpcGetMemHandle"));
        static_assert(sizeof value == kHandleBytes);
        std::memcpy(out.handle.data(), &value, sizeof value);
        return {};
      }
    }
    return invalid("kind", "ARENA_SEGMENT_INVALID", "no such kind of arena");
  }

 private:
  const std::shared_ptr<const Device> device_;
  cuda::CUdeviceptr malloced_ = 0;
  cuda::CUmemGenericAllocationHandle handle_ = 0;
  Mapping mapping_;
};

// ---- an arena ----------------------------------------------------------------------------------

Result<std::unique_ptr<DeviceArena>> DeviceArena::create(std::shared_ptr<const Device> device,
                                                         ArenaKind kind,
                                                         std::span<const uint64_t> segment_bytes,
                                                         double share) {
  if (device->down()) return tl::unexpected<Error>(device->down_error());
  if (!(share > 0 && share <= 1))
    return invalid("share", "ARENA_SHARE_INVALID", "a share is more than 0 and at most 1");
  if (segment_bytes.empty())
    return invalid("segments", "ARENA_SEGMENT_INVALID", "an arena has a segment");
  const auto granularity = granularity_of(*device, kind);
  KVFERRY_RETURN_IF_ERROR(granularity);
  std::unique_ptr<DeviceArena> arena(new DeviceArena(std::move(device), kind));
  for (std::size_t i = 0; i < segment_bytes.size(); ++i) {
    const uint64_t bytes = segment_bytes[i];
    uint64_t rounded = 0;
    if (bytes == 0 || !checked_mul(ceil_div(bytes, *granularity), *granularity, rounded) ||
        !checked_add(arena->total_bytes_, rounded, arena->total_bytes_))
      return invalid("segments[" + std::to_string(i) + "]", "ARENA_SEGMENT_INVALID",
                     std::to_string(bytes) + " bytes: 0, or more than can be counted in all");
    arena->segment_bytes_.push_back(rounded);
  }
  const auto free = arena->device_->free_bytes();
  KVFERRY_RETURN_IF_ERROR(free);
  const auto limit = static_cast<uint64_t>(static_cast<double>(*free) * share);
  if (arena->total_bytes_ > limit)
    return fail(Code::kResourceExhausted, "DEVICE_MEMORY_SHARE",
                "an arena of " + std::to_string(arena->total_bytes_) + " bytes on " +
                    to_string(arena->device_->facts().uuid) + ", where " + std::to_string(*free) +
                    " bytes are free and it may take " + std::to_string(limit) + " of them");
  KVFERRY_RETURN_IF_ERROR(arena->allocate());
  return arena;
}

DeviceArena::DeviceArena(std::shared_ptr<const Device> device, ArenaKind kind)
    : device_(std::move(device)), kind_(kind) {}

DeviceArena::~DeviceArena() = default;

Status DeviceArena::allocate() {
  for (const uint64_t bytes : segment_bytes_) {
    Segment& segment = *segments_.emplace_back(std::make_unique<Segment>(device_));
    KVFERRY_RETURN_IF_ERROR(segment.allocate(kind_, bytes));
  }
  return {};
}

std::optional<cuda::CUdeviceptr> DeviceArena::address_of(const memory::Region& region) const {
  if (region.segment >= segments_.size()) return std::nullopt;
  return address_in(segments_[region.segment]->base(), segment_bytes_[region.segment], region);
}

Result<ExportedSegment> DeviceArena::export_segment(uint32_t segment) const {
  if (device_->down()) return tl::unexpected<Error>(device_->down_error());
  if (segment >= segments_.size())
    return invalid("segment", "ARENA_SEGMENT_INVALID",
                   "there are " + std::to_string(segments_.size()));
  ExportedSegment out;
  out.kind = kind_;
  out.bytes = segment_bytes_[segment];
  out.device_uuid = device_->facts().uuid;
  KVFERRY_RETURN_IF_ERROR(segments_[segment]->export_to(out));
  return out;
}

// ---- which kind --------------------------------------------------------------------------------

namespace {

// The smallest arena there is, with all that a real one goes through.
Status try_out(const std::shared_ptr<const Device>& device, ArenaKind kind) {
  constexpr uint64_t kLeast[] = {1};
  auto arena = DeviceArena::create(device, kind, kLeast, 1);
  KVFERRY_RETURN_IF_ERROR(arena);
  auto exported = (*arena)->export_segment(0);
  KVFERRY_RETURN_IF_ERROR(exported);
  if (kind == ArenaKind::kCudaMalloc) return {};
  std::vector<ExportedSegment> segments;
  segments.push_back(std::move(*exported));
  KVFERRY_RETURN_IF_ERROR(DeviceArenaView::open(device, std::move(segments)));
  return {};
}

}  // namespace

Result<ArenaChoice> probe(const std::shared_ptr<const Device>& device,
                          std::span<const ArenaKind> wanted) {
  if (wanted.empty()) return invalid("kinds", "ARENA_KIND_MISSING", "no kind of arena is wanted");
  ArenaChoice choice;
  std::string words;
  for (const ArenaKind kind : wanted) {
    Status tried = try_out(device, kind);
    if (tried) {
      choice.kind = kind;
      choice.imported = kind != ArenaKind::kCudaMalloc;
      return choice;
    }
    // A device that is lost would refuse every kind, which says nothing of the kinds.
    if (device->down()) return tl::unexpected<Error>(std::move(tried).error());
    words +=
        (words.empty() ? "" : "; ") + std::string(name_of(kind)) + ": " + tried.error().message;
    choice.refused.push_back({kind, std::move(tried).error()});
  }
  return fail(Code::kFailedPrecondition, "ARENA_KIND_UNAVAILABLE",
              to_string(device->facts().uuid) + " offers no arena that is wanted: " + words);
}

}  // namespace kvferry::gpu
