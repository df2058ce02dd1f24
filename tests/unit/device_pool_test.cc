// Pools on a GPU: imports of every kind out of another process, over the fake driver.
#include "daemon/gpu/device_pool.h"

#include <fcntl.h>
#include <sys/mman.h>

#include <catch2/catch.hpp>
#include <functional>
#include <numeric>
#include <thread>

#include "daemon/gpu/copy_queue.h"
#include "daemon/gpu/pinned_memory.h"
#include "daemon/memory/host_pool.h"
#include "tests/fake_cuda/control.h"
#include "tests/unit/gpu_exporter.h"

namespace kvferry::gpu {
namespace {

using fake_cuda::Machine;
using fake_cuda::Setup;
using gpu_test::Exporter;
using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr const char* kLibrary = KVFERRY_FAKE_CUDA_LIBRARY;
constexpr uint64_t kMiB = 1U << 20;
constexpr uint64_t kPart = 2 * kMiB;
constexpr WorkerId kOne{1};
constexpr WorkerId kOther{2};

Setup gpus(int devices, const std::string& lacks = {}) {
  Setup setup;
  setup.devices = devices;
  setup.memory_mb = 256;
  setup.lacks = lacks;
  return setup;
}

Time soon() {
  return monotonic_now() + seconds(20);
}

// Two GPUs, the daemon's view of them, and one worker process.
struct World {
  explicit World(const Setup& setup = gpus(2))
      : machine(kLibrary, setup), worker(KVFERRY_GPU_EXPORTER, kLibrary) {
    auto driver = cuda::Driver::load(kLibrary);
    REQUIRE(driver);
    auto opened = Devices::open(*driver);
    REQUIRE(opened);
    devices = std::move(*opened);
    imports = std::make_unique<Imports>(devices);
  }
  ~World() {
    // Whatever a test did: nothing may be left but what the fake's other users hold.
    imports.reset();
    devices.reset();
    const auto live = machine->live();
    INFO(live.to_string());
    CHECK(live.total() == 0);
  }

  ImportRequest request(uint64_t bytes, uint64_t offset = 0, WorkerId owner = kOne,
                        int device = 0) const {
    ImportRequest out;
    const Uuid& uuid = devices->all().at(static_cast<std::size_t>(device))->facts().uuid;
    out.device_uuid.assign(uuid.begin(), uuid.end());
    out.bytes = bytes;
    out.offset_bytes = offset;
    out.owner = owner;
    out.field = "pools[0]";
    return out;
  }
  // The driver's counts of what imports hold: not contexts, nor what readers need.
  uint64_t held() const {
    const auto live = machine->live();
    return live.ipc_opens + live.mappings + live.reservations + live.handles;
  }
  bool drained() { return imports->drained(soon()); }
  std::vector<uint8_t> read(const DevicePool& pool, uint64_t offset, std::size_t bytes) {
    std::vector<uint8_t> out(bytes);
    const Status status =
        imports->read(pool, offset, std::as_writable_bytes(std::span(out)), seconds(20));
    INFO((status ? "" : status.error().to_string()));
    REQUIRE(status);
    return out;
  }

  Machine machine;
  Exporter worker;
  std::shared_ptr<const Devices> devices;
  std::unique_ptr<Imports> imports;
};

std::vector<uint8_t> pattern(std::size_t bytes, uint8_t first) {
  std::vector<uint8_t> out(bytes);
  std::iota(out.begin(), out.end(), first);
  return out;
}

template <typename T>
std::string reason_of(const Result<T>& result) {
  return result ? "" : result.error().reason + " " + result.error().field;
}

bool comes_true(const std::function<bool()>& condition) {
  const Time limit = soon();
  while (!condition()) {
    if (monotonic_now() > limit) return false;
    std::this_thread::yield();
  }
  return true;
}

// Of [base, base + bytes), in one piece.
std::shared_ptr<DevicePlan> plan_of(uint64_t base, uint64_t bytes) {
  kernels::CopyPlan plan;
  plan.bytes = bytes;
  plan.pool_count = 1;
  plan.rows = {0, 1};
  plan.segments = {0, 1};
  plan.strips.push_back({});
  plan.blocks = {{0, 0}, {1, 1}};
  plan.spans = {{0, 0, 1}};
  kernels::Bundle& bundle = plan.bundles.emplace_back();
  bundle.bytes = bytes;
  bundle.cell_bytes = bytes;
  bundle.order = {kernels::Axis::kRow, kernels::Axis::kPlane, kernels::Axis::kBlock,
                  kernels::Axis::kUnit, kernels::Axis::kToken};
  bundle.row_count = bundle.plane_count = bundle.segment_count = bundle.block_count = 1;
  bundle.token_count = bundle.unit_count = 1;
  auto packed = kernels::PackedPlan::make(plan, std::span(&base, 1));
  REQUIRE(packed);
  return std::make_shared<DevicePlan>(
      std::make_shared<const kernels::PackedPlan>(std::move(*packed)));
}

std::vector<VmmPart> one_part(UniqueFd fd, uint64_t bytes) {
  std::vector<VmmPart> parts;
  parts.push_back({std::move(fd), bytes});
  return parts;
}

}  // namespace

TEST_CASE("CUDA IPC memory is read where the pool begins") {
  World world;
  auto memory = world.worker.alloc(8 * kMiB);
  const auto data = pattern(48, 7);
  world.worker.write(memory.address + 4096 + 100, data);
  auto imported = world.imports->import_ipc(world.request(kMiB, 4096), memory.handle);
  REQUIRE(imported);
  const DevicePool& pool = *imported->pool;
  CHECK(pool.kind() == ImportKind::kCudaIpc);
  CHECK(pool.bytes() == kMiB);
  CHECK(pool.device() == world.devices->all()[0].get());
  CHECK_FALSE(pool.failed());
  CHECK_FALSE(pool.contains(pool.base()));
  CHECK(world.read(pool, 100, data.size()) == data);
  CHECK(world.imports->stats().mapped == 1);
  // Outside of the pool, though inside of the allocation.
  std::array<std::byte, 16> out{};
  CHECK(reason_of(world.imports->read(pool, kMiB - 15, out, seconds(1))) ==
        "OUT_OF_RANGE offset_bytes");
  CHECK(world.imports->read(pool, kMiB - 16, out, seconds(20)));
  imported->pool.reset();
  CHECK(world.drained());
  CHECK(world.held() == 0);
  CHECK(world.imports->stats().mapped == 0);
  CHECK(world.imports->stats().close_failures == 0);
}

TEST_CASE("VMM memory of several parts is one range, in the order of the parts") {
  World world;
  std::vector<VmmPart> parts;
  const uint64_t sizes[] = {kPart, 2 * kPart, kPart};
  uint8_t first = 1;
  uint64_t at = 0;
  std::vector<std::pair<uint64_t, std::vector<uint8_t>>> written;
  for (const uint64_t bytes : sizes) {
    auto memory = world.worker.vmm_fd(bytes);
    const auto data = pattern(32, first);
    world.worker.write(memory.address, data);
    world.worker.write(memory.address + bytes - 32, pattern(32, static_cast<uint8_t>(first + 50)));
    written.emplace_back(at, data);
    at += bytes;
    written.emplace_back(at - 32, pattern(32, static_cast<uint8_t>(first + 50)));
    first = static_cast<uint8_t>(first + 7);
    parts.push_back({std::move(memory.fd), bytes});
  }
  constexpr uint64_t kOffset = 16;
  auto imported =
      world.imports->import_fds(world.request(4 * kPart - kOffset, kOffset), std::move(parts));
  REQUIRE(imported);
  CHECK(imported->pool->kind() == ImportKind::kCudaVmmFd);
  for (const auto& [offset, data] : written) {
    const uint64_t skip = offset < kOffset ? kOffset - offset : 0;
    const std::vector<uint8_t> wanted(data.begin() + static_cast<std::ptrdiff_t>(skip), data.end());
    CHECK(world.read(*imported->pool, offset + skip - kOffset, wanted.size()) == wanted);
  }
  CHECK(world.machine->live().mappings == 3);
  CHECK(world.machine->live().handles == 0);  // the mappings hold the memory
  imported->pool.reset();
  CHECK(world.drained());
  CHECK(world.held() == 0);
}

TEST_CASE("Fabric memory is mapped as far as its pools need it") {
  World world;
  auto memory = world.worker.vmm_fabric(4 * kPart);
  const auto data = pattern(16, 90);
  world.worker.write(memory.address + 3 * kPart + 5, data);
  auto small = world.imports->import_fabric(world.request(kMiB), memory.handle);
  REQUIRE(small);
  CHECK(small->pool->kind() == ImportKind::kCudaFabric);
  auto whole = world.imports->import_fabric(world.request(4 * kPart), memory.handle);
  REQUIRE(whole);
  CHECK(world.read(*whole->pool, 3 * kPart + 5, 16) == data);
  CHECK(small->pool->same_memory(*whole->pool));
  auto inside = world.imports->import_fabric(world.request(kMiB, 3 * kPart), memory.handle);
  REQUIRE(inside);
  CHECK(world.imports->stats().mapped == 2);
  CHECK(world.read(*inside->pool, 5, 16) == data);
}

TEST_CASE("What is told wrong is refused, names its field and leaves nothing") {
  World world;
  auto memory = world.worker.alloc(4 * kMiB);
  Imports& imports = *world.imports;
  const auto ipc = [&](const ImportRequest& request) {
    return reason_of(imports.import_ipc(request, memory.handle));
  };
  ImportRequest request = world.request(kMiB);
  request.device_uuid[3] ^= 1;
  CHECK(ipc(request) == "POOL_DEVICE_UNKNOWN pools[0].device_uuid");
  request.device_uuid.clear();
  CHECK(ipc(request) == "POOL_DEVICE_UNKNOWN pools[0].device_uuid");
  CHECK(ipc(world.request(0)) == "POOL_SIZE_INVALID pools[0].bytes");
  CHECK(ipc(world.request(1, UINT64_MAX)) == "POOL_SIZE_INVALID pools[0].bytes");
  CHECK(ipc(world.request(4 * kMiB + 1)) == "POOL_TOO_SMALL pools[0].bytes");
  CHECK(ipc(world.request(4 * kMiB, 1)) == "POOL_TOO_SMALL pools[0].bytes");
  CHECK(ipc(world.request(1, 4 * kMiB)) == "POOL_TOO_SMALL pools[0].bytes");
  // The other device, which could reach it.
  CHECK(ipc(world.request(kMiB, 0, kOne, 1)) == "POOL_WRONG_DEVICE pools[0].handle");
  CHECK(reason_of(imports.import_ipc(world.request(kMiB), HandleValue{})) ==
        "POOL_IMPORT_FAILED pools[0].handle");
  CHECK(world.drained());  // as long as it is open here, the driver knows it
  world.worker.free(memory.address);
  CHECK(ipc(world.request(kMiB)) == "POOL_IMPORT_FAILED pools[0].handle");

  auto vmm = world.worker.vmm_fd(kPart);
  const auto fds = [&](const ImportRequest& what, uint64_t bytes) {
    return reason_of(imports.import_fds(what, one_part(UniqueFd(::dup(vmm.fd.get())), bytes)));
  };
  CHECK(fds(world.request(kMiB), 0) == "POOL_PART_INVALID pools[0].bytes");
  CHECK(fds(world.request(kMiB), kPart + 1) == "POOL_PART_INVALID pools[0].bytes");
  CHECK(fds(world.request(kMiB), 2 * kPart) == "POOL_IMPORT_FAILED pools[0]");
  CHECK(fds(world.request(kPart + 1), kPart) == "POOL_TOO_SMALL pools[0].bytes");
  CHECK(fds(world.request(kMiB, 0, kOne, 1), kPart) == "POOL_WRONG_DEVICE pools[0]");
  CHECK(reason_of(imports.import_fds(world.request(kMiB), {})) == "POOL_PART_INVALID pools[0]");
  std::vector<VmmPart> huge;
  for (int i = 0; i < 3; ++i) huge.push_back({UniqueFd(::dup(vmm.fd.get())), uint64_t{1} << 63});
  CHECK(reason_of(imports.import_fds(world.request(kMiB), std::move(huge))) ==
        "POOL_PART_INVALID pools[0].bytes");
  // No GPU's memory at all.
  UniqueFd file(::memfd_create("no-gpu", MFD_CLOEXEC));
  CHECK(reason_of(imports.import_fds(world.request(kMiB), one_part(std::move(file), kPart))) ==
        "POOL_IMPORT_FAILED pools[0]");
  CHECK(reason_of(imports.import_fds(world.request(kMiB), one_part(UniqueFd(), kPart))) ==
        "POOL_IMPORT_FAILED pools[0]");

  auto fabric = world.worker.vmm_fabric(kPart);
  CHECK(reason_of(imports.import_fabric(world.request(kPart + 1), fabric.handle)) ==
        "POOL_IMPORT_FAILED pools[0].handle");
  CHECK(reason_of(imports.import_fabric(world.request(UINT64_MAX), fabric.handle)) ==
        "POOL_SIZE_INVALID pools[0].bytes");
  CHECK(reason_of(imports.import_fabric(world.request(kMiB, 0, kOne, 1), fabric.handle)) ==
        "POOL_WRONG_DEVICE pools[0].handle");
  CHECK(world.drained());
  CHECK(world.held() == 0);
}

TEST_CASE("A kind that no device can share is not served") {
  World world(gpus(1, "fabric"));
  CHECK(world.imports->serves(ImportKind::kCudaIpc));
  CHECK(world.imports->serves(ImportKind::kCudaVmmFd));
  CHECK_FALSE(world.imports->serves(ImportKind::kCudaFabric));
  CHECK(reason_of(world.imports->import_fabric(world.request(kMiB), HandleValue{})) ==
        "POOL_KIND_UNSUPPORTED pools[0].kind");
}

TEST_CASE("An allocation is opened once for all pools of its worker, and closed with the last") {
  World world;
  auto memory = world.worker.alloc(8 * kMiB);
  auto a = world.imports->import_ipc(world.request(kMiB), memory.handle);
  REQUIRE(a);
  auto b = world.imports->import_ipc(world.request(kMiB, 4 * kMiB), memory.handle);
  REQUIRE(b);
  CHECK(world.machine->live().ipc_opens == 1);
  CHECK(world.machine->calls("cuIpcOpenMemHandle") == 1);
  CHECK(b->pool->base() - a->pool->base() == 4 * kMiB);
  CHECK(a->pool->same_memory(*b->pool));
  CHECK(b->pool->same_memory(*a->pool));
  a->pool.reset();
  CHECK(world.drained());
  CHECK(world.machine->live().ipc_opens == 1);
  b->pool.reset();
  CHECK(world.drained());
  CHECK(world.machine->live().ipc_opens == 0);
  // The claims are still there: the worker may come again.
  CHECK(world.imports->import_ipc(world.request(kMiB), memory.handle));
}

TEST_CASE("Memory of different allocations, or of host and device, is not the same") {
  World world;
  auto first = world.worker.alloc(kMiB);
  auto second = world.worker.alloc(kMiB);
  auto vmm = world.worker.vmm_fd(kPart);
  auto a = world.imports->import_ipc(world.request(kMiB), first.handle);
  auto b = world.imports->import_ipc(world.request(kMiB), second.handle);
  auto c = world.imports->import_fds(world.request(kMiB), one_part(std::move(vmm.fd), kPart));
  REQUIRE(a);
  REQUIRE(b);
  REQUIRE(c);
  auto host = memory::HostPool::create(4096);
  REQUIRE(host);
  CHECK_FALSE(a->pool->same_memory(*b->pool));
  CHECK_FALSE(a->pool->same_memory(*c->pool));
  CHECK_FALSE(a->pool->same_memory(**host));
  CHECK_FALSE((*host)->same_memory(*a->pool));
  CHECK((*host)->device() == nullptr);
}

TEST_CASE("What one worker has registered is no other's") {
  World world;
  auto memory = world.worker.alloc(kMiB);
  auto fabric = world.worker.vmm_fabric(kPart);
  auto a = world.imports->import_ipc(world.request(kMiB), memory.handle);
  auto b = world.imports->import_fabric(world.request(kPart), fabric.handle);
  REQUIRE(a);
  REQUIRE(b);
  const auto others = [&] {
    return world.imports->import_ipc(world.request(kMiB, 0, kOther), memory.handle);
  };
  CHECK(reason_of(others()) == "POOL_OWNED pools[0].handle");
  CHECK(others().error().code == Code::kPermissionDenied);
  CHECK(reason_of(world.imports->import_fabric(world.request(kMiB, 0, kOther), fabric.handle)) ==
        "POOL_OWNED pools[0].handle");
  // Given back while a copy still runs: the memory stays, the right has gone.
  const std::shared_ptr<memory::Pool> copying = a->pool;
  *a = Imported{};
  auto now = others();
  REQUIRE(now);
  CHECK(world.drained());
  CHECK(world.machine->live().ipc_opens == 2);
  CHECK(now->pool->same_memory(*copying));
  // And now the other way round.
  CHECK(reason_of(world.imports->import_ipc(world.request(kMiB), memory.handle)) ==
        "POOL_OWNED pools[0].handle");
}

TEST_CASE("The last user closes, after the worker's death too, and its memory is free again") {
  World world;
  const uint64_t before = world.machine->device_bytes(0);
  auto memory = world.worker.alloc(64 * kMiB);
  auto vmm = world.worker.vmm_fd(16 * kPart);
  auto a = world.imports->import_ipc(world.request(64 * kMiB), memory.handle);
  auto b =
      world.imports->import_fds(world.request(16 * kPart), one_part(std::move(vmm.fd), 16 * kPart));
  REQUIRE(a);
  REQUIRE(b);
  std::shared_ptr<memory::Pool> copying = a->pool;
  const std::shared_ptr<memory::Pool> also_copying = b->pool;
  *a = Imported{};
  world.worker.kill();
  CHECK(world.read(static_cast<const DevicePool&>(*copying), 0, 16).size() == 16);
  CHECK(world.machine->device_bytes(0) > before);
  const Time began = monotonic_now();
  copying.reset();
  b = Result<Imported>(Imported{});
  const_cast<std::shared_ptr<memory::Pool>&>(also_copying).reset();
  CHECK(world.drained());
  CHECK(monotonic_now() - began < seconds(1));
  CHECK(world.held() == 0);
  CHECK(world.machine->device_bytes(0) == before);
}

TEST_CASE("A worker killed while a copy runs on its memory: the copy ends, and then all is free") {
  const bool by_handle = GENERATE(true, false);
  World world;
  const std::shared_ptr<const Device> device = world.devices->all()[0];
  auto opened = CopyQueue::open(device);
  REQUIRE(opened);
  std::unique_ptr<CopyQueue> queue = std::move(*opened);
  constexpr uint64_t kBytes = 2 * kPart;
  void* const page =
      ::mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  REQUIRE(page != MAP_FAILED);
  auto pinned = PinnedMemory::pin({device}, page, kBytes);
  REQUIRE(pinned);
  const uint64_t before = world.machine->device_bytes(0);
  auto memory = by_handle ? world.worker.alloc(kBytes) : world.worker.vmm_fd(kBytes);
  const auto data = pattern(64, 11);
  world.worker.write(memory.address + kBytes - 64, data);
  auto imported = by_handle ? world.imports->import_ipc(world.request(kBytes), memory.handle)
                            : world.imports->import_fds(world.request(kBytes),
                                                        one_part(std::move(memory.fd), kBytes));
  REQUIRE(imported);

  std::atomic<int> told{0};
  Time ended{};  // read once told
  DeviceJob job;
  job.plan = plan_of(reinterpret_cast<uintptr_t>(imported->pool->base()), kBytes);
  job.bytes = kBytes;
  job.flat = (*pinned)->on(*device);
  job.pools = {imported->pool};
  job.done = [&](Outcome outcome) {
    ended = monotonic_now();
    told = outcome == Outcome::kOk ? 1 : 2;
  };
  world.machine->hold();
  const uint64_t launches = world.machine->calls("cuLaunchKernel");
  REQUIRE(queue->submit(std::move(job)));
  REQUIRE(comes_true([&] { return world.machine->calls("cuLaunchKernel") > launches; }));
  world.worker.kill();
  *imported = Imported{};  // the registration
  CHECK(world.drained());
  CHECK(world.held() > 0);
  CHECK(world.machine->device_bytes(0) == before + kBytes);
  CHECK(told == 0);

  world.machine->release();
  // Memory goes first, what named it right after.
  REQUIRE(
      comes_true([&] { return world.machine->device_bytes(0) == before && world.held() == 0; }));
  const Time free = monotonic_now();
  REQUIRE(told == 1);
  CHECK(free - ended < seconds(1));
  CHECK(std::equal(data.begin(), data.end(), static_cast<const uint8_t*>(page) + kBytes - 64));
  queue.reset();
  *pinned = nullptr;
  ::munmap(page, kBytes);
}

TEST_CASE("A pool may outlive the imports, and closes its memory itself then") {
  World world;
  auto memory = world.worker.alloc(kMiB);
  auto imported = world.imports->import_ipc(world.request(kMiB), memory.handle);
  REQUIRE(imported);
  std::shared_ptr<memory::Pool> pool = imported->pool;
  imported = Result<Imported>(Imported{});
  world.imports.reset();
  CHECK(world.machine->live().ipc_opens == 1);
  pool.reset();
  CHECK(world.machine->live().ipc_opens == 0);
}

TEST_CASE("A device that is down takes no imports, and its pools have failed") {
  World world;
  auto memory = world.worker.alloc(kMiB);
  auto other = world.worker.alloc(kMiB, 1);
  auto imported = world.imports->import_ipc(world.request(kMiB), memory.handle);
  auto healthy = world.imports->import_ipc(world.request(kMiB, 0, kOne, 1), other.handle);
  REQUIRE(imported);
  REQUIRE(healthy);
  world.machine->fault(0, cuda::CUDA_ERROR_ILLEGAL_ADDRESS);
  std::array<std::byte, 16> out{};
  const Status read = world.imports->read(*imported->pool, 0, out, seconds(1));
  REQUIRE_FALSE(read);
  CHECK(read.error().code == Code::kUnavailable);
  CHECK(imported->pool->failed());
  CHECK_FALSE(healthy->pool->failed());
  CHECK(reason_of(world.imports->read(*imported->pool, 0, out, seconds(1))) == "GPU_DOWN ");
  CHECK(reason_of(world.imports->import_ipc(world.request(kMiB), memory.handle)) == "GPU_DOWN ");
  CHECK(world.imports->read(*healthy->pool, 0, out, seconds(20)));
  imported = Result<Imported>(Imported{});
  CHECK(world.drained());
  CHECK(world.imports->stats().close_failures > 0);
  // What the lost context held is lost with it.
  healthy = Result<Imported>(Imported{});
  CHECK(world.drained());
  world.imports.reset();
  world.devices.reset();
  world.machine->reset();
}

TEST_CASE("A read that does not come back ends in time, and is not piled upon") {
  World world;
  auto memory = world.worker.alloc(kMiB);
  world.worker.write(memory.address, pattern(16, 3));
  auto imported = world.imports->import_ipc(world.request(kMiB), memory.handle);
  REQUIRE(imported);
  std::array<std::byte, 16> out{};
  world.machine->hold();
  const Time began = monotonic_now();
  CHECK(reason_of(world.imports->read(*imported->pool, 0, out, milliseconds(20))) ==
        "GPU_READ_TIMEOUT ");
  CHECK(monotonic_now() - began < seconds(5));
  const uint64_t streams = world.machine->live().streams;
  CHECK(reason_of(world.imports->read(*imported->pool, 0, out, milliseconds(20))) ==
        "GPU_READ_TIMEOUT ");
  CHECK(world.machine->live().streams == streams);
  world.machine->release();
  // As soon as the old copy has come back, reads go on.
  const Time patience = soon();
  Status read = world.imports->read(*imported->pool, 0, out, seconds(20));
  while (!read && monotonic_now() < patience)
    read = world.imports->read(*imported->pool, 0, out, seconds(20));
  CHECK(read);
  CHECK(static_cast<uint8_t>(out[15]) == 18);
}

TEST_CASE("Nobody waits at the end for a read that does not come back, and its page stays") {
  World world;
  auto memory = world.worker.alloc(kMiB);
  auto imported = world.imports->import_ipc(world.request(kMiB), memory.handle);
  REQUIRE(imported);
  std::array<std::byte, 16> out{};
  world.machine->hold();
  CHECK(reason_of(world.imports->read(*imported->pool, 0, out, milliseconds(20))) ==
        "GPU_READ_TIMEOUT ");
  world.imports.reset();
  CHECK(world.machine->live().registrations == 1);
  CHECK(world.machine->live().streams == 1);
  world.machine->release();
}

TEST_CASE("A read of which the driver does not tell is not taken for ended") {
  World world;
  auto memory = world.worker.alloc(kMiB);
  auto imported = world.imports->import_ipc(world.request(kMiB), memory.handle);
  REQUIRE(imported);
  std::array<std::byte, 16> out{};
  world.machine->hold();
  world.machine->fail("cuStreamQuery", 1, cuda::CUDA_ERROR_UNKNOWN);
  CHECK(reason_of(world.imports->read(*imported->pool, 0, out, seconds(20))) == "CUDA_UNKNOWN ");
  CHECK(reason_of(world.imports->read(*imported->pool, 0, out, milliseconds(20))) ==
        "GPU_READ_TIMEOUT ");
  CHECK(world.machine->calls("cuMemcpyDtoHAsync") == 1);
  world.machine->release();
}

TEST_CASE("Whichever call of an import fails, nothing is left behind") {
  World world;
  auto memory = world.worker.alloc(4 * kMiB);
  auto fabric = world.worker.vmm_fabric(kPart);
  auto first = world.worker.vmm_fd(kPart);
  auto second = world.worker.vmm_fd(kPart);
  const std::vector<std::pair<std::string, std::function<Result<Imported>()>>> kinds = {
      {"ipc", [&] { return world.imports->import_ipc(world.request(kMiB), memory.handle); }},
      {"fabric", [&] { return world.imports->import_fabric(world.request(kPart), fabric.handle); }},
      {"fds",
       [&] {
         std::vector<VmmPart> parts;
         parts.push_back({UniqueFd(::dup(first.fd.get())), kPart});
         parts.push_back({UniqueFd(::dup(second.fd.get())), kPart});
         return world.imports->import_fds(world.request(2 * kPart), std::move(parts));
       }},
  };
  for (const auto& [name, import] : kinds) {
    uint64_t count = 0;
    {
      const uint64_t before = world.machine->calls();
      auto imported = import();
      REQUIRE(imported);
      count = world.machine->calls() - before;
    }
    REQUIRE(world.drained());
    REQUIRE(count >= 4);
    uint64_t refused = 0;
    for (uint64_t n = 1; n <= count; ++n) {
      INFO(name << ", call " << n << " of " << count);
      world.machine->fail("", n, cuda::CUDA_ERROR_OUT_OF_MEMORY);
      {
        // What gives something back may fail and the import succeed.
        auto imported = import();
        if (!imported) {
          ++refused;
          CHECK(imported.error().code == Code::kResourceExhausted);
        }
      }
      world.machine->fail("", 0, 0);
      CHECK(world.drained());
      const auto live = world.machine->live();
      INFO(live.to_string());
      CHECK(world.held() == 0);
    }
    CHECK(refused >= 3);
  }
}

TEST_CASE("Whichever call of a first read fails, nothing is left behind") {
  World world;
  auto memory = world.worker.alloc(4 * kMiB);
  auto imported = world.imports->import_ipc(world.request(kMiB), memory.handle);
  REQUIRE(imported);
  std::array<std::byte, 16> out{};
  for (const std::string call :
       {"cuCtxPushCurrent", "cuMemHostRegister", "cuStreamCreate", "cuMemcpyDtoHAsync"}) {
    INFO(call);
    Imports fresh(world.devices);
    const auto before = world.machine->live();
    world.machine->fail(call, 1, cuda::CUDA_ERROR_OUT_OF_MEMORY);
    CHECK(reason_of(fresh.read(*imported->pool, 0, out, seconds(20))) == "CUDA_OUT_OF_MEMORY ");
    world.machine->fail("", 0, 0);
    const auto live = world.machine->live();
    if (call != "cuMemcpyDtoHAsync") {
      CHECK(live.streams == before.streams);
      CHECK(live.registrations == before.registrations);
    }
    CHECK(fresh.read(*imported->pool, 0, out, seconds(20)));
  }
}

}  // namespace kvferry::gpu
