#include "client/bench/session.h"

#include <grpcpp/grpcpp.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <thread>

#include "client/bench/stop.h"

namespace kvferry::bench {
namespace {

using client::Code;
using client::Error;

// A daemon without the GPU is an error, not a slower path. Settings of the user's own come last.
void use_gpu(DaemonOptions& options) {
  std::vector<std::string> settings{"gpu.enabled=on"};
  const char* library = std::getenv("KVFERRY_CUDA_DRIVER");
  if (library != nullptr && *library != 0) settings.push_back("gpu.driver=" + std::string(library));
  options.settings.insert(options.settings.begin(), settings.begin(), settings.end());
}

// The value of a label in "name{label="value",...}".
std::string label_of(const std::string& series, const std::string& label) {
  const std::size_t at = series.find(label + "=\"");
  if (at == std::string::npos) return {};
  const std::size_t begin = at + label.size() + 2;
  return series.substr(begin, series.find('"', begin) - begin);
}

std::string processor() {
  std::ifstream in("/proc/cpuinfo");
  for (std::string text; std::getline(in, text);)
    if (text.starts_with("model name")) return text.substr(text.find(':') + 2);
  return {};
}

}  // namespace

CpuUse& CpuUse::operator+=(const CpuUse& other) {
  daemon_seconds += other.daemon_seconds;
  rails_seconds += other.rails_seconds;
  worker_seconds += other.worker_seconds;
  return *this;
}

// ---- the session -------------------------------------------------------------------------------

Result<std::unique_ptr<Session>> Session::start(const CommonOptions& options,
                                                const std::string& path) {
  std::unique_ptr<Session> session(new Session(options));
  session->path_ = path;
  if (!options.sender_socket.empty()) return session;
  tell_progress(options, "starting two daemons over " + path);
  // Locally both ends are on the first daemon, and the second one stands idle.
  DaemonOptions daemons;
  daemons.path = path == "local" ? "tcp" : path;
  daemons.binary_directory = options.bin;
  daemons.settings = options.settings;
  // Daemons of one machine reach each other's memory; with mapped.host_bytes=0 all goes by the
  // rail.
  if (path == "shm")
    daemons.settings.insert(daemons.settings.begin(), std::string("mapped.host_bytes=64MiB"));
  daemons.ends_with_starter = true;
  if (options.memory != "host") use_gpu(daemons);
  auto started = DaemonPair::start(daemons);
  if (!started) return started.error();
  session->daemons_ = std::move(*started);
  return session;
}

HandOff::Options Session::work() const {
  HandOff::Options work;
  work.sender_socket = daemons_ ? daemons_->side(0).socket() : options_.sender_socket;
  work.receiver_socket =
      daemons_ ? daemons_->side(path_ == "local" ? 0 : 1).socket() : options_.receiver_socket;
  work.memory = options_.memory == "cuda"       ? MemoryKind::kCuda
                : options_.memory == "cuda-vmm" ? MemoryKind::kVmm
                                                : MemoryKind::kHost;
  work.sender_device = options_.sender_device;
  work.receiver_device = options_.receiver_device;
  work.seed = options_.seed;
  if (options_.progress)
    work.progress = [this](const std::string& text) { tell_progress(options_, text); };
  return work;
}

CpuUse Session::used() const {
  CpuUse cpu;
  if (daemons_ == nullptr) {
    cpu.daemon_seconds = cpu.rails_seconds = -1;
    return cpu;
  }
  for (int side = 0; side < 2; ++side) {
    const DaemonProcess::Cpu of = daemons_->side(side).cpu();
    cpu.daemon_seconds += of.daemon_seconds;
    cpu.rails_seconds += of.rails_seconds;
  }
  return cpu;
}

Result<RoundResult> Session::play(HandOff& hand_off, const Play& play, CpuUse* cpu) {
  const CpuUse before = used();
  auto result = hand_off.round(play);
  if (!result || cpu == nullptr) return result;
  const CpuUse after = used();
  cpu->worker_seconds += result->worker_cpu_seconds;
  if (daemons_ == nullptr) {
    cpu->daemon_seconds = cpu->rails_seconds = -1;
  } else {
    cpu->daemon_seconds += after.daemon_seconds - before.daemon_seconds;
    cpu->rails_seconds += after.rails_seconds - before.rails_seconds;
  }
  return result;
}

Result<std::vector<Metrics>> Session::scrape() const {
  std::vector<Metrics> out;
  for (int side = 0; daemons_ != nullptr && side < 2; ++side) {
    auto metrics = daemons_->side(side).metrics();
    if (!metrics) return metrics.error();
    out.push_back(std::move(*metrics));
  }
  return out;
}

uint64_t Session::private_bytes() const {
  if (daemons_ == nullptr) return 0;
  return std::max(daemons_->side(0).private_bytes(), daemons_->side(1).private_bytes());
}

// ---- saying ------------------------------------------------------------------------------------

void tell_progress(const CommonOptions& options, const std::string& text) {
  if (!options.progress) return;
  static const bool terminal = ::isatty(STDERR_FILENO) != 0;
  std::fprintf(stderr, terminal ? "\r\033[K   %s" : "   %s\n", text.c_str());
  std::fflush(stderr);
}

int fail(const Error& error, const Session* session) {
  // A signal to the whole group ends the daemons too, and what is then seen first is chance.
  const std::optional<Error> stop = stop_asked();
  const Error& told = stop ? *stop : error;
  std::fprintf(stderr, "\nkvferry-bench: %s\n", told.to_string().c_str());
  if (told.reason == "BENCH_INTERRUPTED") return kExitInterrupted;
  const bool ours = told.reason == "BENCH_WRONG_BYTES" || told.reason == "BENCH_TIME_LIMIT";
  if (session != nullptr && !ours) std::fprintf(stderr, "%s\n", session->log_tail().c_str());
  return kExitFailed;
}

int finish(const CommonOptions& options, const Json& json, const std::string& table,
           bool verified) {
  if (options.progress && ::isatty(STDERR_FILENO) != 0) std::fprintf(stderr, "\r\033[K");
  const std::string text = json.dump(2) + "\n";
  if (!options.json_file.empty()) {
    std::ofstream file(options.json_file);
    file << text;
    file.close();
    if (!file) {
      std::fprintf(stderr, "kvferry-bench: cannot write --json-file %s\n",
                   options.json_file.c_str());
      return kExitFailed;
    }
  }
  std::cout << (options.json ? text : table) << std::flush;
  if (verified) return kExitOk;
  std::fprintf(stderr, "kvferry-bench: not every byte could be verified\n");
  return kExitFailed;
}

std::string line(const char* format, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return std::string(buffer) + "\n";
}

// ---- parts of reports --------------------------------------------------------------------------

Json versions_json(const std::vector<Metrics>& metrics) {
  Json out;
  for (const Metrics& side : metrics) {
    const auto build = side.lower_bound("kvferry_build_info");
    if (build == side.end() || !build->first.starts_with("kvferry_build_info")) continue;
    out["kvferry"] = label_of(build->first, "version");
    out["commit"] = label_of(build->first, "commit");
    out["ucx"] = label_of(build->first, "ucx");
  }
  out["grpc"] = grpc::Version();
  out["compiler"] = __VERSION__;
  utsname system{};
  if (::uname(&system) == 0) out["kernel"] = std::string(system.sysname) + " " + system.release;
  // Half of what a socket over loopback costs may be this.
  std::ifstream congestion("/proc/sys/net/ipv4/tcp_congestion_control");
  if (std::string name; congestion >> name) out["tcp_congestion_control"] = name;
  out["processor"] = processor();
  out["processors"] = std::thread::hardware_concurrency();
  return out;
}

Json settings_json(const CommonOptions& options) {
  Json out;
  out["seed"] = std::to_string(options.seed);
  out["warm_up"] = std::to_string(options.warm_up);
  out["memory"] = options.memory;
  for (const std::string& setting : options.settings) {
    const std::size_t equals = setting.find('=');
    if (equals != std::string::npos) out[setting.substr(0, equals)] = setting.substr(equals + 1);
  }
  return out;
}

double metric_sum(const std::vector<Metrics>& sides, const std::string& metric,
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

Stage stage_between(const std::vector<Metrics>& before, const std::vector<Metrics>& after,
                    const std::string& name) {
  const std::string label = "stage=\"" + name + "\"";
  const auto grown = [&](const char* metric) {
    return metric_sum(after, metric, label) - metric_sum(before, metric, label);
  };
  Stage stage;
  stage.count = grown("kvferry_stage_duration_seconds_count");
  const double total_ms = grown("kvferry_stage_duration_seconds_sum") * 1e3;
  stage.mean_ms = stage.count > 0 ? total_ms / stage.count : 0;
  return stage;
}

Json stages_json(const std::vector<Metrics>& before, const std::vector<Metrics>& after) {
  if (after.empty()) return nullptr;
  Json out;
  for (const char* name : kStageNames) {
    const Stage stage = stage_between(before, after, name);
    out[name] = {{"mean_ms", stage.mean_ms}, {"count", stage.count}};
  }
  for (const char* name : {"gather", "wire", "scatter"})
    out[name + std::string("_ms_per_chunk")] = out[name]["mean_ms"];
  return out;
}

std::string stages_table(const std::vector<Metrics>& before, const std::vector<Metrics>& after) {
  std::string out;
  for (const char* name : kStageNames) {
    if (after.empty()) break;
    const Stage stage = stage_between(before, after, name);
    out += line("  %-22s %.3f ms a %s (mean of %.0f sides of transfers)", name, stage.mean_ms,
                std::string(name) == "wait" ? "transfer" : "chunk", stage.count);
  }
  return out;
}

Json cpu_json(const CpuUse& cpu, uint64_t bytes) {
  const double gib = static_cast<double>(bytes) / kGiB;
  Json out;
  const auto put = [&](const char* name, double seconds) {
    out[name] = seconds >= 0 && gib > 0 ? Json(seconds / gib) : Json(nullptr);
  };
  put("daemon", cpu.daemon_seconds);
  put("rails", cpu.rails_seconds);
  put("worker", cpu.worker_seconds);
  put("total", cpu.daemon_seconds < 0 ? -1 : cpu.total());
  return out;
}

std::string cpu_table(const CpuUse& cpu, uint64_t bytes) {
  const double gib = static_cast<double>(bytes) / kGiB;
  if (cpu.daemon_seconds < 0 || gib <= 0) return {};
  return line("  %-22s %.2f s per GiB (daemons %.2f, rails %.2f, workers %.2f)", "CPU",
              cpu.total() / gib, cpu.daemon_seconds / gib, cpu.rails_seconds / gib,
              cpu.worker_seconds / gib);
}

Json samples_json(const Samples& seconds, double scale, const std::string& unit) {
  Json out;
  out["count"] = seconds.count();
  out["mean_" + unit] = seconds.mean() * scale;
  for (const auto& [name, share] : std::initializer_list<std::pair<const char*, double>>{
           {"p50_", 0.5}, {"p90_", 0.9}, {"p95_", 0.95}, {"p99_", 0.99}, {"max_", 1}})
    out[name + unit] = seconds.percentile(share) * scale;
  return out;
}

}  // namespace kvferry::bench
