// Mapped arenas between real daemons of one machine: the sender's gather writes the receiver's
// memory by itself, in host memory and on GPUs of the fake driver. Every byte verified; what the
// end of a daemon, a stopped one and an operator's word do to what was lent.
#include <csignal>
#include <filesystem>

#include "tests/proc/control.h"
#include "tests/proc/gpu_scene.h"

namespace kvferry::testing {
namespace {

struct HostScene {
  std::unique_ptr<DaemonPair> pair;
  std::unique_ptr<WorkerProcess> workers[2];
  std::string ticket;

  explicit HostScene(std::vector<std::string> settings = {}) {
    settings.insert(settings.begin(), {"engine.chunk_bytes=256KiB", "mapped.host_bytes=16MiB",
                                       "mapped.segment_bytes=8MiB"});
    pair = start_pair(settings);
  }
  void start_workers(const std::string& from, const std::string& to, uint64_t tokens) {
    start_worker(0, from, tokens);
    start_worker(1, to, tokens);
    std::istringstream words(workers[0]->ask("ticket"));
    std::string word;
    words >> word >> ticket;
    REQUIRE(word == "TICKET");
  }
  void start_worker(int side, const std::string& topology, uint64_t tokens) {
    workers[side].reset();
    workers[side] = std::make_unique<WorkerProcess>(
        binary_directory(), side == 0, pair->side(side).socket(), side == 0 ? "prefill" : "decode",
        topology, shape_of(4, 8, 256, tokens));
    const std::string trouble = workers[side]->wait_until_ready();
    INFO(trouble);
    INFO(pair->log_tail());
    REQUIRE(trouble.empty());
  }
  TransferKey begin(uint64_t tokens) {
    const TransferKey key = new_key("prefill");
    const std::string name = key.id + " " + client::to_text(key.secret);
    REQUIRE(workers[0]->ask("send " + name + " " + std::to_string(tokens) + " ") == "OK");
    REQUIRE(workers[1]->ask("receive " + name + " " + ticket + " " + std::to_string(tokens)) ==
            "OK");
    return key;
  }
  TransferEnd end(int side, const TransferKey& key) {
    workers[side]->tell("wait " + key.id + " 30000");
    return workers[side]->next_end();
  }
  void require_hand_over(uint64_t tokens) {
    const TransferKey key = begin(tokens);
    const TransferEnd received = end(1, key);
    INFO(received.error);
    INFO(pair->log_tail());
    REQUIRE_FALSE(received.ranks.empty());
    for (const RankEnd& rank : received.ranks) {
      INFO(rank.reason);
      REQUIRE(rank.state == "COMPLETED");
    }
    for (const RankEnd& rank : end(0, key).ranks) REQUIRE(rank.state == "DELIVERED");
    REQUIRE(workers[1]->ask("verify " + std::to_string(tokens)) == "VERIFIED");
    REQUIRE(workers[1]->ask("clean") == "OK");
    for (auto& worker : workers) REQUIRE(worker->ask("close " + key.id) == "OK");
  }
};

// Until the receiver's daemon has heard that the sender's has mapped so many arenas of its: from
// then on it grants room in them.
void require_lent(const DaemonPair& pair, std::size_t arenas) {
  REQUIRE(comes_true([&] {
    const nlohmann::json answer = control(pair.side(1), "peers");
    for (const auto& peer : answer.at("peers"))
      if (peer.at("node_id") == "sender" && peer.at("lent_arenas").size() == arenas) return true;
    return false;
  }));
}

double written(const bench::DaemonProcess& daemon) {
  return metric(daemon, "kvferry_chunks_total", "event=\"written\"");
}
double mapped(const bench::DaemonProcess& daemon) {
  return metric(daemon, "kvferry_chunks_total", "event=\"mapped\"");
}
double offered(const bench::DaemonProcess& daemon) {
  return metric(daemon, "kvferry_chunks_total", "event=\"offered\"");
}
double fallbacks_to_rails(const bench::DaemonProcess& daemon) {
  return metric(daemon, "kvferry_fallbacks_total", "way=\"peer_arena\"");
}

}  // namespace

TEST_CASE("once the sender has mapped the receiver's arena it writes it, and nothing is offered") {
  const std::string check = GENERATE("none", "xxh3", "gmac");
  HostScene scene({"checks.kind=" + check});
  scene.start_workers("tp2", "tp4", kTokens);
  // The first transfer makes the link, and may be over before the arena is mapped.
  scene.require_hand_over(kTokens);
  require_lent(*scene.pair, 1);
  INFO(scene.pair->log_tail());
  const double before = offered(scene.pair->side(0));
  scene.require_hand_over(kTokens);
  scene.require_hand_over(17);
  CHECK(comes_true([&] { return written(scene.pair->side(0)) > 0; }));
  CHECK(mapped(scene.pair->side(1)) == written(scene.pair->side(0)));
  CHECK(offered(scene.pair->side(0)) == before);
  CHECK(fallbacks_to_rails(scene.pair->side(0)) == 0);
  CHECK(metric(scene.pair->side(1), "kvferry_arena_bytes", "state=\"quarantined\"") == 0);
  CHECK(comes_true([&] { return arena_in_use(scene.pair->side(1)) == 0; }));
}

TEST_CASE("what is lent and cannot be mapped is counted, and the chunks go by the rails") {
  HostScene scene;
  // Nobody is at the receiver's socket for arenas any more: the file is gone before they are
  // linked.
  std::string socket = scene.pair->side(1).config_file();
  socket.replace(socket.rfind(".toml"), std::string::npos, ".arenas");
  REQUIRE(std::filesystem::remove(socket));
  scene.start_workers("tp1", "tp1", kTokens);
  scene.require_hand_over(kTokens);
  const bench::DaemonProcess& sender = scene.pair->side(0);
  CHECK(comes_true([&] { return fallbacks_to_rails(sender) > 0; }));
  CHECK(comes_true([&] {
    return metric(sender, "kvferry_borrow_failures_total", "reason=\"socket\"") ==
           fallbacks_to_rails(sender);
  }));
  scene.require_hand_over(kTokens);
  CHECK(offered(sender) > 0);
  CHECK(written(sender) == 0);
}

TEST_CASE("GPUs write mapped arenas: of host memory, and of each kind of their own") {
  struct Row {
    std::vector<std::string> settings;
    const char* from_memory;
    const char* to_memory;
  };
  const auto on_devices = [](const std::string& kind) {
    return std::vector<std::string>{"mapped.device_bytes=16MiB", "mapped.segment_bytes=8MiB",
                                    "mapped.device_kind=" + kind};
  };
  const std::vector<std::string> on_host{"mapped.host_bytes=16MiB", "mapped.segment_bytes=8MiB"};
  const Row rows[] = {{on_host, "vmm", "vmm"},
                      {on_host, "cuda", "host"},
                      {on_host, "host", "vmm"},
                      {on_devices("fabric_vmm"), "vmm", "cuda"},
                      {on_devices("device_vmm"), "cuda", "vmm"},
                      {on_devices("cuda_malloc"), "vmm", "vmm"},
                      {on_devices("auto"), "host", "vmm"}};
  for (const Row& row : rows) {
    CAPTURE(row.settings, row.from_memory, row.to_memory);
    GpuScene scene(row.settings);
    scene.start_workers("tp2", row.from_memory, "tp4", row.to_memory);
    scene.require_hand_over();
    const std::size_t arenas = row.settings == on_host ? 1 : 2;
    INFO(scene.pair->log_tail());
    require_lent(*scene.pair, arenas);
    const double before = offered(scene.pair->side(0));
    scene.require_hand_over();
    CHECK(comes_true([&] { return written(scene.pair->side(0)) > 0; }));
    CHECK(offered(scene.pair->side(0)) == before);
    CHECK(comes_true([&] { return arena_in_use(scene.pair->side(1)) == 0; }));
  }
}

namespace {

// A transfer under way whose chunks are written, with regions lent at every moment.
struct UnderWay {
  static constexpr uint64_t kMany = 16384;
  HostScene scene{{"engine.chunk_bytes=64KiB", "engine.silence_limit=2s"}};
  TransferKey key;

  UnderWay() {
    scene.start_workers("tp1", "tp1", kMany);
    scene.require_hand_over(17);
    require_lent(*scene.pair, 1);
    scene.require_hand_over(17);
    key = scene.begin(kMany);
    const double before = mapped(receiver());
    REQUIRE(comes_true([&] { return mapped(receiver()) > before + 8; }));
  }
  bench::DaemonProcess& sender() { return scene.pair->side(0); }
  bench::DaemonProcess& receiver() { return scene.pair->side(1); }
  double quarantined() {
    return metric(receiver(), "kvferry_arena_bytes", "state=\"quarantined\"");
  }
  double freed(const std::string& evidence) {
    return metric(receiver(), "kvferry_lent_regions_freed_total", "evidence=\"" + evidence + "\"");
  }
  void require_failed(const std::string& reason) {
    for (const RankEnd& rank : scene.end(1, key).ranks) {
      CHECK(rank.state == "FAILED");
      CHECK(rank.reason == reason);
    }
    REQUIRE(scene.workers[1]->ask("close " + key.id) == "OK");
    REQUIRE(scene.workers[1]->ask("clean") == "OK");
  }
};

}  // namespace

TEST_CASE("a sender's daemon that dies: what was lent is free as soon as its process is gone") {
  UnderWay run;
  run.sender().kill_now();
  run.require_failed("PEER_LOST");
  CHECK(comes_true([&] { return arena_in_use(run.receiver()) == 0; }, seconds(5)));
  CHECK(run.freed("operator") == 0);
  const auto again = run.scene.pair->restart(0);
  require_ok(again);
  run.scene.start_workers("tp1", "tp1", UnderWay::kMany);
  run.scene.require_hand_over(kTokens);
}

TEST_CASE(
    "a sender's daemon that only stopped may still write: quarantine, until it says otherwise") {
  UnderWay run;
  REQUIRE(::kill(run.sender().pid(), SIGSTOP) == 0);
  run.require_failed("PEER_LOST");
  const double held = run.quarantined();
  REQUIRE(held > 0);
  // Nor does an operator's word count for a process that this machine sees run.
  const std::string ctl =
      binary_directory() + "/kvferryctl --socket " + run.receiver().admin_socket();
  CHECK(std::system((ctl + " arenas release --node sender").c_str()) != 0);
  std::this_thread::sleep_for(seconds(1));  // time frees nothing
  CHECK(run.quarantined() == held);
  CHECK(run.freed("process") + run.freed("drained") + run.freed("operator") == 0);
  REQUIRE(::kill(run.sender().pid(), SIGCONT) == 0);
  CHECK(comes_true([&] { return arena_in_use(run.receiver()) == 0; }));
  for (const RankEnd& rank : run.scene.end(0, run.key).ranks) CHECK(rank.state == "FAILED");
  REQUIRE(run.scene.workers[0]->ask("close " + run.key.id) == "OK");
  run.scene.require_hand_over(kTokens);
}

TEST_CASE("a receiver's daemon that dies ends its senders' transfers, and is written again later") {
  UnderWay run;
  run.receiver().kill_now();
  for (const RankEnd& rank : run.scene.end(0, run.key).ranks) {
    CHECK(rank.state == "FAILED");
    CHECK(rank.reason == "PEER_LOST");
  }
  REQUIRE(run.scene.workers[0]->ask("close " + run.key.id) == "OK");
  CHECK(comes_true([&] { return metric(run.sender(), "kvferry_borrowed_arenas") == 0; }));
  require_ok(run.scene.pair->restart(1));
  run.scene.start_worker(1, "tp1", UnderWay::kMany);
  run.scene.require_hand_over(kTokens);
  require_lent(*run.scene.pair, 1);
  const double before = written(run.sender());
  run.scene.require_hand_over(kTokens);
  CHECK(written(run.sender()) > before);
}

}  // namespace kvferry::testing
