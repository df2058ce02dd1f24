// A pool on a GPU: allocated as an engine would, handed to the daemon by the client, and written
// and read through a stream. Uses the driver that the client uses (KVFERRY_CUDA_DRIVER).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/cuda/driver.h"
#include "kvferry/client.h"

namespace kvferry::bench {

// Where workers' pools lie.
enum class MemoryKind : uint8_t {
  kHost,
  kVmm,   // the client allocates it: a descriptor goes over
  kCuda,  // cuMemAlloc, the pool in the midst of the allocation: an IPC handle goes over
};

class DeviceMemory {
 public:
  // Registered with the client's daemon as `name`.
  static client::Result<std::unique_ptr<DeviceMemory>> make(client::Client& client,
                                                            const std::string& name,
                                                            MemoryKind kind, uint64_t bytes,
                                                            int device);
  // After the client's end.
  ~DeviceMemory();
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  // The whole pool from and to host memory. They return when the bytes are there.
  client::Status upload(const std::byte* from);
  client::Status download(std::byte* to);
  // "NVIDIA H100 80GB HBM3, driver of CUDA 13.0"
  const std::string& description() const { return description_; }
  // A new event behind work that has just been put into the stream, for ReadyCondition::cuda_event.
  // The object keeps it.
  client::Result<std::string> record_event(client::Client& client);

 private:
  DeviceMemory() = default;
  client::Status check(cuda::CUresult result, const char* call) const;
  client::Status open(int device);

  std::shared_ptr<const cuda::Driver> driver_;
  cuda::CUdevice device_{};
  cuda::CUcontext context_ = nullptr;
  cuda::CUstream stream_ = nullptr;
  cuda::CUevent event_ = nullptr;
  cuda::CUdeviceptr allocation_ = 0;  // ours to free; 0: the client's
  cuda::CUdeviceptr address_ = 0;
  uint64_t bytes_ = 0;
  std::string description_;
};

// A worker's pool of any kind, seen through host memory: its own, or a copy of the device's.
class RankPool {
 public:
  // Registered with the client's daemon as "kv". `device` counts for memory of a GPU only.
  static client::Result<RankPool> make(client::Client& client, MemoryKind kind, uint64_t bytes,
                                       int device);
  std::byte* data() { return data_; }
  // After data() was written, and before it is read. Nothing to do for memory of the host.
  client::Status put() { return device_ ? device_->upload(data_) : client::Status(); }
  client::Status get() { return device_ ? device_->download(data_) : client::Status(); }
  // Of the device; empty for memory of the host.
  std::string description() const { return device_ ? device_->description() : std::string(); }

 private:
  std::unique_ptr<DeviceMemory> device_;
  std::vector<std::byte> copy_;
  std::byte* data_ = nullptr;
};

}  // namespace kvferry::bench
