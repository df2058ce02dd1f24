// A device arena of another process, mapped into this one (the rails process, as a rule). Closes
// what it has opened when it goes; the owner's memory stays alive meanwhile, except that a segment
// of cudaMalloc must be closed here before it is freed there.
//
// Any thread; open() and the destructor call the driver.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/gpu/device_arena.h"
#include "daemon/gpu/mapping.h"

namespace kvferry::gpu {

class DeviceArenaView {
 public:
  // The segments in their order, all of them or none. `device` is this process's own view of the
  // one that they name; of memory that lies elsewhere, the one whose context does the mapping. VMM
  // memory may then be touched by `device` and those of `also` that are up and reach it; memory of
  // cudaMalloc by `device` alone, until the others have Device::enable_peer().
  // The descriptors are closed either way: the mappings hold the memory.
  // INVALID_ARGUMENT ARENA_SEGMENT_INVALID for no segment or one of 0 bytes; INVALID_ARGUMENT
  // ARENA_WRONG_DEVICE if one is another device's; FAILED_PRECONDITION ARENA_IMPORT_FAILED with the
  // driver's words, or when it holds fewer bytes than told; UNAVAILABLE GPU_DOWN; errors of
  // Device::check.
  static Result<std::unique_ptr<DeviceArenaView>> open(
      const std::shared_ptr<const Device>& device, std::vector<ExportedSegment> segments,
      const std::vector<std::shared_ptr<const Device>>& also = {},
      MemoryHome home = MemoryHome::kDevice);
  // Closes now, and says how many calls of the driver refused: if any, this process may still have
  // the memory. Nothing is left to try then.
  uint32_t close();
  DeviceArenaView(const DeviceArenaView&) = delete;
  DeviceArenaView& operator=(const DeviceArenaView&) = delete;

  std::size_t segment_count() const { return segments_.size(); }
  // As DeviceArena::address_of, with this process's addresses.
  std::optional<cuda::CUdeviceptr> address_of(const memory::Region& region) const;

 private:
  struct Segment {
    Mapping mapping;
    uint64_t bytes = 0;  // as told; of cudaMalloc memory the driver may map more
  };
  DeviceArenaView() = default;

  std::vector<Segment> segments_;
};

}  // namespace kvferry::gpu
