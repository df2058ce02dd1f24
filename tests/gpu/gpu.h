// One GPU for tests and microbenchmarks of the kernels: its driver, primary context, one stream,
// the kernels, and memory. The driver is KVFERRY_CUDA_DRIVER or libcuda.so.1. Any call that fails
// throws std::runtime_error with the driver's words. One thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "kernels/cuda/driver.h"
#include "kernels/device_copy.h"

namespace kvferry::testing {

class Gpu {
 public:
  // Why no GPU can be used here; empty if one can.
  static std::string why_not();

  explicit Gpu(int ordinal = 0);
  ~Gpu();
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;

  const cuda::Api& api() const { return driver_->api(); }
  const cuda::Driver& driver() const { return *driver_; }
  cuda::CUstream stream() const { return stream_; }
  uint32_t multiprocessors() const { return multiprocessors_; }
  const std::string& name() const { return name_; }
  void check(cuda::CUresult result, const char* call) const;

  // Loads the kernels. Throws where this build has none for the device.
  void load_kernels();
  // Launches, as the daemon does; nothing for an empty piece.
  void launch(const kernels::CopyArgs& args,
              kernels::FlatMemory flat_in = kernels::FlatMemory::kDevice);
  void synchronize();

 private:
  std::shared_ptr<const cuda::Driver> driver_;
  cuda::CUdevice device_{};
  cuda::CUcontext context_ = nullptr;
  cuda::CUstream stream_ = nullptr;
  cuda::CUmodule module_ = nullptr;
  uint32_t multiprocessors_ = 1;
  std::string name_;
};

// Memory of the GPU.
class DeviceBytes {
 public:
  DeviceBytes(Gpu& gpu, uint64_t bytes);
  ~DeviceBytes();
  DeviceBytes(const DeviceBytes&) = delete;
  DeviceBytes& operator=(const DeviceBytes&) = delete;

  cuda::CUdeviceptr address() const { return address_; }
  uint64_t bytes() const { return bytes_; }
  // All of it; they return when the bytes are there.
  void put(const void* from);
  void get(void* to) const;

 private:
  Gpu& gpu_;
  uint64_t bytes_;
  cuda::CUdeviceptr address_ = 0;
};

// Host memory that the GPU reads and writes, as the daemon's arena is.
class PinnedBytes {
 public:
  PinnedBytes(Gpu& gpu, uint64_t bytes);
  ~PinnedBytes();
  PinnedBytes(const PinnedBytes&) = delete;
  PinnedBytes& operator=(const PinnedBytes&) = delete;

  std::byte* data() const { return data_; }
  cuda::CUdeviceptr address() const { return address_; }  // on the device

 private:
  Gpu& gpu_;
  uint64_t bytes_;
  std::byte* data_ = nullptr;
  cuda::CUdeviceptr address_ = 0;
};

// A plan on the GPU.
class DevicePlan {
 public:
  DevicePlan(Gpu& gpu, const kernels::CopyPlan& plan, std::span<const uint64_t> pool_bases);
  const kernels::PlanView& view() const { return view_; }

 private:
  std::unique_ptr<DeviceBytes> image_;
  kernels::PlanView view_{};
};

}  // namespace kvferry::testing
