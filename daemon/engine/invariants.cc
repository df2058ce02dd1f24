// The invariants that connect the engine's tables. Each is checked as it is said; the first broken
// one ends the process.
#include <algorithm>

#include "daemon/base/check.h"
#include "daemon/engine/core.h"
#include "daemon/engine/grants.h"

namespace kvferry::engine {

void Core::check_invariants() const {
  std::vector<std::pair<RegionKind, memory::Region>> regions;
  sender.check_invariants(regions);
  receiver.check_invariants(regions);
  lanes.check_invariants();
  reuse.check_invariants();
  reservations.check_invariants();
  claims.check_invariants();
  workers.check_invariants();
  std::vector<std::vector<std::pair<RegionKind, memory::Region>>> by_arena(arenas.size());
  for (const auto& of : regions) by_arena[arena_of(of.second)].push_back(of);
  for (std::size_t number = 0; number < arenas.size(); ++number)
    arenas[number].verify(by_arena[number]);
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
    for (uint32_t lane = 0; lane < link.lanes.size(); ++lane) {
      const Lane& of = link.lanes[lane];
      KVFERRY_CHECK(of.held.empty() || of.held.begin()->first > of.next_in,
                    "only what stands behind a gap is held");
      KVFERRY_CHECK(of.flow.in_flight() == sender.on_lane(id, lane), "a lane counts its chunks");
    }
  }
}

void Lanes::check_invariants() const {
  KVFERRY_CHECK(by_node_.size() == links_.size(), "a node has one link");
  for (const auto& [id, link] : links_) {
    const auto named = by_node_.find(link.node);
    KVFERRY_CHECK(named != by_node_.end() && named->second == id, "a link is found by its node");
    KVFERRY_CHECK(!link.resync_due || !link.control || to_flush_.contains(id),
                  "a resync that is due comes with the next flush");
    KVFERRY_CHECK(
        link.looped() || link.protocol_errors <= kMaxProtocolErrors || to_flush_.contains(id),
        "a link with too many errors ends with the next flush");
  }
}

uint64_t Sender::on_lane(LinkId link, uint32_t lane) const {
  uint64_t bytes = 0;
  for (const auto& [id, staging] : stagings_)
    if (staging.on_lane && staging.link == link && staging.lane == lane) bytes += staging.bytes;
  return bytes;
}

void Sender::check_invariants(std::vector<std::pair<RegionKind, memory::Region>>& regions) const {
  std::map<uint64_t, uint32_t> gathers;
  std::map<uint64_t, uint32_t> reads;
  std::map<std::pair<uint64_t, uint64_t>, uint32_t> packed_gathers;
  std::map<std::pair<uint64_t, PullId>, uint32_t> writing;
  std::map<uint64_t, uint32_t> asking;
  for (const auto& [copy, of] : packings_) {
    ++gathers[of.first];
    ++reads[of.first];
  }
  for (const auto& [id, region] : regions_) {
    if (region.ours) regions.emplace_back(RegionKind::kStaging, region.region);
    if (!region.gathering) continue;
    ++gathers[region.send];
    if (region.packed)
      ++packed_gathers[{region.send, region.slice}];
    else
      ++reads[region.send];
  }
  check_streams();
  check_shares();
  for (const auto& [id, staging] : stagings_) {
    const StagingRegion& region = regions_.at(staging.region);
    if (staging.mapped && region.gathering) ++writing[{staging.peer, staging.pull}];
    KVFERRY_CHECK(region.ours != (staging.lent || staging.mapped),
                  "a chunk has a region here, but one that is lent or written to a peer");
    KVFERRY_CHECK(staging.wanted || region.gathering || staging.sends > 0,
                  "staging that nobody wants or touches is freed");
    KVFERRY_CHECK(!staging.offered || newest_.contains(staging.offer),
                  "an offer that is out is found");
    if (!staging.wanted) continue;
    if (staging.offered && staging.asks) ++asking[staging.leg];
    const auto leg = legs_.find(staging.leg);
    KVFERRY_CHECK(leg != legs_.end(), "wanted staging has a live leg");
    const TxSlice& slice = leg->second.slices.at(staging.slice);
    const TxChunk& chunk = slice.chunks.at(staging.chunk);
    KVFERRY_CHECK(!slice.dropped && chunk.staging == id, "wanted staging is its chunk's");
    const TxState expected = region.gathering  ? TxState::kGathering
                             : staging.mapped  ? TxState::kWritten
                             : staging.offered ? TxState::kOffered
                                               : TxState::kStaged;
    KVFERRY_CHECK(chunk.state == expected, "a chunk's state fits its staging");
    KVFERRY_CHECK(staging.lent || staging.mapped || core_.arena_of(region.region) == slice.arena,
                  "a chunk is staged in the arena of what it is gathered from");
    KVFERRY_CHECK(leg->second.staged.contains({staging.slice, staging.chunk}) ==
                      (expected == TxState::kStaged),
                  "a leg knows its staged chunks");
  }
  uint32_t writes = 0;
  for (const auto& [pull, count] : writing) writes += count;
  KVFERRY_CHECK(writing == writing_ && writes == mapped_gathers_,
                "gathers into peers' regions are counted");
  std::vector<uint64_t> ahead(turns_.size());
  for (const auto& [id, leg] : legs_) {
    ahead[leg.arena] += leg.ahead;
    uint32_t holding = 0;
    const auto send = sends_.find(leg.send);
    KVFERRY_CHECK(send != sends_.end() && !send->second.terminal(), "a live leg's send is open");
    KVFERRY_CHECK(send->second.legs.contains(id), "a send knows its legs");
    uint64_t ungathered = 0;
    uint64_t unacked = 0;
    KVFERRY_CHECK((asking.contains(id) ? asking.at(id) : 0U) == (leg.asking ? 1U : 0U),
                  "a leg has one offer under a spent credit out at most");
    for (const auto& [ordinal, slice] : leg.slices) {
      if (slice.dropped) continue;
      uint64_t acked = 0;
      uint64_t gathered = 0;
      if (slice.all_acked()) {
        KVFERRY_CHECK(slice.plan == nullptr && slice.chunks.empty() &&
                          slice.gathered == slice.count &&
                          slice.state == TxSlice::State::kAnnounced,
                      "of a slice that is wholly acknowledged only numbers are kept");
        continue;
      }
      KVFERRY_CHECK(slice.chunks.size() == slice.count, "an open slice has its chunks");
      for (const TxChunk& chunk : slice.chunks) {
        acked += chunk.state == TxState::kAcked;
        gathered += chunk.state > TxState::kGathering;
        const bool holds = chunk.state != TxState::kIdle && chunk.state != TxState::kAcked;
        KVFERRY_CHECK(holds == (chunk.staging != 0), "a chunk holds staging from gather to ack");
        KVFERRY_CHECK(!holds || slice.arena == leg.arena || leg.link == kLoopedLink || leg.mapped,
                      "a leg has chunks in one arena");
        holding += holds;
      }
      KVFERRY_CHECK(acked == slice.acked && gathered == slice.gathered,
                    "a slice counts its chunks");
      const bool announced = slice.state == TxSlice::State::kAnnounced;
      ungathered += !slice.packed && (!announced || gathered < slice.count);
      ++unacked;
    }
    KVFERRY_CHECK(ungathered == leg.ungathered && unacked == leg.unacked,
                  "a leg counts its slices");
    KVFERRY_CHECK(holding == leg.holding, "a leg counts the chunks that hold staging");
    KVFERRY_CHECK(!leg.queued || leg.mapped || leg.slices.at(leg.cursor.first).arena == leg.arena,
                  "a leg waits for the arena of its next chunk");
    KVFERRY_CHECK(!leg.mapped || (leg.staged.empty() && leg.ahead == 0 && leg.stray_offers.empty()),
                  "a mapped leg stages and offers nothing");
  }
  for (std::size_t arena = 0; arena < turns_.size(); ++arena)
    KVFERRY_CHECK(ahead[arena] == turns_[arena].ahead_total, "chunks staged ahead are counted");
  for (const auto& [id, send] : sends_) {
    const auto count_in = [](const auto& counts, const auto& key) {
      const auto found = counts.find(key);
      return found == counts.end() ? 0 : found->second;
    };
    KVFERRY_CHECK(send.gathers == count_in(gathers, id) && send.reads == count_in(reads, id),
                  "a send counts its gathers");
    KVFERRY_CHECK(!send.terminal() || send.legs.empty(), "a terminal send has no live leg");
    KVFERRY_CHECK(!send.record.released || send.reads == 0, "a released source is not being read");
    uint64_t by_end = 0;
    for (uint32_t index = 0; index < send.sends.size(); ++index) {
      const SendSlice& slice = send.sends[index];
      const uint64_t end = slice.dropped || slice.gone ? 0 : end_of(*slice.op);
      by_end += end > 0 ? 1U : 0U;
      KVFERRY_CHECK(end == 0 || send.by_end.contains({end, slice.ordinal}),
                    "a slice that a Revoke may drop is found by its end");
      KVFERRY_CHECK(slice.packed.gathers ==
                        (slice.gone ? 0 : count_in(packed_gathers, std::pair(id, slice.ordinal))),
                    "a packed copy counts its gathers");
    }
    KVFERRY_CHECK(by_end == send.by_end.size(), "a Revoke looks at no other slices");
  }
  check_packed();
}

void Sender::check_shares() const {
  std::vector<Shares> counted;
  for (const Arena& arena : core_.arenas)
    counted.emplace_back(core_.config, arena, RegionKind::kStaging);
  for (const auto& [id, region] : regions_) {
    if (!region.ours) continue;
    Shares& shares = counted[core_.arena_of(region.region)];
    shares.worker_took(region.holder, region.region.bytes);
    for (const uint64_t user : region.users)
      shares.peer_took(stagings_.at(user).peer, region.region.bytes);
  }
  for (std::size_t arena = 0; arena < turns_.size(); ++arena)
    turns_[arena].shares.verify(counted[arena]);
}

void Sender::check_packed() const {
  uint64_t bytes = 0;
  for (const auto& [id, send] : sends_) {
    uint32_t paged = 0;
    uint32_t packed = 0;
    uint32_t unpacked = 0;
    for (uint32_t index = 0; index < send.sends.size(); ++index) {
      const SendSlice& slice = send.sends[index];
      const PackedCopy& copy = slice.packed;
      bytes += copy.bytes;
      const bool making = copy.state == PackedCopy::State::kMaking;
      const auto known = packings_.find(copy.copy);
      KVFERRY_CHECK(making == (known != packings_.end() && known->second == std::pair(id, index)),
                    "a packed copy that is being made is found");
      KVFERRY_CHECK(
          copy.bytes == 0 || making || copy.gathers > 0 || !(slice.dropped || send.terminal()),
          "a packed copy that nobody wants or reads is gone");
      if (slice.dropped || slice.gone) continue;
      if (!slice.op->packed_bytes) {
        paged += offers_something(*slice.op) ? 1U : 0U;
        continue;
      }
      ++packed;
      unpacked += copy.state != PackedCopy::State::kMade ? 1U : 0U;
    }
    KVFERRY_CHECK(send.terminal() ||
                      (paged == send.paged && packed == send.packed && unpacked == send.unpacked),
                  "a send counts its packed slices");
  }
  KVFERRY_CHECK(bytes == packed_bytes_ && bytes <= core_.config.max_packed_bytes,
                "packed copies are counted and within their limit");
}

void Receiver::check_invariants(std::vector<std::pair<RegionKind, memory::Region>>& regions) const {
  std::map<uint64_t, uint64_t> held;
  std::map<uint64_t, uint64_t> granted;
  std::map<uint64_t, uint64_t> lent;
  std::map<uint64_t, uint32_t> scatters;
  uint32_t loans = 0;
  for (const auto& [id, region] : regions_) {
    KVFERRY_CHECK(region.local
                      ? region.state == RegionState::kScattering && region.region.bytes == 0
                      : region.loan == 0,
                  "a local chunk has no region");
    if (region.loan != 0) {
      ++loans;
      const auto loan = core_.sender.stagings().find(region.loan);
      KVFERRY_CHECK(loan != core_.sender.stagings().end() && loan->second.lent &&
                        core_.sender.staging_regions().at(loan->second.region).gathering,
                    "what a local copy reads is lent");
    }
    if (!region.local) regions.emplace_back(RegionKind::kLanding, region.region);
    const auto leg = legs_.find(region.leg);
    KVFERRY_CHECK(
        region.local || leg == legs_.end() || core_.arena_of(region.region) == leg->second.arena,
        "a leg lands in its layout's arena");
    KVFERRY_CHECK(!region.mapped || (core_.config.arenas[core_.arena_of(region.region)].mapped &&
                                     region.state != RegionState::kLanding),
                  "no receive is posted into a mapped arena");
    if (region.mapped && region.state == RegionState::kQuarantined) {
      KVFERRY_CHECK(leg != legs_.end(), "who may write a lent region is known");
      ++lent[region.leg];
    }
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
    KVFERRY_CHECK(region.chunk < slice.chunks.size(), "a slice that is done has no region");
    const RxState state = slice.chunks[region.chunk];
    KVFERRY_CHECK(
        state == (region.state == RegionState::kLanding ? RxState::kLanding : RxState::kLanded),
        "a chunk's state fits its region");
  }
  uint64_t live_in_all = 0;
  for (const auto& [pull, count] : granted) live_in_all += count;
  KVFERRY_CHECK(core_.stats.credits_granted - core_.stats.credits_ended == live_in_all,
                "a credit is LIVE from its grant to its end");
  for (const auto& [pull, leg] : legs_) {
    const auto count = held.find(pull);
    KVFERRY_CHECK(leg.regions_held == (count == held.end() ? 0 : count->second),
                  "a leg counts its regions");
    const auto live_credits = granted.find(pull);
    KVFERRY_CHECK(leg.credits.size() == (live_credits == granted.end() ? 0 : live_credits->second),
                  "a LIVE credit has one region");
    const Turns& turns = turns_[leg.arena];
    const bool withdrawable = !leg.credits.empty() && !leg.mapped;
    KVFERRY_CHECK(turns.withdrawable.contains(pull) == withdrawable &&
                      turns.unheard.contains(pull) == (withdrawable && !leg.heard),
                  "LIVE credits are found, but those of mapped regions");
    KVFERRY_CHECK(leg.queued_needy == (leg.queued && !leg.queued_idle && needy(leg)),
                  "who waits with refused chunks is found");
    const auto reserved = reserved_.find(leg.receive);
    KVFERRY_CHECK((reserved != reserved_.end() && reserved->second.contains(pull)) ==
                      (leg.queued && leg.reserved),
                  "who waits with a reservation is found");
    const auto lends = lent.find(pull);
    KVFERRY_CHECK(leg.lent == (lends == lent.end() ? 0 : lends->second),
                  "a leg counts what its sender may still write");
    const bool linked = core_.lanes.find(leg.link) != nullptr;
    KVFERRY_CHECK(linked || leg.lent > 0 || leg.state == RxLegState::kOpen,
                  "a leg without a link waits for evidence, or for its transfer's others");
    if (leg.state == RxLegState::kEnded || leg.state == RxLegState::kReleased) {
      KVFERRY_CHECK(leg.held.empty() && !leg.queued, "an ended leg holds nothing");
      continue;
    }
    const auto receive = receives_.find(leg.receive);
    KVFERRY_CHECK(receive != receives_.end() && !receive->second.terminal() &&
                      receive->second.legs.contains(pull),
                  "a live leg's transfer is open");
    KVFERRY_CHECK(leg.local == (leg.link == kLoopedLink) && (!leg.local || leg.credits.empty()),
                  "a local leg has no credits");
    for (const auto& [ordinal, chunk] : leg.refused) {
      const auto slice = leg.slices.find(ordinal);
      if (slice == leg.slices.end() || slice->second.state == RxSlice::State::kCompiling) continue;
      KVFERRY_CHECK(slice->second.state == RxSlice::State::kCounts && chunk < slice->second.count &&
                        slice->second.chunk_state(chunk) == RxState::kNeeded,
                    "a chunk that was refused is needed");
    }
    uint64_t chunks = 0;
    uint64_t done = 0;
    for (const auto& [ordinal, slice] : leg.slices) {
      if (slice.state != RxSlice::State::kCounts) continue;
      chunks += slice.count;
      done += slice.done;
      if (slice.all_done()) {
        KVFERRY_CHECK(slice.plan == nullptr && slice.chunks.empty(),
                      "of a slice that is wholly done only numbers are kept");
        continue;
      }
      KVFERRY_CHECK(slice.chunks.size() == slice.count, "an open slice has its chunks");
      const auto of_slice = static_cast<uint64_t>(
          std::count(slice.chunks.begin(), slice.chunks.end(), RxState::kDone));
      KVFERRY_CHECK(of_slice == slice.done, "a slice counts its chunks");
    }
    KVFERRY_CHECK(chunks == leg.known_chunks && done == leg.done_chunks, "a leg counts its chunks");
  }
  KVFERRY_CHECK(loans == local_copies_, "local copies are counted");
  check_shares();
  for (const auto& [id, receive] : receives_) {
    const auto running = scatters.find(id);
    KVFERRY_CHECK(receive.scatters == (running == scatters.end() ? 0 : running->second),
                  "a receive counts its scatters");
    KVFERRY_CHECK(!receive.terminal() || receive.legs.empty(),
                  "a terminal receive has no live leg");
    KVFERRY_CHECK(!receive.record.released || !receive.writing(),
                  "released pages are not being written");
  }
}

void Receiver::check_shares() const {
  std::vector<Shares> counted;
  for (const Arena& arena : core_.arenas)
    counted.emplace_back(core_.config, arena, RegionKind::kLanding);
  for (const auto& [id, region] : regions_) {
    if (region.local) continue;
    Shares& shares = counted[core_.arena_of(region.region)];
    if (region.state != RegionState::kQuarantined)
      shares.worker_took(region.holder, region.region.bytes);
    shares.peer_took(region.holder.peer, region.region.bytes);
  }
  for (std::size_t arena = 0; arena < turns_.size(); ++arena)
    turns_[arena].shares.verify(counted[arena]);
  if (!core_.flushed) return;
  // Whose turn it is waits for nothing that others hold unused beyond their shares.
  for (std::size_t number = 0; number < turns_.size(); ++number) {
    const Turns& turns = turns_[number];
    const RxLeg* next = nullptr;
    visit_in_turn(
        turns.waiting, turns.shares, turns.starving,
        [&](const FairKey& key) { return legs_.at(key.leg).holder(); },
        [&](const FairKey& key) {
          return core_.arenas[number].region_bytes(legs_.at(key.leg).credit_bytes);
        },
        [&](const FairKey& key) {
          next = &legs_.at(key.leg);
          return true;
        });
    if (next == nullptr || !turns.shares.somebody_spares(next->holder())) continue;
    for (const uint64_t pull : turns.withdrawable) {
      const RxLeg& other = legs_.at(pull);
      const auto loose = loose_region(other);
      if (pull == next->pull || !loose || other.credits.size() <= other.refused.size()) continue;
      const uint64_t bytes = regions_.at(*loose).region.bytes;
      KVFERRY_CHECK(other.credit_bytes < next->credit_bytes ||
                        !turns.shares.may_move(other.holder(), next->holder(), bytes),
                    "nobody holds more than his share unused while another waits");
    }
  }
}

}  // namespace kvferry::engine
