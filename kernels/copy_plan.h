// The compact form of one side of a stream: where each byte of the stream lies in that side's
// pools. Plane strides, unit intervals, token spans and block ids; nothing is expanded per
// fragment, and any stream offset is found by prefix sums, axis by axis. Plain arrays without
// pointers, so that a GPU kernel can take the same form. Immutable once made, readable from any
// thread.
//
// A stream is a row of bundles. A bundle is a product of five axes, nested in the bundle's order:
//   row     the slower one of layer and role
//   plane   the faster one of the two, within a row (rows may differ in length)
//   block   blocks of the receiver, ascending
//   token   cells within one of those blocks
//   unit    heads (or other shards), ascending
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace kvferry::kernels {

enum class Axis : uint8_t { kRow, kPlane, kBlock, kUnit, kToken };
inline constexpr int kAxes = 5;

// Where a plane's cells of one unit segment lie. Offsets are bytes from the pool's first byte:
// offset + block * block_stride + (unit in segment) * unit_stride + token * token_stride.
struct Strip {
  uint64_t offset = 0;
  uint64_t block_stride = 0;
  uint64_t unit_stride = 0;
  uint64_t token_stride = 0;
  uint32_t pool = 0;
};

// Consecutive tokens inside one block of this side's memory.
struct TokenSpan {
  uint32_t block = 0;  // kernel block number
  uint32_t token = 0;  // first token in it
  uint32_t count = 0;
};

// A block of the receiver, as the block axis counts them.
struct BlockEntry {
  uint64_t tokens_before = 0;  // cells of the token axis in the blocks before this one
  uint32_t first_span = 0;     // its spans end where the next entry's begin
};

struct Bundle {
  uint64_t stream_offset = 0;
  uint64_t bytes = 0;
  uint64_t cell_bytes = 0;
  std::array<Axis, kAxes> order{};  // slowest first; kRow before kPlane, kBlock before kToken

  uint32_t first_row = 0;  // rows[first_row + i]: planes before row i; row_count + 1 entries
  uint32_t row_count = 0;
  uint32_t plane_count = 0;
  uint32_t first_strip = 0;    // strips[first_strip + plane * segment_count + segment]
  uint32_t first_segment = 0;  // segments[first_segment + i]: units before segment i; + 1 entry
  uint32_t segment_count = 0;
  uint32_t first_block = 0;  // blocks[first_block + i]; block_count + 1 entries
  uint32_t block_count = 0;
  uint64_t token_count = 0;  // of all blocks
  uint64_t unit_count = 0;   // of all segments

  // True: moving on by one row or plane moves the address by a constant (modulo 2^64) in the same
  // pool, so the axis may be walked as a stride.
  bool rows_regular = false;
  bool planes_regular = false;
  uint64_t row_stride = 0;
  uint64_t plane_stride = 0;
};

struct CopyPlan {
  uint64_t bytes = 0;
  uint32_t pool_count = 0;  // one more than the largest pool index
  std::vector<Bundle> bundles;
  std::vector<uint32_t> rows;
  std::vector<Strip> strips;
  std::vector<uint32_t> segments;
  std::vector<BlockEntry> blocks;
  std::vector<TokenSpan> spans;
};

}  // namespace kvferry::kernels
