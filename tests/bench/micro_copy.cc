// Gather, scatter and the copy between pages on one thread, by size of fragment, beside memcpy of
// the same fragments. Each copies 64 MiB out of or into shuffled places, in chunks of 1 MiB as the
// daemon does; the first pass is compared byte by byte.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/host_copy.h"

using namespace kvferry::kernels;

namespace {

constexpr uint64_t kBytes = uint64_t{64} << 20;
constexpr uint64_t kChunk = uint64_t{1} << 20;

// One side: a pool with a quarter more blocks than are used, one fragment a block.
struct Scattered {
  uint64_t fragment_bytes;
  std::vector<std::byte> pool;
  std::vector<uint32_t> blocks;
  CopyPlan plan;
  std::byte* base = nullptr;

  Scattered(uint64_t fragment, uint64_t seed) : fragment_bytes(fragment) {
    const uint64_t count = kBytes / fragment;
    blocks.resize(count + count / 4);
    pool.resize(blocks.size() * fragment);
    base = pool.data();
    std::mt19937_64 random(seed);
    for (uint64_t i = 0; i + 8 <= pool.size(); i += 8) {
      const uint64_t word = random();
      std::memcpy(pool.data() + i, &word, 8);
    }
    std::iota(blocks.begin(), blocks.end(), 0U);
    std::shuffle(blocks.begin(), blocks.end(), random);
    blocks.resize(count);

    Bundle bundle;
    bundle.bytes = kBytes;
    bundle.cell_bytes = fragment;
    bundle.order = {Axis::kRow, Axis::kPlane, Axis::kBlock, Axis::kToken, Axis::kUnit};
    bundle.row_count = bundle.plane_count = bundle.segment_count = 1;
    bundle.block_count = static_cast<uint32_t>(count);
    bundle.token_count = count;
    bundle.unit_count = 1;
    plan.bytes = kBytes;
    plan.pool_count = 1;
    plan.bundles = {bundle};
    plan.rows = {0, 1};
    plan.strips = {Strip{0, fragment, 0, 0, 0}};
    plan.segments = {0, 1};
    for (uint32_t i = 0; i < count; ++i) {
      plan.blocks.push_back({i, i});
      plan.spans.push_back({blocks[i], 0, 1});
    }
    plan.blocks.push_back({count, static_cast<uint32_t>(count)});
  }
  std::byte* fragment(uint64_t i) { return base + blocks[i] * fragment_bytes; }
  std::span<std::byte* const> bases() const { return {&base, 1}; }
};

void require(bool right) {
  if (!right) std::abort();
}

void told(benchmark::State& state) {
  state.SetBytesProcessed(static_cast<int64_t>(kBytes) * static_cast<int64_t>(state.iterations()));
}

void gather_pages(benchmark::State& state) {
  Scattered from(static_cast<uint64_t>(state.range(0)), 1);
  std::vector<std::byte> chunk(kChunk);
  const auto pass = [&](auto&& check) {
    for (uint64_t at = 0; at < kBytes; at += kChunk) {
      require(gather(from.plan, from.bases(), at, kChunk, chunk.data()));
      check(at);
    }
  };
  pass([&](uint64_t at) {
    for (uint64_t i = 0; i < kChunk; i += from.fragment_bytes)
      require(std::memcmp(chunk.data() + i, from.fragment((at + i) / from.fragment_bytes),
                          from.fragment_bytes) == 0);
  });
  for (auto _ : state) pass([&](uint64_t) { benchmark::DoNotOptimize(chunk.data()); });
  told(state);
}

void scatter_pages(benchmark::State& state) {
  Scattered to(static_cast<uint64_t>(state.range(0)), 2);
  std::vector<std::byte> chunk(kChunk);
  std::iota(reinterpret_cast<uint8_t*>(chunk.data()),
            reinterpret_cast<uint8_t*>(chunk.data()) + kChunk, uint8_t{1});
  const auto pass = [&] {
    for (uint64_t at = 0; at < kBytes; at += kChunk)
      require(scatter(to.plan, to.bases(), at, kChunk, chunk.data()));
  };
  pass();
  for (uint64_t i = 0; i < to.blocks.size(); ++i)
    require(std::memcmp(to.fragment(i), chunk.data() + i * to.fragment_bytes % kChunk,
                        to.fragment_bytes) == 0);
  for (auto _ : state) pass();
  told(state);
}

void transfer_pages(benchmark::State& state) {
  Scattered from(static_cast<uint64_t>(state.range(0)), 1);
  Scattered to(static_cast<uint64_t>(state.range(0)), 2);
  const auto pass = [&] {
    for (uint64_t at = 0; at < kBytes; at += kChunk)
      require(transfer(from.plan, from.bases(), to.plan, to.bases(), at, kChunk));
  };
  pass();
  for (uint64_t i = 0; i < to.blocks.size(); ++i)
    require(std::memcmp(to.fragment(i), from.fragment(i), to.fragment_bytes) == 0);
  for (auto _ : state) pass();
  told(state);
}

// The limits: the same fragments by memcpy, from place to place and through a warm chunk.
void memcpy_pages(benchmark::State& state) {
  Scattered from(static_cast<uint64_t>(state.range(0)), 1);
  Scattered to(static_cast<uint64_t>(state.range(0)), 2);
  for (auto _ : state) {
    for (uint64_t i = 0; i < from.blocks.size(); ++i)
      std::memcpy(to.fragment(i), from.fragment(i), from.fragment_bytes);
    benchmark::ClobberMemory();
  }
  told(state);
}
void memcpy_to_chunk(benchmark::State& state) {
  Scattered from(static_cast<uint64_t>(state.range(0)), 1);
  std::vector<std::byte> chunk(kChunk);
  for (auto _ : state) {
    for (uint64_t i = 0; i < from.blocks.size(); ++i)
      std::memcpy(chunk.data() + i * from.fragment_bytes % kChunk, from.fragment(i),
                  from.fragment_bytes);
    benchmark::ClobberMemory();
  }
  told(state);
}
void memcpy_from_chunk(benchmark::State& state) {
  Scattered to(static_cast<uint64_t>(state.range(0)), 2);
  std::vector<std::byte> chunk(kChunk, std::byte{1});
  for (auto _ : state) {
    for (uint64_t i = 0; i < to.blocks.size(); ++i)
      std::memcpy(to.fragment(i), chunk.data() + i * to.fragment_bytes % kChunk, to.fragment_bytes);
    benchmark::ClobberMemory();
  }
  told(state);
}

void sizes(benchmark::internal::Benchmark* of) {
  for (const int64_t bytes : {256, 512, 1024, 4096, 16384, 65536, 1 << 20}) of->Arg(bytes);
  of->Unit(benchmark::kMillisecond);
}
BENCHMARK(gather_pages)->Apply(sizes);
BENCHMARK(memcpy_to_chunk)->Apply(sizes);
BENCHMARK(scatter_pages)->Apply(sizes);
BENCHMARK(memcpy_from_chunk)->Apply(sizes);
BENCHMARK(transfer_pages)->Apply(sizes);
BENCHMARK(memcpy_pages)->Apply(sizes);

}  // namespace
