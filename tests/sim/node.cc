#include "tests/sim/node.h"

#include <algorithm>

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
  config.segment_bytes = scenario.segments[node];
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
  arena_.clear();
  for (const uint64_t bytes : world_.scenario.segments[index_])
    arena_.emplace_back(bytes, uint8_t{0xA5});
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
  world_.totals.add(engine_->stats());
  engine_.reset();
  rails_up_ = false;
  inbox_.clear();
  uses_.clear();
  copies_.clear();
  copy_ids_.clear();
  watches_.clear();
  cancelled_resolves_.clear();
  scattered_.clear();
  world_.workload->daemon_died(index_);
  world_.after(rng_.micros(2000, 400000), [this] { start(); });
}

void Node::rails_die(Duration back_after) {
  if (!alive() || !rails_up_) return;
  world_.note(name_ + "'s rails process dies");
  world_.network->rails_died(index_);
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

void Node::drain(Duration limit) {
  if (!alive() || draining_) return;
  draining_ = true;
  world_.note(name_ + " drains");
  world_.workload->draining(index_);
  post(Drain{world_.now() + limit});
  const uint64_t life = life_;
  world_.after(limit + seconds(2), [this, life] {
    if (alive() && life_ == life)
      throw Violation("drain", name_ + " has not drained within its limit");
  });
}

EngineSnapshot Node::snapshot() const {
  return engine_->snapshot(world_.now());
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
  const Time now = world_.now();
  for (std::size_t left = inbox_.size(); left > 0; --left) {
    Event event = std::move(inbox_.front());
    inbox_.pop_front();
    world_.trace.event(now, index_, event);
    engine_->handle(std::move(event), now, commands);
    if (world_.scenario.check_each_step) check_now();
  }
  engine_->advance(now, commands);
  engine_->flush(now, commands);
  if (world_.scenario.check_each_step) check_now();
  const uint64_t life = life_;
  bool drained = false;
  for (Command& command : commands) {
    world_.trace.command(now, index_, command);
    drained = drained || std::holds_alternative<Drained>(command);
    carry_out(command);
    if (!alive() || life_ != life) return;
  }
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

void Node::arm_timer() {
  const Time next = engine_->next_timer();
  if (next == Time::never() || (timer_at_ <= next && world_.now() < timer_at_)) return;
  timer_at_ = next;
  // Never in the past: an engine whose timer does not move on would run for ever within a moment.
  const Duration delay = std::max<Duration>(next - world_.now(), microseconds(1));
  world_.after_on(index_, delay, [this, next] {
    if (timer_at_ != next) return;
    timer_at_ = Time::never();
    if (!scheduled_) tick();
  });
}

uint8_t* Node::arena(const memory::Region& region, uint64_t offset, uint64_t bytes) {
  require(region.segment < arena_.size() && offset + bytes <= region.bytes &&
              region.offset + region.bytes <= arena_[region.segment].size(),
          "region", "a region outside the arena");
  return arena_[region.segment].data() + region.offset + offset;
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
  return std::any_of(copies_.begin(), copies_.end(),
                     [side](const auto& copy) { return copy.second.plan->side == side; });
}

bool Node::copying_layout(const LayoutHandle* layout) const {
  return std::any_of(copies_.begin(), copies_.end(), [layout](const auto& copy) {
    return copy.second.plan->layout.get() == layout;
  });
}

// ---- commands ----------------------------------------------------------------------------------

void Node::carry_out(Command& command) {
  Network& network = *world_.network;
  Workload& workload = *world_.workload;
  std::visit(Overloaded{[&](const Reply& c) { workload.on_reply(index_, c); },
                        [&](const Publish& c) { workload.on_publish(index_, c); },
                        [&](const FreeSlot& c) { workload.on_free_slot(index_, c); },
                        [&](const LayoutQuiet& c) { workload.on_quiet(index_, c); },
                        [&](const Resolve& c) { resolve(c); },
                        [&](const ResolvePull& c) { resolve_pull(c); },
                        [&](const CancelResolve& c) { cancelled_resolves_.insert(c.resolve); },
                        [&](const Compile& c) { compile(c); },
                        [&](const Gather& c) { start_gather(c); },
                        [&](const Scatter& c) { start_scatter(c); },
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
  Compiled answer;
  answer.compile = command.compile;
  if (side == nullptr) {  // its worker is gone: the pool is not there any more
    answer.reason = Reason::kWorkerLost;
  } else {
    answer.plan = sim::compile(command, next_plan_++, side->uid);
  }
  world_.after_on(index_, rng_.micros(5, 400), [this, answer] { post(answer); });
}

void Node::resolve_pull(const ResolvePull& command) {
  PullResolved answer = world_.workload->resolve_pull(*command.pull, *command.layout);
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
  world_.after_on(
      index_, rng_.micros(5, 500),
      [this, id = command.resolve, receive = command.receive] { try_resolve(id, receive, 400); });
}

// Answers once there is a link to each node, which takes handshakes.
void Node::try_resolve(ResolveId id, std::shared_ptr<const ReceiveOp> receive, uint32_t tries) {
  if (cancelled_resolves_.contains(id) && rng_.chance(700)) return;
  std::set<uint32_t> peers;
  Resolved answer = world_.workload->resolve(*receive, peers);
  answer.resolve = id;
  bool ready = true;
  if (answer.reason == Reason::kNone)
    for (const uint32_t peer : peers)
      if (!world_.network->link_up(index_, peer)) {
        world_.network->dial(index_, peer);
        ready = false;
      }
  if (ready || tries == 0) {
    if (!ready) {
      answer.reason = Reason::kPeerUnreachable;
      answer.legs.clear();
    }
    if (answer.reason != Reason::kNone) world_.workload->unreachable(receive->key, kCauseLink);
    post(answer);
    return;
  }
  world_.after_on(index_, rng_.micros(1000, 5000),
                  [this, id, receive, tries] { try_resolve(id, receive, tries - 1); });
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
  require(copy.bytes <= copy.region.bytes, "region", "a copy of more bytes than its region has");
  if (copy.gather)
    world_.workload->before_gather(*copy.plan, copy.offset, copy.bytes);
  else
    world_.workload->before_scatter(*copy.plan, copy.offset, copy.bytes);
}

void Node::start_gather(const Gather& command) {
  require(copy_ids_.insert(command.copy).second, "copy", "a copy id is used twice");
  Copy copy{command.copy,
            std::static_pointer_cast<const SimPlan>(command.plan),
            command.offset,
            command.bytes,
            command.region,
            command.check_kind,
            true,
            0,
            0};
  require(copy.plan == nullptr || copy.plan->role == Role::kSender, "copy",
          "a gather by a receiver's plan");
  check_copy(copy);
  copy.use = begin_use(Use::kGather, command.region, "Gather");
  const bool fails = world_.mishap(world_.scenario.faults.copy_failure);
  if (fails) world_.workload->copy_failed(copy.plan->side);
  const bool slow = world_.mishap(world_.scenario.faults.slow_copy);
  const uint64_t key = command.copy.value;
  copies_[key] = std::move(copy);
  const auto steps = static_cast<uint32_t>(rng_.between(1, 4));
  continue_copy(key, steps, rng_.micros(1, 100) * (slow ? 200 : 1), fails);
}

void Node::start_scatter(const Scatter& command) {
  require(copy_ids_.insert(command.copy).second, "copy", "a copy id is used twice");
  Copy copy{command.copy,
            std::static_pointer_cast<const SimPlan>(command.plan),
            command.offset,
            command.bytes,
            command.region,
            command.check.kind,
            false,
            0,
            0};
  require(copy.plan == nullptr || copy.plan->role == Role::kReceiver, "copy",
          "a scatter by a sender's plan");
  check_copy(copy);
  if (!scattered_.insert({copy.plan->id, copy.offset}).second)
    throw Violation("twice", "a chunk is scattered twice for " +
                                 label(*world_.workload->side_by_uid(copy.plan->side)));
  // Two copies into the same page bytes at once: which one wins is anybody's guess.
  for (const auto& [key, other] : copies_) {
    if (other.gather || other.plan->side != copy.plan->side) continue;
    each_piece(*other.plan, other.offset, other.bytes, [&](uint64_t a, uint64_t length, uint64_t) {
      each_piece(*copy.plan, copy.offset, copy.bytes, [&](uint64_t b, uint64_t size, uint64_t) {
        if (!intersect({a, a + length}, {b, b + size}).empty())
          throw Violation("twice", "two scatters write the same bytes at once");
      });
    });
  }
  copy.use = begin_use(Use::kScatter, command.region, "Scatter");
  const uint64_t key = command.copy.value;
  copies_[key] = std::move(copy);
  const Copy& stored = copies_[key];
  if (command.check.kind != CheckKind::kNone &&
      checksum(stored.region, stored.bytes, command.check.kind) != command.check) {
    if ((world_.workload->side_by_uid(stored.plan->side)->transfer->causes & kCauseCorrupt) == 0)
      throw Violation("bytes", "a landed chunk is not what was sent, for " +
                                   label(*world_.workload->side_by_uid(stored.plan->side)));
    world_.after_on(index_, rng_.micros(1, 100),
                    [this, key] { end_copy(key, CopyOutcome::kCheckMismatch, {}); });
    return;
  }
  const bool fails = world_.mishap(world_.scenario.faults.copy_failure);
  if (fails) world_.workload->copy_failed(stored.plan->side);
  const bool slow = world_.mishap(world_.scenario.faults.slow_copy);
  const auto steps = static_cast<uint32_t>(rng_.between(1, 4));
  continue_copy(key, steps, rng_.micros(1, 100) * (slow ? 200 : 1), fails);
}

void Node::continue_copy(uint64_t key, uint32_t steps_left, Duration pause, bool fails) {
  world_.after_on(index_, pause, [this, key, steps_left, pause, fails] {
    Copy& copy = copies_.at(key);
    if (steps_left == 0 || (fails && steps_left == 1)) {
      end_copy(key, fails ? CopyOutcome::kFailed : CopyOutcome::kOk,
               copy.gather ? checksum(copy.region, copy.bytes, copy.kind) : Check{});
      return;
    }
    const uint64_t stop =
        steps_left == 1 ? copy.bytes : copy.done + (copy.bytes - copy.done) / steps_left;
    const uint64_t bytes = stop - copy.done;
    if (bytes != 0) {
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

void Node::end_copy(uint64_t key, CopyOutcome outcome, Check check) {
  const Copy copy = copies_.at(key);
  copies_.erase(key);
  end_use(copy.use);
  post(CopyEnded{copy.id, outcome, check});
}

}  // namespace kvferry::sim
