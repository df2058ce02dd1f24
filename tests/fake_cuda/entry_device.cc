// Initialisation, devices, contexts, and how functions and errors are named.
#include <algorithm>
#include <array>
#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "tests/fake_cuda/entry.h"

namespace kvferry::fake_cuda {

CUresult current_context(Call& c) {
  const auto& stack = context_stack();
  if (stack.empty() || stack.back() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  c.context = c.state.context_of(stack.back());
  return c.context ? CUDA_SUCCESS : CUDA_ERROR_CONTEXT_IS_DESTROYED;
}

bool gives_back(const std::string& function) {
  static const auto* const all =
      new std::set<std::string>{"cuCtxPopCurrent",     "cuDevicePrimaryCtxRelease",
                                "cuEventDestroy",      "cuIpcCloseMemHandle",
                                "cuMemAddressFree",    "cuMemFree",
                                "cuMemRelease",        "cuMemUnmap",
                                "cuMemHostUnregister", "cuModuleUnload",
                                "cuStreamDestroy"};
  return all->contains(function);
}

namespace {

struct Known {
  const char* name;
  void* address;
  int version;
};

// Every function in every form that this driver has.
const std::vector<Known>& known_functions() {
  static const std::vector<Known>* const all = new std::vector<Known>{
#define KVFERRY_FAKE_CUDA_KNOWN(name, symbol, version, need, parameters) \
  {#name, reinterpret_cast<void*>(&symbol), version},
      KVFERRY_CUDA_FUNCTIONS(KVFERRY_FAKE_CUDA_KNOWN)
#undef KVFERRY_FAKE_CUDA_KNOWN
  };
  return *all;
}

CUresult find_function(const char* name, void** address, int version,
                       CUdriverProcAddressQueryResult* status) {
  return call("cuGetProcAddress", Needs::kNothing, [&](Call& c) {
    if (name == nullptr || address == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *address = nullptr;
    CUdriverProcAddressQueryResult found = CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    for (const Known& known : known_functions()) {
      if (std::strcmp(known.name, name) != 0 || known.version > c.state.config().version) continue;
      found = CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT;
      if (known.version > version) continue;
      found = CU_GET_PROC_ADDRESS_SUCCESS;
      *address = known.address;
    }
    if (status != nullptr) {
      *status = found;
      return CUDA_SUCCESS;
    }
    return found == CU_GET_PROC_ADDRESS_SUCCESS ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
  });
}

struct ErrorText {
  CUresult code;
  const char* name;
  const char* text;
};

// The driver's own words for the commoner ones.
constexpr std::array kErrors = {
#define KVFERRY_FAKE_CUDA_ERROR(code, text) \
  ErrorText {                               \
    code, #code, text                       \
  }
    KVFERRY_FAKE_CUDA_ERROR(CUDA_SUCCESS, "no error"),
    KVFERRY_FAKE_CUDA_ERROR(CUDA_ERROR_INVALID_VALUE, "invalid argument"),
    KVFERRY_FAKE_CUDA_ERROR(CUDA_ERROR_OUT_OF_MEMORY, "out of memory"),
    KVFERRY_FAKE_CUDA_ERROR(CUDA_ERROR_NOT_INITIALIZED, "initialization error"),
    KVFERRY_FAKE_CUDA_ERROR(CUDA_ERROR_DEINITIALIZED, "driver shutting down"),
    KVFERRY_FAKE_CUDA_ERROR(CUDA_ERROR_STUB_LIBRARY, "CUDA driver is a stub library"),
    KVFERRY_FAKE_CUDA_ERROR(CUDA_ERROR_DEVICE_UNAVAILABLE,
                            "CUDA-capable device(s) is/are busy or unavailable"),
    KVFERRY_FAKE_CUDA_ERROR(CUDA_ERROR_NO_DEVICE, "no CUDA-capable device is detected"),
    KVFERRY_FAKE_CUDA_ERROR(CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal"),
    KVFERRY_FAKE_CUDA_ERROR(CUDA_ERROR_INVALID_IMAGE, "device kernel image is invalid"),
    KVFERRY_FAKE_CUDA_ERROR(CUDA_ERROR_INVALID_CONTEXT, "invalid device context"),
    KVFERRY_FAKE_CUDA_ERROR(CUDA_ERROR_MAP_FAILED, "mapping of buffer object failed"),
    KVFERRY_FAKE_CUDA_ERROR(CUDA_ERROR_ALREADY_MAPPED, "resource already mapped"),
    KVFERRY_FAKE_CUDA_ERROR(CUDA_ERROR_ECC_UNCORRECTABLE, "uncorrectable ECC error encountered"),
    KVFERRY_FAKE_CUDA_ERROR(CUDA_ERROR_PEER_ACCESS_UNSUPPORTED,
                            "peer access is not supported between these two devices"),
    KVFERRY_FAKE_CUDA_ERROR(CUDA_ERROR_NVLINK_UNCORRECTABLE,
                            "uncorrectable NVLink error detected during the execution"),
    KVFERRY_FAKE_CUDA_ERROR(CUDA_ERROR_OPERATING_SYSTEM,
                            "OS call failed or operation not "
                            "supported on this OS"),
    KVFERRY_FAKE_CUDA_ERROR(CUDA_ERROR_INVALID_HANDLE, "invalid resource handle"),
    KVFERRY_FAKE_CUDA_ERROR(CUDA_ERROR_NOT_FOUND, "named symbol not found"),
    KVFERRY_FAKE_CUDA_ERROR(CUDA_ERROR_NOT_READY, "device not ready"),
    KVFERRY_FAKE_CUDA_ERROR(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered"),
    KVFERRY_FAKE_CUDA_ERROR(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES,
                            "too many resources requested for launch"),
    KVFERRY_FAKE_CUDA_ERROR(CUDA_ERROR_LAUNCH_TIMEOUT, "the launch timed out and was terminated"),
    KVFERRY_FAKE_CUDA_ERROR(CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED,
                            "peer access is already enabled"),
    KVFERRY_FAKE_CUDA_ERROR(CUDA_ERROR_CONTEXT_IS_DESTROYED, "context is destroyed"),
    KVFERRY_FAKE_CUDA_ERROR(CUDA_ERROR_ASSERT, "device-side assert triggered"),
    KVFERRY_FAKE_CUDA_ERROR(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED,
                            "part or all of the requested memory range is already mapped"),
    KVFERRY_FAKE_CUDA_ERROR(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED,
                            "pointer does not correspond to a registered memory region"),
    KVFERRY_FAKE_CUDA_ERROR(CUDA_ERROR_HARDWARE_STACK_ERROR, "hardware stack error"),
    KVFERRY_FAKE_CUDA_ERROR(CUDA_ERROR_ILLEGAL_INSTRUCTION,
                            "an illegal instruction was encountered"),
    KVFERRY_FAKE_CUDA_ERROR(CUDA_ERROR_MISALIGNED_ADDRESS, "misaligned address"),
    KVFERRY_FAKE_CUDA_ERROR(CUDA_ERROR_LAUNCH_FAILED, "unspecified launch failure"),
    KVFERRY_FAKE_CUDA_ERROR(CUDA_ERROR_MPS_CLIENT_TERMINATED, "MPS client was terminated"),
    KVFERRY_FAKE_CUDA_ERROR(CUDA_ERROR_NOT_PERMITTED, "operation not permitted"),
    KVFERRY_FAKE_CUDA_ERROR(CUDA_ERROR_NOT_SUPPORTED, "operation not supported"),
    KVFERRY_FAKE_CUDA_ERROR(CUDA_ERROR_SYSTEM_NOT_READY, "system not yet initialized"),
    KVFERRY_FAKE_CUDA_ERROR(CUDA_ERROR_UNKNOWN, "unknown error"),
#undef KVFERRY_FAKE_CUDA_ERROR
};

CUresult error_text(CUresult code, const char** out, const char* ErrorText::*member) {
  if (out == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *out = nullptr;
  for (const ErrorText& known : kErrors) {
    if (known.code == code) *out = known.*member;
  }
  return *out != nullptr ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

int attribute_of(const Config& config, CUdevice_attribute attribute, int device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
      return 1024;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      return 4;
    case CU_DEVICE_ATTRIBUTE_PCI_BUS_ID:
      return device + 1;
    case CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID:
    case CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID:
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      return 0;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      return 9;
    case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT:
      return 3;
    case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY:
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
    case CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED:
      return 1;
    case CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM:
      return config.has("host_alias") ? 0 : 1;
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED:
      return config.has("vmm") ? 1 : 0;
    case CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED:
      return config.has("vmm") && config.has("fd") ? 1 : 0;
    case CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED:
      return config.has("vmm") && config.has("fabric") ? 1 : 0;
    case CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED:
      return config.has("rdma") ? 1 : 0;
    case CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS:
    case CU_DEVICE_ATTRIBUTE_CAN_USE_STREAM_WAIT_VALUE_NOR:
      return config.has("stream_words") ? 1 : 0;
    case CU_DEVICE_ATTRIBUTE_IPC_EVENT_SUPPORTED:
      return config.has("ipc_events") ? 1 : 0;
  }
  return -1;
}

// Calls that name a device by its ordinal.
template <typename Fn>
CUresult device_call(const char* name, CUdevice ordinal, Fn&& fn) {
  return call(name, Needs::kInit, [&](Call& c) {
    const int device = c.state.machine_device(ordinal);
    if (device < 0) return CUDA_ERROR_INVALID_DEVICE;
    return fn(c, device);
  });
}

}  // namespace

KVFERRY_FAKE_CUDA_EXPORT CUresult cuGetProcAddress(const char* name, void** address, int version,
                                                   cuuint64_t /*flags*/) {
  return find_function(name, address, version, nullptr);
}

KVFERRY_FAKE_CUDA_EXPORT CUresult cuGetProcAddress_v2(const char* name, void** address, int version,
                                                      cuuint64_t /*flags*/,
                                                      CUdriverProcAddressQueryResult* status) {
  return find_function(name, address, version, status);
}

CUresult cuInit(unsigned int flags) {
  return call("cuInit", Needs::kNothing, [&](Call& c) {
    if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
    if (c.state.config().visible.empty()) return CUDA_ERROR_NO_DEVICE;
    c.state.initialised = true;
    return CUDA_SUCCESS;
  });
}

CUresult cuDriverGetVersion(int* version) {
  return call("cuDriverGetVersion", Needs::kNothing, [&](Call& c) {
    if (version == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *version = c.state.config().version;
    return CUDA_SUCCESS;
  });
}

CUresult cuGetErrorName(CUresult error, const char** text) {
  return error_text(error, text, &ErrorText::name);
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  return error_text(error, text, &ErrorText::text);
}

CUresult cuDeviceGetCount(int* count) {
  return call("cuDeviceGetCount", Needs::kInit, [&](Call& c) {
    if (count == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *count = static_cast<int>(c.state.config().visible.size());
    return CUDA_SUCCESS;
  });
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  return device_call("cuDeviceGet", ordinal, [&](Call&, int) {
    if (device == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *device = ordinal;
    return CUDA_SUCCESS;
  });
}

CUresult cuDeviceGetName(char* name, int size, CUdevice ordinal) {
  return device_call("cuDeviceGetName", ordinal, [&](Call&, int) {
    if (name == nullptr || size <= 0) return CUDA_ERROR_INVALID_VALUE;
    std::strncpy(name, "kvferry fake GPU", static_cast<std::size_t>(size) - 1);
    name[size - 1] = '\0';
    return CUDA_SUCCESS;
  });
}

CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice ordinal) {
  return device_call("cuDeviceGetUuid", ordinal, [&](Call&, int device) {
    if (uuid == nullptr) return CUDA_ERROR_INVALID_VALUE;
    std::memcpy(uuid->bytes, "kvferry-fake-gpu", sizeof uuid->bytes);
    uuid->bytes[15] = static_cast<char>(device);
    return CUDA_SUCCESS;
  });
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice ordinal) {
  return device_call("cuDeviceGetAttribute", ordinal, [&](Call& c, int device) {
    const int found = attribute_of(c.state.config(), attribute, device);
    if (value == nullptr || found < 0) return CUDA_ERROR_INVALID_VALUE;
    *value = found;
    return CUDA_SUCCESS;
  });
}

CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice ordinal) {
  return device_call("cuDeviceTotalMem", ordinal, [&](Call& c, int) {
    if (bytes == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *bytes = c.state.config().memory_bytes;
    return CUDA_SUCCESS;
  });
}

CUresult cuDeviceCanAccessPeer(int* can, CUdevice ordinal, CUdevice peer) {
  return device_call("cuDeviceCanAccessPeer", ordinal, [&](Call& c, int device) {
    const int other = c.state.machine_device(peer);
    if (other < 0) return CUDA_ERROR_INVALID_DEVICE;
    if (can == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *can = device != other && c.state.config().has("peer") ? 1 : 0;
    return CUDA_SUCCESS;
  });
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* out, CUdevice ordinal) {
  return device_call("cuDevicePrimaryCtxRetain", ordinal, [&](Call& c, int device) {
    if (out == nullptr) return CUDA_ERROR_INVALID_VALUE;
    auto& context = c.state.primaries[device];
    if (!context) {
      context = std::make_shared<Context>();
      context->handle = c.state.new_handle<CUcontext>();
      context->device = device;
    }
    ++context->retains;
    *out = context->handle;
    return CUDA_SUCCESS;
  });
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice ordinal) {
  return device_call("cuDevicePrimaryCtxRelease", ordinal, [&](Call& c, int device) {
    const auto found = c.state.primaries.find(device);
    if (found == c.state.primaries.end()) return CUDA_ERROR_INVALID_CONTEXT;
    const std::shared_ptr<Context> context = found->second;
    if (--context->retains == 0) c.state.destroy(c.lock, context);
    return CUDA_SUCCESS;
  });
}

CUresult cuCtxPushCurrent_v2(CUcontext context) {
  return call("cuCtxPushCurrent", Needs::kInit, [&](Call& c) {
    if (!c.state.context_of(context)) return CUDA_ERROR_INVALID_CONTEXT;
    context_stack().push_back(context);
    return CUDA_SUCCESS;
  });
}

CUresult cuCtxPopCurrent_v2(CUcontext* context) {
  return call("cuCtxPopCurrent", Needs::kInit, [&](Call&) {
    auto& stack = context_stack();
    if (stack.empty()) return CUDA_ERROR_INVALID_CONTEXT;
    if (context != nullptr) *context = stack.back();
    stack.pop_back();
    return CUDA_SUCCESS;
  });
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  return call("cuCtxGetCurrent", Needs::kInit, [&](Call&) {
    if (context == nullptr) return CUDA_ERROR_INVALID_VALUE;
    const auto& stack = context_stack();
    *context = stack.empty() ? nullptr : stack.back();
    return CUDA_SUCCESS;
  });
}

CUresult cuCtxSetCurrent(CUcontext context) {
  return call("cuCtxSetCurrent", Needs::kInit, [&](Call& c) {
    if (context != nullptr && !c.state.context_of(context)) return CUDA_ERROR_INVALID_CONTEXT;
    auto& stack = context_stack();
    if (!stack.empty()) stack.pop_back();
    if (context != nullptr) stack.push_back(context);
    return CUDA_SUCCESS;
  });
}

CUresult cuCtxGetDevice(CUdevice* device) {
  return call("cuCtxGetDevice", Needs::kKnownContext, [&](Call& c) {
    if (device == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *device = c.state.ordinal_of(c.context->device);
    return CUDA_SUCCESS;
  });
}

CUresult cuCtxEnablePeerAccess(CUcontext peer, unsigned int flags) {
  return call("cuCtxEnablePeerAccess", Needs::kContext, [&](Call& c) {
    const auto other = c.state.context_of(peer);
    if (!other || other == c.context) return CUDA_ERROR_INVALID_CONTEXT;
    if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
    if (!c.state.config().has("peer")) return CUDA_ERROR_PEER_ACCESS_UNSUPPORTED;
    const Changing changing(c);
    return c.context->peers.insert(other->device).second ? CUDA_SUCCESS
                                                         : CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED;
  });
}

}  // namespace kvferry::fake_cuda
