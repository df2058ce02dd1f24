// The GPU kernels' twin on the memory of a test.
#pragma once

#include <catch2/catch.hpp>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <vector>

#include "kernels/device_copy.h"

namespace kvferry::kernels::test {

inline uint64_t address_of(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer);
}

// Addresses are those of the test's own memory, as far as it has been shown.
class Shown : public TwinMemory {
 public:
  void show(const void* begin, uint64_t bytes, bool written) {
    ranges_.push_back({address_of(begin), bytes, written});
  }
  const std::byte* readable(uint64_t address, uint64_t bytes) const override {
    return inside(address, bytes, false) ? reinterpret_cast<const std::byte*>(address) : nullptr;
  }
  std::byte* writable(uint64_t address, uint64_t bytes) const override {
    return inside(address, bytes, true) ? reinterpret_cast<std::byte*>(address) : nullptr;
  }

 private:
  struct Range {
    uint64_t begin, bytes;
    bool written;
  };
  bool inside(uint64_t address, uint64_t bytes, bool written) const {
    for (const Range& range : ranges_)
      if (address >= range.begin && bytes <= range.bytes &&
          address - range.begin <= range.bytes - bytes && (range.written || !written))
        return true;
    return false;
  }
  std::vector<Range> ranges_;
};

// A plan as it lies on the device: packed, at an aligned address.
class Uploaded {
 public:
  Uploaded(const CopyPlan& plan, std::span<std::byte* const> bases) {
    std::vector<uint64_t> addresses;
    for (const std::byte* base : bases) addresses.push_back(address_of(base));
    const auto packed = PackedPlan::make(plan, addresses);
    REQUIRE(packed);
    bytes_ = packed->image().size();
    image_ = std::make_unique<Line[]>(bytes_ / sizeof(Line) + 1);
    if (bytes_ != 0) std::memcpy(image_.get(), packed->image().data(), bytes_);
    view_ = packed->view_at(address_of(image_.get()));
  }
  const PlanView& view() const { return view_; }
  void show(Shown* memory) const { memory->show(image_.get(), bytes_, false); }

 private:
  struct alignas(PackedPlan::kAlignment) Line {
    std::byte bytes[PackedPlan::kAlignment];
  };
  std::unique_ptr<Line[]> image_;
  uint64_t bytes_ = 0;
  PlanView view_{};
};

// A side's pools as the device has them.
struct TwinSide {
  const CopyPlan& plan;
  std::span<std::byte* const> bases;
  std::span<const uint64_t> bytes;  // of each pool
};

inline void show_pools(const TwinSide& side, bool written, Shown* memory) {
  for (std::size_t i = 0; i < side.bases.size(); ++i)
    memory->show(side.bases[i], side.bytes[i], written);
}

// `blocks` of the launch: 0 is launch_shape()'s number.
inline TwinResult run_twin(const Shown& memory, const CopyArgs& args, uint32_t blocks) {
  const LaunchShape shape = launch_shape(args, 2);
  if (shape.blocks == 0) return TwinResult::kOk;
  return run_copy_twin(memory, args, {blocks == 0 ? shape.blocks : blocks, shape.threads});
}

// Gather, scatter and clear: what a kernel may read is shown read-only.
inline TwinResult twin_copy(CopyKind kind, const TwinSide& side, uint64_t stream_offset,
                            uint64_t bytes, std::byte* flat, uint32_t blocks) {
  const Uploaded plan(side.plan, side.bases);
  Shown memory;
  plan.show(&memory);
  show_pools(side, kind != CopyKind::kGather, &memory);
  if (kind != CopyKind::kClear) memory.show(flat, bytes, kind == CopyKind::kGather);
  CopyArgs args{};
  args.plan = plan.view();
  args.stream_offset = stream_offset;
  args.bytes = bytes;
  args.flat = address_of(flat);
  args.kind = kind;
  return run_twin(memory, args, blocks);
}

inline TwinResult twin_transfer(const TwinSide& source, const TwinSide& destination,
                                uint64_t stream_offset, uint64_t bytes, uint32_t blocks) {
  const Uploaded from(source.plan, source.bases);
  const Uploaded to(destination.plan, destination.bases);
  Shown memory;
  from.show(&memory);
  to.show(&memory);
  show_pools(source, false, &memory);
  show_pools(destination, true, &memory);
  CopyArgs args{};
  args.plan = from.view();
  args.other = to.view();
  args.stream_offset = stream_offset;
  args.bytes = bytes;
  args.kind = CopyKind::kTransfer;
  return run_twin(memory, args, blocks);
}

}  // namespace kvferry::kernels::test
