// Memory that is taken away from under transfers, or goes bad: registrations taken back, pages
// punched out of a pool, bytes that change between two daemons.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <chrono>
#include <filesystem>

#include "daemon/base/unique_fd.h"
#include "daemon/memory/host_pool.h"
#include "tests/proc/flow_scene.h"

using namespace kvferry::testing;
namespace kc = kvferry::client;

namespace {

// Half of the prompt has arrived and the other half is not sent yet.
void half_way(FlowScene& scene, FlowRequest& request) {
  request.receive();
  request.compute(0, 128);
  request.send(0, 128, false);
  scene.run([&] {
    const auto status = scene.decode[0]->client().status(request.receives[0]);
    return status && status->slices == 2;  // of each sender rank one
  });
}

void require_failed(FlowWorker& worker, kc::TransferHandle transfer, const std::string& reason) {
  const auto& told = worker.told(transfer);
  CHECK(told.failed == 1);
  CHECK(told.reason == reason);
  CHECK(told.completed + told.delivered + told.cancelled == 0);
  CHECK(told.source_released + told.dest_released == 1);
}

void require_hand_off(FlowScene& scene) {
  const auto ticket = scene.prefill[0]->client().ticket("prefill");
  require_ok(ticket);
  scene.ticket = *ticket;
  FlowRequest request(scene, 256);
  request.prefill_all();
  request.receive();
  scene.run([&] { return request.sent() && request.received(); });
  request.require_well();
  request.close();
}

// Changes every byte of a daemon's arena.
void corrupt_arena(const kvferry::bench::DaemonProcess& daemon) {
  std::set<ino_t> segments;  // the daemon has several descriptors of each
  const std::string directory = "/proc/" + std::to_string(daemon.pid()) + "/fd";
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    std::error_code gone;
    const std::string target = std::filesystem::read_symlink(entry.path(), gone).string();
    if (gone || !target.starts_with("/memfd:kvferry-arena")) continue;
    const kvferry::UniqueFd fd(::open(entry.path().c_str(), O_RDWR | O_CLOEXEC));
    REQUIRE(fd);
    struct stat file {};
    REQUIRE(::fstat(fd.get(), &file) == 0);
    if (!segments.insert(file.st_ino).second) continue;
    const auto bytes = static_cast<std::size_t>(file.st_size);
    void* const data = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
    REQUIRE(data != MAP_FAILED);
    for (std::size_t i = 0; i < bytes; ++i) static_cast<uint8_t*>(data)[i] ^= 0xFF;
    ::munmap(data, bytes);
  }
  REQUIRE_FALSE(segments.empty());
}

}  // namespace

TEST_CASE("sleep: a registration is taken back with work open, and a later one is another") {
  FlowScene scene;
  for (const auto& [of_sender, with_pools] :
       {std::pair(true, false), {true, true}, {false, false}, {false, true}}) {
    CAPTURE(of_sender, with_pools);
    FlowRequest request(scene, 256);
    half_way(scene, request);
    FlowWorker& asleep = of_sender ? *scene.prefill[1] : *scene.decode[0];
    const auto& daemon = scene.pair->side(of_sender ? 0 : 1);
    const double pool_bytes = metric(daemon, "kvferry_pool_bytes");
    const uint64_t generation = asleep.registered().generation;

    asleep.unregister(with_pools);
    const double left = of_sender ? pool_bytes / 2 : 0;  // the other rank's
    CHECK(metric(daemon, "kvferry_pool_bytes") == (with_pools ? left : pool_bytes));
    scene.run([&] { return request.sent() && request.received(); });
    for (std::size_t r = 0; r < 2; ++r)
      require_failed(*scene.prefill[r], request.sends[r], "UNREGISTERED");
    require_failed(*scene.decode[0], request.receives[0], "UNREGISTERED");
    request.close();

    asleep.register_again();
    CHECK_FALSE(asleep.registered().existing);
    CHECK(asleep.registered().generation > generation);
    if (of_sender) {
      // The ticket of before never leads to the new pages.
      FlowRequest stale(scene, 64);
      stale.compute(0, 64);
      stale.send(0, 64, true, [](kc::SendRequest& of) { of.lease = milliseconds(300); });
      stale.receive({}, [](kc::ReceiveRequest& of) { of.wait = milliseconds(300); });
      scene.run([&] { return stale.sent() && stale.received(); });
      require_failed(*scene.decode[0], stale.receives[0], "STALE_CARDS");
      for (std::size_t r = 0; r < 2; ++r)
        require_failed(*scene.prefill[r], stale.sends[r], "EXPIRED");
      stale.close();
    }
    require_hand_off(scene);
  }
  scene.require_quiet();
}

TEST_CASE("a receiver that goes before its sender has heard of it leaves word") {
  FlowScene scene;
  for (std::size_t round = 0; round < 4; ++round) {
    CAPTURE(round);
    FlowRequest request(scene, 900);
    request.prefill_all();
    request.receive();
    // Accepted: a call that unregisters may overtake the stream. Its PULL is on the way or not.
    scene.run([&] {
      const auto status = scene.decode[0]->client().status(request.receives[0]);
      return status.ok() && status->state != kc::TransferState::kNone;
    });
    if (round < 3)
      scene.decode[0]->unregister(false);
    else
      scene.decode[0]->die();
    const auto begin = std::chrono::steady_clock::now();
    scene.run([&] { return request.sent(); });
    // Not by the lease, which is half a minute.
    CHECK(std::chrono::steady_clock::now() - begin < std::chrono::seconds(10));
    for (std::size_t r = 0; r < 2; ++r) {
      const auto& sent = scene.prefill[r]->told(request.sends[r]);
      CHECK(sent.source_released == 1);
      CHECK(sent.reason != "EXPIRED");
    }
    if (round == 3) break;
    scene.run([&] { return request.received(); });
    request.close();
    scene.decode[0]->register_again();
  }
}

TEST_CASE("registrations that are taken back at any moment of running transfers") {
  FlowScene scene;
  for (std::size_t round = 0; round < 12; ++round) {
    CAPTURE(round);
    FlowRequest request(scene, 900);
    request.prefill_all();
    request.receive();
    scene.run([&] {
      return scene.prefill[0]->told(request.sends[0]).receiver_ready == 1 &&
             scene.prefill[1]->told(request.sends[1]).receiver_ready == 1;
    });
    for (std::size_t steps = 0; steps < round; ++steps)
      for (FlowWorker* worker : scene.all()) worker->step();
    FlowWorker& asleep = round % 2 == 0 ? *scene.decode[0] : *scene.prefill[1];
    asleep.unregister(false);
    scene.run([&] { return request.sent() && request.received(); });
    CHECK(request.right);
    const auto& received = scene.decode[0]->told(request.receives[0]);
    CHECK(received.dest_released == 1);
    if (received.completed == 0) CHECK(received.reason == "UNREGISTERED");
    for (std::size_t r = 0; r < 2; ++r) {
      const auto& sent = scene.prefill[r]->told(request.sends[r]);
      CHECK(sent.source_released == 1);
      if (sent.delivered == 0) CHECK(sent.reason == "UNREGISTERED");
    }
    request.close();
    asleep.register_again();
    const auto ticket = scene.prefill[0]->client().ticket("prefill");
    require_ok(ticket);
    scene.ticket = *ticket;
  }
  scene.require_quiet();
}

TEST_CASE("pages punched out of a pool in mid-transfer end it, and the daemon serves on") {
  FlowScene scene;
  for (const bool of_sender : {true, false}) {
    CAPTURE(of_sender);
    FlowRequest request(scene, 256);
    half_way(scene, request);
    FlowWorker& victim = of_sender ? *scene.prefill[1] : *scene.decode[0];
    victim.punch();
    const auto punched = std::chrono::steady_clock::now();
    scene.run([&] {
      return std::chrono::steady_clock::now() - punched > kvferry::memory::HostPool::kLookEvery;
    });
    request.send(128, 256, true);
    scene.run([&] { return request.sent() && request.received(); });
    const std::string reason = of_sender ? "GATHER_FAILED" : "SCATTER_FAILED";
    require_failed(*scene.decode[0], request.receives[0], reason);
    require_failed(*scene.prefill[1], request.sends[1], reason);
    request.close();

    // Nothing goes through that pool any more; another takes its place.
    victim.unregister(true);
    victim.register_again();
    require_hand_off(scene);
  }
  scene.require_quiet();
}

TEST_CASE(
    "bytes that have changed on their way are not scattered: DATA_LOSS, and the next is right") {
  const std::string kind = GENERATE("xxh3", "gmac");
  FlowScene scene({FlowGroup{}}, {}, 1, {"checks.kind=" + kind});
  const uint32_t word = *scene.decode[0]->client().alloc_word();
  FlowRequest request(scene, 64);
  request.prefill_all();
  request.receive(
      {}, [&](kc::ReceiveRequest& of) { of.ready = kc::ReadyCondition::timeline(word, 1); });
  // One chunk of each sender rank has landed and waits for the pages.
  REQUIRE(comes_true([&] {
    return metric(scene.pair->side(1), "kvferry_arena_bytes", "state=\"landed\"") == 2 * (16 << 10);
  }));
  corrupt_arena(scene.pair->side(1));
  require_ok(scene.decode[0]->client().signal(word, 1));
  scene.run([&] { return request.sent() && request.received(); });
  require_failed(*scene.decode[0], request.receives[0], "DATA_LOSS");
  request.close();
  require_hand_off(scene);
  scene.require_quiet();
}
