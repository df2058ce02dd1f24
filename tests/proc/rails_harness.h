// Two daemons' rails in one test: each node is a RailsClient with its own rails process and arena,
// and a handler that notes what it is told. Everything runs on the test's thread.
#pragma once

#include <poll.h>
#include <sys/mman.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "daemon/rails/rails_client.h"
#include "daemon/rails/shared_memory.h"

namespace kvferry::rails::testing {

inline constexpr uint64_t kArenaBytes = 64ULL << 20;

// The one built beside the tests, or another one to be tested (built with another UCX).
inline std::string rails_binary() {
  const char* const other = std::getenv("KVFERRY_RAILS_BINARY");
  return other != nullptr ? other : KVFERRY_RAILS_BINARY;
}

class Node : public RailsEvents {
 public:
  struct Offer {
    uint32_t rail = 0;
    DescriptorId descriptor;
    std::vector<uint8_t> header;
    uint64_t bytes = 0;
    bool too_many = false;
  };
  struct Receive {
    bool ok = false;
    uint64_t bytes = 0;
  };

  explicit Node(RailsConfig config, uint64_t arena_bytes = kArenaBytes) {
    auto memory = make_sealed_memfd("test-arena", arena_bytes);
    REQUIRE(memory);
    memory_ = std::move(*memory);
    auto mapping = Mapping::map(memory_.get(), arena_bytes);
    REQUIRE(mapping);
    arena_ = std::move(*mapping);
    const Segment segment = {memory_.get(), arena_bytes};
    make_client(std::move(config), {&segment, 1});
  }
  // With an arena that the caller looks after.
  Node(RailsConfig config, std::span<const Segment> segments) {
    make_client(std::move(config), segments);
  }

  uint8_t* arena() const { return reinterpret_cast<uint8_t*>(arena_.base()); }

  // A control message, and the header of an offer, as bytes.
  static std::vector<uint8_t> bytes_of(const std::string& text) {
    return {text.begin(), text.end()};
  }
  static std::string text_of(std::span<const uint8_t> bytes) {
    return {bytes.begin(), bytes.end()};
  }

  void on_ready(const RailsReady& told) override {
    ready = told;
    ++ready_count;
  }
  void on_connected(LaneKey lane) override { connected.push_back(lane.value); }
  void on_connect_failed(LaneKey lane, int) override { connect_failed.push_back(lane.value); }
  void on_lane_error(LaneKey lane, int) override { lane_errors.push_back(lane.value); }
  void on_closed(LaneKey lane) override { closed.push_back(lane.value); }
  void on_control(uint32_t, std::span<const uint8_t> message) override {
    controls.push_back(text_of(message));
  }
  void on_offer(const OfferIn& offer) override {
    Offer copy = {offer.rail,
                  offer.descriptor,
                  {offer.header.begin(), offer.header.end()},
                  offer.data_bytes,
                  offer.too_many};
    offers.push_back(copy);
    if (offer_handler) offer_handler(copy);
  }
  void on_send_ended(SendToken token, bool ok) override { sends[token.value] = ok; }
  void on_receive_ended(LandingId landing, bool ok, uint64_t bytes) override {
    receives[landing.value] = {ok, bytes};
    if (receive_handler) receive_handler(landing, ok);
  }
  void on_died(const RailsExit& told) override {
    deaths.push_back(told);
    // A restart must not hide it.
    if (told.signal == SIGSYS && !may_be_refused) FAIL("rails died: " + told.why);
  }

  std::unique_ptr<RailsClient> client;
  RailsReady ready;
  int ready_count = 0;
  std::vector<uint64_t> connected, connect_failed, lane_errors, closed;
  std::vector<std::string> controls;
  std::vector<Offer> offers;
  std::map<uint64_t, bool> sends;
  std::map<uint64_t, Receive> receives;
  std::vector<RailsExit> deaths;
  bool may_be_refused = false;  // a system call
  std::function<void(const Offer&)> offer_handler;
  std::function<void(LandingId, bool)> receive_handler;

 private:
  void make_client(RailsConfig config, std::span<const Segment> segments) {
    auto made = RailsClient::make(std::move(config), segments);
    if (!made) FAIL(made.error().to_string());
    client = std::move(*made);
  }

  UniqueFd memory_;
  Mapping arena_;
};

// Serves the nodes until `done` holds; false when it does not within `limit`.
inline bool pump(const std::vector<Node*>& nodes, const std::function<bool()>& done,
                 Duration limit = std::chrono::seconds(30)) {
  const Time deadline = monotonic_now() + limit;
  for (;;) {
    bool may_sleep = true;
    for (Node* node : nodes) node->client->poll(monotonic_now(), *node);
    if (done()) return true;
    if (monotonic_now() >= deadline) return false;
    std::vector<pollfd> waits;
    for (Node* node : nodes) {
      if (!node->client->prepare_wait()) may_sleep = false;
      const auto more = node->client->pollfds();
      waits.insert(waits.end(), more.begin(), more.end());
    }
    if (may_sleep) ::poll(waits.data(), waits.size(), 20);
  }
}

// Starts the nodes and joins them by lane `key` on `rail` of both.
inline void start(const std::vector<Node*>& nodes) {
  for (Node* node : nodes) {
    auto status = node->client->start(monotonic_now());
    if (!status) FAIL(status.error().to_string());
  }
  REQUIRE(pump(nodes, [&] {
    for (Node* node : nodes) {
      if (!node->deaths.empty()) FAIL("rails died: " + node->deaths.back().why);
      if (node->ready_count == 0) return false;
    }
    return true;
  }));
}

inline void join(Node& a, Node& b, uint64_t key, uint32_t rail = 0) {
  REQUIRE(a.client->connect(LaneKey{key}, rail, b.ready.rails[rail].address));
  REQUIRE(b.client->connect(LaneKey{key}, rail, a.ready.rails[rail].address));
  const auto has = [key](const std::vector<uint64_t>& keys) {
    return std::find(keys.begin(), keys.end(), key) != keys.end();
  };
  REQUIRE(pump({&a, &b}, [&] { return has(a.connected) && has(b.connected); }));
}

inline RailsConfig loopback(const std::string& transport = "tcp") {
  RailsConfig config;
  config.executable = rails_binary();
  config.rails = {{transport, transport == "tcp" ? "lo" : ""}};
  return config;
}

// Bytes that differ from place to place and from seed to seed.
inline void fill(uint8_t* at, uint64_t bytes, uint64_t seed) {
  for (uint64_t i = 0; i < bytes; ++i)
    at[i] = static_cast<uint8_t>((i * 131 + seed * 7919 + (i >> 12)) ^ (seed >> 3));
}
inline bool holds(const uint8_t* at, uint64_t bytes, uint64_t seed) {
  std::vector<uint8_t> wanted(bytes);
  fill(wanted.data(), bytes, seed);
  return std::memcmp(at, wanted.data(), bytes) == 0;
}

}  // namespace kvferry::rails::testing
