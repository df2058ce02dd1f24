// The fake driver's promises about work: late, in any legal order, checked, and failing for good.
#include <atomic>
#include <cstring>
#include <set>
#include <string>

#include "tests/unit/fake_cuda_support.h"

using namespace kvferry;

namespace {

// A gather on the device: 64 tokens of 48 bytes, 64 apart, out of block 1 of a pool.
struct Gather {
  static constexpr uint32_t kTokens = 64;
  static constexpr uint64_t kCell = 48;
  static constexpr uint64_t kStride = 64;
  static constexpr uint64_t kBytes = kTokens * kCell;

  explicit Gather(const FakeGpu& with)
      : gpu(with),
        pool(gpu.alloc(2 * kTokens * kStride)),
        flat(gpu.alloc(kBytes)),
        function(gpu.kernel(kernels::CopyKind::kGather)),
        stream(gpu.stream()) {
    std::vector<unsigned char> bytes(2 * kTokens * kStride);
    for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<unsigned char>(i * 7);
    REQUIRE(gpu.machine->poke(pool, bytes.data(), bytes.size()));
    for (uint32_t t = 0; t < kTokens; ++t) {
      const auto* token = bytes.data() + (kTokens + t) * kStride;
      expected.insert(expected.end(), token, token + kCell);
    }
    const std::vector<uint64_t> bases = {pool};
    const auto packed =
        kernels::PackedPlan::make(token_plan(kTokens, kCell, kStride), bases).value();
    const cuda::CUdeviceptr plan = gpu.alloc(packed.image().size());
    REQUIRE(gpu.machine->poke(plan, packed.image().data(), packed.image().size()));
    args.plan = packed.view_at(plan);
    args.bytes = kBytes;
    args.flat = flat;
    args.kind = kernels::CopyKind::kGather;
  }

  cuda::CUresult launch() {
    const auto shape = kernels::launch_shape(args, 4);
    void* parameters[] = {&args};
    return gpu.api.cuLaunchKernel(function, shape.blocks, 1, 1, shape.threads, 1, 1, 0, stream,
                                  static_cast<void**>(parameters), nullptr);
  }
  bool arrived() const {
    std::vector<unsigned char> got(kBytes);
    return gpu.machine->peek(flat, got.data(), got.size()) && got == expected;
  }

  const FakeGpu& gpu;
  cuda::CUdeviceptr pool;
  cuda::CUdeviceptr flat;
  cuda::CUfunction function;
  cuda::CUstream stream;
  kernels::CopyArgs args{};
  std::vector<unsigned char> expected;
};

}  // namespace

TEST_CASE("An event is not ready before its work is done") {
  const FakeGpu gpu;
  const cuda::CUdeviceptr pointer = gpu.alloc(64);
  const cuda::CUstream stream = gpu.stream();
  const cuda::CUevent event = gpu.event();
  CHECK_OK(gpu.api.cuEventQuery(event));  // never recorded
  gpu.machine->hold();
  CHECK_OK(gpu.api.cuMemsetD8Async(pointer, 0xab, 64, stream));
  CHECK_OK(gpu.api.cuEventRecord(event, stream));
  CHECK(gpu.api.cuEventQuery(event) == cuda::CUDA_ERROR_NOT_READY);
  CHECK(gpu.api.cuStreamQuery(stream) == cuda::CUDA_ERROR_NOT_READY);
  CHECK(gpu.word(pointer) == 0);
  CHECK(gpu.machine->step() == 1);
  CHECK(gpu.word(pointer) == 0xabababababababab);
  CHECK(gpu.api.cuEventQuery(event) == cuda::CUDA_ERROR_NOT_READY);
  CHECK(gpu.machine->step(5) == 1);
  CHECK_OK(gpu.api.cuEventQuery(event));
  CHECK_OK(gpu.api.cuStreamQuery(stream));
  gpu.machine->release();

  CHECK_OK(gpu.api.cuMemsetD8Async(pointer, 1, 64, stream));
  CHECK_OK(gpu.api.cuEventRecord(event, stream));
  CHECK_OK(gpu.api.cuEventSynchronize(event));
  CHECK(gpu.word(pointer) == 0x0101010101010101);
}

TEST_CASE("Streams end in different orders by the seed, and in the same one by the same seed") {
  const auto order = [](uint64_t seed) {
    const FakeGpu gpu({.seed = seed});
    constexpr std::size_t kStreams = 4;
    std::array<cuda::CUevent, kStreams> events{};
    const cuda::CUdeviceptr pointer = gpu.alloc(64);
    gpu.machine->hold();
    for (auto& event : events) {
      const cuda::CUstream stream = gpu.stream();
      event = gpu.event();
      REQUIRE_OK(gpu.api.cuMemsetD8Async(pointer, 1, 64, stream));
      REQUIRE_OK(gpu.api.cuEventRecord(event, stream));
    }
    std::string seen;
    while (seen.size() < kStreams) {
      REQUIRE(gpu.machine->step() == 1);
      for (std::size_t i = 0; i < kStreams; ++i) {
        const char name = static_cast<char>('a' + i);
        if (seen.find(name) == std::string::npos &&
            gpu.api.cuEventQuery(events[i]) == cuda::CUDA_SUCCESS) {
          seen += name;
        }
      }
    }
    return seen;
  };
  std::set<std::string> orders;
  for (uint64_t seed = 1; seed <= 12; ++seed) orders.insert(order(seed));
  CHECK(orders.size() >= 4);
  CHECK(order(3) == order(3));
}

TEST_CASE("A stream waits for another's event, and the default stream for the blocking ones") {
  enum class By { kEvent, kDefaultLast, kDefaultFirst };
  const By by = GENERATE(By::kEvent, By::kDefaultLast, By::kDefaultFirst);
  // Without the wait some seed would take the second one first.
  for (uint64_t seed = 1; seed <= 12; ++seed) {
    const FakeGpu gpu({.seed = seed, .delay_us = 1});
    const cuda::CUdeviceptr pointer = gpu.alloc(8);
    const bool event = by == By::kEvent;
    const cuda::CUstream made =
        gpu.stream(event ? cuda::CU_STREAM_NON_BLOCKING : cuda::CU_STREAM_DEFAULT);
    const cuda::CUstream first = by == By::kDefaultFirst ? nullptr : made;
    const cuda::CUstream second = event ? gpu.stream() : (by == By::kDefaultFirst ? made : nullptr);
    gpu.machine->hold();
    CHECK_OK(gpu.api.cuMemsetD8Async(pointer, 1, 8, first));
    if (event) {
      const cuda::CUevent recorded = gpu.event();
      CHECK_OK(gpu.api.cuEventRecord(recorded, first));
      CHECK_OK(gpu.api.cuStreamWaitEvent(second, recorded, 0));
    }
    CHECK_OK(gpu.api.cuMemsetD8Async(pointer, 2, 8, second));
    gpu.machine->release();
    CHECK_OK(gpu.api.cuStreamSynchronize(first));
    CHECK_OK(gpu.api.cuStreamSynchronize(second));
    CHECK(gpu.word(pointer) == 0x0202020202020202);
  }
}

TEST_CASE("Streams write words that the host sees, and wait for words of the host") {
  const FakeGpu gpu;
  std::vector<std::atomic<uint64_t>> words(2);
  constexpr unsigned int kBoth =
      cuda::CU_MEMHOSTREGISTER_PORTABLE | cuda::CU_MEMHOSTREGISTER_DEVICEMAP;
  REQUIRE_OK(gpu.api.cuMemHostRegister(words.data(), 16, kBoth));
  cuda::CUdeviceptr address = 0;
  REQUIRE_OK(gpu.api.cuMemHostGetDevicePointer(&address, words.data(), 0));
  const cuda::CUstream stream = gpu.stream();
  CHECK(gpu.api.cuStreamWriteValue64(stream, address + 4, 1, 0) == cuda::CUDA_ERROR_INVALID_VALUE);
  CHECK_OK(gpu.api.cuStreamWaitValue64(stream, address, 5, cuda::CU_STREAM_WAIT_VALUE_GEQ));
  CHECK_OK(gpu.api.cuStreamWriteValue64(stream, address + 8, 9, 0));
  words[0] = 4;
  std::this_thread::sleep_for(std::chrono::milliseconds(2));
  CHECK(words[1] == 0);
  words[0] = 6;
  CHECK(soon([&] { return words[1] == 9; }));
  CHECK_OK(gpu.api.cuStreamSynchronize(stream));
  CHECK_OK(gpu.api.cuMemHostUnregister(words.data()));
}

TEST_CASE("Copies from unregistered memory take it at the call, from registered memory later") {
  const FakeGpu gpu;
  const bool registered = GENERATE(false, true);
  uint64_t value = 1;
  if (registered) {
    REQUIRE_OK(gpu.api.cuMemHostRegister(&value, 8, cuda::CU_MEMHOSTREGISTER_DEVICEMAP));
  }
  const cuda::CUdeviceptr pointer = gpu.alloc(8);
  const cuda::CUstream stream = gpu.stream();
  gpu.machine->hold();
  CHECK_OK(gpu.api.cuMemcpyHtoDAsync(pointer, &value, 8, stream));
  value = 2;
  gpu.machine->release();
  CHECK_OK(gpu.api.cuStreamSynchronize(stream));
  CHECK(gpu.word(pointer) == (registered ? 2 : 1));
  gpu.machine->reset();
}

TEST_CASE("Freeing waits for the work, unmapping and unregistering do not") {
  const FakeGpu gpu;
  const cuda::CUstream stream = gpu.stream();
  const cuda::CUdeviceptr pointer = gpu.alloc(64);
  SECTION("cuMemFree") {
    for (int i = 0; i < 20; ++i) REQUIRE_OK(gpu.api.cuMemsetD8Async(pointer, 1, 64, stream));
    CHECK_OK(gpu.api.cuMemFree(pointer));
    CHECK_OK(gpu.api.cuStreamQuery(stream));
  }
  SECTION("cuMemUnmap") {
    const cuda::CUdeviceptr mapped = gpu.map(2 * kMiB);
    const auto own = read_write(0);
    REQUIRE_OK(gpu.api.cuMemSetAccess(mapped, 2 * kMiB, &own, 1));
    gpu.machine->hold();
    REQUIRE_OK(gpu.api.cuMemsetD8Async(mapped, 1, 64, stream));
    REQUIRE_OK(gpu.api.cuMemUnmap(mapped, 2 * kMiB));
    gpu.machine->release();
    CHECK(gpu.api.cuStreamSynchronize(stream) == cuda::CUDA_ERROR_ILLEGAL_ADDRESS);
  }
  SECTION("cuMemHostUnregister") {
    std::vector<unsigned char> host(64);
    cuda::CUdeviceptr address = 0;
    REQUIRE_OK(gpu.api.cuMemHostRegister(host.data(), 64, cuda::CU_MEMHOSTREGISTER_DEVICEMAP));
    REQUIRE_OK(gpu.api.cuMemHostGetDevicePointer(&address, host.data(), 0));
    gpu.machine->hold();
    REQUIRE_OK(gpu.api.cuMemcpyDtoDAsync(address, pointer, 64, stream));
    REQUIRE_OK(gpu.api.cuMemHostUnregister(host.data()));
    gpu.machine->release();
    CHECK(gpu.api.cuStreamSynchronize(stream) == cuda::CUDA_ERROR_ILLEGAL_ADDRESS);
  }
}

TEST_CASE("Handles of what is gone, and of the other device, are refused") {
  const FakeGpu gpu({.devices = 2});
  const cuda::CUstream stream = gpu.stream();
  const cuda::CUevent event = gpu.event();
  const cuda::CUevent kept = gpu.event();
  CHECK_OK(gpu.api.cuStreamDestroy(stream));
  CHECK(gpu.api.cuStreamDestroy(stream) == cuda::CUDA_ERROR_INVALID_HANDLE);
  CHECK(gpu.api.cuEventRecord(event, stream) == cuda::CUDA_ERROR_INVALID_HANDLE);
  CHECK_OK(gpu.api.cuEventDestroy(event));
  CHECK(gpu.api.cuEventQuery(event) == cuda::CUDA_ERROR_INVALID_HANDLE);
  const cuda::CUstream other = gpu.stream();
  const cuda::CUcontext second = gpu.retain(1);
  REQUIRE_OK(gpu.api.cuCtxPushCurrent(second));
  CHECK(gpu.api.cuStreamQuery(other) == cuda::CUDA_ERROR_INVALID_HANDLE);
  CHECK(gpu.api.cuEventRecord(kept, gpu.stream()) == cuda::CUDA_ERROR_INVALID_HANDLE);
}

TEST_CASE("A kernel runs late, with the parameters of the call") {
  const FakeGpu gpu;
  Gather gather(gpu);
  gpu.machine->hold();
  REQUIRE_OK(gather.launch());
  gather.args.flat = 0;  // the call's parameters were copied
  CHECK_FALSE(gather.arrived());
  gpu.machine->release();
  CHECK_OK(gpu.api.cuStreamSynchronize(gather.stream));
  CHECK(gather.arrived());
  CHECK(gpu.machine->calls("(device)") == 1);
}

TEST_CASE("A kernel that leaves its memory fails the context for good") {
  const FakeGpu gpu({.devices = 2});
  Gather gather(gpu);
  const cuda::CUevent event = gpu.event();
  SECTION("behind the end") {
    gather.args.flat += 8 - Gather::kBytes % 8;
  }
  SECTION("freed memory") {
    REQUIRE_OK(gpu.api.cuMemFree(gather.pool));
  }
  SECTION("memory of another device") {
    REQUIRE_OK(gpu.api.cuCtxPushCurrent(gpu.retain(1)));
    gather.args.flat = gpu.alloc(Gather::kBytes);
    REQUIRE_OK(gpu.api.cuCtxPopCurrent(nullptr));
  }
  SECTION("memory of the host") {
    gather.args.flat = reinterpret_cast<uintptr_t>(gather.expected.data());
  }
  REQUIRE_OK(gather.launch());
  CHECK(soon([&] { return gpu.api.cuStreamQuery(gather.stream) != cuda::CUDA_ERROR_NOT_READY; }));
  CHECK(gpu.api.cuEventRecord(event, gather.stream) == cuda::CUDA_ERROR_ILLEGAL_ADDRESS);
  CHECK(gpu.api.cuEventQuery(event) == cuda::CUDA_ERROR_ILLEGAL_ADDRESS);
  CHECK(gather.launch() == cuda::CUDA_ERROR_ILLEGAL_ADDRESS);
}

TEST_CASE("Modules and launches are checked") {
  const FakeGpu gpu;
  Gather gather(gpu);
  cuda::CUmodule module = nullptr;
  cuda::CUfunction function = nullptr;
  CHECK(gpu.api.cuModuleLoadData(&module, "no image at all") == cuda::CUDA_ERROR_INVALID_IMAGE);
  REQUIRE_OK(gpu.api.cuModuleLoadData(&module, kernels::kernel_image().data()));
  CHECK(gpu.api.cuModuleGetFunction(&function, module, "no_kernel") == cuda::CUDA_ERROR_NOT_FOUND);
  void* parameters[] = {&gather.args};
  const auto launch = [&](unsigned int blocks, unsigned int threads, void** with) {
    return gpu.api.cuLaunchKernel(gather.function, blocks, 1, 1, threads, 1, 1, 0, gather.stream,
                                  with, nullptr);
  };
  CHECK(launch(0, 32, static_cast<void**>(parameters)) == cuda::CUDA_ERROR_INVALID_VALUE);
  CHECK(launch(1, 2048, static_cast<void**>(parameters)) == cuda::CUDA_ERROR_INVALID_VALUE);
  CHECK(launch(1, 32, nullptr) == cuda::CUDA_ERROR_INVALID_VALUE);
  REQUIRE_OK(gpu.api.cuModuleUnload(module));
  CHECK(gpu.api.cuModuleUnload(module) == cuda::CUDA_ERROR_INVALID_HANDLE);
  CHECK_OK(gather.launch());  // its own module is there
}

TEST_CASE("A device fails when a test says so, and for all processes by a file") {
  const FakeGpu gpu({.devices = 2});
  const cuda::CUstream stream = gpu.stream();
  SECTION("by the control") {
    gpu.machine->fault(0, cuda::CUDA_ERROR_ECC_UNCORRECTABLE);
  }
  SECTION("by a file") {
    FILE* file = std::fopen((gpu.machine.directory() + "/fault.0").c_str(), "w");
    REQUIRE(file != nullptr);
    std::fputs("214", file);
    std::fclose(file);
  }
  SECTION("in a stream's work") {
    gpu.machine->fail("(device)", 2, cuda::CUDA_ERROR_ECC_UNCORRECTABLE);
    const cuda::CUdeviceptr pointer = gpu.alloc(8);
    CHECK_OK(gpu.api.cuMemsetD8Async(pointer, 1, 8, stream));
    CHECK_OK(gpu.api.cuStreamSynchronize(stream));
    (void)gpu.api.cuMemsetD8Async(pointer, 1, 8, stream);
    CHECK(soon([&] { return gpu.api.cuStreamQuery(stream) != cuda::CUDA_ERROR_NOT_READY; }));
  }
  SECTION("in a call") {
    gpu.machine->fail("cuStreamQuery", 1, cuda::CUDA_ERROR_ECC_UNCORRECTABLE);
    CHECK(gpu.api.cuStreamQuery(stream) == cuda::CUDA_ERROR_ECC_UNCORRECTABLE);
  }
  CHECK(gpu.api.cuStreamQuery(stream) == cuda::CUDA_ERROR_ECC_UNCORRECTABLE);
  REQUIRE_OK(gpu.api.cuCtxPushCurrent(gpu.retain(1)));
  CHECK_OK(gpu.api.cuStreamQuery(gpu.stream()));
}
