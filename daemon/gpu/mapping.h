// Memory mapped into this process's view of a device, and how it is undone. Used by the imports
// (device_pool.h says what is checked and what the errors are) and by device arenas. Any thread;
// all functions call the driver.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/gpu/device.h"
#include "kernels/cuda/driver.h"

namespace kvferry::gpu {

// Where imported memory lies, as far as this machine knows.
enum class MemoryHome : uint8_t {
  kDevice,     // on the device through which it is mapped: anything else is refused
  kElsewhere,  // perhaps on one of another machine, which has no number here: fabric handles alone
};

// Owns what an import has opened or mapped; closes it when it goes. Move-only.
class Mapping {
 public:
  Mapping() = default;
  ~Mapping() { (void)close(); }
  Mapping(Mapping&& other) noexcept { swap(other); }
  Mapping& operator=(Mapping&& other) noexcept {
    Mapping taken(std::move(other));
    swap(taken);
    return *this;
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  // An allocation by its CUDA IPC handle. The driver counts: opened twice, it has the same address
  // and is closed twice. `field` names the handle in errors.
  static Result<Mapping> open_ipc(std::shared_ptr<const Device> device,
                                  const cuda::CUipcMemHandle& handle, const std::string& field);

  // VMM allocations behind each other in a new range of `bytes`, for those of the given devices
  // that reach `device`. First reserve(), then add() or map() one by one, then open_access().
  static Result<Mapping> reserve(std::shared_ptr<const Device> device, uint64_t bytes);
  // `handle`: what cuMemImportFromShareableHandle takes: a descriptor as a pointer, or a
  // pointer to a fabric handle. Maps the allocation's first `bytes`.
  Status add(void* handle, cuda::CUmemAllocationHandleType type, uint64_t bytes,
             const std::string& field, MemoryHome home = MemoryHome::kDevice);
  // The same of an allocation of this process, whose handle stays the caller's. The driver's own
  // answer; nothing is said of the device, which the caller has chosen.
  Status map(cuda::CUmemGenericAllocationHandle allocation, uint64_t bytes);
  Status open_access(const std::vector<std::shared_ptr<const Device>>& devices);

  // Closes now, and says how many calls of the driver refused; there is nothing left to try then.
  uint32_t close();

  cuda::CUdeviceptr base() const { return base_; }
  uint64_t bytes() const { return bytes_; }
  const std::shared_ptr<const Device>& device() const { return device_; }

 private:
  cuda::CUresult map_next(cuda::CUmemGenericAllocationHandle allocation, uint64_t bytes);
  void swap(Mapping& other) noexcept {
    std::swap(device_, other.device_);
    std::swap(ipc_, other.ipc_);
    std::swap(base_, other.base_);
    std::swap(bytes_, other.bytes_);
    std::swap(mapped_, other.mapped_);
    std::swap(filled_, other.filled_);
  }

  std::shared_ptr<const Device> device_;  // null: nothing is owned
  bool ipc_ = false;
  cuda::CUdeviceptr base_ = 0;
  uint64_t bytes_ = 0;  // of the allocation, or of the reserved range
  std::vector<std::pair<cuda::CUdeviceptr, uint64_t>> mapped_;
  uint64_t filled_ = 0;
};

// What to say of a call that failed on something a worker has handed over: its fault, unless the
// device is lost or its memory is full.
tl::unexpected<Error> import_refused(const Device& device, cuda::CUresult result,
                                     std::string_view call, const std::string& field);

}  // namespace kvferry::gpu
