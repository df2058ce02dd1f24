// kvferry-gpu-bench: how fast the kernels gather and scatter on this GPU, beside a plain copy of
// the same bytes (the limit) and beside what could stand in for them. Every result is compared with
// what it must be; a wrong byte fails the run.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <iostream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "tests/gpu/gpu.h"

namespace kvferry::testing {
namespace {

using kernels::CopyArgs;
using kernels::CopyKind;
using kernels::FlatMemory;

struct Options {
  int device = 0;
  uint64_t mib = 256;
  uint64_t chunk_mib = 0;  // of one launch; 0: all
  uint32_t rounds = 9;
  uint32_t launches = 10;  // of a round
  uint64_t most_copies = 1 << 17;
  bool json = false;
};

// Pieces of `fragment` bytes in shuffled blocks of one pool, a quarter of which stay untouched.
struct Work {
  uint64_t fragment;
  uint64_t count;
  std::vector<uint32_t> blocks;
  std::vector<std::byte> pool;
  std::vector<std::byte> stream;

  Work(uint64_t fragment_bytes, uint64_t total) : fragment(fragment_bytes) {
    count = std::max<uint64_t>(total / fragment, 1);
    blocks.resize(count + count / 4 + 1);
    std::iota(blocks.begin(), blocks.end(), 0);
    std::mt19937_64 random(fragment);
    std::shuffle(blocks.begin(), blocks.end(), random);
    pool.resize(blocks.size() * fragment);
    for (std::size_t i = 0; i + 8 <= pool.size(); i += 8) {
      const uint64_t value = i * 0x9E3779B97F4A7C15;
      std::copy_n(reinterpret_cast<const std::byte*>(&value), 8, pool.data() + i);
    }
    blocks.resize(count);
    stream.reserve(bytes());
    for (const uint32_t block : blocks)
      stream.insert(stream.end(), pool.begin() + static_cast<std::ptrdiff_t>(block * fragment),
                    pool.begin() + static_cast<std::ptrdiff_t>((block + 1) * fragment));
  }
  uint64_t bytes() const { return count * fragment; }

  kernels::CopyPlan plan() const {
    using kernels::Axis;
    kernels::CopyPlan out;
    kernels::Bundle bundle;
    bundle.cell_bytes = fragment;
    bundle.order = {Axis::kRow, Axis::kPlane, Axis::kBlock, Axis::kToken, Axis::kUnit};
    bundle.row_count = bundle.plane_count = bundle.segment_count = 1;
    bundle.block_count = static_cast<uint32_t>(count);
    bundle.unit_count = 1;
    bundle.token_count = count;
    bundle.rows_regular = bundle.planes_regular = true;
    bundle.bytes = out.bytes = bytes();
    out.bundles = {bundle};
    out.rows = {0, 1};
    out.segments = {0, 1};
    out.strips = {{0, fragment, fragment, fragment, 0}};
    for (uint32_t i = 0; i < count; ++i) {
      out.blocks.push_back({i, i});
      out.spans.push_back({blocks[i], 0, 1});
    }
    out.blocks.push_back({count, static_cast<uint32_t>(count)});
    out.pool_count = 1;
    return out;
  }
};

struct Row {
  std::string name;
  double gbps = 0;  // 0: not measured
  std::string why_not;
};

class Bench {
 public:
  Bench(Gpu& gpu, const Options& options, const Work& work)
      : gpu_(gpu),
        options_(options),
        work_(work),
        pool_(gpu, work.pool.size()),
        chunk_(gpu, work.bytes()),
        pinned_(gpu, work.bytes()),
        plan_(gpu, work.plan(), std::vector<uint64_t>{pool_.address()}) {
    pool_.put(work.pool.data());
    for (uint64_t i = 0; i < work.count; ++i) {
      to_.push_back(chunk_.address() + i * work.fragment);
      from_.push_back(pool_.address() + work.blocks[i] * work.fragment);
      sizes_.push_back(work.fragment);
    }
  }

  std::vector<Row> run() {
    const cuda::Api& api = gpu_.api();
    rows_.clear();
    // The limit: the same bytes in one piece. Their values do not matter.
    measure("copy_d2d", [&] {
      gpu_.check(
          api.cuMemcpyDtoDAsync(chunk_.address(), pool_.address(), work_.bytes(), gpu_.stream()),
          "cuMemcpyDtoDAsync");
    });
    wipe();
    measure("gather", [&] { launch(CopyKind::kGather, chunk_.address(), FlatMemory::kDevice); });
    check_chunk("gather");
    engines();
    wipe_pool();
    measure("scatter", [&] { launch(CopyKind::kScatter, chunk_.address(), FlatMemory::kDevice); });
    check_pool("scatter");
    measure("copy_d2h", [&] {
      gpu_.check(
          api.cuMemcpyDtoHAsync(pinned_.data(), chunk_.address(), work_.bytes(), gpu_.stream()),
          "cuMemcpyDtoHAsync");
    });
    std::fill_n(pinned_.data(), work_.bytes(), std::byte{0xEE});
    measure("gather_to_host",
            [&] { launch(CopyKind::kGather, pinned_.address(), FlatMemory::kHost); });
    if (!std::equal(work_.stream.begin(), work_.stream.end(), pinned_.data()))
      throw std::runtime_error("gather_to_host: wrong bytes");
    wipe_pool();
    measure("scatter_from_host",
            [&] { launch(CopyKind::kScatter, pinned_.address(), FlatMemory::kHost); });
    check_pool("scatter_from_host");
    return rows_;
  }

 private:
  // What could gather instead of a kernel: the copy engines, told of each piece.
  void engines() {
    const cuda::Api& api = gpu_.api();
    if (work_.count > options_.most_copies) {
      const std::string why = "more than --most-copies pieces";
      rows_.push_back({"gather_by_copies", 0, why});
      rows_.push_back({"gather_by_batch", 0, why});
      return;
    }
    wipe();
    measure("gather_by_copies", [&] {
      for (uint64_t i = 0; i < work_.count; ++i)
        gpu_.check(api.cuMemcpyDtoDAsync(to_[i], from_[i], work_.fragment, gpu_.stream()),
                   "cuMemcpyDtoDAsync");
    });
    check_chunk("gather_by_copies");
    if (api.cuMemcpyBatchAsync == nullptr) {
      rows_.push_back({"gather_by_batch", 0, "needs a driver of CUDA 13.0"});
      return;
    }
    wipe();
    measure("gather_by_batch", [&] {
      cuda::CUmemcpyAttributes attributes{};
      attributes.srcAccessOrder = cuda::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
      std::size_t first = 0;
      gpu_.check(api.cuMemcpyBatchAsync(to_.data(), from_.data(), sizes_.data(), work_.count,
                                        &attributes, &first, 1, gpu_.stream()),
                 "cuMemcpyBatchAsync");
    });
    check_chunk("gather_by_batch");
  }

  void launch(CopyKind kind, uint64_t flat, FlatMemory flat_in) {
    const uint64_t chunk = options_.chunk_mib == 0 ? work_.bytes() : options_.chunk_mib << 20;
    for (uint64_t offset = 0; offset < work_.bytes(); offset += chunk) {
      CopyArgs args{};
      args.plan = plan_.view();
      args.stream_offset = offset;
      args.bytes = std::min(chunk, work_.bytes() - offset);
      args.flat = flat + offset;
      args.kind = kind;
      gpu_.launch(args, flat_in);
    }
  }

  // The median over rounds, each of several launches in a row.
  void measure(const std::string& name, const std::function<void()>& launch_once) {
    launch_once();
    gpu_.synchronize();
    std::vector<double> seconds;
    for (uint32_t round = 0; round < options_.rounds; ++round) {
      const auto begin = std::chrono::steady_clock::now();
      for (uint32_t i = 0; i < options_.launches; ++i) launch_once();
      gpu_.synchronize();
      seconds.push_back(
          std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() /
          options_.launches);
    }
    std::nth_element(seconds.begin(), seconds.begin() + options_.rounds / 2, seconds.end());
    rows_.push_back(
        {name, static_cast<double>(work_.bytes()) / seconds[options_.rounds / 2] / 1e9, {}});
  }

  void wipe() { chunk_.put(std::vector<std::byte>(work_.bytes(), std::byte{0xEE}).data()); }
  void check_chunk(const char* name) {
    std::vector<std::byte> bytes(work_.bytes());
    chunk_.get(bytes.data());
    if (bytes != work_.stream) throw std::runtime_error(std::string(name) + ": wrong bytes");
  }
  // The pieces are wiped and must come back; what lies between them must stay.
  void wipe_pool() {
    std::vector<std::byte> bytes = work_.pool;
    for (const uint32_t block : work_.blocks)
      std::fill_n(bytes.data() + block * work_.fragment, work_.fragment, std::byte{0xEE});
    pool_.put(bytes.data());
  }
  void check_pool(const char* name) {
    std::vector<std::byte> bytes(work_.pool.size());
    pool_.get(bytes.data());
    if (bytes != work_.pool) throw std::runtime_error(std::string(name) + ": wrong bytes");
  }

  Gpu& gpu_;
  const Options& options_;
  const Work& work_;
  DeviceBytes pool_;
  DeviceBytes chunk_;
  PinnedBytes pinned_;
  DevicePlan plan_;
  std::vector<cuda::CUdeviceptr> to_;
  std::vector<cuda::CUdeviceptr> from_;
  std::vector<std::size_t> sizes_;
  std::vector<Row> rows_;
};

void run(const Options& options) {
  Gpu gpu(options.device);
  gpu.load_kernels();
  nlohmann::ordered_json out;
  out["device"] = gpu.name();
  out["driver"] = gpu.driver().version_text();
  out["mib"] = options.mib;
  out["chunk_mib"] = options.chunk_mib;
  out["rounds"] = options.rounds;
  if (!options.json)
    std::printf("%s, driver of CUDA %s; %llu MiB, GB/s (ratio to copy_d2d, or to copy_d2h)\n",
                gpu.name().c_str(), gpu.driver().version_text().c_str(),
                static_cast<unsigned long long>(options.mib));
  for (const uint64_t fragment : {512u, 1024u, 2048u, 4096u, 16384u, 65536u, 1u << 20}) {
    const Work work(fragment, options.mib << 20);
    const std::vector<Row> rows = Bench(gpu, options, work).run();
    nlohmann::ordered_json line;
    line["fragment_bytes"] = fragment;
    line["fragments"] = work.count;
    double on_device = 0;
    double to_host = 0;
    if (!options.json) std::printf("%8llu B", static_cast<unsigned long long>(fragment));
    for (const Row& row : rows) {
      if (row.name == "copy_d2d") on_device = row.gbps;
      if (row.name == "copy_d2h") to_host = row.gbps;
      auto& entry = line[row.name];
      if (row.gbps == 0) {
        entry = {{"not_measured", row.why_not}};
        if (!options.json) std::printf("  %s -", row.name.c_str());
        continue;
      }
      entry = {{"gbps", row.gbps}};
      if (!options.json) std::printf("  %s %.1f", row.name.c_str(), row.gbps);
      if (row.name.starts_with("copy_")) continue;
      const double ratio = row.gbps / (row.name.ends_with("_host") ? to_host : on_device);
      entry["ratio"] = ratio;
      if (!options.json) std::printf(" (%.2f)", ratio);
    }
    if (!options.json) std::printf("\n");
    out["sizes"].push_back(std::move(line));
  }
  out["verified"] = true;  // else an exception
  if (options.json) std::cout << out.dump(2) << "\n";
}

}  // namespace
}  // namespace kvferry::testing

int main(int argc, char** argv) {
  kvferry::testing::Options options;
  CLI::App app("Gather and scatter kernels on one GPU, beside plain copies of the same bytes.");
  app.add_option("--device", options.device, "Number of the GPU")->capture_default_str();
  app.add_option("--mib", options.mib, "Bytes of one copy, in MiB")
      ->check(CLI::Range(1, 16384))
      ->capture_default_str();
  app.add_option("--chunk-mib", options.chunk_mib,
                 "Of one launch of a kernel, as the daemon's chunks; 0: one launch for all")
      ->check(CLI::Range(0, 16384))
      ->capture_default_str();
  app.add_option("--rounds", options.rounds, "Of which the median counts")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  app.add_option("--launches", options.launches, "Copies in a row in each round")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  app.add_option("--most-copies", options.most_copies,
                 "Copy engines are not told of more pieces than this")
      ->capture_default_str();
  app.add_flag("--json", options.json, "Print one JSON object instead of a table");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 64;
  }
  try {
    kvferry::testing::run(options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kvferry-gpu-bench: %s\n", error.what());
    return 1;
  }
  return 0;
}
