// Workload: transfers between honest workers and the enemy's, which the enemy knows all about.
// However they end, they end in time; what is theirs is given back.
#include <algorithm>

#include "tests/sim/hostile.h"
#include "tests/sim/node.h"
#include "tests/sim/workload.h"

namespace kvferry::sim {

using namespace engine;

void Workload::plan_enemy() {
  enemy_ = std::make_unique<Instance>();
  enemy_->name = "default/enemy";
  enemy_->incarnation.bytes[15] = 0xEE;
  enemy_->ranks = {1, 1, shape_.replicated, shape_.units};
  enemy_->usable = true;
  Rng own(world_.scenario.seed ^ 0x40575);
  to_begin_ += world_.scenario.hostile.transfers;
  for (uint32_t i = 0; i < world_.scenario.hostile.transfers; ++i) {
    const auto at = static_cast<int64_t>(
        own.below(static_cast<uint64_t>(world_.scenario.faults.until.count())));
    world_.after(Duration(at), [this, sends = own.chance(500)] { begin_with_enemy(sends); });
  }
}

void Workload::begin_with_enemy(bool sends) {
  --to_begin_;
  Instance& honest = *instances_[rng_.below(instances_.size())];
  if (!instance_stands(honest)) return;
  ++world_.totals.hostile_transfers;
  Transfer& transfer = new_transfer();
  transfer.causes = kCauseHostile;
  transfer.sender = sends ? &honest : enemy_.get();
  transfer.sender_incarnation = transfer.sender->incarnation;
  const auto group = static_cast<uint32_t>(rng_.below(honest.ranks.dp));
  transfer.tokens = transfer.sender_tokens = rng_.between(1, world_.scenario.max_tokens);
  transfer.lease = rng_.micros(50'000, 500'000);
  transfer.wait = rng_.micros(50'000, 500'000);
  transfer.deadline = rng_.micros(50'000, 800'000);
  if (sends) {
    transfer.sender_group = group;
    make_sender_sides(transfer);
    for (const Side* side : transfer.sides)
      enemy_tasks_.push_back({key_of(*side), side->worker->layout, transfer.tokens});
  } else {
    transfer.receivers.push_back({&honest, group, {}});
    make_receiver_sides(transfer, 0);
    enemy_tasks_.push_back(
        {{transfer.sender->name, transfer.sender_incarnation, transfer.id, transfer.secret},
         nullptr,
         transfer.tokens});
  }
  plan_sides(transfer);
}

bool Workload::with_enemy(const std::string& id) const {
  return enemy_task(id).has_value();
}

std::optional<EnemyTask> Workload::enemy_task(const std::string& id) const {
  for (const EnemyTask& task : enemy_tasks_)
    if (task.key.id == id) return task;
  return std::nullopt;
}

std::pair<uint64_t, uint64_t> Workload::enemy_stream(const MsgPull& pull,
                                                     const std::vector<GroupRanges>& offer) const {
  const SimLayout* layout = nullptr;
  for (const auto& worker : workers_)
    if (worker->layout && worker->layout->instance == pull.receiver_instance &&
        worker->layout->incarnation == pull.receiver_incarnation &&
        worker->layout->rank == pull.receiver_rank)
      layout = worker->layout.get();
  if (layout == nullptr) return {0, 0};
  uint64_t tokens = 0;
  for (const GroupNeed& need : pull.needs)
    for (const Range& range : need.ranges) tokens = std::max(tokens, range.end);
  // As a sender with the same units and blocks in their order would.
  auto mine = std::make_shared<SimLayout>();
  mine->pool = std::make_shared<Pool>(shape_, layout->pool->units,
                                      static_cast<uint32_t>(ceil_div(tokens, kTokensPerBlock) + 1));
  auto send = std::make_shared<SendOp>();
  send->layout = mine;
  for (uint32_t g = 0; g < shape_.groups; ++g) {
    GroupBlocks blocks{g, 0, {}};
    for (uint64_t i = 0; i <= ceil_div(tokens, kTokensPerBlock); ++i)
      blocks.ids.push_back(static_cast<int32_t>(i));
    send->blocks.push_back(std::move(blocks));
  }
  auto context = std::make_shared<SimContext>();
  context->units = layout->pool->units;
  context->weak = world_.scenario.weak_digests;
  Compile compile;
  compile.context = context;
  compile.send = send;
  compile.pull = std::make_shared<MsgPull>(pull);
  compile.offer = offer;
  if (offer.empty())
    for (const GroupNeed& need : pull.needs) compile.offer.push_back({need.group, need.ranges});
  const auto plan = sim::compile(compile, 1, 0);
  return {plan->bytes, plan->digest};
}

// The legs of a Receive whose sender is the enemy.
Resolved Workload::resolve_enemy(const ReceiveOp& receive, bool declines,
                                 std::set<uint32_t>& nodes) const {
  Resolved answer;
  nodes.insert(world_.hostile->index());
  answer.sender_incarnation = enemy_->incarnation;
  answer.cards = cards_of(enemy_->incarnation, receive.layout->incarnation);
  ReceiverLeg leg;
  leg.node = Hostile::kName;
  leg.carries_aux = true;
  // A claim or a decline knows no more than the layout's name; its worker may be gone.
  const auto own = std::find_if(instances_.begin(), instances_.end(), [&](const auto& of) {
    return of->name == receive.layout->instance && of->incarnation == receive.layout->incarnation;
  });
  if (own == instances_.end()) {
    if (declines)
      answer.legs.push_back(std::move(leg));
    else
      answer.reason = Reason::kPeerUnreachable;
    return answer;
  }
  const uint32_t rank = receive.layout->rank;
  const Range units = (*own)->ranks.units_of(rank);
  leg.expected_bytes = expected_bytes(shape_, {0, rank, units, false, true}, receive.needs);
  auto context = std::make_shared<SimContext>();
  context->receiver_rank = rank;
  context->units = units;  // the enemy's one rank holds everything
  context->weak = world_.scenario.weak_digests;
  leg.context = std::move(context);
  answer.legs.push_back(std::move(leg));
  return answer;
}

// A pull that came over the enemy's link and has proven its secret. The directory knows which node
// made which card.
PullResolved Workload::resolve_enemy_pull(const MsgPull& pull, const LayoutHandle& handle) const {
  if (!with_enemy(pull.transfer.id))
    throw Violation("told", "the enemy is taken for a receiver of " + pull.transfer.id);
  const auto& layout = static_cast<const SimLayout&>(handle);
  PullResolved answer;
  if (pull.receiver_instance != enemy_->name || pull.receiver_incarnation != enemy_->incarnation ||
      pull.receiver_rank != 0) {
    answer.reason = Reason::kPermission;
    return answer;
  }
  if (pull.cards != cards_of(layout.incarnation, enemy_->incarnation)) {
    answer.reason = Reason::kStaleCards;
    return answer;
  }
  for (const GroupNeed& need : pull.needs)
    if (need.group >= shape_.groups) {
      answer.reason = Reason::kProtocol;
      return answer;
    }
  answer.legs.push_back({0, false, true});
  auto context = std::make_shared<SimContext>();
  context->sender_rank = layout.rank;
  context->units = layout.pool->units;
  context->weak = world_.scenario.weak_digests;
  answer.context = std::move(context);
  answer.expected_bytes =
      expected_bytes(shape_, {layout.rank, 0, layout.pool->units, false, true}, pull.needs);
  for (const GroupNeed& need : pull.needs) answer.needs.push_back({need.group, need.ranges});
  return answer;
}

}  // namespace kvferry::sim
