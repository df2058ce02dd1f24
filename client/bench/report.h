// What a bench run says: a table for people, one JSON object for programs.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "client/bench/daemons.h"

namespace kvferry::bench {

struct Report {
  std::string command;   // "fragments", "model"
  std::string workload;  // "16384 x 4096 B", "llama-3-8b, 8192 tokens, tp2:tp4"
  std::string path;
  uint64_t payload_bytes = 0;
  std::vector<double> seconds;  // one a round
  uint64_t verified_bytes = 0;
  uint64_t untouched_bytes = 0;
  double cpu_seconds = 0;  // of daemons and rails, all rounds; negative: not known
  bool verified = false;
  std::map<std::string, std::string> settings;
  // Sums of both daemons over the timed rounds; empty when daemons were given.
  std::vector<Metrics> before;
  std::vector<Metrics> after;

  double gbps() const;  // 10^9 bytes a second, of the median round
  double percentile_ms(double share) const;
  // Mean seconds of one chunk's stage ("gather", "wire", "scatter") and how many there were.
  struct Stage {
    double seconds = 0;
    double count = 0;
  };
  Stage stage(const std::string& name) const;
  // What a counter grew by, summed over labels that contain `part`.
  double grown(const std::string& metric, const std::string& part = {}) const;
};

std::string to_json(const Report& report);
std::string to_table(const Report& report, bool with_metrics);

}  // namespace kvferry::bench
