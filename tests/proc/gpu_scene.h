// Two daemons and workers in processes of their own, which all share one machine of two GPUs of the
// fake driver.
#pragma once

#include <fstream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "tests/fake_cuda/control.h"
#include "tests/proc/coherent_rails.h"
#include "tests/proc/fault_worker.h"
#include "tests/proc/hand_off_daemons.h"

namespace kvferry::testing {

inline constexpr const char* kLibrary = KVFERRY_FAKE_CUDA_LIBRARY;
inline constexpr uint64_t kTokens = 650;  // with a partly filled last block

inline fake_cuda::Setup two_gpus() {
  fake_cuda::Setup setup;
  setup.devices = 2;
  setup.memory_mb = 512;
  setup.delay_us = 20;
  return setup;
}

struct GpuScene {
  fake_cuda::Machine machine{kLibrary, two_gpus()};
  std::unique_ptr<DaemonPair> pair;
  std::unique_ptr<WorkerProcess> workers[2];
  std::string ticket;

  // Of the daemons' rails: they take device memory for host memory, as it is in their process,
  // where the fake driver maps it for the processor too. In the daemons' own it does not.
  enum class Rails { kAsBuilt, kCoherent };

  // `fail`: what fails in each daemon, as KVFERRY_FAKE_CUDA_FAIL has it.
  explicit GpuScene(std::vector<std::string> settings = {}, const std::string& fail = {},
                    Rails rails = Rails::kAsBuilt) {
    if (rails == Rails::kCoherent)
      settings.insert(
          settings.begin(),
          "rails.binary=" + rails::testing::coherent_rails(
                                machine, binary_directory() + "/kvferry-rails-coherent"));
    ::setenv("KVFERRY_CUDA_DRIVER", kLibrary, 1);
    settings.push_back("gpu.enabled=on");
    settings.push_back("gpu.driver=" + std::string(kLibrary));
    settings.insert(settings.begin(), "engine.chunk_bytes=256KiB");
    settings.push_back("engine.silence_limit=15s");  // silence is not what tells here
    ::setenv("KVFERRY_FAKE_CUDA_FAIL", fail.c_str(), 1);
    pair = start_pair(settings);
    ::unsetenv("KVFERRY_FAKE_CUDA_FAIL");
  }
  std::vector<std::string> receiver_more;  // words of the receiver
  // `both_here`: sender and receiver are workers of one daemon.
  void start_workers(const std::string& from, const std::string& from_memory, const std::string& to,
                     const std::string& to_memory, uint64_t tokens = kTokens,
                     bool both_here = false) {
    start_worker(0, from, from_memory, tokens, both_here);
    start_worker(1, to, to_memory, tokens, both_here);
    std::istringstream words(workers[0]->ask("ticket"));
    std::string word;
    words >> word >> ticket;
    REQUIRE(word == "TICKET");
  }
  void start_worker(int side, const std::string& topology, const std::string& memory,
                    uint64_t tokens, bool both_here = false) {
    workers[side].reset();
    std::vector<std::string> more{memory, "2"};
    if (side == 1) more.insert(more.end(), receiver_more.begin(), receiver_more.end());
    workers[side] = std::make_unique<WorkerProcess>(
        binary_directory(), side == 0, pair->side(both_here ? 0 : side).socket(),
        side == 0 ? "prefill" : "decode", topology, shape_of(4, 8, 256, tokens), more);
    const std::string trouble = workers[side]->wait_until_ready();
    INFO(trouble);
    INFO(pair->log_tail());
    REQUIRE(trouble.empty());
  }
  TransferKey begin(uint64_t tokens, const std::string& ready = {}, const std::string& how = {}) {
    const TransferKey key = new_key("prefill");
    const std::string name = key.id + " " + client::to_text(key.secret);
    REQUIRE(workers[0]->ask("send " + name + " " + std::to_string(tokens) + " " + how) == "OK");
    REQUIRE(workers[1]->ask("receive " + name + " " + ticket + " " + std::to_string(tokens) + " " +
                            ready) == "OK");
    return key;
  }
  TransferEnd end(int side, const TransferKey& key) {
    workers[side]->tell("wait " + key.id + " 30000");
    return workers[side]->next_end();
  }
  void require_hand_over(uint64_t tokens = kTokens, const std::string& ready = {},
                         const std::string& how = {}) {
    const TransferKey key = begin(tokens, ready, how);
    const TransferEnd received = end(1, key);
    INFO(received.error);
    INFO(pair->log_tail());
    REQUIRE_FALSE(received.ranks.empty());
    for (const RankEnd& rank : received.ranks) {
      INFO(rank.reason);
      REQUIRE(rank.state == "COMPLETED");
    }
    for (const RankEnd& rank : end(0, key).ranks) REQUIRE(rank.state == "DELIVERED");
    REQUIRE(workers[1]->ask("verify " + std::to_string(tokens)) == "VERIFIED");
    if (!receiver_more.empty())
      REQUIRE(workers[1]->ask("tail " + std::to_string(tokens)) == "CLEARED");
    REQUIRE(workers[1]->ask("clean") == "OK");
    for (auto& worker : workers) REQUIRE(worker->ask("close " + key.id) == "OK");
  }
  uint64_t device_bytes() const { return machine->device_bytes(0) + machine->device_bytes(1); }
};

}  // namespace kvferry::testing
