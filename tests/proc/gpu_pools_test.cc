// Workers' memory on GPUs in a real daemon, over the fake driver: kinds, proofs, owners, ends.
#include <poll.h>

#include <catch2/catch.hpp>
#include <filesystem>

#include "client/bench/daemons.h"
#include "client/cpp/src/connection.h"
#include "daemon/base/unique_fd.h"
#include "daemon/base/units.h"
#include "kernels/cuda/driver.h"
#include "kvferry/v1/admin.grpc.pb.h"
#include "tests/fake_cuda/control.h"
#include "tests/proc/bad_input_rows.h"
#include "tests/unit/gpu_exporter.h"

using namespace kvferry;
using bad_input::good_layout;
using bad_input::kPool;
using bad_input::kPoolBytes;
using Stub = v1::WorkerService::Stub;
using gpu_test::Exporter;
using std::chrono::seconds;

namespace {

constexpr const char* kLibrary = KVFERRY_FAKE_CUDA_LIBRARY;
constexpr uint64_t kMiB = 1U << 20;

fake_cuda::Setup two_gpus() {
  fake_cuda::Setup setup;
  setup.devices = 2;
  setup.memory_mb = 256;
  return setup;
}

// A daemon and a process with GPU memory on one fake machine; workers attach from the test.
class World {
 public:
  // `fail`: what fails in the daemon, as KVFERRY_FAKE_CUDA_FAIL has it.
  explicit World(const std::vector<std::string>& settings = {}, const std::string& fail = {})
      : machine(kLibrary, two_gpus()), memory(KVFERRY_GPU_EXPORTER, kLibrary) {
    char directory[] = "/tmp/kvferry-gpu-pools.XXXXXX";
    REQUIRE(::mkdtemp(directory) != nullptr);
    directory_ = directory;
    bench::DaemonOptions options;
    options.binary_directory = KVFERRY_BIN_DIR;
    options.settings = {"arena.bytes=16MiB", "arena.segment_bytes=16MiB", "gpu.enabled=on",
                        std::string("gpu.driver=") + kLibrary};
    options.settings.insert(options.settings.end(), settings.begin(), settings.end());
    ::setenv("KVFERRY_FAKE_CUDA_FAIL", fail.c_str(), 1);
    auto started = bench::DaemonProcess::start(directory_, {"subject", 0, "nobody", 9}, options);
    ::unsetenv("KVFERRY_FAKE_CUDA_FAIL");
    REQUIRE(started.ok());
    daemon = std::move(*started);
    const client::Status serving = daemon->wait_until_serving();
    INFO(daemon->log_tail());
    REQUIRE(serving.ok());
    for (int device = 0; device < 2; ++device) uuids_.push_back(uuid_of(device));
  }
  ~World() {
    daemon.reset();
    std::error_code error;
    std::filesystem::remove_all(directory_, error);
  }

  std::unique_ptr<client::Connection> attach(const std::string& name,
                                             client::WorkerRole role = client::WorkerRole::kRank) {
    client::AttachOptions options;
    options.socket = daemon->socket();
    options.name = name;
    options.role = role;
    options.attach_timeout = seconds(20);
    auto attachment = client::Attachment::connect(options);
    REQUIRE(attachment.ok());
    return std::make_unique<client::Connection>(std::move(*attachment));
  }

  v1::RegisterPoolsRequest pools(v1::PoolKind kind, const Exporter::Exported& from,
                                 uint64_t offset = 0, int device = 0) const {
    v1::RegisterPoolsRequest request;
    v1::PoolSpec& pool = *request.add_pools();
    pool.set_name(kPool);
    pool.set_kind(kind);
    pool.set_bytes(kPoolBytes);
    pool.set_offset_bytes(offset);
    pool.set_device_uuid(uuids_.at(static_cast<std::size_t>(device)));
    if (kind != v1::POOL_KIND_CUDA_VMM_FD) pool.set_handle(from.handle.data(), from.handle.size());
    return request;
  }

  // What operators see of the pools of all workers, as "worker/pool kind".
  std::string pool_list() const {
    grpc::ChannelArguments arguments;
    arguments.SetString(GRPC_ARG_DEFAULT_AUTHORITY, "localhost");
    const auto admin = v1::Admin::NewStub(grpc::CreateCustomChannel(
        "unix:" + daemon->admin_socket(), grpc::InsecureChannelCredentials(), arguments));
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + seconds(20));
    v1::ListWorkersResponse response;
    REQUIRE(admin->ListWorkers(&context, {}, &response).ok());
    std::string out;
    for (const auto& worker : response.workers())
      for (const auto& pool : worker.pools())
        out += worker.name() + "/" + pool.name() + " " + pool.kind() + ";";
    return out;
  }

  fake_cuda::Machine machine;
  Exporter memory;
  std::unique_ptr<bench::DaemonProcess> daemon;

 private:
  static std::string uuid_of(int device) {
    auto driver = cuda::Driver::load(kLibrary);
    REQUIRE(driver);
    cuda::CUuuid uuid{};
    REQUIRE((*driver)->api().cuDeviceGetUuid(&uuid, device) == cuda::CUDA_SUCCESS);
    return {uuid.bytes, sizeof uuid.bytes};
  }

  std::string directory_;
  std::vector<std::string> uuids_;
};

template <typename Condition>
bool becomes_true(Condition&& condition, seconds patience = seconds(20)) {
  const auto limit = std::chrono::steady_clock::now() + patience;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > limit) return false;
    ::poll(nullptr, 0, 5);  // between two questions
  }
  return true;
}

template <typename Request, typename Response>
Response good(const client::Connection& worker,
              grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Response*),
              const Request& request) {
  auto response = worker.call(method, request, seconds(20));
  INFO((response.ok() ? "" : response.error().to_string()));
  REQUIRE(response.ok());
  return std::move(*response);
}

// "REASON field" of a call that must fail.
template <typename Request, typename Response>
std::string refused(const client::Connection& worker,
                    grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Response*),
                    const Request& request) {
  auto response = worker.call(method, request, seconds(20));
  return response.ok() ? "" : response.error().reason + " " + response.error().field;
}

v1::RegisterLayoutRequest layout_request(const std::string& instance = "gpu") {
  v1::RegisterLayoutRequest request;
  request.set_instance(instance);
  *request.mutable_layout() = good_layout();
  return request;
}

v1::ProvePoolsRequest prove_request() {
  v1::ProvePoolsRequest request;
  request.add_pools(kPool);
  return request;
}

void answer(World& world, const v1::PoolChallenge& challenge, uint64_t pool_address,
            uint8_t spoil = 0) {
  std::vector<uint8_t> nonce(challenge.nonce().begin(), challenge.nonce().end());
  REQUIRE(nonce.size() == 16);
  nonce[15] = static_cast<uint8_t>(nonce[15] ^ spoil);
  world.memory.write(pool_address + challenge.offset_bytes(), nonce);
}

}  // namespace

TEST_CASE("A pool by handle serves layouts once its challenge has been answered in memory") {
  World world;
  const auto worker = world.attach("rank0");
  const auto kind = GENERATE(v1::POOL_KIND_CUDA_IPC, v1::POOL_KIND_CUDA_FABRIC);
  const auto exported = kind == v1::POOL_KIND_CUDA_IPC ? world.memory.alloc(4 * kMiB)
                                                       : world.memory.vmm_fabric(4 * kMiB);
  constexpr uint64_t kOffset = 4096;
  const auto request = world.pools(kind, exported, kOffset);
  const auto first = good(*worker, &Stub::RegisterPools, request);
  CHECK_FALSE(first.existing());
  REQUIRE(first.challenges_size() == 1);
  CHECK(first.challenges(0).pool() == kPool);
  CHECK(first.challenges(0).offset_bytes() <= kPoolBytes - 16);
  CHECK(refused(*worker, &Stub::RegisterLayout, layout_request()) ==
        "POOL_NOT_PROVEN layout.pools[0].name");
  // Asked again, the same challenge.
  const auto again = good(*worker, &Stub::RegisterPools, request);
  CHECK(again.existing());
  REQUIRE(again.challenges_size() == 1);
  CHECK(again.challenges(0).nonce() == first.challenges(0).nonce());
  CHECK(again.challenges(0).offset_bytes() == first.challenges(0).offset_bytes());

  answer(world, first.challenges(0), exported.address + kOffset);
  good(*worker, &Stub::ProvePools, prove_request());
  good(*worker, &Stub::ProvePools, prove_request());
  const auto proven = good(*worker, &Stub::RegisterPools, request);
  CHECK(proven.existing());
  CHECK(proven.challenges_size() == 0);
  good(*worker, &Stub::RegisterLayout, layout_request());
  CHECK(world.pool_list() ==
        (kind == v1::POOL_KIND_CUDA_IPC ? "rank0/kv cuda_ipc;" : "rank0/kv cuda_fabric;"));
  auto other = request;
  other.mutable_pools(0)->set_offset_bytes(0);
  CHECK(refused(*worker, &Stub::RegisterPools, other) ==
        "REGISTERED_OTHERWISE pools[0].offset_bytes");
}

TEST_CASE("The proof is asked for where the worker says that no page is") {
  World world;
  const auto worker = world.attach("rank0");
  const auto exported = world.memory.alloc(kMiB);
  constexpr uint64_t kOffset = 256;
  auto request = world.pools(v1::POOL_KIND_CUDA_IPC, exported, kOffset);
  v1::PoolSpec& pool = *request.mutable_pools(0);
  pool.set_proof_offset_bytes(kPoolBytes - 15);
  CHECK(refused(*worker, &Stub::RegisterPools, request) ==
        "OUT_OF_RANGE pools[0].proof_offset_bytes");
  pool.set_proof_offset_bytes(UINT64_MAX);
  CHECK(refused(*worker, &Stub::RegisterPools, request) ==
        "OUT_OF_RANGE pools[0].proof_offset_bytes");
  CHECK(world.pool_list().empty());

  const uint64_t place = GENERATE(uint64_t{0}, uint64_t{4099}, kPoolBytes - 16);
  CAPTURE(place);
  pool.set_proof_offset_bytes(place);
  const auto first = good(*worker, &Stub::RegisterPools, request);
  REQUIRE(first.challenges_size() == 1);
  CHECK(first.challenges(0).offset_bytes() == place);
  auto other = request;
  other.mutable_pools(0)->set_proof_offset_bytes(place ^ 1);
  CHECK(refused(*worker, &Stub::RegisterPools, other) ==
        (place == kPoolBytes - 16 ? "OUT_OF_RANGE pools[0].proof_offset_bytes"
                                  : "REGISTERED_OTHERWISE pools[0].proof_offset_bytes"));
  // The right bytes in another place prove nothing.
  const auto wrong_place = place == 0 ? 16 : place - 16;
  const std::string& nonce = first.challenges(0).nonce();
  const std::vector<uint8_t> bytes(nonce.begin(), nonce.end());
  world.memory.write(exported.address + kOffset + wrong_place, bytes);
  CHECK(refused(*worker, &Stub::ProvePools, prove_request()) == "POOL_PROOF_WRONG pools[0]");
  const auto second = good(*worker, &Stub::RegisterPools, request);
  REQUIRE(second.challenges_size() == 1);
  CHECK(second.challenges(0).offset_bytes() == place);
  answer(world, second.challenges(0), exported.address + kOffset);
  good(*worker, &Stub::ProvePools, prove_request());
  good(*worker, &Stub::RegisterLayout, layout_request());
}

TEST_CASE("A call of the driver that fails refuses a registration or a proof, and not the next") {
  const std::string call = GENERATE("cuIpcOpenMemHandle", "cuPointerGetAttribute",
                                    "cuMemGetAddressRange", "cuMemcpyDtoHAsync");
  CAPTURE(call);
  World world({}, call + ":1:" + std::to_string(cuda::CUDA_ERROR_OUT_OF_MEMORY));
  const auto worker = world.attach("rank0");
  const uint64_t before = world.machine->device_bytes(0);
  const auto exported = world.memory.alloc(kMiB);
  const auto request = world.pools(v1::POOL_KIND_CUDA_IPC, exported);
  const bool at_proof = call == "cuMemcpyDtoHAsync";
  if (!at_proof) {
    CHECK(refused(*worker, &Stub::RegisterPools, request).starts_with("CUDA_OUT_OF_MEMORY"));
    CHECK(world.pool_list().empty());
  }
  const auto registered = good(*worker, &Stub::RegisterPools, request);
  REQUIRE(registered.challenges_size() == 1);
  answer(world, registered.challenges(0), exported.address);
  if (at_proof)
    CHECK(refused(*worker, &Stub::ProvePools, prove_request()) == "CUDA_OUT_OF_MEMORY pools[0]");
  good(*worker, &Stub::ProvePools, prove_request());
  good(*worker, &Stub::RegisterLayout, layout_request());
  // Nothing holds it more often than it is registered.
  v1::UnregisterRequest back;
  back.mutable_pools()->add_names(kPool);
  good(*worker, &Stub::Unregister, back);
  world.memory.kill();
  CHECK(becomes_true([&] { return world.machine->device_bytes(0) == before; }));
}

TEST_CASE("A wrong proof drops the pool, and a new registration has a new challenge") {
  World world;
  const auto worker = world.attach("rank0");
  const auto exported = world.memory.alloc(kMiB);
  const auto request = world.pools(v1::POOL_KIND_CUDA_IPC, exported);
  const auto first = good(*worker, &Stub::RegisterPools, request);
  REQUIRE(first.challenges_size() == 1);
  answer(world, first.challenges(0), exported.address, 1);
  CHECK(refused(*worker, &Stub::ProvePools, prove_request()) == "POOL_PROOF_WRONG pools[0]");
  CHECK(world.pool_list().empty());
  CHECK(refused(*worker, &Stub::ProvePools, prove_request()) == "POOL_UNKNOWN pools[0]");
  CHECK(refused(*worker, &Stub::RegisterLayout, layout_request()) ==
        "POOL_UNKNOWN layout.pools[0].name");
  const auto second = good(*worker, &Stub::RegisterPools, request);
  REQUIRE(second.challenges_size() == 1);
  CHECK_FALSE(second.existing());
  CHECK(second.challenges(0).nonce() != first.challenges(0).nonce());
  answer(world, second.challenges(0), exported.address);
  good(*worker, &Stub::ProvePools, prove_request());
}

TEST_CASE("A challenge that nobody answers ends by itself, and with it the import") {
  World world;
  const auto worker = world.attach("rank0");
  const auto exported = world.memory.alloc(kMiB);
  good(*worker, &Stub::RegisterPools, world.pools(v1::POOL_KIND_CUDA_IPC, exported));
  CHECK(world.pool_list() == "rank0/kv cuda_ipc;");
  CHECK(becomes_true([&] { return world.pool_list().empty(); }, seconds(30)));
  CHECK(refused(*worker, &Stub::ProvePools, prove_request()) == "POOL_UNKNOWN pools[0]");
  // Nothing holds the memory any more.
  const uint64_t before = world.machine->device_bytes(0);
  world.memory.free(exported.address);
  CHECK(becomes_true([&] { return world.machine->device_bytes(0) == before - kMiB; }));
}

TEST_CASE("An allocation that one worker has registered is no other's until he is gone") {
  World world;
  auto owner = world.attach("rank0");
  const auto other = world.attach("rank1");
  const auto exported = world.memory.alloc(kMiB);
  const auto request = world.pools(v1::POOL_KIND_CUDA_IPC, exported);
  good(*owner, &Stub::RegisterPools, request);
  CHECK(refused(*other, &Stub::RegisterPools, request) == "POOL_OWNED pools[0].handle");
  owner.reset();
  CHECK(becomes_true([&] { return refused(*other, &Stub::RegisterPools, request).empty(); }));
}

TEST_CASE("VMM memory by descriptor needs no proof; what is told wrong names its field") {
  World world;
  const auto worker = world.attach("rank0");
  auto exported = world.memory.vmm_fd(2 * kMiB);
  const auto send = [&](uint64_t bytes) {
    const client::PoolToSend pool{kPool, lifeline::PoolKind::kCudaVmmFd, bytes, exported.fd.get()};
    const auto sent =
        worker->attachment->send_pools({&pool, 1}, std::chrono::steady_clock::now() + seconds(20));
    REQUIRE(sent.ok());
  };
  const auto request = world.pools(v1::POOL_KIND_CUDA_VMM_FD, exported, 512);
  const auto register_it = [&](auto&& spoil) {
    auto spoiled = request;
    spoil(*spoiled.mutable_pools(0));
    return refused(*worker, &Stub::RegisterPools, spoiled);
  };
  CHECK(register_it([](auto&) {}) == "POOL_NOT_SENT pools[0].name");
  send(2 * kMiB);
  CHECK(register_it([](auto& p) { p.set_handle("x"); }) == "UNEXPECTED pools[0].handle");
  CHECK(register_it([](auto& p) { p.set_device_uuid("x"); }) == "WRONG_SIZE pools[0].device_uuid");
  CHECK(register_it([](auto& p) { p.set_offset_bytes(UINT64_MAX); }) ==
        "POOL_SIZE_INVALID pools[0].offset_bytes");
  CHECK(register_it([](auto& p) { p.set_device_uuid(std::string(16, 'u')); }) ==
        "POOL_DEVICE_UNKNOWN pools[0].device_uuid");
  send(2 * kMiB);  // each attempt uses the descriptor up
  CHECK(register_it([](auto& p) { p.set_bytes(2 * kMiB); }) == "POOL_TOO_SMALL pools[0].bytes");
  send(4 * kMiB);
  CHECK(register_it([](auto&) {}) == "POOL_IMPORT_FAILED pools[0]");
  send(2 * kMiB);
  CHECK(register_it([](auto& p) {
          p.set_kind(v1::POOL_KIND_HOST_SHM);
          p.set_offset_bytes(0);
          p.clear_device_uuid();
        }) == "POOL_KIND_DIFFERS pools[0].kind");
  send(2 * kMiB);
  CHECK(good(*worker, &Stub::RegisterPools, request).challenges_size() == 0);
  good(*worker, &Stub::RegisterLayout, layout_request());
  CHECK(world.pool_list() == "rank0/kv cuda_vmm_fd;");

  // Handles that are values, of the wrong size.
  auto value = world.pools(v1::POOL_KIND_CUDA_IPC, exported);
  value.mutable_pools(0)->set_name("other");
  value.mutable_pools(0)->set_handle("short");
  CHECK(refused(*worker, &Stub::RegisterPools, value) == "WRONG_SIZE pools[0].handle");
  value.mutable_pools(0)->set_handle(std::string(64, 'h'));
  CHECK(refused(*worker, &Stub::RegisterPools, value) == "POOL_IMPORT_FAILED pools[0].handle");
  value.mutable_pools(0)->set_bytes(15);
  CHECK(refused(*worker, &Stub::RegisterPools, value) == "POOL_SIZE_INVALID pools[0].bytes");
  value.mutable_pools(0)->set_bytes(uint64_t{2} << 40);
  CHECK(refused(*worker, &Stub::RegisterPools, value) == "POOL_LIMIT pools[0].bytes");
  const auto controller = world.attach("scheduler", client::WorkerRole::kController);
  value.mutable_pools(0)->set_bytes(4096);
  CHECK(refused(*controller, &Stub::RegisterPools, value) == "ROLE_WITHOUT_POOLS pools[0]");
}

TEST_CASE("The pools of a layout are of one device") {
  World world;
  const auto worker = world.attach("rank0");
  const auto first = world.memory.alloc(kMiB, 0);
  const auto second = world.memory.alloc(kMiB, 1);
  auto request = world.pools(v1::POOL_KIND_CUDA_IPC, first);
  *request.add_pools() = world.pools(v1::POOL_KIND_CUDA_IPC, second, 0, 1).pools(0);
  request.mutable_pools(1)->set_name("far");
  const auto registered = good(*worker, &Stub::RegisterPools, request);
  REQUIRE(registered.challenges_size() == 2);
  v1::ProvePoolsRequest prove = prove_request();
  prove.add_pools("far");
  answer(world, registered.challenges(0), first.address);
  std::vector<uint8_t> nonce(registered.challenges(1).nonce().begin(),
                             registered.challenges(1).nonce().end());
  world.memory.write(second.address + registered.challenges(1).offset_bytes(), nonce, 1);
  good(*worker, &Stub::ProvePools, prove);
  auto layout = layout_request();
  v1::PoolSpan& span = *layout.mutable_layout()->add_pools();
  span.set_name("far");
  span.set_bytes(kPoolBytes);
  CHECK(refused(*worker, &Stub::RegisterLayout, layout) ==
        "POOLS_OF_SEVERAL_DEVICES layout.pools[1].name");
}

TEST_CASE("A worker that is killed has its GPU memory free within a second") {
  World world;
  auto worker = world.attach("rank0");
  const uint64_t before = world.machine->device_bytes(0);
  const auto ipc = world.memory.alloc(32 * kMiB);
  auto vmm = world.memory.vmm_fd(32 * kMiB);
  const client::PoolToSend sent{"vmm", lifeline::PoolKind::kCudaVmmFd, 32 * kMiB, vmm.fd.get()};
  REQUIRE(worker->attachment->send_pools({&sent, 1}, std::chrono::steady_clock::now() + seconds(20))
              .ok());
  auto request = world.pools(v1::POOL_KIND_CUDA_IPC, ipc);
  *request.add_pools() = world.pools(v1::POOL_KIND_CUDA_VMM_FD, vmm).pools(0);
  request.mutable_pools(1)->set_name("vmm");
  const auto registered = good(*worker, &Stub::RegisterPools, request);
  answer(world, registered.challenges(0), ipc.address);
  good(*worker, &Stub::ProvePools, prove_request());
  good(*worker, &Stub::RegisterLayout, layout_request());
  vmm.fd.reset();
  world.memory.kill();
  // The daemon holds it: that is what must not last.
  CHECK(world.machine->device_bytes(0) == before + 64 * kMiB);
  worker.reset();
  CHECK(becomes_true([&] { return world.machine->device_bytes(0) == before; }, seconds(1)));
}

TEST_CASE("Kinds that the configuration leaves out are not allowed") {
  World world({"pools.kinds=host_shm,cuda_vmm_fd"});
  const auto worker = world.attach("rank0");
  const auto exported = world.memory.alloc(kMiB);
  CHECK(refused(*worker, &Stub::RegisterPools, world.pools(v1::POOL_KIND_CUDA_IPC, exported)) ==
        "POOL_KIND_NOT_ALLOWED pools[0].kind");
}

TEST_CASE("A daemon that shall have a GPU and has none does not start") {
  fake_cuda::Machine machine(kLibrary, two_gpus());
  char directory[] = "/tmp/kvferry-gpu-pools.XXXXXX";
  REQUIRE(::mkdtemp(directory) != nullptr);
  bench::DaemonOptions options;
  options.binary_directory = KVFERRY_BIN_DIR;
  options.settings = {"arena.bytes=16MiB", "arena.segment_bytes=16MiB"};
  const auto starts = [&](const std::vector<std::string>& settings) {
    bench::DaemonOptions with = options;
    with.settings.insert(with.settings.end(), settings.begin(), settings.end());
    auto daemon = bench::DaemonProcess::start(directory, {"subject", 0, "nobody", 9}, with);
    REQUIRE(daemon.ok());
    return (*daemon)->wait_until_serving().ok();
  };
  CHECK_FALSE(starts({"gpu.enabled=on", "gpu.driver=/nonexistent/libcuda.so.1"}));
  CHECK_FALSE(starts({"gpu.driver=/nonexistent/libcuda.so.1", "pools.kinds=host_shm,cuda_ipc"}));
  CHECK(starts({"gpu.driver=/nonexistent/libcuda.so.1"}));
  std::error_code error;
  std::filesystem::remove_all(directory, error);
}
