// Daemons of mode mtls for the process tests, their certificates, and hand-offs between two of
// them.
#pragma once

#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>

#include "tests/proc/hand_off_daemons.h"
#include "tests/unit/test_certificates.h"

namespace kvferry::testing {

using bench::DaemonProcess;
using client::TransferState;

inline std::string read_file(const std::string& path) {
  std::ifstream in(path);
  std::stringstream text;
  text << in.rdbuf();
  return text.str();
}

// Everything that a command prints on standard output.
inline std::string output_of(const std::string& command) {
  std::string out;
  FILE* const pipe = ::popen(command.c_str(), "r");
  REQUIRE(pipe != nullptr);
  char buffer[4096];
  for (std::size_t got = 0; (got = ::fread(buffer, 1, sizeof buffer, pipe)) > 0;)
    out.append(buffer, got);
  ::pclose(pipe);
  return out;
}

// Daemons by name in a directory of their own. NAME's identity is spiffe://kvferry.test/NAME.
struct Scene {
  std::string directory;
  std::map<std::string, uint16_t> ports;
  std::map<std::string, std::unique_ptr<DaemonProcess>> daemons;
  std::map<std::string, std::unique_ptr<Party>> parties;

  Scene() {
    char name[] = "/tmp/kvferry-mtls.XXXXXX";
    REQUIRE(::mkdtemp(name) != nullptr);
    directory = name;
  }
  ~Scene() {
    parties.clear();
    for (auto& [name, daemon] : daemons)
      if (daemon && daemon->pid() > 0) ::kill(daemon->pid(), SIGTERM);
    daemons.clear();
    std::error_code error;
    std::filesystem::remove_all(directory, error);
  }
  Scene(const Scene&) = delete;
  Scene& operator=(const Scene&) = delete;

  static std::string id(const std::string& name) { return "spiffe://kvferry.test/" + name; }
  std::string path(const std::string& name) const { return directory + "/" + name; }
  uint16_t port(const std::string& name) {
    uint16_t& port = ports[name];
    if (port == 0) port = DaemonProcess::find_port();
    return port;
  }
  // Certificates of an authority in `in`, made by the script.
  void certify(const std::string& names, const std::string& in = "certs") const {
    const std::string command =
        KVFERRY_SOURCE_DIR "/deploy/make-test-certs.sh " + path(in) + " " + names + " >/dev/null";
    REQUIRE(std::system(command.c_str()) == 0);
  }
  void write(const std::string& file, const std::string& text) const {
    // As careful writers do it: whole or not at all.
    std::ofstream(path(file + ".new")) << text;
    REQUIRE(::chmod(path(file + ".new").c_str(), 0600) == 0);
    std::filesystem::rename(path(file + ".new"), path(file));
  }
  void write(const std::string& name, const KeyPair& pair) const {
    write("certs/" + name + ".key", pair.key);
    write("certs/" + name + ".pem", pair.certificate);
  }

  std::string peer(const std::string& identity, const std::string& at,
                   const std::string& mode = "mtls") {
    return "[[peers]]\nidentity = \"" + identity +
           "\"\naddresses = [\"127.0.0.1:" + std::to_string(port(at)) + "\"]\nmode = \"" + mode +
           "\"\n";
  }
  struct How {
    std::string mode = "mtls";
    std::string certificates = "certs";  // where its own are
    std::vector<std::string> settings = {};
  };
  // Starts it and does not wait.
  DaemonProcess& launch(const std::string& name, const std::string& peers, const How& how) {
    bench::DaemonOptions options;
    options.binary_directory = binary_directory();
    const std::string mine = path(how.certificates + "/" + name);
    options.settings = {"arena.bytes=32MiB", "arena.segment_bytes=16MiB",
                        "engine.chunk_bytes=64KiB", "peer.mode=" + how.mode};
    if (how.mode == "mtls" || peers.find("\"mtls\"") != std::string::npos)
      for (const std::string& setting :
           {"peer.certificate_file=" + mine + ".pem", "peer.key_file=" + mine + ".key",
            "peer.ca_file=" + path(how.certificates + "/ca.pem")})
        options.settings.push_back(setting);
    options.settings.insert(options.settings.end(), how.settings.begin(), how.settings.end());
    daemons[name].reset();
    DaemonProcess::Identity identity;
    identity.name = name;
    identity.peer_port = port(name);
    identity.toml = peers.empty() ? "# nobody\n" : peers;
    auto daemon = DaemonProcess::start(directory, identity, options);
    require_ok(daemon);
    daemons[name] = std::move(*daemon);
    return *daemons[name];
  }
  DaemonProcess& start(const std::string& name, const std::string& peers) {
    return start(name, peers, How{});
  }
  DaemonProcess& start(const std::string& name, const std::string& peers, const How& how) {
    DaemonProcess& daemon = launch(name, peers, how);
    if (const auto serving = daemon.wait_until_serving(); !serving)
      FAIL(serving.error().to_string());
    return daemon;
  }
  // a and b, who know each other.
  void start_both() {
    start("a", peer(id("b"), "b"));
    start("b", peer(id("a"), "a"));
  }
  // What a daemon that ends at once has said.
  std::string refusal(const std::string& name, const How& how) {
    const auto serving = launch(name, peer(id("b"), "b"), how).wait_until_serving();
    REQUIRE_FALSE(serving);
    CHECK(serving.error().reason == "DAEMON_ENDED");
    return serving.error().message;
  }

  // A worker of one rank at `name`.
  Party& attach(const std::string& name, bool sends) {
    Party::Options options;
    options.instance = sends ? "prefill" : "decode";
    options.socket = daemons.at(name)->socket();
    options.shape = small_shape();
    const auto parsed = bench::parse_topology("tp1");
    require_ok(parsed);
    options.topology = *parsed;
    options.sends = sends;
    options.seed = sends ? 1 : 2;
    auto party = Party::make(options);
    require_ok(party);
    parties[name] = std::move(*party);
    return *parties[name];
  }
  std::string log(const std::string& name) const { return read_file(daemons.at(name)->log_file()); }
  std::string logs() const {
    std::string out;
    for (const auto& [name, daemon] : daemons) out += daemon->log_tail();
    return out;
  }
  std::string peers_of(const std::string& name) const {
    return output_of(KVFERRY_CTL " --socket " + daemons.at(name)->admin_socket() + " peers --json");
  }
  // When the certificate in force begins and ends, as the metrics have it and as the file says.
  std::vector<double> validity(const std::string& name) const {
    const DaemonProcess& daemon = *daemons.at(name);
    return {metric(daemon, "kvferry_certificate_start_timestamp_seconds"),
            metric(daemon, "kvferry_certificate_expiry_timestamp_seconds")};
  }
  std::vector<double> validity_of_file(const std::string& file) const {
    std::vector<double> out;
    for (const char* which : {"-startdate", "-enddate"})
      out.push_back(
          std::stod(output_of("date +%s -d \"$(openssl x509 -noout " + std::string(which) +
                              " -in " + path(file) + " | cut -d= -f2)\"")));
    return out;
  }
  double links(const std::string& name) const { return metric(*daemons.at(name), "kvferry_links"); }
  std::size_t count(const std::string& name, const std::string& words) const {
    const std::string text = log(name);
    std::size_t times = 0;
    for (std::size_t at = 0; (at = text.find(words, at)) != std::string::npos; ++at) ++times;
    return times;
  }
};

inline std::string name_of_end(const client::TransferStatus& status) {
  return std::string(name_of(status.state)) + " " + std::string(status.reason);
}

// A sender at a, a receiver at b, and transfers between them.
struct HandOff {
  Scene& scene;
  Party& sender;
  Party& receiver;
  std::string ticket;

  explicit HandOff(Scene& in)
      : scene(in), sender(in.attach("a", true)), receiver(in.attach("b", false)) {
    const auto got = sender.ticket();
    require_ok(got);
    ticket = *got;
  }
  // A first slice has arrived; the rest stays out.
  TransferKey half_way() {
    receiver.clean();
    const TransferKey key = new_key("prefill");
    Party::Send slice;
    slice.tokens = client::TokenRange{0, 256};
    slice.last = false;
    require_ok(sender.send(key, slice));
    require_ok(receiver.receive(key, ticket, {}));
    INFO(scene.logs());
    REQUIRE(comes_true([&] {
      const auto status = receiver.rank(0).status(receiver.handle(key.id, 0));
      return status && (status->slices > 0 || is_terminal(status->state));
    }));
    return key;
  }
  void finish(const TransferKey& key) {
    Party::Send slice;
    slice.index = 1;
    slice.tokens = client::TokenRange{256, 512};
    require_ok(sender.send(key, slice));
    CHECK(receiver_end(key) == "COMPLETED NONE");
    const auto sent = sender.wait(key.id, kPatience);
    require_ok(sent);
    CHECK(name_of_end(sent->front()) == "DELIVERED NONE");
    CHECK(receiver.verify() == "");
  }
  std::string receiver_end(const TransferKey& key) {
    const auto ended = receiver.wait(key.id, kPatience);
    require_ok(ended);
    return name_of_end(ended->front());
  }
  void require_good() {
    INFO(scene.logs());
    finish(half_way());
  }
  // How a transfer ends for its receiver that may find no link.
  std::string try_it() {
    receiver.clean();
    const TransferKey key = new_key("prefill");
    require_ok(sender.send(key, {}));
    Party::Receive receive;
    receive.wait = milliseconds(3000);
    require_ok(receiver.receive(key, ticket, receive));
    const std::string end = receiver_end(key);
    (void)sender.rank(0).cancel(sender.handle(key.id, 0));
    CHECK((receiver.verify() == "") == (end == "COMPLETED NONE"));
    return end;
  }
};

}  // namespace kvferry::testing
