// The words of a control page, registered with CUDA so that streams write and wait for them.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>

#include "client/cpp/src/attachment.h"
#include "client/cpp/src/gpu.h"
#include "kvferry/result.h"

namespace kvferry::client {

class DeviceWords {
 public:
  // Errors of the driver.
  static Result<std::shared_ptr<const DeviceWords>> make(std::shared_ptr<const Gpu> gpu,
                                                         std::shared_ptr<const WordsFile> file);
  // Nothing on the device may use the words any more.
  ~DeviceWords();
  DeviceWords(const DeviceWords&) = delete;
  DeviceWords& operator=(const DeviceWords&) = delete;

  const Gpu& gpu() const { return *gpu_; }
  const WordsFile& file() const { return *file_; }
  // 0 for a word out of range.
  uint64_t timeline_address(uint32_t word) const;
  uint64_t done_address(uint32_t word) const;

  // Queue work in a stream of this device. UNIMPLEMENTED STREAM_WORDS_UNSUPPORTED where driver or
  // device cannot; INVALID_ARGUMENT WORD_OUT_OF_RANGE.
  Status write(void* stream, uint32_t timeline_word, uint64_t value) const;
  Status wait(void* stream, uint32_t done_word, uint64_t value) const;

 private:
  using StreamOperation = cuda::CUresult (*)(cuda::CUstream, cuda::CUdeviceptr, cuda::cuuint64_t,
                                             unsigned int);
  DeviceWords(std::shared_ptr<const Gpu> gpu, std::shared_ptr<const WordsFile> file)
      : gpu_(std::move(gpu)), file_(std::move(file)) {}
  Status queue(StreamOperation operation, std::string_view name, void* stream, uint64_t address,
               uint64_t value, unsigned int flags) const;

  const std::shared_ptr<const Gpu> gpu_;
  const std::shared_ptr<const WordsFile> file_;
  uint64_t address_ = 0;  // of the first word, for the device; 0: not registered
};

}  // namespace kvferry::client
