// CUDA IPC: memory of cuMemAlloc and events in other processes.
#include <cstring>

#include "tests/fake_cuda/entry.h"

namespace kvferry::fake_cuda {
namespace {

// What a handle's 64 bytes say.
struct IpcHandle {
  uint64_t magic;
  uint64_t id;
  uint64_t identity;  // of the process that has it
  uint64_t device;    // of the machine
  uint64_t check;
};
constexpr uint64_t kMemoryMagic = 0x6b76'6970'636d'656d;
constexpr uint64_t kEventMagic = 0x6b76'6970'6365'7674;

uint64_t check_of(const IpcHandle& handle) {
  return (handle.magic ^ handle.id) * 31 + (handle.identity ^ handle.device);
}

template <typename To>
void write_handle(To& to, IpcHandle handle) {
  handle.check = check_of(handle);
  std::memset(&to, 0, sizeof to);
  std::memcpy(&to, &handle, sizeof handle);
}

// Of a living process that is not this one.
template <typename From>
CUresult read_handle(const Call& c, const From& from, uint64_t magic, IpcHandle& handle) {
  std::memcpy(&handle, &from, sizeof handle);
  if (handle.magic != magic || handle.check != check_of(handle)) return CUDA_ERROR_INVALID_VALUE;
  if (handle.identity == c.state.machine->identity()) return CUDA_ERROR_INVALID_CONTEXT;
  if (!c.state.machine->alive(handle.identity)) return CUDA_ERROR_INVALID_HANDLE;
  return CUDA_SUCCESS;
}

// What this context has open already of that allocation.
Range* opened(Call& c, uint64_t id) {
  for (auto& [base, range] : c.state.space.ranges()) {
    if (range.kind == RangeKind::kIpc && range.allocation->info().id == id &&
        range.context == c.context->handle) {
      return &range;
    }
  }
  return nullptr;
}

CUresult open_memory(Call& c, CUdeviceptr* pointer, const IpcHandle& handle) {
  const auto device = static_cast<int>(handle.device);
  if (device != c.context->device && !c.state.config().has("peer")) {
    return CUDA_ERROR_PEER_ACCESS_UNSUPPORTED;
  }
  // Also what is open here already must not have been freed by its owner.
  auto allocation = c.state.machine->find(handle.id, MemoryKind::kLegacy);
  if (!allocation) return allocation.error();
  if (Range* range = opened(c, handle.id)) {
    ++range->opens;
    *pointer = range->base;
    return CUDA_SUCCESS;
  }
  const uint64_t bytes = (*allocation)->info().bytes;
  AddressSpace& space = c.state.space;
  const Changing changing(c);
  const uint64_t base = space.take(bytes, 0);
  if (base == 0) return CUDA_ERROR_MAP_FAILED;
  if (!space.map_bytes(base, bytes, **allocation)) {
    space.give_back(base);
    return CUDA_ERROR_MAP_FAILED;
  }
  Range range;
  range.kind = RangeKind::kIpc;
  range.base = base;
  range.bytes = bytes;
  range.host = space.shadow(base);
  range.allocation = std::move(*allocation);
  range.device = device;
  range.opened_on = c.context->device;
  range.context = c.context->handle;
  space.add(std::move(range));
  *pointer = base;
  return CUDA_SUCCESS;
}

}  // namespace

// Names the whole allocation, wherever in it the pointer is.
CUresult cuIpcGetMemHandle(CUipcMemHandle* handle, CUdeviceptr pointer) {
  return call("cuIpcGetMemHandle", Needs::kContext, [&](Call& c) {
    if (!c.state.config().has("ipc")) return CUDA_ERROR_NOT_SUPPORTED;
    const Range* range = c.state.space.find(pointer);
    // What others have exported, VMM and host memory cannot be exported so.
    if (handle == nullptr || range == nullptr || range->kind != RangeKind::kAllocation) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    write_handle(*handle, {kMemoryMagic, range->allocation->info().id, c.state.machine->identity(),
                           static_cast<uint64_t>(range->device), 0});
    return CUDA_SUCCESS;
  });
}

CUresult cuIpcOpenMemHandle_v2(CUdeviceptr* pointer, CUipcMemHandle handle, unsigned int flags) {
  return call("cuIpcOpenMemHandle", Needs::kContext, [&](Call& c) {
    if (!c.state.config().has("ipc")) return CUDA_ERROR_NOT_SUPPORTED;
    if (pointer == nullptr || flags != CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    IpcHandle named{};
    const CUresult read = read_handle(c, handle, kMemoryMagic, named);
    return read != CUDA_SUCCESS ? read : open_memory(c, pointer, named);
  });
}

// Does not wait: work that still uses the memory meets an illegal address.
CUresult cuIpcCloseMemHandle(CUdeviceptr pointer) {
  return call("cuIpcCloseMemHandle", Needs::kContext, [&](Call& c) {
    Range* range = c.state.space.find(pointer);
    if (range == nullptr || range->kind != RangeKind::kIpc || range->base != pointer ||
        range->context != c.context->handle) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    if (--range->opens != 0) return CUDA_SUCCESS;
    const Changing changing(c);
    c.state.remove_range(pointer);
    return CUDA_SUCCESS;
  });
}

CUresult cuIpcGetEventHandle(CUipcEventHandle* handle, CUevent event) {
  return call("cuIpcGetEventHandle", Needs::kContext, [&](Call& c) {
    const auto found = c.state.events.find(event);
    if (found == c.state.events.end()) return CUDA_ERROR_INVALID_HANDLE;
    const Event& named = found->second;
    if (handle == nullptr || named.opened || (named.flags & CU_EVENT_INTERPROCESS) == 0) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    write_handle(*handle, {kEventMagic, named.id, c.state.machine->identity(),
                           static_cast<uint64_t>(named.context->device), 0});
    return CUDA_SUCCESS;
  });
}

CUresult cuIpcOpenEventHandle(CUevent* event, CUipcEventHandle handle) {
  return call("cuIpcOpenEventHandle", Needs::kContext, [&](Call& c) {
    if (!c.state.config().has("ipc_events")) return CUDA_ERROR_NOT_SUPPORTED;
    if (event == nullptr) return CUDA_ERROR_INVALID_VALUE;
    IpcHandle named{};
    const CUresult read = read_handle(c, handle, kEventMagic, named);
    if (read != CUDA_SUCCESS) return read;
    auto counter = c.state.machine->open_event(named.id, named.identity);
    if (!counter) return counter.error();
    *event = c.state.new_handle<CUevent>();
    c.state.events[*event] = {c.context, CU_EVENT_DISABLE_TIMING | CU_EVENT_INTERPROCESS, true,
                              named.id, std::move(*counter)};
    return CUDA_SUCCESS;
  });
}

}  // namespace kvferry::fake_cuda
