#include "tests/fuzz/engine_world.h"

namespace kvferry::fuzz {

using namespace engine;
using std::chrono::milliseconds;
using std::chrono::minutes;
using std::chrono::seconds;

namespace {

EngineConfig small_config() {
  EngineConfig config;
  config.boot = boot_of(1);
  config.node = "node1";
  config.arenas = {{{512, 512}}, {{4 * kChunk}, true}};
  config.min_region_bytes = 16;
  config.chunk_bytes = kChunk;
  config.staged_ahead = 1;
  config.leg_credits = 3;
  // Small, so that they are reached.
  config.max_held_messages = 4;
  config.max_parked_pulls = 3;
  config.max_tombstones = 6;
  config.max_legs = 5;
  config.max_slices = 6;
  config.max_transfers_per_worker = 6;
  config.max_claims_per_worker = 3;
  config.max_declines_per_worker = 3;
  config.max_packed_bytes = 400;
  config.max_packed_copies = 2;
  config.max_reuse_entries = 12;
  config.max_reuse_entries_per_worker = 8;
  config.reuse_copies = 2;
  config.local_copies = 2;
  config.mapped_gathers = 2;
  return config;
}

std::shared_ptr<const FuzzLayout> make_layout(uint64_t worker, std::string instance, uint8_t life,
                                              uint32_t rank) {
  auto layout = std::make_shared<FuzzLayout>();
  layout->worker = {worker};
  layout->instance = std::move(instance);
  layout->incarnation = incarnation_of(life);
  layout->rank = rank;
  layout->mapped_arena = kMappedArena;
  layout->reuse_space.bytes[0] = 1;
  layout->reuse_groups = {{16, 0, 0}, {16, 32, 1}};
  return layout;
}

bool overlap(const memory::Region& a, uint64_t a_bytes, const memory::Region& b, uint64_t b_bytes) {
  return a.segment == b.segment && a.offset < b.offset + b_bytes && b.offset < a.offset + a_bytes;
}

uint64_t tokens_of(const std::vector<GroupRanges>& offer) {
  uint64_t tokens = 0;
  for (const GroupRanges& group : offer)
    for (const Range& range : group.ranges) tokens += range.size();
  return tokens;
}

}  // namespace

EngineWorld::EngineWorld(Input& in) : in_(in), engine_(small_config()) {
  peers_[0].node = "node2";
  peers_[0].boot = boot_of(2);
  peers_[0].initiator = true;
  peers_[1].node = "node3";
  peers_[1].boot = boot_of(3);
  layouts_.push_back(make_layout(1, "default/prefill", 1, 0));
  layouts_.push_back(make_layout(2, "default/decode", 2, 0));
  layouts_.push_back(make_layout(2, "default/decode", 2, 1));
  workers_ = {1, 2};
  post(WorkerAttached{{1}, "default", 6});
  post(WorkerAttached{{2}, "default", 6});
  post(RailsUp{});
  for (Peer& peer : peers_) bring_up(peer);
}

void EngineWorld::step() {
  switch (in_.below(16)) {
    case 0:
    case 1:
    case 2:
      return call();
    case 3:
    case 4:
    case 5:
      return peer_says();
    case 6:
      return link_changes();
    case 7:
      return pass(in_.chance() ? milliseconds(in_.byte()) : milliseconds(in_.byte() * 100));
    case 8:
      return worker_comes_or_goes();
    case 9:
      if (!open_.empty()) answer(in_.byte() % open_.size(), false);
      return;
    case 10:
      // All that there is, and what comes of it.
      for (int i = 0; i < 20 && !open_.empty(); ++i) answer(0, true);
      return;
    default:
      if (!open_.empty()) answer(in_.byte() % open_.size(), true);
  }
}

void EngineWorld::finish() {
  std::vector<LinkId> links;
  for (int round = 0; round < 40; ++round) {
    if (round == 0) {
      for (const uint64_t worker : workers_) post(WorkerGone{{worker}});
      workers_.clear();
      rails_die();
      for (Peer& peer : peers_)
        if (peer.up) post(LinkEnded{peer.link});
    }
    while (!open_.empty()) answer(0, false);
    pass(minutes(1));
  }
  for (const Peer& peer : peers_)
    for (uint8_t life = 0; life < 8; ++life) {
      BootId boot = peer.boot;
      boot.bytes[1] = life;
      post(PeerProcessGone{boot, peer.node});
    }
  while (!open_.empty()) answer(0, false);
  const EngineSnapshot left = engine_.snapshot(now_);
  FUZZ_CHECK(left.workers == 0 && left.transfers.empty(), "no transfer outlives its worker");
  FUZZ_CHECK(left.links.size() <= 1 && left.reservations == 0, "no link, no reservation is left");
  FUZZ_CHECK(left.packed_copies == 0 && left.reuse_entries == 0 && left.reuse_pins == 0,
             "no packed copy, no entry, no pin is left");
  for (const ArenaView& arena : left.arenas)
    FUZZ_CHECK(arena.free_bytes == arena.total_bytes, "all of an arena comes back");
  FUZZ_CHECK(uses_.empty() && held_.empty(), "nothing is held");
  open_.clear();
  commands_.clear();
  FUZZ_CHECK(FuzzPlan::alive == 0, "no plan is kept");
}

// --- The executor.

Peer* EngineWorld::peer_of(LinkId link) {
  for (Peer& peer : peers_)
    if (peer.link == link) return &peer;
  return nullptr;
}

void EngineWorld::post(Event event) {
  engine_.handle(std::move(event), now_, commands_);
  settle();
}

void EngineWorld::settle() {
  engine_.advance(now_, commands_);
  engine_.flush(now_, commands_);
  engine_.check_invariants();
  Commands taken;
  taken.swap(commands_);
  for (const Command& command : taken) look_at(command);
}

void EngineWorld::pass(Duration time) {
  const Time until = now_ + time;
  for (int i = 0; i < 10'000 && engine_.next_timer() <= until; ++i) {
    now_ = std::max(now_, engine_.next_timer());
    settle();
  }
  FUZZ_CHECK(engine_.next_timer() > until, "timers come to an end");
  now_ = until;
}

void EngineWorld::begin_use(Use use, uint64_t id, const memory::Region& region, uint64_t bytes) {
  FUZZ_CHECK(bytes > 0 && bytes <= region.bytes, "what is used of a region lies in it");
  const bool writes = use == Use::kGather || use == Use::kReceive;
  for (const auto& [other, place] : uses_) {
    const bool other_writes = other.first == Use::kGather || other.first == Use::kReceive;
    FUZZ_CHECK(!(writes || other_writes) || !overlap(region, bytes, place.first, place.second),
               "nothing else uses bytes that are written");
  }
  FUZZ_CHECK(uses_.emplace(std::pair(use, id), std::pair(region, bytes)).second, "an id is new");
}
void EngineWorld::end_use(Use use, uint64_t id) {
  FUZZ_CHECK(uses_.erase({use, id}) == 1, "a use ends once");
}

void EngineWorld::look_at(const Command& command) {
  if (const auto* of = std::get_if<SendMessage>(&command)) {
    std::vector<uint8_t> body;
    const Status encoded = link::encode_body(of->message, body);
    FUZZ_CHECK(encoded.has_value(), "what the engine says can be encoded");
    Peer* peer = peer_of(of->lane.link);
    if (peer == nullptr) return;
    if (const auto* pull = std::get_if<MsgPull>(&of->message)) {
      peer->pulls.push_back(*pull);
      for (const CreditGrant& credit : pull->credits)
        peer->credits.emplace_back(pull->pull, credit);
    } else if (const auto* update = std::get_if<MsgUpdate>(&of->message)) {
      for (const CreditGrant& credit : update->credits)
        peer->credits.emplace_back(update->pull, credit);
    } else if (const auto* slice = std::get_if<MsgSlice>(&of->message)) {
      peer->slices.push_back(*slice);
    }
    return;
  }
  if (const auto* of = std::get_if<Reply>(&command)) {
    FUZZ_CHECK(waiting_.erase({of->op.worker.value, of->op.op_id}) == 1, "a call is answered once");
    return;
  }
  if (const auto* of = std::get_if<DropOffer>(&command)) {
    FUZZ_CHECK(held_.erase(of->descriptor) + lost_.erase(of->descriptor) == 1,
               "only what is held, or was when the rails died, is dropped, and once");
    return;
  }
  if (const auto* of = std::get_if<AcceptOffer>(&command)) {
    FUZZ_CHECK(held_.erase(of->descriptor) == 1, "only what is held is accepted");
    begin_use(Use::kReceive, of->landing.value, of->region, of->bytes);
  } else if (const auto* offered = std::get_if<SendOffer>(&command)) {
    FUZZ_CHECK(rails_up_, "nothing is offered without rails");
    begin_use(Use::kSend, offered->offer.offer.value, offered->region, offered->offer.bytes);
    if (Peer* peer = peer_of(offered->lane.link)) peer->offers.push_back(*offered);
  } else if (const auto* gather = std::get_if<Gather>(&command)) {
    if (!gather->mapped) begin_use(Use::kGather, gather->copy.value, gather->region, gather->bytes);
  } else if (const auto* scatter = std::get_if<Scatter>(&command)) {
    begin_use(Use::kScatter, scatter->copy.value, scatter->region, scatter->bytes);
  } else if (const auto* close = std::get_if<CloseLink>(&command)) {
    if (Peer* peer = peer_of(close->link)) peer->up = false;
    return;
  } else if (const auto* unwatch = std::get_if<UnwatchCondition>(&command)) {
    std::erase_if(open_, [&](const Command& one) {
      const auto* watch = std::get_if<WatchCondition>(&one);
      return watch != nullptr && watch->condition == unwatch->condition;
    });
    return;
  }
  open_.push_back(command);
}

void EngineWorld::rails_die() {
  rails_up_ = false;
  lost_.merge(held_);
  held_.clear();
  std::erase_if(uses_, [](const auto& use) {
    return use.first.first == Use::kSend || use.first.first == Use::kReceive;
  });
  std::erase_if(open_, [](const Command& one) {
    return std::holds_alternative<SendOffer>(one) || std::holds_alternative<AcceptOffer>(one) ||
           std::holds_alternative<ConnectLane>(one);
  });
  post(RailsDied{});
}

// Answers one command; those that want no answer are only forgotten.
struct EngineWorld::Answers {
  EngineWorld& world;
  bool well;

  template <typename Other>
  void operator()(const Other&) {}

  void operator()(const Resolve& of) {
    Resolved out;
    out.resolve = of.resolve;
    if (!well) out.reason = Reason::kPeerUnreachable;
    out.sender_incarnation = incarnation_of(1);
    const uint8_t shape = world.in_.byte();
    const char* const nodes[] = {"node2", "node3", "node1"};
    for (uint32_t rank = 0; well && rank <= (shape & 3) % 3; ++rank) {
      const std::string node = nodes[(rank + (shape >> 2)) % 3];
      // Links to all nodes of an answer have been up.
      if ((node == "node2" && !world.peers_[0].ever_up) ||
          (node == "node3" && !world.peers_[1].ever_up))
        continue;
      const uint32_t dp = (shape & 32) != 0 ? rank : 0;
      const bool empty = (shape & 64) != 0 && rank == 1;
      out.legs.push_back({rank, dp, node, empty, rank == 0 || dp != 0, empty ? 0 : 64 * kTokenBytes,
                          std::make_shared<LegContext>()});
    }
    if (well && out.legs.empty()) out.reason = Reason::kPeerUnreachable;
    world.post(std::move(out));
  }
  void operator()(const ResolvePull& of) {
    PullResolved out;
    out.resolve = of.resolve;
    if (!well) out.reason = Reason::kStaleCards;
    const uint8_t shape = world.in_.byte();
    for (uint32_t rank = 0; well && rank < 3; ++rank)
      if (rank == of.pull->receiver_rank || (shape >> rank & 1) != 0)
        out.legs.push_back({rank, (shape & 8) != 0 && rank == 1, rank == 0});
    if (well && of.pull->receiver_rank >= 3) out.reason = Reason::kIncompatible;
    out.receiver_dp_group = shape >> 6;
    out.context = std::make_shared<LegContext>();
    out.needs = {{0, {{0, 64}}}};
    if (out.reason != Reason::kNone) out.legs.clear();
    world.post(std::move(out));
  }
  std::shared_ptr<FuzzPlan> plan(uint64_t bytes) {
    auto made = std::make_shared<FuzzPlan>();
    made->bytes = bytes;
    made->digest = 42 + world.in_.below(16) / 15;
    return made;
  }
  void operator()(const Compile& of) {
    Compiled out{of.compile, well ? Reason::kNone : Reason::kTooFragmented, {}, nullptr};
    if (well) {
      auto made = plan(tokens_of(of.offer) * kTokenBytes);
      if (of.side == Role::kReceiver)
        made->has_tail = made->bytes > 0 && world.in_.below(4) == 1;
      else
        made->source = of.send->send_index + 1;
      out.plan = std::move(made);
    }
    world.post(std::move(out));
  }
  void operator()(const CompileCopy& of) {
    CopyCompiled out{of.compile, well ? Reason::kNone : Reason::kTooFragmented, {}, {}, {}};
    if (well) {
      out.source = plan(kChunk + 10);
      out.destination = plan(kChunk + 10);
    }
    world.post(std::move(out));
  }
  void operator()(const MakePacked& of) {
    Packed out;
    out.copy = of.copy;
    if (well) {
      auto layout = std::make_shared<FuzzLayout>(static_cast<const FuzzLayout&>(*of.send->layout));
      out.layout = std::move(layout);
      out.blocks = {{0, 0, {1}}};
    } else {
      out.reason = Reason::kGatherFailed;
    }
    world.post(std::move(out));
  }
  template <typename Copy>
  void copied(const Copy& of) {
    CopyEnded out{of.copy, CopyOutcome::kOk, {}};
    if (!well)
      out.outcome = world.in_.chance() ? CopyOutcome::kFailed : CopyOutcome::kCheckMismatch;
    world.post(out);
  }
  void operator()(const Gather& of) {
    if (!of.mapped) world.end_use(Use::kGather, of.copy.value);
    CopyEnded out{of.copy, well ? CopyOutcome::kOk : CopyOutcome::kFailed, {}};
    out.check.kind = of.check_kind;
    world.post(out);
  }
  void operator()(const Scatter& of) {
    world.end_use(Use::kScatter, of.copy.value);
    copied(of);
  }
  void operator()(const ClearTail& of) { copied(of); }
  void operator()(const LocalCopy& of) { copied(of); }
  void operator()(const WatchCondition& of) {
    if (well)
      world.post(ConditionMet{of.condition});
    else
      world.post(ConditionFailed{of.condition});
  }
  void operator()(const ConnectLane& of) {
    if (!world.rails_up_) return;
    if (Peer* peer = world.peer_of(of.lane.link); peer != nullptr && of.lane.lane < kLanes) {
      peer->epoch[of.lane.lane] = of.lane.epoch;
      peer->next[of.lane.lane] = 0;
    }
    if (well)
      world.post(LaneConnected{of.lane});
    else
      world.post(LaneFailed{of.lane});
  }
  void operator()(const ReopenLane& of) {
    if (well)
      world.post(LaneReopened{of.lane});
    else
      world.post(LaneReopenFailed{of.lane});
  }
  void operator()(const AcceptOffer& of) {
    world.end_use(Use::kReceive, of.landing.value);
    world.post(ReceiveEnded{of.landing, well});
  }
  void operator()(const SendOffer& of) {
    world.end_use(Use::kSend, of.offer.offer.value);
    world.post(OfferSendEnded{of.offer.offer});
  }
};

void EngineWorld::answer(std::size_t which, bool well) {
  const Command command = open_[which];
  open_.erase(open_.begin() + static_cast<std::ptrdiff_t>(which));
  std::visit(Answers{*this, well}, command);
}

}  // namespace kvferry::fuzz
