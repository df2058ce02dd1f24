// A real daemon's configuration: the folder beside its file, what it says it runs with, and what a
// reload by signal and by kvferryctl changes of it.
#include <signal.h>
#include <sys/wait.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "tests/proc/hand_off_daemons.h"

namespace kvferry::testing {
namespace {

using bench::DaemonProcess;
using Json = nlohmann::json;

struct Answer {
  std::string text;  // standard output and error
  int status = -1;
};

Answer run(const std::string& command) {
  FILE* const pipe = ::popen((command + " 2>&1").c_str(), "re");
  REQUIRE(pipe != nullptr);
  Answer answer;
  char buffer[4096];
  for (std::size_t got = 0; (got = ::fread(buffer, 1, sizeof buffer, pipe)) > 0;)
    answer.text.append(buffer, got);
  const int status = ::pclose(pipe);
  answer.status = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  return answer;
}

// One daemon in a directory of its own, whose configuration is in its file and conf.d.
struct Scene {
  std::string directory;
  std::unique_ptr<DaemonProcess> daemon;

  Scene() {
    char name[] = "/tmp/kvferry-reload.XXXXXX";
    REQUIRE(::mkdtemp(name) != nullptr);
    directory = name;
    std::filesystem::create_directory(directory + "/conf.d");
  }
  ~Scene() {
    daemon.reset();
    std::error_code error;
    std::filesystem::remove_all(directory, error);
  }
  Scene(const Scene&) = delete;
  Scene& operator=(const Scene&) = delete;

  std::string part(const std::string& name) const { return directory + "/conf.d/" + name; }
  void write(const std::string& name, const std::string& text) const {
    std::ofstream(part(name)) << text;
  }
  void start() {
    bench::DaemonOptions options;
    options.binary_directory = binary_directory();
    options.settings = {"arena.bytes=32MiB", "arena.segment_bytes=16MiB"};
    DaemonProcess::Identity identity;
    identity.name = "a";
    identity.peer_port = DaemonProcess::find_port();
    identity.toml = "[node]\nid = \"a\"\n";
    auto started = DaemonProcess::start(directory, identity, options);
    require_ok(started);
    daemon = std::move(*started);
    require_ok(daemon->wait_until_serving());
  }
  Answer ctl(const std::string& words) const {
    return run(KVFERRY_CTL " --socket " + daemon->admin_socket() + " " + words);
  }
  // The row of a key of what the daemon says it runs with.
  Json value(const std::string& key) const {
    const Json config = Json::parse(ctl("config --json").text);
    for (const Json& row : config.at("values"))
      if (row.at("key") == key) return row;
    return {};
  }
  std::string log() const {
    std::ifstream in(daemon->log_file());
    std::stringstream text;
    text << in.rdbuf();
    return text.str();
  }
  double reloads(const std::string& result) const {
    return metric(*daemon, "kvferry_config_reloads_total", "result=\"" + result + "\"");
  }
};

}  // namespace

TEST_CASE(
    "a reload by signal and by kvferryctl takes over what may change, and a bad one nothing") {
  Scene s;
  s.write("10-log.toml", "[log]\nlevel = \"info\"\n");
  s.start();
  const double started = metric(*s.daemon, "kvferry_config_last_reload_success_timestamp_seconds");
  CHECK(started > 1e9);
  CHECK(metric(*s.daemon, "kvferry_config_last_reload_successful") == 1);
  Json level = s.value("log.level");
  CHECK(level.at("value") == "\"info\"");
  CHECK(level.at("origin") == "file " + s.part("10-log.toml") + ":2");
  CHECK(level.at("reloadable") == true);
  CHECK(s.value("arena.bytes").at("origin") == "--set");
  CHECK(s.value("node.id").at("value") == "\"a\"");
  CHECK(s.value("engine.lease").at("origin") == "default");

  // By kvferryctl: its answer is the whole truth when it comes.
  s.write("20-more.toml",
          "[log]\nlevel = \"debug\"\nformat = \"json\"\n"
          "[engine]\nlease = \"7s\"\nleg_credits = 3\n");
  const Answer taken = s.ctl("reload");
  INFO(taken.text << s.log());
  CHECK(taken.status == 0);
  CHECK(taken.text ==
        "reloaded; peers in force: 0\n"
        "changed, and in force now: log.level log.format engine.lease\n"
        "changed, but in force from the next start on: engine.leg_credits\n");
  level = s.value("log.level");
  CHECK(level.at("value") == "\"debug\"");
  CHECK(level.at("origin") == "file " + s.part("20-more.toml") + ":2");
  CHECK(s.value("engine.leg_credits").at("value") == "8");
  CHECK(s.value("engine.leg_credits").at("next") == "3");
  CHECK(s.reloads("ok") == 1);
  CHECK(metric(*s.daemon, "kvferry_config_keys_waiting") == 1);
  // In the new format from that line on; it is written by another thread.
  CHECK(comes_true([&] {
    const std::string lines = s.log();
    const std::size_t json = lines.find("\n{");
    return json != std::string::npos &&
           lines.find("\"message\":\"reloaded\"", json) != std::string::npos;
  }));

  // A problem anywhere changes nothing, though the level is good.
  s.write("20-more.toml", "[log]\nlevel = \"error\"\n[engine]\nleese = \"7s\"\n");
  const Answer refused = s.ctl("reload");
  CHECK(refused.status == 1);
  CHECK(refused.text.find("BAD_CONFIGURATION") != std::string::npos);
  CHECK(refused.text.find(s.part("20-more.toml") + ":4: engine.leese: unknown key") !=
        std::string::npos);
  CHECK(s.value("log.level").at("value") == "\"debug\"");
  CHECK(s.value("engine.lease").at("value") == "\"7s\"");
  CHECK(s.reloads("refused") == 1);
  CHECK(metric(*s.daemon, "kvferry_config_last_reload_successful") == 0);
  CHECK(metric(*s.daemon, "kvferry_config_last_reload_success_timestamp_seconds") >= started);

  // By signal.
  s.write("20-more.toml", "[log]\nlevel = \"error\"\n");
  REQUIRE(::kill(s.daemon->pid(), SIGHUP) == 0);
  REQUIRE(comes_true([&] { return s.reloads("ok") == 2; }));
  CHECK(metric(*s.daemon, "kvferry_config_last_reload_successful") == 1);
  CHECK(s.value("log.level").at("value") == "\"error\"");
  CHECK(s.value("engine.lease").at("origin") == "default");
  CHECK(metric(*s.daemon, "kvferry_config_keys_waiting") == 0);
  // What is below the level is not written any more: one more reload says nothing.
  const std::string before = s.log();
  CHECK(s.ctl("reload").status == 0);
  CHECK(s.reloads("ok") == 3);
  CHECK(s.log() == before);
}

TEST_CASE("--print-config prints what the daemon would run with, as a configuration") {
  Scene s;
  s.write("10.toml", "[rails]\nspin = \"20us\"\n");
  const std::string main = s.directory + "/kvferry.toml";
  std::ofstream(main) << "config_version = 1\n[node]\nid = \"a\"\n";
  const std::string kvferryd = binary_directory() + "/kvferryd";
  const Answer printed = run("KVFERRY_ENGINE_LEASE=9s " + kvferryd + " --config " + main +
                             " --set log.level=debug --print-config");
  INFO(printed.text);
  REQUIRE(printed.status == 0);
  for (const std::string& line :
       {"spin = \"20us\"  # file " + s.part("10.toml") + ":2\n",
        std::string("lease = \"9s\"  # environment KVFERRY_ENGINE_LEASE\n"),
        std::string("level = \"debug\"  # --set\n"), "id = \"a\"  # file " + main + ":3\n",
        std::string("streams = 4  # default\n")}) {
    INFO(line);
    CHECK(printed.text.find(line) != std::string::npos);
  }
  const std::string again = s.directory + "/again/kvferry.toml";
  std::filesystem::create_directory(s.directory + "/again");
  std::ofstream(again) << printed.text;
  const Answer checked = run(kvferryd + " --config " + again + " --check-config");
  CHECK(checked.text == "configuration ok\n");
  s.write("20.toml", "speed = 1\n");
  const Answer wrong = run(kvferryd + " --config " + main + " --print-config");
  CHECK(wrong.status == 78);
  CHECK(wrong.text == s.part("20.toml") + ":1: speed: unknown section or key\n");
}

TEST_CASE("--check-config takes the examples") {
  Scene s;
  REQUIRE(run(KVFERRY_SOURCE_DIR "/deploy/make-test-certs.sh " + s.directory + " node-1").status ==
          0);
  std::ofstream(s.directory + "/secret") << "0123456789abcdef0123\n";
  std::filesystem::permissions(s.directory + "/secret", std::filesystem::perms::owner_read);
  std::size_t examples = 0;
  for (const auto& entry :
       std::filesystem::directory_iterator(KVFERRY_SOURCE_DIR "/config/examples")) {
    const std::string name = entry.path().stem().string();
    const std::string files = name == "tcp"
                                  ? " --set peer.cluster_secret_file=" + s.directory + "/secret"
                                  : " --set peer.certificate_file=" + s.directory +
                                        "/node-1.pem --set peer.key_file=" + s.directory +
                                        "/node-1.key --set peer.ca_file=" + s.directory + "/ca.pem";
    const std::string check =
        binary_directory() + "/kvferryd --check-config --config " + entry.path().string();
    const Answer answer = run(check + files);
    INFO(name << "\n" << answer.text);
    CHECK(answer.status == 0);
    CHECK(answer.text == "configuration ok\n");
    // The files that it names are looked for.
    CHECK(run(check).status == 78);
    ++examples;
  }
  CHECK(examples == 3);
}

}  // namespace kvferry::testing
