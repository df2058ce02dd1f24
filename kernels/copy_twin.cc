// The kernels' lanes, run one after another on the host.
#include <cstring>

#include "kernels/copy_lane.h"
#include "kernels/device_copy.h"

namespace kvferry::kernels {
namespace {

struct Fault {
  TwinResult result;
};

// What device_copy.cu's memory does, with the checks that a GPU makes.
class CheckedMemory {
 public:
  explicit CheckedMemory(const TwinMemory& memory) : memory_(memory) {}

  template <typename T>
  T read(uint64_t address) const {
    T value;
    std::memcpy(&value, at < sizeof(T), sizeof(T) % 16 == 0 ? 16 : sizeof(T) > (address),
                sizeof(T));
    return value;
  }

  template <uint32_t kWidth>
  Vector load(uint64_t address) const {
    Vector value{};
    std::memcpy(&value, at<kWidth, kWidth>(address), kWidth);
    return value;
  }

  template <uint32_t kWidth, Store kStore>
  void store(uint64_t address, const Vector& value) const {
    if (address % kWidth != 0) throw Fault{TwinResult::kMisalignedAddress};
    std::byte* to = memory_.writable(address, kWidth);
    if (to == nullptr) throw Fault{TwinResult::kIllegalAddress};
    std::memcpy(to, &value, kWidth);
  }

 private:
  template <uint32_t kBytes, uint32_t kAlign>
  const std::byte* at(uint64_t address) const {
    if (address % kAlign != 0) throw Fault{TwinResult::kMisalignedAddress};
    const std::byte* from = memory_.readable(address, kBytes);
    if (from == nullptr) throw Fault{TwinResult::kIllegalAddress};
    return from;
  }

  const TwinMemory& memory_;
};

template <typename Copy>
void run(const CheckedMemory& memory, const CopyArgs& args, uint32_t warps) {
  for (uint32_t warp = 0; warp < warps; ++warp)
    for (uint32_t lane = 0; lane < kLanes; ++lane) copy_lane<Copy>(memory, args, warp, warps, lane);
}

}  // namespace

TwinResult run_copy_twin(const TwinMemory& memory, const CopyArgs& args, LaunchShape shape) {
  const uint32_t warps = shape.blocks * (shape.threads / kLanes);
  try {
    if (args.kind == CopyKind::kTransfer)
      run<PagesCopy>(CheckedMemory(memory), args, warps);
    else
      run<FlatCopy>(CheckedMemory(memory), args, warps);
  } catch (const Fault& fault) {
    return fault.result;
  }
  return TwinResult::kOk;
}

}  // namespace kvferry::kernels
