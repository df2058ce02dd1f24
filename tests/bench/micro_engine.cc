// What the engine costs by the number of its peers: a transfer with each of them at once, and links
// on which nothing moves. Chunks of a transfer stay the same, so the cost of a chunk should too.
// See engine_peers.h for what is played around it; that is part of the time, the same for each
// event.
#include <benchmark/benchmark.h>

#include "tests/bench/engine_peers.h"

using namespace kvferry::engine::bench;

namespace {

using Round = void (Peers::*)();

void rounds(benchmark::State& state, Round round, PeersConfig config) {
  config.peers = static_cast<uint32_t>(state.range(0));
  config.batch = static_cast<uint32_t>(state.range(1));
  Peers peers(config);
  (peers.*round)();  // memory is taken, tables are as large as they get
  const uint64_t events = peers.events();
  const uint64_t chunks = peers.chunks_done();
  for (auto _ : state) (peers.*round)();
  peers.verify();
  const auto done = static_cast<double>(peers.chunks_done() - chunks);
  state.counters["per_chunk"] =
      benchmark::Counter(done, benchmark::Counter::kIsRate | benchmark::Counter::kInvert);
  state.counters["events"] = static_cast<double>(peers.events() - events) / done;
  state.counters["refused"] =
      static_cast<double>(peers.offers_refused()) / static_cast<double>(peers.chunks_done());
}

// Room for all that all transfers have credits for.
void engine_sends(benchmark::State& state) {
  rounds(state, &Peers::send_to_all, {});
}
void engine_receives(benchmark::State& state) {
  rounds(state, &Peers::receive_from_all, {});
}
void engine_receives_reserved(benchmark::State& state) {
  rounds(state, &Peers::receive_from_all, {.reserved = true});
}
// The default arena: 32 transfers fill it.
void engine_sends_full_arena(benchmark::State& state) {
  rounds(state, &Peers::send_to_all, {.arena_chunks = 256});
}
void engine_receives_full_arena(benchmark::State& state) {
  rounds(state, &Peers::receive_from_all, {.arena_chunks = 256});
}

void by_peers(benchmark::internal::Benchmark* benchmark) {
  benchmark->ArgNames({"peers", "batch"})->Unit(benchmark::kMillisecond);
  for (const int64_t batch : {1, 64})
    for (const int64_t peers : {1, 4, 16, 64, 256}) benchmark->Args({peers, batch});
}
BENCHMARK(engine_sends)->Apply(by_peers);
BENCHMARK(engine_receives)->Apply(by_peers);
BENCHMARK(engine_receives_reserved)->Apply(by_peers);
BENCHMARK(engine_sends_full_arena)->Apply(by_peers);
BENCHMARK(engine_receives_full_arena)->Apply(by_peers);

// An iteration is one second of links on which nothing moves, with two lanes each.
void engine_idle_second(benchmark::State& state) {
  Peers peers({.peers = static_cast<uint32_t>(state.range(0)), .lanes = 2, .heartbeats = true});
  for (int second = 0; second < 4; ++second) peers.idle_second();
  for (auto _ : state) peers.idle_second();
  peers.verify();
  state.counters["per_link"] =
      benchmark::Counter(static_cast<double>(state.iterations() * state.range(0)),
                         benchmark::Counter::kIsRate | benchmark::Counter::kInvert);
}
BENCHMARK(engine_idle_second)
    ->ArgName("peers")
    ->RangeMultiplier(4)
    ->Range(1, 256)
    ->Unit(benchmark::kMicrosecond);

void engine_snapshot(benchmark::State& state) {
  const Peers peers({.peers = static_cast<uint32_t>(state.range(0)), .lanes = 2});
  for (auto _ : state) {
    const auto snapshot = peers.snapshot();
    benchmark::DoNotOptimize(snapshot.links.data());
  }
  peers.verify();
}
BENCHMARK(engine_snapshot)
    ->ArgName("peers")
    ->RangeMultiplier(4)
    ->Range(1, 256)
    ->Unit(benchmark::kMicrosecond);

}  // namespace
