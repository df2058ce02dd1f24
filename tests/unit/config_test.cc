#include "daemon/ops/config.h"

#include <algorithm>
#include <array>
#include <catch2/catch.hpp>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "daemon/ops/options.h"
#include "tests/unit/config_support.h"

using namespace kvferry;
using namespace kvferry::ops;

TEST_CASE("the printed default file loads to the defaults") {
  const Scratch scratch;
  const LoadedConfig printed = load_text(scratch, default_config_text());
  const LoadedConfig built_in = load_config({});
  INFO(all_of(printed.problems));
  REQUIRE(printed.ok());
  REQUIRE(built_in.ok());
  CHECK(printed.config == built_in.config);
  CHECK(printed.config.engine.chunk_bytes == 1 * kMiB);
  CHECK(printed.config.arena.bytes == 256 * kMiB);
  CHECK(printed.config.engine.lease == seconds(30));
}

TEST_CASE("the shipped configuration file is the printed default") {
  std::ifstream in(KVFERRY_SOURCE_DIR "/config/kvferry.toml");
  std::stringstream text;
  text << in.rdbuf();
  CHECK(text.str() == default_config_text());
}

TEST_CASE("the examples in the default file are valid when they are put in force") {
  const Scratch scratch;
  std::istringstream in(default_config_text());
  std::string text;
  for (std::string line; std::getline(in, line);) {
    const bool example = line.size() > 1 && line[0] == '#' && line[1] != ' ' && line[1] != '\n';
    text += (example ? line.substr(1) : line) + "\n";
  }
  const std::string secret = scratch.write("secret", "0123456789abcdef\n");
  const LoadedConfig loaded = load_text(scratch, text, {"peer.cluster_secret_file=" + secret});
  INFO(all_of(loaded.problems));
  REQUIRE(loaded.ok());
  REQUIRE(loaded.config.peers.size() == 1);
  CHECK(loaded.config.peers[0].identity == "node-b");
  CHECK(loaded.config.peers[0].addresses[1].prefix_bits == 16);
  CHECK(loaded.config.ucx.count("TCP_TX_SEG_COUNT") == 1);
}

TEST_CASE("the command line wins over the environment, which wins over the file") {
  const Scratch scratch;
  const std::string text =
      "config_version = 1\n[engine]\nlease = \"10s\"\nleg_credits = 3\n"
      "staged_ahead = 5\n";
  const LoadedConfig loaded = load_text(
      scratch, text, {"engine.lease=30s", "engine.lease=40s"},
      {{"KVFERRY_ENGINE_LEASE", "20s"}, {"KVFERRY_ENGINE_LEG_CREDITS", "4"}, {"PATH", "/bin"}});
  INFO(all_of(loaded.problems));
  REQUIRE(loaded.ok());
  CHECK(loaded.config.engine.lease == seconds(40));
  CHECK(loaded.config.engine.leg_credits == 4);
  CHECK(loaded.config.engine.staged_ahead == 5);
}

TEST_CASE("every problem is told at once with file, line and key") {
  const Scratch scratch;
  const std::string text =
      "config_version = 1\n"      // 1
      "[engine]\n"                // 2
      "lease = 30\n"              // 3
      "chunk_bytes = \"5000\"\n"  // 4
      "speed = 7\n"               // 5
      "[log]\n"                   // 6
      "level = \"loud\"\n"        // 7
      "[[socket]]\n"              // 8
      "path = \"relative\"\n"     // 9
      "[socket.limits]\n"         // 10
      "max_transfers = -1\n"      // 11
      "[telemetry]\n"             // 12
      "on = true\n";              // 13
  const LoadedConfig loaded = load_text(scratch, text);
  const std::string file = scratch.path() + "/kvferry.toml";
  const std::string told = all_of(loaded.problems);
  INFO(told);
  CHECK(told.find(file + ":3: engine.lease: ") != std::string::npos);
  CHECK(told.find(file + ":4: engine.chunk_bytes: must be a multiple of 4KiB") !=
        std::string::npos);
  CHECK(told.find(file + ":5: engine.speed: unknown key") != std::string::npos);
  CHECK(told.find(file + ":7: log.level: ") != std::string::npos);
  CHECK(told.find(file + ":9: socket[0].path: must be an absolute path") != std::string::npos);
  CHECK(told.find(file + ":11: socket[0].limits.max_transfers: ") != std::string::npos);
  CHECK(told.find(file + ":12: telemetry: unknown section") != std::string::npos);
  CHECK(std::is_sorted(loaded.problems.begin(), loaded.problems.end(),
                       [](const auto& a, const auto& b) {
                         return a.where.size() < b.where.size() ||
                                (a.where.size() == b.where.size() && a.where < b.where);
                       }));
}

TEST_CASE("a file that is no TOML, is missing or has another version is refused") {
  const Scratch scratch;
  const LoadedConfig broken = load_text(scratch, "config_version = 1\n[log\n");
  REQUIRE_FALSE(broken.ok());
  CHECK(broken.problems[0].to_string().find("kvferry.toml:2: not TOML") != std::string::npos);
  CHECK_FALSE(load_config({scratch.path() + "/absent.toml", {}, {}}).ok());
  CHECK_FALSE(load_config({scratch.path(), {}, {}}).ok());
  CHECK(has_problem(load_text(scratch, "config_version = 2\n"), "config_version", "must be 1"));
  CHECK(has_problem(load_text(scratch, ""), "config_version", "is missing"));
}

TEST_CASE("each wrong value is refused with its key") {
  struct Row {
    std::string set;
    std::string words;
  };
  const std::array<Row, 48> rows{{
      {"node.id=white space", "must be a name"},
      {"log.format=xml", "is none of"},
      {"admin.socket=admin.sock", "must be an absolute path"},
      {"admin.socket=/run/kvferry/kvferry.sock", "is used twice"},
      {"admin.group=no-such-group-here", "there is no group"},
      {"http.address=localhost", "must be a numeric address"},
      {"http.port=65536", "must be between"},
      {"http.port=-1", "must be between"},
      {"http.port=1x", "must be between"},
      {"peer.listen=127.0.0.1", "is not host:port"},
      {"peer.listen=10.0.0.1:7400", "needs peer.cluster_secret_file"},
      {"peer.listen=example.org:7400", "must be a numeric address"},
      {"peer.mode=none", "is none of"},
      {"peer.advertise=0.0.0.0:1", "must not be a wildcard"},
      {"peer.cluster_secret_file=/nonexistent/secret", "No such file"},
      {"arena.bytes=3000000", "must be a multiple of arena.segment_bytes"},
      {"arena.segment_bytes=3MiB", "must be a power of two"},
      {"arena.kind=paper", "is none of: auto, shared_host, pinned_host, fabric_vmm"},
      {"arena.device_bytes=3MiB", "must be a multiple of arena.device_segment_bytes"},
      {"arena.device_segment_bytes=3MiB", "must be a power of two"},
      {"arena.device_share=0", "must be above 0 and at most 1"},
      {"rails.devices=", "must name at least one device"},
      {"rails.transports=rc_verbs", "is not served by this release"},
      {"rails.transports=tcp,tcp", "names \"tcp\" more than once"},
      {"rails.transports=tcp,shm,tcp", "names \"tcp\" more than once"},
      {"rails.devices=lo,lo", "names \"lo\" more than once"},
      {"rails.port_range=200-100", "ends before it begins"},
      {"rails.port_range=0-70000", "must be \"first-last\""},
      {"rails.spin=2h", "must be between"},
      {"rails.binary=/nonexistent/kvferry-rails", "cannot be executed"},
      {"engine.leg_credits=0", "must be between"},
      {"engine.lease=30", "is not a duration"},
      {"engine.lease=11m", "is longer than engine.lease_max"},
      {"engine.lease_max=11m", "is longer than engine.transfer_deadline_max"},
      {"engine.wait_deadline_max=11m", "is longer than engine.transfer_deadline_max"},
      {"engine.silence_limit=1s", "must be at least twice"},
      {"checks.kind=crc32", "is none of"},
      {"shares.worker_share=0", "above 0"},
      {"shares.peer_share=1.01", "at most 1"},
      {"gpu.enabled=yes", "is none of"},
      {"gpu.driver=", "must name a library"},
      {"gpu.streams=0", "must be between"},
      {"gpu.streams=33", "must be between"},
      {"pools.kinds=", "must name at least one kind"},
      {"pools.kinds=auto,host_shm", "stands alone"},
      {"pools.kinds=host_shm,cuda", "is none of"},
      {"pools.kinds=host_shm,CUDA_IPC", "is none of"},
      {"pools.kinds=cuda_fabric,gpu", "is none of"},
  }};
  for (const Row& row : rows) {
    const LoadedConfig loaded = load_config({"", {row.set}, {}});
    const std::string key = row.set.substr(0, row.set.find('='));
    INFO(row.set << "\n" << all_of(loaded.problems));
    CHECK(has_problem(loaded, key, row.words));
  }
}

TEST_CASE("keys that do not exist, or not there, are refused from every source") {
  const Scratch scratch;
  CHECK(has_problem(load_config({"", {"engine.leese=1s"}, {}}), "engine.leese", "unknown key"));
  CHECK(has_problem(load_config({"", {"lease=1s"}, {}}), "lease=1s", "section.key=value"));
  CHECK(has_problem(load_config({"", {}, {{"KVFERRY_ENGINE_LEESE", "1s"}}}), "engine.leese",
                    "unknown key"));
  CHECK(has_problem(load_config({"", {"socket.path=/x"}, {}}), "socket.path", "in the file only"));
  // Not a section of ours: the client library's own.
  CHECK(load_config({"", {}, {{"KVFERRY_SOCKET", "/x"}, {"KVFERRY_BENCH_X", "1"}}}).ok());
  CHECK(
      has_problem(load_text(scratch, "config_version = 1\nsocket = 3\n"), "socket", "[[socket]]"));
  CHECK(has_problem(load_text(scratch, "config_version = 1\nlog = 3\n"), "log", "must be a table"));
}

TEST_CASE("kinds of pools go with the GPU's use and with the tenants") {
  const auto with = [](const std::string& kinds, const std::string& gpu) {
    return load_config({"", {"pools.kinds=" + kinds, "gpu.enabled=" + gpu}, {}});
  };
  CHECK(with("host_shm,cuda_vmm_fd,cuda_ipc,cuda_fabric", "auto").ok());
  CHECK(with("auto", "off").ok());
  CHECK(with("host_shm", "off").ok());
  CHECK(has_problem(with("host_shm,cuda_vmm_fd", "off"), "pools.kinds", "needs a GPU"));

  const Scratch scratch;
  const auto tenants = [&](const std::string& second, const std::string& kinds) {
    return load_text(scratch,
                     "config_version = 1\n[[socket]]\npath = \"/tmp/a.sock\"\n[[socket]]\n"
                     "path = \"/tmp/b.sock\"\ntenant = \"" +
                         second + "\"\n[pools]\nkinds = " + kinds + "\n");
  };
  CHECK(tenants("default", "[\"cuda_ipc\"]").ok());
  CHECK(tenants("other", "[\"auto\"]").ok());
  CHECK(tenants("other", "[\"host_shm\", \"cuda_vmm_fd\"]").ok());
  CHECK(has_problem(tenants("other", "[\"cuda_ipc\"]"), "pools.kinds", "single tenant"));
  CHECK(has_problem(tenants("other", "[\"cuda_fabric\"]"), "pools.kinds", "single tenant"));
  CHECK_FALSE(several_tenants(tenants("default", "[\"auto\"]").config));
  CHECK(several_tenants(tenants("other", "[\"auto\"]").config));
}

TEST_CASE("the arena's kind and the use of GPUs go together") {
  CHECK(load_config({"", {"arena.kind=pinned_host"}, {}}).ok());
  CHECK(has_problem(load_config({"", {"arena.kind=pinned_host", "gpu.enabled=off"}, {}}),
                    "arena.kind", "pinned_host needs a GPU"));
  CHECK(load_config({"", {"arena.kind=shared_host"}, {}}).ok());
  CHECK(has_problem(load_config({"", {"arena.kind=shared_host", "gpu.enabled=on"}, {}}),
                    "arena.kind", "pinned_host memory only"));
  for (const std::string kind : {"fabric_vmm", "device_vmm", "cuda_malloc"}) {
    const std::string set = "arena.kind=" + kind;
    CHECK(load_config({"", {set}, {}}).ok());
    CHECK(
        has_problem(load_config({"", {set, "gpu.enabled=off"}, {}}), "arena.kind", "needs a GPU"));
    CHECK(has_problem(load_config({"", {set, "checks.kind=xxh3"}, {}}), "arena.kind",
                      "use pinned_host"));
    CHECK(has_problem(load_config({"", {set, "arena.device_bytes=0"}, {}}), "arena.kind",
                      "arena.device_bytes, which is 0"));
    const std::vector<std::string> small{set, "arena.device_bytes=2MiB",
                                         "arena.device_segment_bytes=2MiB"};
    CHECK(has_problem(load_config({"", small, {}}), "arena.device_bytes",
                      "must hold engine.staged_ahead + 2 pieces"));
  }
}

TEST_CASE("an arena that cannot hold what is staged and one that lands is refused") {
  CHECK(load_config({"", {"arena.bytes=4MiB", "arena.segment_bytes=4MiB"}, {}}).ok());
  const LoadedConfig small =
      load_config({"", {"arena.bytes=2MiB", "arena.segment_bytes=2MiB"}, {}});
  CHECK(has_problem(small, "arena.bytes", "must hold engine.staged_ahead + 2 pieces: 4MiB"));
  CHECK(load_config(
            {"", {"arena.bytes=2MiB", "arena.segment_bytes=2MiB", "engine.staged_ahead=0"}, {}})
            .ok());
}

TEST_CASE("devices off loopback need a port range with a port for each") {
  CHECK(has_problem(load_config({"", {"rails.devices=eth0,eth1"}, {}}), "rails.port_range",
                    "must be given"));
  CHECK(has_problem(load_config({"", {"rails.devices=eth0,eth1", "rails.port_range=7000"}, {}}),
                    "rails.port_range", "more ports than"));
  CHECK(load_config({"", {"rails.devices=eth0,eth1", "rails.port_range=7000-7021"}, {}}).ok());
}

TEST_CASE("several connections for a device: 1 to 8, each with a port, at most 16 rails") {
  CHECK(load_config({"", {}, {}}).config.rails.connections == 1);
  const LoadedConfig four = load_config({"", {"rails.connections=4"}, {}});
  CHECK(four.ok());
  CHECK(four.config.rails.connections == 4);
  CHECK(has_problem(load_config({"", {"rails.connections=0"}, {}}), "rails.connections",
                    "must be between 1 and 8"));
  CHECK(has_problem(load_config({"", {"rails.connections=9"}, {}}), "rails.connections",
                    "must be between 1 and 8"));
  const std::string devices = "rails.devices=eth0,eth1";
  const auto with = [&](const std::string& connections, const std::string& ports) {
    return load_config(
        {"", {devices, "rails.connections=" + connections, "rails.port_range=" + ports}, {}});
  };
  CHECK(has_problem(with("4", "7000-7007"), "rails.port_range", "more ports than"));
  CHECK(with("4", "7000-7008").ok());
  const auto is_narrow = [](const LoadedConfig& loaded) {
    return std::any_of(loaded.warnings.begin(), loaded.warnings.end(),
                       [](const auto& warning) { return warning.key == "rails.port_range"; });
  };
  CHECK(is_narrow(with("4", "7000-7025")));
  CHECK_FALSE(is_narrow(with("4", "7000-7026")));
  CHECK(with("8", "7000-7100").ok());
  CHECK(has_problem(load_config({"",
                                 {"rails.devices=eth0,eth1,eth2", "rails.connections=6",
                                  "rails.port_range=7000-7100"},
                                 {}}),
                    "rails.connections", "makes 18 rails; 16 are possible"));
  CHECK(has_problem(load_config({"", {"rails.transports=shm,tcp", "rails.connections=2"}, {}}),
                    "rails.connections", "tcp alone"));
  CHECK(has_problem(load_config({"", {"rails.transports=shm", "rails.connections=2"}, {}}),
                    "rails.connections", "tcp alone"));
}

TEST_CASE("the rails process is confined unless that is switched off, which is named as unsafe") {
  const auto is_warned = [](const LoadedConfig& loaded) {
    return std::any_of(loaded.warnings.begin(), loaded.warnings.end(),
                       [](const auto& warning) { return warning.key == "rails.seccomp"; });
  };
  const LoadedConfig on = load_config({"", {}, {}});
  CHECK(on.config.rails.seccomp == Seccomp::kOn);
  CHECK_FALSE(is_warned(on));
  const LoadedConfig off = load_config({"", {"rails.seccomp=off"}, {}});
  CHECK(off.ok());
  CHECK(off.config.rails.seccomp == Seccomp::kOff);
  CHECK(is_warned(off));
  CHECK_FALSE(load_config({"", {"rails.seccomp=auto"}, {}}).ok());
}

TEST_CASE("metrics are for this machine unless they are said to be for others, and that is named") {
  const LoadedConfig own = load_config({"", {}, {}});
  CHECK(own.config.http.address == "127.0.0.1");
  CHECK(own.warnings.empty());
  const LoadedConfig open = load_config({"", {"http.address=0.0.0.0"}, {}});
  CHECK(open.ok());
  REQUIRE(open.warnings.size() == 1);
  CHECK(open.warnings[0].key == "http.address");
}

TEST_CASE("plain mode off loopback needs a secret that only its owner reads") {
  const Scratch scratch;
  const auto with = [&](const std::string& file) {
    return load_config({"", {"peer.listen=10.0.0.1:7400", "peer.cluster_secret_file=" + file}, {}});
  };
  CHECK(with(scratch.write("good", "  0123456789abcdef0123\n")).ok());
  CHECK(*read_secret_file(scratch.path() + "/good") == "0123456789abcdef0123");
  CHECK(has_problem(with(scratch.write("open", "0123456789abcdef", 0640)),
                    "peer.cluster_secret_file", "others than its owner"));
  CHECK(has_problem(with(scratch.write("short", "0123456789abcde\n")), "peer.cluster_secret_file",
                    "less than 16 bytes"));
  CHECK(has_problem(with(scratch.path()), "peer.cluster_secret_file", "not a regular file"));

  const LoadedConfig wildcard = load_config(
      {"",
       {"peer.listen=0.0.0.0:7400", "peer.cluster_secret_file=" + scratch.path() + "/good"},
       {}});
  CHECK(has_problem(wildcard, "peer.advertise", "must be given"));
}

TEST_CASE("peers off loopback need the secret, and name who and where they are") {
  const Scratch scratch;
  const std::string head = "config_version = 1\n[[peers]]\n";
  const LoadedConfig local =
      load_text(scratch, head + "identity = \"b\"\naddresses = [\"127.0.0.1\", \"[::1]:7400\"]\n");
  INFO(all_of(local.problems));
  REQUIRE(local.ok());
  CHECK(local.config.peers[0].tenants == std::vector<std::string>{"default"});

  const auto bad = [&](const std::string& body) { return load_text(scratch, head + body); };
  CHECK(has_problem(bad("identity = \"b\"\naddresses = [\"10.0.0.0/8\"]\n"), "peers[0].addresses",
                    "needs peer.cluster_secret_file"));
  CHECK(has_problem(bad("identity = \"b\"\naddresses = [\"127.0.0.1/4\"]\n"), "peers[0].addresses",
                    "needs peer.cluster_secret_file"));
  CHECK(has_problem(bad("identity = \"b\"\n"), "peers[0].addresses", "at least one"));
  CHECK(has_problem(bad("identity = \"b\"\naddresses = [\"10.0.0.0/33\"]\n"), "peers[0].addresses",
                    "network bits"));
  CHECK(has_problem(bad("addresses = [\"127.0.0.1\"]\n"), "peers[0].identity", "node's id"));
  CHECK(has_problem(bad("identity = \"b\"\naddresses = [\"::1\"]\ntenants = [\"a/b\"]\n"),
                    "peers[0].tenants", "is not a tenant's name"));
  CHECK(has_problem(bad("identity = \"b\"\naddresses = [\"::1\"]\n[[peers]]\nidentity = \"b\"\n"
                        "addresses = [\"::1\"]\n"),
                    "peers[1].identity", "stands twice"));
}

TEST_CASE("sockets keep their tenants, modes and users apart") {
  const Scratch scratch;
  const std::string text =
      "config_version = 1\n"
      "[[socket]]\npath = \"/run/a.sock\"\nmode = 0o600\nuids = [1000, 1001]\ntenant = \"a\"\n"
      "limits.max_pool_bytes = \"1GiB\"\nlimits.max_workers = 7\n"
      "limits.max_claims = 8\nlimits.max_reservations = 6\n"
      "worker_limits.max_pool_bytes = \"512MiB\"\nworker_limits.max_calls = 9\n"
      "[[socket]]\npath = \"/run/b.sock\"\nmode = \"0666\"\ngrpc_path = \"/run/b.rpc\"\n";
  const LoadedConfig loaded = load_text(scratch, text);
  INFO(all_of(loaded.problems));
  REQUIRE(loaded.ok());
  REQUIRE(loaded.config.sockets.size() == 2);
  const SocketConfig& a = loaded.config.sockets[0];
  CHECK(a.mode == 0600);
  CHECK(a.uids == std::vector<uint32_t>{1000, 1001});
  CHECK(a.grpc_path == "/run/a.sock.grpc");
  CHECK(a.limits.max_pool_bytes == 1 * kGiB);
  CHECK(a.max_workers == 7);
  CHECK(a.limits.max_claims == 8);
  CHECK(a.limits.max_reservations == 6);
  CHECK(a.worker_limits.max_pool_bytes == kGiB / 2);
  CHECK(a.worker_limits.max_calls == 9);
  CHECK(a.limits.max_calls == SocketConfig().limits.max_calls);
  CHECK(loaded.config.sockets[1].grpc_path == "/run/b.rpc");
  REQUIRE(loaded.warnings.size() == 1);
  CHECK(loaded.warnings[0].key == "socket[1].mode");
  CHECK(loaded.warnings[0].message == "lets every local process attach");

  const auto bad = [&](const std::string& line) {
    return load_text(scratch, "config_version = 1\n[[socket]]\n" + line + "\n");
  };
  CHECK(has_problem(bad("uids = [65534]"), "socket[0].uids", "never matches"));
  CHECK(has_problem(bad("mode = 660"), "socket[0].mode", "file mode"));
  CHECK(has_problem(bad("tenant = \"\""), "socket[0].tenant", "at most 63"));
  CHECK(has_problem(bad("path = \"/" + std::string(120, 'x') + "\""), "socket[0].path", "longer"));
  CHECK(has_problem(load_text(scratch, "config_version = 1\nsocket = []\n"), "socket",
                    "at least one"));
}

TEST_CASE("UCX settings that the daemon's safety rests on cannot be overridden") {
  CHECK(load_config({"", {"ucx.TCP_TX_SEG_COUNT=32"}, {}}).config.ucx.at("TCP_TX_SEG_COUNT") ==
        "32");
  for (const char* key : {"PROTO_ENABLE", "HANDLE_ERRORS", "TLS", "POSIX_ERROR_HANDLING",
                          "ERROR_SIGNALS", "TCP_PUT_ENABLE", "TCP_PORT_RANGE", "NET_DEVICES",
                          "UCX_TLS", "LOG_FILE", "tls", "TCP_TX_SEG_SIZE", "MODULE_DIR"}) {
    INFO(key);
    const std::string name(key);
    CHECK_FALSE(load_config({"", {"ucx." + name + "=y"}, {}}).ok());
    CHECK_FALSE(load_config({"", {}, {{"KVFERRY_UCX_" + name, "y"}}}).ok());
  }
  const Scratch scratch;
  CHECK(has_problem(load_text(scratch, "config_version = 1\n[ucx]\nTLS = \"all\"\n"), "ucx.TLS",
                    "cannot be overridden"));
  CHECK(has_problem(load_text(scratch, "config_version = 1\n[ucx]\nA = \"x\\ny\"\n"), "ucx.A",
                    "control character"));
}

TEST_CASE("sizes and durations carry units and print back in them") {
  CHECK(*parse_size("256MiB") == 256 * kMiB);
  CHECK(*parse_size("1.5 GiB") == 1536 * kMiB);
  CHECK(*parse_size("2KB") == 2000);
  CHECK(*parse_size("4096") == 4096);
  for (const char* text : {"", "MiB", "1,5GiB", "-1", "1XiB", "0.3B", "99999999999TiB",
                           "18446744073709551616", "1e3", "1.", "1.0000001MiB"})
    CHECK_FALSE(parse_size(text));
  CHECK(format_size(256 * kMiB) == "256MiB");
  CHECK(format_size(1536 * kMiB) == "1536MiB");
  CHECK(format_size(0) == "0");

  CHECK(*parse_duration("30s") == seconds(30));
  CHECK(*parse_duration("1.5h") == minutes(90));
  CHECK(*parse_duration("50us") == microseconds(50));
  CHECK(*parse_duration("0") == Duration(0));
  for (const char* text : {"", "30", "s", "-1s", "1d", "300000000h", "0.1ns"})
    CHECK_FALSE(parse_duration(text));
  CHECK(format_duration(seconds(90)) == "90s");
  CHECK(format_duration(minutes(10)) == "10m");
  for (const auto duration : {Duration(1), Duration(milliseconds(1500)), Duration(hours(24))})
    CHECK(*parse_duration(format_duration(duration)) == duration);
}

TEST_CASE("addresses, networks and ports are compared by value") {
  const auto rule = [](const char* text) { return *parse_address_rule(text); };
  CHECK(rule("10.1.2.3").matches("10.1.2.3", 5));
  CHECK(rule("10.1.2.3").matches("::ffff:10.1.2.3", 5));
  CHECK_FALSE(rule("10.1.2.3").matches("10.1.2.4", 5));
  CHECK(rule("10.1.0.0/17").matches("10.1.127.1", 5));
  CHECK_FALSE(rule("10.1.0.0/17").matches("10.1.128.1", 5));
  CHECK(rule("0.0.0.0/0").matches("1.2.3.4", 5));
  CHECK_FALSE(rule("0.0.0.0/0").matches("::1", 5));
  CHECK(rule("10.1.0.0/16:7400").matches("10.1.0.1", 7400));
  CHECK_FALSE(rule("10.1.0.0/16:7400").matches("10.1.0.1", 7401));
  CHECK(rule("[fd00::1]:7400").matches("fd00:0::1", 7400));
  CHECK(rule("fd00::/8").matches("fdff::1", 1));
  CHECK_FALSE(rule("node-b.example:7400").matches("10.0.0.1", 7400));
  for (const char* text : {"", ":1", "10.0.0.1:0", "10.0.0.1:70000", "host/8", "10.0.0.0/33",
                           "[::1", "[::1]x", "a b", "fd00::/129"})
    CHECK_FALSE(parse_address_rule(text));
  for (const char* text : {"10.1.0.0/16:7400", "[fd00::1]:7400", "fd00::/8", "node-b:7400", "::1"})
    CHECK(rule(rule(text).to_string().c_str()) == rule(text));
  CHECK(is_loopback("127.9.9.9"));
  CHECK(is_loopback("::1"));
  CHECK_FALSE(is_loopback("10.0.0.1"));
  CHECK(parse_host_port("[::]:7400")->host == "::");
  CHECK_FALSE(parse_host_port("::1"));
}

TEST_CASE("the command line chooses an action, and is refused with code 64") {
  const auto parse = [](std::vector<const char*> words) {
    words.insert(words.begin(), "kvferryd");
    return parse_options(static_cast<int>(words.size()), words.data());
  };
  const auto serve =
      parse({"--config", "/etc/x.toml", "--set", "log.level=debug", "--set", "a.b=c"});
  REQUIRE(std::holds_alternative<Options>(serve));
  CHECK(std::get<Options>(serve).action == Action::kServe);
  CHECK(std::get<Options>(serve).config_file == "/etc/x.toml");
  CHECK(std::get<Options>(serve).sets == std::vector<std::string>{"log.level=debug", "a.b=c"});
  CHECK(std::get<Options>(parse({"--check-config"})).action == Action::kCheckConfig);
  CHECK(std::get<Options>(parse({"--print-default-config"})).action == Action::kPrintDefaultConfig);
  CHECK(std::get<int>(parse({"--version"})) == 0);
  CHECK(std::get<int>(parse({"--nonsense"})) == 64);
  CHECK(std::get<int>(parse({"stray"})) == 64);
  CHECK(std::get<int>(parse({"--check-config", "--print-default-config"})) == 64);

  Options wrong;
  wrong.sets = {"log.level=loud"};
  CHECK(check_config(wrong) == 78);
}
