#include "tests/gpu/gpu.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <vector>

namespace kvferry::testing {
namespace {

std::string library() {
  const char* named = std::getenv("KVFERRY_CUDA_DRIVER");
  return named != nullptr && *named != 0 ? named : cuda::Driver::kDefaultLibrary;
}

}  // namespace

std::string Gpu::why_not() {
  auto driver = cuda::Driver::load(library());
  if (!driver) return driver.error().to_string();
  int count = 0;
  if (const auto result = (*driver)->api().cuDeviceGetCount(&count); result != cuda::CUDA_SUCCESS)
    return (*driver)->error(result, "cuDeviceGetCount").to_string();
  return count > 0 ? "" : "the driver has no device";
}

void Gpu::check(cuda::CUresult result, const char* call) const {
  if (result != cuda::CUDA_SUCCESS)
    throw std::runtime_error(driver_->error(result, call).to_string());
}

Gpu::Gpu(int ordinal) {
  auto driver = cuda::Driver::load(library());
  if (!driver) throw std::runtime_error(driver.error().to_string());
  driver_ = std::move(*driver);
  check(api().cuDeviceGet(&device_, ordinal), "cuDeviceGet");
  char name[256] = {};
  check(api().cuDeviceGetName(name, sizeof name - 1, device_), "cuDeviceGetName");
  name_ = name;
  int count = 0;
  check(api().cuDeviceGetAttribute(&count, cuda::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device_),
        "cuDeviceGetAttribute");
  multiprocessors_ = static_cast<uint32_t>(std::max(count, 1));
  check(api().cuDevicePrimaryCtxRetain(&context_, device_), "cuDevicePrimaryCtxRetain");
  check(api().cuCtxSetCurrent(context_), "cuCtxSetCurrent");
  check(api().cuStreamCreate(&stream_, cuda::CU_STREAM_NON_BLOCKING), "cuStreamCreate");
}

Gpu::~Gpu() {
  if (context_ == nullptr) return;
  if (module_ != nullptr) (void)api().cuModuleUnload(module_);
  if (stream_ != nullptr) (void)api().cuStreamDestroy(stream_);
  (void)api().cuDevicePrimaryCtxRelease(device_);
}

void Gpu::load_kernels() {
  check(api().cuModuleLoadData(&module_, kernels::kernel_image().data()),
        kernels::kernels_built() ? "cuModuleLoadData"
                                 : "cuModuleLoadData (this build has no kernels: it was made "
                                   "without a CUDA compiler)");
}

void Gpu::launch(const kernels::CopyArgs& args, kernels::FlatMemory flat_in) {
  const kernels::LaunchShape shape = kernels::launch_shape(args, multiprocessors_, flat_in);
  if (shape.blocks == 0) return;
  cuda::CUfunction function = nullptr;
  check(api().cuModuleGetFunction(&function, module_, kernels::kernel_name(args.kind)),
        "cuModuleGetFunction");
  kernels::CopyArgs passed = args;
  void* parameters[] = {&passed};
  check(api().cuLaunchKernel(function, shape.blocks, 1, 1, shape.threads, 1, 1, 0, stream_,
                             parameters, nullptr),
        "cuLaunchKernel");
}

void Gpu::synchronize() {
  check(api().cuStreamSynchronize(stream_), "cuStreamSynchronize");
}

DeviceBytes::DeviceBytes(Gpu& gpu, uint64_t bytes) : gpu_(gpu), bytes_(bytes) {
  gpu_.check(gpu_.api().cuMemAlloc(&address_, std::max<uint64_t>(bytes, 1)), "cuMemAlloc");
}

DeviceBytes::~DeviceBytes() {
  (void)gpu_.api().cuMemFree(address_);
}

void DeviceBytes::put(const void* from) {
  if (bytes_ == 0) return;
  gpu_.check(gpu_.api().cuMemcpyHtoDAsync(address_, from, bytes_, gpu_.stream()),
             "cuMemcpyHtoDAsync");
  gpu_.synchronize();
}

void DeviceBytes::get(void* to) const {
  if (bytes_ == 0) return;
  gpu_.check(gpu_.api().cuMemcpyDtoHAsync(to, address_, bytes_, gpu_.stream()),
             "cuMemcpyDtoHAsync");
  gpu_.synchronize();
}

PinnedBytes::PinnedBytes(Gpu& gpu, uint64_t bytes) : gpu_(gpu), bytes_(bytes) {
  void* const memory =
      ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("mmap failed");
  data_ = static_cast<std::byte*>(memory);
  gpu_.check(
      gpu_.api().cuMemHostRegister(
          data_, bytes_, cuda::CU_MEMHOSTREGISTER_PORTABLE | cuda::CU_MEMHOSTREGISTER_DEVICEMAP),
      "cuMemHostRegister");
  gpu_.check(gpu_.api().cuMemHostGetDevicePointer(&address_, data_, 0),
             "cuMemHostGetDevicePointer");
}

PinnedBytes::~PinnedBytes() {
  (void)gpu_.api().cuMemHostUnregister(data_);
  ::munmap(data_, bytes_);
}

DevicePlan::DevicePlan(Gpu& gpu, const kernels::CopyPlan& plan,
                       std::span<const uint64_t> pool_bases) {
  const auto packed = kernels::PackedPlan::make(plan, pool_bases);
  if (!packed) throw std::runtime_error("the plan cannot be packed");
  image_ = std::make_unique<DeviceBytes>(gpu, packed->image().size());
  image_->put(packed->image().data());
  view_ = packed->view_at(image_->address());
}

}  // namespace kvferry::testing
