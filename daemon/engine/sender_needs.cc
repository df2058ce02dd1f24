// What receivers need of a send, for a sender that has not computed its pages yet: the union over
// the legs that have come, and when it is whole.
#include <algorithm>
#include <utility>

#include "daemon/engine/core.h"
#include "daemon/mapping/needs.h"

namespace kvferry::engine {
namespace {

// Ranges of one receiver. Beyond it each group's become one that spans them: a sender that sends
// more than is needed is right, and the answer for all places of a send stays small.
constexpr std::size_t kMostRanges = 1024;

void join(std::vector<GroupRanges>& into, const std::vector<GroupRanges>& more) {
  for (const GroupRanges& of : more) {
    if (of.ranges.empty()) continue;
    auto at = std::lower_bound(
        into.begin(), into.end(), of.group,
        [](const GroupRanges& group, uint32_t number) { return group.group < number; });
    if (at == into.end() || at->group != of.group) at = into.insert(at, {of.group, {}});
    at->ranges = mapping::unite_ranges(at->ranges, of.ranges);
  }
  std::size_t ranges = 0;
  for (const GroupRanges& group : into) ranges += group.ranges.size();
  if (ranges <= kMostRanges) return;
  for (GroupRanges& group : into)
    group.ranges = {{group.ranges.front().begin, group.ranges.back().end}};
}

// Whether each of the receiver's legs has had its PULL.
bool whole(const Place& place) {
  return !place.failed && std::none_of(place.legs.begin(), place.legs.end(), [](const auto& leg) {
    return leg.second.fate == LegFate::kExpected || leg.second.fate == LegFate::kFailed;
  });
}

// Another dp group of the sender's has the transfer.
bool given_back(const Place& place) {
  return std::all_of(place.legs.begin(), place.legs.end(),
                     [](const auto& leg) { return leg.second.fate == LegFate::kReleased; });
}

}  // namespace

// A leg of this receiver has been resolved.
void Sender::leg_needs(Send& send, Place& place, const std::vector<GroupRanges>& needs) {
  join(place.needs, needs);
  if (send.record.receiver_ready || !whole(place)) return;
  send.record.receiver_ready = true;
  core_.workers.changed(send, Role::kSender);
}

void Sender::receiver_needs(uint64_t id, const OpRef& op) {
  const Send& send = sends_.at(id);
  if (send.terminal()) {
    core_.reply_error(op, Code::kFailedPrecondition, "TRANSFER_ENDED", "the transfer has ended",
                      "client_handle");
    return;
  }
  Reply answer;
  answer.op = op;
  answer.slot = send.slot;
  answer.state = send.record.state;
  answer.memory_in_use = send.record.memory_in_use;
  for (const auto& [key, place] : send.places) {
    if (place.failed || !key.group_known || given_back(place)) continue;
    answer.receivers.push_back(
        {key.instance, key.incarnation, key.dp_group, whole(place), place.needs});
  }
  core_.emit(std::move(answer));
}

}  // namespace kvferry::engine
