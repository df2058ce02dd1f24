#include "tests/sim/network.h"

#include <algorithm>

#include "daemon/link/codec.h"
#include "tests/sim/hostile.h"
#include "tests/sim/node.h"
#include "tests/sim/workload.h"

namespace kvferry::sim {

using namespace engine;

namespace {

constexpr uint32_t other(uint32_t side) {
  return 1 - side;
}

// Puts the receiver's own name of the lane into an event.
void rename_lane(Event& event, const LaneRef& lane) {
  if (auto* message = std::get_if<MessageIn>(&event)) message->lane = lane;
  if (auto* refuse = std::get_if<RefuseIn>(&event)) refuse->lane = lane;
}

}  // namespace

Network::Network(World& world) : world_(world) {}

bool Network::alive(const End& end) const {
  const Node& node = *world_.nodes[end.node];
  return node.alive() && node.life() == end.life;
}

bool Network::rails_ok(const Link& link, const Wire& wire, uint32_t side) const {
  const Node& node = *world_.nodes[link.ends[side].node];
  return alive(link.ends[side]) && node.rails_up() && node.rails_life() == wire.rails[side];
}

std::optional<std::pair<uint64_t, uint32_t>> Network::find(uint32_t node, LinkId link) const {
  const auto found = by_id_.find({node, link.value});
  if (found == by_id_.end()) return std::nullopt;
  return found->second;
}

std::optional<uint32_t> Network::peer_of(uint32_t node, LinkId link) const {
  const auto found = find(node, link);
  if (!found) return std::nullopt;
  return links_.at(found->first).ends[other(found->second)].node;
}

std::optional<std::pair<uint32_t, uint64_t>> Network::peer_life_of(uint32_t node,
                                                                   LinkId link) const {
  const auto found = find(node, link);
  if (!found) return std::nullopt;
  const End& peer = links_.at(found->first).ends[other(found->second)];
  return std::pair(peer.node, peer.life);
}

bool Network::is_up(uint32_t node, LinkId link) const {
  const auto found = find(node, link);
  return found && links_.at(found->first).ends[found->second].up;
}

Network::Wire& Network::wire_of(const WireKey& key) {
  auto [at, fresh] = wires_.try_emplace(key);
  if (fresh) at->second.rails = links_.at(std::get<0>(key)).rails;
  return at->second;
}

LaneRef Network::lane_at(const WireKey& key, uint32_t side) const {
  return {links_.at(std::get<0>(key)).ends[side].id, std::get<1>(key), std::get<2>(key)};
}

Duration Network::latency() {
  const Duration usual = world_.rng.micros(10, 300);
  return world_.mishap(world_.scenario.faults.slow_message) ? usual * 100 : usual;
}

Duration Network::data_latency(const WireKey& key) {
  const Link& link = links_.at(std::get<0>(key));
  const Duration most = std::chrono::milliseconds(50);  // well within what a landing may take
  return std::min(most, latency() * world_.scenario.slowness(link.ends[0].node, link.ends[1].node,
                                                             std::get<1>(key), world_.now()));
}

void Network::post(const End& end, Event event) {
  if (alive(end)) world_.nodes[end.node]->post(std::move(event));
}

bool Network::partitioned(uint32_t a, uint32_t b) const {
  const auto found = partitions_.find(std::minmax(a, b));
  return found != partitions_.end() && world_.now() < found->second;
}

// ---- links -------------------------------------------------------------------------------------

bool Network::link_up(uint32_t from, uint32_t to) const {
  for (const auto& [index, link] : links_)
    for (uint32_t side = 0; side < 2; ++side)
      if (link.ends[side].node == from && link.ends[side].up && alive(link.ends[side]) &&
          link.ends[other(side)].node == to && alive(link.ends[other(side)]))
        return true;
  return false;
}

void Network::dial(uint32_t from, uint32_t to) {
  if (!dialling_.insert({from, to}).second) return;
  world_.after(world_.rng.micros(200, 3000), [this, from, to] {
    dialling_.erase({from, to});
    handshake(from, to);
  });
}

void Network::handshake(uint32_t from, uint32_t to) {
  const Node& caller = *world_.nodes[from];
  const Node& callee = *world_.nodes[to];
  if (!caller.alive() || !callee.alive() || !caller.rails_up() || !callee.rails_up()) return;
  if (partitioned(from, to)) return;
  if (to < from && dialling_.contains({to, from})) return;  // both dial: the smaller one's stays
  for (const auto& [index, link] : links_)
    for (uint32_t side = 0; side < 2; ++side)
      if (link.ends[side].node == from && link.ends[other(side)].node == to &&
          alive(link.ends[0]) && alive(link.ends[1])) {
        const bool pending = !link.ends[0].told || !link.ends[1].told;
        if (pending || link.ends[0].up || link.ends[1].up) return;  // ALREADY_LINKED
      }
  establish(from, to);
}

void Network::establish(uint32_t from, uint32_t to) {
  // A link to an earlier life of the peer ends now.
  for (auto& [index, link] : links_)
    for (uint32_t side = 0; side < 2; ++side) {
      const uint32_t node = link.ends[side].node;
      const uint32_t peer = link.ends[other(side)].node;
      const bool same_pair = (node == from && peer == to) || (node == to && peer == from);
      if (same_pair && link.ends[side].up) end_link(index, side);
    }
  const uint64_t index = next_link_++;
  Link& link = links_[index];
  const std::array<uint32_t, 2> nodes = {from, to};
  link.initiator = 0;
  for (uint32_t side = 0; side < 2; ++side) {
    Node& node = *world_.nodes[nodes[side]];
    link.ends[side] = {nodes[side], node.life(), node.new_link_id(), false, false};
    link.rails[side] = node.rails_life();
    by_id_[{nodes[side], link.ends[side].id.value}] = {index, side};
  }
  world_.note("link " + std::to_string(index) + " between node" + std::to_string(from) +
              " and node" + std::to_string(to));
  // The one that was called knows first.
  for (uint32_t side = 2; side-- > 0;) {
    const Duration delay = side == 1 ? Duration{0} : world_.rng.micros(50, 800);
    world_.after(delay, [this, index, side] {
      Link& now = links_.at(index);
      End& end = now.ends[side];
      if (!alive(end)) return;
      end.up = end.told = true;
      const Node& peer = *world_.nodes[now.ends[other(side)].node];
      LinkUp up;
      up.link = end.id;
      up.node = peer.name();
      up.boot = peer.boot();
      if (now.ends[other(side)].life != peer.life()) return;  // it has died meanwhile
      up.initiator = side == now.initiator;
      up.lanes = world_.scenario.lanes;
      up.chunk_bytes = world_.scenario.chunk_bytes;
      up.max_credits = world_.scenario.max_credits;
      up.check = world_.scenario.check;
      post(end, up);
      map_arenas(index, side);
    });
  }
}

// What the peer lends is mapped some time after the handshake, if at all.
void Network::map_arenas(uint64_t index, uint32_t side) {
  const Link& link = links_.at(index);
  const uint32_t node = link.ends[side].node;
  const uint32_t peer = link.ends[other(side)].node;
  if (!world_.scenario.maps(node, peer)) return;
  Rng own(world_.scenario.seed ^ mix(0x3A9E00 + 2 * index + side));
  const std::vector<ArenaConfig>& arenas = world_.scenario.arenas[peer];
  for (uint32_t arena = 0; arena < arenas.size(); ++arena) {
    if (!arenas[arena].mapped || own.chance(100)) continue;
    world_.after(own.micros(0, own.chance(700) ? 500 : 50000), [this, index, side, arena] {
      const Link& now = links_.at(index);
      const End& owner = now.ends[other(side)];
      if (!now.ends[side].up || !owner.up || !alive(owner)) return;
      post(owner, ArenaLent{owner.id, arena});
      post(now.ends[side], ArenaMapped{now.ends[side].id, arena});
    });
  }
}

// After a link's end what was mapped for it goes with its last gather, and the peer on the same
// host is told when it has ended the link too. Not always: other evidence has its turn.
void Network::unmap_arenas(uint64_t index, uint32_t side) {
  const Link& link = links_.at(index);
  const End& writer = link.ends[side];
  const End& owner = link.ends[other(side)];
  if (!world_.scenario.maps(writer.node, owner.node) ||
      !world_.scenario.one_host(writer.node, owner.node))
    return;
  const uint64_t draw = mix(world_.scenario.seed ^ mix(0x3A9D00 + 2 * index + side));
  if (draw % 2 == 0) return;
  const Duration pause = std::chrono::microseconds(50 + draw / 2 % 20000);
  world_.after(pause, [this, index, side] { tell_unmapped(index, side); });
}

void Network::tell_unmapped(uint64_t index, uint32_t side) {
  const Link& link = links_.at(index);
  const End& writer = link.ends[side];
  const End& owner = link.ends[other(side)];
  if (!alive(writer) || !alive(owner) || !owner.told) return;
  if (owner.up || world_.nodes[writer.node]->writes_over(writer.id)) {
    world_.after(std::chrono::milliseconds(2), [this, index, side] { tell_unmapped(index, side); });
    return;
  }
  ++world_.totals.unmapped;
  post(owner, PeerUnmapped{owner.id});
}

void Network::end_link(uint64_t index, uint32_t side) {
  End& end = links_.at(index).ends[side];
  if (!end.up) return;
  end.up = false;
  unmap_arenas(index, side);
  world_.workload->link_lost(end.node, links_.at(index).ends[other(side)].node);
  if (world_.hostile) world_.hostile->link_lost(end.node, links_.at(index).ends[other(side)].node);
  post(end, LinkEnded{end.id, Reason::kPeerLost});
}

void Network::close_link(uint32_t node, LinkId id) {
  const auto found = find(node, id);
  require(found.has_value(), "link", "CloseLink of a link that never was");
  const auto [index, side] = *found;
  Link& link = links_.at(index);
  if (!link.ends[side].up) return;
  link.ends[side].up = false;
  unmap_arenas(index, side);
  world_.note("node" + std::to_string(node) + " closes link " + std::to_string(index));
  world_.workload->link_lost(node, link.ends[other(side)].node);
  if (world_.hostile) world_.hostile->link_lost(node, link.ends[other(side)].node);
  for (auto& [key, wire] : wires_)
    if (std::get<0>(key) == index) break_wire(key);
  // The other side may hear of it by gRPC; else it notices the silence.
  if (world_.rng.chance(500))
    world_.after(latency(), [this, index = index, far = other(side)] { end_link(index, far); });
}

// ---- lanes -------------------------------------------------------------------------------------

void Network::connect_lane(uint32_t node, const LaneRef& lane) {
  const auto found = find(node, lane.link);
  require(found.has_value(), "lane", "ConnectLane on a link that never was");
  const auto [index, side] = *found;
  const WireKey key{index, lane.lane, lane.epoch};
  Wire& wire = wire_of(key);
  require(!wire.connecting[side], "lane", "ConnectLane twice for one lane and epoch");
  wire.connecting[side] = true;
  world_.after(world_.rng.micros(50, 1500), [this, key, side = side] {
    Wire& now = wire_of(key);
    const Link& link = links_.at(std::get<0>(key));
    const End& end = link.ends[side];
    if (!alive(end) || now.closed[side] || now.failed[side]) return;
    if (!rails_ok(link, now, side)) {
      now.failed[side] = true;
      post(end, LaneFailed{lane_at(key, side)});
      return;
    }
    if (!rails_ok(link, now, other(side))) now.broken = true;
    // An endpoint is made without the peer's help: a dead one shows later, or by silence.
    now.connected[side] = true;
    post(end, LaneConnected{lane_at(key, side)});
    if (now.broken && world_.rng.chance(600)) learn(key, side, world_.rng.micros(100, 5000));
  });
}

void Network::reopen_lane(uint32_t node, const LaneRef& lane) {
  const auto found = find(node, lane.link);
  require(found.has_value(), "lane", "ReopenLane on a link that never was");
  const auto [index, side] = *found;
  require(links_.at(index).initiator == side, "lane", "ReopenLane by the side that did not dial");
  const WireKey key{index, lane.lane, lane.epoch};
  require(!wires_.contains(key), "lane", "ReopenLane with an epoch that has been used");
  world_.after(world_.rng.micros(100, 2000), [this, key, side = side] {
    const Link& link = links_.at(std::get<0>(key));
    const End& near = link.ends[side];
    const End& far = link.ends[other(side)];
    const Node& here = *world_.nodes[near.node];
    const Node& there = *world_.nodes[far.node];
    const bool answered = alive(near) && near.up && alive(far) && far.up && here.rails_up() &&
                          there.rails_up() && !partitioned(near.node, far.node) &&
                          !world_.mishap(100);
    if (!answered) {
      post(near, LaneReopenFailed{lane_at(key, side)});
      return;
    }
    Wire& wire = wires_[key];
    wire.rails[side] = here.rails_life();
    wire.rails[other(side)] = there.rails_life();
    post(far, LaneReopened{lane_at(key, other(side))});
    const bool lost = world_.mishap(50);  // the answer, so that one side only has the new epoch
    world_.after(world_.rng.micros(50, 1000), [this, key, side, lost] {
      const End& end = links_.at(std::get<0>(key)).ends[side];
      if (lost)
        post(end, LaneReopenFailed{lane_at(key, side)});
      else
        post(end, LaneReopened{lane_at(key, side)});
    });
  });
}

void Network::close_lane(uint32_t node, const LaneRef& lane) {
  const auto found = find(node, lane.link);
  require(found.has_value(), "lane", "CloseLane on a link that never was");
  const auto [index, side] = *found;
  const WireKey key{index, lane.lane, lane.epoch};
  Wire& wire = wire_of(key);
  if (wire.closed[side]) return;
  wire.closed[side] = true;
  wire.broken = true;
  end_requests(key, side, 30000);
  if (!wire.failed[other(side)] && world_.rng.chance(700))
    learn(key, other(side), world_.rng.micros(50, 5000));
}

void Network::tell_lane_down(uint32_t node, const LaneRef& lane) {
  const auto found = find(node, lane.link);
  require(found.has_value(), "lane", "TellLaneDown on a link that never was");
  const auto [index, side] = *found;
  const Link& link = links_.at(index);
  if (partitioned(node, link.ends[other(side)].node) || world_.mishap(100)) return;
  world_.after(world_.rng.micros(100, 2000),
               [this, key = WireKey{index, lane.lane, lane.epoch}, far = other(side)] {
                 const End& end = links_.at(std::get<0>(key)).ends[far];
                 if (end.up) post(end, PeerLaneDown{lane_at(key, far)});
               });
}

void Network::break_wire(const WireKey& key) {
  Wire& wire = wire_of(key);
  if (wire.broken) return;
  wire.broken = true;
  for (uint32_t side = 0; side < 2; ++side)
    if (!world_.rng.chance(world_.scenario.faults.silent))
      learn(key, side, world_.rng.micros(0, 20000));
}

void Network::learn(const WireKey& key, uint32_t side, Duration delay) {
  world_.after(delay, [this, key, side] {
    Wire& wire = wire_of(key);
    const Link& link = links_.at(std::get<0>(key));
    if (wire.failed[side] || wire.closed[side] || !rails_ok(link, wire, side)) return;
    wire.failed[side] = true;
    end_requests(key, side, 3000);
    world_.after(world_.rng.micros(0, 2000), [this, key, side] {
      const Wire& now = wire_of(key);
      const Link& there = links_.at(std::get<0>(key));
      if (!now.closed[side] && rails_ok(there, now, side))
        post(there.ends[side], LaneFailed{lane_at(key, side)});
    });
  });
}

void Network::end_requests(const WireKey& key, uint32_t side, uint64_t most_us) {
  for (const uint64_t id : wire_of(key).flights) {
    const Flight& flight = flights_.at(id);
    if (flight.side == side && flight.sending)
      world_.after(world_.rng.micros(0, most_us), [this, id] { end_send(id); });
    if (flight.side != side && flight.landing_open)
      world_.after(world_.rng.micros(0, most_us), [this, id] { end_landing(id, false); });
  }
}

// ---- messages ----------------------------------------------------------------------------------

bool Network::loses(const WireKey& key, uint32_t to_side, bool survives) {
  Wire& wire = wire_of(key);
  const Link& link = links_.at(std::get<0>(key));
  if (!rails_ok(link, wire, to_side)) return true;
  // What the rails have read before the close still comes up.
  if (wire.closed[to_side]) return !world_.rng.chance(200);
  return wire.broken && !survives;
}

void Network::carry(const WireKey& key, uint32_t from_side, Duration delay, Event event) {
  carry(key, from_side, delay, std::move(event),
        !world_.rng.chance(world_.scenario.faults.lost_in_break));
}

void Network::carry(const WireKey& key, uint32_t from_side, Duration delay, Event event,
                    bool survives) {
  ++links_.at(std::get<0>(key)).on_the_way;
  world_.after(delay, [this, key, from_side, survives, event = std::move(event)]() mutable {
    const uint32_t to = other(from_side);
    Link& link = links_.at(std::get<0>(key));
    const End& end = link.ends[to];
    --link.on_the_way;
    if (loses(key, to, survives)) return;
    if (!end.told) {  // the handshake's answer is still on its way to that daemon
      carry(key, from_side, std::chrono::microseconds(200), std::move(event), survives);
      return;
    }
    rename_lane(event, lane_at(key, to));
    post(end, std::move(event));
  });
}

// A SLICE is held up on its lane; its sender alone sees the lane break, and its worker takes the
// slice back. So what is said over the next lane (that the slice is dropped, and that the first
// lane is down) comes before the SLICE, and the second of these may come after it.
bool Network::ambush(const WireKey& key, uint32_t side, const SendMessage& command) {
  if (world_.scenario.faults.ambush == 0) return false;
  if (std::holds_alternative<MsgLaneDown>(command.message)) {
    if (!world_.mishap(700)) return false;
    carry(key, side, world_.rng.micros(3000, 30000),
          MessageIn{command.lane, command.sequence, command.message}, true);
    return true;
  }
  if (!std::holds_alternative<MsgSlice>(command.message) || ambushes_left_ == 0 ||
      !world_.mishap(world_.scenario.faults.ambush))
    return false;
  --ambushes_left_;
  world_.note("ambush: " + describe(command.message));
  carry(key, side, world_.rng.micros(4000, 25000),
        MessageIn{command.lane, command.sequence, command.message}, true);
  world_.workload->revoke_all(links_.at(std::get<0>(key)).ends[side].node);
  wire_of(key).broken = true;
  learn(key, side, world_.rng.micros(500, 3000));
  return true;
}

void Network::send_message(uint32_t node, const SendMessage& command) {
  const auto found = find(node, command.lane.link);
  require(found.has_value(), "lane", "SendMessage on a link that never was");
  const auto [index, side] = *found;
  const WireKey key{index, command.lane.lane, command.lane.epoch};
  Wire& wire = wire_of(key);
  require(wire.connected[side] || wire.closed[side] || wire.failed[side], "lane",
          "SendMessage on a lane without an endpoint");
  // One that cannot be encoded would take its lane down, again and again.
  std::vector<uint8_t> body;
  const Status encoded = link::encode_body(command.message, body);
  if (!encoded)
    throw Violation("message", describe(command.message) + ": " + encoded.error().to_string());
  if (world_.hostile) world_.hostile->overhear(command.message);
  if (wire.closed[side]) return;
  if (wire.failed[side] || !rails_ok(links_.at(index), wire, side)) return;  // told already
  if (world_.mishap(world_.scenario.faults.vanish)) {
    world_.note("vanishes: " + describe(command.message));
    wire.vanished = true;
    if (world_.rng.chance(300)) {  // the send was refused
      wire.broken = true;
      learn(key, side, Duration{0});
    }
    return;
  }
  if (ambush(key, side, command)) return;
  if (world_.mishap(world_.scenario.faults.duplicate))
    carry(key, side, latency(), MessageIn{command.lane, command.sequence, command.message});
  carry(key, side, latency(), MessageIn{command.lane, command.sequence, command.message});
}

void Network::send_refuse(uint32_t node, const SendRefuse& command) {
  const auto found = find(node, command.lane.link);
  require(found.has_value(), "lane", "SendRefuse on a link that never was");
  const auto [index, side] = *found;
  const WireKey key{index, command.lane.lane, command.lane.epoch};
  const Wire& wire = wire_of(key);
  if (wire.closed[side] || wire.failed[side] || !rails_ok(links_.at(index), wire, side)) return;
  carry(key, side, latency(), RefuseIn{command.lane, command.message});
}

// ---- offers ------------------------------------------------------------------------------------

void Network::send_offer(uint32_t node, const SendOffer& command) {
  const auto found = find(node, command.lane.link);
  require(found.has_value(), "lane", "SendOffer on a link that never was");
  const auto [index, side] = *found;
  const WireKey key{index, command.lane.lane, command.lane.epoch};
  Wire& wire = wire_of(key);
  require(wire.connected[side] || wire.closed[side] || wire.failed[side], "lane",
          "SendOffer on a lane without an endpoint");
  require(command.offer.bytes <= command.region.bytes && command.offer.bytes > 0, "region",
          "an offer of more bytes than its staging region has");
  const Link& ends = links_.at(index);
  const uint32_t slowness = world_.scenario.slowness(ends.ends[0].node, ends.ends[1].node,
                                                     command.lane.lane, world_.now());
  if (slowness >= 10) ++world_.totals.offers_on_slow_lanes;
  const uint64_t id = next_flight_++;
  Flight& flight = flights_[id];
  flight.wire = key;
  flight.side = side;
  flight.offer = command.offer;
  flight.staging = command.region;
  if (!rails_ok(links_.at(index), wire, side)) {  // the rails process is gone; its engine will hear
    flight.sending = false;
    return;
  }
  memory::Region read = command.region;
  read.bytes = command.offer.bytes;
  flight.staging_use = world_.nodes[node]->begin_use(Use::kSend, read, "SendOffer");
  wire.flights.insert(id);
  if (wire.closed[side] || wire.failed[side]) {
    world_.after(world_.rng.micros(0, 2000), [this, id] { end_send(id); });
    return;
  }
  const bool survives = !world_.rng.chance(world_.scenario.faults.lost_in_break);
  world_.after(latency(), [this, id, survives] { arrive(id, survives); });
}

void Network::arrive(uint64_t id, bool survives) {
  Flight& flight = flights_.at(id);
  const uint32_t to = other(flight.side);
  const End& end = links_.at(std::get<0>(flight.wire)).ends[to];
  if (!flight.sending || loses(flight.wire, to, survives)) return;
  if (!end.told) {
    world_.after(std::chrono::microseconds(200), [this, id, survives] { arrive(id, survives); });
    return;
  }
  if (!end.up) {  // no key for this link any more: dropped without a word
    world_.after(latency(), [this, id] { end_send(id); });
    return;
  }
  flight.descriptor = {next_descriptor_++};
  descriptors_[flight.descriptor] = id;
  post(end, OfferIn{lane_at(flight.wire, to), flight.offer, flight.descriptor, flight.offer.bytes});
}

void Network::accept_offer(uint32_t node, const AcceptOffer& command) {
  if (gone_descriptors_.contains(command.descriptor)) return;
  const auto held = descriptors_.find(command.descriptor);
  require(held != descriptors_.end(), "descriptor", "AcceptOffer of a descriptor that is not held");
  const uint64_t id = held->second;
  descriptors_.erase(held);
  Flight& flight = flights_.at(id);
  const uint32_t side = other(flight.side);
  require(links_.at(std::get<0>(flight.wire)).ends[side].node == node &&
              lane_at(flight.wire, side) == command.lane,
          "descriptor", "AcceptOffer on another lane than the offer's");
  require(command.bytes == flight.offer.bytes && command.bytes <= command.region.bytes, "region",
          "AcceptOffer with other bytes than the offer's, or more than the region has");
  flight.accepted = flight.landing_open = true;
  flight.landing = command.landing;
  flight.region = command.region;
  flight.region_use = world_.nodes[node]->begin_use(Use::kReceive, command.region, "AcceptOffer");
  const Wire& wire = wire_of(flight.wire);
  if (wire.closed[side] || wire.failed[side])
    world_.after(world_.rng.micros(0, 3000), [this, id] { end_landing(id, false); });
  const uint64_t count = std::min<uint64_t>(world_.rng.between(1, 3), command.bytes);
  flight.pieces.resize(count);
  for (std::size_t i = 0; i < count; ++i) {
    flight.pieces[i].begin = command.bytes * i / count;
    flight.pieces[i].bytes.resize(command.bytes * (i + 1) / count - flight.pieces[i].begin);
    const bool survives = !world_.rng.chance(world_.scenario.faults.lost_in_break);
    world_.after(data_latency(flight.wire),
                 [this, id, i, survives] { move_piece(id, i, survives); });
  }
  if (world_.mishap(world_.scenario.faults.break_landing))
    world_.after(world_.rng.micros(0, 500), [this, key = flight.wire] { break_wire(key); });
}

void Network::drop_offer(uint32_t node, const DropOffer& command) {
  if (gone_descriptors_.contains(command.descriptor)) return;
  const auto held = descriptors_.find(command.descriptor);
  require(held != descriptors_.end(), "descriptor", "DropOffer of a descriptor that is not held");
  const uint64_t id = held->second;
  descriptors_.erase(held);
  const Flight& flight = flights_.at(id);
  require(links_.at(std::get<0>(flight.wire)).ends[other(flight.side)].node == node, "descriptor",
          "DropOffer of another node's descriptor");
  if (!wire_of(flight.wire).broken) world_.after(latency(), [this, id] { end_send(id); });
}

void Network::move_piece(uint64_t id, std::size_t index, bool survives) {
  Flight& flight = flights_.at(id);
  if (!flight.sending || !flight.landing_open) return;
  if (wire_of(flight.wire).broken && !survives) return;
  Data& piece = flight.pieces[index];
  const End& from = links_.at(std::get<0>(flight.wire)).ends[flight.side];
  const uint8_t* source =
      world_.nodes[from.node]->arena(flight.staging, piece.begin, piece.bytes.size());
  std::copy(source, source + piece.bytes.size(), piece.bytes.begin());
  piece.read = true;
  if (world_.scenario.check != CheckKind::kNone &&
      world_.mishap(world_.scenario.faults.corruption)) {
    piece.bytes[0] = static_cast<uint8_t>(piece.bytes[0] ^ 0x40);
    world_.workload->data_corrupted();
    world_.note("a piece of offer " + std::to_string(flight.offer.offer.value) + " is corrupted");
  }
  const Duration delay =
      data_latency(flight.wire) + (wire_of(flight.wire).broken ? lateness() : Duration{0});
  world_.after(delay, [this, id, index, survives] { write_piece(id, index, survives); });
  const bool all =
      std::all_of(flight.pieces.begin(), flight.pieces.end(), [](const Data& d) { return d.read; });
  if (all) world_.after(latency(), [this, id] { end_send(id); });
}

void Network::write_piece(uint64_t id, std::size_t index, bool survives) {
  Flight& flight = flights_.at(id);
  if (!flight.landing_open || (wire_of(flight.wire).broken && !survives)) return;
  Data& piece = flight.pieces[index];
  if (wire_of(flight.wire).broken && !piece.late) {
    piece.late = true;
    world_.after(lateness(), [this, id, index, survives] { write_piece(id, index, survives); });
    return;
  }
  const End& to = links_.at(std::get<0>(flight.wire)).ends[other(flight.side)];
  uint8_t* target = world_.nodes[to.node]->arena(flight.region, piece.begin, piece.bytes.size());
  std::copy(piece.bytes.begin(), piece.bytes.end(), target);
  piece.written = true;
  const bool all = std::all_of(flight.pieces.begin(), flight.pieces.end(),
                               [](const Data& d) { return d.written; });
  if (all) world_.after(world_.rng.micros(0, 100), [this, id] { end_landing(id, true); });
}

void Network::end_send(uint64_t id) {
  Flight& flight = flights_.at(id);
  if (!flight.sending) return;
  flight.sending = false;
  const End& end = links_.at(std::get<0>(flight.wire)).ends[flight.side];
  if (!alive(end)) return;
  world_.nodes[end.node]->end_use(flight.staging_use);
  post(end, OfferSendEnded{flight.offer.offer});
}

void Network::end_landing(uint64_t id, bool ok) {
  Flight& flight = flights_.at(id);
  if (!flight.landing_open) return;
  flight.landing_open = false;
  const End& end = links_.at(std::get<0>(flight.wire)).ends[other(flight.side)];
  if (!alive(end)) return;
  world_.nodes[end.node]->end_use(flight.region_use);
  post(end, ReceiveEnded{flight.landing, ok});
}

// ---- deaths ------------------------------------------------------------------------------------

void Network::lose_requests(const WireKey& key, uint32_t side) {
  const End& end = links_.at(std::get<0>(key)).ends[side];
  Node& node = *world_.nodes[end.node];
  for (const uint64_t id : wire_of(key).flights) {
    Flight& flight = flights_.at(id);
    if (flight.side == side && flight.sending) {
      flight.sending = false;
      node.end_use(flight.staging_use);
    }
    if (flight.side != side && flight.landing_open) {
      flight.landing_open = false;
      node.end_use(flight.region_use);
    }
    if (flight.side != side && descriptors_.erase(flight.descriptor) != 0)
      gone_descriptors_.insert(flight.descriptor);
  }
}

void Network::rails_gone(uint32_t node) {
  for (auto& [key, wire] : wires_) {
    const Link& link = links_.at(std::get<0>(key));
    for (uint32_t side = 0; side < 2; ++side)
      if (link.ends[side].node == node && rails_ok(link, wire, side)) {
        lose_requests(key, side);
        break_wire(key);
      }
  }
}

void Network::node_died(uint32_t node) {
  rails_gone(node);
  for (auto& [index, link] : links_)
    for (End& end : link.ends)
      if (end.node == node) end.up = false;
}

void Network::rails_died(uint32_t node) {
  rails_gone(node);
}

void Network::break_some_wire(Rng& rng) {
  std::vector<WireKey> whole;
  for (const auto& [key, wire] : wires_) {
    const Link& link = links_.at(std::get<0>(key));
    if (!wire.broken && rails_ok(link, wire, 0) && rails_ok(link, wire, 1)) whole.push_back(key);
  }
  if (whole.empty()) return;
  const WireKey key = whole[rng.below(whole.size())];
  world_.note("wire breaks: link " + std::to_string(std::get<0>(key)) + " lane " +
              std::to_string(std::get<1>(key)) + "." + std::to_string(std::get<2>(key)));
  break_wire(key);
}

void Network::partition(uint32_t a, uint32_t b, Duration length) {
  partitions_[std::minmax(a, b)] = world_.now() + length;
  for (auto& [key, wire] : wires_) {
    const Link& link = links_.at(std::get<0>(key));
    if (std::minmax(link.ends[0].node, link.ends[1].node) == std::minmax(a, b)) break_wire(key);
  }
}

bool Network::quiet(uint64_t index, const Link& link) const {
  if (link.on_the_way != 0) return false;
  for (const End& end : link.ends)
    if (!end.up || !alive(end) || !world_.nodes[end.node]->idle()) return false;
  // Of a wire on which something may have been lost both sides must know, or nobody has told it
  // again yet.
  for (auto it = wires_.lower_bound({index, 0, 0});
       it != wires_.end() && std::get<0>(it->first) == index; ++it) {
    const Wire& wire = it->second;
    if (!wire.broken && !wire.vanished) continue;
    for (uint32_t side = 0; side < 2; ++side)
      if (!wire.closed[side] && rails_ok(link, wire, side)) return false;
  }
  return true;
}

uint64_t Network::check_credits() const {
  uint64_t known = 0;
  for (const auto& [index, link] : links_) {
    if (!quiet(index, link)) continue;
    for (uint32_t side = 0; side < 2; ++side) {
      const Node& receiver = *world_.nodes[link.ends[side].node];
      const Node& sender = *world_.nodes[link.ends[other(side)].node];
      for (const LiveCredit& credit : receiver.engine().live_credits()) {
        if (credit.link != link.ends[side].id) continue;
        if (!sender.engine().knows(link.ends[other(side)].id, credit.pull, credit.credit))
          throw Violation("credits", "credit " + std::to_string(credit.credit.value) + " of pull " +
                                         std::to_string(credit.pull.counter) + " is LIVE on " +
                                         receiver.name() + ", and " + sender.name() +
                                         " does not know it");
        ++known;
      }
    }
  }
  return known;
}

void Network::check_idle(uint32_t node) const {
  for (const auto& [id, flight] : flights_) {
    const Link& link = links_.at(std::get<0>(flight.wire));
    const End& from = link.ends[flight.side];
    const End& to = link.ends[other(flight.side)];
    if (from.node == node && alive(from) && flight.sending)
      throw Violation("leak", "offer " + std::to_string(flight.offer.offer.value) + " of node" +
                                  std::to_string(node) + " is still being sent");
    if (to.node == node && alive(to) && flight.landing_open)
      throw Violation("leak", "landing " + std::to_string(flight.landing.value) + " of node" +
                                  std::to_string(node) + " has not ended");
    if (to.node == node && alive(to) && descriptors_.contains(flight.descriptor))
      throw Violation("leak", "descriptor " + std::to_string(flight.descriptor.value) + " of node" +
                                  std::to_string(node) + " is still held");
  }
}

}  // namespace kvferry::sim
