// Host memory that GPUs read and write directly: a range of this process's memory, registered with
// CUDA for as long as the object lives. Used for the arena, for staging, and for host pools that
// take part in a copy with a GPU.
//
// pin() and the destructor block while the kernel pins or releases the pages (about 0.2 s a GiB at
// first touch): not for the engine's thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "daemon/base/result.h"
#include "daemon/gpu/device.h"

namespace kvferry::gpu {

class PinnedMemory {
 public:
  // [base, base + bytes) lies on whole pages and stays mapped longer than the object. Devices that
  // are down are left out. FAILED_PRECONDITION PIN_FAILED with the driver's words if no device can
  // have it. `refused`, if not null, counts it when the driver will not take the memory back: a GPU
  // may then still reach it.
  static Result<std::shared_ptr<const PinnedMemory>> pin(
      const std::vector<std::shared_ptr<const Device>>& devices, void* base, uint64_t bytes,
      std::shared_ptr<std::atomic<uint32_t>> refused = nullptr);
  ~PinnedMemory();
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;

  // The address of the first byte as the device sees it; 0 if it does not.
  cuda::CUdeviceptr on(const Device& device) const;
  uint64_t bytes() const { return bytes_; }

 private:
  PinnedMemory(std::shared_ptr<const Device> owner, void* base, uint64_t bytes)
      : owner_(std::move(owner)), base_(base), bytes_(bytes) {}

  const std::shared_ptr<const Device> owner_;  // whose context registered it
  void* const base_;
  const uint64_t bytes_;
  std::shared_ptr<std::atomic<uint32_t>> refused_;
  std::vector<std::pair<std::shared_ptr<const Device>, cuda::CUdeviceptr>> addresses_;
};

}  // namespace kvferry::gpu
