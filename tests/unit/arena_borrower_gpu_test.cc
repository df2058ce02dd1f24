// Borrowed arenas where there are GPUs: of all kinds, over the fake driver.
#include <numeric>

#include "daemon/gpu/device_arena.h"
#include "tests/fake_cuda/control.h"
#include "tests/unit/arena_peer.h"
#include "tests/unit/lending_support.h"

namespace kvferry::node {
namespace {

using memory::Region;

constexpr const char* kLibrary = KVFERRY_FAKE_CUDA_LIBRARY;
constexpr uint64_t kPage = 4096;
constexpr uint64_t kGranule = 2U << 20;
constexpr uint32_t kDeviceArena = 5;  // with segments from 20 on
constexpr uint32_t kHostArena = 3;    // from 10 on

fake_cuda::Setup gpus(int devices, const std::string& lacks = {}) {
  fake_cuda::Setup setup;
  setup.devices = devices;
  setup.memory_mb = 256;
  setup.lacks = lacks;
  return setup;
}

rpc::LentKind lent_kind(gpu::ArenaKind kind) {
  switch (kind) {
    case gpu::ArenaKind::kFabricVmm:
      return rpc::LentKind::kFabricVmm;
    case gpu::ArenaKind::kDeviceVmm:
      return rpc::LentKind::kDeviceVmm;
    case gpu::ArenaKind::kCudaMalloc:
      break;
  }
  return rpc::LentKind::kCudaMalloc;
}

// A lender with a device arena on GPU 0 and one in host memory, and a borrower in the same process.
struct World {
  explicit World(gpu::ArenaKind kind, const fake_cuda::Setup& setup = gpus(2),
                 const std::function<void(ArenaBorrowerConfig&)>& change = {})
      : machine(kLibrary, setup) {
    forget_log();
    auto driver = cuda::Driver::load(kLibrary);
    REQUIRE(driver);
    auto opened = gpu::Devices::open(*driver);
    REQUIRE(opened);
    devices = std::move(*opened);
    auto made = gpu::DeviceArena::create(devices->all()[0], kind,
                                         std::vector<uint64_t>{kGranule, 2 * kGranule}, 1);
    REQUIRE(made);
    arena = std::move(*made);
    LentArena lent;
    lent.number = kDeviceArena;
    lent.kind = lent_kind(kind);
    lent.device_uuid = devices->all()[0]->facts().uuid;
    for (uint32_t i = 0; i < 2; ++i) {
      auto segment = arena->export_segment(i);
      REQUIRE(segment);
      lent.segments.push_back({20 + i, segment->bytes, segment->fd.get(), segment->handle});
      exported.push_back(std::move(*segment));
    }
    lender = start_lender(lender_config(directory), {memory.lent, lent}, at_lender);
    owned = held();
    ArenaBorrowerConfig config;
    config.host = host_id();
    config.devices = devices;
    if (change) change(config);
    borrower = std::make_unique<ArenaBorrower>(config, calls, at_borrower.sink());
  }
  ~World() {
    borrower.reset();
    CHECK(held() == owned);
    lender.reset();
    exported.clear();
    arena.reset();
    CHECK(held() == 0);
  }

  uint64_t held() const {
    const auto live = machine->live();
    return live.total() - live.contexts;
  }
  std::vector<uint8_t> read(const Region& region) const {
    std::vector<uint8_t> out(region.bytes);
    const gpu::Device& device = *devices->all()[0];
    const gpu::Device::Current current(device);
    REQUIRE(device.api().cuMemcpyDtoHAsync(out.data(), *arena->address_of(region), out.size(),
                                           nullptr) == cuda::CUDA_SUCCESS);
    REQUIRE(device.api().cuStreamSynchronize(nullptr) == cuda::CUDA_SUCCESS);
    return out;
  }
  // From a copy that runs on this device.
  static bool write(const gpu::Device& device, cuda::CUdeviceptr address,
                    const std::vector<uint8_t>& data) {
    const gpu::Device::Current current(device);
    return device.api().cuMemcpyHtoDAsync(address, data.data(), data.size(), nullptr) ==
               cuda::CUDA_SUCCESS &&
           device.api().cuStreamSynchronize(nullptr) == cuda::CUDA_SUCCESS;
  }
  void up(uint64_t link, engine::CheckKind check = engine::CheckKind::kNone) {
    lender->on_link_up(peer_ref(link + 100, 1), check);
    calls.connect(LinkId{link}, *lender, peer_ref(link + 100, 1));
    borrower->on_link_up(peer_ref(link, 2), check);
  }
  void gone(uint64_t link) {
    borrower->on_link_gone(LinkId{link});
    lender->on_link_gone(LinkId{link + 100});
  }
  // Everything that was offered has been tried.
  bool tried(uint64_t arenas) const {
    return soon([&] {
      const auto stats = borrower->stats();
      return stats.mapped + stats.failed_device + stats.failed_import + stats.skipped_check ==
             arenas;
    });
  }

  fake_cuda::Machine machine;
  TemporaryDirectory directory;
  HostMemory memory{{kPage, 3 * kPage}};
  std::shared_ptr<const gpu::Devices> devices;
  std::unique_ptr<gpu::DeviceArena> arena;
  std::vector<gpu::ExportedSegment> exported;
  Events at_lender;
  Events at_borrower;
  Calls calls;
  std::unique_ptr<ArenaLender> lender;
  std::unique_ptr<ArenaBorrower> borrower;
  uint64_t owned = 0;
};

constexpr gpu::ArenaKind kVmm[] = {gpu::ArenaKind::kFabricVmm, gpu::ArenaKind::kDeviceVmm};
constexpr gpu::ArenaKind kAll[] = {gpu::ArenaKind::kFabricVmm, gpu::ArenaKind::kDeviceVmm,
                                   gpu::ArenaKind::kCudaMalloc};

}  // namespace

TEST_CASE("Device arenas are mapped for all GPUs here, host arenas are pinned for them") {
  const gpu::ArenaKind kind = GENERATE(from_range(std::begin(kVmm), std::end(kVmm)));
  INFO(name_of(kind));
  World world(kind);
  world.up(1);
  REQUIRE(world.at_borrower.mapped(LinkId{1}, kDeviceArena));
  REQUIRE(world.at_borrower.mapped(LinkId{1}, kHostArena));
  {
    const auto segments = world.borrower->segments(LinkId{1}, kDeviceArena);
    REQUIRE(segments != nullptr);
    const Region region{21, 2 * kGranule - 64, 64};
    REQUIRE(segments->holds(region));
    CHECK_FALSE(segments->holds({21, 2 * kGranule - 63, 64}));
    CHECK(segments->device_of(region) == world.devices->all()[0].get());
    CHECK(segments->host_address(region) == nullptr);
    std::vector<uint8_t> data(64);
    std::iota(data.begin(), data.end(), uint8_t{1});
    for (const auto& device : world.devices->all()) {
      ++data[0];
      REQUIRE(World::write(*device, segments->address_on(*device, region), data));
      CHECK(world.read({1, 2 * kGranule - 64, 64}) == data);
    }
    const auto host = world.borrower->segments(LinkId{1}, kHostArena);
    const Region page{11, 2 * kPage, 64};
    for (const auto& device : world.devices->all()) {
      ++data[0];
      REQUIRE(host->address_on(*device, page) != 0);
      REQUIRE(World::write(*device, host->address_on(*device, page), data));
      CHECK(std::memcmp(world.memory.memory.segment(1).data() + 2 * kPage, data.data(), 64) == 0);
    }
    CHECK(world.machine->live().registrations == 2);
    // What holds a registration holds the mapping under it.
    CHECK(host->keep(page).get() != nullptr);
  }
  world.gone(1);
  CHECK(world.at_lender.unmapped(LinkId{101}));
  CHECK(world.held() == world.owned);
  CHECK(world.borrower->stats().stuck == 0);
}

TEST_CASE("A registration that a copy holds holds all of the arena") {
  World world(gpu::ArenaKind::kDeviceVmm);
  world.up(1);
  REQUIRE(world.at_borrower.mapped(LinkId{1}, kHostArena));
  REQUIRE(world.at_borrower.mapped(LinkId{1}, kDeviceArena));
  auto host = world.borrower->segments(LinkId{1}, kHostArena);
  std::byte* const address = host->host_address({10, 0, kPage});
  auto held = host->keep({10, 0, kPage});
  host.reset();
  auto device_held = world.borrower->segments(LinkId{1}, kDeviceArena)->keep({20, 0, kPage});
  world.gone(1);
  std::memset(address, 9, kPage);
  CHECK(world.memory.memory.segment(0).data()[0] == std::byte{9});
  device_held.reset();
  REQUIRE(soon([&] { return world.borrower->stats().arenas == 1; }));
  CHECK(world.at_lender.count<engine::PeerUnmapped>() == 0);
  CHECK(world.machine->live().registrations == 2);
  held.reset();
  CHECK(world.at_lender.unmapped(LinkId{101}));
  CHECK(world.machine->live().registrations == 0);
}

TEST_CASE("What another process writes through its mapping is in the lender's arena") {
  const gpu::ArenaKind kind = GENERATE(from_range(std::begin(kAll), std::end(kAll)));
  INFO(name_of(kind));
  World world(kind);
  ArenaPeer peer(KVFERRY_ARENA_PEER, kLibrary);
  world.lender->on_link_up(peer_ref(501, 77), engine::CheckKind::kNone);
  const auto offer = world.lender->offer(peer_ref(501, 77), {host_id()});
  REQUIRE(offer.arenas.size() == 2);
  REQUIRE(peer.up(1, offer, 2).empty());
  REQUIRE(peer.write(1, kDeviceArena, {20, kGranule - 32, 32}, 0x44).empty());
  CHECK(world.read({0, kGranule - 32, 32}) == std::vector<uint8_t>(32, 0x44));
  REQUIRE(peer.write(1, kDeviceArena, {21, 100, 32}, 0x45).empty());
  CHECK(world.read({1, 100, 32}) == std::vector<uint8_t>(32, 0x45));
  REQUIRE(peer.write(1, kHostArena, {10, 0, kPage}, 0x46).empty());
  CHECK(world.memory.memory.segment(0).data()[0] == std::byte{0x46});
  CHECK(peer.write(1, kDeviceArena, {22, 0, 1}, 1) == "OUTSIDE");
  SECTION("it ends well") {
    REQUIRE(peer.tell(PeerOp::kGone, 1).empty());
    world.lender->on_link_gone(LinkId{501});
    CHECK(world.at_lender.unmapped(LinkId{501}));
  }
  SECTION("it is killed") {
    peer.kill();
    CHECK(world.at_lender.wait<engine::PeerProcessGone>(
        [](const engine::PeerProcessGone& event) { return event.boot == boot_id(77); }));
  }
}

TEST_CASE("Where chunks are checked, only host memory is borrowed") {
  World world(gpu::ArenaKind::kFabricVmm);
  world.up(1, engine::CheckKind::kXxh3);
  REQUIRE(world.at_borrower.mapped(LinkId{1}, kHostArena));
  REQUIRE(world.tried(2));
  CHECK(world.borrower->stats().skipped_check == 1);
  CHECK(world.borrower->segments(LinkId{1}, kDeviceArena) == nullptr);
  world.gone(1);
  CHECK(world.at_lender.unmapped(LinkId{101}));
}

TEST_CASE("A device that is not visible here, not reached or not used has no arena here") {
  const gpu::ArenaKind kind = GENERATE(from_range(std::begin(kVmm), std::end(kVmm)));
  std::string reason = "DEVICE_NOT_VISIBLE";
  const std::string lacks = GENERATE(std::string(), std::string("peer"));
  const bool without = GENERATE(true, false);
  World world(kind, gpus(2, lacks), [&](ArenaBorrowerConfig& config) {
    if (without) config.devices = nullptr;
  });
  if (!without && lacks.empty()) {
    // The UUID of a device that is not of this process.
    world.lender->on_link_up(peer_ref(101, 1), engine::CheckKind::kNone);
    auto offer = world.lender->offer(peer_ref(101, 1), {host_id()});
    offer.arenas.at(1).device_uuid[3] ^= 1;
    world.calls.answer_next(offer);
  } else if (!without) {
    reason = "NO_PEER_ACCESS";
  }
  world.up(1);
  REQUIRE(world.at_borrower.mapped(LinkId{1}, kHostArena));
  REQUIRE(world.tried(2));
  CHECK(world.borrower->stats().failed_device == 1);
  CHECK(logged(reason).size() == 1);
  CHECK(world.at_borrower.size() == 1);
  world.gone(1);
  CHECK(world.at_lender.unmapped(LinkId{101}));
}

TEST_CASE("Fabric memory of another host is mapped through any device, and has no socket") {
  World world(gpu::ArenaKind::kFabricVmm, gpus(2),
              [](ArenaBorrowerConfig& config) { config.host = host_id(8); });
  world.lender->on_link_up(peer_ref(101, 1), engine::CheckKind::kNone);
  auto offer = world.lender->offer(peer_ref(101, 1), {host_id(8)});
  REQUIRE(offer.arenas.size() == 1);
  REQUIRE(offer.socket_path.empty());
  // One that has no number here.
  offer.arenas[0].device_uuid.fill(0xee);
  world.calls.answer_next(offer);
  world.up(1);
  REQUIRE(world.at_borrower.mapped(LinkId{1}, kDeviceArena));
  {
    const auto segments = world.borrower->segments(LinkId{1}, kDeviceArena);
    const Region region{20, 4096, 64};
    const std::vector<uint8_t> data(64, 0x17);
    for (const auto& device : world.devices->all())
      REQUIRE(World::write(*device, segments->address_on(*device, region), data));
    CHECK(world.read({0, 4096, 64}) == data);
  }
  world.gone(1);
  CHECK(soon([&] { return world.held() == world.owned; }));
  CHECK(world.lender->stats().handed_out == 0);
  CHECK(world.at_lender.lent(LinkId{101}, kDeviceArena) == 1);
  CHECK(world.at_lender.size() == 1);
}

TEST_CASE("On one host nothing is borrowed without a socket, handles or not") {
  const gpu::ArenaKind kind = GENERATE(gpu::ArenaKind::kFabricVmm, gpu::ArenaKind::kCudaMalloc);
  World world(kind);
  world.lender->on_link_up(peer_ref(101, 1), engine::CheckKind::kNone);
  auto offer = world.lender->offer(peer_ref(101, 1), {host_id()});
  offer.socket_path.clear();
  offer.token = {};
  world.calls.answer_next(offer);
  world.up(1);
  REQUIRE(soon([&] { return world.borrower->stats().failed_socket == 1; }));
  CHECK(logged("it has no socket").size() == 1);
  CHECK(world.at_borrower.size() == 0);
  CHECK(world.held() == world.owned);
}

TEST_CASE("Host memory that the driver does not take back is not said to be unmapped") {
  World world(gpu::ArenaKind::kDeviceVmm);
  world.up(1);
  REQUIRE(world.at_borrower.mapped(LinkId{1}, kHostArena));
  REQUIRE(world.at_borrower.mapped(LinkId{1}, kDeviceArena));
  world.machine->fail("cuMemHostUnregister", 2, cuda::CUDA_ERROR_OUT_OF_MEMORY);
  world.gone(1);
  REQUIRE(soon([&] { return world.borrower->stats().arenas == 0; }));
  CHECK(world.borrower->stats().stuck == 1);
  // What has been unmapped after it is told after it.
  world.up(2);
  REQUIRE(world.at_borrower.mapped(LinkId{2}, kHostArena));
  REQUIRE(world.at_borrower.mapped(LinkId{2}, kDeviceArena));
  world.gone(2);
  CHECK(world.at_lender.unmapped(LinkId{102}));
  CHECK(world.at_lender.evidence() == 1);
  CHECK(world.lender->watches("peer-1", boot_id(1)));
}

TEST_CASE("Whichever call of the driver fails, nothing is left behind and nothing untrue is said") {
  const gpu::ArenaKind kind = GENERATE(from_range(std::begin(kVmm), std::end(kVmm)));
  INFO(name_of(kind));
  World world(kind);
  uint64_t link = 0;
  const auto use = [&] {
    ++link;
    const auto before = world.borrower->stats();
    const uint64_t settled =
        before.mapped + before.failed_device + before.failed_import + before.skipped_check;
    world.up(link);
    REQUIRE(world.tried(settled + 2));
    world.gone(link);
    REQUIRE(soon([&] { return world.borrower->stats().arenas == 0; }));
    // Either all is unmapped, which is told, or the driver has refused to.
    const bool stuck = world.borrower->stats().stuck != before.stuck;
    if (!stuck) REQUIRE(world.at_lender.unmapped(LinkId{link + 100}));
    return world.borrower->stats().mapped - before.mapped;
  };
  REQUIRE(use() == 2);
  uint64_t before = world.machine->calls();
  REQUIRE(use() == 2);
  const uint64_t count = world.machine->calls() - before;
  REQUIRE(count >= 20);
  REQUIRE(soon([&] { return world.lender->stats().processes == 0; }));
  // One may be about to be closed; one that is left in each round shows all the same.
  const std::size_t descriptors = open_descriptors();
  const uint64_t bytes = world.machine->device_bytes(0);
  uint64_t failed = 0;
  for (uint64_t n = 1; n <= count; ++n) {
    INFO("call " << n << " of " << count);
    world.machine->fail("", n, cuda::CUDA_ERROR_OUT_OF_MEMORY);
    if (use() < 2) ++failed;
    world.machine->fail("", 0, 0);
    INFO(world.machine->live().to_string());
    CHECK(soon([&] { return world.held() == world.owned; }));
    CHECK(world.machine->device_bytes(0) == bytes);
    // A process that has not said that all is unmapped is looked at on.
    CHECK(
        soon([&] { return open_descriptors() <= descriptors + world.lender->stats().processes; }));
  }
  CHECK(failed >= 6);
  CHECK(world.borrower->stats().stuck >= 2);
  // A mapping that may still be there is never said to be gone.
  CHECK(world.lender->stats().unmapped + world.borrower->stats().stuck == link);
  CHECK(use() == 2);
}

}  // namespace kvferry::node
