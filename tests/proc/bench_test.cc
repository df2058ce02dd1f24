// kvferry-bench as its users run it: what each subcommand tells, that bytes are really compared,
// what it refuses, and that nothing is left behind however it ends. No times are judged.
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "tests/proc/hand_off_daemons.h"

namespace kvferry::testing {
namespace {

using Json = nlohmann::json;

std::string text_of(const std::string& path) {
  std::ifstream in(path);
  std::stringstream text;
  text << in.rdbuf();
  return text.str();
}

// A directory of the test's own, gone with it.
class Directory {
 public:
  Directory() {
    char name[] = "/tmp/kvferry-bench-test.XXXXXX";
    REQUIRE(::mkdtemp(name) != nullptr);
    path_ = name;
  }
  ~Directory() {
    std::error_code error;
    std::filesystem::remove_all(path_, error);
  }
  std::string file(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

// The program at work.
class Bench {
 public:
  explicit Bench(std::vector<std::string> words) {
    words.insert(words.begin(), binary_directory() + "/kvferry-bench");
    if (const char* const rails = std::getenv("KVFERRY_RAILS_BINARY"))
      words.insert(words.end(), {"--set", "rails.binary=" + std::string(rails)});
    std::vector<char*> argv;
    for (std::string& word : words) argv.push_back(word.data());
    argv.push_back(nullptr);
    std::array<int, 2> in{};
    std::array<int, 2> out{};
    REQUIRE(::pipe2(in.data(), O_CLOEXEC) == 0);
    REQUIRE(::pipe2(out.data(), O_CLOEXEC) == 0);
    const std::string errors = directory_.file("errors");
    const int error_file = ::open(errors.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    pid_ = ::_Fork();
    if (pid_ == 0) {
      ::setpgid(0, 0);
      ::dup2(in[0], STDIN_FILENO);
      ::dup2(out[1], STDOUT_FILENO);
      ::dup2(error_file, STDERR_FILENO);
      ::execv(argv[0], argv.data());
      ::_exit(127);
    }
    REQUIRE(pid_ > 0);
    ::close(in[0]);
    ::close(out[1]);
    ::close(error_file);
    input_ = in[1];
    output_ = out[0];
  }
  ~Bench() {
    if (pid_ > 0) {
      ::kill(pid_, SIGKILL);
      ::waitpid(pid_, nullptr, 0);
    }
    if (input_ >= 0) ::close(input_);
    ::close(output_);
  }
  Bench(const Bench&) = delete;
  Bench& operator=(const Bench&) = delete;

  pid_t pid() const { return pid_; }
  std::string errors() const { return text_of(directory_.file("errors")); }
  void say(const std::string& text) {
    REQUIRE(::write(input_, text.data(), text.size()) == static_cast<ssize_t>(text.size()));
  }
  void hang_up() {
    ::close(input_);
    input_ = -1;
  }
  // The next line of the output; empty at its end.
  std::string line() {
    for (;;) {
      const std::size_t end = buffer_.find('\n');
      if (end != std::string::npos) {
        std::string out = buffer_.substr(0, end);
        buffer_.erase(0, end + 1);
        return out;
      }
      if (!read_some()) return std::exchange(buffer_, {});
    }
  }
  // Reads to the end; the exit status, or -1 for a signal.
  int wait() {
    while (read_some()) {
    }
    int status = 0;
    REQUIRE(::waitpid(pid_, &status, 0) == pid_);
    pid_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }
  const std::string& output() const { return buffer_; }

  // Processes that it has started, the rails processes too; each with its command line.
  std::map<pid_t, std::string> family() const {
    std::map<pid_t, std::string> out;
    for (const pid_t child : children(pid_)) {
      out[child] = command_line(child);
      for (const pid_t grandchild : children(child)) out[grandchild] = command_line(grandchild);
    }
    return out;
  }

 private:
  static std::string command_line(pid_t pid) {
    std::string words = text_of("/proc/" + std::to_string(pid) + "/cmdline");
    for (char& c : words)
      if (c == '\0') c = ' ';
    return words;
  }
  static std::set<pid_t> children(pid_t pid) {
    std::set<pid_t> out;
    std::error_code error;
    const std::string tasks = "/proc/" + std::to_string(pid) + "/task";
    for (const auto& task : std::filesystem::directory_iterator(tasks, error)) {
      std::istringstream of(text_of(task.path().string() + "/children"));
      for (pid_t child = 0; of >> child;) out.insert(child);
    }
    return out;
  }
  bool read_some() {
    std::array<char, 65536> chunk;
    pollfd entry{output_, POLLIN, 0};
    INFO(errors());
    REQUIRE(::poll(&entry, 1, 120'000) == 1);
    const ssize_t got = ::read(output_, chunk.data(), chunk.size());
    if (got > 0) buffer_.append(chunk.data(), static_cast<std::size_t>(got));
    return got > 0;
  }

  Directory directory_;
  pid_t pid_ = -1;
  int input_ = -1;
  int output_ = -1;
  std::string buffer_;
};

// Small arenas start soon; silence is not what is looked for here.
const std::vector<std::string> kQuick = {
    "--set", "arena.bytes=32MiB",        "--set",     "arena.segment_bytes=16MiB",
    "--set", "engine.silence_limit=15s", "--warm-up", "0"};

std::vector<std::string> with(std::vector<std::string> words,
                              const std::vector<std::string>& more) {
  words.insert(words.end(), more.begin(), more.end());
  return words;
}

Json run_json(const std::vector<std::string>& words) {
  Bench bench(with(with(words, kQuick), {"--json"}));
  const int status = bench.wait();
  INFO(bench.output());
  INFO(bench.errors());
  REQUIRE(status == 0);
  return Json::parse(bench.output());
}

void check_common(const Json& json, const std::string& command, const std::string& path) {
  CHECK(json["command"] == command);
  CHECK(json["path"] == path);
  CHECK(json["verified"] == true);
  CHECK(json["gbps"].get<double>() > 0);
  CHECK(json["p50_ms"].get<double>() > 0);
  CHECK(json["p99_ms"].get<double>() >= json["p50_ms"].get<double>());
  CHECK(json["cpu_s_per_gib"].get<double>() > 0);
  for (const char* who : {"daemon", "rails", "worker"})
    CHECK(json["cpu_s_per_gib_by"][who].get<double>() >= 0);
  CHECK(json["settings"]["arena.bytes"] == "32MiB");
  for (const char* what : {"kvferry", "commit", "ucx", "grpc", "kernel", "processor"})
    CHECK_FALSE(json["versions"][what].get<std::string>().empty());
}

void check_stages(const Json& json) {
  for (const char* name : {"wait", "gather", "wire", "scatter"}) {
    CAPTURE(name);
    CHECK(json["stages"][name]["count"].get<double>() > 0);
    CHECK(json["stages"][name]["mean_ms"].get<double>() >= 0);
  }
}

// Subcommands with as little work as they take.
const std::vector<std::vector<std::string>> kSmall = {
    {"fragments", "--fragments", "32", "--fragment-bytes", "1024", "--rounds", "2"},
    {"model", "--tokens", "40", "--rounds", "2"},
    {"latency", "--calls", "3", "--rounds", "2"},
    {"concurrency", "--transfers", "6", "--sizes", "1,2", "--rounds", "2"},
    {"compare", "--fragments", "32", "--fragment-bytes", "1024", "--rounds", "2"},
    {"sweep", "--values", "512,4096", "--bytes", "65536", "--rounds", "2"}};

}  // namespace

TEST_CASE("bench fragments tells rates, stages, processor time and versions, over each path") {
  const std::string path = GENERATE("tcp", "shm", "local");
  const Json json = run_json(with(kSmall[0], {"--path", path}));
  check_common(json, "fragments", path);
  CHECK(json["payload_bytes"] == 32 * 1024);
  CHECK(json["verified_bytes"] == 2 * 32 * 1024);
  CHECK(json["untouched_bytes"].get<uint64_t>() > 0);
  CHECK(json["rounds"] == 2);
  if (path == "local") return;
  check_stages(json);
  CHECK(json["cpu_s_per_gib_by"]["rails"].get<double>() > 0);
}

TEST_CASE("bench model moves every model with its usual pair") {
  const Json json = run_json({"model", "--model", "all", "--tokens", "150", "--rounds", "1"});
  CHECK(json["verified"] == true);
  std::set<std::string> names;
  for (const Json& model : json["models"]) {
    CAPTURE(model["workload"]);
    check_common(model, "model", "tcp");
    const auto workload = model["workload"].get<std::string>();
    names.insert(workload.substr(0, workload.find(',')));
  }
  CHECK(names == std::set<std::string>{"llama-3-8b", "llama-3-70b", "qwen3-235b-a22b",
                                       "deepseek-r1", "deepseek-r1-fp8", "gpt-oss-120b",
                                       "minimax-m3-like"});
  // 4 of 4 senders' heads at one receiver of sixteen; eight copies of one sender's latent.
  CHECK(json["models"][2]["payload_bytes"] == 94 * 2 * 4 * 128 * 150);
  CHECK(json["models"][3]["payload_bytes"] == 8 * 61 * 1152 * 150);
  // Half of the layers look back 128 tokens: those from the block of token 23 on move.
  CHECK(json["models"][5]["payload_bytes"] == 18 * 2 * 8 * 128 * (150 + (150 - 16)));
}

TEST_CASE("bench latency tells transfers beside bare calls") {
  const Json json = run_json(kSmall[2]);
  check_common(json, "latency", "tcp");
  check_stages(json);
  CHECK(json["payload_bytes"] == 65536);
  for (const char* what : {"transfer", "grpc_echo"}) {
    CHECK(json[what]["count"] == 6);
    for (const char* of : {"p50_us", "p90_us", "p99_us"}) CHECK(json[what][of].get<double>() > 0);
    CHECK(json[what]["max_us"].get<double>() >= json[what]["p99_us"].get<double>());
  }
  CHECK(json["ratio_p50"].get<double>() == Approx(json["transfer"]["p50_us"].get<double>() /
                                                  json["grpc_echo"]["p50_us"].get<double>()));
}

TEST_CASE("bench concurrency tells size classes, fairness and the rate of a single transfer") {
  const Json json = run_json(kSmall[3]);
  check_common(json, "concurrency", "tcp");
  check_stages(json);
  REQUIRE(json["classes"].size() == 2);
  for (const Json& of : json["classes"]) {
    CHECK(of["count"] == 6);  // three of a size, two rounds
    CHECK(of["bytes"].get<double>() <= of["size_mib"].get<double>() * 1024 * 1024);
    CHECK(of["bytes"].get<double>() > of["size_mib"].get<double>() * 1024 * 1024 * 0.9);
    CHECK(of["fairness"].get<double>() > 0.3);  // 1/3 if one got all
    CHECK(of["fairness"].get<double>() <= 1.0001);
    CHECK(of["p99_to_p50"].get<double>() >= 1);
  }
  CHECK(json["all"]["count"] == 12);
  CHECK(json["single_gbps"].get<double>() > 0);
  CHECK(json["ratio_to_single"].get<double>() ==
        Approx(json["gbps"].get<double>() / json["single_gbps"].get<double>()));
}

TEST_CASE("bench compare tells the limits of the same run") {
  const Json json = run_json(kSmall[4]);
  check_common(json, "compare", "tcp");
  for (const char* name :
       {"transfer", "one_piece", "scattered_memcpy", "socket_copy", "socket_stream"}) {
    CAPTURE(name);
    const Json& of = json["contestants"][name];
    CHECK(of["rounds"] == 2);
    CHECK(of["gbps"].get<double>() > 0);
    if (std::string(name) == "transfer") continue;
    CHECK(json["ratios"]["to_" + std::string(name)].get<double>() ==
          Approx(json["gbps"].get<double>() / of["gbps"].get<double>()));
  }
  CHECK(json["contestants"]["socket_copy"]["verified_bytes"] == 2 * 32 * 1024);
  CHECK(json["contestants"]["scattered_memcpy"]["verified_bytes"] == 2 * 32 * 1024);
}

TEST_CASE("bench sweep tells a point for each value and path, and draws them") {
  const Directory directory;
  const std::string plot = directory.file("plot.svg");
  const Json json = run_json(with(kSmall[5], {"--plot", plot, "--paths", "tcp,local"}));
  CHECK(json["verified"] == true);
  REQUIRE(json["points"].size() == 4);
  CHECK(json["points"][0]["fragments"] == 128);
  CHECK(json["points"][1]["fragments"] == 16);
  CHECK(json["points"][3]["path"] == "local");
  for (const Json& point : json["points"]) {
    CHECK(point["verified_bytes"] == 2 * 65536);
    CHECK(point["socket_copy_gbps"].get<double>() > 0);
    CHECK(point["daemon_private_bytes"].get<double>() > 1e6);
  }
  const std::string svg = text_of(plot);
  CHECK(svg.starts_with("<svg "));
  CHECK(svg.ends_with("</svg>\n"));
  for (const char* label : {">kvferry tcp<", ">kvferry local<", ">memcpy, scattered<"})
    CHECK(svg.find(label) != std::string::npos);
}

TEST_CASE("a byte that is wrong fails the run of each subcommand") {
  const auto& small = GENERATE(from_range(kSmall));
  CAPTURE(small[0]);
  Bench bench(with(with(small, kQuick), {"--json", "--spoil", "1"}));
  CHECK(bench.wait() == 1);
  INFO(bench.errors());
  CHECK(bench.errors().find("BENCH_WRONG_BYTES: 8 wrong bytes at receiver rank 0") !=
        std::string::npos);
  CHECK(bench.output().empty());  // no figure without every byte
}

TEST_CASE("rounds of bench fragments wait to be called, at places that are told") {
  const Directory directory;
  const std::string file = directory.file("places.json");
  Bench bench(with(with(kSmall[0], kQuick), {"--step", "--places", file}));
  CHECK(Json::parse(bench.line())["ready"] == true);
  const Json places = Json::parse(text_of(file));
  CHECK(places["fragment_bytes"] == 1024);
  for (const char* side : {"source", "destination"}) {
    const std::set<uint64_t> distinct(places[side].begin(), places[side].end());
    CHECK(distinct.size() == 32);
    CHECK(*distinct.rbegin() + 1024 <= places["sender_pool_bytes"].get<uint64_t>());
  }
  CHECK(places["source"] != places["destination"]);
  for (int round = 0; round < 2; ++round) {
    bench.say("go\n");
    const Json told = Json::parse(bench.line());
    CHECK(told["round"] == round);
    CHECK(told["seconds"].get<double>() > 0);
    CHECK(told["cpu_seconds"].get<double>() > 0);
    CHECK(told["verified_bytes"] == 32 * 1024);
  }
  check_common(Json::parse(bench.line()), "fragments", "tcp");
  CHECK(bench.wait() == 0);
}

TEST_CASE("what the bench cannot do is refused by the flag's name, before anything starts") {
  struct Row {
    std::vector<std::string> words;
    const char* flag;
  };
  const Row row = GENERATE(
      Row{{"fragments", "--path", "rdma"}, "--path"},
      Row{{"fragments", "--fragments", "0"}, "--fragments"},
      Row{{"fragments", "--fragment-bytes", "100"}, "--fragment-bytes"},
      Row{{"fragments", "--rounds", "0"}, "--rounds"},
      Row{{"fragments", "--rounds", "many"}, "--rounds"},
      Row{{"fragments", "--memory", "disk"}, "--memory"},
      Row{{"fragments", "--time-limit", "0"}, "--time-limit"},
      Row{{"fragments", "--spoil", "9"}, "--spoil"},
      Row{{"fragments", "--sender-socket", "/nowhere"}, "--receiver-socket"},
      Row{{"model", "--model", "gpt-9"}, "--model"}, Row{{"model", "--pair", "tp2"}, "--pair"},
      Row{{"model", "--pair", "tp3:tp2"}, "--pair"}, Row{{"model", "--pair", "xx2:tp2"}, "--pair"},
      Row{{"model", "--pair", "pp64:tp1"}, "--pair"},
      Row{{"model", "--model", "all", "--pair", "tp1:tp1"}, "--pair"},
      Row{{"model", "--tokens", "0"}, "--tokens"}, Row{{"latency", "--bytes", "100"}, "--bytes"},
      Row{{"latency", "--calls", "0"}, "--calls"}, Row{{"concurrency", "--sizes", "0"}, "--sizes"},
      Row{{"concurrency", "--transfers", "0"}, "--transfers"},
      Row{{"concurrency", "--pair", "dep4"}, "--pair"},
      Row{{"compare", "--memory", "cuda"}, "--memory"},
      Row{{"compare", "--fragments", "1000000", "--fragment-bytes", "1048576"}, "--fragments"},
      Row{{"sweep", "--over", "colours"}, "--over"}, Row{{"sweep", "--values", "100"}, "--values"},
      Row{{"sweep", "--paths", "tcp,rdma"}, "--paths"},
      Row{{"sweep", "--no-such-thing"}, "--no-such"});
  CAPTURE(row.words);
  Bench bench(row.words);
  CHECK(bench.wait() == 64);
  INFO(bench.errors());
  CHECK(bench.errors().find(row.flag) != std::string::npos);
  CHECK(bench.output().empty());
}

TEST_CASE("without its daemon the bench says what is missing") {
  Bench bench({"fragments", "--bin", "/nonexistent"});
  CHECK(bench.wait() == 1);
  CHECK(bench.errors().find("--bin") != std::string::npos);
}

namespace {

// A run that would last for hours, once rounds are played.
std::unique_ptr<Bench> endless(std::vector<std::string> more = {}) {
  auto bench = std::make_unique<Bench>(
      with(with({"fragments", "--rounds", "100000", "--progress"}, kQuick), more));
  REQUIRE(comes_true([&] { return bench->errors().find("round 2") != std::string::npos; }));
  return bench;
}

// All that it had started is gone, and so is the directory of its daemons.
void check_gone(const std::map<pid_t, std::string>& family, bool directory_too) {
  REQUIRE(family.size() == 4);  // two daemons, each with its rails process
  for (const auto& [pid, words] : family) {
    CAPTURE(words);
    CHECK(comes_true([p = pid] { return ::kill(p, 0) != 0; }));
    const std::size_t at = words.find("/tmp/kvferry-pair.");
    if (!directory_too || at == std::string::npos) continue;
    CHECK_FALSE(std::filesystem::exists(words.substr(at, words.find('/', at + 5) - at)));
  }
}

}  // namespace

TEST_CASE("a bench that is interrupted leaves nothing behind") {
  const int number = GENERATE(SIGINT, SIGTERM);
  const bool whole_group = GENERATE(false, true);  // as a terminal does it
  CAPTURE(number, whole_group);
  const auto bench = endless();
  const auto family = bench->family();
  ::kill(whole_group ? -bench->pid() : bench->pid(), number);
  CHECK(bench->wait() == 130);
  CHECK(bench->errors().find("BENCH_INTERRUPTED") != std::string::npos);
  check_gone(family, true);
}

TEST_CASE("a bench that is killed takes its daemons with it") {
  const auto bench = endless();
  const auto family = bench->family();
  ::kill(bench->pid(), SIGKILL);
  CHECK(bench->wait() == -1);
  check_gone(family, false);
  for (const auto& [pid, words] : family) {  // nobody was left to do it
    const std::size_t at = words.find("/tmp/kvferry-pair.");
    if (at == std::string::npos) continue;
    std::filesystem::remove_all(words.substr(at, words.find('/', at + 5) - at));
  }
}

TEST_CASE("a bench ends at its time limit, and when a daemon dies under it") {
  SECTION("limit") {
    Bench bench(with({"fragments", "--rounds", "100000", "--time-limit", "2"}, kQuick));
    CHECK(bench.wait() == 1);
    CHECK(bench.errors().find("BENCH_TIME_LIMIT") != std::string::npos);
  }
  SECTION("death") {
    const auto bench = endless();
    const auto family = bench->family();
    for (const auto& [pid, words] : family)
      if (words.find("receiver.toml") != std::string::npos) ::kill(pid, SIGKILL);
    CHECK(bench->wait() == 1);
    check_gone(family, true);
  }
}

}  // namespace kvferry::testing
