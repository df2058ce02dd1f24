// The fake driver's promises about memory: wrong use is caught.
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstring>

#include "tests/unit/fake_cuda_support.h"

using namespace kvferry;

TEST_CASE("Nothing works before cuInit, nor without a context") {
  const FakeGpu gpu;
  cuda::CUcontext popped = nullptr;
  cuda::CUdeviceptr pointer = 0;
  CHECK_OK(gpu.api.cuCtxPopCurrent(&popped));
  CHECK(popped == gpu.context);
  CHECK(gpu.api.cuMemAlloc(&pointer, 64) == cuda::CUDA_ERROR_INVALID_CONTEXT);
  CHECK(gpu.api.cuCtxPopCurrent(nullptr) == cuda::CUDA_ERROR_INVALID_CONTEXT);
  CHECK_OK(gpu.api.cuCtxPushCurrent(gpu.context));
  CHECK_OK(gpu.api.cuMemAlloc(&pointer, 64));

  // A context that is gone takes all that was in it with it.
  CHECK_OK(gpu.api.cuDevicePrimaryCtxRelease(0));
  CHECK(gpu.api.cuMemFree(pointer) == cuda::CUDA_ERROR_CONTEXT_IS_DESTROYED);
  CHECK(gpu.api.cuCtxPushCurrent(gpu.context) == cuda::CUDA_ERROR_INVALID_CONTEXT);
  CHECK(gpu.api.cuDevicePrimaryCtxRelease(0) == cuda::CUDA_ERROR_INVALID_CONTEXT);
  CHECK(gpu.machine->live().total() == 0);
  CHECK(gpu.machine->device_bytes(0) == 0);

  gpu.machine->reset();
  int count = 0;
  CHECK(gpu.api.cuDeviceGetCount(&count) == cuda::CUDA_ERROR_NOT_INITIALIZED);
}

TEST_CASE("Memory is freed once, by its first address, and counted") {
  const FakeGpu gpu({.memory_mb = 64});
  const cuda::CUdeviceptr pointer = gpu.alloc(3 * kMiB);
  size_t free = 0;
  size_t total = 0;
  CHECK_OK(gpu.api.cuMemGetInfo(&free, &total));
  CHECK(total == 64 * kMiB);
  CHECK(free == 61 * kMiB);
  cuda::CUdeviceptr other = 0;
  CHECK(gpu.api.cuMemAlloc(&other, 62 * kMiB) == cuda::CUDA_ERROR_OUT_OF_MEMORY);
  CHECK(gpu.api.cuMemAlloc(&other, 0) == cuda::CUDA_ERROR_INVALID_VALUE);
  CHECK(gpu.api.cuMemFree(pointer + 64) == cuda::CUDA_ERROR_INVALID_VALUE);
  CHECK(gpu.machine->live().allocations == 1);
  CHECK_OK(gpu.api.cuMemFree(pointer));
  CHECK(gpu.api.cuMemFree(pointer) == cuda::CUDA_ERROR_INVALID_VALUE);
  CHECK(gpu.machine->live().allocations == 0);
  CHECK(gpu.machine->device_bytes(0) == 0);
}

TEST_CASE("What a pointer is can be asked") {
  const FakeGpu gpu({.devices = 2});
  const cuda::CUdeviceptr legacy = gpu.alloc(5000);
  cuda::CUdeviceptr base = 0;
  size_t bytes = 0;
  CHECK_OK(gpu.api.cuMemGetAddressRange(&base, &bytes, legacy + 4999));
  CHECK((base == legacy && bytes == 5000));
  CHECK(gpu.api.cuMemGetAddressRange(&base, &bytes, legacy + 5000) == cuda::CUDA_ERROR_NOT_FOUND);

  int capable = 0;
  int ordinal = -1;
  uint64_t types = 0;
  const auto ask = [&](void* value, cuda::CUpointer_attribute attribute, cuda::CUdeviceptr of) {
    return gpu.api.cuPointerGetAttribute(value, attribute, of);
  };
  CHECK_OK(ask(&capable, cuda::CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, legacy));
  CHECK(capable == 1);
  const cuda::CUdeviceptr mapped = gpu.map(2 * kMiB, 1, cuda::CU_MEM_HANDLE_TYPE_FABRIC);
  CHECK_OK(ask(&capable, cuda::CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, mapped));
  CHECK(capable == 0);
  CHECK_OK(ask(&types, cuda::CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES, mapped + 100));
  CHECK(types == cuda::CU_MEM_HANDLE_TYPE_FABRIC);
  CHECK_OK(ask(&ordinal, cuda::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, mapped));
  CHECK(ordinal == 1);
  CHECK(ask(&ordinal, cuda::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
            reinterpret_cast<uintptr_t>(&ordinal)) == cuda::CUDA_ERROR_INVALID_VALUE);
}

// The sanitizers have handlers of their own for this signal.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
TEST_CASE("The CPU cannot touch device memory") {
  const FakeGpu gpu;
  const cuda::CUdeviceptr pointer = gpu.alloc(4096);
  const pid_t child = ::fork();
  if (child == 0) {
    std::signal(SIGSEGV, SIG_DFL);
    *reinterpret_cast<volatile char*>(pointer) = 1;
    ::_exit(0);
  }
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(WIFSIGNALED(status));
  CHECK(WTERMSIG(status) == SIGSEGV);
}

TEST_CASE("A forked child has no driver until it begins anew, and nothing of its parent's") {
  const FakeGpu gpu;
  const cuda::CUdeviceptr pointer = gpu.alloc(4096);
  const pid_t child = ::fork();
  if (child == 0) {
    cuda::CUdeviceptr other = 0;
    bool good = gpu.api.cuMemAlloc(&other, 64) == cuda::CUDA_ERROR_NOT_INITIALIZED;
    gpu.machine->reset();
    good = good && gpu.api.cuInit(0) == cuda::CUDA_SUCCESS;
    good = good && gpu.machine->live().total() == 0;
    good = good && gpu.machine->device_bytes(0) == 4096;
    ::_exit(good ? 0 : 1);
  }
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(status == 0);
  CHECK(gpu.machine->device_bytes(0) == 4096);
  CHECK_OK(gpu.api.cuMemFree(pointer));
  CHECK(gpu.machine->device_bytes(0) == 0);
}
#endif

TEST_CASE("VMM memory keeps to its granularity and its order of calls") {
  const FakeGpu gpu({.lacks = "fabric"});
  const cuda::Api& api = gpu.api;
  const auto plain = device_memory(0, 0);
  const auto fabric = device_memory(0, cuda::CU_MEM_HANDLE_TYPE_FABRIC);
  const auto nowhere = device_memory(3, 0);
  size_t unit = 0;
  CHECK_OK(
      api.cuMemGetAllocationGranularity(&unit, &plain, cuda::CU_MEM_ALLOC_GRANULARITY_MINIMUM));
  CHECK(unit == 2 * kMiB);
  cuda::CUmemGenericAllocationHandle handle = 0;
  CHECK(api.cuMemCreate(&handle, unit + 4096, &plain, 0) == cuda::CUDA_ERROR_INVALID_VALUE);
  CHECK(api.cuMemCreate(&handle, unit, &fabric, 0) == cuda::CUDA_ERROR_NOT_SUPPORTED);
  CHECK(api.cuMemCreate(&handle, unit, &nowhere, 0) == cuda::CUDA_ERROR_INVALID_DEVICE);
  CHECK_OK(api.cuMemCreate(&handle, 2 * unit, &plain, 0));

  cuda::CUdeviceptr range = 0;
  CHECK(api.cuMemAddressReserve(&range, unit + 1, 0, 0, 0) == cuda::CUDA_ERROR_INVALID_VALUE);
  CHECK_OK(api.cuMemAddressReserve(&range, 4 * unit, 0, 0, 0));
  CHECK(range % unit == 0);
  CHECK(api.cuMemMap(range + 4096, unit, 0, handle, 0) == cuda::CUDA_ERROR_INVALID_VALUE);
  CHECK(api.cuMemMap(range, unit, unit, handle, 0) == cuda::CUDA_ERROR_INVALID_VALUE);
  CHECK(api.cuMemMap(range, 3 * unit, 0, handle, 0) == cuda::CUDA_ERROR_INVALID_VALUE);
  CHECK(api.cuMemMap(range + 3 * unit, 2 * unit, 0, handle, 0) == cuda::CUDA_ERROR_INVALID_VALUE);
  CHECK(api.cuMemMap(range, 2 * unit, 0, handle + 1, 0) == cuda::CUDA_ERROR_INVALID_VALUE);
  CHECK_OK(api.cuMemMap(range, 2 * unit, 0, handle, 0));
  CHECK(api.cuMemMap(range + unit, unit, 0, handle, 0) == cuda::CUDA_ERROR_ALREADY_MAPPED);
  CHECK_OK(api.cuMemRelease(handle));
  CHECK(api.cuMemRelease(handle) == cuda::CUDA_ERROR_INVALID_VALUE);
  CHECK(gpu.machine->device_bytes(0) == 2 * unit);

  CHECK(api.cuMemAddressFree(range, 4 * unit) == cuda::CUDA_ERROR_INVALID_VALUE);
  CHECK(api.cuMemUnmap(range, unit) == cuda::CUDA_ERROR_INVALID_VALUE);
  CHECK(api.cuMemUnmap(range, 4 * unit) == cuda::CUDA_ERROR_INVALID_VALUE);
  CHECK_OK(api.cuMemUnmap(range, 2 * unit));
  CHECK(api.cuMemUnmap(range, 2 * unit) == cuda::CUDA_ERROR_INVALID_VALUE);
  CHECK(gpu.machine->device_bytes(0) == 0);
  CHECK(api.cuMemAddressFree(range, 2 * unit) == cuda::CUDA_ERROR_INVALID_VALUE);
  CHECK_OK(api.cuMemAddressFree(range, 4 * unit));
  CHECK(api.cuMemAddressFree(range, 4 * unit) == cuda::CUDA_ERROR_INVALID_VALUE);
  CHECK(gpu.machine->live().mappings + gpu.machine->live().reservations == 0);
}

TEST_CASE(
    "VMM memory for fabric handles may be of larger units, and tells whether RDMA reaches it") {
  const FakeGpu gpu({.fabric_granularity_kb = 8192});
  const cuda::Api& api = gpu.api;
  auto fabric = device_memory(0, cuda::CU_MEM_HANDLE_TYPE_FABRIC);
  size_t unit = 0;
  CHECK_OK(
      api.cuMemGetAllocationGranularity(&unit, &fabric, cuda::CU_MEM_ALLOC_GRANULARITY_MINIMUM));
  CHECK(unit == 8 * kMiB);
  const auto plain = device_memory(0, 0);
  CHECK_OK(
      api.cuMemGetAllocationGranularity(&unit, &plain, cuda::CU_MEM_ALLOC_GRANULARITY_MINIMUM));
  CHECK(unit == 2 * kMiB);
  cuda::CUmemGenericAllocationHandle handle = 0;
  CHECK(api.cuMemCreate(&handle, 2 * kMiB, &fabric, 0) == cuda::CUDA_ERROR_INVALID_VALUE);
  const bool reached = GENERATE(false, true);
  fabric.allocFlags.gpuDirectRDMACapable = reached ? 1 : 0;
  REQUIRE_OK(api.cuMemCreate(&handle, 8 * kMiB, &fabric, 0));
  cuda::CUdeviceptr range = 0;
  REQUIRE_OK(api.cuMemAddressReserve(&range, 8 * kMiB, 0, 0, 0));
  CHECK(api.cuMemMap(range, 2 * kMiB, 0, handle, 0) == cuda::CUDA_ERROR_INVALID_VALUE);
  CHECK_OK(api.cuMemMap(range, 8 * kMiB, 0, handle, 0));
  cuda::CUmemAllocationProp told{};
  CHECK_OK(api.cuMemGetAllocationPropertiesFromHandle(&told, handle));
  CHECK((told.allocFlags.gpuDirectRDMACapable != 0) == reached);
}

TEST_CASE("Memory that RDMA reaches is refused where a device has no such") {
  const FakeGpu gpu({.lacks = "rdma"});
  auto properties = device_memory(0, 0);
  properties.allocFlags.gpuDirectRDMACapable = 1;
  cuda::CUmemGenericAllocationHandle handle = 0;
  CHECK(gpu.api.cuMemCreate(&handle, 2 * kMiB, &properties, 0) == cuda::CUDA_ERROR_NOT_SUPPORTED);
}

TEST_CASE("VMM memory is touched by those devices only that were let in") {
  const FakeGpu gpu({.devices = 2});
  const cuda::CUstream stream = gpu.stream();
  const cuda::CUdeviceptr pointer = gpu.map(4 * kMiB);
  const auto own = read_write(0);
  SECTION("nobody: an illegal address, and that for good") {
    CHECK(gpu.touch(pointer, stream) == cuda::CUDA_ERROR_ILLEGAL_ADDRESS);
    cuda::CUdeviceptr other = 0;
    CHECK(gpu.api.cuMemAlloc(&other, 64) == cuda::CUDA_ERROR_ILLEGAL_ADDRESS);
    CHECK(gpu.api.cuStreamQuery(stream) == cuda::CUDA_ERROR_ILLEGAL_ADDRESS);
    // The other device goes on, and a new context of this one too.
    REQUIRE_OK(gpu.api.cuCtxPushCurrent(gpu.retain(1)));
    CHECK_OK(gpu.api.cuMemAlloc(&other, 64));
    CHECK_OK(gpu.api.cuDevicePrimaryCtxRelease(0));
    REQUIRE_OK(gpu.api.cuCtxPushCurrent(gpu.retain(0)));
    CHECK_OK(gpu.api.cuMemAlloc(&other, 64));
  }
  SECTION("the own device") {
    CHECK(gpu.api.cuMemSetAccess(pointer, 2 * kMiB, &own, 1) == cuda::CUDA_ERROR_INVALID_VALUE);
    CHECK_OK(gpu.api.cuMemSetAccess(pointer, 4 * kMiB, &own, 1));
    CHECK_OK(gpu.touch(pointer, stream));
    CHECK_OK(gpu.touch(pointer + 4 * kMiB - 8, stream));
    CHECK(gpu.touch(pointer + 4 * kMiB - 4, stream) == cuda::CUDA_ERROR_ILLEGAL_ADDRESS);
  }
  SECTION("another device") {
    REQUIRE_OK(gpu.api.cuMemSetAccess(pointer, 4 * kMiB, &own, 1));
    REQUIRE_OK(gpu.api.cuCtxPushCurrent(gpu.retain(1)));
    const cuda::CUstream other = gpu.stream();
    const auto let_in = read_write(1);
    CHECK_OK(gpu.api.cuMemSetAccess(pointer, 4 * kMiB, &let_in, 1));
    CHECK_OK(gpu.touch(pointer, other));
    auto read_only = let_in;
    read_only.flags = cuda::CU_MEM_ACCESS_FLAGS_PROT_READ;
    CHECK_OK(gpu.api.cuMemSetAccess(pointer, 4 * kMiB, &read_only, 1));
    CHECK_OK(gpu.touch(pointer, other));
    CHECK_OK(gpu.api.cuMemsetD8Async(pointer, 1, 8, other));
    CHECK(gpu.api.cuStreamSynchronize(other) == cuda::CUDA_ERROR_ILLEGAL_ADDRESS);
  }
}

TEST_CASE("Two parts in one range are one piece of memory, up to the hole behind them") {
  const FakeGpu gpu;
  const cuda::CUstream stream = gpu.stream();
  const auto properties = device_memory(0, 0);
  const auto own = read_write(0);
  cuda::CUdeviceptr range = 0;
  REQUIRE_OK(gpu.api.cuMemAddressReserve(&range, 6 * kMiB, 0, 0, 0));
  for (uint64_t part = 0; part < 2; ++part) {
    cuda::CUmemGenericAllocationHandle handle = 0;
    REQUIRE_OK(gpu.api.cuMemCreate(&handle, 2 * kMiB, &properties, 0));
    REQUIRE_OK(gpu.api.cuMemMap(range + part * 2 * kMiB, 2 * kMiB, 0, handle, 0));
    cuda::CUmemGenericAllocationHandle again = 0;
    void* inside = reinterpret_cast<void*>(range + part * 2 * kMiB + 77);
    CHECK_OK(gpu.api.cuMemRetainAllocationHandle(&again, inside));
    CHECK(again == handle);
    CHECK_OK(gpu.api.cuMemRelease(again));
    REQUIRE_OK(gpu.api.cuMemRelease(handle));
  }
  REQUIRE_OK(gpu.api.cuMemSetAccess(range, 4 * kMiB, &own, 1));
  CHECK_OK(gpu.touch(range + 2 * kMiB - 4, stream));
  CHECK(gpu.touch(range + 4 * kMiB - 4, stream) == cuda::CUDA_ERROR_ILLEGAL_ADDRESS);
}

TEST_CASE("Memory of another device needs peer access") {
  const bool supported = GENERATE(true, false);
  const FakeGpu gpu({.devices = 2, .lacks = supported ? "" : "peer"});
  const cuda::CUdeviceptr pointer = gpu.alloc(4096);
  const cuda::CUcontext second = gpu.retain(1);
  REQUIRE_OK(gpu.api.cuCtxPushCurrent(second));
  const cuda::CUstream stream = gpu.stream();
  int can = -1;
  CHECK_OK(gpu.api.cuDeviceCanAccessPeer(&can, 1, 0));
  CHECK(can == (supported ? 1 : 0));
  CHECK_OK(gpu.api.cuDeviceCanAccessPeer(&can, 1, 1));
  CHECK(can == 0);
  CHECK(gpu.api.cuCtxEnablePeerAccess(second, 0) == cuda::CUDA_ERROR_INVALID_CONTEXT);
  if (supported) {
    CHECK_OK(gpu.api.cuCtxEnablePeerAccess(gpu.context, 0));
    CHECK(gpu.api.cuCtxEnablePeerAccess(gpu.context, 0) ==
          cuda::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED);
    CHECK_OK(gpu.touch(pointer, stream));
  } else {
    CHECK(gpu.api.cuCtxEnablePeerAccess(gpu.context, 0) ==
          cuda::CUDA_ERROR_PEER_ACCESS_UNSUPPORTED);
    CHECK(gpu.touch(pointer, stream) == cuda::CUDA_ERROR_ILLEGAL_ADDRESS);
  }
}

TEST_CASE("Host memory is registered once, and the device knows it by another address") {
  const bool alias = GENERATE(true, false);
  const FakeGpu gpu({.devices = 2, .lacks = alias ? "" : "host_alias"});
  const cuda::Api& api = gpu.api;
  constexpr unsigned int kBoth =
      cuda::CU_MEMHOSTREGISTER_PORTABLE | cuda::CU_MEMHOSTREGISTER_DEVICEMAP;
  std::vector<uint64_t> words(1024, 7);
  void* const host = words.data();
  const uint64_t bytes = words.size() * 8;
  cuda::CUdeviceptr address = 0;
  CHECK(api.cuMemHostGetDevicePointer(&address, host, 0) == cuda::CUDA_ERROR_INVALID_VALUE);
  CHECK(api.cuMemHostRegister(nullptr, 8, kBoth) == cuda::CUDA_ERROR_INVALID_VALUE);
  CHECK(api.cuMemHostRegister(host, bytes, 64) == cuda::CUDA_ERROR_INVALID_VALUE);
  CHECK_OK(api.cuMemHostRegister(host, bytes, kBoth));
  CHECK(api.cuMemHostRegister(&words[100], 8, kBoth) ==
        cuda::CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
  CHECK_OK(api.cuMemHostGetDevicePointer(&address, &words[10], 0));
  CHECK((address != reinterpret_cast<uintptr_t>(&words[10])) == alias);

  const cuda::CUdeviceptr pointer = gpu.alloc(8);
  const cuda::CUstream stream = gpu.stream();
  words[10] = 42;
  CHECK_OK(api.cuMemcpyDtoDAsync(pointer, address, 8, stream));
  CHECK_OK(api.cuStreamSynchronize(stream));
  CHECK(gpu.word(pointer) == 42);

  CHECK(api.cuMemHostUnregister(&words[1]) == cuda::CUDA_ERROR_INVALID_VALUE);
  CHECK_OK(api.cuMemHostUnregister(host));
  CHECK(api.cuMemHostUnregister(host) == cuda::CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);

  // Without "portable" it is of the registering device only.
  CHECK_OK(api.cuMemHostRegister(host, bytes, cuda::CU_MEMHOSTREGISTER_DEVICEMAP));
  CHECK_OK(api.cuMemHostGetDevicePointer(&address, host, 0));
  REQUIRE_OK(api.cuCtxPushCurrent(gpu.retain(1)));
  CHECK(api.cuMemHostGetDevicePointer(&address, host, 0) == cuda::CUDA_ERROR_INVALID_VALUE);
  CHECK(gpu.touch(address, gpu.stream()) == cuda::CUDA_ERROR_ILLEGAL_ADDRESS);
}
