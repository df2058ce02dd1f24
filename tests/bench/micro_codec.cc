// What a message between daemons costs: its body as bytes and back, and with the envelope's tag.
#include <benchmark/benchmark.h>

#include <cstdlib>
#include <vector>

#include "daemon/link/codec.h"
#include "daemon/link/envelope.h"
#include "daemon/link/keys.h"

using namespace kvferry;
using namespace kvferry::engine;
using namespace kvferry::link;

namespace {

// With as much in them as the usual transfer puts there.
MsgOffer offer() {
  MsgOffer m;
  m.chunk = 17;
  m.bytes = 1 << 20;
  return m;
}
MsgUpdate update() {
  MsgUpdate m;
  for (uint64_t i = 0; i < 4; ++i) {
    m.credits.push_back({{i + 1}, 1 << 20});
    m.acks.push_back({0, i});
  }
  return m;
}
MsgPull pull() {
  MsgPull m;
  m.transfer.instance = m.receiver_instance = "default/decode-0";
  m.transfer.id = "qm3zQ0bU2tq4lV6dYtN1Bw";
  for (uint32_t group = 0; group < 2; ++group) m.needs.push_back({group, 0, 8192, {{0, 8192}}});
  for (uint64_t i = 0; i < 8; ++i) m.credits.push_back({{i + 1}, 1 << 20});
  return m;
}
MsgSlice slice() {
  MsgSlice m;
  m.last = true;
  m.bytes = 64 << 20;
  for (uint32_t group = 0; group < 2; ++group) m.ranges.push_back({group, {{0, 8192}}});
  return m;
}

template <typename Make>
void encode(benchmark::State& state, Make make) {
  const auto message = make();
  std::vector<uint8_t> out;
  for (auto _ : state) {
    out.clear();
    if (!encode_body(message, out)) std::abort();
    benchmark::DoNotOptimize(out.data());
  }
  state.counters["bytes"] = static_cast<double>(out.size());
}
template <typename Make>
void decode(benchmark::State& state, Make make) {
  const Message message = make();
  std::vector<uint8_t> body;
  if (!encode_body(message, body)) std::abort();
  const auto type = static_cast<uint8_t>(type_of(message));
  for (auto _ : state) {
    auto back = decode_body(type, body);
    if (!back) std::abort();
    benchmark::DoNotOptimize(back);
  }
}
Message as_control(ControlMessage message) {
  return message;
}

BENCHMARK_CAPTURE(encode, offer, [] { return offer(); });
BENCHMARK_CAPTURE(decode, offer, [] { return Message(offer()); });
BENCHMARK_CAPTURE(encode, update, [] { return as_control(update()); });
BENCHMARK_CAPTURE(decode, update, [] { return as_control(update()); });
BENCHMARK_CAPTURE(encode, pull, [] { return as_control(pull()); });
BENCHMARK_CAPTURE(decode, pull, [] { return as_control(pull()); });
BENCHMARK_CAPTURE(encode, slice, [] { return as_control(slice()); });
BENCHMARK_CAPTURE(decode, slice, [] { return as_control(slice()); });

// Sealed by one daemon and opened by the other.
void seal_and_open_update(benchmark::State& state) {
  LinkTable there;
  LinkTable here;
  there.add(LinkId{1}, derive_keys({}, true));
  here.add(LinkId{2}, derive_keys({}, false));
  const ControlMessage message = update();
  std::vector<uint8_t> sealed;
  uint64_t sequence = 0;
  for (auto _ : state) {
    if (!there.seal({LinkId{1}, 0, 1}, sequence++, message, sealed)) std::abort();
    auto opened = here.open(sealed, Time{});
    if (!opened) std::abort();
    benchmark::DoNotOptimize(opened);
  }
}
BENCHMARK(seal_and_open_update);

}  // namespace
