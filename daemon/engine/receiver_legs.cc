// A receiver's legs: what senders' daemons say (SLICE, DROP, END), which dp group has the transfer,
// when all is there, resync.
#include <algorithm>
#include <utility>

#include "daemon/base/check.h"
#include "daemon/engine/core.h"
#include "daemon/engine/proofs.h"

namespace kvferry::engine {
namespace {

constexpr std::size_t kMostAux = 64 * 1024;
constexpr uint32_t kMostResolves = 3;  // attempts with newer cards

}  // namespace

uint64_t Receiver::oldest(const Link& link) const {
  return link.own_pulls.empty() ? last_pull_ + 1 : *link.own_pulls.begin();
}

// The leg of a message of this link, if it is live. Else the peer is told that it has ended.
RxLeg* Receiver::live_leg(Link& link, const PullId& pull) {
  const auto it = pull.receiver == core_.config.boot ? legs_.find(pull.counter) : legs_.end();
  if (pull.receiver != core_.config.boot || pull.counter == 0 || pull.counter > last_pull_ ||
      (it != legs_.end() && ((it->second.link != link.id && !flawed(Flaw::kForeignLeg)) ||
                             it->second.state == RxLegState::kUnsent))) {
    core_.lanes.protocol_error(link.id);  // it never had such a PULL from us
    return nullptr;
  }
  if (it == legs_.end()) {
    // We made all pulls: one that we do not know has ended.
    core_.dropped(DropCause::kUnknownPull);
    (void)core_.lanes.send_end(
        link, Role::kReceiver,
        MsgEnd{pull, {}, Outcome::kFailed, Reason::kCancelled, std::nullopt});
    return nullptr;
  }
  if (it->second.state == RxLegState::kOpen) return &it->second;
  core_.dropped(DropCause::kLate);
  answer_end(link, it->second);
  return nullptr;
}

void Receiver::answer_end(Link& link, const RxLeg& leg) {
  MsgEnd end{PullId{core_.config.boot, leg.pull},
             leg.name,
             leg.outcome,
             leg.reason,
             std::nullopt,
             leg.mapped};
  if (!leg.heard) end.proof = leg.message->proof;
  (void)core_.lanes.send_end(link, Role::kReceiver, std::move(end));
}

void Receiver::close_leg(uint64_t pull) {
  const auto it = legs_.find(pull);
  if (Link* link = core_.lanes.find(it->second.link)) link->own_pulls.erase(pull);
  to_update_.erase(pull);
  legs_.erase(it);
}

// ---- SLICE and DROP ---------------------------------------------------------------------------

// The first SLICE decides which dp group has the transfer and starts its timer.
void Receiver::wait_is_over(Receive& receive, RxLeg& leg) {
  leg.heard = true;
  note_credits(leg);
  if (!receive.decided) {
    receive.decided = true;
    receive.groups = {leg.dp_group};
    const std::set<uint64_t> legs = receive.legs;
    for (const uint64_t pull : legs)
      if (legs_.at(pull).dp_group != leg.dp_group) release_leg(legs_.at(pull));
    receive.record.bytes_total = 0;
    for (const uint64_t pull : receive.legs) {
      receive.record.bytes_total += legs_.at(pull).expected_bytes;
      update(legs_.at(pull));
    }
  }
  if (!receive.first_slice) {
    receive.first_slice = true;
    receive.timeline.note(Step::kMatched, core_.now);
    receive.record.state = TransferState::kActive;
    receive.must_end = core_.now + receive.deadline;
    core_.timers.cancel({TimerKind::kWait, receive.id, 0});
    core_.timers.set({TimerKind::kReceiveDeadline, receive.id, 0}, receive.must_end);
    core_.workers.changed(receive, Role::kReceiver);
  }
}

// Another dp group has the transfer: no failure.
void Receiver::release_leg(RxLeg& leg) {
  receives_.at(leg.receive).legs.erase(leg.pull);
  end_leg(leg, Outcome::kReleased, Reason::kReleased);
}

void Receiver::slice_in(Link& link, MsgSlice& message) {
  RxLeg* leg = live_leg(link, message.pull);
  if (leg == nullptr) return;
  Receive& receive = receives_.at(leg->receive);
  if (message.send.sender != link.boot || message.send.counter == 0) {
    core_.lanes.protocol_error(link.id);
    return;
  }
  if (leg->send.counter != message.send.counter) {
    ProofFields fields;
    fields.pull = leg->message->pull;
    fields.send = message.send;
    fields.id = leg->name.id;
    fields.instance = leg->name.instance;
    fields.incarnation = leg->name.incarnation;
    fields.sender_rank = leg->sender_rank;
    fields.receiver_rank = leg->message->receiver_rank;
    fields.sender_node = link.node;
    fields.receiver_node = core_.config.node;
    fields.cards = leg->message->cards;
    const Proof expected = sender_proof(receive.key.secret, fields);
    // A leg stays with the first send that proved itself.
    if (leg->send.counter != 0 || !same_proof(expected, message.proof)) {
      core_.dropped(leg->send.counter != 0 ? DropCause::kProtocol : DropCause::kProof);
      return;
    }
    leg->send = message.send;
    leg->expected_proof = expected;
  } else if (!same_proof(leg->expected_proof, message.proof)) {
    core_.dropped(DropCause::kProof);
    return;
  }
  if (const auto known = leg->slices.find(message.ordinal); known != leg->slices.end()) {
    core_.dropped(DropCause::kDuplicate);
    if (!flawed(Flaw::kSticky) || known->second.state != RxSlice::State::kDropped) return;
    leg->slices.erase(known);
  }
  const bool aux_misplaced =
      (message.aux && (!message.last || !leg->carries_aux || !message.with_aux)) ||
      (message.with_aux && !message.last);
  if (aux_misplaced || (message.aux && message.aux->size() > kMostAux) ||
      leg->slices.size() >= core_.config.max_slices || (message.last && leg->last) ||
      !leg->coverage.enter(message.ranges, message.layers)) {
    core_.dropped(DropCause::kProtocol);
    end_receive(receive, TransferState::kFailed, Reason::kProtocol);
    forget_if_done(receive.id);
    return;
  }
  wait_is_over(receive, *leg);
  receive.timeline.note(Step::kSlice, core_.now);
  RxSlice& slice = leg->slices[message.ordinal];
  slice.bytes = message.bytes;
  slice.digest = message.digest;
  if (message.last) {
    leg->last = message.ordinal;
    leg->with_aux = message.with_aux;
    leg->aux = std::move(message.aux);
  }
  slice.ranges = std::move(message.ranges);
  slice.layers = message.layers;
  slice.compile = CompileId{core_.next_number()};
  compiles_[slice.compile] = {leg->pull, message.ordinal};
  ++leg->compiling;
  update(*leg);  // from the queue of those that have heard nothing
  Compile compile;
  compile.compile = slice.compile;
  compile.side = Role::kReceiver;
  compile.context = leg->context;
  compile.receive = receive.op;
  compile.offer = slice.ranges;
  compile.layers = slice.layers;
  core_.emit(std::move(compile));
}

bool Receiver::compiled(Compiled& event) {
  const auto it = compiles_.find(event.compile);
  if (it == compiles_.end()) return false;
  const auto [pull, ordinal] = it->second;
  compiles_.erase(it);
  RxLeg& leg = legs_.at(pull);
  Receive& receive = receives_.at(leg.receive);
  RxSlice& slice = leg.slices.at(ordinal);
  if (slice.state != RxSlice::State::kCompiling) return true;
  Reason reason = event.reason;
  if (reason == Reason::kNone && event.plan == nullptr) reason = Reason::kInternal;
  if (reason == Reason::kNone &&
      (event.plan->bytes != slice.bytes || event.plan->digest != slice.digest))
    reason = Reason::kLayoutMismatch;
  const Link& link = *core_.lanes.find(leg.link);
  if (reason == Reason::kNone && std::min(link.chunk_bytes, slice.bytes) > leg.credit_bytes)
    reason = Reason::kLayoutMismatch;  // more than the directory said that this leg brings
  const uint64_t count = ceil_div(slice.bytes, link.chunk_bytes);
  const auto beyond = leg.refused.lower_bound({ordinal, count});
  if (reason == Reason::kNone && beyond != leg.refused.end() && beyond->first == ordinal)
    reason = Reason::kProtocol;  // a chunk was offered that the slice does not have
  if (reason != Reason::kNone) {
    const uint64_t id = receive.id;
    end_receive(receive, TransferState::kFailed, reason);
    forget_if_done(id);
    return true;
  }
  --leg.compiling;
  slice.state = RxSlice::State::kCounts;
  slice.plan = std::move(event.plan);
  receive.fragments += slice.plan->fragments;
  core_.stats.fragments_received += slice.plan->fragments;
  slice.count = count;
  slice.chunks.assign(slice.count, RxState::kNeeded);
  leg.known_bytes += slice.bytes;
  leg.known_chunks += slice.count;
  if (slice.count == 0) {
    slice.forget();
    ack(leg, {ordinal, 0});
    ++receive.record.slices;
    core_.workers.changed(receive, Role::kReceiver);
  }
  if (leg.local) slice_to_copy(receive, leg, ordinal);
  update(leg);
  decide_held(pull);
  decide_writes(pull);
  check_complete(receive.id);
  return true;
}

void Receiver::drop_in(Link& link, const MsgDrop& message) {
  RxLeg* leg = live_leg(link, message.pull);
  if (leg == nullptr) return;
  leg->any_dropped = true;
  const auto known = leg->slices.find(message.slice);
  // Whatever is dropped, the last slice known so far is dropped with it; a new one will come.
  if (known == leg->slices.end() || known->second.state != RxSlice::State::kDropped)
    leg->last.reset();
  std::erase_if(leg->refused, [&](const auto& of) { return of.first == message.slice; });
  note_needy(*leg);
  if (known == leg->slices.end()) {
    if (leg->slices.size() >= core_.config.max_slices) {
      core_.lanes.protocol_error(link.id);
      return;
    }
    leg->slices[message.slice].state = RxSlice::State::kDropped;
    decide_held(leg->pull);
    return;
  }
  RxSlice& slice = known->second;
  if (slice.state == RxSlice::State::kDropped) {
    core_.dropped(DropCause::kDuplicate);
    return;
  }
  Receive& receive = receives_.at(leg->receive);
  if (slice.state == RxSlice::State::kCompiling) {
    compiles_.erase(slice.compile);
    --leg->compiling;
  } else {
    leg->known_bytes -= slice.bytes;
    leg->known_chunks -= slice.count;
    leg->done_chunks -= slice.done;
    if (slice.all_done()) receive.record.bytes_done -= slice.bytes;
    for (uint64_t chunk = 0; chunk < slice.chunks.size(); ++chunk)
      if (slice.chunks[chunk] == RxState::kDone)
        receive.record.bytes_done -= chunk_size(link.chunk_bytes, slice.bytes, chunk);
    if (slice.all_done()) --receive.record.slices;
    core_.workers.changed(receive, Role::kReceiver);
  }
  slice.state = RxSlice::State::kDropped;
  slice.forget();
  leg->coverage.leave(slice.ranges, slice.layers);
  slice.ranges = std::vector<GroupRanges>();
  for (auto it = regions_.begin(); it != regions_.end();) {
    RxRegion& region = it->second;
    ++it;
    if (region.leg != leg->pull || region.slice != message.slice) continue;
    if (region.state == RegionState::kLanded) {
      receive.landed.erase(region.id);
      if (leg->mapped) ack(*leg, {region.slice, region.chunk});
      free_region(region.id);
    } else if (region.state == RegionState::kScattering) {
      // Goes on; nothing new is written over what it still writes.
      region.of_dropped = true;
      ++leg->dropped_scatters;
    }
  }
  leg->to_copy.erase(message.slice);
  update(*leg);
  const uint64_t pull = leg->pull;
  decide_held(pull);
  decide_writes(pull);
}

// ---- completion -------------------------------------------------------------------------------

// Every byte that this leg had to bring has been scattered.
bool Receiver::complete(const RxLeg& leg) const {
  return leg.last && leg.compiling == 0 && leg.known_bytes == leg.expected_bytes &&
         leg.done_chunks == leg.known_chunks;
}

// The last slice is in, and needed cells are missing.
bool Receiver::not_offered(const RxLeg& leg) const {
  return leg.last && leg.compiling == 0 && leg.known_bytes != leg.expected_bytes;
}

void Receiver::check_complete(uint64_t id) {
  Receive* receive = find(id);
  if (receive == nullptr || receive->terminal() || !receive->decided || receive->legs.empty())
    return;
  bool all = true;
  for (const uint64_t pull : receive->legs) {
    const RxLeg& leg = legs_.at(pull);
    // Once slices were dropped, this last one may be an older message that came by another lane,
    // and its DROP is still to come: then the sender's END tells.
    if (not_offered(leg) && !leg.any_dropped) {
      end_receive(*receive, TransferState::kFailed, Reason::kNotOffered);
      forget_if_done(id);
      return;
    }
    all = all && complete(leg);
  }
  if (!all || receive->writing() || !receive->copies.empty()) return;
  bool expects_aux = false;
  for (const uint64_t pull : receive->legs) {
    const RxLeg& leg = legs_.at(pull);
    expects_aux = expects_aux || leg.with_aux;
    if (leg.carries_aux && leg.aux)
      receive->record.aux = std::make_shared<const std::string>(*leg.aux);
  }
  // Another sender rank's Send had aux; the one whose leg carries it here gave none.
  if (expects_aux && receive->record.aux == nullptr) {
    end_receive(*receive, TransferState::kFailed, Reason::kAuxMissing);
    forget_if_done(id);
    return;
  }
  end_receive(*receive, TransferState::kCompleted, Reason::kNone);
  forget_if_done(id);
}

// ---- END --------------------------------------------------------------------------------------

// That dp group does not have the transfer, or is out of reach: dropped while another is left.
void Receiver::drop_group(Receive& receive, uint32_t group) {
  receive.groups.erase(group);
  const std::set<uint64_t> legs = receive.legs;
  for (const uint64_t pull : legs)
    if (legs_.at(pull).dp_group == group) release_leg(legs_.at(pull));
  if (receive.groups.size() != 1) return;
  receive.decided = true;
  for (const uint64_t pull : receive.legs) {
    receive.record.bytes_total += legs_.at(pull).expected_bytes;
    update(legs_.at(pull));
  }
  core_.workers.changed(receive, Role::kReceiver);
}

void Receiver::end_in(Link& link, const MsgEnd& message) {
  const auto it = legs_.find(message.pull.counter);
  if (it == legs_.end() || (it->second.link != link.id && !flawed(Flaw::kForeignLeg)) ||
      it->second.state == RxLegState::kUnsent) {
    core_.dropped(DropCause::kUnknownPull);
    return;
  }
  RxLeg& leg = it->second;
  if (leg.peer_ended) {
    core_.dropped(DropCause::kDuplicate);
    return;
  }
  leg.peer_ended = true;
  if (leg.state != RxLegState::kOpen) {    // terminal or released: both sides have ended it
    if (!leg.mapped) close_leg(leg.pull);  // else DRAINED closes it
    return;
  }
  Receive& receive = receives_.at(leg.receive);
  const uint64_t id = receive.id;
  Reason reason = message.reason == Reason::kNone ? Reason::kCancelled : message.reason;
  if (message.outcome == Outcome::kDelivered) {
    // It has all our acks, and nothing is to come any more. One that does not know what this leg
    // needs says so too where a Revoke took back what it never sent anew. Anything else contradicts
    // the acks.
    if (complete(leg)) return;
    const bool acked = not_offered(leg) && leg.done_chunks == leg.known_chunks;
    if (!acked) core_.dropped(DropCause::kProtocol);
    reason = acked ? Reason::kNotOffered : Reason::kProtocol;
  } else if (!receive.decided && reason == Reason::kNoSend && receive.groups.size() > 1) {
    drop_group(receive, leg.dp_group);
    return;
  } else if (reason == Reason::kStaleCards && !receive.first_slice &&
             receive.resolves < kMostResolves) {
    // Newer cards, new pulls.
    const std::set<uint64_t> legs = std::exchange(receive.legs, {});
    for (const uint64_t pull : legs) end_leg(legs_.at(pull), Outcome::kReleased, Reason::kReleased);
    receive.groups.clear();
    receive.decided = false;
    ask_legs(receive);
    return;
  }
  end_receive(receive, TransferState::kFailed, reason);
  forget_if_done(id);
}

void Receiver::link_dead(Link& link) {
  const std::set<uint64_t> pulls = link.own_pulls;
  for (const uint64_t pull : pulls) {
    const auto it = legs_.find(pull);
    if (it == legs_.end()) continue;
    RxLeg& leg = it->second;
    leg.peer_ended = true;  // there is nobody left to hear or say more
    if (leg.state == RxLegState::kReleased || leg.state == RxLegState::kEnded) {
      if (leg.lent == 0) close_leg(pull);  // else it waits for evidence
      continue;
    }
    Receive& receive = receives_.at(leg.receive);
    if (complete(leg)) continue;
    const uint64_t id = receive.id;
    if (!receive.decided && receive.groups.size() > 1) {
      drop_group(receive, leg.dp_group);
    } else {
      end_receive(receive, TransferState::kFailed, Reason::kPeerLost);
      forget_if_done(id);
    }
  }
}

// ---- resync -----------------------------------------------------------------------------------

void Receiver::resync(Link& link) {
  const std::set<uint64_t> pulls = link.own_pulls;
  for (const uint64_t pull : pulls) {
    RxLeg& leg = legs_.at(pull);
    if (leg.state != RxLegState::kUnsent) resync_leg(link, leg);
  }
}

void Receiver::resync_leg(Link& link, RxLeg& leg) {
  if (leg.state != RxLegState::kOpen) {
    // The PULL before it says what has ended, in case that was lost too.
    if (!leg.heard) send_pull(link, leg, {});
    answer_end(link, leg);
    return;
  }
  leg.new_credits.clear();
  leg.new_acks.clear();
  for (const auto& [credit, region] : leg.credits)
    leg.new_credits.push_back(grant_of(regions_.at(region)));
  for (const auto& [ordinal, slice] : leg.slices) {
    if (slice.state != RxSlice::State::kCounts) continue;
    if (slice.count == 0) leg.new_acks.push_back({ordinal, 0});
    for (uint64_t chunk = 0; chunk < slice.count; ++chunk)
      if (slice.chunk_state(chunk) == RxState::kDone) leg.new_acks.push_back({ordinal, chunk});
  }
  send_pull(link, leg, {});
  send_update(link, leg);
}

}  // namespace kvferry::engine
