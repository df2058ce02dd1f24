// Workers' memory on a GPU, imported from what a worker hands over: a CUDA IPC handle, file
// descriptors of VMM allocations, or a fabric handle. The worker is not trusted: the import is
// tried out at once, sizes are compared with what the driver says, and nothing outside [offset,
// offset + bytes) of what was told is ever used.
//
// A handle that is a value proves nothing, as whoever reads it can repeat it. The caller asks for
// a proof (Imports::read) before he lets the pool be used, and an allocation belongs to one worker
// at a time: see Claim.
//
// All functions may be called from any thread. Imports::import_* and read block for the driver's
// calls, some milliseconds as a rule: not for the engine's thread, nor for callbacks of gRPC.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "daemon/base/ids.h"
#include "daemon/base/result.h"
#include "daemon/base/unique_fd.h"
#include "daemon/base/units.h"
#include "daemon/gpu/device.h"
#include "daemon/memory/pool.h"

namespace kvferry::gpu {

enum class ImportKind : uint8_t { kCudaIpc, kCudaVmmFd, kCudaFabric };

class Imports;

// A pool on a GPU. Its memory is closed after the last user has gone, on the thread of Imports.
class DevicePool final : public memory::Pool {
 public:
  ~DevicePool() override;

  ImportKind kind() const { return kind_; }
  const Device& gpu() const { return *device(); }
  // Both of one allocation, wherever in it. Two imports of one VMM allocation by descriptors are
  // taken for different ones: the driver does not tell.
  bool same_memory(const Pool& other) const override;
  // ... or its device is down.
  bool failed() const override;

 private:
  friend class Claim;
  friend class Imports;
  struct Memory;  // what is mapped; several pools may lie in it
  DevicePool(ImportKind kind, std::shared_ptr<const Memory> memory, uint64_t offset_bytes,
             uint64_t bytes);

  const ImportKind kind_;
  const std::shared_ptr<const Memory> memory_;
};

// The right of one worker to an allocation whose handle is a value, for as long as the object
// lives; several may be of one worker. It is apart from the pool, whose memory may stay mapped for
// a running copy after the worker has given it back.
class Claim {
 public:
  Claim() = default;
  ~Claim() = default;
  Claim(Claim&&) noexcept = default;
  Claim& operator=(Claim&&) noexcept = default;
  Claim(const Claim&) = delete;
  Claim& operator=(const Claim&) = delete;

 private:
  friend class Imports;
  struct Entry;
  explicit Claim(std::shared_ptr<Entry> entry) : entry_(std::move(entry)) {}
  std::shared_ptr<Entry> entry_;
};

struct Imported {
  std::shared_ptr<DevicePool> pool;
  Claim claim;  // empty for descriptors
};

// What is told of a pool. `field` names it in errors, with ".bytes", ".handle", ... behind it.
struct ImportRequest {
  std::vector<uint8_t> device_uuid;
  uint64_t offset_bytes = 0;  // where the pool begins in the allocation, or in the first part
  uint64_t bytes = 0;
  WorkerId owner;
  std::string field = "pools";
};

// One VMM allocation of several that make up a range.
struct VmmPart {
  UniqueFd fd;
  uint64_t bytes = 0;  // all of it: a multiple of the device's granularity
};

class Imports {
 public:
  explicit Imports(std::shared_ptr<const Devices> devices);
  // Closes what has been given back. Pools that live on close their memory themselves.
  ~Imports();
  Imports(const Imports&) = delete;
  Imports& operator=(const Imports&) = delete;

  const Devices& devices() const { return *devices_; }
  // Whether some device here can serve the kind.
  bool serves(ImportKind kind) const;

  // Errors, all INVALID_ARGUMENT unless said otherwise:
  //   POOL_DEVICE_UNKNOWN  no usable device here has that UUID
  //   POOL_SIZE_INVALID    0 bytes, or offset + bytes overflows
  //   POOL_TOO_SMALL       the allocation ends before offset + bytes
  //   POOL_WRONG_DEVICE    the memory is another device's, or not a device's
  //   POOL_PART_INVALID    no part, or one whose size is no multiple of the device's granularity
  //   POOL_KIND_UNSUPPORTED UNIMPLEMENTED: the device cannot share memory so
  //   POOL_OWNED           PERMISSION_DENIED: already imported for another worker
  //   POOL_IMPORT_FAILED   INVALID_ARGUMENT: the driver refused the handle; the text says how
  //   GPU_DOWN             UNAVAILABLE: the device has failed
  //   CUDA_...             as Device::check, where it is not the handle's fault
  Result<Imported> import_ipc(const ImportRequest& request, const HandleValue& handle);
  Result<Imported> import_fds(const ImportRequest& request, std::vector<VmmPart> parts);
  Result<Imported> import_fabric(const ImportRequest& request, const HandleValue& handle);

  // Copies out of the pool into `out` (at most 4096 bytes), for proofs: a stream of its own, and at
  // most `limit` of waiting. INVALID_ARGUMENT OUT_OF_RANGE for what lies outside; DEADLINE_EXCEEDED
  // GPU_READ_TIMEOUT; UNAVAILABLE GPU_DOWN; errors of Device::check.
  Status read(const DevicePool& pool, uint64_t offset, std::span<std::byte> out, Duration limit);

  // For metrics and tests; each is exact.
  struct Stats {
    std::atomic<uint64_t> mapped{0};          // gauge: allocations that are mapped now
    std::atomic<uint64_t> close_failures{0};  // calls that refused to undo something
  };
  const Stats& stats() const;
  // Waits until everything given back so far is closed; false at the deadline. For tests.
  bool drained(Time deadline);

 private:
  friend class DevicePool;
  class Core;
  Result<std::shared_ptr<const Device>> device_of(const ImportRequest& request, ImportKind kind);
  // The claim, and what is mapped under it already, if that is large enough.
  struct Claimed {
    Claim claim;
    std::shared_ptr<const DevicePool::Memory> memory;
  };
  Result<Claimed> claim(const ImportRequest& request, ImportKind kind, const HandleValue& handle);
  Result<Imported> finish(const ImportRequest& request, ImportKind kind, Claim claim,
                          std::shared_ptr<const DevicePool::Memory> memory);

  const std::shared_ptr<const Devices> devices_;
  const std::shared_ptr<Core> core_;
};

}  // namespace kvferry::gpu
