// The simulator's only source of chance: a small generator whose whole state is one number, so that
// a run is a function of its seed on every machine (the standard distributions are not).
#pragma once

#include <chrono>
#include <cstdint>

#include "daemon/base/units.h"

namespace kvferry::sim {

// One round of splitmix64: also used as a hash of small keys.
constexpr uint64_t mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15ULL;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL;
  return x ^ (x >> 31);
}

class Rng {
 public:
  explicit Rng(uint64_t seed) : state_(mix(seed)) {}

  uint64_t next() {
    state_ += 0x9E3779B97F4A7C15ULL;
    return mix(state_);
  }
  // 0 ... count - 1; 0 for count 0.
  uint64_t below(uint64_t count) { return count == 0 ? 0 : next() % count; }
  // low ... high, both included.
  uint64_t between(uint64_t low, uint64_t high) { return low + below(high - low + 1); }
  uint32_t pick(uint32_t low, uint32_t high) { return static_cast<uint32_t>(between(low, high)); }
  bool chance(uint64_t permille) { return below(1000) < permille; }
  Duration micros(uint64_t low, uint64_t high) {
    return std::chrono::nanoseconds(between(low * 1000, high * 1000));
  }

 private:
  uint64_t state_;
};

}  // namespace kvferry::sim
