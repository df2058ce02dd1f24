// How much a lane carries and how fast, and which lane gets the next chunk. Counts chunks of this
// side's sends alone. Whole numbers and the engine's time only, so that a run can be replayed.
#pragma once

#include <cstdint>
#include <span>

#include "daemon/base/units.h"

namespace kvferry::engine {

// One epoch of a lane. Its rate is what arrived while anything was on the way, by the time of that:
// what an idle lane does not carry says nothing of it.
class LaneFlow {
 public:
  // A chunk of so many bytes is on its way from now on.
  void offered(uint64_t bytes, Time now);
  // It has arrived. Chunks that are told of at one moment count as having shared the time.
  void arrived(uint64_t bytes, Time now);
  // It is no more on its way, and when it left the lane is not known.
  void left(uint64_t bytes);

  uint64_t in_flight() const { return in_flight_; }
  // Bytes a second, a mean that halves what is older every few samples; 0: nothing is known yet.
  // As of the last choice of a lane.
  uint64_t rate() const { return rate_; }
  uint64_t arrived_bytes() const { return arrived_bytes_; }

 private:
  friend class LaneChoice;
  void settle(uint64_t sample_bytes);

  uint64_t in_flight_ = 0;
  uint64_t arrived_bytes_ = 0;
  // The sample that is being taken: arrivals and the time they took. Open since `since_` if
  // anything is in flight.
  uint64_t sample_bytes_ = 0;
  uint64_t sample_ns_ = 0;
  Time since_;
  uint64_t rate_ = 0;
  uint32_t samples_ = 0;  // that the mean is made of, as far as that matters
  uint64_t passed_ = 0;   // bytes that others were given since its last chunk
};

// Picks the lane on which a chunk should arrive first, if each goes on as fast as it lately did.
//
//  * A lane of which nothing is known counts as being as fast as the fastest one.
//  * A lane that is passed over is tried again: with one chunk, once the others have carried as
//    much as costs that trial a sixteenth of their time.
//  * Among equals they take turns.
class LaneChoice {
 public:
  // `lanes`: null where a lane is not up. `sample_bytes`: what has to arrive before a rate is
  // believed, a full chunk. The index of the lane, or lanes.size() if none is up.
  std::size_t next(std::span<LaneFlow* const> lanes, uint64_t bytes, uint64_t sample_bytes);

 private:
  std::size_t turn_ = 0;
};

}  // namespace kvferry::engine
