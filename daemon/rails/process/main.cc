// kvferry-rails: the process that speaks UCX. Started by kvferryd alone, with its channel as
// descriptor 3 and an environment made for it; it maps arenas and the rings, and nothing else. It
// dies with its parent.
//
// With --capabilities [--cuda-driver LIBRARY] it prints as one JSON object what its UCX can do.
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sys/socket.h>
#include <ucp/api/ucp.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <latch>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "daemon/base/cpu_set.h"
#include "daemon/rails/process/capabilities.h"
#include "daemon/rails/process/confinement.h"
#include "daemon/rails/process/device_segments.h"
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
constexpr int kListenersLookedAtMs = 1000;
constexpr int kExitUsage = 64;
constexpr int kExitInternal = 70;
constexpr int kExitConfiguration = 78;

[[noreturn]] void die(int status, const Error& error) {
  say(kChannel, error.message);
  ::_exit(status);
}

// Of the preparation: what no restart will mend, but for memory and devices that others may free or
// mend.
int preparation_status(const Error& error) {
  const bool passing = error.code == Code::kUnavailable || error.code == Code::kResourceExhausted;
  return passing ? kExitInternal : kExitConfiguration;
}

// Between the threads of the rails and main's.
struct Start {
  explicit Start(uint32_t rails) : made(rails) {}
  std::mutex one_at_a_time;
  std::latch made;                  // by each rail that listens
  std::latch confined{1};           // before any of them serves
  std::vector<Listener> listeners;  // of all rails; constant once they are made
};

void run_rail(const ProcessSetup& setup, const gpu::Device* device, uint32_t index, Start& start) {
  const std::string name =
      "rail" + std::to_string(index) + "-" + setup.setup.rails[index].transport;
  ::pthread_setname_np(::pthread_self(), name.substr(0, 15).c_str());
  // First of all, so that what UCX allocates and starts for this rail is there too.
  const CpuSet& cpus = setup.setup.rails[index].cpus;
  const int binding_errno = cpus.none() ? 0 : bind_thread(::pthread_self(), cpus);
  std::unique_ptr<Rail> rail;
  uint16_t port = 0;
  {
    // One after the other: which listener is whose is seen by comparing before and after.
    const std::lock_guard lock(start.one_at_a_time);
    const auto before = tcp_listeners();
    auto made = Rail::make(setup, index, device);
    if (!made)
      die(made.error().code == Code::kFailedPrecondition ? kExitConfiguration : kExitInternal,
          made.error());
    rail = std::move(*made);
    const auto listeners = added_listeners(before, tcp_listeners());
    if (!listeners.empty())
      if (auto status = check_listeners(listeners, setup.setup, setup.setup.rails[index]); !status)
        die(kExitConfiguration, status.error());
    if (!listeners.empty()) port = listeners.front().port;
    start.listeners.insert(start.listeners.end(), listeners.begin(), listeners.end());
  }
  start.made.count_down();
  start.confined.wait();
  if (auto status = rail->announce(port, binding_errno); !status)
    die(kExitInternal, status.error());
  // UCX pushes the context of the memory that it copies; its progress and wake-up take whichever is
  // current, as long as there is one.
  std::optional<gpu::Device::Current> current;
  if (device != nullptr)
    if (const Status& entered = current.emplace(*device).status(); !entered)
      die(kExitInternal, entered.error());
  RailThread(setup, index, *rail).run();
}

// Everything that has to be right before a rail is made.
Result<DeviceSegments> prepare(ProcessSetup& setup) {
  // Forks its peers, so it comes before the driver and UCX; they are reaped when it goes.
  SelfTest test(setup.setup);
  auto devices = DeviceSegments::import(setup);
  if (!devices) return devices;
  if (devices->first_device() != nullptr) KVFERRY_RETURN_IF_ERROR(check_device_memory());
  KVFERRY_RETURN_IF_ERROR(test.run(devices->devices()));
  return devices;
}

int run() {
  drop_privileges();
  int type = 0;
  socklen_t bytes = sizeof type;
  if (::getsockopt(kChannel, SOL_SOCKET, SO_TYPE, &type, &bytes) != 0 || type != SOCK_SEQPACKET) {
    std::fputs("kvferry-rails is started by kvferryd, not by hand\n", stderr);
    return kExitUsage;
  }
  auto setup = receive_setup(kChannel, std::chrono::seconds(10));
  if (!setup) die(kExitInternal, setup.error());
  limit_descriptors(setup->setup);
  const auto devices = prepare(*setup);
  if (!devices) die(preparation_status(devices.error()), devices.error());
  Start start(setup->setup.rail_count);
  for (uint32_t i = 0; i < setup->setup.rail_count; ++i)
    std::thread(run_rail, std::cref(*setup), devices->first_device(), i, std::ref(start)).detach();
  start.made.wait();
  const Needs needs = needs_of(setup->setup);
  hide(needs);
  if (setup->setup.confined != 0)
    if (auto status = confine(needs, kChannel); !status)
      die(preparation_status(status.error()), status.error());
  start.confined.count_down();

  // Main closes its end, or writes anything, when it is done with us. No teardown: an exit ends
  // every request at once, which is what it is for.
  for (;;) {
    pollfd wait = {kChannel, POLLIN, 0};
    const int ready = ::poll(&wait, 1, kListenersLookedAtMs);
    if (ready < 0 && errno == EINTR) continue;
    if (ready != 0) ::_exit(ready < 0 ? kExitInternal : 0);
    // UCX closes a listener when accept() fails, as it does for want of descriptors. Nobody could
    // ever connect again; our successor has new ones.
    for (const Listener& listener : start.listeners)
      if (!listens(listener))
        die(kExitInternal, Error{Code::kInternal,
                                 "LISTENER_CLOSED",
                                 "UCX has closed the listener at port " +
                                     std::to_string(listener.port) + ": out of descriptors?",
                                 {}});
  }
}

// The answer alone goes to the standard output; UCX's words go to standard error.
int print_capabilities(const std::string& cuda_driver) {
  const int output = ::fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, kChannel + 1);
  if (output < 0 || ::dup2(STDERR_FILENO, STDOUT_FILENO) < 0) return kExitInternal;
  auto answer = capabilities_json(cuda_driver);
  if (!answer) {
    std::fprintf(stderr, "kvferry-rails: %s\n", answer.error().message.c_str());
    return kExitInternal;
  }
  *answer += '\n';
  std::string_view left = *answer;
  while (!left.empty()) {
    const ssize_t written = ::write(output, left.data(), left.size());
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return kExitInternal;
    left.remove_prefix(static_cast<std::size_t>(written));
  }
  return 0;
}

int run(std::span<char* const> arguments) {
  const std::vector<std::string_view> all(arguments.begin(), arguments.end());
  if (all.size() < 2) return run();
  const bool driver = all.size() == 4 && all[2] == "--cuda-driver";
  if (all[1] != "--capabilities" || (all.size() != 2 && !driver)) {
    std::fputs("usage: kvferry-rails --capabilities [--cuda-driver LIBRARY]\n", stderr);
    return kExitUsage;
  }
  drop_privileges();
  // No teardown of UCX and the driver here either.
  const int status = print_capabilities(driver ? std::string(all[3]) : std::string());
  ::_exit(status);
}

}  // namespace
}  // namespace kvferry::rails

int main(int argc, char** argv) {
  return kvferry::rails::run({argv, static_cast<std::size_t>(argc)});
}
