#include "tests/sim/hostile.h"

#include <algorithm>

#include "tests/sim/network.h"
#include "tests/sim/node.h"
#include "tests/sim/workload.h"

namespace kvferry::sim {

using namespace engine;
using std::chrono::microseconds;
using std::chrono::milliseconds;

namespace {

constexpr std::size_t kMostOverheard = 512;

BootId boot_of(uint8_t life) {
  BootId boot;
  boot.bytes[0] = 0xEE;
  boot.bytes[1] = life;
  boot.bytes[15] = 0xB0;
  return boot;
}

}  // namespace

Hostile::Hostile(World& world)
    : world_(world), rng_(mix(world.scenario.seed ^ 0x40570)), boot_(boot_of(1)) {
  boots_.insert(boot_);
}

void Hostile::plan() {
  const auto until = static_cast<uint64_t>(world_.scenario.faults.until.count());
  for (uint32_t i = 0; i < world_.scenario.hostile.acts; ++i)
    world_.after(Duration(static_cast<int64_t>(rng_.below(until))), [this] { act(); });
  beat();
  world_.after(world_.scenario.faults.until, [this] { leave(); });
}

// Says on its links that it is there, most times.
void Hostile::beat() {
  if (gone_) return;
  for (auto& [key, link] : links_)
    if (whole(link) && rng_.chance(850)) say(link, MsgPing{});
  world_.after(milliseconds(90), [this] { beat(); });
}

void Hostile::leave() {
  gone_ = true;
  world_.note("the enemy is silent");
  lent_.clear();
  // Where an operator has to vouch for that, he does (World::look_after_lent).
  for (uint32_t n = 0; n < world_.nodes.size(); ++n)
    if (world_.scenario.one_host(index(), n))
      for (const BootId& boot : boots_) world_.nodes[n]->post(PeerProcessGone{boot, kName});
  for (const auto& [key, request] : std::map(sends_))
    if (rng_.chance(500)) end_send(key.second, key.first);
}

// ---- links -------------------------------------------------------------------------------------

bool Hostile::alive(uint32_t node, uint64_t life) const {
  return world_.nodes[node]->alive() && world_.nodes[node]->life() == life;
}

bool Hostile::whole(const Link& link) const {
  return link.up && alive(link.node, link.life) && world_.nodes[link.node]->rails_up();
}

bool Hostile::link_up(uint32_t node) const {
  return std::any_of(links_.begin(), links_.end(), [&](const auto& of) {
    return of.first.first == node && of.second.up && alive(node, of.second.life);
  });
}

void Hostile::post(const Link& link, Event event) {
  if (alive(link.node, link.life)) world_.nodes[link.node]->post(std::move(event));
}

void Hostile::dial(uint32_t node) {
  if (gone_) return;
  world_.after(rng_.micros(200, 3000), [this, node] {
    if (!gone_ && !link_up(node)) establish(node, true);
  });
}

// Its own, or that of any daemon, also of the one that it speaks to.
BootId Hostile::choose_boot() {
  if (!rng_.chance(300)) return boot_;
  ++world_.totals.hostile_boots;
  return world_.nodes[rng_.below(world_.nodes.size())]->boot();
}

// It takes the place of one of them with the other, by its boot id.
void Hostile::link_lost(uint32_t a, uint32_t b) {
  if (gone_ || !rng_.chance(600)) return;
  world_.after(rng_.micros(100, 3000), [this, a, boot = world_.nodes[b]->boot()] {
    if (gone_) return;
    ++world_.totals.hostile_boots;
    establish(a, rng_.chance(300), boot);
  });
}

void Hostile::establish(uint32_t node, bool dialled) {
  establish(node, dialled, choose_boot());
}

void Hostile::establish(uint32_t node, bool dialled, const BootId& boot) {
  Node& there = *world_.nodes[node];
  if (!there.alive() || !there.rails_up()) return;
  for (auto& [key, link] : links_)
    if (link.node == node && link.up) end_link(link);
  Link link;
  link.node = node;
  link.life = there.life();
  link.id = there.new_link_id();
  link.boot = boot;
  boots_.insert(boot);
  link.dialled = dialled;
  link.lanes.resize(1 + rng_.below(3));
  link.chunk_bytes =
      rng_.chance(300) ? world_.scenario.chunk_bytes / 2 : world_.scenario.chunk_bytes;
  ++world_.totals.hostile_links;
  LinkUp up;
  up.link = link.id;
  up.node = kName;
  up.boot = boot;
  up.initiator = dialled;
  up.lanes = static_cast<uint32_t>(link.lanes.size());
  up.chunk_bytes = link.chunk_bytes;
  up.max_credits = rng_.chance(300) ? 1 + rng_.pick(0, 3) : world_.scenario.max_credits;
  up.check = world_.scenario.check;
  post(link, up);
  const std::vector<ArenaConfig>& arenas = world_.scenario.arenas[node];
  for (uint32_t arena = 0; arena < arenas.size(); ++arena)
    if (arenas[arena].mapped && rng_.chance(600)) post(link, ArenaLent{link.id, arena});
  if (rng_.chance(700)) lend(link);
  links_[{node, link.id.value}] = std::move(link);
}

void Hostile::end_link(Link& link) {
  if (!link.up) return;
  link.up = false;
  post(link, LinkEnded{link.id, Reason::kPeerLost});
}

// It goes, comes back, is another life, has lanes that fail.
void Hostile::change_link() {
  const auto node = static_cast<uint32_t>(rng_.below(world_.nodes.size()));
  std::vector<Link*> mine;
  for (auto& [key, link] : links_)
    if (link.node == node && whole(link)) mine.push_back(&link);
  if (mine.empty()) return establish(node, rng_.chance(300));
  Link& link = *mine.back();
  const auto lane = static_cast<uint32_t>(rng_.below(link.lanes.size()));
  const LaneRef ref{link.id, lane, link.lanes[lane].epoch};
  switch (rng_.below(6)) {
    case 0:
      return end_link(link);
    case 1:
      // Another life, by its own word: nobody has seen a process end.
      if (rng_.chance(500)) {
        boot_ = boot_of(static_cast<uint8_t>(boots_.size() + 1));
        boots_.insert(boot_);
      }
      return establish(node, rng_.chance(300));
    case 2:
      return post(link, LaneFailed{ref});
    case 3:
      return post(link, PeerLaneDown{ref});
    default: {
      // Its call, where it has dialled: whichever epoch it names.
      if (link.dialled) return;
      Lane& of = link.lanes[lane];
      const auto epoch = of.epoch + rng_.pick(0, 3);
      if (epoch > of.epoch) {
        close_lane(link, ref);
        of = {epoch, false, 0};
      }
      return post(link, LaneReopened{{link.id, lane, epoch}});
    }
  }
}

void Hostile::act() {
  if (gone_) return;
  if (rng_.chance(30)) change_link();
  if (rng_.chance(150)) write_lent();
  std::vector<Link*> mine;
  for (auto& [key, link] : links_)
    if (whole(link)) mine.push_back(&link);
  if (mine.empty()) {
    const auto node = static_cast<uint32_t>(rng_.below(world_.nodes.size()));
    if (!link_up(node)) establish(node, rng_.chance(300));
    return;
  }
  Link& link = *mine[rng_.below(mine.size())];
  if (rng_.chance(world_.scenario.hostile.floods))
    flood(link);
  else
    for (uint64_t i = rng_.between(1, 4); i > 0; --i) speak(link);
  check_pulls();
}

// ---- commands of honest daemons ----------------------------------------------------------------

bool Hostile::carry_out(uint32_t node, const Command& command) {
  const auto link_of = [&](LinkId id) -> Link* {
    const auto found = links_.find({node, id.value});
    return found == links_.end() ? nullptr : &found->second;
  };
  if (const auto* c = std::get_if<ConnectLane>(&command)) {
    Link* link = link_of(c->lane.link);
    if (link != nullptr) connect(*link, c->lane);
    return link != nullptr;
  }
  if (const auto* c = std::get_if<ReopenLane>(&command)) {
    Link* link = link_of(c->lane.link);
    if (link != nullptr) reopen(*link, c->lane);
    return link != nullptr;
  }
  if (const auto* c = std::get_if<CloseLane>(&command)) {
    Link* link = link_of(c->lane.link);
    if (link != nullptr) close_lane(*link, c->lane);
    return link != nullptr;
  }
  if (const auto* c = std::get_if<TellLaneDown>(&command)) return link_of(c->lane.link) != nullptr;
  if (const auto* c = std::get_if<CloseLink>(&command)) {
    Link* link = link_of(c->link);
    if (link != nullptr) link->up = false;
    return link != nullptr;
  }
  if (const auto* c = std::get_if<SendMessage>(&command)) {
    Link* link = link_of(c->lane.link);
    if (link != nullptr) heard(*link, *c);
    return link != nullptr;
  }
  if (const auto* c = std::get_if<SendRefuse>(&command)) return link_of(c->lane.link) != nullptr;
  if (const auto* c = std::get_if<SendOffer>(&command)) {
    Link* link = link_of(c->lane.link);
    if (link != nullptr) serve(*link, *c);
    return link != nullptr;
  }
  if (const auto* c = std::get_if<AcceptOffer>(&command)) {
    Link* link = link_of(c->lane.link);
    if (link != nullptr) accepted(*link, *c);
    return link != nullptr;
  }
  if (const auto* c = std::get_if<DropOffer>(&command)) {
    if (link_of(c->lane.link) == nullptr) return false;
    const auto of = held_.find(c->descriptor);
    if (gone_descriptors_.contains(c->descriptor)) return true;
    require(of != held_.end() && of->second.node == node, "descriptor",
            "DropOffer of a descriptor that is not held");
    held_.erase(of);
    return true;
  }
  return false;
}

void Hostile::connect(Link& link, const LaneRef& lane) {
  link.lanes.at(lane.lane) = {lane.epoch, false, 0};
  if (rng_.chance(50)) return;  // it never answers
  world_.after(rng_.micros(50, 1500), [this, key = LinkKey{link.node, link.id.value}, lane] {
    Link& now = links_.at(key);
    if (!whole(now) || now.lanes[lane.lane].epoch != lane.epoch || now.lanes[lane.lane].closed)
      return;
    post(now, LaneConnected{lane});
    for (const bool answer : {false, true})
      if (!gone_ && !rng_.chance(20))
        post(now, MessageIn{lane, now.lanes[lane.lane].next++, MsgHello{answer}});
  });
}

void Hostile::reopen(Link& link, const LaneRef& lane) {
  require(link.dialled, "lane", "ReopenLane by the side that did not dial");
  const bool agrees = !gone_ && rng_.chance(800);
  world_.after(rng_.micros(100, 2000),
               [this, key = LinkKey{link.node, link.id.value}, lane, agrees] {
                 Link& now = links_.at(key);
                 if (agrees)
                   post(now, LaneReopened{lane});
                 else
                   post(now, LaneReopenFailed{lane});
               });
}

// The honest side gives it up: what it has posted and sent there ends.
void Hostile::close_lane(Link& link, const LaneRef& lane) {
  Lane& of = link.lanes.at(lane.lane);
  if (of.epoch == lane.epoch) of.closed = true;
  for (const auto& [key, request] : sends_)
    if (request.node == link.node && request.lane == lane)
      world_.after(rng_.micros(0, 30000), [this, key = key] { end_send(key.second, key.first); });
  for (const auto& [key, request] : landings_)
    if (request.node == link.node && request.lane == lane)
      world_.after(rng_.micros(0, 30000), [this, key = key] { end_landing(key, false); });
}

bool Hostile::gave_back(const PullId& pull, CreditId credit) const {
  return given_back_.contains({pull, credit}) || given_back_.contains({pull, CreditId{}});
}

void Hostile::note_credits(Link& link, const PullId& pull,
                           const std::vector<CreditGrant>& credits) {
  for (const CreditGrant& credit : credits) {
    const auto known = std::find_if(link.credits.begin(), link.credits.end(), [&](const auto& of) {
      return of.first == pull && of.second.credit == credit.credit;
    });
    if (known != link.credits.end()) continue;
    ++link.told[pull];
    link.credits.emplace_back(pull, credit);
    if (!credit.place || gone_ || gave_back(pull, credit.credit)) continue;
    Lent lent{link.node, link.life, pull, credit.credit, {}, 0};
    lent.region = {credit.place->segment, credit.place->offset, credit.bytes};
    lent.grant = world_.nodes[link.node]->engine().lent(lent.region).grant;
    require(lent.grant != 0, "lent", "a credit names a region that its daemon has not lent");
    lent_.push_back(lent);
  }
}

void Hostile::heard(Link& link, const SendMessage& command) {
  if (const auto* pull = std::get_if<MsgPull>(&command.message)) {
    require(world_.workload->with_enemy(pull->transfer.id), "told",
            "a transfer with honest workers is pulled from the enemy");
    const bool again = std::any_of(link.pulls.begin(), link.pulls.end(),
                                   [&](const MsgPull& of) { return of.pull == pull->pull; });
    if (!again) link.pulls.push_back(*pull);
    note_credits(link, pull->pull, pull->credits);
  } else if (const auto* update = std::get_if<MsgUpdate>(&command.message)) {
    note_credits(link, update->pull, update->credits);
  } else if (const auto* slice = std::get_if<MsgSlice>(&command.message)) {
    const auto asked = link.asked.find(slice->pull.counter);
    require(slice->pull.receiver == link.boot && asked != link.asked.end() && asked->second, "told",
            "a slice of another peer's pull");
  } else if (const auto* end = std::get_if<MsgEnd>(&command.message)) {
    // Of the daemon's own pull. Where it is called by that daemon's own boot id, nobody can tell.
    const BootId boot = world_.nodes[link.node]->boot();
    require(end->pull.receiver != boot || link.boot == boot || end->transfer.id.empty() ||
                world_.workload->with_enemy(end->transfer.id),
            "told", "the enemy is told of the end of another peer's leg");
  } else if (const auto* drained = std::get_if<MsgDrained>(&command.message)) {
    note_told(link, *drained);
  }
  if (!gone_ && rng_.chance(600))
    world_.after(rng_.micros(50, 5000),
                 [this, key = LinkKey{link.node, link.id.value}, message = command.message] {
                   if (!gone_ && whole(links_.at(key))) answer(links_.at(key), message);
                 });
}

void Hostile::overhear(const ControlMessage& message) {
  if (gone_) return;
  overheard_.push_back(message);
  if (overheard_.size() > kMostOverheard) overheard_.pop_front();
}

// An honest sender offers it a chunk, which it may never fetch.
void Hostile::serve(Link& link, const SendOffer& command) {
  const auto asked = link.asked.find(command.offer.pull.counter);
  require(command.offer.pull.receiver == link.boot && asked != link.asked.end() && asked->second,
          "told", "a chunk of another peer's pull");
  ++world_.totals.hostile_served;
  Node& node = *world_.nodes[link.node];
  if (!node.rails_up()) return;  // its engine will hear of that
  Request request{link.node, link.life, command.lane, 0, command.region, command.offer.bytes};
  memory::Region read = command.region;
  read.bytes = command.offer.bytes;
  request.use = node.begin_use(Use::kSend, read, "SendOffer");
  sends_[{link.node, command.offer.offer}] = request;
  link.offers.push_back(command.offer);
  const Lane& lane = link.lanes.at(command.lane.lane);
  const bool over = gone_ || lane.closed || lane.epoch != command.lane.epoch;
  if (over || rng_.chance(700))
    world_.after(rng_.micros(50, 3000),
                 [this, node = link.node, offer = command.offer.offer] { end_send(offer, node); });
  if (over) return;
  // Whether it has taken the data, is for it alone to say.
  if (rng_.chance(700))
    world_.after(rng_.micros(50, 4000),
                 [this, key = LinkKey{link.node, link.id.value}, offer = command.offer] {
                   Link& now = links_.at(key);
                   if (gone_ || !whole(now)) return;
                   if (rng_.chance(150))
                     return post(now, RefuseIn{some_lane(now), MsgRefuse{offer.pull, offer.offer}});
                   MsgUpdate update;
                   update.pull = offer.pull;
                   update.acks.push_back({offer.slice, offer.chunk});
                   update.credits.push_back({{++next_number_}, now.chunk_bytes, {}});
                   say(now, update);
                 });
}

void Hostile::end_send(OfferId offer, uint32_t node) {
  const auto found = sends_.find({node, offer});
  if (found == sends_.end()) return;
  const Request request = found->second;
  sends_.erase(found);
  if (!alive(node, request.life)) return;
  world_.nodes[node]->end_use(request.use);
  world_.nodes[node]->post(OfferSendEnded{offer});
}

void Hostile::accepted(Link& link, const AcceptOffer& command) {
  const auto held = held_.find(command.descriptor);
  if (gone_descriptors_.contains(command.descriptor)) return;
  require(held != held_.end(), "descriptor", "AcceptOffer of a descriptor that is not held");
  require(held->second.node == link.node && held->second.bytes == command.bytes &&
              command.bytes <= command.region.bytes,
          "region", "AcceptOffer of the enemy's with other bytes than were announced");
  held_.erase(held);
  ++world_.totals.hostile_landings;
  Node& node = *world_.nodes[link.node];
  Request request{link.node, link.life, command.lane, 0, command.region, command.bytes};
  request.use = node.begin_use(Use::kReceive, command.region, "AcceptOffer");
  const std::pair key{link.node, command.landing.value};
  landings_[key] = request;
  const Lane& lane = link.lanes.at(command.lane.lane);
  const bool over = gone_ || lane.closed || lane.epoch != command.lane.epoch;
  // Else it lasts until the lane is given up.
  if (over || rng_.chance(700))
    world_.after(rng_.micros(50, 3000),
                 [this, key, ok = !over && !rng_.chance(100)] { end_landing(key, ok); });
}

void Hostile::end_landing(const std::pair<uint32_t, uint64_t>& landing, bool ok) {
  const auto found = landings_.find(landing);
  if (found == landings_.end()) return;
  const LandingId id{found->first.second};
  const Request request = found->second;
  landings_.erase(found);
  if (!alive(request.node, request.life)) return;
  Node& node = *world_.nodes[request.node];
  uint8_t* bytes = node.arena(request.region, 0, request.bytes);
  for (uint64_t i = 0; i < request.bytes; ++i) bytes[i] = static_cast<uint8_t>(0xE0 + i % 16);
  node.end_use(request.use);
  node.post(ReceiveEnded{id, ok});
}

// ---- ends --------------------------------------------------------------------------------------

void Hostile::rails_gone(uint32_t node) {
  Node& there = *world_.nodes[node];
  const auto end = [&](auto& requests) {
    for (auto it = requests.begin(); it != requests.end();) {
      if (it->second.node != node) {
        ++it;
        continue;
      }
      if (alive(node, it->second.life)) there.end_use(it->second.use);
      it = requests.erase(it);
    }
  };
  end(sends_);
  end(landings_);
  for (const auto& [id, of] : held_)
    if (of.node == node) gone_descriptors_.insert(id);
  std::erase_if(held_, [&](const auto& of) { return of.second.node == node; });
  for (auto& [key, link] : links_)
    if (link.node == node)
      for (Lane& lane : link.lanes) lane.closed = true;
}

void Hostile::node_died(uint32_t node) {
  rails_gone(node);
  std::erase_if(writing_, [&](const auto& of) { return of.second.link.first == node; });
  for (auto& [key, link] : links_)
    if (link.node == node) link.up = false;
}

void Hostile::check_bounds(uint32_t node) const {
  std::map<PullId, uint64_t> held;
  for (const auto& [id, of] : held_) {
    if (of.node != node) continue;
    const Link& link = links_.at({of.node, of.link.value});
    const auto told = link.told.find(of.pull);
    const uint64_t credits = told == link.told.end() ? 0 : told->second;
    // Credits that the daemon has given and not told yet are no more than may be LIVE.
    const uint64_t most = (credits + world_.scenario.max_credits) * link.lanes.size();
    if (++held[of.pull] > most)
      throw Violation("bounds", world_.nodes[node]->name() + " holds more than " +
                                    std::to_string(most) + " offers of one pull for the enemy");
  }
}

void Hostile::check_pulls() const {
  for (const auto& node : world_.nodes) {
    if (!node->alive()) continue;
    for (const auto& link : node->snapshot().links)
      if (link.node == kName)
        require(link.parked <= kHostileParked && link.legs_out <= kHostileLegs, "bounds",
                "more pulls of the enemy are kept than are allowed");
  }
}

void Hostile::check_idle(uint32_t node) const {
  const auto leak = [&](const auto& all, const char* what) {
    for (const auto& [key, of] : all)
      if (of.node == node)
        throw Violation("leak",
                        std::string(what) + " of the enemy is left on node" + std::to_string(node));
  };
  leak(sends_, "an offer to a lane");
  leak(landings_, "a posted receive");
  leak(held_, "a held offer");
}

}  // namespace kvferry::sim
