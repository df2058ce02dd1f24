// In the place of daemon/rails/process/device_memory.cc, for a rails process that is only tested
// with: the machine's device memory is the processor's too (the fake driver with HOST_VISIBLE), so
// UCX takes it as it takes host memory, and needs no CUDA.
#include "daemon/rails/process/device_memory.h"

namespace kvferry::rails {

DeviceMemoryUse device_memory_use() {
  return {UCS_MEMORY_TYPE_HOST, nullptr};
}

}  // namespace kvferry::rails
