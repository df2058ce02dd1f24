// Chunks on their way out: gathered into staging in turn, offered over the lanes that are up, held
// until acknowledged and until nobody touches the region any more.
#include <algorithm>
#include <utility>

#include "daemon/base/check.h"
#include "daemon/engine/core.h"
#include "daemon/engine/grants.h"

namespace kvferry::engine {

Sender::Sender(Core& core) : core_(core) {
  for (const Arena& arena : core_.arenas)
    turns_.emplace_back(Shares(core_.config, arena, RegionKind::kStaging));
}

// Moves the cursor to the next chunk to gather; false if there is none for now. Chunks behind it
// may have found what they need in another leg's region.
bool Sender::next_idle(TxLeg& leg) {
  auto& [ordinal, chunk] = leg.cursor;
  while (ordinal < leg.announced) {
    const auto it = leg.slices.find(ordinal);
    if (it != leg.slices.end() && !it->second.dropped) {
      const std::vector<TxChunk>& chunks = it->second.chunks;
      while (chunk < chunks.size() && chunks[chunk].state != TxState::kIdle) ++chunk;
      if (chunk < chunks.size()) return true;
    }
    ++ordinal;
    chunk = 0;
  }
  return false;
}

// Whether the chunk at the cursor may be staged beside those that the leg has: in their arena, or
// in another one if there are none.
bool Sender::same_arena(TxLeg& leg) {
  const uint32_t next = leg.slices.at(leg.cursor.first).arena;
  if (next != leg.arena && leg.holding == 0) {
    leave_queues(leg);
    leg.arena = next;
  }
  return next == leg.arena;
}

// After any change of credits or chunks: the leg's place in the queues, and whether it can offer.
void Sender::update(TxLeg& leg) {
  if (leg.mapped) {
    update_mapped(leg);
    return;
  }
  const uint64_t credits = leg.credits.size() + leg.returned.size();
  const uint64_t pending = leg.gathering + leg.staged.size();
  const bool local = leg.link == kLoopedLink;  // needs neither credit nor staging
  const auto ahead = static_cast<uint32_t>(pending > credits && !local ? pending - credits : 0);
  turns_[leg.arena].ahead_total += ahead;
  turns_[leg.arena].ahead_total -= leg.ahead;
  leg.ahead = ahead;
  if (!leg.staged.empty() && (credits > 0 || must_ask(leg)))
    ready_.insert(leg.id);
  else
    ready_.erase(leg.id);
  const bool idle = leg.resolved && !local && next_idle(leg) && same_arena(leg);
  const bool credited = idle && credits > pending;
  if (leg.queued && (!idle || leg.queued_ahead == credited)) leave_queues(leg);
  if (idle && !leg.queued) {
    leg.queued = true;
    leg.queued_ahead = !credited;
    Turns& turns = turns_[leg.arena];
    (credited ? turns.credited : turns.ahead).insert(leg.turn, leg.peer);
  }
  if (leg.queued && !leg.queued_ahead) may_share(leg);
}

void Sender::leave_queues(TxLeg& leg) {
  if (!leg.queued) return;
  if (leg.mapped) {
    leg.queued = false;
    mapped_turns_.erase(leg.turn);
    return;
  }
  Turns& turns = turns_[leg.arena];
  (leg.queued_ahead ? turns.ahead : turns.credited).erase(leg.turn);
  turns.starving.erase(leg.turn);
  leg.queued = false;
  leg.passes = 0;
}

// Gathers for which the arena has room: of legs with a credit, then those that may go ahead.
void Sender::gather_all(uint32_t number) {
  Arena& arena = core_.arenas[number];
  Turns& turns = turns_[number];
  const auto holds = [&](const FairKey& key) { return legs_.at(key.leg).holder(); };
  const auto size = [&](const FairKey& key) {
    TxLeg& leg = legs_.at(key.leg);
    KVFERRY_CHECK(next_idle(leg), "a leg waits for staging only with a chunk to gather");
    const TxSlice& slice = leg.slices.at(leg.cursor.first);
    const uint64_t chunk_bytes = core_.lanes.find(leg.link)->chunk_bytes;
    return chunk_size(chunk_bytes, slice.plan->bytes, leg.cursor.second);
  };
  const auto grant = [&](const FairKey& key, const memory::Region& region) {
    TxLeg& leg = legs_.at(key.leg);
    leg.passes = 0;
    gather(leg, region);
    share_all();  // or the next in turn gathers the same
  };
  const auto passed = [&](const FairKey& key) {
    TxLeg& leg = legs_.at(key.leg);
    if (++leg.passes >= core_.config.starvation_passes) turns.starving.insert(key);
  };
  const auto take = [&](const FairKey&, uint64_t bytes) {
    return arena.take(RegionKind::kStaging, bytes);
  };
  serve_in_turn(
      turns.credited, arena, RegionKind::kStaging, turns.shares, turns.starving,
      [] { return true; }, holds, size, take, grant, passed);
  const auto take_ahead = [&](const FairKey& key, uint64_t bytes) {
    const StagingRegion* there = shareable(legs_.at(key.leg));
    return there != nullptr ? std::optional(there->region) : take(key, bytes);
  };
  const auto grant_ahead = [&](const FairKey& key, const memory::Region& region) {
    TxLeg& leg = legs_.at(key.leg);
    if (StagingRegion* const there = shareable(leg)) {
      share(leg, *there);
      return;
    }
    ++core_.stats.chunks_ahead;
    grant(key, region);
  };
  std::set<FairKey> nobody;
  serve_in_turn(
      turns.ahead, arena, RegionKind::kStaging, turns.shares, nobody,
      [&] { return turns.ahead_total < core_.config.staged_ahead; }, holds, size, take_ahead,
      grant_ahead, [](const FairKey&) {});
}

void Sender::flush() {
  gather_mapped();
  share_all();
  for (uint32_t arena = 0; arena < turns_.size(); ++arena) gather_all(arena);
  const std::set<uint64_t> ready = ready_;
  for (const uint64_t id : ready)
    // One before it may have ended it: they fail together.
    if (const auto leg = legs_.find(id); leg != legs_.end()) offer(leg->second);
}

// The chunk's pages are read from now on, into a region or by a copy within this daemon.
StagingRegion& Sender::begin_gather(TxLeg& leg, uint64_t ordinal, uint64_t chunk) {
  Send& send = sends_.at(leg.send);
  const TxSlice& slice = leg.slices.at(ordinal);
  KVFERRY_CHECK(slice.packed || !send.record.released,
                "no gather starts after the source was released");
  StagingRegion region;
  region.id = core_.next_number();
  region.send = leg.send;
  region.slice = ordinal;
  region.chunk = chunk;
  region.packed = slice.packed;
  region.since = core_.now;
  send.timeline.note(Step::kGathering, core_.now);
  ++send.gathers;
  if (slice.packed)
    ++send.sends[send.by_ordinal[ordinal]].packed.gathers;
  else
    ++send.reads;
  if (!send.moved) {
    send.moved = true;
    send.first_move = core_.now;
  }
  return regions_.emplace(region.id, std::move(region)).first->second;
}

// The leg's chunk is what the region holds or is being filled with.
Staging& Sender::begin_chunk(TxLeg& leg, StagingRegion& region) {
  TxSlice& slice = leg.slices.at(region.slice);
  const uint64_t chunk_bytes = core_.lanes.find(leg.link)->chunk_bytes;
  Staging staging;
  staging.id = core_.next_number();
  staging.region = region.id;
  staging.leg = leg.id;
  staging.send = leg.send;
  staging.link = leg.link;
  staging.slice = region.slice;
  staging.chunk = region.chunk;
  staging.bytes = chunk_size(chunk_bytes, slice.plan->bytes, region.chunk);
  slice.chunks[region.chunk].state = TxState::kGathering;
  slice.chunks[region.chunk].staging = staging.id;
  region.users.insert(staging.id);
  staging.peer = leg.peer;
  if (region.ours)
    turns_[core_.arena_of(region.region)].shares.peer_took(leg.peer, region.region.bytes);
  ++leg.holding;
  ++leg.gathering;
  return stagings_.emplace(staging.id, std::move(staging)).first->second;
}

void Sender::gather(TxLeg& leg, const memory::Region& region) {
  Send& send = sends_.at(leg.send);
  const auto [ordinal, chunk] = leg.cursor;
  const TxSlice& slice = leg.slices.at(ordinal);
  const Link& link = *core_.lanes.find(leg.link);
  ++leg.cursor.second;
  StagingRegion& fresh = begin_gather(leg, ordinal, chunk);
  fresh.region = region;
  fresh.ours = true;
  fresh.holder = leg.holder();
  turns_[core_.arena_of(region)].shares.worker_took(fresh.holder, region.bytes);
  const Staging& staging = begin_chunk(leg, fresh);
  Gather command;
  command.copy = CopyId{core_.next_number()};
  command.plan = slice.plan;
  command.offset = chunk * link.chunk_bytes;
  command.bytes = staging.bytes;
  command.region = region;
  command.link = leg.link;
  command.check_kind = link.check;
  gathers_[command.copy] = fresh.id;
  core_.emit(std::move(command));
  list(leg, slice, fresh);
  update(leg);
  if (!slice.packed && !send.record.memory_in_use)
    release(send);  // which tells that a copy reads the source
}

Sender::Loan Sender::lend(uint64_t pull, uint64_t ordinal, uint64_t chunk) {
  const Link& link = *core_.lanes.find(kLoopedLink);
  const auto known = link.pulls.find(pull);
  if (known == link.pulls.end() || known->second.kind != PeerPull::Kind::kLeg) return {};
  TxLeg& leg = legs_.at(known->second.leg);
  const auto it = leg.slices.find(ordinal);
  if (it == leg.slices.end() || it->second.dropped) return {};
  TxSlice& slice = it->second;
  KVFERRY_CHECK(slice.state == TxSlice::State::kAnnounced && chunk < slice.chunks.size() &&
                    slice.chunks[chunk].state == TxState::kIdle,
                "a chunk is lent once, after its SLICE");
  Staging& staging = begin_chunk(leg, begin_gather(leg, ordinal, chunk));
  staging.lent = true;
  Send& send = sends_.at(leg.send);
  if (!slice.packed && !send.record.memory_in_use)
    release(send);  // which tells that a copy reads the source
  return {staging.id, slice.plan};
}

void Sender::repay(uint64_t loan, const CopyEnded& event) {
  gathered(regions_.at(stagings_.at(loan).region), event);
}

bool Sender::copy_ended(const CopyEnded& event) {
  const auto it = gathers_.find(event.copy);
  if (it == gathers_.end()) return false;
  StagingRegion& region = regions_.at(it->second);
  gathers_.erase(it);
  gathered(region, event);
  return true;
}

void Sender::gathered(StagingRegion& region, const CopyEnded& event) {
  Send& send = sends_.at(region.send);
  const uint64_t send_id = send.id;
  region.gathering = false;
  region.check = event.check;
  --send.gathers;
  if (region.packed) {
    SendSlice& packed = send.sends[send.by_ordinal[region.slice]];
    --packed.packed.gathers;
    if (send.terminal() || packed.dropped) free_packed(packed);
  } else {
    --send.reads;
  }
  send.gather += core_.now - region.since;
  if (event.outcome == CopyOutcome::kOk) send.timeline.note(Step::kGathered, core_.now);
  if (event.outcome != CopyOutcome::kOk) {
    unlist(region);
  } else if (region.ours) {
    const auto wanted = static_cast<uint64_t>(
        std::count_if(region.users.begin(), region.users.end(),
                      [&](uint64_t user) { return stagings_.at(user).wanted; }));
    if (wanted > 0) ++core_.stats.chunks_gathered;
    if (wanted > 1) core_.stats.chunks_shared += wanted - 1;
  }
  // A leg that ends takes others with it, and the last one the region.
  const std::set<uint64_t> users = region.users;
  for (const uint64_t user : users)
    if (stagings_.contains(user)) chunk_gathered(user, event.outcome);
  if (Send* left = find(send_id)) {
    answer_revokes(*left);
    release(*left);
    forget_if_done(send_id);
  }
}

// The gather that one of those waits for who use its region has ended.
void Sender::chunk_gathered(uint64_t id, CopyOutcome outcome) {
  Staging& staging = stagings_.at(id);
  if (staging.mapped) writing_ended(staging);
  if (!staging.wanted) {
    free_if_done(id);
    return;
  }
  TxLeg& leg = legs_.at(staging.leg);
  if (outcome != CopyOutcome::kOk) {
    leg_over(leg.id, LegFate::kFailed, Outcome::kFailed,
             staging.lent ? Reason::kScatterFailed : Reason::kGatherFailed);
    return;
  }
  TxSlice& slice = leg.slices.at(staging.slice);
  if (staging.lent) {  // it is there; its ack will come
    slice.chunks[staging.chunk].state = TxState::kOffered;
    slice.chunks[staging.chunk].offered_once = true;
    staging.offer = OfferId{core_.next_number()};
    staging.offered = true;
    staging.since = core_.now;
    newest_[staging.offer] = staging.id;
  } else if (staging.mapped) {
    written(leg, slice, staging);
  } else {
    slice.chunks[staging.chunk].state = TxState::kStaged;
    leg.staged.insert({staging.slice, staging.chunk});
  }
  chunk_read(leg, slice);
  update(leg);
}

// One more chunk of the leg's needs its source no more.
void Sender::chunk_read(TxLeg& leg, TxSlice& slice) {
  --leg.gathering;
  if (++slice.gathered < slice.count) return;
  if (!slice.packed) --leg.ungathered;
  ++sends_.at(leg.send).record.slices;
}

// A staged chunk of which the peer does not know that it waits.
std::set<std::pair<uint64_t, uint64_t>>::const_iterator Sender::unknown_to_peer(
    const TxLeg& leg) const {
  return std::find_if(leg.staged.begin(), leg.staged.end(), [&](const auto& of) {
    return !leg.slices.at(of.first).chunks[of.second].refused;
  });
}

// A REFUSE that comes after the credit which replaces the refused one leaves a chunk that was
// gathered for that credit with none. Beyond what may be staged ahead nobody would wait for such a
// chunk: it is offered under the spent credit, so that the peer refuses it and knows. One at a
// time: a peer may hold an offer until its slice is compiled, but no more of them than there were
// credits.
bool Sender::must_ask(const TxLeg& leg) const {
  return leg.spent && !leg.asking && leg.ahead > 0 &&
         turns_[leg.arena].ahead_total > core_.config.staged_ahead &&
         unknown_to_peer(leg) != leg.staged.end();
}

void Sender::offer(TxLeg& leg) {
  Link& link = *core_.lanes.find(leg.link);
  while (!leg.staged.empty()) {
    std::deque<CreditGrant>& credits = leg.credits.empty() ? leg.returned : leg.credits;
    const bool asks = credits.empty();
    if (asks && !must_ask(leg)) break;
    const auto [ordinal, chunk] = asks ? *unknown_to_peer(leg) : *leg.staged.begin();
    TxSlice& slice = leg.slices.at(ordinal);
    Staging& staging = stagings_.at(slice.chunks[chunk].staging);
    if (!asks && credits.back().bytes < staging.bytes) {
      // All credits of a leg are of one size, that of its largest chunk.
      leg_over(leg.id, LegFate::kFailed, Outcome::kFailed, Reason::kProtocol);
      return;
    }
    const std::optional<uint32_t> lane = core_.lanes.offer_lane(link, asks ? 0 : staging.bytes);
    if (!lane) break;
    staging.credit = asks ? *leg.spent : credits.back();
    staging.asks = asks;
    if (asks)
      leg.asking = true;
    else
      credits.pop_back();
    staging.lane = *lane;
    staging.epoch = link.lanes[*lane].epoch;
    staging.offer = OfferId{core_.next_number()};
    staging.offered = true;
    staging.newest_send_out = true;
    if (!asks) {  // what is to be refused carries nothing
      staging.on_lane = true;
      staging.lane_chunk = core_.lanes.carry(link, *lane, staging.bytes);
    }
    staging.since = core_.now;
    ++staging.sends;
    newest_[staging.offer] = staging.id;
    sends_out_[staging.offer] = staging.id;
    leg.staged.erase({ordinal, chunk});
    slice.chunks[chunk].refused = false;
    slice.chunks[chunk].state = TxState::kOffered;
    slice.chunks[chunk].offered_again = slice.chunks[chunk].offered_once;
    slice.chunks[chunk].offered_once = slice.chunks[chunk].offered_once || !asks;
    ++core_.stats.offers_sent;
    sends_.at(leg.send).timeline.note(Step::kOffered, core_.now);
    SendOffer command;
    command.lane = {link.id, *lane, staging.epoch};
    command.offer.pull = leg.pull->pull;
    command.offer.send = {core_.config.boot, leg.send};
    command.offer.slice = ordinal;
    command.offer.chunk = chunk;
    command.offer.credit = staging.credit.credit;
    command.offer.offer = staging.offer;
    command.offer.bytes = staging.bytes;
    const StagingRegion& region = regions_.at(staging.region);
    command.offer.check = region.check;
    command.region = region.region;
    core_.emit(std::move(command));
  }
  update(leg);
}

// The chunk's newest offer came to nothing: it waits for its next one.
void Sender::lost_offer(Staging& staging, bool credit_usable) {
  TxLeg& leg = legs_.at(staging.leg);
  newest_.erase(staging.offer);
  staging.offered = false;
  off_lane(staging, Left::kUnknown);
  if (staging.asks) leg.asking = false;
  leg.slices.at(staging.slice).chunks[staging.chunk].state = TxState::kStaged;
  leg.staged.insert({staging.slice, staging.chunk});
  if (credit_usable && !staging.asks && !flawed(Flaw::kFresh))
    leg.returned.push_back(staging.credit);
}

// Nobody waits for the chunk's newest offer any more.
void Sender::stray_offer(TxLeg& leg, const Staging& staging) {
  if (!staging.asks) leg.stray_offers.push_back({staging.lane, staging.epoch, staging.credit});
}

void Sender::chunk_acked(TxLeg& leg, TxSlice& slice, uint64_t ordinal, uint64_t chunk) {
  Send& send = sends_.at(leg.send);
  TxChunk& of = slice.chunks[chunk];
  Staging& staging = stagings_.at(of.staging);
  if (of.state == TxState::kStaged) leg.staged.erase({ordinal, chunk});
  if (of.state == TxState::kOffered && of.offered_again)
    stray_offer(leg, staging);
  else
    off_lane(staging, Left::kArrived);
  of.state = TxState::kAcked;
  of.staging = 0;
  --leg.holding;
  if (!staging.lent) core_.stats.bytes_sent += staging.bytes;
  send.record.bytes_done += staging.bytes;
  ++send.chunks;
  ++core_.stats.chunks_acked;
  send.wire += core_.now - staging.since;
  send.timeline.note(Step::kArrived, core_.now);
  core_.workers.changed(send, Role::kSender);
  unwant(staging.id);
  if (++slice.acked == slice.count) {
    --leg.unacked;
    leave_stream(leg, slice);
    slice.forget();
  }
  update(leg);
}

void Sender::ack_all(TxLeg& leg) {
  for (auto& [ordinal, slice] : leg.slices) {
    if (slice.dropped) continue;
    for (uint64_t chunk = 0; chunk < slice.chunks.size(); ++chunk) {
      const TxState state = slice.chunks[chunk].state;
      if (state > TxState::kGathering && state != TxState::kAcked)
        chunk_acked(leg, slice, ordinal, chunk);
    }
  }
}

// Nobody wants the chunk any more; its region is free once nobody touches it, for this leg or for
// others.
void Sender::unwant(uint64_t id) {
  Staging& staging = stagings_.at(id);
  staging.wanted = false;
  if (staging.offered) newest_.erase(staging.offer);
  if (staging.offered && staging.asks) legs_.at(staging.leg).asking = false;
  staging.offered = false;
  // One that nobody waits for is on its lane as long as it is sent.
  if (!staging.newest_send_out) off_lane(staging, Left::kUnknown);
  free_if_done(id);
}

void Sender::off_lane(Staging& staging, Left how) {
  if (!std::exchange(staging.on_lane, false)) return;
  LaneFlow& flow = core_.lanes.find(staging.link)->lanes[staging.lane].flow;
  if (how == Left::kArrived)
    flow.arrived(staging.lane_chunk, staging.bytes, core_.now);
  else
    flow.left(staging.lane_chunk, staging.bytes, core_.now);
}

void Sender::give_back(StagingRegion& region) {
  unlist(region);
  region.ours = false;
  const uint32_t arena = core_.arena_of(region.region);
  core_.arenas[arena].give_back(RegionKind::kStaging, region.region);
  turns_[arena].shares.worker_gave(region.holder, region.region.bytes);
  for (const uint64_t user : region.users)
    turns_[arena].shares.peer_gave(stagings_.at(user).peer, region.region.bytes);
}

void Sender::free_if_done(uint64_t id) {
  const auto it = stagings_.find(id);
  if (it == stagings_.end()) return;
  const Staging& staging = it->second;
  if (staging.wanted || staging.sends > 0) return;
  StagingRegion& region = regions_.at(staging.region);
  if (region.gathering) return;
  region.users.erase(id);
  if (region.ours)
    turns_[core_.arena_of(region.region)].shares.peer_gave(staging.peer, region.region.bytes);
  stagings_.erase(it);
  if (region.ours && (region.users.empty() || flawed(Flaw::kFreeShared))) give_back(region);
  if (region.users.empty()) regions_.erase(region.id);
}

void Sender::offer_send_ended(OfferId offer) {
  const auto it = sends_out_.find(offer);
  if (it == sends_out_.end()) return;
  const uint64_t id = it->second;
  sends_out_.erase(it);
  Staging& staging = stagings_.at(id);
  --staging.sends;
  if (staging.offer == offer) {
    staging.newest_send_out = false;
    if (!staging.wanted) off_lane(staging, Left::kUnknown);
  }
  if (flawed(Flaw::kStatus) && staging.wanted && staging.offered && staging.offer == offer) {
    TxLeg& leg = legs_.at(staging.leg);
    chunk_acked(leg, leg.slices.at(staging.slice), staging.slice, staging.chunk);
    if (all_acked(leg)) delivered(leg);
    return;
  }
  if (StagingRegion& region = regions_.at(staging.region);
      flawed(Flaw::kLocalDone) && staging.sends == 0 && region.ours)
    give_back(region);
  free_if_done(id);
}

void Sender::lane_down(Link& link, uint32_t lane, uint32_t epoch) {
  // A UCX send that ended well says nothing about its chunk: all that went by this lane and is not
  // acknowledged goes again, with the same credit.
  std::set<uint64_t> touched;
  for (auto& [id, staging] : stagings_) {
    if (staging.link != link.id || staging.lane != lane || staging.epoch != epoch) continue;
    staging.on_lane = false;  // what the lane carried is forgotten
    if (!staging.offered) continue;
    if (flawed(Flaw::kErrorOnly) && !staging.newest_send_out) continue;
    touched.insert(staging.leg);
    ++core_.stats.chunks_requeued;
    lost_offer(staging, true);
  }
  for (auto& [id, leg] : legs_) {
    if (leg.link != link.id || leg.stray_offers.empty()) continue;
    touched.insert(id);
    auto& returned = leg.returned;  // clang before 16 captures no structured bindings
    std::erase_if(leg.stray_offers, [&](const StrayOffer& offer) {
      if (offer.lane != lane || offer.epoch != epoch) return false;
      if (!flawed(Flaw::kForgetStray)) returned.push_back(offer.credit);
      return true;
    });
  }
  for (const uint64_t leg : touched) update(legs_.at(leg));
}

void Sender::rails_died() {
  const std::map<OfferId, uint64_t> out = sends_out_;
  for (const auto& [offer, staging] : out) offer_send_ended(offer);
}

}  // namespace kvferry::engine
