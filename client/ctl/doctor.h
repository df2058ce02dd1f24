// `kvferryctl doctor`: what of this machine stands in the way of a daemon, of its workers, and of
// sharing GPU memory between the two. Changes nothing; needs no daemon, but asks one that runs.
//
// Checks are functions of what they read, so that tests run them over machines that do not exist.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "client/ctl/doctor_child.h"
#include "daemon/rails/rails_capabilities.h"

namespace kvferry::ctl {

enum class Grade : uint8_t {
  kOk,
  kNote,     // works, but not all, or not as fast as it could
  kProblem,  // something that is there does not work
};

struct Finding {
  std::string check;  // what was looked at: "cuda ipc"
  Grade grade = Grade::kOk;
  std::string text;    // what was found
  std::string advice;  // what to do; empty with kOk
};
using Findings = std::vector<Finding>;

// The machine, as far as it is looked at.
class System {
 public:
  struct File {
    uint32_t mode = 0;  // type and permissions
    uint32_t uid = 0;
    uint32_t gid = 0;
    bool writable = false;  // by the caller
  };
  virtual ~System() = default;
  virtual std::optional<std::string> read(const std::string& path) const = 0;
  virtual std::optional<File> stat(const std::string& path) const = 0;
  virtual std::vector<std::string> list(const std::string& directory) const = 0;  // names, sorted
  // Of the file system there, all of it.
  virtual std::optional<uint64_t> file_system_bytes(const std::string& path) const = 0;
  virtual std::optional<uint64_t> memlock_bytes() const = 0;  // the caller's; nothing: unlimited
  // Who listens on a Unix socket of sequenced packets; 0: in a PID namespace not seen from here.
  virtual std::optional<int> listener_pid(const std::string& socket) const = 0;
};
std::unique_ptr<System> this_system();

// What a daemon said, if one answered.
struct DaemonFacts {
  std::string version;
  bool healthy = true;
  std::string reason;  // why it is not
  std::string ucx_version;
  std::vector<std::string> transports;  // of the rails
  std::vector<std::string> arenas;      // "gpu0 pinned_host"
};

struct DoctorOptions {
  std::string lifeline = "/run/kvferry/kvferry.sock";
  std::string admin = "/run/kvferry/admin.sock";
  std::string cuda_driver;  // empty: KVFERRY_CUDA_DRIVER, or libcuda.so.1
};

// Runs one part of a check in a process of its own.
using RunChild = std::function<ChildAnswer(const ChildRequest&)>;
// Asks the rails process of this machine what its UCX can do.
using AskRails = std::function<Result<rails::RailsCapabilities>()>;
// The one beside this program.
AskRails installed_rails(const DoctorOptions& options);

// ---- The checks
// ----------------------------------------------------------------------------------

Findings check_sockets(const System& system, const DoctorOptions& options);
Findings check_daemon(const std::optional<DaemonFacts>& daemon, const DoctorOptions& options);
// `gpu`: there is one that works, so that what concerns GPUs only is worth a word.
Findings check_limits(const System& system, const DoctorOptions& options, bool gpu);
Findings check_namespaces(const System& system, const DoctorOptions& options, bool gpu);
Findings check_ucx(const std::optional<DaemonFacts>& daemon, const AskRails& ask_rails, bool gpu);

struct GpuFindings {
  Findings findings;
  bool usable = false;  // at least one device works
};
// Devices, and trials of every way to share their memory: allocated here, imported by a child.
GpuFindings check_gpus(const System& system, const DoctorOptions& options,
                       const RunChild& run_child);

// All of them, in the order in which they are shown.
Findings run_doctor(const System& system, const DoctorOptions& options,
                    const std::optional<DaemonFacts>& daemon, const RunChild& run_child,
                    const AskRails& ask_rails);

// ---- The report
// ----------------------------------------------------------------------------------

nlohmann::ordered_json doctor_json(const Findings& findings);
// A line each: OK, note or PROBLEM first; advice on a line of its own.
std::string doctor_text(const Findings& findings);
// 1 with a problem, else 0.
int doctor_exit(const Findings& findings);

}  // namespace kvferry::ctl
