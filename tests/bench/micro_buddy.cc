// What a region costs: the arena's allocator, empty and under the mix of sizes that chunks have.
#include <benchmark/benchmark.h>

#include <random>
#include <vector>

#include "daemon/memory/buddy.h"

using namespace kvferry;
using namespace kvferry::memory;

namespace {

constexpr uint64_t kKiB = 1024;
constexpr uint64_t kMiB = 1024 * kKiB;
constexpr uint64_t kMinBlock = 4 * kKiB;

// The default arena.
BuddyAllocator arena() {
  return BuddyAllocator(std::vector<uint64_t>(4, 64 * kMiB), kMinBlock);
}

// One region of a chunk, taken and given back, in an arena that has `range(0)` others.
void buddy_allocate_and_free(benchmark::State& state) {
  BuddyAllocator buddy = arena();
  for (int64_t i = 0; i < state.range(0); ++i) (void)buddy.allocate(1 * kMiB);
  for (auto _ : state) {
    const auto region = buddy.allocate(1 * kMiB);
    benchmark::DoNotOptimize(region);
    buddy.free(*region);
  }
}
BENCHMARK(buddy_allocate_and_free)->Arg(0)->Arg(128)->Arg(255);

// Sizes from 4 KiB to 1 MiB, the arena three quarters full, a random region given back each time.
void buddy_mixed_sizes(benchmark::State& state) {
  BuddyAllocator buddy = arena();
  std::mt19937_64 random(1);
  std::vector<Region> held;
  for (auto _ : state) {
    while (buddy.used_bytes() > 192 * kMiB) {
      std::swap(held[random() % held.size()], held.back());
      buddy.free(held.back());
      held.pop_back();
    }
    if (const auto region = buddy.allocate(kMinBlock << random() % 9)) held.push_back(*region);
  }
  state.counters["regions"] = static_cast<double>(held.size());
}
BENCHMARK(buddy_mixed_sizes);

// What a grant asks before it is made.
void buddy_count_fitting(benchmark::State& state) {
  BuddyAllocator buddy = arena();
  for (int i = 0; i < 100; ++i) (void)buddy.allocate(1 * kMiB);
  for (auto _ : state) benchmark::DoNotOptimize(buddy.count_fitting(1 * kMiB));
}
BENCHMARK(buddy_count_fitting);

}  // namespace
