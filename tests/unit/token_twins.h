// The token arithmetic of the mapping said once more, in the plainest way: for tests whose
// expectations must not come from the code they test.
#pragma once

#include <cstdint>

#include "daemon/mapping/layout.h"

namespace kvferry::mapping::test {

inline uint64_t down(uint64_t x, uint64_t g) {
  return x / g * g;
}
inline uint64_t up(uint64_t x, uint64_t g) {
  return (x + g - 1) / g * g;
}

inline uint64_t interleave_of(const Group& group) {
  return group.cp_size == 1 || group.cp_interleave == 0 ? group.tokens_per_block
                                                        : group.cp_interleave;
}
inline uint64_t granule(const Group& group) {
  return group.cp_size == 1 ? group.tokens_per_block : interleave_of(group);
}
inline bool stores(const Group& group, uint64_t p) {
  return group.cp_size == 1 || p / interleave_of(group) % group.cp_size == group.cp_index;
}
// How many of the prompt's positions the rank stores; counted.
inline uint64_t stored_of(const Group& group, uint64_t prompt) {
  uint64_t count = 0;
  for (uint64_t p = 0; p < prompt; ++p)
    if (stores(group, p)) ++count;
  return count;
}
// Local position of one that is stored, and back.
inline uint64_t local_of(const Group& group, uint64_t p) {
  const uint64_t i = interleave_of(group);
  return group.cp_size == 1 ? p : p / (i * group.cp_size) * i + p % i;
}
inline uint64_t position_of(const Group& group, uint64_t local) {
  const uint64_t i = interleave_of(group);
  return group.cp_size == 1 ? local : (local / i * group.cp_size + group.cp_index) * i + local % i;
}

}  // namespace kvferry::mapping::test
