// Chunks on their way in: offers decided, landing, scatter.
#include <algorithm>
#include <utility>

#include "daemon/base/check.h"
#include "daemon/engine/core.h"

namespace kvferry::engine {
namespace {

// Chunks of a leg that are refused before their slice is compiled: as many as a peer may be
// configured to stage ahead.
constexpr std::size_t kMostRefusedEarly = 1024;

}  // namespace

void Receiver::drop_offer(const HeldOffer& offer) {
  ++core_.stats.offers_dropped;
  core_.emit(DropOffer{offer.lane, offer.descriptor});
}

void Receiver::offer_in(Link& link, const OfferIn& event) {
  const HeldOffer offer{event.offer, event.lane, event.descriptor, event.announced_bytes};
  RxLeg* leg = live_leg(link, event.offer.pull);
  if (leg == nullptr) {
    drop_offer(offer);
    return;
  }
  if (leg->mapped || (leg->send.counter != 0 && event.offer.send != leg->send)) {
    drop_offer(offer);
    core_.lanes.protocol_error(link.id);
    return;
  }
  decide(*leg, offer);
}

// One offer against the table. The leg's transfer may be terminal afterwards.
void Receiver::decide(RxLeg& leg, HeldOffer offer) {
  const MsgOffer& of = offer.offer;
  Receive& receive = receives_.at(leg.receive);
  const auto fail = [&](Reason reason) {
    core_.dropped(DropCause::kProtocol);
    drop_offer(offer);
    const uint64_t id = receive.id;
    end_receive(receive, TransferState::kFailed, reason);
    forget_if_done(id);
  };
  if (of.credit.value == 0 || of.credit.value >= leg.next_credit) {
    fail(Reason::kProtocol);  // a credit that was never given
    return;
  }
  const auto it = leg.slices.find(of.slice);
  if (it != leg.slices.end() && it->second.state == RxSlice::State::kDropped) {
    drop_offer(offer);
    spend(leg, of.credit.value);
    return;
  }
  const bool known = it != leg.slices.end() && it->second.state == RxSlice::State::kCounts;
  if (known && (of.send != leg.send || of.chunk >= it->second.count)) {
    fail(Reason::kProtocol);
    return;
  }
  const RxState state = known ? it->second.chunk_state(of.chunk) : RxState::kLanding;
  switch (state) {
    case RxState::kDone:
      drop_offer(offer);
      ack(leg, {of.slice, of.chunk});
      if (!flawed(Flaw::kKeepCredit)) spend(leg, of.credit.value);
      return;
    case RxState::kLanded:
    case RxState::kScattering:  // the ack will come
      drop_offer(offer);
      if (!flawed(Flaw::kKeepCredit)) spend(leg, of.credit.value);
      return;
    case RxState::kLanding: {
      // Of a chunk that is not here a spent credit is refused, whether or not its slice is known.
      if (!known && leg.send.counter != 0 && !leg.credits.contains(of.credit.value) &&
          leg.refused.size() < leg.known_chunks + kMostRefusedEarly) {
        refuse(leg, offer);
        return;
      }
      // Too early to say. A lost lane's offers may stand beside those that replace them.
      const Link& link = *core_.lanes.find(leg.link);
      if (leg.held.size() >= (leg.next_credit - 1) * link.lanes.size() && !flawed(Flaw::kHoldAll)) {
        fail(Reason::kProtocol);
        return;
      }
      leg.held.emplace(++last_order_, std::move(offer));
      return;
    }
    case RxState::kNeeded:
      break;
  }
  const auto credit = leg.credits.find(of.credit.value);
  if (credit == leg.credits.end()) {
    refuse(leg, offer);
    return;
  }
  const Link& link = *core_.lanes.find(leg.link);
  const uint64_t bytes = chunk_size(link.chunk_bytes, it->second.bytes, of.chunk);
  if (of.bytes != bytes || offer.announced_bytes != bytes ||
      bytes > regions_.at(credit->second).region.bytes || of.check.kind != link.check) {
    fail(Reason::kProtocol);
    return;
  }
  accept(leg, it->second, offer);
}

// The credit is spent: the chunk waits at the peer for another one.
void Receiver::refuse(RxLeg& leg, const HeldOffer& offer) {
  ++core_.stats.offers_refused;
  leg.refused.insert({offer.offer.slice, offer.offer.chunk});
  core_.emit(DropOffer{offer.lane, offer.descriptor});
  core_.lanes.refuse(offer.lane, {offer.offer.pull, offer.offer.offer});
  update(leg);
}

void Receiver::accept(RxLeg& leg, RxSlice& slice, const HeldOffer& offer) {
  const auto credit = leg.credits.find(offer.offer.credit.value);
  RxRegion& region = regions_.at(credit->second);
  leg.credits.erase(credit);
  ++core_.stats.credits_ended;
  if (leg.credits.empty()) note_credits(leg);
  leg.refused.erase({offer.offer.slice, offer.offer.chunk});
  note_needy(leg);
  region.state = RegionState::kLanding;
  region.slice = offer.offer.slice;
  region.chunk = offer.offer.chunk;
  region.bytes = offer.offer.bytes;
  region.lane = offer.lane.lane;
  region.epoch = offer.lane.epoch;
  region.check = offer.offer.check;
  region.since = core_.now;
  slice.chunks.at(region.chunk) = RxState::kLanding;
  ++core_.stats.offers_accepted;
  receives_.at(leg.receive).timeline.note(Step::kOffered, core_.now);
  const auto by_rate = std::chrono::nanoseconds(static_cast<int64_t>(
      static_cast<double>(region.bytes) * 1e9 /
      static_cast<double>(std::max<uint64_t>(core_.config.landing_min_rate, 1))));
  core_.timers.set({TimerKind::kLanding, region.id, 0},
                   core_.now + std::max<Duration>(core_.config.landing_timeout, by_rate));
  core_.emit(
      AcceptOffer{offer.lane, offer.descriptor, LandingId{region.id}, region.region, region.bytes});
}

// Decides again what the leg holds, in order of arrival.
void Receiver::decide_held(uint64_t pull) {
  auto it = legs_.find(pull);
  if (it == legs_.end() || it->second.held.empty()) return;
  const std::map<uint64_t, HeldOffer> held = std::exchange(it->second.held, {});
  for (const auto& [order, offer] : held) {
    // An answer may have ended the transfer; what is left then is dropped.
    it = legs_.find(pull);
    if (it == legs_.end() || it->second.state != RxLegState::kOpen)
      drop_offer(offer);
    else if (it->second.send.counter != 0 && offer.offer.send != it->second.send)
      drop_offer(offer);
    else
      decide(it->second, offer);
  }
}

// The chunk is here: other offers of it are dropped and their credits spent.
void Receiver::drop_held(RxLeg& leg, uint64_t slice, uint64_t chunk) {
  for (auto it = leg.held.begin(); it != leg.held.end();) {
    if (it->second.offer.slice != slice || it->second.offer.chunk != chunk) {
      ++it;
      continue;
    }
    const HeldOffer offer = it->second;
    it = leg.held.erase(it);
    drop_offer(offer);
    if (!flawed(Flaw::kKeepCredit)) spend(leg, offer.offer.credit.value);
  }
}

// ---- landing ----------------------------------------------------------------------------------

void Receiver::receive_ended(const ReceiveEnded& event) {
  const auto it = regions_.find(event.landing.value);
  if (it == regions_.end()) return;
  RxRegion& region = it->second;
  if (region.state != RegionState::kLanding && region.state != RegionState::kQuarantined) return;
  core_.timers.cancel({TimerKind::kLanding, region.id, 0});
  const auto leg = legs_.find(region.leg);
  const bool live = leg != legs_.end() && leg->second.state == RxLegState::kOpen;
  if (region.state == RegionState::kQuarantined) {
    if (flawed(Flaw::kScatterQuarantined) && event.ok && live &&
        leg->second.slices.contains(region.slice) &&
        leg->second.slices.at(region.slice).state == RxSlice::State::kCounts &&
        leg->second.slices.at(region.slice).chunk_state(region.chunk) < RxState::kLanded) {
      ++leg->second.regions_held;
      turns_[core_.arena_of(region.region)].shares.worker_took(region.holder, region.region.bytes);
      landed(region);
      return;
    }
    // The evidence that nobody writes it any more.
    free_region(region.id);
    return;
  }
  KVFERRY_CHECK(live, "a region of an ended transfer is not LANDING");
  const RxSlice& slice = leg->second.slices.at(region.slice);
  const LaneRef lane{region.link, region.lane, region.epoch};
  const uint64_t pull = region.leg;
  if (event.ok) core_.lanes.data_in(lane);
  if (slice.state == RxSlice::State::kDropped) {
    free_region(region.id);
    if (!event.ok) core_.lanes.give_up(lane);
  } else if (event.ok) {
    landed(region);
  } else {
    leg->second.slices.at(region.slice).chunks.at(region.chunk) = RxState::kNeeded;
    free_region(region.id);
    decide_held(pull);
    core_.lanes.give_up(lane);
  }
}

void Receiver::landed(RxRegion& region) {
  RxLeg& leg = legs_.at(region.leg);
  Receive& receive = receives_.at(leg.receive);
  region.state = RegionState::kLanded;
  ++core_.stats.chunks_landed;
  leg.slices.at(region.slice).chunks.at(region.chunk) = RxState::kLanded;
  receive.wire += core_.now - region.since;
  receive.timeline.note(Step::kArrived, core_.now);
  region.since = core_.now;
  receive.landed.insert(region.id);
  drop_held(leg, region.slice, region.chunk);
  if (!receive.ready) {
    // Only now does a region wait for the worker.
    const TimerKey key{TimerKind::kReady, receive.id, 0};
    if (!core_.timers.pending(key)) core_.timers.set(key, core_.now + core_.config.ready_timeout);
    return;
  }
  scatter_landed(receive);
}

bool Receiver::condition_failed(ConditionId condition) {
  const auto it = conditions_.find(condition);
  if (it == conditions_.end()) return false;
  Receive& receive = receives_.at(it->second);
  conditions_.erase(it);
  if (!receive.terminal()) end_receive(receive, TransferState::kFailed, Reason::kNotReady);
  return true;
}

bool Receiver::condition_met(ConditionId condition) {
  const auto it = conditions_.find(condition);
  if (it == conditions_.end()) return false;
  Receive& receive = receives_.at(it->second);
  conditions_.erase(it);
  receive.signalled = true;
  may_be_ready(receive);
  return true;
}

// Starts the scatter of every landed region of the transfer that may be written to its pages now.
void Receiver::scatter_landed(Receive& receive) {
  if (!receive.ready) return;
  for (auto it = receive.landed.begin(); it != receive.landed.end();) {
    RxRegion& region = regions_.at(*it);
    RxLeg& leg = legs_.at(region.leg);
    if (leg.dropped_scatters > 0) {  // a dropped slice is still being written to these pages
      ++it;
      continue;
    }
    it = receive.landed.erase(it);
    RxSlice& slice = leg.slices.at(region.slice);
    region.state = RegionState::kScattering;
    slice.chunks.at(region.chunk) = RxState::kScattering;
    region.since = core_.now;
    receive.timeline.note(Step::kScattering, core_.now);
    ++receive.scatters;
    Scatter command;
    command.copy = CopyId{core_.next_number()};
    command.plan = slice.plan;
    command.offset = region.chunk * core_.lanes.find(leg.link)->chunk_bytes;
    command.bytes = region.bytes;
    command.region = region.region;
    command.link = leg.link;
    command.check = region.check;
    scatters_[command.copy] = region.id;
    core_.emit(std::move(command));
  }
  release(receive);
}

bool Receiver::copy_ended(const CopyEnded& event) {
  const auto it = scatters_.find(event.copy);
  if (it == scatters_.end()) return chunk_copied(event);
  RxRegion& region = regions_.at(it->second);
  scatters_.erase(it);
  scattered(region, event);
  return true;
}

// The last chunk of a slice with a tail is not done before the tail is cleared: until then its
// region is held, for the clearing is a write to the pages like the scatter before it.
bool Receiver::clear_tail(RxRegion& region) {
  const auto leg = legs_.find(region.leg);
  if (leg == legs_.end() || leg->second.state != RxLegState::kOpen) return false;
  if (region.of_dropped || region.clearing) return false;
  const RxSlice& slice = leg->second.slices.at(region.slice);
  const std::size_t due = flawed(Flaw::kTailFirst) ? 1 : slice.count;
  if (!slice.plan->has_tail || slice.done + 1 != due) return false;
  region.clearing = true;
  const CopyId copy{core_.next_number()};
  scatters_[copy] = region.id;
  core_.emit(ClearTail{copy, slice.plan});
  return true;
}

void Receiver::scattered(RxRegion& region, const CopyEnded& event) {
  if (region.loan != 0) {
    --local_copies_;
    core_.sender.repay(std::exchange(region.loan, 0), event);
  }
  if (event.outcome == CopyOutcome::kOk && clear_tail(region)) return;
  const uint64_t id = region.receive;
  const uint64_t pull = region.leg;
  const uint64_t ordinal = region.slice;
  const uint64_t chunk = region.chunk;
  const uint64_t bytes = region.bytes;
  const bool of_dropped = region.of_dropped;
  const bool local = region.local;
  Receive& receive = receives_.at(id);
  --receive.scatters;
  receive.scatter += core_.now - region.since;
  if (event.outcome == CopyOutcome::kOk) receive.timeline.note(Step::kScattered, core_.now);
  if (event.outcome == CopyOutcome::kCheckMismatch) ++core_.stats.chunks_corrupt;
  const auto it = legs_.find(pull);
  const bool live = it != legs_.end() && it->second.state == RxLegState::kOpen;
  if (live && of_dropped) --it->second.dropped_scatters;
  free_region(region.id);
  if (!live) {
    release(receive);
    forget_if_done(id);
    return;
  }
  RxLeg& leg = it->second;
  if (event.outcome != CopyOutcome::kOk && !of_dropped) {
    end_receive(
        receive, TransferState::kFailed,
        event.outcome == CopyOutcome::kCheckMismatch ? Reason::kDataLoss : Reason::kScatterFailed);
    forget_if_done(id);
    return;
  }
  if (!of_dropped) {
    RxSlice& slice = leg.slices.at(ordinal);
    slice.chunks.at(chunk) = RxState::kDone;
    ++leg.done_chunks;
    if (++slice.done == slice.count) {
      ++receive.record.slices;
      slice.forget();
    }
    receive.record.bytes_done += bytes;
    ++receive.chunks;
    ++(local ? core_.stats.chunks_local : core_.stats.chunks_scattered);
    (local ? core_.stats.bytes_local : core_.stats.bytes_received) += bytes;
    ack(leg, {ordinal, chunk});
    core_.workers.changed(receive, Role::kReceiver);
  } else if (leg.mapped) {
    ack(leg, {ordinal, chunk});  // its WRITTEN need not be told again
  }
  update(leg);
  scatter_landed(receive);
  release(receive);
  check_complete(id);
}

void Receiver::ack(RxLeg& leg, const Ack& ack) {
  leg.new_acks.push_back(ack);
  changed(leg);
}

// ---- lanes ------------------------------------------------------------------------------------

void Receiver::lane_down(Link& link, uint32_t lane, uint32_t epoch) {
  std::set<uint64_t> touched;
  for (auto& [id, region] : regions_) {
    if (region.state != RegionState::kLanding || region.link != link.id || region.lane != lane ||
        region.epoch != epoch)
      continue;
    RxLeg& leg = legs_.at(region.leg);
    RxSlice& slice = leg.slices.at(region.slice);
    if (slice.state == RxSlice::State::kCounts) slice.chunks.at(region.chunk) = RxState::kNeeded;
    quarantine(region);
    touched.insert(leg.pull);
  }
  for (const uint64_t pull : link.own_pulls) {
    const auto it = legs_.find(pull);
    if (it == legs_.end()) continue;
    const std::size_t dropped = std::erase_if(it->second.held, [&](const auto& entry) {
      if (entry.second.lane.lane != lane || entry.second.lane.epoch != epoch) return false;
      drop_offer(entry.second);
      return true;
    });
    if (dropped > 0) touched.insert(pull);
  }
  for (const uint64_t pull : touched) {
    decide_held(pull);
    const auto it = legs_.find(pull);
    if (it != legs_.end()) update(it->second);
  }
}

void Receiver::rails_died() {
  // All lanes are down, so every posted receive is quarantined; now none can write any more.
  std::vector<uint64_t> evident;
  for (const auto& [id, region] : regions_)
    if (region.state == RegionState::kQuarantined && !region.mapped) evident.push_back(id);
  for (const uint64_t id : evident) free_region(id);
}

}  // namespace kvferry::engine
