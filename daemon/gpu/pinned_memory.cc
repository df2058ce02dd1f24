#include "daemon/gpu/pinned_memory.h"

#include <string>

#include "daemon/gpu/closing.h"

namespace kvferry::gpu {

Result<std::shared_ptr<const PinnedMemory>> PinnedMemory::pin(
    const std::vector<std::shared_ptr<const Device>>& devices, void* base, uint64_t bytes,
    std::shared_ptr<std::atomic<uint32_t>> refused) {
  Error last{Code::kUnavailable, "NO_GPU", "no device is up", {}};
  std::shared_ptr<PinnedMemory> pinned;
  for (const std::shared_ptr<const Device>& device : devices) {
    if (device->down()) continue;
    const Device::Current current(*device);
    if (!current.ok()) {
      last = current.status().error();
      continue;
    }
    const cuda::Api& api = device->api();
    if (pinned == nullptr) {
      // Portable: registered once, in the first context that takes it, and good in all.
      const Status registered = device->check(
          api.cuMemHostRegister(
              base, bytes, cuda::CU_MEMHOSTREGISTER_PORTABLE | cuda::CU_MEMHOSTREGISTER_DEVICEMAP),
          "cuMemHostRegister");
      if (!registered) {
        last = registered.error();
        continue;
      }
      pinned.reset(new PinnedMemory(device, base, bytes));
      pinned->refused_ = refused;
    }
    cuda::CUdeviceptr address = 0;
    const Status seen = device->check(api.cuMemHostGetDevicePointer(&address, base, 0),
                                      "cuMemHostGetDevicePointer");
    if (seen)
      pinned->addresses_.emplace_back(device, address);
    else
      last = seen.error();
  }
  if (pinned == nullptr || pinned->addresses_.empty()) {
    return fail(Code::kFailedPrecondition, "PIN_FAILED",
                std::to_string(bytes) + " bytes of host memory: " + last.to_string());
  }
  return std::shared_ptr<const PinnedMemory>(std::move(pinned));
}

PinnedMemory::~PinnedMemory() {
  const Closing current(*owner_);
  // The context of a device that is down took its registrations along.
  if (!current.ok()) return;
  const Status given_back =
      owner_->check(owner_->api().cuMemHostUnregister(base_), "cuMemHostUnregister");
  if (!given_back && refused_ != nullptr) refused_->fetch_add(1);
}

cuda::CUdeviceptr PinnedMemory::on(const Device& device) const {
  for (const auto& [of, address] : addresses_)
    if (of.get() == &device) return address;
  return 0;
}

}  // namespace kvferry::gpu
