// Two daemons with settings of their own, and an instance on each: hand-offs of one request, and
// which rails carried it.
#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "tests/proc/hand_off_daemons.h"

namespace kvferry::testing {

inline constexpr uint64_t kMiB = 1 << 20;

class RailsScene {
 public:
  RailsScene(const std::vector<std::string>& sender, const std::vector<std::string>& receiver,
             uint64_t tokens) {
    char directory[] = "/tmp/kvferry-rails-test.XXXXXX";
    REQUIRE(::mkdtemp(directory) != nullptr);
    directory_ = directory;
    const std::vector<std::string> settings[2] = {sender, receiver};
    const std::string names[2] = {"sender", "receiver"};
    const uint16_t ports[2] = {bench::DaemonProcess::find_port(),
                               bench::DaemonProcess::find_port()};
    for (int side = 0; side < 2; ++side) {
      bench::DaemonOptions options;
      options.binary_directory = binary_directory();
      options.settings = {"arena.bytes=32MiB", "arena.segment_bytes=16MiB"};
      options.settings.insert(options.settings.end(), settings[side].begin(), settings[side].end());
      auto daemon = bench::DaemonProcess::start(
          directory_, {names[side], ports[side], names[1 - side], ports[1 - side]}, options);
      require_ok(daemon);
      daemons_[side] = std::move(*daemon);
    }
    for (int side = 0; side < 2; ++side) {
      require_ok(daemons_[side]->wait_until_serving());
      Party::Options options;
      options.instance = side == 0 ? "prefill" : "decode";
      options.socket = daemons_[side]->socket();
      options.shape = shape_of(4, 2, 256, tokens);  // 4 KiB a token
      options.sends = side == 0;
      options.seed = static_cast<uint64_t>(side) + 1;
      const auto topology = bench::parse_topology("tp1");
      require_ok(topology);
      options.topology = *topology;
      auto party = Party::make(options);
      require_ok(party);
      parties_[side] = std::move(*party);
    }
  }
  ~RailsScene() {
    for (auto& party : parties_) party.reset();
    for (auto& daemon : daemons_) daemon.reset();
    std::error_code error;
    std::filesystem::remove_all(directory_, error);
  }
  RailsScene(const RailsScene&) = delete;
  RailsScene& operator=(const RailsScene&) = delete;

  TransferKey begin() {
    parties_[1]->clean();
    const TransferKey key = new_key("");
    const auto ticket = parties_[0]->ticket();
    require_ok(ticket);
    require_ok(parties_[0]->send(key, {}));
    require_ok(parties_[1]->receive(key, *ticket, {}));
    return key;
  }
  void require_done(const TransferKey& key) {
    for (const int side : {1, 0}) {
      const auto ended = parties_[side]->wait(key.id, kPatience);
      if (!ended) FAIL(ended.error().to_string() << "\n" << log_tail());
      for (const TransferStatus& status : *ended) {
        INFO(status.reason << "\n" << log_tail());
        REQUIRE(status.state == (side == 0 ? client::TransferState::kDelivered
                                           : client::TransferState::kCompleted));
      }
      require_ok(parties_[side]->close(key.id));
    }
    REQUIRE(parties_[1]->verify() == "");
  }
  void hand_over() { require_done(begin()); }

  const bench::DaemonProcess& daemon(int side) const { return *daemons_[side]; }
  double received() const { return metric(daemon(1), "kvferry_transfer_bytes_total", "received"); }
  // Chunk bytes that the sender's rail has sent.
  double sent_by(int rail) const {
    return metric(daemon(0), "kvferry_rail_bytes_total", "rail=\"" + std::to_string(rail) + "\"",
                  "direction=\"sent\"");
  }
  // Whether the sender's rail is by that device and works.
  bool is_up(int rail, const std::string& device) const {
    return metric(daemon(0), "kvferry_rail_up", "rail=\"" + std::to_string(rail) + "\"",
                  "device=\"" + device + "\"") == 1;
  }
  void require_lanes(int count) const {
    for (const int side : {0, 1}) {
      const bool up = comes_true(
          [&] { return metric(daemon(side), "kvferry_lanes", "state=\"up\"") == count; });
      INFO(log_tail());
      REQUIRE(up);
    }
  }
  std::string log_tail() const { return daemons_[0]->log_tail() + daemons_[1]->log_tail(); }

 private:
  std::string directory_;
  std::unique_ptr<bench::DaemonProcess> daemons_[2];
  std::unique_ptr<Party> parties_[2];
};

}  // namespace kvferry::testing
