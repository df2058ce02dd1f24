// What the directory answers on the engine's thread: the usual case, where cards, link and leg
// table are known from earlier transfers and the legs are few. A hop through a task pool costs a
// small transfer more than all else that is done for it here.
#include <algorithm>

#include "daemon/node/directory_impl.h"

namespace kvferry::node {
namespace {

// Planes looked at for one answer, and ranges of needs with each; some tens of nanoseconds apiece.
constexpr uint64_t kStepsAtOnce = 512;
constexpr std::size_t kDpGroupsAtOnce = 16;

uint64_t leg_steps(const mapping::LegTable& table, uint32_t receiver_rank,
                   const std::vector<mapping::GroupNeed>& needs) {
  const std::vector<mapping::Group>& groups = table.receiver().ranks[receiver_rank].groups;
  uint64_t steps = 0;
  for (const mapping::Group& group : groups) steps += group.planes.size();
  for (const mapping::GroupNeed& need : needs)
    steps += 1 + (need.group < groups.size() ? groups[need.group].planes.size() : 1) *
                     need.ranges.size();
  return steps;
}

// Whether the receive's legs are few, and have been worked out before.
bool has_few_legs(const mapping::LegTable& table, const engine::ReceiveOp& receive) {
  const uint32_t rank = receive.layout->rank;
  if (rank >= table.receiver().ranks.size()) return false;
  const std::span<const uint32_t> all = table.sender_dp_groups();
  const std::span<const uint32_t> groups =
      receive.sender_dp_group ? std::span<const uint32_t>(&*receive.sender_dp_group, 1) : all;
  if (groups.size() > kDpGroupsAtOnce) return false;
  const uint64_t each = leg_steps(table, rank, receive.needs);
  uint64_t steps = 0;
  for (const uint32_t group : groups) {
    if (!table.remembers(group, table.receiver().ranks[rank].topology.dp_group)) return false;
    const auto legs = table.legs_of_receiver(group, rank);
    if (!legs) return false;
    steps += each * legs->size();
    if (steps > kStepsAtOnce) return false;
  }
  return true;
}

}  // namespace

LegTablePtr Directory::Impl::known_table(const CardSetPtr& sender, const CardSetPtr& receiver) {
  MutexLock lock(mutex);
  const auto found = tables.find({sender->digest, receiver->digest});
  if (found == tables.end()) return nullptr;
  found->second->used = monotonic_now();
  return found->second->ready;
}

std::optional<engine::Resolved> Directory::Impl::resolved_at_once(
    const engine::ReceiveOp& receive) {
  if (receive.layout->incarnation.is_zero()) return std::nullopt;  // a controller's
  const Result<Ticket> ticket = parse_ticket(receive.ticket);
  const auto* full = ticket ? std::get_if<InstanceTicket>(&*ticket) : nullptr;
  if (full == nullptr) return std::nullopt;
  const Result<CardSetPtr> own = local_set(receive.layout->instance, receive.layout->incarnation);
  if (!own) return std::nullopt;
  CardSetPtr sender;
  if (full->node != config.node) {
    sender = known_remote({full->node, full->instance, full->incarnation}, kHoweverOld);
  } else if (Result<CardSetPtr> here = local_set(full->instance, full->incarnation)) {
    sender = std::move(*here);
  }
  if (sender == nullptr || sender->digest != full->generations) return std::nullopt;
  const LegTablePtr table = known_table(sender, *own);
  if (table == nullptr || !has_few_legs(*table, receive)) return std::nullopt;
  Result<std::vector<engine::ReceiverLeg>> legs = receiver_legs(table, *sender, receive);
  if (!legs) return std::nullopt;
  for (const engine::ReceiverLeg& leg : *legs)
    if (!links.has_link(leg.node)) return std::nullopt;
  engine::Resolved found;
  found.sender_incarnation = sender->instance->incarnation;
  found.cards = digest_of_pair(sender->digest, (*own)->digest);
  found.legs = std::move(*legs);
  return found;
}

std::optional<engine::PullResolved> Directory::Impl::pull_at_once(
    const engine::ResolvePull& command) {
  const engine::MsgPull& pull = *command.pull;
  const std::optional<PeerRef> peer = links.peer_of(command.link);
  if (!peer || !may_pull(*peer, pull) || pull.receiver_incarnation.is_zero()) return std::nullopt;
  const Result<CardSetPtr> sender =
      local_set(command.layout->instance, command.layout->incarnation);
  if (!sender) return std::nullopt;
  CardSetPtr receiver;
  if (peer->node != config.node) {
    receiver =
        known_remote({peer->node, pull.receiver_instance, pull.receiver_incarnation}, kHoweverOld);
  } else if (Result<CardSetPtr> here =
                 local_set(pull.receiver_instance, pull.receiver_incarnation)) {
    receiver = std::move(*here);
  }
  if (receiver == nullptr || !check_pull(command, *sender, receiver, *peer)) return std::nullopt;
  const LegTablePtr table = known_table(*sender, receiver);
  if (table == nullptr || pull.sender_rank >= table->sender().ranks.size() ||
      pull.receiver_rank >= table->receiver().ranks.size() ||
      leg_steps(*table, pull.receiver_rank, pull.needs) > kStepsAtOnce)
    return std::nullopt;
  const uint32_t sender_dp = table->sender().ranks[pull.sender_rank].topology.dp_group;
  const uint32_t receiver_dp = table->receiver().ranks[pull.receiver_rank].topology.dp_group;
  if (!table->remembers(sender_dp, receiver_dp)) return std::nullopt;
  Result<engine::PullResolved> answer = pull_answer(command, table);
  if (!answer) return std::nullopt;
  return std::move(*answer);
}

}  // namespace kvferry::node
