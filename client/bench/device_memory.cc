#include "client/bench/device_memory.h"

#include <cstdlib>
#include <utility>

namespace kvferry::bench {
namespace {

constexpr uint64_t kBefore = 64 * 1024 + 256;  // of an allocation, ahead of the pool

}  // namespace

client::Status DeviceMemory::check(cuda::CUresult result, const char* call) const {
  if (result == cuda::CUDA_SUCCESS) return {};
  return client::Error{
      client::Code::kInternal, "CUDA", driver_->error(result, call).to_string(), {}};
}

client::Status DeviceMemory::open(int device) {
  const char* const library = std::getenv("KVFERRY_CUDA_DRIVER");
  auto driver = cuda::Driver::load(library != nullptr ? library : cuda::Driver::kDefaultLibrary);
  if (!driver)
    return client::Error{client::Code::kInternal, "CUDA", driver.error().to_string(), {}};
  driver_ = std::move(*driver);
  const cuda::Api& api = driver_->api();
  if (auto s = check(api.cuDeviceGet(&device_, device), "cuDeviceGet"); !s) return s;
  char name[256] = {};
  if (auto s = check(api.cuDeviceGetName(name, sizeof name - 1, device_), "cuDeviceGetName"); !s)
    return s;
  description_ = std::string(name) + ", driver of CUDA " + driver_->version_text();
  if (auto s = check(api.cuDevicePrimaryCtxRetain(&context_, device_), "cuDevicePrimaryCtxRetain");
      !s)
    return s;
  if (auto s = check(api.cuCtxSetCurrent(context_), "cuCtxSetCurrent"); !s) return s;
  return check(api.cuStreamCreate(&stream_, cuda::CU_STREAM_NON_BLOCKING), "cuStreamCreate");
}

client::Result<std::unique_ptr<DeviceMemory>> DeviceMemory::make(client::Client& client,
                                                                 const std::string& name,
                                                                 MemoryKind kind, uint64_t bytes,
                                                                 int device) {
  std::unique_ptr<DeviceMemory> memory(new DeviceMemory);
  memory->bytes_ = bytes;
  if (auto opened = memory->open(device); !opened) return opened.error();
  if (kind == MemoryKind::kVmm) {
    auto pool = client.alloc_device_pool(name, bytes, device);
    if (!pool) return pool.error();
    memory->address_ = pool->address;
    return memory;
  }
  const cuda::Api& api = memory->driver_->api();
  if (auto s = memory->check(api.cuMemAlloc(&memory->allocation_, kBefore + bytes), "cuMemAlloc");
      !s)
    return s.error();
  memory->address_ = memory->allocation_ + kBefore;
  const auto* const pointer =
      reinterpret_cast<const void*>(static_cast<uintptr_t>(memory->address_));
  if (auto exported = client.export_pool(name, pointer, bytes); !exported) return exported.error();
  return memory;
}

DeviceMemory::~DeviceMemory() {
  if (context_ == nullptr) return;
  const cuda::Api& api = driver_->api();
  (void)api.cuCtxSetCurrent(context_);
  if (event_ != nullptr) (void)api.cuEventDestroy(event_);
  if (stream_ != nullptr) (void)api.cuStreamDestroy(stream_);
  if (allocation_ != 0) (void)api.cuMemFree(allocation_);
  (void)api.cuDevicePrimaryCtxRelease(device_);
}

client::Status DeviceMemory::upload(const std::byte* from) {
  const cuda::Api& api = driver_->api();
  if (auto s = check(api.cuCtxSetCurrent(context_), "cuCtxSetCurrent"); !s) return s;
  if (auto s = check(api.cuMemcpyHtoDAsync(address_, from, bytes_, stream_), "cuMemcpyHtoDAsync");
      !s)
    return s;
  return check(api.cuStreamSynchronize(stream_), "cuStreamSynchronize");
}

client::Status DeviceMemory::download(std::byte* to) {
  const cuda::Api& api = driver_->api();
  if (auto s = check(api.cuCtxSetCurrent(context_), "cuCtxSetCurrent"); !s) return s;
  if (auto s = check(api.cuMemcpyDtoHAsync(to, address_, bytes_, stream_), "cuMemcpyDtoHAsync"); !s)
    return s;
  return check(api.cuStreamSynchronize(stream_), "cuStreamSynchronize");
}

client::Result<RankPool> RankPool::make(client::Client& client, MemoryKind kind, uint64_t bytes,
                                        int device) {
  RankPool pool;
  if (kind == MemoryKind::kHost) {
    auto memory = client.alloc_pool("kv", bytes);
    if (!memory) return memory.error();
    pool.data_ = memory->data;
    return pool;
  }
  auto memory = DeviceMemory::make(client, "kv", kind, bytes, device);
  if (!memory) return memory.error();
  pool.device_ = std::move(*memory);
  pool.copy_.resize(bytes);
  pool.data_ = pool.copy_.data();
  return pool;
}

client::Result<std::string> DeviceMemory::record_event(client::Client& client) {
  const cuda::Api& api = driver_->api();
  if (auto s = check(api.cuCtxSetCurrent(context_), "cuCtxSetCurrent"); !s) return s.error();
  if (event_ == nullptr) {
    if (auto s = check(
            api.cuEventCreate(&event_, cuda::CU_EVENT_INTERPROCESS | cuda::CU_EVENT_DISABLE_TIMING),
            "cuEventCreate");
        !s)
      return s.error();
  }
  // Writes what is there already.
  cuda::CUdeviceptr last = address_ + bytes_ - 1;
  if (auto s = check(api.cuMemcpyDtoDAsync(last, last, 1, stream_), "cuMemcpyDtoDAsync"); !s)
    return s.error();
  if (auto s = check(api.cuEventRecord(event_, stream_), "cuEventRecord"); !s) return s.error();
  return client.export_event(event_);
}

}  // namespace kvferry::bench
