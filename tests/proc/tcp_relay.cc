#include "tests/proc/tcp_relay.h"

#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <catch2/catch.hpp>
#include <cstring>

namespace kvferry::testing {
namespace {

sockaddr_in local(uint16_t port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(port);
  return address;
}

// Family, port and host, as they lie in memory.
std::array<uint8_t, 8> named(uint16_t port) {
  const sockaddr_in address = local(port);
  std::array<uint8_t, 8> out;
  std::memcpy(out.data(), &address, out.size());
  return out;
}

}  // namespace

UniqueFd connect_locally(uint16_t port) {
  UniqueFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const sockaddr_in address = local(port);
  if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0)
    fd.reset();
  return fd;
}

TcpRelay::TcpRelay(uint16_t to)
    : to_(to), listener_(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
  sockaddr_in address = local(0);
  socklen_t size = sizeof address;
  auto* const generic = reinterpret_cast<sockaddr*>(&address);
  REQUIRE(::bind(listener_.get(), generic, size) == 0);
  REQUIRE(::listen(listener_.get(), 16) == 0);
  REQUIRE(::getsockname(listener_.get(), generic, &size) == 0);
  port_ = ntohs(address.sin_port);
  thread_ = std::thread([this] { run(); });
}

TcpRelay::~TcpRelay() {
  stop_.store(true);
  thread_.join();
}

std::vector<std::vector<uint8_t>> TcpRelay::said() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return said_;
}

void TcpRelay::run() {
  std::vector<Pair> pairs;
  while (!stop_.load()) {
    std::vector<pollfd> waits = {{listener_.get(), POLLIN, 0}};
    for (const Pair& pair : pairs) {
      waits.push_back({pair.client.get(), POLLIN, 0});
      waits.push_back({pair.server.get(), POLLIN, 0});
    }
    if (::poll(waits.data(), waits.size(), 20) <= 0) continue;
    for (std::size_t i = pairs.size(); i-- > 0;) {
      const bool alive = (waits[1 + 2 * i].revents == 0 || pass_on(pairs[i], true)) &&
                         (waits[2 + 2 * i].revents == 0 || pass_on(pairs[i], false));
      if (!alive) pairs.erase(pairs.begin() + static_cast<std::ptrdiff_t>(i));
    }
    if (waits[0].revents != 0) accept_one(pairs);
  }
}

void TcpRelay::accept_one(std::vector<Pair>& pairs) {
  Pair fresh{UniqueFd(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC)),
             connect_locally(to_), 0};
  if (!fresh.client || !fresh.server) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  fresh.number = said_.size();
  said_.emplace_back();
  pairs.push_back(std::move(fresh));
}

bool TcpRelay::pass_on(const Pair& pair, bool from_client) {
  uint8_t buffer[65536];
  const int from = from_client ? pair.client.get() : pair.server.get();
  const ssize_t got = ::recv(from, buffer, sizeof buffer, 0);
  if (got <= 0) return false;
  const auto bytes = static_cast<std::size_t>(got);
  if (from_client) {
    const std::lock_guard<std::mutex> lock(mutex_);
    said_[pair.number].insert(said_[pair.number].end(), buffer, buffer + bytes);
  } else {
    const auto theirs = named(to_), mine = named(port_);
    for (uint8_t* at = buffer;
         (at = std::search(at, buffer + bytes, theirs.begin(), theirs.end())) != buffer + bytes;)
      at = std::copy(mine.begin(), mine.end(), at);
  }
  const int to = from_client ? pair.server.get() : pair.client.get();
  return ::send(to, buffer, bytes, MSG_NOSIGNAL) == got;
}

}  // namespace kvferry::testing
