// Every call may fail: a whole use of the driver is repeated with the first, second, third ... call
// failing, and what it undoes must be all that it did. That shows the counts of the fake to be
// right, and that it does nothing where it says that it failed.
#include <unistd.h>

#include <functional>

#include "tests/unit/fake_cuda_peer_process.h"
#include "tests/unit/fake_cuda_support.h"

using namespace kvferry;

namespace {

// Undoes in reverse what was done.
class Undo {
 public:
  ~Undo() {
    for (auto step = steps_.rbegin(); step != steps_.rend(); ++step) (*step)();
  }
  void add(std::function<void()> step) { steps_.push_back(std::move(step)); }

 private:
  std::vector<std::function<void()>> steps_;
};

#define RETURN_IF_FAILED(expression)                                              \
  do {                                                                            \
    if (const cuda::CUresult r = (expression); r != cuda::CUDA_SUCCESS) return r; \
  } while (false)

// One use of nearly everything: create, export, import, copy, launch.
class Scenario {
 public:
  Scenario(const cuda::Api& with, const PeerExports& exports, int fd)
      : api_(with), exports_(exports), fd_(fd) {}

  cuda::CUresult run() {
    const auto undo_all = std::make_unique<Undo>();
    undo_ = undo_all.get();
    RETURN_IF_FAILED(api_.cuInit(0));
    RETURN_IF_FAILED(context());
    RETURN_IF_FAILED(memory());
    RETURN_IF_FAILED(export_and_import());
    RETURN_IF_FAILED(from_peer());
    RETURN_IF_FAILED(host());
    RETURN_IF_FAILED(launch());
    return events();
  }

 private:
  cuda::CUresult context() {
    cuda::CUcontext context = nullptr;
    RETURN_IF_FAILED(api_.cuDevicePrimaryCtxRetain(&context, 0));
    undo_->add([this] { (void)api_.cuDevicePrimaryCtxRelease(0); });
    RETURN_IF_FAILED(api_.cuCtxPushCurrent(context));
    undo_->add([this] { (void)api_.cuCtxPopCurrent(nullptr); });
    RETURN_IF_FAILED(api_.cuStreamCreate(&stream_, cuda::CU_STREAM_NON_BLOCKING));
    undo_->add([this] { (void)api_.cuStreamDestroy(stream_); });
    return cuda::CUDA_SUCCESS;
  }

  cuda::CUresult alloc(cuda::CUdeviceptr& pointer, uint64_t bytes) {
    RETURN_IF_FAILED(api_.cuMemAlloc(&pointer, bytes));
    undo_->add([this, pointer] { (void)api_.cuMemFree(pointer); });
    return cuda::CUDA_SUCCESS;
  }
  cuda::CUresult memory() {
    RETURN_IF_FAILED(alloc(pool_, 64 << 10));
    RETURN_IF_FAILED(alloc(flat_, 4096));
    RETURN_IF_FAILED(alloc(plan_, 4096));
    cuda::CUdeviceptr base = 0;
    RETURN_IF_FAILED(api_.cuMemGetAddressRange(&base, nullptr, pool_ + 5));
    cuda::CUipcMemHandle handle{};
    RETURN_IF_FAILED(api_.cuIpcGetMemHandle(&handle, pool_));
    return api_.cuMemsetD8Async(pool_, 5, 64 << 10, stream_);
  }

  cuda::CUresult map(cuda::CUmemGenericAllocationHandle handle, uint64_t bytes) {
    undo_->add([this, handle] { (void)api_.cuMemRelease(handle); });
    cuda::CUdeviceptr range = 0;
    RETURN_IF_FAILED(api_.cuMemAddressReserve(&range, bytes, 0, 0, 0));
    undo_->add([=, this] { (void)api_.cuMemAddressFree(range, bytes); });
    RETURN_IF_FAILED(api_.cuMemMap(range, bytes, 0, handle, 0));
    undo_->add([=, this] { (void)api_.cuMemUnmap(range, bytes); });
    const auto access = read_write(0);
    return api_.cuMemSetAccess(range, bytes, &access, 1);
  }
  cuda::CUresult export_and_import() {
    const auto properties = device_memory(0, cuda::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    cuda::CUmemGenericAllocationHandle made = 0;
    RETURN_IF_FAILED(api_.cuMemCreate(&made, 2 * kMiB, &properties, 0));
    RETURN_IF_FAILED(map(made, 2 * kMiB));
    int fd = -1;
    RETURN_IF_FAILED(api_.cuMemExportToShareableHandle(
        &fd, made, cuda::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0));
    undo_->add([fd] { ::close(fd); });
    return import(fd, 2 * kMiB);
  }
  cuda::CUresult import(int fd, uint64_t bytes) {
    cuda::CUmemGenericAllocationHandle imported = 0;
    RETURN_IF_FAILED(api_.cuMemImportFromShareableHandle(
        &imported, reinterpret_cast<void*>(static_cast<intptr_t>(fd)),
        cuda::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR));
    return map(imported, bytes);
  }

  cuda::CUresult from_peer() {
    cuda::CUdeviceptr opened = 0;
    RETURN_IF_FAILED(api_.cuIpcOpenMemHandle(&opened, exports_.memory, 1));
    undo_->add([this, opened] { (void)api_.cuIpcCloseMemHandle(opened); });
    cuda::CUevent event = nullptr;
    RETURN_IF_FAILED(api_.cuIpcOpenEventHandle(&event, exports_.event));
    undo_->add([this, event] { (void)api_.cuEventDestroy(event); });
    return import(fd_, kPeerVmmBytes);
  }

  cuda::CUresult host() {
    void* const page = page_.data();
    RETURN_IF_FAILED(
        api_.cuMemHostRegister(page, page_.size(), cuda::CU_MEMHOSTREGISTER_DEVICEMAP));
    undo_->add([=, this] { (void)api_.cuMemHostUnregister(page); });
    cuda::CUdeviceptr address = 0;
    RETURN_IF_FAILED(api_.cuMemHostGetDevicePointer(&address, page, 0));
    // What is undone above must not be in use.
    undo_->add([this] { (void)api_.cuStreamSynchronize(stream_); });
    return api_.cuMemcpyDtoDAsync(address, pool_, page_.size(), stream_);
  }

  cuda::CUresult launch() {
    cuda::CUmodule module = nullptr;
    cuda::CUfunction function = nullptr;
    RETURN_IF_FAILED(api_.cuModuleLoadData(&module, kernels::kernel_image().data()));
    undo_->add([=, this] { (void)api_.cuModuleUnload(module); });
    constexpr auto kKind = kernels::CopyKind::kGather;
    RETURN_IF_FAILED(api_.cuModuleGetFunction(&function, module, kernels::kernel_name(kKind)));
    const std::vector<uint64_t> bases = {pool_};
    const auto packed = kernels::PackedPlan::make(token_plan(64, 48, 64), bases).value();
    RETURN_IF_FAILED(
        api_.cuMemcpyHtoDAsync(plan_, packed.image().data(), packed.image().size(), stream_));
    kernels::CopyArgs args{};
    args.plan = packed.view_at(plan_);
    args.bytes = packed.bytes();
    args.flat = flat_;
    args.kind = kKind;
    const auto shape = kernels::launch_shape(args, 4);
    void* parameters[] = {&args};
    return api_.cuLaunchKernel(function, shape.blocks, 1, 1, shape.threads, 1, 1, 0, stream_,
                               static_cast<void**>(parameters), nullptr);
  }

  cuda::CUresult events() {
    cuda::CUevent event = nullptr;
    RETURN_IF_FAILED(api_.cuEventCreate(&event, cuda::CU_EVENT_DISABLE_TIMING));
    undo_->add([=, this] { (void)api_.cuEventDestroy(event); });
    RETURN_IF_FAILED(api_.cuEventRecord(event, stream_));
    RETURN_IF_FAILED(api_.cuEventSynchronize(event));
    uint64_t word = 0;
    RETURN_IF_FAILED(api_.cuMemcpyDtoHAsync(&word, flat_, sizeof word, stream_));
    return word == 0x0505050505050505 ? cuda::CUDA_SUCCESS : cuda::CUDA_ERROR_UNKNOWN;
  }

  const cuda::Api& api_;
  const PeerExports& exports_;
  const int fd_;
  Undo* undo_ = nullptr;
  cuda::CUstream stream_ = nullptr;
  cuda::CUdeviceptr pool_ = 0;
  cuda::CUdeviceptr flat_ = 0;
  cuda::CUdeviceptr plan_ = 0;
  std::vector<std::byte> page_ = std::vector<std::byte>(4096);
};

}  // namespace

TEST_CASE("Whichever call fails, what was done can be undone and nothing is left") {
  const fake_cuda::Machine machine(KVFERRY_FAKE_CUDA_LIBRARY, {.delay_us = 1});
  const auto driver = cuda::Driver::load(KVFERRY_FAKE_CUDA_LIBRARY).value();
  Peer peer;
  const uint64_t of_peer = machine->device_bytes(0);
  const auto run = [&] { return Scenario(driver->api(), peer.exports, peer.fd).run(); };
  machine->reset();
  REQUIRE(run() == cuda::CUDA_SUCCESS);
  const uint64_t calls = machine->calls();
  CHECK(calls > 50);
  for (uint64_t n = 1; n <= calls; ++n) {
    // An ordinary error and one that ends the context; that destroys it at its release, and VMM
    // memory, which is no context's, is given back as ever.
    for (const auto code : {cuda::CUDA_ERROR_OUT_OF_MEMORY, cuda::CUDA_ERROR_ECC_UNCORRECTABLE}) {
      machine->reset();
      machine->fail("", n, code);
      const cuda::CUresult result = run();
      INFO("call " << n << ", error " << code << ", result " << result << ": "
                   << machine->live().to_string());
      if (code == cuda::CUDA_ERROR_OUT_OF_MEMORY) {
        CHECK(machine->live().total() == 0);
      } else {
        // A release or a VMM call that failed so was not done.
        CHECK(machine->live().total() <= 2);
      }
      if (machine->live().total() == 0) CHECK(machine->device_bytes(0) == of_peer);
      CHECK(machine->calls() >= n);
    }
  }
}
