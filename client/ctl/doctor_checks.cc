// What needs no GPU: sockets, the daemon, limits, namespaces, UCX.
#include <sys/stat.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdlib>
#include <sstream>
#include <utility>

#include "client/ctl/doctor.h"
#include "client/ctl/render.h"

namespace kvferry::ctl {
namespace {

constexpr uint64_t kMiB = uint64_t{1} << 20;
// What container runtimes give unless told otherwise.
constexpr uint64_t kDefaultShmBytes = 64 * kMiB;
// A CUDA driver may take its time to start.
constexpr Duration kRailsLimit = std::chrono::seconds(20);

Finding ok(std::string check, std::string text) {
  return {std::move(check), Grade::kOk, std::move(text), {}};
}
Finding note(std::string check, std::string text, std::string advice) {
  return {std::move(check), Grade::kNote, std::move(text), std::move(advice)};
}
Finding problem(std::string check, std::string text, std::string advice) {
  return {std::move(check), Grade::kProblem, std::move(text), std::move(advice)};
}

std::string mode_text(uint32_t mode) {
  std::string text = "0000";
  for (std::size_t i = 0; i < 4; ++i)
    text[3 - i] = static_cast<char>('0' + ((mode >> (3 * i)) & 7));
  return text;
}

Finding check_socket(const System& system, const std::string& check, const std::string& path,
                     Grade absent, Grade unusable) {
  const auto file = system.stat(path);
  if (!file)
    return {check, absent, "no " + path,
            "start kvferryd, or name the socket of its configuration; in containers mount its "
            "directory, not the socket"};
  if (!S_ISSOCK(file->mode))
    return problem(check, path + " is no socket", "look at who has put it there");
  const std::string owner = "mode " + mode_text(file->mode & 07777U) + ", uid " +
                            std::to_string(file->uid) + ", gid " + std::to_string(file->gid);
  if (!file->writable)
    return {check, unusable, path + " may not be used by this user (" + owner + ")",
            "join the socket's group, or change the socket's mode in the daemon's configuration"};
  return ok(check, path + " (" + owner + ")");
}

// The value behind "key:" of lines such as "HugePages_Total:   12".
std::optional<uint64_t> number_after(const std::string& text, const std::string& key) {
  const auto at = text.find(key + ":");
  if (at == std::string::npos) return std::nullopt;
  std::istringstream in(text.substr(at + key.size() + 1));
  uint64_t value = 0;
  if (in >> value) return value;
  return std::nullopt;
}

// The process ids of "NSpid:\t12\t1": one a namespace, the outermost that is visible first.
std::vector<int> nested_pids(const std::string& status) {
  std::vector<int> out;
  const auto at = status.find("NSpid:");
  if (at == std::string::npos) return out;
  std::istringstream line(status.substr(at + 6, status.find('\n', at) - at - 6));
  for (int pid = 0; line >> pid;) out.push_back(pid);
  return out;
}

// The soft limit of "Max locked memory  8388608  8388608  bytes"; absent: unlimited or not told.
struct Limit {
  bool known = false;
  std::optional<uint64_t> bytes;
};
Limit memlock_of(const std::string& limits) {
  const std::string key = "Max locked memory";
  const auto at = limits.find(key);
  if (at == std::string::npos) return {};
  std::istringstream in(limits.substr(at + key.size()));
  std::string soft;
  in >> soft;
  if (soft == "unlimited") return {true, std::nullopt};
  uint64_t value = 0;
  const auto parsed = std::from_chars(soft.data(), soft.data() + soft.size(), value);
  if (parsed.ec != std::errc()) return {};
  return {true, value};
}

Finding check_memlock(const System& system, const DoctorOptions& options, bool gpu) {
  Limit limit{true, system.memlock_bytes()};
  std::string whose = "of this process";
  if (const auto pid = system.listener_pid(options.lifeline); pid && *pid > 0)
    if (const auto text = system.read("/proc/" + std::to_string(*pid) + "/limits"))
      if (const Limit daemons = memlock_of(*text); daemons.known) {
        limit = daemons;
        whose = "of the daemon";
      }
  if (!limit.bytes) return ok("memlock", "unlimited (" + whose + ")");
  const std::string text =
      human_bytes(static_cast<double>(*limit.bytes)) + " at most (" + whose + ")";
  const char* advice =
      "LimitMEMLOCK=infinity in the unit, --ulimit memlock=-1, or the capability IPC_LOCK";
  if (!system.list("/sys/class/infiniband").empty())
    return problem("memlock", text + ", and there are RDMA devices, which lock all they use",
                   advice);
  if (gpu) return note("memlock", text + "; arenas are locked for the GPU by its driver", advice);
  return ok("memlock", text + "; nothing here locks memory");
}

Finding check_huge_pages(const System& system) {
  const std::string info = system.read("/proc/meminfo").value_or("");
  const auto total = number_after(info, "HugePages_Total");
  const uint64_t free = number_after(info, "HugePages_Free").value_or(0);
  const uint64_t size_kib = number_after(info, "Hugepagesize").value_or(0);
  if (!total || size_kib == 0)
    return note("huge pages", "/proc/meminfo does not tell", "nothing, unless they are configured");
  if (*total == 0)
    return ok("huge pages", "none reserved; only pools in hugetlbfs files need them");
  const std::string text = std::to_string(free) + " of " + std::to_string(total.value_or(0)) +
                           " pages of " + human_bytes(static_cast<double>(size_kib) * 1024) +
                           " are free";
  if (free == 0)
    return note("huge pages", text, "reserve more (vm.nr_hugepages) if pools are to lie in them");
  return ok("huge pages", text);
}

// The kernel's list; the daemon's container may forbid what the kernel can.
Finding check_seccomp(const System& system) {
  std::istringstream actions(
      system.read("/proc/sys/kernel/seccomp/actions_avail").value_or(std::string()));
  for (std::string action; actions >> action;)
    if (action == "trap") return ok("seccomp", "the kernel has what the rails process asks for");
  return note("seccomp", "the kernel does not say that it has filters for system calls",
              "rails.seccomp = \"off\" if the rails process ends with SECCOMP_UNAVAILABLE");
}

Finding check_shm(const System& system, bool gpu) {
  const auto bytes = system.file_system_bytes("/dev/shm");
  const char* advice =
      "--shm-size=1g, or an emptyDir of medium Memory at /dev/shm; workers and daemon that share "
      "events need the same one (hostIPC, or the same mount)";
  if (!bytes) return {"/dev/shm", gpu ? Grade::kProblem : Grade::kNote, "there is none", advice};
  const std::string text = human_bytes(static_cast<double>(*bytes));
  if (*bytes <= kDefaultShmBytes)
    return note("/dev/shm", text + ": UCX's shared memory and CUDA's events lie there", advice);
  return ok("/dev/shm", text);
}

Finding check_congestion_control(const System& system) {
  const std::string check = "tcp congestion control";
  const auto text = system.read("/proc/sys/net/ipv4/tcp_congestion_control");
  if (!text) return ok(check, "/proc does not tell");
  const std::string name = text->substr(0, text->find_last_not_of(" \n") + 1);
  if (name.rfind("bbr", 0) == 0)
    return note(
        check,
        name +
            ": it paces and counts each segment, which costs processors a third "
            "more than cubic on fast, short paths",
        "net.ipv4.tcp_congestion_control=cubic, or congctl cubic on the route to the peers");
  return ok(check, name);
}

}  // namespace

Findings check_sockets(const System& system, const DoctorOptions& options) {
  // The second may have been given another path; the third is for operators alone.
  return {check_socket(system, "worker socket", options.lifeline, Grade::kProblem, Grade::kProblem),
          check_socket(system, "call socket", options.lifeline + ".grpc", Grade::kNote,
                       Grade::kProblem),
          check_socket(system, "admin socket", options.admin, Grade::kNote, Grade::kNote)};
}

Findings check_daemon(const std::optional<DaemonFacts>& daemon, const DoctorOptions& options) {
  if (!daemon)
    return {note("daemon", "none answers on " + options.admin,
                 "what only it knows is left out below; run this as a user that may use the admin "
                 "socket")};
  Findings out;
  if (daemon->healthy)
    out.push_back(ok("daemon", daemon->version + ", healthy"));
  else
    out.push_back(problem("daemon", daemon->version + ", not healthy: " + daemon->reason,
                          "kvferryctl health and the daemon's log say more"));
  std::string arenas;
  for (const std::string& arena : daemon->arenas) arenas += (arenas.empty() ? "" : ", ") + arena;
  if (!arenas.empty()) out.push_back(ok("arenas", arenas));
  return out;
}

Findings check_limits(const System& system, const DoctorOptions& options, bool gpu) {
  return {check_memlock(system, options, gpu), check_huge_pages(system), check_shm(system, gpu),
          check_congestion_control(system), check_seccomp(system)};
}

Findings check_namespaces(const System& system, const DoctorOptions& options, bool gpu) {
  const std::string check = "pid namespace";
  const char* advice =
      "CUDA IPC may fail between PID namespaces: shareProcessNamespace: true in a pod with a "
      "sidecar, hostPID with a daemon set; memory of cuMemMap (alloc_device_pool) does not need it";
  const Grade apart = gpu ? Grade::kNote : Grade::kOk;
  const auto pid = system.listener_pid(options.lifeline);
  if (!pid) return {ok(check, "no daemon to compare with")};
  if (*pid == 0)
    return {{check, apart, "the daemon is in one that is not visible from here",
             apart == Grade::kOk ? "" : advice}};
  const auto mine = system.read("/proc/self/status");
  const auto theirs = system.read("/proc/" + std::to_string(*pid) + "/status");
  if (!mine || !theirs) return {note(check, "/proc does not tell", advice)};
  if (nested_pids(*mine).size() == nested_pids(*theirs).size())
    return {ok(check, "the daemon's (process " + std::to_string(*pid) + ") is the same")};
  return {{check, apart, "the daemon (process " + std::to_string(*pid) + ") is in an inner one",
           apart == Grade::kOk ? "" : advice}};
}

AskRails installed_rails(const DoctorOptions& options) {
  std::string driver = options.cuda_driver;
  if (const char* const named = std::getenv("KVFERRY_CUDA_DRIVER"); driver.empty() && named)
    driver = named;
  return [driver] { return rails::query_capabilities({}, driver, kRailsLimit); };
}

namespace {

std::string list(const std::vector<std::string>& words) {
  std::string out;
  for (const std::string& word : words) out += (out.empty() ? "" : ", ") + word;
  return out;
}

// Each once, without its devices.
std::vector<std::string> names_of_transports(const rails::RailsCapabilities& told) {
  std::vector<std::string> out;
  for (const std::string& one : told.transports) {
    std::string name = one.substr(0, one.find('/'));
    if (std::find(out.begin(), out.end(), name) == out.end()) out.push_back(std::move(name));
  }
  return out;
}

}  // namespace

Findings check_ucx(const std::optional<DaemonFacts>& daemon, const AskRails& ask_rails, bool gpu) {
  Findings out;
  if (daemon && !daemon->ucx_version.empty()) {
    std::string transports;
    for (const std::string& one : daemon->transports)
      if (transports.find(one) == std::string::npos)
        transports += (transports.empty() ? "" : ", ") + one;
    out.push_back(ok("ucx of the daemon",
                     daemon->ucx_version +
                         (transports.empty() ? ", no rail is up" : ", rails over " + transports)));
    if (transports.empty())
      out.back() = problem("ucx of the daemon", out.back().text,
                           "kvferryctl rails and the daemon's log say why");
  }
  const char* const check = "ucx here";
  const auto told = ask_rails();
  if (!told && told.error().reason == "RAILS_NOT_FOUND") {
    out.push_back(note(check, "not looked at: there is no kvferry-rails beside this program",
                       "nothing where only workers run; else install kvferryd whole"));
    return out;
  }
  if (!told) {
    out.push_back(problem(check, told.error().message,
                          "run kvferry-rails --capabilities: it says what it lacks; it needs the "
                          "UCX that it was built with, by LD_LIBRARY_PATH or ldconfig"));
    return out;
  }
  const std::string text = told->ucx_version + " (" + told->executable +
                           "), memory: " + list(told->memory_types) +
                           ", transports: " + list(names_of_transports(*told));
  if (gpu && !told->has_cuda())
    out.push_back(note(check, text + "; " + told->cuda_missing,
                       "without CUDA in UCX bytes go through pinned host memory; UCX 1.22 with "
                       "CUDA sends from the GPU. Both ends of a link need the same release"));
  else
    out.push_back(ok(check, text));
  return out;
}

}  // namespace kvferry::ctl
