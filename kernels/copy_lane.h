// What one thread of a copy kernel does. Written once for the kernels and their twin; `Mem` reads
// plan arrays (read) and moves data (load, store).
//
// The piece of the stream is cut into stripes of one 16-byte access for each lane of a warp; a warp
// gets consecutive stripes. Lane l moves the vectors whose number in the stripe is l modulo 32, so
// the flat side is always read or written in whole rows, whatever the fragments are. Each lane
// finds the place of its own vectors and keeps the box around it: lanes of one fragment find it in
// the same instructions. Lanes need nothing of each other.
#pragma once

#include <cstdint>

#include "kernels/locate.h"

namespace kvferry::kernels {

inline constexpr uint32_t kLanes = 32;
inline constexpr uint32_t kStripeBytes = kLanes * 16;
inline constexpr uint32_t kBatch = 4;  // loads in flight before the first store

inline constexpr uint32_t kCopyBlocksPerSm = 8;
inline constexpr uint32_t kTransferBlocksPerSm = 6;

struct Vector {
  uint32_t words[4];
};

// Does a store belong to memory that the GPU itself reads again soon?
enum class Store : uint8_t { kKeep, kStream };

KVFERRY_HD uint64_t lower_of(uint64_t a, uint64_t b) {
  return a < b ? a : b;
}

// Largest power of two up to `limit`, a power of two itself, that divides a number.
KVFERRY_HD uint32_t alignment_of(uint64_t number, uint32_t limit) {
  const uint32_t low = static_cast<uint32_t>(number & (limit - 1)) | limit;
  return low & (~low + 1);
}

// A part of the stream that a lane goes through: inside one bundle of each side, so short that
// positions in it are 32 bits.
struct Part {
  static constexpr uint64_t kMaxBytes = uint64_t{1} << 30;
  uint64_t begin;   // in the stream
  uint64_t end;     // of the bundle, in the stream
  uint64_t origin;  // where the bundle begins: vectors begin at multiples of their width from here
  uint32_t width;   // of a vector
};

// A lane's next vectors: at position, position + step, ..., `count` of them.
struct Batch {
  uint32_t position;
  uint32_t step;
  uint32_t count;

  KVFERRY_HD static Batch of(uint32_t position, uint32_t step, uint32_t limit) {
    const uint32_t left = limit - position;  // more than none
    uint32_t count = 1;
    KVFERRY_UNROLL
    for (uint32_t i = 1; i < kBatch; ++i) count += i * step < left ? 1 : 0;
    return {position, step, count};
  }
};

KVFERRY_HD uint32_t lower_of(uint32_t a, uint32_t b) {
  return a < b ? a : b;
}

// One side's pages: the bundle that a lane is in, and the box around its last place.
class Pages {
 public:
  KVFERRY_HD explicit Pages(const PlanView& plan) : plan_(plan) {}

  template <typename Mem>
  KVFERRY_HD Part enter(const Mem& mem, uint64_t position) {
    bundle_ = plan_.bundles + uint64_t{sizeof(PackedBundle)} *
                                  last_at_most<uint64_t>(mem, plan_.bundles, sizeof(PackedBundle),
                                                         plan_.bundle_count, position);
    const auto range = mem.template read<PackedRange>(bundle_ + offsetof(PackedBundle, range));
    const auto segments =
        mem.template read<PackedSegments>(bundle_ + offsetof(PackedBundle, segments));
    offset_ = position - range.stream_offset;
    box_.end = 0;
    return {position, range.stream_offset + range.bytes, range.stream_offset,
            segments.vector_bytes};
  }

  // Positions count from the part's begin and are asked for in ascending order.
  template <typename Mem>
  KVFERRY_HD void find(const Mem& mem, uint32_t position) {
    if (position >= box_.end) box_ = locate(mem, plan_, bundle_, offset_ + position, position);
  }
  KVFERRY_HD uint32_t box_end() const { return box_.end; }
  // The batch lies in the box.
  KVFERRY_HD void places(const Batch& batch, uint64_t (&at)[kBatch]) const {
    KVFERRY_UNROLL
    for (uint32_t i = 0; i < kBatch; ++i) at[i] = box_.place(batch.position + i * batch.step);
  }

 private:
  const PlanView& plan_;
  uint64_t bundle_ = 0;
  uint64_t offset_ = 0;  // of the part's begin in the bundle
  Box box_;
};

template <uint32_t kWidth, typename Mem>
KVFERRY_HD void load_each(const Mem& mem, const uint64_t (&from)[kBatch], uint32_t count,
                          Vector (&values)[kBatch]) {
  KVFERRY_UNROLL
  for (uint32_t i = 0; i < kBatch; ++i)
    if (i < count) values[i] = mem.template load<kWidth>(from[i]);
}

template <uint32_t kWidth, Store kStore, typename Mem>
KVFERRY_HD void store_each(const Mem& mem, const uint64_t (&to)[kBatch], uint32_t count,
                           const Vector (&values)[kBatch]) {
  KVFERRY_UNROLL
  for (uint32_t i = 0; i < kBatch; ++i)
    if (i < count) mem.template store<kWidth, kStore>(to[i], values[i]);
}

template <typename Mem>
KVFERRY_HD void load_batch(const Mem& mem, uint32_t width, const uint64_t (&from)[kBatch],
                           uint32_t count, Vector (&values)[kBatch]) {
  switch (width) {
    case 16:
      return load_each<16>(mem, from, count, values);
    case 8:
      return load_each<8>(mem, from, count, values);
    case 4:
      return load_each<4>(mem, from, count, values);
    case 2:
      return load_each<2>(mem, from, count, values);
    default:
      return load_each<1>(mem, from, count, values);
  }
}

template <Store kStore, typename Mem>
KVFERRY_HD void store_batch(const Mem& mem, uint32_t width, const uint64_t (&to)[kBatch],
                            uint32_t count, const Vector (&values)[kBatch]) {
  switch (width) {
    case 16:
      return store_each<16, kStore>(mem, to, count, values);
    case 8:
      return store_each<8, kStore>(mem, to, count, values);
    case 4:
      return store_each<4, kStore>(mem, to, count, values);
    case 2:
      return store_each<2, kStore>(mem, to, count, values);
    default:
      return store_each<1, kStore>(mem, to, count, values);
  }
}

// Of gather, scatter and clear.
class FlatCopy {
 public:
  KVFERRY_HD explicit FlatCopy(const CopyArgs& args) : args_(args), pages_(args.plan) {}

  template <typename Mem>
  KVFERRY_HD Part enter(const Mem& mem, uint64_t position) {
    Part part = pages_.enter(mem, position);
    if (args_.kind == CopyKind::kClear) return part;
    flat_ = args_.flat + (position - args_.stream_offset);
    part.width = alignment_of(flat_ - (position - part.origin), part.width);
    return part;
  }

  // Moves the lane's next vectors, at most kBatch, `step` bytes apart, all before `end`. How many.
  template <typename Mem>
  KVFERRY_HD uint32_t move_some(const Mem& mem, uint32_t width, uint32_t position, uint32_t step,
                                uint32_t end) {
    pages_.find(mem, position);
    const Batch batch = Batch::of(position, step, lower_of(end, pages_.box_end()));
    uint64_t at[kBatch];
    Vector values[kBatch] = {};
    if (args_.kind == CopyKind::kGather) {
      pages_.places(batch, at);
      load_batch(mem, width, at, batch.count, values);
      chunk(batch, at);
      store_batch<Store::kKeep>(mem, width, at, batch.count, values);
      return batch.count;
    }
    if (args_.kind == CopyKind::kScatter) {
      chunk(batch, at);
      load_batch(mem, width, at, batch.count, values);
    }
    pages_.places(batch, at);
    store_batch<Store::kStream>(mem, width, at, batch.count, values);
    return batch.count;
  }

 private:
  KVFERRY_HD void chunk(const Batch& batch, uint64_t (&at)[kBatch]) const {
    KVFERRY_UNROLL
    for (uint32_t i = 0; i < kBatch; ++i) at[i] = flat_ + (batch.position + i * batch.step);
  }

  const CopyArgs& args_;
  uint64_t flat_ = 0;  // of the part's begin
  Pages pages_;
};

// From pages to pages.
class PagesCopy {
 public:
  KVFERRY_HD explicit PagesCopy(const CopyArgs& args) : from_(args.plan), to_(args.other) {}

  template <typename Mem>
  KVFERRY_HD Part enter(const Mem& mem, uint64_t position) {
    Part from = from_.enter(mem, position);
    const Part to = to_.enter(mem, position);
    from.end = lower_of(from.end, to.end);
    from.width = alignment_of(from.origin - to.origin, lower_of(from.width, to.width));
    return from;
  }

  template <typename Mem>
  KVFERRY_HD uint32_t move_some(const Mem& mem, uint32_t width, uint32_t position, uint32_t step,
                                uint32_t end) {
    from_.find(mem, position);
    to_.find(mem, position);
    const Batch batch =
        Batch::of(position, step, lower_of(end, lower_of(from_.box_end(), to_.box_end())));
    uint64_t at[kBatch];
    Vector values[kBatch] = {};
    from_.places(batch, at);
    load_batch(mem, width, at, batch.count, values);
    to_.places(batch, at);
    store_batch<Store::kStream>(mem, width, at, batch.count, values);
    return batch.count;
  }

 private:
  Pages from_;
  Pages to_;
};

// A lane's share of the first `bytes` bytes of a part. What the range cuts off a vector goes byte
// by byte, before the whole ones or after them.
template <typename Copy, typename Mem>
KVFERRY_HD void copy_part(const Mem& mem, Copy* copy, const Part& part, uint32_t bytes,
                          uint32_t lane) {
  const auto odd = static_cast<uint32_t>(part.begin - part.origin) & (part.width - 1);
  const uint32_t cut = (odd + bytes) & (part.width - 1);
  for (uint32_t position = 0; position < bytes;) {
    const uint32_t before = (odd + position) & (part.width - 1);
    uint32_t width = 1;
    uint32_t stop = bytes;
    if (before != 0) {
      stop = lower_of(bytes, position + (part.width - before));
    } else if (bytes - position > cut) {
      width = part.width;
      stop = bytes - cut;
    }
    const uint32_t step = width * kLanes;
    for (uint32_t at = position + lane * width; at < stop;)
      at += copy->move_some(mem, width, at, step, stop) * step;
    position = stop;
  }
}

// A lane's share of the stream's bytes [position, end).
template <typename Copy, typename Mem>
KVFERRY_HD void copy_stretch(const Mem& mem, Copy copy, uint64_t position, uint64_t end,
                             uint32_t lane) {
  while (position < end) {
    const Part part = copy.enter(mem, position);
    const uint64_t bytes = lower_of(lower_of(end, part.end) - position, Part::kMaxBytes);
    copy_part(mem, &copy, part, static_cast<uint32_t>(bytes), lane);
    position += bytes;
  }
}

// How a piece of the stream is cut into stripes. The first one begins early enough for stripes to
// lie on lines of the flat side.
struct Stripes {
  uint64_t count;
  uint32_t skew;  // bytes that the first stripe lacks

  KVFERRY_HD static Stripes of(const CopyArgs& args) {
    const bool has_flat = args.kind == CopyKind::kGather || args.kind == CopyKind::kScatter;
    const auto skew =
        static_cast<uint32_t>((has_flat ? args.flat : args.stream_offset) % uint64_t{128});
    return {(skew + args.bytes + (kStripeBytes - 1)) / kStripeBytes, skew};
  }
};

// Stripes that each of `warps` warps gets, so that all are dealt; the last warps may get none.
KVFERRY_HD uint64_t stripes_each(uint64_t stripes, uint32_t warps) {
  // A division of 64 bits is hundreds of instructions on a GPU. Above two terabytes a rough one.
  if (stripes > UINT32_MAX - warps)
    return (uint64_t{static_cast<uint32_t>(stripes >> 16) / warps} + 1) << 16;
  return (static_cast<uint32_t>(stripes) + warps - 1) / warps;
}

// What lane `lane` of warp `warp` of `warps` does.
template <typename Copy, typename Mem>
KVFERRY_HD void copy_lane(const Mem& mem, const CopyArgs& args, uint32_t warp, uint32_t warps,
                          uint32_t lane) {
  const Stripes stripes = Stripes::of(args);
  const uint64_t each = stripes_each(stripes.count, warps) * kStripeBytes;
  const uint64_t begin = warp * each;
  const uint64_t end = lower_of(begin + each, stripes.skew + args.bytes);
  if (begin >= end) return;
  const uint64_t first = begin < stripes.skew ? stripes.skew : begin;
  copy_stretch(mem, Copy(args), args.stream_offset + (first - stripes.skew),
               args.stream_offset + (end - stripes.skew), lane);
}

}  // namespace kvferry::kernels
