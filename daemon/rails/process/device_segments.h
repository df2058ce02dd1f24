// The arena segments that lie on GPUs, mapped into this process. The CUDA driver is loaded only if
// there are any. Made once, before the rails' threads and after the self-test's peers are forked
// (CUDA does not work across a fork).
#pragma once

#include <memory>
#include <vector>

#include "daemon/gpu/device.h"
#include "daemon/gpu/device_arena_view.h"
#include "daemon/rails/process/setup.h"

namespace kvferry::rails {

class DeviceSegments {
 public:
  // Imports every device segment of the set-up and fills in its base; takes the descriptors. Some
  // hundred milliseconds a device. FAILED_PRECONDITION CUDA_DRIVER, DEVICE_UNKNOWN or
  // ARENA_IMPORT_FAILED, with words for the operator; UNAVAILABLE GPU_DOWN; errors of
  // gpu::Device::check.
  static Result<DeviceSegments> import(ProcessSetup& setup);

  // The devices that have segments, in the order of their first one; each with its primary context.
  const std::vector<std::shared_ptr<const gpu::Device>>& devices() const { return devices_; }
  // Whose context UCX's threads have current; null without device segments.
  const gpu::Device* first_device() const {
    return devices_.empty() ? nullptr : devices_.front().get();
  }

 private:
  std::vector<std::shared_ptr<const gpu::Device>> devices_;
  std::vector<std::unique_ptr<gpu::DeviceArenaView>> views_;  // of each device
};

}  // namespace kvferry::rails
