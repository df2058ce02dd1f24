// kvferry-bench: how fast this daemon moves KV on this machine. Every byte of every round is
// verified; a run that could not verify says so and fails.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <optional>

#include "client/bench/daemons.h"
#include "client/bench/hand_off.h"
#include "client/bench/report.h"
#include "client/bench/shapes.h"

namespace kvferry::bench {
namespace {

struct Options {
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

  uint64_t fragments = 16384;
  uint64_t fragment_bytes = 4096;

  std::string model = "llama-3-8b";
  uint64_t tokens = 8192;
  std::string pair = "tp2:tp4";
};

void add_common(CLI::App& command, Options& o) {
  command.add_option("--path", o.path, "How bytes travel")
      ->check(CLI::IsMember({"local", "shm", "tcp"}))
      ->capture_default_str();
  command
      .add_option("--memory", o.memory,
                  "Where pools lie: on the host, or on a GPU as cudaMalloc memory (by CUDA IPC "
                  "handle) or VMM memory (by descriptor)")
      ->check(CLI::IsMember({"host", "cuda", "cuda-vmm"}))
      ->capture_default_str();
  command.add_option("--sender-device", o.sender_device, "Number of the sender's GPU")
      ->check(CLI::Range(0, 1023))
      ->capture_default_str();
  command.add_option("--receiver-device", o.receiver_device, "Number of the receiver's GPU")
      ->check(CLI::Range(0, 1023))
      ->capture_default_str();
  command.add_option("--rounds", o.rounds, "Timed rounds")
      ->check(CLI::Range(1U, 100000U))
      ->capture_default_str();
  command.add_option("--warm-up", o.warm_up, "Rounds before the timed ones")->capture_default_str();
  command.add_option("--seed", o.seed, "Of the shuffled block ids")->capture_default_str();
  command.add_flag("--json", o.json, "Print one JSON object instead of a table");
  command.add_option("--json-file", o.json_file, "Write the JSON object to this file too");
  command.add_flag("--progress", o.progress, "Tell on stderr what is being done");
  command.add_flag("--show-metrics", o.show_metrics, "Print totals of both daemons' metrics");
  command.add_option("--sender-socket", o.sender_socket, "Lifeline of a running daemon");
  command.add_option("--receiver-socket", o.receiver_socket, "Lifeline of a running daemon");
  command.add_option("--bin", o.bin, "Directory of kvferryd; default: that of this program");
  command.add_option("--set", o.settings, "section.key=value for the daemons that are started");
}

void tell(const std::string& text) {
  static const bool terminal = ::isatty(STDERR_FILENO) != 0;
  std::fprintf(stderr, terminal ? "\r\033[K   %s" : "   %s\n", text.c_str());
  std::fflush(stderr);
}

int fail_with(const client::Error& error, const DaemonPair* daemons) {
  std::fprintf(stderr, "\nkvferry-bench: %s\n", error.to_string().c_str());
  if (daemons != nullptr) std::fprintf(stderr, "%s\n", daemons->log_tail().c_str());
  return 1;
}

// A daemon without the GPU is an error, not a slower path. Settings of the user's own come last.
void use_gpu(DaemonOptions& options) {
  std::vector<std::string> settings{"gpu.enabled=on"};
  const char* library = std::getenv("KVFERRY_CUDA_DRIVER");
  if (library != nullptr && *library != 0) settings.push_back("gpu.driver=" + std::string(library));
  options.settings.insert(options.settings.begin(), settings.begin(), settings.end());
}

Result<std::vector<Metrics>> scrape(const DaemonPair& daemons) {
  std::vector<Metrics> out;
  for (int side = 0; side < 2; ++side) {
    auto metrics = daemons.side(side).metrics();
    if (!metrics) return metrics.error();
    out.push_back(std::move(*metrics));
  }
  return out;
}

int run(const Options& o, const std::string& command, HandOff::Options work,
        const std::string& workload) {
  std::unique_ptr<DaemonPair> daemons;
  if (o.sender_socket.empty() != o.receiver_socket.empty()) {
    std::fprintf(stderr, "kvferry-bench: give both sockets or none\n");
    return 64;
  }
  if (o.sender_socket.empty()) {
    if (o.progress) tell("starting two daemons");
    // Locally both ends are on the first daemon, and the second one stands idle.
    const bool local = o.path == "local";
    DaemonOptions daemon_options{local ? "tcp" : o.path, o.bin, o.settings};
    if (o.memory != "host") use_gpu(daemon_options);
    auto started = DaemonPair::start(daemon_options);
    if (!started) return fail_with(started.error(), nullptr);
    daemons = std::move(*started);
    work.sender_socket = daemons->side(0).socket();
    work.receiver_socket = daemons->side(local ? 0 : 1).socket();
  } else {
    work.sender_socket = o.sender_socket;
    work.receiver_socket = o.receiver_socket;
  }
  work.memory = o.memory == "cuda"       ? MemoryKind::kCuda
                : o.memory == "cuda-vmm" ? MemoryKind::kVmm
                                         : MemoryKind::kHost;
  work.sender_device = o.sender_device;
  work.receiver_device = o.receiver_device;
  if (o.progress) work.progress = tell;
  auto hand_off = HandOff::make(std::move(work));
  if (!hand_off) return fail_with(hand_off.error(), daemons.get());

  Report report;
  report.command = command;
  report.workload = workload;
  report.path = o.sender_socket.empty() ? o.path : "given daemons";
  report.payload_bytes = (*hand_off)->payload_bytes();
  report.cpu_seconds = daemons ? 0 : -1;
  report.settings = {{"seed", std::to_string(o.seed)},
                     {"warm_up", std::to_string(o.warm_up)},
                     {"memory", o.memory}};
  if (o.memory != "host") report.settings["devices"] = (*hand_off)->devices();
  for (const std::string& setting : o.settings) {
    const std::size_t equals = setting.find('=');
    if (equals != std::string::npos)
      report.settings[setting.substr(0, equals)] = setting.substr(equals + 1);
  }
  for (uint32_t i = 0; i < o.warm_up + o.rounds; ++i) {
    const bool timed = i >= o.warm_up;
    if (o.progress)
      tell((timed ? "round " + std::to_string(i - o.warm_up + 1) + " of " + std::to_string(o.rounds)
                  : "warm-up round " + std::to_string(i + 1)));
    if (i == o.warm_up && daemons) {
      auto before = scrape(*daemons);
      if (!before) return fail_with(before.error(), daemons.get());
      report.before = std::move(*before);
      for (const auto& [name, value] : report.before[0]) {
        if (name.starts_with("kvferry_build_info")) report.settings["build"] = name;
      }
    }
    const double cpu = daemons ? daemons->cpu_seconds() : 0;
    auto result = (*hand_off)->round();
    if (!result) return fail_with(result.error(), daemons.get());
    if (!timed) continue;
    if (daemons) report.cpu_seconds += daemons->cpu_seconds() - cpu;
    report.seconds.push_back(result->seconds);
    report.verified_bytes += result->cell_bytes;
    report.untouched_bytes += result->outside_bytes;
  }
  report.verified = report.verified_bytes == report.payload_bytes * report.seconds.size();
  if (daemons) {
    auto after = scrape(*daemons);
    if (!after) return fail_with(after.error(), daemons.get());
    report.after = std::move(*after);
  }
  if (o.progress && ::isatty(STDERR_FILENO) != 0) std::fprintf(stderr, "\r\033[K");
  const std::string json = to_json(report);
  if (!o.json_file.empty()) std::ofstream(o.json_file) << json << "\n";
  std::cout << (o.json ? json + "\n" : to_table(report, o.show_metrics));
  if (!report.verified) {
    std::fprintf(stderr, "kvferry-bench: not every byte could be verified\n");
    return 1;
  }
  return 0;
}

int run_fragments(const Options& o) {
  if (o.fragment_bytes > (uint64_t{1} << 31) || o.fragment_bytes % 8 != 0) {
    std::fprintf(stderr, "kvferry-bench: --fragment-bytes is a multiple of 8 up to 2 GiB\n");
    return 64;
  }
  HandOff::Options work;
  work.shape = fragment_shape(o.fragments, o.fragment_bytes);
  work.seed = o.seed;
  return run(o, "fragments", std::move(work),
             std::to_string(o.fragments) + " x " + std::to_string(o.fragment_bytes) + " B");
}

int run_model(const Options& o) {
  HandOff::Options work;
  auto shape = model_shape(o.model, o.tokens);
  const std::size_t colon = o.pair.find(':');
  auto sender = parse_topology(o.pair.substr(0, colon));
  auto receiver = parse_topology(colon == std::string::npos ? "" : o.pair.substr(colon + 1));
  for (const auto* error : {shape ? nullptr : &shape.error(), sender ? nullptr : &sender.error(),
                            receiver ? nullptr : &receiver.error()}) {
    if (error == nullptr) continue;
    std::fprintf(stderr, "kvferry-bench: %s\n", error->to_string().c_str());
    return 64;
  }
  work.shape = *shape;
  work.sender = *sender;
  work.receiver = *receiver;
  work.seed = o.seed;
  return run(o, "model", std::move(work),
             o.model + ", " + std::to_string(o.tokens) + " tokens, " + o.pair);
}

int main_of(int argc, char** argv) {
  Options o;
  std::error_code error;
  o.bin = std::filesystem::read_symlink("/proc/self/exe", error).parent_path().string();
  CLI::App app("Measures KV hand-offs between two kvferry daemons; verifies every byte.");
  app.require_subcommand(1);
  CLI::App* fragments = app.add_subcommand("fragments", "Scattered pieces of one size");
  add_common(*fragments, o);
  fragments->add_option("--fragments", o.fragments, "How many")
      ->check(CLI::Range(uint64_t{1}, uint64_t{1} << 20))
      ->capture_default_str();
  fragments->add_option("--fragment-bytes", o.fragment_bytes, "How large")
      ->check(CLI::Range(uint64_t{8}, uint64_t{1} << 31))
      ->capture_default_str();
  CLI::App* model = app.add_subcommand("model", "A model's KV between two topologies");
  add_common(*model, o);
  model->add_option("--model", o.model, "Whose shape")
      ->check(CLI::IsMember(model_names()))
      ->capture_default_str();
  model->add_option("--tokens", o.tokens, "Length of the request")
      ->check(CLI::Range(uint64_t{1}, uint64_t{1} << 20))
      ->capture_default_str();
  model->add_option("--pair", o.pair, "SENDER:RECEIVER, such as tp2:tp4 or tp2pp2:tp4")
      ->capture_default_str();
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& parse_error) {
    const int code = app.exit(parse_error);
    return code == 0 ? 0 : 64;
  }
  return fragments->parsed() ? run_fragments(o) : run_model(o);
}

}  // namespace
}  // namespace kvferry::bench

int main(int argc, char** argv) {
  return kvferry::bench::main_of(argc, argv);
}
