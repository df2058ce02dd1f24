// Memory on a GPU that the client allocated: a VMM allocation that can be handed over, mapped and
// cleared. Freed with the object; the daemon's own mapping keeps the bytes
// alive for as long as it needs them.
#pragma once

#include <cstdint>
#include <memory>

#include "client/cpp/src/gpu.h"
#include "kvferry/result.h"

namespace kvferry::client {

class DeviceMemory {
 public:
  static constexpr auto kFileDescriptor = cuda::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

  // Rounded up to the device's granularity. UNIMPLEMENTED VMM_UNSUPPORTED where the device has no
  // such memory; DEADLINE_EXCEEDED GPU_TIMEOUT, after which the memory stays for good, as the
  // device may still be clearing it; CUDA_OUT_OF_MEMORY and other errors of the driver.
  static Result<std::unique_ptr<DeviceMemory>> allocate(
      std::shared_ptr<const Gpu> gpu, uint64_t bytes, Gpu::Deadline deadline,
      cuda::CUmemAllocationHandleType handles = kFileDescriptor);
  ~DeviceMemory();
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  uint64_t address() const { return address_; }
  const Gpu& gpu() const { return *gpu_; }

 private:
  explicit DeviceMemory(std::shared_ptr<const Gpu> gpu) : gpu_(std::move(gpu)) {}
  Status make(uint64_t bytes, Gpu::Deadline deadline, cuda::CUmemAllocationHandleType handles);

  const std::shared_ptr<const Gpu> gpu_;
  uint64_t bytes_ = 0;  // rounded
  cuda::CUmemGenericAllocationHandle handle_ = 0;
  uint64_t address_ = 0;
  bool mapped_ = false;
};

}  // namespace kvferry::client
