// Two workers of one daemon with the reuse index between them; the test plays the rest.
#pragma once

#include <algorithm>

#include "daemon/engine/proofs.h"
#include "tests/unit/engine_harness.h"

namespace kvferry::engine::test {

inline constexpr uint64_t kReuseBlock = 8;  // tokens
inline constexpr WorkerId kA{2};
inline constexpr WorkerId kB{3};

inline Digest16 space_of(uint8_t n) {
  Digest16 space;
  space.bytes[0] = n;
  return space;
}

inline std::vector<std::string> hashes_of(std::initializer_list<int> names) {
  std::vector<std::string> hashes;
  for (const int name : names) hashes.push_back("h" + std::to_string(name));
  return hashes;
}

inline std::shared_ptr<TestLayout> reuse_layout(WorkerId worker, const std::string& instance,
                                                uint8_t space) {
  auto layout = std::make_shared<TestLayout>();
  layout->worker = worker;
  layout->instance = instance;
  layout->incarnation = incarnation_of(static_cast<uint8_t>(worker.value));
  layout->reuse_space = space_of(space);
  layout->reuse_groups = {{kReuseBlock, 0, 0}, {kReuseBlock, 16, 1}, {0, 0, 2}};
  return layout;
}

struct ReuseWorld : Box {
  ReuseWorld() : ReuseWorld(small_config(2)) {}
  explicit ReuseWorld(EngineConfig config) : Box(std::move(config)) {
    a = reuse_layout(kA, "default/a", 1);
    b = reuse_layout(kB, "default/b", 1);
    foreign = reuse_layout(kB, "default/c", 2);
    for (const WorkerId worker : {kA, kB}) post(WorkerAttached{worker, "default", 16});
    post(LinkUp{{1}, "node1", boot_of(1), false, 1, 64, 64, CheckKind::kNone});
    post(LaneConnected{{{1}, 0, 0}});
    say(MsgHello{false});
    say(MsgHello{true});
  }
  void say(ControlMessage message) {
    post(MessageIn{{{1}, 0, 0}, next_message++, std::move(message)});
  }

  // Asks for `prompt` tokens of group 0 into these blocks.
  ReceiveOp receive_op(std::shared_ptr<const TestLayout> layout, std::vector<int32_t> ids,
                       uint64_t prompt, uint32_t group = 0) {
    ReceiveOp op;
    op.op = {layout->worker, ++ops};
    op.client_handle = ++handle;
    op.key = key_of("t" + std::to_string(handle));
    op.layout = std::move(layout);
    op.num_tokens = prompt;
    op.needs = {{group, 0, prompt, {{0, round_up(prompt, kReuseBlock)}}}};
    op.blocks = {{group, 0, std::move(ids)}};
    return op;
  }
  // Resolves the newest receive to one leg and ends it by a last slice without a byte.
  uint64_t resolve() {
    Resolved resolved;
    resolved.resolve = seen<Resolve>().back().resolve;
    resolved.sender_incarnation = incarnation_of(1);
    resolved.legs.push_back({0, 0, "node1", true, true, 0, nullptr});
    post(std::move(resolved));
    return told<MsgPull>().back().pull.counter;
  }
  void last_slice(const TransferKey& key) {
    const auto pulls = told<MsgPull>();
    const auto pull = std::find_if(pulls.rbegin(), pulls.rend(),
                                   [&](const MsgPull& of) { return of.transfer.id == key.id; });
    REQUIRE(pull != pulls.rend());
    MsgSlice slice;
    slice.pull = pull->pull;
    slice.send = {boot_of(1), 5};
    ProofFields fields;
    fields.pull = pull->pull;
    fields.send = slice.send;
    fields.id = pull->transfer.id;
    fields.instance = pull->transfer.instance;
    fields.incarnation = pull->transfer.incarnation;
    fields.sender_node = "node1";
    fields.receiver_node = "node2";
    slice.proof = sender_proof(key.secret, fields);
    slice.last = true;
    slice.digest = 42;
    say(slice);
    auto plan = std::make_shared<TestPlan>();
    plan->digest = 42;
    post(Compiled{seen<Compile>().back().compile, Reason::kNone, {}, std::move(plan)});
  }
  uint64_t complete(ReceiveOp op) {
    const uint64_t of = op.client_handle;
    const TransferKey key = op.key;
    post(std::move(op));
    resolve();
    last_slice(key);
    return of;
  }
  // Worker `layout`'s blocks hold the prompt named by these hashes.
  uint64_t publish(const std::shared_ptr<const TestLayout>& layout, std::vector<int32_t> ids,
                   std::vector<std::string> hashes, uint32_t group = 0) {
    const uint64_t tokens = ids.size() * kReuseBlock;
    const uint64_t of = complete(receive_op(layout, std::move(ids), tokens, group));
    REQUIRE(record(layout->worker, of).state == TransferState::kCompleted);
    post(CommitReuseOp{{layout->worker, ++ops}, of, {{group, tokens, std::move(hashes)}}});
    REQUIRE(last_reply().error.code == Code::kOk);
    return of;
  }
  void compile_copy(uint64_t bytes) {
    CopyCompiled compiled;
    compiled.compile = seen<CompileCopy>().back().compile;
    for (auto* plan : {&compiled.source, &compiled.destination}) {
      auto made = std::make_shared<TestPlan>();
      made->bytes = bytes;
      *plan = made;
    }
    post(std::move(compiled));
  }
  void end_copies(CopyOutcome outcome = CopyOutcome::kOk) {
    while (copies_ended < seen<LocalCopy>().size())
      post(CopyEnded{seen<LocalCopy>()[copies_ended++].copy, outcome, {}});
  }
  uint64_t withdraw(const std::shared_ptr<const TestLayout>& layout, std::vector<int32_t> ids) {
    post(WithdrawReuseOp{{layout->worker, ++ops}, layout, {{0, 0, std::move(ids)}}});
    return ops;
  }
  const Reply* reply_to(uint64_t op) {
    replies = seen<Reply>();
    for (const Reply& reply : replies)
      if (reply.op.op_id == op) return &reply;
    return nullptr;
  }
  Reply lookup(const std::shared_ptr<const TestLayout>& layout, std::vector<std::string> hashes,
               Duration pin = {}, uint32_t group = 0) {
    post(LookupReuseOp{{layout->worker, ++ops}, layout, {{group, std::move(hashes)}}, pin});
    return last_reply();
  }
  ReceiveOp hashed(const std::shared_ptr<const TestLayout>& layout, std::vector<int32_t> ids,
                   uint64_t prompt, std::vector<std::string> hashes) {
    ReceiveOp op = receive_op(layout, std::move(ids), prompt);
    op.hashes = {{0, std::move(hashes)}};
    return op;
  }

  std::shared_ptr<TestLayout> a;
  std::shared_ptr<TestLayout> b;
  std::shared_ptr<TestLayout> foreign;
  std::vector<Reply> replies;
  uint64_t next_message = 0;
  uint64_t handle = 0;
  uint64_t ops = 0;
  std::size_t copies_ended = 0;
};

}  // namespace kvferry::engine::test
