#include "tests/sim/node.h"

#include <algorithm>
#include <utility>

#include "tests/sim/hostile.h"
#include "tests/sim/network.h"
#include "tests/sim/workload.h"

namespace kvferry::sim {

using namespace engine;
using std::chrono::microseconds;
using std::chrono::milliseconds;
using std::chrono::seconds;

namespace {

template <typename... Ts>
struct Overloaded : Ts... {
  using Ts::operator()...;
};
template <typename... Ts>
Overloaded(Ts...) -> Overloaded<Ts...>;

EngineConfig config_for(const Scenario& scenario, uint32_t node, BootId boot, std::string name) {
  EngineConfig config;
  config.boot = boot;
  config.node = std::move(name);
  config.arenas = scenario.arenas[node];
  config.min_region_bytes = 64;
  config.chunk_bytes = scenario.chunk_bytes;
  config.leg_credits = scenario.leg_credits;
  config.staged_ahead = scenario.staged_ahead;
  config.max_deadline = seconds(30);
  config.ready_timeout = milliseconds(1000);
  config.ping_interval = milliseconds(100);
  config.silence_limit = milliseconds(350);
  config.lane_retry_first = milliseconds(5);
  config.lane_retry_most = milliseconds(100);
  config.landing_timeout = milliseconds(500);
  if (scenario.hostile.acts != 0) {
    config.max_parked_pulls = kHostileParked;
    config.max_legs = kHostileLegs;
  }
  config.mapped_gathers = static_cast<uint32_t>(1 + mix(scenario.seed ^ 0x3A98) % 8);
  config.max_packed_bytes = scenario.packed_bytes;
  if (scenario.reuse_entries != 0)
    config.max_reuse_entries_per_worker = static_cast<uint32_t>(scenario.reuse_entries);
  return config;
}

bool overlap(const memory::Region& a, const memory::Region& b) {
  return a.segment == b.segment && a.offset < b.offset + b.bytes && b.offset < a.offset + a.bytes;
}

const char* name_of(Use use) {
  switch (use) {
    case Use::kReceive:
      return "a posted receive";
    case Use::kSend:
      return "a send";
    case Use::kGather:
      return "a gather";
    case Use::kScatter:
      return "a scatter";
    case Use::kPeer:
      return "a peer's gather";
  }
  return "?";
}

}  // namespace

Node::Node(World& world, uint32_t index)
    : world_(world),
      index_(index),
      name_("node" + std::to_string(index)),
      rng_(mix(world.scenario.seed * 31 + index)) {}

// ---- lives -------------------------------------------------------------------------------------

void Node::start() {
  ++life_;
  ++rails_life_;
  boot_ = {};
  boot_.bytes[0] = static_cast<uint8_t>(index_ + 1);
  boot_.bytes[1] = static_cast<uint8_t>(life_);
  boot_.bytes[15] = 0xB0;
  segments_.clear();
  arena_of_.clear();
  for (uint32_t arena = 0; arena < world_.scenario.arenas[index_].size(); ++arena)
    for (const uint64_t bytes : world_.scenario.arenas[index_][arena].segment_bytes) {
      segments_.emplace_back(bytes, uint8_t{0xA5});
      arena_of_.push_back(arena);
    }
  engine_ = std::make_unique<Engine>(config_for(world_.scenario, index_, boot_, name_));
  rails_up_ = true;
  draining_ = scheduled_ = false;
  stalled_until_ = {};
  timer_at_ = Time::never();
  world_.note(name_ + " starts, life " + std::to_string(life_));
  post(RailsUp{});
}

void Node::die() {
  if (!alive()) return;
  world_.note(name_ + " dies");
  world_.network->node_died(index_);
  if (world_.hostile) world_.hostile->node_died(index_);
  world_.totals.add(engine_->stats());
  engine_.reset();
  rails_up_ = false;
  inbox_.clear();
  tell_of_death();
  uses_.clear();
  copies_.clear();
  copy_ids_.clear();
  watches_.clear();
  cancelled_resolves_.clear();
  scattered_.clear();
  scattered_bytes_.clear();
  world_.workload->daemon_died(index_);
  world_.after(rng_.micros(2000, 400000), [this] { start(); });
}

// Its copies have ended with it. Who runs on the same host sees that; of other hosts' arenas an
// operator takes care (World::look_after_lent).
void Node::tell_of_death() {
  for (const auto& [key, copy] : copies_)
    if (Node* peer = copy.peer ? peer_of(copy) : nullptr) peer->end_use(copy.use);
  if (world_.scenario.mapped == 0) return;
  Rng own(world_.scenario.seed ^ mix(0x3A9F00 + 16 * life_ + index_));
  for (uint32_t n = 0; n < world_.nodes.size(); ++n) {
    if (n == index_ || !world_.scenario.one_host(index_, n)) continue;
    world_.after(own.micros(50, own.chance(500) ? 2000 : 800000), [this, n, boot = boot_] {
      world_.nodes[n]->post(PeerProcessGone{boot, name_});
    });
  }
}

void Node::rails_die(Duration back_after) {
  if (!alive() || !rails_up_) return;
  world_.note(name_ + "'s rails process dies");
  world_.network->rails_died(index_);
  if (world_.hostile) world_.hostile->rails_gone(index_);
  rails_up_ = false;
  post(RailsDied{});
  world_.after_on(index_, back_after, [this] {
    ++rails_life_;
    rails_up_ = true;
    post(RailsUp{});
  });
}

void Node::stall(Duration length) {
  if (!alive()) return;
  world_.note(name_ + " does not run for " + std::to_string(length.count() / 1000000) + " ms");
  stalled_until_ = std::max(stalled_until_, world_.now() + length);
}

void Node::leap(Duration length) {
  if (!alive()) return;
  world_.note(name_ + "'s clock leaps by " + std::to_string(length.count() / 1000000) + " ms");
  ++world_.totals.leaps;
  world_.workload->leapt(index_);
  ahead_ += length;
  timer_at_ = Time::never();
  if (!scheduled_) schedule(microseconds(1));
}

Time Node::clock() const {
  return world_.now() + ahead_;
}

void Node::drain(Duration limit) {
  if (!alive() || draining_) return;
  draining_ = true;
  world_.note(name_ + " drains");
  world_.workload->draining(index_);
  post(Drain{clock() + limit});
  const uint64_t life = life_;
  world_.after(limit + seconds(2), [this, life] {
    if (alive() && life_ == life)
      throw Violation("drain", name_ + " has not drained within its limit");
  });
}

EngineSnapshot Node::snapshot() const {
  return engine_->snapshot(clock());
}

// ---- the engine's thread -----------------------------------------------------------------------

void Node::post(Event event) {
  if (!alive()) return;
  inbox_.push_back(std::move(event));
  if (!scheduled_) schedule(rng_.micros(1, 30));
}

void Node::schedule(Duration delay) {
  scheduled_ = true;
  world_.after_on(index_, delay, [this] { tick(); });
}

void Node::tick() {
  if (world_.now() < stalled_until_) {
    schedule(stalled_until_ - world_.now());
    return;
  }
  scheduled_ = false;
  Commands commands;
  const Time now = clock();
  for (std::size_t left = inbox_.size(); left > 0; --left) {
    Event event = std::move(inbox_.front());
    inbox_.pop_front();
    world_.trace.event(world_.now(), index_, event);
    engine_->handle(std::move(event), now, commands);
    if (world_.scenario.check_each_step) check_now();
    check_peers_word();
  }
  engine_->advance(now, commands);
  engine_->flush(now, commands);
  if (world_.scenario.check_each_step) check_now();
  const uint64_t life = life_;
  bool drained = false;
  for (Command& command : commands) {
    world_.trace.command(world_.now(), index_, command);
    drained = drained || std::holds_alternative<Drained>(command);
    carry_out(command);
    if (!alive() || life_ != life) return;
  }
  if (world_.hostile) world_.hostile->check_bounds(index_);
  if (drained) {
    require(draining_, "drain", "Drained without Drain");
    die();
    return;
  }
  arm_timer();
}

void Node::check_now() const {
  engine_->check_invariants();
}

// Nothing that an honest daemon says is taken for a breach of the protocol, whatever the network
// does to it. Where there is an enemy, what is dropped as wrong may be his.
void Node::check_peers_word() const {
  if (!world_.hostile && engine_->stats().dropped[static_cast<size_t>(DropCause::kProtocol)] != 0)
    throw Violation("protocol",
                    name_ + " takes for a breach of the protocol what an honest daemon said");
}

void Node::arm_timer() {
  const Time next = engine_->next_timer();
  if (next == Time::never() || (timer_at_ <= next && clock() < timer_at_)) return;
  timer_at_ = next;
  // Never in the past: an engine whose timer does not move on would run for ever within a moment.
  const Duration delay = std::max<Duration>(next - clock(), microseconds(1));
  world_.after_on(index_, delay, [this, next] {
    if (timer_at_ != next) return;
    timer_at_ = Time::never();
    if (!scheduled_) tick();
  });
}

uint8_t* Node::arena(const memory::Region& region, uint64_t offset, uint64_t bytes) {
  require(region.segment < segments_.size() && offset + bytes <= region.bytes &&
              region.offset + region.bytes <= segments_[region.segment].size(),
          "region", "a region outside the arena");
  return segments_[region.segment].data() + region.offset + offset;
}

// Notes who uses the region from now on. Only sends may share one, with sends.
uint64_t Node::begin_use(Use use, const memory::Region& region, const char* command) {
  arena(region, 0, region.bytes);
  for (const auto& [key, occupied] : uses_)
    if (overlap(occupied.region, region) && !(use == Use::kSend && occupied.use == Use::kSend))
      throw Violation("reuse", std::string(command) + " on " + name_ + " names a region that " +
                                   name_of(occupied.use) + " is using");
  uses_[next_use_] = {use, region};
  return next_use_++;
}

void Node::end_use(uint64_t use) {
  uses_.erase(use);
}

bool Node::copying(uint64_t side) const {
  return std::any_of(copies_.begin(), copies_.end(), [side](const auto& entry) {
    const Copy& copy = entry.second;
    const auto touches = [side](const SimPlan* plan) {
      return plan != nullptr && plan->side == side && plan->layout->packed_side == 0;
    };
    return touches(copy.plan.get()) || touches(copy.destination.get());
  });
}

bool Node::copying_layout(const LayoutHandle* layout) const {
  return std::any_of(copies_.begin(), copies_.end(), [layout](const auto& entry) {
    const Copy& copy = entry.second;
    return copy.plan->layout.get() == layout ||
           (copy.destination != nullptr && copy.destination->layout.get() == layout);
  });
}

// ---- commands ----------------------------------------------------------------------------------

void Node::carry_out(Command& command) {
  Network& network = *world_.network;
  Workload& workload = *world_.workload;
  if (world_.hostile && world_.hostile->carry_out(index_, command)) return;
  std::visit(Overloaded{[&](const Reply& c) { workload.on_reply(index_, c); },
                        [&](const Publish& c) { workload.on_publish(index_, c); },
                        [&](const SetDoneWord& c) { workload.on_done_word(index_, c); },
                        [&](const FreeSlot& c) { workload.on_free_slot(index_, c); },
                        [&](const LayoutQuiet& c) { workload.on_quiet(index_, c); },
                        [&](const Resolve& c) { resolve(c); },
                        [&](const ResolvePull& c) { resolve_pull(c); },
                        [&](const CancelResolve& c) { cancelled_resolves_.insert(c.resolve); },
                        [&](const Compile& c) { compile(c); },
                        [&](const Gather& c) { start_gather(c); },
                        [&](const Scatter& c) { start_scatter(c); },
                        [&](const ClearTail& c) { start_clear_tail(c); },
                        [&](const LocalCopy& c) { start_local_copy(c); },
                        [&](const CompileCopy& c) { compile_copy(c); },
                        [&](const MakePacked& c) { make_packed(c); },
                        [&](const WatchCondition& c) {
                          require(watches_.emplace(c.condition, c).second, "condition",
                                  "watched twice");
                          words_changed();
                        },
                        [&](const UnwatchCondition& c) { watches_.erase(c.condition); },
                        [&](const ConnectLane& c) { network.connect_lane(index_, c.lane); },
                        [&](const ReopenLane& c) { network.reopen_lane(index_, c.lane); },
                        [&](const CloseLane& c) { network.close_lane(index_, c.lane); },
                        [&](const TellLaneDown& c) { network.tell_lane_down(index_, c.lane); },
                        [&](const CloseLink& c) { network.close_link(index_, c.link); },
                        [&](const SendMessage& c) { network.send_message(index_, c); },
                        [&](const SendRefuse& c) { network.send_refuse(index_, c); },
                        [&](const SendOffer& c) { network.send_offer(index_, c); },
                        [&](const AcceptOffer& c) { network.accept_offer(index_, c); },
                        [&](const DropOffer& c) { network.drop_offer(index_, c); },
                        [&](const QuarantineReleased&) {},
                        [&](const TransferEnded&) {},
                        [&](const Drained&) {}},
             command);
}

void Node::words_changed() {
  for (auto it = watches_.begin(); it != watches_.end();) {
    const WatchCondition& watch = it->second;
    if (!world_.workload->attached(watch.worker)) {  // no word of a worker that is gone ever moves
      it = watches_.erase(it);
    } else if (world_.workload->holds(watch)) {
      const ConditionId id = watch.condition;
      it = watches_.erase(it);
      world_.after_on(index_, rng_.micros(1, 50), [this, id] { post(ConditionMet{id}); });
    } else {
      ++it;
    }
  }
}

void Node::compile(const Compile& command) {
  const OpRef& op = command.side == Role::kSender ? command.send->op : command.receive->op;
  const uint64_t handle =
      command.side == Role::kSender ? command.send->client_handle : command.receive->client_handle;
  const Side* side = world_.workload->side_of(op.worker, handle);
  uint64_t uid = side == nullptr ? 0 : side->uid;
  if (command.side == Role::kSender)
    if (const uint64_t packed = static_cast<const SimLayout&>(*command.send->layout).packed_side)
      uid = packed;  // which needs no worker
  Compiled answer;
  answer.compile = command.compile;
  if (uid == 0) {  // its worker is gone: the pool is not there any more
    answer.reason = Reason::kWorkerLost;
  } else {
    answer.plan = sim::compile(command, std::exchange(next_plan_, next_plan_ + 2), uid);
  }
  world_.after_on(index_, rng_.micros(5, 400), [this, answer] { post(answer); });
}

void Node::compile_copy(const CompileCopy& command) {
  const auto& layout = static_cast<const SimLayout&>(*command.destination);
  const GroupNeed& need = command.needs.at(0);
  uint64_t side = 0;
  for (const GroupBlocks& blocks : command.destination_blocks)
    if (blocks.group == need.group)
      side = layout.pool->owner_of(
          need.group,
          static_cast<uint32_t>(blocks.ids.at(need.begin / kTokensPerBlock - blocks.first_block)));
  require(side != 0, "compile", "a copy to blocks that are nobody's");
  const CopyPlans plans =
      sim::compile_copy(command, std::exchange(next_plan_, next_plan_ + 2), side);
  CopyCompiled answer;
  answer.compile = command.compile;
  answer.source = plans.source;
  answer.destination = plans.destination;
  world_.after_on(index_, rng_.micros(5, 400), [this, answer] { post(answer); });
}

void Node::resolve_pull(const ResolvePull& command) {
  const bool hostile = world_.hostile && world_.hostile->owns(index_, command.link);
  PullResolved answer = hostile
                            ? world_.workload->resolve_enemy_pull(*command.pull, *command.layout)
                            : world_.workload->resolve_pull(*command.pull, *command.layout);
  if (world_.mishap(world_.scenario.faults.stale_cards)) {
    answer.reason = Reason::kStaleCards;
    world_.workload->unreachable({{}, {}, command.pull->transfer.id, {}}, kCauseStale);
  }
  if (answer.reason != Reason::kNone) answer.legs.clear();
  answer.resolve = command.resolve;
  world_.after_on(index_, rng_.micros(5, 500), [this, answer] { post(answer); });
}

void Node::resolve(const Resolve& command) {
  require(command.receive != nullptr, "resolve", "Resolve without its call");
  world_.after_on(index_, rng_.micros(5, 500), [this, command] { try_resolve(command, 400); });
}

// Answers once there is a link to each node, which takes handshakes.
void Node::try_resolve(const Resolve& command, uint32_t tries) {
  if (cancelled_resolves_.contains(command.resolve) && rng_.chance(700)) return;
  std::set<uint32_t> peers;
  Resolved answer = world_.workload->resolve(*command.receive, command.declines, peers);
  answer.resolve = command.resolve;
  bool ready = true;
  if (world_.hostile && peers.erase(world_.hostile->index()) != 0 &&
      !world_.hostile->link_up(index_)) {
    world_.hostile->dial(index_);
    ready = false;
  }
  if (answer.reason == Reason::kNone)
    for (const uint32_t peer : peers)
      if (peer != index_ && !world_.network->link_up(index_, peer)) {
        world_.network->dial(index_, peer);
        ready = false;
      }
  if (ready || tries == 0) {
    if (!ready) {
      answer.reason = Reason::kPeerUnreachable;
      answer.legs.clear();
    }
    if (answer.reason != Reason::kNone)
      world_.workload->unreachable(command.receive->key, kCauseLink);
    post(answer);
    return;
  }
  world_.after_on(index_, rng_.micros(1000, 5000),
                  [this, command, tries] { try_resolve(command, tries - 1); });
}

// ---- copies ------------------------------------------------------------------------------------

Check Node::checksum(const memory::Region& region, uint64_t bytes, CheckKind kind) {
  Check check;
  check.kind = kind;
  if (kind == CheckKind::kNone) return check;
  const uint8_t* data = arena(region, 0, bytes);
  uint64_t word = bytes;
  for (uint64_t i = 0; i < bytes; ++i) word = (word ^ data[i]) * 0x100000001B3ULL;
  word = mix(word);
  for (std::size_t i = 0; i < 8; ++i) check.value[i] = static_cast<uint8_t>(word >> (8 * i));
  return check;
}

void Node::check_copy(const Copy& copy) const {
  require(copy.plan != nullptr, "copy", "a copy without a plan");
  require(copy.bytes > 0 && copy.offset + copy.bytes <= copy.plan->bytes, "copy",
          "a copy outside its stream");
  require(copy.destination != nullptr || copy.clears || copy.bytes <= copy.region.bytes, "region",
          "a copy of more bytes than its region has");
  require(copy.destination == nullptr || copy.destination->bytes == copy.plan->bytes, "copy",
          "a local copy between two streams");
  if (copy.reads()) world_.workload->before_gather(*copy.plan, copy.offset, copy.bytes);
  if (copy.written() != nullptr)
    world_.workload->before_scatter(*copy.written(), copy.offset, copy.bytes);
}

// A chunk lands and is staged in the arena of its pages, a packed copy's in its own. It may land in
// the mapped one beside it.
uint32_t Node::check_arena(const Copy& copy) const {
  const uint32_t arena = arena_of_[copy.region.segment];
  const uint32_t of_layout = copy.plan->layout->arena;
  const bool beside = !copy.gather && copy.plan->layout->mapped_arena == arena;
  require(arena == of_layout || beside, "arena",
          "a chunk's region lies in another arena than its layout's");
  return arena;
}

template <typename Command>
Node::Copy Node::between_region_and_pages(const Command& command) {
  Copy copy;
  copy.id = command.copy;
  copy.plan = std::static_pointer_cast<const SimPlan>(command.plan);
  copy.offset = command.offset;
  copy.bytes = command.bytes;
  copy.region = command.region;
  return copy;
}

// The node that the copy writes to, unless that life of it is over: then it writes to nobody.
Node* Node::peer_of(const Copy& copy) const {
  Node* peer = world_.nodes[copy.peer->first].get();
  return peer->alive() && peer->life() == copy.peer->second ? peer : nullptr;
}

// From its first byte to its last a gather has the region that the peer's engine has granted for
// it, whatever has become of the transfer.
Lent Node::check_lent(const Copy& copy, const char* when) const {
  const Node* peer = peer_of(copy);
  if (peer == nullptr) return {};
  const Lent lent = peer->engine().lent(copy.region);
  if (lent.grant == 0 || (copy.grant != 0 && copy.grant != lent.grant))
    throw Violation("lent", "a gather of " + name_ + " " + when + " a region that " + peer->name() +
                                (lent.grant == 0 ? " takes for its own" : " has given to another"));
  return lent;
}

bool Node::writes_over(LinkId link) const {
  return std::any_of(copies_.begin(), copies_.end(), [&](const auto& entry) {
    return entry.second.peer && entry.second.link == link;
  });
}

void Node::start_mapped_gather(const Gather& command) {
  Copy copy = between_region_and_pages(command);
  copy.kind = command.check_kind;
  check_copy(copy);
  check_link(command.mapped->link);
  if (world_.hostile && world_.hostile->owns(index_, command.mapped->link)) {
    copy.enemys = world_.hostile->begin_gather(index_, command);
    if (!copy.enemys) {
      post(CopyEnded{copy.id, CopyOutcome::kFailed, {}});
      return;
    }
    copies_[copy.id.value] = copy;
    run_mapped(copy.id.value);
    return;
  }
  copy.peer = world_.network->peer_life_of(index_, command.mapped->link);
  copy.link = command.mapped->link;
  require(copy.peer.has_value(), "mapped", "a gather into an arena of a link that never was");
  require(world_.scenario.maps(index_, copy.peer->first), "mapped",
          "a gather into an arena that is not mapped");
  if (!world_.network->is_up(index_, copy.link)) {
    // Nothing of the peer is found here any more; the engine is to hear of it.
    post(CopyEnded{copy.id, CopyOutcome::kFailed, {}});
    return;
  }
  if (Node* peer = peer_of(copy)) {
    require(peer->arena_of(copy.region) == command.mapped->arena &&
                world_.scenario.arenas[copy.peer->first][command.mapped->arena].mapped,
            "mapped", "a gather into another arena than the one it names");
    copy.grant = check_lent(copy, "begins in").grant;
    copy.use = peer->begin_use(Use::kPeer, command.region, "Gather");
  }
  const uint64_t key = command.copy.value;
  copies_[key] = std::move(copy);
  run_mapped(key);
}

// No gather begins over a link that the engine knows to have ended: what its peer lends may be
// gone.
void Node::check_link(LinkId link) const {
  const std::vector<LinkView> links = snapshot().links;
  require(std::any_of(links.begin(), links.end(), [&](const auto& of) { return of.link == link; }),
          "mapped", "a gather begins over a link that has ended");
}

void Node::run_mapped(uint64_t key) {
  // Some outlive their link.
  const bool slow = copies_.at(key).enemys && rng_.chance(200);
  if (slow || world_.mishap(world_.scenario.faults.slow_copy))
    continue_copy(key, 3, rng_.micros(20000, 400000), false);
  else
    run_copy(key);
}

void Node::start_gather(const Gather& command) {
  require(copy_ids_.insert(command.copy).second, "copy", "a copy id is used twice");
  if (command.mapped) {
    start_mapped_gather(command);
    return;
  }
  Copy copy = between_region_and_pages(command);
  copy.kind = command.check_kind;
  require(copy.plan == nullptr || copy.plan->role == Role::kSender, "copy",
          "a gather by a receiver's plan");
  check_copy(copy);
  copy.use = begin_use(Use::kGather, command.region, "Gather");
  const uint32_t arena = check_arena(copy);
  if (arena != 0) ++world_.totals.gathers_on_devices;
  if (copy.plan->layout->pages_arena != arena) ++world_.totals.gathers_beside;
  copies_[command.copy.value] = std::move(copy);
  run_copy(command.copy.value);
}

// Lets a copy that was begun take its time, and perhaps fail.
void Node::run_copy(uint64_t key) {
  const Copy& copy = copies_.at(key);
  const bool fails = world_.mishap(world_.scenario.faults.copy_failure);
  if (fails) {
    if (copy.plan->side != 0) world_.workload->copy_failed(copy.plan->side);
    if (copy.destination != nullptr) world_.workload->copy_failed(copy.destination->side);
  }
  const bool slow = world_.mishap(world_.scenario.faults.slow_copy);
  const auto steps = static_cast<uint32_t>(rng_.between(1, 4));
  continue_copy(key, steps, rng_.micros(1, 100) * (slow ? 200 : 1), fails);
}

void Node::start_local_copy(const LocalCopy& command) {
  require(copy_ids_.insert(command.copy).second, "copy", "a copy id is used twice");
  Copy copy;
  copy.id = command.copy;
  copy.plan = std::static_pointer_cast<const SimPlan>(command.source);
  copy.destination = std::static_pointer_cast<const SimPlan>(command.destination);
  copy.offset = command.offset;
  copy.bytes = command.bytes;
  require(copy.plan != nullptr && copy.destination != nullptr, "copy", "a copy without a plan");
  check_copy(copy);
  check_writes(copy);
  copies_[command.copy.value] = std::move(copy);
  run_copy(command.copy.value);
}

void Node::make_packed(const MakePacked& command) {
  require(copy_ids_.insert(command.copy).second, "copy", "a copy id is used twice");
  const SendOp& send = *command.send;
  const Side* side = world_.workload->side_of(send.op.worker, send.client_handle);
  if (side == nullptr) {  // its worker is gone, and the pool with it
    world_.after_on(index_, rng_.micros(1, 100), [this, copy = command.copy] {
      post(Packed{copy, Reason::kWorkerLost, {}, nullptr, {}});
    });
    return;
  }
  PackedPlans plans = compile_packed(send, std::exchange(next_plan_, next_plan_ + 2), side->uid);
  Copy copy;
  copy.id = command.copy;
  copy.plan = plans.copy.source;
  copy.destination = plans.copy.destination;
  copy.bytes = copy.plan->bytes;
  copy.packed = plans.layout;
  copy.packed_blocks = std::move(plans.blocks);
  require(send.packed_bytes == copy.bytes, "packed", "a packed copy of another size");
  check_copy(copy);
  copies_[command.copy.value] = std::move(copy);
  run_copy(command.copy.value);
}

// A tail is cleared when every byte of its stream has been scattered: a scatter that came after it
// would bring back what it has cleared.
void Node::start_clear_tail(const ClearTail& command) {
  require(copy_ids_.insert(command.copy).second, "copy", "a copy id is used twice");
  const auto plan = std::static_pointer_cast<const SimPlan>(command.plan);
  require(plan != nullptr && plan->tail != nullptr, "tail", "a plan without a tail is cleared");
  require(scattered_bytes_[plan->id] == plan->bytes, "tail",
          "a tail is cleared before its stream is scattered");
  Copy copy;
  copy.id = command.copy;
  copy.plan = plan->tail;
  copy.bytes = plan->tail->bytes;
  copy.gather = false;
  copy.clears = true;
  check_copy(copy);
  check_writes(copy);
  copies_[command.copy.value] = std::move(copy);
  run_copy(command.copy.value);
}

// A chunk is written once, and no two copies write the same page bytes at once: which one wins is
// anybody's guess.
void Node::check_writes(const Copy& copy) {
  const SimPlan& plan = *copy.written();
  if (!scattered_.insert({plan.id, copy.offset}).second)
    throw Violation("twice", "a chunk is scattered twice for " +
                                 label(*world_.workload->side_by_uid(plan.side)));
  for (const auto& [key, other] : copies_) {
    if (other.plan->side == 0 && other.plan->layout == plan.layout)
      check_apart(*other.plan, other, plan, copy, "reuse", "a page is written while it is copied");
    if (other.written() == nullptr || other.written()->side != plan.side) continue;
    check_apart(*other.written(), other, plan, copy, "twice",
                "two copies write the same bytes at once");
  }
}

// What `one` touches of its pool by `a` and `two` by `b`.
void Node::check_apart(const SimPlan& a, const Copy& one, const SimPlan& b, const Copy& two,
                       const char* name, const char* what) {
  each_piece(a, one.offset, one.bytes, [&](uint64_t at, uint64_t length, uint64_t) {
    each_piece(b, two.offset, two.bytes, [&](uint64_t page, uint64_t size, uint64_t) {
      if (!intersect({at, at + length}, {page, page + size}).empty()) throw Violation(name, what);
    });
  });
}

void Node::start_scatter(const Scatter& command) {
  require(copy_ids_.insert(command.copy).second, "copy", "a copy id is used twice");
  Copy copy = between_region_and_pages(command);
  copy.kind = command.check.kind;
  copy.gather = false;
  require(copy.plan == nullptr || copy.plan->role == Role::kReceiver, "copy",
          "a scatter by a sender's plan");
  check_copy(copy);
  check_writes(copy);
  copy.use = begin_use(Use::kScatter, command.region, "Scatter");
  if (check_arena(copy) != 0) ++world_.totals.scatters_on_devices;
  const uint64_t key = command.copy.value;
  copies_[key] = std::move(copy);
  const Copy& stored = copies_[key];
  if (command.check.kind != CheckKind::kNone &&
      checksum(stored.region, stored.bytes, command.check.kind) != command.check) {
    if ((world_.workload->side_by_uid(stored.plan->side)->transfer->causes &
         (kCauseCorrupt | kCauseHostile)) == 0)
      throw Violation("bytes", "a landed chunk is not what was sent, for " +
                                   label(*world_.workload->side_by_uid(stored.plan->side)));
    world_.after_on(index_, rng_.micros(1, 100),
                    [this, key] { end_copy(key, CopyOutcome::kCheckMismatch, {}); });
    return;
  }
  run_copy(key);
}

void Node::continue_copy(uint64_t key, uint32_t steps_left, Duration pause, bool fails) {
  world_.after_on(index_, pause, [this, key, steps_left, pause, fails] {
    Copy& copy = copies_.at(key);
    if (steps_left == 0 || (fails && steps_left == 1)) {
      end_copy(key, fails ? CopyOutcome::kFailed : CopyOutcome::kOk, check_of(copy));
      return;
    }
    const uint64_t stop =
        steps_left == 1 ? copy.bytes : copy.done + (copy.bytes - copy.done) / steps_left;
    const uint64_t bytes = stop - copy.done;
    if (bytes != 0 && copy.destination != nullptr) {
      world_.workload->before_gather(*copy.plan, copy.offset + copy.done, bytes);
      world_.workload->before_scatter(*copy.destination, copy.offset + copy.done, bytes);
      std::vector<uint8_t> moved(bytes);
      read_stream(*copy.plan, copy.offset + copy.done, bytes, moved.data());
      write_stream(*copy.destination, copy.offset + copy.done, bytes, moved.data());
    } else if (bytes != 0 && copy.clears) {
      world_.workload->before_scatter(*copy.plan, copy.offset + copy.done, bytes);
      const std::vector<uint8_t> zeros(bytes);
      write_stream(*copy.plan, copy.offset + copy.done, bytes, zeros.data());
    } else if (bytes != 0 && copy.peer) {
      world_.workload->before_gather(*copy.plan, copy.offset + copy.done, bytes);
      check_lent(copy, "writes");
      Node* peer = peer_of(copy);
      std::vector<uint8_t> nowhere(peer == nullptr ? bytes : 0);
      read_stream(*copy.plan, copy.offset + copy.done, bytes,
                  peer == nullptr ? nowhere.data() : peer->arena(copy.region, copy.done, bytes));
    } else if (bytes != 0 && copy.enemys) {
      world_.workload->before_gather(*copy.plan, copy.offset + copy.done, bytes);
      world_.hostile->check_gather(*copy.enemys, "writes");
    } else if (bytes != 0) {
      uint8_t* there = arena(copy.region, copy.done, bytes);
      if (copy.gather) {
        world_.workload->before_gather(*copy.plan, copy.offset + copy.done, bytes);
        read_stream(*copy.plan, copy.offset + copy.done, bytes, there);
      } else {
        world_.workload->before_scatter(*copy.plan, copy.offset + copy.done, bytes);
        write_stream(*copy.plan, copy.offset + copy.done, bytes, there);
      }
    }
    copy.done = stop;
    continue_copy(key, steps_left - 1, pause, fails);
  });
}

// Of what a gather has written, where it lies.
Check Node::check_of(const Copy& copy) {
  if (!copy.gather || copy.destination != nullptr) return {};
  if (!copy.peer && !copy.enemys) return checksum(copy.region, copy.bytes, copy.kind);
  Node* peer = copy.peer ? peer_of(copy) : nullptr;
  if (peer != nullptr) return peer->checksum(copy.region, copy.bytes, copy.kind);
  Check nobodys;
  nobodys.kind = copy.kind;
  return nobodys;
}

void Node::end_copy(uint64_t key, CopyOutcome outcome, Check check) {
  const Copy copy = copies_.at(key);
  copies_.erase(key);
  if (copy.peer) {
    if (check_lent(copy, "ends in").quarantined) ++world_.totals.late_writes;
    if (Node* peer = peer_of(copy)) peer->end_use(copy.use);
  } else if (copy.enemys) {
    world_.hostile->end_gather(*copy.enemys);
  } else if (copy.use != 0) {
    end_use(copy.use);
  }
  if (copy.written() != nullptr && copy.packed == nullptr && outcome == CopyOutcome::kOk)
    scattered_bytes_[copy.written()->id] += copy.bytes;
  if (copy.packed != nullptr)
    post(outcome == CopyOutcome::kOk
             ? Packed{copy.id, Reason::kNone, {}, copy.packed, copy.packed_blocks}
             : Packed{copy.id, Reason::kGatherFailed, {}, nullptr, {}});
  else
    post(CopyEnded{copy.id, outcome, check});
}

}  // namespace kvferry::sim
