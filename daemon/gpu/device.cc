#include "daemon/gpu/device.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <utility>

namespace kvferry::gpu {
namespace {

// After one of these every call in the context answers the same: the context is lost.
constexpr cuda::CUresult kSticky[] = {
    cuda::CUDA_ERROR_ECC_UNCORRECTABLE,
    cuda::CUDA_ERROR_NVLINK_UNCORRECTABLE,
    cuda::CUDA_ERROR_ILLEGAL_ADDRESS,
    cuda::CUDA_ERROR_LAUNCH_TIMEOUT,
    cuda::CUDA_ERROR_CONTEXT_IS_DESTROYED,
    cuda::CUDA_ERROR_ASSERT,
    cuda::CUDA_ERROR_HARDWARE_STACK_ERROR,
    cuda::CUDA_ERROR_ILLEGAL_INSTRUCTION,
    cuda::CUDA_ERROR_MISALIGNED_ADDRESS,
    cuda::CUDA_ERROR_INVALID_ADDRESS_SPACE,
    cuda::CUDA_ERROR_INVALID_PC,
    cuda::CUDA_ERROR_LAUNCH_FAILED,
    cuda::CUDA_ERROR_EXTERNAL_DEVICE,
    cuda::CUDA_ERROR_CONTAINED,
    cuda::CUDA_ERROR_MPS_CLIENT_TERMINATED,
};

bool is_sticky(cuda::CUresult result) {
  return std::find(std::begin(kSticky), std::end(kSticky), result) != std::end(kSticky);
}

// "CUDA_ERROR_OUT_OF_MEMORY" -> "CUDA_OUT_OF_MEMORY"
std::string reason_of(const cuda::Driver& driver, cuda::CUresult result) {
  constexpr std::string_view kPrefix = "CUDA_ERROR_";
  std::string name = driver.name_of(result);
  return name.starts_with(kPrefix) ? name.replace(0, kPrefix.size(), "CUDA_") : "CUDA_UNKNOWN";
}

Error error_of(const cuda::Driver& driver, cuda::CUresult result, std::string_view call) {
  Code code = Code::kInternal;
  if (is_sticky(result))
    code = Code::kUnavailable;
  else if (result == cuda::CUDA_ERROR_OUT_OF_MEMORY)
    code = Code::kResourceExhausted;
  return {code, reason_of(driver, result), driver.error(result, call).to_string(), {}};
}

// A GPU is function 0 of its device.
std::string pci_bus_id(uint32_t domain, uint32_t bus, uint32_t device) {
  char text[32];
  std::snprintf(text, sizeof text, "%04x:%02x:%02x.0", domain, bus, device);
  return text;
}

Status checked(const cuda::Driver& driver, cuda::CUresult result, std::string_view call) {
  if (result == cuda::CUDA_SUCCESS) return {};
  return tl::unexpected<Error>(error_of(driver, result, call));
}

}  // namespace

std::string to_string(const Uuid& uuid) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string out = "GPU-";
  for (std::size_t i = 0; i < uuid.size(); ++i) {
    if (i == 4 || i == 6 || i == 8 || i == 10) out += '-';
    out += kDigits[uuid[i] >> 4];
    out += kDigits[uuid[i] & 15];
  }
  return out;
}

// ---- a device ----------------------------------------------------------------------------------

Result<std::shared_ptr<const Device>> Device::open(std::shared_ptr<const cuda::Driver> driver,
                                                   int ordinal) {
  const cuda::Api& api = driver->api();
  cuda::CUdevice handle{};
  KVFERRY_RETURN_IF_ERROR(checked(*driver, api.cuDeviceGet(&handle, ordinal), "cuDeviceGet"));
  std::shared_ptr<Device> device(new Device(std::move(driver), handle));
  KVFERRY_RETURN_IF_ERROR(device->read_facts(ordinal));
  KVFERRY_RETURN_IF_ERROR(device->check(api.cuDevicePrimaryCtxRetain(&device->context_, handle),
                                        "cuDevicePrimaryCtxRetain"));
  return std::shared_ptr<const Device>(std::move(device));
}

Device::~Device() {
  if (context_ != nullptr) api().cuDevicePrimaryCtxRelease(handle_);
}

Status Device::read_facts(int ordinal) {
  facts_.ordinal = ordinal;
  cuda::CUuuid uuid{};
  KVFERRY_RETURN_IF_ERROR(check(api().cuDeviceGetUuid(&uuid, handle_), "cuDeviceGetUuid"));
  static_assert(sizeof uuid.bytes == 16);
  for (std::size_t i = 0; i < facts_.uuid.size(); ++i)
    facts_.uuid[i] = static_cast<uint8_t>(uuid.bytes[i]);
  std::array<char, 256> name{};
  KVFERRY_RETURN_IF_ERROR(
      check(api().cuDeviceGetName(name.data(), static_cast<int>(name.size() - 1), handle_),
            "cuDeviceGetName"));
  facts_.name = name.data();
  std::size_t total = 0;
  KVFERRY_RETURN_IF_ERROR(check(api().cuDeviceTotalMem(&total, handle_), "cuDeviceTotalMem"));
  facts_.total_bytes = total;

  Status status;
  const auto attribute = [&](cuda::CUdevice_attribute which, bool must) -> uint32_t {
    int value = 0;
    const cuda::CUresult result = api().cuDeviceGetAttribute(&value, which, handle_);
    // Drivers older than an attribute do not know it; they lack what it tells of, too.
    if (result == cuda::CUDA_ERROR_INVALID_VALUE && !must) return 0;
    if (Status got = check(result, "cuDeviceGetAttribute"); !got && status) status = got;
    return static_cast<uint32_t>(std::max(value, 0));
  };
  facts_.sm_count = attribute(cuda::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, true);
  facts_.compute_major = attribute(cuda::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, true);
  facts_.compute_minor = attribute(cuda::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, true);
  facts_.pci_bus_id = pci_bus_id(attribute(cuda::CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID, true),
                                 attribute(cuda::CU_DEVICE_ATTRIBUTE_PCI_BUS_ID, true),
                                 attribute(cuda::CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID, true));
  facts_.vmm = attribute(cuda::CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, false) != 0;
  facts_.vmm_fd =
      facts_.vmm &&
      attribute(cuda::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, false) != 0;
  facts_.fabric =
      facts_.vmm && attribute(cuda::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED, false) != 0;
  facts_.events_by_ipc = attribute(cuda::CU_DEVICE_ATTRIBUTE_IPC_EVENT_SUPPORTED, false) != 0;
  facts_.rdma_with_vmm =
      attribute(cuda::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED, false) != 0;
  KVFERRY_RETURN_IF_ERROR(status);
  if (!facts_.vmm) return {};

  cuda::CUmemAllocationProp properties{};
  properties.type = cuda::CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location.type = cuda::CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = handle_;
  if (facts_.vmm_fd)
    properties.requestedHandleTypes = cuda::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  std::size_t granularity = 0;
  KVFERRY_RETURN_IF_ERROR(
      check(api().cuMemGetAllocationGranularity(&granularity, &properties,
                                                cuda::CU_MEM_ALLOC_GRANULARITY_MINIMUM),
            "cuMemGetAllocationGranularity"));
  if (granularity == 0)
    return fail(Code::kInternal, "CUDA_INVALID_VALUE",
                "cuMemGetAllocationGranularity: the driver says 0");
  facts_.granularity = granularity;
  return {};
}

Device::Current::Current(const Device& device) : device_(device) {
  status_ = device.check(device.api().cuCtxPushCurrent(device.context()), "cuCtxPushCurrent");
}

Device::Current::~Current() {
  if (!ok()) return;
  cuda::CUcontext popped = nullptr;
  (void)device_.check(device_.api().cuCtxPopCurrent(&popped), "cuCtxPopCurrent");
}

Status Device::check(cuda::CUresult result, std::string_view call) const {
  if (result == cuda::CUDA_SUCCESS) return {};
  Error error = error_of(*driver_, result, call);
  if (is_sticky(result)) take_down(error);
  return tl::unexpected<Error>(std::move(error));
}

void Device::take_down(Error why) const {
  MutexLock lock(mutex_);
  if (down_.load(std::memory_order_relaxed)) return;
  why_ = std::move(why);
  down_.store(true, std::memory_order_release);
}

Error Device::down_error() const {
  MutexLock lock(mutex_);
  return {Code::kUnavailable,
          "GPU_DOWN",
          to_string(facts_.uuid) + " has failed: " + why_.message + " (" + why_.reason + ")",
          {}};
}

bool Device::reaches(const Device& other) const {
  if (handle_ == other.handle_) return true;
  int yes = 0;
  return check(api().cuDeviceCanAccessPeer(&yes, handle_, other.handle_),
               "cuDeviceCanAccessPeer") &&
         yes != 0;
}

Status Device::enable_peer(const Device& other) const {
  if (handle_ == other.handle_) return {};
  if (!reaches(other))
    return fail(
        Code::kFailedPrecondition, "NO_PEER_ACCESS",
        to_string(facts_.uuid) + " has no access to memory of " + to_string(other.facts_.uuid));
  const Current current(*this);
  KVFERRY_RETURN_IF_ERROR(current.status());
  const cuda::CUresult result = api().cuCtxEnablePeerAccess(other.context_, 0);
  if (result == cuda::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED) return {};
  return check(result, "cuCtxEnablePeerAccess");
}

Result<uint64_t> Device::free_bytes() const {
  const Current current(*this);
  KVFERRY_RETURN_IF_ERROR(current.status());
  std::size_t free = 0;
  std::size_t total = 0;
  KVFERRY_RETURN_IF_ERROR(check(api().cuMemGetInfo(&free, &total), "cuMemGetInfo"));
  return free;
}

// ---- all of them -------------------------------------------------------------------------------

Result<std::shared_ptr<const Devices>> Devices::open(std::shared_ptr<const cuda::Driver> driver) {
  const cuda::Api& api = driver->api();
  int count = 0;
  KVFERRY_RETURN_IF_ERROR(checked(*driver, api.cuDeviceGetCount(&count), "cuDeviceGetCount"));
  auto devices = std::make_shared<Devices>();
  devices->driver_ = driver;
  for (int ordinal = 0; ordinal < count; ++ordinal) {
    auto device = Device::open(driver, ordinal);
    if (device)
      devices->devices_.push_back(std::move(*device));
    else
      devices->problems_.push_back(std::move(device).error());
  }
  if (devices->devices_.empty()) {
    return fail(Code::kUnavailable, "NO_GPU",
                count == 0 ? std::string("the driver knows no device")
                           : "no device can be used: " + devices->problems_.front().message);
  }
  return std::shared_ptr<const Devices>(std::move(devices));
}

std::shared_ptr<const Device> Devices::find(std::span<const uint8_t> uuid) const {
  for (const auto& device : devices_)
    if (std::equal(uuid.begin(), uuid.end(), device->facts().uuid.begin(),
                   device->facts().uuid.end()))
      return device;
  return nullptr;
}

}  // namespace kvferry::gpu
