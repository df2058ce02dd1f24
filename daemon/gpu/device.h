// One GPU as the daemon uses it: its primary context, what it can do, and whether it still works.
// An error that CUDA calls sticky (an illegal address, a launch failure, an uncorrectable ECC
// error) leaves the context useless for good: check() takes the device down for the life of the
// daemon, and the others go on.
//
// Everything here may be called from any thread. Nothing waits for work on the device.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "daemon/base/mutex.h"
#include "daemon/base/result.h"
#include "kernels/cuda/driver.h"

namespace kvferry::gpu {

using Uuid = std::array<uint8_t, 16>;

inline constexpr std::size_t kHandleBytes = 64;  // of CUDA IPC and fabric handles
using HandleValue = std::array<uint8_t, kHandleBytes>;

// "GPU-8f2e4b1a-...", as nvidia-smi prints it.
std::string to_string(const Uuid& uuid);

struct DeviceFacts {
  int ordinal = 0;  // the driver's number in this process; never told to others, who have their own
  Uuid uuid{};
  std::string name;
  std::string pci_bus_id;  // "0000:3b:00.0", as sysfs has it
  uint64_t total_bytes = 0;
  uint32_t sm_count = 0;
  uint32_t compute_major = 0;
  uint32_t compute_minor = 0;
  bool vmm = false;     // cuMemCreate and what goes with it
  bool vmm_fd = false;  // ... shared by file descriptors
  // ... shared by fabric handles. Says what the driver claims: without an IMEX channel they fail
  // all the same.
  bool fabric = false;
  bool events_by_ipc = false;
  bool rdma_with_vmm = false;
  uint64_t granularity = 0;  // of VMM allocations that are shared by descriptor; 0 without vmm
};

class Device {
 public:
  // Retains the primary context of the driver's device `ordinal`. Errors as check().
  static Result<std::shared_ptr<const Device>> open(std::shared_ptr<const cuda::Driver> driver,
                                                    int ordinal);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  const DeviceFacts& facts() const { return facts_; }
  const cuda::Api& api() const { return driver_->api(); }
  cuda::CUdevice handle() const { return handle_; }
  cuda::CUcontext context() const { return context_; }

  // Makes the device's context current on this thread for a scope. Where that fails, ok() is false,
  // status() says why, and no CUDA call may follow.
  class Current {
   public:
    explicit Current(const Device& device);
    ~Current();
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;
    bool ok() const { return status_.has_value(); }
    const Status& status() const { return status_; }

   private:
    const Device& device_;
    Status status_;
  };

  // What a call answered as an Error. `call` names the function. The reason is the driver's name
  // without "ERROR_": RESOURCE_EXHAUSTED CUDA_OUT_OF_MEMORY, INTERNAL CUDA_INVALID_VALUE, ...;
  // UNAVAILABLE for sticky errors, which take the device down.
  // CUDA_ERROR_NOT_READY is an error here: who polls looks at it first.
  Status check(cuda::CUresult result, std::string_view call) const;

  bool down() const { return down_.load(std::memory_order_acquire); }
  // The error that took it down. UNAVAILABLE GPU_DOWN.
  Error down_error() const KVFERRY_EXCLUDES(mutex_);
  // For what is found out otherwise, e.g. a copy that never ends. The first reason stays.
  void take_down(Error why) const KVFERRY_EXCLUDES(mutex_);

  // Whether kernels on this device may touch memory of `other`: the same one, or a peer.
  bool reaches(const Device& other) const;
  // Makes it so for cuMemAlloc and IPC memory (VMM memory is opened to peers when it is imported).
  // May be repeated. FAILED_PRECONDITION NO_PEER_ACCESS, or as check().
  Status enable_peer(const Device& other) const;
  // Bytes that are free now. Errors as check().
  Result<uint64_t> free_bytes() const;

 private:
  Device(std::shared_ptr<const cuda::Driver> driver, cuda::CUdevice handle)
      : driver_(std::move(driver)), handle_(handle) {}
  Status read_facts(int ordinal);

  const std::shared_ptr<const cuda::Driver> driver_;
  const cuda::CUdevice handle_;
  cuda::CUcontext context_ = nullptr;
  DeviceFacts facts_;
  mutable std::atomic<bool> down_{false};
  mutable Mutex mutex_;
  mutable Error why_ KVFERRY_GUARDED_BY(mutex_);
};

// All GPUs of this machine that could be opened. Immutable.
class Devices {
 public:
  // UNAVAILABLE NO_GPU when there is none that can be used.
  static Result<std::shared_ptr<const Devices>> open(std::shared_ptr<const cuda::Driver> driver);

  const cuda::Driver& driver() const { return *driver_; }
  const std::vector<std::shared_ptr<const Device>>& all() const { return devices_; }
  // Null if there is none. Devices are matched by UUID only: ordinals differ between processes.
  std::shared_ptr<const Device> find(std::span<const uint8_t> uuid) const;
  // Devices that could not be opened.
  const std::vector<Error>& problems() const { return problems_; }

 private:
  std::shared_ptr<const cuda::Driver> driver_;
  std::vector<std::shared_ptr<const Device>> devices_;
  std::vector<Error> problems_;
};

}  // namespace kvferry::gpu
