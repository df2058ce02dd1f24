// kvferry-soak: two daemons and several pairs of workers that hand over without end, every byte
// verified, while daemons, rails and workers are killed, stopped, restarted and kept short of
// descriptors at random moments. Prints counts as JSON; fails on a wrong byte, a transfer that
// hangs or ends for no reason, something that does not recover, and what has leaked in the end.
//
// A seed draws the same faults and sizes again, at the same distances; what they meet differs.
#include <signal.h>
#include <sys/resource.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <sstream>

#include "tests/proc/books.h"
#include "tests/proc/soak_line.h"

namespace kvferry::testing {
namespace {

using bench::DaemonPair;
using bench::DaemonProcess;
using std::chrono::milliseconds;
using std::chrono::seconds;
using Clock = std::chrono::steady_clock;
using Json = nlohmann::ordered_json;

constexpr milliseconds kSilence(2000);
constexpr seconds kRecovery(60);  // from the end of a fault to a good transfer of every line
constexpr seconds kRemembered(25);
// What heaps may grow by: freed memory is kept, and how much depends on what met.
constexpr uint64_t kGrowthCalm = 4 << 20;
constexpr uint64_t kGrowthWithFaults = 40 << 20;

struct Options {
  double duration = 60;    // seconds; 0: no limit
  uint64_t transfers = 0;  // 0: no limit
  uint64_t seed = 1;
  std::vector<std::string> faults = {"all"};
  double pause = 1;  // mean seconds from a recovery to the next fault
  std::string path = "tcp";
  std::vector<std::string> settings;
};

uint64_t anonymous_bytes(pid_t pid) {
  std::ifstream status("/proc/" + std::to_string(pid) + "/status");
  for (std::string line; std::getline(status, line);)
    if (line.starts_with("RssAnon:")) return std::strtoull(line.c_str() + 8, nullptr, 10) * 1024;
  return 0;
}

struct Books {
  Level level;
  pid_t daemon = -1;
  pid_t rails = -1;
  uint64_t daemon_bytes = 0;  // resident, its own
  uint64_t rails_bytes = 0;
  Json json() const {
    return {{"descriptors", level.descriptors},
            {"file_mappings", level.mappings},
            {"rails_descriptors", level.rails_descriptors},
            {"workers", level.workers},
            {"pool_bytes", level.pool_bytes},
            {"resident_bytes", daemon_bytes},
            {"rails_resident_bytes", rails_bytes}};
  }
};

class Soak {
 public:
  explicit Soak(Options options) : options_(std::move(options)), random_(options_.seed) {}

  // 0: all was well.
  int run() {
    if (const std::string wrong = start(); !wrong.empty()) {
      std::fprintf(stderr, "kvferry-soak: %s\n", wrong.c_str());
      return 1;
    }
    const Clock::time_point begun = Clock::now();
    warm_up();
    measure(before_);
    const uint64_t warm = totals().completed;
    if (options_.transfers > 0)
      world_.allow(options_.transfers - std::min(options_.transfers, warm));
    else
      world_.allow(UINT64_MAX);
    world_.pause(false);
    work(begun);
    world_.pause(true);
    wait_for([&] { return all_idle(); }, "lines do not come to rest");
    measure(after_);
    if (well()) compare();
    const double took = std::chrono::duration<double>(Clock::now() - begun).count();
    report(took, totals());
    world_.end();
    lines_.clear();
    const bool good = well();
    if (!good) std::fprintf(stderr, "%s\n", pair_->log_tail().c_str());
    pair_.reset();
    return good ? 0 : 1;
  }

 private:
  struct Fault {
    const char* name;
    std::function<void()> strike;  // returns when it is over, but for its consequences
  };

  std::string start() {
    std::error_code error;
    const std::string bin =
        std::filesystem::read_symlink("/proc/self/exe", error).parent_path().string();
    bench::DaemonOptions daemon;
    daemon.binary_directory = bin;
    daemon.path = options_.path;
    daemon.ends_with_starter = true;
    // An arena that all lines together want more of than there is, and short limits.
    daemon.settings = {"arena.bytes=4MiB", "arena.segment_bytes=4MiB", "engine.chunk_bytes=64KiB",
                       "engine.heartbeat_interval=200ms",
                       "engine.silence_limit=" + std::to_string(kSilence.count()) + "ms",
                       "engine.wait_deadline=10s", "engine.transfer_deadline=10s",
                       // Twice this long daemons remember how transfers ended.
                       "engine.transfer_deadline_max=10s", "engine.wait_deadline_max=10s",
                       "engine.lease=10s", "engine.lease_max=10s", "drain.limit=2s"};
    if (const char* const rails = std::getenv("KVFERRY_RAILS_BINARY"))
      daemon.settings.push_back("rails.binary=" + std::string(rails));
    daemon.settings.insert(daemon.settings.end(), options_.settings.begin(),
                           options_.settings.end());
    auto pair = DaemonPair::start(daemon);
    if (!pair) return pair.error().to_string();
    pair_ = std::move(*pair);
    const auto add = [&](const char* name, const char* sender, const char* receiver,
                         uint32_t layers, uint32_t heads, uint32_t head_bytes, uint64_t tokens) {
      SoakLine::Plan plan;
      plan.name = name;
      plan.topologies[0] = sender;
      plan.topologies[1] = receiver;
      plan.shape.name = "soak";
      plan.shape.layers = layers;
      plan.shape.kv_heads = heads;
      plan.shape.head_bytes = head_bytes;
      plan.shape.tokens = tokens;
      plan.binary_directory = bin;
      for (const int side : {0, 1}) plan.sockets[side] = pair_->side(side).socket();
      plan.seed = options_.seed * 100 + lines_.size();
      lines_.push_back(std::make_unique<SoakLine>(std::move(plan), world_));
    };
    add("alike", "tp1", "tp1", 4, 2, 256, 1024);   // up to 4 MiB
    add("split", "tp1", "tp2", 4, 4, 64, 1024);    // 2 MiB
    add("joined", "tp2", "tp1", 2, 2, 128, 1500);  // with a last block that is partly filled
    add("layers", "pp2", "tp2", 4, 2, 128, 777);
    return {};
  }

  bool well() const { return world_.violation().empty(); }
  bool all_idle() const {
    return std::all_of(lines_.begin(), lines_.end(), [](const auto& line) { return line->idle(); });
  }
  SoakCounts totals() const {
    SoakCounts sum;
    for (const auto& line : lines_) sum.add(line->counts());
    return sum;
  }
  // Looks again and again; what does not come true in time is a violation, which ends all waits.
  void wait_for(const std::function<bool()>& condition, const std::string& else_what,
                Clock::duration limit = kRecovery) {
    const auto until = Clock::now() + limit;
    while (well() && !condition()) {
      if (Clock::now() > until) return world_.violate(else_what);
      std::this_thread::sleep_for(milliseconds(20));
    }
  }

  void warm_up() {
    const uint64_t enough = std::max<uint64_t>(200, options_.transfers / 10);
    // Without faults memory has to be flat, once as much is remembered as ever is.
    const auto from = Clock::now() + (chosen_faults().empty() ? kRemembered : seconds(0));
    wait_for([&] { return totals().completed >= enough && Clock::now() >= from; },
             "the first transfers are not made", seconds(600));
    world_.pause(true);
    wait_for([&] { return all_idle(); }, "lines do not come to rest");
  }

  void work(Clock::time_point begun) {
    const auto over = [&] {
      const double passed = std::chrono::duration<double>(Clock::now() - begun).count();
      if (options_.duration > 0 && passed >= options_.duration) return true;
      return options_.transfers > 0 && all_idle();
    };
    const std::vector<Fault> faults = chosen_faults();
    std::exponential_distribution<double> pause(1 / options_.pause);
    while (well() && !over()) {
      const auto next = faults.empty()
                            ? Clock::time_point::max()
                            : Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                                 std::chrono::duration<double>(pause(random_)));
      while (well() && !over() && Clock::now() < next)
        std::this_thread::sleep_for(milliseconds(5));  // the moment is drawn
      if (!well() || over() || faults.empty()) continue;
      world_.begin_disturbance();
      // Now and then the next one strikes before all have recovered.
      do {
        const Fault& fault = faults[random_() % faults.size()];
        ++struck_[fault.name];
        fault.strike();
      } while (well() && random_() % 4 == 0);
      recover();
      world_.end_disturbance();
    }
  }

  void recover() {
    const uint64_t over_ns = monotonic_ns();
    std::string missing;
    const auto recovered = [&] {
      missing.clear();
      for (const auto& line : lines_)
        if (line->last_good_begin_ns() <= over_ns) missing += " " + line->name();
      return missing.empty() || (options_.transfers > 0 && all_idle());
    };
    const auto until = Clock::now() + kRecovery;
    while (well() && !recovered()) {
      if (Clock::now() > until)
        return world_.violate("no good transfer a minute after a fault:" + missing);
      std::this_thread::sleep_for(milliseconds(20));
    }
    const double took = static_cast<double>(monotonic_ns() - over_ns) / 1e9;
    longest_recovery_ = std::max(longest_recovery_, took);
  }

  // ---- faults ----

  milliseconds between(int from, int to) {
    return milliseconds(std::uniform_int_distribution<int>(from, to)(random_));
  }
  int any_side() { return static_cast<int>(random_() % 2); }
  SoakLine& any_line() { return *lines_[random_() % lines_.size()]; }
  // A drawn length of time is part of the fault.
  void hold(milliseconds time) { std::this_thread::sleep_for(time); }
  // Up to twice the silence limit.
  milliseconds a_while() { return between(50, static_cast<int>(2 * kSilence.count())); }

  void stop_for_a_while(pid_t pid, pid_t other = -1) {
    const milliseconds time = a_while();
    for (const pid_t one : {pid, other})
      if (one > 0) ::kill(one, SIGSTOP);
    hold(time);
    for (const pid_t one : {pid, other})
      if (one > 0) ::kill(one, SIGCONT);
  }
  void restart(int side) {
    if (const auto again = pair_->restart(side); !again)
      world_.violate("a daemon cannot be started again: " + again.error().to_string());
  }
  // A process may open hardly anything for a while.
  void starve(pid_t pid, const std::function<void()>& meanwhile) {
    if (pid <= 0) return;
    rlimit before{};
    if (::prlimit(pid, RLIMIT_NOFILE, nullptr, &before) != 0) return;
    std::error_code error;
    const std::filesystem::directory_iterator open("/proc/" + std::to_string(pid) + "/fd", error);
    if (error) return;
    const auto used = static_cast<rlim_t>(std::distance(begin(open), end(open)));
    rlimit tight = before;
    tight.rlim_cur = std::min(before.rlim_cur, used + random_() % 8);
    if (::prlimit(pid, RLIMIT_NOFILE, &tight, nullptr) != 0) return;
    meanwhile();
    hold(a_while());
    ::prlimit(pid, RLIMIT_NOFILE, &before, nullptr);
  }

  std::vector<Fault> all_faults() {
    return {
        {"kill-worker", [this] { any_line().signal_worker(any_side(), SIGKILL); }},
        {"stop-worker",
         [this] {
           SoakLine& line = any_line();
           const int side = any_side();
           line.signal_worker(side, SIGSTOP);
           hold(a_while());
           line.signal_worker(side, SIGCONT);
         }},
        {"kill-rails",
         [this] {
           const pid_t rails = pair_->side(any_side()).rails_pid();
           if (rails > 0) ::kill(rails, SIGKILL);
         }},
        {"stop-rails", [this] { stop_for_a_while(pair_->side(any_side()).rails_pid()); }},
        {"kill",
         [this] {
           const int side = any_side();
           pair_->side(side).kill_now();
           hold(between(0, 1000));
           restart(side);
         }},
        {"kill-both",
         [this] {
           for (const int side : {0, 1}) pair_->side(side).kill_now();
           for (const int side : {0, 1}) restart(side);
         }},
        {"stop", [this] { stop_for_a_while(pair_->side(any_side()).pid()); }},
        {"stop-host",
         [this] {
           const DaemonProcess& daemon = pair_->side(any_side());
           stop_for_a_while(daemon.pid(), daemon.rails_pid());
         }},
        {"restart",
         [this] {
           const int side = any_side();
           if (const int status = pair_->side(side).terminate(); status != 0)
             world_.violate("a daemon ends with status " + std::to_string(status) +
                            " upon SIGTERM");
           restart(side);
         }},
        {"descriptors",
         [this] {
           // With a worker that has to attach meanwhile.
           SoakLine& line = any_line();
           const int side = any_side();
           starve(pair_->side(side).pid(), [&] { line.signal_worker(side, SIGKILL); });
         }},
        {"rails-descriptors",
         [this] {
           // With a peer whose lanes have to be made anew meanwhile.
           const int side = any_side();
           const pid_t other = pair_->side(1 - side).rails_pid();
           starve(pair_->side(side).rails_pid(), [&] {
             if (other > 0) ::kill(other, SIGKILL);
           });
         }},
    };
  }
  std::vector<Fault> chosen_faults() {
    std::vector<Fault> out;
    for (Fault& fault : all_faults())
      for (const std::string& name : options_.faults)
        if (name == "all" || name == fault.name) out.push_back(fault);
    return out;
  }

  // ---- the books ----

  void measure(Books (&books)[2]) {
    for (const int side : {0, 1}) {
      const DaemonProcess& daemon = pair_->side(side);
      const std::string who = side == 0 ? "the sender's daemon" : "the receiver's daemon";
      wait_for(
          [&] {
            const double all = daemon.sum("kvferry_arena_bytes");
            return all > 0 && all == daemon.sum("kvferry_arena_bytes", "state=\"free\"");
          },
          who + " holds arena memory when nothing runs");
      wait_for([&] { return daemon.sum("kvferry_transfers_open") == 0; },
               who + " has open transfers when nothing runs");
      wait_for(
          [&] {
            books[side].level = level_of(daemon);
            return before_[side].daemon < 0 || within(books[side].level, before_[side].level);
          },
          who + " has more open than before", seconds(15));
      books[side].daemon = daemon.pid();
      books[side].rails = daemon.rails_pid();
      books[side].daemon_bytes = daemon.private_bytes();
      books[side].rails_bytes = anonymous_bytes(books[side].rails);
    }
  }
  // Which side dialled decides about a connection or two, and restarts change that.
  bool within(const Level& now, Level before) const {
    if (!struck_.empty()) before.descriptors += 3, before.rails_descriptors += 1;
    // UCX 1.13 keeps the socket of each connection that was refused, as some are then.
    const auto refused = struck_.find("rails-descriptors");
    if (refused != struck_.end()) before.rails_descriptors += 3 * refused->second;
    return now.within(before);
  }
  void compare() {
    const uint64_t most = struck_.empty() ? kGrowthCalm : kGrowthWithFaults;
    for (const int side : {0, 1}) {
      const std::string who = side == 0 ? "sender's" : "receiver's";
      if (after_[side].daemon_bytes > before_[side].daemon_bytes + most)
        world_.violate("the " + who + " daemon has grown");
      if (after_[side].rails_bytes > before_[side].rails_bytes + most)
        world_.violate("the " + who + " rails have grown");
    }
  }

  void report(double took, const SoakCounts& counts) const {
    Json out;
    out["ok"] = well();
    if (!well()) out["violation"] = world_.violation();
    out["seed"] = options_.seed;
    out["seconds"] = std::round(took * 10) / 10;
    out["transfers"] = {{"completed", counts.completed},
                        {"bytes_verified", counts.bytes},
                        {"failed", counts.failed},
                        {"ended_with_worker", counts.with_worker},
                        {"refused", counts.refused}};
    out["faults"] = struck_;
    out["longest_recovery_seconds"] = std::round(longest_recovery_ * 10) / 10;
    const char* const names[] = {"sender", "receiver"};
    for (const int side : {0, 1})
      out["daemons"][names[side]] = {{"before", before_[side].json()},
                                     {"after", after_[side].json()}};
    std::printf("%s\n", out.dump(2).c_str());
  }

  const Options options_;
  std::mt19937_64 random_;
  SoakWorld world_;
  std::unique_ptr<DaemonPair> pair_;
  std::vector<std::unique_ptr<SoakLine>> lines_;
  std::map<std::string, uint64_t> struck_;
  double longest_recovery_ = 0;
  Books before_[2];
  Books after_[2];
};

int soak(int argc, char** argv) {
  Options options;
  CLI::App app("Hands over between two daemons while faults strike; verifies every byte.");
  app.add_option("--duration", options.duration, "Seconds; 0: until --transfers are made")
      ->capture_default_str();
  app.add_option("--transfers", options.transfers, "Ends after so many tries; 0: no limit")
      ->capture_default_str();
  app.add_option("--seed", options.seed, "Draws faults and sizes")->capture_default_str();
  app.add_option("--faults", options.faults,
                 "all, none, or some of kill-worker, stop-worker, kill-rails, stop-rails, kill, "
                 "kill-both, stop, stop-host, restart, descriptors, rails-descriptors")
      ->delimiter(',')
      ->check(CLI::IsMember({"all", "none", "kill-worker", "stop-worker", "kill-rails",
                             "stop-rails", "kill", "kill-both", "stop", "stop-host", "restart",
                             "descriptors", "rails-descriptors"}));
  app.add_option("--pause", options.pause, "Mean seconds from a recovery to the next fault")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--path", options.path, "Of the rails")
      ->check(CLI::IsMember({"tcp", "shm"}))
      ->capture_default_str();
  app.add_option("--set", options.settings, "A daemons' setting: section.key=value");
  CLI11_PARSE(app, argc, argv);
  if (options.duration <= 0 && options.transfers == 0) {
    std::fprintf(stderr, "kvferry-soak: --duration or --transfers must end it\n");
    return 64;
  }
  return Soak(std::move(options)).run();
}

}  // namespace
}  // namespace kvferry::testing

int main(int argc, char** argv) {
  return kvferry::testing::soak(argc, argv);
}
