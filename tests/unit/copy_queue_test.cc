// The queue of one GPU's copies over the fake driver: bytes as the host's copies have them, ends
// that come late and in any order, devices that fail, calls that fail, and closing.
#include "daemon/gpu/copy_queue.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <catch2/catch.hpp>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "daemon/gpu/pinned_memory.h"
#include "daemon/mapping/coverage.h"
#include "daemon/mapping/needs.h"
#include "daemon/mapping/plan.h"
#include "daemon/mapping/stream.h"
#include "kernels/host_copy.h"
#include "tests/fake_cuda/control.h"
#include "tests/unit/fake_cuda_peer_process.h"
#include "tests/unit/mapping_support.h"

namespace kvferry::gpu {
namespace {

using fake_cuda::Machine;
using fake_cuda::Setup;
using kernels::CopyKind;
using mapping::RankLayout;
using mapping::test::GroupSpec;
using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr const char* kLibrary = KVFERRY_FAKE_CUDA_LIBRARY;
constexpr seconds kPatience{60};

Setup gpus(int devices = 1, uint64_t seed = 1, uint64_t delay_us = 20) {
  Setup setup;
  setup.devices = devices;
  setup.memory_mb = 256;
  setup.seed = seed;
  setup.delay_us = delay_us;
  return setup;
}

Time soon() {
  return monotonic_now() + kPatience;
}

bool comes_true(const std::function<bool()>& condition) {
  const Time limit = soon();
  while (!condition()) {
    if (monotonic_now() > limit) return false;
    std::this_thread::yield();
  }
  return true;
}

// cuMemAlloc memory as a pool; freed when the last user has gone.
class TestPool final : public memory::Pool {
 public:
  static std::shared_ptr<TestPool> make(const std::shared_ptr<const Device>& device,
                                        uint64_t bytes) {
    const Device::Current current(*device);
    cuda::CUdeviceptr address = 0;
    REQUIRE(device->api().cuMemAlloc(&address, bytes) == cuda::CUDA_SUCCESS);
    return std::make_shared<TestPool>(device, address, bytes);
  }
  TestPool(std::shared_ptr<const Device> device, cuda::CUdeviceptr address, uint64_t bytes)
      : Pool(reinterpret_cast<std::byte*>(static_cast<uintptr_t>(address)), bytes, device.get()),
        owner_(std::move(device)),
        address_(address) {}
  ~TestPool() override {
    const Device::Current current(*owner_);
    if (current.ok()) (void)owner_->api().cuMemFree(address_);
  }
  bool same_memory(const Pool& other) const override { return this == &other; }

 private:
  const std::shared_ptr<const Device> owner_;
  const cuda::CUdeviceptr address_;
};

// One side of a stream: its plan, its pools' bytes as they should be (on the host), and on a GPU.
struct Side {
  RankLayout layout;
  std::shared_ptr<mapping::Plan> plan;
  std::vector<std::vector<std::byte>> expected;
  std::vector<std::shared_ptr<memory::Pool>> pools;
  std::shared_ptr<DevicePlan> on_device;

  std::vector<std::byte*> host_bases() {
    std::vector<std::byte*> bases;
    for (auto& pool : expected) bases.push_back(pool.data());
    return bases;
  }
  void put_on(const std::shared_ptr<const Device>& device, Machine& machine, uint32_t seed) {
    std::mt19937 random(seed);
    std::vector<uint64_t> bases;
    for (const auto& span : layout.pools) {
      std::vector<std::byte>& bytes = expected.emplace_back(span.bytes);
      for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
      pools.push_back(TestPool::make(device, span.bytes));
      bases.push_back(reinterpret_cast<uintptr_t>(pools.back()->base()));
      REQUIRE(machine->poke(bases.back(), bytes.data(), bytes.size()));
    }
    auto packed = kernels::PackedPlan::make(plan->form(), bases);
    REQUIRE(packed);
    on_device = std::make_shared<DevicePlan>(
        std::make_shared<const kernels::PackedPlan>(std::move(*packed)));
  }
  bool as_expected(Machine& machine) const {
    for (std::size_t i = 0; i < pools.size(); ++i) {
      std::vector<std::byte> bytes(expected[i].size());
      if (!machine->peek(reinterpret_cast<uintptr_t>(pools[i]->base()), bytes.data(),
                         bytes.size()) ||
          bytes != expected[i])
        return false;
    }
    return true;
  }
};

struct Leg {
  Side from;
  Side to;
};

// Rank 1 of two to rank 2 of four, with block ids out of order.
Leg make_leg(const GroupSpec& spec, uint64_t prompt) {
  const auto senders = mapping::test::ranks_of({.tp = 2}, 4, 8, spec);
  const auto receivers = mapping::test::ranks_of({.tp = 4}, 4, 8, spec);
  const auto table = mapping::test::table_of(senders, receivers);
  const uint64_t blocks = ceil_div(prompt, spec.block);
  std::vector<int32_t> ids(blocks);
  std::iota(ids.begin(), ids.end(), 0);
  std::mt19937 random(5);
  std::shuffle(ids.begin(), ids.end(), random);
  const mapping::GroupBlocks from{0, 0, ids};
  std::shuffle(ids.begin(), ids.end(), random);
  const mapping::GroupBlocks to{0, 0, ids};
  const mapping::GroupReceive receive{prompt, 0, to};
  const mapping::GroupOffer offer{prompt, {0, prompt}, from};
  const auto needs = mapping::compute_needs(receivers[2], std::span(&receive, 1));
  const auto offered = mapping::round_offer(senders[1], std::span(&offer, 1));
  REQUIRE(needs);
  REQUIRE(offered);
  auto stream = mapping::compile_stream(*table, 1, 2, *needs, *offered);
  REQUIRE(stream);
  auto source =
      mapping::bind_plan(*stream, mapping::Side::kSender, senders[1], std::span(&from, 1));
  auto destination =
      mapping::bind_plan(*stream, mapping::Side::kReceiver, receivers[2], std::span(&to, 1));
  REQUIRE(source);
  REQUIRE(destination);
  Leg leg;
  leg.from.layout = senders[1];
  leg.from.plan = std::make_shared<mapping::Plan>(std::move(*source));
  leg.to.layout = receivers[2];
  leg.to.plan = std::make_shared<mapping::Plan>(std::move(*destination));
  return leg;
}

GroupSpec spec_of(const std::string& memory, uint64_t cell = 256) {
  GroupSpec spec;
  spec.cell_bytes = cell;
  spec.block_count = 24;
  spec.memory = memory;
  return spec;
}

// Pinned host memory that stands in for the arena.
class Arena {
 public:
  Arena(const std::vector<std::shared_ptr<const Device>>& devices, uint64_t bytes)
      : bytes_(round_up(bytes, 4096)) {
    void* const memory =
        ::mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    REQUIRE(memory != MAP_FAILED);
    data_ = static_cast<std::byte*>(memory);
    auto pinned = PinnedMemory::pin(devices, data_, bytes_);
    REQUIRE(pinned);
    pinned_ = std::move(*pinned);
  }
  ~Arena() {
    pinned_.reset();
    ::munmap(data_, bytes_);
  }
  std::byte* data() const { return data_; }
  cuda::CUdeviceptr on(const Device& device) const { return pinned_->on(device); }

 private:
  const uint64_t bytes_;
  std::byte* data_ = nullptr;
  std::shared_ptr<const PinnedMemory> pinned_;
};

struct World {
  explicit World(const Setup& setup = gpus(), QueueOptions options = {})
      : machine(kLibrary, setup) {
    auto driver = cuda::Driver::load(kLibrary);
    REQUIRE(driver);
    auto opened = Devices::open(*driver);
    REQUIRE(opened);
    devices = std::move(*opened);
    auto made = CopyQueue::open(device(), std::move(options));
    if (!made) FAIL(made.error().to_string());
    queue = std::move(*made);
  }
  ~World() {
    queue.reset();
    const auto live = machine->live();
    INFO(live.to_string());
    if (leaves_nothing) CHECK(live.total() == live.contexts);
  }
  const std::shared_ptr<const Device>& device(std::size_t i = 0) const { return devices->all()[i]; }

  Machine machine;
  std::shared_ptr<const Devices> devices;
  std::unique_ptr<CopyQueue> queue;
  bool leaves_nothing = true;
};

// Counts how often each of some jobs was told of.
class Tally {
 public:
  explicit Tally(std::size_t jobs) : told_(jobs) {}
  std::function<void(Outcome)> at(std::size_t i) {
    return [this, i](Outcome outcome) {
      told_[i].fetch_add(1);
      (outcome == Outcome::kOk ? ok_ : failed_).fetch_add(1);
    };
  }
  bool all_once() const {
    return std::all_of(told_.begin(), told_.end(), [](const auto& n) { return n == 1; });
  }
  uint64_t ok() const { return ok_; }
  uint64_t failed() const { return failed_; }
  uint64_t told() const { return ok_ + failed_; }

 private:
  std::vector<std::atomic<int>> told_;
  std::atomic<uint64_t> ok_{0};
  std::atomic<uint64_t> failed_{0};
};

DeviceJob job_of(CopyKind kind, Side& side, uint64_t offset, uint64_t bytes, cuda::CUdeviceptr flat,
                 std::function<void(Outcome)> done) {
  DeviceJob job;
  job.kind = kind;
  job.plan = side.on_device;
  job.stream_offset = offset;
  job.bytes = bytes;
  job.flat = flat;
  job.pools = side.pools;
  job.done = std::move(done);
  return job;
}

// Uneven pieces that make up [0, bytes).
std::vector<Range> pieces_of(uint64_t bytes, std::size_t count, uint32_t seed) {
  std::mt19937_64 random(seed);
  std::vector<uint64_t> cuts{0, bytes};
  for (std::size_t i = 1; i < count; ++i) cuts.push_back(random() % bytes);
  std::sort(cuts.begin(), cuts.end());
  std::vector<Range> out;
  for (std::size_t i = 0; i + 1 < cuts.size(); ++i)
    if (cuts[i] < cuts[i + 1]) out.push_back({cuts[i], cuts[i + 1]});
  return out;
}

// A whole hand-over in pieces: gather to the arena, scatter from it; checked byte for byte.
void hand_over(World& world, Leg& leg, std::size_t pieces, uint32_t seed) {
  const uint64_t bytes = leg.from.plan->bytes();
  Arena arena(world.devices->all(), bytes);
  std::vector<Range> cut = pieces_of(bytes, pieces, seed);
  std::shuffle(cut.begin(), cut.end(), std::mt19937(seed));
  for (const CopyKind kind : {CopyKind::kGather, CopyKind::kScatter}) {
    Side& side = kind == CopyKind::kGather ? leg.from : leg.to;
    Tally tally(cut.size());
    for (std::size_t i = 0; i < cut.size(); ++i)
      REQUIRE(world.queue->submit(job_of(kind, side, cut[i].begin, cut[i].size(),
                                         arena.on(*world.device()) + cut[i].begin, tally.at(i))));
    REQUIRE(comes_true([&] { return tally.told() == cut.size(); }));
    CHECK(tally.all_once());
    CHECK(tally.failed() == 0);
    if (kind != CopyKind::kGather) continue;
    std::vector<std::byte> expected(bytes);
    REQUIRE(
        kernels::gather(leg.from.plan->form(), leg.from.host_bases(), 0, bytes, expected.data()));
    CHECK(std::equal(expected.begin(), expected.end(), arena.data()));
  }
  REQUIRE(kernels::scatter(leg.to.plan->form(), leg.to.host_bases(), 0, bytes, arena.data()));
  CHECK(leg.to.as_expected(world.machine));
  CHECK(leg.from.as_expected(world.machine));
}

}  // namespace

TEST_CASE("gather and scatter have the bytes of the host's copies, for any layout and cut") {
  const std::string memory = GENERATE("lr|but", "|blrut", "l|brtu", "|lrbtu");
  const uint64_t cell = GENERATE(256U, 34U, 7U);
  CAPTURE(memory, cell);
  World world;
  Leg leg = make_leg(spec_of(memory, cell), 200);
  leg.from.put_on(world.device(), world.machine, 1);
  leg.to.put_on(world.device(), world.machine, 2);
  hand_over(world, leg, 13, 3);
  CHECK(world.queue->stats().outstanding == 0);
  CHECK(world.queue->stats().uploads == 2);
  CHECK(world.queue->stats().bytes[0] == leg.from.plan->bytes());
}

TEST_CASE("ends that come late and in any order, by several seeds") {
  const uint64_t seed = GENERATE(1U, 2U, 3U, 4U, 5U);
  CAPTURE(seed);
  QueueOptions options;
  options.launched_per_stream = 3;
  World world(gpus(1, seed, 200), options);
  Leg leg = make_leg(spec_of("lr|but"), 300);
  leg.from.put_on(world.device(), world.machine, 1);
  leg.to.put_on(world.device(), world.machine, 2);
  hand_over(world, leg, 60, static_cast<uint32_t>(seed));
}

TEST_CASE("a transfer goes straight from pages to pages, on one device and to a peer") {
  const std::size_t to = GENERATE(0U, 1U);
  CAPTURE(to);
  World world(gpus(2));
  Leg leg = make_leg(spec_of("lr|but"), 250);
  leg.from.put_on(world.device(0), world.machine, 1);
  leg.to.put_on(world.device(to), world.machine, 2);
  const std::vector<Range> cut = pieces_of(leg.from.plan->bytes(), 9, 4);
  Tally tally(cut.size());
  for (std::size_t i = 0; i < cut.size(); ++i) {
    DeviceJob job =
        job_of(CopyKind::kTransfer, leg.from, cut[i].begin, cut[i].size(), 0, tally.at(i));
    job.other = leg.to.on_device;
    job.pools.insert(job.pools.end(), leg.to.pools.begin(), leg.to.pools.end());
    if (to != 0) job.peers = {world.device(to).get()};
    REQUIRE(world.queue->submit(std::move(job)));
  }
  REQUIRE(comes_true([&] { return tally.told() == cut.size(); }));
  CHECK(tally.failed() == 0);
  REQUIRE(kernels::transfer(leg.from.plan->form(), leg.from.host_bases(), leg.to.plan->form(),
                            leg.to.host_bases(), 0, leg.from.plan->bytes()));
  CHECK(leg.to.as_expected(world.machine));
}

TEST_CASE("a copy to a device that is out of reach fails, and no other") {
  Setup setup = gpus(2);
  setup.lacks = "peer";
  World world(setup);
  Leg leg = make_leg(spec_of("lr|but"), 64);
  leg.from.put_on(world.device(0), world.machine, 1);
  leg.to.put_on(world.device(1), world.machine, 2);
  Tally tally(2);
  DeviceJob job = job_of(CopyKind::kTransfer, leg.from, 0, leg.from.plan->bytes(), 0, tally.at(0));
  job.other = leg.to.on_device;
  job.peers = {world.device(1).get()};
  REQUIRE(world.queue->submit(std::move(job)));
  REQUIRE(world.queue->submit(
      job_of(CopyKind::kClear, leg.from, 0, leg.from.plan->bytes(), 0, tally.at(1))));
  REQUIRE(comes_true([&] { return tally.told() == 2; }));
  CHECK(tally.ok() == 1);
  CHECK(tally.failed() == 1);
  CHECK_FALSE(world.device(0)->down());
}

TEST_CASE("a clear writes zeros to all that its plan names, and to nothing else") {
  World world;
  Leg leg = make_leg(spec_of("|blrut", 34), 77);
  leg.to.put_on(world.device(), world.machine, 2);
  Tally tally(1);
  REQUIRE(world.queue->submit(
      job_of(CopyKind::kClear, leg.to, 0, leg.to.plan->bytes(), 0, tally.at(0))));
  REQUIRE(comes_true([&] { return tally.told() == 1; }));
  CHECK(tally.ok() == 1);
  REQUIRE(kernels::clear(leg.to.plan->form(), leg.to.host_bases()));
  CHECK(leg.to.as_expected(world.machine));
}

TEST_CASE("no more jobs are taken than the bound, and those taken end") {
  QueueOptions options;
  options.max_jobs = 5;
  World world(gpus(), options);
  Leg leg = make_leg(spec_of("lr|but"), 64);
  leg.from.put_on(world.device(), world.machine, 1);
  Arena arena(world.devices->all(), leg.from.plan->bytes());
  world.machine->hold();
  Tally tally(6);
  for (std::size_t i = 0; i < 5; ++i)
    REQUIRE(world.queue->submit(job_of(CopyKind::kGather, leg.from, 0, leg.from.plan->bytes(),
                                       arena.on(*world.device()), tally.at(i))));
  const Status refused = world.queue->submit(
      job_of(CopyKind::kGather, leg.from, 0, 1, arena.on(*world.device()), tally.at(5)));
  REQUIRE_FALSE(refused);
  CHECK(refused.error().reason == "GPU_QUEUE_FULL");
  world.machine->release();
  REQUIRE(comes_true([&] { return tally.told() == 5; }));
  CHECK(tally.ok() == 5);
  CHECK(world.queue->stats().refused == 1);
}

TEST_CASE("pools stay open until done has returned, and empty jobs end well") {
  World world;
  Leg leg = make_leg(spec_of("lr|but"), 64);
  leg.from.put_on(world.device(), world.machine, 1);
  Arena arena(world.devices->all(), leg.from.plan->bytes());
  std::vector<std::weak_ptr<memory::Pool>> watched(leg.from.pools.begin(), leg.from.pools.end());
  std::atomic<int> state{0};
  world.machine->hold();
  REQUIRE(world.queue->submit(job_of(CopyKind::kGather, leg.from, 0, leg.from.plan->bytes(),
                                     arena.on(*world.device()), [&](Outcome outcome) {
                                       const bool open = std::none_of(
                                           watched.begin(), watched.end(),
                                           [](const auto& pool) { return pool.expired(); });
                                       state = outcome == Outcome::kOk && open ? 1 : 2;
                                     })));
  leg.from.pools.clear();
  leg.from.on_device.reset();
  CHECK_FALSE(watched.front().expired());
  world.machine->release();
  REQUIRE(comes_true([&] { return state != 0; }));
  CHECK(state == 1);
  REQUIRE(comes_true([&] { return watched.front().expired(); }));
  Leg other = make_leg(spec_of("lr|but"), 64);
  other.from.put_on(world.device(), world.machine, 1);
  Tally tally(1);
  REQUIRE(world.queue->submit(job_of(CopyKind::kGather, other.from, 0, 0, 0, tally.at(0))));
  REQUIRE(comes_true([&] { return tally.told() == 1; }));
  CHECK(tally.ok() == 1);
}

TEST_CASE("a pool that has failed fails its jobs and no others") {
  World world;
  Leg leg = make_leg(spec_of("lr|but"), 64);
  leg.from.put_on(world.device(), world.machine, 1);
  leg.to.put_on(world.device(), world.machine, 2);
  Arena arena(world.devices->all(), leg.from.plan->bytes());
  leg.from.pools.front()->mark_failed();
  Tally tally(2);
  REQUIRE(world.queue->submit(job_of(CopyKind::kGather, leg.from, 0, leg.from.plan->bytes(),
                                     arena.on(*world.device()), tally.at(0))));
  REQUIRE(world.queue->submit(job_of(CopyKind::kScatter, leg.to, 0, leg.to.plan->bytes(),
                                     arena.on(*world.device()), tally.at(1))));
  REQUIRE(comes_true([&] { return tally.told() == 2; }));
  CHECK(tally.ok() == 1);
  CHECK_FALSE(world.device()->down());
}

TEST_CASE("a pool that is found to have lost pages is not copied from") {
  class Holed final : public memory::Pool {
   public:
    Holed() : Pool(nullptr, 0, nullptr) {}
    bool same_memory(const Pool& other) const override { return this == &other; }
    bool usable(Time) override { return false; }
  };
  World world;
  Leg leg = make_leg(spec_of("lr|but"), 64);
  leg.from.put_on(world.device(), world.machine, 1);
  Arena arena(world.devices->all(), leg.from.plan->bytes());
  Tally tally(1);
  DeviceJob job = job_of(CopyKind::kGather, leg.from, 0, leg.from.plan->bytes(),
                         arena.on(*world.device()), tally.at(0));
  job.pools.push_back(std::make_shared<Holed>());
  REQUIRE(world.queue->submit(std::move(job)));
  REQUIRE(comes_true([&] { return tally.told() == 1; }));
  CHECK(tally.failed() == 1);
  CHECK(world.machine->calls("cuLaunchKernel") == 0);
}

TEST_CASE("plans that are not used make room for others and come again") {
  QueueOptions options;
  options.max_plan_bytes = 8 << 20;
  World world(gpus(), options);
  GroupSpec spec = spec_of("lr|but", 2);
  spec.block = 1;
  spec.block_count = 40'000;  // more than a megabyte a plan
  Leg first = make_leg(spec, 40'000);
  first.from.put_on(world.device(), world.machine, 1);
  const uint64_t bytes = first.from.plan->bytes();
  Arena arena(world.devices->all(), bytes);
  std::vector<std::byte> expected(bytes);
  REQUIRE(
      kernels::gather(first.from.plan->form(), first.from.host_bases(), 0, bytes, expected.data()));
  std::vector<std::shared_ptr<DevicePlan>> plans;
  for (int i = 0; i < 12; ++i)
    plans.push_back(std::make_shared<DevicePlan>(first.from.on_device->shared_packed()));
  for (int round = 0; round < 2; ++round) {
    std::memset(arena.data(), 0, bytes);
    const std::vector<Range> cut = pieces_of(bytes, plans.size(), 7);
    Tally tally(cut.size());
    for (std::size_t i = 0; i < cut.size(); ++i) {
      DeviceJob job = job_of(CopyKind::kGather, first.from, cut[i].begin, cut[i].size(),
                             arena.on(*world.device()) + cut[i].begin, tally.at(i));
      job.plan = plans[i];
      REQUIRE(world.queue->submit(std::move(job)));
    }
    REQUIRE(comes_true([&] { return tally.told() == cut.size(); }));
    CHECK(tally.failed() == 0);
    CHECK(std::equal(expected.begin(), expected.end(), arena.data()));
  }
  CHECK(world.queue->stats().uploads > plans.size());
}

TEST_CASE("a device that fails ends all that is outstanding, each job once, and takes no more") {
  World world(gpus(2));
  Leg leg = make_leg(spec_of("lr|but"), 300);
  leg.from.put_on(world.device(), world.machine, 1);
  const uint64_t bytes = leg.from.plan->bytes();
  Arena arena(world.devices->all(), bytes);
  const std::vector<Range> cut = pieces_of(bytes, 100, 9);
  Tally tally(cut.size());
  world.machine->hold();
  for (std::size_t i = 0; i < cut.size(); ++i)
    REQUIRE(world.queue->submit(job_of(CopyKind::kGather, leg.from, cut[i].begin, cut[i].size(),
                                       arena.on(*world.device()) + cut[i].begin, tally.at(i))));
  (void)world.machine->step(10);
  world.machine->fault(0, cuda::CUDA_ERROR_ILLEGAL_ADDRESS);
  world.machine->release();
  REQUIRE(comes_true([&] { return tally.told() == cut.size(); }));
  CHECK(tally.all_once());
  CHECK(tally.failed() > 0);
  REQUIRE(world.device()->down());
  CHECK_FALSE(world.device(1)->down());
  const Status refused = world.queue->submit(
      job_of(CopyKind::kGather, leg.from, 0, 1, arena.on(*world.device()), tally.at(0)));
  REQUIRE_FALSE(refused);
  CHECK(refused.error().reason == "GPU_DOWN");
  world.leaves_nothing = false;  // a dead context gives nothing back but by its end
}

TEST_CASE("a device that fails while it is idle is seen") {
  World world;
  world.machine->fault(0, cuda::CUDA_ERROR_ECC_UNCORRECTABLE);
  CHECK(comes_true([&] { return world.device()->down(); }));
  world.leaves_nothing = false;
}

TEST_CASE("an illegal access by a kernel takes the device down") {
  World world;
  Leg leg = make_leg(spec_of("lr|but"), 64);
  leg.from.put_on(world.device(), world.machine, 1);
  Tally tally(1);
  // Nothing is mapped there.
  REQUIRE(world.queue->submit(
      job_of(CopyKind::kGather, leg.from, 0, leg.from.plan->bytes(), 0x10000, tally.at(0))));
  REQUIRE(comes_true([&] { return tally.told() == 1; }));
  CHECK(tally.failed() == 1);
  CHECK(world.device()->down());
  world.leaves_nothing = false;
}

TEST_CASE("whatever call fails, each job ends once and nothing is leaked") {
  // How many calls a life without failures has; then each of them fails in turn.
  uint64_t calls = 1000;
  for (uint64_t n = 0; n <= calls; n += n < 150 ? 1 : 7) {
    CAPTURE(n);
    Machine machine(kLibrary, gpus(1, n + 1, 0));
    auto driver = cuda::Driver::load(kLibrary);
    REQUIRE(driver);
    auto devices = Devices::open(*driver);
    REQUIRE(devices);
    const std::shared_ptr<const Device> device = (*devices)->all()[0];
    Leg leg = make_leg(spec_of("lr|but"), 64);
    leg.from.put_on(device, machine, 1);
    leg.to.put_on(device, machine, 2);
    const uint64_t bytes = leg.from.plan->bytes();
    Arena arena((*devices)->all(), bytes);
    const uint64_t before = machine->calls();
    const auto held = machine->live().total();
    if (n != 0) machine->fail("", n, cuda::CUDA_ERROR_UNKNOWN);
    {
      Tally tally(8);
      std::size_t taken = 0;
      auto queue = CopyQueue::open(device);
      if (queue) {
        for (std::size_t i = 0; i < 4; ++i) {
          taken += (*queue)->submit(job_of(CopyKind::kGather, leg.from, bytes * i / 4, bytes / 4,
                                           arena.on(*device) + bytes * i / 4, tally.at(i)))
                       ? 1U
                       : 0U;
          DeviceJob transfer =
              job_of(CopyKind::kTransfer, leg.from, bytes * i / 4, bytes / 4, 0, tally.at(4 + i));
          transfer.other = leg.to.on_device;
          transfer.pools.insert(transfer.pools.end(), leg.to.pools.begin(), leg.to.pools.end());
          taken += (*queue)->submit(std::move(transfer)) ? 1U : 0U;
        }
        REQUIRE(comes_true([&] { return tally.told() == taken; }));
        // One call is of one job, or of one plan, or of all.
        CHECK((tally.failed() <= 1 || device->down()));
        CHECK((*queue)->close(soon()));
      }
      CHECK(tally.told() == taken);
    }
    const auto live = machine->live();
    INFO(live.to_string());
    CHECK(live.total() == held);
    if (n == 0) calls = machine->calls() - before;
  }
}

TEST_CASE("close waits for what was taken") {
  World world;
  Leg leg = make_leg(spec_of("lr|but"), 300);
  leg.from.put_on(world.device(), world.machine, 1);
  Arena arena(world.devices->all(), leg.from.plan->bytes());
  Tally tally(50);
  for (std::size_t i = 0; i < 50; ++i)
    REQUIRE(world.queue->submit(job_of(CopyKind::kGather, leg.from, 0, leg.from.plan->bytes(),
                                       arena.on(*world.device()), tally.at(i))));
  CHECK(world.queue->close(soon()));
  CHECK(tally.ok() == 50);
  const Status refused = world.queue->submit(
      job_of(CopyKind::kGather, leg.from, 0, 1, arena.on(*world.device()), tally.at(0)));
  REQUIRE_FALSE(refused);
  CHECK(refused.error().reason == "GPU_QUEUE_CLOSED");
}

TEST_CASE("at the deadline what has not been launched is dropped, and the rest may end") {
  QueueOptions options;
  options.streams = 1;
  options.launched_per_stream = 2;
  options.close_grace = kPatience;
  World world(gpus(), options);
  Leg leg = make_leg(spec_of("lr|but"), 64);
  leg.from.put_on(world.device(), world.machine, 1);
  Arena arena(world.devices->all(), leg.from.plan->bytes());
  Tally tally(10);
  world.machine->hold();
  for (std::size_t i = 0; i < 10; ++i)
    REQUIRE(world.queue->submit(job_of(CopyKind::kGather, leg.from, 0, leg.from.plan->bytes(),
                                       arena.on(*world.device()), tally.at(i))));
  REQUIRE(comes_true([&] { return world.machine->calls("cuLaunchKernel") == 2; }));
  std::thread later([&] {
    (void)comes_true([&] { return tally.failed() == 8; });
    world.machine->release();
  });
  const Status closed = world.queue->close(Time{0});
  later.join();
  REQUIRE_FALSE(closed);
  CHECK(closed.error().reason == "GPU_DRAIN");
  CHECK(tally.all_once());
  CHECK(tally.ok() == 2);
}

TEST_CASE("a copy that never ends: the device is taken down, its memory is never given back") {
  QueueOptions options;
  options.hang_limit = milliseconds(20);
  options.close_grace = milliseconds(20);
  World world(gpus(), options);
  Leg leg = make_leg(spec_of("lr|but"), 64);
  leg.from.put_on(world.device(), world.machine, 1);
  Arena arena(world.devices->all(), leg.from.plan->bytes());
  std::weak_ptr<memory::Pool> pool = leg.from.pools.front();
  Tally tally(1);
  world.machine->hold();
  REQUIRE(world.queue->submit(job_of(CopyKind::kGather, leg.from, 0, leg.from.plan->bytes(),
                                     arena.on(*world.device()), tally.at(0))));
  leg.from.pools.clear();
  REQUIRE(comes_true([&] { return world.device()->down(); }));
  CHECK(tally.told() == 0);  // it may still write
  CHECK_FALSE(world.queue->close(Time{0}));
  CHECK(tally.all_once());
  CHECK(tally.failed() == 1);
  world.queue.reset();
  CHECK_FALSE(pool.expired());
  world.leaves_nothing = false;
}

TEST_CASE("a worker that never reaches its event holds up nobody's copies") {
  World world;
  Leg leg = make_leg(spec_of("lr|but"), 200);
  leg.from.put_on(world.device(), world.machine, 1);
  leg.to.put_on(world.device(), world.machine, 2);
  Peer worker;  // has recorded it behind work that ends by a command
  EventHandle handle{};
  static_assert(sizeof handle == sizeof worker.exports.event);
  std::memcpy(handle.data(), &worker.exports.event, sizeof handle);
  std::atomic<int> told{0};
  REQUIRE(world.queue->watch_event(
      1, handle, [&](EventState state) { told = state == EventState::kReached ? 1 : 2; }));
  hand_over(world, leg, 13, 3);
  CHECK(told == 0);
  worker.command(PeerCommand::kComplete);
  REQUIRE(comes_true([&] { return told != 0; }));
  CHECK(told == 1);
}

TEST_CASE("an event that cannot be opened is told as unusable") {
  World world;
  std::atomic<int> told{0};
  EventHandle handle{};
  handle.fill(7);
  REQUIRE(world.queue->watch_event(
      1, handle, [&](EventState state) { told = state == EventState::kUnusable ? 1 : 2; }));
  REQUIRE(comes_true([&] { return told != 0; }));
  CHECK(told == 1);
  world.queue->unwatch_event(1);  // known no more
}

}  // namespace kvferry::gpu
