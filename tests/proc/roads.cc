#include "tests/proc/roads.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <deque>
#include <random>
#include <sstream>
#include <stdexcept>

namespace kvferry::testing {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kMtu = 9000;
constexpr int kQueuedFrames = 64;  // at the sender's end of a road
constexpr std::size_t kUnderwayFrames = 4096;
// How far a road may be ahead of its speed: sleeps of less than this are no use.
constexpr std::chrono::milliseconds kBurst(2);

[[noreturn]] void fail_call(const std::string& call) {
  throw std::runtime_error(call + ": " + std::strerror(errno));
}

void check(int result, const std::string& call) {
  if (result < 0) fail_call(call);
}

// In a thread of its own, as namespaces are a thread's.
void in_thread(const std::function<void()>& work) {
  std::string failed;
  std::thread([&] {
    try {
      work();
    } catch (const std::exception& error) {
      failed = error.what();
    }
  }).join();
  if (!failed.empty()) throw std::runtime_error(failed);
}

UniqueFd make_namespace() {
  UniqueFd fd;
  in_thread([&] {
    check(::unshare(CLONE_NEWNET), "unshare");
    fd = UniqueFd(::open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC));
    check(fd.get(), "open of the namespace");
  });
  return fd;
}

void set_up(const std::string& device, const std::string& address) {
  const UniqueFd socket(::socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  check(socket.get(), "socket");
  const auto set = [&](unsigned long request, const char* name, auto fill) {
    ifreq what{};
    std::strncpy(what.ifr_name, device.c_str(), IFNAMSIZ - 1);
    fill(what);
    check(::ioctl(socket.get(), request, &what), name);
  };
  const auto to = [](const std::string& text) {
    return [text](ifreq& what) {
      sockaddr_in ip{};
      ip.sin_family = AF_INET;
      ::inet_pton(AF_INET, text.c_str(), &ip.sin_addr);
      std::memcpy(&what.ifr_addr, &ip, sizeof ip);
    };
  };
  if (!address.empty()) {
    set(SIOCSIFMTU, "SIOCSIFMTU", [](ifreq& what) { what.ifr_mtu = kMtu; });
    set(SIOCSIFTXQLEN, "SIOCSIFTXQLEN", [](ifreq& what) { what.ifr_qlen = kQueuedFrames; });
    set(SIOCSIFADDR, "SIOCSIFADDR", to(address));
    set(SIOCSIFNETMASK, "SIOCSIFNETMASK", to("255.255.255.0"));
  }
  set(SIOCSIFFLAGS, "SIOCSIFFLAGS", [](ifreq& what) { what.ifr_flags = IFF_UP | IFF_RUNNING; });
}

UniqueFd make_tap(int network, std::size_t road, int side) {
  UniqueFd tap;
  in_thread([&] {
    check(::setns(network, CLONE_NEWNET), "setns");
    tap = UniqueFd(::open("/dev/net/tun", O_RDWR | O_CLOEXEC | O_NONBLOCK));
    check(tap.get(), "open of /dev/net/tun");
    ifreq what{};
    const std::string name = "road" + std::to_string(road);
    std::strncpy(what.ifr_name, name.c_str(), IFNAMSIZ - 1);
    what.ifr_flags = IFF_TAP | IFF_NO_PI;
    check(::ioctl(tap.get(), TUNSETIFF, &what), "TUNSETIFF");
    set_up("lo", "");
    set_up(name, Roads::address(road, side));
  });
  return tap;
}

// What a command says that ends badly; empty if it ends well.
std::string complaint(const std::string& command) {
  std::FILE* const pipe = ::popen((command + " 2>&1").c_str(), "re");
  if (pipe == nullptr) fail_call("popen");
  std::string said;
  std::array<char, 512> buffer{};
  for (std::size_t got = 0; (got = std::fread(buffer.data(), 1, buffer.size(), pipe)) > 0;)
    said.append(buffer.data(), got);
  const int status = ::pclose(pipe);
  if (status == 0) return {};
  return said.empty() ? command + " ends with status " + std::to_string(status) : said;
}

}  // namespace

std::string Roads::why_not() {
  try {
    const Roads trial({1'000'000});
    return complaint(trial.inside(0) + " true");
  } catch (const std::exception& error) {
    return error.what();
  }
}

Roads::Roads(const std::vector<uint64_t>& speeds) : stop_(::eventfd(0, EFD_CLOEXEC)) {
  check(stop_.get(), "eventfd");
  for (UniqueFd& network : namespaces_) network = make_namespace();
  for (const uint64_t speed : speeds) {
    auto road = std::make_unique<Road>();
    road->speed = speed;
    for (int side = 0; side < kSides; ++side)
      road->taps[side] = make_tap(namespaces_[side].get(), roads_.size(), side);
    roads_.push_back(std::move(road));
  }
  for (const auto& road : roads_)
    for (int side = 0; side < kSides; ++side)
      threads_.emplace_back([this, &of = *road, side] { carry(of, side); });
}

Roads::~Roads() {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = ::write(stop_.get(), &one, sizeof one);
  for (std::thread& thread : threads_) thread.join();
}

std::string Roads::in_network(int side) const {
  return "nsenter --net=/proc/" + std::to_string(::getpid()) + "/fd/" +
         std::to_string(namespaces_[side].get()) + " unshare --mount";
}

std::vector<std::string> Roads::inside_words(int side) const {
  std::istringstream said(in_network(side));
  std::vector<std::string> words = {"/usr/bin/env"};
  for (std::string word; said >> word;) words.push_back(word);
  words.insert(words.end(), {"sh", "-c", kOwnSys});
  return words;
}

bool Roads::stops_while_waiting(int tap, std::chrono::nanoseconds limit) const {
  pollfd waits[] = {{stop_.get(), POLLIN, 0}, {tap, POLLIN, 0}};
  const auto left = std::max<int64_t>(limit.count(), 0);
  const timespec wait{left / 1'000'000'000, left % 1'000'000'000};
  if (::ppoll(waits, 2, &wait, nullptr) < 0) return errno != EINTR;
  return waits[0].revents != 0;
}

// The frames of one direction. Those that come faster than the road's speed are queued by the
// device, and beyond its queue lost, as on a slow network.
void Roads::carry(Road& road, int from) {
  struct Underway {
    Clock::time_point arrives;
    std::vector<uint8_t> frame;
  };
  std::deque<Underway> underway;
  std::minstd_rand random(static_cast<uint32_t>(from) + 1);
  std::array<uint8_t, kMtu + 64> frame{};
  Clock::time_point free = Clock::now();  // when the road's beginning can take the next one
  while (true) {
    const Clock::time_point now = Clock::now();
    while (!underway.empty() && underway.front().arrives <= now) {
      const std::vector<uint8_t>& first = underway.front().frame;
      if (!road.cut[from]) {
        road.carried += first.size();
        // A full receiver loses it, as would a network.
        [[maybe_unused]] const ssize_t written =
            ::write(road.taps[1 - from].get(), first.data(), first.size());
      }
      underway.pop_front();
    }
    const bool takes = free <= now + kBurst && underway.size() < kUnderwayFrames;
    Clock::time_point wake = now + std::chrono::hours(1);
    if (!underway.empty()) wake = underway.front().arrives;
    if (free > now + kBurst) wake = std::min(wake, free - kBurst / 2);
    if (stops_while_waiting(takes ? road.taps[from].get() : -1, wake - now)) return;
    if (!takes) continue;
    const ssize_t got = ::read(road.taps[from].get(), frame.data(), frame.size());
    if (got <= 0) continue;
    const auto bytes = static_cast<std::size_t>(got);
    if (road.cut[from]) continue;
    if (random() % 1000 < road.lost_per_mille) {
      ++road.lost;
      continue;
    }
    free =
        std::max(free, Clock::now()) + std::chrono::nanoseconds(bytes * 1'000'000'000 / road.speed);
    underway.push_back({free - kBurst + road.delay.load(), {frame.data(), frame.data() + bytes}});
  }
}

}  // namespace kvferry::testing
