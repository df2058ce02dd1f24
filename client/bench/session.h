// What every subcommand needs: the options they share, two daemons over a path (or those that were
// given), what these have used of the processors and tell by their metrics, and how a run ends.
#pragma once

#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "client/bench/daemons.h"
#include "client/bench/hand_off.h"
#include "client/bench/samples.h"

namespace kvferry::bench {

using Json = nlohmann::ordered_json;

inline constexpr int kExitOk = 0;
inline constexpr int kExitFailed = 1;
inline constexpr int kExitUsage = 64;
inline constexpr int kExitInterrupted = 130;

inline constexpr double kGiB = 1024.0 * 1024.0 * 1024.0;

struct CommonOptions {
  std::string path = "tcp";
  uint32_t rounds = 5;
  uint32_t warm_up = 1;
  uint64_t seed = 1;
  bool json = false;
  std::string json_file;
  bool progress = false;
  bool show_metrics = false;
  std::string sender_socket;
  std::string receiver_socket;
  std::string bin;
  std::vector<std::string> settings;
  std::string memory = "host";
  int sender_device = 0;
  int receiver_device = 0;
  uint32_t time_limit_s = 1800;
  uint32_t spoil = 0;
};

// Processor time; negative where a process is not ours to look at.
struct CpuUse {
  double daemon_seconds = 0;
  double rails_seconds = 0;
  double worker_seconds = 0;
  double total() const { return daemon_seconds + rails_seconds + worker_seconds; }
  CpuUse& operator+=(const CpuUse& other);
};

class Session {
 public:
  // The errors of DaemonPair::start.
  static Result<std::unique_ptr<Session>> start(const CommonOptions& options,
                                                const std::string& path);

  const std::string& path() const { return path_; }
  // "tcp", or "given daemons".
  std::string path_name() const { return daemons_ ? path_ : "given daemons"; }
  // Options with sockets, memory and seed filled in.
  HandOff::Options work() const;
  // A round, with what it took of all processes added to `cpu`.
  Result<RoundResult> play(HandOff& hand_off, const Play& play, CpuUse* cpu);
  // Both daemons' figures; none for given daemons.
  Result<std::vector<Metrics>> scrape() const;
  // Of the daemon that has more, see DaemonProcess::private_bytes; 0 for given daemons.
  uint64_t private_bytes() const;
  std::string log_tail() const { return daemons_ ? daemons_->log_tail() : std::string(); }

 private:
  explicit Session(const CommonOptions& options) : options_(options) {}
  CpuUse used() const;

  const CommonOptions& options_;
  std::string path_;
  std::unique_ptr<DaemonPair> daemons_;
};

void tell_progress(const CommonOptions& options, const std::string& text);

// Says what went wrong on stderr, with the ends of the daemons' logs where they help; the status to
// exit with.
int fail(const client::Error& error, const Session* session);

// Prints the table or the object, writes the file. The status to exit with: that of `verified`.
int finish(const CommonOptions& options, const Json& json, const std::string& table, bool verified);

// ---- parts of reports --------------------------------------------------------------------------

// Versions and the machine; `metrics` as scraped, or empty.
Json versions_json(const std::vector<Metrics>& metrics);
Json settings_json(const CommonOptions& options);

// Sum over both daemons of a counter's series whose labels contain `part`.
double metric_sum(const std::vector<Metrics>& sides, const std::string& metric,
                  const std::string& part);

// A side of a transfer tells one figure of each stage when it ends: its wait, and of the others the
// mean over its chunks. Stages of different chunks overlap, so they do not add up to the time.
struct Stage {
  double mean_ms = 0;  // over the sides
  double count = 0;    // of them
};
inline constexpr const char* kStageNames[] = {"wait", "gather", "wire", "scatter"};
Stage stage_between(const std::vector<Metrics>& before, const std::vector<Metrics>& after,
                    const std::string& name);
// {"wait": {"mean_ms", "count", "total_ms"}, ..., "gather_ms_per_chunk", ...}; null without
// metrics.
Json stages_json(const std::vector<Metrics>& before, const std::vector<Metrics>& after);
std::string stages_table(const std::vector<Metrics>& before, const std::vector<Metrics>& after);

// {"daemon", "rails", "worker", "total"} in seconds per GiB moved; null where it is not known.
Json cpu_json(const CpuUse& cpu, uint64_t bytes);
std::string cpu_table(const CpuUse& cpu, uint64_t bytes);

// {"count", "mean_<unit>", "p50_<unit>", "p90_", "p95_", "p99_", "max_"}, of seconds times `scale`.
Json samples_json(const Samples& seconds, double scale, const std::string& unit);

// One line of text, as printf writes it, with its end.
#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
std::string
line(const char* format, ...);

}  // namespace kvferry::bench
