#include "daemon/engine/lane_flow.h"

#include <algorithm>
#include <limits>

#include "daemon/base/check.h"

namespace kvferry::engine {
namespace {

__extension__ using Wide = unsigned __int128;

constexpr uint32_t kMeanOf = 4;  // a sample counts as much as a third of the mean behind it
constexpr uint64_t kTrialShare = 16;
// A lane counts as so many times slower at most when it is to be tried: a wrong measure must not
// cost a lane for good.
constexpr uint64_t kTrialSlowest = 256;
constexpr uint32_t kTrialDoublings = 8;
// Than the fastest lane is known to be. Acknowledgements that were held up together come in no time
// at all, which says nothing of a lane.
constexpr uint64_t kBelievedFaster = 2;
constexpr uint64_t kNsPerSecond = 1'000'000'000;

uint64_t narrow(Wide value) {
  return static_cast<uint64_t>(std::min<Wide>(value, std::numeric_limits<uint64_t>::max()));
}

uint64_t fastest_of(std::span<LaneFlow* const> lanes) {
  uint64_t fastest = 0;
  for (const LaneFlow* lane : lanes)
    if (lane != nullptr) fastest = std::max(fastest, lane->rate());
  return fastest;
}

}  // namespace

uint64_t LaneFlow::offered(uint64_t bytes, Time now) {
  in_flight_ += bytes;
  queued_bytes_ += bytes;
  queued_.emplace_hint(queued_.end(), next_, Queued{bytes, now});
  return next_++;
}

void LaneFlow::take(std::map<uint64_t, Queued>::iterator chunk) {
  queued_bytes_ -= chunk->second.bytes;
  queued_.erase(chunk);
}

void LaneFlow::arrived(uint64_t chunk, uint64_t bytes, Time now) {
  KVFERRY_CHECK(bytes <= in_flight_, "what arrives was on its way");
  in_flight_ -= bytes;
  arrived_bytes_ += bytes;
  unanswered_ = 0;
  const bool full = bytes >= full_bytes_;
  Sample& sample = full ? full_ : small_;
  ++sample.chunks;
  sample.bytes += bytes;
  const auto it = queued_.find(chunk);
  if (it == queued_.end()) return;  // overtaken: the time has been counted
  const auto ns = static_cast<uint64_t>((now - std::max(since_, it->second.offered)).count());
  since_ = now;
  sample.ns += ns;
  if (!full) {
    if (ns > 0) small_ns_ = ns;
  } else {
    if (ns == 0) {  // told of together with small ones: most of their time was its
      full_.ns += small_ns_;
      small_.ns -= small_ns_;
    }
    small_ns_ = 0;
  }
  // A small chunk may overtake large ones that are still being carried.
  for (auto other = queued_.begin(); other != it;) {
    const auto next = std::next(other);
    if (other->second.bytes <= bytes) take(other);
    other = next;
  }
  take(it);
}

void LaneFlow::left(uint64_t chunk, uint64_t bytes, Time now) {
  KVFERRY_CHECK(bytes <= in_flight_, "what leaves was on its way");
  in_flight_ -= bytes;
  const auto it = queued_.find(chunk);
  if (it == queued_.end()) return;
  if (it == queued_.begin()) since_ = now;  // those behind it had waited for it
  take(it);
}

// The time of a small chunk is that of its bytes and of whatever else an acknowledgement takes. So
// it gives bounds: what its own bytes say, and that a full chunk would have taken no less time.
// Within these the rate stays what it was.
//
// The mean is one of rates, not of times: a receiver that takes nothing for a second makes one bad
// sample, which costs a lane a quarter of its rate and not a second's worth of chunks.
void LaneFlow::settle(uint64_t fastest) {
  const auto rate = [](Wide bytes, uint64_t ns) { return narrow(bytes * kNsPerSecond / ns); };
  uint64_t sample = 0;
  if (full_.bytes > 0 && full_.ns > 0) {
    sample = rate(full_.bytes, full_.ns);
    full_ = {};
  } else if (small_.bytes >= full_bytes_ && small_.ns > 0) {
    uint64_t expected = std::numeric_limits<uint64_t>::max();
    if (rate_ != 0)
      expected = rate_;
    else if (fastest != 0)
      expected = fastest;
    sample = std::clamp(expected, rate(small_.bytes, small_.ns),
                        rate(Wide{small_.chunks} * full_bytes_, small_.ns));
  } else {
    return;
  }
  small_ = {};
  small_ns_ = 0;
  if (fastest != 0) sample = std::min(sample, narrow(Wide{fastest} * kBelievedFaster));
  samples_ = std::min(samples_ + 1, kMeanOf);
  rate_ = narrow((Wide{rate_} * (samples_ - 1) + std::max<uint64_t>(sample, 1)) / samples_);
}

// passed / fastest >= share * full / rate, so that the trial is no large part of the time.
bool LaneFlow::trial_due(uint64_t fastest) const {
  const Wide full = Wide{full_bytes_} * kTrialShare;
  if (passed_ >= full * kTrialSlowest) return true;
  const Wide rate = rate_ == 0 ? fastest : rate_;
  return passed_ * rate >= ((full * fastest) << unanswered_);
}

// Chunks below full size end no wait for a trial, as they say too little; when one is due they are
// a part of it.
void LaneFlow::given(uint64_t bytes, uint64_t fastest) {
  const bool due = trial_due(fastest);
  if (due) trial_ += bytes;
  if (bytes < full_bytes_ && trial_ < full_bytes_) return;
  if (due) unanswered_ = std::min(unanswered_ + 1, kTrialDoublings);
  passed_ = 0;
  trial_ = 0;
}

std::size_t LaneChoice::pick(std::span<LaneFlow* const> lanes, uint64_t bytes) const {
  const uint64_t known = fastest_of(lanes);
  for (LaneFlow* lane : lanes)
    if (lane != nullptr) lane->settle(known);
  const uint64_t fastest = std::max<uint64_t>(fastest_of(lanes), 1);
  std::size_t best = lanes.size();
  Wide best_bytes = 0;
  uint64_t best_rate = 1;
  for (std::size_t step = 0; step < lanes.size(); ++step) {
    const std::size_t at = (turn_ + step) % lanes.size();
    if (lanes[at] == nullptr) continue;
    if (bytes != 0 && lanes[at]->trial_due(fastest)) return at;
    const Wide queued = Wide{lanes[at]->queued()} + bytes;
    const uint64_t rate = lanes[at]->rate() == 0 ? fastest : lanes[at]->rate();
    if (best != lanes.size() && queued * best_rate >= best_bytes * rate) continue;
    best = at;
    best_bytes = queued;
    best_rate = rate;
  }
  return best;
}

uint64_t LaneChoice::give(std::span<LaneFlow* const> lanes, std::size_t lane, uint64_t bytes,
                          Time now) {
  const uint64_t fastest = std::max<uint64_t>(fastest_of(lanes), 1);
  lanes[lane]->given(bytes, fastest);
  for (std::size_t at = 0; at < lanes.size(); ++at)
    if (lanes[at] != nullptr && at != lane) lanes[at]->passed_ += bytes;
  turn_ = lane + 1;
  return lanes[lane]->offered(bytes, now);
}

}  // namespace kvferry::engine
