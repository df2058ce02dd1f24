#include "daemon/rails/process/confinement.h"

#include <fcntl.h>
#include <linux/capability.h>
#include <linux/netlink.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <seccomp.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>

namespace kvferry::rails {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

// --- Last words.

constexpr int kSeccompCode = 1;  // SYS_SECCOMP of siginfo_t::si_code, which libc's headers lack
constexpr std::size_t kNames = 512;
// By number; null: a call that libseccomp does not know. Made before the filter, as a signal
// handler may not allocate.
std::array<const char*, kNames> call_names;
int words_channel = -1;

class Words {
 public:
  Words& operator<<(std::string_view text) {
    const std::size_t bytes = std::min(text.size(), sizeof text_ - used_);
    std::memcpy(text_ + used_, text.data(), bytes);
    used_ += bytes;
    return *this;
  }
  Words& operator<<(long number) {
    char digits[24];
    const auto end = std::to_chars(digits, digits + sizeof digits, number).ptr;
    return *this << std::string_view(digits, static_cast<std::size_t>(end - digits));
  }
  std::string_view text() const { return {text_, used_}; }

 private:
  char text_[256];
  std::size_t used_ = 0;
};

void on_refused(int, siginfo_t* info, void*) {
  Words words;
  if (info->si_code == kSeccompCode) {
    const int number = info->si_syscall;
    const bool named = number >= 0 && static_cast<std::size_t>(number) < kNames;
    const char* const name = named ? call_names[static_cast<std::size_t>(number)] : nullptr;
    words << "system call " << (name != nullptr ? name : "?") << " (" << long{number}
          << ") is refused by the seccomp filter: taken over, or UCX needs it";
  } else {
    words << "SIGSYS was sent by another process";
  }
  (void)::send(words_channel, words.text().data(), words.text().size(),
               MSG_DONTWAIT | MSG_NOSIGNAL);
  Words line;
  line << "kvferry-rails: " << words.text() << "\n";
  [[maybe_unused]] const ssize_t written =
      ::write(STDERR_FILENO, line.text().data(), line.text().size());
  // Past the C library, where the thread sanitizer puts signals off: with the handler gone, one
  // more refused call is the end, whatever is blocked.
  constexpr unsigned long kDefaultAction[8] = {};
  ::syscall(SYS_rt_sigaction, SIGSYS, kDefaultAction, nullptr, sizeof(uint64_t));
  ::syscall(SYS_ptrace, 0, 0, 0, 0);
  ::_exit(128 + SIGSYS);
}

Status prepare_last_words(int channel) {
  words_channel = channel;
  // Never freed: the process ends by _exit.
  for (std::size_t number = 0; number < kNames; ++number)
    call_names[number] =
        seccomp_syscall_resolve_num_arch(SCMP_ARCH_NATIVE, static_cast<int>(number));
  struct sigaction action = {};
  action.sa_sigaction = &on_refused;
  action.sa_flags = SA_SIGINFO;
  if (::sigaction(SIGSYS, &action, nullptr) != 0)
    return fail_errno("SECCOMP_UNAVAILABLE", "sigaction", errno);
  return {};
}

// --- The filter.

// libseccomp's context. Remembers the first failure, so that the lists below read as lists.
class Filter {
 public:
  using Condition = scmp_arg_cmp;

  explicit Filter(uint32_t refused) : context_(seccomp_init(refused)) {
    if (context_ == nullptr) error_ = -ENOMEM;
  }
  ~Filter() {
    if (context_ != nullptr) seccomp_release(context_);
  }
  Filter(const Filter&) = delete;
  Filter& operator=(const Filter&) = delete;

  void set(scmp_filter_attr attribute, uint32_t value) {
    note(seccomp_attr_set(context_, attribute, value));
  }
  void allow(std::initializer_list<const char*> names) {
    for (const char* const name : names) rule(SCMP_ACT_ALLOW, name, {});
  }
  void allow_if(const char* name, std::initializer_list<Condition> conditions) {
    rule(SCMP_ACT_ALLOW, name, conditions);
  }
  void answer(int error, const char* name, std::initializer_list<Condition> conditions = {}) {
    rule(SCMP_ACT_ERRNO(static_cast<uint32_t>(error)), name, conditions);
  }
  int load() {
    if (error_ == 0) note(seccomp_load(context_));
    return error_;
  }

 private:
  void note(int result) {
    if (error_ == 0 && result < 0) error_ = result;
  }
  void rule(uint32_t action, const char* name, std::initializer_list<Condition> conditions) {
    const int number = seccomp_syscall_resolve_name(name);
    // A name of another architecture, or newer than libseccomp.
    if (number == __NR_SCMP_ERROR || number < 0) return;
    const std::span<const Condition> all(conditions);
    note(seccomp_rule_add_array(context_, action, number, static_cast<unsigned>(all.size()),
                                all.data()));
  }

  scmp_filter_ctx context_;
  int error_ = 0;
};

Filter::Condition equal(unsigned argument, uint64_t value) {
  // Of an int only the lower half counts, to the kernel too.
  return {argument, SCMP_CMP_MASKED_EQ, UINT32_MAX, value & UINT32_MAX};
}
Filter::Condition bits(unsigned argument, uint64_t mask, uint64_t value) {
  return {argument, SCMP_CMP_MASKED_EQ, mask, value};
}

void allow_memory(Filter& filter) {
  filter.allow({"brk", "munmap", "mremap", "madvise"});
  // What is code was loaded before.
  filter.allow_if("mmap", {bits(2, PROT_EXEC, 0)});
  filter.allow_if("mprotect", {bits(2, PROT_EXEC, 0)});
}

void allow_threads(Filter& filter) {
  filter.allow({"futex", "sched_yield", "sched_getaffinity", "getcpu", "rt_sigreturn",
                "rt_sigprocmask", "rt_sigaction", "restart_syscall", "exit", "exit_group", "getpid",
                "gettid", "clock_gettime", "gettimeofday", "clock_nanosleep", "nanosleep",
                "getrandom", "membarrier"});
  // Tell nothing that is not known.
  filter.allow({"getuid", "geteuid", "getgid", "getegid", "uname"});
  // A library's thread may have been made, and not have begun.
  filter.allow({"set_robust_list", "rseq"});
  // abort(): signals to ourselves alone.
  filter.allow_if("tgkill", {equal(0, static_cast<uint64_t>(::getpid()))});
  // Limits are read, by UCX, and not set.
  filter.allow_if("prlimit64", {equal(0, 0), {2, SCMP_CMP_EQ, 0, 0}});
}

void allow_descriptors(Filter& filter) {
  filter.allow({"read", "write", "readv", "writev", "close", "fstat", "lseek", "poll", "ppoll",
                "epoll_wait", "epoll_pwait", "epoll_ctl", "timerfd_create", "timerfd_settime"});
  // How the C library does fstat.
  filter.allow_if("newfstatat", {equal(3, AT_EMPTY_PATH)});
  // Whether its words go to a terminal.
  filter.allow_if("ioctl", {equal(1, TCGETS)});
  // Not F_SETOWN and F_SETSIG, which send signals to others.
  for (const int command : {F_GETFD, F_SETFD, F_GETFL, F_SETFL})
    filter.allow_if("fcntl", {equal(1, static_cast<uint64_t>(command))});
}

void allow_sockets(Filter& filter) {
  filter.allow({"connect", "accept", "accept4", "bind", "shutdown", "sendto", "recvfrom", "sendmsg",
                "recvmsg", "getsockname", "getpeername", "getsockopt"});
  // Not Unix sockets with connections: that is where this host's services are.
  for (const int family : {AF_INET, AF_INET6})
    filter.allow_if("socket", {equal(0, static_cast<uint64_t>(family)), bits(1, 0xf, SOCK_STREAM)});
  // What UCX asks of an interface at each connection.
  for (const int request : {SIOCETHTOOL, SIOCGIFHWADDR, SIOCGIFMTU, SIOCGIFFLAGS, SIOCGIFADDR,
                            SIOCGIFNETMASK, SIOCGIFINDEX})
    filter.allow_if("ioctl", {equal(1, static_cast<uint64_t>(request))});
  // The C library's if_nametoindex, which UCX 1.22 calls for each connection off loopback.
  filter.allow_if("socket", {equal(0, AF_UNIX), bits(1, 0xf, SOCK_DGRAM)});
  // UCX 1.22 asks for the route to a peer.
  filter.allow_if("socket",
                  {equal(0, AF_NETLINK), bits(1, 0xf, SOCK_RAW), equal(2, NETLINK_ROUTE)});
  // What UCX's TCP sets; not filters, protocols on top (TCP_ULP), or owners.
  for (const int option : {SO_REUSEADDR, SO_KEEPALIVE, SO_SNDBUF, SO_RCVBUF})
    filter.allow_if("setsockopt", {equal(1, SOL_SOCKET), equal(2, static_cast<uint64_t>(option))});
  for (const int option :
       {TCP_NODELAY, TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT, TCP_SYNCNT, TCP_USER_TIMEOUT})
    filter.allow_if("setsockopt", {equal(1, IPPROTO_TCP), equal(2, static_cast<uint64_t>(option))});
}

// Opening for reading alone, and looking for a file, is answered with an error, not with death:
// libraries look for files that they do without. UCX 1.22 wants the PCI bandwidth of the interface
// at each connection, to choose between transports, of which there is one, and rp_filter to warn of
// it.
void refuse_files(Filter& filter) {
  filter.answer(EACCES, "openat", {bits(2, O_ACCMODE | O_CREAT, O_RDONLY)});
  filter.answer(EACCES, "open", {bits(1, O_ACCMODE | O_CREAT, O_RDONLY)});
  filter.answer(EACCES, "newfstatat", {bits(3, AT_EMPTY_PATH, 0)});
  for (const char* const name :
       {"stat", "lstat", "readlink", "readlinkat", "access", "faccessat", "faccessat2"})
    filter.answer(EACCES, name);
}

// A peer's segment is opened by /proc/PID/fd for reading and writing, and /proc/PID/stat tells that
// it lives. A filter does not see paths. The segments of our own grow in /dev/shm.
void allow_shm(Filter& filter) {
  filter.allow({"open", "openat", "fallocate", "ftruncate", "unlink", "unlinkat", "newfstatat",
                "stat", "lstat", "readlink", "readlinkat", "access", "faccessat", "faccessat2",
                "getdents64", "fstatfs", "statfs"});
}

// The driver is closed: what it calls, and when, is not known for sure, so files, ioctl, threads
// and code that it loads or makes are free. Programs, tracing and other processes stay out of
// reach.
void allow_driver(Filter& filter) {
  filter.allow({"open", "openat", "ioctl", "access", "faccessat", "faccessat2", "stat", "lstat",
                "newfstatat", "statx", "statfs", "fstatfs", "readlink", "readlinkat",
                "getdents64"});
  filter.allow({"mmap", "mprotect", "mlock", "mlock2", "munlock", "mincore", "msync", "mbind",
                "get_mempolicy", "set_mempolicy", "memfd_create", "ftruncate", "fallocate"});
  filter.allow({"eventfd2", "epoll_create1", "pipe2", "pread64", "pwrite64", "dup", "select",
                "pselect6", "sysinfo", "sigaltstack"});
  filter.allow({"sched_setaffinity", "sched_getscheduler", "sched_getparam"});
  filter.allow_if("prctl", {equal(0, PR_SET_NAME)});
  filter.allow_if("fcntl", {equal(1, F_DUPFD_CLOEXEC)});
  constexpr uint64_t kThread = CLONE_VM | CLONE_SIGHAND | CLONE_THREAD;
  filter.allow_if("clone", {bits(0, kThread, kThread)});
  // Its flags lie in memory that no filter sees; the C library then takes the older call.
  filter.answer(ENOSYS, "clone3");
}

// For the sanitizers' reports.
void allow_sanitizers(Filter& filter) {
  filter.allow({"readlink", "readlinkat", "pipe", "pipe2", "sigaltstack", "getrusage",
                "sched_getaffinity", "mincore", "newfstatat", "stat", "dup", "prctl"});
  filter.allow_if("openat", {bits(2, O_ACCMODE | O_CREAT, O_RDONLY)});
  filter.allow_if("open", {bits(1, O_ACCMODE | O_CREAT, O_RDONLY)});
}

Status load_filter(const Needs& needs) {
  Filter filter(SCMP_ACT_TRAP);
  filter.set(SCMP_FLTATR_ACT_BADARCH, SCMP_ACT_KILL_PROCESS);
  filter.set(SCMP_FLTATR_CTL_NNP, 1);
  filter.set(SCMP_FLTATR_CTL_TSYNC, 1);
  // Kernels before 5.16 would slow all loads down after stores, against code that reads its own
  // process's memory by speculation: there is no such code here that may not read it anyhow.
  filter.set(SCMP_FLTATR_CTL_SSB, 1);
  filter.set(SCMP_FLTATR_CTL_OPTIMIZE, 2);  // a binary tree
  allow_memory(filter);
  allow_threads(filter);
  allow_descriptors(filter);
  allow_sockets(filter);
  if (needs.shm) allow_shm(filter);
  if (needs.devices) allow_driver(filter);
  if (kSanitized) allow_sanitizers(filter);
  if (!needs.shm && !needs.devices && !kSanitized) refuse_files(filter);
  if (const int error = filter.load(); error < 0)
    return fail(Code::kFailedPrecondition, "SECCOMP_UNAVAILABLE",
                "no seccomp filter can be set (libseccomp: " + std::string(std::strerror(-error)) +
                    "); rails.seccomp = \"off\" does without, and leaves whoever reaches a UCX "
                    "port all that the daemon's user may do");
  return {};
}

void drop_capabilities() {
  // As far as there are any; the numbers end where the kernel says so.
  for (unsigned long capability = 0; capability < 64; ++capability)
    if (::prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0) break;
  __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
  __user_cap_data_struct none[_LINUX_CAPABILITY_U32S_3] = {};
  // To have fewer is always allowed.
  if (::syscall(SYS_capset, &header, none) != 0) std::abort();
}

}  // namespace

void drop_privileges() {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
  drop_capabilities();
  const rlimit none = {0, 0};
  ::setrlimit(RLIMIT_CORE, &none);
  ::signal(SIGPIPE, SIG_IGN);
}

Needs needs_of(const Setup& setup) {
  const std::span rails(setup.rails, setup.rail_count);
  const std::span segments(setup.segments, setup.segment_count);
  Needs needs;
  needs.shm = std::any_of(rails.begin(), rails.end(), [](const SetupRail& rail) {
    return std::string_view(rail.transport) == "shm";
  });
  needs.devices = std::any_of(segments.begin(), segments.end(), [](const SetupSegment& segment) {
    return is_on_device(segment.kind);
  });
  return needs;
}

void limit_descriptors(const Setup& setup) {
  // A lane has at most two connections, and a third is there while one is given up. The rest: what
  // a context, a worker and the driver open.
  constexpr rlim_t kOfLane = 3;
  constexpr rlim_t kOfRail = 64;
  constexpr rlim_t kOfProcess = 1024;
  rlimit limit = {};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  const rlim_t wanted = kOfProcess + setup.rail_count * (setup.limits.lanes * kOfLane + kOfRail);
  limit.rlim_cur = limit.rlim_max = std::min(wanted, limit.rlim_max);
  ::setrlimit(RLIMIT_NOFILE, &limit);
}

void hide(const Needs& needs) {
  if (!needs.shm) ::prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
}

Status confine(const Needs& needs, int channel) {
  KVFERRY_RETURN_IF_ERROR(prepare_last_words(channel));
  return load_filter(needs);
}

}  // namespace kvferry::rails
