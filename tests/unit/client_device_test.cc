// The client's device part over the fake driver, with a daemon's two ends as far as it needs them.
#include <grpcpp/grpcpp.h>
#include <sys/mman.h>

#include <catch2/catch.hpp>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "client/cpp/src/attachment.h"
#include "client/cpp/src/device_export.h"
#include "client/cpp/src/device_memory.h"
#include "client/cpp/src/device_words.h"
#include "client/cpp/src/gpu.h"
#include "kvferry/client.h"
#include "kvferry/v1/worker.grpc.pb.h"
#include "tests/fake_cuda/control.h"
#include "tests/unit/lifeline_support.h"

namespace kvferry::client {
namespace {

namespace pb = ::kvferry::v1;
using std::chrono::seconds;
using Deadline = std::chrono::steady_clock::time_point;

constexpr uint64_t kMiB = uint64_t{1} << 20;

Deadline soon() {
  return std::chrono::steady_clock::now() + seconds(20);
}

// Takes pools, challenges those whose handle is a value, and looks into their memory when they say
// that they are proven.
class Service final : public pb::WorkerService::Service {
 public:
  struct Pool {
    pb::PoolSpec spec;
    std::vector<uint64_t> part_bytes;
    std::vector<UniqueFd> fds;
    std::optional<pb::PoolChallenge> challenge;
  };

  Service(const fake_cuda::Control& control, std::map<std::string, uint64_t>& addresses)
      : control_(control), addresses_(addresses) {}

  grpc::Status RegisterPools(grpc::ServerContext* context, const pb::RegisterPoolsRequest* request,
                             pb::RegisterPoolsResponse* response) override {
    const auto session = session_of(*context);
    if (!session) return {grpc::StatusCode::UNAUTHENTICATED, "token"};
    std::lock_guard<std::mutex> lock(mutex);
    for (const pb::PoolSpec& spec : request->pools()) {
      Pool pool;
      pool.spec = spec;
      if (spec.kind() == pb::POOL_KIND_CUDA_IPC || spec.kind() == pb::POOL_KIND_CUDA_FABRIC) {
        pool.challenge.emplace();
        pool.challenge->set_pool(spec.name());
        pool.challenge->set_offset_bytes(challenge_at.value_or(
            spec.has_proof_offset_bytes() ? spec.proof_offset_bytes() : spec.bytes() / 2 + 3));
        pool.challenge->set_nonce("0123456789abcdef");
        *response->add_challenges() = *pool.challenge;
      } else {
        auto taken = session->take_pool(spec.name());
        if (!taken) return {grpc::StatusCode::NOT_FOUND, taken.error().message};
        for (auto& part : taken->parts) {
          pool.part_bytes.push_back(part.bytes);
          pool.fds.push_back(std::move(part.fd));
        }
      }
      pools[spec.name()] = std::move(pool);
    }
    return grpc::Status::OK;
  }

  grpc::Status ProvePools(grpc::ServerContext*, const pb::ProvePoolsRequest* request,
                          pb::ProvePoolsResponse*) override {
    std::lock_guard<std::mutex> lock(mutex);
    for (const std::string& name : request->pools()) {
      Pool& pool = pools.at(name);
      std::string found(16, '\0');
      if (!control_.peek(addresses_.at(name) + pool.challenge->offset_bytes(), found.data(), 16) ||
          found != pool.challenge->nonce())
        return {grpc::StatusCode::PERMISSION_DENIED, "wrong proof"};
      pool.challenge.reset();
    }
    return grpc::Status::OK;
  }

  grpc::Status RegisterLayout(grpc::ServerContext*, const pb::RegisterLayoutRequest* request,
                              pb::RegisterLayoutResponse*) override {
    std::lock_guard<std::mutex> lock(mutex);
    layouts.insert(request->instance());
    return grpc::Status::OK;
  }

  grpc::Status Unregister(grpc::ServerContext*, const pb::UnregisterRequest* request,
                          pb::UnregisterResponse* response) override {
    std::lock_guard<std::mutex> lock(mutex);
    for (const std::string& name : request->pools().names())
      response->set_existed(pools.erase(name) > 0 || response->existed());
    return grpc::Status::OK;
  }

  grpc::Status Submit(
      grpc::ServerContext*,
      grpc::ServerReaderWriter<pb::SubmitResponse, pb::SubmitRequest>* stream) override {
    pb::SubmitRequest request;
    while (stream->Read(&request)) {
      pb::SubmitResponse response;
      for (const pb::Operation& operation : request.operations()) {
        auto* result = response.add_results();
        result->set_op_id(operation.op_id());
        result->set_outcome(pb::OPERATION_OUTCOME_ACCEPTED);
        std::lock_guard<std::mutex> lock(mutex);
        operations.push_back(operation);
      }
      changed.notify_all();
      if (!stream->Write(response)) break;
    }
    return grpc::Status::OK;
  }

  // A pool that is registered, and proven where it has to be.
  bool has(const std::string& name) {
    std::lock_guard<std::mutex> lock(mutex);
    const auto it = pools.find(name);
    return it != pools.end() && !it->second.challenge;
  }
  pb::PoolSpec spec(const std::string& name) {
    std::lock_guard<std::mutex> lock(mutex);
    return pools.at(name).spec;
  }
  bool has_layout(const std::string& instance) {
    std::lock_guard<std::mutex> lock(mutex);
    return layouts.contains(instance);
  }

  std::mutex mutex;
  std::condition_variable changed;
  std::map<std::string, Pool> pools;
  std::set<std::string> layouts;
  std::vector<pb::Operation> operations;
  std::optional<uint64_t> challenge_at;
  rpc::Lifeline* lifeline = nullptr;

 private:
  std::shared_ptr<rpc::Session> session_of(const grpc::ServerContext& context) {
    const auto it = context.client_metadata().find("kvferry-token-bin");
    if (it == context.client_metadata().end() || lifeline == nullptr) return nullptr;
    return lifeline->find(std::span<const uint8_t>(
        reinterpret_cast<const uint8_t*>(it->second.data()), it->second.length()));
  }
  const fake_cuda::Control& control_;
  std::map<std::string, uint64_t>& addresses_;
};

class Daemon {
 public:
  Daemon(const rpc::TemporaryDirectory& directory, const fake_cuda::Control& control,
         std::map<std::string, uint64_t>& addresses, uint8_t boot)
      : config(rpc::lifeline_config(directory, boot)), service(control, addresses) {
    grpc::ServerBuilder builder;
    builder.AddListeningPort("unix:" + config.sockets[0].grpc_path,
                             grpc::InsecureServerCredentials());
    builder.RegisterService(&service);
    server = builder.BuildAndStart();
    REQUIRE(server);
    auto started = rpc::Lifeline::start(config, recorder);
    REQUIRE(started);
    lifeline = std::move(*started);
    service.lifeline = lifeline.get();
  }
  ~Daemon() {
    lifeline->stop();
    server->Shutdown(std::chrono::system_clock::now());
  }
  rpc::ControlPage& page() { return recorder.attached.back()->page(); }

  rpc::LifelineConfig config;
  rpc::Recorder recorder;
  Service service;
  std::unique_ptr<grpc::Server> server;
  std::unique_ptr<rpc::Lifeline> lifeline;
};

// A machine with GPUs, a daemon, a client, and a CUDA program around it: the test.
class Scene {
 public:
  explicit Scene(const fake_cuda::Setup& setup = {})
      : machine(KVFERRY_FAKE_CUDA_LIBRARY, setup),
        variable_("KVFERRY_CUDA_DRIVER", KVFERRY_FAKE_CUDA_LIBRARY) {
    restart(1);
    auto loaded = Gpus::load();
    REQUIRE(loaded);
    gpus = *loaded;
    gpu = *gpus->gpu(0);
    client = attach();
    before_ = machine.control().live();
  }
  ~Scene() {
    client.reset();
    gpu.reset();
    gpus.reset();
  }

  void stop() { daemon.reset(); }
  void restart(uint8_t boot) {
    stop();
    daemon = std::make_unique<Daemon>(directory, machine.control(), addresses, boot);
  }
  std::unique_ptr<Client> attach() {
    AttachOptions options;
    options.socket = daemon->config.sockets[0].path;
    options.name = "rank0";
    auto attached = Client::attach(options);
    REQUIRE(attached);
    return std::move(*attached);
  }
  std::vector<Event> take(std::size_t count) {
    std::vector<Event> out;
    std::vector<Event> some(4);
    const auto deadline = soon();
    while (out.size() < count && std::chrono::steady_clock::now() < deadline) {
      const std::size_t got = client->wait_any(some, deadline);
      out.insert(out.end(), some.begin(), some.begin() + static_cast<std::ptrdiff_t>(got));
    }
    return out;
  }
  Event wait_for(EventKind kind) {
    for (;;)
      for (const Event& event : take(1))
        if (event.kind == kind) return event;
  }

  // Of cuMemAlloc.
  uint64_t allocate(uint64_t bytes) {
    const Gpu::Current current(*gpu);
    cuda::CUdeviceptr address = 0;
    REQUIRE(gpu->api().cuMemAlloc(&address, bytes) == cuda::CUDA_SUCCESS);
    return address;
  }
  void free(uint64_t address) {
    const Gpu::Current current(*gpu);
    REQUIRE(gpu->api().cuMemFree(address) == cuda::CUDA_SUCCESS);
  }
  // Exports and says to the daemon where the pool lies.
  Status share(const std::string& name, uint64_t address, uint64_t bytes,
               std::optional<uint64_t> scratch = {}) {
    addresses[name] = address;
    return client->export_pool(name, reinterpret_cast<const void*>(address), bytes, {scratch});
  }
  std::string reason_of(uint64_t address, uint64_t bytes) {
    const auto described = describe(*gpus, address, bytes);
    return described ? "" : described.error().reason;
  }
  // What the client has taken and not given back. It keeps the device's context.
  std::string leaked() const {
    const fake_cuda::Counts now = machine.control().live();
    return now.total() - now.contexts == before_.total() - before_.contexts ? "" : now.to_string();
  }
  std::string bytes_at(uint64_t address, std::size_t count) {
    std::string out(count, '\0');
    REQUIRE(machine.control().peek(address, out.data(), count));
    return out;
  }

  struct Variable {
    Variable(const char* name, const char* value) : name_(name) { ::setenv(name, value, 1); }
    ~Variable() { ::unsetenv(name_); }
    const char* name_;
  };

  fake_cuda::Machine machine;
  Variable variable_;
  rpc::TemporaryDirectory directory;
  std::map<std::string, uint64_t> addresses;  // of pools that are challenged
  std::unique_ptr<Daemon> daemon;
  std::shared_ptr<Gpus> gpus;
  std::shared_ptr<const Gpu> gpu;
  std::unique_ptr<Client> client;

 private:
  fake_cuda::Counts before_{};
};

// Allocations of cuMemCreate behind each other in one range, as an allocator makes them.
class Range {
 public:
  Range(const Gpu& gpu, std::vector<uint64_t> parts, unsigned int handle_types)
      : gpu_(gpu), parts_(std::move(parts)) {
    const Gpu::Current current(gpu);
    const cuda::Api& api = gpu.api();
    for (const uint64_t bytes : parts_) bytes_ += bytes;
    cuda::CUdeviceptr address = 0;
    REQUIRE(api.cuMemAddressReserve(&address, bytes_, 0, 0, 0) == cuda::CUDA_SUCCESS);
    address_ = address;
    cuda::CUmemAllocationProp prop{};
    prop.type = cuda::CU_MEM_ALLOCATION_TYPE_PINNED;
    prop.requestedHandleTypes = static_cast<cuda::CUmemAllocationHandleType>(handle_types);
    prop.location = {cuda::CU_MEM_LOCATION_TYPE_DEVICE, gpu.handle()};
    const cuda::CUmemAccessDesc access{prop.location, cuda::CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    uint64_t at = address_;
    for (const uint64_t bytes : parts_) {
      cuda::CUmemGenericAllocationHandle handle = 0;
      REQUIRE(api.cuMemCreate(&handle, bytes, &prop, 0) == cuda::CUDA_SUCCESS);
      REQUIRE(api.cuMemMap(at, bytes, 0, handle, 0) == cuda::CUDA_SUCCESS);
      REQUIRE(api.cuMemSetAccess(at, bytes, &access, 1) == cuda::CUDA_SUCCESS);
      REQUIRE(api.cuMemRelease(handle) == cuda::CUDA_SUCCESS);  // the mapping keeps it
      at += bytes;
    }
  }
  ~Range() {
    const Gpu::Current current(gpu_);
    uint64_t at = address_;
    for (const uint64_t bytes : parts_) {
      static_cast<void>(gpu_.api().cuMemUnmap(at, bytes));
      at += bytes;
    }
    static_cast<void>(gpu_.api().cuMemAddressFree(address_, bytes_));
  }
  uint64_t address() const { return address_; }

 private:
  const Gpu& gpu_;
  const std::vector<uint64_t> parts_;
  uint64_t bytes_ = 0;
  uint64_t address_ = 0;
};

constexpr unsigned int kFd = cuda::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
constexpr unsigned int kFabric = cuda::CU_MEM_HANDLE_TYPE_FABRIC;

LayoutRegistration layout_on(const std::string& instance, const std::string& pool) {
  LayoutRegistration registration;
  registration.instance = instance;
  registration.layout.pools = {{pool, kMiB}};
  return registration;
}

}  // namespace

TEST_CASE("cudaMalloc memory goes by its IPC handle and its place in the allocation") {
  Scene scene;
  const uint64_t base = scene.allocate(4 * kMiB);
  const uint64_t pool = base + kMiB + 512;
  const std::string zeros(16, '\0');
  REQUIRE(scene.machine.control().poke(pool + kMiB / 2 + 3, zeros.data(), 16));
  const Status shared = scene.share("kv", pool, kMiB);
  INFO((shared ? "" : shared.error().to_string()));
  REQUIRE(shared);
  CHECK(scene.daemon->service.has("kv"));
  const pb::PoolSpec spec = scene.daemon->service.spec("kv");
  CHECK(spec.kind() == pb::POOL_KIND_CUDA_IPC);
  CHECK(spec.offset_bytes() == kMiB + 512);
  CHECK(spec.bytes() == kMiB);
  CHECK(spec.device_uuid() == scene.gpu->uuid());
  CHECK_FALSE(spec.has_proof_offset_bytes());
  cuda::CUipcMemHandle handle{};
  {
    const Gpu::Current current(*scene.gpu);
    REQUIRE(scene.gpu->api().cuIpcGetMemHandle(&handle, base) == cuda::CUDA_SUCCESS);
  }
  CHECK(spec.handle() == std::string(handle.reserved, sizeof handle.reserved));
  // The proof is gone again.
  CHECK(scene.bytes_at(pool + kMiB / 2 + 3, 16) == zeros);
  CHECK(scene.share("kv", pool, kMiB).error().reason == "POOL_EXISTS");
  const std::string names[] = {"kv"};
  REQUIRE(scene.client->unregister_pools(names));
  CHECK_FALSE(scene.daemon->service.has("kv"));
  scene.free(base);
  CHECK(scene.leaked() == "");
}

TEST_CASE("a proof is written where the worker wants it and nowhere else") {
  Scene scene;
  const uint64_t base = scene.allocate(kMiB);
  CHECK(scene.share("kv", base, kMiB, kMiB - 15).error().reason == "SCRATCH_OUT_OF_RANGE");
  REQUIRE(scene.share("kv", base, kMiB, 4096));
  CHECK(scene.daemon->service.spec("kv").proof_offset_bytes() == 4096);
  scene.daemon->service.challenge_at = 8192;
  const uint64_t calls = scene.machine.control().calls("cuMemcpyHtoDAsync");
  CHECK(scene.share("other", base, kMiB, 4096).error().reason == "POOL_CHALLENGE");
  CHECK(scene.machine.control().calls("cuMemcpyHtoDAsync") == calls);
  CHECK_FALSE(scene.daemon->service.pools.contains("other"));
  // Outside of the pool.
  scene.daemon->service.challenge_at = kMiB - 15;
  CHECK(scene.share("other", base, kMiB).error().reason == "POOL_CHALLENGE");
  scene.free(base);
}

TEST_CASE("memory of the client goes as a descriptor, without a proof") {
  Scene scene;
  auto pool = scene.client->alloc_device_pool("kv", 3 * kMiB, 0);
  REQUIRE(pool);
  CHECK(pool->bytes == 3 * kMiB);
  CHECK(scene.daemon->service.has("kv"));
  const pb::PoolSpec spec = scene.daemon->service.spec("kv");
  CHECK(spec.kind() == pb::POOL_KIND_CUDA_VMM_FD);
  CHECK(spec.offset_bytes() == 0);
  CHECK(spec.handle().empty());
  CHECK(spec.device_uuid() == scene.gpu->uuid());
  REQUIRE(scene.daemon->service.pools["kv"].part_bytes == std::vector<uint64_t>{4 * kMiB});
  CHECK(scene.bytes_at(pool->address + 3 * kMiB - 64, 64) == std::string(64, '\0'));
  CHECK(scene.machine.control().calls("cuIpcGetMemHandle") == 0);
  CHECK(scene.client->alloc_device_pool("kv", kMiB, 0).error().reason == "POOL_EXISTS");
  CHECK(scene.client->alloc_device_pool("x", kMiB, 7).error().reason == "DEVICE_UNKNOWN");
  CHECK(scene.client->alloc_device_pool("x", 0, 0).error().reason == "SIZE_INVALID");
  CHECK(scene.client->alloc_device_pool("x", uint64_t{1} << 40, 0).error().reason ==
        "CUDA_OUT_OF_MEMORY");
  const std::string names[] = {"kv"};
  REQUIRE(scene.client->unregister_pools(names));
  CHECK(scene.leaked() == "");
}

TEST_CASE("a range of many allocations goes as its parts, in order") {
  Scene scene;
  std::vector<uint64_t> parts(18, 2 * kMiB);
  parts[0] = 4 * kMiB;
  const Range range(*scene.gpu, parts, kFd);
  // From the middle of the first to the middle of the last but one.
  const uint64_t begin = range.address() + 3 * kMiB;
  REQUIRE(scene.share("kv", begin, 32 * kMiB + 5));
  const pb::PoolSpec spec = scene.daemon->service.spec("kv");
  CHECK(spec.offset_bytes() == 3 * kMiB);
  CHECK(spec.bytes() == 32 * kMiB + 5);
  CHECK(scene.daemon->service.pools["kv"].part_bytes ==
        std::vector<uint64_t>(parts.begin(), parts.end() - 1));
  // Each descriptor is of its place: what is written there is read through it.
  const Gpu::Current current(*scene.gpu);
  const cuda::Api& api = scene.gpu->api();
  for (std::size_t i = 0; i < 17; ++i) {
    const uint64_t at = range.address() + (i == 0 ? 0 : (4 + 2 * (i - 1)) * kMiB);
    const std::string text = "part " + std::to_string(100 + i);
    REQUIRE(scene.machine.control().poke(at + 77, text.data(), text.size()));
    cuda::CUmemGenericAllocationHandle handle = 0;
    void* const fd =
        reinterpret_cast<void*>(intptr_t{scene.daemon->service.pools["kv"].fds[i].get()});
    REQUIRE(api.cuMemImportFromShareableHandle(
                &handle, fd, cuda::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) == cuda::CUDA_SUCCESS);
    cuda::CUdeviceptr mapped = 0;
    REQUIRE(api.cuMemAddressReserve(&mapped, parts[i], 0, 0, 0) == cuda::CUDA_SUCCESS);
    REQUIRE(api.cuMemMap(mapped, parts[i], 0, handle, 0) == cuda::CUDA_SUCCESS);
    CHECK(scene.bytes_at(mapped + 77, text.size()) == text);
    CHECK(api.cuMemUnmap(mapped, parts[i]) == cuda::CUDA_SUCCESS);
    CHECK(api.cuMemAddressFree(mapped, parts[i]) == cuda::CUDA_SUCCESS);
    CHECK(api.cuMemRelease(handle) == cuda::CUDA_SUCCESS);
  }
}

TEST_CASE("memory that has fabric handles only goes by value") {
  Scene scene;
  const Range range(*scene.gpu, {2 * kMiB, 2 * kMiB}, kFabric);
  REQUIRE(scene.share("kv", range.address() + 4096, kMiB, 0));
  const pb::PoolSpec spec = scene.daemon->service.spec("kv");
  CHECK(spec.kind() == pb::POOL_KIND_CUDA_FABRIC);
  CHECK(spec.handle().size() == 64);
  CHECK(spec.offset_bytes() == 4096);
  CHECK(scene.daemon->service.has("kv"));
  CHECK(scene.share("two", range.address(), 4 * kMiB).error().reason == "POOL_PARTS");
  // Where both are allowed the descriptor is taken.
  const Range both(*scene.gpu, {2 * kMiB}, kFabric | kFd);
  REQUIRE(scene.share("both", both.address(), kMiB));
  CHECK(scene.daemon->service.spec("both").kind() == pb::POOL_KIND_CUDA_VMM_FD);
}

TEST_CASE("memory that cannot be shared is refused with what it is") {
  Scene scene;
  const uint64_t base = scene.allocate(2 * kMiB);
  CHECK(scene.reason_of(base, 2 * kMiB + 1) == "POOL_TOO_SMALL");
  CHECK(scene.reason_of(base + kMiB, 2 * kMiB) == "POOL_TOO_SMALL");
  CHECK(scene.reason_of(base, 0) == "SIZE_INVALID");
  CHECK(scene.reason_of(base, ~uint64_t{0}) == "SIZE_INVALID");
  std::vector<std::byte> host(kMiB);
  const auto address = reinterpret_cast<uint64_t>(host.data());
  CHECK(scene.reason_of(address, 64) == "POINTER_NOT_DEVICE");
  CHECK(scene.reason_of(0, 64) == "POINTER_NOT_DEVICE");
  {
    const Gpu::Current current(*scene.gpu);
    REQUIRE(scene.gpu->api().cuMemHostRegister(host.data(), host.size(), 0) == cuda::CUDA_SUCCESS);
    CHECK(scene.reason_of(address, 64) == "POINTER_NOT_DEVICE");
    REQUIRE(scene.gpu->api().cuMemHostUnregister(host.data()) == cuda::CUDA_SUCCESS);
  }
  const Range private_range(*scene.gpu, {2 * kMiB}, 0);
  CHECK(scene.reason_of(private_range.address(), kMiB) == "POINTER_NOT_EXPORTABLE");
  CHECK(describe(*scene.gpus, private_range.address(), kMiB)
            .error()
            .message.find("expandable_segments") != std::string::npos);
  const Range range(*scene.gpu, {2 * kMiB, 2 * kMiB}, kFd);
  CHECK(scene.reason_of(range.address(), 5 * kMiB) == "POOL_TOO_SMALL");

  // What the fake driver has no memory of, told by its attributes.
  auto& api = const_cast<cuda::Api&>(scene.gpus->driver().api());
  const auto real = api.cuPointerGetAttribute;
  static decltype(api.cuPointerGetAttribute) original;
  static cuda::CUpointer_attribute changed;
  original = real;
  api.cuPointerGetAttribute = [](void* value, cuda::CUpointer_attribute which,
                                 cuda::CUdeviceptr pointer) {
    const auto result = original(value, which, pointer);
    if (which == changed) *static_cast<uint32_t*>(value) = 1;
    return result;
  };
  changed = cuda::CU_POINTER_ATTRIBUTE_IS_MANAGED;
  CHECK(scene.reason_of(base, kMiB) == "POINTER_MANAGED");
  changed = cuda::CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE;
  CHECK(scene.reason_of(base, kMiB) == "POINTER_STREAM_ORDERED");
  api.cuPointerGetAttribute = real;
  scene.free(base);
  CHECK(scene.client->attached());
}

TEST_CASE("whatever call of the driver fails, nothing is registered and nothing kept") {
  Scene scene;
  const uint64_t base = scene.allocate(kMiB);
  const Range range(*scene.gpu, {2 * kMiB}, kFd);
  const fake_cuda::Counts before = scene.machine.control().live();
  const auto try_all = [&](const auto& attempt) {
    for (uint64_t n = 1;; ++n) {
      REQUIRE(n < 200);
      const uint64_t calls = scene.machine.control().calls();
      scene.machine.control().fail("", n, cuda::CUDA_ERROR_UNKNOWN);
      const bool done = attempt();
      const bool reached = scene.machine.control().calls() - calls >= n;
      scene.machine.control().fail("", 0, 0);
      if (done) {
        const std::string names[] = {"kv"};
        REQUIRE(scene.client->unregister_pools(names));
      }
      // A call that only tidies up may fail unnoticed; then something may be left.
      if (!done) CHECK_FALSE(scene.daemon->service.has("kv"));
      if (!reached) return n;
    }
  };
  CHECK(try_all([&] { return scene.share("kv", base, kMiB).ok(); }) > 10);
  CHECK(try_all([&] { return scene.share("kv", range.address(), kMiB).ok(); }) > 5);
  CHECK(scene.client->attached());
  // And a plain success afterwards leaves nothing.
  const fake_cuda::Counts middle = scene.machine.control().live();
  REQUIRE(scene.share("kv", base, kMiB));
  const std::string names[] = {"kv"};
  REQUIRE(scene.client->unregister_pools(names));
  CHECK(scene.machine.control().live().total() == middle.total());
  CHECK(middle.allocations == before.allocations);
}

TEST_CASE("a GPU that is stuck ends an export in time") {
  Scene scene;
  AttachOptions options;
  options.socket = scene.daemon->config.sockets[0].path;
  options.name = "rank1";
  options.call_timeout = milliseconds(100);
  auto client = Client::attach(options);
  REQUIRE(client);
  const uint64_t base = scene.allocate(kMiB);
  scene.addresses["kv"] = base;
  scene.machine.control().hold();
  const auto status = (*client)->export_pool("kv", reinterpret_cast<const void*>(base), kMiB);
  REQUIRE_FALSE(status);
  CHECK(status.error().reason == "GPU_TIMEOUT");
  CHECK_FALSE(scene.daemon->service.pools.contains("kv"));
  scene.machine.control().release();
}

TEST_CASE("memory that is still being cleared when an allocation has to end stays mapped") {
  Scene scene;
  scene.machine.control().hold();
  const auto late = std::chrono::steady_clock::now() + milliseconds(20);
  const auto memory = DeviceMemory::allocate(scene.gpu, kMiB, late);
  REQUIRE_FALSE(memory);
  CHECK(memory.error().reason == "GPU_TIMEOUT");
  CHECK(scene.machine.control().live().mappings == 1);
  scene.machine.control().release();
  // The clearing ends well, and with it all of the device's work before this.
  scene.free(scene.allocate(kMiB));
}

TEST_CASE("streams set timeline words and wait for done words") {
  Scene scene({.devices = 2});
  const uint32_t word = *scene.client->alloc_word();
  const uint32_t done = *scene.client->alloc_done_word();
  CHECK(scene.client->device_word_address(word) == 0);
  CHECK(scene.client->signal_on_stream(nullptr, word, 1).error().reason == "WORDS_NOT_REGISTERED");
  REQUIRE(scene.client->register_words_with_device(1));
  REQUIRE(scene.client->register_words_with_device(1));
  CHECK(scene.client->register_words_with_device(0).error().reason == "WORDS_REGISTERED");
  CHECK(scene.client->device_word_address(word) != 0);
  CHECK(scene.client->device_word_address(16) == 0);
  CHECK(scene.client->device_done_address(16) == 0);
  CHECK(scene.client->signal_on_stream(nullptr, 16, 1).error().reason == "WORD_OUT_OF_RANGE");

  const auto gpu = *scene.gpus->gpu(1);
  const Gpu::Current current(*gpu);
  const cuda::Api& api = gpu->api();
  cuda::CUstream stream = nullptr;
  REQUIRE(api.cuStreamCreate(&stream, cuda::CU_STREAM_NON_BLOCKING) == cuda::CUDA_SUCCESS);
  REQUIRE(scene.client->wait_on_stream(stream, done, 5));
  REQUIRE(scene.client->signal_on_stream(stream, word, 41));
  // The stream stands before the done word.
  CHECK(api.cuStreamQuery(stream) == cuda::CUDA_ERROR_NOT_READY);
  CHECK(scene.daemon->page().load_timeline(word) == 0U);
  scene.daemon->page().store_done(done, 5);
  CHECK(api.cuStreamSynchronize(stream) == cuda::CUDA_SUCCESS);
  CHECK(scene.daemon->page().load_timeline(word) == 41U);
  // By hand, as a kernel or another library would.
  REQUIRE(api.cuStreamWriteValue64(stream, scene.client->device_word_address(word), 42, 0) ==
          cuda::CUDA_SUCCESS);
  CHECK(api.cuStreamSynchronize(stream) == cuda::CUDA_SUCCESS);
  CHECK(scene.daemon->page().load_timeline(word) == 42U);
  CHECK(api.cuStreamDestroy(stream) == cuda::CUDA_SUCCESS);
  scene.client.reset();
  CHECK(scene.machine.control().live().registrations == 0);
}

TEST_CASE("what waits for a daemon that has ended goes on") {
  Scene scene;
  AttachOptions options;
  options.socket = scene.daemon->config.sockets[0].path;
  options.name = "rank1";
  auto attachment = Attachment::connect(options);
  REQUIRE(attachment);
  auto words = DeviceWords::make(scene.gpu, (*attachment)->words());
  REQUIRE(words);
  const Gpu::Current current(*scene.gpu);
  cuda::CUstream stream = nullptr;
  REQUIRE(scene.gpu->api().cuStreamCreate(&stream, 0) == cuda::CUDA_SUCCESS);
  REQUIRE((*words)->wait(stream, 3, 1000));
  // The words outlive the attachment.
  const std::shared_ptr<const WordsFile> file = (*attachment)->words();
  attachment->reset();
  CHECK(scene.gpu->api().cuStreamQuery(stream) == cuda::CUDA_ERROR_NOT_READY);
  file->release_waiters();
  CHECK(scene.gpu->api().cuStreamSynchronize(stream) == cuda::CUDA_SUCCESS);
  CHECK(scene.gpu->api().cuStreamDestroy(stream) == cuda::CUDA_SUCCESS);
}

TEST_CASE("an event is handed over with an operation") {
  Scene scene;
  cuda::CUevent event = nullptr;
  cuda::CUevent plain = nullptr;
  {
    const Gpu::Current current(*scene.gpu);
    REQUIRE(scene.gpu->api().cuEventCreate(
                &event, cuda::CU_EVENT_INTERPROCESS | cuda::CU_EVENT_DISABLE_TIMING) ==
            cuda::CUDA_SUCCESS);
    REQUIRE(scene.gpu->api().cuEventCreate(&plain, cuda::CU_EVENT_DISABLE_TIMING) ==
            cuda::CUDA_SUCCESS);
  }
  // Also from a thread that has never seen CUDA.
  const auto handle = scene.client->export_event(event);
  INFO((handle ? "" : handle.error().to_string()));
  REQUIRE(handle);
  CHECK(handle->size() == 64);
  CHECK(scene.client->export_event(plain).error().reason == "EVENT_NOT_SHAREABLE");
  SendRequest send;
  send.key.instance = "prefill";
  send.key.id = "t1";
  send.layout = {"prefill", 0};
  send.num_tokens = 64;
  send.tokens = {0, 64};
  send.ready = ReadyCondition::cuda_event(*handle);
  REQUIRE(scene.client->send(send));
  Service& service = scene.daemon->service;
  std::unique_lock<std::mutex> lock(service.mutex);
  REQUIRE(service.changed.wait_for(lock, seconds(20), [&] { return !service.operations.empty(); }));
  CHECK(service.operations[0].send().ready().cuda_ipc_event().handle() == *handle);
}

TEST_CASE("after a restart pools of a GPU are exported again, pages in use are not touched") {
  Scene scene;
  const uint64_t base = scene.allocate(2 * kMiB);
  REQUIRE(scene.client->alloc_device_pool("own", kMiB, 0));
  REQUIRE(scene.client->alloc_pool("host", 8192));
  REQUIRE(scene.share("scratch", base, kMiB, 4096));
  REQUIRE(scene.share("busy", base + kMiB, kMiB));
  REQUIRE(scene.client->register_layout(layout_on("on-own", "own")));
  REQUIRE(scene.client->register_layout(layout_on("on-busy", "busy")));
  const uint32_t word = *scene.client->alloc_word();
  REQUIRE(scene.client->register_words_with_device());
  const std::string page(64, 'k');  // the cache, from now on
  const uint64_t challenged = base + kMiB + kMiB / 2 + 3;
  REQUIRE(scene.machine.control().poke(challenged, page.data(), page.size()));
  {
    const Gpu::Current current(*scene.gpu);
    cuda::CUstream stream = nullptr;
    REQUIRE(scene.gpu->api().cuStreamCreate(&stream, 0) == cuda::CUDA_SUCCESS);
    REQUIRE(scene.client->signal_on_stream(stream, word, 77));
    REQUIRE(scene.gpu->api().cuStreamSynchronize(stream) == cuda::CUDA_SUCCESS);
    REQUIRE(scene.gpu->api().cuStreamDestroy(stream) == cuda::CUDA_SUCCESS);
  }
  const uint64_t old_address = scene.client->device_word_address(word);
  scene.stop();
  CHECK(scene.wait_for(EventKind::kDaemonRestarted).transfer == 0);
  CHECK(scene.client->device_word_address(word) == 0);
  CHECK(scene.client->restore_pools().error().reason == "NOT_ATTACHED");

  scene.restart(2);
  const Event reattached = scene.wait_for(EventKind::kReattached);
  REQUIRE(reattached.error);
  CHECK(reattached.error->reason == "POOLS_LEFT_OUT");
  CHECK(reattached.error->message.find("busy") != std::string::npos);
  CHECK(reattached.error->message.find("scratch,") == std::string::npos);
  Service& service = scene.daemon->service;
  CHECK(service.has("own"));
  CHECK(service.has("host"));
  CHECK(service.has("scratch"));
  CHECK_FALSE(service.pools.contains("busy"));
  CHECK(service.has_layout("on-own"));
  CHECK_FALSE(service.has_layout("on-busy"));
  CHECK(scene.bytes_at(challenged, page.size()) == page);
  // What a stream had set stands in the new page, and the old one may still be written.
  CHECK(scene.daemon->page().load_timeline(word) == 77U);
  CHECK(scene.client->device_word_address(word) != 0);
  CHECK(scene.machine.control().live().registrations == 2);
  CHECK(scene.client->device_word_address(word) != old_address);

  REQUIRE(scene.client->restore_pools());
  CHECK(service.has("busy"));
  CHECK(service.has_layout("on-busy"));
  CHECK(scene.bytes_at(challenged, page.size()) == page);
  REQUIRE(scene.client->restore_pools());
}

TEST_CASE("memory that is gone after a restart is left out, the rest is registered") {
  Scene scene;
  const uint64_t base = scene.allocate(kMiB);
  REQUIRE(scene.share("gone", base, kMiB, 0));
  REQUIRE(scene.client->alloc_device_pool("own", kMiB, 0));
  REQUIRE(scene.client->register_layout(layout_on("on-gone", "gone")));
  REQUIRE(scene.client->register_layout(layout_on("on-own", "own")));
  scene.stop();
  scene.wait_for(EventKind::kDaemonRestarted);
  scene.free(base);
  scene.restart(2);
  const Event reattached = scene.wait_for(EventKind::kReattached);
  REQUIRE(reattached.error);
  CHECK(reattached.error->reason == "POINTER_NOT_DEVICE");
  CHECK(scene.daemon->service.has("own"));
  CHECK(scene.daemon->service.has_layout("on-own"));
  CHECK_FALSE(scene.daemon->service.has_layout("on-gone"));
  CHECK(scene.client->restore_pools().error().reason == "POINTER_NOT_DEVICE");
  const std::string names[] = {"gone"};
  REQUIRE(scene.client->unregister_pools(names));
  CHECK(scene.client->restore_pools());
}

TEST_CASE("without a driver only what needs one fails") {
  Scene scene;
  const Scene::Variable none("KVFERRY_CUDA_DRIVER", "/nonexistent/libcuda.so");
  auto status = scene.client->export_pool("kv", reinterpret_cast<const void*>(uint64_t{4096}), 64);
  CHECK(status.error().code == Code::kFailedPrecondition);
  CHECK(status.error().reason == "NO_CUDA_DRIVER");
  CHECK(status.error().message.find("/nonexistent/libcuda.so") != std::string::npos);
  CHECK(scene.client->alloc_pool("host", 4096));
  ::setenv("KVFERRY_CUDA_DRIVER", KVFERRY_FAKE_CUDA_LIBRARY, 1);
  CHECK(scene.client->alloc_device_pool("kv", 4096, 0));
}

}  // namespace kvferry::client
