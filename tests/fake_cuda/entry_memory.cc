// Memory of cuMemAlloc, registered host memory, and what is known of a pointer.
#include <sys/mman.h>
#include <unistd.h>

#include <vector>

#include "tests/fake_cuda/entry.h"

namespace kvferry::fake_cuda {
namespace {

// Whether all of it is mapped in this process.
bool is_host_memory(const void* pointer, size_t bytes) {
  const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto first = reinterpret_cast<uintptr_t>(pointer) / page * page;
  const auto last = reinterpret_cast<uintptr_t>(pointer) + bytes;
  if (last < first) return false;
  std::vector<unsigned char> pages((last - first + page - 1) / page);
  return ::mincore(reinterpret_cast<void*>(first), last - first, pages.data()) == 0;
}

CUresult pointer_attribute(Call& c, void* value, CUpointer_attribute attribute, const Range& range,
                           CUdeviceptr pointer) {
  const bool host = range.kind == RangeKind::kHost;
  const auto put = [&](auto what) {
    *static_cast<decltype(what)*>(value) = what;
    return CUDA_SUCCESS;
  };
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT:
      return put(range.context);
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      return put(host ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE);
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
      return put(pointer);
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
      return host ? put(static_cast<void*>(range.host + (pointer - range.base)))
                  : CUDA_ERROR_INVALID_VALUE;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID:
      return put(range.number);
    case CU_POINTER_ATTRIBUTE_IS_MANAGED:
      return put(0U);
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
      return put(c.state.ordinal_of(range.device));
    case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE:
      return put(int{range.kind == RangeKind::kAllocation && c.state.config().has("ipc")});
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
      return put(CUdeviceptr{range.base});
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
      return put(size_t{range.bytes});
    case CU_POINTER_ATTRIBUTE_MAPPED:
      return put(1U);
    case CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES:
      return put(
          uint64_t{range.kind == RangeKind::kMapped ? range.allocation->info().handle_types : 0});
    case CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE:
      return put(static_cast<void*>(nullptr));
  }
  return CUDA_ERROR_INVALID_VALUE;
}

}  // namespace

CUresult cuMemGetInfo_v2(size_t* free, size_t* total) {
  return call("cuMemGetInfo", Needs::kContext, [&](Call& c) {
    if (free == nullptr || total == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *total = c.state.config().memory_bytes;
    *free = *total - c.state.machine->used_bytes(c.context->device);
    return CUDA_SUCCESS;
  });
}

CUresult cuMemAlloc_v2(CUdeviceptr* pointer, size_t bytes) {
  return call("cuMemAlloc", Needs::kContext, [&](Call& c) {
    if (pointer == nullptr || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    auto allocation =
        c.state.machine->allocate({MemoryKind::kLegacy, c.context->device, 0, bytes, 0, 0});
    if (!allocation) return allocation.error();
    const Changing changing(c);
    AddressSpace& space = c.state.space;
    const uint64_t base = space.take(bytes, 0);
    if (base == 0) return CUDA_ERROR_OUT_OF_MEMORY;
    if (!space.map_bytes(base, bytes, **allocation)) {
      space.give_back(base);
      return CUDA_ERROR_OUT_OF_MEMORY;
    }
    Range range;
    range.kind = RangeKind::kAllocation;
    range.base = base;
    range.bytes = bytes;
    range.host = space.shadow(base);
    range.allocation = std::move(*allocation);
    range.device = c.context->device;
    range.context = c.context->handle;
    space.add(std::move(range));
    *pointer = base;
    return CUDA_SUCCESS;
  });
}

// Waits for all work of the context, as the driver does.
CUresult cuMemFree_v2(CUdeviceptr pointer) {
  return call("cuMemFree", Needs::kContext, [&](Call& c) {
    if (pointer == 0) return CUDA_SUCCESS;
    const auto is_it = [&] {
      const Range* range = c.state.space.find(pointer);
      return range != nullptr && range->kind == RangeKind::kAllocation && range->base == pointer;
    };
    if (!is_it()) return CUDA_ERROR_INVALID_VALUE;
    const CUresult waited = c.state.wait_for(c.lock, c.context, c.state.streams_of(*c.context));
    if (waited != CUDA_SUCCESS) return waited;
    if (!is_it()) return CUDA_ERROR_INVALID_VALUE;
    const Changing changing(c);
    c.state.remove_range(pointer);
    return CUDA_SUCCESS;
  });
}

CUresult cuMemGetAddressRange_v2(CUdeviceptr* base, size_t* bytes, CUdeviceptr pointer) {
  return call("cuMemGetAddressRange", Needs::kContext, [&](Call& c) {
    const Range* range = c.state.space.find(pointer);
    if (range == nullptr) return CUDA_ERROR_NOT_FOUND;
    if (base != nullptr) *base = range->base;
    if (bytes != nullptr) *bytes = range->bytes;
    return CUDA_SUCCESS;
  });
}

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return call("cuPointerGetAttribute", Needs::kInit, [&](Call& c) {
    if (value == nullptr) return CUDA_ERROR_INVALID_VALUE;
    const Range* range = c.state.space.find(pointer);
    uint64_t address = pointer;
    if (range == nullptr) {
      // Registered host memory is known by both of its addresses.
      const auto* host = reinterpret_cast<const std::byte*>(pointer);
      range = c.state.space.registered(host, 1);
      if (range == nullptr) return CUDA_ERROR_INVALID_VALUE;
      address = range->base + static_cast<uint64_t>(host - range->host);
    }
    return pointer_attribute(c, value, attribute, *range, address);
  });
}

CUresult cuMemHostRegister_v2(void* pointer, size_t bytes, unsigned int flags) {
  return call("cuMemHostRegister", Needs::kContext, [&](Call& c) {
    constexpr unsigned int kKnown = CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP;
    if (pointer == nullptr || bytes == 0 || (flags & ~kKnown) != 0 ||
        !is_host_memory(pointer, bytes)) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    auto* const begin = static_cast<std::byte*>(pointer);
    AddressSpace& space = c.state.space;
    for (const auto& [base, other] : space.ranges()) {
      if (other.kind == RangeKind::kHost && begin < other.host + other.bytes &&
          other.host < begin + bytes) {
        return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
      }
    }
    const Changing changing(c);
    Range range;
    range.kind = RangeKind::kHost;
    range.base = reinterpret_cast<uint64_t>(pointer);
    if (c.state.config().has("host_alias")) {
      // The same offset within a page, as a mapping has.
      const uint64_t in_page = range.base % 4096;
      range.base = space.take(in_page + bytes, 0);
      if (range.base == 0) return CUDA_ERROR_OUT_OF_MEMORY;
      range.base += in_page;
    }
    range.bytes = bytes;
    range.host = begin;
    range.device = c.context->device;
    range.context = c.context->handle;
    range.portable = (flags & CU_MEMHOSTREGISTER_PORTABLE) != 0;
    range.device_mapped = (flags & CU_MEMHOSTREGISTER_DEVICEMAP) != 0;
    space.add(std::move(range));
    return CUDA_SUCCESS;
  });
}

// Does not wait: work that still uses the memory meets an illegal address.
CUresult cuMemHostUnregister(void* pointer) {
  return call("cuMemHostUnregister", Needs::kContext, [&](Call& c) {
    const Range* range = c.state.space.registered(pointer, 1);
    if (range == nullptr) return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
    if (range->host != pointer) return CUDA_ERROR_INVALID_VALUE;
    const Changing changing(c);
    c.state.remove_range(range->base);
    return CUDA_SUCCESS;
  });
}

CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr* address, void* pointer, unsigned int flags) {
  return call("cuMemHostGetDevicePointer", Needs::kContext, [&](Call& c) {
    const Range* range = c.state.space.registered(pointer, 1);
    if (address == nullptr || flags != 0 || range == nullptr ||
        !range->allows(c.context->device, c.context->peers, true)) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    const auto offset = static_cast<std::byte*>(pointer) - range->host;
    *address = range->base + static_cast<uint64_t>(offset);
    return CUDA_SUCCESS;
  });
}

}  // namespace kvferry::fake_cuda
