#include "client/cpp/src/device_export.h"

#include <fcntl.h>

#include <optional>
#include <utility>

#include "proto/kvferry/lifeline.h"

namespace kvferry::client {
namespace {

// An allocation has one handle for all of its range; the walk over a range asks for it granule by
// granule. More than this many would be 8 TiB.
constexpr uint64_t kMaxGranules = uint64_t{1} << 22;

Error bad_pointer(std::string reason, std::string message) {
  return {Code::kInvalidArgument, std::move(reason), std::move(message), "pointer", {}};
}

Error bad_size(std::string reason, std::string message) {
  return {Code::kInvalidArgument, std::move(reason), std::move(message), "bytes", {}};
}

// Attributes are of different widths, none above 64 bits.
std::optional<uint64_t> attribute(const cuda::Driver& driver, cuda::CUpointer_attribute which,
                                  uint64_t pointer) {
  uint64_t value = 0;
  const auto result = driver.api().cuPointerGetAttribute(&value, which, pointer);
  return result == cuda::CUDA_SUCCESS ? std::optional(value) : std::nullopt;
}

Error not_device(bool known) {
  return bad_pointer("POINTER_NOT_DEVICE",
                     std::string(known ? "pinned host memory" : "not memory that CUDA knows") +
                         ": host pools are made with alloc_pool, or handed over as a descriptor; "
                         "GPU pools need a pointer from cudaMalloc, cuMemMap or alloc_device_pool");
}

// A reference to the allocation behind an address, for as long as the object lives.
class Allocation {
 public:
  // Nothing where nothing is mapped.
  static Result<std::optional<Allocation>> at(const Gpu& gpu, uint64_t address) {
    cuda::CUmemGenericAllocationHandle handle = 0;
    const auto result =
        gpu.api().cuMemRetainAllocationHandle(&handle, reinterpret_cast<void*>(address));
    if (result == cuda::CUDA_SUCCESS) return std::optional(Allocation(gpu, handle));
    if (result == cuda::CUDA_ERROR_INVALID_VALUE) return std::optional<Allocation>();
    return cuda_error(gpu.driver(), result, "cuMemRetainAllocationHandle");
  }
  Allocation(Allocation&& other) noexcept
      : gpu_(other.gpu_), handle_(std::exchange(other.handle_, 0)) {}
  Allocation& operator=(Allocation&&) = delete;
  ~Allocation() {
    if (handle_ != 0) static_cast<void>(gpu_.api().cuMemRelease(handle_));
  }
  cuda::CUmemGenericAllocationHandle handle() const { return handle_; }
  // Whether the address belongs to the same one.
  Result<bool> covers(uint64_t address) const {
    const auto other = at(gpu_, address);
    if (!other) return other.error();
    return *other && (*other)->handle_ == handle_;
  }

 private:
  Allocation(const Gpu& gpu, cuda::CUmemGenericAllocationHandle handle)
      : gpu_(gpu), handle_(handle) {}
  const Gpu& gpu_;
  cuda::CUmemGenericAllocationHandle handle_;
};

struct Properties {
  unsigned int handle_types = 0;
  uint64_t granularity = 0;
};

Result<Properties> properties_of(const Gpu& gpu, const Allocation& allocation) {
  cuda::CUmemAllocationProp prop{};
  if (auto got =
          gpu.check(gpu.api().cuMemGetAllocationPropertiesFromHandle(&prop, allocation.handle()),
                    "cuMemGetAllocationPropertiesFromHandle");
      !got)
    return got.error();
  std::size_t granularity = 0;
  if (auto got = gpu.check(gpu.api().cuMemGetAllocationGranularity(
                               &granularity, &prop, cuda::CU_MEM_ALLOC_GRANULARITY_MINIMUM),
                           "cuMemGetAllocationGranularity");
      !got)
    return got.error();
  return Properties{prop.requestedHandleTypes, granularity == 0 ? 1 : granularity};
}

Error not_exportable() {
  return bad_pointer(
      "POINTER_NOT_EXPORTABLE",
      "memory mapped with cuMemMap from an allocation that asked for no shareable handle, as "
      "PyTorch's expandable_segments and sleep modes may make it: allocate the KV cache with "
      "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False or in a torch.cuda.MemPool of its own, "
      "make the allocation with CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, or use "
      "alloc_device_pool");
}

// The whole mapping of the allocation around `address`, which is a multiple of the granularity. An
// error is not taken for an end: a part that began too late would stand for other bytes.
Result<DeviceExport::Part> mapping_around(const Allocation& allocation, uint64_t address,
                                          uint64_t granularity) {
  uint64_t begin = address;
  uint64_t end = address + granularity;
  for (uint64_t n = 0; n < kMaxGranules && begin >= granularity; ++n, begin -= granularity) {
    const auto covers = allocation.covers(begin - granularity);
    if (!covers) return covers.error();
    if (!*covers) break;
  }
  for (uint64_t n = 0; n < kMaxGranules; ++n, end += granularity) {
    const auto covers = allocation.covers(end);
    if (!covers) return covers.error();
    if (!*covers) break;
  }
  return DeviceExport::Part{begin, end - begin};
}

Result<std::string> fabric_handle(const Gpu& gpu, const Allocation& allocation) {
  cuda::CUmemFabricHandle handle{};
  const auto result = gpu.api().cuMemExportToShareableHandle(&handle, allocation.handle(),
                                                             cuda::CU_MEM_HANDLE_TYPE_FABRIC, 0);
  if (result != cuda::CUDA_SUCCESS) {
    Error error = cuda_error(gpu.driver(), result, "cuMemExportToShareableHandle");
    error.field = "pointer";
    error.message +=
        "; fabric handles need an IMEX channel (kvferryctl doctor tells); memory that also allows "
        "POSIX file descriptors needs none";
    return error;
  }
  return std::string(reinterpret_cast<const char*>(handle.data), sizeof handle.data);
}

// Memory of cuMemMap: one or several allocations behind each other.
Result<DeviceExport> describe_mapped(const std::shared_ptr<const Gpu>& gpu, uint64_t pointer,
                                     uint64_t bytes) {
  DeviceExport out;
  out.gpu = gpu;
  uint64_t at = pointer;
  while (at < pointer + bytes) {
    const auto found = Allocation::at(*gpu, at);
    if (!found) return found.error();
    const std::optional<Allocation>& allocation = *found;
    if (!allocation) {
      if (at != pointer)
        return bad_size("POOL_TOO_SMALL",
                        "the mapped range ends after " + std::to_string(at - pointer) + " bytes");
      return bad_pointer("POINTER_NOT_EXPORTABLE",
                         "device memory that CUDA neither shares by IPC nor lets be exported, as "
                         "what was opened from another process: use cudaMalloc or "
                         "alloc_device_pool");
    }
    const auto properties = properties_of(*gpu, *allocation);
    if (!properties) return properties.error();
    const bool by_fd =
        (properties->handle_types & cuda::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) != 0;
    const bool by_fabric = (properties->handle_types & cuda::CU_MEM_HANDLE_TYPE_FABRIC) != 0;
    if (!by_fd && !by_fabric) return not_exportable();
    const uint64_t granule = at - at % properties->granularity;
    const auto mapping = mapping_around(*allocation, granule, properties->granularity);
    if (!mapping) return mapping.error();
    const DeviceExport::Part part = *mapping;
    if (at == pointer) {
      out.offset = pointer - part.address;
      out.kind = by_fd ? DeviceKind::kVmmFd : DeviceKind::kFabric;
    }
    if (out.kind == DeviceKind::kFabric || !by_fd) {
      if (at != pointer || part.address + part.bytes < pointer + bytes)
        return bad_size("POOL_PARTS",
                        "the range lies in several allocations that have fabric handles only: "
                        "export each as a pool of its own, or let them allow POSIX file "
                        "descriptors too");
      auto handle = fabric_handle(*gpu, *allocation);
      if (!handle) return handle.error();
      out.handle = std::move(*handle);
      return out;
    }
    if (out.parts.size() == lifeline::kMaxPoolParts)
      return bad_size("POOL_PARTS", "the range lies in more than " +
                                        std::to_string(lifeline::kMaxPoolParts) +
                                        " allocations: export it as several pools");
    out.parts.push_back(part);
    at = part.address + part.bytes;
  }
  return out;
}

Result<DeviceExport> describe_legacy(const std::shared_ptr<const Gpu>& gpu, uint64_t pointer,
                                     uint64_t bytes) {
  cuda::CUdeviceptr base = 0;
  std::size_t size = 0;
  if (auto got = gpu->check(gpu->api().cuMemGetAddressRange(&base, &size, pointer),
                            "cuMemGetAddressRange");
      !got)
    return got.error();
  if (bytes > size - (pointer - base))
    return bad_size("POOL_TOO_SMALL", "the allocation ends after " +
                                          std::to_string(size - (pointer - base)) +
                                          " bytes: tensors of several allocations are several "
                                          "pools");
  cuda::CUipcMemHandle handle{};
  if (const auto result = gpu->api().cuIpcGetMemHandle(&handle, base);
      result != cuda::CUDA_SUCCESS) {
    Error error = cuda_error(gpu->driver(), result, "cuIpcGetMemHandle");
    error.field = "pointer";
    if (result == cuda::CUDA_ERROR_NOT_SUPPORTED)
      error.message += "; this device has no CUDA IPC: use alloc_device_pool";
    return error;
  }
  DeviceExport out;
  out.kind = DeviceKind::kIpc;
  out.gpu = gpu;
  out.offset = pointer - base;
  out.handle.assign(handle.reserved, sizeof handle.reserved);
  return out;
}

}  // namespace

Result<DeviceExport> describe(Gpus& gpus, uint64_t pointer, uint64_t bytes) {
  const cuda::Driver& driver = gpus.driver();
  if (bytes == 0 || pointer + bytes < pointer)
    return bad_size("SIZE_INVALID", "not a size that memory can have");
  const auto managed = attribute(driver, cuda::CU_POINTER_ATTRIBUTE_IS_MANAGED, pointer);
  const auto type = attribute(driver, cuda::CU_POINTER_ATTRIBUTE_MEMORY_TYPE, pointer);
  if (managed.value_or(0) != 0)
    return bad_pointer("POINTER_MANAGED",
                       "managed memory (cudaMallocManaged) cannot be shared between processes: "
                       "allocate it with cudaMalloc or alloc_device_pool");
  if (!type || *type != cuda::CU_MEMORYTYPE_DEVICE) return not_device(type.has_value());
  const auto ordinal = attribute(driver, cuda::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, pointer);
  if (!ordinal) return not_device(false);
  auto gpu = gpus.gpu(static_cast<int>(static_cast<uint32_t>(*ordinal)));
  if (!gpu) return gpu.error();
  const Gpu::Current current(**gpu);
  if (!current) return current.error();
  // A driver that does not know the attribute has no such memory.
  if (attribute(driver, cuda::CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE, pointer).value_or(0) != 0)
    return bad_pointer("POINTER_STREAM_ORDERED",
                       "memory of a stream-ordered allocator (cudaMallocAsync, PyTorch's "
                       "backend:cudaMallocAsync) has no handle for other processes: allocate it "
                       "with cudaMalloc or alloc_device_pool");
  const auto legacy =
      attribute(driver, cuda::CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, pointer);
  if (legacy.value_or(0) != 0) return describe_legacy(*gpu, pointer, bytes);
  return describe_mapped(*gpu, pointer, bytes);
}

Result<UniqueFd> export_part(const Gpu& gpu, const DeviceExport::Part& part) {
  const Gpu::Current current(gpu);
  if (!current) return current.error();
  const auto found = Allocation::at(gpu, part.address);
  if (!found) return found.error();
  const std::optional<Allocation>& allocation = *found;
  if (!allocation)
    return bad_pointer("POINTER_NOT_EXPORTABLE", "the memory has been unmapped meanwhile");
  int fd = -1;
  if (auto exported = gpu.check(
          gpu.api().cuMemExportToShareableHandle(&fd, allocation->handle(),
                                                 cuda::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
          "cuMemExportToShareableHandle");
      !exported)
    return exported.error();
  UniqueFd out(fd);
  ::fcntl(out.get(), F_SETFD, FD_CLOEXEC);
  return out;
}

}  // namespace kvferry::client
