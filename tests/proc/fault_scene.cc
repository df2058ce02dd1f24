#include "tests/proc/fault_scene.h"

#include <time.h>

#include <iostream>

namespace kvferry::testing {
namespace {

constexpr uint64_t kTokens = 32768;    // 128 MiB: long enough to be met in the middle
constexpr uint64_t kFewTokens = 1000;  // with a partly filled last block
constexpr uint64_t kTokenBytes = 4096;

bench::Shape shape() {
  bench::Shape shape;
  shape.name = "test";
  shape.layers = 4;
  shape.kv_heads = 2;
  shape.head_bytes = 256;
  shape.tokens = kTokens;
  return shape;
}

std::mt19937_64 seeded() {
  const char* const given = std::getenv("KVFERRY_FAULT_SEED");
  const uint64_t seed = given != nullptr ? std::stoull(given) : std::random_device()();
  std::cout << "KVFERRY_FAULT_SEED=" << seed << std::endl;
  return std::mt19937_64(seed);
}

}  // namespace

FaultScene::FaultScene(std::vector<std::string> settings) : random_(seeded()) {
  // Small pieces and few of them under way make a long transfer of few bytes.
  std::vector<std::string> all = {"engine.chunk_bytes=16KiB", "engine.leg_credits=2",
                                  "engine.heartbeat_interval=200ms", "engine.silence_limit=2s"};
  all.insert(all.end(), settings.begin(), settings.end());
  pair_ = start_pair(all);
  for (const int side : {0, 1}) start_worker(side);
  require_done(begin(kTokens), kTokens);
  require_hand_over();
  for (const int side : {0, 1}) measure(side);
}

void FaultScene::start_worker(int side) {
  workers_[side] = std::make_unique<WorkerProcess>(
      binary_directory(), side == 0, pair_->side(side).socket(), side == 0 ? "prefill" : "decode",
      side == 0 ? "tp1" : "tp2", shape());
  const std::string wrong = workers_[side]->wait_until_ready();
  REQUIRE(wrong == "");
}

uint64_t FaultScene::now_ns() {
  timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(now.tv_nsec);
}

TransferKey FaultScene::begin(uint64_t tokens) {
  const std::string ticket = workers_[0]->ask("ticket");
  REQUIRE(ticket.starts_with("TICKET "));
  REQUIRE(workers_[1]->ask("clean") == "OK");
  const TransferKey key = new_key("");
  const std::string name = key.id + " " + client::to_text(key.secret);
  REQUIRE(workers_[0]->ask("send " + name + " " + std::to_string(tokens)) == "OK");
  REQUIRE(workers_[1]->ask("receive " + name + " " + ticket.substr(7) + " " +
                           std::to_string(tokens)) == "OK");
  return key;
}

void FaultScene::require_done(const TransferKey& key, uint64_t tokens) {
  for (const int side : {1, 0}) {
    const TransferEnd ended = end(side, key);
    for (const RankEnd& rank : ended.ranks) {
      if (rank.state == (side == 0 ? "DELIVERED" : "COMPLETED")) continue;
      FAIL(rank.state << " " << rank.reason << " at side " << side << "\n" << pair_->log_tail());
    }
  }
  REQUIRE(workers_[1]->ask("verify " + std::to_string(tokens)) == "VERIFIED");
}

void FaultScene::require_hand_over() {
  INFO("the next transfer");
  require_done(begin(kFewTokens), kFewTokens);
}

double FaultScene::received_bytes() const {
  return metric(pair_->side(1), "kvferry_transfer_bytes_total", "received");
}

TransferKey FaultScene::begin_and_move() {
  const double before = received_bytes();
  const double share = std::uniform_real_distribution<double>(0.0001, 0.4)(random_);
  const TransferKey key = begin(kTokens);
  const bool moves = comes_true([&] {
    return received_bytes() - before > share * static_cast<double>(kTokens * kTokenBytes);
  });
  if (!moves) FAIL("no bytes move\n" << pair_->log_tail());
  return key;
}

void FaultScene::require_lanes() {
  for (const int side : {0, 1})
    REQUIRE(
        comes_true([&] { return metric(pair_->side(side), "kvferry_lanes", "state=\"up\"") > 0; }));
}

void FaultScene::ask_for_end(int side, const TransferKey& key) {
  workers_[side]->tell("wait " + key.id + " 40000");
}

TransferEnd FaultScene::end(int side, const TransferKey& key) {
  ask_for_end(side, key);
  TransferEnd ended = workers_[side]->next_end();
  if (!ended.error.empty()) FAIL(ended.error << " at side " << side << "\n" << pair_->log_tail());
  REQUIRE(workers_[side]->ask("close " + key.id) == "OK");
  return ended;
}

void FaultScene::measure(int side) {
  before_[side] = level_of(pair_->side(side));
}

void FaultScene::require_nothing_held(int side) {
  const bench::DaemonProcess& daemon = pair_->side(side);
  CAPTURE(side);
  CHECK(comes_true([&] { return arena_in_use(daemon) == 0; }, seconds(10)));
  CHECK(metric(daemon, "kvferry_arena_bytes", "quarantined") == 0);
  CHECK(comes_true([&] { return metric(daemon, "kvferry_transfers_open") == 0; }, seconds(10)));
  const Level before = before_[side];
  Level now;
  const bool back = comes_true(
      [&] {
        now = level_of(daemon);
        return now.within(before);
      },
      seconds(10));
  INFO("before: " << before.text() << "; now: " << now.text());
  CHECK(back);
}

}  // namespace kvferry::testing
