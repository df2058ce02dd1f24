#include <grpcpp/grpcpp.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <catch2/catch.hpp>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <sstream>
#include <string>
#include <thread>

#include "client/ctl/render.h"
#include "daemon/rpc/admin_service.h"
#include "kvferry/v1/admin.grpc.pb.h"

using namespace kvferry;
using namespace kvferry::rpc;
using std::chrono::microseconds;
using std::chrono::milliseconds;
using std::chrono::seconds;

namespace {

// Answers fixed snapshots, some from another thread.
class FakeBackend : public AdminBackend {
 public:
  ~FakeBackend() override {
    for (std::thread& thread : threads_) thread.join();
  }
  bool healthy = true;
  std::string cancelled;
  std::atomic<uint64_t> listed{0};
  std::atomic<bool> drops{false};  // answers nothing, as a daemon does that stops
  std::string released_node;
  std::optional<BootId> released_boot;

  void status(Time, Reply<StatusInfo> done) override {
    StatusInfo info;
    info.version = "1.2.3";
    info.commit = "abc";
    info.boot.bytes[0] = 0xab;
    info.node = "node-a";
    info.uptime = milliseconds(61'500);
    info.arenas = {{"host", "shared_host", "no GPU here"}};
    info.gpus = {{"gpu0", "GPU-1", "A fast one", true, ""},
                 {"gpu1", "GPU-2", "Another", false, "an ECC error"}};
    info.numa = {{"arena 0", "node 1", "next to eth0", ""},
                 {"copy threads", "node 1", "", "not permitted"}};
    info.rails_up = 1;
    info.rails_total = 2;
    threads_.emplace_back([done = std::move(done), info] { done(info); });
  }
  void list_workers(Time, Reply<std::vector<WorkerInfo>> done) override {
    WorkerInfo worker;
    worker.id = 7;
    worker.name = "prefill-0";
    worker.tenant = "default";
    worker.role = "rank";
    worker.pid = 42;
    worker.pools = {{"kv", "host_shm", 3ULL << 30}, {"gpu", "cuda_ipc", 1ULL << 30}};
    worker.layouts = {{"llama", 1, 2, 1, 64}};
    done(std::vector<WorkerInfo>{worker});
  }
  void list_transfers(Time, Reply<std::vector<TransferInfo>> done) override {
    std::vector<TransferInfo> list(3);
    for (std::size_t i = 0; i < list.size(); ++i) {
      list[i].handle = "s" + std::to_string(i);
      list[i].role = "send";
      list[i].state = "ACTIVE";
    }
    list[0].id = std::string("a\n\x00\xff\"", 5);
    list[0].reason = Reason::kPeerLost;
    list[0].bytes_done = ++listed << 20;  // it moves
    list[0].bytes_total = uint64_t{1} << 40;
    done(std::move(list));
  }
  void list_peers(Time, Reply<std::vector<PeerInfo>> done) override {
    PeerInfo linked;
    linked.node = "node-b";
    linked.boot.bytes[15] = 1;
    linked.state = "linked";
    linked.last_heard = milliseconds(250);
    linked.lanes = {{0, 0, true, 5000, 2, 3}, {1, 1, false, 0, 0, 0}};
    PeerInfo down;
    down.node = "node-c";
    down.state = "down";
    down.last_heard = Duration(-1);
    done(std::vector<PeerInfo>{linked, down});
  }
  void list_rails(Time, Reply<std::vector<RailInfo>> done) override {
    if (drops) return;
    RailInfo rail;
    rail.transport = "tcp";
    rail.device = "lo";
    rail.settings = {{"UCX_TLS", "tcp"}};
    RailInfo second = rail;
    second.index = second.connection = 1;
    second.send_rate = 7 << 20;
    done(std::vector<RailInfo>{rail, second});
  }
  void list_arenas(Time, Reply<ArenasInfo> done) override {
    ArenaInfo arena;
    arena.device = "host";
    arena.kind = "shared_host";
    arena.total_bytes = 256 << 20;
    arena.free_bytes = 192 << 20;
    arena.landing_bytes = 64 << 20;
    LentInfo lent;
    lent.arena = 3;
    lent.node = "away";
    lent.boot.bytes[0] = 0xab;
    lent.regions = 2;
    lent.bytes = 2 << 20;
    done(ArenasInfo{{arena}, {lent}});
  }
  void release_arenas(std::string node, std::optional<BootId> boot, Time,
                      Reply<ReleasedInfo> done) override {
    released_node = std::move(node);
    released_boot = boot;
    done(ReleasedInfo{2, 2 << 20, 1});
  }
  void cancel_transfer(std::string selector, Time,
                       Reply<std::vector<CancelledTransfer>> done) override {
    cancelled = selector;
    if (selector == "r9")
      done(fail(Code::kNotFound, "TRANSFER_UNKNOWN", "there is no r9"));
    else
      done(std::vector<CancelledTransfer>{{selector, "CANCELLED", true}});
  }
  void trace(std::string selector, Time, Reply<TraceInfo> done) override {
    traced = selector;
    if (selector == "r9") {
      done(fail(Code::kNotFound, "TRANSFER_UNKNOWN", "there is no r9"));
      return;
    }
    TracePartInfo own;
    own.node = "node-a";
    own.handle = "s3x17";
    own.id_hash = "0badcafe";
    own.role = "send";
    own.state = "DELIVERED";
    own.bytes_done = own.bytes_total = 3 << 20;
    own.fragments = 96;
    own.chunks = 3;
    own.peers = {"node-b"};
    own.steps = {{"asked", Duration(0), milliseconds(5), 2},
                 {"arrived", milliseconds(30), milliseconds(42), 3}};
    TracePartInfo other;
    other.node = "node-b";
    other.id_hash = own.id_hash;
    other.role = "receive";
    other.rank = 4;
    other.state = "FAILED";
    other.reason = Reason::kDeadline;
    other.clock_error = microseconds(250);
    other.steps = {{"asked", -milliseconds(1500), -microseconds(20), 2}};
    done(TraceInfo{{own, other}, {{"node-c", "LINK_DOWN: there is\x1b no link"}}, seconds(2)});
  }
  std::string traced;
  void health(Time, Reply<std::vector<HealthCheckInfo>> done) override {
    done(std::vector<HealthCheckInfo>{{"engine", true, ""},
                                      {"rails", healthy, healthy ? "" : "all down"}});
  }
  std::optional<Duration> drain_limit;
  bool good_configuration = true;
  void drain(std::optional<Duration> limit, Reply<bool> done) override {
    if (drops) return;
    drain_limit = limit;
    threads_.emplace_back([done = std::move(done)] { done(true); });
  }
  void reload(Reply<ReloadedInfo> done) override {
    if (good_configuration)
      done(ReloadedInfo{3, {"log.level"}, {"engine.leg_credits", "ucx"}});
    else
      done(fail(Code::kInvalidArgument, "BAD_CONFIGURATION", "engine.lease: is not a duration"));
  }
  void config(Reply<std::vector<ConfigValueInfo>> done) override {
    done(std::vector<ConfigValueInfo>{
        {"log.level", "\"info\"", "default", true, ""},
        {"engine.leg_credits", "8", "file /x/conf.d/1.toml:3", false, "9"}});
  }

 private:
  std::vector<std::thread> threads_;
};

struct Fixture {
  Fixture() {
    std::string name = (std::filesystem::temp_directory_path() / "kvferry-admin-XXXXXX").string();
    REQUIRE(::mkdtemp(name.data()) != nullptr);
    directory = name;
    config.path = directory + "/admin.sock";
    auto started = AdminServer::start(config, backend, metrics);
    REQUIRE(started);
    server = std::move(*started);
    stub = v1::Admin::NewStub(
        grpc::CreateChannel("unix:" + config.path, grpc::InsecureChannelCredentials()));
  }
  ~Fixture() {
    server.reset();
    std::filesystem::remove_all(directory);
  }

  template <typename Request, typename Response>
  grpc::Status call(grpc::Status (v1::Admin::Stub::*method)(grpc::ClientContext*, const Request&,
                                                            Response*),
                    const Request& request, Response& response) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + seconds(20));
    return (stub.get()->*method)(&context, request, &response);
  }

  // Runs kvferryctl against the server; output and exit code.
  std::pair<std::string, int> ctl(const std::string& arguments) const {
    const std::string command = std::string(KVFERRY_CTL) + " --timeout 20 --socket " + config.path +
                                " " + arguments + " 2>&1";
    std::FILE* pipe = ::popen(command.c_str(), "re");
    REQUIRE(pipe != nullptr);
    std::string out;
    std::array<char, 4096> block{};
    for (std::size_t got = 0; (got = std::fread(block.data(), 1, block.size(), pipe)) > 0;)
      out.append(block.data(), got);
    const int status = ::pclose(pipe);
    return {out, WIFEXITED(status) ? WEXITSTATUS(status) : -1};
  }

  std::string directory;
  AdminServerConfig config;
  FakeBackend backend;
  ops::Metrics metrics{{"1", "c", ""}, {}, {}};
  std::unique_ptr<AdminServer> server;
  std::unique_ptr<v1::Admin::Stub> stub;
};

}  // namespace

TEST_CASE_METHOD(Fixture, "the admin socket is its owner's only and refuses a second daemon") {
  struct stat info {};
  REQUIRE(::stat(config.path.c_str(), &info) == 0);
  CHECK((info.st_mode & 0777U) == 0600);
  const auto second = AdminServer::start(config, backend, metrics);
  REQUIRE_FALSE(second);
  CHECK(second.error().reason == "LISTEN_FAILED");

  AdminServerConfig elsewhere = config;
  elsewhere.path = directory + "/absent/admin.sock";
  CHECK_FALSE(AdminServer::start(elsewhere, backend, metrics));

  server.reset();
  CHECK(AdminServer::start(config, backend, metrics));
}

TEST_CASE_METHOD(Fixture, "snapshots become messages, with bytes of ids escaped") {
  v1::StatusResponse status;
  REQUIRE(call(&v1::Admin::Stub::Status, v1::StatusRequest(), status).ok());
  CHECK(status.boot_id() == "ab" + std::string(30, '0'));
  CHECK(status.uptime().seconds() == 61);
  CHECK(status.uptime().nanos() == 500'000'000);

  v1::ListTransfersRequest request;
  request.set_limit(2);
  v1::ListTransfersResponse transfers;
  REQUIRE(call(&v1::Admin::Stub::ListTransfers, request, transfers).ok());
  CHECK(transfers.total() == 3);
  REQUIRE(transfers.transfers_size() == 2);
  CHECK(transfers.transfers(0).id() == R"(a\x0a\x00\xff\x22)");
  CHECK(transfers.transfers(0).reason() == "PEER_LOST");
  CHECK(transfers.transfers(1).reason().empty());

  v1::ListPeersResponse peers;
  REQUIRE(call(&v1::Admin::Stub::ListPeers, v1::ListPeersRequest(), peers).ok());
  CHECK(peers.peers(0).has_last_heard());
  CHECK_FALSE(peers.peers(1).has_last_heard());
  REQUIRE(peers.peers(0).lanes_size() == 2);
  CHECK(peers.peers(0).lanes(0).up());
  CHECK(peers.peers(0).lanes(0).send_rate() == 5000);
  CHECK(peers.peers(0).lanes(0).in_flight_bytes() == 2);
  CHECK(peers.peers(0).lanes(0).arrived_bytes() == 3);
  CHECK(peers.peers(0).lanes(1).rail() == 1);
  CHECK(peers.peers(1).boot_id().empty());
}

TEST_CASE_METHOD(Fixture, "errors carry their code and reason, and are counted") {
  v1::CancelTransferResponse response;
  v1::CancelTransferRequest request;
  for (const char* selector : {"", "S1", "a b", "s1\n"}) {
    request.set_selector(selector);
    const grpc::Status status = call(&v1::Admin::Stub::CancelTransfer, request, response);
    CHECK(status.error_code() == grpc::StatusCode::INVALID_ARGUMENT);
    CHECK(status.error_message().find("BAD_SELECTOR selector") == 0);
    CHECK(backend.cancelled.empty());
  }
  request.set_selector("r9");
  CHECK(call(&v1::Admin::Stub::CancelTransfer, request, response).error_code() ==
        grpc::StatusCode::NOT_FOUND);
  v1::TraceResponse trace;
  const grpc::Status status = call(&v1::Admin::Stub::Trace, v1::TraceRequest(), trace);
  CHECK(status.error_code() == grpc::StatusCode::INVALID_ARGUMENT);
  CHECK(backend.traced.empty());
  const std::string page = metrics.text();
  CHECK(page.find("kvferry_rpcs_total{code=\"INVALID_ARGUMENT\"} 5\n") != std::string::npos);
  CHECK(page.find("kvferry_rpcs_total{code=\"NOT_FOUND\"} 1\n") != std::string::npos);
}

TEST_CASE_METHOD(Fixture, "kvferryctl prints JSON for programs and tables for people") {
  const auto [status_json, status_code] = ctl("status --json");
  INFO(status_json);
  CHECK(status_code == 0);
  const auto status = nlohmann::json::parse(status_json);
  CHECK(status["node_id"] == "node-a");
  CHECK(status["uptime_seconds"] == 61.5);
  CHECK(status["arenas"][0]["kind"] == "shared_host");
  CHECK(status["gpus"][0]["up"] == true);
  CHECK(status["gpus"][1]["detail"] == "an ECC error");
  CHECK(ctl("status").first.find("gpu1: Another, GPU-2, down: an ECC error") != std::string::npos);
  CHECK(status["numa"][0]["place"] == "node 1");
  CHECK(status["numa"][1]["problem"] == "not permitted");
  CHECK(ctl("status").first.find("arena 0: node 1 (next to eth0)\n") != std::string::npos);
  CHECK(ctl("status").first.find("copy threads: node 1, failed: not permitted\n") !=
        std::string::npos);

  CHECK(nlohmann::json::parse(ctl("--json workers").first)["workers"][0]["pools"][0]["bytes"] ==
        3ULL << 30);
  CHECK(nlohmann::json::parse(ctl("arenas --json").first)["arenas"][0]["landing_bytes"] ==
        64 << 20);
  CHECK(
      nlohmann::json::parse(ctl("peers --json").first)["peers"][1]["last_heard_seconds"].is_null());
  CHECK(nlohmann::json::parse(ctl("transfers --json --limit 1").first)["total"] == 3);

  CHECK(ctl("status").first.find("node         node-a\n") != std::string::npos);
  CHECK(ctl("workers").first.find("prefill-0") != std::string::npos);
  CHECK(ctl("workers").first.find("1 cuda_ipc + 1 host_shm, 4.0 GiB") != std::string::npos);
  CHECK(ctl("transfers").first.find("PEER_LOST") != std::string::npos);
  CHECK(ctl("rails").first.find("UCX_TLS=tcp") != std::string::npos);
  const auto rails = nlohmann::json::parse(ctl("rails --json").first)["rails"];
  CHECK(rails[0]["connection"] == 0);
  CHECK(rails[1]["connection"] == 1);
  CHECK(rails[1]["send_bytes_per_second"] == 7 << 20);
  CHECK(ctl("rails").first.find("7.0 MiB") != std::string::npos);
  CHECK(nlohmann::json::parse(ctl("peers --json").first)["peers"][0]["lanes"][1]["rail"] == 1);
  CHECK(ctl("arenas").first.find("25%") != std::string::npos);
  CHECK(ctl("arenas").first.find("away") != std::string::npos);
  CHECK(nlohmann::json::parse(ctl("arenas --json").first)["lent"][0]["bytes"] == 2 << 20);
}

TEST_CASE_METHOD(Fixture, "a call whose answer is dropped is answered all the same") {
  backend.drops = true;
  const auto [text, code] = ctl("rails");
  CHECK(code != 0);
  CHECK(text.find("SHUTDOWN") != std::string::npos);
}

TEST_CASE_METHOD(Fixture, "kvferryctl answers by its exit code") {
  CHECK(ctl("health").second == 0);
  backend.healthy = false;
  const auto [text, code] = ctl("health");
  CHECK(code == 1);
  CHECK(text.find("FAIL  rails: all down") != std::string::npos);

  CHECK(ctl("cancel s12").second == 0);
  CHECK(backend.cancelled == "s12");
  const auto released = ctl("arenas release --node away --boot ab000000000000000000000000000000");
  CHECK(released.second == 0);
  CHECK(released.first == "released 2 regions, 2.0 MiB\n1 regions left: their peer's link is up\n");
  CHECK(backend.released_node == "away");
  REQUIRE(backend.released_boot.has_value());
  CHECK(backend.released_boot->bytes[0] == 0xab);
  backend.released_node.clear();
  CHECK(ctl("arenas release").second == 1);
  CHECK(ctl("arenas release --boot ab000000000000000000000000000000").second == 1);
  CHECK(backend.released_node.empty());
  CHECK(ctl("arenas release --boot xyz").second == 1);
  CHECK(ctl("cancel r9").second == 1);
  CHECK(ctl("cancel").second == 64);
  CHECK(ctl("").second == 64);
  CHECK(ctl("nonsense").second == 64);
  CHECK(ctl("--help").second == 0);
  CHECK(ctl("--version").second == 0);
  CHECK(ctl("trace r9").second == 1);
  server.reset();
  CHECK(ctl("top --once").second == 69);
  CHECK(ctl("transfers --watch 0.05").second == 69);
  CHECK(ctl("status").second == 69);
  CHECK(ctl("health").second == 1);
}

TEST_CASE_METHOD(Fixture, "a trace is told part by part, and what could not be had") {
  const auto [text, code] = ctl("trace s3x17");
  CHECK(code == 0);
  CHECK(backend.traced == "s3x17");
  CHECK(text ==
        "send rank 0 on node-a, s3x17 (0badcafe): DELIVERED\n"
        "3.0 MiB of 3.0 MiB, 3 chunks of 96 pieces of memory\n"
        "STEP     FIRST   LAST  COUNT\n"
        "asked     +0us   +5ms      2\n"
        "arrived  +30ms  +42ms      3\n"
        "\n"
        "receive rank 4 on node-b (0badcafe): FAILED DEADLINE\n"
        "0 B of 0 B, 0 chunks of 0 pieces of memory\n"
        "times may be wrong by 250us\n"
        "STEP   FIRST   LAST  COUNT\n"
        "asked  -1.5s  -20us      2\n"
        "\n"
        "node-c did not tell of its side; ask there: LINK_DOWN: there is\\x1b no link\n");
  const auto json = nlohmann::json::parse(ctl("--json trace s3x17").first);
  CHECK(json["age_seconds"] == 2);
  CHECK(json["parts"][0]["peers"][0] == "node-b");
  CHECK(json["parts"][0]["steps"][1]["name"] == "arrived");
  CHECK(json["parts"][0]["steps"][1]["last_seconds"] == 0.042);
  CHECK(json["parts"][0]["steps"][1]["count"] == 3);
  CHECK(json["parts"][1]["clock_error_seconds"] == 0.00025);
  CHECK(json["gaps"][0]["node_id"] == "node-c");
}

TEST_CASE_METHOD(Fixture, "live views print one picture after the other and end when told") {
  // Each list of transfers says a MiB more.
  const auto lines = [](const std::string& text) {
    std::vector<nlohmann::json> out;
    std::istringstream in(text);
    for (std::string line; std::getline(in, line);) out.push_back(nlohmann::json::parse(line));
    return out;
  };
  const auto [watched, code] = ctl("--json transfers --watch 0.05 --count 2");
  CHECK(code == 0);
  const auto pictures = lines(watched);
  REQUIRE(pictures.size() == 2);
  for (const auto& picture : pictures) {
    const double interval = picture["interval_seconds"];
    CHECK(interval > 0.04);  // measured between pictures, of which the first may have been late
    CHECK(picture["transfers"][0]["bytes_per_second"].get<double>() * interval == Approx(1 << 20));
    CHECK(picture["transfers"][1]["bytes_per_second"] == 0);
    CHECK(picture["total"] == 3);
  }
  CHECK(pictures[1]["transfers"][0]["bytes_done"].get<uint64_t>() ==
        pictures[0]["transfers"][0]["bytes_done"].get<uint64_t>() + (1 << 20));
  const auto text = ctl("transfers --count 1 --watch 0.05");
  CHECK(text.second == 0);
  CHECK(text.first.find("RATE") != std::string::npos);
  CHECK(text.first.find("\033") == std::string::npos);  // it is no terminal

  const auto top = lines(ctl("--json top --interval 0.05 --count 3 --rows 2").first);
  REQUIRE(top.size() == 3);
  CHECK(top[2]["transfers"].size() == 2);
  CHECK(top[2]["transfers_total"] == 3);
  CHECK(top[2]["transfers"][0]["handle"] == "s0");
  CHECK(top[2]["rates"]["sent_bytes_per_second"] == 0);
  CHECK(top[2]["transfers_by_state"]["send"]["ACTIVE"] == 3);
  const auto [page, top_code] = ctl("top --once --interval 0.05");
  CHECK(top_code == 0);
  CHECK(page.find("kvferryd 1.2.3 on node-a") != std::string::npos);
  CHECK(page.find("QUARANTINED") != std::string::npos);
  CHECK(page.find("prefill-0") != std::string::npos);

  for (const char* wrong : {"transfers --watch 0", "transfers --watch x", "transfers --count 2",
                            "top --once --count 2", "top --interval 0", "top --count 0"})
    CHECK(ctl(wrong).second == 64);
  // An answer that fails ends the view.
  backend.drops = true;
  CHECK(ctl("top --interval 0.05").second == 69);
}

TEST_CASE_METHOD(Fixture, "--watch alone looks once a second") {
  const auto [text, code] = ctl("--json transfers --watch --count 1");
  CHECK(code == 0);
  CHECK(nlohmann::json::parse(text)["interval_seconds"] >= 1.0);
}

TEST_CASE("bytes and durations read well") {
  CHECK(ctl::human_bytes(0) == "0 B");
  CHECK(ctl::human_bytes(1536) == "1.5 KiB");
  CHECK(ctl::human_bytes(256.0 * 1024 * 1024) == "256 MiB");
  CHECK(ctl::human_duration(0.00034) == "340us");
  CHECK(ctl::human_duration(125) == "2m05s");
  CHECK(ctl::human_duration(90'000) == "1d01h");
}

TEST_CASE_METHOD(Fixture, "drain is answered when all has ended, with the limit that was given") {
  CHECK(ctl("drain") == std::pair<std::string, int>{"drained: no transfer is left\n", 0});
  CHECK(backend.drain_limit == std::nullopt);
  CHECK(ctl("drain --limit 1.5").second == 0);
  CHECK(backend.drain_limit == Duration(milliseconds(1500)));
  CHECK(ctl("drain --limit -1").second == 64);
  for (const int64_t seconds_given : {int64_t{-1}, int64_t{86401}, int64_t{1} << 62}) {
    v1::DrainRequest request;
    request.mutable_limit()->set_seconds(seconds_given);
    v1::DrainResponse response;
    const grpc::Status status = call(&v1::Admin::Stub::Drain, request, response);
    CHECK(status.error_code() == grpc::StatusCode::INVALID_ARGUMENT);
    CHECK(status.error_message().find("BAD_LIMIT limit") == 0);
  }
  // A daemon that stops meanwhile says so.
  backend.drops = true;
  CHECK(ctl("drain").second == 69);
}

TEST_CASE_METHOD(Fixture,
                 "reload tells what is in force, what waits for a restart, what is wrong") {
  const auto [text, code] = ctl("reload");
  CHECK(code == 0);
  CHECK(text ==
        "reloaded; peers in force: 3\n"
        "changed, and in force now: log.level\n"
        "changed, but in force from the next start on: engine.leg_credits ucx\n");
  backend.good_configuration = false;
  const auto [problem, refused] = ctl("reload");
  CHECK(refused == 1);
  CHECK(problem.find("BAD_CONFIGURATION: engine.lease: is not a duration") != std::string::npos);
}

TEST_CASE_METHOD(Fixture, "config tells each value, where it comes from and what waits") {
  const auto [text, code] = ctl("config");
  CHECK(code == 0);
  CHECK(text ==
        "KEY                 VALUE   FROM\n"
        "log.level           \"info\"  default\n"
        "engine.leg_credits  8       file /x/conf.d/1.toml:3\n"
        "\n"
        "In force from the next start on:\n"
        "  engine.leg_credits = 9\n");
  const auto json = nlohmann::json::parse(ctl("--json config").first);
  CHECK(json["values"].size() == 2);
  CHECK(json["values"][0]["reloadable"] == true);
  CHECK(json["values"][1]["next"] == "9");
}
