#include "daemon/rails/child_process.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>

namespace kvferry::rails {
namespace {

constexpr int kChannelFd = 3;

std::vector<char*> pointers_to(std::vector<std::string>& strings) {
  std::vector<char*> pointers;
  pointers.reserve(strings.size() + 1);
  for (std::string& text : strings) pointers.push_back(text.data());
  pointers.push_back(nullptr);
  return pointers;
}

// posix_spawn's two objects, destroyed together.
class SpawnPlan {
 public:
  SpawnPlan() {
    posix_spawn_file_actions_init(&actions);
    posix_spawnattr_init(&attributes);
  }
  ~SpawnPlan() {
    posix_spawn_file_actions_destroy(&actions);
    posix_spawnattr_destroy(&attributes);
  }
  SpawnPlan(const SpawnPlan&) = delete;
  SpawnPlan& operator=(const SpawnPlan&) = delete;

  // What the child has: its descriptors, and signals as a fresh process has them.
  int prepare(const ChildProcess::Ends& ends) {
    sigset_t none;
    sigset_t all;
    sigemptyset(&none);
    sigfillset(&all);
    int error = posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
    if (error == 0)
      error = ends.output >= 0
                  ? posix_spawn_file_actions_adddup2(&actions, ends.output, 1)
                  : posix_spawn_file_actions_addopen(&actions, 1, "/dev/null", O_WRONLY, 0);
    if (error == 0 && ends.channel >= 0)
      error = posix_spawn_file_actions_adddup2(&actions, ends.channel, kChannelFd);
    const int first_other = ends.channel >= 0 ? kChannelFd + 1 : kChannelFd;
    if (error == 0) error = posix_spawn_file_actions_addclosefrom_np(&actions, first_other);
    if (error == 0) error = posix_spawnattr_setsigmask(&attributes, &none);
    if (error == 0) error = posix_spawnattr_setsigdefault(&attributes, &all);
    if (error == 0)
      error = posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
    return error;
  }

  posix_spawn_file_actions_t actions;
  posix_spawnattr_t attributes;
};

}  // namespace

Result<ChildProcess> ChildProcess::spawn(const std::string& path,
                                         const std::vector<std::string>& arguments,
                                         const std::vector<std::string>& environment,
                                         const Ends& ends) {
  std::vector<std::string> argument_copy;
  argument_copy.reserve(arguments.size() + 1);
  argument_copy.push_back(path);
  argument_copy.insert(argument_copy.end(), arguments.begin(), arguments.end());
  std::vector<std::string> environment_copy = environment;
  const std::vector<char*> argv = pointers_to(argument_copy);
  const std::vector<char*> envp = pointers_to(environment_copy);

  // An end that is descriptor 0, 1 or 2 would be lost to the actions before it.
  const auto high = [](int fd) { return UniqueFd(::fcntl(fd, F_DUPFD_CLOEXEC, kChannelFd + 1)); };
  UniqueFd channel, output;
  if (ends.channel >= 0 && !(channel = high(ends.channel)))
    return fail_errno("RAILS_SPAWN_FAILED", "fcntl(F_DUPFD_CLOEXEC)", errno);
  if (ends.output >= 0 && !(output = high(ends.output)))
    return fail_errno("RAILS_SPAWN_FAILED", "fcntl(F_DUPFD_CLOEXEC)", errno);
  SpawnPlan plan;
  if (const int error = plan.prepare({channel.get(), output.get()}); error != 0)
    return fail_errno("RAILS_SPAWN_FAILED", "posix_spawn set-up", error);
  pid_t pid = -1;
  const int error =
      posix_spawn(&pid, path.c_str(), &plan.actions, &plan.attributes, argv.data(), envp.data());
  if (error != 0) return fail_errno("RAILS_SPAWN_FAILED", "posix_spawn(" + path + ")", error);

  ChildProcess child;
  child.pid_ = pid;
  // Nobody else waits for this pid, so it cannot have been given to another process.
  child.pidfd_ = UniqueFd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
  if (!child.pidfd_) {
    const int saved = errno;
    child.end(std::chrono::seconds(1));
    return fail_errno("RAILS_SPAWN_FAILED", "pidfd_open", saved);
  }
  return child;
}

void ChildProcess::kill() {
  if (alive()) ::kill(pid_, SIGKILL);
}

bool ChildProcess::reap(Exit& exit) {
  if (!alive()) return false;
  int status = 0;
  const pid_t got = ::waitpid(pid_, &status, WNOHANG);
  if (got == 0 || (got < 0 && errno == EINTR)) return false;
  exit = {};
  if (got == pid_ && WIFEXITED(status)) {
    exit.exited = true;
    exit.status = WEXITSTATUS(status);
  } else if (got == pid_ && WIFSIGNALED(status)) {
    exit.signal = WTERMSIG(status);
  }
  pid_ = -1;
  pidfd_.reset();
  return true;
}

void ChildProcess::end(Duration limit) {
  kill();
  Exit exit;
  const Time deadline = monotonic_now() + limit;
  while (alive() && !reap(exit)) {
    const Duration left = deadline - monotonic_now();
    if (left <= Duration::zero()) return;
    pollfd wait = {pidfd_.get(), POLLIN, 0};
    const auto left_ms = std::chrono::ceil<std::chrono::milliseconds>(left).count();
    // Without a pidfd poll is a short pause.
    ::poll(&wait, pidfd_ ? 1 : 0, pidfd_ ? static_cast<int>(left_ms) : 1);
  }
}

}  // namespace kvferry::rails
