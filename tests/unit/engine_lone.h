// One sending engine; the test plays the receiver's daemon.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "daemon/engine/proofs.h"
#include "tests/unit/engine_harness.h"

namespace kvferry::engine::test {

inline constexpr uint64_t kChunk = 64;

// node1 sends to node2, which the test plays. Tokens are 10 bytes on a leg.
struct Lone : Box {
  explicit Lone(EngineConfig config = small_config(1), uint32_t lanes = 2)
      : Box(std::move(config)) {
    layout = make_layout({1}, "default/prefill", 1, 0);
    post(WorkerAttached{{1}, "default", 8});
    post(LinkUp{{1}, "node2", boot_of(2), true, lanes, kChunk, 64, CheckKind::kNone});
    for (uint32_t lane = 0; lane < lanes; ++lane) {
      post(LaneConnected{{{1}, lane, 0}});
      say(lane, MsgHello{false});
      say(lane, MsgHello{true});
    }
  }

  void say(uint32_t lane, ControlMessage message) {
    post(MessageIn{{{1}, lane, 0}, next[lane]++, std::move(message)});
  }

  void send(const std::string& id, uint32_t index, Range tokens, bool last,
            uint32_t receivers = 1) {
    SendOp op;
    op.op = {{1}, 1};
    op.client_handle = std::hash<std::string>{}(id) | 1;
    op.key = key_of(id);
    op.layout = layout;
    op.send_index = index;
    if (!tokens.empty()) op.offer = {{0, {tokens}}};
    op.last = last;
    op.max_receivers = receivers;
    op.lease = std::chrono::seconds(10);
    post(std::move(op));
  }
  MsgPull pull_of(const std::string& id, uint64_t counter, std::vector<uint64_t> credits,
                  uint8_t life = 2, uint32_t rank = 0) const {
    MsgPull pull;
    pull.pull = {boot_of(2), counter};
    pull.transfer = wire_name(key_of(id), incarnation_of(1));
    pull.receiver_rank = rank;
    pull.receiver_instance = "default/decode";
    pull.receiver_incarnation = incarnation_of(life);
    pull.remaining_ms = 20'000;
    for (const uint64_t credit : credits) pull.credits.push_back({{credit}, kChunk});
    pull.oldest = 1;
    pull.proof = proof_of(pull.pull, pull.transfer, rank);
    return pull;
  }
  Proof proof_of(const PullId& pull, const TransferName& name, uint32_t rank) const {
    ProofFields fields;
    fields.pull = pull;
    fields.id = name.id;
    fields.instance = name.instance;
    fields.incarnation = name.incarnation;
    fields.receiver_rank = rank;
    fields.sender_node = "node1";
    fields.receiver_node = "node2";
    return receiver_proof(key_of(name.id).secret, fields);
  }
  void resolve(std::vector<uint32_t> ranks = {0}, uint32_t group = 0,
               std::vector<GroupRanges> needs = {}) {
    PullResolved resolved;
    resolved.resolve = seen<ResolvePull>().back().resolve;
    resolved.receiver_dp_group = group;
    for (const uint32_t rank : ranks) resolved.legs.push_back({rank, false, rank == 0});
    resolved.needs = std::move(needs);
    post(std::move(resolved));
  }
  void compile_all() {
    for (const Compile& compile : seen<Compile>()) {
      auto plan = std::make_shared<TestPlan>();
      for (const GroupRanges& group : compile.offer)
        for (const Range& range : group.ranges) plan->bytes += range.size() * 10;
      plan->digest = 42;
      plan->source = source;
      post(Compiled{compile.compile, Reason::kNone, {}, std::move(plan)});
    }
  }
  void gather_all() {
    const auto gathers = seen<Gather>();
    for (const Gather& gather : gathers)
      if (done.insert(gather.copy).second) post(CopyEnded{gather.copy, CopyOutcome::kOk, {}});
  }
  // A send with one slice of `chunks` chunks that has been pulled, compiled and announced.
  void open(const std::string& id, uint64_t chunks, std::vector<uint64_t> credits) {
    send(id, 0, {0, chunks * kChunk / 10}, true);
    say(0, pull_of(id, 1, std::move(credits)));
    resolve();
    compile_all();
  }
  void update(std::vector<uint64_t> credits, std::vector<Ack> acks, uint64_t pull = 1) {
    MsgUpdate update;
    update.pull = {boot_of(2), pull};
    for (const uint64_t credit : credits) update.credits.push_back({{credit}, kChunk});
    update.acks = std::move(acks);
    update.oldest = 1;
    say(0, std::move(update));
  }
  TransferRecord status(const std::string& id) const {
    return record({1}, std::hash<std::string>{}(id) | 1);
  }
  ArenaView arena() const { return engine.snapshot(now).arenas[0]; }
  uint64_t drops(DropCause cause) const {
    return engine.stats().dropped[static_cast<std::size_t>(cause)];
  }

  std::shared_ptr<const TestLayout> layout;
  std::map<uint32_t, uint64_t> next;
  std::set<CopyId> done;
  uint64_t source = 0;  // of what is compiled
};

}  // namespace kvferry::engine::test
