// What a rails process that has been taken over can still do: each call is tried by a program that
// confines itself by the same function, and without it too, lest a call be tried that fails anyhow.
#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <algorithm>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>

#include "daemon/rails/process/confinement.h"
#include "daemon/rails/ucx_environment.h"
#include "tests/proc/rails_harness.h"

namespace kvferry::rails {
namespace {

using namespace testing;

struct Outcome {
  bool exited = false;
  int status = 0;
  int signal = 0;
  std::string output;  // standard output and error
};

Outcome outcome_of(int wait_status) {
  Outcome out;
  out.exited = WIFEXITED(wait_status);
  if (out.exited) out.status = WEXITSTATUS(wait_status);
  if (WIFSIGNALED(wait_status)) out.signal = WTERMSIG(wait_status);
  return out;
}

Outcome run_confined(const std::string& call, const std::string& needs) {
  int ends[2];
  REQUIRE(::pipe2(ends, O_CLOEXEC) == 0);
  UniqueFd ours(ends[0]);
  UniqueFd theirs(ends[1]);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  for (const int fd : {1, 2}) posix_spawn_file_actions_adddup2(&actions, theirs.get(), fd);
  posix_spawn_file_actions_addopen(&actions, 3, "/dev/null", O_RDWR, 0);
  std::string texts[] = {KVFERRY_RAILS_CONFINED, call, needs};
  char* const arguments[] = {texts[0].data(), texts[1].data(), texts[2].data(), nullptr};
  pid_t pid = -1;
  REQUIRE(::posix_spawn(&pid, texts[0].c_str(), &actions, nullptr, arguments, environ) == 0);
  posix_spawn_file_actions_destroy(&actions);
  theirs.reset();
  std::string output;
  char part[512];
  for (;;) {
    pollfd wait = {ours.get(), POLLIN, 0};
    if (::poll(&wait, 1, 20'000) <= 0) {
      ::kill(pid, SIGKILL);
      ::waitpid(pid, nullptr, 0);
      FAIL(call << " with " << needs << " hangs: " << output);
    }
    const ssize_t got = ::read(ours.get(), part, sizeof part);
    if (got <= 0) break;
    output.append(part, static_cast<std::size_t>(got));
  }
  int status = 0;
  REQUIRE(::waitpid(pid, &status, 0) == pid);
  Outcome out = outcome_of(status);
  out.output = output;
  return out;
}

// "clone as fork" is the call clone.
std::string name_of(const std::string& call) {
  return call.substr(0, call.find(' '));
}

void check_refused(const std::string& call, const std::string& needs) {
  const Outcome outcome = run_confined(call, needs);
  INFO(call << " with " << needs << ": status " << outcome.status << ", signal " << outcome.signal
            << ": " << outcome.output);
  CHECK(outcome.signal == SIGSYS);
  CHECK(outcome.output.find("system call " + name_of(call) + " (") != std::string::npos);
}

void check_answered(const std::string& call, const std::string& needs, const std::string& answer) {
  const Outcome outcome = run_confined(call, needs);
  INFO(call << " with " << needs << ": status " << outcome.status << ", signal " << outcome.signal
            << ": " << outcome.output);
  CHECK(outcome.exited);
  CHECK(outcome.status == 0);
  CHECK(outcome.output.find(answer) != std::string::npos);
}

TEST_CASE("Programs, other processes and the kernel are out of a confined process's reach") {
  for (const char* const call : {"execve",
                                 "execveat",
                                 "clone as fork",
                                 "ptrace",
                                 "process_vm_readv",
                                 "process_vm_writev",
                                 "kill",
                                 "tgkill",
                                 "pidfd_open",
                                 "pidfd_getfd",
                                 "setpriority",
                                 "prlimit64",
                                 "fcntl",
                                 "mount",
                                 "bpf",
                                 "keyctl",
                                 "userfaultfd",
                                 "unshare",
                                 "setns",
                                 "io_uring_setup",
                                 "perf_event_open",
                                 "init_module",
                                 "setuid",
                                 "chroot",
                                 "socket of Unix",
                                 "socket of Unix, packets",
                                 "socket of packets",
                                 "listen",
                                 "setsockopt",
                                 "rename"}) {
    // The call comes back, or becomes another program that ends well.
    CHECK(run_confined(call, "off").exited);
    for (const char* const needs : {"tcp", "shm", "devices"}) check_refused(call, needs);
  }
}

TEST_CASE("With TCP alone files, new memory files and threads are out of reach too") {
  for (const char* const call :
       {"openat to write", "openat to make", "unlink", "memfd_create", "ioctl"}) {
    CHECK(run_confined(call, "off").exited);
    check_refused(call, "tcp");
  }
  check_answered("openat to write", "off", "ok");
  check_answered("openat to write", "shm", "ok");
  for (const char* const needs : {"tcp", "shm"}) {
    CHECK(run_confined("a thread", needs).signal == SIGSYS);
    check_refused("mmap of code", needs);
    check_refused("mprotect to code", needs);
    check_refused("ioctl", needs);
    check_refused("memfd_create", needs);
  }
  check_answered("a thread", "devices", "ok");
}

TEST_CASE("What rails do goes on in a confined process") {
  for (const char* const needs : {"off", "tcp", "shm", "devices"}) {
    check_answered("a connection", needs, "ok");
    check_answered("reading a limit", needs, "ok");
    check_answered("an interface's index", needs, "ok");
    CHECK(run_confined("abort", needs).signal == SIGABRT);
  }
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  // An error that libraries are used to, not death.
  check_answered("openat to read", "tcp", "Permission denied");
  check_answered("readlink", "tcp", "Permission denied");
#endif
  for (const char* const needs : {"off", "shm", "devices"}) {
    check_answered("openat to read", needs, "ok");
    check_answered("readlink", needs, "ok");
  }
}

TEST_CASE("Where no filter can be had the process does not go on without") {
  const Outcome outcome = run_confined("a connection", "forbidden");
  INFO(outcome.output);
  CHECK(outcome.exited);
  CHECK(outcome.status == 78);
  CHECK(outcome.output.find("no seccomp filter can be set") != std::string::npos);
}

// --- The real process, and the main process's side.

RailsConfig loopback(const std::string& transport, Seccomp seccomp = Seccomp::kOn) {
  RailsConfig config;
  config.executable = rails_binary();
  config.rails = {{transport, transport == "tcp" ? "lo" : ""}};
  config.seccomp = seccomp;
  return config;
}

// "Seccomp:\t2" of a /proc status file.
std::string field_of(const std::filesystem::path& file, const std::string& name) {
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);)
    if (line.starts_with(name + ":"))
      return line.substr(line.find_first_not_of(" \t", name.size() + 1));
  return {};
}

TEST_CASE("Every thread of a ready rails process is confined, unless that is switched off") {
  const std::string transport = GENERATE("tcp", "shm");
  const Seccomp seccomp = GENERATE(Seccomp::kOn, Seccomp::kOff);
  Node node(loopback(transport, seccomp));
  start({&node});
  const std::filesystem::path process = "/proc/" + std::to_string(node.client->pid());
  int threads = 0;
  for (const auto& task : std::filesystem::directory_iterator(process / "task")) {
    const auto status = task.path() / "status";
    INFO(status << " " << field_of(status, "Name"));
    CHECK(field_of(status, "Seccomp") == (seccomp == Seccomp::kOn ? "2" : "0"));
    CHECK(field_of(status, "NoNewPrivs") == "1");
    for (const char* const set : {"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"})
      CHECK(field_of(status, set).find_first_not_of('0') == std::string::npos);
    ++threads;
  }
  // Its own and UCX's.
  CHECK(threads >= 3);
  std::ifstream limits(process / "limits");
  std::ostringstream text;
  text << limits.rdbuf();
  CHECK(text.str().find("Max core file size        0                    0 ") != std::string::npos);
  rlimit ours = {};
  REQUIRE(::getrlimit(RLIMIT_NOFILE, &ours) == 0);
  // For 1024 lanes of one rail, were it allowed.
  const std::string files = std::to_string(std::min<rlim_t>(ours.rlim_max, 4160));
  const std::string room(21 - files.size(), ' ');
  CHECK(text.str().find("Max open files            " + files + room + files + " ") !=
        std::string::npos);
}

// What the process has been given: its environment, what its descriptors are, what it maps.
struct Belongings {
  std::set<std::string> environment;
  std::set<std::string> open;    // "/memfd:kvferry-rails (deleted)", "socket:", "/dev/null"
  std::set<std::string> mapped;  // files, and memory that is shared
  std::string shared_in_dumps;   // an arena or ring that a core dump would hold
};

Belongings belongings_of(pid_t pid) {
  const std::filesystem::path process = "/proc/" + std::to_string(pid);
  Belongings out;
  std::ifstream environment(process / "environ");
  for (std::string line; std::getline(environment, line, '\0');) out.environment.insert(line);
  for (const auto& entry : std::filesystem::directory_iterator(process / "fd")) {
    const std::string target = std::filesystem::read_symlink(entry.path()).string();
    if (entry.path().filename() == "2") continue;  // for UCX's words, as ours
    const std::size_t number = target.find(":[");
    out.open.insert(number == std::string::npos ? target : target.substr(0, number + 1));
  }
  std::ifstream maps(process / "smaps");
  bool shared = false;
  std::string name;
  for (std::string line; std::getline(maps, line);) {
    std::istringstream words(line);
    std::string range, rights, offset, device, inode;
    words >> range >> rights;
    if (range.find('-') != std::string::npos && range.back() != ':') {
      shared = rights.ends_with("s");
      words >> offset >> device >> inode;
      name.clear();
      std::getline(words >> std::ws, name);
      if (name.starts_with("/")) out.mapped.insert(name);
    } else if (range == "VmFlags:" && shared && name.starts_with("/memfd:") &&
               line.find(" dd") == std::string::npos) {
      out.shared_in_dumps = name;
    }
  }
  return out;
}

TEST_CASE("A ready rails process has its arenas and its rings, and nothing else of its parent's") {
  // All that a parent may have: pools, mapped or not, connections, words in its environment.
  const UniqueFd pool(::memfd_create("a-worker-s-pool", 0));
  REQUIRE(pool);
  REQUIRE(::ftruncate(pool.get(), 4096) == 0);
  void* const seen = ::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, pool.get(), 0);
  REQUIRE(seen != MAP_FAILED);
  const UniqueFd key(::open("/etc/hostname", O_RDONLY));  // inherited unless somebody sees to it
  REQUIRE(key);
  REQUIRE(::setenv("KVFERRY_SECRET", "of the cluster", 1) == 0);
  const std::string transport = GENERATE("tcp", "shm");
  Node node(loopback(transport));
  start({&node});
  ::unsetenv("KVFERRY_SECRET");
  if (!std::ifstream("/proc/" + std::to_string(node.client->pid()) + "/environ")) {
    WARN("not tested: to look into a rails process takes CAP_SYS_PTRACE");
    return;
  }
  const Belongings has = belongings_of(node.client->pid());
  ::munmap(seen, 4096);
  const auto lines = make_rails_environment({});
  REQUIRE(lines);
  CHECK(has.environment == std::set<std::string>(lines->begin(), lines->end()));
  for (const std::string& target : has.open) {
    INFO(target);
    const bool own_arena = target.starts_with("/memfd:test-arena");
    CHECK_FALSE(own_arena);  // closed once it is mapped
    const bool known = target == "/dev/null" || target == "socket:" || target == "pipe:" ||
                       target == "anon_inode:" || target.starts_with("anon_inode:") ||
                       target.starts_with("/memfd:kvferry-rails") ||
                       (transport == "shm" && target.starts_with("/dev/shm/ucx_shm_posix"));
    CHECK(known);
  }
  bool arena = false;
  for (const std::string& name : has.mapped) {
    INFO(name);
    arena = arena || name.starts_with("/memfd:test-arena");
    CHECK(name.find("a-worker-s-pool") == std::string::npos);
    for (const char* const library : {"libcrypto", "libssl", "libgrpc", "libprotobuf"})
      CHECK(name.find(library) == std::string::npos);
  }
  CHECK(arena);
  CHECK(has.shared_in_dumps == "");
}

// Asked by a process that has no capabilities, which would let it look into any.
bool may_look_into(pid_t pid) {
  const pid_t child = ::fork();
  if (child == 0) {
    drop_privileges();
    const std::string path = "/proc/" + std::to_string(pid) + "/fd/0";
    ::_exit(::open(path.c_str(), O_RDONLY | O_CLOEXEC) >= 0 ? 0 : 1);
  }
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

TEST_CASE("Only a process that has shared-memory rails may be looked into by its peers") {
  const std::string transport = GENERATE("tcp", "shm");
  RailsConfig config = loopback(transport);
  config.seccomp = GENERATE(Seccomp::kOn, Seccomp::kOff);
  Node node(config);
  start({&node});
  CHECK(may_look_into(node.client->pid()) == (transport == "shm"));
}

TEST_CASE("The main process is told which call the filter refused") {
  RailsConfig config = loopback("tcp");
  config.executable = KVFERRY_RAILS_CONFINED;
  config.unchecked_environment = {"RAILS_CONFINED=execve"};
  Node node(config);
  node.may_be_refused = true;
  REQUIRE(node.client->start(monotonic_now()));
  REQUIRE(pump({&node}, [&] { return !node.deaths.empty(); }));
  INFO(node.deaths[0].why);
  CHECK_FALSE(node.deaths[0].exited);
  CHECK(node.deaths[0].signal == SIGSYS);
  CHECK(node.deaths[0].why.find("system call execve (") != std::string::npos);
}

}  // namespace
}  // namespace kvferry::rails
