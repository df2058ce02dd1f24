#include "daemon/node/segments.h"

namespace kvferry::node {

bool Segments::holds(const memory::Region& region) const {
  if (region.segment < first_ || region.segment - first_ >= segments_.size()) return false;
  const uint64_t bytes = at(region).bytes;
  return region.offset <= bytes && region.bytes <= bytes - region.offset;
}

std::byte* Segments::host_address(const memory::Region& region) const {
  std::byte* const base = at(region).host;
  return base == nullptr ? nullptr : base + region.offset;
}

cuda::CUdeviceptr Segments::address_on(const gpu::Device& device,
                                       const memory::Region& region) const {
  const Segment& segment = at(region);
  const cuda::CUdeviceptr base = segment.device != nullptr ? segment.base
                                 : segment.pin != nullptr  ? segment.pin->on(device)
                                                           : 0;
  return base == 0 ? 0 : base + region.offset;
}

std::shared_ptr<const void> Segments::keep(const memory::Region& region) const {
  const Segment& segment = at(region);
  if (segment.pin != nullptr) return segment.pin;
  return segment.keep;
}

}  // namespace kvferry::node
