// How the kernels are launched, and what they are called.
#include <algorithm>

#include "kernels/copy_lane.h"
#include "kernels/device_copy.h"

namespace kvferry::kernels {
namespace {

constexpr uint32_t kWarps = kBlockThreads / kLanes;  // of a block
constexpr std::array<const char*, 2> kNames{"kvferry_copy", "kvferry_transfer"};

uint64_t divide_up(uint64_t a, uint64_t b) {
  return (a + b - 1) / b;
}

// Warps of one SM that keep its memory pipe busy, and stripes that one warp has in flight.
constexpr uint64_t kFewWarps = 8;
constexpr uint64_t kStripesAtOnce = kBatch;

}  // namespace

LaunchShape launch_shape(const CopyArgs& args, uint32_t sm_count, FlatMemory flat_in) {
  if (args.bytes == 0) return {};
  const uint64_t sms = std::max(sm_count, uint32_t{1});
  const uint64_t stripes = Stripes::of(args).count;
  // A small chunk is spread one stripe a warp until each SM has something to do; then a warp takes
  // as many as it can have in flight; then more warps come; then each gets more.
  const uint64_t each = std::clamp<uint64_t>(stripes / (sms * kFewWarps), 1, kStripesAtOnce);
  const uint64_t per_sm = flat_in == FlatMemory::kHost       ? 1
                          : args.kind == CopyKind::kTransfer ? kTransferBlocksPerSm
                                                             : kCopyBlocksPerSm;
  const uint64_t blocks = std::min(divide_up(divide_up(stripes, each), kWarps), sms * per_sm);
  return {static_cast<uint32_t>(blocks), kBlockThreads};
}

const char* kernel_name(CopyKind kind) {
  return kNames[kind == CopyKind::kTransfer ? 1 : 0];
}

std::span<const char* const> kernel_names() {
  return kNames;
}

}  // namespace kvferry::kernels
