// The reuse index and receives that find blocks in it, every order of copies, pins, withdrawals and
// new receives into the same blocks. Two workers of one daemon, the test plays the rest.
#include "tests/unit/engine_reuse_world.h"

namespace kvferry::engine::test {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using World = ReuseWorld;

TEST_CASE("a receive has a committed prefix from the other worker and pulls only the rest") {
  World w;
  w.publish(w.a, {5, 6}, hashes_of({1, 2}));
  ReceiveOp op = w.hashed(w.b, {0, 1, 2, 3}, 30, hashes_of({1, 2, 9}));
  const uint64_t handle = op.client_handle;
  const TransferKey key = op.key;
  w.post(op);
  const CompileCopy compile = w.seen<CompileCopy>().back();
  CHECK(compile.source == w.a);
  CHECK(compile.destination == w.b);
  CHECK(compile.source_blocks == std::vector<GroupBlocks>{{0, 0, {5, 6}}});
  CHECK(compile.needs == std::vector<GroupNeed>{{0, 0, 16, {{0, 16}}}});
  w.resolve();
  CHECK(w.told<MsgPull>().back().needs == std::vector<GroupNeed>{{0, 16, 30, {{16, 32}}}});
  w.compile_copy(100);
  REQUIRE(w.seen<LocalCopy>().size() == 2);  // chunks of 64 bytes
  w.last_slice(key);
  CHECK(w.record(kB, handle).state == TransferState::kActive);  // not before its copies are done
  CHECK(w.record(kB, handle).memory_in_use);
  w.end_copies();
  CHECK(w.record(kB, handle).state == TransferState::kCompleted);
  CHECK(w.engine.stats().reuse_blocks == 2);
  CHECK(w.engine.stats().reuse_bytes == 100);
  // The call again is the same call.
  w.post(op);
  CHECK(w.last_reply().existing);
  op.hashes[0].hashes.pop_back();
  w.post(op);
  CHECK(w.last_reply().error.field == "prompt_hashes");
}

TEST_CASE("everything is here: nothing is needed, the legs still run") {
  World w;
  w.publish(w.a, {5, 6}, hashes_of({1, 2}));
  ReceiveOp op = w.hashed(w.b, {0, 1}, 16, hashes_of({1, 2}));
  w.post(op);
  w.resolve();
  CHECK(w.told<MsgPull>().back().needs.empty());
  w.last_slice(op.key);
  w.compile_copy(10);
  w.end_copies();
  CHECK(w.record(kB, op.client_handle).state == TransferState::kCompleted);
}

TEST_CASE("a worker's own blocks need no copy where they are and stay published") {
  World w;
  w.publish(w.a, {5, 6}, hashes_of({1, 2}));
  const auto compiles = w.seen<CompileCopy>().size();
  w.complete(w.hashed(w.a, {5, 6}, 16, hashes_of({1, 2})));
  CHECK(w.seen<CompileCopy>().size() == compiles);
  CHECK(w.lookup(w.b, hashes_of({1, 2})).matches.front().tokens == 16);
}

TEST_CASE("a receive never reads a block that it writes itself") {
  World w;
  w.publish(w.a, {5, 6}, hashes_of({1, 2}));
  // Block 5 holds what goes into block 7, but is the place of the prompt's second block.
  w.post(w.hashed(w.a, {7, 5}, 16, hashes_of({1, 3})));
  CHECK(w.seen<CompileCopy>().empty());
  w.resolve();
  CHECK(w.told<MsgPull>().back().needs.front().begin == 0);
  CHECK(w.lookup(w.b, hashes_of({1})).matches.front().tokens == 0);  // withdrawn
}

TEST_CASE("misses and foreign hits answer alike") {
  World w;
  w.publish(w.a, {5}, hashes_of({1}));
  const Reply miss = w.lookup(w.b, hashes_of({7}), seconds(1));
  const Reply other = w.lookup(w.foreign, hashes_of({1}), seconds(1));
  for (const Reply& reply : {miss, other}) {
    CHECK(reply.error.code == Code::kOk);
    CHECK(reply.matches.size() == 1);
    CHECK(reply.matches[0].tokens == 0);
    CHECK(reply.pin == 0);
  }
}

TEST_CASE("a withdrawal waits for copies that were promised the block, and nobody finds it") {
  World w;
  w.publish(w.a, {5}, hashes_of({1}));
  ReceiveOp op = w.hashed(w.b, {0}, 8, hashes_of({1}));
  w.post(op);  // promised, not yet compiled
  const uint64_t withdrawn = w.withdraw(w.a, {5});
  CHECK(w.reply_to(withdrawn) == nullptr);
  CHECK(w.lookup(w.b, hashes_of({1})).matches.front().tokens == 0);
  w.compile_copy(100);
  CHECK(w.reply_to(withdrawn) == nullptr);
  w.post(CopyEnded{w.seen<LocalCopy>()[0].copy, CopyOutcome::kOk, {}});
  CHECK(w.reply_to(withdrawn) == nullptr);
  w.post(CopyEnded{w.seen<LocalCopy>()[1].copy, CopyOutcome::kOk, {}});
  REQUIRE(w.reply_to(withdrawn) != nullptr);
  CHECK(w.reply_to(withdrawn)->withdrawn == 1);
}

TEST_CASE("a withdrawal first: the receive fetches the block from afar") {
  World w;
  w.publish(w.a, {5}, hashes_of({1}));
  const uint64_t withdrawn = w.withdraw(w.a, {5});
  REQUIRE(w.reply_to(withdrawn) != nullptr);
  w.post(w.hashed(w.b, {0}, 8, hashes_of({1})));
  CHECK(w.seen<CompileCopy>().empty());
}

TEST_CASE("a withdrawal waits for a pin, which ends by itself") {
  World w;
  w.publish(w.a, {5}, hashes_of({1}));
  REQUIRE(w.lookup(w.b, hashes_of({1}), seconds(60)).pin != 0);
  const uint64_t withdrawn = w.withdraw(w.a, {5});
  w.pass(milliseconds(999));
  CHECK(w.reply_to(withdrawn) == nullptr);
  w.pass(milliseconds(1));
  CHECK(w.reply_to(withdrawn) != nullptr);
}

TEST_CASE("a pinned block is still copied after its withdrawal, and only by who pinned it") {
  World w;
  w.publish(w.a, {5}, hashes_of({1}));
  const uint64_t pin = w.lookup(w.b, hashes_of({1}), seconds(1)).pin;
  const uint64_t withdrawn = w.withdraw(w.a, {5});
  ReceiveOp stranger = w.hashed(w.a, {9}, 8, hashes_of({1}));
  stranger.reuse_pin = pin;
  w.post(stranger);
  CHECK(w.seen<CompileCopy>().empty());
  ReceiveOp op = w.hashed(w.b, {0}, 8, hashes_of({1}));
  op.reuse_pin = pin;
  w.post(op);
  CHECK(w.seen<CompileCopy>().size() == 1);
  w.pass(seconds(1));
  CHECK(w.reply_to(withdrawn) == nullptr);  // the copy reads it now
  w.compile_copy(10);
  w.end_copies();
  CHECK(w.reply_to(withdrawn) != nullptr);
}

TEST_CASE("a receive into a published block withdraws it and waits for its readers") {
  World w;
  w.publish(w.a, {5}, hashes_of({1}));
  w.publish(w.b, {8}, hashes_of({2}));
  w.post(w.hashed(w.b, {0}, 8, hashes_of({1})));  // is to read block 5
  w.compile_copy(10);
  REQUIRE(w.seen<LocalCopy>().size() == 1);
  ReceiveOp into = w.hashed(w.a, {5}, 8, hashes_of({2}));  // writes it, with what b has
  w.post(into);
  w.compile_copy(10);
  CHECK(w.seen<LocalCopy>().size() == 1);
  w.post(CopyEnded{w.seen<LocalCopy>()[0].copy, CopyOutcome::kOk, {}});
  CHECK(w.seen<LocalCopy>().size() == 2);
}

TEST_CASE("a receive whose blocks stay read fails NOT_READY") {
  World w;
  w.publish(w.a, {5}, hashes_of({1}));
  w.publish(w.b, {8}, hashes_of({2}));
  w.post(w.hashed(w.b, {0}, 8, hashes_of({1})));
  w.compile_copy(10);
  ReceiveOp into = w.hashed(w.a, {5}, 8, hashes_of({2}));
  w.post(into);
  w.compile_copy(10);
  w.pass(seconds(10));
  CHECK(w.record(kA, into.client_handle).reason == Reason::kNotReady);
}

TEST_CASE("an early end lets running copies finish: memory stays in use, blocks stay read") {
  World w;
  w.publish(w.a, {5}, hashes_of({1}));
  ReceiveOp op = w.hashed(w.b, {0}, 8, hashes_of({1}));
  w.post(op);
  w.compile_copy(100);
  const uint64_t withdrawn = w.withdraw(w.a, {5});
  w.post(CancelOp{{kB, ++w.ops}, op.client_handle});
  CHECK(w.last_reply().memory_in_use);
  CHECK_FALSE(w.record(kB, op.client_handle).released);
  CHECK(w.reply_to(withdrawn) == nullptr);
  w.end_copies();
  CHECK(w.record(kB, op.client_handle).released);
  CHECK(w.reply_to(withdrawn) != nullptr);
}

TEST_CASE("a failed copy fails the receive") {
  World w;
  w.publish(w.a, {5}, hashes_of({1}));
  ReceiveOp op = w.hashed(w.b, {0}, 8, hashes_of({1}));
  w.post(op);
  w.compile_copy(100);
  w.end_copies(CopyOutcome::kFailed);
  CHECK(w.record(kB, op.client_handle).reason == Reason::kScatterFailed);
  CHECK(w.record(kB, op.client_handle).released);
}

TEST_CASE("a layout is quiet when no copy reads it; its blocks are not found any more") {
  World w;
  w.publish(w.a, {5}, hashes_of({1}));
  w.post(w.hashed(w.b, {0}, 8, hashes_of({1})));
  (void)w.lookup(w.b, hashes_of({1}), seconds(1));
  w.post(UnregisterLayout{w.a, Reason::kUnregistered});
  CHECK(w.seen<LayoutQuiet>().empty());
  CHECK(w.lookup(w.b, hashes_of({1})).matches.front().tokens == 0);
  w.compile_copy(10);
  w.end_copies();
  CHECK(w.seen<LayoutQuiet>().size() == 1);
}

TEST_CASE("a worker that is gone leaves no entry, pin or waiting withdrawal") {
  World w;
  w.publish(w.a, {5}, hashes_of({1}));
  (void)w.lookup(w.b, hashes_of({1}), seconds(1));
  w.withdraw(w.a, {5});
  w.post(WorkerGone{kA});
  CHECK(w.last_reply().error.reason == "NOT_ATTACHED");
  w.post(WorkerGone{kB});
  const EngineSnapshot snapshot = w.engine.snapshot(w.now);
  CHECK(snapshot.reuse_entries == 0);
  CHECK(snapshot.reuse_pins == 0);
}

TEST_CASE("a window group answers with the longest prefix of which its window is here") {
  World w;
  // Window 16, blocks of 8: a prefix of n blocks needs its last two.
  w.publish(w.a, {1, 2, 3}, hashes_of({3, 4, 5}), 1);
  CHECK(w.lookup(w.b, hashes_of({1, 2, 3, 4, 5, 6}), {}, 1).matches.front().tokens == 40);
  CHECK(w.lookup(w.b, hashes_of({1, 2, 3, 9, 5}), {}, 1).matches.front().tokens == 0);
  CHECK(w.lookup(w.b, hashes_of({1, 2, 3, 4, 5, 6})).matches.front().tokens == 0);  // full
}

TEST_CASE("a commit names what is wrong, and the same one is made once") {
  World w;
  ReceiveOp op = w.receive_op(w.a, {5, mapping::kHole, 6}, 20);
  w.post(op);
  const auto commit = [&](std::vector<CommitReuseOp::Group> groups) {
    w.post(CommitReuseOp{{kA, ++w.ops}, op.client_handle, std::move(groups)});
    return w.last_reply();
  };
  CHECK(commit({{0, 16, hashes_of({1, 2})}}).error.reason == "NOT_COMPLETED");
  w.resolve();
  w.last_slice(op.key);
  CHECK(commit({{1, 16, hashes_of({1})}}).error.field == "groups[0].group");
  CHECK(commit({{0, 21, hashes_of({1})}}).error.field == "groups[0].tokens");
  CHECK(commit({{0, 20, hashes_of({1, 2, 3, 4})}}).error.field == "groups[0].hashes");
  CHECK(commit({{0, 8, {}}, {0, 8, {}}}).error.field == "groups[1].group");
  CHECK(commit({{0, 20, hashes_of({1, 2, 3})}}).error.code == Code::kOk);
  CHECK(commit({{0, 20, hashes_of({1, 2, 3})}}).existing);
  CHECK(commit({{0, 16, hashes_of({1})}}).error.code == Code::kAlreadyExists);
  // The hole has none, the third block is not whole.
  CHECK(w.engine.snapshot(w.now).reuse_entries == 1);
}

TEST_CASE("beyond the worker's limit its oldest entries go") {
  EngineConfig config = small_config(2);
  config.max_reuse_entries_per_worker = 2;
  World w(config);
  w.publish(w.a, {1, 2, 3}, hashes_of({1, 2, 3}));
  CHECK(w.engine.snapshot(w.now).reuse_entries == 2);
  CHECK(w.engine.stats().reuse_evicted == 1);
  CHECK(w.lookup(w.b, hashes_of({1})).matches.front().tokens == 0);
  CHECK(w.lookup(w.b, hashes_of({2})).matches.front().tokens == 8);
}

TEST_CASE("of the holders of one hash only a few are tried, but one's own block is found") {
  World w;
  std::vector<int32_t> ids;
  for (int32_t id = 0; id < 40; ++id) ids.push_back(id);
  w.publish(w.a, ids, std::vector<std::string>(ids.size(), "h1"));
  w.publish(w.b, {7}, hashes_of({1}));
  w.a->willing = false;
  w.a->questions = 0;
  CHECK(w.lookup(w.b, hashes_of({1})).matches.front().tokens == 0);
  CHECK(w.a->questions == 16);
  // Where the block is needed it is already: no question.
  w.post(w.hashed(w.b, {7}, 8, hashes_of({1})));
  CHECK(w.a->questions == 16);
  CHECK(w.seen<CompileCopy>().empty());
}

TEST_CASE("only a few chunks are copied at a time") {
  EngineConfig config = small_config(2);
  config.reuse_copies = 2;
  World w(config);
  w.publish(w.a, {5}, hashes_of({1}));
  w.post(w.hashed(w.b, {0}, 8, hashes_of({1})));
  w.compile_copy(64 * 5);
  CHECK(w.seen<LocalCopy>().size() == 2);
  w.post(CopyEnded{w.seen<LocalCopy>()[0].copy, CopyOutcome::kOk, {}});
  CHECK(w.seen<LocalCopy>().size() == 3);
}

TEST_CASE("pins are bounded, and hashes of other groups refused") {
  World w;
  w.publish(w.a, {5}, hashes_of({1}));
  for (int i = 0; i < 64; ++i) REQUIRE(w.lookup(w.b, hashes_of({1}), seconds(1)).pin != 0);
  CHECK(w.lookup(w.b, hashes_of({1}), seconds(1)).error.reason == "TOO_MANY_PINS");
  CHECK(w.lookup(w.b, hashes_of({1}), {}, 2).error.field == "prompt_hashes[0].group");
  CHECK(w.lookup(w.b, hashes_of({1}), {}, 9).error.field == "prompt_hashes[0].group");
  w.pass(seconds(1));
  CHECK(w.lookup(w.b, hashes_of({1}), seconds(1)).pin != 0);
}

}  // namespace
}  // namespace kvferry::engine::test
