#include "client/bench/daemons.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstddef>
#include <cstdio>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <optional>
#include <random>
#include <sstream>
#include <thread>

#include "client/bench/stop.h"

namespace kvferry::bench {
namespace {

using client::Code;
using client::Error;
using Clock = std::chrono::steady_clock;

constexpr int kCannotExecute = 127;  // as shells say it

Error failed(std::string reason, std::string message) {
  return Error{Code::kUnavailable, std::move(reason), std::move(message), {}};
}

int local_socket(uint16_t port, sockaddr_in& address) {
  address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(port);
  return ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
}

// A free port, kept from other programs of this kind for as long as `hold` is open: whoever takes
// one binds an abstract socket of its name, which like the port is the network namespace's. Below
// the ports that the kernel gives to outgoing connections (from 32768 unless configured), so that
// none of those takes it before the daemon does, or while the daemon is being restarted. 0: none
// was found.
struct Port {
  uint16_t number = 0;
  UniqueFd hold;
};
Port free_port() {
  constexpr int kLowest = 12000, kHighest = 31999, kTries = 100;
  static std::minstd_rand random(std::random_device{}());  // processes side by side differ
  for (int tries = 0; tries < kTries; ++tries) {
    const int number = std::uniform_int_distribution<int>(kLowest, kHighest)(random);
    Port port{static_cast<uint16_t>(number),
              UniqueFd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0))};
    sockaddr_un name{};
    name.sun_family = AF_UNIX;  // sun_path[0] stays 0: abstract
    const int length =
        std::snprintf(name.sun_path + 1, sizeof name.sun_path - 1, "kvferry-bench-port-%d", number);
    if (::bind(port.hold.get(), reinterpret_cast<sockaddr*>(&name),
               static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 +
                                      static_cast<std::size_t>(length))) != 0)
      continue;
    sockaddr_in address{};
    const UniqueFd probe(local_socket(port.number, address));
    if (::bind(probe.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) == 0)
      return port;
  }
  return {};
}

// A socket in that network namespace (-1: ours), made by a thread of its own, as namespaces are a
// thread's.
int local_socket_in(int network, uint16_t port, sockaddr_in& address) {
  if (network < 0) return local_socket(port, address);
  int fd = -1;
  std::thread([&] {
    if (::setns(network, CLONE_NEWNET) == 0) fd = local_socket(port, address);
  }).join();
  return fd;
}

// One HTTP/1.0 request to a local port; the body, or nothing unless the answer is 200.
std::string http_get(int network, uint16_t port, const std::string& path) {
  sockaddr_in address{};
  const int fd = local_socket_in(network, port, address);
  const timeval limit{2, 0};
  ::setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  ::setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
  std::string answer;
  const std::string request = "GET " + path + " HTTP/1.0\r\nHost: localhost\r\n\r\n";
  if (::connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0 &&
      ::send(fd, request.data(), request.size(), MSG_NOSIGNAL) ==
          static_cast<ssize_t>(request.size())) {
    char buffer[65536];
    for (ssize_t got = 0; (got = ::recv(fd, buffer, sizeof buffer, 0)) > 0;)
      answer.append(buffer, static_cast<std::size_t>(got));
  }
  ::close(fd);
  const std::size_t body = answer.find("\r\n\r\n");
  if (body == std::string::npos || answer.find(" 200 ") > 16) return {};
  return answer.substr(body + 4);
}

std::string read_file(const std::string& path) {
  std::ifstream in(path);
  std::stringstream text;
  text << in.rdbuf();
  return text.str();
}

// User and system seconds of one process; 0 if it is gone.
double process_seconds(pid_t pid) {
  clockid_t clock{};
  timespec used{};
  if (::clock_getcpuclockid(pid, &clock) != 0 || ::clock_gettime(clock, &used) != 0) return 0;
  return static_cast<double>(used.tv_sec) + static_cast<double>(used.tv_nsec) * 1e-9;
}

std::string tail_of(const std::string& path) {
  const std::string text = read_file(path);
  return text.substr(text.size() > 3000 ? text.size() - 3000 : 0);
}

std::vector<pid_t> children_of(pid_t pid) {
  std::vector<pid_t> out;
  std::error_code error;
  const std::string tasks = "/proc/" + std::to_string(pid) + "/task";
  for (const auto& task : std::filesystem::directory_iterator(tasks, error)) {
    std::istringstream children(read_file(task.path().string() + "/children"));
    for (pid_t child = 0; children >> child;) out.push_back(child);
  }
  return out;
}

// Waits at most `ms` for the end of a child; its status, or nothing.
std::optional<int> wait_for_end(pid_t pid, int ms) {
  // The C library's header declares pidfd_open without C linkage.
  const auto fd = static_cast<int>(::syscall(SYS_pidfd_open, pid, 0));
  pollfd ended{fd, POLLIN, 0};
  const bool over = fd >= 0 && ::poll(&ended, 1, ms) > 0;
  if (fd >= 0) ::close(fd);
  int status = 0;
  if (!over || ::waitpid(pid, &status, 0) != pid) return std::nullopt;
  return status;
}

}  // namespace

// ---- one daemon --------------------------------------------------------------------------------

Result<std::unique_ptr<DaemonProcess>> DaemonProcess::start(const std::string& directory,
                                                            const Identity& identity,
                                                            const DaemonOptions& options) {
  std::unique_ptr<DaemonProcess> daemon(new DaemonProcess);
  const std::string base = directory + "/" + identity.name;
  daemon->socket_ = base + ".sock";
  daemon->admin_ = base + ".admin";
  daemon->log_ = base + ".log";
  Port http = free_port();
  daemon->http_port_ = http.number;
  daemon->http_hold_ = std::move(http.hold);
  daemon->peer_port_ = identity.peer_port;
  daemon->network_ = options.network;
  daemon->config_ = base + ".toml";
  const auto peer = [](const std::string& name, uint16_t port) {
    return "[[peers]]\nidentity = \"" + name +
           "\"\naddresses = [\"127.0.0.1:" + std::to_string(port) + "\"]\n";
  };
  std::string rest = identity.toml;
  if (rest.empty()) {
    rest = "[node]\nid = \"" + identity.name + "\"\n" + peer(identity.other, identity.other_port);
    for (const auto& [name, port] : identity.more) rest += peer(name, port);
  }
  std::ofstream(daemon->config_) << "config_version = 1\n[[socket]]\npath = \"" << daemon->socket_
                                 << "\"\n[admin]\nsocket = \"" << daemon->admin_
                                 << "\"\n[mapped]\nsocket = \"" << base << ".arenas"
                                 << "\"\n[http]\nport = " << daemon->http_port_
                                 << "\n[peer]\nlisten = \"" << identity.host << ":"
                                 << identity.peer_port << "\"\n[rails]\ntransports = [\""
                                 << options.path << "\"]\n"
                                 << rest;
  std::vector<std::string> words = options.inside;
  words.insert(words.end(), {options.binary_directory + "/kvferryd", "--config", daemon->config_});
  for (const std::string& setting : options.settings) {
    words.push_back("--set");
    words.push_back(setting);
  }
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  // Not posix_spawn, which cannot ask for the signal.
  const int log = ::open(daemon->log_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  const int nothing = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
  const pid_t parent = ::getpid();
  daemon->pid_ = log >= 0 && nothing >= 0 ? ::_Fork() : -1;
  if (daemon->pid_ == 0) {
    // Only what a signal handler may do: other threads held locks when this process was made.
    if (options.ends_with_starter) ::prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (!options.ends_with_starter || ::getppid() == parent) {
      ::dup2(nothing, STDIN_FILENO);
      ::dup2(log, STDOUT_FILENO);
      ::dup2(log, STDERR_FILENO);
      ::execv(argv[0], argv.data());
    }
    ::_exit(kCannotExecute);
  }
  if (log >= 0) ::close(log);
  if (nothing >= 0) ::close(nothing);
  if (daemon->pid_ < 0) return failed("DAEMON_SPAWN", "cannot start " + words[0]);
  return daemon;
}

uint16_t DaemonProcess::find_port() {
  static std::vector<UniqueFd> held;
  Port port = free_port();
  held.push_back(std::move(port.hold));
  return port.number;
}

DaemonProcess::~DaemonProcess() {
  terminate();
}

Status DaemonProcess::wait_until_serving() {
  const Clock::time_point limit = Clock::now() + std::chrono::seconds(30);
  while (http("/readyz").empty()) {
    if (auto stop = stop_asked()) return *stop;
    if (const std::optional<int> status = wait_for_end(pid_, 0)) {
      pid_ = -1;
      if (WIFEXITED(*status) && WEXITSTATUS(*status) == kCannotExecute)
        return failed("DAEMON_SPAWN", "cannot start kvferryd; give its directory by --bin");
      return failed("DAEMON_ENDED", "a daemon ended at once\n" + log_tail());
    }
    if (Clock::now() > limit)
      return failed("DAEMON_NOT_READY", "a daemon is not ready after 30 s\n" + log_tail());
    ::poll(nullptr, 0, 20);  // between two questions
  }
  return {};
}

int DaemonProcess::terminate() {
  if (pid_ <= 0) return 0;
  ::kill(pid_, SIGTERM);
  const std::optional<int> status = wait_for_end(pid_, 10'000);
  if (!status) {
    kill_now();
    return -1;
  }
  pid_ = -1;
  return WIFEXITED(*status) ? WEXITSTATUS(*status) : -1;
}

void DaemonProcess::kill_now() {
  if (pid_ <= 0) return;
  ::kill(pid_, SIGKILL);
  ::waitpid(pid_, nullptr, 0);
  pid_ = -1;
}

pid_t DaemonProcess::rails_pid() const {
  for (pid_t child : children_of(pid_)) {
    if (read_file("/proc/" + std::to_string(child) + "/comm").starts_with("kvferry-rails"))
      return child;
  }
  return -1;
}

DaemonProcess::Cpu DaemonProcess::cpu() const {
  Cpu used;
  used.daemon_seconds = process_seconds(pid_);
  for (pid_t child : children_of(pid_)) used.rails_seconds += process_seconds(child);
  return used;
}

uint64_t DaemonProcess::private_bytes() const {
  const std::string status = read_file("/proc/" + std::to_string(pid_) + "/status");
  const std::size_t at = status.find("RssAnon:");
  return at == std::string::npos ? 0 : std::strtoull(status.c_str() + at + 8, nullptr, 10) * 1024;
}

std::string DaemonProcess::http(const std::string& path) const {
  return http_get(network_, http_port_, path);
}

Result<Metrics> DaemonProcess::metrics() const {
  std::istringstream page(http("/metrics"));
  Metrics metrics;
  for (std::string line; std::getline(page, line);) {
    const std::size_t space = line.rfind(' ');
    if (line.empty() || line[0] == '#' || space == std::string::npos) continue;
    metrics[line.substr(0, space)] = std::strtod(line.c_str() + space, nullptr);
  }
  if (metrics.empty()) return failed("DAEMON_METRICS", "a daemon answers no metrics");
  return metrics;
}

double DaemonProcess::sum(const std::string& name, const std::string& part,
                          const std::string& other) const {
  const auto scraped = metrics();
  double sum = 0;
  if (!scraped) return sum;
  for (const auto& [series, value] : *scraped) {
    const bool same = series == name || series.starts_with(name + "{");
    if (same && series.find(part) != std::string::npos && series.find(other) != std::string::npos)
      sum += value;
  }
  return sum;
}

std::string DaemonProcess::log_tail() const {
  return "--- " + log_ + "\n" + tail_of(log_);
}

// ---- two ---------------------------------------------------------------------------------------

Result<std::unique_ptr<DaemonPair>> DaemonPair::start(const DaemonOptions& options) {
  std::unique_ptr<DaemonPair> pair(new DaemonPair);
  char directory[] = "/tmp/kvferry-pair.XXXXXX";
  if (::mkdtemp(directory) == nullptr) return failed("DAEMON_DIRECTORY", "mkdtemp failed");
  pair->directory_ = directory;
  pair->options_ = options;
  const std::string names[2] = {"sender", "receiver"};
  const uint16_t ports[2] = {DaemonProcess::find_port(), DaemonProcess::find_port()};
  for (int side = 0; side < 2; ++side)
    pair->identities_[side] = {names[side], ports[side], names[1 - side], ports[1 - side]};
  for (int side = 0; side < 2; ++side) {
    auto daemon = DaemonProcess::start(pair->directory_, pair->identities_[side], options);
    if (!daemon) return daemon.error();
    pair->sides_[side] = std::move(*daemon);
  }
  for (int side = 0; side < 2; ++side)
    if (Status serving = pair->sides_[side]->wait_until_serving(); !serving) return serving.error();
  return pair;
}

DaemonPair::~DaemonPair() {
  for (auto& side : sides_)
    if (side && side->pid() > 0) ::kill(side->pid(), SIGTERM);  // both at once
  for (auto& side : sides_) side.reset();
  std::error_code error;
  if (!directory_.empty()) std::filesystem::remove_all(directory_, error);
}

Status DaemonPair::restart(int side) {
  sides_[side].reset();
  auto daemon = DaemonProcess::start(directory_, identities_[side], options_);
  if (!daemon) return daemon.error();
  sides_[side] = std::move(*daemon);
  return sides_[side]->wait_until_serving();
}

std::string DaemonPair::log_tail() const {
  std::string out;
  for (const auto& side : sides_)
    if (side) out += side->log_tail();
  return out;
}

}  // namespace kvferry::bench
