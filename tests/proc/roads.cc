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

#include <array>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <optional>
#include <stdexcept>

namespace kvferry::testing {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kMtu = 9000;
constexpr int kQueuedFrames = 64;  // at the sender's end of a road
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
    set_up(name, "10.77." + std::to_string(road) + "." + std::to_string(side + 1));
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

std::string Roads::inside(int side) const {
  return "nsenter --net=/proc/" + std::to_string(::getpid()) + "/fd/" +
         std::to_string(namespaces_[side].get()) +
         " unshare --mount sh -c 'mount -t sysfs none /sys && exec \"$0\" \"$@\"'";
}

// The frames of one direction. Those that come while it waits are queued by the device, and beyond
// its queue lost, as on a slow network.
void Roads::carry(Road& road, int from) {
  std::array<uint8_t, kMtu + 64> frame{};
  Clock::time_point free = Clock::now();
  while (true) {
    pollfd waits[] = {{stop_.get(), POLLIN, 0}, {road.taps[from].get(), POLLIN, 0}};
    if (::poll(waits, 2, -1) < 0 && errno != EINTR) return;
    if (waits[0].revents != 0) return;
    const ssize_t bytes = ::read(road.taps[from].get(), frame.data(), frame.size());
    if (bytes <= 0) continue;
    if (road.cut) continue;
    const Clock::time_point now = Clock::now();
    free = std::max(free, now) +
           std::chrono::nanoseconds(static_cast<uint64_t>(bytes) * 1'000'000'000 / road.speed);
    if (free - now > kBurst) {
      pollfd stop = {stop_.get(), POLLIN, 0};
      const auto left =
          std::chrono::duration_cast<std::chrono::nanoseconds>(free - now - kBurst / 2);
      const timespec wait{0, std::min<long>(left.count(), 100'000'000)};
      if (::ppoll(&stop, 1, &wait, nullptr) > 0) return;
    }
    road.carried += static_cast<uint64_t>(bytes);
    // A full receiver loses it, as would a network.
    [[maybe_unused]] const ssize_t written =
        ::write(road.taps[1 - from].get(), frame.data(), static_cast<std::size_t>(bytes));
  }
}

}  // namespace kvferry::testing
