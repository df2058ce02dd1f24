#include "client/ctl/doctor_child.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <iostream>
#include <utility>
#include <vector>

#include "client/cpp/src/gpu.h"
#include "daemon/base/unique_fd.h"

namespace kvferry::ctl {
namespace {

using client::Gpu;
using client::Gpus;
using Clock = std::chrono::steady_clock;

constexpr int kChildFd = 3;
constexpr auto kChildLimit = std::chrono::seconds(30);
constexpr auto kCopyLimit = std::chrono::seconds(10);

// What goes through the pipe.
struct Wire {
  ChildTask task;
  uint32_t has_fd;
  char cuda_driver[256];
  uint8_t uuid[16];
  uint8_t handle[64];
  uint64_t offset;
  uint64_t bytes;
};

// ---- the parent's side -------------------------------------------------------------------------

Wire wire_of(const ChildRequest& request) {
  Wire wire{};
  wire.task = request.task;
  wire.has_fd = request.fd >= 0 ? 1 : 0;
  std::strncpy(wire.cuda_driver, request.cuda_driver.c_str(), sizeof wire.cuda_driver - 1);
  std::copy(request.uuid.begin(), request.uuid.end(), wire.uuid);
  std::copy(request.handle.begin(), request.handle.end(), wire.handle);
  wire.offset = request.offset;
  wire.bytes = request.bytes;
  return wire;
}

struct Pipe {
  UniqueFd read, write;
  static Pipe make() {
    int fds[2] = {-1, -1};
    if (::pipe2(fds, O_CLOEXEC) != 0) return {};
    return {UniqueFd(fds[0]), UniqueFd(fds[1])};
  }
};

// Everything that comes until the end of the pipe or the time.
std::string read_all(int fd, Clock::time_point deadline) {
  std::string text;
  char buffer[4096];
  for (;;) {
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
    pollfd entry{fd, POLLIN, 0};
    if (left <= 0 || ::poll(&entry, 1, static_cast<int>(left)) <= 0) return text;
    const ssize_t got = ::read(fd, buffer, sizeof buffer);
    if (got <= 0) return text;
    text.append(buffer, static_cast<std::size_t>(got));
  }
}

// Ends the child if it has not ended by itself; its exit status, or -1.
int reap(pid_t child, Clock::time_point deadline) {
  int status = 0;
  while (::waitpid(child, &status, WNOHANG) == 0) {
    if (Clock::now() >= deadline) {
      ::kill(child, SIGKILL);
      ::waitpid(child, &status, 0);
      return -1;
    }
    ::poll(nullptr, 0, 1);
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

}  // namespace

ChildAnswer run_child(const std::string& program, const ChildRequest& request) {
  if (request.cuda_driver.size() >= sizeof(Wire::cuda_driver))
    return {false, "the driver's path is too long"};
  const Pipe in = Pipe::make();
  Pipe out = Pipe::make();
  // Numbers beyond those that the child's own are put at.
  const UniqueFd shared(request.fd < 0 ? -1 : ::fcntl(request.fd, F_DUPFD_CLOEXEC, 10));
  if (!in.read || !out.read) return {false, "no pipe: out of descriptors"};
  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_adddup2(&actions, in.read.get(), 0);
  ::posix_spawn_file_actions_adddup2(&actions, out.write.get(), 1);
  if (shared) ::posix_spawn_file_actions_adddup2(&actions, shared.get(), kChildFd);
  std::string name = program;
  std::string command = kChildCommand;
  char* argv[] = {name.data(), command.data(), nullptr};
  pid_t child = -1;
  const int failed = ::posix_spawn(&child, program.c_str(), &actions, nullptr, argv, environ);
  ::posix_spawn_file_actions_destroy(&actions);
  if (failed != 0)
    return {false, "a second process could not be started: " + std::string(std::strerror(failed))};
  const auto deadline = Clock::now() + kChildLimit;
  const Wire wire = wire_of(request);
  // Shorter than a pipe's buffer: never blocks. A child that ends early is told by its status.
  struct sigaction ignore {};
  struct sigaction before {};
  ignore.sa_handler = SIG_IGN;
  ::sigaction(SIGPIPE, &ignore, &before);
  (void)!::write(in.write.get(), &wire, sizeof wire);
  ::sigaction(SIGPIPE, &before, nullptr);
  out.write.reset();
  std::string text = read_all(out.read.get(), deadline);
  const int status = reap(child, deadline);
  if (const auto end = text.find('\n'); end != std::string::npos) text.resize(end);
  if (text.empty()) text = "the importing process died or did not answer in time";
  return {status == 0, std::move(text)};
}

// ---- the child's side --------------------------------------------------------------------------

namespace {

ChildAnswer failed(const client::Error& error) {
  return {false, error.message.empty() ? error.to_string() : error.message};
}

client::Result<std::shared_ptr<const Gpu>> find_gpu(Gpus& gpus, const Wire& wire) {
  int count = 0;
  if (const auto result = gpus.driver().api().cuDeviceGetCount(&count);
      result != cuda::CUDA_SUCCESS)
    return client::cuda_error(gpus.driver(), result, "cuDeviceGetCount");
  const std::string uuid(reinterpret_cast<const char*>(wire.uuid), sizeof wire.uuid);
  for (int i = 0; i < count; ++i)
    if (auto gpu = gpus.gpu(i); gpu && (*gpu)->uuid() == uuid) return gpu;
  return client::Error{client::Code::kNotFound,
                       "DEVICE_UNKNOWN",
                       "the importing process does not see the device",
                       {},
                       {}};
}

// Looks whether the memory holds what the parent has written.
ChildAnswer compare(const Gpu& gpu, uint64_t address) {
  std::vector<std::byte> found(kTrialBytes);
  if (auto read = gpu.read(address, found, Clock::now() + kCopyLimit); !read)
    return failed(read.error());
  for (std::size_t i = 0; i < found.size(); ++i)
    if (found[i] != trial_byte(i))
      return {false, "the imported memory holds other bytes than the exported"};
  return {true, "imported and compared"};
}

ChildAnswer import_ipc(const Gpu& gpu, const Wire& wire) {
  cuda::CUipcMemHandle handle{};
  std::memcpy(handle.reserved, wire.handle, sizeof handle.reserved);
  cuda::CUdeviceptr base = 0;
  if (auto opened = gpu.check(
          gpu.api().cuIpcOpenMemHandle(&base, handle, cuda::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS),
          "cuIpcOpenMemHandle");
      !opened)
    return failed(opened.error());
  ChildAnswer answer = compare(gpu, base + wire.offset);
  if (auto closed = gpu.check(gpu.api().cuIpcCloseMemHandle(base), "cuIpcCloseMemHandle");
      !closed && answer.ok)
    answer = failed(closed.error());
  return answer;
}

ChildAnswer map_and_compare(const Gpu& gpu, cuda::CUmemGenericAllocationHandle handle,
                            const Wire& wire) {
  const cuda::Api& api = gpu.api();
  cuda::CUdeviceptr address = 0;
  if (auto reserved =
          gpu.check(api.cuMemAddressReserve(&address, wire.bytes, 0, 0, 0), "cuMemAddressReserve");
      !reserved)
    return failed(reserved.error());
  ChildAnswer answer;
  if (auto mapped = gpu.check(api.cuMemMap(address, wire.bytes, 0, handle, 0), "cuMemMap");
      !mapped) {
    answer = failed(mapped.error());
  } else {
    const cuda::CUmemAccessDesc access{{cuda::CU_MEM_LOCATION_TYPE_DEVICE, gpu.handle()},
                                       cuda::CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    auto set = gpu.check(api.cuMemSetAccess(address, wire.bytes, &access, 1), "cuMemSetAccess");
    answer = set ? compare(gpu, address + wire.offset) : failed(set.error());
    static_cast<void>(api.cuMemUnmap(address, wire.bytes));
  }
  static_cast<void>(api.cuMemAddressFree(address, wire.bytes));
  return answer;
}

ChildAnswer import_vmm(const Gpu& gpu, const Wire& wire) {
  const bool by_fd = wire.task == ChildTask::kImportFd;
  cuda::CUmemFabricHandle fabric{};
  std::memcpy(fabric.data, wire.handle, sizeof fabric.data);
  // The driver wants the descriptor itself as a pointer, and fabric handles by address.
  void* const from = by_fd ? reinterpret_cast<void*>(intptr_t{kChildFd}) : &fabric;
  cuda::CUmemGenericAllocationHandle handle = 0;
  if (auto imported = gpu.check(gpu.api().cuMemImportFromShareableHandle(
                                    &handle, from,
                                    by_fd ? cuda::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
                                          : cuda::CU_MEM_HANDLE_TYPE_FABRIC),
                                "cuMemImportFromShareableHandle");
      !imported)
    return failed(imported.error());
  ChildAnswer answer = map_and_compare(gpu, handle, wire);
  static_cast<void>(gpu.api().cuMemRelease(handle));
  return answer;
}

ChildAnswer import_memory(const Wire& wire) {
  auto gpus = Gpus::load(wire.cuda_driver);
  if (!gpus) return failed(gpus.error());
  auto gpu = find_gpu(**gpus, wire);
  if (!gpu) return failed(gpu.error());
  const Gpu::Current current(**gpu);
  if (!current) return failed(current.error());
  return wire.task == ChildTask::kImportIpc ? import_ipc(**gpu, wire) : import_vmm(**gpu, wire);
}

}  // namespace

int child_main() {
  Wire wire{};
  std::size_t got = 0;
  while (got < sizeof wire) {
    const ssize_t n = ::read(0, reinterpret_cast<char*>(&wire) + got, sizeof wire - got);
    if (n <= 0) return 64;
    got += static_cast<std::size_t>(n);
  }
  wire.cuda_driver[sizeof wire.cuda_driver - 1] = '\0';
  const ChildAnswer answer = import_memory(wire);
  std::string line = answer.text;
  std::replace(line.begin(), line.end(), '\n', ' ');
  std::cout << line << std::endl;
  return answer.ok ? 0 : 1;
}

}  // namespace kvferry::ctl
