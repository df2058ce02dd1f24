// What a copy kernel takes: a CopyPlan packed for the device, and one piece of work on it. Plain
// structures for host and device code, without pointers; an address is a number of 64 bits in the
// memory that the kernel runs on.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define KVFERRY_HD __host__ __device__ __forceinline__
#else
#define KVFERRY_HD inline
#endif

namespace kvferry::kernels {

inline constexpr uint32_t kBlockThreads = 128;  // of every launch

// What a kernel reads is in words of 16 bytes, each read where it is needed.

// Axes that a bundle nests, as nibbles of PackedAxes::order. As kernels::Axis, but axes of one step
// are left out, and rows whose planes follow them at once: the planes are counted through.
enum PackedAxis : uint32_t { kPackedRow, kPackedPlane, kPackedBlock, kPackedUnit, kPackedToken };

enum PackedFlag : uint32_t {
  kRowsRegular = 1,    // the row axis may be walked with row_stride
  kPlanesRegular = 2,  // the plane axis may be walked with plane_stride
};

struct alignas(16) PackedRange {
  uint64_t stream_offset;
  uint64_t bytes;
};
struct alignas(16) PackedCell {
  uint64_t magic;  // see divide_by_cell() in locate.h
  uint32_t bytes;
  uint32_t shift;
};
struct alignas(16) PackedAxes {
  uint32_t order;  // nibble i is the axis of level i, the slowest is 0; nibble 7: how many
  uint32_t plane_count;
  uint32_t token_count;
  uint32_t unit_count;
};
struct alignas(16) PackedRows {
  uint32_t first_row;
  uint32_t row_count;
  uint32_t row_planes;  // of every row; 0 where rows differ and must be searched
  uint32_t flags;
};
struct alignas(16) PackedStrides {
  uint64_t row;
  uint64_t plane;
};
struct alignas(16) PackedSegments {
  uint32_t first_strip;
  uint32_t first_segment;
  uint32_t segment_count;
  uint32_t vector_bytes;  // power of two up to 16 that divides every address and the cell's bytes
};
struct alignas(16) PackedBlocks {
  uint32_t first_block;
  uint32_t block_count;
  // A guess at where a token's block stands: the first block is often partial, and the others but
  // the last are alike.
  uint32_t first_tokens;
  uint32_t tokens;
};

struct alignas(16) PackedBundle {
  PackedRange range;
  PackedCell cell;
  PackedAxes axes;
  PackedRows rows;
  PackedStrides strides;
  PackedSegments segments;
  PackedBlocks blocks;
};

struct alignas(16) PackedStrip {
  uint64_t address;  // the pool's base is in it
  uint64_t block_stride;
  uint64_t unit_stride;
  uint64_t token_stride;
};

struct alignas(16) PackedBlock {
  uint32_t tokens_before;
  uint32_t tokens;
  uint32_t first_span;
  uint32_t span_count;
};

struct alignas(16) PackedSpan {
  uint32_t tokens_before;  // in its block
  uint32_t count;
  uint32_t block;
  uint32_t token;
};

// Where a packed plan's arrays lie on the device.
struct PlanView {
  uint64_t bytes;  // of the stream
  uint64_t bundles;
  uint64_t strips;
  uint64_t blocks;
  uint64_t spans;
  uint64_t rows;      // uint32_t
  uint64_t segments;  // uint32_t
  uint32_t bundle_count;
  uint32_t unused;
};

enum class CopyKind : uint8_t {
  kGather,    // plan's pages -> flat
  kScatter,   // flat -> plan's pages
  kTransfer,  // plan's pages -> other's pages, of the same stream, which must not overlap
  kClear,     // zeros -> plan's pages
};

// The stream's bytes [stream_offset, stream_offset + bytes) of the plan, not empty. The kernel's
// one parameter, passed by value.
struct CopyArgs {
  PlanView plan;
  PlanView other;  // transfer only
  uint64_t stream_offset;
  uint64_t bytes;
  uint64_t flat;  // gather, scatter: where byte stream_offset of the stream lies or goes
  CopyKind kind;
};

}  // namespace kvferry::kernels
