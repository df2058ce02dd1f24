// The workers of a bench run, one client for each rank of both sides, and the rounds they play:
// every round hands requests over under new ids, is timed, and is verified byte by byte.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "client/bench/device_memory.h"
#include "client/bench/shapes.h"
#include "kvferry/client.h"

namespace kvferry::bench {

using client::Status;

// One request that a run can hand over.
struct Request {
  uint64_t tokens = 0;
  uint32_t sender_group = 0;    // dp group of the ranks that hold it ...
  uint32_t receiver_group = 0;  // ... and of those that get it
};

// What a round is to do.
struct Play {
  std::vector<uint32_t> requests;  // by number; empty: all
  bool sender_first = false;       // receivers are called once the senders' daemon has every Send
  uint32_t spoil = 0;              // receivers' bytes to change before they are verified
};

struct RoundResult {
  double seconds = 0;  // from the first call until the last receiver's pages may be read
  std::vector<double> request_seconds;  // of each request played, from its own first call on
  double worker_cpu_seconds = 0;        // of this process, until all is delivered and closed
  uint64_t cell_bytes = 0;              // verified
  uint64_t outside_bytes = 0;
};

class HandOff {
 public:
  struct Options {
    Shape shape;
    std::vector<Request> requests;  // empty: one of shape.tokens
    Topology sender;
    Topology receiver;
    std::string sender_socket;
    std::string receiver_socket;
    uint64_t seed = 1;
    double spare = 1.25;  // blocks of a pool for each block of the requests
    MemoryKind memory = MemoryKind::kHost;
    int sender_device = 0;  // numbers of GPUs in this process
    int receiver_device = 0;
    std::function<void(const std::string&)> progress;
  };
  // Attaches all workers, allocates and fills their pools, registers their layouts.
  static Result<std::unique_ptr<HandOff>> make(Options options);

  // One hand-off of the requests, whole. Errors of the daemon, DATA_LOSS BENCH_WRONG_BYTES, or
  // stop_asked().
  Result<RoundResult> round(const Play& play = {});

  // The parts of a round, for those who move the same bytes by other means: receivers' pools
  // become what no transfer leaves, and are compared. verify() fills in the bytes of the result.
  Status clear_receivers();
  Status verify(const Play& play, RoundResult& result);

  // Bytes that all receiver ranks get together, of one request or of all.
  uint64_t payload_bytes(uint32_t request) const;
  uint64_t payload_bytes() const;
  std::size_t request_count() const { return options_.requests.size(); }
  // The GPUs that pools lie on; empty for memory of the host.
  std::string devices() const;
  const Shape& shape() const { return options_.shape; }

  // One rank's pool and the blocks of its requests. Ranks: 0 ... of that side.
  struct View {
    std::byte* data = nullptr;
    const RankMemory* memory = nullptr;
  };
  View sender(uint32_t rank);
  View receiver(uint32_t rank);

 private:
  struct Rank {
    RankPool pool;  // goes after the client
    std::unique_ptr<client::Client> client;
    RankMemory memory;
    std::vector<uint64_t> first_block;             // of each request in memory.block_ids
    std::vector<client::TransferHandle> transfer;  // of each request in this round
  };
  using Clock = std::chrono::steady_clock;

  explicit HandOff(Options options) : options_(std::move(options)) {}
  Status attach(bool sender);
  Status attach_rank(bool sender, uint32_t number);
  bool takes_part(const Rank& rank, bool sender, uint32_t request) const;
  RequestCells cells(const Rank& rank, uint32_t request) const;
  Status send(Rank& rank, uint32_t request, const client::TransferKey& key);
  Status receive(Rank& rank, uint32_t request, const client::TransferKey& key);
  Status start(std::span<const uint32_t> requests, bool sender_first,
               std::vector<Clock::time_point>& begins);
  Status wait_for_senders(std::span<const uint32_t> requests);
  // The end of each request at its last receiver.
  Status finish_receivers(std::span<const uint32_t> requests, std::vector<Clock::time_point>& ends);
  Status finish(Rank& rank, uint32_t request, client::TransferState wanted);
  // One thread's part where several requests run: all of one rank's, in whatever order they end.
  Status follow(Rank& rank, std::span<const uint32_t> requests,
                std::vector<Clock::time_point>& ends);
  Status close_all(std::span<const uint32_t> requests);

  Options options_;
  std::string sender_instance_;
  std::string receiver_instance_;
  std::vector<Rank> senders_;
  std::vector<Rank> receivers_;
  std::string ticket_;
};

}  // namespace kvferry::bench
