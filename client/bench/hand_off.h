// The workers of a bench run, one client for each rank of both sides, and the rounds they play:
// every round hands one request over under a new id, is timed, and is verified byte by byte.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "client/bench/device_memory.h"
#include "client/bench/shapes.h"
#include "kvferry/client.h"

namespace kvferry::bench {

using client::Status;

struct RoundResult {
  double seconds = 0;       // from the first call until the last receiver's pages may be read
  uint64_t cell_bytes = 0;  // verified
  uint64_t outside_bytes = 0;
};

class HandOff {
 public:
  struct Options {
    Shape shape;
    Topology sender;
    Topology receiver;
    std::string sender_socket;
    std::string receiver_socket;
    uint64_t seed = 1;
    double spare = 1.25;  // blocks of a pool for each block of the request
    MemoryKind memory = MemoryKind::kHost;
    int sender_device = 0;  // numbers of GPUs in this process
    int receiver_device = 0;
    std::function<void(const std::string&)> progress;
  };
  // Attaches all workers, allocates and fills their pools, registers their layouts.
  static Result<std::unique_ptr<HandOff>> make(Options options);

  // One hand-off of the whole request. Errors of the daemon, or DATA_LOSS BENCH_WRONG_BYTES.
  Result<RoundResult> round();
  // Bytes that all receiver ranks get together.
  uint64_t payload_bytes() const { return payload_bytes_; }
  // The GPUs that pools lie on; empty for memory of the host.
  std::string devices() const;

 private:
  struct Rank {
    RankPool pool;  // goes after the client
    std::unique_ptr<client::Client> client;
    RankMemory memory;
    client::TransferHandle transfer = 0;
  };
  explicit HandOff(Options options) : options_(std::move(options)) {}
  Status attach(bool sender);
  Status start_round(const client::TransferKey& key);
  Status finish(std::vector<Rank>& ranks, client::TransferState wanted);

  Options options_;
  std::vector<Rank> senders_;
  std::vector<Rank> receivers_;
  std::string ticket_;
  uint64_t payload_bytes_ = 0;
};

}  // namespace kvferry::bench
