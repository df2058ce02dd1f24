// CUDA as the client uses it: the driver, loaded when a device function is called first, and the
// GPUs whose memory is shared. The client has no context of its own: it works in the devices'
// primary contexts, which CUDA's runtime and so every engine uses, and leaves the caller's current
// context as it was. All functions may be called from any thread.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "daemon/base/mutex.h"
#include "kernels/cuda/driver.h"
#include "kvferry/result.h"

namespace kvferry::client {

// What a call of the driver answered. The reason is the driver's name without "ERROR_"
// (CUDA_OUT_OF_MEMORY), as the daemon has it.
Error cuda_error(const cuda::Driver& driver, cuda::CUresult result, std::string_view call);

class Gpu {
 public:
  using Deadline = std::chrono::steady_clock::time_point;

  // Retains the primary context of the device with this number in this process.
  static Result<std::shared_ptr<const Gpu>> open(std::shared_ptr<const cuda::Driver> driver,
                                                 int ordinal);
  ~Gpu();
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;

  int ordinal() const { return ordinal_; }
  cuda::CUdevice handle() const { return handle_; }
  // 16 bytes; under MIG those of the GPU instance.
  const std::string& uuid() const { return uuid_; }
  const cuda::Driver& driver() const { return *driver_; }
  const cuda::Api& api() const { return driver_->api(); }
  bool has(cuda::CUdevice_attribute attribute) const;

  Status check(cuda::CUresult result, std::string_view call) const {
    return result == cuda::CUDA_SUCCESS ? Status() : cuda_error(*driver_, result, call);
  }

  // Makes the device's context current on this thread for a scope. Where that fails, status() says
  // why, and no CUDA call may follow.
  class Current {
   public:
    explicit Current(const Gpu& gpu);
    ~Current();
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;
    explicit operator bool() const { return status_.ok(); }
    const Error& error() const { return status_.error(); }

   private:
    const Gpu& gpu_;
    Status status_;
  };

  // Copies of one byte or more between host and device, on a stream of their own, so that they wait
  // for nothing that others have queued, and for the end at most until the deadline:
  // DEADLINE_EXCEEDED GPU_TIMEOUT. A write that has timed out may still happen.
  Status read(uint64_t address, std::span<std::byte> to, Deadline deadline) const;
  Status write(uint64_t address, std::span<const std::byte> from, Deadline deadline) const;
  Status clear(uint64_t address, uint64_t bytes, Deadline deadline) const;

 private:
  Gpu(std::shared_ptr<const cuda::Driver> driver, int ordinal)
      : driver_(std::move(driver)), ordinal_(ordinal) {}

  // Runs `submit(stream)` on a stream of its own, with the context current. `buffer` is kept for
  // good if the work does not end in time, as the device may still touch it.
  template <typename Submit>
  Status run(std::shared_ptr<void> buffer, std::string_view call, Deadline deadline,
             Submit&& submit) const;

  const std::shared_ptr<const cuda::Driver> driver_;
  const int ordinal_;
  cuda::CUdevice handle_ = 0;
  cuda::CUcontext context_ = nullptr;
  std::string uuid_;
};

class Gpus {
 public:
  // The library is KVFERRY_CUDA_DRIVER or libcuda.so.1 ...
  static std::string library();
  // ... unless another is named. FAILED_PRECONDITION NO_CUDA_DRIVER.
  static Result<std::shared_ptr<Gpus>> load(const std::string& library = Gpus::library());

  const cuda::Driver& driver() const { return *driver_; }
  // Opened when asked for first.
  Result<std::shared_ptr<const Gpu>> gpu(int ordinal) KVFERRY_EXCLUDES(mutex_);

 private:
  explicit Gpus(std::shared_ptr<const cuda::Driver> driver) : driver_(std::move(driver)) {}

  const std::shared_ptr<const cuda::Driver> driver_;
  Mutex mutex_;
  std::map<int, std::shared_ptr<const Gpu>> open_ KVFERRY_GUARDED_BY(mutex_);
};

}  // namespace kvferry::client
