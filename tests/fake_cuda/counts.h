// Shared by the fake driver and control.h.
#pragma once

#include <cstdint>

// What this process has and has not given back. Host registrations, primary contexts (one per
// retain) and IPC opens (one per open) are counted as often as they were taken.
struct kvferry_fake_cuda_counts {
  uint64_t allocations;   // cuMemAlloc
  uint64_t handles;       // cuMemCreate, cuMemImportFromShareableHandle, cuMemRetain...: references
  uint64_t reservations;  // cuMemAddressReserve
  uint64_t mappings;      // cuMemMap
  uint64_t ipc_opens;     // cuIpcOpenMemHandle
  uint64_t registrations;  // cuMemHostRegister
  uint64_t contexts;       // cuDevicePrimaryCtxRetain
  uint64_t streams;
  uint64_t events;  // created and opened
  uint64_t modules;
};
