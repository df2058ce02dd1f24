// A piece of an arena. Plain data: it crosses to the rails process as it is, since a pointer of one
// process means nothing in the other.
#pragma once

#include <compare>
#include <cstdint>

namespace kvferry::memory {

struct Region {
  uint32_t segment = 0;  // index of the arena's segment
  uint64_t offset = 0;   // bytes from the segment's first byte
  uint64_t bytes = 0;
  auto operator<=>(const Region&) const = default;
};

}  // namespace kvferry::memory
