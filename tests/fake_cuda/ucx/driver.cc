// libcuda.so.1 for UCX's CUDA module: the fake driver, which this library brings along, and the few
// functions that UCX's copies need beyond those of kernels/cuda/functions.h. What else the module
// names is bound when it is called, and is not.
//
// Device memory stays what it is there: no host memory. So bytes that arrive have been copied by
// the driver.
#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/cuda/abi.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace kvferry::cuda;  // NOLINT: this file defines its functions

// Of the fake driver.
extern "C" {
CUresult cuCtxGetCurrent(CUcontext* context);
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer);
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, CUstream stream);
CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, CUstream stream);
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream);
}

namespace {

// Not registered host memory either.
bool on_device(CUdeviceptr pointer) {
  CUmemorytype type{};
  return cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, pointer) == CUDA_SUCCESS &&
         type == CU_MEMORYTYPE_DEVICE;
}

// Those that UCX asks for in one call.
std::size_t size_of(CUpointer_attribute attribute) {
  return attribute == CU_POINTER_ATTRIBUTE_CONTEXT ? sizeof(CUcontext) : sizeof(int);
}

}  // namespace

EXPORT CUresult cuCtxGetId(CUcontext context, unsigned long long* id) {
  if (context == nullptr) {
    const CUresult result = cuCtxGetCurrent(&context);
    if (result != CUDA_SUCCESS) return result;
    if (context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  }
  *id = reinterpret_cast<uintptr_t>(context);
  return CUDA_SUCCESS;
}

// UCX pushes primary contexts that are active; whoever has memory on a device has one.
EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice /*device*/, unsigned int* flags, int* active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}

// For what is no memory of the driver's it succeeds, with zeros.
EXPORT CUresult cuPointerGetAttributes(unsigned int count, CUpointer_attribute* attributes,
                                       void** values, CUdeviceptr pointer) {
  for (unsigned int i = 0; i < count; ++i) {
    std::memset(values[i], 0, size_of(attributes[i]));
    static_cast<void>(cuPointerGetAttribute(values[i], attributes[i], pointer));
  }
  return CUDA_SUCCESS;
}

EXPORT CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
  const bool to_device = on_device(to);
  const bool from_device = on_device(from);
  if (to_device && from_device) return cuMemcpyDtoDAsync_v2(to, from, bytes, stream);
  if (to_device)
    return cuMemcpyHtoDAsync_v2(to, reinterpret_cast<const void*>(from), bytes, stream);
  if (from_device) return cuMemcpyDtoHAsync_v2(reinterpret_cast<void*>(to), from, bytes, stream);
  return CUDA_ERROR_INVALID_VALUE;
}

// With the flag that copies are over when their call returns: those of the fake that read or write
// unregistered host memory are, too.
EXPORT CUresult cuCtxSetFlags(unsigned int /*flags*/) {
  return CUDA_SUCCESS;
}

EXPORT CUresult cuGetProcAddress_v2(const char* name, void** function, int version,
                                    unsigned long long flags, int* status) {
  if (std::strcmp(name, "cuCtxSetFlags") == 0) {
    *function = reinterpret_cast<void*>(&cuCtxSetFlags);
    if (status != nullptr) *status = 0;
    return CUDA_SUCCESS;
  }
  using Next = CUresult (*)(const char*, void**, int, unsigned long long, int*);
  static const auto next = reinterpret_cast<Next>(::dlsym(RTLD_NEXT, "cuGetProcAddress_v2"));
  return next(name, function, version, flags, status);
}
