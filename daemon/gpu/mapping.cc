#include "daemon/gpu/mapping.h"

#include <iterator>

#include "daemon/base/check.h"
#include "daemon/gpu/closing.h"

namespace kvferry::gpu {
namespace {

// Imported VMM memory between its import and its mapping, which holds it by itself.
class Allocation {
 public:
  Allocation(const Device& device, cuda::CUmemGenericAllocationHandle handle)
      : device_(device), handle_(handle) {}
  ~Allocation() { (void)device_.check(device_.api().cuMemRelease(handle_), "cuMemRelease"); }
  Allocation(const Allocation&) = delete;
  Allocation& operator=(const Allocation&) = delete;
  cuda::CUmemGenericAllocationHandle get() const { return handle_; }

 private:
  const Device& device_;
  const cuda::CUmemGenericAllocationHandle handle_;
};

tl::unexpected<Error> wrong_device(const Device& device, const std::string& field) {
  return invalid(field, "POOL_WRONG_DEVICE",
                 "the memory is not of the device " + to_string(device.facts().uuid));
}

}  // namespace

tl::unexpected<Error> import_refused(const Device& device, cuda::CUresult result,
                                     std::string_view call, const std::string& field) {
  Error error = device.check(result, call).error();
  error.field = field;
  if (error.code != Code::kInternal) return tl::unexpected<Error>(std::move(error));
  return invalid(field, "POOL_IMPORT_FAILED",
                 "the driver refused the memory: " + error.message +
                     "; kvferryctl doctor tells what this machine can share");
}

// ---- CUDA IPC ----------------------------------------------------------------------------------

Result<Mapping> Mapping::open_ipc(std::shared_ptr<const Device> device,
                                  const cuda::CUipcMemHandle& handle, const std::string& field) {
  const cuda::Api& api = device->api();
  const Device::Current current(*device);
  KVFERRY_RETURN_IF_ERROR(current.status());
  cuda::CUdeviceptr base = 0;
  const cuda::CUresult opened =
      api.cuIpcOpenMemHandle(&base, handle, cuda::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
  if (opened != cuda::CUDA_SUCCESS)
    return import_refused(*device, opened, "cuIpcOpenMemHandle", field);
  Mapping out;
  out.device_ = device;
  out.ipc_ = true;
  out.base_ = base;

  // Memory of another device opens too where there is peer access, but is not what was told.
  int ordinal = -1;
  const cuda::CUresult where =
      api.cuPointerGetAttribute(&ordinal, cuda::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, base);
  KVFERRY_RETURN_IF_ERROR(device->check(where, "cuPointerGetAttribute"));
  if (ordinal != device->facts().ordinal) return wrong_device(*device, field);
  // The handle names a whole allocation. Its size is the driver's word, not the worker's.
  cuda::CUdeviceptr start = 0;
  std::size_t bytes = 0;
  KVFERRY_RETURN_IF_ERROR(
      device->check(api.cuMemGetAddressRange(&start, &bytes, base), "cuMemGetAddressRange"));
  if (start != base)
    return invalid(field, "POOL_IMPORT_FAILED",
                   "the handle does not name a whole allocation: CUDA puts small ones together, so "
                   "allocate a multiple of 2 MiB");
  out.bytes_ = bytes;
  return out;
}

// ---- VMM ---------------------------------------------------------------------------------------

Result<Mapping> Mapping::reserve(std::shared_ptr<const Device> device, uint64_t bytes) {
  const Device::Current current(*device);
  KVFERRY_RETURN_IF_ERROR(current.status());
  cuda::CUdeviceptr base = 0;
  KVFERRY_RETURN_IF_ERROR(device->check(device->api().cuMemAddressReserve(&base, bytes, 0, 0, 0),
                                        "cuMemAddressReserve"));
  Mapping out;
  out.device_ = std::move(device);
  out.base_ = base;
  out.bytes_ = bytes;
  return out;
}

Status Mapping::add(void* handle, cuda::CUmemAllocationHandleType type, uint64_t bytes,
                    const std::string& field, MemoryHome home) {
  const cuda::Api& api = device_->api();
  const Device::Current current(*device_);
  KVFERRY_RETURN_IF_ERROR(current.status());
  cuda::CUmemGenericAllocationHandle imported = 0;
  const cuda::CUresult import = api.cuMemImportFromShareableHandle(&imported, handle, type);
  if (import != cuda::CUDA_SUCCESS)
    return import_refused(*device_, import, "cuMemImportFromShareableHandle", field);
  const Allocation allocation(*device_, imported);
  cuda::CUmemAllocationProp properties{};
  KVFERRY_RETURN_IF_ERROR(
      device_->check(api.cuMemGetAllocationPropertiesFromHandle(&properties, allocation.get()),
                     "cuMemGetAllocationPropertiesFromHandle"));
  if (home == MemoryHome::kDevice &&
      (properties.location.type != cuda::CU_MEM_LOCATION_TYPE_DEVICE ||
       properties.location.id != device_->facts().ordinal))
    return wrong_device(*device_, field);
  // Larger than the allocation, it is refused: so the size that was told need not be believed.
  const cuda::CUresult mapped = map_next(allocation.get(), bytes);
  if (mapped != cuda::CUDA_SUCCESS) return import_refused(*device_, mapped, "cuMemMap", field);
  return {};
}

Status Mapping::map(cuda::CUmemGenericAllocationHandle allocation, uint64_t bytes) {
  const Device::Current current(*device_);
  KVFERRY_RETURN_IF_ERROR(current.status());
  return device_->check(map_next(allocation, bytes), "cuMemMap");
}

cuda::CUresult Mapping::map_next(cuda::CUmemGenericAllocationHandle allocation, uint64_t bytes) {
  KVFERRY_CHECK(bytes <= bytes_ - filled_, "a part lies in its range");
  const cuda::CUresult result = device_->api().cuMemMap(base_ + filled_, bytes, 0, allocation, 0);
  if (result != cuda::CUDA_SUCCESS) return result;
  mapped_.emplace_back(base_ + filled_, bytes);
  filled_ += bytes;
  return result;
}

Status Mapping::open_access(const std::vector<std::shared_ptr<const Device>>& devices) {
  std::vector<cuda::CUmemAccessDesc> access;
  for (const auto& device : devices) {
    if (device->down() || !device->reaches(*device_)) continue;
    cuda::CUmemAccessDesc& entry = access.emplace_back();
    entry.location.type = cuda::CU_MEM_LOCATION_TYPE_DEVICE;
    entry.location.id = device->facts().ordinal;
    entry.flags = cuda::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  }
  const Device::Current current(*device_);
  KVFERRY_RETURN_IF_ERROR(current.status());
  return device_->check(device_->api().cuMemSetAccess(base_, filled_, access.data(), access.size()),
                        "cuMemSetAccess");
}

uint32_t Mapping::close() {
  const std::shared_ptr<const Device> device = std::exchange(device_, nullptr);
  if (device == nullptr) return 0;
  const cuda::Api& api = device->api();
  uint32_t refused = 0;
  const auto count = [&](cuda::CUresult result, std::string_view call) {
    if (!device->check(result, call)) ++refused;
  };
  const Closing current(*device);
  if (!current.ok()) return 1;
  if (ipc_) {
    count(api.cuIpcCloseMemHandle(base_), "cuIpcCloseMemHandle");
    return refused;
  }
  for (const auto& [address, bytes] : mapped_) count(api.cuMemUnmap(address, bytes), "cuMemUnmap");
  mapped_.clear();
  count(api.cuMemAddressFree(base_, bytes_), "cuMemAddressFree");
  return refused;
}

}  // namespace kvferry::gpu
