// The fake driver between two processes: memory and events by handle, and what a killed process
// leaves behind, which is nothing.
#include <unistd.h>

#include "tests/unit/fake_cuda_peer_process.h"
#include "tests/unit/fake_cuda_support.h"

using namespace kvferry;

namespace {

constexpr uint64_t kAllBytes = kPeerBytes + 4096 + kPeerVmmBytes;

cuda::CUdeviceptr open_memory(const FakeGpu& gpu, const cuda::CUipcMemHandle& handle) {
  cuda::CUdeviceptr pointer = 0;
  REQUIRE_OK(
      gpu.api.cuIpcOpenMemHandle(&pointer, handle, cuda::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS));
  return pointer;
}

uint8_t read(const FakeGpu& gpu, cuda::CUdeviceptr at) {
  uint8_t value = 0;
  REQUIRE_OK(gpu.api.cuMemcpyDtoHAsync(&value, at, 1, nullptr));
  return value;
}

void write(const FakeGpu& gpu, cuda::CUdeviceptr at, unsigned char value) {
  REQUIRE_OK(gpu.api.cuMemsetD8Async(at, value, 1, nullptr));
  REQUIRE_OK(gpu.api.cuStreamSynchronize(nullptr));
}

// Imports and maps, for device 0.
cuda::CUdeviceptr import(const FakeGpu& gpu, void* handle, cuda::CUmemAllocationHandleType type) {
  cuda::CUmemGenericAllocationHandle imported = 0;
  cuda::CUdeviceptr range = 0;
  const auto access = read_write(0);
  REQUIRE_OK(gpu.api.cuMemImportFromShareableHandle(&imported, handle, type));
  cuda::CUmemAllocationProp properties{};
  CHECK_OK(gpu.api.cuMemGetAllocationPropertiesFromHandle(&properties, imported));
  CHECK(properties.location.type == cuda::CU_MEM_LOCATION_TYPE_DEVICE);
  CHECK(properties.location.id == 0);
  REQUIRE_OK(gpu.api.cuMemAddressReserve(&range, kPeerVmmBytes, 0, 0, 0));
  CHECK(gpu.api.cuMemMap(range, 2 * kPeerVmmBytes, 0, imported, 0) ==
        cuda::CUDA_ERROR_INVALID_VALUE);
  REQUIRE_OK(gpu.api.cuMemMap(range, kPeerVmmBytes, 0, imported, 0));
  REQUIRE_OK(gpu.api.cuMemRelease(imported));
  REQUIRE_OK(gpu.api.cuMemSetAccess(range, kPeerVmmBytes, &access, 1));
  return range;
}

void* as_handle(int fd) {
  return reinterpret_cast<void*>(static_cast<intptr_t>(fd));
}

}  // namespace

TEST_CASE("Memory is shared by its IPC handle, and opened again it is the same") {
  const FakeGpu gpu;
  Peer peer;
  const cuda::CUdeviceptr pointer = open_memory(gpu, peer.exports.memory);
  CHECK(read(gpu, pointer) == 0x11);
  write(gpu, pointer + kPeerBytes - 1, 0x77);
  CHECK(peer.command(PeerCommand::kReadBack) == 0x77);
  cuda::CUdeviceptr base = 0;
  size_t bytes = 0;
  CHECK_OK(gpu.api.cuMemGetAddressRange(&base, &bytes, pointer + 5));
  CHECK((base == pointer && bytes == kPeerBytes));

  CHECK(open_memory(gpu, peer.exports.memory) == pointer);
  CHECK(gpu.machine->live().ipc_opens == 2);
  cuda::CUipcMemHandle again{};
  CHECK(gpu.api.cuMemFree(pointer) == cuda::CUDA_ERROR_INVALID_VALUE);
  CHECK(gpu.api.cuIpcGetMemHandle(&again, pointer) == cuda::CUDA_ERROR_INVALID_VALUE);
  CHECK(gpu.api.cuIpcCloseMemHandle(pointer + 1) == cuda::CUDA_ERROR_INVALID_VALUE);
  CHECK_OK(gpu.api.cuIpcCloseMemHandle(pointer));
  CHECK(read(gpu, pointer) == 0x11);
  CHECK_OK(gpu.api.cuIpcCloseMemHandle(pointer));
  CHECK(gpu.api.cuIpcCloseMemHandle(pointer) == cuda::CUDA_ERROR_INVALID_VALUE);
  CHECK(gpu.machine->live().ipc_opens == 0);
}

TEST_CASE("IPC handles that are wrong, one's own, freed, or of a dead process are refused") {
  const FakeGpu gpu;
  Peer peer;
  cuda::CUdeviceptr pointer = 0;
  const auto open = [&](const cuda::CUipcMemHandle& handle, unsigned int flags = 1) {
    return gpu.api.cuIpcOpenMemHandle(&pointer, handle, flags);
  };
  CHECK(open(peer.exports.memory, 0) == cuda::CUDA_ERROR_INVALID_VALUE);
  cuda::CUipcMemHandle wrong = peer.exports.memory;
  wrong.reserved[9] = static_cast<char>(wrong.reserved[9] + 1);
  CHECK(open(wrong) == cuda::CUDA_ERROR_INVALID_VALUE);
  CHECK_OK(gpu.api.cuIpcGetMemHandle(&wrong, gpu.alloc(4096)));
  CHECK(open(wrong) == cuda::CUDA_ERROR_INVALID_CONTEXT);

  // What is open when the owner frees it stays; it cannot be opened anew.
  const cuda::CUdeviceptr small = open_memory(gpu, peer.exports.small);
  CHECK(peer.command(PeerCommand::kFreeSmall) == 0);
  CHECK(read(gpu, small) == 0x22);
  CHECK(open(peer.exports.small) == cuda::CUDA_ERROR_INVALID_HANDLE);
  CHECK(gpu.machine->device_bytes(0) == kAllBytes + 4096);
  CHECK_OK(gpu.api.cuIpcCloseMemHandle(small));
  CHECK(gpu.machine->device_bytes(0) == kAllBytes);
  CHECK(open(peer.exports.small) == cuda::CUDA_ERROR_INVALID_HANDLE);
  peer.kill();
  CHECK(open(peer.exports.memory) == cuda::CUDA_ERROR_INVALID_HANDLE);
}

TEST_CASE("Memory is shared by a descriptor, which keeps it alive, and by a fabric handle") {
  const FakeGpu gpu;
  Peer peer;
  const bool by_fd = GENERATE(true, false);
  const cuda::CUdeviceptr range =
      by_fd ? import(gpu, as_handle(peer.fd), cuda::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR)
            : import(gpu, &peer.exports.fabric, cuda::CU_MEM_HANDLE_TYPE_FABRIC);
  CHECK(read(gpu, range) == 0x33);
  write(gpu, range + kPeerVmmBytes - 1, 0x44);
  CHECK(peer.command(PeerCommand::kReadVmm) == 0x44);
  // A handle of one's own for memory that another process made.
  cuda::CUmemGenericAllocationHandle handle = 0;
  CHECK_OK(gpu.api.cuMemRetainAllocationHandle(&handle, reinterpret_cast<void*>(range)));
  CHECK_OK(gpu.api.cuMemRelease(handle));

  CHECK(peer.command(PeerCommand::kReleaseVmm) == 0);
  CHECK(read(gpu, range) == 0x33);
  CHECK_OK(gpu.api.cuMemUnmap(range, kPeerVmmBytes));
  CHECK_OK(gpu.api.cuMemAddressFree(range, kPeerVmmBytes));
  CHECK(gpu.machine->device_bytes(0) == kAllBytes);  // the descriptor has it
  ::close(peer.fd);
  peer.fd = -1;
  CHECK(gpu.machine->device_bytes(0) == kAllBytes - kPeerVmmBytes);
  CHECK(gpu.api.cuMemImportFromShareableHandle(&handle, &peer.exports.fabric,
                                               cuda::CU_MEM_HANDLE_TYPE_FABRIC) ==
        cuda::CUDA_ERROR_INVALID_HANDLE);
}

TEST_CASE("Descriptors of something else, and handle types not asked for, are refused") {
  const FakeGpu gpu;
  cuda::CUmemGenericAllocationHandle handle = 0;
  CHECK(gpu.api.cuMemImportFromShareableHandle(&handle, as_handle(2),
                                               cuda::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) ==
        cuda::CUDA_ERROR_INVALID_VALUE);
  CHECK(gpu.api.cuMemImportFromShareableHandle(&handle, as_handle(12345),
                                               cuda::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) ==
        cuda::CUDA_ERROR_INVALID_VALUE);
  const auto properties = device_memory(0, cuda::CU_MEM_HANDLE_TYPE_FABRIC);
  REQUIRE_OK(gpu.api.cuMemCreate(&handle, 2 * kMiB, &properties, 0));
  int fd = -1;
  CHECK(gpu.api.cuMemExportToShareableHandle(&fd, handle,
                                             cuda::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                                             0) == cuda::CUDA_ERROR_INVALID_VALUE);
}

TEST_CASE("Devices are the same by UUID, whatever their number") {
  fake_cuda::Setup setup;
  setup.devices = 2;
  const FakeGpu gpu(setup);
  Peer peer;  // on the machine's device 0
  ::setenv("CUDA_VISIBLE_DEVICES", "1,0", 1);
  gpu.machine->reset();
  REQUIRE_OK(gpu.api.cuInit(0));
  cuda::CUuuid first{};
  cuda::CUuuid second{};
  CHECK_OK(gpu.api.cuDeviceGetUuid(&first, 0));
  CHECK_OK(gpu.api.cuDeviceGetUuid(&second, 1));
  CHECK((first.bytes[15] == 1 && second.bytes[15] == 0));
  REQUIRE_OK(gpu.api.cuCtxPushCurrent(gpu.retain(1)));
  const cuda::CUdeviceptr pointer = open_memory(gpu, peer.exports.memory);
  int ordinal = -1;
  CHECK_OK(
      gpu.api.cuPointerGetAttribute(&ordinal, cuda::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, pointer));
  CHECK(ordinal == 1);
  CHECK(read(gpu, pointer) == 0x11);
  gpu.machine->reset();
  ::unsetenv("CUDA_VISIBLE_DEVICES");
}

TEST_CASE("An event of another process is seen when its work is done") {
  const FakeGpu gpu;
  Peer peer;
  cuda::CUevent event = nullptr;
  REQUIRE_OK(gpu.api.cuIpcOpenEventHandle(&event, peer.exports.event));
  CHECK(gpu.api.cuEventQuery(event) == cuda::CUDA_ERROR_NOT_READY);
  const cuda::CUstream stream = gpu.stream();
  CHECK_OK(gpu.api.cuStreamWaitEvent(stream, event, 0));
  CHECK(gpu.api.cuStreamQuery(stream) == cuda::CUDA_ERROR_NOT_READY);
  peer.command(PeerCommand::kComplete);
  CHECK(soon([&] { return gpu.api.cuEventQuery(event) == cuda::CUDA_SUCCESS; }));
  CHECK_OK(gpu.api.cuStreamSynchronize(stream));
  CHECK_OK(gpu.api.cuEventDestroy(event));
  CHECK(gpu.machine->live().events == 0);

  const cuda::CUevent own = gpu.event(cuda::CU_EVENT_INTERPROCESS | cuda::CU_EVENT_DISABLE_TIMING);
  const cuda::CUevent plain = gpu.event();
  cuda::CUipcEventHandle handle{};
  CHECK(gpu.api.cuIpcGetEventHandle(&handle, plain) == cuda::CUDA_ERROR_INVALID_VALUE);
  CHECK_OK(gpu.api.cuIpcGetEventHandle(&handle, own));
  CHECK(gpu.api.cuIpcOpenEventHandle(&event, handle) == cuda::CUDA_ERROR_INVALID_CONTEXT);
  CHECK(gpu.api.cuEventCreate(&event, cuda::CU_EVENT_INTERPROCESS) ==
        cuda::CUDA_ERROR_INVALID_VALUE);
}

TEST_CASE("The memory of a killed process is free when its last user has let it go") {
  const FakeGpu gpu;
  Peer peer;
  CHECK(gpu.machine->device_bytes(0) == kAllBytes);
  const cuda::CUdeviceptr pointer = open_memory(gpu, peer.exports.memory);
  const cuda::CUdeviceptr range =
      import(gpu, as_handle(peer.fd), cuda::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
  ::close(peer.fd);
  peer.fd = -1;
  peer.kill();
  CHECK(gpu.machine->device_bytes(0) == kPeerBytes + kPeerVmmBytes);
  CHECK(read(gpu, pointer) == 0x11);
  cuda::CUdeviceptr again = 0;
  CHECK(gpu.api.cuIpcOpenMemHandle(&again, peer.exports.memory,
                                   cuda::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS) ==
        cuda::CUDA_ERROR_INVALID_HANDLE);
  CHECK_OK(gpu.api.cuIpcCloseMemHandle(pointer));
  CHECK(gpu.machine->device_bytes(0) == kPeerVmmBytes);
  CHECK_OK(gpu.api.cuMemUnmap(range, kPeerVmmBytes));
  CHECK_OK(gpu.api.cuMemAddressFree(range, kPeerVmmBytes));
  CHECK(gpu.machine->device_bytes(0) == 0);
  size_t free = 0;
  size_t total = 0;
  CHECK_OK(gpu.api.cuMemGetInfo(&free, &total));
  CHECK(free == total);
}
