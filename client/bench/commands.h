// The subcommands. Each starts what it needs, measures, verifies every byte, prints a table or one
// JSON object, and returns the status to exit with.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "client/bench/session.h"

namespace kvferry::bench {

struct FragmentsOptions {
  uint64_t fragments = 16384;
  uint64_t fragment_bytes = 4096;
  std::string places_file;
  bool step = false;
};
int run_fragments(const CommonOptions& common, const FragmentsOptions& options);

struct ModelOptions {
  std::string model = "llama-3-8b";  // or "all"
  uint64_t tokens = 8192;
  std::string pair;           // empty: the model's usual one
  uint32_t block_tokens = 0;  // 0: the model's
};
int run_model(const CommonOptions& common, const ModelOptions& options);

struct LatencyOptions {
  uint64_t bytes = 64 * 1024;
  uint64_t fragment_bytes = 4096;
  uint32_t calls = 200;  // in a round
};
int run_latency(const CommonOptions& common, const LatencyOptions& options);

struct ConcurrencyOptions {
  uint32_t transfers = 64;
  std::vector<uint32_t> sizes_mib = {1, 2, 4, 8, 16, 32, 64};
  std::string model = "deepseek-r1";
  std::string pair = "dep4:tep8";
  uint32_t layers = 4;
};
int run_concurrency(const CommonOptions& common, const ConcurrencyOptions& options);

// Against what the machine can do with the same bytes.
int run_compare(const CommonOptions& common, const FragmentsOptions& options);

struct SweepOptions {
  std::string over = "fragment-bytes";  // "fragments", "bytes"
  std::vector<uint64_t> values;         // empty: a usual range
  uint64_t bytes = uint64_t{64} << 20;  // of a transfer, where fragment-bytes vary
  uint64_t fragment_bytes = 4096;       // where the others vary
  std::vector<std::string> paths;       // empty: that of --path
  bool limits = true;
  std::string plot;
};
int run_sweep(const CommonOptions& common, const SweepOptions& options);

}  // namespace kvferry::bench
