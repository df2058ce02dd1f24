// conf.d, where each value comes from, and what a reload takes over.
#include <sys/stat.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <filesystem>
#include <map>
#include <sstream>

#include "daemon/ops/options.h"
#include "daemon/ops/reload.h"
#include "tests/unit/config_support.h"
#include "tests/unit/test_certificates.h"

using namespace kvferry;
using namespace kvferry::ops;

namespace {

// kvferry.toml and conf.d beside it.
struct Folder {
  Scratch scratch;
  std::string part(const std::string& name, const std::string& text, mode_t mode = 0644) const {
    std::filesystem::create_directory(scratch.path() + "/conf.d");
    return scratch.write("conf.d/" + name, text, mode);
  }
  std::string main() const { return scratch.path() + "/kvferry.toml"; }
  std::string at(const std::string& name) const { return scratch.path() + "/conf.d/" + name; }
  LoadedConfig load(const std::string& text, std::vector<std::string> sets = {},
                    std::vector<std::pair<std::string, std::string>> environment = {}) const {
    return load_text(scratch, "config_version = 1\n" + text, std::move(sets),
                     std::move(environment));
  }
};

std::string peer(const std::string& identity, const std::string& address) {
  return "[[peers]]\nidentity = \"" + identity + "\"\naddresses = [\"" + address + "\"]\n";
}

std::map<std::string, std::string> origins(const LoadedConfig& loaded) {
  std::map<std::string, std::string> out;
  for (const EffectiveValue& row : effective_values(loaded.config, loaded.places))
    out[row.path()] = row.origin;
  return out;
}

const RunningValue* find(const std::vector<RunningValue>& values, const std::string& path) {
  for (const RunningValue& value : values)
    if (value.path() == path) return &value;
  return nullptr;
}

}  // namespace

TEST_CASE("files of conf.d win over the main file, the later name over the earlier, by key") {
  const Folder folder;
  folder.part("20-b.toml", "[engine]\nlease = \"20s\"\n[ucx]\nA = \"b\"\n");
  folder.part("10-a.toml", "config_version = 1\n[engine]\nlease = \"10s\"\nleg_credits = 2\n");
  // What editors, packages and people leave behind.
  folder.part("90-old.toml.dpkg-old", "nonsense");
  folder.part(".hidden.toml", "nonsense");
  folder.part("README", "nonsense");
  const LoadedConfig loaded = folder.load(
      "[engine]\nlease = \"5s\"\nleg_credits = 1\nstaged_ahead = 3\n[ucx]\nA = \"a\"\nB = \"a\"\n",
      {"engine.wait_deadline=9s"},
      {{"KVFERRY_ENGINE_WAIT_DEADLINE", "8s"}, {"KVFERRY_ENGINE_PACKED_BYTES", "1MiB"}});
  INFO(all_of(loaded.problems));
  REQUIRE(loaded.ok());
  CHECK(loaded.config.engine.lease == seconds(20));
  CHECK(loaded.config.engine.leg_credits == 2);
  CHECK(loaded.config.engine.staged_ahead == 3);
  CHECK(loaded.config.engine.wait_deadline == seconds(9));
  CHECK(loaded.config.ucx == std::map<std::string, std::string>{{"A", "b"}, {"B", "a"}});

  auto from = origins(loaded);
  CHECK(from["engine.lease"] == "file " + folder.at("20-b.toml") + ":2");
  CHECK(from["engine.leg_credits"] == "file " + folder.at("10-a.toml") + ":4");
  CHECK(from["engine.staged_ahead"] == "file " + folder.main() + ":5");
  CHECK(from["engine.wait_deadline"] == "--set");
  CHECK(from["engine.packed_bytes"] == "environment KVFERRY_ENGINE_PACKED_BYTES");
  CHECK(from["engine.chunk_bytes"] == "default");
  CHECK(from["ucx.A"] == "file " + folder.at("20-b.toml") + ":4");
  CHECK(from["ucx.B"] == "file " + folder.main() + ":8");
  CHECK(from["node.id"] == "host name");
  CHECK(from["socket[0].path"] == "default");
  CHECK(from["socket[0].grpc_path"] == "socket[0].path");
}

TEST_CASE("sockets and peers add up over the files, and one of the same name takes the place") {
  const Folder folder;
  folder.part("10.toml", peer("b", "127.0.0.2") + peer("c", "127.0.0.3"));
  folder.part("20.toml", peer("b", "127.0.0.9") + peer("d", "127.0.0.4") +
                             "[[socket]]\npath = \"/run/t.sock\"\ntenant = \"t\"\n");
  const LoadedConfig loaded = folder.load(peer("a", "127.0.0.1"));
  INFO(all_of(loaded.problems));
  REQUIRE(loaded.ok());
  std::string peers;
  for (const PeerConfig& entry : loaded.config.peers)
    peers += entry.identity + "=" + entry.addresses.at(0).to_string() + " ";
  CHECK(peers == "a=127.0.0.1 b=127.0.0.9 c=127.0.0.3 d=127.0.0.4 ");
  // A file's sockets stand instead of the built-in one.
  REQUIRE(loaded.config.sockets.size() == 1);
  CHECK(loaded.config.sockets[0].tenant == "t");
  CHECK(origins(loaded)["peers[1].addresses"] == "file " + folder.at("20.toml") + ":3");
  CHECK(origins(loaded)["peers[1].tenants"] == "default");

  // An entry is replaced as a whole; what it does not say is at its default.
  const LoadedConfig socket = folder.load(
      "[[socket]]\npath = \"/run/t.sock\"\nmode = \"0600\"\nlimits.max_transfers = 5\n"
      "[[socket]]\npath = \"/run/u.sock\"\n");
  REQUIRE(socket.ok());
  REQUIRE(socket.config.sockets.size() == 2);
  CHECK(socket.config.sockets[0].tenant == "t");
  CHECK(socket.config.sockets[0].mode == 0660);
  CHECK(socket.config.sockets[0].limits.max_transfers == SocketConfig().limits.max_transfers);
  CHECK(origins(socket)["socket[0].mode"] == "default");

  folder.part("15.toml", "peers = []\n");
  const LoadedConfig forgotten = folder.load(peer("a", "127.0.0.1"));
  REQUIRE(forgotten.ok());
  REQUIRE(forgotten.config.peers.size() == 2);
  CHECK(forgotten.config.peers[0].identity == "b");
  CHECK(forgotten.config.peers[1].identity == "d");

  // Within one file it is a mistake, whoever has it besides.
  folder.part("30.toml", peer("d", "127.0.0.5") + peer("d", "127.0.0.6"));
  CHECK(has_problem(folder.load(""), "peers[2].identity", "stands twice"));
}

TEST_CASE("problems of conf.d name file and line, in the order in which the files count") {
  const Folder folder;
  folder.part("20.toml", "[engine]\nspeed = 1\n");
  folder.part("10.toml", "[log]\n\nlevel = \"loud\"\n" + peer("b", "10.0.0.1"));
  folder.part("30.toml", "[log\n");
  folder.part("40.toml", "config_version = 2\n");
  const LoadedConfig loaded = folder.load("[engine]\nlease = 3\n[http]\nport = 70000\n");
  std::string told;
  for (const ConfigProblem& problem : loaded.problems)
    told += problem.where + " " + problem.key + "\n";
  CHECK(told == folder.main() + ":3 engine.lease\n" +                   //
                    folder.main() + ":5 http.port\n" +                  //
                    folder.at("10.toml") + ":3 log.level\n" +           //
                    folder.at("10.toml") + ":6 peers[0].addresses\n" +  //
                    folder.at("20.toml") + ":2 engine.speed\n" +        //
                    folder.at("30.toml") + ":1 \n" +                    //
                    folder.at("40.toml") + ":1 config_version\n");
}

TEST_CASE("what cannot be read or trusted in conf.d is an error, and never waits") {
  const Folder folder;
  const auto refused = [&](const std::string& where, const std::string& words) {
    const LoadedConfig loaded = folder.load("");
    INFO(all_of(loaded.problems));
    return loaded.problems.size() == 1 && loaded.problems[0].where == where &&
           loaded.problems[0].message.find(words) != std::string::npos;
  };
  folder.part("good.toml", "[engine]\nleg_credits = 2\n");
  CHECK(folder.load("").ok());
  SECTION("a folder") {
    std::filesystem::create_directory(folder.at("x.toml"));
    CHECK(refused(folder.at("x.toml"), "is not a regular file"));
  }
  SECTION("a FIFO that nobody writes") {
    REQUIRE(::mkfifo(folder.at("x.toml").c_str(), 0600) == 0);
    CHECK(refused(folder.at("x.toml"), "is not a regular file"));
  }
  SECTION("a link to nothing") {
    std::filesystem::create_symlink("/nonexistent/x", folder.at("x.toml"));
    CHECK(refused(folder.at("x.toml"), "No such file"));
  }
  SECTION("a link to a file is that file") {
    const std::string elsewhere = folder.scratch.write("other", "[engine]\nleg_credits = 3\n");
    std::filesystem::create_symlink(elsewhere, folder.at("x.toml"));
    CHECK(folder.load("").config.engine.leg_credits == 3);
  }
  SECTION("a stranger's link to a file of ours") {
    if (::geteuid() != 0) return;  // only root can make one
    const std::string elsewhere = folder.scratch.write("other", "[engine]\nleg_credits = 3\n");
    std::filesystem::create_symlink(elsewhere, folder.at("x.toml"));
    CHECK(folder.load("").ok());
    REQUIRE(::lchown(folder.at("x.toml").c_str(), 12345, 0) == 0);
    CHECK(refused(folder.at("x.toml"), "is a link that belongs to user 12345"));
  }
  SECTION("one that everybody writes") {
    folder.part("x.toml", "", 0666);
    CHECK(refused(folder.at("x.toml"), "may be written by everybody"));
  }
  SECTION("one that is too long") {
    folder.part("x.toml", std::string(kMiB + 1, '#'));
    CHECK(refused(folder.at("x.toml"), "is longer than 1MiB"));
  }
  SECTION("a stranger's file, and a stranger's folder") {
    if (::geteuid() != 0) return;  // only root can make them
    folder.part("x.toml", "");
    REQUIRE(::chown(folder.at("x.toml").c_str(), 12345, 0) == 0);
    CHECK(refused(folder.at("x.toml"), "belongs to user 12345"));
    // Whoever has the main file could write all that there.
    REQUIRE(::chown(folder.main().c_str(), 12345, 0) == 0);
    CHECK(folder.load("").ok());
    const std::string conf_d = folder.scratch.path() + "/conf.d";
    REQUIRE(::chown(conf_d.c_str(), 54321, 0) == 0);
    CHECK(refused(conf_d, "belongs to user 54321"));
  }
  SECTION("a file instead of the folder") {
    std::filesystem::remove_all(folder.scratch.path() + "/conf.d");
    folder.scratch.write("conf.d", "");
    CHECK(refused(folder.scratch.path() + "/conf.d", "is not a folder"));
  }
}

TEST_CASE("the printed values read as the same configuration, with an origin each") {
  const Folder folder;
  folder.part("10.toml", peer("b", "127.0.0.2") + "[ucx]\nTCP_TX_SEG_COUNT = \"64\"\n");
  const std::string secret = folder.scratch.write("secret", "0123456789abcdef0123\n");
  const LoadedConfig loaded = folder.load(
      "[[socket]]\npath = \"/run/a.sock\"\nuids = [7]\n[[socket]]\npath = \"/run/b.sock\"\n",
      {"peer.cluster_secret_file=" + secret, "node.id=a"});
  INFO(all_of(loaded.problems));
  REQUIRE(loaded.ok());
  const std::string text = effective_config_text(effective_values(loaded.config, loaded.places));
  const Scratch other;
  const LoadedConfig again = load_text(other, text);
  INFO(text);
  INFO(all_of(again.problems));
  REQUIRE(again.ok());
  CHECK(again.config == loaded.config);
  CHECK(text.find("uids = [7]  # file " + folder.main() + ":4\n") != std::string::npos);
  CHECK(text.find("id = \"a\"  # --set\n") != std::string::npos);
  CHECK(text.find("0123456789abcdef") == std::string::npos);
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);)
    if (line.find(" = ") != std::string::npos && line != "config_version = 1")
      CHECK(line.find("  # ") != std::string::npos);
  // The default's, too.
  const LoadedConfig built_in = load_config({});
  CHECK(load_text(other, effective_config_text(effective_values(built_in.config, built_in.places)))
            .config == built_in.config);
  // A path cannot break out of its comment.
  Places places;
  places["log.level"] = {Place::Kind::kFile, "a\nb = 1:7"};
  CHECK(effective_config_text(effective_values(built_in.config, places)).find("\nb = 1") ==
        std::string::npos);
}

TEST_CASE("the examples are good configurations, and do what they are for") {
  const Scratch scratch;
  const kvferry::testing::TestAuthority authority("authority");
  const kvferry::testing::KeyPair pair = authority.node("spiffe://cluster.example/node-1");
  const std::vector<std::string> files{
      "peer.certificate_file=" + scratch.write("node.pem", pair.certificate),
      "peer.key_file=" + scratch.write("node.key", pair.key),
      "peer.ca_file=" + scratch.write("ca.pem", authority.certificate())};
  const std::vector<std::string> secret{"peer.cluster_secret_file=" +
                                        scratch.write("secret", "0123456789abcdef0123\n")};
  const auto load = [&](const std::string& name, const std::vector<std::string>& sets) {
    LoadedConfig loaded =
        load_config({KVFERRY_SOURCE_DIR "/config/examples/" + name + ".toml", sets, {}});
    INFO(name << "\n" << all_of(loaded.problems) << all_of(loaded.warnings));
    REQUIRE(loaded.ok());
    CHECK(loaded.warnings.empty());
    return loaded.config;
  };
  const Config tcp = load("tcp", secret);
  CHECK(tcp.peer.mode == PeerMode::kPlain);
  CHECK(tcp.rails.devices == std::vector<std::string>{"eth0"});
  const Config roce = load("roce", files);
  CHECK(roce.rails.devices.size() == 4);
  CHECK(roce.peers.size() == 2);
  const Config nvlink = load("nvlink-domain", files);
  CHECK(nvlink.mapped.device_bytes > 0);
  CHECK(nvlink.mapped.device_kind == ArenaKind::kFabricVmm);
  std::size_t count = 0;
  for (const auto& entry :
       std::filesystem::directory_iterator(KVFERRY_SOURCE_DIR "/config/examples"))
    count += entry.path().extension() == ".toml" ? 1U : 0U;
  CHECK(count == 3);
}

TEST_CASE("a reload takes over what may change, and tells the keys that wait for a restart") {
  const Folder folder;
  RunningConfig running(folder.load("[engine]\nlease = \"10s\"\n[ucx]\nA = \"b\"\n"));
  const LoadedConfig same = folder.load("\n\n[engine]\nlease = \"10s\"\n[ucx]\nA = \"b\"\n");
  const RunningConfig::Change none = running.take(same);
  CHECK(none.taken.empty());
  CHECK(none.waiting.empty());
  CHECK(find(running.values(), "engine.lease")->origin == "file " + folder.main() + ":5");

  LoadedConfig read = folder.load(
      "[log]\nlevel = \"error\"\nformat = \"json\"\n[engine]\nlease = \"7s\"\n"
      "leg_credits = 3\n[[socket]]\npath = \"/run/x.sock\"\n"
      "[[socket]]\npath = \"/run/y.sock\"\n[drain]\nlimit = \"1s\"\n" +
      peer("b", "127.0.0.2"));
  REQUIRE(read.ok());
  const RunningConfig::Change change = running.take(read);
  CHECK(change.taken == std::vector<std::string>{"log.level", "log.format", "engine.lease",
                                                 "drain.limit", "peers"});
  CHECK(change.waiting == std::vector<std::string>{"engine.leg_credits", "socket", "ucx"});
  const Config now = running.config();
  CHECK(now.log.level == LogLevel::kError);
  CHECK(now.log.format == LogFormat::kJson);
  CHECK(now.engine.lease == seconds(7));
  CHECK(now.engine.leg_credits == 8);
  CHECK(now.drain.limit == seconds(1));
  CHECK(now.peers.size() == 1);
  CHECK(now.sockets == std::vector<SocketConfig>(same.config.sockets));
  CHECK(now.ucx.at("A") == "b");

  const std::vector<RunningValue> values = running.values();
  const RunningValue& credits = *find(values, "engine.leg_credits");
  CHECK(credits.value == "8");
  CHECK(credits.origin == "default");
  CHECK(credits.next == "3");
  CHECK_FALSE(credits.reloadable);
  CHECK(find(values, "engine.lease")->reloadable);
  CHECK(find(values, "engine.lease")->next.empty());
  CHECK(find(values, "peers[0].identity")->reloadable);
  CHECK(find(values, "socket[0].path")->next == "\"/run/x.sock\"");
  CHECK(find(values, "socket[1].path")->value.empty());
  CHECK(find(values, "socket[1].path")->next == "\"/run/y.sock\"");
  CHECK(find(values, "ucx.A")->next == "removed");

  // What goes back to what runs waits no longer.
  CHECK(running.take(same).waiting.empty());
  CHECK(running.config() == same.config);
  for (const RunningValue& value : running.values()) CHECK(value.next.empty());
}

TEST_CASE("a default of calls never gets past a maximum that waits for a restart") {
  const Folder folder;
  // Above the other two, so that those alone may change.
  const std::string most = "transfer_deadline_max = \"40m\"\n";
  const LoadedConfig started = folder.load("[engine]\n" + most);
  RunningConfig running(started);
  for (const std::string name : {"lease", "wait_deadline", "transfer_deadline"}) {
    const std::string key = "engine." + name;
    const LoadedConfig read =
        folder.load("[engine]\n" + name + " = \"20m\"\n" + name + "_max = \"30m\"\n" +
                    (name == "transfer_deadline" ? "" : most));
    INFO(all_of(read.problems));
    REQUIRE(read.ok());
    const RunningConfig::Change change = running.take(read);
    CHECK(change.taken.empty());
    CHECK(change.waiting == std::vector<std::string>{key, key + "_max"});
    CHECK(find(running.values(), key)->next == "\"20m\"");
  }
  CHECK(running.config() == started.config);
}

TEST_CASE("peers that rest on another cluster secret wait for it") {
  const Folder folder;
  const std::string secret = "[peer]\ncluster_secret_file = \"" +
                             folder.scratch.write("secret", "0123456789abcdef0123\n") + "\"\n";
  RunningConfig running(folder.load(""));
  const LoadedConfig distant = folder.load(secret + peer("b", "10.0.0.1"));
  INFO(all_of(distant.problems));
  REQUIRE(distant.ok());
  const RunningConfig::Change waits = running.take(distant);
  CHECK(waits.taken.empty());
  CHECK(waits.waiting == std::vector<std::string>{"peer.cluster_secret_file", "peers"});
  CHECK(running.config().peers.empty());
  CHECK(find(running.values(), "peers[0].identity")->next == "\"b\"");

  // Those on loopback rest on none.
  const RunningConfig::Change local = running.take(folder.load(secret + peer("c", "127.0.0.3")));
  CHECK(local.taken == std::vector<std::string>{"peers"});
  CHECK(local.waiting == std::vector<std::string>{"peer.cluster_secret_file"});
  // Nor do those wait whose secret is in force.
  RunningConfig with_secret(folder.load(secret));
  CHECK(with_secret.take(distant).taken == std::vector<std::string>{"peers"});
  CHECK(with_secret.config().peers.size() == 1);
}

TEST_CASE("every key that a reload takes over says so in the default file") {
  std::size_t told = 0;
  std::string section;
  std::string before;
  std::istringstream in(default_config_text());
  for (std::string line; std::getline(in, line); before = line) {
    if (line.front() == '[') section = line.substr(1, line.find_first_of(']') - 1);
    const std::size_t equals = line.find(" = ");
    if (line.empty() || line.front() == '#' || equals == std::string::npos) continue;
    const bool says = before == "# A reload takes it over.";
    CHECK(says == is_reloadable(section + "." + line.substr(0, equals)));
    told += says ? 1U : 0U;
  }
  CHECK(told == 7);
}

TEST_CASE("--print-config is an action of its own and refuses what --check-config refuses") {
  const char* const print[] = {"kvferryd", "--print-config"};
  CHECK(std::get<Options>(parse_options(2, print)).action == Action::kPrintConfig);
  const char* const both[] = {"kvferryd", "--print-config", "--check-config"};
  CHECK(std::get<int>(parse_options(3, both)) == 64);
  Options wrong;
  wrong.sets = {"log.level=loud"};
  CHECK(print_config(wrong) == 78);
}
