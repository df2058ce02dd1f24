// How UCX is told of memory on a GPU. A unit of its own, so that a test can link another one, for
// a machine whose device memory the processor reads and writes as its own.
#pragma once

#include <ucs/memory/memory_type.h>

namespace kvferry::rails {

struct DeviceMemoryUse {
  ucs_memory_type_t type = UCS_MEMORY_TYPE_CUDA;  // in registrations and requests
  // What a context needs beside the rail's own transport; null: nothing.
  const char* transport = nullptr;
};

DeviceMemoryUse device_memory_use();

}  // namespace kvferry::rails
