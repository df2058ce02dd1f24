#include "tests/bench/engine_peers.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <utility>

#include "daemon/engine/proofs.h"

namespace kvferry::engine::bench {
namespace {

constexpr WorkerId kWorker{1};
constexpr const char* kNode = "node-under-test";
constexpr const char* kSenders = "default/prefill";
constexpr const char* kReceivers = "default/decode";

BootId boot_of(uint64_t number) {
  BootId boot;
  for (std::size_t byte = 0; byte < sizeof number; ++byte)
    boot.bytes[byte] = static_cast<uint8_t>(number >> (8 * byte));
  boot.bytes.back() = 1;
  return boot;
}

// A life of an instance. Each peer is an instance of its own.
Incarnation life_of(uint64_t number) {
  Incarnation life;
  life.bytes = boot_of(number).bytes;
  return life;
}

EngineConfig engine_config(const PeersConfig& peers, uint64_t chunk) {
  EngineConfig config;
  config.boot = boot_of(0);
  config.node = kNode;
  config.arenas = {{{peers.arena_chunks * chunk}}};
  config.chunk_bytes = chunk;
  config.max_tombstones = 4096;  // so that the tables of what is over are soon as full as they get
  if (!peers.heartbeats) {
    config.ping_interval = std::chrono::hours(24);
    config.silence_limit = std::chrono::hours(72);
  }
  return config;
}

}  // namespace

void require(bool so, const char* what) {
  if (so) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::abort();
}

Peers::Peers(const PeersConfig& config)
    : config_(config), engine_(engine_config(config, kChunk)), peers_(config.peers) {
  auto layout = std::make_shared<LayoutHandle>();
  layout->worker = kWorker;
  layout->instance = kSenders;
  layout->incarnation = life_of(0);
  layout_ = std::move(layout);
  auto plan = std::make_shared<Plan>();
  plan->bytes = bytes();
  plan->digest = 42;
  plan_ = std::move(plan);
  context_ = std::make_shared<LegContext>();
  events_due_.emplace_back(WorkerAttached{kWorker, "default", 2 * config.peers});
  for (std::size_t i = 0; i < peers_.size(); ++i) {
    Peer& peer = peers_[i];
    peer.link = LinkId{i + 1};
    peer.node = "peer-" + std::to_string(i);
    peer.boot = boot_of(i + 1);
    peer.next_in.assign(config.lanes, 0);
    events_due_.emplace_back(LinkUp{peer.link, peer.node, peer.boot, i % 2 == 0, config.lanes,
                                    kChunk, 64, CheckKind::kNone});
  }
  run();
}

void Peers::say(Peer& peer, ControlMessage message, uint32_t lane) {
  events_due_.emplace_back(
      MessageIn{{peer.link, lane, 0}, peer.next_in[lane]++, std::move(message)});
}

// Feeds what is due and answers what the engine says to it, until both are silent.
void Peers::run() {
  while (!events_due_.empty()) {
    for (uint32_t i = 0; i < config_.batch && !events_due_.empty(); ++i) {
      engine_.handle(std::move(events_due_.front()), now_, commands_);
      events_due_.pop_front();
      ++events_;
    }
    if (!config_.heartbeats) now_ = now_ + std::chrono::microseconds(1);
    engine_.advance(now_, commands_);
    engine_.flush(now_, commands_);
    for (Command& command : commands_) std::visit([this](auto& of) { on(of); }, command);
    commands_.clear();
  }
}

// ---- transfers --------------------------------------------------------------------------------

void Peers::begin() {
  ++round_;
  moved_ = transfers_ended_ = pulls_ = 0;
  for (std::size_t i = 0; i < peers_.size(); ++i) {
    Peer& peer = peers_[i];
    peer.granted = peer.landed = 0;
    peer.ended = peer.closing = false;
    peer.credits.clear();
    peer.key.instance = kSenders;
    peer.key.incarnation = role_ == Role::kSender ? layout_->incarnation : life_of(i + 1);
    peer.key.id = "transfer-" + std::to_string(handle_of(i));
    peer.key.secret.bytes.fill(7);
  }
}

void Peers::send_to_all() {
  role_ = Role::kSender;
  begin();
  for (std::size_t i = 0; i < peers_.size(); ++i) {
    Peer& peer = peers_[i];
    SendOp op;
    op.op = {kWorker, handle_of(i)};
    op.client_handle = handle_of(i);
    op.key = peer.key;
    op.layout = layout_;
    op.num_tokens = config_.chunks;
    op.offer = {{0, {{0, config_.chunks}}}};
    op.last = true;
    events_due_.emplace_back(std::move(op));
    ++peer.pull;
    say(peer, pull_of(peer));
    peer.granted = std::min(kCredits, config_.chunks);
  }
  run();
  require(transfers_ended_ == peers_.size(), "all transfers have ended");
  require(moved_ == peers_.size() * config_.chunks, "each chunk was offered once");
  chunks_done_ += moved_;
}

void Peers::receive_from_all() {
  role_ = Role::kReceiver;
  begin();
  for (std::size_t i = 0; i < peers_.size(); ++i) {
    Peer& peer = peers_[i];
    // From the end, so that the first goes first.
    peer.to_offer.resize(config_.chunks);
    std::iota(peer.to_offer.rbegin(), peer.to_offer.rend(), 0);
    ReceiveOp op;
    op.op = {kWorker, handle_of(i)};
    op.client_handle = handle_of(i);
    op.key = peer.key;
    op.layout = layout_;
    op.needs = {{0, 0, config_.chunks, {{0, config_.chunks}}}};
    op.num_tokens = config_.chunks;
    if (config_.reserved) {
      ReserveOp reserve;
      reserve.op = op.op;
      reserve.key = op.key;
      reserve.layout = layout_;
      events_due_.emplace_back(std::move(reserve));
    }
    events_due_.emplace_back(std::move(op));
  }
  run();
  require(transfers_ended_ == peers_.size(), "all transfers have ended");
  require(moved_ == peers_.size() * config_.chunks, "each chunk was scattered once");
  chunks_done_ += moved_;
}

void Peers::verify() const {
  const EngineSnapshot seen = engine_.snapshot(now_);
  require(seen.arenas.at(0).free_bytes == seen.arenas.at(0).total_bytes, "the arena is empty");
  require(seen.transfers.empty(), "no transfer is left");
  require(seen.links.size() == peers_.size(), "all links are up");
  for (const LinkView& link : seen.links)
    require(std::all_of(link.lanes.begin(), link.lanes.end(),
                        [](const LaneView& lane) { return lane.up; }),
            "all lanes are up");
  const EngineStats& stats = engine_.stats();
  require(stats.lane_downs == 0 && stats.links_lost == 0, "no lane was lost");
  require(stats.dropped[static_cast<std::size_t>(DropCause::kProtocol)] == 0 &&
              stats.dropped[static_cast<std::size_t>(DropCause::kProof)] == 0,
          "nobody has broken the protocol");
  engine_.check_invariants();
}

void Peers::on(Reply& of) {
  require(of.error.code == Code::kOk, "every call is accepted");
}

// Each transfer is closed as soon as it may be.
void Peers::on(Publish& of) {
  Peer& peer = peer_of(of.record.client_handle);
  if (!peer.ended) peer.ended = of.record.state > TransferState::kActive;
  if (!peer.ended || !of.record.released || std::exchange(peer.closing, true)) return;
  events_due_.emplace_back(CloseOp{{kWorker, of.record.client_handle}, of.record.client_handle});
}

void Peers::on(TransferEnded& of) {
  ++transfers_ended_;
  require(of.role == role_, "only the round's transfers end");
  require(
      of.state == (role_ == Role::kSender ? TransferState::kDelivered : TransferState::kCompleted),
      "a transfer ends well");
  require(of.chunks == config_.chunks && of.bytes == bytes(), "a transfer has all its chunks");
}

void Peers::on(Compile& of) {
  events_due_.emplace_back(Compiled{of.compile, Reason::kNone, {}, plan_});
  if (of.side == Role::kReceiver) offer(peer_of(of.receive->client_handle));
}

// ---- the engine sends -------------------------------------------------------------------------

MsgPull Peers::pull_of(const Peer& peer) const {
  MsgPull pull;
  pull.pull = {peer.boot, peer.pull};
  pull.transfer = wire_name(peer.key, peer.key.incarnation);
  pull.receiver_instance = kReceivers;
  pull.receiver_incarnation = life_of(peer.link.value);
  pull.needs = {{0, 0, config_.chunks, {{0, config_.chunks}}}};
  pull.remaining_ms = 600'000;
  for (uint64_t credit = 1; credit <= std::min(kCredits, config_.chunks); ++credit)
    pull.credits.push_back({{credit}, kChunk});
  pull.oldest = peer.pull;
  ProofFields fields;
  fields.pull = pull.pull;
  fields.id = pull.transfer.id;
  fields.instance = pull.transfer.instance;
  fields.incarnation = pull.transfer.incarnation;
  fields.sender_node = kNode;
  fields.receiver_node = peer.node;
  pull.proof = receiver_proof(peer.key.secret, fields);
  return pull;
}

void Peers::on(ResolvePull& of) {
  PullResolved resolved;
  resolved.resolve = of.resolve;
  resolved.legs = {{0, false, true}};
  resolved.context = context_;
  events_due_.emplace_back(std::move(resolved));
}

void Peers::on(Gather& of) {
  events_due_.emplace_back(CopyEnded{of.copy, CopyOutcome::kOk, {}});
}

void Peers::on(SendOffer& of) {
  Peer& peer = peer_of(of.lane);
  ++moved_;
  events_due_.emplace_back(OfferSendEnded{of.offer.offer});
  if (++peer.landed == config_.chunks) {  // its END stands for the acks that are due
    say(peer, MsgEnd{of.offer.pull, wire_name(peer.key, peer.key.incarnation), Outcome::kCompleted,
                     Reason::kNone, std::nullopt});
    return;
  }
  MsgUpdate update;
  update.pull = of.offer.pull;
  if (peer.granted < config_.chunks) update.credits = {{{++peer.granted}, kChunk}};
  update.acks = {{of.offer.slice, of.offer.chunk}};
  update.oldest = peer.pull;
  say(peer, std::move(update));
}

// ---- the engine receives ----------------------------------------------------------------------

void Peers::on(Resolve& of) {
  const Peer& peer = peer_of(of.receive->client_handle);
  Resolved resolved;
  resolved.resolve = of.resolve;
  resolved.sender_incarnation = peer.key.incarnation;
  resolved.legs.push_back({0, 0, peer.node, false, true, bytes(), context_});
  events_due_.emplace_back(std::move(resolved));
}

MsgSlice Peers::slice_of(const Peer& peer) const {
  MsgSlice slice;
  slice.pull = {boot_of(0), peer.pull};
  slice.send = peer.send;
  slice.last = true;
  slice.ranges = {{0, {{0, config_.chunks}}}};
  slice.bytes = bytes();
  slice.digest = plan_->digest;
  ProofFields fields;
  fields.pull = slice.pull;
  fields.send = slice.send;
  fields.id = peer.key.id;
  fields.instance = peer.key.instance;
  fields.incarnation = peer.key.incarnation;
  fields.sender_node = peer.node;
  fields.receiver_node = kNode;
  slice.proof = sender_proof(peer.key.secret, fields);
  return slice;
}

// As many chunks as the peer has credits for.
void Peers::offer(Peer& peer) {
  while (!peer.credits.empty() && !peer.to_offer.empty()) {
    OfferIn in;
    in.lane = {peer.link, 0, 0};
    in.offer.pull = {boot_of(0), peer.pull};
    in.offer.send = peer.send;
    in.offer.chunk = peer.to_offer.back();
    in.offer.credit = peer.credits.back().credit;
    in.offer.offer = OfferId{in.offer.chunk + 1};
    in.offer.bytes = in.announced_bytes = kChunk;
    in.descriptor = DescriptorId{++descriptors_};
    peer.to_offer.pop_back();
    peer.credits.pop_back();
    events_due_.emplace_back(std::move(in));
  }
}

void Peers::on(SendMessage& of) {
  Peer& peer = peer_of(of.lane);
  if (const auto* pull = std::get_if<MsgPull>(&of.message)) {
    peer.pull = pull->pull.counter;
    peer.send = {peer.boot, round_};
    peer.credits = pull->credits;
    // The last who was asked begins: where the arena is full, credits of the first are taken back.
    if (++pulls_ < peers_.size()) return;
    for (auto last = peers_.rbegin(); last != peers_.rend(); ++last) say(*last, slice_of(*last));
  } else if (const auto* update = std::get_if<MsgUpdate>(&of.message)) {
    if (update->pull.counter != peer.pull) return;
    peer.credits.insert(peer.credits.end(), update->credits.begin(), update->credits.end());
    offer(peer);
  } else if (const auto* end = std::get_if<MsgEnd>(&of.message)) {
    if (role_ == Role::kReceiver)
      say(peer, MsgEnd{end->pull, end->transfer, Outcome::kDelivered, Reason::kNone, std::nullopt});
  } else if (std::holds_alternative<MsgHello>(of.message)) {
    if (std::get<MsgHello>(of.message).answer) return;
    say(peer, MsgHello{false}, of.lane.lane);
    say(peer, MsgHello{true}, of.lane.lane);
  } else if (std::holds_alternative<MsgPing>(of.message)) {
    ++pings_;
  }
}

void Peers::on(AcceptOffer& of) {
  events_due_.emplace_back(ReceiveEnded{of.landing, true});
}

void Peers::on(Scatter& of) {
  ++moved_;
  events_due_.emplace_back(CopyEnded{of.copy, CopyOutcome::kOk, {}});
}

// The credit had been withdrawn: the chunk waits for another one.
void Peers::on(SendRefuse& of) {
  Peer& peer = peer_of(of.lane);
  peer.to_offer.push_back(of.message.offer.value - 1);
  offer(peer);
}

// ---- links ------------------------------------------------------------------------------------

void Peers::on(ConnectLane& of) {
  events_due_.emplace_back(LaneConnected{of.lane});
}

void Peers::on(CloseLink&) {
  require(false, "no link is closed");
}

void Peers::idle_second() {
  using std::chrono::nanoseconds;
  const Time begin = now_;
  const uint64_t count = peers_.size();
  pings_ = 0;
  for (uint64_t i = 0; i <= count; ++i) {
    const Time next = begin + nanoseconds(static_cast<int64_t>(1'000'000'000 / count * i));
    while (engine_.next_timer() <= next) {
      now_ = std::max(now_, engine_.next_timer());
      engine_.advance(now_, commands_);
      engine_.flush(now_, commands_);
      for (Command& command : commands_) std::visit([this](auto& of) { on(of); }, command);
      commands_.clear();
    }
    now_ = next;
    if (i == count) break;
    for (uint32_t lane = 0; lane < config_.lanes; ++lane) say(peers_[i], MsgPing{}, lane);
    run();
  }
  now_ = begin + std::chrono::seconds(1);
  require(pings_ == count * config_.lanes, "each lane is pinged once a second");
}

}  // namespace kvferry::engine::bench
