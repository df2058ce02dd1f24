// The exporting process of fake_cuda_sharing_test: memory of every kind and an event, then commands
// until its socket is closed.
#include "tests/unit/fake_cuda_peer.h"

#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels/cuda/driver.h"

using namespace kvferry;

namespace {

void must(cuda::CUresult result, const char* what) {
  if (result == cuda::CUDA_SUCCESS) return;
  std::fprintf(stderr, "peer: %s: %u\n", what, static_cast<unsigned int>(result));
  std::exit(1);
}
#define MUST(expression) must(expression, #expression)

void send_exports(const PeerExports& exports, int fd) {
  iovec data{const_cast<PeerExports*>(&exports), sizeof exports};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  cmsghdr* header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof fd);
  std::memcpy(CMSG_DATA(header), &fd, sizeof fd);
  if (::sendmsg(kPeerSocket, &message, 0) < 0) std::exit(2);
}

struct Peer {
  std::shared_ptr<const cuda::Driver> driver =
      cuda::Driver::load(KVFERRY_FAKE_CUDA_LIBRARY).value();
  const cuda::Api& api = driver->api();
  cuda::CUcontext context = nullptr;
  cuda::CUstream stream = nullptr;
  cuda::CUstream gated = nullptr;
  cuda::CUdeviceptr memory = 0;
  cuda::CUdeviceptr small = 0;
  cuda::CUdeviceptr range = 0;
  cuda::CUevent event = nullptr;
  std::atomic<uint64_t> gate{0};

  void fill(cuda::CUdeviceptr at, unsigned char value, uint64_t bytes) {
    MUST(api.cuMemsetD8Async(at, value, bytes, stream));
    MUST(api.cuStreamSynchronize(stream));
  }
  uint8_t read(cuda::CUdeviceptr at) {
    uint8_t value = 0;
    MUST(api.cuMemcpyDtoHAsync(&value, at, 1, stream));
    return value;
  }

  void export_legacy(PeerExports& exports) {
    MUST(api.cuMemAlloc(&memory, kPeerBytes));
    MUST(api.cuMemAlloc(&small, 4096));
    fill(memory, 0x11, kPeerBytes);
    fill(small, 0x22, 4096);
    // An inner address names the whole allocation all the same.
    MUST(api.cuIpcGetMemHandle(&exports.memory, memory + 4096));
    MUST(api.cuIpcGetMemHandle(&exports.small, small));
  }

  int export_vmm(PeerExports& exports) {
    constexpr unsigned int kBoth =
        cuda::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR | cuda::CU_MEM_HANDLE_TYPE_FABRIC;
    cuda::CUmemAllocationProp properties{};
    properties.type = cuda::CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.requestedHandleTypes = static_cast<cuda::CUmemAllocationHandleType>(kBoth);
    properties.location = {cuda::CU_MEM_LOCATION_TYPE_DEVICE, 0};
    const cuda::CUmemAccessDesc access{properties.location,
                                       cuda::CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    cuda::CUmemGenericAllocationHandle handle = 0;
    MUST(api.cuMemCreate(&handle, kPeerVmmBytes, &properties, 0));
    MUST(api.cuMemAddressReserve(&range, kPeerVmmBytes, 0, 0, 0));
    MUST(api.cuMemMap(range, kPeerVmmBytes, 0, handle, 0));
    MUST(api.cuMemSetAccess(range, kPeerVmmBytes, &access, 1));
    fill(range, 0x33, kPeerVmmBytes);
    int fd = -1;
    MUST(api.cuMemExportToShareableHandle(&fd, handle,
                                          cuda::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0));
    MUST(api.cuMemExportToShareableHandle(&exports.fabric, handle, cuda::CU_MEM_HANDLE_TYPE_FABRIC,
                                          0));
    MUST(api.cuMemRelease(handle));
    return fd;
  }

  // Recorded behind a word that is set by command.
  void export_event(PeerExports& exports) {
    constexpr unsigned int kFlags = cuda::CU_EVENT_INTERPROCESS | cuda::CU_EVENT_DISABLE_TIMING;
    cuda::CUdeviceptr address = 0;
    MUST(api.cuMemHostRegister(&gate, sizeof gate, cuda::CU_MEMHOSTREGISTER_DEVICEMAP));
    MUST(api.cuMemHostGetDevicePointer(&address, &gate, 0));
    MUST(api.cuEventCreate(&event, kFlags));
    MUST(api.cuIpcGetEventHandle(&exports.event, event));
    MUST(api.cuStreamCreate(&gated, cuda::CU_STREAM_NON_BLOCKING));
    MUST(api.cuStreamWaitValue64(gated, address, 1, cuda::CU_STREAM_WAIT_VALUE_GEQ));
    MUST(api.cuEventRecord(event, gated));
  }

  uint8_t obey(PeerCommand command) {
    switch (command) {
      case PeerCommand::kComplete:
        gate = 1;
        break;
      case PeerCommand::kFreeSmall:
        gate = 1;  // freeing waits for all work
        MUST(api.cuMemFree(small));
        break;
      case PeerCommand::kReadBack:
        return read(memory + kPeerBytes - 1);
      case PeerCommand::kReadVmm:
        return read(range + kPeerVmmBytes - 1);
      case PeerCommand::kReleaseVmm:
        MUST(api.cuMemUnmap(range, kPeerVmmBytes));
        MUST(api.cuMemAddressFree(range, kPeerVmmBytes));
        break;
    }
    return 0;
  }
};

}  // namespace

int main() {
  // Not on the stack: the fake's threads look at the gate until the process has ended.
  static Peer& peer = *new Peer;
  PeerExports exports{};
  MUST(peer.api.cuDevicePrimaryCtxRetain(&peer.context, 0));
  MUST(peer.api.cuCtxPushCurrent(peer.context));
  MUST(peer.api.cuStreamCreate(&peer.stream, cuda::CU_STREAM_NON_BLOCKING));
  peer.export_legacy(exports);
  const int fd = peer.export_vmm(exports);
  peer.export_event(exports);
  send_exports(exports, fd);
  ::close(fd);
  PeerCommand command{};
  while (::recv(kPeerSocket, &command, sizeof command, 0) == sizeof command) {
    const uint8_t answer = peer.obey(command);
    if (::send(kPeerSocket, &answer, sizeof answer, 0) != sizeof answer) return 3;
  }
  return 0;
}
