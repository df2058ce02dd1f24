#include "client/cpp/src/device_words.h"

namespace kvferry::client {

Result<std::shared_ptr<const DeviceWords>> DeviceWords::make(
    std::shared_ptr<const Gpu> gpu, std::shared_ptr<const WordsFile> file) {
  const std::shared_ptr<DeviceWords> words(new DeviceWords(std::move(gpu), std::move(file)));
  const Gpu& on = words->gpu();
  const Gpu::Current current(on);
  if (!current) return current.error();
  const std::span<std::byte> bytes = words->file_->bytes();
  if (auto registered = on.check(on.api().cuMemHostRegister(bytes.data(), bytes.size(),
                                                            cuda::CU_MEMHOSTREGISTER_PORTABLE |
                                                                cuda::CU_MEMHOSTREGISTER_DEVICEMAP),
                                 "cuMemHostRegister");
      !registered)
    return registered.error();
  cuda::CUdeviceptr address = 0;
  auto got = on.check(on.api().cuMemHostGetDevicePointer(&address, bytes.data(), 0),
                      "cuMemHostGetDevicePointer");
  if (!got) {
    static_cast<void>(on.api().cuMemHostUnregister(bytes.data()));
    return got.error();
  }
  words->address_ = address;
  return std::shared_ptr<const DeviceWords>(words);
}

DeviceWords::~DeviceWords() {
  if (address_ == 0) return;
  const Gpu::Current current(*gpu_);
  if (current) static_cast<void>(gpu_->api().cuMemHostUnregister(file_->bytes().data()));
}

uint64_t DeviceWords::timeline_address(uint32_t word) const {
  return word < file_->timeline_words() ? address_ + uint64_t{word} * 8 : 0;
}

uint64_t DeviceWords::done_address(uint32_t word) const {
  return word < file_->done_words() ? address_ + (uint64_t{file_->timeline_words()} + word) * 8 : 0;
}

Status DeviceWords::write(void* stream, uint32_t timeline_word, uint64_t value) const {
  return queue(gpu_->api().cuStreamWriteValue64, "cuStreamWriteValue64", stream,
               timeline_address(timeline_word), value, cuda::CU_STREAM_WRITE_VALUE_DEFAULT);
}

Status DeviceWords::wait(void* stream, uint32_t done_word, uint64_t value) const {
  return queue(gpu_->api().cuStreamWaitValue64, "cuStreamWaitValue64", stream,
               done_address(done_word), value, cuda::CU_STREAM_WAIT_VALUE_GEQ);
}

Status DeviceWords::queue(StreamOperation operation, std::string_view name, void* stream,
                          uint64_t address, uint64_t value, unsigned int flags) const {
  if (address == 0)
    return Error{Code::kInvalidArgument, "WORD_OUT_OF_RANGE", "no such word", "word", {}};
  if (operation == nullptr || !gpu_->has(cuda::CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS))
    return Error{
        Code::kUnimplemented,
        "STREAM_WORDS_UNSUPPORTED",
        "driver or device cannot use 64-bit words in streams: use an event, or synchronise "
        "and signal from the CPU",
        {},
        {}};
  const Gpu::Current current(*gpu_);
  if (!current) return current.error();
  return gpu_->check(operation(static_cast<cuda::CUstream>(stream), address, value, flags), name);
}

}  // namespace kvferry::client
