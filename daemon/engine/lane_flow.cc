#include "daemon/engine/lane_flow.h"

#include <algorithm>
#include <limits>

#include "daemon/base/check.h"

namespace kvferry::engine {
namespace {

__extension__ using Wide = unsigned __int128;

constexpr uint32_t kMeanOf = 4;  // a sample counts as much as three of the mean behind it
constexpr uint64_t kTrialShare = 16;
constexpr uint64_t kNsPerSecond = 1'000'000'000;

uint64_t narrow(Wide value) {
  return static_cast<uint64_t>(std::min<Wide>(value, std::numeric_limits<uint64_t>::max()));
}

}  // namespace

void LaneFlow::offered(uint64_t bytes, Time now) {
  if (in_flight_ == 0) since_ = now;
  in_flight_ += bytes;
  passed_ = 0;
}

void LaneFlow::arrived(uint64_t bytes, Time now) {
  KVFERRY_CHECK(bytes <= in_flight_, "what arrives was on its way");
  in_flight_ -= bytes;
  arrived_bytes_ += bytes;
  sample_bytes_ += bytes;
  sample_ns_ += static_cast<uint64_t>((now - since_).count());
  since_ = now;
}

void LaneFlow::left(uint64_t bytes) {
  KVFERRY_CHECK(bytes <= in_flight_, "what leaves was on its way");
  in_flight_ -= bytes;
}

// The mean is one of rates, not of times: a receiver that takes nothing for a second makes one bad
// sample, which costs a lane a quarter of its rate and not a second's worth of chunks.
void LaneFlow::settle(uint64_t sample_bytes) {
  if (sample_bytes_ < sample_bytes || sample_ns_ == 0) return;
  const uint64_t sample =
      std::max<uint64_t>(narrow(Wide{sample_bytes_} * kNsPerSecond / sample_ns_), 1);
  samples_ = std::min(samples_ + 1, kMeanOf);
  rate_ = narrow((Wide{rate_} * (samples_ - 1) + sample) / samples_);
  sample_bytes_ = 0;
  sample_ns_ = 0;
}

std::size_t LaneChoice::next(std::span<LaneFlow* const> lanes, uint64_t bytes,
                             uint64_t sample_bytes) {
  uint64_t fastest = 0;
  for (LaneFlow* lane : lanes) {
    if (lane == nullptr) continue;
    lane->settle(sample_bytes);
    fastest = std::max(fastest, lane->rate_);
  }
  fastest = std::max<uint64_t>(fastest, 1);
  const auto rate_of = [&](const LaneFlow& lane) {
    const bool unknown = lane.rate_ == 0;
    // passed / fastest >= share * bytes / rate, so that the trial is no large part of the time.
    const bool try_again = lane.in_flight_ == 0 &&
                           Wide{lane.passed_} * lane.rate_ >= Wide{bytes} * kTrialShare * fastest;
    return unknown || try_again ? fastest : lane.rate_;
  };
  std::size_t best = lanes.size();
  Wide best_bytes = 0;
  uint64_t best_rate = 1;
  for (std::size_t step = 0; step < lanes.size(); ++step) {
    const std::size_t at = (turn_ + step) % lanes.size();
    if (lanes[at] == nullptr) continue;
    const Wide ahead = Wide{lanes[at]->in_flight_} + bytes;
    const uint64_t rate = rate_of(*lanes[at]);
    if (best != lanes.size() && ahead * best_rate >= best_bytes * rate) continue;
    best = at;
    best_bytes = ahead;
    best_rate = rate;
  }
  if (best == lanes.size()) return best;
  turn_ = best + 1;
  for (std::size_t at = 0; at < lanes.size(); ++at)
    if (lanes[at] != nullptr && at != best) lanes[at]->passed_ += bytes;
  return best;
}

}  // namespace kvferry::engine
