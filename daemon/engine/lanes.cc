#include "daemon/engine/lanes.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "daemon/base/check.h"
#include "daemon/engine/core.h"

namespace kvferry::engine {
namespace {

constexpr uint64_t kMaxHeldBytes = 4 << 20;  // of a link's lanes together, behind gaps
constexpr std::size_t kMostEarly = 8;        // a HELLO and PINGs: nothing else precedes our HELLO

// Roughly what a held message takes.
uint64_t size_of(const ControlMessage& message) {
  uint64_t bytes = 256;
  if (const auto* pull = std::get_if<MsgPull>(&message)) {
    for (const GroupNeed& need : pull->needs) bytes += 32 + 16 * need.ranges.size();
    bytes += sizeof(CreditGrant) * pull->credits.size();
  } else if (const auto* update = std::get_if<MsgUpdate>(&message)) {
    bytes += sizeof(CreditGrant) * update->credits.size() + 16 * update->acks.size();
  } else if (const auto* slice = std::get_if<MsgSlice>(&message)) {
    for (const GroupRanges& ranges : slice->ranges) bytes += 16 + 16 * ranges.ranges.size();
    if (slice->aux) bytes += slice->aux->size();
  }
  return bytes;
}

void forget_held(Link& link, Lane& lane) {
  for (const auto& [number, message] : lane.held) link.held_bytes -= size_of(message);
  lane.held.clear();
}

TimerKey lane_timer(TimerKind kind, LinkId link, uint32_t lane) {
  return {kind, link.value, lane};
}

std::vector<LaneFlow*> flows_up(Link& link) {
  std::vector<LaneFlow*> flows;
  flows.reserve(link.lanes.size());
  for (Lane& lane : link.lanes)
    flows.push_back(lane.state == LaneState::kUp ? &lane.flow : nullptr);
  return flows;
}

}  // namespace

Link* Lanes::find(LinkId id) {
  const auto it = links_.find(id);
  return it == links_.end() ? nullptr : &it->second;
}

const Link* Lanes::find(LinkId id) const {
  const auto it = links_.find(id);
  return it == links_.end() ? nullptr : &it->second;
}

Link* Lanes::find_node(const std::string& node) {
  const auto it = by_node_.find(node);
  return it == by_node_.end() ? nullptr : &links_.at(it->second);
}

Link* Lanes::find_life(const std::string& node, const BootId& boot) {
  Link* link = find_node(node);
  if (flawed(Flaw::kLifeByBoot))
    for (auto& [id, of] : links_)
      if (of.boot == boot && !of.looped()) link = &of;
  return link != nullptr && link->boot == boot && !link->looped() ? link : nullptr;
}

Link* Lanes::find_life(uint64_t peer, const BootId& boot) {
  for (auto& [id, link] : links_)
    if (link.peer == peer && link.boot == boot && !link.looped()) return &link;
  return nullptr;
}

// The lane that `ref` names, if that epoch of it is in use.
Lane* Lanes::current(const LaneRef& ref, Link*& link) {
  link = find(ref.link);
  if (link == nullptr) {
    core_.dropped(DropCause::kUnknownLink);
    return nullptr;
  }
  if (ref.lane >= link->lanes.size()) {
    core_.dropped(DropCause::kProtocol);
    return nullptr;
  }
  Lane& lane = link->lanes[ref.lane];
  if (lane.epoch != ref.epoch || lane.state == LaneState::kDown) {
    core_.dropped(DropCause::kOldEpoch);
    return nullptr;
  }
  return &lane;
}

// ---- links ------------------------------------------------------------------------------------

void Lanes::link_up(const LinkUp& event) {
  if (event.link == kLoopedLink || event.node == core_.config.node) {  // needs no other link
    core_.emit(CloseLink{event.link, Reason::kProtocol});
    return;
  }
  if (find(event.link) != nullptr) return;
  if (Link* old = find_node(event.node)) end_link(old->id, Reason::kPeerLost, true);
  Link& link = links_[event.link];
  link.id = event.link;
  link.node = event.node;
  by_node_[link.node] = link.id;
  link.peer = peers_.try_emplace(link.node, peers_.size() + 1).first->second;
  link.boot = event.boot;
  link.initiator = event.initiator;
  link.chunk_bytes = std::clamp<uint64_t>(event.chunk_bytes, 1, core_.config.chunk_bytes);
  link.max_credits = std::max<uint32_t>(event.max_credits, 1);
  link.check = event.check;
  link.lanes.resize(std::clamp<uint32_t>(event.lanes, 1, 256));
  link.heard = core_.now;
  core_.receiver.link_up(link);
  for (uint32_t lane = 0; lane < link.lanes.size(); ++lane) connect(link, lane);
  core_.timers.set({TimerKind::kPing, link.id.value, 0}, core_.now + core_.config.ping_interval);
  core_.timers.set({TimerKind::kLinkSilence, link.id.value, 0},
                   core_.now + core_.config.silence_limit);
}

void Lanes::link_ended(const LinkEnded& event) {
  if (find(event.link) != nullptr) end_link(event.link, event.reason, false);
}

void Lanes::process_gone(const PeerProcessGone& event) {
  if (const Link* link = find_life(event.node, event.boot))
    end_link(LinkId{link->id}, Reason::kPeerLost, true);
}

void Lanes::arena_lent(const ArenaLent& event) {
  const auto& arenas = core_.config.arenas;
  KVFERRY_CHECK(event.arena < arenas.size() && arenas[event.arena].mapped,
                "only mapped arenas are lent");
  Link* link = event.link == kLoopedLink ? nullptr : find(event.link);
  if (link != nullptr) link->lendable.insert(event.arena);
}

void Lanes::arena_mapped(const ArenaMapped& event) {
  Link* link = event.link == kLoopedLink ? nullptr : find(event.link);
  if (link == nullptr || !link->mapped.insert(event.arena).second) return;
  (void)send(*link, MsgMapped{event.arena});
}

void Lanes::end_link(LinkId id, Reason reason, bool close) {
  Link& link = links_.at(id);
  ++core_.stats.links_lost;
  link.dying = true;
  link.control.reset();
  for (uint32_t lane = 0; lane < link.lanes.size(); ++lane) {
    lane_down(link, lane, false);
    core_.timers.cancel(lane_timer(TimerKind::kLaneRetry, id, lane));
  }
  core_.timers.cancel({TimerKind::kPing, id.value, 0});
  core_.timers.cancel({TimerKind::kLinkSilence, id.value, 0});
  // No message goes out any more: all lanes are down.
  core_.sender.link_dead(link);
  core_.receiver.link_dead(link);
  by_node_.erase(link.node);
  links_.erase(id);
  if (close) core_.emit(CloseLink{id, reason});
}

void Lanes::protocol_error(LinkId id) {
  core_.dropped(DropCause::kProtocol);
  Link* link = find(id);
  if (link == nullptr) return;
  ++link->protocol_errors;
  to_flush_.insert(id);
}

// ---- lanes coming and going -------------------------------------------------------------------

void Lanes::connect(Link& link, uint32_t index) {
  Lane& lane = link.lanes[index];
  lane.state = LaneState::kConnecting;
  lane.next_out = 0;
  lane.next_in = 0;
  forget_held(link, lane);
  lane.flow = LaneFlow(link.chunk_bytes);
  lane.hello_seen = false;
  lane.heard = core_.now;
  core_.emit(ConnectLane{{link.id, index, lane.epoch}});
  core_.timers.set(lane_timer(TimerKind::kLaneSilence, link.id, index),
                   core_.now + core_.config.silence_limit);
}

void Lanes::lane_connected(const LaneRef& ref) {
  Link* link = nullptr;
  Lane* lane = current(ref, link);
  if (lane == nullptr || lane->state != LaneState::kConnecting) return;
  lane->state = LaneState::kHello;
  send_on(*link, ref.lane, MsgHello{false});
  if (!lane->hello_seen) return;
  send_on(*link, ref.lane, MsgHello{true});
  lane_up(*link, ref.lane);
}

void Lanes::hello_in(Link& link, uint32_t index, const MsgHello& message) {
  Lane& lane = link.lanes[index];
  if (!message.answer) {
    lane.hello_seen = true;
    if (lane.state == LaneState::kConnecting) return;  // answered once there is an endpoint
    send_on(link, index, MsgHello{true});
  }
  if (lane.state == LaneState::kHello) lane_up(link, index);
}

void Lanes::lane_up(Link& link, uint32_t index) {
  Lane& lane = link.lanes[index];
  lane.state = LaneState::kUp;
  lane.backoff = Duration{};
  core_.timers.cancel(lane_timer(TimerKind::kLaneRetry, link.id, index));
  if (!link.control) choose_control(link);
}

void Lanes::lane_failed(const LaneRef& ref) {
  Link* link = nullptr;
  if (current(ref, link) != nullptr) lane_down(*link, ref.lane, true);
}

void Lanes::give_up(const LaneRef& ref) {
  Link* link = find(ref.link);
  if (link == nullptr || ref.lane >= link->lanes.size()) return;
  const Lane& lane = link->lanes[ref.lane];
  if (lane.epoch == ref.epoch && lane.state != LaneState::kDown) lane_down(*link, ref.lane, true);
}

void Lanes::peer_lane_down(const LaneRef& ref) {
  Link* link = nullptr;
  if (current(ref, link) != nullptr) lane_down(*link, ref.lane, false);
}

void Lanes::lane_down(Link& link, uint32_t index, bool tell) {
  Lane& lane = link.lanes[index];
  if (lane.state == LaneState::kDown) return;
  lane.state = LaneState::kDown;
  ++core_.stats.lane_downs;
  forget_held(link, lane);
  lane.flow = LaneFlow(link.chunk_bytes);
  core_.timers.cancel(lane_timer(TimerKind::kLaneSilence, link.id, index));
  core_.timers.cancel(lane_timer(TimerKind::kGap, link.id, index));
  const LaneRef ref{link.id, index, lane.epoch};
  if (rails_) core_.emit(CloseLane{ref});
  const bool was_control = link.control == index;
  if (was_control) link.control.reset();
  core_.sender.lane_down(link, index, lane.epoch);
  core_.receiver.lane_down(link, index, lane.epoch);
  if (was_control || !link.control) {
    choose_control(link);
  } else {
    link.resync_due = true;
    to_flush_.insert(link.id);
  }
  if (tell) {
    if (link.control)
      send_on(link, *link.control, MsgLaneDown{index, ref.epoch});
    else
      core_.emit(TellLaneDown{ref});
  }
  retry_later(link, index);
}

void Lanes::choose_control(Link& link) {
  if (link.dying || !rails_) return;
  const auto old = std::find_if(link.lanes.begin(), link.lanes.end(),
                                [](const Lane& lane) { return lane.state == LaneState::kUp; });
  if (old == link.lanes.end()) return;
  link.control = static_cast<uint32_t>(old - link.lanes.begin());
  if (flawed(Flaw::kOldNumbers) && link.had_control)
    link.lanes[*link.control].next_out += link.lanes.front().next_out;
  resync(link);
}

void Lanes::resync(Link& link) {
  link.resync_due = false;
  const bool first = !std::exchange(link.had_control, true);
  if (!first) ++core_.stats.resyncs;
  if (flawed(Flaw::kNoResync) && !first) return;
  core_.receiver.resync(link);
  core_.claims.resync(link);
  core_.sender.resync(link);
}

void Lanes::flush() {
  // Where no control lane is up, the next one starts with the resync.
  for (const LinkId id : std::exchange(to_flush_, {})) {
    Link* link = find(id);
    if (link == nullptr) continue;
    if (link->protocol_errors > kMaxProtocolErrors && !link->looped())
      end_link(id, Reason::kProtocol, true);
    else if (link->resync_due && link->control)
      resync(*link);
  }
}

void Lanes::retry_later(Link& link, uint32_t index) {
  if (!link.initiator) return;
  Lane& lane = link.lanes[index];
  lane.backoff = lane.backoff == Duration{}
                     ? core_.config.lane_retry_first
                     : std::min(2 * lane.backoff, core_.config.lane_retry_most);
  core_.timers.set(lane_timer(TimerKind::kLaneRetry, link.id, index), core_.now + lane.backoff);
}

void Lanes::lane_reopened(const LaneRef& ref) {
  Link* link = find(ref.link);
  if (link == nullptr || ref.lane >= link->lanes.size()) return;
  Lane& lane = link->lanes[ref.lane];
  if (ref.epoch <= lane.epoch) return;
  lane_down(*link, ref.lane, false);  // the peer has seen it break, we had not
  core_.timers.cancel(lane_timer(TimerKind::kLaneRetry, ref.link, ref.lane));
  lane.epoch = ref.epoch;
  connect(*link, ref.lane);
  for (MessageIn& message : std::exchange(lane.early, {}))
    if (message.lane == ref) message_in(message);
}

// The peer has taken up what was proposed, and its HELLO may come before its answer. Without it the
// lane would be up on its side alone, until the gap has lasted too long.
bool Lanes::keep_early(const MessageIn& event) {
  Link* link = find(event.lane.link);
  if (link == nullptr || event.lane.lane >= link->lanes.size()) return false;
  Lane& lane = link->lanes[event.lane.lane];
  const bool first = std::holds_alternative<MsgHello>(event.message) ||
                     std::holds_alternative<MsgPing>(event.message);
  if (event.lane.epoch != lane.asked || lane.asked <= lane.epoch || !first ||
      lane.early.size() >= kMostEarly)
    return false;
  lane.early.push_back(event);
  return true;
}

void Lanes::lane_reopen_failed(const LaneRef& ref) {
  Link* link = find(ref.link);
  if (link == nullptr || ref.lane >= link->lanes.size()) return;
  if (link->lanes[ref.lane].state == LaneState::kDown) retry_later(*link, ref.lane);
}

void Lanes::rails_up() {
  rails_ = true;
  for (auto& [id, link] : links_) {
    for (uint32_t lane = 0; lane < link.lanes.size(); ++lane)
      if (link.lanes[lane].state == LaneState::kDown) {
        link.lanes[lane].backoff = Duration{};
        retry_later(link, lane);
      }
  }
}

void Lanes::rails_died() {
  rails_ = false;  // there is nothing left that could be closed
  for (auto& [id, link] : links_) {
    link.control.reset();
    for (uint32_t lane = 0; lane < link.lanes.size(); ++lane) lane_down(link, lane, true);
  }
  // The process is gone: that ends every request it had.
  core_.receiver.rails_died();
  core_.sender.rails_died();
}

// ---- sending ----------------------------------------------------------------------------------

void Lanes::send_on(Link& link, uint32_t index, ControlMessage message) {
  Lane& lane = link.lanes[index];
  core_.emit(SendMessage{{link.id, index, lane.epoch}, lane.next_out++, std::move(message)});
}

bool Lanes::send(Link& link, ControlMessage message) {
  if (link.looped()) {
    looped_.emplace_back(Role::kSender, std::move(message));
    return true;
  }
  if (!link.control) return false;
  send_on(link, *link.control, std::move(message));
  return true;
}

void Lanes::refuse(const LaneRef& ref, const MsgRefuse& message) {
  if (flawed(Flaw::kNoRefuse)) return;
  const Link* link = find(ref.link);
  if (link == nullptr) return;
  LaneRef lane = ref;
  if (flawed(Flaw::kRefuseByControl) && link->control)
    lane = {ref.link, *link->control, link->lanes[*link->control].epoch};
  if (link->lanes[lane.lane].epoch == lane.epoch &&
      link->lanes[lane.lane].state != LaneState::kDown)
    core_.emit(SendRefuse{lane, message});
}

std::optional<uint32_t> Lanes::offer_lane(Link& link, uint64_t bytes) {
  const std::vector<LaneFlow*> flows = flows_up(link);
  const std::size_t lane = link.choice.pick(flows, bytes);
  if (lane == flows.size()) return std::nullopt;
  return static_cast<uint32_t>(lane);
}

uint64_t Lanes::carry(Link& link, uint32_t lane, uint64_t bytes) {
  return link.choice.give(flows_up(link), lane, bytes, core_.now);
}

bool Lanes::up(const Link& link, uint32_t lane, uint32_t epoch) const {
  return lane < link.lanes.size() && link.lanes[lane].epoch == epoch &&
         link.lanes[lane].state != LaneState::kDown;
}

// ---- receiving --------------------------------------------------------------------------------

void Lanes::heard(Link& link, uint32_t index) {
  link.heard = core_.now;
  link.lanes[index].heard = core_.now;
}

void Lanes::message_in(MessageIn& event) {
  if (keep_early(event)) return;
  Link* link = nullptr;
  Lane* lane = current(event.lane, link);
  if (lane == nullptr) return;
  const LinkId id = event.lane.link;
  const uint32_t index = event.lane.lane;
  heard(*link, index);
  if (flawed(Flaw::kUpdateFirst)) {
    dispatch(id, index, event.message);
    return;
  }
  if (event.sequence < lane->next_in || lane->held.contains(event.sequence)) {
    core_.dropped(DropCause::kDuplicate);
    return;
  }
  if (event.sequence > lane->next_in) {
    link->held_bytes += size_of(event.message);
    lane->held.emplace(event.sequence, std::move(event.message));
    if (lane->held.size() > core_.config.max_held_messages || link->held_bytes > kMaxHeldBytes) {
      core_.dropped(DropCause::kLimit);
      lane_down(*link, index, true);
      return;
    }
    if (!flawed(Flaw::kNoGapTimer) && !core_.timers.pending(lane_timer(TimerKind::kGap, id, index)))
      core_.timers.set(lane_timer(TimerKind::kGap, id, index),
                       core_.now + core_.config.silence_limit);
    return;
  }
  const bool was_gap = !lane->held.empty();
  ControlMessage message = std::move(event.message);
  while (true) {
    ++lane->next_in;
    dispatch(id, index, message);
    // What it said may have ended the lane or the link.
    lane = current(event.lane, link);
    if (lane == nullptr) return;
    const auto next = lane->held.begin();
    if (next == lane->held.end() || next->first != lane->next_in) break;
    link->held_bytes -= size_of(next->second);
    message = std::move(next->second);
    lane->held.erase(next);
  }
  if (!was_gap) return;
  core_.timers.cancel(lane_timer(TimerKind::kGap, id, index));
  if (!lane->held.empty() && !flawed(Flaw::kNoGapTimer))  // the next gap has its own time
    core_.timers.set(lane_timer(TimerKind::kGap, id, index),
                     core_.now + core_.config.silence_limit);
}

void Lanes::dispatch(LinkId id, uint32_t index, ControlMessage& message) {
  Link& link = links_.at(id);
  if (const auto* hello = std::get_if<MsgHello>(&message)) {
    hello_in(link, index, *hello);
    return;
  }
  if (std::holds_alternative<MsgPing>(message)) return;
  if (link.lanes[index].state != LaneState::kUp) {  // HELLO comes first and is answered before use
    protocol_error(id);
    return;
  }
  if (const auto* down = std::get_if<MsgLaneDown>(&message)) {
    if (down->lane == index)
      protocol_error(id);
    else
      peer_lane_down({id, down->lane, down->epoch});
    return;
  }
  const auto* end = std::get_if<MsgEnd>(&message);
  const bool ours = end != nullptr && end->pull.receiver == core_.config.boot;
  deliver(link, ours ? Role::kSender : Role::kReceiver, message);
}

// `by`: which side says it; only of an END it is not plain.
void Lanes::deliver(Link& link, Role by, ControlMessage& message) {
  if (auto* pull = std::get_if<MsgPull>(&message)) {
    core_.sender.pull_in(link, *pull);
  } else if (const auto* update = std::get_if<MsgUpdate>(&message)) {
    core_.sender.update_in(link, *update);
  } else if (auto* slice = std::get_if<MsgSlice>(&message)) {
    core_.receiver.slice_in(link, *slice);
  } else if (const auto* end = std::get_if<MsgEnd>(&message)) {
    if (by == Role::kSender)
      core_.receiver.end_in(link, *end);
    else
      core_.sender.end_in(link, *end);
  } else if (const auto* claim = std::get_if<MsgClaim>(&message)) {
    core_.sender.claim_in(link, *claim);
  } else if (const auto* decline = std::get_if<MsgDecline>(&message)) {
    core_.sender.decline_in(link, *decline);
  } else if (const auto* drop = std::get_if<MsgDrop>(&message)) {
    core_.receiver.drop_in(link, *drop);
  } else if (const auto* mapped = std::get_if<MsgMapped>(&message)) {
    core_.receiver.mapped_in(link, *mapped);
  } else if (const auto* written = std::get_if<MsgWritten>(&message)) {
    core_.receiver.written_in(link, *written);
  } else if (const auto* drained = std::get_if<MsgDrained>(&message)) {
    core_.receiver.drained_in(link, *drained);
  }
}

void Lanes::refuse_in(const RefuseIn& event) {
  Link* link = nullptr;
  if (current(event.lane, link) == nullptr) return;
  heard(*link, event.lane.lane);
  core_.sender.refuse_in(*link, event);
}

void Lanes::offer_in(const OfferIn& event) {
  Link* link = nullptr;
  const Lane* lane = current(event.lane, link);
  if (lane == nullptr || lane->state == LaneState::kConnecting) {
    core_.emit(DropOffer{event.lane, event.descriptor});
    return;
  }
  heard(*link, event.lane.lane);
  core_.receiver.offer_in(*link, event);
}

void Lanes::data_in(const LaneRef& ref) {
  Link* link = nullptr;
  if (current(ref, link) != nullptr) heard(*link, ref.lane);
}

// ---- timers -----------------------------------------------------------------------------------

void Lanes::timer(TimerKey key) {
  const LinkId id{key.a};
  Link* link = find(id);
  if (link == nullptr) return;
  const auto index = static_cast<uint32_t>(key.b);
  switch (key.kind) {
    case TimerKind::kPing:
      ping(*link);
      break;
    case TimerKind::kLinkSilence:
      if (link->heard + core_.config.silence_limit <= core_.now)
        end_link(id, Reason::kPeerLost, true);
      else
        core_.timers.set(key, link->heard + core_.config.silence_limit);
      break;
    case TimerKind::kLaneSilence:
      silence(id, index);
      break;
    case TimerKind::kGap:
      lane_down(*link, index, true);
      break;
    case TimerKind::kLaneRetry:
      if (link->lanes[index].state != LaneState::kDown) break;
      if (rails_) {
        // Never one that was proposed before: the peer may have taken it up, and its answer was
        // lost.
        Lane& lane = link->lanes[index];
        lane.asked = std::max(lane.asked, lane.epoch) + 1;
        lane.early.clear();
        core_.emit(ReopenLane{{id, index, lane.asked}});
      }
      // In case nobody answers.
      core_.timers.set(key, core_.now + core_.config.silence_limit);
      break;
    default:
      break;
  }
}

void Lanes::ping(Link& link) {
  core_.receiver.tell_oldest(link);
  for (uint32_t lane = 0; lane < link.lanes.size(); ++lane) {
    const LaneState state = link.lanes[lane].state;
    if (state == LaneState::kHello || state == LaneState::kUp) send_on(link, lane, MsgPing{});
  }
  core_.timers.set({TimerKind::kPing, link.id.value, 0}, core_.now + core_.config.ping_interval);
}

void Lanes::silence(LinkId id, uint32_t index) {
  Link& link = links_.at(id);
  const Time limit = link.lanes[index].heard + core_.config.silence_limit;
  if (limit <= core_.now)
    lane_down(link, index, true);
  else
    core_.timers.set(lane_timer(TimerKind::kLaneSilence, id, index), limit);
}

}  // namespace kvferry::engine
