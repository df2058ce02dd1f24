#include "daemon/gpu/reader.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <thread>

#include "daemon/base/check.h"

namespace kvferry::gpu {

Result<std::unique_ptr<Reader>> Reader::make(std::shared_ptr<const Device> device) {
  std::unique_ptr<Reader> reader(new Reader(std::move(device)));
  const Device& gpu = *reader->device_;
  const Device::Current current(gpu);
  KVFERRY_RETURN_IF_ERROR(current.status());
  void* page =
      ::mmap(nullptr, kMaxBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (page == MAP_FAILED) return fail_errno("MEMORY_EXHAUSTED", "mmap", errno);
  reader->page_ = static_cast<std::byte*>(page);
  // A copy to pageable memory would wait inside the call, for as long as it likes.
  KVFERRY_RETURN_IF_ERROR(
      gpu.check(gpu.api().cuMemHostRegister(page, kMaxBytes, 0), "cuMemHostRegister"));
  reader->registered_ = true;
  KVFERRY_RETURN_IF_ERROR(gpu.check(
      gpu.api().cuStreamCreate(&reader->stream_, cuda::CU_STREAM_NON_BLOCKING), "cuStreamCreate"));
  return reader;
}

Reader::~Reader() {
  if (still_stuck()) return;
  const Device::Current current(*device_);
  if (current.ok()) {
    if (stream_ != nullptr)
      (void)device_->check(device_->api().cuStreamDestroy(stream_), "cuStreamDestroy");
    if (registered_)
      (void)device_->check(device_->api().cuMemHostUnregister(page_), "cuMemHostUnregister");
  }
  if (page_ != nullptr) ::munmap(page_, kMaxBytes);
}

bool Reader::still_stuck() {
  if (!stuck_) return false;
  const Device::Current current(*device_);
  if (!current.ok()) return true;
  // Only the end of the copy, or that of its context, is an end.
  const cuda::CUresult state = device_->api().cuStreamQuery(stream_);
  if (state != cuda::CUDA_ERROR_NOT_READY) {
    const Status ended = device_->check(state, "cuStreamQuery");
    stuck_ = !ended && ended.error().code != Code::kUnavailable;
  }
  return stuck_;
}

Status Reader::read(cuda::CUdeviceptr from, std::span<std::byte> out, Duration limit) {
  KVFERRY_CHECK(out.size() <= kMaxBytes && !stuck_, "a reader that can take it");
  const cuda::Api& api = device_->api();
  const Device::Current current(*device_);
  KVFERRY_RETURN_IF_ERROR(current.status());
  KVFERRY_RETURN_IF_ERROR(
      device_->check(api.cuMemcpyDtoHAsync(page_, from, out.size(), stream_), "cuMemcpyDtoHAsync"));
  stuck_ = true;  // until it is known to have ended
  const Time deadline = monotonic_now() + limit;
  auto pause = std::chrono::microseconds(20);
  for (;;) {
    const cuda::CUresult state = api.cuStreamQuery(stream_);
    if (state != cuda::CUDA_ERROR_NOT_READY) {
      KVFERRY_RETURN_IF_ERROR(device_->check(state, "cuStreamQuery"));
      stuck_ = false;
      std::memcpy(out.data(), page_, out.size());
      return {};
    }
    if (monotonic_now() >= deadline)
      return fail(Code::kDeadlineExceeded, "GPU_READ_TIMEOUT",
                  "the device did not copy " + std::to_string(out.size()) + " bytes in time");
    std::this_thread::sleep_for(pause);
    pause = std::min(pause * 2, std::chrono::microseconds(1000));
  }
}

}  // namespace kvferry::gpu
