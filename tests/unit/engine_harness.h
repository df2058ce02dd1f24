// Engines joined by a perfect network, or one engine whose commands a test answers by hand. Nothing
// takes time unless the test lets it pass.
#pragma once

#include <catch2/catch.hpp>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "daemon/engine/engine.h"
#include "daemon/link/codec.h"

namespace kvferry::engine::test {

// Blocks serve each other if their groups have the same number.
struct TestLayout : LayoutHandle {
  bool serves(uint32_t group, const LayoutHandle&, uint32_t other_group) const override {
    ++questions;
    return willing && group == other_group;
  }
  bool willing = true;
  mutable uint64_t questions = 0;
};
struct TestPlan : Plan {
  TestPlan() { ++alive; }
  ~TestPlan() override { --alive; }
  TestPlan(const TestPlan&) = delete;
  TestPlan& operator=(const TestPlan&) = delete;
  bool same_source(const Plan& other) const override {
    return source != 0 && source == static_cast<const TestPlan&>(other).source;
  }
  uint64_t source = 0;  // 0: like no other
  inline static uint64_t alive = 0;
};
struct TestContext : LegContext {};

inline BootId boot_of(uint8_t n) {
  BootId boot;
  boot.bytes[0] = n;
  return boot;
}
inline Incarnation incarnation_of(uint8_t n) {
  Incarnation incarnation;
  incarnation.bytes[0] = n;
  return incarnation;
}

inline std::shared_ptr<const TestLayout> make_layout(WorkerId worker, std::string instance,
                                                     uint8_t life, uint32_t rank) {
  auto layout = std::make_shared<TestLayout>();
  layout->worker = worker;
  layout->instance = std::move(instance);
  layout->incarnation = incarnation_of(life);
  layout->rank = rank;
  return layout;
}

inline EngineConfig small_config(uint8_t node) {
  EngineConfig config;
  config.boot = boot_of(node);
  config.node = "node" + std::to_string(node);
  config.arenas = {{{1024}}};
  config.min_region_bytes = 16;
  config.chunk_bytes = 64;
  config.staged_ahead = 1;
  config.leg_credits = 4;
  return config;
}

inline TransferKey key_of(const std::string& id, uint8_t secret = 7) {
  TransferKey key;
  key.instance = "default/prefill";
  key.incarnation = incarnation_of(1);
  key.id = id;
  key.secret.bytes.fill(secret);
  return key;
}

// One engine and the commands it gave.
class Box {
 public:
  explicit Box(EngineConfig config) : engine(std::move(config)) {}

  void post(Event event) {
    engine.handle(std::move(event), now, commands);
    engine.flush(now, commands);
    if (verify) engine.check_invariants();
  }
  // Feeds several events as one batch.
  void post_all(std::vector<Event> events) {
    for (Event& event : events) engine.handle(std::move(event), now, commands);
    engine.flush(now, commands);
    engine.check_invariants();
  }
  void pass(Duration time) {
    const Time until = now + time;
    while (engine.next_timer() <= until) {
      now = std::max(now, engine.next_timer());
      engine.advance(now, commands);
      engine.flush(now, commands);
    }
    now = until;
    engine.check_invariants();
  }

  // The commands of one kind since the last take(), which forgets all.
  template <typename Kind>
  std::vector<Kind> seen() const {
    std::vector<Kind> found;
    for (const Command& command : commands)
      if (const auto* of = std::get_if<Kind>(&command)) found.push_back(*of);
    return found;
  }
  template <typename Message>
  std::vector<Message> told() const {
    std::vector<Message> found;
    for (const SendMessage& command : seen<SendMessage>())
      if (const auto* of = std::get_if<Message>(&command.message)) found.push_back(*of);
    return found;
  }
  void forget() { commands.clear(); }
  Reply last_reply() const {
    const auto replies = seen<Reply>();
    REQUIRE_FALSE(replies.empty());
    return replies.back();
  }
  TransferRecord record(WorkerId worker, uint64_t handle) const {
    TransferRecord found;
    bool any = false;
    for (const Publish& publish : seen<Publish>()) {
      if (publish.worker != worker || publish.record.client_handle != handle) continue;
      found = publish.record;
      any = true;
    }
    REQUIRE(any);
    return found;
  }

  Engine engine;
  bool verify = true;  // after every event, which costs as much as there is state
  Time now{1'000'000'000};
  Commands commands;
  std::map<uint32_t, uint64_t> next_in;  // by lane, of a peer that the test plays
};

// A world of two daemons, node1 sending and node2 receiving, in which each command is answered at
// once. `bytes_per_token` of each slice's tokens travel on the one leg there is.
class Pair {
 public:
  static constexpr uint64_t kBytesPerToken = 10;

  Pair() : Pair(small_config(1), small_config(2)) {}
  Pair(EngineConfig sender, EngineConfig receiver) : s(std::move(sender)), r(std::move(receiver)) {
    s_layout = make_layout({1}, "default/prefill", 1, 0);
    r_layout = make_layout({2}, "default/decode", 2, 0);
    s.post(WorkerAttached{{1}, "default", 64});
    r.post(WorkerAttached{{2}, "default", 64});
    s.post(LinkUp{{1}, "node2", boot_of(2), true, lanes, 64, 64, CheckKind::kNone});
    r.post(LinkUp{{1}, "node1", boot_of(1), false, lanes, 64, 64, CheckKind::kNone});
    run();
  }

  SendOp send_op(const std::string& id, uint32_t index, Range tokens, bool last) const {
    SendOp op;
    op.op = {{1}, 100 + index};
    op.client_handle = handle_of(id);
    op.key = key_of(id);
    op.layout = s_layout;
    op.send_index = index;
    op.num_tokens = 64;
    if (!tokens.empty()) op.offer = {{0, {tokens}}};
    op.last = last;
    return op;
  }
  ReceiveOp receive_op(const std::string& id, Range tokens) const {
    ReceiveOp op;
    op.op = {{2}, 200};
    op.client_handle = handle_of(id);
    op.key = key_of(id);
    op.layout = r_layout;
    op.needs = {{0, tokens.begin, tokens.end, {tokens}}};
    op.num_tokens = 64;
    return op;
  }
  static uint64_t handle_of(const std::string& id) { return std::hash<std::string>{}(id) | 1; }

  // Answers commands until both engines are silent.
  void run() {
    bool busy = true;
    while (busy) {
      busy = step(s, r, s_done_);
      busy = step(r, s, r_done_) || busy;
    }
  }
  // Forgets the commands of both, which hold on to plans and messages; after run().
  void forget() {
    s.forget();
    r.forget();
    s_done_ = r_done_ = 0;
    offers_.clear();
  }
  void pass(Duration time) {
    for (Duration left = time; left > Duration{}; left -= tick) {
      s.pass(std::min(left, tick));
      r.pass(std::min(left, tick));
      run();
    }
  }

  // The receiver's rails have the offer's data in the region that was accepted for it; `ok` false:
  // they have lost it with its lane.
  void land(const AcceptOffer& of, bool ok = true) {
    s.post(OfferSendEnded{offers_.at(of.descriptor)});
    r.post(ReceiveEnded{of.landing, ok});
    run();
  }

  TransferRecord sent(const std::string& id) const { return s.record({1}, handle_of(id)); }
  TransferRecord received(const std::string& id) const { return r.record({2}, handle_of(id)); }

  // The copy has been made, or not, as packed_reason says.
  void packed(Box& from, const MakePacked& of) {
    Packed answer;
    answer.copy = of.copy;
    answer.reason = packed_reason;
    if (packed_reason == Reason::kNone) {
      answer.layout = make_layout({1}, "packed", 1, 0);
      answer.blocks = {{0, 0, {static_cast<int32_t>(of.send->send_index)}}};
    }
    from.post(std::move(answer));
  }

  static constexpr Duration tick = std::chrono::milliseconds(100);
  uint32_t lanes = 2;
  Box s;
  Box r;
  std::shared_ptr<const TestLayout> s_layout;
  std::shared_ptr<const TestLayout> r_layout;
  bool tails = false;  // the receiver's slices have a tail to clear
  uint64_t skew = 0;   // added to the receiver's digests
  CopyOutcome scatter_outcome = CopyOutcome::kOk;
  bool answer_gathers = true;
  Reason packed_reason = Reason::kNone;  // of packed copies that are made
  std::function<bool(const Command&)> swallow = [](const Command&) { return false; };
  const Box* mute = nullptr;  // whose messages get lost
  Reason resolve_reason = Reason::kNone;
  Range needed{0, 64};  // what the directory thinks the transfer needs

 private:
  bool step(Box& from, Box& to, std::size_t& done) {
    bool any = false;
    while (done < from.commands.size()) {
      const Command command = from.commands[done++];
      any = true;
      if (swallow(command)) continue;
      if (mute == &from && std::holds_alternative<SendMessage>(command)) continue;
      answer(from, to, command);
    }
    return any;
  }

  static uint64_t tokens_of(const std::vector<GroupRanges>& offer) {
    uint64_t tokens = 0;
    for (const GroupRanges& group : offer)
      for (const Range& range : group.ranges) tokens += range.size();
    return tokens;
  }

  void answer(Box& from, Box& to, const Command& command) {
    std::visit([&](const auto& of) { on(from, to, of); }, command);
  }
  template <typename Other>
  void on(Box&, Box&, const Other&) {}
  void on(Box& from, Box&, const ConnectLane& of) { from.post(LaneConnected{of.lane}); }
  void on(Box& from, Box& to, const ReopenLane& of) {
    to.post(LaneReopened{of.lane});
    from.post(LaneReopened{of.lane});
  }
  void on(Box&, Box& to, const TellLaneDown& of) { to.post(PeerLaneDown{of.lane}); }
  void on(Box&, Box& to, const SendMessage& of) {
    // A message that cannot be encoded would take its lane down, again and again.
    std::vector<uint8_t> body;
    const Status encoded = link::encode_body(of.message, body);
    if (!encoded) FAIL(encoded.error().to_string());
    to.post(MessageIn{of.lane, of.sequence, of.message});
  }
  void on(Box&, Box& to, const SendRefuse& of) { to.post(RefuseIn{of.lane, of.message}); }
  void on(Box&, Box& to, const SendOffer& of) {
    const DescriptorId descriptor{++last_descriptor_};
    offers_[descriptor] = of.offer.offer;
    to.post(OfferIn{of.lane, of.offer, descriptor, of.offer.bytes});
  }
  void on(Box& from, Box& to, const AcceptOffer& of) {
    to.post(OfferSendEnded{offers_.at(of.descriptor)});
    from.post(ReceiveEnded{of.landing, true});
  }
  void on(Box&, Box& to, const DropOffer& of) {
    to.post(OfferSendEnded{offers_.at(of.descriptor)});
  }
  void on(Box& from, Box&, const Gather& of) {
    if (answer_gathers) from.post(CopyEnded{of.copy, CopyOutcome::kOk, {}});
  }
  void on(Box& from, Box&, const MakePacked& of) { packed(from, of); }
  void on(Box& from, Box&, const LocalCopy& of) {
    from.post(CopyEnded{of.copy, scatter_outcome, {}});
  }
  void on(Box& from, Box&, const Scatter& of) {
    from.post(CopyEnded{of.copy, scatter_outcome, {}});
  }
  void on(Box& from, Box&, const ClearTail& of) {
    from.post(CopyEnded{of.copy, scatter_outcome, {}});
  }
  void on(Box& from, Box&, const Compile& of) {
    auto plan = std::make_shared<TestPlan>();
    plan->bytes = tokens_of(of.offer) * kBytesPerToken;
    plan->has_tail = tails && of.side == Role::kReceiver && plan->bytes > 0;
    plan->digest = 42 + (of.side == Role::kReceiver ? skew : 0);
    from.post(Compiled{of.compile, Reason::kNone, {}, std::move(plan)});
  }
  void on(Box& from, Box&, const Resolve& of) {
    Resolved resolved;
    resolved.resolve = of.resolve;
    resolved.reason = resolve_reason;
    resolved.sender_incarnation = incarnation_of(1);
    resolved.legs.push_back({0, 0, "node1", false, true, needed.size() * kBytesPerToken,
                             std::make_shared<TestContext>()});
    from.post(std::move(resolved));
  }
  void on(Box& from, Box&, const ResolvePull& of) {
    PullResolved resolved;
    resolved.resolve = of.resolve;
    resolved.legs.push_back({0, false, true});
    resolved.context = std::make_shared<TestContext>();
    resolved.expected_bytes = needed.size() * kBytesPerToken;
    from.post(std::move(resolved));
  }

  std::map<DescriptorId, OfferId> offers_;
  uint64_t last_descriptor_ = 0;
  std::size_t s_done_ = 0;
  std::size_t r_done_ = 0;
};

}  // namespace kvferry::engine::test
