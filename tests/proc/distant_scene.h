// Two hosts: each a whole daemon in a network namespace of its own, joined by roads alone. Peers'
// gRPC goes by road 0, a rail by each. Workers are in the test's process and reach their daemons by
// Unix sockets, as those are of the file system. One thread at a time.
#pragma once

#include <sys/stat.h>

#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "tests/proc/hand_off_daemons.h"
#include "tests/proc/roads.h"

namespace kvferry::testing {

inline constexpr uint64_t kMiB = 1 << 20;

// How one rank's side of a transfer ended, and how long after the moment that counts.
struct DistantEnd {
  std::string text;  // "FAILED PEER_LOST"
  double seconds = 0;
};

struct DistantEnds {
  DistantEnd of[2];  // by side
  const DistantEnd& operator[](int side) const { return of[side]; }
  const DistantEnd* begin() const { return of; }
  const DistantEnd* end() const { return of + 2; }
};

class DistantScene {
 public:
  struct How {
    std::vector<uint64_t> speeds = {20 * kMiB};  // of each road, bytes a second
    bool mtls = false;                           // else plain, with a cluster secret
    uint64_t tokens = 2048;                      // 4 KiB each
    std::vector<std::string> settings = {};
  };
  // Set unless `settings` say otherwise.
  static constexpr double kSilenceSeconds = 2;

  explicit DistantScene(const How& how) : roads(how.speeds), how_(how) {
    char directory[] = "/tmp/kvferry-distant.XXXXXX";
    REQUIRE(::mkdtemp(directory) != nullptr);
    directory_ = directory;
    if (how.mtls) {
      const std::string command = KVFERRY_SOURCE_DIR "/deploy/make-test-certs.sh " + directory_ +
                                  "/certs " + kNames[0] + " " + kNames[1] + " >/dev/null";
      REQUIRE(std::system(command.c_str()) == 0);
    } else {
      const std::string file = directory_ + "/secret";
      std::ofstream(file) << "a secret of the two hosts of this test";
      REQUIRE(::chmod(file.c_str(), 0600) == 0);
    }
    for (const int side : {0, 1}) start_daemon(side);
    for (const int side : {0, 1}) {
      require_ok(daemons_[side]->wait_until_serving());
      start_workers(side);
    }
    hand_over();  // which makes the link
    require_lanes(static_cast<int>(how.speeds.size()));
  }
  ~DistantScene() {
    for (auto& party : parties_) party.reset();
    for (auto& daemon : daemons_)
      if (daemon && daemon->pid() > 0) ::kill(daemon->pid(), SIGTERM);
    for (auto& daemon : daemons_) daemon.reset();
    std::error_code error;
    std::filesystem::remove_all(directory_, error);
  }
  DistantScene(const DistantScene&) = delete;
  DistantScene& operator=(const DistantScene&) = delete;

  Roads roads;

  bench::DaemonProcess& daemon(int side) { return *daemons_[side]; }
  const bench::DaemonProcess& daemon(int side) const { return *daemons_[side]; }
  Party& party(int side) { return *parties_[side]; }
  std::string log_tail() const { return daemons_[0]->log_tail() + daemons_[1]->log_tail(); }

  // The host's daemon is killed; nothing is said to anybody by a network that is cut.
  void kill_daemon(int side) { daemons_[side]->kill_now(); }
  // The same host again, with the same name and place, until its worker has registered again.
  void return_daemon(int side) {
    start_daemon(side);
    require_ok(daemons_[side]->wait_until_serving());
    const client::Bytes16 before = boots_[side];
    const bool again = comes_true([&] {
      client::Client& worker = parties_[side]->rank(0);
      return worker.attached() && worker.boot_id() != before;
    });
    INFO(log_tail());
    REQUIRE(again);
    boots_[side] = parties_[side]->rank(0).boot_id();
  }

  TransferKey begin(uint64_t tokens = 0, const Party::Receive& how = {}) {
    parties_[1]->clean();
    const TransferKey key = new_key("");
    const auto ticket = parties_[0]->ticket();
    require_ok(ticket);
    Party::Send send;
    send.num_tokens = tokens;
    Party::Receive receive = how;
    receive.num_tokens = tokens;
    require_ok(parties_[0]->send(key, send));
    require_ok(parties_[1]->receive(key, *ticket, receive));
    return key;
  }
  // Begins one with all tokens, of which some have arrived, and most have not.
  TransferKey begin_and_move(const Party::Receive& receive = {}) {
    const double before = received();
    const TransferKey key = begin(0, receive);
    const bool moves = comes_true([&] { return received() - before >= bytes() / 16; });
    INFO(log_tail());
    REQUIRE(moves);
    REQUIRE(received() - before < bytes() * 3 / 4);
    return key;
  }
  // Waits for both at once; both have their memory back. Closes the transfer.
  DistantEnds ends(const TransferKey& key, std::chrono::steady_clock::time_point since) {
    DistantEnds out;
    std::thread waiters[2];
    for (const int side : {0, 1})
      waiters[side] = std::thread([&, side] {
        const auto ended = parties_[side]->wait(key.id, kPatience);
        out.of[side].seconds =
            std::chrono::duration<double>(std::chrono::steady_clock::now() - since).count();
        if (!ended) {
          out.of[side].text = ended.error().to_string();
          return;
        }
        const TransferStatus& status = ended->front();
        out.of[side].text = std::string(name_of(status.state)) + " " + std::string(status.reason);
      });
    for (std::thread& waiter : waiters) waiter.join();
    for (const int side : {0, 1}) require_ok(parties_[side]->close(key.id));
    return out;
  }
  void require_done(const TransferKey& key, uint64_t tokens = 0) {
    const auto ended = ends(key, std::chrono::steady_clock::now());
    INFO(log_tail());
    REQUIRE(ended[1].text == "COMPLETED NONE");
    REQUIRE(ended[0].text == "DELIVERED NONE");
    require_pages(tokens);
  }
  // The first tokens are the sender's, and every byte of all other pages is as it was.
  void require_pages(uint64_t tokens) { REQUIRE(parties_[1]->verify(tokens) == ""); }
  void hand_over(uint64_t tokens = 0) { require_done(begin(tokens), tokens); }

  // After a failed transfer, with the road whole again: what is late of it gets its chance, while
  // all but a few pages are watched.
  void require_healed(int lanes = 1) {
    for (int i = 0; i < 2; ++i) hand_over(how_.tokens / 16);
    require_lanes(lanes);
    hand_over();
    require_nothing_held();
  }
  void require_lanes(int count) {
    for (const int side : {0, 1}) {
      const bool up = comes_true(
          [&] { return metric(daemon(side), "kvferry_lanes", "state=\"up\"") == count; });
      INFO("side " << side << "\n" << log_tail());
      REQUIRE(up);
    }
  }
  void require_nothing_held() {
    for (const int side : {0, 1}) {
      CAPTURE(side);
      CHECK(comes_true([&] { return arena_in_use(daemon(side)) == 0; }));
      CHECK(comes_true([&] { return metric(daemon(side), "kvferry_transfers_open") == 0; }));
    }
  }
  double received() const { return metric(daemon(1), "kvferry_transfer_bytes_total", "received"); }
  double sent_by(int rail) const {
    return metric(daemon(0), "kvferry_rail_bytes_total", "rail=\"" + std::to_string(rail) + "\"",
                  "direction=\"sent\"");
  }
  double bytes() const { return static_cast<double>(how_.tokens * 4096); }

 private:
  static constexpr const char* kNames[2] = {"host-a", "host-b"};

  std::string identity(int side) const {
    return (how_.mtls ? "spiffe://kvferry.test/" : "") + std::string(kNames[side]);
  }
  void start_daemon(int side) {
    daemons_[side].reset();
    bench::DaemonOptions options;
    options.binary_directory = binary_directory();
    options.inside = roads.inside_words(side);
    options.network = roads.network(side);
    std::string devices = "rails.devices=";
    for (std::size_t road = 0; road < how_.speeds.size(); ++road)
      devices += (road == 0 ? "road" : ",road") + std::to_string(road);
    options.settings = {"arena.bytes=32MiB",
                        "arena.segment_bytes=16MiB",
                        "engine.chunk_bytes=256KiB",
                        devices,
                        "rails.port_range=20000-20999",
                        "engine.heartbeat_interval=200ms",
                        "engine.silence_limit=2s"};
    if (const char* const rails = std::getenv("KVFERRY_RAILS_BINARY"))
      options.settings.push_back("rails.binary=" + std::string(rails));
    const std::string mine = directory_ + "/certs/" + kNames[side];
    if (how_.mtls)
      for (const std::string& setting :
           {std::string("peer.mode=mtls"), "peer.certificate_file=" + mine + ".pem",
            "peer.key_file=" + mine + ".key", "peer.ca_file=" + directory_ + "/certs/ca.pem"})
        options.settings.push_back(setting);
    else
      options.settings.push_back("peer.cluster_secret_file=" + directory_ + "/secret");
    options.settings.insert(options.settings.end(), how_.settings.begin(), how_.settings.end());
    bench::DaemonProcess::Identity who;
    who.name = kNames[side];
    who.host = Roads::address(0, side);
    who.peer_port = kPeerPort;
    who.toml = "[node]\nid = \"" + identity(side) + "\"\n[[peers]]\nidentity = \"" +
               identity(1 - side) + "\"\naddresses = [\"" + Roads::address(0, 1 - side) + ":" +
               std::to_string(kPeerPort) + "\"]\nmode = \"" + (how_.mtls ? "mtls" : "plain") +
               "\"\n";
    auto daemon = bench::DaemonProcess::start(directory_, who, options);
    require_ok(daemon);
    daemons_[side] = std::move(*daemon);
  }
  void start_workers(int side) {
    Party::Options options;
    options.instance = side == 0 ? "prefill" : "decode";
    options.socket = daemons_[side]->socket();
    options.shape = shape_of(4, 2, 256, how_.tokens);  // 4 KiB a token
    options.sends = side == 0;
    options.seed = static_cast<uint64_t>(side) + 1;
    options.reconnect = true;
    const auto topology = bench::parse_topology("tp1");
    require_ok(topology);
    options.topology = *topology;
    auto party = Party::make(options);
    require_ok(party);
    parties_[side] = std::move(*party);
    boots_[side] = parties_[side]->rank(0).boot_id();
  }

  static constexpr uint16_t kPeerPort = 7400;  // each has its network to itself
  How how_;
  std::string directory_;
  std::unique_ptr<bench::DaemonProcess> daemons_[2];
  std::unique_ptr<Party> parties_[2];
  client::Bytes16 boots_[2] = {};
};

}  // namespace kvferry::testing
