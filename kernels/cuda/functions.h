// The functions of the driver that kvferry calls, each once: X(name, symbol, version, need,
// parameters).
//   name        as cuGetProcAddress knows it
//   symbol      what libcuda.so.1 exports for this version of it
//   version     the CUDA version from which it has this form, as cuGetProcAddress is asked for it
//   need        kRequired, or kOptional: null where the driver does not have it
// All of them return CUresult.
#pragma once

#define KVFERRY_CUDA_FUNCTIONS(X)   \
  KVFERRY_CUDA_DEVICE_FUNCTIONS(X)  \
  KVFERRY_CUDA_MEMORY_FUNCTIONS(X)  \
  KVFERRY_CUDA_SHARING_FUNCTIONS(X) \
  KVFERRY_CUDA_STREAM_FUNCTIONS(X)  \
  KVFERRY_CUDA_KERNEL_FUNCTIONS(X)

// clang-format off
#define KVFERRY_CUDA_DEVICE_FUNCTIONS(X)                                                           \
  X(cuInit, cuInit, 2000, kRequired, (unsigned int flags))                                         \
  X(cuDriverGetVersion, cuDriverGetVersion, 2020, kRequired, (int* version))                       \
  X(cuGetErrorName, cuGetErrorName, 6000, kRequired, (CUresult error, const char** text))          \
  X(cuGetErrorString, cuGetErrorString, 6000, kRequired, (CUresult error, const char** text))      \
  X(cuDeviceGetCount, cuDeviceGetCount, 2000, kRequired, (int* count))                             \
  X(cuDeviceGet, cuDeviceGet, 2000, kRequired, (CUdevice* device, int ordinal))                    \
  X(cuDeviceGetName, cuDeviceGetName, 2000, kRequired, (char* name, int size, CUdevice device))    \
  X(cuDeviceGetUuid, cuDeviceGetUuid_v2, 11040, kRequired, (CUuuid* uuid, CUdevice device))        \
  X(cuDeviceGetAttribute, cuDeviceGetAttribute, 2000, kRequired,                                   \
    (int* value, CUdevice_attribute attribute, CUdevice device))                                   \
  X(cuDeviceTotalMem, cuDeviceTotalMem_v2, 3020, kRequired, (size_t* bytes, CUdevice device))      \
  X(cuDeviceCanAccessPeer, cuDeviceCanAccessPeer, 4000, kRequired,                                 \
    (int* can, CUdevice device, CUdevice peer))                                                    \
  X(cuDevicePrimaryCtxRetain, cuDevicePrimaryCtxRetain, 7000, kRequired,                           \
    (CUcontext* context, CUdevice device))                                                         \
  X(cuDevicePrimaryCtxRelease, cuDevicePrimaryCtxRelease_v2, 11000, kRequired, (CUdevice device))  \
  X(cuCtxPushCurrent, cuCtxPushCurrent_v2, 4000, kRequired, (CUcontext context))                   \
  X(cuCtxPopCurrent, cuCtxPopCurrent_v2, 4000, kRequired, (CUcontext* context))                    \
  X(cuCtxGetCurrent, cuCtxGetCurrent, 4000, kRequired, (CUcontext* context))                       \
  X(cuCtxSetCurrent, cuCtxSetCurrent, 4000, kRequired, (CUcontext context))                        \
  X(cuCtxGetDevice, cuCtxGetDevice, 2000, kRequired, (CUdevice* device))                           \
  X(cuCtxEnablePeerAccess, cuCtxEnablePeerAccess, 4000, kRequired,                                 \
    (CUcontext peer, unsigned int flags))

#define KVFERRY_CUDA_MEMORY_FUNCTIONS(X)                                                           \
  X(cuMemGetInfo, cuMemGetInfo_v2, 3020, kRequired, (size_t* free, size_t* total))                 \
  X(cuMemAlloc, cuMemAlloc_v2, 3020, kRequired, (CUdeviceptr* pointer, size_t bytes))              \
  X(cuMemFree, cuMemFree_v2, 3020, kRequired, (CUdeviceptr pointer))                               \
  X(cuMemGetAddressRange, cuMemGetAddressRange_v2, 3020, kRequired,                                \
    (CUdeviceptr* base, size_t* bytes, CUdeviceptr pointer))                                       \
  X(cuPointerGetAttribute, cuPointerGetAttribute, 4000, kRequired,                                 \
    (void* value, CUpointer_attribute attribute, CUdeviceptr pointer))                             \
  X(cuMemHostRegister, cuMemHostRegister_v2, 6050, kRequired,                                      \
    (void* pointer, size_t bytes, unsigned int flags))                                             \
  X(cuMemHostUnregister, cuMemHostUnregister, 4000, kRequired, (void* pointer))                    \
  X(cuMemHostGetDevicePointer, cuMemHostGetDevicePointer_v2, 3020, kRequired,                      \
    (CUdeviceptr* address, void* pointer, unsigned int flags))                                     \
  X(cuMemCreate, cuMemCreate, 10020, kRequired,                                                    \
    (CUmemGenericAllocationHandle* handle, size_t bytes, const CUmemAllocationProp* properties,    \
     unsigned long long flags))                                                                    \
  X(cuMemRelease, cuMemRelease, 10020, kRequired, (CUmemGenericAllocationHandle handle))           \
  X(cuMemAddressReserve, cuMemAddressReserve, 10020, kRequired,                                    \
    (CUdeviceptr* pointer, size_t bytes, size_t alignment, CUdeviceptr address,                    \
     unsigned long long flags))                                                                    \
  X(cuMemAddressFree, cuMemAddressFree, 10020, kRequired, (CUdeviceptr pointer, size_t bytes))     \
  X(cuMemMap, cuMemMap, 10020, kRequired,                                                          \
    (CUdeviceptr pointer, size_t bytes, size_t offset, CUmemGenericAllocationHandle handle,        \
     unsigned long long flags))                                                                    \
  X(cuMemUnmap, cuMemUnmap, 10020, kRequired, (CUdeviceptr pointer, size_t bytes))                 \
  X(cuMemSetAccess, cuMemSetAccess, 10020, kRequired,                                              \
    (CUdeviceptr pointer, size_t bytes, const CUmemAccessDesc* access, size_t count))              \
  X(cuMemGetAllocationGranularity, cuMemGetAllocationGranularity, 10020, kRequired,                \
    (size_t* bytes, const CUmemAllocationProp* properties,                                         \
     CUmemAllocationGranularity_flags option))

#define KVFERRY_CUDA_SHARING_FUNCTIONS(X)                                                          \
  X(cuMemExportToShareableHandle, cuMemExportToShareableHandle, 10020, kRequired,                  \
    (void* out, CUmemGenericAllocationHandle handle, CUmemAllocationHandleType type,               \
     unsigned long long flags))                                                                    \
  X(cuMemImportFromShareableHandle, cuMemImportFromShareableHandle, 10020, kRequired,              \
    (CUmemGenericAllocationHandle* handle, void* from, CUmemAllocationHandleType type))            \
  X(cuMemGetAllocationPropertiesFromHandle, cuMemGetAllocationPropertiesFromHandle, 10020,         \
    kRequired, (CUmemAllocationProp* properties, CUmemGenericAllocationHandle handle))             \
  X(cuMemRetainAllocationHandle, cuMemRetainAllocationHandle, 11000, kRequired,                    \
    (CUmemGenericAllocationHandle* handle, void* address))                                         \
  X(cuIpcGetMemHandle, cuIpcGetMemHandle, 4010, kRequired,                                         \
    (CUipcMemHandle* handle, CUdeviceptr pointer))                                                 \
  X(cuIpcOpenMemHandle, cuIpcOpenMemHandle_v2, 11000, kRequired,                                   \
    (CUdeviceptr* pointer, CUipcMemHandle handle, unsigned int flags))                             \
  X(cuIpcCloseMemHandle, cuIpcCloseMemHandle, 4010, kRequired, (CUdeviceptr pointer))              \
  X(cuIpcGetEventHandle, cuIpcGetEventHandle, 4010, kRequired,                                     \
    (CUipcEventHandle* handle, CUevent event))                                                     \
  X(cuIpcOpenEventHandle, cuIpcOpenEventHandle, 4010, kRequired,                                   \
    (CUevent* event, CUipcEventHandle handle))

#define KVFERRY_CUDA_STREAM_FUNCTIONS(X)                                                           \
  X(cuMemcpyHtoDAsync, cuMemcpyHtoDAsync_v2, 3020, kRequired,                                      \
    (CUdeviceptr to, const void* from, size_t bytes, CUstream stream))                             \
  X(cuMemcpyDtoHAsync, cuMemcpyDtoHAsync_v2, 3020, kRequired,                                      \
    (void* to, CUdeviceptr from, size_t bytes, CUstream stream))                                   \
  X(cuMemcpyDtoDAsync, cuMemcpyDtoDAsync_v2, 3020, kRequired,                                      \
    (CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream))                             \
  X(cuMemcpyBatchAsync, cuMemcpyBatchAsync_v2, 13000, kOptional,                                   \
    (CUdeviceptr* to, CUdeviceptr* from, size_t* bytes, size_t count,                              \
     CUmemcpyAttributes* attributes, size_t* first_of_attributes, size_t attribute_count,          \
     CUstream stream))                                                                             \
  X(cuMemsetD8Async, cuMemsetD8Async, 3020, kRequired,                                             \
    (CUdeviceptr to, unsigned char value, size_t bytes, CUstream stream))                          \
  X(cuEventCreate, cuEventCreate, 2000, kRequired, (CUevent* event, unsigned int flags))           \
  X(cuEventRecord, cuEventRecord, 2000, kRequired, (CUevent event, CUstream stream))               \
  X(cuEventQuery, cuEventQuery, 2000, kRequired, (CUevent event))                                  \
  X(cuEventSynchronize, cuEventSynchronize, 2000, kRequired, (CUevent event))                      \
  X(cuEventDestroy, cuEventDestroy_v2, 4000, kRequired, (CUevent event))                           \
  X(cuStreamCreate, cuStreamCreate, 2000, kRequired, (CUstream* stream, unsigned int flags))       \
  X(cuStreamCreateWithPriority, cuStreamCreateWithPriority, 5050, kRequired,                       \
    (CUstream* stream, unsigned int flags, int priority))                                          \
  X(cuStreamDestroy, cuStreamDestroy_v2, 4000, kRequired, (CUstream stream))                       \
  X(cuStreamQuery, cuStreamQuery, 2000, kRequired, (CUstream stream))                              \
  X(cuStreamSynchronize, cuStreamSynchronize, 2000, kRequired, (CUstream stream))                  \
  X(cuStreamWaitEvent, cuStreamWaitEvent, 3020, kRequired,                                         \
    (CUstream stream, CUevent event, unsigned int flags))                                          \
  X(cuStreamWriteValue64, cuStreamWriteValue64_v2, 11070, kOptional,                               \
    (CUstream stream, CUdeviceptr address, cuuint64_t value, unsigned int flags))                  \
  X(cuStreamWaitValue64, cuStreamWaitValue64_v2, 11070, kOptional,                                 \
    (CUstream stream, CUdeviceptr address, cuuint64_t value, unsigned int flags))

#define KVFERRY_CUDA_KERNEL_FUNCTIONS(X)                                                           \
  X(cuModuleLoadData, cuModuleLoadData, 2000, kRequired, (CUmodule* module, const void* image))    \
  X(cuModuleUnload, cuModuleUnload, 2000, kRequired, (CUmodule module))                            \
  X(cuModuleGetFunction, cuModuleGetFunction, 2000, kRequired,                                     \
    (CUfunction* function, CUmodule module, const char* name))                                     \
  X(cuFuncSetAttribute, cuFuncSetAttribute, 9000, kRequired,                                       \
    (CUfunction function, CUfunction_attribute attribute, int value))                              \
  X(cuLaunchKernel, cuLaunchKernel, 4000, kRequired,                                               \
    (CUfunction function, unsigned int grid_x, unsigned int grid_y, unsigned int grid_z,           \
     unsigned int block_x, unsigned int block_y, unsigned int block_z, unsigned int shared_bytes,  \
     CUstream stream, void** parameters, void** extra))
// clang-format on
