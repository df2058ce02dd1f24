// Bytes thrown at the TCP ports of the rails, and addresses that are none: at worst the rails
// process ends and is started again, while the daemon serves on and every byte that it says has
// come is right. Chunks are checked, as arenas are what somebody in the rails process can spoil.
#include <netinet/in.h>
#include <sys/socket.h>

#include <algorithm>
#include <iostream>
#include <random>

#include "tests/proc/hostile_peer.h"
#include "tests/proc/tcp_relay.h"

namespace kvferry::testing {
namespace {

using hostile::HostilePeer;
using Bytes8 = std::vector<uint8_t>;

// In the daemons' range. A port at which connections came in cannot be listened at for a minute
// after its process has died, and here one dies every few moments.
constexpr uint16_t kPorts = 256;

// A range at which nobody listens, below those that the kernel gives away: what is thrown there
// meets no process of others.
uint16_t quiet_range() {
  std::random_device random;
  for (int tries = 0; tries < 100; ++tries) {
    const auto first = static_cast<uint16_t>(20'000 + random() % 12'000);
    bool quiet = true;
    for (uint16_t i = 0; quiet && i < kPorts; ++i)
      quiet = !connect_locally(static_cast<uint16_t>(first + i));
    if (quiet) return first;
  }
  FAIL("no range of ports is free");
  return 0;
}

struct PortScene {
  const uint16_t first = quiet_range();  // of both daemons: each takes what is free
  std::unique_ptr<HostileScene> scene;
  std::mt19937 random{12345};
  uint64_t thrown = 0;  // connections at which somebody took something

  PortScene() {
    const std::string range = std::to_string(first) + "-" + std::to_string(first + kPorts - 1);
    HostileScene::Options options;
    options.settings = {"gpu.enabled=off",
                        "checks.kind=xxh3",
                        "rails.port_range=" + range,
                        "rails.restart_backoff=10ms",
                        "rails.restart_backoff_max=200ms",
                        "engine.lane_retry_max=200ms",
                        "engine.lease=5s",
                        "engine.wait_deadline=5s",
                        "engine.transfer_deadline=5s"};
    options.toml = "[[peers]]\nidentity = \"evil\"\naddresses = [\"127.0.0.1\"]\n";
    options.tolerate = HonestPair::Tolerate::kFailures;
    scene = std::make_unique<HostileScene>(options);
  }

  // Ports of both rails processes at which somebody listens now.
  std::vector<uint16_t> ports() const {
    std::vector<uint16_t> out;
    for (uint16_t i = 0; i < kPorts; ++i) {
      const auto port = static_cast<uint16_t>(first + i);
      if (connect_locally(port)) out.push_back(port);
    }
    return out;
  }
  Bytes8 noise(std::size_t bytes) {
    Bytes8 out(bytes);
    for (uint8_t& byte : out) byte = static_cast<uint8_t>(random());
    return out;
  }
  // To each of the ports, once both rails processes listen, be it again; some of the connections
  // stay open and silent.
  void throw_at_ports(const Bytes8& bytes) {
    std::vector<uint16_t> at;
    REQUIRE(comes_true([&] {
      at = ports();
      return at.size() >= 2;
    }));
    for (const uint16_t port : at) {
      UniqueFd fd = connect_locally(port);
      if (!fd) continue;
      ++thrown;
      (void)::send(fd.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
      // Every fourth is closed with what it has not read, as a reset.
      const linger reset{1, 0};
      if (random() % 4 == 0) ::setsockopt(fd.get(), SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
      if (open_.size() < 64 && random() % 4 == 0) open_.push_back(std::move(fd));
    }
    if (open_.size() == 64) open_.clear();
  }
  double restarts() const {
    return metric(scene->daemon(0), "kvferry_rails_process_restarts_total") +
           metric(scene->daemon(1), "kvferry_rails_process_restarts_total");
  }
  // Both serve and hand over.
  void require_service() {
    scene->honest().require_more(3);
    for (const int side : {0, 1}) {
      INFO(scene->daemon(side).log_tail());
      CHECK_FALSE(scene->daemon(side).http("/healthz").empty());
      CHECK(comes_true([&] { return !scene->daemon(side).http("/readyz").empty(); }));
    }
  }

 private:
  std::vector<UniqueFd> open_;
};

PortScene& port_scene() {
  static PortScene shared;
  return shared;
}

// What UCX says for a stranger who knows the address of that daemon's rails: it connects, sends
// messages that look like a daemon's, and offers data. None of it has an effect.
std::vector<Bytes8> record(PortScene& p, int side) {
  HostilePeer scout("evil", "");
  REQUIRE(scout.shake_hands(p.scene->daemon(side)) == "");
  Bytes8 address = scout.theirs().rails.at(0).address;
  std::unique_ptr<TcpRelay> relay;
  for (const uint16_t port : p.ports()) {
    const uint8_t wanted[2] = {static_cast<uint8_t>(port >> 8), static_cast<uint8_t>(port)};
    const auto at = std::search(address.begin(), address.end(), wanted, wanted + 2);
    if (at == address.end()) continue;
    relay = std::make_unique<TcpRelay>(port);
    at[0] = static_cast<uint8_t>(relay->port() >> 8);
    at[1] = static_cast<uint8_t>(relay->port());
    break;
  }
  if (!relay) FAIL("no port of the range is in the rails' address");
  const auto dropped = [&] {
    return metric(p.scene->daemon(side), "kvferry_messages_dropped_total");
  };
  const double before = dropped();
  constexpr uint64_t kMessages = 50;
  const rails::LaneKey lane{1};
  rails::testing::Node stranger(rails::testing::loopback());
  rails::testing::start({&stranger});
  REQUIRE(stranger.client->connect(lane, 0, address));
  REQUIRE(rails::testing::pump({&stranger}, [&] { return !stranger.connected.empty(); }));
  Bytes8 message = p.noise(link::kOverheadBytes);
  message[0] = 'K', message[1] = 'V', message[2] = link::kWireVersion;
  for (uint64_t i = 1; i <= kMessages; ++i)
    REQUIRE(stranger.client->send_control(lane, message, rails::SendToken{i}));
  REQUIRE(stranger.client->send_offer(lane, message, {0, 0, 64 << 10},
                                      rails::SendToken{kMessages + 1}));
  CHECK(rails::testing::pump({&stranger}, [&] { return dropped() >= before + kMessages + 1; }));
  return relay->said();
}

}  // namespace

TEST_CASE("random bytes at the rails' ports") {
  PortScene& p = port_scene();
  const double before = p.restarts();
  const uint64_t thrown = p.thrown;
  for (const std::size_t bytes :
       {0U, 1U, 4U, 8U, 9U, 16U, 54U, 55U, 60U, 88U, 89U, 128U, 1000U, 4096U, 65536U})
    for (int times = 0; times < 4; ++times) p.throw_at_ports(p.noise(bytes));
  CHECK(p.thrown - thrown >= 60);
  p.require_service();
  std::cout << "random bytes: the rails were started again " << p.restarts() - before << " times, "
            << p.scene->honest().failed() << " honest hand-offs failed in all\n";
}

TEST_CASE("beginnings of real conversations at the rails' ports, as they are and changed") {
  PortScene& p = port_scene();
  for (const int side : {0, 1}) {
    CAPTURE(side);
    const std::vector<Bytes8> said = record(p, side);
    std::size_t bytes_said = 0;
    for (const Bytes8& one : said) bytes_said += one.size();
    REQUIRE(bytes_said > 1000);
    const double before = p.restarts();
    const uint64_t thrown = p.thrown;
    for (const Bytes8& one : said) {
      if (one.empty()) continue;
      for (std::size_t bytes = 1; bytes <= std::min<std::size_t>(one.size(), 200);
           bytes += bytes < 100 ? 3 : 20) {
        const Bytes8 prefix(one.begin(), one.begin() + static_cast<std::ptrdiff_t>(bytes));
        p.throw_at_ports(prefix);
        Bytes8 changed = prefix;
        changed[p.random() % bytes] ^= static_cast<uint8_t>(1 + p.random() % 255);
        p.throw_at_ports(changed);
        Bytes8 longer = prefix;
        const Bytes8 more = p.noise(200);
        longer.insert(longer.end(), more.begin(), more.end());
        p.throw_at_ports(longer);
      }
      p.throw_at_ports(one);
      p.throw_at_ports(one);
    }
    CHECK(p.thrown - thrown >= 200);
    p.require_service();
    std::cout << p.thrown - thrown << " beginnings: the rails were started again "
              << p.restarts() - before << " times, " << p.scene->honest().failed()
              << " honest hand-offs failed in all\n";
  }
}

TEST_CASE("a peer whose rails are nowhere, or whose address is none") {
  PortScene& p = port_scene();
  HostilePeer peer("evil", "");
  const double before = p.restarts();
  for (int row = 0; row < 12; ++row) {
    CAPTURE(row);
    const std::string reason = peer.shake_hands(p.scene->daemon(row % 2), [&](rpc::PeerHello& h) {
      Bytes8& address = h.rails[0].address;
      if (row < 4) address = p.noise(1 + p.random() % 300);
      if (row >= 4 && row < 8) address.resize(address.size() * static_cast<unsigned>(row - 3) / 5);
      if (row >= 8) address[p.random() % address.size()] ^= 0xff;
    });
    CHECK(reason == "");
    p.scene->honest().require_more(1);
  }
  p.require_service();
  std::cout << "addresses: the rails were started again " << p.restarts() - before << " times\n";
}

}  // namespace kvferry::testing
