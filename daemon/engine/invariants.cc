// The invariants that connect the engine's tables. Each is checked as it is said; the first broken
// one ends the process.
#include <algorithm>

#include "daemon/base/check.h"
#include "daemon/engine/core.h"

namespace kvferry::engine {

void Core::check_invariants() const {
  std::vector<std::pair<RegionKind, memory::Region>> regions;
  sender.check_invariants(regions);
  receiver.check_invariants(regions);
  arena.verify(regions);
  for (const auto& [id, link] : lanes.all()) {
    KVFERRY_CHECK(!link.control || link.lanes[*link.control].state == LaneState::kUp,
                  "the control lane is up");
    uint32_t legs = 0;
    uint32_t ended = 0;
    uint64_t parked = 0;
    for (const auto& [pull, entry] : link.pulls) {
      if (entry.kind == PeerPull::Kind::kLeg) {
        ++legs;
        KVFERRY_CHECK(sender.legs().contains(entry.leg), "a pull's leg exists");
        KVFERRY_CHECK(sender.legs().at(entry.leg).pull->pull.counter == pull,
                      "a leg knows its pull");
      } else if (entry.kind == PeerPull::Kind::kEnded) {
        ++ended;
      } else {
        ++parked;
        KVFERRY_CHECK(entry.parked != nullptr, "a parked pull has its message");
      }
    }
    KVFERRY_CHECK(legs == link.legs_out && ended == link.ended_out && parked == link.parked.size(),
                  "a link counts its pulls");
    for (const uint64_t pull : link.own_pulls)
      KVFERRY_CHECK(receiver.legs().contains(pull), "a pull that is not closed has a leg");
    for (const Lane& lane : link.lanes)
      KVFERRY_CHECK(lane.held.empty() || lane.held.begin()->first > lane.next_in,
                    "only what stands behind a gap is held");
  }
}

void Sender::check_invariants(std::vector<std::pair<RegionKind, memory::Region>>& regions) const {
  std::map<uint64_t, uint32_t> gathers;
  for (const auto& [id, staging] : stagings_) {
    regions.emplace_back(RegionKind::kStaging, staging.region);
    KVFERRY_CHECK(staging.wanted || staging.gathering || staging.sends > 0,
                  "staging that nobody wants or touches is freed");
    KVFERRY_CHECK(!staging.offered || newest_.contains(staging.offer),
                  "an offer that is out is found");
    if (staging.gathering) ++gathers[staging.send];
    if (!staging.wanted) continue;
    const auto leg = legs_.find(staging.leg);
    KVFERRY_CHECK(leg != legs_.end(), "wanted staging has a live leg");
    const TxSlice& slice = leg->second.slices.at(staging.slice);
    const TxChunk& chunk = slice.chunks.at(staging.chunk);
    KVFERRY_CHECK(!slice.dropped && chunk.staging == id, "wanted staging is its chunk's");
    const TxState expected = staging.gathering ? TxState::kGathering
                             : staging.offered ? TxState::kOffered
                                               : TxState::kStaged;
    KVFERRY_CHECK(chunk.state == expected, "a chunk's state fits its staging");
    KVFERRY_CHECK(leg->second.staged.contains({staging.slice, staging.chunk}) ==
                      (expected == TxState::kStaged),
                  "a leg knows its staged chunks");
  }
  uint64_t ahead = 0;
  for (const auto& [id, leg] : legs_) {
    ahead += leg.ahead;
    const auto send = sends_.find(leg.send);
    KVFERRY_CHECK(send != sends_.end() && !send->second.terminal(), "a live leg's send is open");
    KVFERRY_CHECK(send->second.legs.contains(id), "a send knows its legs");
    uint64_t ungathered = 0;
    uint64_t unacked = 0;
    for (const auto& [ordinal, slice] : leg.slices) {
      if (slice.dropped) continue;
      uint64_t acked = 0;
      uint64_t gathered = 0;
      for (const TxChunk& chunk : slice.chunks) {
        acked += chunk.state == TxState::kAcked;
        gathered += chunk.state > TxState::kGathering;
        const bool holds = chunk.state != TxState::kIdle && chunk.state != TxState::kAcked;
        KVFERRY_CHECK(holds == (chunk.staging != 0), "a chunk holds staging from gather to ack");
      }
      KVFERRY_CHECK(acked == slice.acked && gathered == slice.gathered,
                    "a slice counts its chunks");
      const bool announced = slice.state == TxSlice::State::kAnnounced;
      ungathered += !announced || gathered < slice.chunks.size();
      unacked += slice.chunks.empty() ? !slice.empty_acked : acked < slice.chunks.size();
    }
    KVFERRY_CHECK(ungathered == leg.ungathered && unacked == leg.unacked,
                  "a leg counts its slices");
  }
  KVFERRY_CHECK(ahead == ahead_total_, "chunks staged ahead are counted");
  for (const auto& [id, send] : sends_) {
    const auto running = gathers.find(id);
    KVFERRY_CHECK(send.gathers == (running == gathers.end() ? 0 : running->second),
                  "a send counts its gathers");
    KVFERRY_CHECK(!send.terminal() || send.legs.empty(), "a terminal send has no live leg");
    KVFERRY_CHECK(!send.record.released || send.gathers == 0,
                  "a released source is not being read");
  }
}

void Receiver::check_invariants(std::vector<std::pair<RegionKind, memory::Region>>& regions) const {
  std::map<uint64_t, uint64_t> held;
  std::map<uint64_t, uint64_t> granted;
  std::map<uint64_t, uint32_t> scatters;
  for (const auto& [id, region] : regions_) {
    regions.emplace_back(RegionKind::kLanding, region.region);
    const auto leg = legs_.find(region.leg);
    const bool live = leg != legs_.end() && (leg->second.state == RxLegState::kOpen ||
                                             leg->second.state == RxLegState::kUnsent);
    if (region.state != RegionState::kQuarantined) ++held[region.leg];
    if (region.state == RegionState::kScattering) {
      ++scatters[region.receive];
      continue;
    }
    if (region.state == RegionState::kQuarantined) continue;
    KVFERRY_CHECK(live, "regions of an ended leg are quarantined or being scattered");
    if (region.state == RegionState::kGranted) {
      ++granted[region.leg];
      const auto credit = leg->second.credits.find(region.credit);
      KVFERRY_CHECK(credit != leg->second.credits.end() && credit->second == id,
                    "a granted region is held by a LIVE credit");
      continue;
    }
    const RxSlice& slice = leg->second.slices.at(region.slice);
    if (slice.state == RxSlice::State::kDropped) continue;
    const RxState state = slice.chunks.at(region.chunk);
    KVFERRY_CHECK(
        state == (region.state == RegionState::kLanding ? RxState::kLanding : RxState::kLanded),
        "a chunk's state fits its region");
  }
  for (const auto& [pull, leg] : legs_) {
    const auto count = held.find(pull);
    KVFERRY_CHECK(leg.regions_held == (count == held.end() ? 0 : count->second),
                  "a leg counts its regions");
    const auto live_credits = granted.find(pull);
    KVFERRY_CHECK(leg.credits.size() == (live_credits == granted.end() ? 0 : live_credits->second),
                  "a LIVE credit has one region");
    KVFERRY_CHECK(withdrawable_.contains(pull) == !leg.credits.empty(), "LIVE credits are found");
    if (leg.state == RxLegState::kEnded || leg.state == RxLegState::kReleased) {
      KVFERRY_CHECK(leg.held.empty() && !leg.queued, "an ended leg holds nothing");
      continue;
    }
    const auto receive = receives_.find(leg.receive);
    KVFERRY_CHECK(receive != receives_.end() && !receive->second.terminal() &&
                      receive->second.legs.contains(pull),
                  "a live leg's transfer is open");
    uint64_t chunks = 0;
    uint64_t done = 0;
    for (const auto& [ordinal, slice] : leg.slices) {
      if (slice.state != RxSlice::State::kCounts) continue;
      chunks += slice.chunks.size();
      const auto of_slice = static_cast<uint64_t>(
          std::count(slice.chunks.begin(), slice.chunks.end(), RxState::kDone));
      KVFERRY_CHECK(of_slice == slice.done, "a slice counts its chunks");
      done += of_slice;
    }
    KVFERRY_CHECK(chunks == leg.known_chunks && done == leg.done_chunks, "a leg counts its chunks");
  }
  for (const auto& [id, receive] : receives_) {
    const auto running = scatters.find(id);
    KVFERRY_CHECK(receive.scatters == (running == scatters.end() ? 0 : running->second),
                  "a receive counts its scatters");
    KVFERRY_CHECK(!receive.terminal() || receive.legs.empty(),
                  "a terminal receive has no live leg");
    KVFERRY_CHECK(!receive.record.released || receive.scatters == 0,
                  "released pages are not being written");
  }
}

}  // namespace kvferry::engine
