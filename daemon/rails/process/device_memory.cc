#include "daemon/rails/process/device_memory.h"

namespace kvferry::rails {

DeviceMemoryUse device_memory_use() {
  return {UCS_MEMORY_TYPE_CUDA, "cuda_copy"};
}

}  // namespace kvferry::rails
