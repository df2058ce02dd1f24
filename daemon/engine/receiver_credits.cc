// Regions and credits: who gets one, who gives one up, and what the peer is told: PULL and UPDATE.
#include <algorithm>
#include <utility>

#include "daemon/base/check.h"
#include "daemon/engine/core.h"
#include "daemon/engine/grants.h"

namespace kvferry::engine {
namespace {

constexpr std::size_t kMostCredits = 64;  // in a message
constexpr std::size_t kMostAcks = 1024;

// Fewer chunks of it stand staged at the peer, after a REFUSE, than it has credits for, so that it
// can do without one of them ...
bool has_spare(const RxLeg& leg) {
  return leg.credits.size() > leg.refused.size();
}

}  // namespace

// ... or more.
bool Receiver::needy(const RxLeg& leg) {
  return leg.refused.size() > leg.credits.size();
}

Receiver::Receiver(Core& core) : core_(core) {
  for (const Arena& arena : core_.arenas)
    turns_.emplace_back(Shares(core_.config, arena, RegionKind::kLanding));
}

// After it has entered the queues or left them.
void Receiver::note_reserved(const RxLeg& leg) {
  if (!leg.reserved) return;
  if (leg.queued) {
    reserved_[leg.receive].insert(leg.pull);
    return;
  }
  const auto it = reserved_.find(leg.receive);
  if (it != reserved_.end() && it->second.erase(leg.pull) > 0 && it->second.empty())
    reserved_.erase(it);
}

// After any change of its credits or refused chunks, or of its place in the queues.
void Receiver::note_needy(RxLeg& leg) {
  const bool now = leg.queued && !leg.queued_idle && needy(leg);
  if (now == leg.queued_needy) return;
  leg.queued_needy = now;
  FairQueue& queue = turns_[leg.arena].needy;
  now ? queue.insert(leg.turn) : queue.erase(leg.turn);
}

// After it got its first LIVE credit or lost its last one, or heard its first SLICE.
void Receiver::note_credits(const RxLeg& leg) {
  if (leg.mapped) return;
  const auto note = [&](std::set<uint64_t>& pulls, bool in) {
    in ? static_cast<void>(pulls.insert(leg.pull)) : static_cast<void>(pulls.erase(leg.pull));
  };
  note(turns_[leg.arena].withdrawable, !leg.credits.empty());
  note(turns_[leg.arena].unheard, !leg.credits.empty() && !leg.heard);
}

// How many regions the leg should hold: as many as it has chunks to come, up to the caps.
uint64_t Receiver::wanted(const RxLeg& leg) const {
  const Link* link = core_.lanes.find(leg.link);
  if (link == nullptr || leg.local || leg.expected_bytes == 0) return 0;
  if (leg.state != RxLegState::kOpen && leg.state != RxLegState::kUnsent) return 0;
  if (!receives_.at(leg.receive).decided) return 0;
  uint64_t to_come = leg.known_chunks - leg.done_chunks;
  // A mapped region is never withdrawn, so it is lent only for a chunk that is there to be written.
  if (!leg.mapped && (!leg.last || leg.compiling > 0) && leg.expected_bytes > leg.known_bytes)
    to_come += ceil_div(leg.expected_bytes - leg.known_bytes, link->chunk_bytes);
  return std::min<uint64_t>({core_.config.leg_credits, link->max_credits, to_come});
}

// After any change of its regions or chunks: the leg's place in the queues.
void Receiver::update(RxLeg& leg) {
  if (leg.local) {
    update_local(leg);
    return;
  }
  const bool wants = leg.regions_held < wanted(leg);
  const bool idle = !leg.heard;
  if (leg.queued && (!wants || leg.queued_idle != idle)) leave_queues(leg);
  if (wants && !leg.queued) {
    leg.queued = true;
    leg.queued_idle = idle;
    Turns& turns = turns_[leg.arena];
    (idle ? turns.idle : turns.waiting).insert(leg.turn, leg.peer);
    note_reserved(leg);
  }
  note_needy(leg);
}

void Receiver::leave_queues(RxLeg& leg) {
  if (!leg.queued) return;
  Turns& turns = turns_[leg.arena];
  (leg.local ? local_turns_ : leg.queued_idle ? turns.idle : turns.waiting).erase(leg.turn);
  turns.starving.erase(leg.turn);
  turns.starving_idle.erase(leg.turn);
  leg.queued = false;
  leg.passes = 0;
  note_reserved(leg);
  note_needy(leg);
}

CreditGrant Receiver::grant_of(const RxRegion& region) const {
  CreditGrant grant{CreditId{region.credit}, region.region.bytes};
  if (region.mapped) grant.place = RegionPlace{region.region.segment, region.region.offset};
  return grant;
}

void Receiver::grant(RxLeg& leg, const memory::Region& region) {
  Receive& receive = receives_.at(leg.receive);
  RxRegion fresh;
  fresh.id = core_.next_number();
  fresh.region = region;
  fresh.link = leg.link;
  fresh.holder = leg.holder();
  fresh.leg = leg.pull;
  fresh.receive = leg.receive;
  fresh.credit = leg.next_credit++;
  leg.credits[fresh.credit] = fresh.id;
  fresh.mapped = leg.mapped;
  fresh.since = core_.now;  // mapped: that is all there is to know of its way here
  Shares& shares = turns_[leg.arena].shares;
  shares.worker_took(fresh.holder, region.bytes);
  shares.peer_took(fresh.holder.peer, region.bytes);
  leg.new_credits.push_back(grant_of(fresh));
  regions_.emplace(fresh.id, std::move(fresh));
  ++leg.regions_held;
  leg.passes = 0;
  if (leg.credits.size() == 1) note_credits(leg);
  receive.granted_any = true;
  if (!receive.moved) {
    receive.moved = true;
    receive.first_move = core_.now;
  }
  receive.timeline.note(Step::kGranted, core_.now);
  ++core_.stats.credits_granted;
  changed(leg);
  update(leg);
}

// Grants what fits into the arena: first to legs that have a slice to bring, in turn; to others
// only what is left over, and they give it up again as soon as one of the first kind waits.
void Receiver::grant_all(uint32_t number) {
  Arena& arena = core_.arenas[number];
  Turns& turns = turns_[number];
  const auto holds = [&](const FairKey& key) { return legs_.at(key.leg).holder(); };
  const auto size = [&](const FairKey& key) { return legs_.at(key.leg).credit_bytes; };
  const auto use = [&](const FairKey& key, const memory::Region& region) {
    grant(legs_.at(key.leg), region);
  };
  const auto passed = [&](std::set<FairKey>& starving) {
    return [&](const FairKey& key) {
      if (++legs_.at(key.leg).passes >= core_.config.starvation_passes) starving.insert(key);
    };
  };
  const auto always = [] { return true; };
  const auto take = [&](const FairKey&, uint64_t bytes) {
    return arena.take(RegionKind::kLanding, bytes);
  };
  while (true) {
    serve_in_turn(turns.waiting, arena, RegionKind::kLanding, turns.shares, turns.starving, always,
                  holds, size, take, use, passed(turns.starving));
    if (turns.waiting.empty()) break;
    FairKey next;
    visit_in_turn(
        turns.waiting, turns.shares, turns.starving, holds,
        [&](const FairKey& key) { return arena.region_bytes(size(key)); },
        [&](const FairKey& key) {
          next = key;
          return true;
        });
    bool freed = withdraw_for(legs_.at(next.leg)) || withdraw_share(legs_.at(next.leg));
    if (!freed) {
      // A peer whose staged chunks were refused must get on, or its staging stands in others' way.
      turns.needy.find_if([&](const FairKey& key) {
        freed = withdraw_for(legs_.at(key.leg));
        return freed;
      });
    }
    if (!freed) return;  // somebody with a slice waits: nothing for the others
  }
  serve_in_turn(turns.idle, arena, RegionKind::kLanding, turns.shares, turns.starving_idle, always,
                holds, size, take, use, passed(turns.starving_idle));
}

void Receiver::grant_all() {
  grant_reserved();
  for (uint32_t arena = 0; arena < turns_.size(); ++arena) grant_all(arena);
}

// What reservations have been promised: a transfer's legs in turn, those that have a slice to bring
// first, then whichever holds least.
void Receiver::grant_reserved() {
  std::vector<uint64_t> receives;
  for (const auto& [id, legs] : reserved_) receives.push_back(id);
  for (const uint64_t id : receives) {
    const uint64_t reservation = receives_.at(id).reservation;
    for (auto it = reserved_.find(id); it != reserved_.end(); it = reserved_.find(id)) {
      RxLeg* next = nullptr;
      for (const uint64_t pull : it->second) {
        RxLeg& leg = legs_.at(pull);
        if (next == nullptr ||
            std::pair(!leg.heard, leg.regions_held) < std::pair(!next->heard, next->regions_held))
          next = &leg;
      }
      const auto region = core_.arenas[next->arena].take_reserved(reservation, next->credit_bytes);
      if (!region) break;
      grant(*next, *region);
    }
  }
}

// A region of an unused credit that may be taken back: a reservation's are not.
std::optional<uint64_t> Receiver::loose_region(const RxLeg& leg) const {
  for (const auto& [credit, region] : leg.credits)
    if (!core_.arenas[leg.arena].is_reserved(regions_.at(region).region)) return region;
  return std::nullopt;
}

// Takes unused credits of its arena back so that `leg` gets a region: from legs that have brought
// no SLICE; if `leg` has chunks that were refused, also from one that has. False if nothing
// changed.
bool Receiver::withdraw_for(const RxLeg& leg) {
  const std::set<uint64_t>& unheard = turns_[leg.arena].unheard;
  for (auto it = unheard.rbegin(); it != unheard.rend(); ++it) {
    const RxLeg& other = legs_.at(*it);
    if (other.pull == leg.pull) continue;
    const auto loose = loose_region(other);
    if (!loose) continue;
    withdraw_region(*loose);
    return true;
  }
  return needy(leg) && withdraw_used(leg, [](const RxLeg&, uint64_t) { return true; });
}

// Who waits within his share gets it from those who hold more than theirs: unused credits again, as
// what lands or is scattered comes back by itself. What is beyond some share becomes less each
// time and nothing is beyond one that was not, so this ends.
bool Receiver::withdraw_share(const RxLeg& leg) {
  const Shares& shares = turns_[leg.arena].shares;
  const Holder to = leg.holder();
  if (!shares.somebody_spares(to)) return false;
  return withdraw_used(leg, [&](const RxLeg& other, uint64_t bytes) {
    return shares.may_move(other.holder(), to, bytes);
  });
}

// From legs that can do without so many bytes, of those that have more credits than refused chunks:
// one credit as large as the leg's, else all the small ones of a frame.
template <typename Spares>
bool Receiver::withdraw_used(const RxLeg& leg, Spares&& spares) {
  const std::set<uint64_t>& withdrawable = turns_[leg.arena].withdrawable;
  bool smaller = false;
  for (auto it = withdrawable.rbegin(); it != withdrawable.rend(); ++it) {
    const RxLeg& other = legs_.at(*it);
    if (!has_spare(other) || other.pull == leg.pull) continue;
    if (other.credit_bytes < leg.credit_bytes) {
      smaller = true;
      continue;
    }
    const auto loose = loose_region(other);
    if (!loose || !spares(other, regions_.at(*loose).region.bytes)) continue;
    withdraw_region(*loose);
    return grant_at_once(leg);
  }
  return smaller && withdraw_frame(leg, spares);
}

template <typename Spares>
bool Receiver::withdraw_frame(const RxLeg& leg, Spares&& spares) {
  const Arena& arena = core_.arenas[leg.arena];
  std::map<std::pair<uint32_t, uint64_t>, std::vector<uint64_t>> frames;
  std::set<std::pair<uint32_t, uint64_t>> in_use;
  for (const auto& [id, region] : regions_) {
    if (region.local || core_.arena_of(region.region) != leg.arena) continue;
    const std::pair frame{region.region.segment, region.region.offset / arena.frame_bytes()};
    const bool unused = region.state == RegionState::kGranted && region.leg != leg.pull &&
                        has_spare(legs_.at(region.leg)) && !arena.is_reserved(region.region);
    if (unused)
      frames[frame].push_back(id);
    else
      in_use.insert(frame);
  }
  for (const auto& [frame, regions] : frames) {
    std::map<uint64_t, uint64_t> losses;
    for (const uint64_t id : regions) ++losses[regions_.at(id).leg];
    const bool spared = std::all_of(losses.begin(), losses.end(), [&](const auto& loss) {
      const RxLeg& other = legs_.at(loss.first);
      return loss.second <= other.credits.size() - other.refused.size() &&
             spares(other, arena.frame_bytes());
    });
    if (!spared || in_use.contains(frame)) continue;
    for (const uint64_t id : regions) withdraw_region(id);
    return grant_at_once(leg);
  }
  return false;
}

// What was just freed goes straight to the leg that needs it, whoever's turn it is. True: something
// has changed.
bool Receiver::grant_at_once(const RxLeg& leg) {
  const auto region = core_.arenas[leg.arena].take(RegionKind::kLanding, leg.credit_bytes);
  if (!region) return true;
  Turns& turns = turns_[leg.arena];
  turns.waiting.served(leg.turn, leg.credit_bytes);
  if (leg.queued_needy) turns.needy.served(leg.turn, leg.credit_bytes);
  turns.starving.erase(leg.turn);
  grant(legs_.at(leg.pull), *region);
  return true;
}

// This region of all. The peer takes the oldest of its credits for those that were withdrawn, so it
// is always the oldest that goes: it changes places with the region's own.
void Receiver::withdraw_region(uint64_t id) {
  RxRegion& region = regions_.at(id);
  RxLeg& leg = legs_.at(region.leg);
  const auto oldest = leg.credits.begin();
  if (oldest->second != id) {
    leg.credits.at(region.credit) = oldest->second;
    regions_.at(oldest->second).credit = region.credit;
    region.credit = oldest->first;
    oldest->second = id;
  }
  // Silently: an offer that names the credit is refused.
  ++core_.stats.credits_withdrawn;
  spend(leg, leg.credits.begin()->first);
}

// The credit is SPENT, for good; if it was LIVE, its region is free.
void Receiver::spend(RxLeg& leg, uint64_t credit) {
  const auto it = leg.credits.find(credit);
  if (it == leg.credits.end()) return;
  const uint64_t region = it->second;
  leg.credits.erase(it);
  ++core_.stats.credits_ended;
  if (leg.credits.empty()) note_credits(leg);
  std::erase_if(leg.new_credits,
                [&](const CreditGrant& grant) { return grant.credit.value == credit; });
  free_region(region);
}

void Receiver::free_region(uint64_t id) {
  const auto it = regions_.find(id);
  const RxRegion region = it->second;
  core_.timers.cancel({TimerKind::kLanding, id, 0});
  if (!region.local) {
    const uint32_t arena = core_.arena_of(region.region);
    const bool quarantined = region.state == RegionState::kQuarantined;
    core_.arenas[arena].give_back(RegionKind::kLanding, region.region, quarantined);
    Shares& shares = turns_[arena].shares;
    if (!quarantined) shares.worker_gave(region.holder, region.region.bytes);
    shares.peer_gave(region.holder.peer, region.region.bytes);
  }
  regions_.erase(it);
  const auto leg = legs_.find(region.leg);
  if (leg == legs_.end()) return;
  if (region.state != RegionState::kQuarantined)
    --leg->second.regions_held;
  else if (region.mapped)
    --leg->second.lent;
  update(leg->second);
}

// A posted receive, or the peer itself, may still write it; only evidence of its end frees it.
void Receiver::quarantine(RxRegion& region) {
  region.state = RegionState::kQuarantined;
  const uint32_t arena = core_.arena_of(region.region);
  core_.arenas[arena].quarantine(region.region);
  turns_[arena].shares.worker_gave(region.holder, region.region.bytes);
  ++core_.stats.quarantines;
  core_.timers.cancel({TimerKind::kLanding, region.id, 0});
  if (flawed(Flaw::kFreeByTime))
    core_.timers.set({TimerKind::kLanding, region.id, 0}, core_.now + core_.config.silence_limit);
  const auto leg = legs_.find(region.leg);
  if (leg == legs_.end()) return;
  --leg->second.regions_held;
  if (region.mapped) ++leg->second.lent;
  update(leg->second);
}

// ---- PULL and UPDATE --------------------------------------------------------------------------

void Receiver::send_pull(Link& link, RxLeg& leg, std::vector<CreditGrant> credits) {
  MsgPull pull = *leg.message;
  const Receive* receive = find(leg.receive);
  const Duration left = receive == nullptr || receive->must_end < core_.now
                            ? Duration{}
                            : receive->must_end - core_.now;
  pull.remaining_ms =
      static_cast<uint64_t>(std::chrono::ceil<std::chrono::milliseconds>(left).count());
  pull.credits = std::move(credits);
  pull.oldest = link.oldest_told = oldest(link);
  (void)core_.lanes.send(link, std::move(pull));
}

void Receiver::send_update(Link& link, RxLeg& leg) {
  std::vector<CreditGrant> credits = std::exchange(leg.new_credits, {});
  std::vector<Ack> acks = std::exchange(leg.new_acks, {});
  std::size_t credit = 0;
  std::size_t ack = 0;
  while (credit < credits.size() || ack < acks.size()) {
    MsgUpdate update;
    update.pull = {core_.config.boot, leg.pull};
    const std::size_t last_credit = std::min(credits.size(), credit + kMostCredits);
    const std::size_t last_ack = std::min(acks.size(), ack + kMostAcks);
    for (; credit < last_credit; ++credit) update.credits.push_back(credits[credit]);
    for (; ack < last_ack; ++ack) update.acks.push_back(acks[ack]);
    update.oldest = link.oldest_told = oldest(link);
    if (!core_.lanes.send(link, std::move(update))) return;
  }
}

void Receiver::tell_oldest(Link& link) {
  const uint64_t now_oldest = oldest(link);
  if (now_oldest == link.oldest_told || link.oldest_told == 0) return;
  MsgUpdate update;
  update.pull = {core_.config.boot, 0};
  update.oldest = now_oldest;
  if (core_.lanes.send(link, std::move(update))) link.oldest_told = now_oldest;
}

// Whether a leg whose PULL is due would have to wait for the arena.
bool Receiver::no_room(const Receive& receive, const RxLeg& leg) const {
  const Arena& arena = core_.arenas[leg.arena];
  if (leg.mapped) return arena.exhausted(RegionKind::kLanding);  // it asks for none before a SLICE
  return leg.credits.empty() && wanted(leg) > 0 && arena.promised(receive.reservation) == 0;
}

void Receiver::flush() {
  run_copies();
  run_local();
  grant_all();
  bool freed = false;
  const std::set<uint64_t> unsent = std::exchange(unsent_, {});
  for (const uint64_t pull : unsent) {
    const auto it = legs_.find(pull);
    if (it == legs_.end()) continue;
    RxLeg& leg = it->second;
    Receive& receive = receives_.at(leg.receive);
    if (!receive.op->wait_for_arena && no_room(receive, leg)) {
      const uint64_t id = receive.id;
      end_receive(receive, TransferState::kFailed, Reason::kArenaExhausted);
      forget_if_done(id);
      freed = true;
      continue;
    }
    leg.state = RxLegState::kOpen;
    receive.timeline.note(Step::kPulled, core_.now);
    leg.new_acks.clear();
    to_update_.erase(pull);
    send_pull(*core_.lanes.find(leg.link), leg, std::exchange(leg.new_credits, {}));
  }
  if (freed) grant_all();
  const std::set<uint64_t> news = std::exchange(to_update_, {});
  for (const uint64_t pull : news) {
    const auto it = legs_.find(pull);
    if (it == legs_.end() || it->second.state != RxLegState::kOpen) continue;
    if (Link* link = core_.lanes.find(it->second.link)) send_update(*link, it->second);
  }
}

}  // namespace kvferry::engine
