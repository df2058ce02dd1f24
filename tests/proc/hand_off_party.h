// One side of hand-offs in a test: the workers of an instance, one client for each rank, with
// recognisable bytes in their pools. Used in the test's own process and in kvferry-test-worker.
// One thread at a time.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "client/bench/device_memory.h"
#include "client/bench/shapes.h"
#include "kvferry/client.h"

namespace kvferry::testing {

using client::Result;
using client::Status;
using client::TransferKey;
using client::TransferStatus;

class Party {
 public:
  struct Options {
    std::string instance;
    std::string socket;
    std::vector<std::string> sockets = {};  // of each rank; empty: `socket` of all
    // What ranks on several daemons share.
    std::optional<client::Bytes16> incarnation = {};
    std::optional<client::Bytes16> instance_key = {};
    bench::Shape shape;  // tokens: of one request
    bench::Topology topology;
    bool sends = false;     // its pools hold the pattern
    uint32_t requests = 1;  // that fit the pools; above 1, whole blocks only
    uint64_t seed = 1;      // of block ids; the pattern is the same for all
    bool reconnect = false;
    bench::MemoryKind memory = bench::MemoryKind::kHost;
    int devices = 1;         // memory on GPUs: rank r is on device r % devices
    bool zero_tail = false;  // its groups clear what lies past the prompt's end
  };
  // Attaches, fills the pools, registers the layouts. The errors are the client's.
  static Result<std::unique_ptr<Party>> make(Options options);

  Result<std::string> ticket() { return ranks_[0].client->ticket(options_.instance); }

  // What all ranks of a side say of one transfer.
  struct Send {
    uint32_t request = 0;
    uint64_t num_tokens = 0;                   // 0: the shape's
    uint32_t index = 0;                        // of the slice
    std::optional<client::TokenRange> tokens;  // absent: all
    std::optional<std::pair<uint32_t, uint32_t>> layers;
    bool last = true;
    std::optional<std::string> aux;
    std::chrono::milliseconds lease{0};
    std::chrono::milliseconds deadline{0};
    std::optional<client::DoneWord> done;
    bool packed_copy = false;
    uint32_t max_receivers = 1;
  };
  struct Receive {
    uint32_t request = 0;
    uint64_t num_tokens = 0;
    std::chrono::milliseconds wait{0};
    std::chrono::milliseconds deadline{0};
    client::ReadyCondition ready;
    std::optional<client::DoneWord> done;
  };
  // These queue the operation on all ranks. The key's instance is filled in when it is empty.
  Status send(TransferKey key, const Send& what);
  Status receive(TransferKey key, const std::string& ticket, const Receive& what);

  // The end of all ranks' sides of a transfer, in rank order; the first error, which is a
  // rejection's or WAIT_TIMEOUT.
  Result<std::vector<TransferStatus>> wait(const std::string& id, std::chrono::milliseconds limit);
  // Closes and forgets it.
  Status close(const std::string& id);

  // Every byte of all pools: cells of the first `tokens` of the pattern must be there, all others
  // untouched. tokens 0: all requests. The first fault as text; empty if there is none.
  std::string verify(uint64_t tokens = 0) const;
  // Every byte of all pools is as clean() leaves it. As above.
  std::string verify_untouched() const;
  // Receivers with zero_tail: the cells past `tokens` in the last block of the first request must
  // be zeros. As above.
  std::string verify_tail(uint64_t tokens) const;
  // Memory on GPUs: the condition that a new event of the rank's stream has been reached.
  Result<client::ReadyCondition> ready_by_event(uint32_t rank);
  // Receivers: as if nothing had come.
  void clean();

  client::Client& rank(uint32_t rank) { return *ranks_[rank].client; }
  client::TransferHandle handle(const std::string& id, uint32_t rank) const {
    return transfers_.at(id).at(rank);
  }
  client::PoolMemory pool(uint32_t rank) const { return ranks_[rank].pool; }
  uint32_t ranks() const { return static_cast<uint32_t>(ranks_.size()); }
  // Of all ranks, for join_instance().
  const std::vector<std::string>& cards() const { return cards_; }
  const std::string& instance() const { return options_.instance; }
  // One rank's blocks of one request, to make calls by hand.
  std::vector<int32_t> blocks(uint32_t rank, uint32_t request, client::TokenRange tokens) const;

 private:
  struct Rank {
    // On a GPU: `pool` is what is copied there, or was copied from there, in host memory.
    std::unique_ptr<bench::DeviceMemory> device;
    std::vector<std::byte> mirror;
    std::unique_ptr<client::Client> client;
    bench::RankMemory memory;
    client::PoolMemory pool;
  };
  // The bytes of a rank's pool as they are now.
  static const std::byte* bytes_of(const Rank& rank);
  Status make_pool(Rank& rank, uint32_t number);
  explicit Party(Options options) : options_(std::move(options)) {}
  Status attach(uint32_t rank);

  Options options_;
  std::vector<Rank> ranks_;
  std::vector<std::string> cards_;
  std::map<std::string, std::vector<client::TransferHandle>> transfers_;  // by id, one a rank
};

// A fresh id and secret.
TransferKey new_key(const std::string& instance);

}  // namespace kvferry::testing
