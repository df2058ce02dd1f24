// How memory on a GPU is handed to the daemon: which kind of pool a pointer's memory makes, and the
// handles or descriptors that name it. The driver's facts behind it are in client/README.md.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "client/cpp/src/gpu.h"
#include "daemon/base/unique_fd.h"
#include "kvferry/result.h"

namespace kvferry::client {

enum class DeviceKind : uint8_t { kVmmFd, kIpc, kFabric };

// Its handle is a value: the daemon wants a proof that the memory is the caller's.
constexpr bool is_value(DeviceKind kind) {
  return kind != DeviceKind::kVmmFd;
}

struct DeviceExport {
  DeviceKind kind = DeviceKind::kVmmFd;
  std::shared_ptr<const Gpu> gpu;
  uint64_t offset = 0;  // where the pool begins in the allocation, or in the first part
  std::string handle;   // of value kinds, 64 bytes
  // VMM allocations behind each other, each with all of its mapping.
  struct Part {
    uint64_t address = 0;
    uint64_t bytes = 0;
  };
  std::vector<Part> parts;  // of descriptors
};

// What [pointer, pointer + bytes) is. Reads only; nothing of the memory is kept. Errors, all with
// a text that says what to change; INVALID_ARGUMENT and field "pointer" unless said otherwise:
//   POINTER_NOT_DEVICE      host memory, pinned or not, or no memory at all
//   POINTER_MANAGED         cudaMallocManaged
//   POINTER_STREAM_ORDERED  cudaMallocAsync
//   POINTER_NOT_EXPORTABLE  its allocation was made without a handle that can be shared, or is
//                           another process's that was opened here
//   POOL_TOO_SMALL          "bytes": the memory ends earlier
//   POOL_PARTS              "bytes": too many allocations, or several of fabric memory
//   CUDA_...                the driver refused
Result<DeviceExport> describe(Gpus& gpus, uint64_t pointer, uint64_t bytes);

// A descriptor of one part. It keeps the memory alive while it is open.
Result<UniqueFd> export_part(const Gpu& gpu, const DeviceExport::Part& part);

}  // namespace kvferry::client
