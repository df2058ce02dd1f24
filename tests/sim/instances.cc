// Workload: instances, workers, their deaths and returns, and what the directory knows of them.
#include <algorithm>

#include "tests/sim/network.h"
#include "tests/sim/node.h"
#include "tests/sim/workload.h"

namespace kvferry::sim {

using namespace engine;
using std::chrono::milliseconds;

namespace {

constexpr uint32_t kBlocks = 96;  // of each group, each rank
constexpr uint32_t kSlots = 256;

std::shared_ptr<SimContext> context_for(const Leg& leg, bool weak, bool skewed) {
  auto context = std::make_shared<SimContext>();
  context->sender_rank = leg.sender_rank;
  context->receiver_rank = leg.receiver_rank;
  context->units = leg.units;
  context->skewed = skewed;
  context->weak = weak;
  return context;
}

}  // namespace

Digest16 cards_of(const Incarnation& sender, const Incarnation& receiver) {
  Digest16 digest;
  for (std::size_t i = 0; i < 8; ++i) {
    digest.bytes[i] = sender.bytes[i];
    digest.bytes[8 + i] = receiver.bytes[i];
  }
  return digest;
}

Workload::Workload(World& world)
    : world_(world),
      rng_(mix(world.scenario.seed ^ 0x3073)),
      shape_{world.scenario.groups, world.scenario.layers_per_group,
             world.scenario.replicated ? 1U : 4U, world.scenario.replicated,
             world.scenario.zero_tail} {}

Instance& Workload::make_instance(std::vector<uint32_t> nodes, Rng& rng) {
  auto instance = std::make_unique<Instance>();
  instance->name = "default/i" + std::to_string(instances_.size());
  instance->ranks = {uint32_t{1} << rng.below(3), world_.scenario.data_parallel ? 2U : 1U,
                     shape_.replicated, shape_.units};
  if (world_.scenario.fan_out) instance->ranks.tp = instances_.size() % 2 == 0 ? 1 : 4;
  const uint32_t ranks = instance->ranks.tp * instance->ranks.dp;
  for (uint32_t rank = 0; rank < ranks; ++rank) {
    auto worker = std::make_unique<Worker>();
    worker->node = nodes[rank % nodes.size()];
    worker->instance = instance.get();
    worker->rank = rank;
    instance->workers.push_back(worker.get());
    workers_.push_back(std::move(worker));
  }
  instances_.push_back(std::move(instance));
  return *instances_.back();
}

void Workload::make_instances() {
  if (world_.scenario.spread) {
    make_instance({0, 1}, rng_);
    make_instance({2}, rng_);
    if (rng_.chance(500)) make_instance({0}, rng_);
    if (rng_.chance(500)) make_instance({1, 2}, rng_);
  } else {
    for (uint32_t n = 0; n < world_.nodes.size(); ++n) make_instance({n}, rng_);
    if (rng_.chance(400))
      make_instance({static_cast<uint32_t>(rng_.below(world_.nodes.size()))}, rng_);
  }
  apart_ = instances_.size();
  make_neighbours();
  for (auto& instance : instances_) revive(*instance);
}

// One more on some node, so that there are two, and perhaps one with ranks there and elsewhere.
void Workload::make_neighbours() {
  if (world_.scenario.habits.local == 0) return;
  Rng own(world_.scenario.seed ^ 0x10CC);
  const auto nodes = static_cast<uint32_t>(world_.nodes.size());
  const auto node = static_cast<uint32_t>(own.below(nodes));
  make_instance({node}, own);
  if (own.chance(500)) make_instance({node, (node + 1) % nodes}, own);
}

void Workload::attach(Worker& worker) {
  Node& node = *world_.nodes[worker.node];
  worker.id = {next_worker_++};
  worker.life = node.life();
  worker.sides.clear();
  worker.ops.clear();
  worker.words.clear();
  worker.free_blocks.assign(shape_.groups, {});
  for (auto& free : worker.free_blocks)
    for (uint32_t b = 0; b < kBlocks; ++b) free.insert(b);
  workers_by_id_[worker.id] = &worker;
  auto layout = std::make_shared<SimLayout>();
  layout->worker = worker.id;
  layout->instance = worker.instance->name;
  layout->incarnation = worker.instance->incarnation;
  layout->rank = worker.rank;
  layout->dp_group = worker.rank / worker.instance->ranks.tp;
  layout->pool =
      std::make_shared<Pool>(shape_, worker.instance->ranks.units_of(worker.rank), kBlocks);
  layout->instance_ptr = worker.instance;
  if (world_.scenario.habits.reuse != 0) {
    layout->reuse_space.bytes[0] = 1;
    for (uint32_t g = 0; g < shape_.groups; ++g)
      layout->reuse_groups.push_back({kTokensPerBlock, 0, g});
  }
  layout->node = worker.node;
  layout->arena = static_cast<uint32_t>(mix(world_.scenario.seed ^ mix(worker.id.value)) %
                                        world_.scenario.ordinary_arenas(worker.node));
  layout->pages_arena = layout->arena;
  layout->mapped_arena = world_.scenario.mapped_arena(worker.node, worker.id.value);
  worker.layout = std::move(layout);
  worker.quiet_due = false;
  node.post(WorkerAttached{worker.id, "default", kSlots});
}

bool Workload::instance_stands(const Instance& instance) const {
  if (!instance.usable) return false;
  return std::all_of(instance.workers.begin(), instance.workers.end(), [this](const Worker* w) {
    const Node& node = *world_.nodes[w->node];
    return w->id && node.alive() && node.life() == w->life && !node.draining();
  });
}

void Workload::revive(Instance& instance) {
  instance.incarnation = {};
  const uint64_t number = next_incarnation_++;
  for (std::size_t i = 0; i < 8; ++i)
    instance.incarnation.bytes[i] = static_cast<uint8_t>(number >> (8 * i));
  for (Worker* worker : instance.workers) attach(*worker);
  instance.usable = true;
}

void Workload::revive_soon(Instance& instance) {
  ++planned_;
  world_.after(rng_.micros(1000, 60000), [this, &instance] {
    --planned_;
    if (instance.usable) return;
    const bool nodes_up =
        std::all_of(instance.workers.begin(), instance.workers.end(), [this](const Worker* w) {
          return world_.nodes[w->node]->alive() && !world_.nodes[w->node]->draining();
        });
    const bool quiet = std::none_of(instance.workers.begin(), instance.workers.end(),
                                    [](const Worker* w) { return w->quiet_due; });
    if (nodes_up && quiet)
      revive(instance);
    else
      revive_soon(instance);
  });
}

// The worker's life is over: nobody is told of its sides any more.
void Workload::lose_sides(Worker& worker, uint32_t cause) {
  for (auto& [handle, side] : worker.sides) {
    if (!side->closed) blame(*side->transfer, cause);
    side->lost = true;
    side->blocks.clear();
  }
  worker.sides.clear();
  worker.ops.clear();
  worker.cache.clear();
  workers_by_id_.erase(worker.id);
  worker.id = {};
}

// Every rank of the instance goes: `victim` dies, the others die too or take their layout back.
void Workload::retire(Instance& instance, bool abruptly, Worker* victim) {
  if (!instance.usable) return;
  instance.usable = false;
  for (Worker* worker : instance.workers) {
    if (!worker->id) continue;
    Node& node = *world_.nodes[worker->node];
    const bool here = node.alive() && node.life() == worker->life;
    if (here && !abruptly && worker != victim) {
      for (auto& [handle, side] : worker->sides)
        if (!side->closed) blame(*side->transfer, kCauseUnregister);
      worker->quiet_due = true;
      node.post(UnregisterLayout{worker->layout, Reason::kUnregistered});
      continue;
    }
    const WorkerId id = worker->id;
    lose_sides(*worker, kCauseWorker);
    if (here) {
      node.post(WorkerGone{id});
      node.words_changed();
    }
  }
  revive_soon(instance);
}

void Workload::worker_dies() {
  Instance& instance = *instances_[rng_.below(instances_.size())];
  if (!instance.usable) return;
  Worker* victim = instance.workers[rng_.below(instance.workers.size())];
  world_.note("a worker of " + instance.name + " dies on node" + std::to_string(victim->node));
  retire(instance, rng_.chance(500), victim);
}

void Workload::unregister_something() {
  Instance& instance = *instances_[rng_.below(instances_.size())];
  world_.note("layouts of " + instance.name + " are taken back");
  retire(instance, false, nullptr);
}

void Workload::on_quiet(uint32_t node, const LayoutQuiet& quiet) {
  Worker* worker = worker_of(node, quiet.layout->worker);
  if (worker == nullptr) return;
  require(worker->quiet_due, "quiet", "LayoutQuiet for a layout that nobody takes back");
  require(worker->layout == quiet.layout, "quiet", "LayoutQuiet for another layout");
  require(!world_.nodes[node]->copying_layout(quiet.layout.get()), "quiet",
          "LayoutQuiet while a copy runs");
  for (const auto& [handle, side] : worker->sides)
    require(!side->accepted || side->closed || (side->terminal() && side->released()), "quiet",
            "LayoutQuiet while a transfer is open");
  worker->quiet_due = false;
  worker->layout->quiet = true;
  // What it still has to close dies with its lifeline.
  const WorkerId id = worker->id;
  lose_sides(*worker, kCauseUnregister);
  world_.nodes[node]->post(WorkerGone{id});
}

void Workload::daemon_died(uint32_t node) {
  for (auto& worker : workers_)
    if (worker->node == node && worker->id) {
      lose_sides(*worker, kCauseDaemon);
      worker->quiet_due = false;
    }
  for (auto& instance : instances_) {
    const bool here = std::any_of(instance->workers.begin(), instance->workers.end(),
                                  [node](const Worker* w) { return w->node == node; });
    if (!here) continue;
    if (instance->usable)
      retire(*instance, true, nullptr);
    else
      revive_soon(*instance);
  }
}

void Workload::draining(uint32_t node) {
  for (auto& transfer : transfers_)
    for (const auto& side : sides_)
      if (side->transfer == transfer.get() && side->worker->node == node)
        blame(*transfer, kCauseDrain);
}

// ---- the directory -----------------------------------------------------------------------------

Side* Workload::side_of(WorkerId worker, uint64_t handle) const {
  const auto found = workers_by_id_.find(worker);
  if (found == workers_by_id_.end()) return nullptr;
  const auto side = found->second->sides.find(handle);
  return side == found->second->sides.end() ? nullptr : side->second;
}

Side* Workload::side_by_uid(uint64_t uid) const {
  return sides_[uid - 1].get();
}

Worker* Workload::worker_of(uint32_t node, WorkerId id) const {
  const auto found = workers_by_id_.find(id);
  if (found == workers_by_id_.end()) return nullptr;
  Worker* worker = found->second;
  const Node& daemon = *world_.nodes[node];
  require(worker->node == node && worker->life == daemon.life(), "worker",
          "a command names a worker of another daemon");
  return worker;
}

bool Workload::holds(const WatchCondition& watch) const {
  const auto found = workers_by_id_.find(watch.worker);
  if (found == workers_by_id_.end()) return false;
  if (watch.ready.kind == ReadyCondition::Kind::kHostSynced) return true;
  return found->second->words.at(watch.ready.word) >= watch.ready.value;
}

Resolved Workload::resolve(const ReceiveOp& receive, bool declines,
                           std::set<uint32_t>& nodes) const {
  if (enemy_ && receive.key.instance == enemy_->name)
    return resolve_enemy(receive, declines, nodes);
  Resolved answer;
  const LayoutHandle& layout = *receive.layout;
  const Instance* sender = nullptr;
  const Instance* own = nullptr;
  for (const auto& instance : instances_) {
    if (instance->name == receive.key.instance && instance->incarnation == receive.key.incarnation)
      sender = instance.get();
    if (instance->name == layout.instance && instance->incarnation == layout.incarnation)
      own = instance.get();
  }
  if (sender != nullptr && sender->usable && own == nullptr && declines) {
    answer.sender_incarnation = sender->incarnation;
    for (uint32_t rank = 0; rank < sender->workers.size(); ++rank) {
      ReceiverLeg leg;
      leg.sender_rank = rank;
      leg.node = world_.nodes[sender->workers[rank]->node]->name();
      nodes.insert(sender->workers[rank]->node);
      answer.legs.push_back(std::move(leg));
    }
    return answer;
  }
  if (sender == nullptr || !sender->usable || own == nullptr) {
    answer.reason = Reason::kPeerUnreachable;
    answer.message = "no such instance any more";
    return answer;
  }
  answer.sender_incarnation = sender->incarnation;
  answer.cards = cards_of(sender->incarnation, layout.incarnation);
  const Side* side = side_of(layout.worker, receive.client_handle);
  const bool skewed = side != nullptr && side->transfer->skewed;
  for (uint32_t group = 0; group < sender->ranks.dp; ++group) {
    if (receive.sender_dp_group && *receive.sender_dp_group != group) continue;
    for (const Leg& leg : legs_between(sender->ranks, group, own->ranks, layout.dp_group)) {
      if (leg.receiver_rank != layout.rank) continue;
      const uint32_t node = sender->workers[leg.sender_rank]->node;
      nodes.insert(node);
      ReceiverLeg out;
      out.sender_rank = leg.sender_rank;
      out.sender_dp_group = group;
      out.node = world_.nodes[node]->name();
      out.empty = leg.empty;
      out.carries_aux = leg.carries_aux;
      out.expected_bytes = expected_bytes(shape_, leg, receive.needs);
      out.context = context_for(leg, world_.scenario.weak_digests, skewed);
      answer.legs.push_back(std::move(out));
    }
  }
  return answer;
}

PullResolved Workload::resolve_pull(const MsgPull& pull, const LayoutHandle& handle) const {
  PullResolved answer;
  const auto& layout = static_cast<const SimLayout&>(handle);
  const Instance* receiver = nullptr;
  for (const auto& instance : instances_)
    if (instance->name == pull.receiver_instance &&
        instance->incarnation == pull.receiver_incarnation)
      receiver = instance.get();
  if (receiver == nullptr ||
      pull.cards != cards_of(layout.incarnation, pull.receiver_incarnation)) {
    answer.reason = Reason::kStaleCards;
    return answer;
  }
  answer.receiver_dp_group = pull.receiver_rank / receiver->ranks.tp;
  for (const Leg& leg : legs_between(layout.instance_ptr->ranks, layout.dp_group, receiver->ranks,
                                     answer.receiver_dp_group)) {
    if (leg.sender_rank != layout.rank) continue;
    answer.legs.push_back({leg.receiver_rank, leg.empty, leg.carries_aux});
    if (leg.receiver_rank != pull.receiver_rank) continue;
    answer.context = context_for(leg, world_.scenario.weak_digests, false);
    answer.expected_bytes = expected_bytes(shape_, leg, pull.needs);
    if (leg.empty) continue;
    for (const GroupNeed& need : pull.needs) answer.needs.push_back({need.group, need.ranges});
  }
  if (answer.context == nullptr) answer.reason = Reason::kProtocol;
  return answer;
}

}  // namespace kvferry::sim
