// A process that confines itself as the rails do and then does what somebody who has taken it over
// might try.
//   rails_confined CALL NEEDS   NEEDS: off, tcp, shm, devices; forbidden: as tcp, on a machine
//                               that lets nobody have a filter
// Says on its standard output what the call answered, if it came back. Started as a rails process,
// with a channel and the call in RAILS_CONFINED, it takes its set-up first.
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/keyctl.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <seccomp.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <future>
#include <map>
#include <string>
#include <thread>

#include "daemon/rails/process/confinement.h"
#include "daemon/rails/process/setup.h"

namespace kvferry::rails {
namespace {

constexpr int kChannel = 3;

long forked(long pid) {
  if (pid == 0) ::_exit(0);
  if (pid > 0) ::waitpid(static_cast<pid_t>(pid), nullptr, 0);
  return pid;
}

long open_file(const char* path, int flags) {
  return ::syscall(SYS_openat, AT_FDCWD, path, flags, 0600);
}

long map_code() {
  void* const at = ::mmap(nullptr, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return at == MAP_FAILED ? -1 : 0;
}

long make_code() {
  void* const at =
      ::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return ::mprotect(at, 4096, PROT_READ | PROT_EXEC);
}

// To a listener of its own that was made before; what a new lane does.
class Listener {
 public:
  Listener() : fd_(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    address_.sin_family = AF_INET;
    address_.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t bytes = sizeof address_;
    if (::bind(fd_, generic(), bytes) != 0 || ::listen(fd_, 1) != 0 ||
        ::getsockname(fd_, generic(), &bytes) != 0)
      std::abort();
  }
  long connect() {
    const int ours = ::socket(AF_INET, SOCK_STREAM, 0);
    const int on = 1;
    if (ours < 0 || ::setsockopt(ours, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) != 0) return -1;
    if (::connect(ours, generic(), sizeof address_) != 0) return -1;
    const int theirs = ::accept(fd_, nullptr, nullptr);
    return theirs >= 0 && ::send(theirs, "x", 1, 0) == 1 && ::close(ours) == 0 ? 0 : -1;
  }

 private:
  sockaddr* generic() { return reinterpret_cast<sockaddr*>(&address_); }
  int fd_;
  sockaddr_in address_ = {};
};

using Call = std::function<long()>;

std::map<std::string, Call> calls_on_others(pid_t parent) {
  static char byte = 0;
  static iovec part = {&byte, 1};
  return {
      {"ptrace", [parent] { return ::ptrace(PTRACE_SEIZE, parent, nullptr, nullptr); }},
      {"process_vm_readv",
       [parent] { return ::syscall(SYS_process_vm_readv, parent, &part, 1, &part, 1, 0); }},
      {"process_vm_writev",
       [parent] { return ::syscall(SYS_process_vm_writev, parent, &part, 1, &part, 1, 0); }},
      {"kill", [parent] { return ::kill(parent, 0); }},
      {"tgkill", [parent] { return ::syscall(SYS_tgkill, parent, parent, 0); }},
      {"pidfd_open", [parent] { return ::syscall(SYS_pidfd_open, parent, 0); }},
      {"pidfd_getfd", [] { return ::syscall(SYS_pidfd_getfd, -1, 0, 0); }},
      {"setpriority",
       [parent] { return ::setpriority(PRIO_PROCESS, static_cast<id_t>(parent), 0); }},
      {"prlimit64",
       [parent] {
         rlimit limit = {};
         return ::prlimit(parent, RLIMIT_NOFILE, nullptr, &limit);
       }},
      {"fcntl", [parent] { return ::fcntl(kChannel, F_SETOWN, parent); }},
  };
}

std::map<std::string, Call> calls_on_the_kernel() {
  return {
      {"mount", [] { return ::mount("none", "/nowhere", "tmpfs", 0, nullptr); }},
      {"bpf",
       [] {
         bpf_attr attributes = {};
         return ::syscall(SYS_bpf, BPF_MAP_CREATE, &attributes, sizeof attributes);
       }},
      {"keyctl", [] { return ::syscall(SYS_keyctl, KEYCTL_GET_KEYRING_ID, 0, 0); }},
      {"userfaultfd", [] { return ::syscall(SYS_userfaultfd, O_CLOEXEC); }},
      {"unshare", [] { return ::unshare(CLONE_NEWUSER); }},
      {"setns", [] { return ::setns(-1, 0); }},
      {"io_uring_setup", [] { return ::syscall(SYS_io_uring_setup, 0, nullptr); }},
      {"perf_event_open", [] { return ::syscall(SYS_perf_event_open, nullptr, 0, -1, -1, 0); }},
      {"init_module", [] { return ::syscall(SYS_init_module, nullptr, 0, nullptr); }},
      {"setuid", [] { return ::syscall(SYS_setuid, ::getuid()); }},
      {"chroot", [] { return ::chroot("/nowhere"); }},
      {"socket of Unix, packets", [] { return ::socket(AF_UNIX, SOCK_SEQPACKET, 0); }},
      {"socket of Unix", [] { return ::socket(AF_UNIX, SOCK_STREAM, 0); }},
      {"socket of packets", [] { return ::socket(AF_PACKET, SOCK_RAW, 0); }},
      {"listen", [] { return ::listen(kChannel, 1); }},
      {"setsockopt", [] { return ::setsockopt(kChannel, IPPROTO_TCP, TCP_ULP, "tls", 3); }},
  };
}

std::map<std::string, Call> all_calls() {
  static Listener listener;
  std::map<std::string, Call> calls = {
      {"execve",
       [] {
         char name[] = "/bin/true";
         char* const arguments[] = {name, nullptr};
         return ::execve(name, arguments, nullptr);
       }},
      {"execveat", [] { return ::syscall(SYS_execveat, -1, "", nullptr, nullptr, 0); }},
      {"clone as fork", [] { return forked(::syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0)); }},
      {"a thread",
       [] {
         std::thread([] {}).join();
         return 0;
       }},
      {"openat to write", [] { return open_file("/etc/passwd", O_WRONLY | O_APPEND); }},
      {"openat to make", [] { return open_file("/nowhere/file", O_RDONLY | O_CREAT); }},
      {"openat to read", [] { return open_file("/etc/passwd", O_RDONLY); }},
      {"unlink", [] { return ::unlink("/nowhere/file"); }},
      {"rename", [] { return std::rename("/nowhere/a", "/nowhere/b"); }},
      {"memfd_create", [] { return ::memfd_create("x", 0); }},
      {"ioctl", [] { return ::ioctl(kChannel, TIOCSTI, ""); }},
      {"mmap of code", &map_code},
      {"mprotect to code", &make_code},
      {"a connection", [] { return listener.connect(); }},
      {"an interface's index", [] { return ::if_nametoindex("lo") != 0 ? 0L : -1L; }},
      {"readlink",
       [] {
         char text[64];
         return ::readlink("/proc/self/exe", text, sizeof text);
       }},
      {"reading a limit",
       [] {
         rlimit limit = {};
         return ::getrlimit(RLIMIT_NOFILE, &limit);
       }},
      {"abort", []() -> long { std::abort(); }},
  };
  calls.merge(calls_on_others(::getppid()));
  calls.merge(calls_on_the_kernel());
  return calls;
}

// By a thread that was there before, as a taken rail's is.
int act(const Call& call, const std::function<Status()>& confined) {
  std::promise<void> go;
  int answered = 0;
  long result = 0;
  std::thread thread([&] {
    go.get_future().wait();
    result = call();
    answered = errno;
  });
  if (auto status = confined(); !status) {
    say(kChannel, status.error().message);
    ::_exit(78);
  }
  go.set_value();
  thread.join();
  char text[64];
  const int bytes =
      std::snprintf(text, sizeof text, "%s\n", result >= 0 ? "ok" : std::strerror(answered));
  [[maybe_unused]] const ssize_t written =
      ::write(STDOUT_FILENO, text, static_cast<std::size_t>(bytes));
  ::_exit(0);
}

// As a container runtime may.
void forbid_filters() {
  const scmp_filter_ctx filter = seccomp_init(SCMP_ACT_ALLOW);
  if (filter == nullptr ||
      seccomp_rule_add(filter, SCMP_ACT_ERRNO(ENOSYS), SCMP_SYS(seccomp), 0) != 0 ||
      seccomp_load(filter) != 0)
    std::abort();
  seccomp_release(filter);
}

int run(const std::string& call, const std::string& needs) {
  drop_privileges();
  const auto calls = all_calls();
  const auto found = calls.find(call);
  if (found == calls.end()) return 64;
  return act(found->second, [&]() -> Status {
    if (needs == "off") return {};
    if (needs == "forbidden") forbid_filters();
    const Needs told = {needs == "shm", needs == "devices"};
    hide(told);
    return confine(told, kChannel);
  });
}

int run_as_rails(const char* call) {
  drop_privileges();
  const auto setup = receive_setup(kChannel, std::chrono::seconds(10));
  if (!setup || call == nullptr) return 70;
  const auto calls = all_calls();
  return act(calls.at(call), [&] { return confine(needs_of(setup->setup), kChannel); });
}

}  // namespace
}  // namespace kvferry::rails

int main(int argc, char** argv) {
  if (argc == 3) return kvferry::rails::run(argv[1], argv[2]);
  return kvferry::rails::run_as_rails(std::getenv("RAILS_CONFINED"));
}
