// A pool on a GPU for tests: allocated as an engine would, handed to the daemon by the client, and
// written and read through a stream. Uses the driver that the client uses (KVFERRY_CUDA_DRIVER).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "kernels/cuda/driver.h"
#include "kvferry/client.h"

namespace kvferry::testing {

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

  client::Status upload(const std::byte* from);
  client::Status download(std::byte* to);
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
};

}  // namespace kvferry::testing
