// Finds where a byte of a stream lies in one side's memory: an offset is decoded axis by axis, and
// what comes back is not a place but a box around it, in which every further place is a few
// instructions away. Written once for the kernels and their twin. `Mem` is how plan arrays are
// read: mem.template read<T>(address).
//
// Tuned for GPUs: 32-bit arithmetic (a bundle has fewer than 2^32 cells), at most one division an
// axis, arrays that unroll into registers, 16-byte reads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/plan_view.h"

#if defined(__CUDACC__)
#define KVFERRY_UNROLL _Pragma("unroll")
#define KVFERRY_ROLLED _Pragma("unroll 1")
#else
#define KVFERRY_UNROLL
#define KVFERRY_ROLLED
#endif

namespace kvferry::kernels {

// Some bytes of the stream: equal pieces, each contiguous, in a grid of at most two dimensions.
// Positions count from a place of the user's choice, at or before which the box may begin.
struct Box {
  uint64_t address = 0;       // of position `begin`
  uint64_t inner_stride = 0;  // bytes, modulo 2^64, as the other one
  uint64_t outer_stride = 0;
  uint32_t begin = 0;  // modulo 2^32
  uint32_t end = 0;
  uint32_t piece_bytes = 0;  // 0: all of it is contiguous
  uint32_t inner_count = 0;  // 0: the pieces are one row

  KVFERRY_HD uint64_t place(uint32_t position) const {
    const uint32_t at = position - begin;
    if (piece_bytes == 0) return address + at;
    uint32_t piece = at / piece_bytes;
    uint64_t place = address + (at - piece * piece_bytes);
    if (inner_count != 0) {
      const uint32_t outer = piece / inner_count;
      piece -= outer * inner_count;
      place += outer * outer_stride;
    }
    return place + piece * inner_stride;
  }
};

// The last of `count` ascending values, `stride` bytes apart, that is at most `value`; the first
// one is.
template <typename T, typename Mem>
KVFERRY_HD uint32_t last_at_most(const Mem& mem, uint64_t values, uint32_t stride, uint32_t count,
                                 T value) {
  uint32_t first = 0;
  while (count > 1) {
    const uint32_t half = count / 2;
    if (mem.template read<T>(values + uint64_t{first + half} * stride) <= value) {
      first += half;
      count -= half;
    } else {
      count = half;
    }
  }
  return first;
}

KVFERRY_HD uint64_t high_product(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(a, b);
#else
  __extension__ using Wide = unsigned __int128;
  return static_cast<uint64_t>(Wide{a} * b >> 64);
#endif
}

// The cell of a bundle's byte. A division by an odd number d > 1 is a multiplication by
// floor(2^64 / d) + 1, which gives at most one too many; of d = 1 the magic is 0.
KVFERRY_HD uint32_t divide_by_cell(const PackedCell& cell, uint64_t offset) {
  const uint64_t number = offset >> cell.shift;
  if (cell.magic == 0) return static_cast<uint32_t>(number);
  const uint64_t quotient = high_product(number, cell.magic);
  const uint64_t divisor = cell.bytes >> cell.shift;
  return static_cast<uint32_t>(quotient * divisor > number ? quotient - 1 : quotient);
}

// How a cell stands on one axis.
struct Step {
  uint32_t count = 1;  // steps that lie alike: of the row, the span, the segment
  uint32_t index = 0;
};

// Where a cell stands. Axes have members of their own, and no array is indexed by a level, so that
// all of it is registers.
struct Decoded {
  Step plane, unit, token;
  uint32_t row = 0;
  uint32_t plane_number = 0;
  uint32_t segment = 0;
  uint32_t memory_block = 0;
  uint32_t memory_token = 0;  // in that block
  bool whole_block = true;    // the span is all of its block
};

template <typename Mem>
KVFERRY_HD PackedBlock find_block(const Mem& mem, const PlanView& plan, const PackedBlocks& axis,
                                  uint32_t token) {
  const uint64_t blocks = plan.blocks + uint64_t{axis.first_block} * sizeof(PackedBlock);
  const uint32_t guess =
      token < axis.first_tokens ? 0 : 1 + (token - axis.first_tokens) / axis.tokens;
  if (guess < axis.block_count) {
    const PackedBlock block =
        mem.template read<PackedBlock>(blocks + uint64_t{guess} * sizeof(PackedBlock));
    if (token - block.tokens_before < block.tokens) return block;
  }
  const uint32_t found =
      last_at_most<uint32_t>(mem, blocks, sizeof(PackedBlock), axis.block_count, token);
  return mem.template read<PackedBlock>(blocks + uint64_t{found} * sizeof(PackedBlock));
}

template <typename Mem>
KVFERRY_HD PackedSpan find_span(const Mem& mem, const PlanView& plan, const PackedBlock& block,
                                uint32_t token) {
  const uint64_t spans = plan.spans + uint64_t{block.first_span} * sizeof(PackedSpan);
  const uint32_t found =
      last_at_most<uint32_t>(mem, spans, sizeof(PackedSpan), block.span_count, token);
  return mem.template read<PackedSpan>(spans + uint64_t{found} * sizeof(PackedSpan));
}

// Decodes a cell, slowest axis first. What is left of its number is counted in cells of the axes
// not yet decoded, of which there are planes_ * tokens_ * units_.
template <typename Mem>
class Decoder {
 public:
  KVFERRY_HD Decoder(const Mem& mem, const PlanView& plan, uint64_t bundle, const PackedAxes& axes,
                     uint32_t cell)
      : mem_(mem),
        plan_(plan),
        bundle_(bundle),
        cell_(cell),
        planes_(axes.plane_count),
        tokens_(axes.token_count),
        units_(axes.unit_count) {}

  KVFERRY_HD Decoded run(uint32_t order) {
    const uint32_t levels = order >> 28;
    KVFERRY_ROLLED
    for (uint32_t level = 0; level < levels; ++level, order >>= 4) {
      switch (order & 15) {
        case kPackedRow:
          row();
          break;
        case kPackedPlane:
          plane();
          break;
        case kPackedBlock:
          block();
          break;
        case kPackedUnit:
          unit();
          break;
        default:
          token();
          break;
      }
    }
    return place_;
  }

 private:
  KVFERRY_HD uint32_t take(uint32_t cells) {
    const uint32_t steps = cell_ / cells;
    cell_ -= steps * cells;
    return steps;
  }
  KVFERRY_HD uint32_t read(uint64_t numbers, uint32_t index) const {
    return mem_.template read<uint32_t>(numbers + uint64_t{index} * sizeof(uint32_t));
  }

  KVFERRY_HD void row() {
    const auto axis = mem_.template read<PackedRows>(bundle_ + offsetof(PackedBundle, rows));
    const uint32_t cells = tokens_ * units_;  // of a plane
    const uint32_t plane = cell_ / cells;
    if (axis.row_planes != 0) {
      planes_ = axis.row_planes;
      place_.row = plane / planes_;
      place_.plane_number = place_.row * planes_;
    } else {
      const uint64_t rows = plan_.rows + uint64_t{axis.first_row} * sizeof(uint32_t);
      place_.row = last_at_most<uint32_t>(mem_, rows, sizeof(uint32_t), axis.row_count, plane);
      place_.plane_number = read(rows, place_.row);
      planes_ = read(rows, place_.row + 1) - place_.plane_number;
    }
    cell_ -= place_.plane_number * cells;
  }

  KVFERRY_HD void plane() {
    place_.plane.count = planes_;
    planes_ = 1;
    place_.plane.index = take(tokens_ * units_);
    place_.plane_number += place_.plane.index;
  }

  KVFERRY_HD void block() {
    const auto axis = mem_.template read<PackedBlocks>(bundle_ + offsetof(PackedBundle, blocks));
    const uint32_t cells = planes_ * units_;  // of a token
    block_ = find_block(mem_, plan_, axis, cell_ / cells);
    cell_ -= block_.tokens_before * cells;
    tokens_ = block_.tokens;
  }

  KVFERRY_HD void token() {
    tokens_ = 1;
    const uint32_t token = take(planes_ * units_);
    const PackedSpan span = find_span(mem_, plan_, block_, token);
    place_.token.count = span.count;
    place_.token.index = token - span.tokens_before;
    place_.whole_block = block_.span_count == 1;
    place_.memory_block = span.block;
    place_.memory_token = span.token + place_.token.index;
  }

  KVFERRY_HD void unit() {
    const auto axis =
        mem_.template read<PackedSegments>(bundle_ + offsetof(PackedBundle, segments));
    place_.unit.count = units_;
    units_ = 1;
    place_.unit.index = take(planes_ * tokens_);
    if (axis.segment_count == 1) return;
    const uint64_t segments = plan_.segments + uint64_t{axis.first_segment} * sizeof(uint32_t);
    place_.segment = last_at_most<uint32_t>(mem_, segments, sizeof(uint32_t), axis.segment_count,
                                            place_.unit.index);
    const uint32_t before = read(segments, place_.segment);
    place_.unit.count = read(segments, place_.segment + 1) - before;
    place_.unit.index -= before;
  }

  const Mem& mem_;
  const PlanView& plan_;
  const uint64_t bundle_;
  uint32_t cell_;
  uint32_t planes_;
  uint32_t tokens_;
  uint32_t units_;
  PackedBlock block_{};
  Decoded place_;
};

// Widens a cell to a box, fastest axis first, as long as its axes are strides and two dimensions
// are enough.
class BoxBuilder {
 public:
  KVFERRY_HD BoxBuilder(uint64_t cell_address, uint32_t cell_bytes)
      : address_(cell_address), bytes_(cell_bytes) {}

  // False if the axis is not in the box.
  KVFERRY_HD bool add(const Step& step, uint64_t stride) {
    if (step.count == 1) return true;
    if (dims_ == 0 && stride == bytes_) {
      grow(step, stride);
      return true;
    }
    // A box in pieces is indexed with 32 bits.
    if (bytes_ > UINT32_MAX || bytes_ * step.count > UINT32_MAX) return false;
    if (dims_ == 0) {
      dims_ = 1;
      piece_bytes_ = static_cast<uint32_t>(bytes_);
      inner_count_ = step.count;
      inner_stride_ = stride;
    } else if (stride == reach_) {
      if (dims_ == 1) inner_count_ *= step.count;
    } else if (dims_ == 1) {
      dims_ = 2;
      outer_stride_ = stride;
    } else {
      return false;
    }
    grow(step, stride);
    return true;
  }

  // `position` is the user's name for the byte `in_cell` of the cell.
  KVFERRY_HD Box finish(uint32_t position, uint32_t in_cell) const {
    const uint64_t before = before_ + in_cell;
    const uint64_t end = position + (bytes_ - before);
    Box box;
    box.address = address_;
    box.inner_stride = inner_stride_;
    box.outer_stride = outer_stride_;
    box.begin = position - static_cast<uint32_t>(before);
    box.end = end < UINT32_MAX ? static_cast<uint32_t>(end) : UINT32_MAX;
    box.piece_bytes = piece_bytes_;
    box.inner_count = dims_ == 2 ? inner_count_ : 0;
    if (dims_ == 0) {  // what is before may be more than 32 bits say
      box.address += before;
      box.begin = position;
    }
    return box;
  }

 private:
  KVFERRY_HD void grow(const Step& step, uint64_t stride) {
    address_ -= step.index * stride;
    before_ += step.index * bytes_;
    bytes_ *= step.count;
    reach_ = step.count * stride;
  }

  uint64_t address_;
  uint64_t bytes_;
  uint64_t before_ = 0;  // bytes of the box before the cell
  uint64_t reach_ = 0;   // a slower axis of this stride goes on where the last one ends
  uint64_t inner_stride_ = 0;
  uint64_t outer_stride_ = 0;
  uint32_t piece_bytes_ = 0;
  uint32_t inner_count_ = 0;
  uint32_t dims_ = 0;
};

template <typename Mem>
KVFERRY_HD void widen(const Mem& mem, uint64_t bundle, uint32_t order, uint64_t strip,
                      const Decoded& place, BoxBuilder* box) {
  KVFERRY_ROLLED
  for (uint32_t level = order >> 28; level-- != 0;) {
    bool open = true;
    switch (order >> (4 * level) & 15) {
      case kPackedRow: {
        const auto rows = mem.template read<PackedRows>(bundle + offsetof(PackedBundle, rows));
        open = (rows.flags & kRowsRegular) != 0 &&
               box->add({rows.row_count, place.row},
                        mem.template read<uint64_t>(bundle + offsetof(PackedBundle, strides.row)));
        break;
      }
      case kPackedPlane: {
        const auto rows = mem.template read<PackedRows>(bundle + offsetof(PackedBundle, rows));
        open =
            (place.plane.count == 1 || (rows.flags & kPlanesRegular) != 0) &&
            box->add(place.plane,
                     mem.template read<uint64_t>(bundle + offsetof(PackedBundle, strides.plane)));
        break;
      }
      case kPackedBlock:
        open =
            mem.template read<PackedBlocks>(bundle + offsetof(PackedBundle, blocks)).block_count ==
            1;
        break;
      case kPackedUnit: {
        const auto units =
            mem.template read<PackedSegments>(bundle + offsetof(PackedBundle, segments));
        open = box->add(place.unit,
                        mem.template read<uint64_t>(strip + offsetof(PackedStrip, unit_stride))) &&
               units.segment_count == 1;
        break;
      }
      default:
        open = box->add(place.token,
                        mem.template read<uint64_t>(strip + offsetof(PackedStrip, token_stride))) &&
               place.whole_block;
        break;
    }
    if (!open) return;
  }
}

// The box around byte `offset` of the bundle whose PackedBundle lies at `bundle`. That byte's
// position in the box's count is `position`.
template <typename Mem>
KVFERRY_HD Box locate(const Mem& mem, const PlanView& plan, uint64_t bundle, uint64_t offset,
                      uint32_t position) {
  const auto cell = mem.template read<PackedCell>(bundle + offsetof(PackedBundle, cell));
  const auto axes = mem.template read<PackedAxes>(bundle + offsetof(PackedBundle, axes));
  const uint32_t number = divide_by_cell(cell, offset);
  const Decoded place = Decoder<Mem>(mem, plan, bundle, axes, number).run(axes.order);
  const auto segments =
      mem.template read<PackedSegments>(bundle + offsetof(PackedBundle, segments));
  const uint64_t strip =
      plan.strips + (segments.first_strip + uint64_t{place.plane_number} * segments.segment_count +
                     place.segment) *
                        sizeof(PackedStrip);
  const auto strides = mem.template read<PackedStrip>(strip);
  BoxBuilder box(strides.address + place.memory_block * strides.block_stride +
                     place.unit.index * strides.unit_stride +
                     place.memory_token * strides.token_stride,
                 cell.bytes);
  widen(mem, bundle, axes.order, strip, place, &box);
  return box.finish(position, static_cast<uint32_t>(offset - uint64_t{number} * cell.bytes));
}

}  // namespace kvferry::kernels
