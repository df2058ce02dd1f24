// How much a lane carries and how fast, and which lane gets the next chunk. Counts chunks of this
// side's sends alone. Whole numbers and the engine's time only, so that a run can be replayed.
#pragma once

#include <cstdint>
#include <map>
#include <span>

#include "daemon/base/units.h"

namespace kvferry::engine {

// One epoch of a lane, which carries its chunks one after the other. Each counts with the time
// since it was offered or since the one before it arrived, whichever is shorter: neither an idle
// lane nor a chunk that waits at the receiver makes the lane slow for the others.
//
// A chunk is *overtaken* when one that is no smaller was offered later and has arrived: it has been
// carried too, and what it waits for is not the lane.
class LaneFlow {
 public:
  // `full_bytes`: of the largest chunk, below 2^52.
  explicit LaneFlow(uint64_t full_bytes = 1) : full_bytes_(full_bytes) {}

  // A chunk of so many bytes is on its way from now on. Its number on this lane.
  uint64_t offered(uint64_t bytes, Time now);
  // It has arrived. Chunks that are told of at one moment share the time.
  void arrived(uint64_t chunk, uint64_t bytes, Time now);
  // It is no more on its way, and when it left the lane is not known.
  void left(uint64_t chunk, uint64_t bytes, Time now);

  uint64_t in_flight() const { return in_flight_; }
  // What of that is not overtaken: the next chunk arrives behind it.
  uint64_t queued() const { return queued_bytes_; }
  // Bytes a second, a mean that halves what is older every few samples; 0: nothing is known yet.
  // As of the last choice of a lane.
  uint64_t rate() const { return rate_; }
  uint64_t arrived_bytes() const { return arrived_bytes_; }

 private:
  friend class LaneChoice;
  struct Queued {
    uint64_t bytes = 0;
    Time offered;
  };
  // Arrivals and the time they took.
  struct Sample {
    uint64_t chunks = 0;
    uint64_t bytes = 0;
    uint64_t ns = 0;
  };
  void take(std::map<uint64_t, Queued>::iterator chunk);
  void settle(uint64_t fastest);
  bool trial_due(uint64_t fastest) const;
  void given(uint64_t bytes, uint64_t fastest);

  uint64_t full_bytes_;
  uint64_t next_ = 0;
  uint64_t in_flight_ = 0;
  uint64_t arrived_bytes_ = 0;
  std::map<uint64_t, Queued> queued_;  // in flight and not overtaken, by number
  uint64_t queued_bytes_ = 0;
  Time since_;  // the lane's last chunk was carried by then

  // The samples that are being taken, of full chunks and of smaller ones.
  Sample full_;
  Sample small_;
  uint64_t small_ns_ = 0;  // of that, the time of the lane's last chunk
  uint64_t rate_ = 0;
  uint32_t samples_ = 0;  // that the mean is made of, as far as that matters

  uint64_t passed_ = 0;      // bytes that others were given since its last full chunk or trial
  uint64_t trial_ = 0;       // bytes that it was given of the trial that is due
  uint32_t unanswered_ = 0;  // trials since anything arrived
};

// Picks the lane on which a chunk should arrive first, if each goes on as fast as it lately did.
//
//  * A lane of which nothing is known counts as being as fast as the fastest one.
//  * A lane that is passed over is tried again, with a full chunk's bytes, once the others have
//    carried as much as costs that trial a sixteenth of their time, but 4096 full chunks at most.
//    As long as nothing arrives by it the next trial is due after twice as much.
//  * Among equals they take turns.
class LaneChoice {
 public:
  // `lanes`: null where a lane is not up. The index of the lane, or lanes.size() if none is up.
  // For 0 bytes, which are no trial, the lane that is free first.
  // Nothing is booked: the same question has the same answer.
  std::size_t pick(std::span<LaneFlow* const> lanes, uint64_t bytes) const;
  // The chunk is offered on that lane. Its number there.
  uint64_t give(std::span<LaneFlow* const> lanes, std::size_t lane, uint64_t bytes, Time now);

 private:
  std::size_t turn_ = 0;
};

}  // namespace kvferry::engine
