#include "daemon/gpu/device_pool.h"

#include <pthread.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <thread>
#include <utility>

#include "daemon/base/mutex.h"
#include "daemon/gpu/mapping.h"
#include "daemon/gpu/reader.h"

namespace kvferry::gpu {
namespace {

std::byte* as_pointer(cuda::CUdeviceptr address) {
  return reinterpret_cast<std::byte*>(static_cast<uintptr_t>(address));
}

Status check_span(const ImportRequest& request) {
  uint64_t end = 0;
  if (request.bytes == 0 || !checked_add(request.offset_bytes, request.bytes, end))
    return invalid(request.field + ".bytes", "POOL_SIZE_INVALID",
                   "a pool has at least one byte and ends somewhere");
  return {};
}

Status check_fits(const ImportRequest& request, uint64_t allocation_bytes) {
  if (request.offset_bytes <= allocation_bytes &&
      request.bytes <= allocation_bytes - request.offset_bytes)
    return {};
  return invalid(request.field + ".bytes", "POOL_TOO_SMALL",
                 "the memory has " + std::to_string(allocation_bytes) + " bytes, told were " +
                     std::to_string(request.bytes) + " from " +
                     std::to_string(request.offset_bytes) + " on");
}

}  // namespace

// What all pools and the Imports share: the thread that closes, and who has claimed what.
class Imports::Core {
 public:
  Core() {
    thread_ = std::thread([this] { run(); });
    pthread_setname_np(thread_.native_handle(), "kvf-gpu-close");
  }

  // Closes all that waits and joins; from then on close() works on the caller's thread.
  void stop() {
    std::vector<std::unique_ptr<Reader>> readers;
    {
      MutexLock lock(mutex_);
      stopping_ = true;
      readers.swap(readers_);
    }
    changed_.notify_all();
    if (thread_.joinable()) thread_.join();
  }

  void close(Mapping mapping) {
    {
      MutexLock lock(mutex_);
      if (!stopping_) {
        closing_.push_back(std::move(mapping));
        changed_.notify_all();
        return;
      }
    }
    close_now(std::move(mapping));
  }

  bool drained(Time deadline) {
    MutexLock lock(mutex_);
    while (!closing_.empty() || busy_)
      if (!changed_.wait_until(mutex_, deadline)) return closing_.empty() && !busy_;
    return true;
  }

  // A reader of the device, made if none is idle. As long as one is stuck there is no other: they
  // would only add up.
  Result<std::unique_ptr<Reader>> take_reader(const std::shared_ptr<const Device>& device) {
    std::unique_ptr<Reader> reader;
    {
      MutexLock lock(mutex_);
      const auto idle = std::find_if(readers_.begin(), readers_.end(),
                                     [&](const auto& one) { return one->device() == device; });
      if (idle != readers_.end()) {
        reader = std::move(*idle);
        readers_.erase(idle);
      }
    }
    if (reader == nullptr) return Reader::make(device);
    if (!reader->still_stuck()) return reader;
    give_reader(std::move(reader));
    return fail(Code::kUnavailable, "GPU_READ_TIMEOUT", "an earlier read has not come back yet");
  }
  void give_reader(std::unique_ptr<Reader> reader) {
    MutexLock lock(mutex_);
    if (!stopping_) readers_.push_back(std::move(reader));
  }

  Stats stats;
  Mutex claims_mutex;
  // By device, kind and handle.
  std::map<std::string, std::weak_ptr<Claim::Entry>> claims KVFERRY_GUARDED_BY(claims_mutex);

 private:
  void close_now(Mapping mapping) {
    stats.close_failures.fetch_add(mapping.close(), std::memory_order_relaxed);
    stats.mapped.fetch_sub(1, std::memory_order_relaxed);
  }

  void run() {
    for (;;) {
      Mapping mapping;
      {
        MutexLock lock(mutex_);
        busy_ = false;
        if (closing_.empty()) changed_.notify_all();
        while (closing_.empty()) {
          if (stopping_) return;
          changed_.wait(mutex_);
        }
        mapping = std::move(closing_.front());
        closing_.pop_front();
        busy_ = true;
      }
      close_now(std::move(mapping));
    }
  }

  Mutex mutex_;
  CondVar changed_;
  std::deque<Mapping> closing_ KVFERRY_GUARDED_BY(mutex_);
  bool busy_ KVFERRY_GUARDED_BY(mutex_) = false;
  bool stopping_ KVFERRY_GUARDED_BY(mutex_) = false;
  std::vector<std::unique_ptr<Reader>> readers_ KVFERRY_GUARDED_BY(mutex_);
  std::thread thread_;
};

struct DevicePool::Memory {
  Memory(std::shared_ptr<Imports::Core> owner, Mapping what, std::string handle)
      : core(std::move(owner)),
        mapping(std::move(what)),
        identity(std::move(handle)),
        device(mapping.device()),
        base(mapping.base()),
        bytes(mapping.bytes()) {
    core->stats.mapped.fetch_add(1, std::memory_order_relaxed);
  }
  ~Memory() { core->close(std::move(mapping)); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  const std::shared_ptr<Imports::Core> core;
  Mapping mapping;
  const std::string identity;  // what its handle is; empty: a descriptor, which has no value
  const std::shared_ptr<const Device> device;
  const cuda::CUdeviceptr base;
  const uint64_t bytes;
};

struct Claim::Entry {
  WorkerId owner;
  std::string identity;
  std::weak_ptr<const DevicePool::Memory> memory;
};

// ---- pools -------------------------------------------------------------------------------------

DevicePool::DevicePool(ImportKind kind, std::shared_ptr<const Memory> memory, uint64_t offset_bytes,
                       uint64_t bytes)
    : Pool(as_pointer(memory->base + offset_bytes), bytes, memory->device.get()),
      kind_(kind),
      memory_(std::move(memory)) {}

DevicePool::~DevicePool() = default;

bool DevicePool::same_memory(const Pool& other) const {
  const auto* there = dynamic_cast<const DevicePool*>(&other);
  if (there == nullptr) return false;
  const Memory& a = *memory_;
  const Memory& b = *there->memory_;
  if (!a.identity.empty() && a.identity == b.identity) return true;
  // One allocation that was opened twice by CUDA IPC has one address.
  return a.base < b.base + b.bytes && b.base < a.base + a.bytes;
}

bool DevicePool::failed() const {
  return Pool::failed() || memory_->device->down();
}

// ---- imports -----------------------------------------------------------------------------------

Imports::Imports(std::shared_ptr<const Devices> devices)
    : devices_(std::move(devices)), core_(std::make_shared<Core>()) {}

Imports::~Imports() {
  core_->stop();
}

const Imports::Stats& Imports::stats() const {
  return core_->stats;
}

bool Imports::drained(Time deadline) {
  return core_->drained(deadline);
}

namespace {

bool serves_kind(const Device& device, ImportKind kind) {
  switch (kind) {
    case ImportKind::kCudaIpc:
      return true;
    case ImportKind::kCudaVmmFd:
      return device.facts().vmm_fd;
    case ImportKind::kCudaFabric:
      return device.facts().fabric;
  }
  return false;
}

}  // namespace

bool Imports::serves(ImportKind kind) const {
  return std::any_of(devices_->all().begin(), devices_->all().end(),
                     [&](const auto& device) { return serves_kind(*device, kind); });
}

Result<std::shared_ptr<const Device>> Imports::device_of(const ImportRequest& request,
                                                         ImportKind kind) {
  std::shared_ptr<const Device> device = devices_->find(request.device_uuid);
  if (device == nullptr)
    return invalid(request.field + ".device_uuid", "POOL_DEVICE_UNKNOWN",
                   "the daemon can use no device of this UUID; it has " +
                       std::to_string(devices_->all().size()) + " others");
  if (!serves_kind(*device, kind))
    return fail(Code::kUnimplemented, "POOL_KIND_UNSUPPORTED",
                to_string(device->facts().uuid) + " cannot share memory so",
                request.field + ".kind");
  if (device->down()) return tl::unexpected<Error>(device->down_error());
  KVFERRY_RETURN_IF_ERROR(check_span(request));
  return device;
}

Result<Imports::Claimed> Imports::claim(const ImportRequest& request, ImportKind kind,
                                        const HandleValue& handle) {
  std::string identity(1, static_cast<char>(kind));
  identity.append(request.device_uuid.begin(), request.device_uuid.end());
  identity.append(handle.begin(), handle.end());
  MutexLock lock(core_->claims_mutex);
  std::erase_if(core_->claims, [](const auto& claim) { return claim.second.expired(); });
  std::weak_ptr<Claim::Entry>& known = core_->claims[identity];
  std::shared_ptr<Claim::Entry> entry = known.lock();
  if (entry == nullptr) {
    entry = std::make_shared<Claim::Entry>(Claim::Entry{request.owner, identity, {}});
    known = entry;
  } else if (entry->owner != request.owner) {
    return fail(Code::kPermissionDenied, "POOL_OWNED",
                "another worker has registered this allocation", request.field + ".handle");
  }
  Claimed out{Claim(entry), entry->memory.lock()};
  uint64_t end = 0;
  if (out.memory != nullptr && checked_add(request.offset_bytes, request.bytes, end) &&
      end > out.memory->bytes && kind == ImportKind::kCudaFabric)
    out.memory = nullptr;  // as much of it was mapped as the pools before needed
  return out;
}

Result<Imported> Imports::finish(const ImportRequest& request, ImportKind kind, Claim claim,
                                 std::shared_ptr<const DevicePool::Memory> memory) {
  KVFERRY_RETURN_IF_ERROR(check_fits(request, memory->bytes));
  if (claim.entry_ != nullptr) {
    MutexLock lock(core_->claims_mutex);
    // Another handle may lead to the same allocation: the address tells.
    for (const auto& [identity, known] : core_->claims) {
      const auto entry = known.lock();
      if (entry == nullptr || entry->owner == request.owner) continue;
      const auto theirs = entry->memory.lock();
      if (theirs != nullptr && theirs->base == memory->base)
        return fail(Code::kPermissionDenied, "POOL_OWNED",
                    "another worker has registered this allocation", request.field + ".handle");
    }
    claim.entry_->memory = memory;
  }
  Imported out;
  out.pool.reset(new DevicePool(kind, std::move(memory), request.offset_bytes, request.bytes));
  out.claim = std::move(claim);
  return out;
}

Result<Imported> Imports::import_ipc(const ImportRequest& request, const HandleValue& handle) {
  auto device = device_of(request, ImportKind::kCudaIpc);
  KVFERRY_RETURN_IF_ERROR(device);
  auto claimed = claim(request, ImportKind::kCudaIpc, handle);
  KVFERRY_RETURN_IF_ERROR(claimed);
  if (claimed->memory == nullptr) {
    cuda::CUipcMemHandle value{};
    static_assert(sizeof value == kHandleBytes);
    std::memcpy(&value, handle.data(), sizeof value);
    auto mapping = Mapping::open_ipc(*device, value, request.field + ".handle");
    KVFERRY_RETURN_IF_ERROR(mapping);
    claimed->memory = std::make_shared<DevicePool::Memory>(core_, std::move(*mapping),
                                                           claimed->claim.entry_->identity);
  }
  return finish(request, ImportKind::kCudaIpc, std::move(claimed->claim),
                std::move(claimed->memory));
}

Result<Imported> Imports::import_fds(const ImportRequest& request, std::vector<VmmPart> parts) {
  auto device = device_of(request, ImportKind::kCudaVmmFd);
  KVFERRY_RETURN_IF_ERROR(device);
  const uint64_t granularity = (*device)->facts().granularity;
  uint64_t total = 0;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    if (parts[i].bytes == 0 || parts[i].bytes % granularity != 0 ||
        !checked_add(total, parts[i].bytes, total))
      return invalid(request.field + ".bytes", "POOL_PART_INVALID",
                     "part " + std::to_string(i) + " has " + std::to_string(parts[i].bytes) +
                         " bytes, no multiple of the device's " + std::to_string(granularity));
  }
  if (parts.empty()) return invalid(request.field, "POOL_PART_INVALID", "no descriptor was sent");
  KVFERRY_RETURN_IF_ERROR(check_fits(request, total));
  auto mapping = Mapping::reserve(*device, total);
  KVFERRY_RETURN_IF_ERROR(mapping);
  for (const VmmPart& part : parts) {
    void* const handle = reinterpret_cast<void*>(static_cast<intptr_t>(part.fd.get()));
    KVFERRY_RETURN_IF_ERROR(mapping->add(handle, cuda::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                                         part.bytes, request.field));
  }
  KVFERRY_RETURN_IF_ERROR(mapping->open_access(devices_->all()));
  return finish(request, ImportKind::kCudaVmmFd, {},
                std::make_shared<DevicePool::Memory>(core_, std::move(*mapping), std::string()));
}

Result<Imported> Imports::import_fabric(const ImportRequest& request, const HandleValue& handle) {
  auto device = device_of(request, ImportKind::kCudaFabric);
  KVFERRY_RETURN_IF_ERROR(device);
  auto claimed = claim(request, ImportKind::kCudaFabric, handle);
  KVFERRY_RETURN_IF_ERROR(claimed);
  if (claimed->memory == nullptr) {
    const uint64_t end = request.offset_bytes + request.bytes;
    const uint64_t granularity = (*device)->facts().granularity;
    if (end > UINT64_MAX - granularity)
      return invalid(request.field + ".bytes", "POOL_SIZE_INVALID", "no such memory");
    const uint64_t total = round_up(end, granularity);
    cuda::CUmemFabricHandle value{};
    static_assert(sizeof value == kHandleBytes);
    std::memcpy(&value, handle.data(), sizeof value);
    auto mapping = Mapping::reserve(*device, total);
    KVFERRY_RETURN_IF_ERROR(mapping);
    KVFERRY_RETURN_IF_ERROR(
        mapping->add(&value, cuda::CU_MEM_HANDLE_TYPE_FABRIC, total, request.field + ".handle"));
    KVFERRY_RETURN_IF_ERROR(mapping->open_access(devices_->all()));
    claimed->memory = std::make_shared<DevicePool::Memory>(core_, std::move(*mapping),
                                                           claimed->claim.entry_->identity);
  }
  return finish(request, ImportKind::kCudaFabric, std::move(claimed->claim),
                std::move(claimed->memory));
}

Status Imports::read(const DevicePool& pool, uint64_t offset, std::span<std::byte> out,
                     Duration limit) {
  if (out.size() > Reader::kMaxBytes || out.size() > pool.bytes() ||
      offset > pool.bytes() - out.size())
    return invalid("offset_bytes", "OUT_OF_RANGE", "outside of the pool");
  const std::shared_ptr<const Device>& device = pool.memory_->device;
  if (device->down()) return tl::unexpected<Error>(device->down_error());
  auto reader = core_->take_reader(device);
  KVFERRY_RETURN_IF_ERROR(reader);
  const auto base = static_cast<cuda::CUdeviceptr>(reinterpret_cast<uintptr_t>(pool.base()));
  const Status status = (*reader)->read(base + offset, out, limit);
  core_->give_reader(std::move(*reader));
  return status;
}

}  // namespace kvferry::gpu
