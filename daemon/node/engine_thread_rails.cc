// The part of the engine thread that talks to the rails: commands about links, lanes and chunks on
// one side, the rails' records on the other.
#include <algorithm>
#include <utility>

#include "daemon/base/check.h"
#include "daemon/base/cpu_set.h"
#include "daemon/node/engine_thread.h"
#include "daemon/node/link_manager.h"
#include "daemon/ops/log.h"

namespace kvferry::node {
namespace {

// Tokens of control messages and of offers share one space; this bit tells them apart.
constexpr uint64_t kControlToken = uint64_t{1} << 63;
// UCX ends the requests of a closed endpoint within milliseconds.
constexpr Duration kLongestClosing = std::chrono::seconds(10);
// Messages of links that are not known yet.
constexpr std::size_t kMostEarly = 64;
constexpr std::size_t kMostEarlyBytes = 4096;

rails::Region piece_of(const memory::Region& region, uint64_t bytes) {
  return {region.segment, region.offset, bytes};
}

}  // namespace

EngineThread::Lane* EngineThread::find_lane(const engine::LaneRef& lane) {
  const auto it = lanes_.find(lane);
  return it == lanes_.end() || it->second.closing ? nullptr : &it->second;
}

const engine::LaneRef* EngineThread::find_ref(rails::LaneKey key) const {
  const auto it = refs_.find(key.value);
  return it == refs_.end() ? nullptr : &it->second;
}

void EngineThread::forget_lane(rails::LaneKey key) {
  const auto it = refs_.find(key.value);
  if (it == refs_.end()) return;
  lanes_.erase(it->second);
  refs_.erase(it);
}

bool EngineThread::begin_closing(Lane& lane) {
  // RAILS_DOWN or LANE_UNKNOWN: there is nothing left to close.
  if (!parts_.rails->close(lane.key)) return false;
  lane.closing = true;
  lane.closing_since = monotonic_now();
  return true;
}

void EngineThread::watch_closing_lanes(Time now) {
  for (const auto& [ref, lane] : lanes_) {
    if (!lane.closing || now - lane.closing_since < kLongestClosing) continue;
    ops::log_error("a lane that was given up does not end: ending the rails process",
                   {ops::field("link", ref.link.value), ops::field("lane", ref.lane)});
    parts_.rails->kill("a lane that was given up did not end");
    return;
  }
}

void EngineThread::lane_failed(const engine::LaneRef& lane) {
  follow_up_.push_back(engine::LaneFailed{lane});
}

// ---- commands ----------------------------------------------------------------------------------

void EngineThread::execute(engine::ConnectLane& command) {
  const Result<LanePath> path = parts_.links->lane_path(command.lane);
  if (!path || lanes_.contains(command.lane)) {
    lane_failed(command.lane);
    return;
  }
  const rails::LaneKey key{next_lane_key_++};
  if (Status status = parts_.rails->connect(key, path->rail, path->address); !status) {
    ops::log_info("lane not connected", {ops::field("error", status.error())});
    lane_failed(command.lane);
    return;
  }
  lanes_[command.lane] = Lane{key, false};
  refs_[key.value] = command.lane;
}

void EngineThread::execute(engine::ReopenLane& command) {
  parts_.links->reopen_lane(command);
}
void EngineThread::execute(engine::TellLaneDown& command) {
  parts_.links->tell_lane_down(command);
}

void EngineThread::execute(engine::CloseLane& command) {
  Lane* lane = find_lane(command.lane);
  if (lane == nullptr) return;
  if (!begin_closing(*lane)) forget_lane(lane->key);
}

void EngineThread::execute(engine::CloseLink& command) {
  ops::log_info("link closed", {ops::field("link", command.link.value),
                                ops::field("reason", name_of(command.reason))});
  for (auto it = lanes_.begin(); it != lanes_.end();) {
    const auto next = std::next(it);
    if (it->first.link == command.link && !it->second.closing) {
      if (!begin_closing(it->second)) forget_lane(it->second.key);
    }
    it = next;
  }
  links_.remove(command.link);
  parts_.links->close_link(command);
}

void EngineThread::send_sealed(const engine::LaneRef& ref) {
  send({ref, sealed_});
}

void EngineThread::send(Waiting message) {
  const engine::LaneRef lane = message.lane;
  const auto offer = message.offer;
  if (backlog_.send(std::move(message), [this](const Waiting& of) { return hand_over(of); }))
    return;
  ops::log_info("lane given up: too many messages wait", {ops::field("bytes", backlog_.bytes())});
  if (offer) follow_up_.push_back(engine::OfferSendEnded{offer->first});
  lane_failed(lane);
}

bool EngineThread::hand_over(const Waiting& message) {
  const Lane* const lane = find_lane(message.lane);
  Status sent = fail(Code::kUnavailable, "LANE_UNKNOWN", "the lane is gone");
  if (lane != nullptr && message.offer) {
    sent = parts_.rails->send_offer(lane->key, message.message, message.offer->second,
                                    rails::SendToken{message.offer->first.value});
  } else if (lane != nullptr) {
    const rails::SendToken token{kControlToken | next_control_token_++};
    sent = parts_.rails->send_control(lane->key, message.message, token);
  }
  if (sent && !message.offer) {
    ++controls_under_way_;
    parts_.metrics->messages_sent.add();
  }
  if (sent) return true;
  if (sent.error().reason == "RAILS_BUSY") return false;
  if (lane != nullptr)
    ops::log_info("lane given up: message not sent", {ops::field("error", sent.error())});
  // Nothing was handed over, so nothing reads the region.
  if (message.offer) follow_up_.push_back(engine::OfferSendEnded{message.offer->first});
  lane_failed(message.lane);
  return true;
}

void EngineThread::send_backlog() {
  if (backlog_.empty()) return;
  backlog_.retry([this](const engine::AcceptOffer& of) { return hand_over(of); },
                 [this](const Waiting& of) { return hand_over(of); });
  parts_.rails->ring();
}

void EngineThread::execute(engine::SendMessage& command) {
  if (Status sealed = links_.seal(command.lane, command.sequence, command.message, sealed_);
      !sealed) {
    // A link that has ended in between, or a message that no daemon may send.
    ops::log_warning("lane given up: message not sealed", {ops::field("error", sealed.error())});
    lane_failed(command.lane);
    return;
  }
  send_sealed(command.lane);
}

void EngineThread::execute(engine::SendRefuse& command) {
  if (links_.seal(command.lane, command.message, sealed_)) send_sealed(command.lane);
}

void EngineThread::execute(engine::SendOffer& command) {
  const engine::MsgOffer& offer = command.offer;
  if (find_lane(command.lane) != nullptr && links_.seal(command.lane, offer, sealed_)) {
    send({command.lane, sealed_, std::pair(offer.offer, piece_of(command.region, offer.bytes))});
    return;
  }
  // Nothing was handed over, so nothing reads the region.
  follow_up_.push_back(engine::OfferSendEnded{offer.offer});
  lane_failed(command.lane);
}

void EngineThread::execute(engine::AcceptOffer& command) {
  backlog_.accept(command, [this](const engine::AcceptOffer& of) { return hand_over(of); });
}

bool EngineThread::hand_over(const engine::AcceptOffer& command) {
  const Lane* lane = find_lane(command.lane);
  Status accepted = fail(Code::kUnavailable, "LANE_UNKNOWN", "the lane is gone");
  if (lane != nullptr) {
    accepted = parts_.rails->accept(command.descriptor, lane->key,
                                    piece_of(command.region, command.bytes), command.landing);
  }
  if (accepted) return true;
  if (accepted.error().reason == "RAILS_BUSY") return false;
  (void)parts_.rails->drop(command.descriptor);
  follow_up_.push_back(engine::ReceiveEnded{command.landing, false});
  lane_failed(command.lane);
  return true;
}

void EngineThread::execute(engine::DropOffer& command) {
  // OFFER_UNKNOWN: the rails process died in between and holds nothing.
  (void)parts_.rails->drop(command.descriptor);
}

// ---- records -----------------------------------------------------------------------------------

void EngineThread::on_ready(const rails::RailsReady& ready) {
  std::string release = std::to_string(ready.ucx_major) + "." + std::to_string(ready.ucx_minor) +
                        "." + std::to_string(ready.ucx_release);
  ops::log_info("rails ready",
                {ops::field("ucx", release), ops::field("rails", ready.rails.size())});
  for (std::size_t i = 0; i < ready.rails.size(); ++i)
    if (const int error = ready.rails[i].binding_errno; error != 0)
      ops::log_warning("not bound to its NUMA node",
                       {ops::field("what", "rail " + std::to_string(i)),
                        ops::field("error", binding_error(error))});
  parts_.metrics->of(ops::Fallback::kNumaUnbound)
      .add(static_cast<uint64_t>(
          std::count_if(ready.rails.begin(), ready.rails.end(),
                        [](const rails::RailInfo& rail) { return rail.binding_errno != 0; })));
  parts_.metrics->set_ucx_version(release);
  {
    MutexLock lock(view_mutex_);
    view_.info = ready;
    view_.ready = true;
  }
  std::vector<rpc::PeerRail> rails;
  for (const rails::RailInfo& rail : ready.rails)
    rails.push_back({rail.transport, rail.device, rail.address});
  parts_.links->set_rails(release, std::move(rails));
  follow_up_.push_back(engine::RailsUp{});
}

void EngineThread::on_connected(rails::LaneKey lane) {
  if (const engine::LaneRef* ref = find_ref(lane))
    follow_up_.push_back(engine::LaneConnected{*ref});
}

void EngineThread::on_connect_failed(rails::LaneKey lane, int) {
  const engine::LaneRef* ref = find_ref(lane);
  if (ref == nullptr) return;
  lane_failed(*ref);
  forget_lane(lane);
}

void EngineThread::on_lane_error(rails::LaneKey lane, int status) {
  const engine::LaneRef* ref = find_ref(lane);
  if (ref == nullptr) return;
  ops::log_info("lane error", {ops::field("link", ref->link.value), ops::field("lane", ref->lane),
                               ops::field("ucx_status", status)});
  lane_failed(*ref);
}

void EngineThread::on_closed(rails::LaneKey lane) {
  forget_lane(lane);
}

void EngineThread::on_control(uint32_t, std::span<const uint8_t> message) {
  parts_.metrics->messages_received.add();
  take_message(message, monotonic_now());
}

// Who answers a handshake has the link first, and its HELLO may overtake the answer. So what names
// no link waits a moment for one: lost, it would cost the lane its silence limit.
void EngineThread::keep_early(std::span<const uint8_t> message, Time since) {
  if (message.size() > kMostEarlyBytes) {
    ++unknown_links_;
    return;
  }
  early_.push_back({since, {message.begin(), message.end()}});
  if (early_.size() > kMostEarly) drop_early(early_.front().since);
}

void EngineThread::drop_early(Time until) {
  for (; !early_.empty() && early_.front().since <= until; early_.pop_front()) ++unknown_links_;
}

void EngineThread::take_early() {
  for (const Early& early : std::exchange(early_, {})) take_message(early.message, early.since);
}

Result<link::Opened> EngineThread::open(std::span<const uint8_t> message, Time now) {
  Result<link::Opened> opened = links_.open(message, now);
  // The keys are here before the answer that lets the peer use them leaves.
  if (!opened && opened.error().reason == "UNKNOWN_LINK" && take_renewed_keys())
    opened = links_.open(message, now);
  if (opened && opened->first_under)
    parts_.links->keys_seen(opened->lane.link, *opened->first_under, now);
  return opened;
}

void EngineThread::renew_keys(LinkId link, const link::LinkKeys& keys, bool seal_now) {
  {
    MutexLock lock(renewed_mutex_);
    renewed_[link] = {keys, seal_now};
  }
  inbox_.wake();
}

bool EngineThread::take_renewed_keys() {
  std::unordered_map<LinkId, RenewedKeys, IdHash> renewed;
  {
    MutexLock lock(renewed_mutex_);
    renewed.swap(renewed_);
  }
  for (const auto& [link, keys] : renewed)
    links_.renew(link, keys.keys, keys.seal_now, monotonic_now());
  return !renewed.empty();
}

void EngineThread::take_message(std::span<const uint8_t> message, Time since) {
  Result<link::Opened> opened = open(message, since);
  if (!opened) {
    const std::string& reason = opened.error().reason;
    if (reason == "UNKNOWN_LINK")
      keep_early(message, since);
    else
      parts_.metrics->of(reason == "BAD_TAG" ? ops::DropCause::kBadTag : ops::DropCause::kMalformed)
          .add();
    // A body that its sender tagged and nobody can read: that lane cannot be kept in sequence.
    if (reason == "BAD_MESSAGE" && links_.opened_lane()) lane_failed(*links_.opened_lane());
    return;
  }
  std::visit(
      [&](auto& body) {
        using Body = std::decay_t<decltype(body)>;
        if constexpr (std::is_same_v<Body, engine::MsgRefuse>) {
          follow_up_.push_back(engine::RefuseIn{opened->lane, std::move(body)});
        } else if constexpr (std::is_same_v<Body, engine::MsgOffer>) {
          parts_.metrics->of(ops::DropCause::kMalformed).add();  // offers come as offers
        } else {
          follow_up_.push_back(engine::MessageIn{opened->lane, opened->sequence, std::move(body)});
        }
      },
      opened->message);
}

void EngineThread::on_offer(const rails::OfferIn& offer) {
  Result<link::Opened> opened = open(offer.header, monotonic_now());
  engine::MsgOffer* body = opened ? std::get_if<engine::MsgOffer>(&opened->message) : nullptr;
  if (body == nullptr || !offer.descriptor) {
    parts_.metrics
        ->of(!opened          ? ops::DropCause::kBadTag
             : offer.too_many ? ops::DropCause::kQueueFull
                              : ops::DropCause::kMalformed)
        .add();
    if (offer.descriptor) (void)parts_.rails->drop(offer.descriptor);
    // Eager arrival of an offer breaks the protocol. One too many is gone, and its sender takes it
    // as sent: with its lane it learns that nothing of it is here, and offers it again.
    if (body != nullptr) lane_failed(opened->lane);
    return;
  }
  follow_up_.push_back(engine::OfferIn{opened->lane, *body, offer.descriptor, offer.data_bytes});
}

void EngineThread::on_send_ended(rails::SendToken token, bool) {
  if ((token.value & kControlToken) != 0)
    --controls_under_way_;
  else
    follow_up_.push_back(engine::OfferSendEnded{OfferId{token.value}});
}

void EngineThread::on_receive_ended(LandingId landing, bool ok, uint64_t) {
  follow_up_.push_back(engine::ReceiveEnded{landing, ok});
}

void EngineThread::on_died(const rails::RailsExit& exit) {
  ops::log_error("rails process ended",
                 {ops::field("why", exit.why), ops::field("status", exit.status),
                  ops::field("signal", exit.signal)});
  for (std::size_t rail = 0; rail < parts_.metrics->rail_count(); ++rail)
    parts_.metrics->rail(rail).downs.add();
  controls_under_way_ = 0;
  backlog_.clear();
  lanes_.clear();
  refs_.clear();
  {
    MutexLock lock(view_mutex_);
    view_.ready = false;
    view_.last_exit = exit.why;
    view_.last_status = exit.exited ? exit.status : 0;
  }
  parts_.links->set_rails({}, {});
  follow_up_.push_back(engine::RailsDied{});
}

}  // namespace kvferry::node
