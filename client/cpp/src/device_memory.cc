#include "client/cpp/src/device_memory.h"

namespace kvferry::client {
namespace {

cuda::CUmemAllocationProp properties_for(const Gpu& gpu, cuda::CUmemAllocationHandleType handles) {
  cuda::CUmemAllocationProp prop{};
  prop.type = cuda::CU_MEM_ALLOCATION_TYPE_PINNED;
  prop.requestedHandleTypes = handles;
  prop.location = {cuda::CU_MEM_LOCATION_TYPE_DEVICE, gpu.handle()};
  if (gpu.has(cuda::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED))
    prop.allocFlags.gpuDirectRDMACapable = 1;
  return prop;
}

}  // namespace

Result<std::unique_ptr<DeviceMemory>> DeviceMemory::allocate(
    std::shared_ptr<const Gpu> gpu, uint64_t bytes, Gpu::Deadline deadline,
    cuda::CUmemAllocationHandleType handles) {
  const auto shared_so = handles == kFileDescriptor
                             ? cuda::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED
                             : cuda::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED;
  if (!gpu->has(cuda::CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED) ||
      !gpu->has(shared_so))
    return Error{Code::kUnimplemented,
                 "VMM_UNSUPPORTED",
                 "the device has no memory that is shared so: allocate with cudaMalloc and hand it "
                 "over with export_pool",
                 "device",
                 {}};
  std::unique_ptr<DeviceMemory> memory(new DeviceMemory(std::move(gpu)));
  if (auto made = memory->make(bytes, deadline, handles); !made) {
    // What is still being cleared must stay mapped: unmapping it would be a fault on the device.
    if (made.error().reason == "GPU_TIMEOUT") static_cast<void>(memory.release());
    return made.error();
  }
  return memory;
}

Status DeviceMemory::make(uint64_t bytes, Gpu::Deadline deadline,
                          cuda::CUmemAllocationHandleType handles) {
  const Gpu::Current current(*gpu_);
  if (!current) return current.error();
  const cuda::Api& api = gpu_->api();
  const cuda::CUmemAllocationProp prop = properties_for(*gpu_, handles);
  std::size_t granularity = 0;
  if (auto got = gpu_->check(api.cuMemGetAllocationGranularity(
                                 &granularity, &prop, cuda::CU_MEM_ALLOC_GRANULARITY_MINIMUM),
                             "cuMemGetAllocationGranularity");
      !got)
    return got;
  const uint64_t rounded = (bytes + granularity - 1) / granularity * granularity;
  if (auto created = gpu_->check(api.cuMemCreate(&handle_, rounded, &prop, 0), "cuMemCreate");
      !created) {
    handle_ = 0;
    return created;
  }
  bytes_ = rounded;
  cuda::CUdeviceptr address = 0;
  if (auto reserved =
          gpu_->check(api.cuMemAddressReserve(&address, bytes_, 0, 0, 0), "cuMemAddressReserve");
      !reserved)
    return reserved;
  address_ = address;
  if (auto mapped = gpu_->check(api.cuMemMap(address_, bytes_, 0, handle_, 0), "cuMemMap"); !mapped)
    return mapped;
  mapped_ = true;
  const cuda::CUmemAccessDesc access{prop.location, cuda::CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  if (auto set = gpu_->check(api.cuMemSetAccess(address_, bytes_, &access, 1), "cuMemSetAccess");
      !set)
    return set;
  return gpu_->clear(address_, bytes_, deadline);
}

DeviceMemory::~DeviceMemory() {
  // A process that is ending may have lost the driver by now: errors mean nothing here.
  const Gpu::Current current(*gpu_);
  if (!current) return;
  const cuda::Api& api = gpu_->api();
  if (mapped_) static_cast<void>(api.cuMemUnmap(address_, bytes_));
  if (address_ != 0) static_cast<void>(api.cuMemAddressFree(address_, bytes_));
  if (handle_ != 0) static_cast<void>(api.cuMemRelease(handle_));
}

}  // namespace kvferry::client
