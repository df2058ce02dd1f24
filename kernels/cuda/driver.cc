#include "kernels/cuda/driver.h"

#include <dlfcn.h>

#include <type_traits>
#include <utility>

namespace kvferry::cuda {
namespace {

using GetProcAddress = CUresult (*)(const char*, void**, int, cuuint64_t);
using GetProcAddressV2 = CUresult (*)(const char*, void**, int, cuuint64_t,
                                      CUdriverProcAddressQueryResult*);

template <typename Fn>
Fn symbol(void* library, const char* name) {
  return reinterpret_cast<Fn>(::dlsym(library, name));
}

std::string number(CUresult result) {
  return std::to_string(static_cast<unsigned int>(result));
}

std::string version_of(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

tl::unexpected<DriverError> fail(CUresult code, std::string call, std::string message) {
  return tl::unexpected<DriverError>(DriverError{code, std::move(call), std::move(message)});
}

// How a function is found: by the driver itself, in the form that it had in a given version.
class Finder {
 public:
  explicit Finder(void* library)
      : v2_(symbol<GetProcAddressV2>(library, "cuGetProcAddress_v2")),
        v1_(symbol<GetProcAddress>(library, "cuGetProcAddress")) {}

  bool usable() const { return v2_ != nullptr || v1_ != nullptr; }

  void* find(const char* name, int version) const {
    void* address = nullptr;
    CUdriverProcAddressQueryResult found = CU_GET_PROC_ADDRESS_SUCCESS;
    const CUresult result =
        v2_ != nullptr ? v2_(name, &address, version, 0, &found) : v1_(name, &address, version, 0);
    return result == CUDA_SUCCESS && found == CU_GET_PROC_ADDRESS_SUCCESS ? address : nullptr;
  }

 private:
  const GetProcAddressV2 v2_;
  const GetProcAddress v1_;
};

enum class Need : uint8_t { kRequired, kOptional };

}  // namespace

std::string DriverError::to_string() const {
  return call + ": " + message;
}

tl::expected<std::shared_ptr<const Driver>, DriverError> Driver::load(const std::string& library) {
  const std::shared_ptr<Driver> driver(new Driver(library));
  if (auto opened = driver->open(); !opened) return tl::unexpected(std::move(opened).error());
  if (auto resolved = driver->resolve(); !resolved) {
    return tl::unexpected(std::move(resolved).error());
  }
  if (const CUresult result = driver->api_.cuInit(0); result != CUDA_SUCCESS) {
    return tl::unexpected(driver->error(result, "cuInit"));
  }
  return driver;
}

Driver::~Driver() {
  if (handle_ != nullptr) ::dlclose(handle_);
}

tl::expected<void, DriverError> Driver::open() {
  // Local: nothing here may be taken for the functions of a CUDA runtime in the same process. Never
  // unloaded: the driver's own threads may outlive the last context.
  handle_ = ::dlopen(library_.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
  if (handle_ != nullptr) return {};
  const char* why = ::dlerror();
  return fail(CUDA_ERROR_FILE_NOT_FOUND, "dlopen",
              std::string("no CUDA driver: ") + (why != nullptr ? why : library_.c_str()));
}

tl::expected<void, DriverError> Driver::resolve() {
  // First of all, so that whatever is missing can be told together with it.
  if (auto* get = symbol<decltype(api_.cuDriverGetVersion)>(handle_, "cuDriverGetVersion")) {
    if (get(&version_) != CUDA_SUCCESS) version_ = 0;
  }
  const Finder finder(handle_);
  if (!finder.usable()) {
    return fail(CUDA_ERROR_SHARED_OBJECT_SYMBOL_NOT_FOUND, "cuGetProcAddress",
                library_ + (version_ == 0 ? " is no CUDA driver"
                                          : " is for CUDA " + version_text() +
                                                "; a driver for CUDA 11.4 or later is needed"));
  }
  std::string missing;
  const auto resolve_one = [&](auto& member, const char* name, int version, Need need) {
    // An older driver may have an older form of the same name.
    void* address = version <= version_ ? finder.find(name, version) : nullptr;
    member = reinterpret_cast<std::remove_reference_t<decltype(member)>>(address);
    if (address == nullptr && need == Need::kRequired) {
      missing +=
          (missing.empty() ? "" : ", ") + std::string(name) + " of CUDA " + version_of(version);
    }
  };
#define KVFERRY_CUDA_RESOLVE(name, symbol, version, need, parameters) \
  resolve_one(api_.name, #name, version, Need::need);
  KVFERRY_CUDA_FUNCTIONS(KVFERRY_CUDA_RESOLVE)
#undef KVFERRY_CUDA_RESOLVE
  if (missing.empty()) return {};
  return fail(
      CUDA_ERROR_SHARED_OBJECT_SYMBOL_NOT_FOUND, "cuGetProcAddress",
      library_ + " (CUDA " + version_text() + ") lacks " + missing + "; a newer driver is needed");
}

std::string Driver::version_text() const {
  return version_of(version_);
}

std::string Driver::name_of(CUresult result) const {
  const char* name = nullptr;
  if (api_.cuGetErrorName(result, &name) == CUDA_SUCCESS && name != nullptr) return name;
  return "CUDA error " + number(result);
}

std::string Driver::text_of(CUresult result) const {
  const char* text = nullptr;
  if (api_.cuGetErrorString(result, &text) == CUDA_SUCCESS && text != nullptr) return text;
  return "unknown to this driver";
}

DriverError Driver::error(CUresult result, std::string_view call) const {
  return {result, std::string(call),
          name_of(result) + " (" + number(result) + "): " + text_of(result)};
}

}  // namespace kvferry::cuda
