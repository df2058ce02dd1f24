// The CUDA driver, loaded at run time: one binary runs with and without a GPU. Daemon, client and
// tests call CUDA through this only. Immutable once loaded, usable from any thread; it stays loaded
// for as long as somebody holds it.
//
//   auto driver = cuda::Driver::load();
//   if (!driver) return ... driver.error().to_string();
//   const cuda::Api& api = (*driver)->api();
//   cuda::CUresult result = api.cuDeviceGetCount(&count);
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <tl/expected.hpp>

#include "kernels/cuda/abi.h"
#include "kernels/cuda/functions.h"

namespace kvferry::cuda {

// Pointers to the driver's functions, named as NVIDIA names them in <cuda.h>. The ones that
// functions.h calls optional are null where the driver does not have them.
struct Api {
#define KVFERRY_CUDA_MEMBER(name, symbol, version, need, parameters) \
  CUresult(*name) parameters = nullptr;
  KVFERRY_CUDA_FUNCTIONS(KVFERRY_CUDA_MEMBER)
#undef KVFERRY_CUDA_MEMBER
};

struct DriverError {
  CUresult code = CUDA_ERROR_UNKNOWN;
  std::string call;  // the function that failed, "dlopen" for the library itself
  std::string message;

  // "cuInit: CUDA_ERROR_NO_DEVICE (100): no CUDA-capable device is detected"
  std::string to_string() const;
};

class Driver {
 public:
  static constexpr const char* kDefaultLibrary = "libcuda.so.1";

  // Opens the library, finds every function and calls cuInit. Errors, by code:
  //   FILE_NOT_FOUND                  no such library, or it does not load: no GPU driver here
  //   SHARED_OBJECT_SYMBOL_NOT_FOUND  a function is missing: the driver is too old
  //   anything else                   what cuInit answered, e.g. NO_DEVICE
  // May block for a second while the driver starts. May be called again after an error.
  static tl::expected<std::shared_ptr<const Driver>, DriverError> load(
      const std::string& library = kDefaultLibrary);
  ~Driver();
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;

  const Api& api() const { return api_; }
  // Of CUDA, that the driver knows: 13000 is 13.0.
  int version() const { return version_; }
  // "13.0"
  std::string version_text() const;
  const std::string& library() const { return library_; }

  // "CUDA_ERROR_OUT_OF_MEMORY", or "CUDA error 4711" for what the driver does not know.
  std::string name_of(CUresult result) const;
  // The driver's words for people: "out of memory".
  std::string text_of(CUresult result) const;
  // "cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY (2): out of memory"
  DriverError error(CUresult result, std::string_view call) const;

 private:
  explicit Driver(std::string library) : library_(std::move(library)) {}
  tl::expected<void, DriverError> open();
  tl::expected<void, DriverError> resolve();

  const std::string library_;
  void* handle_ = nullptr;
  int version_ = 0;
  Api api_;
};

}  // namespace kvferry::cuda
