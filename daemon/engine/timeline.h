// When each step of one rank's part of a transfer was taken: the first time, the last one and how
// often. Of a fixed size, whatever a transfer does.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

#include "daemon/base/units.h"

namespace kvferry::engine {

// In the order of a transfer where all goes well.
enum class Step : uint8_t {
  kAsked,       // the worker's call; sender: of each slice
  kResolved,    // receiver: the directory has told the legs
  kPulled,      // receiver: PULLs that went out; sender: that came and were proven
  kMatched,     // sender: a receiver's rank has its place; receiver: its sender has answered
  kSlice,       // SLICEs; sender: that went out; receiver: that came
  kReady,       // sender: slices that may be read; receiver: the pages may be written
  kGranted,     // credits; receiver: given; sender: got
  kGathering,   // chunks: gathers begun ...
  kGathered,    // ... and ended well
  kOffered,     // sender: offers, and chunks written into the peer's arena; receiver: accepted
  kArrived,     // sender: acknowledged; receiver: landed
  kReused,      // receiver: copied from blocks of this node
  kScattering,  // receiver: scatters begun, and copies from a sender on this node ...
  kScattered,   // ... and ended well
  kEnded,       // the state is final
  kReleased,    // the worker has its pages back
};
inline constexpr std::size_t kSteps = 16;

constexpr std::string_view name_of(Step step) {
  constexpr std::array<std::string_view, kSteps> kNames{
      "asked",      "resolved",  "pulled",   "matched", "slice",   "ready",
      "granted",    "gathering", "gathered", "offered", "arrived", "reused",
      "scattering", "scattered", "ended",    "released"};
  return kNames.at(static_cast<std::size_t>(step));
}

struct StepTimes {
  Time first;
  Time last;
  uint64_t count = 0;  // 0: it has not been taken
};

class Timeline {
 public:
  void note(Step step, Time now, uint64_t count = 1) {
    StepTimes& times = steps_[static_cast<std::size_t>(step)];
    if (times.count == 0) times.first = now;
    times.last = now;
    times.count += count;
  }
  const StepTimes& of(Step step) const { return steps_.at(static_cast<std::size_t>(step)); }

 private:
  std::array<StepTimes, kSteps> steps_{};
};

}  // namespace kvferry::engine
