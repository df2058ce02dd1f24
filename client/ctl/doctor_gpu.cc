// Devices, and trials of every way in which a worker hands memory of a GPU to a daemon. Each is
// done as workers and daemons do it: allocated here, described by the client library, imported by a
// process of its own, compared.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

#include "client/cpp/src/device_export.h"
#include "client/cpp/src/device_memory.h"
#include "client/cpp/src/gpu.h"
#include "client/ctl/doctor.h"
#include "client/ctl/render.h"

namespace kvferry::ctl {
namespace {

using client::Gpu;
using client::Gpus;

constexpr uint64_t kBytes = 2 * 1024 * 1024;
constexpr auto kCopyLimit = std::chrono::seconds(10);
constexpr char kImexDriver[] = "nvidia-caps-imex-channels";
constexpr char kImexNodes[] = "/dev/nvidia-caps-imex-channels";

Finding ok(std::string check, std::string text) {
  return {std::move(check), Grade::kOk, std::move(text), {}};
}

std::string uuid_text(const std::string& bytes) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text = "GPU-";
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    text += kDigits[static_cast<unsigned char>(bytes[i]) >> 4];
    text += kDigits[static_cast<unsigned char>(bytes[i]) & 15];
  }
  return text;
}

int attribute(const Gpu& gpu, cuda::CUdevice_attribute which) {
  int value = 0;
  return gpu.api().cuDeviceGetAttribute(&value, which, gpu.handle()) == cuda::CUDA_SUCCESS ? value
                                                                                           : 0;
}

Finding device_finding(const Gpu& gpu) {
  char name[256] = "unnamed";
  static_cast<void>(gpu.api().cuDeviceGetName(name, sizeof name, gpu.handle()));
  std::size_t bytes = 0;
  static_cast<void>(gpu.api().cuDeviceTotalMem(&bytes, gpu.handle()));
  return ok("gpu " + std::to_string(gpu.ordinal()),
            std::string(name) + ", " + uuid_text(gpu.uuid()) + ", " +
                human_bytes(static_cast<double>(bytes)) + ", compute " +
                std::to_string(attribute(gpu, cuda::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)) +
                "." +
                std::to_string(attribute(gpu, cuda::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)));
}

// ---- trials ------------------------------------------------------------------------------------

// Memory of cuMemAlloc for as long as the object lives.
class LegacyMemory {
 public:
  explicit LegacyMemory(const Gpu& gpu) : gpu_(gpu) {
    const Gpu::Current current(gpu);
    status_ = current ? gpu.check(gpu.api().cuMemAlloc(&address_, kBytes), "cuMemAlloc")
                      : client::Status(current.error());
  }
  ~LegacyMemory() {
    const Gpu::Current current(gpu_);
    if (current && status_) static_cast<void>(gpu_.api().cuMemFree(address_));
  }
  LegacyMemory(const LegacyMemory&) = delete;
  LegacyMemory& operator=(const LegacyMemory&) = delete;
  const client::Status& status() const { return status_; }
  uint64_t address() const { return address_; }

 private:
  const Gpu& gpu_;
  cuda::CUdeviceptr address_ = 0;
  client::Status status_;
};

ChildAnswer failed(const client::Error& error) {
  return {false, error.message};
}

struct Trial {
  Gpus& gpus;
  const std::shared_ptr<const Gpu>& gpu;
  const RunChild& run_child;
  std::string driver_file;
};

// Writes the bytes, exports them as a worker would and lets the child import them.
ChildAnswer share(const Trial& trial, uint64_t address) {
  std::vector<std::byte> bytes(kTrialBytes);
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = trial_byte(i);
  if (auto written =
          trial.gpu->write(address, bytes, std::chrono::steady_clock::now() + kCopyLimit);
      !written)
    return failed(written.error());
  auto exported = client::describe(trial.gpus, address, kTrialBytes);
  if (!exported) return failed(exported.error());
  ChildRequest request;
  request.cuda_driver = trial.driver_file;
  request.offset = exported->offset;
  std::copy_n(trial.gpu->uuid().begin(), request.uuid.size(), request.uuid.begin());
  UniqueFd fd;
  switch (exported->kind) {
    case client::DeviceKind::kIpc:
      request.task = ChildTask::kImportIpc;
      break;
    case client::DeviceKind::kFabric:
      request.task = ChildTask::kImportFabric;
      request.bytes = kBytes;
      break;
    case client::DeviceKind::kVmmFd: {
      request.task = ChildTask::kImportFd;
      request.bytes = exported->parts.front().bytes;
      auto part = client::export_part(*trial.gpu, exported->parts.front());
      if (!part) return failed(part.error());
      fd = std::move(*part);
      request.fd = fd.get();
      break;
    }
  }
  if (!exported->handle.empty())
    std::copy_n(exported->handle.begin(), request.handle.size(), request.handle.begin());
  return trial.run_child(request);
}

ChildAnswer share_vmm(const Trial& trial, cuda::CUmemAllocationHandleType handles) {
  auto memory = client::DeviceMemory::allocate(
      trial.gpu, kBytes, std::chrono::steady_clock::now() + kCopyLimit, handles);
  if (!memory) return failed(memory.error());
  return share(trial, (*memory)->address());
}

Finding try_ipc(const Trial& trial, const std::string& suffix) {
  const std::string check = "cuda ipc" + suffix;
  const LegacyMemory memory(*trial.gpu);
  const ChildAnswer answer =
      memory.status() ? share(trial, memory.address()) : failed(memory.status().error());
  if (answer.ok) return ok(check, answer.text);
  return {check, Grade::kProblem, answer.text,
          "pools of cudaMalloc memory will be refused: in containers give both processes the same "
          "GPU and one PID namespace (shareProcessNamespace, hostPID); under MIG the daemon needs "
          "the worker's instance; with confidential computing there is no CUDA IPC. Memory of "
          "cuMemMap (alloc_device_pool) does not need it"};
}

Finding try_fd(const Trial& trial, const std::string& suffix) {
  const std::string check = "cuda vmm descriptor" + suffix;
  if (attribute(*trial.gpu,
                cuda::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED) == 0)
    return {check, Grade::kNote, "the device does not share memory by file descriptor",
            "alloc_device_pool and expandable segments cannot be used; cudaMalloc memory can"};
  const ChildAnswer answer = share_vmm(trial, cuda::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
  if (answer.ok) return ok(check, answer.text);
  return {check, Grade::kProblem, answer.text,
          "pools of cuMemMap memory will be refused: both processes need the device nodes of the "
          "same GPU, and free memory on it"};
}

Finding try_fabric(const System& system, const Trial& trial, const std::string& suffix) {
  const std::string check = "cuda fabric" + suffix;
  if (attribute(*trial.gpu, cuda::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED) == 0)
    return ok(check, "not this device's: it has no fabric handles, and needs none");
  const auto devices = system.read("/proc/devices");
  const bool driver = devices && devices->find(kImexDriver) != std::string::npos;
  std::string channels;
  bool usable = false;
  for (const std::string& name : system.list(kImexNodes)) {
    const auto node = system.stat(std::string(kImexNodes) + "/" + name);
    if (!node || !node->writable) continue;
    usable = true;
    channels += (channels.empty() ? "" : ", ") + name;
  }
  constexpr char kAdvice[] =
      "only memory shared across an NVLink domain needs it: load the driver's IMEX channels and "
      "make one visible (nvidia-modprobe -c 0 -i; in Kubernetes a ComputeDomain claim). All "
      "daemons and workers of the domain need the same channel";
  if (!driver)
    return {check, Grade::kNote, "no " + std::string(kImexDriver) + " in /proc/devices", kAdvice};
  if (!usable)
    return {check, Grade::kNote,
            "no channel in " + std::string(kImexNodes) + " that this user may open", kAdvice};
  const ChildAnswer answer = share_vmm(trial, cuda::CU_MEM_HANDLE_TYPE_FABRIC);
  if (answer.ok) return ok(check, answer.text + " (" + channels + "); says nothing of other nodes");
  return {check, Grade::kProblem, answer.text + " (" + channels + ")",
          "the channel is there and fabric handles fail all the same: look at nvidia-imex and at "
          "the fabric's state (nvidia-smi -q, Fabric)"};
}

Findings notes_on(const Gpu& gpu, const std::string& suffix) {
  Findings out;
  if (attribute(gpu, cuda::CU_DEVICE_ATTRIBUTE_IPC_EVENT_SUPPORTED) == 0)
    out.push_back({"cuda events" + suffix, Grade::kNote, "events cannot be shared",
                   "ready conditions by event are refused; use timeline words"});
  if (attribute(gpu, cuda::CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS) == 0)
    out.push_back({"stream words" + suffix, Grade::kNote, "streams cannot use 64-bit words",
                   "signal_on_stream and wait_on_stream are refused; use events"});
  return out;
}

Findings no_driver(const System& system, const std::string& message) {
  const bool nodes = system.stat("/dev/nvidiactl") || system.stat("/dev/nvidia0");
  if (!nodes)
    return {{"cuda driver", Grade::kNote, "none, and no GPU's device nodes: " + message,
             "host memory only; with a GPU install its driver, and in containers use NVIDIA's "
             "runtime (NVIDIA_VISIBLE_DEVICES)"}};
  return {{"cuda driver", Grade::kProblem, "there are GPU device nodes, but " + message,
           "install the driver of this machine's GPU; in containers libcuda.so.1 comes from "
           "NVIDIA's runtime with NVIDIA_DRIVER_CAPABILITIES=compute,utility"}};
}

}  // namespace

GpuFindings check_gpus(const System& system, const DoctorOptions& options,
                       const RunChild& run_child) {
  GpuFindings out;
  const std::string library = options.cuda_driver.empty() ? Gpus::library() : options.cuda_driver;
  auto gpus = Gpus::load(library);
  if (!gpus) {
    out.findings = no_driver(system, gpus.error().message);
    return out;
  }
  const cuda::Driver& driver = (*gpus)->driver();
  int count = 0;
  if (driver.api().cuDeviceGetCount(&count) != cuda::CUDA_SUCCESS || count == 0) {
    out.findings.push_back({"cuda driver", Grade::kProblem,
                            "CUDA " + driver.version_text() + ", but it shows no device",
                            "look at CUDA_VISIBLE_DEVICES and at the container's devices"});
    return out;
  }
  out.findings.push_back(ok("cuda driver", "CUDA " + driver.version_text() + ", " + library + ", " +
                                               std::to_string(count) + " device(s)"));
  for (int i = 0; i < count; ++i) {
    auto gpu = (*gpus)->gpu(i);
    if (!gpu) {
      out.findings.push_back({"gpu " + std::to_string(i), Grade::kProblem, gpu.error().message,
                              "it may be taken by others (compute mode exclusive), or have failed "
                              "(nvidia-smi, dmesg)"});
      continue;
    }
    out.usable = true;
    const std::string suffix = " " + std::to_string(i);
    const Trial trial{**gpus, *gpu, run_child, library};
    out.findings.push_back(device_finding(**gpu));
    out.findings.push_back(try_ipc(trial, suffix));
    out.findings.push_back(try_fd(trial, suffix));
    out.findings.push_back(try_fabric(system, trial, suffix));
    for (Finding& note : notes_on(**gpu, suffix)) out.findings.push_back(std::move(note));
  }
  return out;
}

}  // namespace kvferry::ctl
