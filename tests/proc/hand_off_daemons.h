// Pairs of daemons for the process tests, and small things said often in them. KVFERRY_BIN_DIR says
// where the programs are, KVFERRY_RAILS_BINARY names another kvferry-rails for the daemons (built
// with another UCX); both in the environment.
#pragma once

#include <catch2/catch.hpp>
#include <chrono>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "client/bench/daemons.h"
#include "tests/proc/hand_off_party.h"

namespace kvferry::testing {

using bench::DaemonPair;
using std::chrono::milliseconds;
using std::chrono::seconds;

inline constexpr seconds kPatience(30);  // for what should take a moment

inline std::string binary_directory() {
  const char* const given = std::getenv("KVFERRY_BIN_DIR");
  return given != nullptr ? given : KVFERRY_BIN_DIR;
}

// `heads` of K and of V, `head_bytes` each for every token, in blocks of the usual size.
inline bench::Shape shape_of(uint32_t layers, uint32_t heads, uint32_t head_bytes,
                             uint64_t tokens) {
  bench::Shape shape;
  shape.name = "test";
  shape.layers = layers;
  shape.kv_heads = heads;
  shape.head_bytes = head_bytes;
  shape.tokens = tokens;
  return shape;
}

// Daemons with small arenas; `settings` win over the defaults here.
inline std::unique_ptr<DaemonPair> start_pair(std::vector<std::string> settings = {}) {
  bench::DaemonOptions options;
  options.binary_directory = binary_directory();
  options.settings = {"arena.bytes=32MiB", "arena.segment_bytes=16MiB"};
  if (const char* const rails = std::getenv("KVFERRY_RAILS_BINARY"))
    options.settings.push_back("rails.binary=" + std::string(rails));
  options.settings.insert(options.settings.end(), settings.begin(), settings.end());
  auto pair = DaemonPair::start(options);
  if (!pair) FAIL(pair.error().to_string());
  return std::move(*pair);
}

// Looks again and again until it is so; false after `limit`.
inline bool comes_true(const std::function<bool()>& condition,
                       std::chrono::steady_clock::duration limit = kPatience) {
  const auto until = std::chrono::steady_clock::now() + limit;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > until) return false;
    std::this_thread::sleep_for(milliseconds(5));  // between two looks
  }
  return true;
}

// The sum of a metric's series whose labels hold both parts; 0 if the daemon does not answer.
inline double metric(const bench::DaemonProcess& daemon, const std::string& name,
                     const std::string& part = {}, const std::string& other = {}) {
  return daemon.sum(name, part, other);
}

// Bytes of the arena that are not free. Negative while the daemon does not answer.
inline double arena_in_use(const bench::DaemonProcess& daemon) {
  const double all = metric(daemon, "kvferry_arena_bytes");
  return all > 0 ? all - metric(daemon, "kvferry_arena_bytes", "state=\"free\"") : -1;
}

// A request of 4 MiB, in 32 blocks.
inline bench::Shape small_shape() {
  bench::Shape shape;
  shape.name = "test";
  shape.layers = 4;
  shape.kv_heads = 4;
  shape.head_bytes = 256;
  shape.tokens = 512;
  return shape;
}

template <typename T>
void require_ok(const client::Result<T>& result) {
  if (!result) FAIL(result.error().to_string());
}

}  // namespace kvferry::testing
