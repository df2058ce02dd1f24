// Time and checked arithmetic. Sizes and counts are uint64_t with a suffix that names the unit.
#pragma once

#include <bit>
#include <chrono>
#include <compare>
#include <cstdint>
#include <limits>

namespace kvferry {

using Duration = std::chrono::nanoseconds;

// A moment on the monotonic clock (in the simulator: on its virtual clock).
struct Time {
  int64_t ns = 0;
  constexpr auto operator<=>(const Time&) const = default;
  static constexpr Time never() { return {std::numeric_limits<int64_t>::max()}; }
};

// Saturates: a deadline of "never" stays never.
constexpr Time operator+(Time time, Duration delta) {
  int64_t sum = 0;
  if (__builtin_add_overflow(time.ns, delta.count(), &sum))
    return delta.count() > 0 ? Time::never() : Time{std::numeric_limits<int64_t>::min()};
  return {sum};
}
constexpr Duration operator-(Time later, Time earlier) {
  return Duration(later.ns - earlier.ns);
}

// The process's monotonic clock. The engine never calls it; time is handed in.
inline Time monotonic_now() {
  return {std::chrono::duration_cast<Duration>(std::chrono::steady_clock::now().time_since_epoch())
              .count()};
}

// False on overflow; then `out` is undefined.
[[nodiscard]] constexpr bool checked_add(uint64_t a, uint64_t b, uint64_t& out) {
  return !__builtin_add_overflow(a, b, &out);
}
[[nodiscard]] constexpr bool checked_mul(uint64_t a, uint64_t b, uint64_t& out) {
  return !__builtin_mul_overflow(a, b, &out);
}
constexpr uint64_t ceil_div(uint64_t a, uint64_t b) {
  return a / b + (a % b != 0 ? 1 : 0);
}
constexpr uint64_t round_down(uint64_t a, uint64_t granule) {
  return a - a % granule;
}
// The caller knows that the result fits.
constexpr uint64_t round_up(uint64_t a, uint64_t granule) {
  return ceil_div(a, granule) * granule;
}

// Half-open interval of tokens, units, layers or bytes.
struct Range {
  uint64_t begin = 0;
  uint64_t end = 0;
  constexpr auto operator<=>(const Range&) const = default;
  constexpr bool empty() const { return begin >= end; }
  constexpr uint64_t size() const { return empty() ? 0 : end - begin; }
};
constexpr Range intersect(Range a, Range b) {
  const Range r{a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end};
  return r.empty() ? Range{} : r;
}

}  // namespace kvferry
