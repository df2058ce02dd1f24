// Gather, scatter, transfer and clear on a GPU: how a plan is packed for the device, how a copy is
// launched, the kernels' image, and a twin of the kernels on the host. Knows no driver: whoever
// launches loads kernel_image() as a module, uploads a PackedPlan, and passes CopyArgs as the one
// parameter of the kernel of that name:
//
//   auto packed = PackedPlan::make(plan, bases);   // once a plan
//   upload packed->image() to an address that is a multiple of PackedPlan::kAlignment
//   CopyArgs args{.plan = packed->view_at(address), .stream_offset = ..., .bytes = ..., ...};
//   const LaunchShape shape = launch_shape(args, sm_count);
//   cuLaunchKernel(kernel_name(args.kind), shape.blocks, 1, 1, shape.threads, 1, 1, 0, stream, ...)
//
// Everything here may be called from any thread.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "kernels/copy_plan.h"
#include "kernels/plan_view.h"

namespace kvferry::kernels {

// A plan bound to its pools' addresses, in the form that kernels read. Self-contained: the plan may
// go.
class PackedPlan {
 public:
  static constexpr uint64_t kAlignment = 16;

  // pool_bases[i] is the address of pool i's first byte as the device sees it. Nothing if a pool is
  // missing, or a bundle has 2^32 cells or a cell 2^32 bytes (no GPU has memory for either).
  static std::optional<PackedPlan> make(const CopyPlan& plan, std::span<const uint64_t> pool_bases);

  // To be copied to the device as it is. Empty for an empty plan.
  std::span<const std::byte> image() const { return image_; }
  uint64_t bytes() const { return view_.bytes; }
  // The view of an image that lies at `address`, a multiple of kAlignment.
  PlanView view_at(uint64_t address) const;

 private:
  std::vector<std::byte> image_;
  PlanView view_{};  // of an image at 0
};

// Where a copy's flat side lies. Over PCIe a few SMs saturate the bus, so a copy to or from host
// memory takes less of the GPU away from others.
enum class FlatMemory : uint8_t { kDevice, kHost };

struct LaunchShape {
  uint32_t blocks = 0;  // 0: nothing to do, and nothing may be launched
  uint32_t threads = 0;
};
// `sm_count` of the device, or fewer to leave room for others. With any number of blocks of
// kBlockThreads threads the kernel copies the same bytes; this shape is a fast one.
LaunchShape launch_shape(const CopyArgs& args, uint32_t sm_count,
                         FlatMemory flat_in = FlatMemory::kDevice);

const char* kernel_name(CopyKind kind);
// All that the image has; another name is not found in it.
std::span<const char* const> kernel_names();

// For cuModuleLoadData: binaries for sm_80, sm_90 and sm_100, and PTX of sm_80 for others. Where
// the build had no CUDA compiler it is a mark that no real driver loads and kernels_built() is
// false.
std::span<const unsigned char> kernel_image();
bool kernels_built();

// ---- The twin -----------------------------------------------------------------------------------

// Memory as the twin sees it: addresses are translated, and refused where the device has nothing.
class TwinMemory {
 public:
  virtual ~TwinMemory() = default;
  // The bytes [address, address + bytes), or null.
  virtual const std::byte* readable(uint64_t address, uint64_t bytes) const = 0;
  virtual std::byte* writable(uint64_t address, uint64_t bytes) const = 0;
};

enum class TwinResult : uint8_t { kOk, kIllegalAddress, kMisalignedAddress };

// Does what the kernel does when it is launched with that shape, by the same code, thread after
// thread; an access that a GPU would refuse ends it, with earlier ones done. `args` is the kernel's
// parameter.
TwinResult run_copy_twin(const TwinMemory& memory, const CopyArgs& args, LaunchShape shape);

}  // namespace kvferry::kernels
