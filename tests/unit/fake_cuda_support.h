// What the tests of the fake driver share: a machine with a context, and the smallest plan that a
// kernel can copy.
#pragma once

#include <array>
#include <catch2/catch.hpp>
#include <chrono>
#include <cstddef>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "kernels/copy_plan.h"
#include "kernels/cuda/driver.h"
#include "kernels/device_copy.h"
#include "tests/fake_cuda/control.h"

namespace kvferry {

inline constexpr uint64_t kMiB = uint64_t{1} << 20;

// The first `tokens` tokens of `cell` bytes in block 1, at `stride` from token to token.
inline kernels::CopyPlan token_plan(uint32_t tokens, uint64_t cell, uint64_t stride) {
  kernels::CopyPlan plan;
  kernels::Bundle bundle;
  bundle.bytes = tokens * cell;
  bundle.cell_bytes = cell;
  bundle.order = {kernels::Axis::kRow, kernels::Axis::kPlane, kernels::Axis::kBlock,
                  kernels::Axis::kToken, kernels::Axis::kUnit};
  bundle.row_count = 1;
  bundle.plane_count = 1;
  bundle.segment_count = 1;
  bundle.block_count = 1;
  bundle.token_count = tokens;
  bundle.unit_count = 1;
  bundle.rows_regular = true;
  bundle.planes_regular = true;
  plan.bytes = bundle.bytes;
  plan.pool_count = 1;
  plan.bundles = {bundle};
  plan.rows = {0, 1};
  plan.strips = {{.offset = 0,
                  .block_stride = tokens * stride,
                  .unit_stride = cell,
                  .token_stride = stride,
                  .pool = 0}};
  plan.segments = {0, 1};
  plan.blocks = {{0, 0}, {tokens, 1}};
  plan.spans = {{.block = 1, .token = 0, .count = tokens}};
  return plan;
}

inline cuda::CUmemAllocationProp device_memory(int ordinal, unsigned int handle_types) {
  cuda::CUmemAllocationProp properties{};
  properties.type = cuda::CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.requestedHandleTypes = static_cast<cuda::CUmemAllocationHandleType>(handle_types);
  properties.location = {cuda::CU_MEM_LOCATION_TYPE_DEVICE, ordinal};
  return properties;
}

inline cuda::CUmemAccessDesc read_write(int ordinal) {
  return {{cuda::CU_MEM_LOCATION_TYPE_DEVICE, ordinal}, cuda::CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
}

#define REQUIRE_OK(expression) REQUIRE((expression) == cuda::CUDA_SUCCESS)
#define CHECK_OK(expression) CHECK((expression) == cuda::CUDA_SUCCESS)

// A machine, its driver, and device 0's context current.
class FakeGpu {
 public:
  explicit FakeGpu(const fake_cuda::Setup& setup = {})
      : machine(KVFERRY_FAKE_CUDA_LIBRARY, setup),
        driver(cuda::Driver::load(KVFERRY_FAKE_CUDA_LIBRARY).value()),
        api(driver->api()) {
    context = retain(0);
    REQUIRE_OK(api.cuCtxPushCurrent(context));
  }

  cuda::CUcontext retain(int ordinal) const {
    cuda::CUcontext retained = nullptr;
    REQUIRE_OK(api.cuDevicePrimaryCtxRetain(&retained, ordinal));
    return retained;
  }
  cuda::CUdeviceptr alloc(uint64_t bytes) const {
    cuda::CUdeviceptr pointer = 0;
    REQUIRE_OK(api.cuMemAlloc(&pointer, bytes));
    return pointer;
  }
  cuda::CUstream stream(unsigned int flags = cuda::CU_STREAM_NON_BLOCKING) const {
    cuda::CUstream made = nullptr;
    REQUIRE_OK(api.cuStreamCreate(&made, flags));
    return made;
  }
  cuda::CUevent event(unsigned int flags = cuda::CU_EVENT_DISABLE_TIMING) const {
    cuda::CUevent made = nullptr;
    REQUIRE_OK(api.cuEventCreate(&made, flags));
    return made;
  }
  // The kernel of that kind, ready to be launched.
  cuda::CUfunction kernel(kernels::CopyKind kind) const {
    cuda::CUmodule module = nullptr;
    cuda::CUfunction function = nullptr;
    REQUIRE_OK(api.cuModuleLoadData(&module, kernels::kernel_image().data()));
    REQUIRE_OK(api.cuModuleGetFunction(&function, module, kernels::kernel_name(kind)));
    return function;
  }
  // An address that has `bytes` of VMM memory of the device, which nobody may touch yet.
  cuda::CUdeviceptr map(uint64_t bytes, int ordinal = 0, unsigned int handle_types = 0) const {
    const auto properties = device_memory(ordinal, handle_types);
    cuda::CUmemGenericAllocationHandle handle = 0;
    cuda::CUdeviceptr pointer = 0;
    REQUIRE_OK(api.cuMemCreate(&handle, bytes, &properties, 0));
    REQUIRE_OK(api.cuMemAddressReserve(&pointer, bytes, 0, 0, 0));
    REQUIRE_OK(api.cuMemMap(pointer, bytes, 0, handle, 0));
    REQUIRE_OK(api.cuMemRelease(handle));
    return pointer;
  }
  // Eight bytes of device memory, past the streams.
  uint64_t word(cuda::CUdeviceptr address) const {
    uint64_t value = 0;
    REQUIRE(machine->peek(address, &value, sizeof value));
    return value;
  }
  // A copy of 8 bytes on a stream, waited for: whether this context may read there.
  cuda::CUresult touch(cuda::CUdeviceptr address, cuda::CUstream on) const {
    uint64_t value = 0;
    return api.cuMemcpyDtoHAsync(&value, address, sizeof value, on);
  }

  fake_cuda::Machine machine;
  std::shared_ptr<const cuda::Driver> driver;
  const cuda::Api& api;
  cuda::CUcontext context = nullptr;
};

template <typename Condition>
bool soon(Condition&& condition) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  return true;
}

}  // namespace kvferry
