// kvferry-bench: how fast this daemon moves KV on this machine. Every byte of every round is
// verified; a run that could not verify says so and fails. This file is its command line.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <filesystem>
#include <functional>

#include "client/bench/commands.h"
#include "client/bench/echo.h"
#include "client/bench/stop.h"

namespace kvferry::bench {
namespace {

constexpr uint64_t kMaxFragmentBytes = uint64_t{1} << 31;
constexpr uint64_t kMaxFragments = uint64_t{1} << 20;

void add_common(CLI::App& command, CommonOptions& o) {
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
  command.add_option("--warm-up", o.warm_up, "Rounds before the timed ones")
      ->check(CLI::Range(0U, 100000U))
      ->capture_default_str();
  command.add_option("--seed", o.seed, "Of places and orders")->capture_default_str();
  command.add_flag("--json", o.json, "Print one JSON object instead of a table");
  command.add_option("--json-file", o.json_file, "Write the JSON object to this file too");
  command.add_flag("--progress", o.progress, "Tell on stderr what is being done");
  command.add_flag("--show-metrics", o.show_metrics, "Print totals of both daemons' metrics");
  CLI::Option* sender =
      command.add_option("--sender-socket", o.sender_socket, "Lifeline of a running daemon");
  CLI::Option* receiver =
      command.add_option("--receiver-socket", o.receiver_socket, "Lifeline of a running daemon");
  sender->needs(receiver);
  receiver->needs(sender);
  command.add_option("--bin", o.bin, "Directory of kvferryd; default: that of this program");
  command.add_option("--set", o.settings, "section.key=value for the daemons that are started");
  command.add_option("--time-limit", o.time_limit_s, "Seconds after which the run is given up")
      ->check(CLI::Range(1U, 86400U))
      ->capture_default_str();
  command
      .add_option("--spoil", o.spoil,
                  "Change so many received bytes before the last round is verified, to see that "
                  "the run then fails")
      ->check(CLI::Range(0U, 8U))
      ->capture_default_str();
}

void add_fragments(CLI::App& command, FragmentsOptions& o) {
  command.add_option("--fragments", o.fragments, "How many")
      ->check(CLI::Range(uint64_t{1}, kMaxFragments))
      ->capture_default_str();
  command.add_option("--fragment-bytes", o.fragment_bytes, "How large")
      ->check(CLI::Range(uint64_t{8}, kMaxFragmentBytes))
      ->capture_default_str();
}

int usage(const std::string& flag, const std::string& message) {
  std::fprintf(stderr, "kvferry-bench: %s: %s\n", flag.c_str(), message.c_str());
  return kExitUsage;
}

int check_fragment(const std::string& flag, uint64_t bytes) {
  if (bytes >= 8 && bytes <= kMaxFragmentBytes && bytes % 8 == 0) return kExitOk;
  return usage(flag, "a multiple of 8 up to 2 GiB");
}

// A model on this pair of topologies can be laid out.
int check_pair(const std::string& model, const std::string& pair, uint32_t block_tokens) {
  const std::string text = pair.empty() ? usual_pair(model) : pair;
  const std::size_t colon = text.find(':');
  if (colon == std::string::npos)
    return usage("--pair", "SENDER:RECEIVER, such as tp2:tp4, not " + text);
  auto shape = model_shape(model, block_tokens != 0 ? block_tokens : 1);
  if (!shape) return usage("--model", shape.error().message);
  for (const std::string& side : {text.substr(0, colon), text.substr(colon + 1)}) {
    auto topology = parse_topology(side);
    if (!topology) return usage("--pair", topology.error().message);
    auto memory = rank_memory(*shape, *topology, 0, 1, 1);
    if (!memory) return usage("--pair", memory.error().message);
  }
  return kExitOk;
}

struct Command {
  CLI::App* app = nullptr;
  std::function<int()> check;
  std::function<int()> run;
};

int main_of(int argc, char** argv) {
  CommonOptions common;
  FragmentsOptions fragments;
  ModelOptions model;
  LatencyOptions latency;
  ConcurrencyOptions concurrency;
  SweepOptions sweep;
  std::string echo_socket;
  std::error_code error;
  common.bin = std::filesystem::read_symlink("/proc/self/exe", error).parent_path().string();
  CLI::App app("Measures KV hand-offs between two kvferry daemons; verifies every byte.");
  app.require_subcommand(1);
  std::vector<Command> commands;
  const auto add = [&](const char* name, const char* description) {
    CLI::App* command = app.add_subcommand(name, description);
    add_common(*command, common);
    return command;
  };

  CLI::App* command = add("fragments", "Scattered pieces of one size");
  add_fragments(*command, fragments);
  command->add_option("--places", fragments.places_file,
                      "Write where the pieces lie to this file, as JSON");
  command->add_flag("--step", fragments.step,
                    "Wait for a line on standard input before each timed round, and print each "
                    "round's result in a line of JSON");
  commands.push_back({command,
                      [&] { return check_fragment("--fragment-bytes", fragments.fragment_bytes); },
                      [&] { return run_fragments(common, fragments); }});

  command = add("model", "A model's KV between two topologies");
  std::vector<std::string> names = model_names();
  names.emplace_back("all");
  command->add_option("--model", model.model, "Whose shape, or all, each with its usual pair")
      ->check(CLI::IsMember(names))
      ->capture_default_str();
  command->add_option("--tokens", model.tokens, "Length of the request")
      ->check(CLI::Range(uint64_t{1}, kMaxFragments))
      ->capture_default_str();
  command->add_option("--pair", model.pair,
                      "SENDER:RECEIVER, such as tp2:tp4, tp2pp2:tp4, dep4:tep8; default: usual "
                      "for the model");
  command->add_option("--block-tokens", model.block_tokens, "Tokens of a block; 0: the model's")
      ->check(CLI::Range(0U, 1024U))
      ->capture_default_str();
  commands.push_back({command,
                      [&] {
                        if (model.model != "all")
                          return check_pair(model.model, model.pair, model.block_tokens);
                        return model.pair.empty() ? kExitOk
                                                  : usage("--pair", "not with --model all");
                      },
                      [&] { return run_model(common, model); }});

  command = add("latency", "Small transfers with the sender ready, beside a bare gRPC call");
  command->add_option("--bytes", latency.bytes, "Of a transfer")
      ->check(CLI::Range(uint64_t{8}, uint64_t{1} << 30))
      ->capture_default_str();
  command->add_option("--fragment-bytes", latency.fragment_bytes, "Of its pieces")
      ->check(CLI::Range(uint64_t{8}, kMaxFragmentBytes))
      ->capture_default_str();
  command->add_option("--calls", latency.calls, "Transfers, and calls, in a round")
      ->check(CLI::Range(1U, 100000U))
      ->capture_default_str();
  commands.push_back({command,
                      [&] {
                        if (latency.bytes % latency.fragment_bytes != 0)
                          return usage("--bytes", "a multiple of --fragment-bytes");
                        return check_fragment("--fragment-bytes", latency.fragment_bytes);
                      },
                      [&] { return run_latency(common, latency); }});

  command = add("concurrency", "Many transfers of mixed size at once, beside a single large one");
  command->add_option("--transfers", concurrency.transfers, "How many at once")
      ->check(CLI::Range(1U, 4096U))
      ->capture_default_str();
  command
      ->add_option("--sizes", concurrency.sizes_mib,
                   "MiB that all receivers of a transfer get together, dealt in turns")
      ->delimiter(',')
      ->check(CLI::Range(1U, 65536U))
      ->capture_default_str();
  command->add_option("--model", concurrency.model, "Whose shape")
      ->check(CLI::IsMember(model_names()))
      ->capture_default_str();
  command->add_option("--pair", concurrency.pair, "SENDER:RECEIVER")->capture_default_str();
  command->add_option("--layers", concurrency.layers, "Only so many of the model's; 0: all")
      ->check(CLI::Range(0U, 1024U))
      ->capture_default_str();
  commands.push_back({command, [&] { return check_pair(concurrency.model, concurrency.pair, 0); },
                      [&] { return run_concurrency(common, concurrency); }});

  FragmentsOptions compare;
  command = add("compare", "Scattered pieces beside memcpy and a raw socket");
  add_fragments(*command, compare);
  commands.push_back({command,
                      [&] {
                        if (common.memory != "host")
                          return usage("--memory", "compare works on memory of the host only");
                        if (compare.fragments * compare.fragment_bytes > kMaxFragmentBytes)
                          return usage("--fragments", "2 GiB in all at most");
                        return check_fragment("--fragment-bytes", compare.fragment_bytes);
                      },
                      [&] { return run_compare(common, compare); }});

  command = add("sweep", "One thing varied, and a plot of it");
  command->add_option("--over", sweep.over, "What varies")
      ->check(CLI::IsMember({"fragment-bytes", "fragments", "bytes"}))
      ->capture_default_str();
  command->add_option("--values", sweep.values, "Its values; default: a usual range")
      ->delimiter(',')
      ->check(CLI::Range(uint64_t{1}, uint64_t{1} << 36));
  command->add_option("--bytes", sweep.bytes, "Of a transfer, where fragment-bytes vary")
      ->check(CLI::Range(uint64_t{8}, uint64_t{1} << 36))
      ->capture_default_str();
  command->add_option("--fragment-bytes", sweep.fragment_bytes, "Of its pieces, where else varies")
      ->check(CLI::Range(uint64_t{8}, kMaxFragmentBytes))
      ->capture_default_str();
  command->add_option("--paths", sweep.paths, "Several in place of --path: tcp,shm,local")
      ->delimiter(',')
      ->check(CLI::IsMember({"local", "shm", "tcp"}));
  command->add_flag("!--no-limits", sweep.limits, "Without memcpy and the raw socket");
  command->add_option("--plot", sweep.plot, "Write a plot to this SVG file");
  commands.push_back({command,
                      [&] {
                        if (sweep.limits && common.memory != "host")
                          return usage("--memory",
                                       "a sweep with limits works on memory of the host only");
                        if (sweep.over == "fragment-bytes")
                          for (const uint64_t value : sweep.values)
                            if (check_fragment("--values", value) != kExitOk) return kExitUsage;
                        return check_fragment("--fragment-bytes", sweep.fragment_bytes);
                      },
                      [&] { return run_sweep(common, sweep); }});

  // latency starts it; hidden, as nobody else needs it.
  CLI::App* echo = app.add_subcommand("echo-server", "")->group("");
  echo->add_option("socket", echo_socket)->required();

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& parse_error) {
    const int code = app.exit(parse_error);
    return code == 0 ? kExitOk : kExitUsage;
  }
  if (echo->parsed()) return serve_echo(echo_socket);
  watch_for_stop(std::chrono::seconds(common.time_limit_s));
  for (const Command& of : commands) {
    if (!of.app->parsed()) continue;
    const int code = of.check();
    return code != kExitOk ? code : of.run();
  }
  return kExitUsage;
}

}  // namespace
}  // namespace kvferry::bench

int main(int argc, char** argv) {
  return kvferry::bench::main_of(argc, argv);
}
