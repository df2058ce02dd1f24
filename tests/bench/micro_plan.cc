// What compiling a transfer costs: a stream and one side's plan, by number of fragments and slices.
#include <benchmark/benchmark.h>

#include "tests/bench/large_transfer.h"

using namespace kvferry;
using namespace kvferry::mapping;
using namespace kvferry::mapping::test;

namespace {

const LargeTransfer& large() {
  static const LargeTransfer transfer;
  return transfer;
}

// All that a sender's daemon works out for one leg and slice.
void compile_sender(benchmark::State& state) {
  for (auto _ : state) {
    const Stream stream = large().stream();
    const Plan plan = large().source(stream);
    benchmark::DoNotOptimize(plan.bytes());
  }
  state.counters["fragments"] = static_cast<double>(LargeTransfer::kFragments);
}
BENCHMARK(compile_sender)->Unit(benchmark::kMicrosecond);

void compile_receiver(benchmark::State& state) {
  for (auto _ : state) {
    const Stream stream = large().stream();
    const Plan plan = large().destination(stream);
    benchmark::DoNotOptimize(plan.bytes());
  }
  state.counters["fragments"] = static_cast<double>(LargeTransfer::kFragments);
}
BENCHMARK(compile_receiver)->Unit(benchmark::kMicrosecond);

// What the metrics' look at a compiled plan's pieces adds to that.
void estimate_pieces(benchmark::State& state) {
  const Plan plan = large().source(large().stream());
  for (auto _ : state) benchmark::DoNotOptimize(plan.estimate_pieces());
  state.counters["pieces"] = static_cast<double>(plan.estimate_pieces());
}
BENCHMARK(estimate_pieces)->Unit(benchmark::kMicrosecond);

// What the worker's call itself costs: block ids checked, needs worked out.
void needs_of_a_receive(benchmark::State& state) {
  const GroupReceive receive{LargeTransfer::kTokens, 0, large().to};
  for (auto _ : state) {
    auto needs = compute_needs(large().receivers[7], std::span(&receive, 1));
    benchmark::DoNotOptimize(needs);
  }
}
BENCHMARK(needs_of_a_receive)->Unit(benchmark::kMicrosecond);

// Once per pair of instances.
void leg_table(benchmark::State& state) {
  const auto tp = static_cast<uint32_t>(state.range(0));
  GroupSpec spec;
  const auto senders = ranks_of({.tp = tp}, 61, 32, spec);
  const auto receivers = ranks_of({.tp = tp * 2}, 61, 32, spec);
  for (auto _ : state) {
    const auto table = table_of(senders, receivers);
    benchmark::DoNotOptimize(table->legs_of_receiver(0, 0));
  }
}
BENCHMARK(leg_table)->Arg(2)->Arg(8)->Arg(16)->Unit(benchmark::kMicrosecond);

}  // namespace
