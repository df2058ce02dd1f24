#include "client/cpp/src/gpu.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <thread>
#include <utility>

namespace kvferry::client {
namespace {

constexpr auto kPollInterval = std::chrono::microseconds(50);

Code code_of(cuda::CUresult result) {
  switch (result) {
    case cuda::CUDA_ERROR_OUT_OF_MEMORY:
      return Code::kResourceExhausted;
    case cuda::CUDA_ERROR_INVALID_VALUE:
    case cuda::CUDA_ERROR_INVALID_DEVICE:
    case cuda::CUDA_ERROR_INVALID_HANDLE:
      return Code::kInvalidArgument;
    case cuda::CUDA_ERROR_NOT_SUPPORTED:
      return Code::kUnimplemented;
    case cuda::CUDA_ERROR_NOT_PERMITTED:
      return Code::kPermissionDenied;
    case cuda::CUDA_ERROR_NO_DEVICE:
    case cuda::CUDA_ERROR_NOT_INITIALIZED:
    case cuda::CUDA_ERROR_DEINITIALIZED:
      return Code::kFailedPrecondition;
    default:
      return Code::kInternal;
  }
}

// Host memory that the device copies from and to by itself: with other memory a copy to the host
// waits inside of the driver for as long as it takes. In whole pages of its own, so that nothing
// else is locked with it.
class Pinned {
 public:
  static Result<std::shared_ptr<Pinned>> make(const Gpu& gpu, std::size_t bytes) {
    const std::shared_ptr<Pinned> pinned(new Pinned(gpu));
    void* data = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED)
      return Error{Code::kResourceExhausted, "OUT_OF_MEMORY", "mmap of some pages", {}, {}};
    // A child's copy would change what the device has locked.
    ::madvise(data, bytes, MADV_DONTFORK);
    pinned->bytes_ = {static_cast<std::byte*>(data), bytes};
    if (auto registered =
            gpu.check(gpu.api().cuMemHostRegister(data, bytes, cuda::CU_MEMHOSTREGISTER_PORTABLE),
                      "cuMemHostRegister");
        !registered)
      return registered.error();
    pinned->registered_ = true;
    return pinned;
  }
  // With the context current.
  ~Pinned() {
    // Locked pages that the driver does not let go are not given back either.
    if (registered_ && gpu_.api().cuMemHostUnregister(bytes_.data()) != cuda::CUDA_SUCCESS) return;
    if (!bytes_.empty()) ::munmap(bytes_.data(), bytes_.size());
  }
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;
  std::byte* data() const { return bytes_.data(); }

 private:
  explicit Pinned(const Gpu& gpu) : gpu_(gpu) {}
  const Gpu& gpu_;
  std::span<std::byte> bytes_;
  bool registered_ = false;
};

// What the device may still read or write after nobody waits for it any more: never given back.
void keep_for_good(std::shared_ptr<void> buffer) {
  static_cast<void>(new std::shared_ptr<void>(std::move(buffer)));
}

}  // namespace

Error cuda_error(const cuda::Driver& driver, cuda::CUresult result, std::string_view call) {
  const cuda::DriverError error = driver.error(result, call);
  std::string reason = driver.name_of(result);
  constexpr std::string_view kPrefix = "CUDA_ERROR_";
  reason = reason.rfind(kPrefix, 0) == 0 ? "CUDA_" + reason.substr(kPrefix.size())
                                         : std::string("CUDA_UNKNOWN");
  return {code_of(result), std::move(reason), error.to_string(), {}, {}};
}

// ---- one device --------------------------------------------------------------------------------

Result<std::shared_ptr<const Gpu>> Gpu::open(std::shared_ptr<const cuda::Driver> driver,
                                             int ordinal) {
  const std::shared_ptr<Gpu> gpu(new Gpu(std::move(driver), ordinal));
  if (auto got = gpu->check(gpu->api().cuDeviceGet(&gpu->handle_, ordinal), "cuDeviceGet"); !got)
    return got.error();
  cuda::CUuuid uuid{};
  if (auto got = gpu->check(gpu->api().cuDeviceGetUuid(&uuid, gpu->handle_), "cuDeviceGetUuid");
      !got)
    return got.error();
  gpu->uuid_.assign(uuid.bytes, sizeof uuid.bytes);
  cuda::CUcontext context = nullptr;
  if (auto got = gpu->check(gpu->api().cuDevicePrimaryCtxRetain(&context, gpu->handle_),
                            "cuDevicePrimaryCtxRetain");
      !got)
    return got.error();
  gpu->context_ = context;
  return std::shared_ptr<const Gpu>(gpu);
}

Gpu::~Gpu() {
  if (context_ != nullptr) static_cast<void>(api().cuDevicePrimaryCtxRelease(handle_));
}

bool Gpu::has(cuda::CUdevice_attribute attribute) const {
  int value = 0;
  return api().cuDeviceGetAttribute(&value, attribute, handle_) == cuda::CUDA_SUCCESS && value != 0;
}

Gpu::Current::Current(const Gpu& gpu)
    : gpu_(gpu), status_(gpu.check(gpu.api().cuCtxPushCurrent(gpu.context_), "cuCtxPushCurrent")) {}

Gpu::Current::~Current() {
  cuda::CUcontext popped = nullptr;
  if (status_.ok()) static_cast<void>(gpu_.api().cuCtxPopCurrent(&popped));
}

template <typename Submit>
Status Gpu::run(std::shared_ptr<void> buffer, std::string_view call, Deadline deadline,
                Submit&& submit) const {
  cuda::CUstream stream = nullptr;
  if (auto made =
          check(api().cuStreamCreate(&stream, cuda::CU_STREAM_NON_BLOCKING), "cuStreamCreate");
      !made)
    return made;
  Status status = check(submit(stream), call);
  if (status) {
    cuda::CUresult state = cuda::CUDA_SUCCESS;
    while ((state = api().cuStreamQuery(stream)) == cuda::CUDA_ERROR_NOT_READY &&
           std::chrono::steady_clock::now() < deadline)
      std::this_thread::sleep_for(kPollInterval);
    // Whatever is wrong, the copy may not have ended.
    if (state != cuda::CUDA_SUCCESS) keep_for_good(std::move(buffer));
    status = state == cuda::CUDA_ERROR_NOT_READY
                 ? Error{Code::kDeadlineExceeded,
                         "GPU_TIMEOUT",
                         "work of a moment has not ended in time: the GPU is busy or stuck",
                         {},
                         {}}
                 : check(state, call);
  }
  // Of a stream with work the driver lets go once the work has ended.
  static_cast<void>(api().cuStreamDestroy(stream));
  return status;
}

Status Gpu::read(uint64_t address, std::span<std::byte> to, Deadline deadline) const {
  const Current current(*this);
  if (!current) return current.error();
  auto buffer = Pinned::make(*this, to.size());
  if (!buffer) return buffer.error();
  std::byte* const data = (*buffer)->data();
  Status status = run(*buffer, "cuMemcpyDtoHAsync", deadline, [&](cuda::CUstream stream) {
    return api().cuMemcpyDtoHAsync(data, address, to.size(), stream);
  });
  if (status) std::memcpy(to.data(), data, to.size());
  return status;
}

Status Gpu::write(uint64_t address, std::span<const std::byte> from, Deadline deadline) const {
  const Current current(*this);
  if (!current) return current.error();
  auto buffer = Pinned::make(*this, from.size());
  if (!buffer) return buffer.error();
  std::byte* const data = (*buffer)->data();
  std::memcpy(data, from.data(), from.size());
  return run(*buffer, "cuMemcpyHtoDAsync", deadline, [&](cuda::CUstream stream) {
    return api().cuMemcpyHtoDAsync(address, data, from.size(), stream);
  });
}

Status Gpu::clear(uint64_t address, uint64_t bytes, Deadline deadline) const {
  const Current current(*this);
  if (!current) return current.error();
  return run(nullptr, "cuMemsetD8Async", deadline, [&](cuda::CUstream stream) {
    return api().cuMemsetD8Async(address, 0, bytes, stream);
  });
}

// ---- all of them -------------------------------------------------------------------------------

std::string Gpus::library() {
  const char* named = std::getenv("KVFERRY_CUDA_DRIVER");
  return named != nullptr && *named != '\0' ? named : cuda::Driver::kDefaultLibrary;
}

Result<std::shared_ptr<Gpus>> Gpus::load(const std::string& library) {
  auto driver = cuda::Driver::load(library);
  if (driver) return std::shared_ptr<Gpus>(new Gpus(std::move(*driver)));
  return Error{Code::kFailedPrecondition, "NO_CUDA_DRIVER", driver.error().to_string(), {}, {}};
}

Result<std::shared_ptr<const Gpu>> Gpus::gpu(int ordinal) {
  {
    MutexLock lock(mutex_);
    if (const auto it = open_.find(ordinal); it != open_.end()) return it->second;
  }
  int count = 0;
  if (const auto result = driver_->api().cuDeviceGetCount(&count); result != cuda::CUDA_SUCCESS)
    return cuda_error(*driver_, result, "cuDeviceGetCount");
  if (ordinal < 0 || ordinal >= count)
    return Error{Code::kInvalidArgument,
                 "DEVICE_UNKNOWN",
                 "device " + std::to_string(ordinal) + " of " + std::to_string(count) +
                     " that this process sees (CUDA_VISIBLE_DEVICES)",
                 "device",
                 {}};
  auto opened = Gpu::open(driver_, ordinal);
  if (!opened) return opened;
  MutexLock lock(mutex_);
  // Two threads may have opened it: one is enough.
  return open_.try_emplace(ordinal, std::move(*opened)).first->second;
}

}  // namespace kvferry::client
