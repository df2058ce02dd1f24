// kvferryd: reads the configuration, starts the daemon, waits for signals, drains and stops.
#include <malloc.h>
#include <sys/resource.h>

#include <csignal>
#include <cstdio>
#include <ctime>
#include <exception>
#include <variant>

#include "daemon/node/daemon.h"
#include "daemon/ops/config.h"
#include "daemon/ops/crash.h"
#include "daemon/ops/log.h"
#include "daemon/ops/options.h"
#include "daemon/ops/service_manager.h"
#include "daemon/rpc/quiet_parser.h"

namespace kvferry {
namespace {

sigset_t handled_signals() {
  sigset_t set;
  sigemptyset(&set);
  for (int signal : {SIGTERM, SIGINT, SIGHUP}) sigaddset(&set, signal);
  return set;
}

// The next signal, or 0 after the time is over.
int next_signal(const sigset_t& set, Duration wait) {
  timespec time{};
  time.tv_sec = static_cast<time_t>(wait.count() / 1'000'000'000);
  time.tv_nsec = static_cast<long>(wait.count() % 1'000'000'000);
  const int signal = sigtimedwait(&set, nullptr, &time);
  return signal > 0 ? signal : 0;
}

// Tables of a transfer with many blocks take hundreds of KiB for a millisecond. Such memory would
// go back to the kernel and come again zeroed, page by page; kept, a transfer of 64 MiB within a
// node takes 8 % less time. What is kept in vain is at most the last number for each heap, and
// there are as many heaps as the first number says.
void keep_freed_memory() {
  mallopt(M_ARENA_MAX, 8);
  mallopt(M_MMAP_THRESHOLD, 16 << 20);
  mallopt(M_TRIM_THRESHOLD, 32 << 20);
}

// Workers' pools and connections take descriptors, and a listener of gRPC 1.51's whose accept()
// once finds none left never listens again (later releases try again after a second): the usual
// 1,024 are too few to be safe from whoever may connect.
void take_all_descriptors() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == limit.rlim_max) return;
  limit.rlim_cur = limit.rlim_max;
  (void)setrlimit(RLIMIT_NOFILE, &limit);
}

int serve(const ops::ConfigSources& sources, const ops::LoadedConfig& loaded,
          const sigset_t& signals) {
  ops::ServiceManager manager;
  auto started = node::Daemon::start(loaded, sources);
  if (!started) {
    ops::log_error("not started", {ops::field("error", started.error())});
    return ops::kExitConfiguration;
  }
  node::Daemon& daemon = **started;
  bool told = false;
  const Duration turn =
      std::min<Duration>(std::chrono::milliseconds(200),
                         manager.watchdog_interval().value_or(std::chrono::milliseconds(200)));
  while (true) {
    const int signal = next_signal(signals, turn);
    if (signal == SIGTERM || signal == SIGINT) break;
    if (signal == SIGHUP) daemon.reload();
    daemon.turn();
    const node::Daemon::Phase phase = daemon.phase();
    if (phase == node::Daemon::Phase::kRefused) {
      ops::log_error("the rails refuse this configuration", {ops::field("why", daemon.refusal())});
      daemon.stop();
      return ops::kExitConfiguration;
    }
    if (!told && phase == node::Daemon::Phase::kServing) {
      told = true;
      manager.ready(daemon.status_line());
      ops::log_info("serving");
    }
    if (daemon.healthy()) manager.watchdog_ping();
  }
  const Duration limit = daemon.drain_limit();
  ops::log_info("draining", {ops::field("limit", limit)});
  manager.stopping("draining");
  manager.extend_timeout(limit + std::chrono::seconds(5));
  daemon.drain();
  daemon.stop();
  ops::log_info("stopped");
  return ops::kExitOk;
}

// The code of a command that only prints, unless what it printed was lost.
int written(int code) {
  const bool lost = std::fflush(stdout) != 0 || std::ferror(stdout) != 0;
  if (code != ops::kExitOk || !lost) return code;
  std::fputs("kvferryd: standard output could not be written\n", stderr);
  return ops::kExitUnwritten;
}

int run(int argc, const char* const* argv) {
  const std::variant<ops::Options, int> parsed = ops::parse_options(argc, argv);
  if (const int* exit = std::get_if<int>(&parsed)) return written(*exit);
  const auto& options = std::get<ops::Options>(parsed);
  if (options.action == ops::Action::kCheckConfig) return written(ops::check_config(options));
  if (options.action == ops::Action::kPrintConfig) return written(ops::print_config(options));
  if (options.action == ops::Action::kPrintDefaultConfig) {
    std::fputs(ops::default_config_text().c_str(), stdout);
    return written(ops::kExitOk);
  }
  const ops::ConfigSources sources{options.config_file, options.sets, ops::current_environment()};
  const ops::LoadedConfig loaded = ops::load_config(sources);
  for (const ops::ConfigProblem& problem : loaded.problems)
    std::fprintf(stderr, "%s\n", problem.to_string().c_str());
  if (!loaded.ok()) return ops::kExitConfiguration;

  keep_freed_memory();
  take_all_descriptors();
  rpc::quiet_parser();
  // Before any thread exists, so that all of them leave these signals to this one.
  const sigset_t signals = handled_signals();
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
  ops::log_start(loaded.config.log.level, loaded.config.log.format);
  for (const ops::ConfigProblem& warning : loaded.warnings)
    ops::log_warning("configuration", {ops::field("warning", warning.to_string())});
  const int status = serve(sources, loaded, signals);
  ops::log_stop();
  return status;
}

}  // namespace
}  // namespace kvferry

int main(int argc, char** argv) {
  try {
    kvferry::ops::install_crash_handler(argv[0]);
    return kvferry::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kvferryd: %s\n", error.what());
    return kvferry::ops::kExitInternal;
  }
}
