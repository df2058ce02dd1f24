// Arenas in device memory: which kind a machine has, how they are made and undone, and how another
// process sees them. Over the fake driver.
#include "daemon/gpu/device_arena.h"

#include <fcntl.h>

#include <catch2/catch.hpp>
#include <filesystem>
#include <functional>
#include <limits>
#include <numeric>

#include "daemon/gpu/device_arena_view.h"
#include "tests/fake_cuda/control.h"
#include "tests/unit/arena_importer.h"
#include "tests/unit/gpu_exporter.h"

namespace kvferry::gpu {
namespace {

using fake_cuda::Machine;
using fake_cuda::Setup;
using gpu_test::Importer;
using memory::Region;

constexpr const char* kLibrary = KVFERRY_FAKE_CUDA_LIBRARY;
constexpr uint64_t kMiB = 1U << 20;
constexpr uint64_t kGranule = 2 * kMiB;
constexpr ArenaKind kAll[] = {ArenaKind::kFabricVmm, ArenaKind::kDeviceVmm, ArenaKind::kCudaMalloc};

Setup gpus(int devices, const std::string& lacks = {}) {
  Setup setup;
  setup.devices = devices;
  setup.memory_mb = 256;
  setup.lacks = lacks;
  return setup;
}

struct World {
  explicit World(const Setup& setup = gpus(1)) : machine(kLibrary, setup) {
    auto driver = cuda::Driver::load(kLibrary);
    REQUIRE(driver);
    auto opened = Devices::open(*driver);
    REQUIRE(opened);
    devices = std::move(*opened);
    device = devices->all().front();
  }
  ~World() {
    device.reset();
    devices.reset();
    const auto live = machine->live();
    INFO(live.to_string());
    CHECK(live.total() == 0);
  }

  // What this process has not given back, but for contexts.
  uint64_t held() const {
    const auto live = machine->live();
    return live.total() - live.contexts;
  }
  std::unique_ptr<DeviceArena> arena(ArenaKind kind, const std::vector<uint64_t>& sizes) const {
    auto made = DeviceArena::create(device, kind, sizes, 1);
    INFO((made ? "" : made.error().to_string()));
    REQUIRE(made);
    return std::move(*made);
  }
  std::vector<uint8_t> read(cuda::CUdeviceptr address, std::size_t bytes) const {
    std::vector<uint8_t> out(bytes);
    const Device::Current current(*device);
    REQUIRE(current.ok());
    const cuda::Api& api = device->api();
    REQUIRE(api.cuMemcpyDtoHAsync(out.data(), address, bytes, nullptr) == cuda::CUDA_SUCCESS);
    REQUIRE(api.cuStreamSynchronize(nullptr) == cuda::CUDA_SUCCESS);
    return out;
  }

  Machine machine;
  std::shared_ptr<const Devices> devices;
  std::shared_ptr<const Device> device;
};

template <typename T>
std::string reason_of(const Result<T>& result) {
  return result ? "" : result.error().reason + " " + result.error().field;
}

std::vector<ExportedSegment> export_all(const DeviceArena& arena) {
  std::vector<ExportedSegment> out;
  for (uint32_t i = 0; i < arena.segment_bytes().size(); ++i) {
    auto segment = arena.export_segment(i);
    REQUIRE(segment);
    out.push_back(std::move(*segment));
  }
  return out;
}

ExportedSegment again(const ExportedSegment& segment) {
  ExportedSegment out;
  out.kind = segment.kind;
  out.handle = segment.handle;
  out.bytes = segment.bytes;
  out.device_uuid = segment.device_uuid;
  if (segment.fd) out.fd.reset(::fcntl(segment.fd.get(), F_DUPFD_CLOEXEC, 3));
  return out;
}

std::vector<ExportedSegment> one(ExportedSegment segment) {
  std::vector<ExportedSegment> out;
  out.push_back(std::move(segment));
  return out;
}

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

std::size_t open_descriptors() {
  const std::filesystem::directory_iterator all("/proc/self/fd");
  return static_cast<std::size_t>(std::distance(begin(all), end(all)));
}

}  // namespace

// ---- which kind --------------------------------------------------------------------------------

TEST_CASE("The best kind that works is chosen, and the driver says why the better ones do not") {
  struct Row {
    std::string lacks;
    ArenaKind kind;
    std::vector<std::string> words;  // for each kind that was refused
  };
  const std::vector<Row> rows = {
      {"", ArenaKind::kFabricVmm, {}},
      {"fabric", ArenaKind::kDeviceVmm, {"CUDA_ERROR_NOT_SUPPORTED"}},
      // Claimed by the device, but there is no channel.
      {"imex", ArenaKind::kDeviceVmm, {"CUDA_ERROR_NOT_PERMITTED"}},
      {"fabric,fd",
       ArenaKind::kCudaMalloc,
       {"CUDA_ERROR_NOT_SUPPORTED", "CUDA_ERROR_NOT_SUPPORTED"}},
      {"imex,fd", ArenaKind::kCudaMalloc, {"CUDA_ERROR_NOT_PERMITTED", "CUDA_ERROR_NOT_SUPPORTED"}},
      {"vmm", ArenaKind::kCudaMalloc, {"CUDA_ERROR_NOT_SUPPORTED", "CUDA_ERROR_NOT_SUPPORTED"}},
      {"rdma", ArenaKind::kFabricVmm, {}},
  };
  for (const Row& row : rows) {
    INFO("lacks " << row.lacks);
    const World world(gpus(1, row.lacks));
    const auto choice = probe(world.device, kAll);
    REQUIRE(choice);
    CHECK(choice->kind == row.kind);
    CHECK(choice->imported == (row.kind != ArenaKind::kCudaMalloc));
    REQUIRE(choice->refused.size() == row.words.size());
    for (std::size_t i = 0; i < row.words.size(); ++i) {
      CHECK(choice->refused[i].kind == kAll[i]);
      CHECK(has(choice->refused[i].why.message, row.words[i]));
    }
    CHECK(world.held() == 0);
    CHECK(world.machine->device_bytes(0) == 0);
    // What the probe has promised, an arena keeps.
    CHECK(world.arena(row.kind, {kMiB, kMiB})->total_bytes() == 2 * kGranule);
  }
}

TEST_CASE("Kinds are tried in the order in which they are wanted, and no others") {
  const World world;
  const ArenaKind malloc_first[] = {ArenaKind::kCudaMalloc, ArenaKind::kFabricVmm};
  auto choice = probe(world.device, malloc_first);
  REQUIRE(choice);
  CHECK(choice->kind == ArenaKind::kCudaMalloc);
  CHECK(choice->refused.empty());
  CHECK(world.machine->calls("cuMemCreate") == 0);
  // The driver does not open it here, and is not asked to.
  CHECK(world.machine->calls("cuIpcGetMemHandle") == 1);
  CHECK(world.machine->calls("cuIpcOpenMemHandle") == 0);
  CHECK(reason_of(probe(world.device, {})) == "ARENA_KIND_MISSING kinds");
}

TEST_CASE("Where no wanted kind works, the error has the driver's words to each") {
  const World world(gpus(1, "imex,fd,ipc"));
  const auto none = probe(world.device, kAll);
  REQUIRE(reason_of(none) == "ARENA_KIND_UNAVAILABLE ");
  CHECK(none.error().code == Code::kFailedPrecondition);
  const std::string& text = none.error().message;
  CHECK(has(text, "fabric_vmm: cuMemGetAllocationGranularity: CUDA_ERROR_NOT_PERMITTED"));
  CHECK(has(text, "device_vmm: cuMemGetAllocationGranularity: CUDA_ERROR_NOT_SUPPORTED"));
  CHECK(has(text, "cuda_malloc: cuIpcGetMemHandle: CUDA_ERROR_NOT_SUPPORTED"));
  CHECK(world.held() == 0);
  const ArenaKind fabric[] = {ArenaKind::kFabricVmm};
  CHECK(reason_of(probe(world.device, fabric)) == "ARENA_KIND_UNAVAILABLE ");
}

TEST_CASE("A kind that fails in any step of its use is not chosen") {
  struct Step {
    std::string call;
    uint64_t nth;
  };
  // Twice where the importing half does it too. Some machines make memory for fabric handles and
  // refuse no earlier than at the export, others at the import.
  const std::vector<Step> steps = {
      {"cuMemGetAllocationGranularity", 1},
      {"cuMemCreate", 1},
      {"cuMemAddressReserve", 1},
      {"cuMemMap", 1},
      {"cuMemSetAccess", 1},
      {"cuMemExportToShareableHandle", 1},
      {"cuMemImportFromShareableHandle", 1},
      {"cuMemAddressReserve", 2},
      {"cuMemMap", 2},
      {"cuMemSetAccess", 2},
  };
  const ArenaKind kind = GENERATE(ArenaKind::kFabricVmm, ArenaKind::kDeviceVmm);
  const World world;
  const ArenaKind wanted[] = {kind, ArenaKind::kCudaMalloc};
  for (const auto& [call, nth] : steps) {
    INFO(name_of(kind) << ", " << call << " " << nth);
    world.machine->fail(call, nth, cuda::CUDA_ERROR_NOT_PERMITTED);
    const auto choice = probe(world.device, wanted);
    REQUIRE(choice);
    CHECK(choice->kind == ArenaKind::kCudaMalloc);
    REQUIRE(choice->refused.size() == 1);
    CHECK(has(choice->refused[0].why.message, call + ": CUDA_ERROR_NOT_PERMITTED"));
    CHECK(world.held() == 0);
  }
}

// ---- an arena ----------------------------------------------------------------------------------

TEST_CASE("An arena has one allocation for each segment, rounded up") {
  const ArenaKind kind = GENERATE(from_range(std::begin(kAll), std::end(kAll)));
  INFO(name_of(kind));
  const World world;
  {
    const auto arena = world.arena(kind, {1, kGranule, kGranule + 1});
    CHECK(arena->kind() == kind);
    CHECK(arena->device() == world.device);
    CHECK(arena->segment_bytes() == std::vector<uint64_t>{kGranule, kGranule, 2 * kGranule});
    CHECK(arena->total_bytes() == 4 * kGranule);
    CHECK(world.machine->device_bytes(0) == 4 * kGranule);
    const auto live = world.machine->live();
    INFO(live.to_string());
    if (kind == ArenaKind::kCudaMalloc) {
      CHECK(live.allocations == 3);
    } else {
      CHECK(live.handles == 3);
      CHECK(live.mappings == 3);
    }
  }
  CHECK(world.held() == 0);
  CHECK(world.machine->device_bytes(0) == 0);
}

TEST_CASE("Sizes are rounded to the granularity of their own kind") {
  Setup setup = gpus(1);
  setup.fabric_granularity_kb = 8 * 1024;
  const World world(setup);
  CHECK(world.arena(ArenaKind::kFabricVmm, {1})->total_bytes() == 8 * kMiB);
  CHECK(world.arena(ArenaKind::kDeviceVmm, {1})->total_bytes() == kGranule);
  const ArenaKind fabric[] = {ArenaKind::kFabricVmm};
  CHECK(probe(world.device, fabric));
}

TEST_CASE("VMM memory is asked for as RDMA reaches it, where the device can") {
  const bool can = GENERATE(true, false);
  const World world(gpus(1, can ? "" : "rdma"));
  for (const ArenaKind kind : {ArenaKind::kFabricVmm, ArenaKind::kDeviceVmm}) {
    INFO(name_of(kind));
    const auto arena = world.arena(kind, {1});
    const cuda::Api& api = world.device->api();
    cuda::CUmemGenericAllocationHandle handle = 0;
    REQUIRE(api.cuMemRetainAllocationHandle(&handle, reinterpret_cast<void*>(*arena->address_of(
                                                         {0, 0, 1}))) == cuda::CUDA_SUCCESS);
    cuda::CUmemAllocationProp properties{};
    CHECK(api.cuMemGetAllocationPropertiesFromHandle(&properties, handle) == cuda::CUDA_SUCCESS);
    CHECK(api.cuMemRelease(handle) == cuda::CUDA_SUCCESS);
    CHECK((properties.allocFlags.gpuDirectRDMACapable != 0) == can);
  }
}

TEST_CASE("An address is given for what lies wholly in a segment") {
  const ArenaKind kind = GENERATE(from_range(std::begin(kAll), std::end(kAll)));
  const World world;
  const auto arena = world.arena(kind, {kGranule, 2 * kGranule});
  const auto first = arena->address_of({0, 0, kGranule});
  const auto second = arena->address_of({1, 0, 2 * kGranule});
  REQUIRE(first);
  REQUIRE(second);
  CHECK((*first + kGranule <= *second || *second + 2 * kGranule <= *first));
  CHECK(arena->address_of({1, kGranule, kGranule}) == *second + kGranule);
  CHECK(arena->address_of({0, kGranule - 1, 1}) == *first + kGranule - 1);
  constexpr uint64_t kMost = std::numeric_limits<uint64_t>::max();
  const std::vector<Region> outside = {
      {0, 0, kGranule + 1}, {0, kGranule - 1, 2}, {0, kGranule, 1},  {0, kGranule, 0},  {0, 0, 0},
      {0, kMost, 1},        {0, 1, kMost},        {0, kMost, kMost}, {0, 2, kMost - 1}, {2, 0, 1},
      {UINT32_MAX, 0, 1},   {1, 2 * kGranule, 1},
  };
  for (const Region& region : outside) {
    INFO(region.segment << " " << region.offset << " " << region.bytes);
    CHECK_FALSE(arena->address_of(region));
  }
  CHECK(reason_of(arena->export_segment(2)) == "ARENA_SEGMENT_INVALID segment");
}

TEST_CASE("Sizes and shares that make no sense are refused before anything is allocated") {
  const ArenaKind kind = GENERATE(from_range(std::begin(kAll), std::end(kAll)));
  const World world;
  const auto make = [&](const std::vector<uint64_t>& sizes, double share = 1) {
    return reason_of(DeviceArena::create(world.device, kind, sizes, share));
  };
  constexpr uint64_t kHalf = uint64_t{1} << 63;
  CHECK(make({}) == "ARENA_SEGMENT_INVALID segments");
  CHECK(make({0}) == "ARENA_SEGMENT_INVALID segments[0]");
  CHECK(make({kGranule, 0}) == "ARENA_SEGMENT_INVALID segments[1]");
  CHECK(make({UINT64_MAX}) == "ARENA_SEGMENT_INVALID segments[0]");
  CHECK(make({UINT64_MAX - kGranule + 2}) == "ARENA_SEGMENT_INVALID segments[0]");
  CHECK(make({kHalf, kHalf}) == "ARENA_SEGMENT_INVALID segments[1]");
  // The largest that are numbers are only too large.
  CHECK(make({UINT64_MAX - kGranule + 1}) == "DEVICE_MEMORY_SHARE ");
  CHECK(make({kHalf, kHalf - kGranule}) == "DEVICE_MEMORY_SHARE ");
  for (const double share : {0.0, -0.5, 1.0001, std::numeric_limits<double>::infinity(),
                             std::numeric_limits<double>::quiet_NaN()}) {
    INFO(share);
    CHECK(make({kGranule}, share) == "ARENA_SHARE_INVALID share");
  }
  CHECK(world.machine->calls("cuMemCreate") == 0);
  CHECK(world.machine->calls("cuMemAlloc") == 0);
  CHECK(world.held() == 0);
}

TEST_CASE("An arena takes at most its share of what is free now") {
  const ArenaKind kind = GENERATE(from_range(std::begin(kAll), std::end(kAll)));
  const World world;
  // Another process has 56 of the 256 MiB.
  gpu_test::Exporter engine(KVFERRY_GPU_EXPORTER, kLibrary);
  engine.alloc(56 * kMiB);
  const auto make = [&](const std::vector<uint64_t>& sizes) {
    return DeviceArena::create(world.device, kind, sizes, 0.5);
  };
  CHECK(make({100 * kMiB}));
  CHECK(make({50 * kMiB - 1, 50 * kMiB - 1}));
  const uint64_t before = world.machine->calls("cuMemCreate") + world.machine->calls("cuMemAlloc");
  // It counts what is allocated, not what was asked for.
  for (const std::vector<uint64_t>& sizes :
       {std::vector<uint64_t>{100 * kMiB + 1}, {50 * kMiB, 50 * kMiB + 1}}) {
    const auto refused = make(sizes);
    REQUIRE(reason_of(refused) == "DEVICE_MEMORY_SHARE ");
    CHECK(refused.error().code == Code::kResourceExhausted);
    CHECK(has(refused.error().message, std::to_string(102 * kMiB)));
    CHECK(has(refused.error().message, std::to_string(100 * kMiB)));
    CHECK(has(refused.error().message, std::to_string(200 * kMiB)));
  }
  CHECK(world.machine->calls("cuMemCreate") + world.machine->calls("cuMemAlloc") == before);
  // What the first arena has is not free for a second.
  const auto first = make({100 * kMiB});
  REQUIRE(first);
  CHECK(reason_of(make({51 * kMiB})) == "DEVICE_MEMORY_SHARE ");
  CHECK(make({50 * kMiB}));
}

TEST_CASE("Whichever call fails, an arena, a view or a probe leaves nothing behind") {
  const ArenaKind kind = GENERATE(from_range(std::begin(kAll), std::end(kAll)));
  const World world;
  gpu_test::Exporter other(KVFERRY_GPU_EXPORTER, kLibrary);
  const uint64_t theirs = 4 * kMiB;
  const auto malloced = other.alloc(theirs);
  const auto owner =
      world.arena(kind == ArenaKind::kCudaMalloc ? ArenaKind::kDeviceVmm : kind, {kGranule});
  const uint64_t owned = world.held();
  const std::vector<std::pair<std::string, std::function<Status()>>> uses = {
      {"arena",
       [&]() -> Status {
         auto arena =
             DeviceArena::create(world.device, kind, std::vector<uint64_t>{kGranule, kGranule}, 1);
         KVFERRY_RETURN_IF_ERROR(arena);
         for (uint32_t i = 0; i < 2; ++i) KVFERRY_RETURN_IF_ERROR((*arena)->export_segment(i));
         return {};
       }},
      {"view",
       [&]() -> Status {
         // A CUDA IPC handle that opens here is another process's.
         std::vector<ExportedSegment> segments;
         if (kind == ArenaKind::kCudaMalloc) {
           ExportedSegment segment;
           segment.kind = kind;
           segment.handle = malloced.handle;
           segment.bytes = theirs;
           segment.device_uuid = world.device->facts().uuid;
           segments.push_back(std::move(segment));
         } else {
           auto segment = owner->export_segment(0);
           KVFERRY_RETURN_IF_ERROR(segment);
           segments = one(std::move(*segment));
         }
         KVFERRY_RETURN_IF_ERROR(DeviceArenaView::open(world.device, std::move(segments)));
         return {};
       }},
      {"probe",
       [&]() -> Status {
         KVFERRY_RETURN_IF_ERROR(probe(world.device, std::span(&kind, 1)));
         return {};
       }},
  };
  for (const auto& [name, use] : uses) {
    const uint64_t bytes = world.machine->device_bytes(0);
    const std::size_t descriptors = open_descriptors();
    const uint64_t before = world.machine->calls();
    REQUIRE(use());
    const uint64_t count = world.machine->calls() - before;
    REQUIRE(count >= 6);
    uint64_t refused = 0;
    for (uint64_t n = 1; n <= count; ++n) {
      INFO(name_of(kind) << " " << name << ", call " << n << " of " << count);
      world.machine->fail("", n, cuda::CUDA_ERROR_OUT_OF_MEMORY);
      const Status status = use();
      world.machine->fail("", 0, 0);
      // What gives something back may fail and the use succeed.
      if (!status) {
        ++refused;
        CHECK(has(status.error().message, "CUDA_ERROR_OUT_OF_MEMORY"));
      }
      const auto live = world.machine->live();
      INFO(live.to_string());
      CHECK(world.held() == owned);
      CHECK(world.machine->device_bytes(0) == bytes);
      CHECK(open_descriptors() == descriptors);
    }
    CHECK(refused >= 3);
  }
}

// ---- another process ---------------------------------------------------------------------------

TEST_CASE("What another process writes through its view is in the arena") {
  const ArenaKind kind = GENERATE(from_range(std::begin(kAll), std::end(kAll)));
  INFO(name_of(kind));
  const World world(gpus(2));
  Importer importer(KVFERRY_ARENA_IMPORTER, kLibrary);
  auto arena = world.arena(kind, {kGranule, 2 * kGranule});
  {
    const auto segments = export_all(*arena);
    for (const ExportedSegment& segment : segments) {
      CHECK(segment.kind == kind);
      CHECK(segment.device_uuid == world.device->facts().uuid);
      CHECK(static_cast<bool>(segment.fd) == (kind == ArenaKind::kDeviceVmm));
      if (segment.fd) CHECK((::fcntl(segment.fd.get(), F_GETFD) & FD_CLOEXEC) != 0);
    }
    CHECK(segments[1].bytes == 2 * kGranule);
    CHECK(importer.open(segments).reason.data() == std::string());
  }
  std::vector<uint8_t> data(48);
  std::iota(data.begin(), data.end(), uint8_t{1});
  const std::vector<Region> places = {
      {0, 0, 48}, {0, kGranule - 48, 48}, {1, 100, 48}, {1, 2 * kGranule - 48, 48}};
  for (const Region& place : places) {
    INFO(place.segment << " " << place.offset);
    ++data[0];
    CHECK(importer.write(place, data).reason.data() == std::string());
    CHECK(world.read(*arena->address_of(place), data.size()) == data);
  }
  CHECK(importer.write({0, kGranule - 47, 48}, data).reason.data() == std::string("OUTSIDE"));
  CHECK(importer.write({2, 0, 48}, data).reason.data() == std::string("OUTSIDE"));
  CHECK(importer.write({0, 1, UINT64_MAX}, data).reason.data() == std::string("OUTSIDE"));

  if (kind != ArenaKind::kCudaMalloc) {
    // A mapping keeps the memory alive by itself.
    arena.reset();
    CHECK(world.machine->device_bytes(0) == 3 * kGranule);
    CHECK(importer.write(places[0], data).reason.data() == std::string());
  }
  CHECK(importer.close().held == 0);
  arena.reset();
  CHECK(world.machine->device_bytes(0) == 0);
}

TEST_CASE("A view refuses what it is told wrong, and leaves nothing") {
  const ArenaKind kind = GENERATE(from_range(std::begin(kAll), std::end(kAll)));
  INFO(name_of(kind));
  const World world(gpus(2));
  Importer importer(KVFERRY_ARENA_IMPORTER, kLibrary);
  auto arena = world.arena(kind, {kGranule});
  const ExportedSegment good = std::move(export_all(*arena).front());
  const auto open = [&](const std::function<void(ExportedSegment&)>& change) {
    // A good one before it, which is undone.
    std::vector<ExportedSegment> segments;
    segments.push_back(again(good));
    segments.push_back(again(good));
    change(segments.back());
    const auto reply = importer.open(segments);
    CHECK(reply.held == 0);
    return std::string(reply.reason.data());
  };
  CHECK(open([&](ExportedSegment& s) { s.bytes = 0; }) == "ARENA_SEGMENT_INVALID");
  CHECK(open([&](ExportedSegment& s) { s.bytes = 2 * kGranule; }) == "ARENA_IMPORT_FAILED");
  CHECK(open([&](ExportedSegment& s) { s.device_uuid = world.devices->all()[1]->facts().uuid; }) ==
        "ARENA_WRONG_DEVICE");
  CHECK(open([&](ExportedSegment& s) {
          s.handle.fill(7);
          s.fd.reset();
        }) == "ARENA_IMPORT_FAILED");
  CHECK(reason_of(DeviceArenaView::open(world.device, {})) == "ARENA_SEGMENT_INVALID segments");
  // Memory of the first device that is said to be the second's, which could reach it.
  std::vector<ExportedSegment> moved = one(again(good));
  moved[0].device_uuid = world.devices->all()[1]->facts().uuid;
  CHECK(importer.open(moved).reason.data() == std::string("ARENA_IMPORT_FAILED"));
  CHECK(importer.open(one(again(good))).reason.data() == std::string());
}

TEST_CASE("A handle of an arena that has gone opens nothing, a descriptor does") {
  const ArenaKind kind = GENERATE(from_range(std::begin(kAll), std::end(kAll)));
  INFO(name_of(kind));
  const World world;
  Importer importer(KVFERRY_ARENA_IMPORTER, kLibrary);
  auto arena = world.arena(kind, {kGranule});
  {
    const auto segments = export_all(*arena);
    arena.reset();
    const std::string reason(importer.open(segments).reason.data());
    CHECK(reason == (kind == ArenaKind::kDeviceVmm ? "" : "ARENA_IMPORT_FAILED"));
  }
  CHECK(importer.close().held == 0);
  CHECK(world.machine->device_bytes(0) == 0);
}

TEST_CASE("Fabric memory that lies elsewhere is mapped through a device that is here") {
  const World world(gpus(2));
  const auto arena = world.arena(ArenaKind::kFabricVmm, {kGranule, kGranule});
  const auto& second = world.devices->all()[1];
  auto segments = export_all(*arena);
  // A device of another machine has no number here, and says nothing to this one.
  for (ExportedSegment& segment : segments) segment.device_uuid.fill(0xee);
  std::vector<ExportedSegment> copies;
  for (const ExportedSegment& segment : segments) copies.push_back(again(segment));
  CHECK(reason_of(DeviceArenaView::open(second, std::move(copies))) ==
        "ARENA_WRONG_DEVICE segments[0]");
  const uint64_t owned = world.held();
  {
    auto view = DeviceArenaView::open(second, std::move(segments), world.devices->all(),
                                      MemoryHome::kElsewhere);
    INFO((view ? "" : view.error().to_string()));
    REQUIRE(view);
    const Region place{1, 4096, 64};
    for (const auto& device : world.devices->all()) {
      const std::vector<uint8_t> data(64, static_cast<uint8_t>(device->facts().ordinal + 1));
      const Device::Current current(*device);
      const cuda::Api& api = device->api();
      REQUIRE(api.cuMemcpyHtoDAsync(*(*view)->address_of(place), data.data(), data.size(),
                                    nullptr) == cuda::CUDA_SUCCESS);
      REQUIRE(api.cuStreamSynchronize(nullptr) == cuda::CUDA_SUCCESS);
      CHECK(world.read(*arena->address_of(place), 64) == data);
    }
    CHECK((*view)->close() == 0);
    CHECK(world.held() == owned);
    CHECK_FALSE((*view)->address_of(place));
    CHECK((*view)->close() == 0);
  }
  // Nothing else comes from elsewhere.
  for (const ArenaKind kind : {ArenaKind::kDeviceVmm, ArenaKind::kCudaMalloc}) {
    const auto other = world.arena(kind, {kGranule});
    CHECK(reason_of(DeviceArenaView::open(world.device, export_all(*other), {},
                                          MemoryHome::kElsewhere)) ==
          "ARENA_SEGMENT_INVALID segments[0]");
  }
}

TEST_CASE("A view is touched by those devices that it is opened for") {
  const bool both = GENERATE(true, false);
  World world(gpus(2));
  auto arena = world.arena(ArenaKind::kDeviceVmm, {kGranule});
  const auto& second = world.devices->all()[1];
  auto view = DeviceArenaView::open(
      world.device, export_all(*arena),
      both ? world.devices->all() : std::vector<std::shared_ptr<const Device>>{});
  REQUIRE(view);
  {
    const Device::Current current(*second);
    const uint64_t word = 7;
    const cuda::Api& api = second->api();
    const bool copied = api.cuMemcpyHtoDAsync(*(*view)->address_of({0, 0, 8}), &word, sizeof word,
                                              nullptr) == cuda::CUDA_SUCCESS &&
                        api.cuStreamSynchronize(nullptr) == cuda::CUDA_SUCCESS;
    CHECK(copied == both);
  }
  view->reset();
  arena.reset();
  if (both) return;
  // What the lost context held may be lost with it.
  world.device.reset();
  world.devices.reset();
  world.machine->reset();
}

TEST_CASE("A view that the driver will not close says so") {
  const World world;
  const auto arena = world.arena(ArenaKind::kDeviceVmm, {kGranule});
  auto view = DeviceArenaView::open(world.device, export_all(*arena));
  REQUIRE(view);
  world.machine->fail("cuMemUnmap", 1, cuda::CUDA_ERROR_INVALID_VALUE);
  CHECK((*view)->close() == 1);
  CHECK((*view)->close() == 0);
}

// ---- a device that is down ---------------------------------------------------------------------

TEST_CASE("A device that is down has no arenas, and the other has") {
  const ArenaKind kind = GENERATE(from_range(std::begin(kAll), std::end(kAll)));
  World world(gpus(2));
  const std::vector<uint64_t> sizes = {kGranule};
  auto arena = world.arena(kind, sizes);
  auto segments = export_all(*arena);
  world.machine->fault(0, cuda::CUDA_ERROR_ILLEGAL_ADDRESS);
  // The driver's word comes first; cuMemGetInfo asks the context.
  const auto first = DeviceArena::create(world.device, kind, sizes, 1);
  REQUIRE_FALSE(first);
  CHECK(first.error().code == Code::kUnavailable);
  CHECK(first.error().reason == "CUDA_ILLEGAL_ADDRESS");
  REQUIRE(world.device->down());
  const uint64_t before = world.machine->calls();
  CHECK(reason_of(DeviceArena::create(world.device, kind, sizes, 1)) == "GPU_DOWN ");
  CHECK(reason_of(probe(world.device, kAll)) == "GPU_DOWN ");
  CHECK(reason_of(arena->export_segment(0)) == "GPU_DOWN ");
  CHECK(reason_of(DeviceArenaView::open(world.device, std::move(segments))) == "GPU_DOWN ");
  CHECK(world.machine->calls() == before);
  const auto& healthy = world.devices->all()[1];
  CHECK(DeviceArena::create(healthy, kind, sizes, 1));
  CHECK(probe(healthy, kAll));
  // What the lost context held may be lost with it.
  arena.reset();
  world.device.reset();
  world.devices.reset();
  world.machine->reset();
}

TEST_CASE("A device that fails in a trial ends the probe") {
  World world;
  world.machine->fail("cuMemMap", 1, cuda::CUDA_ERROR_ILLEGAL_ADDRESS);
  const auto choice = probe(world.device, kAll);
  REQUIRE_FALSE(choice);
  CHECK(choice.error().code == Code::kUnavailable);
  CHECK(world.device->down());
  CHECK(world.machine->calls("cuMemAlloc") == 0);
  world.device.reset();
  world.devices.reset();
  world.machine->reset();
}

}  // namespace kvferry::gpu
