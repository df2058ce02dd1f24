// What receivers' daemons say to the sender: PULL, END, CLAIM and DECLINE, with or without a Send
// to meet; receivers' places.
#include <algorithm>
#include <utility>

#include "daemon/base/check.h"
#include "daemon/engine/core.h"
#include "daemon/engine/proofs.h"

namespace kvferry::engine {
namespace {

constexpr Duration kMostClaim = std::chrono::seconds(60);   // one CLAIM's ttl
constexpr Duration kMostClaims = std::chrono::minutes(10);  // all its renewals

Duration from_wire_ms(uint64_t ms, Duration most) {
  const auto limit =
      static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::milliseconds>(most).count());
  return std::chrono::milliseconds(static_cast<int64_t>(std::min(ms, limit)));
}

// Whether a last slice has been announced to the leg, also one that a Revoke has dropped since.
bool last_told(const Send& send, const TxLeg& leg) {
  return std::any_of(leg.slices.begin(), leg.slices.end(), [&](const auto& of) {
    return of.second.state == TxSlice::State::kAnnounced &&
           send.sends[send.by_ordinal[of.first]].op->last;
  });
}

}  // namespace

bool Sender::proven(const Send& send, const std::string& node, const PullId& pull,
                    uint32_t receiver_rank, const Digest16& cards, const Proof& proof) const {
  ProofFields fields;
  fields.pull = pull;
  fields.id = send.name.id;
  fields.instance = send.name.instance;
  fields.incarnation = send.name.incarnation;
  fields.sender_rank = send.layout->rank;
  fields.receiver_rank = receiver_rank;
  fields.sender_node = core_.config.node;
  fields.receiver_node = node;
  fields.cards = cards;
  return same_proof(receiver_proof(send.key.secret, fields), proof);
}

// ---- PULL -------------------------------------------------------------------------------------

void Sender::pull_in(Link& link, MsgPull& message) {
  if (message.pull.receiver != link.boot || message.pull.counter == 0) {
    core_.lanes.protocol_error(link.id);
    return;
  }
  const uint64_t pull = message.pull.counter;
  forget_below(link, message.oldest);
  const auto known = link.pulls.find(pull);
  if (known != link.pulls.end()) {
    PeerPull& entry = known->second;
    core_.dropped(DropCause::kDuplicate);
    if (entry.kind == PeerPull::Kind::kEnded)
      answer_end(link, pull, entry);
    else if (entry.kind == PeerPull::Kind::kLeg)
      take_credits(link, legs_.at(entry.leg), message.credits);
    return;
  }
  if (pull < link.oldest) {
    core_.dropped(DropCause::kLate);
    return;
  }
  if (message.credits.size() > link.max_credits) {
    core_.lanes.protocol_error(link.id);
    return;
  }
  if (bad_mapped(link, message)) {
    core_.lanes.protocol_error(link.id);
    end_pull(link, pull, message.transfer, Outcome::kFailed, Reason::kProtocol);
    return;
  }
  auto kept = std::make_shared<MsgPull>(std::move(message));
  const std::vector<CreditGrant> credits = std::exchange(kept->credits, {});
  const NameAndRank name{kept->transfer, kept->sender_rank};
  // No wait of a receiver is longer than its wait and its deadline.
  const Time expires = core_.now + from_wire_ms(kept->remaining_ms, 2 * core_.config.max_deadline);
  if (Send* send = find(name)) {
    accept_pull(*send, link, std::move(kept), credits, expires);
  } else if (const auto reason =
                 core_.workers.buried(Role::kSender, sender_key(name.first, name.second))) {
    end_pull(link, pull, name.first, Outcome::kFailed, *reason);
  } else if (core_.draining) {
    end_pull(link, pull, name.first, Outcome::kFailed, Reason::kShutdown);
  } else {
    park(link, std::move(kept));
    ParkedPull& parked = *link.pulls.at(pull).parked;
    parked.credits = credits;
    parked.expires = expires;
    core_.timers.set({TimerKind::kParked, link.id.value, pull}, expires);
  }
}

void Sender::park(Link& link, std::shared_ptr<const MsgPull> pull) {
  if (link.parked.size() >= core_.config.max_parked_pulls) {  // the oldest of the link goes
    const uint64_t oldest = link.parked.begin()->second;
    const TransferName name = link.pulls.at(oldest).parked->pull->transfer;
    core_.dropped(DropCause::kLimit);
    unpark(link, oldest);
    end_pull(link, oldest, name, Outcome::kFailed, Reason::kNoSend);
  }
  const uint64_t number = pull->pull.counter;
  const uint64_t order = core_.next_number();
  parked_[{pull->transfer, pull->sender_rank}][order] = {link.id, number};
  link.parked[order] = number;
  PeerPull& entry = link.pulls[number];
  entry.kind = PeerPull::Kind::kParked;
  entry.parked = std::make_unique<ParkedPull>();
  entry.parked->pull = std::move(pull);
  entry.parked->order = order;
}

std::unique_ptr<ParkedPull> Sender::unpark(Link& link, uint64_t pull) {
  std::unique_ptr<ParkedPull> parked = std::move(link.pulls.at(pull).parked);
  KVFERRY_CHECK(parked != nullptr, "a parked pull is unparked once");
  link.pulls.erase(pull);
  link.parked.erase(parked->order);
  core_.timers.cancel({TimerKind::kParked, link.id.value, pull});
  const auto it = parked_.find({parked->pull->transfer, parked->pull->sender_rank});
  it->second.erase(parked->order);
  if (it->second.empty()) parked_.erase(it);
  return parked;
}

// A new Send or OpenSend meets what came for it before, in order of arrival.
void Sender::meet(Send& send) {
  const uint64_t id = send.id;
  const NameAndRank name{send.name, send.layout->rank};
  std::map<uint64_t, std::optional<std::pair<LinkId, uint64_t>>> arrivals;
  if (const auto it = parked_.find(name); it != parked_.end())
    for (const auto& [order, pull] : it->second) arrivals[order] = pull;
  if (const auto it = remembered_by_name_.find(name); it != remembered_by_name_.end())
    for (const uint64_t order : it->second) arrivals[order] = std::nullopt;
  for (const auto& [order, pull] : arrivals) {
    Send& current = sends_.at(id);  // its worker has just called: it is not forgotten
    if (pull) {
      Link& link = *core_.lanes.find(pull->first);
      const std::unique_ptr<ParkedPull> parked = unpark(link, pull->second);
      accept_pull(current, link, parked->pull, parked->credits, parked->expires);
      continue;
    }
    const Remembered entry = remembered_.at(order);
    forget(order);
    if (!proven(current, entry.node, entry.pull, entry.rank, entry.cards, entry.proof)) {
      core_.dropped(DropCause::kProof);
      continue;
    }
    if (entry.kind == Remembered::Kind::kClaim)
      apply_claim(current, entry);
    else if (entry.kind == Remembered::Kind::kDecline)
      apply_decline(current, entry);
    else if (!current.terminal())
      lose_place(current, entry.instance, entry.incarnation, entry.rank, entry.reason);
  }
}

void Sender::accept_pull(Send& send, Link& link, std::shared_ptr<const MsgPull> pull,
                         const std::vector<CreditGrant>& credits, Time expires) {
  const uint64_t number = pull->pull.counter;
  if (!flawed(Flaw::kTrustPull) &&
      !proven(send, link.node, pull->pull, pull->receiver_rank, pull->cards, pull->proof)) {
    core_.dropped(DropCause::kProof);
    end_pull(link, number, pull->transfer, Outcome::kFailed, Reason::kPermission);
    return;
  }
  if (send.terminal() || link.legs_out >= core_.config.max_legs) {
    const Reason reason = send.terminal() && send.record.reason != Reason::kNone
                              ? send.record.reason
                              : Reason::kRefused;
    end_pull(link, number, pull->transfer, Outcome::kFailed, reason);
    return;
  }
  TxLeg fresh;
  fresh.id = core_.next_number();
  TxLeg& leg = legs_.emplace(fresh.id, std::move(fresh)).first->second;
  leg.link = link.id;
  leg.send = send.id;
  leg.in_time = !send.lease_over;
  leg.pull = std::move(pull);
  leg.mapped = leg.pull->mapped;
  leg.turn = {send.tenant, send.worker.value, send.id, leg.id};
  leg.peer = link.peer;
  ProofFields fields;
  fields.pull = leg.pull->pull;
  fields.send = {core_.config.boot, send.id};
  fields.id = send.name.id;
  fields.instance = send.name.instance;
  fields.incarnation = send.name.incarnation;
  fields.sender_rank = send.layout->rank;
  fields.receiver_rank = leg.pull->receiver_rank;
  fields.sender_node = core_.config.node;
  fields.receiver_node = link.node;
  fields.cards = leg.pull->cards;
  leg.proof = sender_proof(send.key.secret, fields);
  send.legs.insert(leg.id);
  PeerPull& entry = link.pulls[number];
  entry.kind = PeerPull::Kind::kLeg;
  entry.leg = leg.id;
  ++link.legs_out;
  core_.timers.set({TimerKind::kLegDeadline, leg.id, 0}, expires);
  note_node(send, link);
  send.timeline.note(Step::kPulled, core_.now);
  take_credits(link, leg, credits);
  start(send);
  send.record.state = TransferState::kActive;
  core_.workers.changed(send, Role::kSender);
  leg.resolve = ResolveId{core_.next_number()};
  resolves_[leg.resolve] = leg.id;
  core_.emit(ResolvePull{leg.resolve, link.id, leg.pull, send.layout});
}

// The place of the pull's receiver; null with a reason if it has none.
Place* Sender::place_for(Send& send, const TxLeg& leg, const PullResolved& event, Reason& refusal) {
  const ReceiverKey key{leg.pull->receiver_instance, leg.pull->receiver_incarnation, true,
                        event.receiver_dp_group};
  auto it = send.places.find(key);
  if (it == send.places.end()) {
    // A DECLINE may have come before any PULL said which dp group it is.
    const auto unknown = send.places.find({key.instance, key.incarnation, false, 0});
    const bool same = unknown != send.places.end() &&
                      std::any_of(event.legs.begin(), event.legs.end(), [&](const SenderLeg& of) {
                        return unknown->second.legs.contains(of.receiver_rank);
                      });
    if (same) {
      auto node = send.places.extract(unknown);
      node.key() = key;
      it = send.places.insert(std::move(node)).position;
    }
  }
  if (it == send.places.end()) {
    // A source is released while a place is left only if packed copies serve it.
    if (!leg.in_time || send.places.size() >= send.max_receivers) {
      refusal = Reason::kRefused;
      return nullptr;
    }
    it = send.places.try_emplace(key).first;
    for (const SenderLeg& of : event.legs) it->second.legs[of.receiver_rank];
  }
  Place& place = it->second;
  refusal = place.failed ? place.reason : Reason::kRefused;
  const auto of = place.legs.find(leg.pull->receiver_rank);
  if (place.failed || of == place.legs.end() || of->second.fate != LegFate::kExpected)
    return nullptr;
  return &place;
}

void Sender::pull_resolved(PullResolved& event) {
  const auto it = resolves_.find(event.resolve);
  if (it == resolves_.end()) return;
  TxLeg& leg = legs_.at(it->second);
  resolves_.erase(it);
  leg.resolve = {};
  Send& send = sends_.at(leg.send);
  // A copy between two layouts that share pages could read what it has written. No other layout of
  // that receiver will come.
  const LayoutHandle* other =
      leg.link == kLoopedLink ? core_.receiver.layout_of(leg.pull->pull.counter) : nullptr;
  if (other != nullptr && send.layout->shares_pages(*other)) {
    const uint64_t id = send.id;
    leg_over(leg.id, LegFate::kFailed, Outcome::kFailed, Reason::kIncompatible);
    if (Send* left = find(id); left != nullptr && !left->terminal()) evaluate(*left);
    return;
  }
  Reason reason = event.reason;
  Place* place = reason == Reason::kNone ? place_for(send, leg, event, reason) : nullptr;
  if (place == nullptr) {
    const std::shared_ptr<const MsgPull> pull = leg.pull;
    Link& link = *core_.lanes.find(leg.link);
    end_leg(leg, Outcome::kFailed, reason);
    // Among too many ended ones it may be history by now.
    const auto entry = link.pulls.find(pull->pull.counter);
    if (event.reason != Reason::kNone && entry != link.pulls.end())
      entry->second.turned_away =
          std::make_unique<TurnedAway>(TurnedAway{pull->sender_rank, pull->receiver_instance,
                                                  pull->receiver_incarnation, pull->receiver_rank});
    evaluate(send);
    return;
  }
  leg.resolved = true;
  send.timeline.note(Step::kMatched, core_.now);
  leg.dp_group = event.receiver_dp_group;
  leg.context = event.context;
  Place::Leg& of = place->legs.at(leg.pull->receiver_rank);
  of.fate = LegFate::kOpen;
  of.leg = leg.id;
  for (const SenderLeg& known : event.legs)
    if (known.receiver_rank == leg.pull->receiver_rank) leg.carries_aux = known.carries_aux;
  leg.expected_bytes = event.expected_bytes;
  leg_needs(send, *place, event.needs);
  lease_timer(send);
  pump(leg);
}

// ---- END --------------------------------------------------------------------------------------

// The pull is over on this side: told to the peer, and kept so that it can be told again.
void Sender::end_pull(Link& link, uint64_t pull, const TransferName& name, Outcome outcome,
                      Reason reason) {
  const auto [it, fresh] = link.pulls.try_emplace(pull);
  PeerPull& entry = it->second;
  if (fresh || entry.kind != PeerPull::Kind::kEnded) ++link.ended_out;
  entry.kind = PeerPull::Kind::kEnded;
  entry.leg = 0;
  entry.parked.reset();
  entry.name = name;
  entry.outcome = outcome;
  entry.reason = reason;
  answer_end(link, pull, entry);
  if (link.ended_out <= core_.config.max_tombstones) return;
  // Too many: the lowest ended one becomes history, but none that still writes to the peer.
  const auto lowest = std::find_if(link.pulls.begin(), link.pulls.end(), [&](const auto& of) {
    return of.second.kind == PeerPull::Kind::kEnded &&
           !writing_.contains({link.peer, {link.boot, of.first}});
  });
  if (lowest == link.pulls.end()) return;
  link.oldest = std::max(link.oldest, lowest->first + 1);
  link.pulls.erase(lowest);
  --link.ended_out;
}

void Sender::answer_end(Link& link, uint64_t pull, const PeerPull& ended) {
  (void)core_.lanes.send_end(
      link, Role::kSender,
      MsgEnd{PullId{link.boot, pull}, ended.name, ended.outcome, ended.reason, std::nullopt});
}

// The peer has closed all its pulls below `oldest`.
void Sender::forget_below(Link& link, uint64_t oldest) {
  if (oldest <= link.oldest) return;
  link.oldest = oldest;
  for (auto it = link.pulls.begin(); it != link.pulls.end() && it->first < oldest;) {
    if (it->second.kind == PeerPull::Kind::kEnded) {
      it = link.pulls.erase(it);
      --link.ended_out;
    } else {
      ++it;
    }
  }
}

void Sender::end_in(Link& link, const MsgEnd& message) {
  if (message.pull.receiver != link.boot) {
    core_.lanes.protocol_error(link.id);
    return;
  }
  receiver_ended(link, message);
  if (message.mapped) ask_drained(link, message.pull);
}

void Sender::receiver_ended(Link& link, const MsgEnd& message) {
  const uint64_t pull = message.pull.counter;
  const auto it = link.pulls.find(pull);
  if (it == link.pulls.end()) {
    core_.dropped(DropCause::kUnknownPull);
    if (message.mapped) {  // kept, so that DRAINED is told until the peer has closed it
      end_pull(link, pull, message.transfer, message.outcome, message.reason);
      return;
    }
    if (pull < link.oldest) return;
    // Nothing was ever heard of it, so there is nothing to end; the peer may close it.
    (void)core_.lanes.send_end(
        link, Role::kSender,
        MsgEnd{message.pull, message.transfer, message.outcome, message.reason, std::nullopt});
    return;
  }
  PeerPull& entry = it->second;
  const bool released = message.outcome == Outcome::kReleased;
  const Reason reason = message.reason == Reason::kNone ? Reason::kCancelled : message.reason;
  switch (entry.kind) {
    case PeerPull::Kind::kEnded: {
      // Our END may be lost, and the peer repeats its own until it has seen ours.
      answer_end(link, pull, entry);
      const std::unique_ptr<TurnedAway> away = std::move(entry.turned_away);
      if (away == nullptr || released || message.outcome == Outcome::kCompleted) return;
      // It could have come again with newer cards, and does not.
      Send* send = find(NameAndRank{entry.name, away->sender_rank});
      if (send != nullptr && !send->terminal())
        lose_place(*send, away->instance, away->incarnation, away->rank, reason);
      return;
    }
    case PeerPull::Kind::kParked: {
      const std::unique_ptr<ParkedPull> parked = unpark(link, pull);
      if (!released && message.outcome != Outcome::kCompleted) {
        Remembered ended;
        ended.kind = Remembered::Kind::kEnded;
        ended.link = link.id;
        ended.node = link.node;
        ended.of = {parked->pull->transfer, parked->pull->sender_rank};
        ended.pull = parked->pull->pull;
        ended.instance = parked->pull->receiver_instance;
        ended.incarnation = parked->pull->receiver_incarnation;
        ended.rank = parked->pull->receiver_rank;
        ended.cards = parked->pull->cards;
        ended.proof = parked->pull->proof;
        ended.reason = reason;
        ended.until = core_.now + 2 * core_.config.default_deadline;
        remember(std::move(ended));
      }
      end_pull(link, pull, parked->pull->transfer, message.outcome, reason);
      break;
    }
    case PeerPull::Kind::kLeg:
      if (message.outcome == Outcome::kCompleted &&
          !last_told(sends_.at(legs_.at(entry.leg).send), legs_.at(entry.leg))) {
        // Nobody is complete who does not know the last slice.
        core_.dropped(DropCause::kProtocol);
        leg_over(entry.leg, LegFate::kFailed, Outcome::kFailed, Reason::kProtocol);
      } else if (message.outcome == Outcome::kCompleted) {
        ack_all(legs_.at(entry.leg));
        leg_over(entry.leg, LegFate::kDelivered, Outcome::kDelivered, Reason::kNone);
      } else if (released)
        leg_over(entry.leg, LegFate::kReleased, Outcome::kReleased, Reason::kReleased);
      else
        leg_over(entry.leg, LegFate::kFailed, Outcome::kFailed, reason);
      break;
  }
}

// ---- CLAIM and DECLINE ------------------------------------------------------------------------

void Sender::claim_in(Link& link, const MsgClaim& message) {
  Remembered claim;
  claim.kind = Remembered::Kind::kClaim;
  claim.link = link.id;
  claim.node = link.node;
  claim.of = {message.transfer, message.sender_rank};
  claim.pull = {link.boot, 0};
  claim.instance = message.receiver_instance;
  claim.incarnation = message.receiver_incarnation;
  claim.rank = message.receiver_rank;
  claim.proof = message.proof;
  claim.until = core_.now + from_wire_ms(message.ttl_ms, kMostClaim);
  if (Send* send = find(claim.of)) {
    if (proven(*send, claim.node, claim.pull, claim.rank, claim.cards, claim.proof))
      apply_claim(*send, claim);
    else
      core_.dropped(DropCause::kProof);
  } else if (!core_.workers.buried(Role::kSender, sender_key(claim.of.first, claim.of.second))) {
    remember(std::move(claim));
  }
}

void Sender::decline_in(Link& link, const MsgDecline& message) {
  Remembered decline;
  decline.kind = Remembered::Kind::kDecline;
  decline.link = link.id;
  decline.node = link.node;
  decline.of = {message.transfer, message.sender_rank};
  decline.pull = {link.boot, 0};
  decline.instance = message.receiver_instance;
  decline.incarnation = message.receiver_incarnation;
  decline.rank = message.receiver_rank;
  decline.proof = message.proof;
  decline.reason = Reason::kDeclined;
  decline.until = core_.now + 2 * core_.config.default_deadline;
  if (Send* send = find(decline.of)) {
    if (proven(*send, decline.node, decline.pull, decline.rank, decline.cards, decline.proof))
      apply_decline(*send, decline);
    else
      core_.dropped(DropCause::kProof);
  } else if (!core_.workers.buried(Role::kSender,
                                   sender_key(decline.of.first, decline.of.second))) {
    remember(std::move(decline));
  }
}

// Whether that receiver rank's leg has had its PULL.
bool Sender::pulled(const Send& send, const std::string& instance, const Incarnation& incarnation,
                    uint32_t rank) const {
  for (const uint64_t id : send.legs) {
    const MsgPull& pull = *legs_.at(id).pull;
    if (pull.receiver_rank == rank && pull.receiver_incarnation == incarnation &&
        pull.receiver_instance == instance)
      return true;
  }
  for (const auto& [key, place] : send.places) {
    if (key.instance != instance || key.incarnation != incarnation) continue;
    const auto of = place.legs.find(rank);
    if (of != place.legs.end() && of->second.fate != LegFate::kExpected) return true;
  }
  return false;
}

void Sender::apply_claim(Send& send, const Remembered& claim) {
  const bool over = pulled(send, claim.instance, claim.incarnation, claim.rank) ||
                    send.declined.contains({claim.instance, {claim.incarnation, claim.rank}});
  if (send.terminal() || (over && !flawed(Flaw::kSticky))) {
    core_.dropped(DropCause::kLate);
    return;
  }
  if (!send.claimed) {
    send.claimed = true;
    send.first_claim = core_.now;
  }
  start(send);
  if (send.lease_over) return;
  send.lease_end = std::max(send.lease_end, std::min(claim.until, send.first_claim + kMostClaims));
  lease_timer(send);
}

void Sender::apply_decline(Send& send, const Remembered& decline) {
  if (send.terminal() || pulled(send, decline.instance, decline.incarnation, decline.rank)) {
    core_.dropped(DropCause::kLate);
    return;
  }
  if (!send.declined.insert({decline.instance, {decline.incarnation, decline.rank}}).second) return;
  lose_place(send, decline.instance, decline.incarnation, decline.rank, Reason::kDeclined);
}

// A leg of that receiver ends before it began: the receiver's others end too, and if it had no
// place yet (nor a known dp group), it takes one and leaves it empty.
void Sender::lose_place(Send& send, const std::string& instance, const Incarnation& incarnation,
                        uint32_t rank, Reason reason) {
  std::optional<ReceiverKey> lost;
  for (const auto& [key, place] : send.places) {
    if (key.instance == instance && key.incarnation == incarnation &&
        (!key.group_known || place.legs.contains(rank)))
      lost = key;
  }
  if (!lost) {
    if (send.places.size() >= send.max_receivers || send.lease_over) return;
    lost = ReceiverKey{instance, incarnation, false, 0};
  }
  send.places[*lost].legs[rank].fate = LegFate::kFailed;
  lease_timer(send);
  fail_place(send, *lost, reason);
  evaluate(send);  // it may be gone now
}

// ---- what came before the Send ----------------------------------------------------------------

void Sender::remember(Remembered entry) {
  std::set<uint64_t>& same_name = remembered_by_name_[entry.of];
  for (const uint64_t id : same_name) {
    Remembered& known = remembered_.at(id);
    if (known.kind != entry.kind || known.rank != entry.rank || known.pull != entry.pull ||
        known.incarnation != entry.incarnation || known.instance != entry.instance)
      continue;
    known.until = std::max(known.until, entry.until);
    known.proof = entry.proof;
    core_.timers.set({TimerKind::kRemembered, id, 0}, known.until);
    return;
  }
  const uint64_t id = core_.next_number();
  same_name.insert(id);
  std::set<uint64_t>& same_link = remembered_by_link_[entry.link];
  same_link.insert(id);
  core_.timers.set({TimerKind::kRemembered, id, 0}, entry.until);
  const bool full = same_link.size() > core_.config.max_parked_pulls;
  const uint64_t oldest = *same_link.begin();
  remembered_.emplace(id, std::move(entry));
  if (full) {
    core_.dropped(DropCause::kLimit);
    forget(oldest);
  }
  if (remembered_.size() > core_.config.max_tombstones) forget(remembered_.begin()->first);
}

void Sender::forget(uint64_t id) {
  const auto it = remembered_.find(id);
  if (it == remembered_.end()) return;
  core_.timers.cancel({TimerKind::kRemembered, id, 0});
  const auto name = remembered_by_name_.find(it->second.of);
  name->second.erase(id);
  if (name->second.empty()) remembered_by_name_.erase(name);
  const auto link = remembered_by_link_.find(it->second.link);
  link->second.erase(id);
  if (link->second.empty()) remembered_by_link_.erase(link);
  remembered_.erase(it);
}

}  // namespace kvferry::engine
