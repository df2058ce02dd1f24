// Whether strided sets of bytes can meet. Internal to the mapping folder.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "daemon/mapping/layout.h"

namespace kvferry::mapping {

// Bytes offset + sum(i_k * stride_k) + [0, cell_bytes), 0 <= i_k < count_k.
struct StridedBox {
  struct Axis {
    uint64_t count = 1;
    uint64_t stride = 0;
  };
  uint64_t offset = 0;
  uint64_t cell_bytes = 0;
  std::vector<Axis> ids;    // the block id axis: at most one
  std::vector<Axis> inner;  // the others; both by falling stride, counts above 1 only
  std::vector<Axis> all;
  uint64_t extent = 0;  // from offset to the end of the last cell
};

// The plane's numbers must have passed the range checks, so that the extent fits in 64 bits.
StridedBox box_of(const Group& group, const Plane& plane);

// True if no two cells of the box share a byte, shown by each axis stepping over all faster ones.
bool steps_over_itself(const StridedBox& box);

enum class SameId : uint8_t { kMayMeet, kMustNotMeet };

// Shows that two boxes share no byte; false also if that cannot be shown within `steps`, which is
// counted down. With kMayMeet, cells of equal block ids are let be.
bool shown_disjoint(const StridedBox& a, const StridedBox& b, SameId same_id, uint64_t& steps);

}  // namespace kvferry::mapping
