// Reads a few bytes of device memory with a wait that ends: a stream and a pinned page of its own.
// One thread at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "daemon/base/result.h"
#include "daemon/base/units.h"
#include "daemon/gpu/device.h"

namespace kvferry::gpu {

class Reader {
 public:
  static constexpr std::size_t kMaxBytes = 4096;

  static Result<std::unique_ptr<Reader>> make(std::shared_ptr<const Device> device);
  // Waits for nothing: with a copy that is still under way its page is never given back.
  ~Reader();
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  // out.size() <= kMaxBytes. DEADLINE_EXCEEDED GPU_READ_TIMEOUT, or as Device::check; after an
  // error the reader may be stuck.
  Status read(cuda::CUdeviceptr from, std::span<std::byte> out, Duration limit);
  // Its last copy has not come back, also not by now. Asks the driver.
  bool still_stuck();
  const std::shared_ptr<const Device>& device() const { return device_; }

 private:
  explicit Reader(std::shared_ptr<const Device> device) : device_(std::move(device)) {}

  const std::shared_ptr<const Device> device_;
  cuda::CUstream stream_ = nullptr;
  std::byte* page_ = nullptr;
  bool registered_ = false;
  bool stuck_ = false;
};

}  // namespace kvferry::gpu
