// The context for giving things back, on a thread that may have none. Tried twice: what is not
// given back now never will be.
#pragma once

#include <optional>

#include "daemon/gpu/device.h"

namespace kvferry::gpu {

class Closing {
 public:
  explicit Closing(const Device& device) {
    for (int tries = 0; tries < 2 && !ok(); ++tries) current_.emplace(device);
  }
  bool ok() const { return current_.has_value() && current_->ok(); }

 private:
  std::optional<Device::Current> current_;
};

}  // namespace kvferry::gpu
