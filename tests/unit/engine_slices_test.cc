// Transfers of thousands of slices: one more costs what the first did, and one that has arrived
// keeps little. A binary of its own, since it counts what is on the heap.
#include <algorithm>
#include <cstdlib>
#include <ctime>
#include <random>
#include <set>

#include "daemon/engine/coverage.h"
#include "tests/unit/engine_harness.h"
#include "tests/unit/heap_count.h"

namespace kvferry::engine::test {
namespace {

constexpr uint64_t kTokens = 16;  // of a slice: 160 bytes, three chunks

// One transfer that both sides know, fed slice by slice; each has arrived before the next is sent.
class Long {
 public:
  // By tokens, or with `layers` > 0 layer by layer within each stretch of tokens.
  Long(uint64_t layers, uint64_t slices)
      : layers_(layers), slices_(slices), tokens_(kTokens * slices) {
    pair.needed = {0, tokens_};  // in the harness a slice's bytes do not depend on its layers
    pair.s.verify = pair.r.verify = false;
    ReceiveOp op = pair.receive_op("a", {0, tokens_});
    op.num_tokens = tokens_;
    pair.r.post(op);
    settle();
  }

  // Sends slices up to `until`.
  void send(uint64_t until) {
    for (; next_ < until; ++next_) {
      const uint64_t at = layers_ == 0 ? next_ : next_ / layers_;
      SendOp op = op_at(at, next_ + 1 == slices_);
      if (layers_ > 0) op.layers = Range{next_ % layers_, next_ % layers_ + 1};
      pair.s.post(op);
      settle();
    }
    verify();
  }

  // Sends the same tokens again and again, takes them back each time.
  void send_and_revoke(uint64_t until) {
    for (; next_ < until; ++next_) {
      SendOp op = op_at(0, false);
      op.max_receivers = 2;  // or what all have gathered would stay
      pair.s.post(op);
      settle();
      pair.s.post(RevokeOp{{{1}, 7}, Pair::handle_of("a"), 0});
      pair.run();
      REQUIRE(pair.s.last_reply().dropped_sends == std::vector{static_cast<uint32_t>(next_)});
      settle();
    }
    verify();
  }

  Pair pair;
  TransferState sent = TransferState::kOpen;
  TransferState received = TransferState::kOpen;
  uint64_t received_bytes = 0;

 private:
  SendOp op_at(uint64_t at, bool last) const {
    SendOp op =
        pair.send_op("a", static_cast<uint32_t>(next_), {at * kTokens, (at + 1) * kTokens}, last);
    op.num_tokens = tokens_;
    return op;
  }
  void settle() {
    pair.run();
    for (const Publish& publish : pair.s.seen<Publish>()) sent = publish.record.state;
    for (const Publish& publish : pair.r.seen<Publish>()) {
      received = publish.record.state;
      received_bytes = publish.record.bytes_done;
    }
    pair.forget();
  }
  void verify() const {
    pair.s.engine.check_invariants();
    pair.r.engine.check_invariants();
  }

  uint64_t layers_;
  uint64_t slices_;
  uint64_t tokens_;
  uint64_t next_ = 0;
};

// What each of some slices took.
struct Cost {
  double allocations = 0;
  double kept = 0;  // bytes that are still there
  double micros = 0;
};

Cost cost_of(uint64_t slices, const std::function<void()>& work) {
  timespec before{};
  timespec after{};
  const uint64_t bytes = heap_bytes;
  const uint64_t made = allocations;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &before);
  work();
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &after);
  const auto each = [&](double total) { return total / static_cast<double>(slices); };
  return {each(static_cast<double>(allocations - made)),
          each(static_cast<double>(heap_bytes) - static_cast<double>(bytes)),
          each(1e6 * static_cast<double>(after.tv_sec - before.tv_sec) +
               1e-3 * static_cast<double>(after.tv_nsec - before.tv_nsec))};
}

void compare(const Cost& first, const Cost& last) {
  INFO("first: allocations " << first.allocations << ", bytes kept " << first.kept << ", us "
                             << first.micros);
  INFO("last: allocations " << last.allocations << ", bytes kept " << last.kept << ", us "
                            << last.micros);
  CHECK(last.allocations < first.allocations * 1.05);
  // The call, so that it may be made again, and numbers. Tables that double may do so in between.
  CHECK(last.kept < 1200);
  // Other work on the machine disturbs this one: only a cost that grows goes so far.
  CHECK(last.micros < first.micros * 5 + 100);
}

TEST_CASE("the cost of a slice does not grow with the slices before it") {
  for (const uint64_t layers : {uint64_t{0}, uint64_t{8}, uint64_t{4000}}) {
    INFO("layers " << layers);
    Long transfer(layers, 4001);
    const Cost first = cost_of(500, [&] { transfer.send(500); });
    transfer.send(3500);
    const Cost last = cost_of(500, [&] { transfer.send(4000); });
    compare(first, last);
    CHECK(TestPlan::alive == 0);
    CHECK(transfer.received_bytes == 4000 * kTokens * Pair::kBytesPerToken);
    transfer.send(4001);
    CHECK(transfer.sent == TransferState::kDelivered);
    CHECK(transfer.received == TransferState::kCompleted);
  }
}

TEST_CASE("the cost of a Revoke does not grow with the slices that were taken back before") {
  Long transfer(0, 100'000);
  const Cost first = cost_of(500, [&] { transfer.send_and_revoke(500); });
  transfer.send_and_revoke(31'500);
  const Cost last = cost_of(500, [&] { transfer.send_and_revoke(32'000); });
  compare(first, last);
  CHECK(TestPlan::alive == 0);
  CHECK(transfer.received_bytes == 0);
}

TEST_CASE("slices that continue each other are covered by one interval") {
  Coverage coverage;
  for (uint64_t at = 0; at < 4000; ++at)
    REQUIRE(coverage.enter({{0, {{at * 16, at * 16 + 16}}}}, std::nullopt));
  CHECK(coverage.intervals() == 1);
  coverage.leave({{0, {{160, 176}}}}, std::nullopt);
  CHECK(coverage.intervals() == 2);
  CHECK_FALSE(Coverage(coverage).enter({{0, {{159, 160}}}}, std::nullopt));
  CHECK_FALSE(Coverage(coverage).enter({{0, {{176, 177}}}}, Range{5, 6}));
  CHECK(coverage.enter({{0, {{160, 176}}}}, std::nullopt));
  CHECK(coverage.intervals() == 1);
}

// Against a set of cells.
TEST_CASE("coverage knows every cell that has come") {
  std::mt19937_64 random(11);
  const auto below = [&](uint64_t most) { return random() % most; };
  uint64_t refused = 0;
  uint64_t left = 0;
  for (int round = 0; round < 200; ++round) {
    struct Slice {
      std::vector<GroupRanges> offer;
      std::optional<Range> layers;
    };
    Coverage coverage;
    std::set<std::array<uint64_t, 3>> cells;
    std::vector<Slice> slices;
    for (int step = 0; step < 60; ++step) {
      if (!slices.empty() && below(4) == 0) {
        const auto it = slices.begin() + static_cast<std::ptrdiff_t>(below(slices.size()));
        coverage.leave(it->offer, it->layers);
        for (const GroupRanges& group : it->offer)
          for (const Range& range : group.ranges)
            for (uint64_t token = range.begin; token < range.end; ++token)
              for (uint64_t layer = 0; layer < 8; ++layer)
                if (!it->layers || (layer >= it->layers->begin && layer < it->layers->end))
                  cells.erase({group.group, layer, token});
        slices.erase(it);
        ++left;
        continue;
      }
      Slice slice;
      if (below(4) != 0) {
        const uint64_t layer = below(8);
        slice.layers = Range{layer, layer + 1 + below(8 - layer)};
      }
      const uint64_t begin = below(30);
      const uint64_t end = begin + 1 + below(4);
      slice.offer = {{static_cast<uint32_t>(below(2)), {{begin, end}}}};
      if (below(3) == 0) slice.offer[0].ranges.push_back({end + 1, end + 2});
      bool met = false;
      std::vector<std::array<uint64_t, 3>> fresh;
      for (const Range& range : slice.offer[0].ranges)
        for (uint64_t token = range.begin; token < range.end; ++token)
          for (uint64_t layer = 0; layer < 8; ++layer)
            if (!slice.layers || (layer >= slice.layers->begin && layer < slice.layers->end)) {
              fresh.push_back({slice.offer[0].group, layer, token});
              met = met || cells.contains(fresh.back());
            }
      Coverage trial = coverage;
      REQUIRE(trial.enter(slice.offer, slice.layers) == !met);
      if (met) {
        ++refused;
        continue;
      }
      coverage = trial;
      cells.insert(fresh.begin(), fresh.end());
      slices.push_back(slice);
    }
    for (const Slice& slice : slices) coverage.leave(slice.offer, slice.layers);
    REQUIRE(coverage.intervals() == 0);
  }
  CHECK(refused > 1000);
  CHECK(left > 1000);
}

}  // namespace
}  // namespace kvferry::engine::test
