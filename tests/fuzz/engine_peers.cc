// What two peers say. Half of it fits what the engine has said to them, so that transfers get on;
// the rest is wrong in some number, out of order, or of nothing that there is.
#include "tests/fuzz/engine_world.h"

namespace kvferry::fuzz {

using namespace engine;
using std::chrono::milliseconds;

void EngineWorld::say(Peer& peer, ControlMessage message) {
  // What no codec lets through never comes.
  std::vector<uint8_t> body;
  if (!link::encode_body(message, body)) return;
  const LaneRef lane = some_lane(peer);
  const uint32_t number = std::min(lane.lane, kLanes - 1);
  const uint8_t order = in_.byte();
  uint64_t sequence = peer.next[number];
  if (order < 240)
    ++peer.next[number];
  else
    sequence += order % 8 - 3;  // again, or with a gap
  post(MessageIn{lane, sequence, std::move(message)});
}

LaneRef EngineWorld::some_lane(Peer& peer) {
  const uint8_t kind = in_.byte();
  LaneRef lane{peer.link, kind % kLanes, peer.epoch[kind % kLanes]};
  if (kind >= 250) lane.epoch += kind & 1;
  if (kind >= 254) lane.lane = kind;
  return lane;
}

PullId EngineWorld::some_pull(Peer& peer) {
  const uint8_t kind = in_.byte();
  // The engine's own, the peer's own, anybody's.
  if (kind < 120 && !peer.pulls.empty()) return peer.pulls[kind % peer.pulls.size()].pull;
  if (kind < 245) return {peer.boot, 1 + kind % std::max<uint64_t>(peer.next_pull, 2)};
  return {boot_of(kind), kind};
}

MsgPull EngineWorld::make_pull(Peer& peer) {
  MsgPull pull;
  const TransferKey key = some_key();
  pull.pull = {peer.boot, in_.below(4) == 1 ? 1 + in_.below(4) : peer.next_pull++};
  pull.transfer = wire_name(key, incarnation_of(1));
  pull.receiver_rank = in_.below(3);
  pull.receiver_instance = "default/decode";
  pull.receiver_incarnation = incarnation_of(in_.below(8) == 1 ? 9 : 2);
  pull.needs = {{0, 0, 64, {{0, 64}}}};
  pull.remaining_ms = in_.number<uint16_t>();
  pull.oldest = in_.below(4) == 1 ? in_.below(8) : 1;
  if (in_.below(8) == 1) pull.mapped = in_.below(2);
  if (!pull.mapped || in_.below(8) == 1)
    for (uint32_t n = in_.below(4); n > 0; --n)
      pull.credits.push_back({{in_.below(8) == 1 ? 1 : next_credit_++}, kChunk >> in_.below(2)});
  ProofFields fields;
  fields.pull = pull.pull;
  fields.id = pull.transfer.id;
  fields.instance = pull.transfer.instance;
  fields.incarnation = pull.transfer.incarnation;
  fields.receiver_rank = pull.receiver_rank;
  fields.sender_node = "node1";
  fields.receiver_node = peer.node;
  pull.proof = receiver_proof(key.secret, fields);
  if (in_.below(32) == 1) pull.proof.bytes[0] ^= 1;
  return pull;
}

MsgUpdate EngineWorld::make_update(Peer& peer) {
  MsgUpdate update;
  update.pull = some_pull(peer);
  for (uint32_t n = in_.below(4); n > 0; --n) {
    CreditGrant credit{{in_.below(8) == 1 ? 1 : next_credit_++}, kChunk, {}};
    if (in_.below(4) == 1) credit.place = RegionPlace{in_.below(3), 64u * in_.below(4)};
    update.credits.push_back(credit);
  }
  for (uint32_t n = in_.below(4); n > 0; --n) {
    if (!peer.offers.empty() && in_.chance()) {
      const MsgOffer& offer = peer.offers[in_.byte() % peer.offers.size()].offer;
      update.pull = offer.pull;
      update.acks.push_back({offer.slice, offer.chunk});
    } else {
      update.acks.push_back({in_.below(3), in_.below(4)});
    }
  }
  update.oldest = in_.below(4) == 1 ? in_.below(8) : 1;
  return update;
}

MsgSlice EngineWorld::make_slice(Peer& peer) {
  MsgSlice slice;
  slice.pull = some_pull(peer);
  slice.send = {peer.boot, 5u + in_.below(8) / 7};
  slice.ordinal = in_.below(4);
  slice.last = in_.chance();
  const std::vector<Range> ranges = some_ranges();
  slice.ranges = {{0, ranges}};
  if (in_.below(8) == 1) slice.ranges.clear();
  for (const GroupRanges& group : slice.ranges)
    for (const Range& range : group.ranges) slice.bytes += range.size() * kTokenBytes;
  if (in_.below(16) == 1) slice.bytes = in_.size();
  slice.digest = 42 + in_.below(32) / 31;
  if (in_.below(8) == 1) slice.layers = Range{0, 1u + in_.below(3)};
  slice.with_aux = slice.last && in_.chance();
  if (slice.with_aux && in_.chance()) slice.aux = "aux";
  for (const MsgPull& pull : peer.pulls) {
    if (pull.pull != slice.pull) continue;
    ProofFields fields;
    fields.pull = slice.pull;
    fields.send = slice.send;
    fields.id = pull.transfer.id;
    fields.instance = pull.transfer.instance;
    fields.incarnation = pull.transfer.incarnation;
    fields.sender_rank = pull.sender_rank;
    fields.receiver_rank = pull.receiver_rank;
    fields.sender_node = peer.node;
    fields.receiver_node = "node1";
    fields.cards = pull.cards;
    Secret secret;
    secret.bytes.fill(7);
    slice.proof = sender_proof(secret, fields);
  }
  if (in_.below(32) == 1) slice.proof.bytes[0] ^= 1;
  return slice;
}

ControlMessage EngineWorld::some_message(Peer& peer) {
  const uint8_t kind = in_.byte();
  switch (kind % 20) {
    case 0:
    case 1:
    case 2:
      return make_pull(peer);
    case 3:
    case 4:
    case 5:
      return make_update(peer);
    case 6:
    case 7:
    case 8:
    case 9:
      return make_slice(peer);
    case 10:
      return MsgHello{in_.chance()};
    case 11:
      return MsgPing{};
    case 12:
      return MsgLaneDown{in_.below(3), in_.below(3)};
    case 13:
    case 14: {
      MsgEnd end;
      end.pull = some_pull(peer);
      end.transfer = wire_name(some_key(), incarnation_of(1));
      end.outcome = static_cast<Outcome>(in_.below(5));
      end.reason = static_cast<Reason>(in_.below(kReasonCount));
      end.mapped = in_.below(8) == 1;
      if (in_.below(4) == 1) end.proof = Proof{};
      return end;
    }
    case 15: {
      MsgDrop drop{some_pull(peer), in_.below(4)};
      return drop;
    }
    case 16: {
      const TransferKey key = some_key();
      ProofFields fields;
      fields.pull = {peer.boot, 0};
      fields.id = key.id;
      fields.instance = key.instance;
      fields.incarnation = key.incarnation;
      fields.sender_node = "node1";
      fields.receiver_node = peer.node;
      const Proof proof = receiver_proof(key.secret, fields);
      const TransferName name = wire_name(key, incarnation_of(1));
      if (in_.chance())
        return MsgClaim{name, proof, "default/decode",      incarnation_of(2),
                        0,    0,     in_.number<uint16_t>()};
      return MsgDecline{name, proof, "default/decode", incarnation_of(2), 0, 0};
    }
    case 17:
      return MsgMapped{kMappedArena + in_.below(8) / 7};
    case 18: {
      MsgWritten written{some_pull(peer), in_.below(3), in_.below(4), {in_.size()}, {}};
      if (!peer.credits.empty()) {
        const auto& credit = peer.credits[in_.byte() % peer.credits.size()];
        written.pull = credit.first;
        written.credit = credit.second.credit;
      }
      return written;
    }
    default:
      return MsgDrained{some_pull(peer)};
  }
}

// A chunk's data comes: what is announced, what the header says and what was granted may all
// differ.
void EngineWorld::offer(Peer& peer) {
  if (!rails_up_) return;
  MsgOffer offer;
  offer.pull = some_pull(peer);
  offer.credit = {in_.size()};
  if (!peer.credits.empty() && in_.below(8) != 1) {
    const auto& credit = peer.credits[in_.byte() % peer.credits.size()];
    offer.pull = credit.first;
    offer.credit = credit.second.credit;
  }
  offer.send = {peer.boot, 5u + in_.below(16) / 15};
  offer.slice = in_.below(3);
  offer.chunk = in_.below(11);
  offer.offer = {in_.below(8) == 1 ? 1 : next_credit_++};
  offer.bytes = in_.below(8) == 1 ? in_.size() : kChunk;
  std::vector<uint8_t> body;
  if (!link::encode_body(offer, body)) return;
  const uint64_t announced = in_.below(16) == 1 ? in_.size() : offer.bytes;
  const DescriptorId descriptor{next_descriptor_++};
  held_.insert(descriptor);
  post(OfferIn{some_lane(peer), offer, descriptor, announced});
}

void EngineWorld::peer_says() {
  Peer& peer = peers_[in_.below(2)];
  switch (in_.below(8)) {
    case 0:
    case 1:
    case 2:
      return offer(peer);
    case 3: {
      MsgRefuse refuse{some_pull(peer), {in_.byte()}};
      if (!peer.offers.empty()) {
        const MsgOffer& of = peer.offers[in_.byte() % peer.offers.size()].offer;
        refuse = {of.pull, of.offer};
      }
      return post(RefuseIn{some_lane(peer), refuse});
    }
    default:
      return say(peer, some_message(peer));
  }
}

// A link with lanes that carry messages.
void EngineWorld::bring_up(Peer& peer) {
  peer.link = {next_link_++};
  peer.up = peer.ever_up = true;
  peer.next = {};
  peer.epoch = {};
  post(LinkUp{peer.link, peer.node, peer.boot, peer.initiator, kLanes, kChunk, 64,
              CheckKind::kNone});
  for (std::size_t i = 0; i < open_.size();) {
    const auto* connect = std::get_if<ConnectLane>(&open_[i]);
    if (connect != nullptr && connect->lane.link == peer.link)
      answer(i, true);
    else
      ++i;
  }
  for (uint32_t lane = 0; lane < kLanes; ++lane)
    for (const bool answered : {false, true}) {
      if (!peer.up || !rails_up_) return;
      post(MessageIn{{peer.link, lane, peer.epoch[lane]}, peer.next[lane]++, MsgHello{answered}});
    }
}

void EngineWorld::link_changes() {
  Peer& peer = peers_[in_.below(2)];
  const uint8_t kind = in_.byte();
  switch (kind % 12) {
    case 0:
      if (peer.up) {
        peer.up = false;
        post(LinkEnded{peer.link, Reason::kPeerLost});
      }
      return;
    case 1:
    case 2:
      if (peer.up) return;
      // Another life, sometimes; what the old one heard it may still say.
      if (kind >= 128) {
        peer.boot.bytes[1] = static_cast<uint8_t>((peer.boot.bytes[1] + 1) % 8);
        peer.next_pull = 1;
      }
      return bring_up(peer);
    case 3:
      return post(LaneFailed{some_lane(peer)});
    case 4:
      return post(PeerLaneDown{some_lane(peer)});
    case 5: {
      // The peer's call: whichever lane and epoch it names.
      if (peer.initiator) return;
      const LaneRef lane{peer.link, in_.below(3), in_.below(4)};
      return post(LaneReopened{lane});
    }
    case 6:
      if (rails_up_) return rails_die();
      rails_up_ = true;
      return post(RailsUp{});
    case 7:
      return post(ArenaMapped{peer.link, in_.below(2)});
    case 8:
      return post(ArenaLent{peer.link, kMappedArena});
    case 9: {
      ReleaseQuarantine release;
      release.call = kind;
      release.node = in_.chance() ? peer.node : "";
      if (in_.chance()) release.boot = peer.boot;
      return post(std::move(release));
    }
    case 10:
      if (!peer.up) return post(PeerUnmapped{peer.link});
      return;
    default:
      if (kind < 128) return;
      peer.up = false;
      post(PeerProcessGone{peer.boot, peer.node});
      // A process that has ended is not met again.
      peer.boot.bytes[1] = static_cast<uint8_t>((peer.boot.bytes[1] + 1) % 8);
      peer.next_pull = 1;
  }
}

}  // namespace kvferry::fuzz
