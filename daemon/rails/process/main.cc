// kvferry-rails: the process that speaks UCX. Started by kvferryd alone, with its channel as
// descriptor 3 and an environment made for it; it maps arenas and the rings, and nothing else. It
// dies with its parent.
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <ucp/api/ucp.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <mutex>
#include <string>
#include <thread>

#include "daemon/rails/process/listeners.h"
#include "daemon/rails/process/rail.h"
#include "daemon/rails/process/rail_thread.h"
#include "daemon/rails/process/self_test.h"
#include "daemon/rails/process/setup.h"

#if defined(__SANITIZE_THREAD__)
// UCX is not instrumented; without this its own synchronisation is reported. The environment is
// made by the parent and carries no sanitizer options.
extern "C" const char* __tsan_default_options() {
  return "ignore_noninstrumented_modules=1";
}
#endif

namespace kvferry::rails {
namespace {

constexpr int kChannel = 3;
constexpr int kExitUsage = 64;
constexpr int kExitInternal = 70;
constexpr int kExitConfiguration = 78;

[[noreturn]] void die(int status, const Error& error) {
  say(kChannel, error.message);
  ::_exit(status);
}

void confine() {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
  const rlimit none = {0, 0};
  ::setrlimit(RLIMIT_CORE, &none);
  ::signal(SIGPIPE, SIG_IGN);
}

void run_rail(const ProcessSetup& setup, uint32_t index, std::mutex& one_at_a_time) {
  const std::string name =
      "rail" + std::to_string(index) + "-" + setup.setup.rails[index].transport;
  ::pthread_setname_np(::pthread_self(), name.substr(0, 15).c_str());
  std::unique_ptr<Rail> rail;
  {
    // One after the other: which listener is whose is seen by comparing before and after.
    const std::lock_guard lock(one_at_a_time);
    const auto before = tcp_listeners();
    auto made = Rail::make(setup, index);
    if (!made) die(kExitInternal, made.error());
    rail = std::move(*made);
    const auto listeners = added_listeners(before, tcp_listeners());
    if (!listeners.empty())
      if (auto status = check_listeners(listeners, setup.setup, setup.setup.rails[index]); !status)
        die(kExitConfiguration, status.error());
    const uint16_t port = listeners.empty() ? uint16_t{0} : listeners.front().port;
    if (auto status = rail->announce(port); !status) die(kExitInternal, status.error());
  }
  RailThread(setup, index, *rail).run();
}

int run() {
  confine();
  int type = 0;
  socklen_t bytes = sizeof type;
  if (::getsockopt(kChannel, SOL_SOCKET, SO_TYPE, &type, &bytes) != 0 || type != SOCK_SEQPACKET) {
    std::fputs("kvferry-rails is started by kvferryd, not by hand\n", stderr);
    return kExitUsage;
  }
  auto setup = receive_setup(kChannel, std::chrono::seconds(10));
  if (!setup) die(kExitInternal, setup.error());
  // Its peers are reaped before we may die.
  const Status tested = SelfTest(setup->setup).run();
  if (!tested) die(kExitConfiguration, tested.error());
  std::mutex one_at_a_time;
  for (uint32_t i = 0; i < setup->setup.rail_count; ++i)
    std::thread(run_rail, std::cref(*setup), i, std::ref(one_at_a_time)).detach();

  // Main closes its end, or writes anything, when it is done with us. No teardown: an exit ends
  // every request at once, which is what it is for.
  for (;;) {
    pollfd wait = {kChannel, POLLIN, 0};
    const int ready = ::poll(&wait, 1, -1);
    if (ready < 0 && errno == EINTR) continue;
    ::_exit(ready < 0 ? kExitInternal : 0);
  }
}

}  // namespace
}  // namespace kvferry::rails

int main() {
  return kvferry::rails::run();
}
