#include "client/bench/limits.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

namespace kvferry::bench {
namespace {

using client::Code;
using client::Error;
using Clock = std::chrono::steady_clock;

double since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

Error failed(const char* what) {
  return Error{Code::kUnavailable, "BENCH_SOCKET", std::string(what) + " failed", {}, {}};
}

bool send_all(int fd, const std::byte* data, uint64_t bytes) {
  while (bytes > 0) {
    const ssize_t sent = ::send(fd, data, bytes, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent <= 0) return false;
    data += sent;
    bytes -= static_cast<uint64_t>(sent);
  }
  return true;
}

bool receive_all(int fd, std::byte* data, uint64_t bytes) {
  while (bytes > 0) {
    const ssize_t got = ::recv(fd, data, bytes, MSG_WAITALL);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    data += got;
    bytes -= static_cast<uint64_t>(got);
  }
  return true;
}

// Calls fn(offset of the fragment's part, its place, bytes) for the stream's [begin, end).
template <typename Fn>
void for_each_part(const std::vector<uint64_t>& places, uint64_t fragment_bytes, uint64_t begin,
                   uint64_t end, Fn&& fn) {
  for (uint64_t at = begin; at < end;) {
    const uint64_t inside = at % fragment_bytes;
    const uint64_t bytes = std::min(fragment_bytes - inside, end - at);
    fn(at - begin, places[at / fragment_bytes] + inside, bytes);
    at += bytes;
  }
}

}  // namespace

double scattered_memcpy(const Places& places) {
  const Clock::time_point begin = Clock::now();
  for (std::size_t i = 0; i < places.source.size(); ++i)
    std::memcpy(places.to + places.destination[i], places.from + places.source[i],
                places.fragment_bytes);
  return since(begin);
}

client::Result<std::unique_ptr<RawSocket>> RawSocket::make() {
  std::unique_ptr<RawSocket> pair(new RawSocket);
  const int listener = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  pair->sender_ = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const bool connected =
      ::bind(listener, reinterpret_cast<sockaddr*>(&address), size) == 0 &&
      ::listen(listener, 1) == 0 &&
      ::getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size) == 0 &&
      ::connect(pair->sender_, reinterpret_cast<sockaddr*>(&address), size) == 0;
  if (connected) pair->receiver_ = ::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
  ::close(listener);
  if (pair->receiver_ < 0) return failed("a connection over loopback");
  const timeval limit{30, 0};
  for (const int fd : {pair->sender_, pair->receiver_}) {
    ::setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    ::setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
  }
  pair->out_.resize(kPieceBytes);
  pair->in_.resize(kPieceBytes);
  return pair;
}

RawSocket::~RawSocket() {
  if (sender_ >= 0) ::close(sender_);
  if (receiver_ >= 0) ::close(receiver_);
}

template <typename Fill, typename Take>
client::Result<double> RawSocket::move(uint64_t bytes, Fill&& fill, Take&& take) {
  bool received = true;
  Clock::time_point end;
  // Waits in recv when the clock starts.
  std::thread receiver([&] {
    for (uint64_t at = 0; at < bytes && received; at += kPieceBytes) {
      const uint64_t piece = std::min(kPieceBytes, bytes - at);
      received = receive_all(receiver_, in_.data(), piece);
      if (received) take(at, at + piece);
    }
    end = Clock::now();
  });
  const Clock::time_point begin = Clock::now();
  bool sent = true;
  for (uint64_t at = 0; at < bytes && sent; at += kPieceBytes) {
    const uint64_t piece = std::min(kPieceBytes, bytes - at);
    fill(at, at + piece);
    sent = send_all(sender_, out_.data(), piece);
  }
  if (!sent) ::shutdown(sender_, SHUT_RDWR);  // wakes the receiver
  receiver.join();
  if (!sent || !received) return failed("send or recv");
  return std::chrono::duration<double>(end - begin).count();
}

client::Result<double> RawSocket::scattered(const Places& places) {
  return move(
      places.bytes(),
      [&](uint64_t begin, uint64_t end) {
        for_each_part(places.source, places.fragment_bytes, begin, end,
                      [&](uint64_t offset, uint64_t place, uint64_t bytes) {
                        std::memcpy(out_.data() + offset, places.from + place, bytes);
                      });
      },
      [&](uint64_t begin, uint64_t end) {
        for_each_part(places.destination, places.fragment_bytes, begin, end,
                      [&](uint64_t offset, uint64_t place, uint64_t bytes) {
                        std::memcpy(places.to + place, in_.data() + offset, bytes);
                      });
      });
}

client::Result<double> RawSocket::stream(uint64_t bytes) {
  return move(
      bytes, [](uint64_t, uint64_t) {}, [](uint64_t, uint64_t) {});
}

}  // namespace kvferry::bench
