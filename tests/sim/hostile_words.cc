// What the enemy says. Half of it fits what it has heard, so that its transfers get on; the rest is
// wrong in some number, out of order, again, of others' transfers, or of nothing that there is.
#include <algorithm>

#include "daemon/engine/proofs.h"
#include "daemon/link/codec.h"
#include "tests/sim/hostile.h"
#include "tests/sim/node.h"
#include "tests/sim/workload.h"

namespace kvferry::sim {

using namespace engine;

namespace {

constexpr uint64_t kSend = 7;  // of all that it sends
// Its own words are kept to be said again.
constexpr std::size_t kMostSaid = 128;

ProofFields fields_of(const PullId& pull, const TransferName& name) {
  ProofFields fields;
  fields.pull = pull;
  fields.id = name.id;
  fields.instance = name.instance;
  fields.incarnation = name.incarnation;
  return fields;
}

}  // namespace

LaneRef Hostile::some_lane(const Link& link) {
  const auto lane =
      rng_.chance(800)
          ? 0
          : static_cast<uint32_t>(rng_.below(link.lanes.size() + (rng_.chance(20) ? 1 : 0)));
  const uint32_t epoch = lane < link.lanes.size() ? link.lanes[lane].epoch : 0;
  return {link.id, lane, epoch + (rng_.chance(10) ? 1 : 0)};
}

PullId Hostile::some_pull(Link& link) {
  const uint64_t roll = rng_.below(100);
  if (roll < 35 && !link.pulls.empty()) return link.pulls[rng_.below(link.pulls.size())].pull;
  if (roll < 65) return {link.boot, 1 + rng_.below(link.next_pull)};
  if (roll < 92)
    for (int tries = 0; tries < 16 && !overheard_.empty(); ++tries) {
      const ControlMessage& of = overheard_[rng_.below(overheard_.size())];
      if (const auto* pull = std::get_if<MsgPull>(&of)) return pull->pull;
      if (const auto* update = std::get_if<MsgUpdate>(&of)) return update->pull;
      if (const auto* slice = std::get_if<MsgSlice>(&of)) return slice->pull;
    }
  const Node& of =
      rng_.chance(700) ? *world_.nodes[link.node] : *world_.nodes[rng_.below(world_.nodes.size())];
  return {of.boot(), rng_.below(40)};
}

void Hostile::say(Link& link, ControlMessage message) {
  std::vector<uint8_t> body;
  if (!link::encode_body(message, body)) return;  // nobody would read it
  const LaneRef lane = some_lane(link);
  if (lane.lane >= link.lanes.size()) return post(link, MessageIn{lane, 0, std::move(message)});
  Lane& of = link.lanes[lane.lane];
  if (of.closed) return;
  uint64_t sequence = of.next;
  if (rng_.chance(985))
    ++of.next;
  else
    sequence += rng_.below(8) - 3;  // again, or behind a gap
  ++world_.totals.hostile_messages;
  // A region that it gives back by its own word, also one that it has not been told of yet, it does
  // not write any more.
  if (const auto* written = std::get_if<MsgWritten>(&message))
    given_back_.insert({written->pull, written->credit});
  if (const auto* drained = std::get_if<MsgDrained>(&message))
    given_back_.insert({drained->pull, CreditId{}});
  std::erase_if(lent_, [&](const Lent& lent) { return gave_back(lent.pull, lent.credit); });
  if (const auto* pull = std::get_if<MsgPull>(&message)) {
    if (pull->pull.receiver == link.boot)
      link.asked[pull->pull.counter] |= world_.workload->with_enemy(pull->transfer.id);
    if (pull->mapped) link.mapped_pulls.insert(pull->pull);
  } else if (const auto* update = std::get_if<MsgUpdate>(&message)) {
    for (const CreditGrant& credit : update->credits)
      if (credit.place) link.places.emplace_back(update->pull, credit);
  }
  said_.push_back(message);
  if (said_.size() > kMostSaid) said_.pop_front();
  post(link, MessageIn{lane, sequence, std::move(message)});
}

// ---- messages ----------------------------------------------------------------------------------

MsgPull Hostile::make_pull(Link& link) {
  std::vector<const EnemyTask*> tasks;
  for (const EnemyTask& task : world_.workload->enemy_tasks())
    if (task.sender != nullptr && task.sender->node == link.node) tasks.push_back(&task);
  MsgPull pull;
  pull.pull = {link.boot, rng_.chance(50) ? 1 + rng_.below(4) : link.next_pull++};
  pull.receiver_instance = world_.workload->enemy_instance().name;
  pull.receiver_incarnation = world_.workload->enemy_instance().incarnation;
  pull.remaining_ms = rng_.between(1, 60000);
  pull.oldest = rng_.chance(50) ? rng_.below(8) : 1;
  for (uint64_t i = rng_.below(5); i > 0; --i)
    pull.credits.push_back({{++next_number_}, link.chunk_bytes, {}});
  if (tasks.empty()) {  // of a transfer that it has made up
    pull.transfer.instance = "default/i0";
    pull.transfer.id = "guess" + std::to_string(rng_.below(4));
    return pull;
  }
  const EnemyTask& task = *tasks[rng_.below(tasks.size())];
  pull.transfer = wire_name(task.key, task.key.incarnation);
  pull.sender_rank = task.sender->rank;
  pull.cards = cards_of(task.key.incarnation, pull.receiver_incarnation);
  const uint64_t end = round_up(task.tokens, kTokensPerBlock);
  for (uint32_t g = 0; g < world_.scenario.groups; ++g)
    pull.needs.push_back({g, 0, task.tokens, {{0, end}}});
  if (!link.lends.empty() && rng_.chance(600)) {
    pull.mapped = rng_.chance(900) ? *link.lends.begin() : rng_.pick(0, 1);
    pull.credits.clear();
  }
  if (rng_.chance(150)) spoil(pull);
  ProofFields fields = fields_of(pull.pull, pull.transfer);
  fields.sender_rank = pull.sender_rank;
  fields.receiver_rank = pull.receiver_rank;
  fields.sender_node = world_.nodes[link.node]->name();
  fields.receiver_node = kName;
  fields.cards = pull.cards;
  pull.proof = receiver_proof(task.key.secret, fields);
  if (rng_.chance(30)) pull.proof.bytes[0] ^= 1;
  return pull;
}

void Hostile::spoil(MsgPull& pull) {
  switch (rng_.below(8)) {
    case 7:
      pull.pull.receiver = world_.nodes[rng_.below(world_.nodes.size())]->boot();
      break;
    case 0:
      pull.mapped = rng_.pick(0, 3);
      break;
    case 1:
      pull.needs = {{rng_.pick(0, 3), 0, 8, {{rng_.below(16), 16 + rng_.below(64)}}}};
      break;
    case 2:
      pull.receiver_rank = rng_.pick(0, 4);
      break;
    case 3:
      pull.needs.clear();
      break;
    case 4:
      for (CreditGrant& credit : pull.credits) credit.bytes = rng_.below(1024);
      break;
    case 5:
      if (!pull.credits.empty()) pull.credits.push_back(pull.credits.front());
      break;
    default:
      pull.cards.bytes[0] ^= 1;
  }
}

MsgUpdate Hostile::make_update(Link& link) {
  MsgUpdate update;
  update.pull = some_pull(link);
  if (!link.offers.empty() && rng_.chance(500)) {
    const MsgOffer& offer = link.offers[rng_.below(link.offers.size())];
    update.pull = offer.pull;
    update.acks.push_back({offer.slice, offer.chunk});
  }
  for (uint64_t i = rng_.below(4); i > 0; --i)
    update.acks.push_back({rng_.below(4), rng_.below(6)});
  for (uint64_t i = rng_.below(4); i > 0; --i) {
    CreditGrant credit{
        {rng_.chance(100) ? 1 : ++next_number_}, rng_.below(2 * link.chunk_bytes), {}};
    if (rng_.chance(100)) credit.place = RegionPlace{rng_.pick(0, 3), 64 * rng_.below(4)};
    update.credits.push_back(credit);
  }
  if (!link.mapped_pulls.empty() && rng_.chance(400)) {
    update.pull = *std::next(link.mapped_pulls.begin(),
                             static_cast<int64_t>(rng_.below(link.mapped_pulls.size())));
    update.credits.clear();
    fill(link, update, rng_.below(4));
  }
  update.oldest = rng_.chance(100) ? rng_.below(8) : 1;
  return update;
}

// A slice as an honest sender of that transfer would announce it: all that is needed, the last.
std::optional<MsgSlice> Hostile::make_slice(Link& link, const MsgPull& pull) {
  const std::optional<EnemyTask> task = world_.workload->enemy_task(pull.transfer.id);
  if (!task) return std::nullopt;
  MsgSlice slice;
  slice.pull = pull.pull;
  slice.send = {link.boot, kSend};
  slice.ordinal = link.slices[pull.pull]++;
  slice.last = slice.ordinal > 0 || rng_.chance(700);
  uint64_t bytes = 0;
  for (const GroupNeed& need : pull.needs) slice.ranges.push_back({need.group, need.ranges});
  std::tie(bytes, slice.digest) = world_.workload->enemy_stream(pull, slice.ranges);
  slice.bytes = bytes;
  if (rng_.chance(200)) spoil(slice);
  ProofFields fields = fields_of(pull.pull, pull.transfer);
  fields.send = slice.send;
  fields.sender_rank = pull.sender_rank;
  fields.receiver_rank = pull.receiver_rank;
  fields.sender_node = kName;
  fields.receiver_node = world_.nodes[link.node]->name();
  fields.cards = pull.cards;
  slice.proof = sender_proof(task->key.secret, fields);
  if (rng_.chance(30)) slice.proof.bytes[0] ^= 1;
  return slice;
}

void Hostile::spoil(MsgSlice& slice) {
  switch (rng_.below(9)) {
    case 8:
      slice.send.sender = world_.nodes[rng_.below(world_.nodes.size())]->boot();
      break;
    case 0:
      slice.bytes = rng_.below(1 << 14);
      break;
    case 1:
      slice.digest ^= 1;
      break;
    case 2:
      slice.ordinal = rng_.below(6);
      break;
    case 3:
      slice.ranges = {{rng_.pick(0, 3), {{rng_.below(8), 8 + rng_.below(64)}}}};
      break;
    case 4:
      slice.layers = Range{0, rng_.between(1, 6)};
      break;
    case 5:
      slice.send.counter += 1;
      break;
    case 6:
      slice.with_aux = true;
      slice.aux = "aux of the enemy";
      break;
    default:
      slice.last = !slice.last;
  }
}

MsgEnd Hostile::make_end(Link& link) {
  MsgEnd end;
  end.pull = some_pull(link);
  end.transfer.instance = "default/i0";
  end.transfer.id = "t" + std::to_string(rng_.between(1, 16));
  end.outcome = static_cast<Outcome>(rng_.below(5));
  end.reason = static_cast<Reason>(rng_.below(kReasonCount));
  end.mapped = rng_.chance(200) || link.mapped_pulls.contains(end.pull);
  if (rng_.chance(200)) end.proof = Proof{};
  return end;
}

MsgWritten Hostile::make_written(Link& link) {
  MsgWritten written{some_pull(link), rng_.below(3), rng_.below(6), {rng_.below(32)}, {}};
  if (!lent_.empty() && rng_.chance(700)) {
    const Lent& lent = lent_[rng_.below(lent_.size())];
    written.pull = lent.pull;
    written.credit = lent.credit;
  }
  written.check.kind = world_.scenario.check;
  return written;
}

ControlMessage Hostile::some_message(Link& link) {
  if (rng_.chance(120) && !overheard_.empty()) {
    ControlMessage message = overheard_[rng_.below(overheard_.size())];
    auto* pull = std::get_if<MsgPull>(&message);
    // Another's, under a number of its own.
    if (pull != nullptr && rng_.chance(700)) pull->pull = {link.boot, link.next_pull++};
    return message;
  }
  if (rng_.chance(60) && !said_.empty()) return said_[rng_.below(said_.size())];
  switch (rng_.below(16)) {
    case 0:
    case 1:
    case 2:
      return make_pull(link);
    case 3:
    case 4:
    case 5:
      return make_update(link);
    case 6:
    case 7:
      if (!link.pulls.empty())
        if (const auto slice = make_slice(link, link.pulls[rng_.below(link.pulls.size())]))
          return *slice;
      return make_end(link);
    case 8:
      return make_end(link);
    case 9:
      return MsgDrop{some_pull(link), rng_.below(4)};
    case 10:
      return MsgLaneDown{rng_.pick(0, 3), rng_.pick(0, 3)};
    case 11: {
      const MsgPull of = make_pull(link);
      if (rng_.chance(500))
        return MsgClaim{
            of.transfer,    of.proof,         of.receiver_instance, of.receiver_incarnation,
            of.sender_rank, of.receiver_rank, rng_.below(90000)};
      return MsgDecline{of.transfer,          of.proof,
                        of.receiver_instance, of.receiver_incarnation,
                        of.sender_rank,       of.receiver_rank};
    }
    case 12:
      return MsgMapped{rng_.pick(0, 5)};
    case 13:
      return make_written(link);
    case 14:
      return MsgDrained{some_pull(link)};
    default:
      return MsgHello{rng_.chance(500)};
  }
}

// ---- offers ------------------------------------------------------------------------------------

void Hostile::offer(Link& link, MsgOffer offer, uint64_t announced) {
  std::vector<uint8_t> body;
  if (!link::encode_body(offer, body)) return;
  const LaneRef lane = some_lane(link);
  if (lane.lane < link.lanes.size() && link.lanes[lane.lane].closed) return;
  const DescriptorId descriptor{next_descriptor_++};
  held_[descriptor] = {link.node, link.id, offer.pull, announced};
  ++world_.totals.hostile_offers;
  post(link, OfferIn{lane, offer, descriptor, announced});
}

// By a credit that it was given: the next chunk, or (`wild`) anything.
void Hostile::offer(Link& link, bool wild) {
  MsgOffer of;
  of.pull = some_pull(link);
  of.send = {link.boot, kSend};
  of.credit = {rng_.below(16)};
  of.bytes = link.chunk_bytes;
  if (!link.credits.empty()) {
    const auto& [pull, credit] = link.credits[rng_.below(link.credits.size())];
    of.pull = pull;
    of.credit = credit.credit;
    of.bytes = std::min(credit.bytes, link.chunk_bytes);
  }
  of.chunk = link.chunks[of.pull]++;
  of.offer = {++next_number_};
  of.check.kind = world_.scenario.check;
  uint64_t announced = of.bytes;
  if (wild) {
    of.slice = rng_.below(3);
    of.chunk = rng_.below(12);
    if (rng_.chance(200)) of.bytes = rng_.below(2 * link.chunk_bytes);
    if (rng_.chance(200)) announced = rng_.below(2 * link.chunk_bytes);
    if (rng_.chance(100)) of.send.counter += 1;
    if (rng_.chance(50)) of.send.sender = world_.nodes[rng_.below(world_.nodes.size())]->boot();
    if (rng_.chance(100)) of.check.kind = CheckKind::kGmac;
    if (rng_.chance(100)) of.credit.value += rng_.below(64);
  } else if (link.pulls.size() == 1) {
    // The last chunk is what is left.
    const auto [bytes, digest] = world_.workload->enemy_stream(link.pulls[0], {});
    static_cast<void>(digest);
    if (bytes > of.chunk * link.chunk_bytes)
      announced = of.bytes = std::min(link.chunk_bytes, bytes - of.chunk * link.chunk_bytes);
  }
  offer(link, of, announced);
}

// Gets one of its own transfers on.
void Hostile::be_polite(Link& link) {
  switch (rng_.below(4)) {
    case 0: {
      const MsgPull pull = make_pull(link);
      if (world_.workload->with_enemy(pull.transfer.id)) say(link, pull);
      return;
    }
    case 1: {
      if (link.offers.empty()) return;
      const MsgOffer& of = link.offers[rng_.below(link.offers.size())];
      MsgUpdate update;
      update.pull = of.pull;
      update.acks.push_back({of.slice, of.chunk});
      update.oldest = 1;
      return say(link, update);
    }
    case 2:
      if (!link.credits.empty()) offer(link, false);
      return;
    default:
      say(link, MsgPing{});
  }
}

void Hostile::speak(Link& link) {
  if (rng_.chance(world_.scenario.hostile.manners)) return be_polite(link);
  const uint64_t roll = rng_.below(10);
  if (roll < 3) return offer(link, rng_.chance(500));
  if (roll == 3) {
    MsgRefuse refuse{some_pull(link), {rng_.below(64)}};
    if (!link.offers.empty() && rng_.chance(700)) {
      const MsgOffer& of = link.offers[rng_.below(link.offers.size())];
      refuse = {of.pull, of.offer};
    }
    return post(link, RefuseIn{some_lane(link), refuse});
  }
  say(link, some_message(link));
}

// As a daemon would, most times.
void Hostile::answer(Link& link, const ControlMessage& message) {
  if (std::holds_alternative<MsgHello>(message)) {
    const std::vector<ArenaConfig>& arenas = world_.scenario.arenas[link.node];
    for (uint32_t arena = 0; arena < arenas.size(); ++arena)
      if (arenas[arena].mapped) say(link, MsgMapped{arena});
    return;
  }
  if (std::holds_alternative<MsgMapped>(message)) {
    for (int i = 0; i < 3; ++i) say(link, make_pull(link));
    return;
  }
  if (const auto* pull = std::get_if<MsgPull>(&message)) {
    if (const auto slice = make_slice(link, *pull)) say(link, *slice);
    return;
  }
  if (const auto* update = std::get_if<MsgUpdate>(&message)) {
    for (std::size_t i = update->credits.size(); i > 0; --i) offer(link, false);
    return;
  }
  if (const auto* slice = std::get_if<MsgSlice>(&message)) {
    MsgUpdate update;
    update.pull = slice->pull;
    fill(link, update, 4);
    return say(link, update);
  }
  if (const auto* written = std::get_if<MsgWritten>(&message)) {
    MsgUpdate update;
    update.pull = written->pull;
    update.acks.push_back({written->slice, written->chunk});
    fill(link, update, 1);
    return say(link, update);
  }
  if (const auto* end = std::get_if<MsgEnd>(&message)) {
    if (!end->mapped || rng_.chance(700)) return say(link, make_end(link));
    return say(link, MsgDrained{end->pull});
  }
}

// Hundreds of one kind.
void Hostile::flood(Link& link) {
  const uint64_t count = rng_.between(50, 400);
  const uint64_t kind = rng_.below(6);
  const auto& credits = link.credits;
  for (uint64_t i = 0; i < count && whole(link); ++i) {
    switch (kind) {
      case 0: {  // pulls of what nobody will send
        MsgPull pull = make_pull(link);
        pull.transfer.id = "none" + std::to_string(i);
        say(link, pull);
        break;
      }
      case 1: {  // claims and declines, too
        MsgPull pull = make_pull(link);
        pull.transfer.id = "none" + std::to_string(i);
        if (i % 2 == 0)
          say(link, MsgClaim{pull.transfer, pull.proof, pull.receiver_instance,
                             pull.receiver_incarnation, 0, 0, 60000});
        else
          say(link, MsgDecline{pull.transfer, pull.proof, pull.receiver_instance,
                               pull.receiver_incarnation, 0, 0});
        break;
      }
      case 2:  // pulls that are in order
        say(link, make_pull(link));
        break;
      case 3: {  // behind a gap
        Lane& lane = link.lanes[0];
        if (lane.closed) return;
        post(link, MessageIn{{link.id, 0, lane.epoch}, lane.next + 1 + i, make_update(link)});
        break;
      }
      case 4: {  // offers of a slice that is not known, by one credit that is
        if (credits.empty()) return;
        MsgOffer of;
        of.pull = credits.back().first;
        of.send = {link.boot, kSend};
        of.slice = 40;
        of.chunk = i;
        of.credit = credits.back().second.credit;
        of.offer = {++next_number_};
        of.bytes = link.chunk_bytes;
        of.check.kind = world_.scenario.check;
        offer(link, of, of.bytes);
        break;
      }
      default:
        say(link, make_end(link));
    }
  }
}

}  // namespace kvferry::sim
