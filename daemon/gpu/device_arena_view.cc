#include "daemon/gpu/device_arena_view.h"

#include <cstring>
#include <string>
#include <utility>

namespace kvferry::gpu {
namespace {

using DeviceList = std::vector<std::shared_ptr<const Device>>;

Result<Mapping> map_vmm(const DeviceList& access, void* handle,
                        cuda::CUmemAllocationHandleType type, uint64_t bytes, MemoryHome home,
                        const std::string& field) {
  auto mapping = Mapping::reserve(access.front(), bytes);
  KVFERRY_RETURN_IF_ERROR(mapping);
  KVFERRY_RETURN_IF_ERROR(mapping->add(handle, type, bytes, field, home));
  KVFERRY_RETURN_IF_ERROR(mapping->open_access(access));
  return mapping;
}

// `access`: who may touch it; the first one maps.
Result<Mapping> map(const DeviceList& access, const ExportedSegment& segment, MemoryHome home,
                    const std::string& field) {
  switch (segment.kind) {
    case ArenaKind::kFabricVmm: {
      cuda::CUmemFabricHandle value{};
      static_assert(sizeof value == kHandleBytes);
      std::memcpy(&value, segment.handle.data(), sizeof value);
      return map_vmm(access, &value, cuda::CU_MEM_HANDLE_TYPE_FABRIC, segment.bytes, home, field);
    }
    case ArenaKind::kDeviceVmm:
      return map_vmm(access, reinterpret_cast<void*>(static_cast<intptr_t>(segment.fd.get())),
                     cuda::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, segment.bytes, home, field);
    case ArenaKind::kCudaMalloc: {
      cuda::CUipcMemHandle value{};
      static_assert(sizeof value == kHandleBytes);
      std::memcpy(&value, segment.handle.data(), sizeof value);
      return Mapping::open_ipc(access.front(), value, field);
    }
  }
  return invalid(field, "ARENA_SEGMENT_INVALID", "no such kind of arena");
}

// What a mapping blames a worker for is here the machine's or our own doing.
Error refused(Error error) {
  if (error.code == Code::kInvalidArgument) {
    error.code = Code::kFailedPrecondition;
    error.reason = "ARENA_IMPORT_FAILED";
  }
  return error;
}

}  // namespace

Result<std::unique_ptr<DeviceArenaView>> DeviceArenaView::open(
    const std::shared_ptr<const Device>& device, std::vector<ExportedSegment> segments,
    const std::vector<std::shared_ptr<const Device>>& also, MemoryHome home) {
  if (device->down()) return tl::unexpected<Error>(device->down_error());
  if (segments.empty())
    return invalid("segments", "ARENA_SEGMENT_INVALID", "an arena has a segment");
  DeviceList access{device};
  for (const auto& other : also)
    if (other != device) access.push_back(other);
  std::unique_ptr<DeviceArenaView> view(new DeviceArenaView);
  for (std::size_t i = 0; i < segments.size(); ++i) {
    const ExportedSegment& segment = segments[i];
    const std::string field = "segments[" + std::to_string(i) + "]";
    if (segment.bytes == 0) return invalid(field, "ARENA_SEGMENT_INVALID", "a segment has bytes");
    if (home == MemoryHome::kElsewhere && segment.kind != ArenaKind::kFabricVmm)
      return invalid(field, "ARENA_SEGMENT_INVALID",
                     "only fabric memory is reached from elsewhere");
    if (home == MemoryHome::kDevice && segment.device_uuid != device->facts().uuid)
      return invalid(field, "ARENA_WRONG_DEVICE",
                     "the segment lies on " + to_string(segment.device_uuid) + ", not on " +
                         to_string(device->facts().uuid));
    auto mapping = map(access, segment, home, field);
    if (!mapping) return tl::unexpected<Error>(refused(std::move(mapping).error()));
    if (mapping->bytes() < segment.bytes)
      return fail(Code::kFailedPrecondition, "ARENA_IMPORT_FAILED",
                  "the segment has " + std::to_string(mapping->bytes()) + " bytes, told were " +
                      std::to_string(segment.bytes),
                  field);
    view->segments_.push_back({std::move(*mapping), segment.bytes});
  }
  return view;
}

uint32_t DeviceArenaView::close() {
  uint32_t refused = 0;
  for (Segment& segment : segments_) refused += segment.mapping.close();
  segments_.clear();
  return refused;
}

std::optional<cuda::CUdeviceptr> DeviceArenaView::address_of(const memory::Region& region) const {
  if (region.segment >= segments_.size()) return std::nullopt;
  const Segment& segment = segments_[region.segment];
  return address_in(segment.mapping.base(), segment.bytes, region);
}

}  // namespace kvferry::gpu
