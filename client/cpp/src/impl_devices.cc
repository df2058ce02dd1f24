// The parts of a Client that need a GPU: pools in its memory, words for its streams, its events.
#include <algorithm>
#include <array>
#include <cstring>

#include "client/cpp/src/impl.h"

namespace kvferry::client {
namespace {

constexpr std::size_t kProofBytes = 16;

using Stub = pb::WorkerService::Stub;

pb::PoolKind wire(DeviceKind kind) {
  switch (kind) {
    case DeviceKind::kIpc:
      return pb::POOL_KIND_CUDA_IPC;
    case DeviceKind::kFabric:
      return pb::POOL_KIND_CUDA_FABRIC;
    case DeviceKind::kVmmFd:
      break;
  }
  return pb::POOL_KIND_CUDA_VMM_FD;
}

Error left_out(const std::string& pools) {
  return {Code::kFailedPrecondition,
          "POOLS_LEFT_OUT",
          "the daemon wants a proof written into pages that may be in use: " + pools +
              "; call restore_pools when nothing uses them, or export with a scratch_offset",
          "pools",
          {}};
}

bool uses(const pb::RegisterLayoutRequest& layout, const std::set<std::string>& pools) {
  const auto& spans = layout.layout().pools();
  return std::any_of(spans.begin(), spans.end(),
                     [&](const pb::PoolSpan& span) { return pools.contains(span.name()); });
}

}  // namespace

Result<std::shared_ptr<Gpus>> Client::Impl::gpus() {
  {
    MutexLock lock(mutex_);
    if (gpus_) return gpus_;
  }
  auto loaded = Gpus::load();
  if (!loaded) return loaded;
  MutexLock lock(mutex_);
  if (!gpus_) gpus_ = std::move(*loaded);
  return gpus_;
}

// ---- one pool ----------------------------------------------------------------------------------

Status Client::Impl::send_parts(const Connection& connection, const std::string& name,
                                const DeviceExport& exported, Deadline deadline) {
  // Few descriptors are open at a time: a large range may have thousands of allocations.
  for (std::size_t first = 0; first < exported.parts.size(); first += lifeline::kMaxDescriptors) {
    const std::size_t count =
        std::min(exported.parts.size() - first, std::size_t{lifeline::kMaxDescriptors});
    std::vector<GuardedFd> fds;
    std::vector<PoolToSend> parts;
    for (std::size_t i = first; i < first + count; ++i) {
      auto fd = export_part(*exported.gpu, exported.parts[i]);
      if (!fd) return fd.error();
      fds.emplace_back(std::move(*fd));
      parts.push_back({name, lifeline::PoolKind::kCudaVmmFd, exported.parts[i].bytes,
                       fds.back().get(), static_cast<uint32_t>(i)});
    }
    if (auto sent = connection.attachment->send_pools(parts, deadline); !sent) return sent;
  }
  return {};
}

Status Client::Impl::register_device(const Connection& connection, const std::string& name,
                                     const DevicePool& pool, Pages pages) {
  auto loaded = gpus();
  if (!loaded) return loaded.error();
  auto exported = describe(**loaded, pool.pointer, pool.bytes);
  if (!exported) return exported.error();
  const bool proven = is_value(exported->kind);
  if (proven && pages == Pages::kInUse && !pool.scratch_offset) return left_out(name);
  const Deadline deadline = std::chrono::steady_clock::now() + options_.call_timeout;
  if (!proven)
    if (auto sent = send_parts(connection, name, *exported, deadline); !sent) return sent;
  pb::RegisterPoolsRequest request;
  pb::PoolSpec* spec = request.add_pools();
  spec->set_name(name);
  spec->set_kind(wire(exported->kind));
  spec->set_bytes(pool.bytes);
  spec->set_offset_bytes(exported->offset);
  spec->set_handle(exported->handle);
  spec->set_device_uuid(exported->gpu->uuid());
  if (proven && pool.scratch_offset) spec->set_proof_offset_bytes(*pool.scratch_offset);
  auto response = connection.call(&Stub::RegisterPools, request, options_.call_timeout);
  if (!response) return response.error();
  for (const pb::PoolChallenge& challenge : response->challenges()) {
    Status answered = prove(connection, challenge, *exported, pool, deadline);
    if (answered) continue;
    // The daemon would drop it by itself, but only after some seconds.
    pb::UnregisterRequest back;
    back.mutable_pools()->add_names(name);
    static_cast<void>(connection.call(&Stub::Unregister, back, options_.call_timeout));
    return answered;
  }
  return {};
}

Status Client::Impl::prove(const Connection& connection, const pb::PoolChallenge& challenge,
                           const DeviceExport& exported, const DevicePool& pool,
                           Deadline deadline) {
  const uint64_t offset = challenge.offset_bytes();
  // Never into pages that may be in use, whatever is asked.
  if (challenge.nonce().size() != kProofBytes || pool.bytes < kProofBytes ||
      offset > pool.bytes - kProofBytes || (pool.scratch_offset && *pool.scratch_offset != offset))
    return Error{Code::kInternal,
                 "POOL_CHALLENGE",
                 "the daemon asks for a proof that cannot be written",
                 challenge.pool(),
                 {}};
  const Gpu& gpu = *exported.gpu;
  const uint64_t address = pool.pointer + offset;
  std::array<std::byte, kProofBytes> before{};
  if (auto read = gpu.read(address, before, deadline); !read) return read;
  const auto nonce = std::as_bytes(std::span(challenge.nonce()));
  Status status = gpu.write(address, nonce, deadline);
  if (status) {
    pb::ProvePoolsRequest request;
    request.add_pools(challenge.pool());
    auto response = connection.call(&Stub::ProvePools, request, options_.call_timeout);
    if (!response) status = response.error();
  }
  // What engines rely on, such as zeros in pages that are not filled yet, is there again.
  Status back = gpu.write(address, before, deadline);
  return status ? back : status;
}

// ---- pools -------------------------------------------------------------------------------------

Status Client::Impl::add_device_pool(std::string_view name, const DevicePool& pool,
                                     std::shared_ptr<DeviceMemory> memory) {
  const std::shared_ptr<Connection> connection = current();
  if (!connection) return not_attached();
  const Error exists{Code::kAlreadyExists, "POOL_EXISTS", "a pool of this name exists", "name", {}};
  {
    MutexLock lock(mutex_);
    if (pools_.contains(name)) return exists;
  }
  if (auto done = register_device(*connection, std::string(name), pool, Pages::kUnused); !done)
    return done;
  Pool entry;
  entry.bytes = pool.bytes;
  entry.device = pool;
  entry.memory = std::move(memory);
  MutexLock lock(mutex_);
  // The registration was with a daemon that is gone, and the next one does not know of it.
  if (connection_ != connection) return not_attached();
  if (!pools_.try_emplace(std::string(name), std::move(entry)).second) return exists;
  return {};
}

Status Client::Impl::export_device_pool(std::string_view name, uint64_t pointer, uint64_t bytes,
                                        const DevicePoolOptions& options) {
  if (!usable()) return not_attached();
  if (options.scratch_offset &&
      (bytes < kProofBytes || *options.scratch_offset > bytes - kProofBytes))
    return Error{Code::kInvalidArgument,
                 "SCRATCH_OUT_OF_RANGE",
                 "16 bytes from there do not lie in the pool",
                 "options.scratch_offset",
                 {}};
  return add_device_pool(name, {pointer, bytes, options.scratch_offset}, nullptr);
}

Result<DevicePoolMemory> Client::Impl::alloc_device_pool(std::string_view name, uint64_t bytes,
                                                         int device) {
  if (!current()) return not_attached();
  if (bytes == 0 || bytes > (uint64_t{1} << 46))
    return Error{Code::kInvalidArgument, "SIZE_INVALID", "a pool has 1 to 2^46 bytes", "bytes", {}};
  auto loaded = gpus();
  if (!loaded) return loaded.error();
  auto gpu = (*loaded)->gpu(device);
  if (!gpu) return gpu.error();
  auto memory =
      DeviceMemory::allocate(*gpu, bytes, std::chrono::steady_clock::now() + options_.call_timeout);
  if (!memory) return memory.error();
  const DevicePoolMemory out{(*memory)->address(), bytes, device};
  const std::shared_ptr<DeviceMemory> shared = std::move(*memory);
  if (auto added = add_device_pool(name, {out.address, bytes, {}}, shared); !added)
    return added.error();
  return out;
}

// ---- again, after a restart --------------------------------------------------------------------

Status Client::Impl::register_devices_again(const Connection& connection,
                                            std::optional<Error>& problem) {
  std::map<std::string, DevicePool> pools;
  {
    MutexLock lock(mutex_);
    for (auto& [name, pool] : pools_)
      if (pool.device) pools.emplace(name, *pool.device);
  }
  std::string waiting;
  for (const auto& [name, pool] : pools) {
    const Status done = register_device(connection, name, pool, Pages::kInUse);
    if (!done && done.error().code == Code::kUnavailable) return done;
    if (!done && done.error().reason == "POOLS_LEFT_OUT")
      waiting += (waiting.empty() ? "" : ", ") + name;
    else if (!done && !problem)
      problem = done.error();
    MutexLock lock(mutex_);
    if (const auto it = pools_.find(name); it != pools_.end()) it->second.left_out = !done;
  }
  if (!waiting.empty() && !problem) problem = left_out(waiting);
  return {};
}

Status Client::Impl::register_layouts_again(const Connection& connection,
                                            std::optional<Error>& problem) {
  std::vector<pb::RegisterLayoutRequest> layouts;
  {
    MutexLock lock(mutex_);
    std::set<std::string> missing;
    for (const auto& [name, pool] : pools_)
      if (pool.left_out) missing.insert(name);
    layouts_left_out_.clear();
    for (const auto& [key, request] : layouts_) {
      if (uses(request, missing))
        layouts_left_out_.insert(key);
      else
        layouts.push_back(request);
    }
  }
  for (const pb::RegisterLayoutRequest& request : layouts) {
    auto response = connection.call(&Stub::RegisterLayout, request, options_.call_timeout);
    if (response) continue;
    if (response.error().code == Code::kUnavailable) return response.error();
    if (!problem) problem = response.error();
  }
  return {};
}

Status Client::Impl::restore_pools() {
  const std::shared_ptr<Connection> connection = current();
  if (!connection) return not_attached();
  std::map<std::string, DevicePool> pools;
  {
    MutexLock lock(mutex_);
    for (const auto& [name, pool] : pools_)
      if (pool.left_out && pool.device) pools.emplace(name, *pool.device);
  }
  Status first;
  for (const auto& [name, pool] : pools) {
    const Status done = register_device(*connection, name, pool, Pages::kUnused);
    MutexLock lock(mutex_);
    if (connection_ != connection) return not_attached();
    if (const auto it = pools_.find(name); it != pools_.end()) it->second.left_out = !done;
    if (!done && first) first = done;
  }
  std::map<LayoutKey, pb::RegisterLayoutRequest> layouts;
  {
    MutexLock lock(mutex_);
    std::set<std::string> missing;
    for (const auto& [name, pool] : pools_)
      if (pool.left_out) missing.insert(name);
    for (const LayoutKey& key : layouts_left_out_)
      if (const auto it = layouts_.find(key); it != layouts_.end() && !uses(it->second, missing))
        layouts.insert(*it);
  }
  for (const auto& [key, request] : layouts) {
    auto response = connection->call(&Stub::RegisterLayout, request, options_.call_timeout);
    MutexLock lock(mutex_);
    if (connection_ != connection) return not_attached();
    if (response)
      layouts_left_out_.erase(key);
    else if (first)
      first = response.error();
  }
  return first;
}

// ---- words and events --------------------------------------------------------------------------

Status Client::Impl::register_words(const std::shared_ptr<Attachment>& attachment, int device) {
  auto loaded = gpus();
  if (!loaded) return loaded.error();
  auto gpu = (*loaded)->gpu(device);
  if (!gpu) return gpu.error();
  auto words = DeviceWords::make(*gpu, attachment->words());
  if (!words) return words.error();
  MutexLock lock(mutex_);
  device_words_.push_back(std::move(*words));
  return {};
}

Status Client::Impl::register_words_with_device(int device) {
  const std::shared_ptr<Connection> connection = current();
  if (!connection) return not_attached();
  {
    MutexLock lock(mutex_);
    if (words_device_ && *words_device_ != device)
      return Error{Code::kFailedPrecondition,
                   "WORDS_REGISTERED",
                   "the words are registered with device " + std::to_string(*words_device_),
                   "device",
                   {}};
  }
  if (device_words()) return {};
  if (auto done = register_words(connection->attachment, device); !done) return done;
  MutexLock lock(mutex_);
  words_device_ = device;
  return {};
}

std::shared_ptr<const DeviceWords> Client::Impl::device_words() const {
  const std::shared_ptr<Connection> connection = current();
  if (!connection) return nullptr;
  MutexLock lock(mutex_);
  for (const auto& words : device_words_)
    if (&words->file() == connection->attachment->words().get()) return words;
  return nullptr;
}

Result<std::string> Client::Impl::export_event(const void* event) {
  if (!usable()) return not_attached();
  auto loaded = gpus();
  if (!loaded) return loaded.error();
  const cuda::Driver& driver = (*loaded)->driver();
  // The call needs some context: the caller's if he has one.
  cuda::CUcontext context = nullptr;
  std::optional<Gpu::Current> ours;
  if (driver.api().cuCtxGetCurrent(&context) != cuda::CUDA_SUCCESS || context == nullptr) {
    int device = 0;
    {
      MutexLock lock(mutex_);
      device = words_device_.value_or(0);
    }
    auto gpu = (*loaded)->gpu(device);
    if (!gpu) return gpu.error();
    ours.emplace(**gpu);
    if (!*ours) return ours->error();
  }
  cuda::CUipcEventHandle handle{};
  const auto result = driver.api().cuIpcGetEventHandle(
      &handle, static_cast<cuda::CUevent>(const_cast<void*>(event)));
  if (result == cuda::CUDA_SUCCESS) return std::string(handle.reserved, sizeof handle.reserved);
  Error error = cuda_error(driver, result, "cuIpcGetEventHandle");
  error.field = "event";
  if (error.code == Code::kInvalidArgument) {
    error.reason = "EVENT_NOT_SHAREABLE";
    error.message +=
        "; make it with cudaEventInterprocess | cudaEventDisableTiming, in this process";
  }
  return error;
}

}  // namespace kvferry::client
