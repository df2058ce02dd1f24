// A sender's legs: slices compiled, announced, acknowledged; a leg's end; resync and revoke.
#include <algorithm>
#include <utility>

#include "daemon/base/check.h"
#include "daemon/engine/core.h"

namespace kvferry::engine {
namespace {

// A message has 64 KiB for all but its aux; a range takes 16 bytes.
constexpr uint64_t kMostRanges = 3500;

}  // namespace

// The live leg that a message of this link means; else nothing, and the peer is answered if it
// should know better.
TxLeg* Sender::leg_of(Link& link, const PullId& pull) {
  const auto it = pull.receiver == link.boot ? link.pulls.find(pull.counter) : link.pulls.end();
  if (it != link.pulls.end() && it->second.kind == PeerPull::Kind::kLeg)
    return &legs_.at(it->second.leg);
  if (flawed(Flaw::kForeignAck))
    for (auto& [id, leg] : legs_)
      if (leg.pull->pull == pull) return &leg;
  return nullptr;
}

// ---- slices -----------------------------------------------------------------------------------

// Compiles slices that are new to the leg and announces, in order, those whose turn has come.
void Sender::pump(TxLeg& leg) {
  Send& send = sends_.at(leg.send);
  for (; leg.created < send.by_ordinal.size(); ++leg.created) {
    const SendSlice& of = send.sends[send.by_ordinal[leg.created]];
    if (of.dropped) continue;
    // What comes from a packed copy is compiled when that is there; what comes later, after it.
    if (of.packed.state == PackedCopy::State::kAwaited ||
        of.packed.state == PackedCopy::State::kMaking)
      break;
    TxSlice& slice = leg.slices[leg.created];
    slice.packed = of.packed.state == PackedCopy::State::kMade;
    slice.compile = CompileId{core_.next_number()};
    compiles_[slice.compile] = {leg.id, leg.created};
    if (!slice.packed) ++leg.ungathered;
    ++leg.unacked;
    Compile compile;
    compile.compile = slice.compile;
    compile.side = Role::kSender;
    compile.context = leg.context;
    compile.send = slice.packed ? of.packed.source : of.op;
    slice.arena = flawed(Flaw::kPagesArena) ? send.layout->arena : compile.send->layout->arena;
    compile.pull = leg.pull;
    compile.offer = of.op->offer;
    compile.layers = of.op->layers;
    core_.emit(std::move(compile));
  }
  while (leg.announced < leg.created) {
    const auto it = leg.slices.find(leg.announced);
    if (it != leg.slices.end() && !it->second.dropped) {
      const SendSlice& of = send.sends[send.by_ordinal[leg.announced]];
      if (it->second.state == TxSlice::State::kCompiling || !of.ready) break;
      announce(leg, it->first, it->second);
    }
    ++leg.announced;
  }
  update(leg);
  release(send);
}

bool Sender::compiled(Compiled& event) {
  const auto it = compiles_.find(event.compile);
  if (it == compiles_.end()) return false;
  const auto [id, ordinal] = it->second;
  compiles_.erase(it);
  TxLeg& leg = legs_.at(id);
  TxSlice& slice = leg.slices.at(ordinal);
  if (slice.dropped) return true;
  if (event.reason != Reason::kNone || event.plan == nullptr) {
    leg_over(id, LegFate::kFailed, Outcome::kFailed,
             event.reason == Reason::kNone ? Reason::kInternal : event.reason);
    return true;
  }
  const Link& link = *core_.lanes.find(leg.link);
  Send& send = sends_.at(leg.send);
  const std::vector<GroupRanges>& offer = send.sends[send.by_ordinal[ordinal]].op->offer;
  uint64_t ranges = 0;
  for (const GroupRanges& group : offer) ranges += 1 + group.ranges.size();
  if (ranges > kMostRanges) {
    leg_over(id, LegFate::kFailed, Outcome::kFailed, Reason::kTooFragmented);
    return true;
  }
  slice.plan = std::move(event.plan);
  slice.state = TxSlice::State::kCompiled;
  slice.bytes = slice.plan->bytes;
  slice.count = ceil_div(slice.bytes, link.chunk_bytes);
  slice.chunks.resize(slice.count);
  enter_stream(leg, ordinal, slice);
  send.record.bytes_total += slice.plan->bytes;
  send.fragments += slice.plan->fragments;
  core_.stats.fragments_sent += slice.plan->fragments;
  core_.workers.changed(send, Role::kSender);
  pump(leg);
  return true;
}

MsgSlice Sender::slice_message(const TxLeg& leg, uint64_t ordinal, const TxSlice& slice) const {
  const Send& send = sends_.at(leg.send);
  const SendOp& op = *send.sends[send.by_ordinal[ordinal]].op;
  MsgSlice message;
  message.pull = leg.pull->pull;
  message.send = {core_.config.boot, leg.send};
  message.proof = leg.proof;
  message.ordinal = ordinal;
  message.last = op.last;
  message.ranges = op.offer;
  message.layers = op.layers;
  message.bytes = slice.plan->bytes;
  message.digest = slice.plan->digest;
  message.with_aux = op.last && op.aux.has_value();
  if (op.last && leg.carries_aux) message.aux = op.aux;
  return message;
}

bool Sender::tell_slice(TxLeg& leg, uint64_t ordinal, const TxSlice& slice) {
  return core_.lanes.send(*core_.lanes.find(leg.link), slice_message(leg, ordinal, slice));
}

void Sender::announce(TxLeg& leg, uint64_t ordinal, TxSlice& slice) {
  slice.state = TxSlice::State::kAnnounced;
  sends_.at(leg.send).timeline.note(Step::kSlice, core_.now);
  (void)tell_slice(leg, ordinal, slice);
  if (slice.count > 0) return;
  if (!slice.packed) --leg.ungathered;  // nothing to gather
  ++sends_.at(leg.send).record.slices;
}

// ---- credits and acks -------------------------------------------------------------------------

// A receiver tells its credits in order, and all that are LIVE again where a control lane starts.
// So one below the newest has been taken already, or was withdrawn before it came here.
void Sender::take_credits(Link& link, TxLeg& leg, const std::vector<CreditGrant>& credits) {
  for (const CreditGrant& credit : credits) {
    if (credit.credit.value == 0 || credit.bytes == 0 ||
        credit.place.has_value() != leg.mapped.has_value()) {
      core_.lanes.protocol_error(link.id);
      return;
    }
    if (credit.credit.value <= leg.newest_credit) continue;
    leg.newest_credit = credit.credit.value;
    leg.credits.push_back(credit);
    sends_.at(leg.send).timeline.note(Step::kGranted, core_.now);
    // More than may be LIVE: the oldest have been withdrawn, as a mapped leg's never are.
    if (leg.mapped && leg.credits.size() > link.max_credits) core_.lanes.protocol_error(link.id);
    if (leg.credits.size() > link.max_credits) leg.credits.pop_front();
  }
  update(leg);
}

void Sender::update_in(Link& link, const MsgUpdate& message) {
  TxLeg* leg = leg_of(link, message.pull);
  if (message.pull.counter == 0) {
    // About no pull: it says only what may be forgotten.
  } else if (leg == nullptr) {
    const auto it = message.pull.receiver == link.boot ? link.pulls.find(message.pull.counter)
                                                       : link.pulls.end();
    if (it == link.pulls.end()) {
      core_.dropped(DropCause::kUnknownPull);
    } else if (it->second.kind == PeerPull::Kind::kParked) {
      // Kept for its Send, as many as a leg may have: the newest, as others have been withdrawn.
      ParkedPull& parked = *it->second.parked;
      for (const CreditGrant& credit : message.credits) {
        std::vector<CreditGrant>& kept = parked.credits;
        if (parked.pull->mapped || (!kept.empty() && credit.credit <= kept.back().credit)) continue;
        kept.push_back(credit);
        if (kept.size() > link.max_credits) kept.erase(kept.begin());
      }
    } else {
      core_.dropped(DropCause::kLate);
      answer_end(link, message.pull.counter, it->second);
    }
  } else {
    const uint64_t id = leg->id;
    take_credits(link, *leg, message.credits);
    for (const Ack& of : message.acks) {
      ack(*leg, of);
      const auto again = legs_.find(id);
      if (again == legs_.end()) break;  // it broke the protocol
    }
    if (legs_.contains(id) && all_acked(*leg)) delivered(*leg);
  }
  forget_below(link, message.oldest);
}

void Sender::ack(TxLeg& leg, const Ack& of) {
  const auto it = leg.slices.find(of.slice);
  if (it == leg.slices.end() || it->second.state != TxSlice::State::kAnnounced) {
    leg_over(leg.id, LegFate::kFailed, Outcome::kFailed, Reason::kProtocol);
    return;
  }
  TxSlice& slice = it->second;
  leg.acked_below = std::max(leg.acked_below, of.slice + 1);
  if (slice.dropped) {  // they crossed
    leg.dropped_writes.erase({of.slice, of.chunk});
    return;
  }
  if (slice.count == 0) {
    if (of.chunk == 0 && !slice.empty_acked) {
      slice.empty_acked = true;
      slice.forget();
      --leg.unacked;
    }
    return;
  }
  if (of.chunk < slice.count && slice.all_acked()) return;
  if (of.chunk >= slice.count || slice.chunks[of.chunk].state <= TxState::kGathering) {
    leg_over(leg.id, LegFate::kFailed, Outcome::kFailed, Reason::kProtocol);
    return;
  }
  if (slice.chunks[of.chunk].state != TxState::kAcked) chunk_acked(leg, slice, of.slice, of.chunk);
}

bool Sender::all_acked(const TxLeg& leg) const {
  const Send& send = sends_.at(leg.send);
  return leg.resolved && send.last && leg.announced > *send.last && leg.unacked == 0;
}

// All that counts has arrived. Where a Revoke has taken back what nobody sent anew, that is less
// than the receiver needs; it cannot tell by itself (README: who says NOT_OFFERED).
void Sender::delivered(const TxLeg& leg) {
  uint64_t bytes = 0;
  for (const auto& [ordinal, slice] : leg.slices)
    if (!slice.dropped) bytes += slice.bytes;
  if (leg.expected_bytes.value_or(bytes) == bytes || flawed(Flaw::kDeliverLess))
    leg_over(leg.id, LegFate::kDelivered, Outcome::kDelivered, Reason::kNone);
  else
    leg_over(leg.id, LegFate::kFailed, Outcome::kFailed, Reason::kNotOffered);
}

void Sender::refuse_in(Link& link, const RefuseIn& event) {
  TxLeg* leg = leg_of(link, event.message.pull);
  if (leg == nullptr) {
    core_.dropped(DropCause::kUnknownPull);
    return;
  }
  const auto it = newest_.find(event.message.offer);
  if (it == newest_.end() || stagings_.at(it->second).leg != leg->id) {
    core_.dropped(DropCause::kLate);
    return;
  }
  Staging& staging = stagings_.at(it->second);
  leg->spent = staging.credit;
  leg->slices.at(staging.slice).chunks[staging.chunk].refused = true;
  lost_offer(staging, false);
  update(*leg);
}

// ---- a leg's end ------------------------------------------------------------------------------

void Sender::end_leg(TxLeg& leg, Outcome outcome, Reason reason) {
  Send& send = sends_.at(leg.send);
  // A pull that was never admitted says nothing about what the others got.
  bool all_offered = !leg.resolved || (send.last && leg.announced > *send.last);
  for (auto& [ordinal, slice] : leg.slices) {
    compiles_.erase(slice.compile);
    for (const TxChunk& chunk : slice.chunks) {
      if (!slice.dropped && !may_arrive(chunk)) all_offered = false;
      if (chunk.staging != 0) unwant(chunk.staging);
    }
    leave_stream(leg, slice);
  }
  if (!all_offered) send.all_offered = false;
  if (leg.resolve) {
    resolves_.erase(leg.resolve);
    core_.emit(CancelResolve{leg.resolve});
  }
  leave_queues(leg);
  turns_[leg.arena].ahead_total -= leg.ahead;
  ready_.erase(leg.id);
  sharing_.erase(leg.id);
  core_.timers.cancel({TimerKind::kLegDeadline, leg.id, 0});
  Link& link = *core_.lanes.find(leg.link);
  --link.legs_out;
  end_pull(link, leg.pull->pull.counter, leg.pull->transfer, outcome, reason);
  send.legs.erase(leg.id);
  legs_.erase(leg.id);
}

void Sender::leg_over(uint64_t id, LegFate fate, Outcome outcome, Reason reason) {
  TxLeg& leg = legs_.at(id);
  Send& send = sends_.at(leg.send);
  const bool resolved = leg.resolved;
  const std::shared_ptr<const MsgPull> pull = leg.pull;
  const ReceiverKey key{pull->receiver_instance, pull->receiver_incarnation, true, leg.dp_group};
  end_leg(leg, outcome, reason);
  if (resolved) {
    send.places.at(key).legs.at(pull->receiver_rank).fate = fate;
    if (fate == LegFate::kFailed) fail_place(send, key, reason);
  } else if (fate == LegFate::kFailed) {
    lose_place(send, key.instance, key.incarnation, pull->receiver_rank, reason);
    return;  // which has seen to the rest
  }
  evaluate(send);
}

// One leg's failure ends that receiver's legs; with one place it is the send's.
void Sender::fail_place(Send& send, const ReceiverKey& key, Reason reason) {
  Place& place = send.places.at(key);
  if (!place.failed) {
    place.failed = true;
    place.reason = reason;
  }
  if (send.max_receivers == 1) {
    if (!send.terminal()) end_send(send, TransferState::kFailed, reason);
    return;
  }
  for (auto& [rank, of] : place.legs) {
    if (of.fate == LegFate::kOpen) end_leg(legs_.at(of.leg), Outcome::kFailed, reason);
    if (of.fate != LegFate::kDelivered && of.fate != LegFate::kReleased) of.fate = LegFate::kFailed;
  }
}

void Sender::link_dead(Link& link) {
  std::vector<uint64_t> pulls;
  for (const auto& [pull, entry] : link.pulls) pulls.push_back(pull);
  for (const uint64_t pull : pulls) {
    const auto it = link.pulls.find(pull);
    if (it == link.pulls.end()) continue;
    if (it->second.kind == PeerPull::Kind::kParked)
      unpark(link, pull);
    else if (it->second.kind == PeerPull::Kind::kLeg)
      leg_over(it->second.leg, LegFate::kFailed, Outcome::kFailed, Reason::kPeerLost);
  }
}

void Sender::resync(Link& link) {
  for (const uint32_t arena : link.mapped) (void)core_.lanes.send(link, MsgMapped{arena});
  for (auto& [pull, entry] : link.pulls) {
    // Until the peer has closed the pull: that its END was seen says nothing of our answer to it.
    if (entry.kind == PeerPull::Kind::kEnded) {
      answer_end(link, pull, entry);
      tell_drained(link, {link.boot, pull}, entry);
    } else if (entry.kind == PeerPull::Kind::kLeg) {
      TxLeg& leg = legs_.at(entry.leg);
      for (const auto& [ordinal, slice] : leg.slices)
        // Who has acknowledged a slice that came after a DROP knows the DROP.
        if (slice.dropped && slice.state == TxSlice::State::kAnnounced &&
            leg.acked_below <= slice.dropped_before)
          (void)core_.lanes.send(link, MsgDrop{leg.pull->pull, ordinal});
      for (const auto& [ordinal, slice] : leg.slices) {
        // Who has acknowledged all of a slice knows it.
        if (!slice.dropped && slice.state == TxSlice::State::kAnnounced && !slice.all_acked())
          (void)tell_slice(leg, ordinal, slice);
      }
      resync_writes(link, leg);
    }
  }
}

// ---- revoke -----------------------------------------------------------------------------------

void Sender::revoke(uint64_t id, const RevokeOp& op) {
  Send& send = sends_.at(id);
  if (send.terminal()) {
    core_.reply_error(op.op, Code::kFailedPrecondition, std::string(name_of(send.record.reason)),
                      "the transfer has ended");
    return;
  }
  const bool nobody_else = send.places.size() >= send.max_receivers || send.lease_over;
  const auto wholly_gathered = [&](uint64_t ordinal) {
    if (!nobody_else || send.places.empty()) return false;
    for (const auto& [key, place] : send.places) {
      if (place.failed) continue;
      for (const auto& [rank, of] : place.legs) {
        if (of.fate == LegFate::kExpected) return false;
        if (of.fate != LegFate::kOpen) continue;
        const TxLeg& leg = legs_.at(of.leg);
        const auto slice = leg.slices.find(ordinal);
        if (slice == leg.slices.end() || slice->second.state != TxSlice::State::kAnnounced ||
            slice->second.gathered < slice->second.count)
          return false;
      }
    }
    return true;
  };
  const auto dropped = [&](uint64_t ordinal) {
    // Released pages bring no other slices: what is packed by then stays.
    return !send.record.released && !wholly_gathered(ordinal);
  };
  PendingRevoke revoke;
  revoke.op = op.op;
  for (auto it = send.by_end.upper_bound({op.from_token, UINT64_MAX}); it != send.by_end.end();
       ++it)
    if (dropped(it->second)) revoke.ordinals.insert(it->second);
  // Whatever comes anew comes with a new last slice.
  if (!revoke.ordinals.empty() && send.last) revoke.ordinals.insert(*send.last);
  for (const uint64_t ordinal : revoke.ordinals) {
    SendSlice& slice = send.sends[send.by_ordinal[ordinal]];
    slice.dropped = true;
    send.by_end.erase({end_of(*slice.op), ordinal});
    revoke.sends.push_back(send.by_ordinal[ordinal]);
    if (slice.condition && conditions_.erase(slice.condition) > 0)
      core_.emit(UnwatchCondition{slice.condition});
    if (send.last == ordinal) send.last.reset();
    for (const uint64_t leg : send.legs) drop_slice(legs_.at(leg), ordinal);
    drop_packed(send, slice);
  }
  for (const uint64_t leg : send.legs)
    if (legs_.at(leg).resolved) pump(legs_.at(leg));
  send.revokes.push_back(std::move(revoke));
  answer_revokes(send);
}

void Sender::drop_slice(TxLeg& leg, uint64_t ordinal) {
  const auto it = leg.slices.find(ordinal);
  if (it == leg.slices.end() || it->second.dropped) return;
  TxSlice& slice = it->second;
  slice.dropped = true;
  slice.dropped_before = leg.announced;
  sends_.at(leg.send).record.bytes_total -= slice.bytes;
  if (!slice.packed && (slice.state != TxSlice::State::kAnnounced || slice.gathered < slice.count))
    --leg.ungathered;
  if (slice.all_acked())
    sends_.at(leg.send).record.bytes_done -= slice.bytes;
  else
    --leg.unacked;
  const uint64_t chunk_bytes = core_.lanes.find(leg.link)->chunk_bytes;
  std::vector<uint64_t> idle;
  for (uint64_t chunk = 0; chunk < slice.chunks.size(); ++chunk) {
    const TxState state = slice.chunks[chunk].state;
    if (state == TxState::kIdle) idle.push_back(chunk);
    if (state == TxState::kAcked)
      sends_.at(leg.send).record.bytes_done -= chunk_size(chunk_bytes, slice.bytes, chunk);
    if (slice.chunks[chunk].staging == 0) continue;
    Staging& staging = stagings_.at(slice.chunks[chunk].staging);
    --leg.holding;
    if (state == TxState::kGathering) --leg.gathering;
    if (state == TxState::kStaged) leg.staged.erase({ordinal, chunk});
    if (state == TxState::kOffered && !staging.lent) stray_offer(leg, staging);
    // That of a gather which still runs is usable again when it ends; this one the peer spends.
    if (state == TxState::kWritten)
      leg.dropped_writes[{ordinal, chunk}] = {staging.credit.credit,
                                              regions_.at(staging.region).check};
    if (state == TxState::kWritten && flawed(Flaw::kReuseWritten))
      leg.credits.push_back(staging.credit);
    slice.chunks[chunk].staging = 0;
    unwant(staging.id);
  }
  leave_stream(leg, slice);
  slice.forget();
  if (slice.state == TxSlice::State::kAnnounced) {
    (void)core_.lanes.send(*core_.lanes.find(leg.link), MsgDrop{leg.pull->pull, ordinal});
    if (leg.mapped) give_back_credits(leg, ordinal, idle);
  }
  update(leg);
}

// A Revoke is answered when no gather reads its slices' pages any more.
void Sender::answer_revokes(Send& send) {
  if (send.revokes.empty()) return;
  std::set<uint64_t> reading;
  for (const auto& [id, region] : regions_)
    if (region.gathering && !region.packed && region.send == send.id) reading.insert(region.slice);
  std::erase_if(send.revokes, [&](const PendingRevoke& revoke) {
    for (const uint64_t ordinal : revoke.ordinals) {
      const SendSlice& slice = send.sends[send.by_ordinal[ordinal]];
      if (reading.contains(ordinal) || slice.packed.state == PackedCopy::State::kMaking)
        return false;
    }
    Reply answer;
    answer.op = revoke.op;
    answer.slot = send.slot;
    answer.state = send.record.state;
    answer.memory_in_use = send.record.memory_in_use;
    answer.dropped_sends = revoke.sends;
    core_.emit(std::move(answer));
    return true;
  });
}

}  // namespace kvferry::engine
