// Between fake_cuda_sharing_test and the process that it starts, which exports memory: records over
// a SOCK_SEQPACKET socket.
#pragma once

#include <cstdint>

#include "kernels/cuda/abi.h"

namespace kvferry {

inline constexpr uint64_t kPeerBytes = 3 << 20;     // of the cuMemAlloc allocation
inline constexpr uint64_t kPeerVmmBytes = 4 << 20;  // of each VMM allocation
inline constexpr int kPeerSocket = 3;               // its descriptor in the started process

// The first record: what is exported. A descriptor of the VMM allocation comes with it.
struct PeerExports {
  cuda::CUipcMemHandle memory;
  cuda::CUipcMemHandle small;  // of another allocation, of 4096 bytes
  cuda::CUipcEventHandle event;
  cuda::CUmemFabricHandle fabric;
};

// Then a byte each way for every command.
enum class PeerCommand : uint8_t {
  kComplete,    // the event, which was recorded before anything was exported, completes
  kFreeSmall,   // frees that allocation
  kReadBack,    // answers the byte at the memory's end, written by the other process
  kReadVmm,     // the same of the VMM memory
  kReleaseVmm,  // unmaps and releases the VMM memory
};

}  // namespace kvferry
