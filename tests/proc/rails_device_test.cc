// Arenas in GPU memory between rails processes that live, over the fake driver. Bytes move where
// the machine's device memory is the processor's too (kvferry-rails-coherent), or, with another
// executable and driver named in the environment, by UCX's own copies to and from the device.
#include <fcntl.h>
#include <signal.h>

#include <cstdlib>

#include "daemon/gpu/device_arena.h"
#include "daemon/rails/rails_capabilities.h"
#include "tests/fake_cuda/control.h"
#include "tests/proc/coherent_rails.h"
#include "tests/proc/rails_harness.h"

namespace kvferry::rails::testing {
namespace {

using gpu::ArenaKind;

constexpr const char* kLibrary = KVFERRY_FAKE_CUDA_LIBRARY;
constexpr uint64_t kLane = 1;
constexpr uint64_t kSegmentBytes = 8ULL << 20;

// A rails process whose UCX has CUDA, and the driver that it finds: then no device memory is the
// processor's.
const char* const kOwnRails = std::getenv("KVFERRY_CUDA_RAILS");
const char* const kOwnDriver = std::getenv("KVFERRY_CUDA_RAILS_DRIVER");

SegmentKind kind_of(ArenaKind kind) {
  switch (kind) {
    case ArenaKind::kFabricVmm:
      return SegmentKind::kFabricVmm;
    case ArenaKind::kDeviceVmm:
      return SegmentKind::kDeviceVmm;
    case ArenaKind::kCudaMalloc:
      break;
  }
  return SegmentKind::kCudaMalloc;
}

// The machine and its devices, as the main process has them. What it has is counted at the end,
// over all processes.
struct World {
  explicit World(int count = 1, uint64_t memory_mb = 1024)
      : machine(kLibrary,
                {.devices = count, .memory_mb = memory_mb, .host_visible = kOwnRails == nullptr}) {
    auto driver = cuda::Driver::load(kLibrary);
    REQUIRE(driver);
    auto opened = gpu::Devices::open(*driver);
    REQUIRE(opened);
    devices = std::move(*opened);
  }
  ~World() {
    for (std::size_t i = 0; i < devices->all().size(); ++i)
      CHECK(machine->device_bytes(static_cast<int>(i)) == 0);
    devices.reset();
    INFO(machine->live().to_string());
    CHECK(machine->live().total() == 0);
  }

  fake_cuda::Machine machine;
  std::shared_ptr<const gpu::Devices> devices;
};

// Segments on devices and in host memory, and their bytes as a test looks at them.
class Arena {
 public:
  explicit Arena(World& world) : world_(world) {}

  Arena& add(ArenaKind kind, std::size_t device = 0, uint64_t bytes = kSegmentBytes) {
    const uint64_t sizes[] = {bytes};
    auto made = gpu::DeviceArena::create(world_.devices->all()[device], kind, sizes, 1);
    REQUIRE(made);
    auto exported = (*made)->export_segment(0);
    REQUIRE(exported);
    Part& part = parts_.emplace_back();
    part.address = *(*made)->address_of({0, 0, exported->bytes});
    part.device = std::move(*made);
    part.fd = std::move(exported->fd);
    segments_.push_back(
        {part.fd.get(), exported->bytes, kind_of(kind), exported->handle, exported->device_uuid});
    return *this;
  }
  Arena& add_host() {
    Part& part = parts_.emplace_back();
    auto memory = make_sealed_memfd("test-arena", kSegmentBytes);
    REQUIRE(memory);
    part.fd = std::move(*memory);
    auto mapped = Mapping::map(part.fd.get(), kSegmentBytes);
    REQUIRE(mapped);
    part.host = std::move(*mapped);
    segments_.push_back({part.fd.get(), kSegmentBytes});
    return *this;
  }

  std::span<const Segment> segments() const { return segments_; }
  std::vector<Segment> copy() const { return segments_; }

  void fill(const Region& region, uint64_t seed) {
    std::vector<uint8_t> bytes(region.bytes);
    testing::fill(bytes.data(), bytes.size(), seed);
    Part& part = parts_[region.segment];
    if (part.device == nullptr)
      std::memcpy(part.host.base() + region.offset, bytes.data(), bytes.size());
    else
      REQUIRE(world_.machine->poke(part.address + region.offset, bytes.data(), bytes.size()));
  }
  bool holds(const Region& region, uint64_t seed) const {
    std::vector<uint8_t> bytes(region.bytes);
    const Part& part = parts_[region.segment];
    if (part.device == nullptr)
      std::memcpy(bytes.data(), part.host.base() + region.offset, bytes.size());
    else
      REQUIRE(world_.machine->peek(part.address + region.offset, bytes.data(), bytes.size()));
    return testing::holds(bytes.data(), bytes.size(), seed);
  }

 private:
  struct Part {
    std::unique_ptr<gpu::DeviceArena> device;
    cuda::CUdeviceptr address = 0;
    UniqueFd fd;
    Mapping host;
  };
  World& world_;
  std::vector<Part> parts_;
  std::vector<Segment> segments_;
};

RailsConfig with_gpus(const World& world, const std::string& transport = "tcp") {
  RailsConfig config = loopback(transport);
  config.executable = kOwnRails != nullptr ? kOwnRails : KVFERRY_RAILS_COHERENT;
  config.cuda_driver = kOwnDriver != nullptr ? kOwnDriver : kLibrary;
  config.unchecked_environment = world.machine.environment();
  return config;
}

// Sends `from` of a's arena to `to` of b's.
void transfer(Node& a, Node& b, uint64_t lane, const Region& from, const Region& to,
              uint64_t token) {
  b.offers.clear();
  REQUIRE(a.client->send_offer(LaneKey{lane}, Node::bytes_of("x"), from, SendToken{token}));
  REQUIRE(pump({&a, &b}, [&] { return b.offers.size() == 1; }));
  REQUIRE(b.client->accept(b.offers[0].descriptor, LaneKey{lane}, to, LandingId{token}));
  REQUIRE(pump({&a, &b}, [&] { return b.receives.contains(token) && a.sends.contains(token); }));
  REQUIRE(b.receives[token].ok);
  REQUIRE(a.sends[token]);
}

RailsExit death_of(RailsConfig config, std::span<const Segment> segments) {
  Node node(std::move(config), segments);
  REQUIRE(node.client->start(monotonic_now()));
  REQUIRE(pump({&node}, [&] { return !node.deaths.empty() || node.ready_count != 0; }));
  REQUIRE(node.ready_count == 0);
  return node.deaths[0];
}

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

TEST_CASE("Bytes cross between segments in GPU memory of every kind, and host memory beside them") {
  const auto kind = GENERATE(ArenaKind::kFabricVmm, ArenaKind::kDeviceVmm, ArenaKind::kCudaMalloc);
  const std::string transport = GENERATE("tcp", "shm");
  INFO(gpu::name_of(kind) << " over " << transport);
  World world;
  Arena here(world);
  Arena there(world);
  here.add(kind).add_host().add(kind);
  there.add_host().add(kind).add(kind);
  Node a(with_gpus(world, transport), here.segments());
  Node b(with_gpus(world, transport), there.segments());
  start({&a, &b});
  join(a, b, kLane);
  uint64_t token = 0;
  for (const uint64_t bytes : {uint64_t{1}, uint64_t{70'001}, kSegmentBytes})
    for (uint32_t from = 0; from < 3; ++from)
      for (uint32_t to = 0; to < 3; ++to) {
        const Region source{from, kSegmentBytes - bytes, bytes};
        const Region target{to, (kSegmentBytes - bytes) / 2, bytes};
        here.fill(source, ++token);
        transfer(a, b, kLane, source, target, token);
        REQUIRE(there.holds(target, token));
      }
  // And the other way.
  there.fill({1, 0, kSegmentBytes}, 777);
  transfer(b, a, kLane, {1, 0, kSegmentBytes}, {2, 0, kSegmentBytes}, ++token);
  REQUIRE(here.holds({2, 0, kSegmentBytes}, 777));
  // A region outside a segment of any kind is refused.
  REQUIRE(
      a.client
          ->send_offer(LaneKey{kLane}, Node::bytes_of("x"), {0, kSegmentBytes, 1}, SendToken{9999})
          .error()
          .reason == "REGION_INVALID");
}

TEST_CASE("Segments of several devices are imported and tested by each rail") {
  World world(3);
  Arena here(world);
  Arena there(world);
  here.add(ArenaKind::kDeviceVmm, 2).add(ArenaKind::kCudaMalloc, 0).add(ArenaKind::kFabricVmm, 2);
  there.add(ArenaKind::kFabricVmm, 1).add(ArenaKind::kDeviceVmm, 1).add(ArenaKind::kDeviceVmm, 2);
  RailsConfig config = with_gpus(world);
  config.rails.push_back({"shm", ""});
  Node a(config, here.segments());
  Node b(config, there.segments());
  start({&a, &b});
  join(a, b, 1, 0);
  join(a, b, 2, 1);
  for (uint32_t segment = 0; segment < 3; ++segment) {
    const Region region{segment, 4096, kSegmentBytes / 2};
    here.fill(region, 10 + segment);
    transfer(a, b, 1 + segment % 2, region, region, 1 + segment);
    REQUIRE(there.holds(region, 10 + segment));
  }
}

TEST_CASE("A process that was killed comes back with its imports, and leaves none behind") {
  const auto kind = GENERATE(ArenaKind::kFabricVmm, ArenaKind::kDeviceVmm, ArenaKind::kCudaMalloc);
  INFO(gpu::name_of(kind));
  World world;
  auto here = std::make_unique<Arena>(world);
  Arena there(world);
  here->add(kind).add(kind);
  there.add(kind);
  const uint64_t all = world.machine->device_bytes(0);
  REQUIRE(all == 3 * kSegmentBytes);
  RailsConfig config = with_gpus(world);
  config.backoff_first = std::chrono::milliseconds(1);
  auto a = std::make_unique<Node>(config, here->segments());
  Node b(config, there.segments());
  start({a.get(), &b});
  const Region region{0, 0, kSegmentBytes};
  for (uint64_t life = 1; life <= 3; ++life) {
    join(*a, b, life);
    // What is in an arena stays: the self-test of a new life has memory of its own, which it frees.
    if (life != 1) REQUIRE(there.holds(region, life - 1));
    REQUIRE(world.machine->device_bytes(0) == all);
    here->fill({1, 0, kSegmentBytes}, life);
    transfer(*a, b, life, {1, 0, kSegmentBytes}, region, life);
    REQUIRE(there.holds(region, life));
    const int ready = a->ready_count;
    a->client->kill("the test says so");
    REQUIRE(pump({a.get(), &b}, [&] { return a->ready_count > ready; }));
    REQUIRE(b.client->close(LaneKey{life}));
    REQUIRE(pump({a.get(), &b}, [&] { return b.closed.size() == life; }));
  }
  REQUIRE(a->client->restarts() == 3);
  // VMM memory lives as long as somebody has it mapped: the rails do.
  a->client->stop();
  a.reset();
  here.reset();
  REQUIRE(world.machine->device_bytes(0) == kSegmentBytes);
}

TEST_CASE("When the sender is killed every receive posted into GPU memory ends") {
  constexpr uint64_t kOffers = 4;
  World world;
  Arena here(world);
  Arena there(world);
  for (uint64_t i = 0; i < kOffers; ++i) {
    here.add(ArenaKind::kDeviceVmm);
    there.add(ArenaKind::kDeviceVmm);
  }
  Node a(with_gpus(world), here.segments());
  Node b(with_gpus(world), there.segments());
  start({&a, &b});
  join(a, b, kLane);
  const int pid = a.client->pid();
  for (uint32_t i = 0; i < kOffers; ++i)
    REQUIRE(a.client->send_offer(LaneKey{kLane}, Node::bytes_of("x"), {i, 0, kSegmentBytes},
                                 SendToken{i + 1}));
  REQUIRE(pump({&a, &b}, [&] { return b.offers.size() == kOffers; }));
  REQUIRE(::kill(pid, SIGSTOP) == 0);
  for (uint32_t i = 0; i < kOffers; ++i)
    REQUIRE(b.client->accept(b.offers[i].descriptor, LaneKey{kLane}, {i, 0, kSegmentBytes},
                             LandingId{i + 1}));
  REQUIRE(::kill(pid, SIGKILL) == 0);
  REQUIRE(pump({&a, &b}, [&] { return b.receives.size() == kOffers; }));
  for (const auto& [landing, receive] : b.receives) REQUIRE_FALSE(receive.ok);
}

TEST_CASE("A script may stand before the rails process, as daemons' tests need it") {
  World world;
  Arena arena(world);
  arena.add(ArenaKind::kDeviceVmm);
  RailsConfig config = with_gpus(world);
  config.executable = coherent_rails(world.machine, config.executable);
  config.unchecked_environment.clear();
  Node node(config, arena.segments());
  start({&node});
  const auto told =
      query_capabilities(config.executable, config.cuda_driver, std::chrono::seconds(20));
  REQUIRE(told);
  CHECK(told->has_cuda());
}

TEST_CASE("UCX pins no host segment, and no copy outlives its request") {
  // What pins, and what marks the end of a copy that goes on by itself: both would fail here.
  const std::string call = GENERATE("cuMemHostRegister", "cuEventRecord");
  const std::string transport = GENERATE("tcp", "shm");
  INFO(call << " over " << transport);
  World world;
  Arena here(world);
  Arena there(world);
  here.add_host().add(ArenaKind::kDeviceVmm);
  there.add(ArenaKind::kCudaMalloc).add_host();
  RailsConfig config = with_gpus(world, transport);
  config.unchecked_environment.push_back("KVFERRY_FAKE_CUDA_FAIL=" + call + ":1:1");
  Node a(config, here.segments());
  Node b(config, there.segments());
  start({&a, &b});
  join(a, b, kLane);
  uint64_t token = 0;
  for (uint32_t from = 0; from < 2; ++from)
    for (uint32_t to = 0; to < 2; ++to) {
      here.fill({from, 0, kSegmentBytes}, ++token);
      transfer(a, b, kLane, {from, 0, kSegmentBytes}, {to, 0, kSegmentBytes}, token);
      REQUIRE(there.holds({to, 0, kSegmentBytes}, token));
    }
}

TEST_CASE("UCX's copies go through the driver, whose refusal ends the process") {
  if (kOwnRails == nullptr) {
    WARN("this UCX has no CUDA");
    return;
  }
  World world;
  Arena here(world);
  Arena there(world);
  here.add(ArenaKind::kDeviceVmm);
  there.add_host();
  // The sender reads the device: past the self-test, whose own look is the first of these calls.
  RailsConfig config = with_gpus(world);
  config.unchecked_environment.push_back("KVFERRY_FAKE_CUDA_FAIL=cuStreamCreate:2:1");
  Node a(config, here.segments());
  Node b(with_gpus(world), there.segments());
  start({&a, &b});
  join(a, b, kLane);
  REQUIRE(a.client->send_offer(LaneKey{kLane}, Node::bytes_of("x"), {0, 0, 4096}, SendToken{1}));
  REQUIRE(pump({&a, &b}, [&] { return b.offers.size() == 1; }));
  REQUIRE(b.client->accept(b.offers[0].descriptor, LaneKey{kLane}, {0, 0, 4096}, LandingId{1}));
  REQUIRE(pump({&a, &b}, [&] { return !a.deaths.empty() && b.receives.contains(1); }));
  REQUIRE(a.deaths[0].signal == SIGABRT);
  REQUIRE_FALSE(b.receives[1].ok);
}

// --- What cannot be.

TEST_CASE("A set-up that this machine cannot serve ends with status 78 and says why") {
  World world;
  const auto kind = GENERATE(ArenaKind::kFabricVmm, ArenaKind::kDeviceVmm, ArenaKind::kCudaMalloc);
  INFO(gpu::name_of(kind));
  Arena arena(world);
  arena.add_host().add(kind);
  std::vector<Segment> segments = arena.copy();
  RailsConfig config = with_gpus(world);
  const auto refused = [&](const std::string& words) {
    const RailsExit exit = death_of(config, segments);
    INFO(exit.why);
    CHECK(exit.exited);
    CHECK(exit.status == 78);
    CHECK(has(exit.why, words));
  };

  SECTION("a device that is not there") {
    segments[1].device_uuid[0] ^= 0xFF;
    refused("segment 1: " + gpu::to_string(segments[1].device_uuid) +
            " is not seen by kvferry-rails, but " +
            gpu::to_string(world.devices->all()[0]->facts().uuid) + " is");
  }
  SECTION("no driver") {
    config.cuda_driver = "/nonexistent/libcuda.so";
    refused("/nonexistent/libcuda.so");
  }
  SECTION("more bytes than the allocation has") {
    segments[1].bytes += 2ULL << 20;
    refused("from segment 1 on: ");
  }
  SECTION("memory of which nothing is left") {
    segments[1].handle[3] ^= 0xFF;
    if (kind == ArenaKind::kDeviceVmm) {
      segments[1] = arena.segments()[1];
      segments[1].fd = ::open("/dev/null", O_RDWR | O_CLOEXEC);
    }
    refused("from segment 1 on: ");
    if (kind == ArenaKind::kDeviceVmm) ::close(segments[1].fd);
  }
}

TEST_CASE("A UCX without CUDA refuses GPU memory and names the remedy") {
  World world;
  Arena arena(world);
  arena.add(ArenaKind::kDeviceVmm);
  RailsConfig config = with_gpus(world);
  config.executable = rails_binary();
  config.cuda_driver = kLibrary;
  const auto told = query_capabilities(rails_binary(), kLibrary, std::chrono::seconds(20));
  REQUIRE(told);
  if (told->has_cuda()) {
    WARN("this UCX has CUDA: nothing to refuse");
    return;
  }
  const RailsExit exit = death_of(config, arena.segments());
  INFO(exit.why);
  REQUIRE(exit.status == 78);
  REQUIRE(has(exit.why, "UCX " + told->ucx_version + " has no transport cuda_copy"));
  REQUIRE(has(exit.why, "pinned_host"));
}

TEST_CASE("The self-test posts a receive into memory of the device") {
  World world;
  Arena arena(world);
  arena.add(ArenaKind::kDeviceVmm);
  RailsConfig config = with_gpus(world);
  const std::string where = "self-test of rail 0 (tcp/lo) and " +
                            gpu::to_string(world.devices->all()[0]->facts().uuid) + ": ";

  SECTION("where there is no memory left, a later life may have more luck") {
    config.unchecked_environment.push_back("KVFERRY_FAKE_CUDA_FAIL=cuMemAlloc:1:2");
    const RailsExit exit = death_of(config, arena.segments());
    INFO(exit.why);
    REQUIRE(exit.status == 70);
    REQUIRE(has(exit.why, where + "cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY"));
  }
  SECTION("it looks for data there") {
    config.unchecked_environment.push_back("KVFERRY_FAKE_CUDA_FAIL=cuMemcpyDtoHAsync:1:1");
    const RailsExit exit = death_of(config, arena.segments());
    INFO(exit.why);
    REQUIRE(exit.status == 78);
    REQUIRE(has(exit.why, where + "cuMemcpyDtoHAsync: CUDA_ERROR_INVALID_VALUE"));
  }
}

TEST_CASE("Device segments that cannot be are refused before a process is started") {
  World world;
  const auto reason = [&](const Segment& segment) {
    auto made = RailsClient::make(with_gpus(world), {&segment, 1});
    if (made) return std::string("made");
    return made.error().reason + " " + made.error().field + ": " + made.error().message;
  };
  Arena arena(world);
  arena.add(ArenaKind::kDeviceVmm).add(ArenaKind::kFabricVmm).add(ArenaKind::kCudaMalloc);
  arena.add_host();
  const std::vector<Segment> good = arena.copy();
  for (const Segment& segment : good) CHECK(reason(segment) == "made");

  const std::string wrong = "SEGMENT_INVALID segments[0]: ";
  for (const Segment& segment : good) {
    Segment bad = segment;
    bad.bytes = 0;
    CHECK(reason(bad) == wrong + "has no bytes");
    bad = segment;
    bad.kind = static_cast<SegmentKind>(4);
    CHECK(reason(bad) == wrong + "no such kind of memory");
    bad = segment;
    const bool device = is_on_device(segment.kind);
    bad.device_uuid = device ? DeviceUuid{} : good[0].device_uuid;
    CHECK(reason(bad) == wrong + (device ? "names no device" : "host memory is on no device"));
    bad = segment;
    bad.handle = has_handle(segment.kind) ? SegmentHandle{} : good[1].handle;
    CHECK(reason(bad) ==
          wrong + (has_handle(segment.kind) ? "lacks its handle" : "its kind has no handle"));
    if (!device) continue;
    bad = segment;
    bad.fd = has_descriptor(segment.kind) ? -1 : good[3].fd;
    CHECK(reason(bad) == wrong + (has_descriptor(segment.kind) ? "lacks its descriptor"
                                                               : "its kind has no descriptor"));
  }
  RailsConfig config = with_gpus(world);
  config.cuda_driver = std::string(256, 'x');
  CHECK(RailsClient::make(config, good).error().reason == "RAILS_CONFIG_INVALID");
}

}  // namespace kvferry::rails::testing
