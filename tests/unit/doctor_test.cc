// kvferryctl doctor: its checks over machines that do not exist, its trials over the fake driver
// with a second process, and the program itself.
#include "client/ctl/doctor.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <catch2/catch.hpp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>

#include "daemon/base/unique_fd.h"
#include "tests/fake_cuda/control.h"

namespace kvferry::ctl {
namespace {

constexpr uint64_t kGiB = uint64_t{1} << 30;

// A machine where all is well, until a test changes it.
struct FakeSystem final : System {
  std::map<std::string, std::string> files;
  std::map<std::string, File> nodes;
  std::map<std::string, std::vector<std::string>> directories;
  std::map<std::string, uint64_t> file_systems;
  std::optional<uint64_t> memlock;
  std::optional<int> listener;

  FakeSystem() {
    files["/proc/meminfo"] =
        "MemTotal: 1000 kB\nHugePages_Total:      10\nHugePages_Free:        4\n"
        "Hugepagesize:       2048 kB\n";
    files["/proc/self/status"] = "Name:\tkvferryctl\nNSpid:\t100\nThreads:\t1\n";
    files["/proc/42/status"] = "Name:\tkvferryd\nNSpid:\t42\n";
    files["/proc/42/limits"] =
        "Limit                     Soft Limit           Hard Limit           Units\n"
        "Max locked memory         unlimited            unlimited            bytes\n";
    for (const char* socket : {"/s", "/s.grpc", "/a"})
      nodes[socket] = {S_IFSOCK | 0660U, 1, 2, true};
    files["/proc/sys/kernel/seccomp/actions_avail"] = "kill_process kill_thread trap errno allow\n";
    file_systems["/dev/shm"] = 32 * kGiB;
    listener = 42;
  }
  std::optional<std::string> read(const std::string& path) const override {
    const auto it = files.find(path);
    return it == files.end() ? std::nullopt : std::optional(it->second);
  }
  std::optional<File> stat(const std::string& path) const override {
    const auto it = nodes.find(path);
    return it == nodes.end() ? std::nullopt : std::optional(it->second);
  }
  std::vector<std::string> list(const std::string& directory) const override {
    const auto it = directories.find(directory);
    return it == directories.end() ? std::vector<std::string>() : it->second;
  }
  std::optional<uint64_t> file_system_bytes(const std::string& path) const override {
    const auto it = file_systems.find(path);
    return it == file_systems.end() ? std::nullopt : std::optional(it->second);
  }
  std::optional<uint64_t> memlock_bytes() const override { return memlock; }
  std::optional<int> listener_pid(const std::string&) const override { return listener; }
};

DoctorOptions options(std::string driver = "/nonexistent/libcuda.so") {
  return {"/s", "/a", std::move(driver)};
}

DaemonFacts healthy() {
  return {"0.1.0", true, "", "1.22.0", {"tcp", "tcp", "shm"}, {"host shared_host"}};
}

Result<rails::RailsCapabilities> ucx() {
  rails::RailsCapabilities told;
  told.executable = "/opt/kvferry-rails";
  told.ucx_version = "1.22.0";
  told.ucx_built_for = "1.22";
  told.memory_types = {"host", "cuda"};
  told.transports = {"cuda_copy/cuda", "tcp/eth0", "tcp/lo"};
  return told;
}

ChildAnswer no_child(const ChildRequest&) {
  return {false, "not started"};
}

ChildAnswer second_process(const ChildRequest& request) {
  return run_child(KVFERRY_CTL, request);
}

const Finding& find(const Findings& findings, const std::string& check) {
  for (const Finding& finding : findings)
    if (finding.check == check) return finding;
  FAIL("no finding " << check << " in\n" << doctor_text(findings));
  return findings.front();
}

Grade grade(const Findings& findings, const std::string& check) {
  return find(findings, check).grade;
}

// What every finding keeps to: something was found, and whoever has trouble is told what to do.
void check_form(const Findings& findings) {
  for (const Finding& finding : findings) {
    INFO(finding.check);
    CHECK_FALSE(finding.check.empty());
    CHECK_FALSE(finding.text.empty());
    CHECK((finding.grade == Grade::kOk) == finding.advice.empty());
    CHECK(finding.text.find('\n') == std::string::npos);
  }
}

}  // namespace

TEST_CASE("a machine without a GPU where all is well has no problems") {
  const Findings findings = run_doctor(FakeSystem(), options(), healthy(), no_child, ucx);
  INFO(doctor_text(findings));
  check_form(findings);
  CHECK(doctor_exit(findings) == 0);
  CHECK(grade(findings, "cuda driver") == Grade::kNote);
  CHECK(grade(findings, "worker socket") == Grade::kOk);
  CHECK(find(findings, "ucx of the daemon").text == "1.22.0, rails over tcp, shm");
  CHECK(find(findings, "worker socket").text == "/s (mode 0660, uid 1, gid 2)");
  const auto json = doctor_json(findings);
  CHECK(json["problems"] == 0);
  CHECK(json["findings"].size() == findings.size());
  CHECK(json["findings"][0]["grade"] == "ok");
  const std::string text = doctor_text(findings);
  CHECK(text.find("OK       worker socket: /s") == 0);
  CHECK(text.find("\nno problems\n") != std::string::npos);
}

TEST_CASE("sockets that are missing, no sockets or closed to the user are told apart") {
  FakeSystem system;
  system.nodes.erase("/s");
  CHECK(grade(check_sockets(system, options()), "worker socket") == Grade::kProblem);
  system.nodes["/s"] = {S_IFREG | 0644U, 0, 0, true};
  CHECK(find(check_sockets(system, options()), "worker socket").text == "/s is no socket");
  system.nodes["/s"] = {S_IFSOCK | 0600U, 7, 8, false};
  const Findings closed = check_sockets(system, options());
  CHECK(grade(closed, "worker socket") == Grade::kProblem);
  CHECK(find(closed, "worker socket").text ==
        "/s may not be used by this user (mode 0600, uid 7, gid 8)");
  // Workers need no admin socket, and the calls' socket may have another path.
  system = FakeSystem();
  system.nodes.erase("/a");
  system.nodes.erase("/s.grpc");
  CHECK(doctor_exit(check_sockets(system, options())) == 0);
  check_form(check_sockets(system, options()));
}

TEST_CASE("a daemon that is not well is a problem, one that is not there a note") {
  CHECK(grade(check_daemon({}, options()), "daemon") == Grade::kNote);
  DaemonFacts facts = healthy();
  facts.healthy = false;
  facts.reason = "the rails do not start";
  const Findings findings = check_daemon(facts, options());
  CHECK(grade(findings, "daemon") == Grade::kProblem);
  CHECK(find(findings, "daemon").text == "0.1.0, not healthy: the rails do not start");
  facts = healthy();
  facts.transports.clear();
  CHECK(grade(check_ucx(facts, ucx, false), "ucx of the daemon") == Grade::kProblem);
}

TEST_CASE("locked memory matters where something locks it") {
  FakeSystem system;
  CHECK(grade(check_limits(system, options(), true), "memlock") == Grade::kOk);
  // The daemon's, not the caller's.
  system.memlock = 1000;
  CHECK(find(check_limits(system, options(), true), "memlock").text == "unlimited (of the daemon)");
  system.files["/proc/42/limits"] = "Max locked memory         8388608   8388608   bytes\n";
  CHECK(find(check_limits(system, options(), false), "memlock").text.find("8") == 0);
  CHECK(grade(check_limits(system, options(), false), "memlock") == Grade::kOk);
  CHECK(grade(check_limits(system, options(), true), "memlock") == Grade::kNote);
  system.directories["/sys/class/infiniband"] = {"mlx5_0"};
  CHECK(grade(check_limits(system, options(), true), "memlock") == Grade::kProblem);
  // Without a daemon that can be looked at, the caller's.
  system.files.erase("/proc/42/limits");
  CHECK(find(check_limits(system, options(), true), "memlock").text.find("of this process") !=
        std::string::npos);
  check_form(check_limits(system, options(), true));
}

TEST_CASE("huge pages and shared memory") {
  FakeSystem system;
  CHECK(find(check_limits(system, options(), false), "huge pages").text.find("4 of 10 pages") == 0);
  system.files["/proc/meminfo"] = "HugePages_Total: 10\nHugePages_Free: 0\nHugepagesize: 2048 kB\n";
  CHECK(grade(check_limits(system, options(), false), "huge pages") == Grade::kNote);
  system.files["/proc/meminfo"] = "HugePages_Total: 0\nHugePages_Free: 0\nHugepagesize: 2048 kB\n";
  CHECK(grade(check_limits(system, options(), false), "huge pages") == Grade::kOk);
  system.files["/proc/meminfo"] = "HugePages_Total: many\n";
  CHECK(grade(check_limits(system, options(), false), "huge pages") == Grade::kNote);
  CHECK(grade(check_limits(system, options(), true), "/dev/shm") == Grade::kOk);
  system.file_systems["/dev/shm"] = uint64_t{64} << 20;
  CHECK(grade(check_limits(system, options(), true), "/dev/shm") == Grade::kNote);
  system.file_systems.clear();
  CHECK(grade(check_limits(system, options(), true), "/dev/shm") == Grade::kProblem);
  check_form(check_limits(system, options(), true));
}

TEST_CASE("congestion control that paces is a note") {
  FakeSystem system;
  const std::string check = "tcp congestion control";
  system.files.erase("/proc/sys/net/ipv4/tcp_congestion_control");
  CHECK(grade(check_limits(system, options(), false), check) == Grade::kOk);
  system.files["/proc/sys/net/ipv4/tcp_congestion_control"] = "cubic\n";
  CHECK(find(check_limits(system, options(), false), check).text == "cubic");
  system.files["/proc/sys/net/ipv4/tcp_congestion_control"] = "bbr\n";
  CHECK(grade(check_limits(system, options(), false), check) == Grade::kNote);
  check_form(check_limits(system, options(), false));
}

TEST_CASE("a kernel that does not tell of seccomp's actions is a note") {
  FakeSystem system;
  CHECK(grade(check_limits(system, options(), false), "seccomp") == Grade::kOk);
  system.files["/proc/sys/kernel/seccomp/actions_avail"] = "kill_process trapped\n";
  CHECK(grade(check_limits(system, options(), false), "seccomp") == Grade::kNote);
  system.files.erase("/proc/sys/kernel/seccomp/actions_avail");
  CHECK(grade(check_limits(system, options(), false), "seccomp") == Grade::kNote);
  check_form(check_limits(system, options(), false));
}

TEST_CASE("a daemon in another PID namespace is a note where there is a GPU") {
  FakeSystem system;
  CHECK(grade(check_namespaces(system, options(), true), "pid namespace") == Grade::kOk);
  system.files["/proc/42/status"] = "Name:\tkvferryd\nNSpid:\t42\t1\n";
  CHECK(grade(check_namespaces(system, options(), true), "pid namespace") == Grade::kNote);
  CHECK(grade(check_namespaces(system, options(), false), "pid namespace") == Grade::kOk);
  system.listener = 0;
  CHECK(grade(check_namespaces(system, options(), true), "pid namespace") == Grade::kNote);
  system.listener.reset();
  CHECK(grade(check_namespaces(system, options(), true), "pid namespace") == Grade::kOk);
  check_form(check_namespaces(system, options(), true));
}

TEST_CASE(
    "what the rails process says of its UCX is told, and what it lacks where there is a GPU") {
  CHECK(find(check_ucx({}, ucx, true), "ucx here").text ==
        "1.22.0 (/opt/kvferry-rails), memory: host, cuda, transports: cuda_copy, tcp");
  CHECK(grade(check_ucx({}, ucx, true), "ucx here") == Grade::kOk);
  const auto host_only = [] {
    auto told = ucx();
    told->memory_types = {"host"};
    told->cuda_missing = "no transport cuda_copy";
    return told;
  };
  CHECK(grade(check_ucx({}, host_only, false), "ucx here") == Grade::kOk);
  CHECK(grade(check_ucx({}, host_only, true), "ucx here") == Grade::kNote);
  CHECK(find(check_ucx({}, host_only, true), "ucx here").text.find("; no transport cuda_copy") !=
        std::string::npos);
  // Where only workers run there is none.
  const auto none = []() -> Result<rails::RailsCapabilities> {
    return invalid("rails.executable", "RAILS_NOT_FOUND", "no executable at x");
  };
  CHECK(grade(check_ucx({}, none, true), "ucx here") == Grade::kNote);
  const auto broken = []() -> Result<rails::RailsCapabilities> {
    return fail(Code::kInternal, "CAPABILITIES_INVALID", "ended with status 127");
  };
  CHECK(grade(check_ucx(healthy(), broken, false), "ucx here") == Grade::kProblem);
  for (const auto& findings : {check_ucx({}, ucx, true), check_ucx({}, host_only, true),
                               check_ucx({}, none, false), check_ucx({}, broken, false)})
    check_form(findings);
}

TEST_CASE("device nodes without a driver are a problem, and so is a driver without devices") {
  FakeSystem system;
  CHECK(grade(check_gpus(system, options(), no_child).findings, "cuda driver") == Grade::kNote);
  system.nodes["/dev/nvidiactl"] = {S_IFCHR | 0666U, 0, 0, true};
  const GpuFindings found = check_gpus(system, options(), no_child);
  CHECK(grade(found.findings, "cuda driver") == Grade::kProblem);
  CHECK_FALSE(found.usable);
  check_form(found.findings);
}

TEST_CASE("every way of sharing GPU memory is tried with a second process") {
  const fake_cuda::Machine machine(KVFERRY_FAKE_CUDA_LIBRARY, {.devices = 2});
  FakeSystem system;
  system.files["/proc/devices"] = "Character devices:\n195 nvidia\n511 nvidia-caps-imex-channels\n";
  system.directories["/dev/nvidia-caps-imex-channels"] = {"channel0"};
  system.nodes["/dev/nvidia-caps-imex-channels/channel0"] = {S_IFCHR | 0666U, 0, 0, true};
  const GpuFindings found = check_gpus(system, options(KVFERRY_FAKE_CUDA_LIBRARY), second_process);
  INFO(doctor_text(found.findings));
  check_form(found.findings);
  CHECK(found.usable);
  CHECK(doctor_exit(found.findings) == 0);
  for (const char* check : {"cuda driver", "gpu 0", "cuda ipc 0", "cuda vmm descriptor 0",
                            "cuda fabric 0", "gpu 1", "cuda ipc 1", "cuda vmm descriptor 1"})
    CHECK(grade(found.findings, check) == Grade::kOk);
  CHECK(find(found.findings, "cuda ipc 1").text == "imported and compared");
  CHECK(machine.control().live().total() == 0);
  CHECK(machine.control().device_bytes(0) == 0);
}

TEST_CASE("without an IMEX channel fabric handles are not tried") {
  const fake_cuda::Machine machine(KVFERRY_FAKE_CUDA_LIBRARY);
  FakeSystem system;
  const auto run = [&] {
    return check_gpus(system, options(KVFERRY_FAKE_CUDA_LIBRARY),
                      [](const ChildRequest&) {
                        return ChildAnswer{true, "as if"};
                      })
        .findings;
  };
  CHECK(find(run(), "cuda fabric 0").text == "no nvidia-caps-imex-channels in /proc/devices");
  system.files["/proc/devices"] = "511 nvidia-caps-imex-channels\n";
  CHECK(grade(run(), "cuda fabric 0") == Grade::kNote);
  system.directories["/dev/nvidia-caps-imex-channels"] = {"channel0", "channel7"};
  system.nodes["/dev/nvidia-caps-imex-channels/channel7"] = {S_IFCHR | 0600U, 0, 0, false};
  CHECK(grade(run(), "cuda fabric 0") == Grade::kNote);
  system.nodes["/dev/nvidia-caps-imex-channels/channel7"].writable = true;
  CHECK(find(run(), "cuda fabric 0").text == "as if (channel7); says nothing of other nodes");
}

TEST_CASE("what a device lacks is told, and what fails is a problem") {
  {
    const fake_cuda::Machine machine(KVFERRY_FAKE_CUDA_LIBRARY, {.lacks = "fabric"});
    const auto found =
        check_gpus(FakeSystem(), options(KVFERRY_FAKE_CUDA_LIBRARY), second_process).findings;
    CHECK(grade(found, "cuda fabric 0") == Grade::kOk);
  }
  {
    const fake_cuda::Machine machine(KVFERRY_FAKE_CUDA_LIBRARY, {.lacks = "ipc,fabric"});
    const auto found =
        check_gpus(FakeSystem(), options(KVFERRY_FAKE_CUDA_LIBRARY), second_process).findings;
    INFO(doctor_text(found));
    CHECK(grade(found, "cuda ipc 0") == Grade::kProblem);
    CHECK(grade(found, "cuda vmm descriptor 0") == Grade::kOk);
    CHECK(doctor_exit(found) == 1);
    check_form(found);
  }
  {
    const fake_cuda::Machine machine(KVFERRY_FAKE_CUDA_LIBRARY);
    const auto refuses = [](const ChildRequest&) {
      return ChildAnswer{false, "cuIpcOpenMemHandle: CUDA_ERROR_INVALID_CONTEXT (201)"};
    };
    const auto found =
        check_gpus(FakeSystem(), options(KVFERRY_FAKE_CUDA_LIBRARY), refuses).findings;
    CHECK(grade(found, "cuda ipc 0") == Grade::kProblem);
    CHECK(find(found, "cuda ipc 0").advice.find("shareProcessNamespace") != std::string::npos);
    CHECK(machine.control().live().total() == 0);
  }
}

TEST_CASE("a second process that cannot do its part says why") {
  ChildRequest request;
  request.task = ChildTask::kImportIpc;
  request.cuda_driver = "/nonexistent/libcuda.so";
  ChildAnswer answer = run_child(KVFERRY_CTL, request);
  CHECK_FALSE(answer.ok);
  CHECK(answer.text.find("/nonexistent/libcuda.so") != std::string::npos);
  const fake_cuda::Machine machine(KVFERRY_FAKE_CUDA_LIBRARY);
  request.cuda_driver = KVFERRY_FAKE_CUDA_LIBRARY;
  answer = run_child(KVFERRY_CTL, request);
  CHECK(answer.text == "the importing process does not see the device");
  answer = run_child("/nonexistent/kvferryctl", request);
  CHECK(answer.text.find("could not be started") != std::string::npos);
  answer = run_child("/bin/true", request);
  CHECK(answer.text == "the importing process died or did not answer in time");
}

TEST_CASE("the program tells, and exits with what it found") {
  const auto run = [](const std::string& arguments, int& status) {
    const std::string command = std::string(KVFERRY_CTL) + " " + arguments + " 2>&1";
    FILE* pipe = ::popen(command.c_str(), "r");
    REQUIRE(pipe != nullptr);
    std::string out;
    std::array<char, 4096> buffer{};
    while (const std::size_t got = std::fread(buffer.data(), 1, buffer.size(), pipe))
      out.append(buffer.data(), got);
    status = WEXITSTATUS(::pclose(pipe));
    return out;
  };
  const std::string sockets =
      "--socket /nonexistent/a doctor --worker-socket /nonexistent/s "
      "--cuda-driver /nonexistent/libcuda.so";
  int status = 0;
  const std::string text = run(sockets, status);
  CHECK(status == 1);
  CHECK(text.find("PROBLEM  worker socket: no /nonexistent/s\n") == 0);
  CHECK(text.find("\nnote     daemon: none answers on /nonexistent/a\n") != std::string::npos);
  // The one that is built beside it.
  CHECK(text.find("     ucx here: 1.") != std::string::npos);
  CHECK(text.find("/kvferry-rails), memory: host") != std::string::npos);
  const auto json = nlohmann::json::parse(run("--json " + sockets, status));
  CHECK(status == 1);
  CHECK(json["problems"].get<int>() >= 1);
  CHECK(json["findings"][0]["grade"] == "problem");
}

}  // namespace kvferry::ctl
