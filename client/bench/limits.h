// What this machine can do with the same bytes without a daemon: the limits that a transfer is held
// against. Each moves them from the sender's places to the receiver's and returns the seconds that
// took; who calls clears the receiver before and verifies after.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kvferry/result.h"

namespace kvferry::bench {

// Fragments of one size; fragment i goes from `from + source[i]` to `to + destination[i]`.
struct Places {
  const std::byte* from = nullptr;
  std::byte* to = nullptr;
  uint64_t fragment_bytes = 0;
  std::vector<uint64_t> source;
  std::vector<uint64_t> destination;
  uint64_t bytes() const { return fragment_bytes * source.size(); }
};

// One memcpy for each fragment, one thread.
double scattered_memcpy(const Places& places);

// Two ends of one TCP connection over loopback. One thread at a time.
class RawSocket {
 public:
  static client::Result<std::unique_ptr<RawSocket>> make();
  ~RawSocket();
  RawSocket(const RawSocket&) = delete;
  RawSocket& operator=(const RawSocket&) = delete;

  // The caller gathers a piece into a buffer with memcpy and sends it, another thread receives a
  // piece into a buffer and scatters it: one on each side, nothing overlaps within a side.
  // UNAVAILABLE BENCH_SOCKET.
  client::Result<double> scattered(const Places& places);
  // The bytes of the pieces only: the same buffer is sent and received over and over.
  client::Result<double> stream(uint64_t bytes);

  static constexpr uint64_t kPieceBytes = 256 * 1024;

 private:
  RawSocket() = default;
  template <typename Fill, typename Take>
  client::Result<double> move(uint64_t bytes, Fill&& fill, Take&& take);

  int sender_ = -1;
  int receiver_ = -1;
  std::vector<std::byte> out_;
  std::vector<std::byte> in_;
};

}  // namespace kvferry::bench
