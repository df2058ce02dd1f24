#include "client/bench/stop.h"

#include <signal.h>
#include <unistd.h>

#include <atomic>

namespace kvferry::bench {
namespace {

constexpr unsigned kGraceSeconds = 30;

std::atomic<int> signal_seen{0};
static_assert(std::atomic<int>::is_always_lock_free);  // written by a signal handler

void on_signal(int number) {
  signal_seen.store(number);
  // SIGALRM comes again after the grace, and then ends the process.
  if (number == SIGALRM) ::alarm(kGraceSeconds);
}

}  // namespace

void watch_for_stop(std::chrono::seconds limit) {
  struct sigaction action {};
  action.sa_handler = on_signal;
  // Once: the second one does what the system does by default, which is to end the process.
  action.sa_flags = static_cast<int>(SA_RESETHAND) | SA_RESTART;
  for (const int number : {SIGINT, SIGTERM, SIGALRM}) ::sigaction(number, &action, nullptr);
  ::alarm(static_cast<unsigned>(limit.count()));
}

std::optional<client::Error> stop_asked() {
  const int number = signal_seen.load();
  if (number == 0) return std::nullopt;
  if (number == SIGALRM) {
    return client::Error{client::Code::kDeadlineExceeded,
                         "BENCH_TIME_LIMIT",
                         "the run took longer than --time-limit",
                         {},
                         {}};
  }
  return client::Error{client::Code::kCancelled, "BENCH_INTERRUPTED", "ended by a signal", {}, {}};
}

}  // namespace kvferry::bench
