// A bounce arena in the memory of one GPU: segments, each one allocation of the driver, which
// copies gather into and which another process (the rails) imports through device_arena_view.h.
//
// Any thread; all functions that say so call the driver, some milliseconds as a rule: not for the
// engine's thread. The arena does not know who uses it: whoever lets it go has seen all copies end.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/base/unique_fd.h"
#include "daemon/gpu/device.h"
#include "daemon/memory/region.h"
#include "kernels/cuda/driver.h"

namespace kvferry::gpu {

// Best first: fabric memory may be reached from other machines of an NVLink domain, VMM memory
// carries the flag for RDMA and is handed over by a descriptor, cudaMalloc works everywhere.
enum class ArenaKind : uint8_t { kFabricVmm, kDeviceVmm, kCudaMalloc };
// "fabric_vmm", "device_vmm", "cuda_malloc"
std::string_view name_of(ArenaKind kind);

// ---- which kind --------------------------------------------------------------------------------

struct ArenaChoice {
  ArenaKind kind = ArenaKind::kCudaMalloc;
  // What was exported has been imported and mapped, too. False for kCudaMalloc: the driver does not
  // open a CUDA IPC handle in the process that made it, so the trial ends with the export. True for
  // kFabricVmm says that this machine can; a peer elsewhere may lack the IMEX domain all the same.
  bool imported = false;
  // The kinds that were wanted more, in their order, and what the driver said to each.
  struct Refused {
    ArenaKind kind = ArenaKind::kFabricVmm;
    Error why;
  };
  std::vector<Refused> refused;
};

// The first of the `wanted` kinds, in their order, that works on the device. Each is tried as it
// would be used: created, mapped, exported, imported, all undone. What a device claims is no
// evidence: fabric handles fail in one place or another where there is no IMEX channel.
// Calls the driver. INVALID_ARGUMENT ARENA_KIND_MISSING when none is wanted; FAILED_PRECONDITION
// ARENA_KIND_UNAVAILABLE when none works, with the driver's words to each; UNAVAILABLE when the
// device is down or fails in the trial.
Result<ArenaChoice> probe(const std::shared_ptr<const Device>& device,
                          std::span<const ArenaKind> wanted);

// ---- an arena ----------------------------------------------------------------------------------

// A segment as another process gets it. A descriptor keeps the memory alive, a handle does not: the
// arena must outlive the import. Whoever has a handle has the memory.
struct ExportedSegment {
  ArenaKind kind = ArenaKind::kCudaMalloc;
  UniqueFd fd;           // kDeviceVmm
  HandleValue handle{};  // kFabricVmm and kCudaMalloc
  uint64_t bytes = 0;
  Uuid device_uuid{};
};

// Where the region begins in a segment of `bytes` at `base`; nothing unless it has bytes and all
// lie in the segment.
std::optional<cuda::CUdeviceptr> address_in(cuda::CUdeviceptr base, uint64_t bytes,
                                            const memory::Region& region);

class DeviceArena {
 public:
  // One allocation for each segment, of at least the bytes asked for: rounded up to the granularity
  // of its kind. All of them or none. At most `share` (0 < share <= 1) of what is free on the
  // device now, workers' engines and their pools already counted. Whoever wants no arena makes
  // none. Calls the driver. INVALID_ARGUMENT ARENA_SHARE_INVALID, or ARENA_SEGMENT_INVALID for no
  // segment, one of 0 bytes, or sizes that overflow; RESOURCE_EXHAUSTED DEVICE_MEMORY_SHARE;
  // UNAVAILABLE GPU_DOWN; errors of Device::check.
  static Result<std::unique_ptr<DeviceArena>> create(std::shared_ptr<const Device> device,
                                                     ArenaKind kind,
                                                     std::span<const uint64_t> segment_bytes,
                                                     double share);
  // Calls the driver. Importers of kCudaMalloc segments must have closed them.
  ~DeviceArena();
  DeviceArena(const DeviceArena&) = delete;
  DeviceArena& operator=(const DeviceArena&) = delete;

  ArenaKind kind() const { return kind_; }
  const std::shared_ptr<const Device>& device() const { return device_; }
  // Of each segment, rounded.
  const std::vector<uint64_t>& segment_bytes() const { return segment_bytes_; }
  uint64_t total_bytes() const { return total_bytes_; }

  // On the device, as address_in() says; nothing for a segment that there is not, either.
  std::optional<cuda::CUdeviceptr> address_of(const memory::Region& region) const;

  // May be repeated. Calls the driver. INVALID_ARGUMENT ARENA_SEGMENT_INVALID for a segment that
  // there is not; UNAVAILABLE GPU_DOWN; errors of Device::check.
  Result<ExportedSegment> export_segment(uint32_t segment) const;

 private:
  class Segment;
  DeviceArena(std::shared_ptr<const Device> device, ArenaKind kind);
  Status allocate();

  const std::shared_ptr<const Device> device_;
  const ArenaKind kind_;
  std::vector<uint64_t> segment_bytes_;
  uint64_t total_bytes_ = 0;
  std::vector<std::unique_ptr<Segment>> segments_;
};

}  // namespace kvferry::gpu
