// A TCP relay on loopback that notes what whoever connects has said. One thread of its own; each
// connection is passed on to the same port. Where the other side names its own address (a
// sockaddr_in, as UCX does, which compares it with the one it has dialled) the relay puts its port.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "daemon/base/unique_fd.h"

namespace kvferry::testing {

// Connected to a local port; empty if nobody listens there.
UniqueFd connect_locally(uint16_t port);

class TcpRelay {
 public:
  explicit TcpRelay(uint16_t to);
  ~TcpRelay();
  TcpRelay(const TcpRelay&) = delete;
  TcpRelay& operator=(const TcpRelay&) = delete;

  uint16_t port() const { return port_; }
  // So far, of each connection in turn: the bytes of who connected.
  std::vector<std::vector<uint8_t>> said();

 private:
  struct Pair {
    UniqueFd client;
    UniqueFd server;
    std::size_t number = 0;
  };
  void run();
  void accept_one(std::vector<Pair>& pairs);
  // False when either end has gone.
  bool pass_on(const Pair& pair, bool from_client);

  const uint16_t to_;
  uint16_t port_ = 0;
  UniqueFd listener_;
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::vector<std::vector<uint8_t>> said_;
  std::thread thread_;
};

}  // namespace kvferry::testing
