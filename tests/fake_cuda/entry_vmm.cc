// Virtual memory management: allocations, reserved addresses, mappings, access, and handles that
// other processes can import.
#include <cstring>

#include "tests/fake_cuda/entry.h"

namespace kvferry::fake_cuda {
namespace {

constexpr unsigned int kShareable =
    CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR | CU_MEM_HANDLE_TYPE_FABRIC;

// What a fabric handle's bytes say.
struct FabricHandle {
  uint64_t magic;
  uint64_t id;
  uint64_t check;
};
constexpr uint64_t kFabricMagic = 0x6b76'6661'6272'6963;

CUresult check_properties(const Call& c, const CUmemAllocationProp* properties) {
  const Config& config = c.state.config();
  if (!config.has("vmm")) return CUDA_ERROR_NOT_SUPPORTED;
  if (properties == nullptr || properties->type != CU_MEM_ALLOCATION_TYPE_PINNED ||
      properties->win32HandleMetaData != nullptr) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (properties->location.type != CU_MEM_LOCATION_TYPE_DEVICE) return CUDA_ERROR_NOT_SUPPORTED;
  if (c.state.machine_device(properties->location.id) < 0) return CUDA_ERROR_INVALID_DEVICE;
  const auto types = static_cast<unsigned int>(properties->requestedHandleTypes);
  if ((types & ~kShareable) != 0) return CUDA_ERROR_NOT_SUPPORTED;
  if ((types & CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) != 0 && !config.has("fd")) {
    return CUDA_ERROR_NOT_SUPPORTED;
  }
  if ((types & CU_MEM_HANDLE_TYPE_FABRIC) != 0) {
    if (!config.has("fabric")) return CUDA_ERROR_NOT_SUPPORTED;
    // The device can, but there is no channel that this user may use.
    if (!config.has("imex")) return CUDA_ERROR_NOT_PERMITTED;
  }
  if (properties->allocFlags.gpuDirectRDMACapable != 0 && !config.has("rdma")) {
    return CUDA_ERROR_NOT_SUPPORTED;
  }
  return CUDA_SUCCESS;
}

uint64_t granularity_of(const Config& config, unsigned int handle_types) {
  return (handle_types & CU_MEM_HANDLE_TYPE_FABRIC) != 0 ? config.fabric_granularity
                                                         : config.granularity;
}

CUmemGenericAllocationHandle add_handle(State& all, std::shared_ptr<Allocation> allocation) {
  const auto handle = all.new_handle<CUmemGenericAllocationHandle>();
  all.handles[handle] = {std::move(allocation), 1};
  return handle;
}

// [pointer, pointer + bytes) in one reservation.
bool reserved(const State& all, CUdeviceptr pointer, size_t bytes) {
  auto next = all.reservations.upper_bound(pointer);
  if (next == all.reservations.begin()) return false;
  const auto& [base, length] = *std::prev(next);
  return bytes <= length && pointer - base <= length - bytes;
}

// The bases of the mappings that make up exactly [pointer, pointer + bytes); empty if they do not.
std::vector<uint64_t> whole_mappings(const State& all, CUdeviceptr pointer, size_t bytes) {
  std::vector<uint64_t> bases;
  uint64_t at = pointer;
  while (at < pointer + bytes) {
    const auto found = all.space.ranges().find(at);
    if (found == all.space.ranges().end() || found->second.kind != RangeKind::kMapped) return {};
    bases.push_back(at);
    at = found->second.end();
  }
  return at == pointer + bytes ? bases : std::vector<uint64_t>{};
}

CUresult export_fd(void* out, const Allocation& allocation) {
  const int fd = allocation.exported_fd();
  if (fd < 0) return CUDA_ERROR_OPERATING_SYSTEM;
  *static_cast<int*>(out) = fd;
  return CUDA_SUCCESS;
}

CUresult export_fabric(void* out, const Allocation& allocation) {
  const FabricHandle handle{kFabricMagic, allocation.info().id, ~allocation.info().id};
  std::memset(out, 0, sizeof(CUmemFabricHandle));
  std::memcpy(out, &handle, sizeof handle);
  return CUDA_SUCCESS;
}

Answer<std::shared_ptr<Allocation>> import(const Call& c, void* from,
                                           CUmemAllocationHandleType type) {
  const Config& config = c.state.config();
  if (type == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) {
    if (!config.has("fd")) return tl::unexpected(CUDA_ERROR_NOT_SUPPORTED);
    return c.state.machine->adopt(static_cast<int>(reinterpret_cast<intptr_t>(from)));
  }
  if (type != CU_MEM_HANDLE_TYPE_FABRIC || from == nullptr) {
    return tl::unexpected(CUDA_ERROR_INVALID_VALUE);
  }
  if (!config.has("fabric")) return tl::unexpected(CUDA_ERROR_NOT_SUPPORTED);
  if (!config.has("imex")) return tl::unexpected(CUDA_ERROR_NOT_PERMITTED);
  FabricHandle handle{};
  std::memcpy(&handle, from, sizeof handle);
  if (handle.magic != kFabricMagic || handle.check != ~handle.id) {
    return tl::unexpected(CUDA_ERROR_INVALID_VALUE);
  }
  auto found = c.state.machine->find(handle.id, MemoryKind::kVmm);
  if (found && ((*found)->info().handle_types & CU_MEM_HANDLE_TYPE_FABRIC) == 0) {
    return tl::unexpected(CUDA_ERROR_INVALID_VALUE);
  }
  return found;
}

}  // namespace

CUresult cuMemGetAllocationGranularity(size_t* bytes, const CUmemAllocationProp* properties,
                                       CUmemAllocationGranularity_flags option) {
  return call("cuMemGetAllocationGranularity", Needs::kInit, [&](Call& c) {
    if (bytes == nullptr || option > CU_MEM_ALLOC_GRANULARITY_RECOMMENDED) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    const CUresult result = check_properties(c, properties);
    if (result != CUDA_SUCCESS) return result;
    *bytes = granularity_of(c.state.config(), properties->requestedHandleTypes);
    return CUDA_SUCCESS;
  });
}

CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, size_t bytes,
                     const CUmemAllocationProp* properties, unsigned long long flags) {
  return call("cuMemCreate", Needs::kInit, [&](Call& c) {
    if (const CUresult result = check_properties(c, properties); result != CUDA_SUCCESS) {
      return result;
    }
    const auto types = static_cast<unsigned int>(properties->requestedHandleTypes);
    if (handle == nullptr || flags != 0 || bytes == 0 ||
        bytes % granularity_of(c.state.config(), types) != 0) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    auto allocation = c.state.machine->allocate(
        {MemoryKind::kVmm, c.state.machine_device(properties->location.id), 0, bytes, types,
         properties->allocFlags.gpuDirectRDMACapable});
    if (!allocation) return allocation.error();
    *handle = add_handle(c.state, std::move(*allocation));
    return CUDA_SUCCESS;
  });
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  return call("cuMemRelease", Needs::kInit, [&](Call& c) {
    const auto found = c.state.handles.find(handle);
    if (found == c.state.handles.end()) return CUDA_ERROR_INVALID_VALUE;
    if (--found->second.references == 0) c.state.handles.erase(found);
    return CUDA_SUCCESS;
  });
}

CUresult cuMemAddressReserve(CUdeviceptr* pointer, size_t bytes, size_t alignment,
                             CUdeviceptr /*address: a wish*/, unsigned long long flags) {
  return call("cuMemAddressReserve", Needs::kInit, [&](Call& c) {
    if (!c.state.config().has("vmm")) return CUDA_ERROR_NOT_SUPPORTED;
    if (pointer == nullptr || flags != 0 || bytes == 0 ||
        bytes % c.state.config().granularity != 0 || (alignment & (alignment - 1)) != 0) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    const Changing changing(c);
    const uint64_t base =
        c.state.space.take(bytes, std::max<uint64_t>(alignment, c.state.config().granularity));
    if (base == 0) return CUDA_ERROR_OUT_OF_MEMORY;
    c.state.reservations[base] = bytes;
    *pointer = base;
    return CUDA_SUCCESS;
  });
}

CUresult cuMemAddressFree(CUdeviceptr pointer, size_t bytes) {
  return call("cuMemAddressFree", Needs::kInit, [&](Call& c) {
    const auto found = c.state.reservations.find(pointer);
    if (found == c.state.reservations.end() || found->second != bytes ||
        c.state.space.overlaps(pointer, bytes)) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    const Changing changing(c);
    c.state.reservations.erase(found);
    c.state.space.give_back(pointer);
    return CUDA_SUCCESS;
  });
}

CUresult cuMemMap(CUdeviceptr pointer, size_t bytes, size_t offset,
                  CUmemGenericAllocationHandle handle, unsigned long long flags) {
  return call("cuMemMap", Needs::kInit, [&](Call& c) {
    const auto found = c.state.handles.find(handle);
    if (found == c.state.handles.end()) return CUDA_ERROR_INVALID_VALUE;
    const Allocation& allocation = *found->second.allocation;
    const uint64_t unit = granularity_of(c.state.config(), allocation.info().handle_types);
    if (flags != 0 || offset != 0 || bytes == 0 || bytes % unit != 0 ||
        pointer % c.state.config().granularity != 0 || !reserved(c.state, pointer, bytes) ||
        bytes > allocation.info().bytes) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    AddressSpace& space = c.state.space;
    if (space.overlaps(pointer, bytes)) return CUDA_ERROR_ALREADY_MAPPED;
    const Changing changing(c);
    if (!space.map_bytes(pointer, bytes, allocation)) return CUDA_ERROR_OUT_OF_MEMORY;
    Range range;
    range.kind = RangeKind::kMapped;
    range.base = pointer;
    range.bytes = bytes;
    range.host = space.shadow(pointer);
    range.allocation = found->second.allocation;
    range.device = allocation.info().device;
    space.add(std::move(range));
    return CUDA_SUCCESS;
  });
}

// Does not wait: work that still uses the memory meets an illegal address.
CUresult cuMemUnmap(CUdeviceptr pointer, size_t bytes) {
  return call("cuMemUnmap", Needs::kInit, [&](Call& c) {
    const std::vector<uint64_t> bases = whole_mappings(c.state, pointer, bytes);
    if (bases.empty()) return CUDA_ERROR_INVALID_VALUE;
    const Changing changing(c);
    for (const uint64_t base : bases) {
      c.state.space.unmap_bytes(base, c.state.space.find(base)->bytes);
      c.state.space.remove(base);
    }
    return CUDA_SUCCESS;
  });
}

CUresult cuMemSetAccess(CUdeviceptr pointer, size_t bytes, const CUmemAccessDesc* access,
                        size_t count) {
  return call("cuMemSetAccess", Needs::kInit, [&](Call& c) {
    const std::vector<uint64_t> bases = whole_mappings(c.state, pointer, bytes);
    if (bases.empty() || access == nullptr || count == 0) return CUDA_ERROR_INVALID_VALUE;
    for (size_t i = 0; i < count; ++i) {
      if (access[i].location.type != CU_MEM_LOCATION_TYPE_DEVICE) return CUDA_ERROR_INVALID_VALUE;
      const int device = c.state.machine_device(access[i].location.id);
      if (device < 0) return CUDA_ERROR_INVALID_DEVICE;
      for (const uint64_t base : bases) {
        const bool own = c.state.space.find(base)->device == device;
        if (!own && !c.state.config().has("peer")) return CUDA_ERROR_INVALID_DEVICE;
      }
    }
    const Changing changing(c);
    for (size_t i = 0; i < count; ++i) {
      const int device = c.state.machine_device(access[i].location.id);
      for (const uint64_t base : bases) {
        c.state.space.find(base)->access[device] = access[i].flags;
      }
    }
    return CUDA_SUCCESS;
  });
}

CUresult cuMemExportToShareableHandle(void* out, CUmemGenericAllocationHandle handle,
                                      CUmemAllocationHandleType type, unsigned long long flags) {
  return call("cuMemExportToShareableHandle", Needs::kInit, [&](Call& c) {
    const auto found = c.state.handles.find(handle);
    if (found == c.state.handles.end() || out == nullptr || flags != 0) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    const Allocation& allocation = *found->second.allocation;
    // Only what was asked for when it was created.
    if ((allocation.info().handle_types & type) == 0) return CUDA_ERROR_INVALID_VALUE;
    switch (type) {
      case CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR:
        return export_fd(out, allocation);
      case CU_MEM_HANDLE_TYPE_FABRIC:
        return export_fabric(out, allocation);
      default:
        return CUDA_ERROR_INVALID_VALUE;
    }
  });
}

CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle* handle, void* from,
                                        CUmemAllocationHandleType type) {
  return call("cuMemImportFromShareableHandle", Needs::kInit, [&](Call& c) {
    if (handle == nullptr) return CUDA_ERROR_INVALID_VALUE;
    if (!c.state.config().has("vmm")) return CUDA_ERROR_NOT_SUPPORTED;
    auto allocation = import(c, from, type);
    if (!allocation) return allocation.error();
    if (c.state.ordinal_of((*allocation)->info().device) < 0) return CUDA_ERROR_INVALID_DEVICE;
    *handle = add_handle(c.state, std::move(*allocation));
    return CUDA_SUCCESS;
  });
}

CUresult cuMemGetAllocationPropertiesFromHandle(CUmemAllocationProp* properties,
                                                CUmemGenericAllocationHandle handle) {
  return call("cuMemGetAllocationPropertiesFromHandle", Needs::kInit, [&](Call& c) {
    const auto found = c.state.handles.find(handle);
    if (found == c.state.handles.end() || properties == nullptr) return CUDA_ERROR_INVALID_VALUE;
    const AllocationInfo& info = found->second.allocation->info();
    *properties = {};
    properties->type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties->requestedHandleTypes = static_cast<CUmemAllocationHandleType>(info.handle_types);
    properties->location = {CU_MEM_LOCATION_TYPE_DEVICE, c.state.ordinal_of(info.device)};
    properties->allocFlags.gpuDirectRDMACapable = static_cast<unsigned char>(info.rdma);
    return CUDA_SUCCESS;
  });
}

CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle* handle, void* address) {
  return call("cuMemRetainAllocationHandle", Needs::kInit, [&](Call& c) {
    const Range* range = c.state.space.find(reinterpret_cast<uint64_t>(address));
    if (handle == nullptr || range == nullptr || range->kind != RangeKind::kMapped) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    for (auto& [value, known] : c.state.handles) {
      if (known.allocation != range->allocation) continue;
      ++known.references;
      *handle = value;
      return CUDA_SUCCESS;
    }
    *handle = add_handle(c.state, range->allocation);
    return CUDA_SUCCESS;
  });
}

}  // namespace kvferry::fake_cuda
