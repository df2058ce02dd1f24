#include "client/bench/report.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

namespace kvferry::bench {
namespace {

double sum_of(const std::vector<Metrics>& sides, const std::string& metric,
              const std::string& part) {
  double sum = 0;
  for (const Metrics& side : sides) {
    for (auto it = side.lower_bound(metric); it != side.end() && it->first.starts_with(metric);
         ++it) {
      const char next = it->first.size() == metric.size() ? '{' : it->first[metric.size()];
      if (next == '{' && it->first.find(part) != std::string::npos) sum += it->second;
    }
  }
  return sum;
}

template <typename... Args>
std::string line(const char* format, Args... args) {
  char buffer[256];
  std::snprintf(buffer, sizeof buffer, format, args...);
  return std::string(buffer) + "\n";
}

}  // namespace

double Report::percentile_ms(double share) const {
  if (seconds.empty()) return 0;
  std::vector<double> sorted = seconds;
  std::sort(sorted.begin(), sorted.end());
  const auto rank = static_cast<std::size_t>(std::ceil(share * static_cast<double>(sorted.size())));
  return sorted[std::clamp<std::size_t>(rank, 1, sorted.size()) - 1] * 1e3;
}

double Report::gbps() const {
  const double ms = percentile_ms(0.5);
  return ms > 0 ? static_cast<double>(payload_bytes) / (ms * 1e6) : 0;
}

double Report::grown(const std::string& metric, const std::string& part) const {
  return sum_of(after, metric, part) - sum_of(before, metric, part);
}

Report::Stage Report::stage(const std::string& name) const {
  const std::string label = "stage=\"" + name + "\"";
  Stage out;
  out.count = grown("kvferry_stage_duration_seconds_count", label);
  const double sum = grown("kvferry_stage_duration_seconds_sum", label);
  out.seconds = out.count > 0 ? sum / out.count : 0;
  return out;
}

std::string to_json(const Report& report) {
  nlohmann::ordered_json out;
  out["command"] = report.command;
  out["workload"] = report.workload;
  out["path"] = report.path;
  out["payload_bytes"] = report.payload_bytes;
  out["rounds"] = report.seconds.size();
  out["gbps"] = report.gbps();
  out["p50_ms"] = report.percentile_ms(0.5);
  out["p99_ms"] = report.percentile_ms(0.99);
  if (report.cpu_seconds >= 0 && report.payload_bytes > 0) {
    const double gib = static_cast<double>(report.payload_bytes) *
                       static_cast<double>(report.seconds.size()) / (1024.0 * 1024.0 * 1024.0);
    out["cpu_s_per_gib"] = report.cpu_seconds / gib;
  } else {
    out["cpu_s_per_gib"] = nullptr;
  }
  out["verified"] = report.verified;
  out["verified_bytes"] = report.verified_bytes;
  out["untouched_bytes"] = report.untouched_bytes;
  if (!report.after.empty()) {
    for (const char* name : {"gather", "wire", "scatter"})
      out["stages"][name + std::string("_ms_per_chunk")] = report.stage(name).seconds * 1e3;
  }
  for (const auto& [key, value] : report.settings) out["settings"][key] = value;
  return out.dump(2);
}

std::string to_table(const Report& report, bool with_metrics) {
  std::string out;
  out += line("  %-22s %s", "workload", report.workload.c_str());
  out += line("  %-22s %.3f GB in %zu rounds over %s", "payload",
              static_cast<double>(report.payload_bytes) / 1e9, report.seconds.size(),
              report.path.c_str());
  out += line("  %-22s %.2f GB/s (median)", "speed", report.gbps());
  out += line("  %-22s p50 %.1f ms, p99 %.1f ms", "time", report.percentile_ms(0.5),
              report.percentile_ms(0.99));
  if (report.cpu_seconds >= 0) {
    const double gib = static_cast<double>(report.payload_bytes) *
                       static_cast<double>(report.seconds.size()) / (1024.0 * 1024.0 * 1024.0);
    out += line("  %-22s %.2f s per GiB (daemons and rails)", "CPU", report.cpu_seconds / gib);
  }
  if (!report.after.empty()) {
    for (const char* name : {"gather", "wire", "scatter"})
      out += line("  %-22s %.2f ms a chunk (mean)", name, report.stage(name).seconds * 1e3);
  }
  out +=
      line("  %-22s %s: %llu bytes of KV, %llu bytes outside untouched", "verified",
           report.verified ? "yes" : "NO", static_cast<unsigned long long>(report.verified_bytes),
           static_cast<unsigned long long>(report.untouched_bytes));
  if (!with_metrics || report.after.empty()) return out;
  out += "  metrics of both daemons\n";
  const std::pair<const char*, const char*> totals[] = {
      {"kvferry_transfers_ended_total", "outcome=\"done\""},
      {"kvferry_transfers_unfinished_total", ""},
      {"kvferry_transfer_bytes_total", "direction=\"sent\""},
      {"kvferry_transfer_bytes_total", "direction=\"received\""},
      {"kvferry_transfer_bytes_total", "direction=\"local\""},
      {"kvferry_chunks_total", "event=\"scattered\""},
      {"kvferry_quarantines_total", ""},
      {"kvferry_messages_dropped_total", ""}};
  for (const auto& [metric, part] : totals) {
    const std::string name = part[0] == 0 ? metric : std::string(metric) + "{" + part + "}";
    out += line("    %-58s %.0f", name.c_str(), sum_of(report.after, metric, part));
  }
  return out;
}

}  // namespace kvferry::bench
